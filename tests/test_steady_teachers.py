"""Teachers that are no function of their input, and those whose change no state dict tells of."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, World
from tiny_teachers import Linear

from kd_cache import StaleError, TeacherError
from kd_cache.score.dump import DumpJob, DumpReport, dump_logits
from kd_cache.score.teacher import check_teacher, teacher_fingerprint, unknown_state
from kd_cache.watch import Watcher

CPU = torch.device("cpu")


class Net(torch.nn.Module):
    """Features through layers of one's choice, then their mean over time; nobody puts them into evaluation mode."""

    num_classes, value_kind = 20, "logits"

    def __init__(
        self, *layers: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        self.layers, self.function = torch.nn.Sequential(*layers), function

    def eval(self) -> Net:
        return self

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.layers(features.mean(dim=1))
        return rows if self.function is None else self.function(rows)

    def fingerprint_parts(self) -> dict[str, str]:
        return {"architecture": "net/1"}


def dump(world: World, teacher: Any, batch_size: int = 8, notes: list[str] | None = None, **options: Any) -> DumpReport:
    class Notes(Watcher):
        def note(self, text: str) -> None:
            if notes is not None:
                notes.append(text)

    job = DumpJob(
        world.root / "cache", world.data(), {"mine": teacher}, CPU, workers=0, batch_size=batch_size, **options
    )
    return dump_logits(job, Notes())


UNSTEADY: dict[str, tuple[Callable[[], Any], str]] = {
    "dropout": (lambda: Net(torch.nn.Dropout(0.3)), r"dropout is on \(layers.0\)"),
    "torch's random numbers": (lambda: Net(function=lambda x: x + torch.randn(x.shape) / 99), "draws random numbers"),
    "numpy's": (lambda: Net(function=lambda x: x * np.random.uniform(0.9, 1)), "draws random numbers"),  # noqa: NPY002
    "Python's": (lambda: Net(function=lambda x: x + random.random()  * x.cos()), "draws random numbers"),  # noqa: S311
    "a batch norm that trains": (lambda: Net(torch.nn.BatchNorm1d(20)), "statistics of the batch"),
    "a batch norm without statistics": (
        lambda: Net(torch.nn.BatchNorm1d(20, track_running_stats=False)),
        r"statistics of the batch \(layers.0\)",
    ),
    "the other rows": (lambda: Net(function=lambda x: x - x.mean(dim=0)), "depends on the other rows"),
    "the last row": (lambda: Net(function=lambda x: x + x[-1:] * 0.1), "depends on the other rows"),
    "the rows before": (lambda: Net(torch.nn.LSTM(20, 20), function=lambda x: x[0]), "depends on the other rows"),
    "its place": (lambda: Net(function=lambda x: x * (1 + torch.arange(len(x))[:, None] % 9)), "on the other rows"),
    "how many rows": (lambda: Net(function=lambda x: x * x.cos() if len(x) > 1 else x), "or on their number"),
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("what", UNSTEADY)
def test_a_teacher_that_is_no_function_of_its_input_is_refused_before_anything_is_stored(
    world: World, what: str, batch_size: int
) -> None:
    make, cause = UNSTEADY[what]
    with pytest.raises(TeacherError, match=r"other numbers|Expected more than 1 value") as caught:
        dump(world, make(), batch_size)
    if batch_size > 1:
        caught.match(cause)
    assert not list(world.cache.glob("packs/*"))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steady_ones_are_not(world: World, precision: str, batch_size: int) -> None:
    layers = [torch.nn.Linear(20, 500), torch.nn.BatchNorm1d(500).eval(), torch.nn.Dropout().eval()]
    net = Net(*layers, torch.nn.Linear(500, 20))
    assert dump(world, net, batch_size, precision=precision).samples_scored == 20


def test_batches_of_one_size_alone_may_be_all_that_a_teacher_takes(world: World) -> None:
    def fixed(rows: torch.Tensor) -> torch.Tensor:
        assert len(rows) in (1, 2, 4, 8)
        return rows

    random.seed(7)
    expected = random.random()  # noqa: S311
    random.seed(7)
    assert dump(world, Net(function=fixed)).samples_scored == 20
    assert random.random() == expected  # noqa: S311 (nothing of the caller's was drawn)


# -- what no state dict tells of ---------------------------------------------------------------------------------------


@dataclass
class Config:
    scale: float
    more: Sequence[Any] = ()


class Stateful(Linear):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(1)
        for name, value in attributes.items():
            setattr(self, name, value)


def buffer(value: float) -> Stateful:
    made = Stateful()
    made.register_buffer("mean", torch.full((3,), value), persistent=False)
    return made


STATE: dict[str, Callable[[float], Any]] = {
    "a buffer that is not saved": buffer,
    "a tensor": lambda value: Stateful(mean=torch.tensor(value)),
    "an array": lambda value: Stateful(mean=np.full(3, value)),
    "a number": lambda value: Stateful(temperature=value),
    "a switch": lambda value: Stateful(normalise=value > 1),
    "a net in a list": lambda value: Stateful(others=[Linear(int(value))]),
    "a tensor in a dict in a tuple": lambda value: Stateful(kept=({"mean": torch.tensor([value])},)),
    "settings": lambda value: Stateful(config=Config(1.0, [value])),
    "a parameter called as a counter": lambda value: Stateful(
        num_batches_tracked=torch.nn.Parameter(torch.ones(1) * value)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", STATE)
def test_what_a_state_dict_does_not_hold_is_a_part_of_the_fingerprint(what: str) -> None:
    one, same, other = (teacher_fingerprint(STATE[what](value)).digest for value in (1.0, 1.0, 2.0))
    assert one == same
    assert one != other


def test_a_teacher_without_such_state_keeps_its_fingerprint() -> None:
    parts = teacher_fingerprint(Linear(1)).parts
    assert "unregistered" not in parts
    kept = Stateful(class_names=[str(n) for n in range(10)], source="x", note="y", path=Path("z"), size=None)
    assert teacher_fingerprint(kept).parts["weights"] == parts["weights"]
    assert "unregistered" not in teacher_fingerprint(kept).parts


def test_what_a_forward_keeps_for_the_next_one_is_no_setting() -> None:
    teacher = Stateful(calls=0)
    check_teacher("mine", teacher)
    before = teacher_fingerprint(teacher).digest
    teacher.calls, teacher.window = 3, torch.ones(4)
    assert teacher_fingerprint(teacher).digest == before


def test_attributes_that_hold_nobody_knows_what_are_named(world: World) -> None:
    teacher = Stateful(client=object(), graph={"a": torch.zeros(2).to_sparse()})
    assert unknown_state(teacher) == ["client (object)", "graph.a (Tensor)"]
    notes: list[str] = []
    dump(world, teacher, notes=notes)
    assert [note for note in notes if "client (object), graph.a (Tensor)" in note]


class Coded(Linear):
    """Its code changes, and its fingerprint does not tell."""

    factor = 1.0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) * self.factor


def test_cached_rows_of_changed_code_are_noticed_at_the_next_dump(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(world, Coded(1))
    assert dump(world, Coded(1)).samples_scored == 0
    index = (world.cache / "cache_index.json").read_bytes()
    monkeypatch.setattr(Coded, "factor", 1.2)
    with pytest.raises(StaleError, match="rows that the cache holds are not what it gives now"):
        dump(world, Coded(1))
    assert (world.cache / "cache_index.json").read_bytes() == index
    assert dump(world, Coded(1), skip_existing=False).samples_scored == 20
    assert dump(world, Coded(1)).samples_scored == 0


def test_what_another_machine_may_do_is_a_note_and_built_in_code_is_not_scored_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(world, Coded(1))
    monkeypatch.setattr(Coded, "factor", 1 + 1e-4)
    notes: list[str] = []
    dump(world, Coded(1), notes=notes)
    assert [note for note in notes if "another machine or version may do that" in note]
    monkeypatch.setattr(Coded, "factor", 2.0)
    built_in = {"mine": {"source": {"built_in": True}}}
    job = DumpJob(world.root / "cache", world.data(), {"mine": Coded(1)}, CPU, workers=0, notes=built_in)
    assert dump_logits(job).samples_scored == 0


# -- rows of noise -----------------------------------------------------------------------------------------------------


def test_noise_is_neither_excused_by_a_noisy_teacher_nor_confirmed(world: World, run: Run, tmp_path: Path) -> None:
    files = world.data().selection.listed
    torch.save(torch.randn(len(files), 10, generator=torch.Generator().manual_seed(3)), tmp_path / "tiny.pt")
    (tmp_path / "tiny.files.json").write_text(json.dumps(list(files)))
    data = ("--target", "b", "--json-path", world.json_path)
    assert run("adopt", tmp_path / "tiny.pt", *data).exit_code == 0
    noisy = run("verify", *data, "--teacher", "tiny=tiny_teachers:noisy", "--recompute")
    assert noisy.exit_code == 4
    assert "the teacher itself varies by" in noisy.stdout
    repaired = run("repair", *data, "--teacher", "tiny=tiny_teachers:linear", "--recompute")
    assert (repaired.exit_code, "confirmed" in repaired.output) == (0, False)
    assert "20 adopted rows are not what it gives; they were replaced" in repaired.stdout
