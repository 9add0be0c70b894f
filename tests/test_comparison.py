"""Students compared: the same batches for all of one seed, nothing trained twice, and what signs of seeds may say."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, World
from test_distill_student import QUICK, taught
from train_fixtures import scene, town

from kd_cache.distill import comparison
from kd_cache.distill.comparison import Comparison, StudentRun, chance, verdict
from kd_cache.distill.recipe import parse_modes
from kd_cache.distill.student import StudentTraining
from kd_cache.errors import TrainingError, UsageError
from kd_cache.train.resampling import Cells

__all__ = ["scene", "taught", "town"]
HOME = Path("outputs/student/A2b")


def compared(run: Run, *more: object) -> dict[str, Any]:
    result = run("student", "compare", "--target", "b", *QUICK, "--json", *more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) | {"notes": result.stderr}


def test_every_seed_is_compared_with_its_own_twin_and_nothing_is_trained_twice(taught: World, run: Run) -> None:
    few = compared(run, "--modes", "mean_fusion", "--seeds", 1, "--seed", 3)
    assert list(few["modes"]) == ["ce", "mean"]
    more = compared(run, "--modes", "scene,ce,mean", "--seeds", 3, "--seed", 3)
    folder = Path(more["folder"])
    assert few["folder"] == more["folder"]
    assert folder.parent == HOME
    assert folder.name.startswith("compare-")
    assert more["notes"].count("is there already") == 2
    assert more["seeds"] == [3, 4, 5]
    measured = {
        (path.parts[-5], path.parts[-4]): json.loads(path.read_text())["test"]
        for path in folder.glob("*/seed-*/runs/*/results.json")
    }
    assert len(measured) == len(list(folder.glob("*/*/runs/*"))) == 9
    for mode in ("scene", "mean"):
        pairs = [(measured[mode, f"seed-{seed}"], measured["ce", f"seed-{seed}"]) for seed in (3, 4, 5)]
        for figure in ("accuracy", "log_loss"):
            apart = [one[figure] - twin[figure] for one, twin in pairs]
            assert more["modes"][mode][figure]["difference"]["by_seed"] == apart
            assert more["modes"][mode][figure]["difference"]["mean"] == pytest.approx(sum(apart) / 3)
        of_b = [one["by"]["device_group"]["target"]["accuracy"] for one, _ in pairs]
        assert more["modes"][mode]["target"]["by_seed"] == of_b
        assert more["verdicts"][mode] == verdict(more["modes"][mode]["accuracy"]["difference"]["by_seed"])
        apart = more["modes"][mode]["accuracy"]["difference"]
        assert apart["interval"][0] <= apart["mean"] <= apart["interval"][1]
        assert len(apart["intervals_by_seed"]) == 3
        assert more["modes"][mode]["ece"]["difference"]["interval"] is None
    low, high = more["modes"]["scene"]["target"]["difference"]["interval"]
    assert -1 <= low <= high <= 1
    alone = run("student", "--target", "b", *QUICK, "--teacher-mode", "ce", "--seed", 4)
    assert alone.exit_code == 0
    assert (HOME / "ce/best.safetensors").read_bytes() == (folder / "ce/seed-4/best.safetensors").read_bytes()
    with (folder / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["mode"], row["seed"]) for row in rows] == [
        (mode, seed) for mode in ("ce", "scene", "mean") for seed in ("3", "4", "5")
    ]
    assert [float(row["accuracy"]) for row in rows[3:6]] == more["modes"]["scene"]["accuracy"]["by_seed"]
    told = more["modes"]["scene"]["accuracy"]["difference"]["intervals_by_seed"]
    assert [[float(row[f"difference_{end}"]) for end in ("low", "high")] for row in rows[3:6]] == told
    assert json.loads((folder / "comparison.json").read_text())["verdicts"] == more["verdicts"]
    markdown = (folder / "comparison.md").read_text()
    assert "over 1,000 draws of the test locations" in markdown
    assert all(f"- {mode}: {said}\n" in markdown for mode, said in more["verdicts"].items())
    other = compared(run, "--modes", "mean", "--seeds", 1, "--seed", 3, "--kd-alpha", 0.9)
    assert other["folder"] != more["folder"]


def test_a_student_that_learns_nothing_is_a_finding_and_not_the_end(
    taught: World, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    trains = StudentTraining.run

    def run_or_not(self: StudentTraining) -> Any:
        if self.job.mode == "mean" and self.settings.seed == 1:
            raise TrainingError("it learnt nothing")
        return trains(self)

    monkeypatch.setattr(StudentTraining, "run", run_or_not)
    result = run("student", "compare", "--target", "b", *QUICK, "--seed", 0, "--modes", "mean",
                 "--seeds", 2)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "mean: cannot be compared: 1 of 2 seeds have no figure" in result.stdout
    assert "mean, seed 1: it learnt nothing" in result.stdout


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    taught: World, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "StudentTraining", None)
    for args, says in (
        (("--modes", "mean,attention"), "no fusion is called attention"),
        (("--modes", "mean,,fit"), "expected modes such as"),
        (("--seeds", 0), "greater than or equal to 1"),
    ):
        result = run("student", "compare", "--target", "b", *args)
        assert (result.exit_code, says in " ".join(result.stderr.split())) == (2, True), result.output


def drawn_students(chance: np.random.Generator, places: int, each: int) -> Comparison:
    """Three seeds of ``ce`` and ``fit`` on random locations, whose clips are easy or hard together. Over all locations
    there are, ``fit`` is better by ten points of b's clips and by none of A's.
    """
    easy, better = chance.uniform(0.3, 0.6, (places, 1)), chance.uniform(-0.2, 0.4, (places, 1))
    names, groups = np.repeat(np.arange(places), 2 * each), ["source", "target"] * places * each
    labels = np.repeat(chance.integers(3, size=places), 2 * each)
    runs = []
    for mode, seed in itertools.product(("ce", "fit"), range(3)):
        likely = easy + np.tile([0, 1], each) * (mode == "fit") * better
        right = chance.random(likely.shape) < likely
        logits = np.eye(3)[(labels + ~right.reshape(-1)) % 3]
        split = {"by_location": Cells.of(logits, labels, names, groups).as_json()}
        runs.append(StudentRun(mode, seed, {"test": json.loads(json.dumps(split))}))
    return Comparison(Path(), ["ce", "fit"], range(3), runs)


def test_intervals_of_a_difference_hold_the_truth_nineteen_times_of_twenty() -> None:
    chance, held = np.random.default_rng(0), Counter[str]()
    truths = {"target": 0.1, "accuracy": 0.05, "source": 0.0}
    for _ in range(60):
        one = drawn_students(chance, 40, 6)
        for figure, truth in truths.items():
            low, high = one.intervals("fit", figure)[-1]
            held[figure] += low <= truth <= high
    assert all(53 <= count <= 60 for count in held.values()), held


def test_without_the_same_locations_there_is_no_interval() -> None:
    one = drawn_students(np.random.default_rng(1), 5, 2)
    other = drawn_students(np.random.default_rng(1), 6, 2)
    mixed = replace(one, runs=[run if run.seed or run.mode == "ce" else fresh
                               for run, fresh in zip(one.runs, other.runs, strict=True)])  # fmt: skip
    by_seed = mixed.intervals("fit")
    assert [each is None for each in by_seed] == [True, False, False, True]
    lost = replace(one, runs=[StudentRun(run.mode, run.seed, None, "nothing") for run in one.runs])
    assert lost.intervals("fit") == [None] * 4


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ([0.01, 0.03, 0.02], "better in 3 of 3 seeds, +2.0 points on average"),
        ([-0.01, -0.03, -0.02], "worse in 3 of 3 seeds, −2.0 points on average"),
        ([0.01, 0.02, 0.0], "no more than luck (better in 2 of 3 seeds)"),
        ([0.01, 0.02, -0.3], "no more than luck (better in 2 of 3 seeds)"),
        ([0.1, 0.2], "no more than luck (better in 2 of 2 seeds, and fewer than 3 tell nothing)"),
        ([0.01] * 9 + [-0.01], "better in 9 of 10 seeds, +0.8 points on average"),
        ([-0.01] * 8 + [0.01] * 2, "no more than luck (better in 2 of 10 seeds)"),
        ([0.0] * 4, "no more than luck (better in 0 of 4 seeds)"),
        ([0.01, None, 0.02], "cannot be compared: 1 of 3 seeds have no figure"),
    ],
)
def test_the_verdict(differences: list[float | None], says: str) -> None:
    assert verdict(differences) == says


def test_the_sign_test_and_the_modes_by_commas() -> None:
    assert [chance(3, 0), chance(0, 5), chance(9, 1), chance(1, 1), chance(0, 0)] == [0.25, 0.0625, 22 / 1024, 1, 1]
    assert parse_modes("ce_only, weights:a=.7,b=.3,fit") == ["ce", "weights:a=.7,b=.3", "fit"]
    with pytest.raises(UsageError, match="expected modes"):
        parse_modes("")
