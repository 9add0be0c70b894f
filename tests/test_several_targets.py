"""Several targets in one dump: what serves them all is scored once, and each cache is as good as if dumped alone."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, World
from store_fixtures import Rows, make_cache, names, origin
from test_provenance import from_file, row
from tiny_teachers import Linear
from train_fixtures import add_clip, scene, town

from kd_cache import LogitCache, MissingLogitsError, StaleError, UsageError, student_loader
from kd_cache.dataset.task import DCASE
from kd_cache.store.index import read_index
from kd_cache.train.checkpoint import read_weights

__all__ = ["from_file", "scene", "town"]
SEEN: dict[str, Counter[bytes]] = {}
"""By teacher: how often it was given each feature."""
STOP: list[int] = []
"""After how many batches a teacher is interrupted."""


class Counted(Linear):
    """Counts what it is given; ``seed`` makes its weights."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(seed)
        self.name = name

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        SEEN.setdefault(self.name, Counter()).update({row.numpy().tobytes() for row in features})
        if STOP and (STOP.append(STOP.pop() - 1), STOP[0])[1] < 0:
            raise KeyboardInterrupt
        return super().forward(features)


def shared(ckpt: Path | None) -> Counted:
    return Counted("shared", 7)


def own(ckpt: Path | None) -> Counted:
    """A teacher of one target; its checkpoint is that target's, and says so."""
    assert ckpt is not None
    return Counted(f"own {ckpt.stem}", int(ckpt.read_text()))


@pytest.fixture
def several(run: Run, world: World) -> Any:
    """Dump the world for some targets; a further option may replace these."""
    SEEN.clear()
    STOP.clear()
    for seed, target in enumerate("bc", start=1):
        (world.root / f"{target}.txt").write_text(str(seed))

    def call(targets: str, *more: object, root: str = "cache", code: int = 0) -> Any:
        result = run(
            "dump", "--target", targets, "--json-path", world.json_path, "--cache-root", world.root / root,
            "--teacher", "shared=test_several_targets:shared", "--only", "shared", "--only", "own", "--json",
            "--num-verify", 0, "--no-files" if targets == "b,c" else "--files",
            "--teacher", f"own=test_several_targets:own,ckpt={world.root}/{{target}}.txt", *more,
        )  # fmt: skip
        assert result.exit_code == code, result.output
        return result if code else json.loads(result.stdout)

    return call


def counted(world: World, name: str) -> set[str]:
    """The files that a teacher was given."""
    known = {np.load(world.feature(row["file"])).tobytes(): row["file"] for row in world.rows}
    return {known[content] for content in SEEN.get(name, ()) if content in known}


def rows(world: World, target: str, teacher: str, root: str = "cache") -> dict[str, np.ndarray]:
    folder = world.root / root / f"A2{target}"
    index = read_index(folder / "cache_index.json", maps=True)
    return {file: np.load(folder / teacher / Path(path).name) for file, path in index.maps[teacher].items()}


def is_sound(run: Run, world: World, targets: str = "b,c", root: str = "cache") -> None:
    teachers = ("--teacher", "shared=test_several_targets:shared",
                "--teacher", f"own=test_several_targets:own,ckpt={world.root}/{{target}}.txt")  # fmt: skip
    result = run("verify", "--all", "--recompute", "--target", targets, "--cache-root", world.root / root, *teachers)
    assert result.exit_code == 0, result.output


def test_each_sample_is_scored_once_and_rows_are_those_of_single_dumps(several: Any, run: Run, world: World) -> None:
    found = several("c,b")["targets"]
    assert list(found) == ["b", "c"]
    everyone = set(world.permitted()) | set(world.permitted("c"))
    assert counted(world, "shared") == everyone
    assert [counted(world, f"own {target}") for target in "bc"] == [set(world.permitted()), set(world.permitted("c"))]
    assert [found[target]["teachers"]["shared"]["scored"] for target in "bc"] == [20, 5]
    assert sum(found[target]["teachers"]["own"]["scored"] for target in "bc") == 20 + 17
    plans = [(world.root / f"cache/A2{target}/plan.json").read_bytes() for target in "bc"]
    assert plans[0] == plans[1]
    is_sound(run, world)
    for target in "bc":
        several(target, root="alone")
        for teacher in ("shared", "own"):
            mine, single = (rows(world, target, teacher, root) for root in ("cache", "alone"))
            assert mine.keys() == single.keys() == set(world.permitted(target))
            for file in mine:
                np.testing.assert_allclose(mine[file], single[file], rtol=1e-5, atol=1e-5)
        again = several(target)["teachers"]
        assert {name: (each["scored"], each["skipped"]) for name, each in again.items()} == dict.fromkeys(
            ("shared", "own"), (0, len(world.permitted(target)))
        )


