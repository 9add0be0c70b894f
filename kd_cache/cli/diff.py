"""``kd-cache diff``: how two caches differ, teacher by teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.console import Screen, reporting_errors, table
from kd_cache.errors import shown

if TYPE_CHECKING:
    from kd_cache.diff import DiffReport, TeacherDiff

EXAMPLES = """Examples:

kd-cache diff cache/A2b cache/half/A2b

kd-cache diff cache/A2b cache/half/A2b --only scene --json"""

MOST_SHOWN = 20


@reporting_errors
def diff_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A cache.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The cache to compare it with.")],
    only: opt.OnlyOption = [],  # noqa: B006 (typer copies it)
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Compare two caches: rows, equal bits, changed argmax and KL per teacher. Exits 0 whether or not they differ."""
    from kd_cache.diff import diff_caches  # brings torch, which --help must not wait for

    with Screen(quiet=quiet, as_json=as_json) as screen:
        report = diff_caches(a, b, only, screen)
        for note in report.notes:
            screen.note(note)
        if report.teachers:
            screen.result(_table(report))
        screen.result(*_lines(report))
        screen.result_json(report.as_json())


def _table(report: DiffReport) -> Any:
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
    return table(f"A: {shown(report.a)}, B: {shown(report.b)}", ["", *report.teachers], rows)


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
