"""A student out of a cache: the same bytes however it was interrupted, nothing of the target's labels, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import Run, World, kaiming
from store_fixtures import flip
from train_fixtures import OWN, Listening, own_net, scene, settings, town

import kd_cache.distill.fitting
import teachers
from kd_cache import LogitCache, Provenance, StaleError
from kd_cache.cli.student import _recipe
from kd_cache.cli.student_commands import STUDENT
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.task import DCASE
from kd_cache.distill import student
from kd_cache.distill.recipe import Recipe
from kd_cache.distill.student import StudentJob, StudentTraining, _Taught, train_student
from kd_cache.distill.subset import listed_samples
from kd_cache.errors import TrainingError, UsageError
from kd_cache.score.device import numerics
from kd_cache.train.checkpoint import read_weights
from kd_cache.train.job import TrainReport
from kd_cache.train.loop import Loop
from teachers.cnn14 import CNN14

__all__ = ["own_net", "scene", "town"]
COUNTS = ("--num-scenes", 3, "--num-cities", 3)
QUICK = ("--arch", "cp_resnet", "--channels", "16,16,32,8", "--epochs", 5, "--warmup-epochs", 1, "--batch-size", 8,
         "--ema", 0, "--lr", 0.03, "--time-roll", 0, "--freq-mixstyle", 0, "--device-response", 0)  # fmt: skip


@pytest.fixture
def taught(town: World, run: Run, scene: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The town, and the scene teacher's logits of it; three held-out rows are enough to fit on."""
    monkeypatch.setattr(kd_cache.distill.fitting, "LEAST", 3)
    made = run("dump", "--target", "b", "--json-path", town.json_path, *COUNTS, "--scene-teacher-ckpt", scene,
               "--only", "scene")  # fmt: skip
    assert made.exit_code == 0, made.output
    return town


def job(world: World, provenance: Provenance | None = None, mode: str = "fit", **changed: Any) -> StudentJob:
    recipe = Recipe(**{name: changed.pop(name) for name in list(changed) if name in Recipe.__dataclass_fields__})
    own = {name: changed.pop(name) for name in list(changed) if name in StudentJob.__dataclass_fields__}
    return StudentJob(
        **own,
        settings=settings("scene", **{"batch_size": 8, "epochs": 4, "warmup_epochs": 1, **changed}),
        data=Dataset.load("b", world.json_path, num_scenes=3, num_cities=3),
        output_dir=world.root / "outputs",
        device=torch.device("cpu"),
        workers=0,
        cache=world.cache,
        mode=mode,
        recipe=recipe,
        provenances={"scene": provenance},
    )


def weights(report: TrainReport) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in read_weights(report.checkpoint).tensors.items()}


def command(run: Run, world: World, *more: object, code: int = 0) -> Any:
    result = run("student", "--target", "b", *QUICK, "--json", *more)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)["student"] | {"notes": result.stderr} if code == 0 else result.stderr


def test_interrupted_after_any_epoch_it_ends_in_the_same_bytes(taught: World, scene: Path) -> None:
    provenance = teachers.scene(scene).provenance
    one = job(taught, provenance, mixup=0.3, ramp_epochs=2, balance=True)
    whole = train_student(replace(one, output_dir=taught.root / "whole"))
    content = whole.checkpoint.read_bytes()
    for stop in (1, 2):
        part = replace(one, output_dir=taught.root / f"stopped-{stop}")
        with pytest.raises(KeyboardInterrupt):
            train_student(part, Listening(stop))
        resumed = train_student(part)
        assert resumed.how == "resumed"
        assert resumed.checkpoint.read_bytes() == content
    assert whole.checkpoint == taught.root / "whole/student/A2b/fit/best.safetensors"
    assert whole.results["distillation"]["weights"].keys() == {"scene"}


@pytest.mark.parametrize("mode", ["ce", "fit", "label", "gate"])
def test_permuting_the_target_s_scene_labels_changes_no_bit_of_a_student_nor_its_key(
    taught: World, scene: Path, mode: str
) -> None:
    provenance = teachers.scene(scene).provenance
    before = train_student(job(taught, provenance, mode, apply_to="all", epochs=4))
    for row in taught.rows:
        if row["device_id"] == "b" and row["split"] == "train":
            row["scene_label"] = (row["scene_label"] + 1) % 3
    taught.write()
    after = train_student(replace(job(taught, provenance, mode, apply_to="all", epochs=4), resume="fresh"))
    assert weights(after) == weights(before)
    assert after.results["key"] == before.results["key"]


