"""`kd-cache seal`, the order in which anything is published, and the records of dumps that no index tells of yet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, Run, World
from store_fixtures import snapshot

import kd_cache.score.commits
import kd_cache.store.index
import kd_cache.store.publish
from kd_cache import LogitCache, load_manifest
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import write_index
from kd_cache.store.pack import open_pack
from kd_cache.store.pending import Age, PendingRecord, read_pending

SEAL = ("seal", "--target", "b")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "KD_CACHE_SHARD"):
        monkeypatch.delenv(name, raising=False)


def halves(dump: Run, *arguments: object) -> list[int]:
    return [dump("--shard", part, *arguments).exit_code for part in ("0/2", "1/2")]


def index_of(world: World) -> dict[str, Any]:
    return dict(json.loads((world.cache / "cache_index.json").read_bytes()))


def record_of(world: World) -> dict[str, Any]:
    return dict(index_of(world)["kd_cache"])


def index_bytes(world: World) -> bytes:
    return (world.cache / "cache_index.json").read_bytes()


def pending(world: World) -> list[Path]:
    folder = world.cache / "pending"
    return sorted(folder.glob("*.json")) if folder.exists() else []


def served(cache: Path) -> dict[str, bytes]:
    """The rows of a cache by file, teachers one after the other."""
    opened = LogitCache.open(cache)
    files = opened.files
    return {file: row.numpy().tobytes() for file, row in zip(files, opened.batch(files), strict=True)}


def weighing(world: World, weights: int, name: str = "tiny") -> tuple[object, ...]:
    """A dump with one teacher of these weights."""
    path = world.root / "weights.txt"
    path.write_text(str(weights))
    teacher = ("--teacher", f"{name}=tiny_teachers:linear,ckpt={path}", "--only", name)
    return ("dump", "--target", "b", "--json-path", world.json_path, *teacher)


# -- what it needs and what it leaves ---------------------------------------------------------------------------------


def test_a_seal_needs_neither_torch_nor_the_teachers_code(dump: Run, world: World, tmp_path: Path) -> None:
    """A process of its own, in which torch cannot be imported, and where nobody finds the teachers' module."""
    assert halves(dump) == [0, 0]
    program = "import sys; sys.modules['torch'] = None; from kd_cache.cli import main; main()"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program, *SEAL, "--cache-root", str(world.cache.parent), "--json"]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["published"]["num_samples"] == 20
    assert len(LogitCache.open(world.cache)) == 20


