"""``kd-cache evaluate``: the figures of training again, of any net, on rows that did not make it."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, World
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from train_fixtures import city, scene, town

from kd_cache.train.evaluation import crossed as crossed_of

__all__ = ["city", "scene", "town"]

OWN = """
import torch
from kd_cache import Provenance
from kd_cache.dataset.task import DCASE

class Net(torch.nn.Module):
    num_classes = 3
    def __init__(self, kind, made=None):
        super().__init__()
        self.value_kind, self.provenance = kind, made
    def forward(self, x):
        z = 3 * torch.stack([x[:, :, 6 * n : 6 * n + 4].mean((1, 2)) for n in range(3)], 1)
        ways = {"logits": z, "log_probs": z.log_softmax(1), "probs": z.softmax(1), "sigmoid": z.sigmoid()}
        return ways[self.value_kind]
    def fingerprint_parts(self):
        return {"architecture": "own/1", "weights": "none"}

class Wide(Net):
    def forward(self, x):
        return torch.zeros(len(x), 4)

class Broken(Net):
    def forward(self, x):
        return super().forward(x) * float("nan")

class Failing(Net):
    def forward(self, x):
        raise SystemExit(0)

def logits(ckpt): return Net("logits")
def log_probs(ckpt): return Net("log_probs")
def probs(ckpt): return Net("probs")
def sigmoid(ckpt): return Net("sigmoid")
def wide(ckpt): return Wide("logits")
def broken(ckpt): return Broken("logits")
def failing(ckpt): return Failing("logits")
def lying(ckpt):
    net = Net("probs"); net.value_kind = "probs"
    net.forward = lambda x: torch.full((len(x), 3), 0.9)
    return net
def dicing(ckpt):
    net = Net("logits")
    net.forward = lambda x: torch.randn(len(x), 3)
    return net
def turned(ckpt):
    net = Net("logits")
    net.num_classes, net.class_names = 10, (*DCASE.scenes[1:], DCASE.scenes[0])
    return net
def leaking(ckpt): return Net("logits", Provenance.of(ckpt.read_text().split()))
"""


@pytest.fixture
def own(town: World, run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder where the command runs has nets of its own."""
    (town.root / "mine_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(town.root)
    yield
    sys.modules.pop("mine_nets", None)


def evaluate(run: Run, town: World, model: object, *more: object, code: int = 0) -> Any:
    counts = [part for count in ("--num-scenes", "--num-cities") if count not in more for part in (count, 3)]
    result = run("evaluate", model, "--json-path", town.json_path, *counts, "--json", *more)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) | {"notes": result.stderr} if code == 0 else result.stderr


def assert_near(found: Any, expected: Any, where: str = "") -> None:
    """What is expected is there, but for rounding; there may be more."""
    if isinstance(expected, dict | list):
        for key, value in expected.items() if isinstance(expected, dict) else enumerate(expected):
            assert_near(found[key], value, f"{where}/{key}")
    else:
        assert found == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected), where


@pytest.mark.parametrize(("role", "more"), [("scene", ()), ("city", ("--target", "b"))])
def test_a_checkpoint_gets_the_figures_that_its_training_wrote_down(
    run: Run, town: World, request: pytest.FixtureRequest, role: str, more: tuple[str, ...]
) -> None:
    checkpoint: Path = request.getfixturevalue(role)
    (results,) = checkpoint.parent.glob("runs/*/results.json")
    trained = json.loads(results.read_text())
    for split, name in (("val", "validation"), ("test", "test")):
        found = evaluate(run, town, checkpoint, "--split", split, *more)
        for kind, groups in trained[name]["by"].items():
            assert found["by"][kind].keys() == groups.keys()
        assert_near(found, trained[name])
        assert found["label"] == role
        assert found["chose_epoch"] == (found["samples"] if split == "val" else 0)
        assert found["trained_on"] == 0
        low, high = found["intervals"]["accuracy"]
        assert low <= found["accuracy"] <= high


