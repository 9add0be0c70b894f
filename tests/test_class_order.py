"""Which class a column is: compared wherever rows of two teachers meet, and with the task's labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, World
from store_fixtures import Rows, make_cache, names, origin
from tiny_teachers import Linear

from kd_cache import LogitCache, StoreError, TeacherError, UsageError, student_loader
from kd_cache.care.diff import diff_caches
from kd_cache.care.verify import VerifyJob, verify_cache
from kd_cache.dataset.task import DCASE
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.store.cache import CacheFolder
from kd_cache.store.classes import differing_columns, misplaced
from kd_cache.store.origin import Origin
from kd_cache.store.snapshot import Snapshot

CPU = torch.device("cpu")
SCENES = DCASE.scenes
SWAPPED = (*SCENES[:4], SCENES[5], SCENES[4], *SCENES[6:])
OWN = tuple(f"class{number}" for number in range(10))


class Naming(Linear):
    def __init__(self, class_names: Sequence[str] | None, seed: int = 1) -> None:
        super().__init__(seed)
        self.class_names = class_names


def dump(world: World, **class_names: Sequence[str] | None) -> None:
    teachers = {name: Naming(listed) for name, listed in class_names.items()}
    dump_logits(DumpJob(world.root / "cache", world.data(), teachers, CPU, workers=0, batch_size=8))


def named(teacher: str, classes: Sequence[str] | None) -> Origin:
    made = origin(teacher, class_order=json.dumps(classes))
    return Origin(teacher, made.fingerprint, "logits", 3, "fp32", None if classes is None else tuple(classes))


def cache_of(path: Path, **class_names: Sequence[str] | None) -> Path:
    rows = {name: Rows.of(names(4), seed=n) for n, name in enumerate(class_names)}
    return make_cache(path, rows, {name: named(name, listed) for name, listed in class_names.items()}).path


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (None, OWN, None),
        (OWN, OWN, None),
        (["Public Square", "metro-station"], ["public_square", "METRO STATION"], None),
        (["bus", "tram"], ["tram", "bus"], "the same classes in another order: column 0 is bus of A, tram of B"),
        (["bus", "tram"], ["bus", "train"], "other classes: column 1 is tram of A, train of B"),
        (["bus"], ["bus", "tram"], "other classes: column 1 is nothing of A, tram of B"),
        (["bus", "bus", "tram"], ["bus", "tram", "tram"], "other classes: column 1 is bus of A, tram of B"),
    ],
)
def test_names_are_compared_column_by_column(mine: Any, theirs: Any, expected: str | None) -> None:
    found = differing_columns("A", mine, "B", theirs)
    assert found is None if expected is None else expected in str(found)


@pytest.mark.parametrize(
    ("found", "is_wrong"),
    [
        (None, False),
        (OWN, False),  # another task's classes: nothing to compare
        (SCENES, False),
        ((*SCENES, "none of them"), False),
        (("none of them", *SCENES), True),
        (SWAPPED, True),
        (DCASE.cities, False),
        (DCASE.cities[::-1], True),
        (("class0", "class1", "Class0"), True),
        ((*SCENES, "bus"), True),
    ],
)
def test_columns_named_after_the_tasks_labels_stand_where_these_do(found: Any, is_wrong: bool) -> None:
    assert (misplaced(found, SCENES, DCASE.cities) is not None) == is_wrong


@pytest.mark.parametrize("other", [["tram", "park", "bus"], ["bus", "park", "train"]])
def test_teachers_whose_columns_are_other_classes_do_not_open_together(tmp_path: Path, other: list[str]) -> None:
    path = cache_of(tmp_path / "A2b", one=["bus", "park", "tram"], two=other)
    with pytest.raises(UsageError, match=r"column \d is \w+ of one, \w+ of two"):
        LogitCache.open(path)
    assert LogitCache.open(path, ["two"]).class_names == {"two": tuple(other)}


def test_columns_of_one_name_are_refused_when_they_are_opened(tmp_path: Path) -> None:
    """As an earlier version dumped or adopted them."""
    path = cache_of(tmp_path / "A2b", one=["bus", "tram", "bus"])
    with pytest.raises(UsageError, match="one: its columns 0 and 2 are both called bus"):
        LogitCache.open(path)


def test_columns_without_names_beside_named_ones_are_a_warning(tmp_path: Path) -> None:
    path = cache_of(tmp_path / "A2b", one=["bus", "park", "tram"], two=None)
    with pytest.warns(UserWarning, match="two name no classes"):
        LogitCache.open(path)


def test_a_dump_refuses_another_order_before_it_scores_also_beside_what_is_cached(world: World) -> None:
    with pytest.raises(UsageError, match="same classes in another order"):
        dump(world, up=OWN, down=OWN[::-1])
    assert not world.cache.exists()
    dump(world, up=OWN)
    with pytest.raises(UsageError, match="same classes in another order"):
        dump(world, down=OWN[::-1])
    dump(world, up=OWN[::-1])  # a teacher may change its own


def test_columns_in_another_order_than_the_labels_are_refused_at_the_dump(world: World) -> None:
    with pytest.raises(TeacherError, match="column 4 is public_square of the teacher, park of the task"):
        dump(world, one=SWAPPED)
    with pytest.raises(TeacherError, match="its columns 0 and 9 are both called class0"):
        dump(world, one=(*OWN[:9], OWN[0]))
    assert not world.cache.exists()


def test_a_cache_of_columns_in_another_order_than_the_labels_is_told_of_and_not_trained_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("kd_cache.score.existing.misplaced", lambda *_: None)  # as an earlier version dumped it
        dump(world, one=SWAPPED)
    report = verify_cache(VerifyJob(Snapshot(CacheFolder(world.cache)), world.data()))
    assert [problem.reason[:34] for problem in report.problems] == ["the teacher and the task have the "]
    with pytest.raises(UsageError, match="one: the teacher and the task have the same classes in another order"):
        student_loader(world.json_path, world.root, world.cache, 4)


def test_merge_and_adopt_refuse_another_order(world: World, run: Run) -> None:
    dump(world, up=OWN)
    (world.root / "cache").rename(world.root / "first")
    dump(world, down=OWN[::-1])
    data = ("--target", "b", "--json-path", world.json_path)
    merged = run("merge", "first/A2b", *data)
    assert (merged.exit_code, "down and up have the same classes in another order" in merged.stderr) == (2, True)
    assert run("export", "first/A2b", "--to", "pt", "--output", "out").exit_code == 0
    adopted = run("adopt", "out/up.pt", *data)
    assert (adopted.exit_code, "down and up have the same classes in another order" in adopted.stderr) == (2, True)
    for wrong, why in ((SWAPPED, "of the task"), ((*OWN[:9], OWN[3]), "its columns 3 and 9 are both called class3")):
        described = json.loads((world.root / "out/up.files.json").read_text()) | {"class_names": list(wrong)}
        (world.root / "out/up.files.json").write_text(json.dumps(described))
        refused = run("adopt", "out/up.pt", *data, "--cache-root", "third")
        assert (refused.exit_code, why in refused.stderr) == (2, True)
    assert not (world.root / "third").exists()


def test_diff_names_the_columns(tmp_path: Path) -> None:
    a, b = (cache_of(tmp_path / part / "A2b", scene=order) for part, order in (("a", "xyz"), ("b", "xzy")))
    assert "column 1 is y of A, z of B" in str(diff_caches(a, b).teachers["scene"].not_compared)


def test_more_class_names_than_a_pack_can_hold_are_refused_before_scoring(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, "forward", lambda self, features: pytest.fail("it was scored"))
    with pytest.raises(StoreError, match="class_names of teacher many takes more than 60000 bytes") as caught:
        dump(world, many=["n" * 7000] * 10)
    assert "Leave class_names out" in str(caught.value.hint)