def test_a_seal_leaves_one_pack_per_teacher_and_no_record(dump: Run, run: Run, world: World) -> None:
    halves(dump, "--shard-size", 1)
    assert len(world.packs()) == 4
    assert len(pending(world)) == 2
    result = run(*SEAL, "--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert (content["permitted"], content["missing"]) == (20, {})
    assert content["published"]["rows"] == {"tiny": 20, "other": 20}
    assert sorted(name for named in content["published"]["packs"].values() for name in named) == sorted(world.packs())
    assert len(world.packs()) == 2
    assert pending(world) == []
    assert run("verify", "--target", "b", "--all", *TINY).exit_code == 0
    before = snapshot(world.cache)
    assert run(*SEAL).exit_code == 0
    assert snapshot(world.cache) == before, "again, there is nothing to do"


def test_a_seal_finds_manifest_and_features_by_what_the_dumps_saved(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Relative paths on the dumps' command lines, another folder for the seal."""
    for part in ("0/2", "1/2"):
        command = ("dump", "--target", "b", "--json-path", "dataset.json", "--data-root", ".", *TINY)
        assert run(*command, "--only", "tiny", "--shard", part).exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(*SEAL, "--cache-root", world.cache.parent).exit_code == 0
    assert len(LogitCache.open(world.cache)) == 20


def test_the_indexs_paths_are_of_the_cache_that_was_sealed(dump: Run, run: Run, world: World, tmp_path: Path) -> None:
    """A copy must never send existing code to the rows of the cache that it was copied from."""
    halves(dump)
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    assert run(*SEAL).exit_code == 0
    shutil.copytree(tmp_path / "cache", tmp_path / "again")
    for root in ("cache", "copy", "again", tmp_path / "copy"):
        assert run(*SEAL, "--cache-root", root).exit_code == 0
        index = json.loads((tmp_path / root / "A2b" / "cache_index.json").read_bytes())
        for file in world.permitted():
            assert index["tiny"][file].startswith(f"{root}/A2b/tiny/")
            assert np.load(index["tiny"][file]).shape == (10,)
        assert index["kd_cache"]["shown_path"] == f"{root}/A2b"


@pytest.mark.parametrize("first", ["--files", "--no-files"])
def test_a_view_is_made_as_the_dumps_said_or_as_asked(dump: Run, run: Run, world: World, first: str) -> None:
    halves(dump, first)
    for option, expected in ((), first == "--files"), (("--no-files",), False), ((), False), (("--files",), True):
        assert run(*SEAL, *option).exit_code == 0
        index = index_of(world)
        assert index["kd_cache"]["files"] == expected
        assert len(index["tiny"]) == len(list((world.cache / "tiny").glob("*.npy"))) == (20 if expected else 0)
        assert index["num_samples"] == len(LogitCache.open(world.cache)) == 20
    assert run(*SEAL).exit_code == 0
    assert record_of(world)["files"] is True


def test_an_option_that_is_given_takes_the_place_of_what_was_saved(dump: Run, run: Run, world: World) -> None:
    halves(dump)
    moved = world.root / "moved"
    shutil.copytree(world.root / "x", moved / "x")
    shutil.copy(world.json_path, moved / "other.json")
    shutil.rmtree(world.root / "x")
    assert run(*SEAL).exit_code == 1
    assert run(*SEAL, "--json-path", moved / "other.json", "--data-root", moved).exit_code == 0
    assert record_of(world)["manifest"]["path"] == str(moved / "other.json")


def test_samples_that_are_no_longer_permitted_are_left_out(dump: Run, run: Run, world: World) -> None:
    halves(dump)
    gone = [world.rows.pop(0)["file"] for _ in range(3)]
    world.write()
    result = run(*SEAL, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["published"]["left_out"] == {"tiny": 3, "other": 3}
    assert set(served(world.cache)) == set(world.permitted())
    for path in world.packs():
        assert not set(gone) & set(open_pack(world.cache / "packs" / path).files)


def test_a_sample_that_must_not_be_scored_stops_a_seal(dump: Run, run: Run, world: World) -> None:
    """The guard stands before everything: a location in train and in test."""
    halves(dump)
    before = snapshot(world.cache)
    row = dict(world.rows[0], split="test", file=world.rows[0]["file"].replace("-a.npy", "-b.npy"), device_id="b")
    world.rows.append(row | {"domain": 1})
    world.write()
    result = run(*SEAL)
    assert result.exit_code == 6, result.output
    assert snapshot(world.cache) == before


# -- what keeps it from sealing ---------------------------------------------------------------------------------------


def test_a_part_that_has_not_run_is_named_with_its_files_and_nothing_changes(dump: Run, run: Run, world: World) -> None:
    dump("--shard", "2/3")
    dump("--shard", "0/3")
    before = snapshot(world.cache)
    lost = set(world.permitted())
    for path in (world.cache / "packs").glob("tiny-*"):
        lost -= set(open_pack(path).files)
    result = run(*SEAL)
    assert result.exit_code == 3
    assert f"{len(lost)} permitted samples have no row" in result.stderr
    assert all(file in result.stderr for file in lost)
    assert "These parts have not run: 1/3." in result.stderr
    assert snapshot(world.cache) == before
    dump("--shard", "1/3")
    assert run(*SEAL).exit_code == 0


def test_a_feature_that_changed_after_its_part_is_missed(cached: World, dump: Run, run: Run, world: World) -> None:
    """Its row is stale: it must not be sealed as if it were that feature's."""
    before, rows = index_bytes(world), served(world.cache)
    file = world.permitted()[3]
    world.write_feature(file, np.ones((12, 20), np.float32))
    halves(dump)
    world.write_feature(file, np.zeros((12, 20), np.float32))
    result = run(*SEAL)
    assert result.exit_code == 3
    assert file in result.stderr
    assert "1 permitted samples have no row" in result.stderr
    assert index_bytes(world) == before
    found = served(world.cache)
    assert found == rows  # readers have the finished generation, whatever parts are under way
    assert halves(dump) == [0, 0]
    assert run(*SEAL).exit_code == 0
    assert served(world.cache).keys() == rows.keys()
    assert served(world.cache)[file] == bytes(2 * 10 * 4)


@pytest.mark.parametrize("how", ["gone", "malformed", "not finite"])
def test_a_feature_that_cannot_be_read_is_named(dump: Run, run: Run, world: World, how: str) -> None:
    halves(dump)
    file = world.permitted()[3]
    path = world.feature(file)
    {
        "gone": path.unlink,
        "malformed": lambda: path.write_bytes(b"\x93NUMPY"),
        "not finite": lambda: world.write_feature(file, np.full((12, 20), np.nan, np.float32)),
    }[how]()
    before = snapshot(world.cache)
    result = run(*SEAL)
    assert result.exit_code == 1
    assert file in result.stderr
    assert snapshot(world.cache) == before


def test_a_missing_sample_that_was_scored_later_is_missing_no_more(dump: Run, run: Run, world: World) -> None:
    files = world.permitted()
    good = world.feature(files[2]).read_bytes()
    world.feature(files[2]).write_bytes(b"no array")
    world.feature(files[13]).write_bytes(b"no array")
    halves(dump, "--on-bad-sample", "skip")
    world.feature(files[2]).write_bytes(good)
    halves(dump, "--on-bad-sample", "skip")
    result = run(*SEAL, "--json")
    assert result.exit_code == 3
    assert list(json.loads(result.stdout)["missing"]) == [files[13]]
    world.feature(files[13]).write_bytes(good)
    assert run(*SEAL).exit_code == 3, "mended, but nobody scored it"
    halves(dump)
    assert run(*SEAL).exit_code == 0
    assert record_of(world)["missing"] == {}
    assert len(served(world.cache)) == 20


# -- damage -----------------------------------------------------------------------------------------------------------


def test_with_every_record_lost_the_packs_say_what_there_is(cached: World, dump: Run, run: Run, world: World) -> None:
    rows = served(world.cache)
    shutil.rmtree(world.cache)
    halves(dump)
    shutil.rmtree(world.cache / "pending")
    result = run(*SEAL, "--json-path", world.json_path)
    assert result.exit_code == 0, result.output
    assert {name: set(row) for name, row in served(world.cache).items()} == {
        name: set(row) for name, row in rows.items()
    }
    assert run("verify", "--target", "b", "--json-path", world.json_path, "--all", *TINY).exit_code == 0
    assert run("info").exit_code == 0


@pytest.mark.parametrize("index", ["absent", "damaged"])
def test_without_a_word_which_weights_are_current_a_seal_refuses(run: Run, world: World, index: str) -> None:
    assert run(*weighing(world, 1)).exit_code == 0
    assert run(*weighing(world, 2)).exit_code == 0
    assert len(world.packs()) == 2
    path = world.cache / "cache_index.json"
    if index == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])
    before = snapshot(world.cache)
    result = run(*SEAL, "--json-path", world.json_path)
    assert result.exit_code == 4
    assert "2 fingerprints: which is current?" in result.stderr
    assert snapshot(world.cache) == before


def test_a_record_says_which_weights_are_current_where_the_index_is_damaged(run: Run, world: World) -> None:
    run(*weighing(world, 1))
    for part in ("0/2", "1/2"):
        run(*weighing(world, 2), "--shard", part)
    (world.cache / "cache_index.json").write_bytes(b"{")
    assert run(*SEAL).exit_code == 0
    sealed = served(world.cache)
    shutil.rmtree(world.cache)
    run(*weighing(world, 2))
    assert served(world.cache) == sealed


# -- several at once --------------------------------------------------------------------------------------------------


@contextmanager
def meanwhile(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any], times: int = 1, *, after: bool = False
) -> Iterator[list[bool]]:
    """Have ``act`` happen just before an index is put in place, or just after, the first times that one is."""
    write, done = kd_cache.store.publish.write_index, list[bool]()

    def writing(*args: Any, **kwargs: Any) -> Any:
        is_time = len(done) < times
        done.extend([True] * is_time)
        if is_time and not after:
            act()
        written = write(*args, **kwargs)
        if is_time and after:
            act()
        return written

    with monkeypatch.context() as patched:
        patched.setattr(kd_cache.store.publish, "write_index", writing)
        yield done


