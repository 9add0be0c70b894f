"""A manifest's front end: read strictly, a part of fingerprints, compared with teachers and with features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Run, World
from train_fixtures import job
from train_fixtures import town as town

from kd_cache import TeacherError, load_manifest, teacher_fingerprint
from kd_cache.dataset.front_end import FRONT_ENDS, as_text, chosen, differences
from kd_cache.errors import UsageError
from kd_cache.score.teacher import compare_front_ends
from kd_cache.train.evaluation_job import EvaluationJob, evaluate
from kd_cache.watch import Watcher
from teachers.loading import load_teacher
from teachers.recipes import train_teacher

WORDS = chosen("logmel64", {})[1]


def say(world: World, front_end: Any) -> None:
    content = json.loads(world.json_path.read_text())
    world.json_path.write_text(json.dumps({"front_end": front_end, **content}))


@pytest.mark.parametrize("front_end", [[], {}, "logmel64", {"a": None}, {"a": {}}, {"n_mels": 0}, {"n_mels": "64"}])
def test_what_is_no_front_end_is_refused(world: World, run: Run, front_end: Any) -> None:
    say(world, front_end)
    result = run("check", "--json-path", "dataset.json")
    assert (result.exit_code, "front_end" in result.stderr) == (2, True), result.output


def test_a_front_end_says_what_is_assumed_and_what_was_changed() -> None:
    one, words = chosen("logmel64", {"window": "hamming"})
    assert (one.window, words["name"]) == ("hamming", "logmel64, changed")
    assert "window" not in words["assumed"]
    assert "mel_norm" in words["assumed"]
    assert words["n_mels"] == 64
    assert as_text({**words, "assumed": []}) == as_text(words), "an assumption is no part of the numbers"
    assert {name: differences(name, chosen(name, {})[1]) for name in FRONT_ENDS} == {name: [] for name in FRONT_ENDS}
    with pytest.raises(UsageError, match="no front end is called mfcc"):
        chosen("mfcc", {})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"fmax": 8001.0}, "fmax is 8001.0, expected 50.0 to 8000.0"),
        ({"win_length": 513}, "win_length is 513, expected 1 to 512"),
        ({"window": "kaiser"}, "window is kaiser, expected hann or hamming or ones"),
        ({"log_floor": 0.0}, "log_floor is 0.0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        chosen("logmel64", given)


@pytest.fixture
def bins(world: World) -> World:
    """The world's features have 20 bins."""
    say(world, {**WORDS, "n_mels": 20})
    return world


def parts(world: World) -> dict[str, str]:
    index = json.loads((world.cache / "cache_index.json").read_text())
    return index["kd_cache"]["teachers"]["tiny"]["parts"]  # type: ignore[no-any-return]


def test_it_is_a_part_of_every_fingerprint_and_a_change_makes_rows_stale(dump: Run, run: Run, bins: World) -> None:
    assert dump().exit_code == 0
    own = ("verify", "--target", "b", "--json-path", "dataset.json")
    assert run(*own, *TINY).exit_code == 0
    assert parts(bins)["front_end"] == as_text({**WORDS, "n_mels": 20})
    bins.write()
    say(bins, {**WORDS, "n_mels": 20, "hop_length": 161})
    for known in (TINY, ()):
        assert run(*own, *known).exit_code == 5, "also of teachers that nobody can load"
    bins.write()
    assert run(*own, *TINY).exit_code == 5
    assert dump().exit_code == 0
    assert "front_end" not in parts(bins)


class Stating:
    """A teacher that says what it was trained with."""

    num_classes, value_kind = 3, "logits"

    def __init__(self, feature_spec: str, **parts: str) -> None:
        self.parts = {"architecture": "a/1", "weights": "00", "feature_spec": feature_spec, **parts}

    def fingerprint_parts(self) -> dict[str, str]:
        return self.parts

    def __call__(self, features: Any) -> Any:
        raise AssertionError


def test_a_teacher_s_own_part_of_that_name_is_kept_beside_it() -> None:
    teacher = Stating("x", front_end="mine")
    assert teacher_fingerprint(teacher).parts["front_end"] == "mine"
    both = teacher_fingerprint(teacher, front_end="theirs").parts
    assert (both["front_end"], both["own_front_end"]) == ("theirs", "mine")


class Notes(Watcher):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("stated", "outcome"),
    [
        ("logmel64", None),
        (as_text(WORDS), None),
        ('{"sample_rate": 16000}', None),
        ("64 mels, 16 kHz", "does not state"),
        ("[1]", "does not state"),
        ("cpjku256", "sample_rate: 32000, not 16000"),
        (as_text(chosen("logmel64", {"zscore": "bin"})[1]), "zscore: bin, not clip"),
    ],
)
def test_a_teacher_s_front_end_is_compared_with_the_manifest_s(world: World, stated: str, outcome: str | None) -> None:
    watcher, teachers = Notes(), {"mine": Stating(stated)}
    compare_front_ends(teachers, world.data(), watcher)
    say(world, WORDS)
    data = world.data()
    if outcome is not None and "not " in outcome and "does not" not in outcome:
        with pytest.raises(TeacherError, match=outcome):
            compare_front_ends(teachers, data, watcher)
        return
    compare_front_ends(teachers, data, watcher)
    assert [outcome in note for note in watcher.notes] == ([True] if outcome else [])


def transposed(world: World, file: str) -> None:
    world.write_feature(file, np.zeros((20, 12), np.float32))


def narrower(world: World, file: str) -> None:
    world.write_feature(file, np.zeros((12, 19), np.float32))


@pytest.mark.parametrize(("change", "says"), [(transposed, "12 bins, the manifest's front end has 20; is it [bins"),
                                              (narrower, "19 bins, the manifest's front end has 20")])  # fmt: skip
def test_features_of_another_number_of_bins_are_refused(
    dump: Run, bins: World, change: Callable[[World, str], None], says: str
) -> None:
    change(bins, bins.permitted()[0])
    result = dump()
    assert (result.exit_code, says in result.stderr) == (1, True), result.output
    assert not Path("cache/A2b/cache_index.json").exists()


def test_training_writes_it_down_and_what_stands_on_another_is_refused(town: World) -> None:
    say(town, {**WORDS, "n_mels": 20})
    city = train_teacher(job(town, "city")).checkpoint
    stated = load_teacher(city).fingerprint_parts()["feature_spec"]
    assert stated == load_manifest(town.json_path).front_end_text
    town.write()
    say(town, {**WORDS, "n_mels": 20, "hop_length": 161})
    with pytest.raises(TeacherError, match="hop_length: 160, not 161"):
        train_teacher(job(town, "city2scene", backbone=city))
    measured = EvaluationJob("city", load_teacher(city), town.data(), "test", "city", torch.device("cpu"))
    with pytest.raises(TeacherError, match="hop_length: 160, not 161"):
        evaluate(measured, Watcher())
