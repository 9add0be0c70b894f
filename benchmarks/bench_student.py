"""A student's epoch: rows of the cache against teachers in the loop, logits on against off, and each loss alone.

By the processor time of one thread, not by the clock: what else runs on the machine lengthens that less.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bench_dump import Case, make_data, make_teachers, with_kd_cache
from benchmarks.harness import Report, Row, in_turns, options
from benchmarks.made_cache import TEACHERS, make_cache, names
from kd_cache import LogitCache
from kd_cache.dataset.features import FeatureSource
from kd_cache.distill import DistillLoss
from kd_cache.distill.losses import LOSSES, NEED_LABELS
from kd_cache.score.device import numerics
from kd_cache.score.engine import Engine
from kd_cache.train.cp_mobile import CPMobile

BATCH, CLASSES = 256, 10
CPU = torch.device("cpu")
CACHED, ONLINE, OFF = "rows of the cache", "teachers in the loop", "no logits"


class Student:
    """cp_mobile of the baseline's size, in the layout that training gives it, with AdamW."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = CPMobile(CLASSES).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(self.net.parameters())

    def step(self, features: Tensor, loss_of: Callable[[Tensor], Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss_of(self.net(features)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def online(report: Report, count: int, rounds: int) -> None:
    """An epoch of ``count`` clips in batches of 32, as the dump has them: both ways see the same logits, to the bit."""
    case = Case("cnn14", "fp32", 101, count, 0)
    teachers = make_teachers(case.architecture)
    with tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as folder:
        root = Path(folder)
        files = make_data(root, case.frames, count)
        with_kd_cache(root, teachers, CPU, case, 32)
        cache, source = LogitCache.open(root / "cache" / "A2b"), FeatureSource(root)
        clips = torch.stack([torch.from_numpy(source.read(file).array.copy()) for file in files])
        rows, engine = cache.rows(files), Engine(teachers, CPU)

        def cached(at: Tensor) -> Tensor:
            logits: Tensor = cache.batch(rows[at], torch.float32)
            return logits

        def scored(at: Tensor) -> Tensor:
            with numerics(CPU, "fp32", 0):
                return torch.stack([engine.forward(name, clips[at]).clone() for name in cache.teachers], dim=1)

        batches = torch.arange(count).view(-1, 32)
        if not all(torch.equal(cached(at), scored(at)) for at in batches):
            raise AssertionError("cached and online logits differ")
        objective = DistillLoss("mean", teachers=cache.teachers, apply_to="all")

        def epoch(logits_of: Callable[[Tensor], Tensor]) -> Callable[[], None]:
            student = Student()

            def run() -> None:
                for at in batches:
                    said, labels = logits_of(at), at % CLASSES
                    student.step(clips[at], lambda z: objective(z, said, labels, labels >= 0))  # noqa: B023

            return run

        ways = {CACHED: epoch(cached), ONLINE: epoch(scored)}
        took = in_turns(ways, 0, rounds, time.process_time)
    ratio = took[ONLINE] / took[CACHED]
    title = f"cp_mobile and two CNN14, {count} clips [101, 64], one epoch"
    report.add(Row(title, ONLINE, took[ONLINE], "s"))
    report.add(
        Row(title, CACHED, took[CACHED], "s", ONLINE, ratio, "≥ 30 ×", ratio >= 30, "the same logits, to the bit")
    )


def on_against_off(report: Report, count: int, shapes: dict[tuple[int, int], int]) -> None:
    """A step with 256 random rows of a cache of ``count``, and without any; features are in memory either way.

    ``shapes``: of the clips, and how often each way makes a step.
    """
    with tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as folder:
        cache = LogitCache.open(make_cache(Path(folder), names(count), CLASSES))
        chance, labels = torch.Generator().manual_seed(0), torch.arange(BATCH) % CLASSES
        is_source = torch.arange(BATCH) % 2 == 0
        objective = DistillLoss("mean", teachers=TEACHERS)

        def distilled(z: Tensor) -> Tensor:
            said = cache.batch(torch.randint(count, (BATCH,), generator=chance), torch.float32)
            loss: Tensor = objective(z, said, labels, is_source)
            return loss

        for (frames, bins), steps in shapes.items():
            features, student = torch.randn(BATCH, frames, bins), Student()  # one for both: the same weights and memory

            def step(loss_of: Callable[[Tensor], Tensor]) -> Callable[[], None]:
                return lambda: student.step(features, loss_of)  # noqa: B023

            ways = {OFF: step(lambda z: F.cross_entropy(z, labels)), "kd-cache": step(distilled)}
            took = in_turns(ways, 0, steps, time.process_time)
            more = took["kd-cache"] / took[OFF] - 1
            case = f"cp_mobile, a step of {BATCH} clips [{frames}, {bins}], {count:,} rows × {CLASSES}"
            report.add(Row(case, OFF, took[OFF] * 1e3, "ms"))
            note = f"{more * 100:+.2f} % time"
            ratio = took[OFF] / took["kd-cache"]
            report.add(
                Row(case, "kd-cache", took["kd-cache"] * 1e3, "ms", OFF, ratio, "≤ 5 % slower", more <= 0.05, note)
            )
        hard = _alone(lambda z: F.cross_entropy(z, labels))
        took = in_turns({"rows and their loss": _alone(distilled), "cross-entropy": hard}, 1, clock=time.process_time)
        for name, each in took.items():
            report.add(Row(f"of such a step, without the net, {count:,} rows", name, each * 1e3, "ms"))


def _alone(loss_of: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    z = torch.randn(BATCH, CLASSES, requires_grad=True)
    return lambda: loss_of(z).backward()  # type: ignore[no-untyped-call]


def losses(report: Report, seconds: float) -> None:
    """Every loss of 256 rows, with its gradient."""
    labels, everyone = torch.arange(BATCH) % CLASSES, torch.ones(BATCH, dtype=torch.bool)
    teacher = torch.randn(BATCH, CLASSES)

    def one(name: str) -> Callable[[], Any]:
        more = [labels] if name in NEED_LABELS else [everyone] if name == "dist" else []
        return _alone(lambda z: LOSSES[name](z, teacher, *more).mean())

    took = in_turns({name: one(name) for name in LOSSES}, seconds, clock=time.process_time)
    for name, each in took.items():
        report.add(
            Row(f"loss and gradient, {BATCH} × {CLASSES}", name, each * 1e3, "ms", "", None, "≤ 1 ms", each <= 1e-3)
        )


def main() -> None:
    chosen = options(str(__doc__))
    report = Report("student", chosen.quick)
    torch.set_num_threads(1)
    losses(report, 2 if chosen.quick else 10)
    if chosen.quick:
        on_against_off(report, 100_000, {(48, 64): 7})
    else:
        on_against_off(report, 1_000_000, {(48, 64): 51, (65, 256): 7})
    online(report, *((32, 1) if chosen.quick else (96, 3)))
    report.save(chosen.out)


if __name__ == "__main__":
    main()
