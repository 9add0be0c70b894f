"""The page of a comparison of students: which differences are more than luck."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kd_cache.commands import Table, points
from kd_cache.files.atomic import open_file, store_errors
from kd_cache.files.strict_json import strict_json
from kd_cache.report.figures import Bar, bars, differences
from kd_cache.report.page import Figure, Page, Section, as_written_by
from kd_cache.train.evaluation import FIGURES, GROUPS

COMPARISON: Final = "comparison.json"
_MOST: Final = 1 << 28
_T: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Where 97.5 % of Student's t lie below, by degrees of freedom from 1 on."""


def comparison_page(folder: Path) -> Page:
    """Differences with intervals, of every seed. Raises `CorruptError` for a file that ``compare`` does not write."""
    path = folder / COMPARISON
    with as_written_by("student compare", path), store_errors(path, "read"), open_file(path) as file:
        return _page(folder, strict_json(file.read(_MOST)))


def _page(folder: Path, found: Mapping[str, Any]) -> Page:
    modes, seeds, split = found["modes"], found["seeds"], found["split"]
    known = {
        mode: [100 * each for each in figures["accuracy"]["difference"]["by_seed"] if each is not None]
        for mode, figures in modes.items()
        if mode in found["verdicts"]
    }
    known = {mode: each for mode, each in known.items() if each}
    spans = {mode: span(each) for mode, each in known.items()}
    parts: list[str | Table | Figure] = []
    if known:
        told = "Mean over the seeds, where it lies with 95 % confidence (t distribution), and every seed by itself."
        drawn = differences(known, spans, "difference to ce in accuracy (points)")
        parts.append(Figure(drawn, "Differences to ce, the twin without teachers", told))
    parts += [*_by_group(modes, split), _differences(found, spans), _accuracies(modes)]
    where = "test rows" if split == "test" else "validation rows, which also chose the epochs: there is no test"
    about = [
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), measured on {where}. All of one seed begin with the same "
        "weights and see the same batches.",
    ]
    content = {"subject": "comparison", "path": str(folder), "comparison": found, "spans": spans}
    return Page("What teachers are worth", found["sentences"], [Section("Over all devices", [*about, *parts])], content)


def span(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the mean of what these are drawn from lies with 95 % confidence; ``None`` of a single value."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    half = (_T[freedom - 1] if freedom <= len(_T) else 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def _by_group(modes: Mapping[str, Any], split: str) -> list[Figure]:
    series = {}
    for mode, figures in modes.items():
        means = {group: figures[group] for group in GROUPS if figures[group]["mean"] is not None}
        series[mode] = {group: Bar(100 * each["mean"], _seeds(each)) for group, each in means.items()}
    series = {mode: groups for mode, groups in series.items() if groups}
    told = "Mean over the seeds; the whisker reaches from the worst seed to the best."
    return (
        [Figure(bars(series, "device group", f"{split} accuracy (%)", 100), "Accuracy by device group", told)]
        if series
        else []
    )


def _seeds(spread: Mapping[str, Any]) -> tuple[float, float]:
    known = [100 * each for each in spread["by_seed"] if each is not None]
    return min(known), max(known)


def _differences(found: Mapping[str, Any], spans: Mapping[str, tuple[float, float] | None]) -> Table:
    rows = []
    for mode, verdict in found["verdicts"].items():
        apart, between = found["modes"][mode]["accuracy"]["difference"], spans.get(mode)
        told = "–" if between is None else f"{points(between[0] / 100)} to {points(between[1] / 100)}"
        rows.append([mode, points(apart["mean"]), told, *map(points, apart["by_seed"]), verdict])
    columns = ["Student", "Mean", "95 %", *(f"Seed {seed}" for seed in found["seeds"]), "Verdict"]
    return Table("Difference to ce in accuracy, in points", columns, rows)


def _accuracies(modes: Mapping[str, Any]) -> Table:
    figures = [*FIGURES, *GROUPS]
    rows = [[mode, *(_mean_sd(of[figure], figure not in ("log_loss", "ece", "brier")) for figure in figures)]
            for mode, of in modes.items()]  # fmt: skip
    named = [figure.replace("_", " ").capitalize().replace("Ece", "ECE") for figure in figures]
    return Table("Mean ± standard deviation over the seeds; accuracies in per cent", ["Student", *named], rows)


def _mean_sd(spread: Mapping[str, Any], is_share: bool) -> str:
    scale, digits = (100, 1) if is_share else (1, 3)
    known = [spread["mean"], spread["sd"]]
    return " ± ".join(f"{scale * each:.{digits}f}" for each in known if each is not None) or "–"