@pytest.mark.usefixtures("own")
def test_a_net_of_ones_own_is_measured_by_its_probabilities_whatever_it_gives(run: Run, town: World) -> None:
    found = evaluate(run, town, "mine=mine_nets:logits", "--target", "b")
    rows = [row for row in town.rows if row["split"] == "test"]
    clips = np.stack([np.load(town.feature(row["file"])) for row in rows])
    decided = np.stack([clips[:, :, 6 * n : 6 * n + 4].mean((1, 2)) for n in range(3)], 1).argmax(1)
    labels = np.array([row["scene_label"] for row in rows])
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, decided))
    assert found["macro_accuracy"] == pytest.approx(balanced_accuracy_score(labels, decided))
    names = {"device_group": {"source", "target", "unseen"}, "device": {"A", "b", "s4"}}
    for kind, groups in names.items():
        assert found["by"][kind].keys() == groups
    assert found["by"]["scene"].keys() == {"airport", "bus", "metro"}
    for number, name in enumerate(("airport", "bus", "metro")):
        mine = labels == number
        assert found["by"]["scene"][name]["accuracy"] == pytest.approx(accuracy_score(labels[mine], decided[mine]))
    assert "says nothing of what it was trained on" in found["notes"]
    assert found["trained_on"] is None
    for kind in ("log_probs", "probs"):
        other = evaluate(run, town, f"mine=mine_nets:{kind}", "--target", "b")
        for figure in ("accuracy", "log_loss", "ece", "brier"):
            assert other[figure] == pytest.approx(found[figure], rel=1e-5)
    said = run("evaluate", "mine=mine_nets:logits", "--json-path", town.json_path, "--num-scenes", 3, "--num-cities", 3)
    assert "mine on test: 27 rows of 9 locations, scenes" in said.stdout
    assert all(head in said.stdout for head in ("Device group", "Device", "City", "Scene", "95 %"))


@pytest.mark.usefixtures("own")
def test_a_net_that_saw_a_test_row_is_refused_and_one_that_saw_a_held_out_row_is_told_of(run: Run, town: World) -> None:
    tested = [row["file"] for row in town.rows if row["split"] == "test"]
    (town.root / "seen.txt").write_text("\n".join(tested[:2]))
    said = evaluate(run, town, "mine=mine_nets:leaking,ckpt=seen.txt", code=6)
    assert "trained or validated on 2 of 27 test rows" in said
    assert tested[0] in said
    (town.root / "seen.txt").write_text("\n".join(town.permitted()))
    found = evaluate(run, town, "mine=mine_nets:leaking,ckpt=seen.txt", "--split", "val")
    assert found["trained_on"] == found["samples"] > 0
    assert "rows trained mine: the figures are better than they should be" in found["notes"]


@pytest.mark.usefixtures("own")
def test_the_difference_to_each_teacher_of_a_cache_is_of_the_same_rows_and_draws(
    run: Run, town: World, scene: Path
) -> None:
    named = ("--teacher", "mine=mine_nets:logits")
    made = run("dump", "--target", "b", "--json-path", town.json_path, "--num-scenes", 3, "--num-cities", 3, *named,
               "--scene-teacher-ckpt", scene, "--only", "scene", "--only", "mine")  # fmt: skip
    assert made.exit_code == 0, made.output
    more = ("--target", "b", "--against", town.cache, *named)
    found = evaluate(run, town, "mine=mine_nets:logits", *more)
    teacher = evaluate(run, town, scene, "--target", "b")
    against = found["against"]
    assert teacher["accuracy"] != found["accuracy"]
    for figure, told in against["scene"]["difference"].items():
        assert told["value"] == pytest.approx(found[figure] - teacher[figure])
        low, high = told["interval"]
        assert low <= told["value"] <= high
        assert against["mine"]["difference"][figure] == {"value": 0, "interval": [0, 0]}  # of one draw for both
    assert against["scene"]["accuracy"] == pytest.approx(teacher["accuracy"])
    assert (against["scene"]["trained_on"], against["mine"]["trained_on"]) == (0, None)
    assert found["by"] == evaluate(run, town, "mine=mine_nets:logits", "--target", "b")["by"]
    lost = evaluate(run, town, scene, "--target", "b", "--against", town.cache)
    assert lost["against"].keys() == {"scene"}
    assert "mine: nothing is compared with it: it is your own; pass it with --teacher" in lost["notes"]
    assert "there is no cache" in evaluate(run, town, scene, "--against", "nowhere", code=3)
    assert "is about a teacher of --against" in evaluate(run, town, scene, *named, code=2)
    said = run("evaluate", scene, "--json-path", town.json_path, "--num-scenes", 3, "--num-cities", 3, *more)
    assert "Difference to teachers, in points" in said.stdout


