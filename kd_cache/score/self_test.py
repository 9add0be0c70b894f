"""Whether a teacher is a function of its input: the same sample twice, among others, and alone, gives one result.

Dropout that is on, statistics of the batch, random numbers: such rows belong to the accident of their batch, and no
student can learn from them twice. Looked for before a teacher's first row is kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from kd_cache.errors import TeacherError
from kd_cache.score.given import Given, each, size_of
from kd_cache.score.tolerance import TOLERANCE, deviation, most_allowed

Score = Callable[[Any], torch.Tensor]
_SAMPLES = 4


def refuse_unsteady(name: str, teacher: Any, precision: str, batch: Given, rows: torch.Tensor, score: Score) -> None:
    """Raise `TeacherError` where rows of a batch come out otherwise in other company.

    Costs two more batches and one sample. What a teacher refuses to score in other company is not compared.

    Args:
        batch: ``[B, T, F]`` on the teacher's device; ``rows`` ``[B, C]`` on the CPU are what came of it.
        score: scores ``batch`` in the same way again.
    """
    kind = teacher.value_kind
    allowed, most = TOLERANCE[precision], most_allowed(precision)
    with _another_seed():
        apart = _apart(rows, score(batch), kind)
    if apart > allowed:
        raise TeacherError(
            f"teacher {name} gives other numbers each time for the same batch ({apart:.1e} of a row's range, allowed "
            f"{allowed:.1e}): {_random_cause(teacher)}",
            hint="Put every part of it into evaluation mode (eval()), and draw no random numbers in its forward.",
        )
    for company, (ours, place) in (
        ("other samples", _in_other_company(batch)),
        ("nothing", (each(batch, lambda tensor: tensor[:1]), 0)),
    ):
        try:
            again = teacher(each(ours, torch.clone)).flatten(1)[place:]  # not compiled: each size would take minutes
        except Exception:  # noqa: BLE001, S112 (it may take batches of one size only; what it says of ours is heeded)
            continue
        apart = _apart(rows, again, kind)
        if apart > most:
            raise TeacherError(
                f"teacher {name} gives a sample other numbers with {company} beside it in its batch ({apart:.1e} of a "
                f"row's range, allowed {most:.1e}): {_batch_cause(teacher)}",
                hint="Row i must depend on sample i alone: eval(), and no normalisation over the batch.",
            )


def _in_other_company(batch: Given) -> tuple[Given, int]:
    """The first samples, and where they are now: between others that none of the batch is.

    Before them as well as after: a recurrent layer that runs over the batch hands on what comes before a row. Integers
    only change places: others may be no token.
    """
    size = size_of(batch)
    return each(batch, _among_others), (size - _SAMPLES if size > _SAMPLES + 1 else 2 * size) // 2


def _among_others(batch: torch.Tensor) -> torch.Tensor:
    others = batch.roll(1, dims=0).flip(min(1, batch.ndim - 1))
    others = others * 1.5 + 1 if others.is_floating_point() else others
    others = others[_SAMPLES:] if len(batch) > _SAMPLES + 1 else torch.cat([others, others])
    place = len(others) // 2
    return torch.cat([others[:place], batch[:_SAMPLES], others[place:]])


def _apart(rows: torch.Tensor, again: Any, kind: str) -> float:
    """How far the first rows are apart, relative to their range; bad samples are told of elsewhere, by name."""
    count = min(len(rows), len(again), _SAMPLES)
    pairs = zip(rows[:count].double().numpy(), again[:count].double().cpu().numpy(), strict=True)
    finite = [(a, b) for a, b in pairs if np.isfinite(a).all()]
    return max((deviation(b, a, kind) if np.isfinite(b).all() else np.inf for a, b in finite), default=0.0)


@contextmanager
def _another_seed() -> Iterator[None]:
    """Other random numbers of torch, of numpy and of Python; the same as before afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (what teachers may draw from)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0x5EED)
        random.seed(0x5EED)
        np.random.seed(0x5EED)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _random_cause(teacher: Any) -> str:
    dropout = [name for name, part in _modules(teacher) if "Dropout" in type(part).__name__ and part.training]
    return f"dropout is on ({', '.join(dropout[:3])})" if dropout else "it draws random numbers, or keeps a state"


def _batch_cause(teacher: Any) -> str:
    norms = [
        name
        for name, part in _modules(teacher)
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None)
    ]
    told = f"it normalises with statistics of the batch ({', '.join(norms[:3])})"
    return told if norms else "a row depends on the other rows, or on their number"


def _modules(teacher: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """All modules of a teacher, also of one that is none itself but has some."""
    if isinstance(teacher, torch.nn.Module):
        yield from teacher.named_modules()
        return
    for name, value in getattr(teacher, "__dict__", {}).items():
        if isinstance(value, torch.nn.Module):
            yield from ((f"{name}.{inner}".rstrip("."), part) for inner, part in value.named_modules())
