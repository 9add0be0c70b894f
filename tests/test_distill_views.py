"""A student on views: in each epoch one of every clip, just as the teachers scored it, with their rows of just that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import Run, World
from test_distill_student import COUNTS, command, scene, town
from test_views_dump import POLICY_FILE, views

from kd_cache import LogitCache, StaleError
from kd_cache.dataset.views import Policy
from kd_cache.distill.views import EpochViews
from kd_cache.train.clips import Clips
from kd_cache.watch import Watcher

__all__ = ["scene", "town", "views"]


def test_an_epoch_s_inputs_and_rows_are_of_the_same_views(views: Run, world: World) -> None:
    assert views(3).exit_code == 0
    cache, data, policy = LogitCache.open(world.cache), world.data(), Policy.of(POLICY_FILE)
    clips = Clips.read(data.features, data.selection.samples, 0, Watcher())
    epochs = EpochViews(cache, clips, seed=1, checked=64)
    drawn, clips.changed = [], epochs.replay
    for epoch in (0, 1, 0):
        rows = epochs.begin(epoch)
        taken = epochs._draws[:, 0]
        drawn.append(taken.tolist())
        assert (rows == cache.batch(cache.rows([each.file for each in clips.samples]), view=taken)).all()
        for batch, features in clips.load(clips.in_order(4)):
            for number, array in zip(batch.tolist(), features.numpy(), strict=True):
                file = clips.samples[number].file
                assert (array == policy.augmented(file, int(taken[number]), np.load(world.feature(file)))[0]).all()
    assert drawn[0] == drawn[2] != drawn[1]
    assert set(drawn[0]) == {0, 1, 2}

    clips._arrays = [array + np.float32(1) for array in clips._arrays or ()]
    with pytest.raises(StaleError, match="comes out otherwise"):
        clips.stacked() if len(set(clips.shapes)) == 1 else list(clips.load(clips.in_order(4)))
    unchecked = EpochViews(cache, clips, seed=1, checked=0)
    unchecked.begin(0)
    assert isinstance(unchecked.replay(np.array([0]), np.stack(clips._arrays[:1])), np.ndarray)


def test_student_on_views(town: World, run: Run, scene: Path) -> None:
    (town.root / "policy.yaml").write_text(yaml.safe_dump({"roll": {"frames": [1, 4]}}))
    with_views = ("--views", 2, "--policy", "policy.yaml")
    made = run("dump", "--target", "b", "--json-path", town.json_path, *COUNTS, "--scene-teacher-ckpt", scene,
               "--only", "scene", *with_views)  # fmt: skip
    assert made.exit_code == 0, made.output
    found = command(run, town, "--teacher-mode", "scene", "--views")
    told = found["results"]["distillation"]["views"]
    assert (told["count"], told["policy"]) == (2, Policy.of({"roll": {"frames": [1, 4]}}).digest)
    assert "leave out time_mask" in command(run, town, "--views", "--time-mask", 0.1, code=2)