@pytest.mark.parametrize(
    ("before", "options"),
    [
        ("", ("--dtype", "fp16")),
        ("c", ("--only", "shared")),
        ("c", ("--batch-size", "auto")),
        ("b,c", ("--no-skip-existing",)),
        ("b,c", ("--seed", 3)),
    ],
)
def test_options_and_what_is_cached_already_leave_each_sample_scored_once(
    several: Any, run: Run, world: World, before: str, options: tuple[object, ...]
) -> None:
    if before:
        several(before)
    SEEN.clear()
    dry = several("b,c", *options, "--dry-run")["targets"]
    assert not SEEN
    found = several("b,c", *options)["targets"]
    given = sum((Counter(SEEN.get(f"own {target}", ())) for target in "bc"), SEEN.get("shared", Counter()))
    assert given or before == "b,c"
    for name in found["b"]["teachers"]:
        made = {target: _scored(found[target], name) for target in "bc"}
        assert made == {target: _scored(dry[target], name) for target in "bc"}
        is_new = not before or options[0] in ("--no-skip-existing", "--dtype")
        alone = 17 if name == "own" else 5
        expected = {"b": 20, "c": alone} if is_new else {"b": 8 if name == "shared" else 20, "c": 0}
        assert made == (expected if is_new or before == "c" else {"b": 0, "c": 0})
    is_sound(run, world)


def _scored(report: dict[str, Any], name: str) -> int:
    each = report["teachers"][name]
    return int(each["scored"] + sum(each["rescored"].values()))


@pytest.mark.parametrize("after", [1, 26])
def test_killed_in_the_middle_a_rerun_goes_on(several: Any, run: Run, world: World, after: int) -> None:
    STOP.append(after)
    several("b,c", "--batch-size", 4, code=130)
    STOP.clear()
    before = {name: set(seen) for name, seen in SEEN.items()}
    SEEN.clear()
    found = several("b,c", "--batch-size", 4)["targets"]
    assert before
    assert sum(_scored(found[target], "shared") for target in "bc") < 25 or after == 1, "what was scored is kept"
    is_sound(run, world)
    single = {target: rows(world, target, "own") for target in "bc"}
    shutil.rmtree(world.root / "cache")
    several("b,c", "--batch-size", 4)
    for target in "bc":
        again = rows(world, target, "own")
        assert {file: row.tobytes() for file, row in again.items()} == {
            file: row.tobytes() for file, row in single[target].items()
        }


def test_an_error_of_one_target_leaves_the_others_caches_right(several: Any, run: Run, world: World) -> None:
    bad = next(file for file in world.permitted("c") if file.endswith("-c.npy"))
    content = world.feature(bad).read_bytes()
    world.feature(bad).write_bytes(content[:-8])
    assert bad in several("b,c", code=1).stderr
    is_sound(run, world, "b")
    assert not (world.root / "cache/A2c/cache_index.json").exists()
    assert several("b,c", "--on-bad-sample", "skip", code=3)
    world.feature(bad).write_bytes(content)
    found = several("b,c")["targets"]
    assert [_scored(found["c"], name) for name in ("shared", "own")] == [1, 1]
    is_sound(run, world)


def test_rows_of_other_features_or_weights_are_not_copied(several: Any, run: Run, world: World) -> None:
    several("c")
    changed = world.permitted()[0]
    world.write_feature(changed, np.ones((12, 20), np.float32))
    found = several("b,c")["targets"]
    assert _scored(found["b"], "shared") == 8 + 1
    assert found["c"]["teachers"]["shared"]["rescored"] == {}  # copied from the cache that was made first
    assert found["c"]["teachers"]["own"]["rescored"] == {"its feature changed": 1}
    is_sound(run, world)
    (world.root / "c.txt").write_text("9")
    found = several("b,c")["targets"]
    assert [_scored(found[target], "own") for target in "bc"] == [0, 17]
    is_sound(run, world)


def test_a_teacher_that_leaks_for_one_target_is_refused_before_any_is_scored(several: Any, world: World) -> None:
    (world.root / "told.json").write_text(json.dumps(world.permitted()))  # b is not permitted for c
    told = ("--teacher", f"told=test_several_targets:from_file,ckpt={world.root}/told.json", "--only", "told")
    several("b,c", *told, code=6)
    assert not SEEN
    assert not (world.root / "cache").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("b", "b"), ("S1, B", "b,s1"), ("all", "b,c,s1,s2,s3"), ("b,b", None), ("b,", None), ("b,A", None), ("s4", None)],
)
def test_targets_by_name(text: str, expected: str | None) -> None:
    if expected is not None:
        assert ",".join(DCASE.several(text)) == expected
        return
    with pytest.raises(UsageError):
        DCASE.several(text)


def test_a_part_is_of_one_target(several: Any, world: World) -> None:
    assert "one target" in several("b,c", "--shard", "0/2", code=2).stderr
    assert "takes one value" in several("b", "--target", "c", code=2).stderr
    assert not (world.root / "cache").exists()


