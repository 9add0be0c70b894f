"""Tables of what an audit found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kd_cache.commands import Failure, Table
from kd_cache.errors import shown
from kd_cache.store.accuracy import in_words, stored_accuracy, stored_apart

if TYPE_CHECKING:
    from kd_cache.care.problems import TeacherResult, VerifyReport


def verify_table(report: VerifyReport) -> Table:
    """One column per teacher, one line per check."""
    checks: dict[str, Callable[[TeacherResult], str]] = {
        "Hits": lambda result: _share(result.hits, result.checked),
        "Intact": lambda result: _share(result.intact, result.hits),
        "Fresh": lambda result: "not checked" if result.fresh is None else _share(result.fresh, result.hits),
        "Permitted rows": lambda result: _share(result.rows - result.forbidden, result.rows),
        "View equals pack": lambda result: "no view" if result.view is None else _share(result.view, result.hits),
    }
    if any(result.recomputed is not None for result in report.teachers.values()):
        checks["Recomputed"] = _recomputed
    rows = [[name, *map(check, report.teachers.values())] for name, check in checks.items()]
    what = "all" if report.everything else f"{report.checked:,} of"
    title = f"{shown(report.cache)}: {what} {report.promised:,} permitted samples, seed {report.seed}"
    return Table(title, ["", *report.teachers], rows)


def accuracy_lines(report: VerifyReport) -> list[str]:
    """What each teacher is worth now."""
    known = {name: result for name, result in report.teachers.items() if result.accuracy is not None}
    told = ((name, stored_accuracy(vars(result)), stored_apart(vars(result))) for name, result in known.items())
    return [line for each in told for line in in_words(*each)]


def problem_lines(report: VerifyReport, most: int = 20) -> list[Failure]:
    """One line per problem, the first of them: a table would fold long names, and nobody could search for them."""
    problems = report.worst_first
    if not problems:
        return []
    lines = [f"{shown(report.cache)}: {len(problems):,} problem{'s' if len(problems) > 1 else ''}, the worst first:"]
    for problem in problems[:most]:
        where = f"{problem.teacher}: " if problem.teacher else ""
        lines.append(f"  {problem.kind}: {where}{problem.file}: {problem.reason}")
    if len(problems) > most:
        lines.append(f"  … and {len(problems) - most:,} more; --json lists them all")
    return [Failure(line) for line in lines]


def missing_lines(missing: Mapping[str, str], most: int = 20) -> list[Failure]:
    """One line per sample without a row, the first of them."""
    lines = [f"missing: {shown(file)}: {shown(reason)}" for file, reason in list(missing.items())[:most]]
    lines += [f"… and {len(missing) - most:,} more missing samples"] if len(missing) > most else []
    return [Failure(line) for line in lines]


def _share(count: int, total: int) -> str:
    return f"{count:,}/{total:,} · {100 * count / total:.1f} %" if total else "0/0"


def _recomputed(result: TeacherResult) -> str:
    if result.recomputed is None:
        return "not recomputed"
    exact = f"{result.bit_exact:,}/{result.recomputed:,} bit-exact"
    return exact if result.bit_exact == result.recomputed else f"{exact}, deviation ≤ {result.deviation:.1e}"
