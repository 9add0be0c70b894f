"""Training a teacher: who trains, who validates, what is kept, what stays frozen, and going on after a stop."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import REPO, World
from safetensors import safe_open
from safetensors.torch import load_file
from train_fixtures import OWN, Listening, add_clip, city, job, own_net, scene, settings, town

from kd_cache import (
    CheckpointError,
    StoreError,
    TeacherError,
    TrainingError,
    UsageError,
)
from kd_cache.dataset.manifest import Sample
from kd_cache.dataset.provenance import Provenance
from kd_cache.keys import keys_of
from kd_cache.score.device import training_numerics
from kd_cache.score.teacher import teacher_fingerprint
from kd_cache.train import pretraining
from kd_cache.train.augment import Mixed
from kd_cache.train.checkpoint import read_record, read_weights, save_checkpoint
from kd_cache.train.clips import Clips
from kd_cache.train.job import TrainReport
from kd_cache.train.loop import Loop
from kd_cache.train.nets import make_net, warm_start
from kd_cache.train.optimiser import Schedule, average, cross_entropy
from kd_cache.train.pretraining import Pretrained
from kd_cache.train.settings import Settings, Stage, parse_stage
from kd_cache.train.training import foreseen
from teachers.cnn14 import CNN14
from teachers.loading import load_teacher, own_teacher
from teachers.recipes import RECIPES, train_teacher

__all__ = ["city", "own_net", "scene", "town"]


def trained(world: World, role: str = "city", **changed: Any) -> tuple[TrainReport, Listening]:
    watcher = changed.pop("watcher", None) or Listening()
    return train_teacher(job(world, role, **changed), watcher), watcher


def weights(path: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def key(world: World, role: str = "city", **changed: Any) -> str:
    return RECIPES[role](job(world, role, **changed), Listening()).key


def stopped(world: World, role: str, after: int = 2, **changed: Any) -> Path:
    """The folder of a run that a person stopped after so many epochs."""
    with pytest.raises(KeyboardInterrupt):
        trained(world, role, watcher=Listening(after), **changed)
    return max((world.root / "outputs").glob(f"teacher_{role}/*/runs/*/"))


def narrow_cnn14(monkeypatch: pytest.MonkeyPatch) -> None:
    """CNN14 with few channels, so that a test need not wait for it."""

    def sized(
        cls: type[CNN14], num_classes: int, width: int | None, hidden: tuple[int, ...] | None, dropout: float
    ) -> CNN14:
        return cls(num_classes, (2, 2, 2, 4, 4, 4), width or 6, hidden or (), dropout=dropout)

    monkeypatch.setattr(CNN14, "sized", classmethod(sized))


# -- who trains on what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["city", "city2scene"])
def test_scene_labels_of_the_target_change_nothing(town: World, role: str) -> None:
    backbone = trained(town, output_dir=town.root / "city")[0].checkpoint
    given = {"backbone": backbone} if role == "city2scene" else {}
    before = trained(town, role, **given, output_dir=town.root / "one")[0]
    for row in town.rows:
        if row["device_id"] == "b":
            row["scene_label"] = 2 - row["scene_label"]
    town.write()
    after = trained(town, role, **given, output_dir=town.root / "two")[0]
    assert weights(before.checkpoint) == weights(after.checkpoint)


@pytest.mark.parametrize("role", ["city", "city2scene", "scene"])
def test_no_validation_location_is_in_training_and_scenes_are_learnt_from_a_alone(town: World, role: str) -> None:
    division = job(town, role).division
    places = [
        {sample.file.split("-", 1)[1].rsplit("-", 2)[0] for sample in side}
        for side in (division.train, division.validation)
    ]
    assert all(places)
    assert not places[0] & places[1]
    both = (*division.train, *division.validation)
    assert {sample.split for sample in both} == {"train"}
    assert {sample.device_id for sample in both} == ({"A", "b"} if role == "city" else {"A"})
    for side in (division.train, division.validation):
        assert {sample.city_label for sample in side} == {0, 1, 2}
    if role == "city2scene":  # its head validates on what its city teacher held out
        below = job(town, "city").division.validation
        assert {s.file for s in division.validation} == {s.file for s in below if s.device_id == "A"}


def test_test_clips_are_measured_and_change_nothing(town: World) -> None:
    report, _ = trained(town, output_dir=town.root / "one")
    assert report.results["test"]["by"]["device"].keys() == {"A", "b", "s4"}
    assert report.results["test"]["by"]["device_group"].keys() == {"source", "target", "unseen"}
    paths = [town.feature(row["file"]) for row in town.rows if row["split"] == "test"]
    np.save(paths[0], np.zeros((3, 20), np.float32))  # the net refuses it
    for number in (2, 3):
        blind, watcher = trained(town, output_dir=town.root / f"{number}")
        assert blind.results["test"] is None
        assert watcher.told("test was not measured")
        assert weights(blind.checkpoint) == weights(report.checkpoint)
        for path in paths:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize(("role", "label"), [("city", "city_label"), ("scene", "scene_label")])
def test_a_sample_without_the_label_that_is_learnt_is_refused_by_name(town: World, role: str, label: str) -> None:
    row = next(row for row in town.rows if row["split"] == "train" and row["device_id"] == "A")
    row[label] = None
    town.write()
    with pytest.raises(UsageError, match=row["file"]):
        trained(town, role)


def test_equal_features_on_both_sides_are_told_of(town: World) -> None:
    division = job(town, "city").division
    copied = town.feature(division.train[0].file).read_bytes()
    town.feature(division.validation[0].file).write_bytes(copied)
    assert trained(town)[1].told("1 validation features are byte for byte a training sample's")


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_run_keeps_weights_settings_history_and_results(town: World) -> None:
    report, _ = trained(town)
    assert report.run.parent == town.root / "outputs/teacher_city/A2b/runs"
    assert report.checkpoint == town.root / "outputs/teacher_city/A2b/best.safetensors"
    assert report.checkpoint.read_bytes() == (report.run / "best.safetensors").read_bytes()
    config = yaml.safe_load((report.run / "config.yaml").read_text())
    assert config["settings"]["batch_size"] == 4
    assert [stage["level"] for stage in config["stages"]] == [0]
    history = list(csv.DictReader((report.run / "history.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in history] == [1, 2, 3]
    steps = list(csv.DictReader((report.run / "steps.csv").read_text().splitlines()))
    clips = len(job(town, "city").division.train)
    assert len(steps) == 3 * (clips // 4 + (clips % 4 > 1))  # one left over joins another batch
    rates = [float(step["lr"]) for step in steps]
    assert 0 < max(rates) <= 0.03
    assert rates[-1] < max(rates)
    assert json.loads((report.run / "results.json").read_text()) == json.loads(json.dumps(report.results))
    load_teacher(report.run / "last.safetensors", role="city")
    assert not list(town.root.rglob("*.partial"))


@pytest.mark.parametrize("role", ["scene", "city2scene"])
def test_the_results_are_those_of_the_stored_weights(town: World, city: Path, role: str) -> None:
    """Of the float16 ones that --half stores, and of a head's whole teacher."""
    given = {"backbone": city} if role == "city2scene" else {}
    report, _ = trained(town, role, half=True, **given)
    assert {tensor.dtype for tensor in load_file(report.checkpoint).values()} == {torch.float16, torch.int64}
    teacher = load_teacher(report.checkpoint, role=role)
    assert {tensor.dtype for tensor in teacher.parameters()} == {torch.float32}
    division = job(town, role).division
    clips = {
        "validation": [(sample.file, sample.scene_label) for sample in division.validation],
        "test": [(row["file"], row["scene_label"]) for row in town.rows if row["split"] == "test"],
    }
    for split, named in clips.items():
        x = torch.from_numpy(np.stack([np.load(town.feature(file)) for file, _ in named]))
        with torch.inference_mode():
            loss = F.cross_entropy(teacher(x), torch.tensor([label for _, label in named]))
        assert report.results[split]["log_loss"] == pytest.approx(float(loss), abs=1e-5)
    if role == "scene":
        files = ([sample.file for sample in side] for side in (division.train, division.validation))
        assert teacher.provenance.digest == Provenance.of(*files).digest


