"""Features that are not there, that two samples share, or whose axes are swapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World
from tiny_teachers import Linear

from kd_cache import TeacherError
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.watch import Watcher


def dump(world: World, teacher: Any = None) -> list[str]:
    class Notes(Watcher):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    teachers = {"tiny": teacher or Linear(1)}
    dump_logits(DumpJob(world.root / "cache", world.data(), teachers, torch.device("cpu"), workers=0), Notes())
    return [note for note in notes if "features" in note]


def fill(world: World, numbers: Sequence[int], value: float | np.ndarray, dtype: str = "f4") -> list[str]:
    """Write ``value`` as the features of these samples of one length; gives their files."""
    files = [world.rows[number]["file"] for number in numbers]
    for file in files:
        world.write_feature(file, np.zeros((12, 20), dtype) + np.asarray(value, dtype))
    return files


def test_features_of_their_own_are_nothing_to_speak_of(world: World) -> None:
    assert dump(world) == []


@pytest.mark.parametrize("numbers", [[3], [0, 1, 3]])
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_features_of_zeros_were_never_written(world: World, dtype: str, numbers: list[int]) -> None:
    files = fill(world, numbers, 0, dtype)
    (note,) = dump(world)
    assert note.startswith(f"{len(numbers)} of 20 features hold nothing but zeros")
    assert all(file in note for file in files)
    assert dump(world) == [note]  # what is known is said at each dump


def test_one_feature_under_several_names_is_counted_with_contrary_labels(world: World) -> None:
    random = np.random.default_rng(5).normal(size=(12, 20))
    files = fill(world, [0, 1], random)  # scenes 0 and 1 of the source
    (note,) = dump(world)
    assert note.startswith("2 of 20 samples have the same features as another, 2 of them with other scene labels")
    assert all(file in note for file in files)
    assert "single value" not in note
    fill(world, [12, 14, 16], random.T[:12, :1])  # of the target, which has no labels; constant over bins
    assert dump(world)[0].startswith("5 of 20 samples have the same features as another, 2 of them")


def test_a_value_that_is_not_zero_may_be_all_that_there_is(world: World) -> None:
    fill(world, [12, 14, 16], -11.5)
    assert dump(world)[0].endswith("which hold a single value")


@pytest.mark.parametrize(("bins", "said"), [(20, None), (64, "[12, 20]"), (12, "its axes are swapped")])
def test_a_teacher_that_says_its_bins_gets_no_others(world: World, bins: int, said: str | None) -> None:
    teacher: Any = Linear(1)
    teacher.num_bins = bins
    if said is None:
        assert dump(world, teacher) == []
        return
    with pytest.raises(TeacherError, match=rf"teacher tiny takes features \[T, {bins}\]") as caught:
        dump(world, teacher)
    assert said in caught.value.message or "[16, 20]" in caught.value.message or "[24, 20]" in caught.value.message
    assert not (world.cache / "cache_index.json").exists()