def test_rows_and_accuracy_of_each_device_and_class_are_a_table(run: Run, town: World, scene: Path) -> None:
    found = evaluate(run, town, scene, "--target", "b", "--csv", "tables/scene.csv")
    crossed = found["device_by_class"]
    assert (crossed["devices"], crossed["classes"]) == (["A", "b", "s4"], ["0", "1", "2"])
    for device, counts, shares in zip(crossed["devices"], crossed["samples"], crossed["accuracy"], strict=True):
        whole = found["by"]["device"][device]
        assert sum(counts) == whole["samples"]
        assert np.dot(counts, shares) == pytest.approx(whole["accuracy"] * whole["samples"])
    with Path("tables/scene.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["device"] for row in rows] == ["A"] * 3 + ["b"] * 3 + ["s4"] * 3
    assert [float(row["accuracy"]) for row in rows] == [share for each in crossed["accuracy"] for share in each]
    lacking = crossed_of(np.eye(2)[[0, 1, 1]], np.array([0, 0, 1]), ["b", "A", "A"], ["x", "y"])
    assert lacking == {"devices": ["A", "b"], "classes": ["x", "y"], "samples": [[1, 1], [1, 0]],
                       "accuracy": [[0, 1], [1, None]]}  # fmt: skip
    Path("tables/scene.csv").write_text("mine")
    assert "Pass --overwrite" in evaluate(run, town, scene, "--target", "b", "--csv", "tables/scene.csv", code=2)


def test_no_label_of_a_target_s_train_row_changes_a_byte(run: Run, town: World, scene: Path) -> None:
    before = evaluate(run, town, scene, "--target", "b", "--split", "val")
    for row in town.rows:
        if row["device_id"] == "b" and row["split"] == "train":
            row["scene_label"] = (row["scene_label"] + 1) % 3
    town.write()
    assert evaluate(run, town, scene, "--target", "b", "--split", "val") == before
    assert before["by"]["device"].keys() == {"A"}


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("model", "more", "code", "message"),
    [
        ("nowhere.safetensors", (), 2, "neither a checkpoint nor NAME=module:factory"),
        ("mine=mine_nets:sigmoid", (), 2, "gives sigmoid"),
        ("mine=mine_nets:wide", (), 1, r"must return floating-point [27, 3], it returned [27, 4]"),
        ("mine=mine_nets:broken", (), 1, "values that are not finite"),
        ("mine=mine_nets:failing", (), 1, "cannot be evaluated on cpu: SystemExit"),
        ("mine=mine_nets:lying", (), 1, "are not probabilities"),
        ("mine=mine_nets:dicing", (), 1, "gives other numbers each time"),
        ("mine=mine_nets:logits", ("--num-scenes", 4), 2, "mine has 3 classes, and there are 4 (--num-scenes)"),
        ("mine=mine_nets:turned", ("--num-scenes", 10), 2, "have the same classes in another order"),
        ("mine=mine_nets:logits", ("--label", "city", "--num-cities", 12), 2, "3 classes, and there are 12"),
        ("mine=mine_nets:logits", ("--split", "val", "--val-ratio", 0.9), 2, "validation ratio"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    run: Run, town: World, model: str, more: tuple[object, ...], code: int, message: str
) -> None:
    assert message in evaluate(run, town, model, *more, code=code)


@pytest.mark.usefixtures("own")
def test_rows_without_a_label_do_not_count_and_rows_without_a_place_are_told_of(run: Run, town: World) -> None:
    tests = [row for row in town.rows if row["split"] == "test"]
    for row in tests[1:6:3]:  # of b: those of A need one
        del row["scene_label"]
    town.feature(tests[0]["file"]).rename(town.feature("x/clip.npy"))
    tests[0]["file"] = "x/clip.npy"
    for row in town.rows:
        del row["city_label"]
    town.write()
    found = evaluate(run, town, "mine=mine_nets:logits")
    assert found["samples"] == len(tests) - 2
    assert "1 rows name no location" in found["notes"]
    said = evaluate(run, town, "mine=mine_nets:logits", "--label", "city", code=2)
    assert "none of the 27 test rows has a city label" in said
