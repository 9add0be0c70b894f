"""What readers are served is one generation, whole, until the next one stands; what writers do meanwhile is theirs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Run, World
from store_fixtures import Rows, md5

from kd_cache import LogitCache
from kd_cache.store.index import read_index
from kd_cache.store.pack import open_pack
from kd_cache.store.pending import Age

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


# -- which generation is current, and what stays of the others ---------------------------------------------------------


def weighing(world: World, seed: int) -> tuple[object, ...]:
    """A dump with these weights."""
    (world.root / f"w{seed}.txt").write_text(str(seed))
    teacher = ("--teacher", f"tiny=tiny_teachers:linear,ckpt={world.root}/w{seed}.txt", "--only", "tiny")
    return ("dump", "--target", "b", "--json-path", world.json_path, *teacher)


def fingerprint(world: World) -> str:
    return read_index(world.cache / "cache_index.json").origins["tiny"].fingerprint.digest


def pending(world: World) -> list[Path]:
    return sorted((world.cache / "pending").glob("*.json"))


@pytest.mark.parametrize("meanwhile", ["nothing", "old weights", "a sample less", "drop"])
def test_what_a_dump_of_new_weights_acknowledged_stays_until_it_is_dropped(
    run: Run, world: World, meanwhile: str
) -> None:
    assert run(*weighing(world, 1)).exit_code == 0
    last = by_key(world)[-1]
    content = world.feature(last).read_bytes()
    world.feature(last).write_bytes(b"no array")
    assert run(*weighing(world, 2), "--shard-size", 1).exit_code == 1
    world.feature(last).write_bytes(content)
    current = fingerprint(world)
    packs = [open_pack(world.cache / "packs" / name) for name in world.packs("tiny")]
    committed = {file for pack in packs if pack.origin.fingerprint.digest != current for file in pack.files}
    assert len(committed) > 2
    if meanwhile == "a sample less":
        gone = next(row for row in world.rows if row["file"] in committed)
        world.rows.remove(gone)
        committed.remove(gone["file"])
        world.write()
    if meanwhile != "nothing":
        again = run(*weighing(world, 1), "--json")
        assert json.loads(again.stdout)["samples_scored"] == 0
    drop = ("--drop-unfinished",) if meanwhile == "drop" else ()
    assert run("gc", world.cache, "--older-than", 0, *drop).exit_code == 0
    assert (fingerprint(world), pending(world) == []) == (current, meanwhile == "drop")
    counts = json.loads(run(*weighing(world, 2), "--json").stdout)["teachers"]["tiny"]
    assert counts["skipped"] == (0 if meanwhile == "drop" else len(committed))
    assert pending(world) == []


def test_a_clock_that_was_ahead_does_not_make_old_weights_current(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        now = time.time_ns()
        patch.setattr(time, "time_ns", lambda: now + 86_400 * 10**9)
        for part in ("0/2", "1/2"):
            assert run(*weighing(world, 1), "--shard", part).exit_code == 0
    assert run(*weighing(world, 2)).exit_code == 0
    current = fingerprint(world)
    assert run("seal", "--target", "b").exit_code == 0
    assert fingerprint(world) == current


def test_of_dumps_that_had_not_read_each_other_the_index_counts_or_the_user_says_which(run: Run, world: World) -> None:
    def unread(*command: object) -> Path:
        """Run a dump that no later one reads, until its record is put back."""
        assert run(*command).exit_code == 0
        (record,) = pending(world)
        return record.rename(world.root / record.name)

    first = unread(*weighing(world, 1), "--shard", "0/2")
    assert run(*weighing(world, 2), "--shard", "1/2").exit_code == 0
    first.rename(world.cache / "pending" / first.name)
    refused = run("seal", "--target", "b")
    assert refused.exit_code == 5
    assert "two dumps at the same time made rows of tiny with different fingerprints" in refused.stderr
    assert run(*weighing(world, 2), "--shard", "1/2").exit_code == 0  # as it says
    assert run("seal", "--target", "b").exit_code == 3, "one part of the weights that count is lacking"
    assert run(*weighing(world, 2), "--shard", "0/2").exit_code == 0
    assert run("seal", "--target", "b").exit_code == 0
    shutil.rmtree(world.cache)
    first = unread(*weighing(world, 1), "--shard", "0/2")
    assert run(*weighing(world, 2)).exit_code == 0
    current = fingerprint(world)
    first.rename(world.cache / "pending" / first.name)
    assert run("seal", "--target", "b").exit_code == 0
    assert (fingerprint(world), len(pending(world))) == (current, 1)


def test_runs_of_the_first_version_come_before_all_that_have_a_number() -> None:
    now = time.time_ns()
    ages = [Age(2, 3), Age.of({"generation": 1, "begun": 5}), Age.of({"begun": now + 1}), Age.of({"begun": now})]
    assert sorted(ages) == ages[::-1]