# -- served together ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preload", [True, False])
def test_several_caches_are_served_as_one(several: Any, world: World, preload: bool) -> None:
    several("b,c")
    paths = [world.root / f"cache/A2{target}" for target in "bc"]
    with pytest.warns(UserWarning, match=r"own is not the same teacher in .*A2c as in .*A2b \(weights\)"):
        cache = LogitCache.open(paths, preload=preload)
    alone = [LogitCache.open(path) for path in paths]
    everyone = sorted({*world.permitted(), *world.permitted("c")})
    assert (sorted(cache.files), cache.target, cache.teachers) == (everyone, "b,c", ("shared", "own"))
    of_b = set(world.permitted())
    expected = torch.cat([alone[file not in of_b].batch([file]) for file in everyone])
    assert torch.equal(cache.batch(everyone), expected)
    assert torch.equal(pickle.loads(pickle.dumps(cache)).batch(everyone), expected)  # noqa: S301 (our own)
    digests = cache.input_digests(cache.rows(everyone))
    assert digests is not None
    assert [digest.tobytes() for digest in digests[:, 0]] == [
        world.data().features.read(file).digest for file in everyone
    ]
    assert cache.fingerprints["own"] == "+".join(each.fingerprints["own"] for each in alone)
    assert cache.fingerprints["shared"] == alone[0].fingerprints["shared"]
    with pytest.raises(MissingLogitsError, match="not in the cache"):
        cache.rows([row(world, "A", "test")])
    shared_alone = LogitCache.open(paths, ["shared"])
    loader = student_loader(world.json_path, world.root, shared_alone, 64, shuffle=False)
    (batch,) = [each for each in loader if each["features"].shape[1] == 24] or list(loader)
    assert {*batch["device_id"]} == {"A", "b", "c"}
    assert (batch["scene_label"][batch["target_mask"]] == -100).all()
    for wrong in ([], [paths[0], paths[0]], [paths[0], world.root / "none"]):
        with pytest.raises((UsageError, MissingLogitsError)):
            LogitCache.open(wrong)


def test_other_rows_of_one_teacher_are_refused_and_named(several: Any, world: World) -> None:
    several("b,c")
    changed = world.permitted()[3]
    world.write_feature(changed, np.ones((12, 20), np.float32))
    several("c")
    paths = [world.root / f"cache/A2{target}" for target in "bc"]
    with pytest.raises(StaleError, match=f"shared: 1 samples .*{changed}: its feature changed"):
        LogitCache.open(paths, ["shared"])
    files, made_by = names(3), {"scene": origin("scene")}
    rows, other = Rows.of(files), Rows.of(files)
    other.logits[1] += 1e-6
    made = [
        make_cache(world.root / place / "A2b", {"scene": each}, made_by).path
        for place, each in (("1", rows), ("2", rows), ("3", other))
    ]
    assert sorted(LogitCache.open(made[:2]).files) == files
    with pytest.raises(StaleError, match=f"scene: 1 samples .*{other.files[1]}: they differ by up to"):
        LogitCache.open([made[0], made[2]])


def test_one_student_learns_from_the_caches_of_several_targets(run: Run, town: World, scene: Path) -> None:
    for kind in range(3):
        add_clip(town, kind, kind, 1, "c", "train")
        add_clip(town, kind, kind, 9, "c", "test")
    data = ("--json-path", town.write().json_path, "--num-scenes", 3, "--num-cities", 3)
    dumped = run("dump", "--targets", "b,c", *data, "--scene-teacher-ckpt", scene, "--only", "scene", "--no-files")
    assert dumped.exit_code == 0, dumped.output
    quick = (
        "--arch",
        "cp_resnet",
        "--epochs",
        1,
        "--channels",
        "16,16,32,8",
        "--batch-size",
        8,
        "--lr",
        0.03,
        "--json",
    )
    result = run("student", "--targets", "c,b", "--teacher-mode", "scene", *quick)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["student"]
    assert report["checkpoint"] == "outputs/student/A2b+c/scene/best.safetensors"
    by_device = report["results"]["test"]["by"]
    assert {"A", "b", "c", "s4"} <= by_device["device"].keys()
    samples = {name: by_device["device_group"][name]["samples"] for name in ("source", "target", "unseen")}
    assert samples == {"source": 9, "target": 9 + 3, "unseen": 9}
    made = read_weights(Path(report["checkpoint"])).provenance
    assert made is not None
    learnt = [each["file"] for each in town.rows if each["split"] == "train"]
    trained = {file[-5] for file, is_so in zip(learnt, made.has_trained(learnt), strict=True) if is_so}
    assert trained == {"a", "b", "c"}
    compared = run("student", "compare", "--target", "b,c", "--modes", "scene", "--seeds", 1, *quick)
    assert compared.exit_code == 0, compared.output
    assert "A2b+c" in json.loads(compared.stdout)["folder"]
