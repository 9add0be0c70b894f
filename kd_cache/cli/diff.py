"""``kd-cache diff``: how two caches differ, teacher by teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kd_cache.care.diff import DiffReport, TeacherDiff, diff_caches
from kd_cache.cli.console import Screen
from kd_cache.commands import Report, Table
from kd_cache.errors import shown

MOST_SHOWN = 20


def diff(screen: Screen, a: Path, b: Path, only: list[str]) -> Report:
    """Compare two caches."""
    report = diff_caches(a, b, only, screen)
    for note in report.notes:
        screen.note(note)
    return Report(report.as_json(), [*([_table(report)] if report.teachers else []), *_lines(report)])


def _table(report: DiffReport) -> Table:
    """One column per teacher, one line per figure."""
    facts: dict[str, Callable[[TeacherDiff], str]] = {
        "Rows in A": lambda found: f"{found.rows_a:,}",
        "Rows in B": lambda found: f"{found.rows_b:,}",
        "In both": lambda found: f"{found.in_both:,}",
        "Only in A": lambda found: f"{found.only_in_a:,}",
        "Only in B": lambda found: f"{found.only_in_b:,}",
        "Other features": lambda found: _count(found.other_features, found.in_both, "unknown"),
        "Bit-equal": lambda found: _count(found.bit_equal, found.in_both),
        "Argmax changed": lambda found: _count(found.argmax_changes, found.compared or 0),
        "KL(A ‖ B), mean": lambda found: _figure(found.kl_mean),
        "KL(A ‖ B), max": lambda found: _figure(found.kl_max),
    }
    if any(found.largest_difference is not None for found in report.teachers.values()):
        facts["Largest difference"] = lambda found: _figure(found.largest_difference)
    rows = [[name, *map(fact, report.teachers.values())] for name, fact in facts.items()]
    return Table(f"A: {shown(report.a)}, B: {shown(report.b)}", ["", *report.teachers], rows)


def _lines(report: DiffReport) -> list[str]:
    """What does not fit into a table: which teachers, which parts, which files."""
    lines = []
    for names, where in ((report.only_in_a, "A"), (report.only_in_b, "B")):
        if names:
            lines.append(f"only in {where}: {', '.join(names)}")
    for name, found in report.teachers.items():
        if found.fingerprints_equal is not None:
            lines.append(f"{name}: fingerprints {f'differ ({found.difference})' if found.difference else 'equal'}")
        if found.not_compared is not None:
            lines.append(f"{name}: values are not compared: {found.not_compared}")
        if found.not_finite:
            lines.append(f"{name}: {found.not_finite:,} rows are not finite; argmax and distances leave them out")
        lines += _changed_lines(name, found)
    return lines


def _changed_lines(name: str, found: TeacherDiff) -> list[str]:
    lines = [f"{name}: argmax {change.a} → {change.b}: {change.file}" for change in found.changed[:MOST_SHOWN]]
    more = (found.argmax_changes or 0) - len(lines)
    if more > 0:
        every = "lists them all" if len(found.changed) == found.argmax_changes else f"lists {len(found.changed):,}"
        lines.append(f"{name}: … and {more:,} more; --json {every}")
    return lines


def _count(count: int | None, total: int, unknown: str = "–") -> str:
    if count is None:
        return unknown
    return f"{count:,}/{total:,} · {100 * count / total:.1f} %" if total else "0/0"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
