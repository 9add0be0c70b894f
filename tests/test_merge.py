"""``kd-cache merge``: what machines scored apart becomes the cache that one of them would have made alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, Run, World
from store_fixtures import flip, no_file_over, rewrite, snapshot

from kd_cache.care import merge
from kd_cache.keys import sample_key
from kd_cache.store.index import read_index
from kd_cache.store.pack import open_pack

OTHER_RUN = ("begun", "generation", "created", "digest", "settings", "shown_path", "environment", "manifest")


def cache_at(world: World, root: str) -> Path:
    return world.root / root / "A2b"


def rows_of(path: Path) -> dict[str, bytes]:
    """Everything in a cache but its index, and the temporary records of dumps."""
    return {name: content for name, content in snapshot(path).items() if name != "cache_index.json"}


def record_of(path: Path) -> dict[str, Any]:
    """What the index says, but for when, where and by which options the rows were scored."""
    record = json.loads((path / "cache_index.json").read_text())["kd_cache"]
    return {key: value for key, value in record.items() if key not in OTHER_RUN}


def same_cache(one: Path, other: Path) -> None:
    assert rows_of(one) == rows_of(other)
    assert record_of(one) == record_of(other)
    samples = [json.loads((path / "cache_index.json").read_text())["num_samples"] for path in (one, other)]
    assert samples[0] == samples[1]


@pytest.fixture
def parts(dump: Run, world: World) -> list[str]:
    """``whole/A2b`` by one process, and the same in three parts, each in a root of its own."""
    assert dump("--cache-root", "whole").exit_code == 0
    for number in range(3):
        assert dump("--shard", f"{number}/3", "--cache-root", f"part{number}").exit_code == 0
    return [f"part{number}/A2b" for number in range(3)]


@pytest.fixture
def merged(run: Run) -> Run:
    """Merge into ``cache/A2b``."""

    def call(*args: object, code: int = 0) -> Any:
        result = run("merge", *args, "--target", "b")
        assert result.exit_code == code, result.output
        return result

    return call


def weights(world: World, seed: int) -> str:
    (world.root / "weights.txt").write_text(str(seed))
    return f"tiny_teachers:linear,ckpt={world.root / 'weights.txt'}"


# -- the same as one dump ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_parts_made_apart_become_the_cache_of_one_dump_and_are_only_read(
    dump: Run, merged: Run, world: World, parts: list[str], order: list[int]
) -> None:
    def state() -> dict[str, tuple[int, int, int]]:
        folders = [world.root / part for part in parts]
        found = [path for folder in folders for path in (folder, *folder.rglob("*"))]
        return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in found}

    before = state()
    merged(*[parts[number] for number in order])
    same_cache(world.cache, cache_at(world, "whole"))
    assert state() == before
    assert json.loads(dump("--json").stdout)["samples_scored"] == 0


def test_the_index_holds_where_the_merge_ran_and_verify_needs_no_options(
    run: Run, merged: Run, world: World, parts: list[str]
) -> None:
    world.json_path.rename(world.root / "here.json")  # the sources remember another machine's paths
    merged(*parts, "--json-path", "here.json")
    index = json.loads((world.cache / "cache_index.json").read_text())
    for file in world.permitted():
        expected = np.load(cache_at(world, "whole") / "tiny" / f"{sample_key(file)}.npy")
        np.testing.assert_array_equal(np.load(index["tiny"][file]), expected)
    assert run("verify", "--all", "--recompute", *TINY).exit_code == 0
    assert index["kd_cache"]["settings"]["paths"]["json_path"] == str(world.root / "here.json")


def test_a_source_adds_to_a_destination_that_is_finished_already(
    run: Run, dump: Run, merged: Run, world: World
) -> None:
    dump("--cache-root", "whole")
    run("dump", "--target", "b", "--json-path", world.json_path, *TINY, "--only", "tiny")
    merged("whole/A2b", "--only", "other")
    assert rows_of(world.cache) == rows_of(cache_at(world, "whole"))
    merged("whole/A2b")
    assert set(read_index(world.cache / "cache_index.json").origins) == {"tiny", "other"}


def test_samples_that_only_a_source_has_are_added(dump: Run, merged: Run, world: World) -> None:
    world.add(50, "b", "train", frames=48)
    world.write()
    dump("--cache-root", "whole")
    file = world.rows.pop()
    world.write()
    dump()
    world.rows.append(file)
    world.write()
    merged("whole/A2b")
    assert world.packs() == {p.name: p.read_bytes() for p in (cache_at(world, "whole") / "packs").iterdir()}
    assert (world.cache / "plan.json").read_bytes() == (cache_at(world, "whole") / "plan.json").read_bytes()


def test_merging_twice_changes_nothing(merged: Run, world: World, parts: list[str]) -> None:
    merged(*parts, parts[0])
    before = snapshot(world.cache)
    merged(*parts)
    merged("whole/A2b", "--only", "tiny")
    assert rows_of(world.cache) == {name: content for name, content in before.items() if name != "cache_index.json"}
    same_cache(world.cache, cache_at(world, "whole"))


def test_a_merge_without_view_makes_none(merged: Run, world: World, parts: list[str]) -> None:
    merged(*parts, "--no-files")
    assert not (world.cache / "tiny").exists()
    assert world.packs() == {p.name: p.read_bytes() for p in (cache_at(world, "whole") / "packs").iterdir()}


def test_it_says_what_came_from_where(merged: Run, parts: list[str]) -> None:
    content = json.loads(merged(*parts, "--json").stdout)
    assert [source["source"] for source in content["sources"]] == parts
    assert sum(source["rows"]["tiny"] for source in content["sources"]) == 20
    assert all(source["not_permitted"] == {"tiny": 0, "other": 0} for source in content["sources"])
    assert content["published"]["rows"] == {"tiny": 20, "other": 20}
    shown = merged(*parts).stdout
    assert "part1/A2b: other" in shown


# -- what is not permitted, or not there ------------------------------------------------------------------------------


def test_rows_that_the_manifest_does_not_permit_stay_behind_and_are_counted(
    dump: Run, merged: Run, world: World, parts: list[str]
) -> None:
    gone = {world.permitted()[number] for number in (1, 7, 15)}
    world.rows = [row for row in world.rows if row["file"] not in gone]
    world.write()
    dump("--cache-root", "fewer")
    content = json.loads(merged(*parts, "--json").stdout)
    assert sum(source["not_permitted"]["tiny"] for source in content["sources"]) == 3
    for pack in (world.cache / "packs").iterdir():
        assert not gone & set(open_pack(pack).files)
    # With fewer samples of a shape, a dump scores in other batches; which samples are there is the same.
    assert set(snapshot(world.cache / "tiny")) == set(snapshot(cache_at(world, "fewer") / "tiny"))
    for name, content in snapshot(world.cache / "tiny").items():
        assert content == (cache_at(world, "whole") / "tiny" / name).read_bytes()


def test_a_source_without_a_permitted_row_brings_none(dump: Run, merged: Run, world: World) -> None:
    for number in range(3):
        dump("--shard", f"{number}/3", "--cache-root", f"part{number}")
    held = {file for pack in (cache_at(world, "part1") / "packs").glob("tiny-*") for file in open_pack(pack).files}
    world.rows = [row for row in world.rows if row["file"] not in held]
    world.write()
    content = json.loads(merged("part1/A2b", "part0/A2b", "part2/A2b", "--json").stdout)
    assert content["sources"][0]["packs"] == 0
    assert content["sources"][0]["rows"] == content["sources"][0]["not_permitted"]
    assert content["published"]["rows"]["tiny"] == 20 - len(held)


def test_parts_that_are_missing_are_a_miss_and_may_follow_later(
    run: Run, merged: Run, world: World, parts: list[str]
) -> None:
    result = merged(parts[0], parts[2], code=3)
    assert "What was merged is kept" in result.stderr
    assert not (world.cache / "cache_index.json").exists()
    merged(parts[1])
    same_cache(world.cache, cache_at(world, "whole"))


def test_what_no_source_has_can_be_dumped(dump: Run, merged: Run, world: World, parts: list[str]) -> None:
    merged(parts[0], code=3)
    content = json.loads(dump("--json").stdout)
    assert 0 < content["samples_scored"] < 20
    assert rows_of(world.cache) == rows_of(cache_at(world, "whole"))


def test_stale_rows_are_not_taken(merged: Run, world: World, parts: list[str]) -> None:
    world.write_feature(world.permitted()[3], np.ones((12, 20), np.float32))
    assert world.permitted()[3] in merged(*parts, code=3).stderr


def test_samples_that_could_not_be_scored_are_listed_as_missing(dump: Run, run: Run, merged: Run, world: World) -> None:
    world.feature(world.permitted()[4]).write_bytes(b"broken")
    for number in range(2):
        dump("--shard", f"{number}/2", "--cache-root", f"part{number}", "--on-bad-sample", "skip")
    result = merged("part0/A2b", "part1/A2b", code=3)
    assert world.permitted()[4] in result.stdout
    assert list(read_index(world.cache / "cache_index.json").missing) == [world.permitted()[4]]


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(merged: Run, world: World, code: int, *args: object) -> str:
    """The message; and nothing was written."""
    before = snapshot(world.root)
    message: str = merged(*args, code=code).stderr
    assert snapshot(world.root) == before
    return message


def test_other_weights_are_refused_by_name_unless_other_teachers_are_asked_for(
    run: Run, dump: Run, merged: Run, world: World
) -> None:
    dump("--cache-root", "whole")
    run("dump", "--target", "b", "--json-path", world.json_path, *TINY[2:], "--teacher", f"tiny={weights(world, 9)}",
        "--only", "tiny", "--only", "other", "--cache-root", "second")  # fmt: skip
    for pair in (("whole/A2b", "second/A2b"), ("second/A2b", "whole/A2b")):
        message = refused(merged, world, 5, *pair)
        assert "tiny: the rows in" in message
        assert "weights: " in message
    merged("whole/A2b", "second/A2b", "--only", "other")
    assert list(read_index(world.cache / "cache_index.json").origins) == ["other"]


def test_other_weights_in_the_destination_are_refused(run: Run, dump: Run, merged: Run, world: World) -> None:
    dump("--cache-root", "whole")
    run("dump", "--target", "b", "--json-path", world.json_path, "--teacher", f"tiny={weights(world, 9)}",
        "--only", "tiny")  # fmt: skip
    assert "cache/A2b and in whole/A2b" in refused(merged, world, 5, "whole/A2b")
    merged("whole/A2b", "--only", "other")
    assert set(read_index(world.cache / "cache_index.json").origins) == {"tiny", "other"}


def test_a_finished_source_gives_what_it_serves_and_not_what_it_is_being_rescored_with(
    run: Run, dump: Run, merged: Run, world: World
) -> None:
    dump("--cache-root", "whole")
    run("dump", "--target", "b", "--json-path", world.json_path, "--teacher", f"tiny={weights(world, 9)}",
        "--only", "tiny", "--shard", "0/2", "--cache-root", "whole")  # fmt: skip
    merged("whole/A2b")
    assert rows_of(world.cache).items() <= rows_of(cache_at(world, "whole")).items()


def break_pack(path: Path) -> None:
    flip(next((path / "packs").glob("tiny-*")), -5)


def break_pending(path: Path) -> None:
    record = next((path / "pending").glob("*.json"))
    record.write_bytes(record.read_bytes()[:-4])


def lose_pending(path: Path) -> None:
    shutil.rmtree(path / "pending")


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [(break_pack, 4, "is damaged"), (break_pending, 4, "is damaged"), (lose_pending, 3, "it has no cache_index.json")],
)
def test_a_source_that_cannot_be_vouched_for_is_refused_whole(
    merged: Run, world: World, parts: list[str], change: Callable[[Path], None], code: int, told: str
) -> None:
    change(cache_at(world, "part1"))
    assert told in refused(merged, world, code, *parts)


def test_damage_of_a_teacher_that_is_not_asked_for_is_no_obstacle(merged: Run, world: World, parts: list[str]) -> None:
    break_pack(cache_at(world, "part1"))
    merged(*parts, "--only", "other")
    assert list(read_index(world.cache / "cache_index.json").origins) == ["other"]


def test_rows_under_wrong_keys_are_not_merged(dump: Run, merged: Run, world: World) -> None:
    dump("--cache-root", "whole")
    path = next((cache_at(world, "whole") / "packs").glob("tiny-*"))
    pack = open_pack(path)
    label = {row["file"]: row["scene_label"] for row in world.rows}
    logits = np.zeros_like(pack.logits)
    logits[np.arange(len(pack)), [label[file] for file in pack.files]] = (
        1  # a cache that is always right was not dumped
    )
    rewrite(pack, logits)
    assert "logits are joined to wrong rows" in refused(merged, world, 4, "whole/A2b")


def test_the_guard_comes_first(merged: Run, world: World, parts: list[str]) -> None:
    break_pack(cache_at(world, "part1"))
    world.rows[0]["split"] = "test"
    world.rows.append({**world.rows[0], "split": "train"})
    world.write()
    assert "stand in another split too" in refused(merged, world, 6, *parts)


@pytest.mark.parametrize("link", [False, True])
def test_the_destination_is_no_source(cached: World, merged: Run, world: World, link: bool) -> None:
    (world.root / "link").symlink_to(world.cache)
    assert "the destination itself" in refused(merged, world, 2, "link" if link else "cache/A2b")


def test_no_source_is_a_usage_error(run: Run) -> None:
    assert run("merge", "--target", "b").exit_code == 2
    assert run("merge", "somewhere").exit_code == 2


def test_other_batch_sizes_are_noted_and_the_first_are_kept(dump: Run, merged: Run, world: World) -> None:
    dump("--shard", "0/2", "--cache-root", "part0", "--batch-size", 4)
    dump("--shard", "1/2", "--cache-root", "part1", "--batch-size", 2)
    result = merged("part0/A2b", "part1/A2b")
    assert "part1/A2b was scored in batches of other sizes" in result.stderr
    assert (world.cache / "plan.json").read_bytes() == (cache_at(world, "part0") / "plan.json").read_bytes()


def test_a_sample_scored_twice_with_other_bits_is_reported(dump: Run, merged: Run, world: World) -> None:
    for root in ("one", "two"):
        dump("--cache-root", root)
    path = next((cache_at(world, "two") / "packs").glob("tiny-*"))
    pack = open_pack(path)
    logits = pack.logits.copy()
    logits[5] += np.float32(1e-5)
    rewrite(pack, logits)
    result = merged("one/A2b", "two/A2b")
    assert "1 samples were scored twice with different bits" in result.stderr
    assert pack.files[5] in result.stderr
    # Also where the one is in the destination already.
    shutil.rmtree(world.cache)
    shutil.copytree(cache_at(world, "one"), world.cache)
    assert pack.files[5] in merged("two/A2b").stderr


# -- faults -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_gc_leaves_what_an_interrupted_merge_brought(
    run: Run, dump: Run, merged: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump("--cache-root", "whole")
    run("dump", "--target", "b", "--json-path", world.json_path, *TINY, "--only", "tiny")
    with monkeypatch.context() as patched:

        def die(*_: Any) -> None:
            raise Killed

        patched.setattr(merge, "seal_cache", die)
        with pytest.raises(Killed):
            run("merge", "whole/A2b", "--target", "b")
    brought = world.packs("other")
    assert brought
    assert run("gc", "--older-than", 0).exit_code == 0
    assert world.packs("other") == brought


def test_a_copy_that_is_not_the_original_is_never_put_in_place(
    merged: Run, world: World, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merge._chunks

    def rotten(path: Path) -> Any:
        for chunk in real(path):
            changed = bytearray(chunk)
            changed[len(changed) // 2] ^= 1
            yield bytes(changed) if path.parent.parent.name == "A2b" and "part" in str(path) else chunk

    monkeypatch.setattr(merge, "_chunks", rotten)
    result = merged(*parts, code=1)
    assert "is not what was copied" in result.stderr
    assert os.listdir(world.cache / "packs") == []


def test_a_full_disk_is_a_store_error_and_leaves_no_temporary(
    run: Run, merged: Run, world: World, parts: list[str]
) -> None:
    smallest = min(path.stat().st_size for path in (cache_at(world, "whole") / "packs").iterdir())
    with no_file_over(smallest - 1):
        result = run("merge", "whole/A2b", "--target", "b")
    assert result.exit_code == 1
    assert "cannot write cache/A2b/packs/" in result.stderr
    assert os.strerror(errno.EFBIG) in result.stderr
    assert not list(world.cache.rglob(".tmp-*"))
    merged(*parts)
    same_cache(world.cache, cache_at(world, "whole"))


def test_a_source_that_cannot_be_read_is_named(
    merged: Run, world: World, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> Any:
        if path.name.startswith("tiny-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    real = merge.open_file
    monkeypatch.setattr(merge, "open_file", broken)
    result = merged(*parts, code=1)
    assert f"cannot read {parts[0]}/packs/tiny-" in result.stderr