@pytest.fixture
def city_of_squares(town: World) -> World:
    """The town with clips large enough for CNN14's poolings."""
    for row in town.rows:
        path = town.feature(row["file"])
        np.save(path, np.tile(np.load(path), (3, 2))[:32, :32])
    return town


@pytest.mark.parametrize(
    ("role", "arch"), [("scene", "cp_resnet"), ("city2scene", "cp_resnet"), ("city2scene", "cnn14")]
)
def test_a_pth_has_the_field_s_names_and_the_same_fingerprint(
    city_of_squares: World, monkeypatch: pytest.MonkeyPatch, role: str, arch: str
) -> None:
    narrow_cnn14(monkeypatch)
    monkeypatch.setattr("kd_cache.train.training.random_loss", lambda *_: 1e9)  # it need not learn anything
    given: dict[str, Any] = {"arch": arch, "feature_dim": 6}
    if role == "city2scene":
        hidden = {"mlp_hidden_dims": (5, 4)} if arch == "cnn14" else {}
        given["backbone"] = trained(city_of_squares, **given, **hidden)[0].checkpoint
    report, _ = trained(city_of_squares, role, pth=True, **given)
    pth = report.checkpoint.with_name("best.pth")
    entries = torch.load(pth, weights_only=True)
    if role == "scene":
        assert entries.keys() == {
            "epoch", "model_state_dict", "optimizer_state_dict", "val_acc", "val_loss", "kd_cache",
        }  # fmt: skip
    else:
        assert entries.keys() >= {"city_model_state_dict", "scene_head_state_dict", "val_acc"}
        assert entries["scene_head_state_dict"].keys() == {"weight", "bias"}
    one, two = load_teacher(report.checkpoint, role=role), load_teacher(pth, role=role)
    assert teacher_fingerprint(one).digest == teacher_fingerprint(two).digest
    x = torch.randn(2, 32, 32)
    assert torch.equal(one(x), two(x))
    _, watcher = trained(city_of_squares, role, weight_decay=0.02, **given)
    assert watcher.told("is replaced")
    assert not pth.exists()  # one of other weights must not stand beside it


# -- cached pre-training -----------------------------------------------------------------------------------------------