def test_labels_of_the_target_that_pass_the_manifest_reach_no_loss(taught: World, scene: Path) -> None:
    """As if the guard had been got round: the selection itself says that b is of scene 1,000,000."""
    one = job(taught, teachers.scene(scene).provenance, "label", apply_to="all", loss="dkd")
    data = one.data
    wild = tuple(each._replace(scene_label=10**6) if each.device_id == "b" else each for each in data.selection.samples)
    told = replace(one, data=replace(data, selection=replace(data.selection, samples=wild)), resume="fresh")
    assert max(sample.scene_label for sample in told.division.train) == 10**6
    assert weights(train_student(told)) == weights(train_student(one))


def test_batches_that_are_added_up_make_the_step_of_one_batch(taught: World, own_net: Callable[[str], str]) -> None:
    plain = {"arch": own_net(OWN), "optimizer": "sgd", "momentum": 0.0, "warmup_epochs": 0.0, "lr": 0.01, "epochs": 1}
    count, made = len(job(taught).division.train), []
    for size, accumulate in ((count, 1), (-(-count // 4), 4)):
        one = job(taught, mode="scene", apply_to="all", batch_size=size, accumulate=accumulate, **plain)
        training = StudentTraining(one)
        made.append(read_weights(training.run().checkpoint).tensors)
    for name, tensor in made[0].items():
        torch.testing.assert_close(made[1][name], tensor, rtol=0, atol=1e-6)


def test_it_learns_from_the_teacher_alone_where_hard_labels_weigh_nothing(taught: World) -> None:
    report = train_student(job(taught, mode="scene", alpha=1.0, apply_to="all", epochs=6))
    assert report.results["test"]["accuracy"] > 0.6
    training = StudentTraining(job(taught, mode="scene"))
    files = [sample.file for sample in training.train.samples]
    assert {file[-5] for file in files} == {"a", "b"}
    assert torch.equal(training.teachers, LogitCache.open(taught.cache).batch(files))
    assert (training.train.scenes < 0).tolist() == [file.endswith("-b.npy") for file in files]
    assert all(sample.device_id == "A" for sample in training.validation.samples)


def test_a_training_without_the_rows_scrambled_teaches_nothing(taught: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control to the test above: were rows joined to other clips, it would not learn."""
    rows = StudentTraining._rows
    monkeypatch.setattr(StudentTraining, "_rows", lambda self, *of: rows(self, *of).roll(7, 0))
    with suppress(TrainingError):  # nothing was learnt
        report = train_student(job(taught, mode="scene", alpha=1.0, apply_to="all", epochs=6))
        assert report.results["test"]["accuracy"] < 0.6


def test_a_student_of_the_cache_is_to_the_bit_one_whose_teachers_score_every_batch(
    town: World, run: Run, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CP-ResNet and CNN14 in the loop, on the clean clips, in batches padded to the dump's size."""
    for row in town.rows:  # large enough for CNN14's poolings
        np.save(town.feature(row["file"]), np.tile(np.load(town.feature(row["file"])), (3, 2))[:32, :32])
    net = CNN14(3, (2, 4, 8, 8, 16, 24), 16, (8,))
    kaiming(net)
    says = {"role": "scene", "class_names": teachers.scene(scene).class_names}
    teachers.save_checkpoint(town.root / "cnn14.pth", net.state_dict(), says)
    made = run("dump", "--target", "b", "--json-path", town.json_path, *COUNTS, "--scene-teacher-ckpt", scene,
               "--teacher", f"cnn14=scene,ckpt={town.root / 'cnn14.pth'}", "--only", "scene", "--only", "cnn14",
               "--no-files")  # fmt: skip
    assert made.exit_code == 0, made.output
    one = job(town, mode="mean", apply_to="all", time_roll=1.0, epochs=3)
    cached = train_student(replace(one, output_dir=town.root / "cached"))
    loaded = {"scene": teachers.scene(scene), "cnn14": teachers.scene(town.root / "cnn14.pth")}
    in_order = [loaded[name] for name in LogitCache.open(one.cache).teachers]
    clips, scored = StudentTraining(one).train, []

    def online(self: Any, logits: torch.Tensor, rows: np.ndarray, mixed: Any) -> torch.Tensor:
        (features,) = [features for _, features in clips.load([rows])]
        with numerics(torch.device("cpu"), "fp32", 0):
            padded = torch.cat([features, features[:1].expand(32 - len(rows), -1, -1)])
            said = torch.stack([teacher(padded)[: len(rows)].clone() for teacher in in_order], dim=1)
        scored.append(len(rows))
        at = torch.from_numpy(rows)
        return self._objective(logits, said, self._labels[at], self._is_source[at])

    monkeypatch.setattr(_Taught, "__call__", online)
    live = train_student(replace(one, output_dir=town.root / "live"))
    assert sum(scored) >= 3 * 40
    assert weights(live) == weights(cached)


def test_every_mode_and_number_makes_another_key_and_every_mode_trains(taught: World, scene: Path) -> None:
    provenance = teachers.scene(scene).provenance
    keys = {
        StudentTraining(job(taught, provenance, **changed)).key
        for changed in (
            {}, {"mode": "ce"}, {"mode": "mean"}, {"mode": "weights:scene=2"}, {"mode": "weights:scene=3"},
            {"alpha": 0.4}, {"loss": "dkd"}, {"loss": "dkd", "options": {"beta": 2.0}}, {"temperature": 2.0},
            {"apply_to": "all"}, {"normalise": "mask"}, {"weighting": "pmax"}, {"keep_ce": True}, {"seed": 1},
            {"weighting": "pmax", "raw_weights": True}, {"balance": True}, {"select": "last"},
        )
    }  # fmt: skip
    assert len(keys) == 17
    assert StudentTraining(job(taught, None)).key not in keys


@pytest.mark.parametrize(
    ("given", "ramp"), [({}, 20), ({"kd_ramp_epochs": 3}, 3), ({"kd_warmup_epochs": 2}, 0), ({"loss": "kl"}, 0)]
)
def test_on_the_command_line_the_weight_of_dkd_grows_as_published(given: dict[str, Any], ramp: int) -> None:
    plain = {option.name: option.default for option in STUDENT.options}
    assert _recipe({**plain, "loss": "dkd", **given}).ramp_epochs == ramp


def test_the_command_trains_a_student_that_can_teach(taught: World, run: Run, scene: Path) -> None:
    older = ("--recipe", "city2scene", "--kd-warmup-epochs", 0)
    taken = command(run, taught, *older, "--teacher-mode", "mean_fusion", "--kd-alpha", 0.6,
                    "--select", "last")  # fmt: skip
    assert taken["place"] == "A2b"
    assert taken["results"]["distillation"]["recipe"]["normalise"] == "mask"
    assert taken["results"]["distillation"]["recipe"]["alpha"] == 0.6
    assert "recipe city2scene: loss kl" in taken["notes"]
    assert taken["results"]["distillation"]["select"] == "last"
    assert "a distilled row weighs" in taken["notes"]
    path = Path("outputs/student/A2b/mean/best.safetensors")
    assert Path(taken["checkpoint"]) == path
    own = StudentTraining(job(taught))
    made = teachers.scene(path).provenance
    assert made is not None
    assert made.complete
    assert made.has_trained(sample.file for sample in own.train.samples).all()
    assert not made.has_trained(sample.file for sample in own.validation.samples).any()
    assert read_weights(path).record["distillation"]["teachers"] == LogitCache.open(taught.cache).fingerprints
    (listed,) = json.loads(run("info", "outputs", "--json").stdout)["trained"]
    assert (listed["role"], listed["place"], listed["path"]) == ("student (mean)", "A2b", str(path))
    assert listed["accuracy"]["validation"] == taken["results"]["validation"]["accuracy"]
    small = ("--teacher", f"small=scene,ckpt={path}", "--only", "small", "--cache-root", "small")
    dumped = run("dump", "--target", "b", "--json-path", taught.json_path, *COUNTS, *small)
    assert dumped.exit_code == 0, dumped.output
    measured = run("evaluate", path, "--json-path", taught.json_path, *COUNTS, "--target", "b", "--json")
    assert json.loads(measured.stdout)["accuracy"] == pytest.approx(taken["results"]["test"]["accuracy"])


def test_of_a_subset_nothing_else_trains_validates_or_weighs_the_teachers(taught: World, run: Run, scene: Path) -> None:
    provenance, table = teachers.scene(scene).provenance, Path("split50.csv")
    whole = StudentTraining(job(taught, provenance))
    held = {sample.file for sample in whole.validation.samples}
    chosen = {*taught.permitted()[::2], *sorted(held)[1:]} - {min(held)}
    names = [f"audio/{Path(file).stem}.wav" for file in sorted(chosen, reverse=True)]
    table.write_text("filename\tscene_label\n" + "".join(f"{name}\tbus\n" for name in names))
    one = replace(job(taught, provenance), subset=listed_samples(table, whole.job.data.manifest))
    some = StudentTraining(one)
    assert {sample.file for sample in some.validation.samples} == held & chosen
    assert {sample.file for sample in some.train.samples} == {s.file for s in whole.train.samples} & chosen
    assert whole.said["fitted_on"]["rows"] == len(held) == kd_cache.distill.fitting.LEAST
    assert not some.said["fitted_on"]  # one row too few to fit on
    assert some.key != whole.key
    twin = whole.train.samples[0]._replace(file=f"y/{Path(whole.train.samples[0].file).name}")
    table.write_text(f"filename\n{Path(twin.file).stem}.wav\n")
    with pytest.raises(UsageError, match=twin.file):
        listed_samples(table, [*whole.train.samples, twin])
    for text, says in (("other.wav", "other: no train sample"), ("", "0 of 0 rows"),
                       (taught.rows[-1]["file"], "no train sample"),  # of test
                       (names[1], "leaves 1 samples to train on and 0 of A")):  # fmt: skip
        table.write_text(f"filename\n{text}\n")
        assert says in command(run, taught, "--subset", table, "--teacher-mode", "ce", code=2)


def test_what_made_a_student_is_its_own_rows_and_those_of_the_teachers_that_it_had(taught: World) -> None:
    def made(provenance: Provenance | None, mode: str) -> Provenance:
        return Provenance.from_json(StudentTraining(job(taught, provenance, mode)).record["provenance"])

    elsewhere = "x/elsewhere.npy"
    assert made(Provenance.of([elsewhere]), "mean").has_trained([elsewhere]).all()
    assert not made(Provenance.of([elsewhere]), "ce").has_trained([elsewhere]).any()
    assert not made(None, "mean").complete
    assert made(None, "ce").complete


def test_where_nobody_knows_the_teachers_rows_fit_is_the_mean_and_says_so(taught: World, run: Run, scene: Path) -> None:
    other = Path("other.safetensors")
    report = train_student(job(taught, teachers.scene(scene).provenance, seed=5, epochs=5))
    other.write_bytes(report.checkpoint.read_bytes())
    taken = command(run, taught, "--scene-teacher-ckpt", other)
    assert "its checkpoint is not the one whose rows are cached" in taken["notes"]
    assert "the teachers' mean is taken in place of a fit" in taken["notes"]
    assert taken["results"]["distillation"]["weights"] == {"scene": 1.0}


@pytest.mark.parametrize(("select", "kept", "epochs"), [("macro_accuracy", 3, 4), ("last", 5, 5)])
def test_the_kept_epoch_has_the_best_macro_accuracy_and_least_loss_or_is_the_last(
    taught: World, monkeypatch: pytest.MonkeyPatch, select: str, kept: int, epochs: int
) -> None:
    told = iter([(0.9, 0.5, 0.9), (0.5, 0.7, 0.8), (0.5, 0.7, 0.7), (1.0, 0.6, 0.75), (0.1, 0.1, 0.9)])
    names = ("accuracy", "macro_accuracy", "log_loss")
    monkeypatch.setattr(Loop, "_validated", lambda self: dict(zip(names, next(told), strict=True)))
    report = train_student(job(taught, mode="ce", epochs=5, patience=1, select=select))
    assert (report.results["best_epoch"], report.results["epochs"]) == (kept, epochs)
    assert report.results["distillation"]["select"] == select
    assert report.run is not None
    last = read_weights(report.run / "last.safetensors").tensors
    same = all(torch.equal(tensor, last[name]) for name, tensor in read_weights(report.checkpoint).tensors.items())
    assert same == (select == "last")


def test_it_says_how_often_it_decides_as_its_teachers_do_where_neither_was_trained(taught: World, scene: Path) -> None:
    one = job(taught, mode="scene", fold=1, val_ratio=0.5)
    report = train_student(one)
    files = [sample.file for sample in one.unseen]
    assert files
    assert not {*files} & {sample.file for sample in (*one.division.train, *one.division.validation)}
    assert all(file.endswith("-b.npy") for file in files)
    net, said = teachers.scene(report.checkpoint), LogitCache.open(taught.cache).batch(files)[:, 0].argmax(1)
    own = net(torch.stack([torch.from_numpy(np.load(taught.feature(file))) for file in files])).argmax(1)
    assert report.results["agreement"] == {"rows": len(files), "share": float((own == said).double().mean())}
    assert train_student(replace(one, mode="ce")).results["agreement"] is None


def test_it_warns_of_validation_rows_and_teachers_that_cannot_be_trusted(
    taught: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = [sample.file for sample in job(taught).division.validation]
    for made, count in ((Provenance.of(validation[:2]), 2), (Provenance.of([]), 0), (None, None)):
        training = StudentTraining(job(taught, made, "mean", loss="dkd"), watcher := Listening())
        assert training.said["validation_that_trained"] == {"scene": count}
        training._announce()
        assert watcher.told("2 of 3 validation samples trained") == (count == 2)
        assert watcher.told("dkd needs a label: for rows of the target the teachers' decision stands for it")
    told = {"good": {"accuracy": 0.9}, "poor": {"accuracy": 0.65}, "fair": {"accuracy": 0.75}}
    monkeypatch.setattr(student, "singles", lambda rows: told)
    monkeypatch.setattr(student, "held_out", lambda *of: None)
    training._tell_of_unequal(SimpleNamespace(teachers=(*told,)))
    assert [note for note in watcher.notes if "count alike" in note] == [
        "poor is right on 65.0% of the rows that are held out from training, good on 90.0%: under mean both count "
        "alike (fit weighs them)"
    ]
    balanced = StudentTraining(job(taught, mode="ce", balance=True), watcher)
    of_a = int(balanced.is_source.sum())
    assert balanced.said["drawn"] == {"source": 1, "target": of_a / (len(balanced.train) - of_a)}
    assert watcher.told("an epoch draws each clip of A 1 times, each of b ")
    with pytest.raises(UsageError, match="half of a batch of 7"):
        job(taught, balance=True, batch_size=7)
    with pytest.raises(UsageError, match="the rows of a whole batch, and --accumulate 2"):
        job(taught, loss="dist", accumulate=2)


def test_a_cache_that_does_not_fit_is_refused_by_its_kind(taught: World, run: Run) -> None:
    file = next(file for file in taught.permitted() if file.endswith("-b.npy"))
    kept = taught.feature(file).read_bytes()
    taught.write_feature(file, np.load(taught.feature(file)) + 1)
    assert "features are not those that the teachers scored" in command(run, taught, code=5)
    with pytest.raises(StaleError, match=file):
        StudentTraining(job(taught, mode="mean"))
    taught.feature(file).write_bytes(kept)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LogitCache, "class_names", {"scene": (*DCASE.scenes[1:], DCASE.scenes[0])})
        with pytest.raises(UsageError, match="the same classes in another order"):
            StudentTraining(job(taught, mode="mean"))
    probs = ("--teacher", "p=test_accuracy:probs", "--only", "p", "--cache-root", "probs")
    made = run("dump", "--target", "b", "--json-path", taught.json_path, "--num-cities", 3, *probs)
    assert made.exit_code == 0, made.output
    assert "probs" in command(run, taught, "--cache-root", "probs", "--teacher-mode", "p", code=2)
    assert "there is no cache" in command(run, taught, "--cache-root", "nowhere", code=3)
    assert "known: mean, probs" in command(run, taught, "--teacher-mode", "attention", code=2)
    with pytest.raises(UsageError, match="the teachers have 3 classes"):
        StudentTraining(job(taught, num_scenes=4))
    assert "expected a temperature such as 4" in command(run, taught, "--temperature", "hot", code=2)
    assert "each parameter once" in command(run, taught, "--loss-option", "beta", code=2)
    for older in (("--recipe", "city2scene"), ("--kd-ramp-epochs", 2)):
        assert "are --kd-warmup-epochs" in " ".join(command(run, taught, *older, code=2).split())
    assert "the loss kl has no option beta" in command(run, taught, "--loss-option", "beta=2", code=2)
    with pytest.raises(UsageError, match="no cache for the target c"):
        StudentTraining(replace(job(taught), data=replace(job(taught).data, selection=replace(
            job(taught).data.selection, target="c"))))  # fmt: skip
    taught.rows.append({**taught.rows[0], "file": "x/airport-amsterdam-77-0-a.npy"})
    taught.write_feature("x/airport-amsterdam-77-0-a.npy", np.load(taught.feature(taught.rows[0]["file"])))
    taught.write()
    assert "airport-amsterdam-77" in command(run, taught, code=3)
    taught.rows.pop()
    taught.write()
    (pack,) = (taught.cache / "packs").glob("*.h5")
    flip(pack)
    assert pack.name in command(run, taught, code=4)


@pytest.fixture
def other_features(taught: World) -> Path:
    """Features of another front end, of 24 bins in place of 20, under the manifest's names."""
    for row in taught.rows:
        path = taught.root / "own" / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.pad(np.load(taught.feature(row["file"])), ((0, 0), (4, 0))).astype(np.float16))
    return taught.root / "own"


def test_a_student_with_a_front_end_of_its_own_is_taught_by_key(
    taught: World, other_features: Path, run: Run, scene: Path
) -> None:
    own, names = ("--student-features", "own"), [row["file"] for row in taught.rows]
    taken = command(run, taught, *own, "--teacher-mode", "scene", "--kd-alpha", 1, "--apply-kd-to", "all")
    assert taken["results"]["test"]["accuracy"] > 0.6
    path = taken["checkpoint"]
    record = read_weights(path).record
    assert record["feature_spec"] is None
    assert (other_features / record["own_features"]["file"]).is_file()
    mine = replace(job(taught, mode="mean"), own_features=FeatureSource(other_features))
    shared = StudentTraining(mine)
    twin = StudentTraining(replace(mine, mode="ce"))
    assert twin.train.stacked().shape[1:] == (12, 24)
    assert torch.equal(shared.teachers, LogitCache.open(taught.cache).batch([s.file for s in shared.train.samples]))
    assert shared.key != StudentTraining(job(taught, mode="mean")).key
    assert "own_features" not in StudentTraining(job(taught, mode="mean")).record

    def used(*args: object, code: int = 0) -> str:
        done = run(*args, "--json-path", taught.json_path, *COUNTS, "--target", "b")
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    assert "features of its own, and these are not they" in used("evaluate", path, code=1)
    with h5py.File("own.h5", "w") as file:
        file["features"], file["files"] = np.stack([np.load(other_features / name) for name in names]), names
    for place in ("own", "own.h5"):
        told = json.loads(used("evaluate", path, "--student-features", place, "--json", "--quiet"))
        assert told["accuracy"] == pytest.approx(taken["results"]["test"]["accuracy"])
    teaching = ("dump", "--teacher", f"small=scene,ckpt={path}", "--only", "small", "--cache-root", "small")
    assert "features of its own, and these are not they" in used(*teaching, code=1)
    assert not Path("small").exists()
    used(*teaching, "--data-root", "own")
    foreign = Path("foreign")
    tests = [row for row in taught.rows if row["split"] == "test"]
    for row in tests:
        (foreign / row["file"]).parent.mkdir(parents=True, exist_ok=True)
        (foreign / row["file"]).write_bytes((other_features / row["file"]).read_bytes())
    assert "whether they are made alike is not known" in used("evaluate", path, "--student-features", foreign)
    assert (
        "made by it"
        in run("student", "predict", path, "--features", foreign, "--num-scenes", 3, "--num-cities", 3).stderr
    )


def test_features_of_the_student_s_own_are_all_there_and_the_teachers_are_still_those_they_scored(
    taught: World, other_features: Path, run: Run
) -> None:
    own, files = ("--student-features", "own", "--teacher-mode", "mean"), taught.permitted()
    tested = next(row["file"] for row in taught.rows if row["split"] == "test")
    for file in (*files[:2], tested):
        (other_features / file).rename(f"kept-{Path(file).name}")
    said = command(run, taught, *own, code=1)
    assert f"2 of {len(files)} samples have no feature of the student's own" in said
    assert files[0] in said
    assert files[1] in said
    for file in files[:2]:
        Path(f"kept-{Path(file).name}").rename(other_features / file)
    taught.feature(files[3]).unlink()
    notes = command(run, taught, *own)["notes"]
    assert "1 of 27 test samples have no feature of the student's own" in notes
    assert "features that the teachers scored are not at hand" in notes
    taught.write_feature(files[3], np.zeros((12, 20), np.float32))
    assert files[3] in command(run, taught, *own, code=5)
    np.save(other_features / files[3], np.zeros((12, 20), np.float32))
    assert "of different sizes: [[20], [24]]" in command(run, taught, *own, code=1)
