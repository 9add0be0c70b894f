"""Shards: what was scored becomes one durable pack per teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from store_fixtures import Rows, names, origin

from kd_cache.score.commits import Shard

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
