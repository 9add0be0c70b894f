"""What nobody touched is not read again, and nothing else is spared."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Run, World

import kd_cache.score.cached_rows
import kd_cache.score.unchanged
from kd_cache import FeatureSource
from kd_cache.dataset.features import Feature
from kd_cache.files.file_systems import file_systems, is_network


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose features were read. Files are believed at once, however new: the tests cannot wait."""
    monkeypatch.setattr(kd_cache.score.unchanged, "SETTLED", 0)
    monkeypatch.setattr(kd_cache.score.unchanged, "SAMPLED", 0)
    monkeypatch.setattr(kd_cache.score.cached_rows, "_SAMPLES", 0)  # it scores some cached rows again
    on_file_system(monkeypatch, "ext4")
    return counted(monkeypatch)


def on_file_system(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    class Everywhere(dict[int, str]):
        def get(self, device: int, default: str = "") -> str:  # type: ignore[override]
            return kind

    monkeypatch.setattr(kd_cache.score.unchanged, "file_systems", Everywhere)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    reading = FeatureSource.read

    def counting(self: FeatureSource, file: str) -> Feature:
        asked.append(file)
        return reading(self, file)

    monkeypatch.setattr(FeatureSource, "read", counting)
    return asked


@pytest.fixture
def dumped(dump: Run, read: list[str]) -> Run:
    """A dump without verification, which reads features of its own."""

    def call(*args: object) -> object:
        read.clear()
        result = dump("--num-verify", 0, *args)
        assert result.exit_code == 0, result.output
        return result

    call()
    return call  # type: ignore[return-value]


def test_a_rerun_a_part_and_a_dry_run_read_nothing_that_nobody_touched(
    dumped: Run, world: World, read: list[str]
) -> None:
    assert sorted(read) == sorted(world.permitted())
    for options in (["--json"], ["--dry-run", "--json"], ["--shard", "1/2"]):
        result = dumped(*options)
        assert read == []
        if "--json" in options:
            told = json.loads(result.stdout)["teachers"]["tiny"]
            assert (told["scored"], told["skipped"]) == (0, len(world.permitted()))
    dumped("--reread")
    assert sorted(read) == sorted(world.permitted())


def test_a_feature_that_was_just_written_is_not_believed_yet(
    dump: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = counted(monkeypatch)
    for _ in range(2):
        read.clear()
        world.write_feature(world.permitted()[0], np.zeros((12, 20), np.float32))
        assert dump("--num-verify", 0).exit_code == 0
        assert world.permitted()[0] in read


def test_a_touched_feature_is_read_and_still_fresh(dumped: Run, world: World, read: list[str]) -> None:
    file = world.permitted()[0]
    os.utime(world.feature(file))
    result = dumped("--json")
    assert read == [file]
    assert json.loads(result.stdout)["samples_scored"] == 0
    dumped()
    assert read == []


def test_a_feature_changed_behind_a_restored_time_is_scored_again(dumped: Run, world: World, read: list[str]) -> None:
    file = world.permitted()[0]
    before = world.feature(file).stat()
    array = np.load(world.feature(file))
    with world.feature(file).open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(np.float32(array[-1, -1] + 1).tobytes())
    os.utime(world.feature(file), ns=(before.st_atime_ns, before.st_mtime_ns))
    after = world.feature(file).stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    result = dumped("--json")
    assert read == [file]
    assert json.loads(result.stdout)["teachers"]["tiny"]["rescored"] == {"its feature changed": 1}


def test_another_file_under_the_same_name_is_read(dumped: Run, world: World, read: list[str]) -> None:
    file = world.permitted()[0]
    copy = world.feature(file).with_suffix(".copy")
    shutil.copy2(world.feature(file), copy)
    copy.replace(world.feature(file))
    dumped()
    assert read == [file]


@pytest.mark.parametrize("damage", ["gone", "flipped", "truncated", "a folder", "empty"])
def test_without_good_notes_everything_is_read(dumped: Run, world: World, read: list[str], damage: str) -> None:
    notes = world.cache / "seen.bin"
    content = bytearray(notes.read_bytes())
    notes.unlink()
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        notes.write_bytes(content)
    elif damage == "truncated":
        notes.write_bytes(content[:-1])
    elif damage == "empty":
        notes.touch()
    elif damage == "a folder":
        notes.mkdir()
    dumped()
    assert sorted(read) == sorted(world.permitted())


def test_rows_that_are_gone_are_scored_again_to_the_same_bytes(dumped: Run, world: World, read: list[str]) -> None:
    packs = world.packs("tiny")
    for name in packs:
        (world.cache / "packs" / name).unlink()
    dumped()
    assert sorted(read) == sorted(world.permitted())
    assert world.packs("tiny") == packs


def test_one_sample_among_unchanged_ones_gets_the_bytes_it_had(dumped: Run, world: World, read: list[str]) -> None:
    packs = world.packs("tiny")
    file = sorted(world.permitted())[3]
    array = np.load(world.feature(file))
    world.write_feature(file, array + 1)
    dumped("--batch-size", 4)
    assert world.packs("tiny") != packs
    world.write_feature(file, array)
    dumped("--batch-size", 4)
    assert read == [file]
    assert world.packs("tiny") == packs


def test_another_teacher_reads_what_one_has_scored(dumped: Run, world: World, read: list[str]) -> None:
    dumped("--teacher", "third=tiny_teachers:other", "--only", "third")
    assert sorted(read) == sorted(world.permitted())
    dumped("--teacher", "third=tiny_teachers:other", "--only", "third")
    assert read == []


def test_a_sample_that_is_no_longer_permitted_is_forgotten(dumped: Run, world: World, read: list[str]) -> None:
    size = (world.cache / "seen.bin").stat().st_size
    gone = world.rows.pop(0)
    world.write()
    world.write_feature(file := world.permitted()[0], np.zeros((12, 20), np.float32))
    dumped()
    assert read == [file]
    assert (world.cache / "seen.bin").stat().st_size == size - 80
    assert gone["file"] not in read


def test_verify_and_repair_read_every_feature(dumped: Run, world: World, read: list[str], run: Run) -> None:
    read.clear()
    assert run("verify", "--all", *TINY[:2]).exit_code == 0
    assert sorted(read) == sorted(world.permitted())


def written_through_a_map(world: World, file: str) -> None:
    """Another value, while size, inode and times stay: some systems and clocks show a map's write late, or never."""
    array = np.load(world.feature(file))
    np.save(world.feature(file), array + np.float32(1))


@pytest.mark.parametrize("sampled", [20, 0])
def test_a_feature_that_changed_behind_all_its_numbers_is_found_by_the_sample(
    dumped: Run, world: World, read: list[str], monkeypatch: pytest.MonkeyPatch, sampled: int
) -> None:
    monkeypatch.setattr(kd_cache.score.unchanged, "SAMPLED", sampled)
    before = {file: os.lstat(world.feature(file)) for file in world.permitted()}
    written_through_a_map(world, world.permitted()[3])
    monkeypatch.setattr(
        os, "lstat", lambda path, real=os.lstat: before.get(os.path.relpath(path, world.root)) or real(path)
    )
    result = dumped("--json")
    rescored = json.loads(result.stdout)["teachers"]["tiny"]["rescored"]
    assert rescored == ({"its feature changed": 1} if sampled else {})
    assert ("every feature is read" in result.stderr) == bool(sampled)


def test_a_sample_says_how_sure_it_makes_one(dumped: Run, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd_cache.score.unchanged, "SAMPLED", 5)
    asked = set()
    for _ in range(3):
        said = dumped().stderr
        assert "20 features are unchanged" in said
        assert "5 of them, drawn at random, were read and are as noted (99% sure that fewer than 60.2% of all" in said
        assert len(read) == 5
        asked.add(tuple(read))
    assert len(asked) > 1  # drawn anew each time


@pytest.mark.parametrize(
    ("kind", "rested", "count"), [("tmpfs", 0, 20), ("nfs4", 0, 0), ("nfs4", 1 << 62, 20), ("ext4", 1 << 62, 0)]
)
def test_files_in_memory_and_files_on_a_network_that_are_young_are_read(
    dumped: Run, read: list[str], monkeypatch: pytest.MonkeyPatch, kind: str, rested: int, count: int
) -> None:
    on_file_system(monkeypatch, kind)
    monkeypatch.setattr(kd_cache.score.unchanged, "NETWORK_SETTLED", rested)
    dumped()
    assert len(read) == count


def test_this_systems_file_systems_are_known_by_their_devices() -> None:
    kinds = file_systems()
    assert kinds.get(Path("/proc").stat().st_dev) == "proc"
    assert [is_network(kind) for kind in ("fuse.sshfs", "cifs", "nfs4", "ext4", "xfs")] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.fixture
def parted(dumped: Run, world: World, read: list[str], monkeypatch: pytest.MonkeyPatch) -> World:
    """Two parts, not sealed, each with notes of its own."""
    shutil.rmtree(world.cache)
    for part in ("1/2", "0/2"):
        dumped("--shard", part)
    assert len(list((world.cache / "pending").glob("*.seen"))) == 2
    monkeypatch.setattr(kd_cache.score.unchanged, "SAMPLED", 256)
    read.clear()
    return world


SEAL = ("seal", "--target", "b", "--json")


def test_a_seal_reads_only_what_its_parts_did_not(
    parted: World, run: Run, dumped: Run, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drawn of what they read; and what they noted is known to the dump that comes after."""
    assert run(*SEAL).exit_code == 0
    assert read == []
    assert not list((parted.cache / "pending").iterdir())
    monkeypatch.setattr(kd_cache.score.unchanged, "SAMPLED", 0)
    dumped()
    assert read == []
    changed = parted.permitted()[2]
    np.save(parted.feature(changed), np.zeros((12, 20), np.float32))
    assert run(*SEAL).exit_code == 3
    assert read == [changed]


@pytest.mark.parametrize("damage", ["flipped", "gone", "changed"])
def test_a_seal_reads_what_notes_do_not_tell(parted: World, run: Run, read: list[str], damage: str) -> None:
    notes = next((parted.cache / "pending").glob("*.seen"))
    if damage == "flipped":
        content = bytearray(notes.read_bytes())
        content[-1] ^= 1
        notes.write_bytes(content)
    elif damage == "gone":
        notes.unlink()
    else:
        os.utime(parted.feature(parted.permitted()[2]))
    assert run(*SEAL).exit_code == 0
    assert len(read) == (1 if damage == "changed" else 10)
    read.clear()
    assert run(*SEAL, "--inputs", "read").exit_code == 0
    assert len(read) == 20


def test_notes_go_with_their_record_and_none_is_left_behind(parted: World, run: Run, read: list[str]) -> None:
    """A writer killed between a record and its notes, or between their removals."""
    orphan, _ = (parted.cache / "pending").glob("*.seen")
    orphan.with_suffix(".json").unlink()
    assert run(*SEAL).exit_code == 0
    assert len(read) == 10
    assert list((parted.cache / "pending").iterdir()) == [orphan]
    assert run("gc", "--older-than", "0").exit_code == 0
    assert not list((parted.cache / "pending").iterdir())


def test_a_dump_of_everything_goes_by_the_notes_of_parts_and_keeps_them(
    parted: World, dumped: Run, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kd_cache.score.unchanged, "SAMPLED", 0)
    for _ in range(2):
        dumped()
        assert read == []
    assert not list((parted.cache / "pending").iterdir())


def test_rows_can_be_taken_as_scored_where_no_feature_is_at_hand(parted: World, run: Run, read: list[str]) -> None:
    """One feature has changed since, and its rows are as the part read it. Whoever looks at the cache is told."""
    for file in parted.permitted():
        parted.feature(file).unlink()
    assert run(*SEAL).exit_code == 1
    read.clear()
    told = run(*SEAL, "--inputs", "as-scored")
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["published"]["num_samples"] == 20
    assert read == []
    assert not list((parted.cache / "pending").iterdir())
    assert "as-scored" in run("info", "cache").stdout
    assert "as-scored" in run("verify", *TINY[:2]).stderr


def test_what_is_taken_as_scored_is_what_was_read_last_or_nothing(
    parted: World, run: Run, dumped: Run, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A feature changed between two runs of a part: its older rows are not taken, and none where nobody can tell."""
    monkeypatch.setattr(kd_cache.score.unchanged, "SAMPLED", 0)
    file = parted.permitted()[2]
    parted.write_feature(file, np.ones((12, 20), np.float32))
    for part in ("0/2", "1/2"):
        dumped("--shard", part)
    expected = shutil.copytree(parted.cache, parted.root / "other" / "A2b")
    for notes in (expected / "pending").glob("*.seen"):
        notes.unlink()
    refused = run(*SEAL, "--inputs", "as-scored", "--cache-root", "other")
    assert refused.exit_code == 5
    assert file in refused.stderr
    assert run(*SEAL, "--inputs", "as-scored").exit_code == 0
    rows = parted.packs()
    assert run(*SEAL).exit_code == 0
    assert parted.packs() == rows
    assert "as-scored" not in run("info", "cache").stdout