def test_the_key_changes_with_stages_storage_target_data_and_code(town: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every setting, too: test_train_settings."""
    stage = Stage(0, 3, 1e-3)
    changes = ({"level": 1}, {"epochs": 4}, {"lr": 2e-3}, {"augment": "full"}, {"schedule": "constant"})
    keys = [key(town, stages=(replace(stage, **change),)) for change in changes]
    keys += [key(town), key(town, stages=(stage,)), key(town, half=True), key(town, seed=7), key(town, epochs=4)]
    assert key(town) == keys[5]
    assert key(town, epochs=40, lr=3e-3, preset="scratch") == key(town, epochs=None, lr=None, preset="auto")
    for row in town.rows:
        if row["device_id"] == "b" and row["split"] == "train":
            add_clip(town, row["scene_label"], row["city_label"], 3, "c", "train")
    town.write()
    keys.append(key(town, target="c"))
    path = town.feature(town.permitted()[0])
    np.save(path, np.load(path) + 1)
    keys.append(key(town))
    monkeypatch.setattr("kd_cache.train.training.code_version", lambda _: "another")
    keys.append(key(town))
    assert len(set(keys)) == len(keys)


def test_a_second_run_uses_the_cached_weights_unless_they_are_damaged_or_not_wanted(town: World) -> None:
    first, _ = trained(town)
    other, _ = trained(town, seed=3)
    cached = Pretrained(town.root / "outputs/pretrained").entries()
    (mine,) = (entry.weights for entry in cached if entry.parts["seed"]["seed"] == 42)
    good = weights(first.run / "best.safetensors")  # type: ignore[operator]

    def again(**more: Any) -> Listening:
        report, watcher = trained(town, **more)
        assert report.how == ("trained" if watcher.epochs else "cached")
        assert weights(report.checkpoint) == good
        return watcher

    first.checkpoint.unlink()
    assert again().told("pre-training skipped")
    content = bytearray(mine.read_bytes())
    content[-1] ^= 1
    mine.write_bytes(content)
    assert again().told("damaged")
    entry = mine.with_name("entry.json")
    entry.unlink()
    os.mkfifo(entry)
    assert again().told("training again")
    assert again(resume="fresh").told("removed the cached weights")
    assert not again().epochs
    assert (other.how, trained(town, seed=3)[0].how) == ("trained", "cached")


def test_cached_weights_are_measured_on_the_clips_that_are_there_now(town: World) -> None:
    trained(town)
    (entry,) = (town.root / "outputs/pretrained").iterdir()
    content = json.loads((entry / "entry.json").read_text())
    content["measured"]["validation"]["accuracy"] = 7.0
    del content["measured"]["chance"]
    (entry / "entry.json").write_text(json.dumps(content))
    town.rows = [row for row in town.rows if row["split"] == "train" or row["device_id"] == "A"]
    town.write()
    report, _ = trained(town)
    assert report.how == "cached"
    assert report.results["test"]["samples"] == 9
    assert report.results["validation"]["accuracy"] <= 1
    assert report.results["chance"] == 1 / 3


def test_a_run_of_other_settings_or_before_a_fresh_one_is_not_gone_on_with(town: World) -> None:
    run = stopped(town, "scene", 1)
    (run / ".tmp-1-0000000000000000").write_bytes(b"half")  # of a process that was killed while it wrote
    assert trained(town, "scene", lr=1e-3)[0].how == "trained"
    assert trained(town, "scene")[0].how == "resumed"
    assert not list(run.glob(".tmp-*"))
    stopped(town, "scene", 1, seed=3)
    assert trained(town, "scene", seed=3, resume="fresh")[0].how == "trained"
    assert trained(town, "scene", seed=3)[0].how == "trained"


def test_weights_that_cannot_be_cached_are_only_a_note(town: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(pretraining.Pretrained, "save", full)
    report, watcher = trained(town)
    assert report.checkpoint.is_file()
    assert watcher.told("the disk is full")


# -- going on ----------------------------------------------------------------------------------------------------------

PLANS: dict[str, dict[str, Any]] = {
    "scratch": {},
    "sgd, averaged": {"optimizer": "sgd", "ema": 0.9, "accumulate": 2, "clip": 1.0},
    "stages": {"stages": (Stage(2, 10, 0.1), Stage(1, 1, 1e-2), Stage(0, 2, 1e-3))},
    "mixed": {"mixup": 0.3, "label_smoothing": 0.1, "class_weights": "balanced", "drop_last": True},
}


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def of_another_version(path: Path) -> None:
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["kd_cache"])
    record["progress"]["later"] = 1
    save_checkpoint(path, load_file(path), record)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("role", "name", "damage", "told"),
    [
        ("scene", "last", flipped, "its weights are not those that were written"),
        ("city2scene", "best", flipped, "its weights are not those that were written"),
        ("city2scene", "last", flipped, "its weights are not those that were written"),
        ("scene", "last", of_another_version, "does not say how far the run was"),
        ("scene", "last", cut, "cannot go on with"),
    ],
)
def test_a_stopped_run_that_is_damaged_is_told_of_and_trained_anew(
    town: World, city: Path, role: str, name: str, damage: Callable[[Path], None], told: str
) -> None:
    given = {"backbone": city} if role == "city2scene" else {}
    whole, _ = trained(town, role, **given, output_dir=town.root / "whole")
    (path,) = stopped(town, role, **given).glob(f"{name}*.safetensors")
    damage(path)
    report, watcher = trained(town, role, **given)
    assert report.how == "trained"
    assert watcher.told(told)
    assert weights(report.checkpoint) == weights(whole.checkpoint)
    assert not trained(town, role, **given)[1].told("cannot go on with")


def test_a_run_without_an_epoch_leaves_nothing(town: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kd_cache.train.loop.augmented", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(town, "scene", mixup=0.3)
    assert not list((town.root / "outputs/teacher_scene/global/runs").iterdir())


UNTRAINABLE: dict[str, dict[str, Any]] = {
    "tf32": {"precision": "tf32"},
    "fp16": {"precision": "fp16"},
    "--drop-last": {"drop_last": True, "batch_size": 100},  # no full batch
    "--direct-unfreeze": {"stages": (Stage(2, 1, 1e-2), Stage(0, 1, 1e-3))},
}


@pytest.mark.parametrize("told", UNTRAINABLE)
def test_settings_that_cannot_be_trained_with_are_refused(town: World, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        trained(town, "scene", **UNTRAINABLE[told])
    assert told in str(caught.value)
    assert not list(town.root.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("role", "plan", "stop_after"),
    [
        ("scene", "scratch", 1),
        ("city2scene", "scratch", 2),
        ("city2scene", "sgd, averaged", 1),
        ("scene", "sgd, averaged", 2),
        ("scene", "stages", 1),
        ("city2scene", "stages", 2),
        ("scene", "mixed", 2),
        ("city2scene", "mixed", 1),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_weights(
    town: World, city: Path, role: str, plan: str, stop_after: int
) -> None:
    given: dict[str, Any] = {"backbone": city} if role == "city2scene" else {}
    given |= PLANS[plan]
    whole, _ = trained(town, role, **given, output_dir=town.root / "whole")
    stopped(town, role, stop_after, **given)
    report, watcher = trained(town, role, **given)
    assert report.how == "resumed"
    assert watcher.told(f"{stop_after} epochs are done")
    for name in ("best.safetensors", "last.safetensors"):
        assert weights(report.run / name) == weights(whole.run / name)
    assert (report.run / "steps.csv").read_text() == (whole.run / "steps.csv").read_text()
    headers = {(run / "history.csv").read_text().partition("\n")[0] for run in (report.run, whole.run)}
    assert headers == {"stage,epoch,train_loss,val_accuracy,val_macro_accuracy,val_log_loss,seconds"}
    assert len(list(report.run.parent.iterdir())) == 1


def test_a_killed_process_goes_on_to_the_same_weights(town: World) -> None:
    whole, _ = trained(town, output_dir=town.root / "whole")
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(REPO / "tests")!r}]
from dataclasses import replace
from pathlib import Path
from conftest import World
from train_fixtures import Listening, job
from teachers.recipes import train_teacher
class Killed(Listening):
    def epoch(self, measured):
        if measured["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
train_teacher(job(World(Path({str(town.root)!r})), "city"), Killed())
"""
    died = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    report, _ = trained(town)
    assert report.how == "resumed"
    assert weights(report.checkpoint) == weights(whole.checkpoint)


@pytest.mark.parametrize("stop_after", [3, 4])
def test_a_run_killed_where_a_stage_ended_early_ends_there_too(town: World, stop_after: int) -> None:
    idle = {"stages": (Stage(0, 30, 1e-9), Stage(0, 2, 1e-9)), "patience": 3, "quick_experiment": 1 - 1e-9}
    whole, _ = trained(town, "scene", **idle, output_dir=town.root / "whole")
    assert 3 <= whole.results["epochs"] < 30
    stopped(town, "scene", whole.results["epochs"] - 6 + stop_after, **idle)
    report, _ = trained(town, "scene", **idle)
    assert report.results["epochs"] == whole.results["epochs"]
    assert weights(report.run / "last.safetensors") == weights(whole.run / "last.safetensors")


def test_a_run_that_another_process_is_at_work_on_is_left_alone(town: World) -> None:
    class Meanwhile(Listening):
        def epoch(self, measured: Any) -> None:
            super().epoch(measured)
            if len(self.epochs) == 1:
                other.append(trained(town, "scene")[0])

    other: list[TrainReport] = []
    report, _ = trained(town, "scene", watcher=Meanwhile())
    assert (report.how, other[0].how) == ("trained", "trained")
    assert report.run != other[0].run
    assert weights(report.run / "best.safetensors") == weights(other[0].run / "best.safetensors")
    assert not list(town.root.rglob(".lock"))


def test_the_order_of_the_manifest_changes_no_weights_and_another_seed_does(town: World) -> None:
    one, _ = trained(town, output_dir=town.root / "one")
    town.rows.reverse()
    town.write()
    two, _ = trained(town, output_dir=town.root / "two")
    assert weights(one.checkpoint) == weights(two.checkpoint)
    assert key(town) == one.results["key"]
    assert weights(trained(town, seed=2, output_dir=town.root / "three")[0].checkpoint) != weights(two.checkpoint)


def test_averaged_weights_are_kept_with_their_own_backbone(town: World, city: Path) -> None:
    stages = (Stage(1, 4, 0.05), Stage(0, 3, 0.05))
    report, watcher = trained(town, "city2scene", backbone=city, stages=stages, ema=0.8)
    best = watcher.epochs[report.results["best_epoch"] - 1]
    assert report.results["validation"]["log_loss"] == pytest.approx(best["val_log_loss"], abs=1e-4)


def test_what_trained_the_parts_is_joined_and_a_silent_part_makes_it_incomplete(town: World, city: Path) -> None:
    def provenance(number: int, **parts: Any) -> tuple[Provenance, Listening]:
        report, watcher = trained(town, "city2scene", **parts, output_dir=town.root / f"{number}")
        made = load_teacher(report.checkpoint).provenance
        assert made is not None
        return made, watcher

    assert (of_city := load_teacher(city).provenance) is not None
    assert of_city.complete
    head = trained(town, "city2scene", backbone=city)[0].checkpoint
    silent = {"city": town.root / "city.safetensors", "head": town.root / "head.safetensors"}
    for name, path in (("city", city), ("head", head)):
        save_checkpoint(silent[name], load_file(path), {})
    again = {"stages": (Stage(2, 1, 1e-3),)}
    joined, watcher = provenance(1, backbone=city, init=silent["head"], **again)
    assert watcher.told("says nothing of it")
    assert {key.tobytes() for key in joined.keys} == {key.tobytes() for key in keys_of(town.permitted())}
    assert not joined.complete
    assert not provenance(2, backbone=silent["city"])[0].complete
    # A whole teacher to start from leaves nothing of the silent weights below it.
    assert provenance(3, backbone=silent["city"], init=head, **again)[0].complete


def validate_as(monkeypatch: pytest.MonkeyPatch, *measured: tuple[float, float]) -> None:
    """Validations, epoch by epoch: accuracy and loss."""
    left = iter(measured)

    def validated(self: Loop) -> dict[str, float]:
        accuracy, loss = next(left)
        return {"accuracy": accuracy, "macro_accuracy": accuracy, "log_loss": loss}

    monkeypatch.setattr(Loop, "_validated", validated)


PACKAGE = {
    "__init__.py": "import functools\nfrom .nets import small\npartly = functools.partial(small)\n",
    "nets.py": "import torch\nimport kd_cache\nfrom .parts import blocks as there\n\ndef small(classes):\n"
    "    return there.Small(classes)\n",
    "parts/__init__.py": "",
    "parts/blocks.py": OWN.replace("return self", "from . import late; return late.same(self").replace(
        "n(1))", "n(1)))"
    ),
    "parts/late.py": "def same(x):\n    return x\n",
}


@pytest.mark.parametrize("factory", ["small", "partly"])
def test_one_net_has_one_digest_whatever_is_imported_by_then_and_changed_code_another(
    town: World, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    for name, text in PACKAGE.items():
        path = town.root / "mine_package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(town.root)
    net = f"mine_package:{factory}"
    before = key(town, "scene", arch=net)
    report, _ = trained(town, "scene", arch=net)
    assert "mine_package.parts.late" in sys.modules
    assert key(town, "scene", arch=net) == before
    dumped = own_teacher(net, report.checkpoint).fingerprint_parts()
    for part, text in (("nets.py", "# changed\n"), ("parts/late.py", "def same(x):\n    return 2 * x\n")):
        content = (town.root / "mine_package" / part).read_text()
        (town.root / "mine_package" / part).write_text(content + text)
        assert key(town, "scene", arch=net) != before
        assert own_teacher(net, report.checkpoint).fingerprint_parts() != dumped
        (town.root / "mine_package" / part).write_text(content)
        assert key(town, "scene", arch=net) == before
    for name in [name for name in sys.modules if name.startswith("mine_package")]:
        sys.modules.pop(name)


def test_a_net_of_one_s_own_may_have_integers(town: World, own_net: Callable[[str], str]) -> None:
    counted = OWN.replace(
        "        self.module",
        '        self.register_buffer("table", torch.arange(2**40, 2**40 + 3))\n        self.module',
    )
    arch = own_net(counted)
    report, _ = trained(town, "scene", arch=arch)
    teacher = own_teacher(arch, report.checkpoint)
    assert teacher.net.table.tolist() == [2**40, 2**40 + 1, 2**40 + 2]
    again, _ = trained(
        town,
        "scene",
        pth=True,
        arch=arch,
        init=report.checkpoint,
        stages=(Stage(0, 1, 0.01),),
        output_dir=town.root / "o",
    )
    assert own_teacher(arch, again.checkpoint.with_suffix(".pth")).net.table.dtype == torch.int64
    cast = {name: tensor.to(torch.int8) for name, tensor in load_file(report.checkpoint).items()}
    save_checkpoint(town.root / "cast.safetensors", cast, {})
    with pytest.raises(CheckpointError, match=r"module.weight: expected \[3, 240\], found int8 \[3, 240\]"):
        trained(town, "scene", arch=arch, init=town.root / "cast.safetensors")
    assert load_file(again.checkpoint)["table"].dtype == torch.int64
    with pytest.raises(CheckpointError, match="none of its names"):
        load_teacher(report.checkpoint)


def test_a_checkpoint_of_a_larger_net_is_not_that_of_a_net_of_one_s_own(
    town: World, own_net: Callable[[str], str]
) -> None:
    arch = own_net(OWN)
    report, _ = trained(town, "scene", arch=arch)
    with safe_open(report.checkpoint, "pt") as file:
        record = json.loads(file.metadata()["kd_cache"])
    larger = {**load_file(report.checkpoint), "after.weight": torch.eye(3)}
    save_checkpoint(town.root / "larger.safetensors", larger, record)
    with pytest.raises(CheckpointError, match=r"after\.weight: unexpected"):
        own_teacher(arch, town.root / "larger.safetensors")
    save_checkpoint(town.root / "silent.safetensors", larger, {})
    with pytest.raises(CheckpointError, match="does not say which teacher"):
        own_teacher(arch, town.root / "silent.safetensors")


def test_errors_of_torch_are_said_with_what_to_do(town: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InductorError

    pooled, where = F.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
    with (
        training_numerics(torch.device("cpu"), "fp32", deterministic=True),
        pytest.raises(RuntimeError) as unrepeatable,
    ):
        F.max_unpool2d(pooled, where, 2)
    plain = settings("scene")
    told = {
        "--batch-size": foreseen(torch.OutOfMemoryError("CUDA out of memory"), plain),
        "--deterministic": foreseen(
            RuntimeError("no deterministic implementation"), settings("scene", deterministic=True)
        ),
        "--compile": foreseen(InductorError(RuntimeError("no compiler"), None), settings("scene", compile=True)),
        "--debug": foreseen(RuntimeError("shapes"), settings("scene", arch="mine:net")),
    }
    assert all(error is not None and word in str(error.hint) for word, error in told.items())
    assert foreseen(unrepeatable.value, plain) is None

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trained(town, "city")
    for where, role in (("loop.cross_entropy", "scene"), ("training.evaluated", "city")):  # also of cached weights
        monkeypatch.setattr(f"kd_cache.train.{where}", full)
        with pytest.raises(TrainingError, match="memory"):
            trained(town, role)


def test_clips_that_no_batch_ever_holds_are_told_of(town: World) -> None:
    files = [sample.file for sample in job(town, "scene").division.train[:2]]
    for count, file in enumerate(files, start=1):
        array = np.load(town.feature(file))
        np.save(town.feature(file), np.concatenate([array, array]))
        told = trained(town, "scene", output_dir=town.root / f"{count}")[1].told
        assert told("1 training clips are alone with their shape") == (count == 1)
        clips = RECIPES["scene"](job(town, "scene"), Listening()).train
        rows = np.concatenate(clips.shuffled(4, torch.Generator().manual_seed(0), drop_last=False))
        assert len(set(rows.tolist())) == len(rows) == len(clips) - (count == 1)
    assert trained(town, "scene", drop_last=True)[1].told("2 training clips fill no batch")


def test_batches_of_one_clip_are_refused_where_batch_norm_cannot_learn_from_them(
    city_of_squares: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow_cnn14(monkeypatch)
    with pytest.raises(TrainingError, match="batch of one clip"):
        trained(city_of_squares, "scene", arch="cnn14", batch_size=1, feature_dim=6, mlp_hidden_dims=())


# -- stages and warm starts --------------------------------------------------------------------------------------------


def test_what_is_frozen_is_bit_for_bit_the_same_and_what_is_not_changes(town: World, scene: Path) -> None:
    before = load_file(scene)
    stages = (Stage(2, 2, 1e-2), Stage(1, 2, 1e-2))
    report, watcher = trained(town, "scene", init=scene, stages=stages)
    after = load_file(report.run / "last.safetensors")
    for name, tensor in before.items():
        if name.endswith("num_batches_tracked"):
            continue
        same = torch.equal(tensor, after[name])
        assert same == (not name.startswith(("block4.", "head."))), name
    assert len([note for note in watcher.notes if "bit for bit" in note]) == 2
    assert len(report.results["frozen"]) == 2
    free, _ = trained(town, "scene", init=scene, stages=(Stage(0, 1, 1e-3),))
    moved = load_file(free.run / "last.safetensors")
    assert not any(torch.equal(before[name], moved[name]) for name in before if name.endswith("weight"))


def test_averaged_weights_hold_still_where_the_net_is_frozen(town: World) -> None:
    stages = (Stage(0, 2, 0.03), Stage(2, 2, 0.03))
    report, _ = trained(town, "scene", stages=stages, ema=0.97, direct_unfreeze=True)
    last = read_weights(report.run / "last.safetensors").tensors
    state = load_file(report.run / "last.safetensors")
    averaged = {name.rpartition("ema.")[2]: tensor for name, tensor in state.items() if "ema." in name}
    for name, tensor in last.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, averaged[name]) != name.startswith("head."), name


def test_validating_on_what_trained_the_backbone_is_told_of(town: World) -> None:
    city, _ = trained(town, fold=1)
    head = {"backbone": city.checkpoint, "quick_experiment": 1 - 1e-9}  # all of it, but it need not learn anything
    _, watcher = trained(town, "city2scene", **head)
    assert watcher.told("validation samples trained what this starts from")
    _, watcher = trained(town, "city2scene", **head, fold=1)
    assert not watcher.told("validation samples trained what this starts from")


Tensors = dict[str, torch.Tensor]
OTHERS = r"""^.*: 0 of \d+ tensors loaded.*
(.*\n)*  stem.0.weight: expected \[32, 1, 5, 5\], missing
(.*\n)*  other_.*: unexpected"""
WARM_STARTS: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "all of it": ("scene", lambda kept: kept, r"^(\d+) of \1 tensors loaded, from "),
    "other names": ("scene", lambda kept: {f"other_{n}": kept[n] for n in kept}, OTHERS),
    "under an attribute": ("scene", lambda kept: {f"a.{n}": kept[n] for n in kept}, r"prefix 'a\.' removed"),
    "a part of the backbone": (
        "scene",
        lambda kept: {n: kept[n] for n in kept if not n.startswith("block2.")},
        r"block2.conv1.weight: expected .*, missing",
    ),
    "more than the net has": (
        "scene",
        lambda kept: {**kept, "extra": torch.zeros(2)},
        "1 of the file are not the net's and are left out: extra",
    ),
    "the head of cities is not one of scenes": ("city", lambda kept: kept, "new: head.0.weight"),
}


@pytest.mark.parametrize("what", WARM_STARTS)
def test_a_warm_start_takes_what_fits_and_says_what_does_not(
    tmp_path: Path, scene: Path, city: Path, what: str
) -> None:
    role, change, told = WARM_STARTS[what]
    source = {"scene": scene, "city": city}[role]
    save_checkpoint(tmp_path / "start.safetensors", change(load_file(source)), read_record(source))
    own = settings("scene")
    try:
        found = warm_start(make_net(own, 3), tmp_path / "start.safetensors", own).told
    except CheckpointError as error:
        found = error.message
    assert re.search(told, found), found


def test_a_part_of_the_neck_that_the_net_has_not_is_refused_by_name(tmp_path: Path) -> None:
    net = CNN14(3, channels=(2, 2, 2, 4, 4, 4), embedding=6, hidden=(), projection=(5, 6))
    save_checkpoint(tmp_path / "net.safetensors", net.state_dict(), {})
    plain = CNN14(3, channels=(2, 2, 2, 4, 4, 4), embedding=6, hidden=())
    with pytest.raises(CheckpointError, match="projection_head"):
        warm_start(plain, tmp_path / "net.safetensors", settings("scene"))


def test_a_backbone_whose_head_is_new_starts_with_the_head(town: World, city: Path) -> None:
    bare = {name: tensor for name, tensor in load_file(city).items() if not name.startswith("head.")}
    save_checkpoint(town.root / "bare.safetensors", bare, {})
    report, watcher = trained(town, "scene", init=town.root / "bare.safetensors", epochs=13, patience=0, lr=None)
    assert watcher.told("(new: head.0.weight")
    config = yaml.safe_load((report.run / "config.yaml").read_text())
    assert [(stage["level"], stage["epochs"], stage["lr"]) for stage in config["stages"]] == [
        (2, 10, 1e-4),
        (1, 2, 2e-4),
        (0, 1, 2e-4),
    ]


def test_a_whole_model_is_tuned_gently_and_drift_is_told_of(town: World) -> None:
    first, _ = trained(town, "scene", epochs=6)
    _, watcher = trained(town, "scene", init=first.checkpoint, stages=(Stage(0, 3, 0.05),), epochs=7)
    assert watcher.told("--epochs, --lr and --preset are not used")
    assert watcher.told("starts at a learning rate of 0.05: above 0.0001")
    assert watcher.told("drift: ")


# -- heads on embeddings -----------------------------------------------------------------------------------------------


def test_a_head_on_cached_embeddings_is_the_head_over_the_running_trunk(town: World, city: Path) -> None:
    results = [
        trained(
            town,
            "city2scene",
            backbone=city,
            epochs=10,
            cached_features=cached,
            output_dir=town.root / str(cached),
        )
        for cached in (True, False)
    ]
    (one, _), (two, _) = results
    for name in ("accuracy", "log_loss"):
        assert one.results["validation"][name] == pytest.approx(two.results["validation"][name], abs=1e-4)
    heads = [read_weights(report.checkpoint).tensors["scene_head.weight"] for report, _ in results]
    torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-4)


def test_the_teacher_of_a_head_is_written_once(town: World, city: Path) -> None:
    run = stopped(town, "city2scene", backbone=city)
    assert not (run / "best.safetensors").exists()
    assert (run / "best_head.safetensors").stat().st_size < city.stat().st_size / 3
    report, _ = trained(town, "city2scene", backbone=city)
    assert report.run.name == run.name
    assert (run / "best.safetensors").read_bytes() == report.checkpoint.read_bytes()
    assert not (run / "best_head.safetensors").exists()


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_a_training_that_diverges_stops_with_the_cause(town: World) -> None:
    with pytest.raises(TrainingError, match=r"became|diverged|not finite") as stopped:
        trained(town, "scene", lr=10.0, optimizer="sgd", momentum=0.99, warmup_epochs=0.0, epochs=30)
    assert stopped.value.hint is not None
    assert "--lr" in stopped.value.hint
    assert not (town.root / "outputs/teacher_scene/global/best.safetensors").exists()


def test_the_epoch_that_is_kept_is_better_than_random_weights(town: World, monkeypatch: pytest.MonkeyPatch) -> None:
    validate_as(monkeypatch, (0.9, 2.0), (0.5, 0.8), (0.7, 0.9), (0.9, 1.5))
    monkeypatch.setattr("kd_cache.train.training.random_loss", lambda *_: 1.0)
    report, _ = trained(town, "scene", epochs=4)
    assert report.results["best_epoch"] == 3


def test_each_stage_has_its_own_patience(town: World, monkeypatch: pytest.MonkeyPatch) -> None:
    validate_as(monkeypatch, (0.9, 0.1), (0.2, 0.9), (0.3, 0.8), (0.4, 0.7), (0.5, 0.6))
    report, _ = trained(town, "scene", stages=(Stage(0, 1, 0.01), Stage(0, 4, 0.01)), patience=2)
    assert report.results["epochs"] == 5
    assert report.results["best_epoch"] == 1


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [2, 4, 10])
def test_balanced_batches_are_half_and_half_and_draw_the_fewer_again(size: int, drop_last: bool) -> None:
    shapes, is_source = [(4, 2)] * 12 + [(3, 2)] * 5, np.array([True] * 9 + [False] * 3 + [True] * 5)
    sample = Sample("x", 0, 0, -1, "A", "train", None, None)
    clips = Clips([sample] * 17, shapes, np.zeros((17, 16), np.uint8), None, None)
    batches = clips.balanced(size, torch.Generator().manual_seed(0), is_source, drop_last=drop_last)
    drawn = np.bincount(np.concatenate(batches), minlength=17)
    for rows in batches:
        assert len(rows) >= 2
        assert len(rows) == size or not drop_last
        assert (rows < 12).all() or (rows >= 12).all()  # of one shape
        if rows[0] < 12:
            assert 2 * is_source[rows].sum() == len(rows)
    if not drop_last:
        assert drawn.tolist() == [1] * 9 + [3] * 3 + [1] * 5
    assert drawn[9:12].max() - drawn[9:12].min() <= 1
    again = clips.balanced(size, torch.Generator().manual_seed(0), is_source, drop_last=drop_last)
    assert all(np.array_equal(*pair) for pair in zip(batches, again, strict=True))


