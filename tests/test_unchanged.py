"""What nobody touched is not read again, and nothing else is spared."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from conftest import TINY, Run, World

import kd_cache.score.unchanged
from kd_cache import FeatureSource
from kd_cache.dataset.features import Feature


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose features were read. Files are believed at once, however new: the tests cannot wait."""
    monkeypatch.setattr(kd_cache.score.unchanged, "SETTLED", 0)
    return counted(monkeypatch)


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
