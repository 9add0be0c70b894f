"""A teacher that is hardly better than guessing: said wherever its accuracy is known, refused where that is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run, World
from store_fixtures import origin
from tiny_teachers import Linear

from kd_cache import LogitCache, TeacherError, UsageError, student_loader
from kd_cache.dataset.task import DCASE
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.store.accuracy import Accuracy, below, near_chance
from kd_cache.store.origin import Origin

SAID = "is hardly better than guessing: its accuracy on labelled source rows is 10.00 % (6 of 60)"


class Stuck(Linear):
    """Says the first class, whatever it is given."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        rows = super().forward(features) / 100
        rows[:, 0] += 5
        return rows


def stuck(ckpt: Path | None) -> Linear:
    return Stuck(1)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """60 labelled rows of A, six of each scene, and 8 of b."""
    made = World(tmp_path)
    for number in range(60):
        made.add(number, "A", "train")
    for number in range(60, 68):
        made.add(number, "b", "train")
    return made.write()


@pytest.mark.parametrize(
    ("correct", "rows", "classes", "is_flagged"),
    [
        (0, 10, 10, False),  # ten rows do not cry wolf
        (1, 12, 10, False),
        (1, 300, 10, True),
        (20, 300, 10, True),
        (53, 300, 10, True),  # 17.7 %
        (90, 300, 10, False),
        (0, 0, 10, False),
        (500, 1000, 2, True),
        (65, 100, 2, False),
        (30, 1000, 527, False),  # 16 times chance
        (3, 1000, 527, False),
        (1, 5000, 527, True),
        (7, 100, 1, False),
    ],
)
def test_the_interval_decides_not_the_share(correct: int, rows: int, classes: int, is_flagged: bool) -> None:
    warning = near_chance(origin("scene", classes), Accuracy(correct, rows), DCASE.cities)
    assert (warning is not None) == is_flagged


@pytest.mark.parametrize(
    ("apart", "says"), [((3, 30), "that it did not train on is 10.00 %"), ((1, 10), ""), ((15, 30), "")]
)
def test_what_it_knows_by_heart_does_not_hide_that_it_guesses(apart: tuple[int, int], says: str) -> None:
    warning = near_chance(origin("scene"), Accuracy(280, 300), DCASE.cities, Accuracy(*apart))
    assert (warning is not None) == bool(says)
    assert says in (warning or "")


@pytest.mark.parametrize(("correct", "rows", "low", "high"), [(53, 300, 0.1377, 0.2239), (0, 10, 0, 0.2775)])
def test_the_interval_is_wilsons(correct: int, rows: int, low: float, high: float) -> None:
    assert Accuracy(correct, rows).interval == pytest.approx((low, high), abs=1e-4)


def test_a_city_teacher_names_no_scenes() -> None:
    made = origin("city", 10)
    city = Origin("city", made.fingerprint, "logits", 10, "fp32", DCASE.cities[:10])
    assert near_chance(city, Accuracy(1, 300), DCASE.cities) is None


@pytest.mark.parametrize(("found", "is_below"), [((3, 10), True), ((5, 10), False), ((6, 10), False), ((0, 0), True)])
def test_what_is_asked_for_is_asked_of_the_share(found: tuple[int, int], is_below: bool) -> None:
    assert (below("scene", Accuracy(*found), 0.5) is not None) == is_below
    assert below("scene", Accuracy(*found), None) is None


def test_every_command_that_knows_an_accuracy_says_it(world: World, run: Run) -> None:
    teacher = ("--teacher", f"stuck={__file__}:stuck")
    data = ("--target", "b", "--json-path", world.json_path)
    dumped = run("dump", *data, *teacher, "--only", "stuck")
    assert (dumped.exit_code, dumped.stderr.count(f"stuck {SAID}")) == (0, 1)
    assert "swapped axes" in dumped.stderr
    verified = run("verify", *teacher)
    assert (verified.exit_code, f"stuck {SAID}" in verified.stderr) == (0, True)
    assert SAID in run("info").stdout
    assert run("export", "cache/A2b", "--to", "pt", "--output", "out").exit_code == 0
    adopted = run("adopt", "out/stuck.pt", *data, "--cache-root", "other")
    assert (adopted.exit_code, f"stuck {SAID}" in adopted.stderr) == (0, True)
    with pytest.warns(UserWarning, match="stuck is hardly better than guessing"):
        student_loader(world.json_path, world.root, LogitCache.open(world.cache), 4)


def test_a_least_accuracy_refuses_and_leaves_index_and_view_as_they_were(world: World, run: Run) -> None:
    data = ("--target", "b", "--json-path", world.json_path)
    teacher = ("--teacher", f"stuck={__file__}:stuck")
    assert run("dump", *data, "--teacher", "stuck=tiny_teachers:other", "--only", "stuck").exit_code == 0
    before = {path: path.read_bytes() for path in world.cache.rglob("*.*") if path.parent.name != "packs"}
    refused = run("dump", *data, *teacher, "--only", "stuck", "--min-accuracy", "0.3")
    assert refused.exit_code == 1
    assert "10.00 % (6 of 60), expected at least 30 %" in refused.stderr
    after = {path: path.read_bytes() for path in before}
    assert before == after
    accepted = run("dump", *data, *teacher, "--only", "stuck", "--min-accuracy", "0.1")
    assert accepted.exit_code == 0, accepted.output
    verified = run("verify", *teacher, "--min-accuracy", "0.2", "--json")
    assert verified.exit_code == 1
    (problem,) = json.loads(verified.stdout)["caches"][0]["problems"]
    assert "expected at least 20 %" in problem["reason"]
    assert run("export", "cache/A2b", "--to", "pt", "--output", "out").exit_code == 0
    adopted = run("adopt", "out/stuck.pt", *data, "--cache-root", "other", "--min-accuracy", "0.2")
    assert (adopted.exit_code, (world.root / "other/A2b/cache_index.json").exists()) == (1, False)


@pytest.mark.parametrize("part", [(0, 2), None])
def test_it_is_about_a_whole_cache(world: World, part: tuple[int, int] | None) -> None:
    job = DumpJob(
        world.root / "cache", world.data(), {"tiny": Stuck(1)}, torch.device("cpu"), part=part, min_accuracy=0.5
    )
    with pytest.raises(TeacherError if part is None else UsageError, match="accuracy"):
        dump_logits(job)
