"""Dumping views: a commit is of one view, a sealed row holds all of them, and no byte tells how they came about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, Run, World
from test_parts import taken
from test_views import POLICY
from tiny_teachers import Linear

from kd_cache import LogitCache
from kd_cache.dataset.views import Policy
from kd_cache.store.pack import open_pack

POLICY_FILE = {**POLICY, "crop": {"frames": [8, 12]}}


@pytest.fixture
def views(dump: Run, world: World) -> Run:
    (world.root / "policy.yaml").write_text(yaml.safe_dump(POLICY_FILE))
    return lambda count, *more: dump("--views", count, "--policy", world.root / "policy.yaml", *more)


def scored(result) -> dict[str, int]:
    return {name: each["scored"] for name, each in json.loads(result.stdout)["teachers"].items()}


def test_rows_hold_what_the_teacher_gives_for_each_augmented_input(
    views: Run, dump: Run, run: Run, world: World
) -> None:
    assert dump("--no-files").exit_code == 0
    clean = open_pack(next((world.cache / "packs").glob("tiny-*.h5")))
    shutil.rmtree(world.cache)
    result = views(3)
    assert result.exit_code == 0, result.output
    with h5py.File(next((world.cache / "packs").glob("tiny-*.h5"))) as pack:
        names = np.split(pack["files"][:], pack["file_offsets"][1:-1].astype(int))
        logits, draws, policy = pack["logits"][:], pack["draws"][:], Policy.of(POLICY_FILE)
        assert json.loads(pack.attrs["parts"])["view_policy"] == policy.text
        assert pack["views"][:].tolist() == [0, 1, 2]
    assert logits.shape == (20, 3, 10)
    assert (logits[:, 0] == clean.logits).all()
    for row, name in enumerate(bytes(name).decode() for name in names):
        for view in range(3):
            array, drawn = policy.augmented(name, view, np.load(world.feature(name)))
            assert (draws[row, view] == drawn).all()
            assert np.allclose(logits[row, view], array.mean(axis=0) @ Linear(1).weight.numpy(), atol=1e-5)
    audit = run("verify", "--target", "b", "--all", "--recompute", *TINY)
    assert audit.exit_code == 0, audit.output
    again = views(3, "--json")
    assert scored(again) == {"tiny": 0, "other": 0}


def test_parts_and_later_views_give_the_bytes_of_one_process(views: Run, run: Run, world: World) -> None:
    assert views(4, "--batch-size", 4).exit_code == 0
    whole = taken(world.cache)
    for number in (2, 0, 3, 1):
        how = ("--shard", f"{number}/4", "--workers", number % 2, "--shard-size", 1 + number, "--batch-size", 4)
        assert views(4, *how).exit_code == 0
    assert run("seal", "--target", "b").exit_code == 0
    assert taken(world.cache) == whole

    assert views(2, "--batch-size", 4).exit_code == 0
    more = views(4, "--batch-size", 4, "--json")
    assert scored(more) == {"tiny": 40, "other": 40}
    assert taken(world.cache)[0] == whole[0]


def test_a_missing_view_is_named(views: Run, run: Run, world: World) -> None:
    assert all(views(3, "--shard", part).exit_code == 0 for part in ("0/2", "1/2"))
    packs = {path: open_pack(path) for path in (world.cache / "packs").glob("tiny-*.h5")}
    gone = next(path for path, pack in packs.items() if pack.origin.views == (1,))
    file = packs[gone].file(0)
    count = len(packs[gone])
    gone.unlink()
    result = run("seal", "--target", "b")
    assert result.exit_code == 3
    assert f"{file} (view 1)" in result.stderr
    assert f"tiny: {count} permitted samples have no row" in result.stderr
    assert views(3).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--views", "2"), "belong together"),
        (("--policy", "policy.yaml"), "belong together"),
        (("--views", "2", "--policy", "policy.yaml", "--files"), "rows of views, are no vectors"),
        (("--views", "1", "--policy", "policy.yaml"), "has rows of 2 views here, 1 were asked for"),
    ],
)
def test_what_is_refused(views: Run, dump: Run, arguments: tuple[str, ...], why: str) -> None:
    if "asked" in why:
        assert views(2).exit_code == 0
    result = dump(*arguments)
    assert result.exit_code == 2
    assert why in result.stderr


def test_a_shape_that_no_view_can_have_names_the_sample(views: Run, world: World, run: Run, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("name: images\nclasses: 10")
    np.save(world.root / "image.npy", np.zeros((3, 4, 5), np.float32))
    (tmp_path / "images.json").write_text(
        json.dumps({"train": [{"file": "image.npy", "label": 1}], "val": [], "test": []})
    )
    arguments = ("--task", "task.yaml", "--json-path", "images.json", "--views", "2", "--policy", "policy.yaml")
    result = run("dump", *arguments, "--teacher", "tiny=tiny_teachers:linear", "--only", "tiny")
    assert result.exit_code == 1
    assert "image.npy has the shape [3, 4, 5]" in result.stderr


def test_every_command_that_touches_rows_keeps_their_views(views: Run, run: Run, world: World, tmp_path: Path) -> None:
    assert views(2).exit_code == 0
    whole = world.packs()
    path = world.cache / "packs" / next(iter(whole))
    teachers = [argument for argument in TINY if argument != "--only"]

    damaged = bytearray(whole[path.name])
    damaged[-20] ^= 1
    path.write_bytes(damaged)
    assert run("verify", "--target", "b", "--all", *teachers).exit_code == 4
    repaired = run("repair", "--target", "b", *teachers)
    assert repaired.exit_code == 0, repaired.output
    assert world.packs() == whole

    assert run("merge", world.cache, "--target", "b", "--cache-root", tmp_path / "other").exit_code == 0
    assert {each.name: each.read_bytes() for each in (tmp_path / "other/A2b/packs").iterdir()} == whole
    assert run("diff", world.cache, tmp_path / "other" / "A2b").exit_code == 0
    assert run("export", world.cache, "--to", "pt", "--output", tmp_path / "out").exit_code == 0
    cache = LogitCache.open(world.cache, ["tiny"])
    assert (torch.load(tmp_path / "out/tiny.pt") == cache.batch(cache.all_rows())[:, 0]).all()
    info = json.loads(run("info", world.cache, "--json").stdout)
    assert "view_policy" in json.dumps(info)
