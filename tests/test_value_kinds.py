"""Rows that are not what their teacher calls them are refused over all rows of a run; logits never are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, World
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_teachers import Linear

from kd_cache import TeacherError
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.score.value_kind import RowCheck
from kd_cache.watch import Watcher

CPU = torch.device("cpu")
Turn = Callable[[torch.Tensor], torch.Tensor]
REFUSED: dict[str, Turn] = {
    "probabilities": lambda z: z.softmax(1),
    "log probabilities": lambda z: z.log_softmax(1),
    "sigmoid outputs": lambda z: z.sigmoid(),
    "log sigmoids": lambda z: torch.nn.functional.logsigmoid(z),
    "percentages": lambda z: z.softmax(1) * 100,
    "shares of a whole": lambda z: z.softmax(1) * 255,
}
REMARKED: dict[str, tuple[Turn, str]] = {
    "rows are zero": (lambda z: z * 0, "zero"),
    "rows are the same value in every class": (lambda z: z * 0 + 3, "the same value"),
    "rows are equal": (lambda z: z[:1].expand_as(z), "does not look at its input"),
    "a few constant rows": (lambda z: torch.cat([z[:2] * 0 + 1, z[2:]]), "2 of"),
    "a sigmoid's, or a cosine's": (lambda z: 0.2 + z.sigmoid() / 4, "as a sigmoid's do"),
    "rectified logits": (lambda z: z.relu() * 4, "no value is negative"),
    "logits of a shy tagger": (lambda z: -z.exp() - 3, "no value is above 0"),
}


def drawn(rows: int = 64, classes: int = 10, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale


def checked(rows: torch.Tensor, batch: int = 7, kind: str = "logits") -> RowCheck:
    check = RowCheck(kind)
    for start in range(0, len(rows), batch):
        check.add(rows[start : start + batch].numpy())
    return check


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_plainly_not_logits_is_refused_whatever_the_batch(what: str, scale: float, batch: int) -> None:
    assert f"are {what}, not logits" in str(checked(REFUSED[what](drawn(scale=scale)), batch).contradiction())


@pytest.mark.parametrize("classes", [2, 5, 527])
def test_any_number_of_classes_is_enough_for_a_softmax(classes: int) -> None:
    rows = drawn(30, classes)
    assert "are probabilities" in str(checked(rows.softmax(1)).contradiction())
    assert "are probabilities" in str(checked(rows.softmax(1).half().float()).contradiction())
    assert checked(rows).contradiction() is None


@pytest.mark.parametrize("what", REMARKED)
def test_what_is_merely_suspicious_is_a_remark(what: str) -> None:
    turn, said = REMARKED[what]
    check = checked(turn(drawn()))
    assert check.contradiction() is None
    assert said in str(check.remark())


@pytest.mark.parametrize("kind", ["probs", "log_probs", "sigmoid"])
def test_every_other_kind_is_held_to_its_word(kind: str) -> None:
    true = {"probs": "probabilities", "log_probs": "log probabilities", "sigmoid": "sigmoid outputs"}[kind]
    assert checked(REFUSED[true](drawn()), kind=kind).contradiction() is None
    assert f"are not {true}" in str(checked(drawn(), kind=kind).contradiction())


@example(classes=2, scale=0.02, bias=0.0, shift=0.2, tail="heavy", seed=0)  # all between 0 and 1, by chance
@given(
    classes=st.sampled_from([2, 3, 10, 50, 527]),
    scale=st.sampled_from([1e-3, 0.02, 0.3, 1.0, 4.0, 30.0]),
    bias=st.sampled_from([0.0, 0.3, 1.0, 5.0]),  # of classes, as a net that has learnt priors has
    shift=st.sampled_from([0.0, -7.0, 0.2, 2.0]),  # of all, which no softmax notices
    tail=st.sampled_from(["normal", "heavy", "rectified", "distances", "less the largest"]),
    seed=st.integers(0, 1 << 30),
)
def test_logits_are_never_refused(classes: int, scale: float, bias: float, shift: float, tail: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(100, classes, generator=generator)
    if tail == "heavy":
        rows = rows / torch.randn(100, 1, generator=generator).abs().clamp(min=0.05)
    rows = rows * scale + torch.randn(classes, generator=generator) * bias + shift
    if tail == "rectified":
        rows = rows.relu() * 10
    if tail == "distances":  # to prototypes
        rows = -((torch.randn(100, 1, 8, generator=generator) - torch.randn(classes, 8, generator=generator)) ** 2).sum(
            2
        )
    if tail == "less the largest":
        rows = rows - rows.amax(dim=1, keepdim=True)
    check = RowCheck("logits")
    for row in rows.numpy():
        check.add(row[None])
        assert check.contradiction() is None


class Turned(Linear):
    """Calls ``turn`` of its logits logits."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(1)
        self.turn = turn

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.turn(super().forward(features) * 5)


def job(world: World, turn: Turn, batch_size: int) -> DumpJob:
    return DumpJob(world.root / "cache", world.data(), {"tiny": Turned(turn)}, CPU, workers=0, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("what", REFUSED)
def test_a_dump_refuses_them_before_anything_is_current(world: World, what: str, batch_size: int) -> None:
    with pytest.raises(TeacherError, match=f"says value_kind logits, but its rows are {what}"):
        dump_logits(job(world, REFUSED[what], batch_size))
    assert not (world.cache / "cache_index.json").exists()


def test_a_dump_says_what_is_suspicious_once(world: World) -> None:
    class Notes(Watcher):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    dump_logits(job(world, lambda z: z * 0, 4), Notes())
    assert [note for note in notes if "all 20 rows are zero" in note] == [
        "tiny: all 20 rows are zero: a dead teacher, or a failed export?"
    ]


@pytest.mark.parametrize("what", [*REFUSED, *REMARKED])
def test_adopted_rows_are_looked_at_in_the_same_way(world: World, run: Run, tmp_path: Path, what: str) -> None:
    files = world.data().selection.listed
    turn, said = REMARKED[what] if what in REMARKED else (REFUSED[what], f"are {what}, not logits")
    torch.save(turn(drawn(len(files))).contiguous().clone(), tmp_path / "outside.pt")
    (tmp_path / "outside.files.json").write_text(json.dumps(list(files)))
    adopted = run("adopt", tmp_path / "outside.pt", "--target", "b", "--json-path", world.json_path)
    assert adopted.exit_code == (0 if what in REMARKED else 1)
    assert said in adopted.stderr
    assert (world.cache / "cache_index.json").exists() == (what in REMARKED)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (lambda z: z.to_sparse(), "a sparse tensor"),
        (lambda z: z.to("meta"), "a meta tensor"),
        (lambda z: torch.nested.nested_tensor(list(z)), "a nested tensor"),
        (lambda z: z.round().long(), "int64 [1, 10]"),
        (lambda z: (z, z), "tuple"),
    ],
)
def test_outputs_that_are_no_plain_tensor_are_named(world: World, returned: Any, found: str) -> None:
    with pytest.raises(TeacherError, match="must return floating-point") as caught:
        dump_logits(job(world, returned, 1))
    assert f"it returned {found}" in caught.value.message


def test_rows_of_one_class_prove_nothing() -> None:
    check = RowCheck("logits")
    check.add(np.full((50, 1), 1.0, np.float32))
    assert (check.contradiction(), "all 50 rows are equal" in str(check.remark())) == (None, True)
