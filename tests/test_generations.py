"""What readers are served is one generation, whole, until the next one stands; what writers do meanwhile is theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Run, World
from store_fixtures import Rows, md5

from kd_cache import LogitCache
from kd_cache.store.index import read_index
from kd_cache.store.pack import open_pack

SMALL = ("--shard-size", 1, "--batch-size", 2)
ONE = (*TINY[:2], "--only", "tiny")


@pytest.fixture
def one(run: Run, world: World) -> Run:
    """Dump ``world`` with the teacher ``tiny`` alone."""
    return lambda *args: run("dump", "--target", "b", "--json-path", world.json_path, *ONE, *args)


def served(world: World) -> dict[tuple[str, str], bytes]:
    """What readers are given, by teacher and file; each teacher has all rows that the index promises."""
    found = {}
    for name in read_index(world.cache / "cache_index.json").origins:
        cache = LogitCache.open(world.cache, [name], strict=True)
        found |= {(name, file): row.numpy().tobytes() for file, row in zip(cache.files, cache.tensor(), strict=True)}
    return found


def by_key(world: World) -> list[str]:
    """The permitted files in the order in which they are scored."""
    return sorted(world.permitted(), key=md5)


def away(world: World, files: list[str]) -> Callable[[], None]:
    """Move features out of reach; gives the way back."""
    for file in files:
        world.feature(file).rename(world.feature(file).with_suffix(".away"))
    return lambda: [world.feature(file).with_suffix(".away").rename(world.feature(file)) for file in files] and None


def another_root(world: World) -> list[object]:
    """A data root with features of the same names and other content; the last that is scored cannot be read."""
    root = world.root / "another"
    for number, file in enumerate(by_key(world)):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / file, np.full((12, 20), number, np.float32))
    (root / by_key(world)[-1]).write_bytes(b"no array")
    return ["--data-root", root]


# -- an unfinished dump takes nothing ----------------------------------------------------------------------------------


def test_what_an_unfinished_dump_committed_takes_no_row_from_readers(cached: World, dump: Run, world: World) -> None:
    """The wrong data root, stopped after its first commits."""
    before, packs = served(world), world.packs()
    assert dump(*another_root(world), *SMALL).exit_code == 1
    assert len(world.packs("tiny")) > 1
    assert served(world) == before
    counts = json.loads(dump("--json").stdout)["teachers"]
    assert {name: count["skipped"] for name, count in counts.items()} == {"tiny": 20, "other": 20}
    assert (served(world), world.packs()) == (before, packs)


def test_rows_scored_twice_with_other_bits_are_told_of_and_the_named_packs_stay(
    cached: World, run: Run, dump: Run, world: World
) -> None:
    """A backup of another cache restored into the folder: the same teacher and features, other bits."""
    before = served(world)
    named = read_index(world.cache / "cache_index.json").record["teachers"]["tiny"]["pack"]
    pack = open_pack(world.cache / "packs" / named)
    for seed in range(8):  # some of them come before the named pack by name
        rows = Rows(pack.files, pack.keys, pack.inputs, pack.logits + np.float32(1 + seed)).part(range(seed + 1))
        rows.write(pack.path.parent, pack.origin)
    assert min(world.packs("tiny")) < named
    told = run("verify", "--target", "b", *TINY, "--json")
    assert told.exit_code == 1
    assert "8 samples were scored twice with different bits" in told.stdout
    assert served(world) == before
    assert dump("--num-verify", 0).exit_code == 0
    assert served(world) == before
    assert run("verify", "--target", "b", *TINY).exit_code == 0


def test_a_wrong_row_in_a_pack_that_no_index_names_is_found_and_repaired(
    cached: World, run: Run, dump: Run, world: World
) -> None:
    assert dump(*another_root(world), *SMALL).exit_code == 1
    before = served(world)
    path = next(Path(world.cache, "packs", name) for name in world.packs("tiny") if name != named(world, "tiny"))
    forge_row(path)
    assert run("verify", "--target", "b", *TINY).exit_code == 4
    repaired = run("repair", "--target", "b", *TINY)
    assert repaired.exit_code == 0, repaired.output
    assert served(world) == before


def named(world: World, teacher: str) -> str:
    pack: str = read_index(world.cache / "cache_index.json").record["teachers"][teacher]["pack"]
    return pack


def forge_row(path: Path) -> None:
    """The right digest of a pack, and logits that no checksum is of."""
    from store_fixtures import forge, plain_pack

    pack = open_pack(path)
    rows = Rows(pack.files, pack.keys, pack.inputs, pack.logits)
    path.unlink()

    def build(file: object) -> None:
        plain_pack(file, rows, pack.origin)  # type: ignore[arg-type]
        file["logits"][0] = 7  # type: ignore[index]

    forge(path.parent, build, teacher=pack.origin.teacher)


# -- features that cannot be read just now -----------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [False, True])
def test_a_row_stays_whose_feature_cannot_be_read_just_now(
    cached: World, one: Run, world: World, changed: bool
) -> None:
    """Also the rows of a teacher that was not asked. One whose feature is another goes: that is known."""
    before = served(world)
    back = away(world, world.permitted()[::2])
    another = world.permitted()[1]
    if changed:
        world.write_feature(another, np.ones((12, 20), np.float32))
    result = one("--on-bad-sample", "skip", "--num-verify", 0)
    assert result.exit_code == 3
    for name in ("tiny", "other"):
        assert f"{name}: 10 rows were kept although their features cannot be read now" in result.stderr
    index = read_index(world.cache / "cache_index.json")
    assert index.missing == {}
    after = served(world)
    differing = {key for key in before if before[key] != after.get(key)}
    assert differing == ({("tiny", another), ("other", another)} if changed else set())
    back()
    assert json.loads(one("--json").stdout)["teachers"]["tiny"]["skipped"] == 20
