"""kd-cache removes only what it can prove that it wrote: whatever a user keeps in a cache or beside a run stays."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TINY, Run, World
from store_fixtures import snapshot

from kd_cache.keys import sample_key
from kd_cache.store.index import read_older_maps


def row_name(file: str) -> str:
    return f"{sample_key(file)}.npy"


@pytest.mark.parametrize("again", [("--no-skip-existing",), ("--no-files",), ("--shard", "0/1")])
def test_folders_of_the_user_s_in_a_cache_outlive_every_dump_and_seal(
    cached: World, dump: Run, run: Run, world: World, again: tuple[str, ...]
) -> None:
    """Copies of the view, and the features themselves under the names that rows have."""
    shutil.copytree(world.cache / "tiny", world.cache / "my_embeddings")
    (world.cache / "features").mkdir()
    lists = json.loads(world.json_path.read_text())
    for row in (row for rows in lists.values() for row in rows):
        row["location"], name = Path(row["file"]).stem, f"features/{row_name(row['file'])}"
        shutil.copy(world.feature(row["file"]), world.cache / name)
        row["file"] = name
    (world.cache / "dataset.json").write_text(json.dumps(lists))
    (world.cache / "linked").symlink_to(world.root / "x")
    kept = {name: snapshot(world.cache / name) for name in ("my_embeddings", "features", "linked")}
    here = (
        "dump",
        "--target",
        "b",
        "--json-path",
        world.cache / "dataset.json",
        *TINY,
        "--only",
        "tiny",
        "--only",
        "other",
    )
    for arguments in ((*here, *again), ("seal", "--target", "b"), ("gc", world.cache, "--older-than", "0"), (*here,)):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
    assert {name: snapshot(world.cache / name) for name in kept} == kept
    assert run("verify", *TINY, "--all").exit_code == 0


def test_files_that_stand_where_a_first_view_is_to_be_are_not_replaced(dump: Run, world: World) -> None:
    """A folder that is called as a teacher, with somebody's own files under the names of its rows."""
    mine = world.view("tiny", world.permitted()[0])
    mine.parent.mkdir(parents=True)
    np.save(mine, np.zeros((4, 4), np.float32))
    before = mine.read_bytes()
    refused = dump()
    assert refused.exit_code == 1
    assert all(word in refused.stderr for word in (mine.name, "The rows are saved", "--no-files"))
    assert mine.read_bytes() == before
    mine.write_bytes(b"")  # as a power cut may leave a row: nobody's
    assert json.loads(dump("--json").stdout)["samples_scored"] == 0
    assert np.load(mine).shape == (10,)


def test_an_older_script_s_other_teacher_outlives_the_dump_of_one(dump: Run, world: World) -> None:
    rows = {name: {} for name in ("tiny", "scene")}  # type: dict[str, dict[str, str]]
    for name, paths in rows.items():
        (world.cache / name).mkdir(parents=True)
        for file in world.permitted():
            paths[file] = f"cache/A2b/{name}/{row_name(file)}"
            np.save(world.cache / name / row_name(file), np.full(10, len(file), np.float32))
    index = world.cache / "cache_index.json"
    index.write_text(json.dumps(rows | {"num_samples": 20}))
    before = snapshot(world.cache / "scene")
    refused = dump()
    assert (refused.exit_code, "--no-skip-existing" in refused.stderr) == (5, True)
    done = dump("--no-skip-existing")
    assert done.exit_code == 0, done.output
    assert snapshot(world.cache / "scene") == before
    kept = world.cache / "cache_index.older.json"
    assert read_older_maps(kept) == rows
    assert kept.name in done.stderr


def test_a_run_and_published_weights_of_somebody_else_s_stay(tmp_path: Path) -> None:
    import torch

    from kd_cache.train.checkpoint import save_checkpoint
    from kd_cache.train.run_folder import RunFolder, publish
    from kd_cache.watch import Watcher

    folder = RunFolder.new(tmp_path, {}, {"key": "k"})
    (folder.path / "notes.txt").write_text("mine")
    folder.close()
    assert os.listdir(folder.path) == ["notes.txt"]
    ours = {"net.weight": torch.ones(2, 2)}
    save_checkpoint(tmp_path / "weights.safetensors", ours, {"role": "scene"})
    mine = {"net.weight": torch.zeros(2, 2)}
    torch.save(mine, tmp_path / "best.pth")
    save_checkpoint(tmp_path / "best.safetensors", mine, {})  # no record: anybody's
    before = {name: (tmp_path / name).read_bytes() for name in ("best.pth", "best.safetensors")}
    job: Any = SimpleNamespace(home=tmp_path, pth=False)
    publish(job, tmp_path / "weights.safetensors", {}, Watcher())
    assert (tmp_path / "best.safetensors").read_bytes() == (tmp_path / "weights.safetensors").read_bytes()
    assert not (tmp_path / "best.pth").exists()
    for name, content in before.items():
        stem, _, suffix = name.partition(".")
        assert (tmp_path / f"{stem}.earlier-1.{suffix}").read_bytes() == content
