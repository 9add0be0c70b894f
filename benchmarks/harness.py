"""What the benchmarks share: ways that are measured side by side, and tables of the results.

A figure here is a ratio of two ways measured in one run, in turns, so that whatever else the machine does falls on
both. Absolute figures are kept beside it, with the machine and the date.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        case: what is measured (``1M × 10, 256 rows``).
        way: how it is done (``kd-cache``, ``np.load per sample``).
        value: the median, in ``unit``.
        against: the way that it is compared with, if any.
        ratio: how many times better than ``against`` (above 1 is better).
        target: what was aimed at, in words, and ``met``: whether it was.
        note: what a reader must know.
    """

    case: str
    way: str
    value: float
    unit: str
    against: str = ""
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    note: str = ""


@dataclass
class Report:
    """The rows of one benchmark, with machine and date."""

    name: str
    quick: bool
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(_line(row), flush=True)

    def skip(self, what: str) -> None:
        """Say what was left out, and why."""
        self.skipped.append(what)
        print(f"skipped: {what}", flush=True)

    def save(self, out: Path | None = None) -> Path:
        """Write ``results/<name>.json`` (``results/quick/`` of a quick run) and print the table."""
        folder = out or (RESULTS / "quick" if self.quick else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        content = {
            "benchmark": self.name,
            "quick": self.quick,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "seconds": round(time.monotonic() - self.began, 1),
            "machine": machine(),
            "rows": [
                {key: value for key, value in asdict(row).items() if value not in ("", None)} for row in self.rows
            ],
            "skipped": self.skipped,
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"\n{table(content)}\n\nwritten: {path}")
        return path


def options(description: str) -> argparse.Namespace:
    """The command line of every benchmark: ``--quick`` and ``--out``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, less time; not for figures to keep")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    return parser.parse_args()


def in_turns(
    ways: Mapping[str, Callable[[], Any]],
    seconds: float,
    at_least: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of one call of each way, after one unmeasured; they take turns for ``seconds`` in all.

    Each round begins with another way, so that none is always the one after the slowest. ``clock`` may be
    `time.process_time`, where the ways compute in this process.
    """
    took: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    turns = deque(ways.items())
    until = time.monotonic() + seconds
    while time.monotonic() < until or min(map(len, took.values())) < at_least:
        for name, call in turns:
            began = clock()
            call()
            took[name].append(clock() - began)
        turns.rotate(1)
    return {name: statistics.median(each) for name, each in took.items()}


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import numpy
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(content: Mapping[str, Any]) -> str:
    """The Markdown table of a benchmark's results."""
    lines = ["| case | way | measured | ratio | target |", "|---|---|---|---|---|"]
    for stored in content["rows"]:
        row = Row(**stored)
        ratio = "" if row.ratio is None else f"{figure(row.ratio)} × {row.against}"
        met = "" if row.met is None else (" ✓" if row.met else " ✗")
        note = f" ({row.note})" if row.note else ""
        lines.append(f"| {row.case} | {row.way}{note} | {figure(row.value)} {row.unit} | {ratio} | {row.target}{met} |")
    return "\n".join(lines + [f"\nskipped: {what}" for what in content["skipped"]])


def figure(value: float) -> str:
    """Three digits that matter: ``0.0123``, ``4.56``, ``1,230``."""
    if value == 0 or abs(value) >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def _stored(row: Row) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if value not in ("", None)}


def _line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"  {figure(row.ratio)} × {row.against}"
    return f"{row.case:40} {row.way:32} {figure(row.value):>10} {row.unit}{ratio}"