@pytest.mark.parametrize(("epochs", "given", "patience"), [(40, None, 10), (200, None, 50), (200, 0, 0), (3, 7, 7)])
def test_patience_is_a_quarter_of_a_long_stage_unless_it_is_given(
    epochs: int, given: int | None, patience: int
) -> None:
    # A linear head may get worse for a dozen of its 200 epochs before it gets better.
    assert Settings("scene", patience=given).patience_of(Stage(2, epochs, 0.01)) == patience


def test_batches_that_are_added_up_make_the_step_of_one_batch(town: World, own_net: Callable[[str], str]) -> None:
    plain = {"arch": own_net(OWN), "optimizer": "sgd", "momentum": 0.0, "warmup_epochs": 0.0, "lr": 0.01}
    count = len(job(town, "scene").division.train)
    assert count % 4
    made = [
        trained(town, "scene", **plain, batch_size=size, accumulate=together, output_dir=town.root / str(size))[0]
        for size, together in ((count, 1), (4, count))
    ]
    one, other = (load_file(report.checkpoint) for report in made)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)


def test_the_average_is_of_the_steps_alone(town: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []

    def watched(averaged: torch.nn.Module, net: torch.nn.Module, decay: float) -> None:
        average(averaged, net, decay)
        seen.append(net.state_dict()["stem.0.weight"].double().clone())
        kept.append(averaged.state_dict()["stem.0.weight"].double().clone())

    monkeypatch.setattr("kd_cache.train.loop.average", watched)
    trained(town, "scene", ema=0.9)
    for count in (1, 2, len(seen)):
        shares = torch.tensor([0.9 ** (count - 1 - number) for number in range(count)], dtype=torch.float64)
        mean = sum(share * weights for share, weights in zip(shares / shares.sum(), seen[:count], strict=True))
        torch.testing.assert_close(kept[count - 1], mean, rtol=1e-5, atol=1e-6)


def test_a_tensor_under_two_names_is_averaged_once() -> None:
    nets = [torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)) for _ in range(2)]
    for net, value in zip(nets, (0.0, 1.0), strict=True):
        net[1].weight = net[0].weight
        torch.nn.init.constant_(net[0].weight, value)
    average(nets[0], nets[1], 0.9)
    torch.testing.assert_close(nets[0][0].weight.detach(), torch.full((2, 2), 0.1))


