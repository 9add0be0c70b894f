"""A teacher's rows in several packs: how a seal divides them, who reads them, and what is opened of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from conftest import TINY, Run, World
from store_fixtures import Rows, flip, flipping, names, origin

from kd_cache import LogitCache
from kd_cache.errors import UsageError
from kd_cache.options import byte_size
from kd_cache.store import cache as cache_module
from kd_cache.store.cache import CacheFolder
from kd_cache.store.pack import open_pack
from kd_cache.store.preamble import Span
from kd_cache.store.union import Union, merge_packs

SCENE = origin()
MANY = Rows.of(names(300))
SEAL = ("seal", "--target", "b")


def served(cache: Path) -> dict[str, bytes]:
    opened = LogitCache.open(cache)
    return {file: row.numpy().tobytes() for file, row in zip(opened.files, opened.batch(opened.files), strict=True)}


def named(world: World, teacher: str = "tiny") -> list[Any]:
    record = json.loads((world.cache / "cache_index.json").read_text())["kd_cache"]
    return list(record["teachers"][teacher]["packs"])


def test_equal_rows_give_equal_packs_by_the_first_bits_of_their_keys(tmp_path: Path) -> None:
    """Whatever parts they come from: the rows of one pack, in twice as many until none is expected to be too large."""
    whole = open_pack(MANY.write(tmp_path, SCENE))
    made = []
    for cut in (1, 7):
        folder = tmp_path / f"cut {cut}"
        folder.mkdir()
        parts = [open_pack(MANY.part(range(at, 300, cut)).write(folder, SCENE)) for at in range(cut)]
        made.append(merge_packs(folder, Union(parts), MANY.keys, MANY.inputs, pack_bytes=4000).paths)
    assert [path.read_bytes() for path in made[0]] == [path.read_bytes() for path in made[1]]
    packs = [open_pack(path) for path in made[0]]
    assert [len({key[0] >> 5 for key in pack.keys}) for pack in packs] == [1] * 8
    for column in ("keys", "inputs", "checksums", "logits", "files_blob"):
        assert np.concatenate([getattr(pack, column) for pack in packs]).tobytes() == getattr(whole, column).tobytes()
    assert Union(packs)._order is None  # they follow each other: nothing was sorted
    few = merge_packs(tmp_path, Union(packs), MANY.keys[:1], MANY.inputs[:1], pack_bytes=10)
    assert [len(open_pack(path)) for path in few.paths] == [1]  # empty prefixes make no pack


def test_a_cache_of_several_packs_is_served_verified_mended_and_gone_on_with(
    cached: World, dump: Run, run: Run, world: World
) -> None:
    before, one = served(world.cache), world.packs()
    result = run(*SEAL, "--pack-bytes", "300B", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(named(world)) > 4
    assert [count for _, count in named(world)] == [
        len(open_pack(world.cache / "packs" / name)) for name, _ in named(world)
    ]
    assert served(world.cache) == before
    assert run("verify", "--target", "b", "--all", "--recompute", *TINY).exit_code == 0
    assert (
        run("info", world.cache).exit_code == run("export", "--to", "pt", "--output", "out", world.cache).exit_code == 0
    )
    several = world.packs()
    assert dump().exit_code == 0  # nothing is scored: every pack stays as it is
    assert run("gc", world.cache, "--older-than", 0).exit_code == 0
    assert world.packs() == several
    flip(world.cache / "packs" / named(world)[1][0])
    kept = {name: (world.cache / "packs" / name).stat().st_ino for name, _ in named(world)[2:]}
    assert run("verify", "--target", "b", "--all", *TINY).exit_code == 4
    assert run("repair", "--target", "b", *TINY).exit_code == 0
    assert world.packs() == several
    assert {name: (world.cache / "packs" / name).stat().st_ino for name in kept} == kept  # only the one was written
    (world.cache / "packs" / named(world)[0][0]).unlink()
    assert run("verify", "--target", "b", "--all", *TINY).exit_code == 3
    assert dump().exit_code == 0
    assert (served(world.cache), world.packs()) == (before, several)
    assert run(*SEAL, "--pack-bytes", "8GiB").exit_code == 0
    assert world.packs() == one


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("32MiB", 32 << 20), ("8GB", 8 * 10**9), ("3K", 0), ("0", 0), ("x", 0)]
)
def test_a_size_in_bytes_is_read_or_refused(text: str, size: int) -> None:
    if size:
        assert byte_size(text) == size
    else:
        with pytest.raises(UsageError, match="32MiB"):
            byte_size(text)


# -- what a part opens ------------------------------------------------------------------------------------------------


def test_a_part_opens_what_may_hold_its_keys_and_reads_512_bytes_of_the_rest(
    dump: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (0, 1, 3):
        assert dump("--shard", f"{number}/4", "--shard-size", 1).exit_code == 0
    others, opened = set(world.packs()), list[str]()
    genuine = cache_module.open_pack
    monkeypatch.setattr(cache_module, "open_pack", lambda path, *more: opened.append(path.name) or genuine(path, *more))
    assert dump("--shard", "2/4", "--shard-size", 1).exit_code == 0
    assert opened
    assert others.isdisjoint(opened)
    assert len(world.packs()) == 8  # one per part and teacher
    opened.clear()
    assert dump("--shard", "0/2").exit_code == 0  # nothing is left to score, and two packs become one
    assert len(opened) >= 4
    assert len(world.packs()) == 6


def test_no_bit_of_a_preamble_makes_a_wrong_row_of_it(tmp_path: Path) -> None:
    """Each flipped: the pack is found damaged, or left alone so that its rows are scored again."""
    (tmp_path / "packs").mkdir()
    path = MANY.part(range(100)).write(tmp_path / "packs", SCENE)
    folder = CacheFolder(tmp_path)
    inside, outside = Span.of(MANY.keys[50:60]), Span.of(MANY.keys[100:])
    assert [len(folder.packs(needed=span).good) for span in (inside, outside)] == [1, 0]
    with flipping(path) as flip_bit:
        for bit in range(8 * 512):
            flip_bit(bit)
            assert not folder.packs(needed=outside).good, bit
            found = folder.packs(needed=inside)
            assert (found.good, [*found.damaged]) == ([], [path]), bit
    content = path.read_bytes()
    other = struct.pack("<16s16sQ", MANY.keys[100].tobytes(), MANY.keys[200].tobytes(), 100)
    path.write_bytes(content[:36] + other + struct.pack("<Q", xxhash.xxh3_64_intdigest(other)) + content[84:])
    assert vars(folder.packs(needed=inside)) == {
        "good": [],
        "damaged": {},
        "apart": [path],
    }  # its rows are scored again
    assert [*folder.packs(needed=outside).damaged] == [*folder.packs().damaged] == [path]
