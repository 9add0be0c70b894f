"""What trainings came to, for a person."""

from __future__ import annotations

from collections.abc import Sequence

from kd_cache.cli.console import percent
from kd_cache.commands import Table
from kd_cache.errors import shown
from kd_cache.train.evaluation import headline
from kd_cache.train.job import TrainReport


def report_lines(reports: Sequence[TrainReport]) -> list[str | Table]:
    """A table of all, then what there is to say of each."""
    made: list[str | Table] = [_headlines(reports)]
    for report in reports:
        made += ["", *_details(report)]
    return made


def _headlines(reports: Sequence[TrainReport]) -> Table:
    rows = []
    for report in reports:
        found = headline(report.results)
        chance = report.results["chance"]
        validation = report.results["validation"]
        rows.append(
            [
                f"{report.role} {report.place}",
                report.how,
                percent(found["validation"]),
                number(validation.get("log_loss")),
                number(validation.get("ece")),
                *(percent(found[where]) for where in ("test, source", "test, target")),
                percent(chance),
            ]
        )
    columns = ["Teacher", "", "Validation", "its log loss", "its ECE", "Test, A", "Test, target", "Chance"]
    return Table("Accuracy on locations that were not trained on", columns, rows)


def _details(report: TrainReport) -> list[str]:
    lines = [f"{report.role} {report.place}: {shown(report.checkpoint)}"]
    lines += [f"  {said}" for said in report.results.get("frozen", [])]
    split = "Test" if report.results.get("test") else "Validation"
    test = report.results.get("test") or report.results["validation"]
    if test.get("samples"):
        sure = next(one for one in test["early_exit"] if one["threshold"] == 0.9)
        lines.append(
            f"  {split}, {test['samples']} clips: macro accuracy {percent(test['macro_accuracy'])}, log loss "
            f"{number(test['log_loss'])}, ECE {number(test['ece'])} (equal mass {number(test['ece_equal_mass'])}), "
            f"Brier {number(test['brier'])}; {percent(sure['coverage'])} are at least 0.9 sure, of those "
            f"{percent(sure['accuracy'])} right"
        )
    for kind, name in (("device_group", "Devices"), ("device", "Device"), ("city", "City")):
        groups = test.get("by", {}).get(kind, {})
        told = ", ".join(f"{group} {percent(one['accuracy'])} of {one['samples']}" for group, one in groups.items())
        if told:
            lines.append(f"  {name}: {told}")
    return lines


def number(value: float | None) -> str:
    """A figure for a person; a dash where it is not known."""
    return "–" if value is None else f"{value:.3f}"
