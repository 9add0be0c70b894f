"""Shards: what was scored becomes durable packs, at once or in a thread of its own."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from store_fixtures import Rows, names, origin

import kd_cache.shard
from kd_cache.errors import StoreError
from kd_cache.shard import Commits, Shard
from kd_cache.store.pack import open_pack, write_pack

ROWS = Rows.of(names(20), 3, "fp16")
ORIGINS = {"scene": origin("scene", 3, "fp16"), "city": origin("city", 3, "fp16")}
UNSORTED = np.random.default_rng(3).permutation(20)


def encoded(numbers: np.ndarray) -> list[bytes]:
    return [ROWS.files[number].encode() for number in numbers]


def add(shard: Shard, teacher: str, numbers: np.ndarray) -> None:
    shard.add_rows(teacher, ROWS.keys[numbers], ROWS.inputs[numbers], encoded(numbers), ROWS.logits[numbers])


def shard(directory: Path, size: int = 100, seconds: float = 1e9) -> Shard:
    return Shard(directory, ORIGINS, size, seconds)


def test_batches_in_any_order_give_the_pack_of_all_of_them(tmp_path: Path) -> None:
    made = shard(tmp_path / "packs")
    for numbers in (UNSORTED[:7], UNSORTED[7:], UNSORTED[:0]):
        add(made, "scene", numbers)
    add(made, "city", UNSORTED[:4])
    made.commit()
    assert made.is_empty
    expected = [
        ROWS.write(tmp_path, ORIGINS["scene"]).name,
        ROWS.part(UNSORTED[:4].tolist()).write(tmp_path, ORIGINS["city"]).name,
    ]
    assert [path.name for path in made.written] == expected
    made.commit()
    assert len(made.written) == 2


def test_rows_one_by_one_give_the_same_pack(tmp_path: Path) -> None:
    made = shard(tmp_path)
    for number in UNSORTED.tolist():
        made.add("scene", ROWS.files[number], ROWS.inputs[number].tobytes(), ROWS.logits[number])
    made.commit()
    assert [path.name for path in made.written] == [ROWS.write(tmp_path / "", ORIGINS["scene"]).name]


def test_a_commit_is_due_after_so_many_samples_or_seconds(tmp_path: Path) -> None:
    by_size, by_time = shard(tmp_path, size=5), shard(tmp_path, seconds=0)
    assert (by_size.due, by_time.due) == (False, False)
    add(by_size, "scene", np.arange(4))
    add(by_size, "city", np.arange(4))
    add(by_time, "scene", np.arange(1))
    assert (by_size.due, by_time.due) == (False, True)
    add(by_size, "city", np.arange(4, 5))
    assert by_size.due
    by_size.commit()
    assert not by_size.due


def test_columns_of_different_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 keys, 3 inputs, 2 names, 3 rows"):
        shard(tmp_path).add_rows("scene", ROWS.keys[:3], ROWS.inputs[:3], [b"a", b"b"], ROWS.logits[:3])


# -- in a thread ------------------------------------------------------------------------------------------------------


class Gate:
    """Keeps `write_pack` from returning until it is opened, or makes it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered, self.error = threading.Event(), threading.Event(), False

        def late(*arguments: object) -> Path:
            self.entered.set()
            assert self.open.wait(60)
            if self.error:
                raise StoreError("cannot write: No space left on device")
            return write_pack(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(kd_cache.shard, "write_pack", late)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_rows_count_as_kept_when_they_are_on_the_disk(tmp_path: Path, gate: Gate) -> None:
    with Commits(tmp_path, ORIGINS, 100, 1e9) as commits:
        add(commits.filling, "scene", UNSORTED[:10])
        commits.hand_over(10)
        assert gate.entered.wait(60)
        add(commits.filling, "scene", UNSORTED[10:])  # the next one fills meanwhile
        assert (commits.durable(), commits.written) == (0, [])
        gate.open.set()
        commits.finish(20)
        assert commits.durable() == 20
    packs = [open_pack(path) for path in commits.written]
    assert [len(pack) for pack in packs] == [10, 10]
    assert {file for pack in packs for file in pack.files} == set(ROWS.files)


def test_a_mark_without_new_rows_is_durable_with_those_before(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    with Commits(tmp_path, ORIGINS, 100, 1e9) as commits:
        commits.hand_over(3)
        assert commits.durable() == 3
        add(commits.filling, "scene", UNSORTED)
        commits.hand_over(23)
        commits.hand_over(25)
        assert (commits.durable(), len(commits.written)) == (25, 1)


@pytest.mark.parametrize("how", ["hand_over", "durable", "finish"])
def test_what_goes_wrong_in_the_thread_reaches_the_caller(tmp_path: Path, gate: Gate, how: str) -> None:
    gate.error = True
    with Commits(tmp_path, ORIGINS, 100, 1e9) as commits:
        add(commits.filling, "scene", UNSORTED[:10])
        commits.hand_over(10)
        gate.open.set()
        with pytest.raises(StoreError, match="No space left"):
            asked(commits, how)
        gate.error = False
        add(commits.filling, "scene", UNSORTED[10:])
        commits.finish(20)  # what came later is kept all the same, but it does not count
        assert (commits.durable(), len(commits.written)) == (0, 1)


def asked(commits: Commits, how: str) -> None:
    if how != "durable":
        getattr(commits, how)(20)
    while how == "durable" and commits.durable() == 0:
        time.sleep(0.01)


def test_the_teachers_written_before_one_fails_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(directory: Path, made_by: object, *rest: object) -> Path:
        if made_by is ORIGINS["city"]:
            raise StoreError("cannot write: No space left on device")
        return write_pack(directory, made_by, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kd_cache.shard, "write_pack", fails)
    with Commits(tmp_path, ORIGINS, 100, 1e9) as commits:
        for teacher in ORIGINS:
            add(commits.filling, teacher, UNSORTED)
        with pytest.raises(StoreError, match="No space left"):
            commits.finish(20)
        assert [path.name.partition("-")[0] for path in commits.written] == ["scene"]
        assert commits.durable() == 0