def test_what_no_checkpoint_keeps_is_not_averaged() -> None:
    nets = [torch.nn.Linear(2, 2) for _ in range(2)]
    for net in nets:
        net.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)
    average(nets[0], nets[1], 0.5)
    assert nets[0].mask.tolist() == [0.0, -torch.inf]


def test_one_city_teacher_to_stand_on_and_to_start_from(town: World, city: Path) -> None:
    _, watcher = trained(town, "city2scene", backbone=city, init=city, stages=(Stage(2, 1, 1e-3),))
    assert watcher.told("new: scene_head.weight")


def test_a_whole_city2scene_teacher_to_start_from_brings_its_city_teacher(town: World, city: Path) -> None:
    whole, _ = trained(town, "city2scene", backbone=city)
    start = town.root / "start.safetensors"
    start.write_bytes(whole.checkpoint.read_bytes())
    plan = {"stages": (Stage(2, 1, 1e-3),), "output_dir": town.root / "o"}
    one, _ = trained(town, "city2scene", backbone=start, init=start, **plan)
    tensors, before = load_file(one.checkpoint), load_file(start)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items() if name.startswith("city_model"))


def test_what_is_frozen_and_changes_all_the_same_stops_the_training(
    town: World, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd_cache.train import loop

    honest = loop.Loop._step

    def meddling(self: loop.Loop, *args: Any) -> None:
        honest(self, *args)
        with torch.no_grad():
            next(self.net.parameters()).add_(1e-3)

    monkeypatch.setattr(loop.Loop, "_step", meddling)
    with pytest.raises(TrainingError, match="changed while it was frozen"):
        trained(town, "scene", init=scene, stages=(Stage(2, 1, 1e-3),))


def test_a_stage_ends_early_where_nothing_gets_better(town: World) -> None:
    report, watcher = trained(
        town,
        "scene",
        lr=1e-9,
        epochs=40,
        patience=3,
        warmup_epochs=0.0,
        stages=(Stage(0, 40, 1e-9),),
        shuffle_labels=True,
    )
    assert report.results["epochs"] < 40
    assert watcher.told("for 3 epochs neither validation accuracy nor loss got better")


def test_the_learning_rate_warms_up_and_goes_down_a_cosine() -> None:
    stage = parse_stage("level=0,epochs=10,lr=1.0")
    rates = [Schedule(stage, settings("scene", warmup_epochs=2.0), 5).lr(step) for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[30] == pytest.approx(0.5)
    assert rates[-1] < 0.01
    flat = Stage(0, 10, 1.0, schedule="constant")
    assert {Schedule(flat, settings("scene", warmup_epochs=0.0), 5).lr(step) for step in range(50)} == {1.0}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_torch_s(weighted: bool, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(16, 5), torch.randint(5, (16,))
    weights = torch.rand(5) + 0.1 if weighted else None
    plain = Mixed(logits)
    expected = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, labels, plain, weights, smoothing), expected)
    partner = torch.randperm(16)
    mixed = Mixed(logits, torch.full((16,), 0.7), partner)
    if not weighted:
        both = 0.7 * expected + 0.3 * F.cross_entropy(logits, labels[partner], label_smoothing=smoothing)
        torch.testing.assert_close(cross_entropy(logits, labels, mixed, None, smoothing), both)


def test_a_net_of_one_s_own_trains_by_its_factory(town: World, own_net: Callable[[str], str]) -> None:
    source = f"{OWN}\ndef broken(classes):\n    return 3\n\nclass Seven(Small):\n    def __init__(self, classes):\n"
    arch = own_net(f"{source}        super().__init__(classes)\n        self.module = torch.nn.Linear(7, classes)\n")
    report, _ = trained(town, "scene", arch=arch)
    assert load_file(report.checkpoint)["module.weight"].shape == (3, 240)
    with pytest.raises(TeacherError, match=r"must return a torch.nn.Module"):
        trained(town, "scene", arch=arch.replace("small", "broken"))
    with pytest.raises(TeacherError, match=r"mine_net:Seven failed: RuntimeError: .*shapes"):
        trained(town, "scene", arch=arch.replace("small", "Seven"))


def test_features_that_do_not_fit_into_memory_are_read_again_and_give_the_same_weights(
    town: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = trained(town, "scene", output_dir=town.root / "whole")
    monkeypatch.setattr("kd_cache.train.clips.fits", lambda size: False)
    for workers in (0, 2):
        read, watcher = trained(town, "scene", output_dir=town.root / f"read{workers}", workers=workers)
        assert watcher.told("do not fit into memory")
        assert weights(read.checkpoint) == weights(whole.checkpoint)


def test_more_samples_than_a_checkpoint_can_name_are_refused_before_training(
    town: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_cache.train.job.MOST_RECORD", {".safetensors": 22 * 1030, ".pth": 22 * 1030})
    with pytest.raises(UsageError, match="a checkpoint can name 30"):
        trained(town)