def dumping(world: World, name: str, *args: object) -> tuple[object, ...]:
    return ("dump", "--target", "b", "--json-path", world.json_path, *TINY, "--only", name, *args)


def both_are_there(world: World, run: Run) -> None:
    assert set(LogitCache.open(world.cache).teachers) == {"tiny", "other"}
    assert pending(world) == []
    assert run("verify", "--target", "b", "--all", *TINY).exit_code == 0


@pytest.mark.parametrize("by", ["dump", "seal"])
def test_what_ends_in_the_same_moment_as_a_dump_of_another_teacher_is_in_the_index_like_that(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    for part in ("0/2", "1/2") if by == "seal" else ():
        run(*dumping(world, "tiny", "--shard", part))
    with meanwhile(monkeypatch, lambda: run(*dumping(world, "other"))) as done:
        result = run(*SEAL) if by == "seal" else run(*dumping(world, "tiny"))
    assert (result.exit_code, done) == (0, [True]), result.output
    both_are_there(world, run)


def test_an_index_that_never_stops_changing_is_an_error_and_no_endless_loop(
    dump: Run, run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves(dump, "--no-files")

    def touch() -> None:
        write_index(world.cache / "cache_index.json", 0, {}, {"teachers": {}, "missing": {}})

    with meanwhile(monkeypatch, touch, times=10_000) as done:
        result = run(*SEAL)
    assert result.exit_code == 1
    assert "keeps changing" in result.stderr
    assert len(done) == 100
    assert run(*SEAL).exit_code == 0
    assert len(served(world.cache)) == 20


def test_an_index_that_another_process_replaces_in_the_same_moment_is_written_again(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked before either renamed. Who came first looks again before it is done."""
    assert run(*dumping(world, "tiny")).exit_code == 0
    with meanwhile(monkeypatch, overtaking(world), after=True) as done:
        assert run(*dumping(world, "other")).exit_code == 0
    assert done
    both_are_there(world, run)


def overtaking(world: World) -> Callable[[], Any]:
    """Puts the index as it is now in place again."""
    late, draft = index_bytes(world), world.cache / ".tmp-1-1"
    return lambda: draft.write_bytes(late) and draft.replace(world.cache / "cache_index.json")


def test_a_pack_that_another_process_names_meanwhile_stays_whatever_is_permitted_here(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        assert run(*weighing(world, seed), "--no-files").exit_code == 0
    overtake = overtaking(world)
    del world.rows[0]
    world.write()
    with meanwhile(monkeypatch, overtake, after=True) as done:
        assert run(*weighing(world, 1), "--no-files", "--num-verify", 0).exit_code == 0
    assert done
    assert len(served(world.cache)) == 20


def test_an_index_lost_in_the_last_moment_costs_no_row(run: Run, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last look and the rename there is a moment that no file system closes: the rows are still there."""
    write, done = kd_cache.store.index.write_atomic, []

    def late(path: Path, content: Any, before: Callable[[], None] | None = None) -> Any:
        def looked() -> None:
            if before is not None:
                before()
            if not done and path.name == "cache_index.json":
                done.append(True)
                assert run(*dumping(world, "other")).exit_code == 0

        return write(path, content, looked)

    with monkeypatch.context() as patched:
        patched.setattr(kd_cache.store.index, "write_atomic", late)
        result = run(*dumping(world, "tiny"))
    assert done
    assert result.exit_code == 0  # neither takes the other's view for its own
    result = run(*dumping(world, "other", "--json"))
    assert json.loads(result.stdout)["samples_scored"] == 0
    both_are_there(world, run)


# -- records ----------------------------------------------------------------------------------------------------------


def test_a_record_stands_before_the_first_pack_and_goes_with_the_index(
    dump: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seen = kd_cache.score.commits.write_pack, []

    def looking(directory: Path, origin: Any, *rest: Any, **options: Any) -> Path:
        (index,) = read_pending(CacheFolder(world.cache))[0]
        seen.append(index.origins[origin.teacher] == origin)
        return write(directory, origin, *rest, **options)

    monkeypatch.setattr(kd_cache.score.commits, "write_pack", looking)
    assert dump("--shard-size", 4).exit_code == 0
    assert len(seen) > 4
    assert all(seen)
    assert pending(world) == []


def test_a_record_says_all_that_a_seal_needs(dump: Run, world: World) -> None:
    dump("--shard", "1/2", "--dtype", "fp16", "--no-files")
    (index,) = read_pending(CacheFolder(world.cache))[0]
    record = index.record
    assert record["adaptation"] == "A2b"
    assert record["manifest"]["sha256"] == load_manifest(world.json_path).digest
    assert record["settings"]["paths"]["json_path"] == str(world.json_path)
    assert (record["files"], record["part"], record["shown_path"]) == (False, [1, 2], "cache/A2b")
    assert list(record["teachers"]) == ["tiny", "other"]
    assert record["teachers"]["tiny"]["storage_cost"]["rows"] == 10
    assert Age.of(record).generation == 1


def test_a_dump_that_scores_nothing_or_cannot_begin_leaves_no_record(dump: Run, run: Run, world: World) -> None:
    assert dump("--batch-size", 0).exit_code == 2
    assert dump("--dry-run").exit_code == 0
    assert dump("--shard", "0/2", "--dry-run").exit_code == 0
    teacher = ("--teacher", "bad=tiny_teachers:raises", "--only", "bad")
    assert run("dump", "--target", "b", "--json-path", world.json_path, *teacher).exit_code == 1
    assert pending(world) == []
    dump()
    assert dump().exit_code == 0
    assert pending(world) == []


def test_the_newest_weights_are_sealed_in_whatever_order_the_parts_ran(run: Run, world: World) -> None:
    """Old and new weights, both complete: what began later is current."""
    for weights, part in ((1, "0/2"), (2, "1/2"), (1, "1/2"), (2, "0/2")):
        assert run(*weighing(world, weights), "--shard", part).exit_code == 0
    assert run(*SEAL).exit_code == 0
    assert len(pending(world)) == 2, "a dump could go on from the old weights' rows"
    sealed = served(world.cache)
    shutil.rmtree(world.cache)
    run(*weighing(world, 2))
    assert served(world.cache) == sealed


def test_a_dump_of_another_teacher_does_not_overtake_parts_with_new_weights(
    cached: World, run: Run, world: World
) -> None:
    """The index is newer than the parts, but what it says of their teacher is older: it only carried that over."""
    for part in ("0/2", "1/2"):
        assert run(*weighing(world, 7, "other"), "--shard", part).exit_code == 0
    for _ in range(2):
        assert run(*dumping(world, "tiny")).exit_code == 0
    assert len(pending(world)) == 2
    before = LogitCache.open(world.cache)
    assert run(*SEAL).exit_code == 0
    after = LogitCache.open(world.cache)
    assert pending(world) == []
    assert before.fingerprints["tiny"] == after.fingerprints["tiny"]
    assert before.fingerprints["other"] != after.fingerprints["other"]
    assert run(*weighing(world, 7, "other"), "--json").stdout.count('"scored": 0') == 1
    assert LogitCache.open(world.cache).fingerprints == after.fingerprints


def test_what_an_older_record_says_of_a_teacher_that_was_dumped_again_is_overtaken(
    dump: Run, run: Run, world: World
) -> None:
    """The record stays for its other teacher."""
    assert halves(dump) == [0, 0]
    assert run(*weighing(world, 7)).exit_code == 0
    assert len(pending(world)) == 2
    current = LogitCache.open(world.cache).fingerprints["tiny"]
    assert run(*SEAL).exit_code == 0
    found = LogitCache.open(world.cache)
    assert set(found.teachers) == {"tiny", "other"}
    assert found.fingerprints["tiny"] == current
    assert len(pending(world)) == 2, "a dump could go on from tiny's rows of before"


def test_a_record_that_was_written_late_is_as_old_as_its_dump(run: Run, world: World) -> None:
    """A dump that began before others, and wrote its first rows after them, overtakes nobody and is not overtaken."""
    assert run(*weighing(world, 7), "--shard", "0/2").exit_code == 0
    (late,) = pending(world)
    kept = late.read_bytes()
    late.unlink()
    for part in ("0/2", "1/2"):
        assert run(*dumping(world, "other", "--shard", part)).exit_code == 0
    assert run(*SEAL).exit_code == 0
    late.write_bytes(kept)
    assert run(*dumping(world, "other")).exit_code == 0
    assert pending(world) == [late], "nobody but a dump of its own teacher may forget it"
    assert run(*weighing(world, 7), "--shard", "1/2").exit_code == 0
    assert run(*SEAL).exit_code == 0
    assert set(LogitCache.open(world.cache).teachers) == {"tiny", "other"}
    assert pending(world) == []


@pytest.mark.parametrize("when", ["while it scores", "while it ends"])
def test_the_record_of_a_newer_dump_outlives_an_older_ones_end(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A part with new weights runs just when a dump with the old ones, begun before, scores or ends."""
    command = weighing(world, 1)
    write, done = kd_cache.score.commits.write_pack, []

    def scoring(*args: Any, **options: Any) -> Path:
        if not done:
            done.append(True)
            assert run(*weighing(world, 2), "--shard", "0/2").exit_code == 0
        return write(*args, **options)

    if when == "while it scores":
        with monkeypatch.context() as patched:
            patched.setattr(kd_cache.score.commits, "write_pack", scoring)
            assert run(*command).exit_code == 0
    else:
        with meanwhile(monkeypatch, lambda: run(*weighing(world, 2), "--shard", "0/2")):
            assert run(*command).exit_code == 0
    assert len(pending(world)) == 1
    first = served(world.cache)
    assert run(*SEAL).exit_code == 3
    assert served(world.cache) == first
    assert run(*weighing(world, 2), "--shard", "1/2").exit_code == 0
    assert run(*SEAL).exit_code == 0
    assert pending(world) == []
    assert served(world.cache) != first


def test_a_dump_of_another_teacher_does_not_forget_which_weights_came_last(
    cached: World, run: Run, world: World
) -> None:
    """Old weights, new ones, and the old ones again: the index says the same as the last, but is older."""
    current = LogitCache.open(world.cache).fingerprints
    for part in ("0/2", "1/2"):
        run(*weighing(world, 7, "other"), "--shard", part)
    for part in ("0/2", "1/2"):
        run(*dumping(world, "other", "--shard", part))
    assert run(*dumping(world, "tiny")).exit_code == 0
    assert run(*SEAL).exit_code == 0
    assert LogitCache.open(world.cache).fingerprints == current
    assert len(pending(world)) == 2


def test_records_are_read_oldest_first_and_temporaries_and_strangers_are_left(world: World) -> None:
    folder = CacheFolder(world.cache)
    assert read_pending(folder) == ([], [])
    for number in (3, 1, 2):
        PendingRecord(folder, {}, {"begun": number}).write({}, {})
    (folder.pending_path / ".tmp-1-2.json").write_text("{")
    for name in ("notes.txt", "._0123456789abcdef.json", "0123456789abcdef (1).json"):
        (folder.pending_path / name).write_text("mine")
    assert [Age.of(index.record).begun for index in read_pending(folder)[0]] == [1, 2, 3]
    for value in (None, "x", 1.5, True):
        assert Age.of({"begun": value}) == (0, 0)
    assert Age.of({}) == (0, 0)


def test_parts_that_do_not_fit_together_are_named(run: Run, dump: Run, world: World) -> None:
    dump("--shard", "0/2")
    dump("--shard", "1/2", "--dtype", "fp16")
    result = run("seal", "--target", "b")
    assert result.exit_code == 3
    assert "Parts 0/2 and 1/2 of tiny differ (dtype: fp32 → fp16): dump one of them as the other" in result.stderr
