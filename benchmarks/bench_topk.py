"""Batches of top-k rows against whole rows in half precision: gather and split, what every class is given, the loss."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kd_cache
from benchmarks.harness import Report, Row, in_turns, options
from kd_cache.distill import kl
from kd_cache.serve.logit_cache import LogitCache

BATCH = 256
CASES = ((1_000, 100), (32_000, 64))


class Inputs:
    """Made by their number."""

    spec = "made/1"

    def __init__(self, count: int) -> None:
        self.keys = [f"{number}" for number in range(count)]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.randn(16, generator=torch.Generator().manual_seed(number))


class Net(torch.nn.Linear):
    architecture = "linear/1"


def made(folder: Path, count: int, classes: int, dtype: str) -> LogitCache:
    """A cache of a teacher that is sure of some classes."""
    torch.manual_seed(0)
    teacher = Net(16, classes)
    teacher.weight.data *= 12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody else is to know these teachers' names
        return kd_cache.score(Inputs(count), {"wide": teacher}, cache=folder / dtype.replace(":", "-"), dtype=dtype)


def measure(report: Report, folder: Path, count: int, classes: int, k: int, seconds: float) -> None:
    whole, topk = (made(folder, count, classes, dtype) for dtype in ("fp16", f"topk:{k}"))
    chance = torch.Generator().manual_seed(1)
    drawn = [torch.randperm(count, generator=chance)[:BATCH] for _ in range(50)]
    student = torch.randn(BATCH, classes)

    def over(work: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
        rows = itertools.cycle(drawn)
        return lambda: work(next(rows))

    pairs: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[torch.Tensor], Any]]] = {
        "gathered": (whole.batch, topk.batch),
        "as float32 of every class": (
            lambda rows: whole.batch(rows, torch.float32),
            lambda rows: topk.batch(rows).dense(),
        ),
        "and kl at T = 1": (
            lambda rows: kl(student, whole.batch(rows, torch.float32)[:, 0], temperature=1.0),
            lambda rows: kl(student, topk.batch(rows)[:, 0], temperature=1.0),
        ),
    }
    case = f"{count:,} × {classes:,}, {BATCH} rows"
    for what, (dense, few) in pairs.items():
        took = in_turns({"fp16": over(dense), "topk": over(few)}, seconds)
        report.add(Row(case, f"fp16, {what}", took["fp16"] * 1e6, "µs"))
        report.add(Row(case, f"topk:{k}, {what}", took["topk"] * 1e6, "µs", "fp16", took["fp16"] / took["topk"]))


def main() -> None:
    chosen = options(__doc__ or "")
    report = Report("topk", chosen.quick)
    torch.set_num_threads(1)
    for classes, k in CASES:
        with tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as folder:
            measure(report, Path(folder), 512 if chosen.quick else 4_096, classes, k, 2 if chosen.quick else 8)
    report.save(chosen.out)


if __name__ == "__main__":
    main()
