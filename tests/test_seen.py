"""Notes of features: believed only where nothing can have changed, and never needed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from store_fixtures import Rows, names

import kd_cache.score.unchanged
from kd_cache.score.unchanged import SEEN_NAME, SETTLED, Seen

ROWS = Rows.of(names(9))
SHAPES = np.arange(18, dtype=np.int32).reshape(9, 2) + 1
MOMENT = 10_000_000_000


@pytest.fixture(autouse=True)
def _notes(_no_notes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here notes are taken as ever."""
    monkeypatch.setattr(kd_cache.score.unchanged, "SETTLED", SETTLED)


def stats(ctime: int = 0) -> np.ndarray:
    made = np.arange(45, dtype=np.int64).reshape(9, 5) + 1
    made[:, 4] = ctime
    return made


def seen(numbers: range = range(9), ctime: int = 0) -> Seen:
    part = np.array(numbers)
    return Seen.nothing().record(ROWS.keys[part], stats(ctime)[part], SHAPES[part], ROWS.inputs[part], MOMENT)


def test_what_was_recorded_is_found_in_any_order(tmp_path: Path) -> None:
    assert seen().save(tmp_path / SEEN_NAME)
    order = np.random.default_rng(0).permutation(9)
    for notes in (seen(), Seen.load(tmp_path / SEEN_NAME)):
        believed, digests, shapes = notes.lookup(ROWS.keys[order], stats()[order])
        assert believed.all()
        np.testing.assert_array_equal(digests, ROWS.inputs[order])
        np.testing.assert_array_equal(shapes, SHAPES[order])


@pytest.mark.parametrize("column", range(5))
def test_one_other_number_and_the_note_is_not_believed(column: int) -> None:
    now = stats()
    now[3, column] += 1
    believed, digests, shapes = seen().lookup(ROWS.keys, now)
    assert np.flatnonzero(~believed).tolist() == [3]
    assert not digests[3].any()
    assert not shapes[3].any()


def test_a_file_of_which_nothing_can_be_said_is_neither_noted_nor_believed() -> None:
    unknown = stats()
    unknown[2] = -1
    notes = Seen.nothing().record(ROWS.keys, unknown, SHAPES, ROWS.inputs, MOMENT)
    assert len(notes) == 8
    assert np.flatnonzero(~notes.lookup(ROWS.keys, unknown)[0]).tolist() == [2]
    assert np.flatnonzero(~seen().lookup(ROWS.keys, unknown)[0]).tolist() == [2]


@pytest.mark.parametrize(
    ("ctime", "noted"), [(MOMENT - SETTLED, 9), (MOMENT - SETTLED + 1, 0), (MOMENT, 0), (MOMENT + 10 * SETTLED, 0)]
)
def test_a_file_that_changed_just_now_is_not_noted(ctime: int, noted: int) -> None:
    assert len(seen(ctime=ctime)) == noted


def test_later_notes_replace_earlier_ones_and_others_stay() -> None:
    later = stats() + 100
    later[:, 4] = 0
    part = np.array([7, 2])
    notes = seen().record(ROWS.keys[part], later[part], SHAPES[part], ROWS.inputs[part], MOMENT)
    assert len(notes) == 9
    assert np.flatnonzero(notes.lookup(ROWS.keys, stats())[0]).tolist() == [0, 1, 3, 4, 5, 6, 8]
    assert np.flatnonzero(notes.lookup(ROWS.keys, later)[0]).tolist() == [2, 7]
    fresh = stats(MOMENT)  # changed just now: the old note must go all the same
    notes = seen().record(ROWS.keys[part], fresh[part], SHAPES[part], ROWS.inputs[part], MOMENT)
    assert len(notes) == 7
    assert not notes.lookup(ROWS.keys[part], stats()[part])[0].any()


def test_only_what_is_permitted_is_remembered() -> None:
    notes = seen(range(6)).only(ROWS.keys[[8, 4, 1]])
    assert np.flatnonzero(notes.lookup(ROWS.keys, stats())[0]).tolist() == [1, 4]
    assert len(seen().only(ROWS.keys[:0])) == 0


def test_a_missing_or_impossible_file_gives_no_notes_and_no_error(tmp_path: Path) -> None:
    path = tmp_path / SEEN_NAME
    assert len(Seen.load(path)) == 0
    path.mkdir()
    assert len(Seen.load(path)) == 0
    assert not seen().save(path)
    path.rmdir()
    os.mkfifo(path)
    assert len(Seen.load(path)) == 0
    assert not seen().save(tmp_path / "no" / "folder")
