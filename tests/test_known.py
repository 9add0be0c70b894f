"""What a cache holds of a teacher: many samples at once, as one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from store_fixtures import Rows, names, origin

from kd_cache.score.existing import FEATURE_CHANGED, FRESH, NEW, Known
from kd_cache.store.cache import CacheFolder
from kd_cache.store.snapshot import Snapshot

NOW, EARLIER, OLDER = origin(), origin(weights="earlier"), origin(weights="older", architecture="tiny/0")


@pytest.fixture
def wanted() -> Rows:
    return Rows.of(names(12))


def known(path: Path, wanted: Rows) -> Known:
    (path / "packs").mkdir(exist_ok=True)
    return Known(NOW, Snapshot(CacheFolder(path)), wanted.keys)


def test_without_packs_all_is_new(tmp_path: Path, wanted: Rows) -> None:
    held = known(tmp_path, wanted)
    assert held.states(np.arange(12), wanted.inputs) == [NEW] * 12
    assert not held.was_scored(np.arange(12)).any()
    assert not held.are_fresh(np.arange(12), wanted.inputs).any()


def test_every_state_in_one_call_and_one_by_one(tmp_path: Path, wanted: Rows) -> None:
    (tmp_path / "packs").mkdir()
    packs = tmp_path / "packs"
    changed = Rows.of(wanted.files, inputs=1)
    wanted.part([0, 1]).write(packs, NOW)
    changed.part([1, 2, 3]).write(packs, NOW)  # 1 has rows of both features
    Rows.of(wanted.files, inputs=2).part([3]).write(packs, NOW)
    wanted.part([0, 4, 5]).write(packs, EARLIER)  # 0 is fresh all the same
    wanted.part([5, 6]).write(packs, OLDER)
    Rows.of(wanted.files).part([7]).write(packs, origin("other"))
    held = known(tmp_path, wanted)
    older = "architecture, weights changed"
    both = {older, "weights changed"}
    found = held.states(np.arange(12), wanted.inputs)
    assert found[:5] == [FRESH, FRESH, FEATURE_CHANGED, FEATURE_CHANGED, "weights changed"]
    assert found[5] in both
    assert found[6:] == [older, *[NEW] * 5]
    assert [held.state(number, wanted.inputs[number].tobytes()) for number in range(12)] == found
    assert held.was_scored(np.arange(12)).tolist() == [True] * 7 + [False] * 5
    picked = np.array([6, 1, 3, 1])
    assert held.states(picked, changed.inputs[picked]) == [older, FRESH, FRESH, FRESH]
    assert held.are_fresh(picked, wanted.inputs[picked]).tolist() == [False, True, False, True]
    assert [held.holds(number) for number in range(12)] == [True] * 4 + [False] * 8
