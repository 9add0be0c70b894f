"""The samples table: parts share what the manifest and all features' headers say, and nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Run, World
from test_parts import SLOTTED, permanent, several_lengths, taken
from test_parts import told as index_of

import kd_cache.dataset.dataset
from kd_cache import FeatureSource
from kd_cache.dataset.samples_table import find_table
from kd_cache.dataset.task import DCASE
from kd_cache.store.cache import CacheFolder


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose headers were looked at for themselves."""
    asked: list[str] = []
    shape = FeatureSource.shape

    def counting(self: FeatureSource, file: str) -> tuple[int, ...]:
        asked.append(file)
        return shape(self, file)

    monkeypatch.setattr(FeatureSource, "shape", counting)
    return asked


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The manifests that were parsed."""
    asked: list[Path] = []
    load = kd_cache.dataset.dataset.load_manifest
    monkeypatch.setattr(
        kd_cache.dataset.dataset, "load_manifest", lambda path, **how: (asked.append(path), load(path, **how))[1]
    )
    return asked


def tables(world: World) -> list[Path]:
    return sorted((world.cache / "pending").glob("samples-*.bin"))


def test_a_manifest_of_lines_is_dumped_and_checked_as_the_same_list(
    dump: Run, run: Run, world: World, parsed: list[Path]
) -> None:
    assert dump().exit_code == 0
    files, _ = taken(world.cache)
    parsed.clear()
    lines = world.root / "dataset.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in world.rows))
    for part in ("0/2", "1/2"):
        told = ("--json-path", lines, *TINY, "--only", "tiny", "--only", "other", "--shard", part)
        assert run("dump", "--target", "b", *told).exit_code == 0
    assert parsed == [lines]
    assert run("seal", "--target", "b").exit_code == 0
    assert permanent(world.cache) == files
    assert run("check", "--json-path", lines).exit_code == run("check", "--json-path", world.json_path).exit_code


@pytest.mark.parametrize("first", ["made before", "by itself"])
def test_parts_read_no_header_of_others_and_no_manifest_and_are_sealed_to_the_bytes_of_one_process(
    dump: Run, run: Run, world: World, headers: list[str], parsed: list[Path], first: str
) -> None:
    several_lengths(world)
    arguments = (*SLOTTED, "--batch-size", 4, "--num-verify", 0)
    assert dump(*arguments).exit_code == 0
    files, index = taken(world.cache)
    if first == "made before":
        world.data().samples_table(CacheFolder(world.cache).pending_path)

    for number in (5, 0, 1, 7, 6, 2, 3, 4):
        headers.clear()
        parsed.clear()
        assert dump(*arguments, "--shard", f"{number}/8").exit_code == 0
        makes = first == "by itself" and number == 5
        assert sorted(headers) == (sorted(world.permitted()) if makes else [])
        assert len(parsed) == makes

    assert len(tables(world)) == 1
    assert run("seal", "--target", "b").exit_code == 0
    assert permanent(world.cache) == files  # the table is gone
    assert index_of(world.cache) == index


DIFFERENT: dict[str, Callable[[World], object]] = {
    "a flipped bit": lambda world: _flip(tables(world)[0]),
    "a truncated table": lambda world: os.truncate(tables(world)[0], 700),
    "an empty table": lambda world: os.truncate(tables(world)[0], 0),
    "a folder": lambda world: (tables(world)[0].unlink(), (world.cache / "pending" / "x").mkdir()),
    "another manifest": lambda world: (world.add(50, "A", "train"), world.write()),
    "another spelling of it": lambda world: world.json_path.write_text(world.json_path.read_text() + "\n"),
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_table_that_is_not_whole_or_of_something_else_is_none(
    dump: Run, world: World, parsed: list[Path], name: str
) -> None:
    assert dump("--shard", "1/2").exit_code == 0
    DIFFERENT[name](world)
    shutil.rmtree(world.cache / "packs")
    for times in (1, 0):
        parsed.clear()
        assert dump("--shard", "1/2").exit_code == 0
        assert len(parsed) == times


@pytest.mark.parametrize("way", ["manifest", "link"])
def test_the_guard_refuses_what_it_refuses_without_a_table(dump: Run, world: World, way: str) -> None:
    """A file in train and in test: the manifest says so now, or a folder that became a link."""
    world.rows.append({**world.rows[-1], "file": "y/other.npy", "split": "test"})
    if way == "link":
        world.rows[-1]["file"] = world.permitted()[0].replace("x/", "y/")
    world.write()
    allowed = ["--allow-shared-locations"] * (way == "link")
    assert dump("--shard", "0/2", *allowed).exit_code == 0
    assert len(tables(world)) == 1
    if way == "manifest":
        world.rows[-1]["file"] = world.permitted()[0]
        world.write()
    else:
        (world.root / "y").symlink_to("x")
    result = dump("--shard", "1/2", *allowed)
    assert result.exit_code == 6
    assert world.permitted()[0] in result.stderr


def test_a_teacher_that_was_trained_on_a_test_sample_is_refused_by_its_name(
    dump: Run, world: World, parsed: list[Path]
) -> None:
    """The manifest is parsed for it after all."""
    assert dump("--shard", "0/2").exit_code == 0
    parsed.clear()
    secret = next(row["file"] for row in world.rows if row["split"] == "test")
    path = world.root / "told.json"
    path.write_text(json.dumps([world.permitted()[0], secret]))
    result = dump("--shard", "1/2", "--teacher", f"told=test_provenance:from_file,ckpt={path}", "--only", "told")
    assert result.exit_code == 6
    assert secret in result.stderr
    assert len(parsed) == 1


def test_a_feature_of_another_shape_ends_the_table(dump: Run, run: Run, world: World, headers: list[str]) -> None:
    """What comes after it has another place in its batch than the table would give it."""
    several_lengths(world)
    data = world.data()
    data.samples_table(CacheFolder(world.cache).pending_path)
    world.write_feature(data.selection.by_key[3], np.ones((24, 20), np.float32))
    arguments = (*SLOTTED, "--batch-size", 4, "--num-verify", 0)
    assert dump(*arguments, "--shard", "0/3").exit_code == 0
    assert not tables(world)
    for part in ("1/3", "2/3"):
        assert dump(*arguments, "--shard", part).exit_code == 0
    assert run("seal", "--target", "b").exit_code == 0
    plan = (world.cache / "plan.json").read_bytes()
    files = permanent(world.cache)
    shutil.rmtree(world.cache)
    world.cache.mkdir()
    (world.cache / "plan.json").write_bytes(plan)  # made before the feature changed
    assert dump(*arguments).exit_code == 0
    assert permanent(world.cache) == files


def test_a_feature_that_was_mended_since_has_its_place(dump: Run, run: Run, world: World) -> None:
    several_lengths(world)
    arguments = (*SLOTTED, "--batch-size", 4, "--num-verify", 0)
    assert dump(*arguments).exit_code == 0
    files, _ = taken(world.cache)
    data = world.data()
    feature = world.feature(data.selection.by_key[2])
    content = feature.read_bytes()
    feature.write_bytes(b"no array")
    table = data.samples_table(CacheFolder(world.cache).pending_path)
    assert table is not None
    assert table.unreadable() == [2]
    feature.write_bytes(content)
    for part in ("2/3", "1/3", "0/3"):
        assert dump(*arguments, "--shard", part).exit_code == 0
    assert run("seal", "--target", "b").exit_code == 0
    assert permanent(world.cache) == files


def test_a_table_says_what_the_selection_says(world: World) -> None:
    several_lengths(world)
    pending = CacheFolder(world.cache).pending_path
    data = world.data()
    made = data.samples_table(pending)
    mapped = type(data).load("b", world.json_path, tables=pending, task=replace(DCASE))  # one that nobody has used
    assert made is not None
    assert mapped.table is not None
    assert data.table is None
    assert mapped.described == data.described
    assert mapped.selection.by_key[:] == list(mapped.selection.by_key) == data.selection.by_key
    assert mapped.selection.by_key[-1] == data.selection.by_key[-1]
    for name in ("keys", "labels", "order"):
        assert np.array_equal(getattr(mapped.selection, name), getattr(data.selection, name))
    assert list(mapped.manifest) == list(data.manifest)
    assert list(mapped.selection.samples) == list(data.selection.samples)
    assert sum(made.counts().values()) == len(world.permitted())
    before = made.path.read_bytes()
    made.remove()
    again = data.samples_table(pending)
    assert again is not None
    assert again.path.read_bytes() == before, "two that make it at once make the same"
    assert find_table(pending, again.path.name, world.root) is not None
    assert type(data).load("c", world.json_path, tables=pending).table is None
