"""``kd-cache check``: what is wrong with a manifest, before anything is scored."""

from __future__ import annotations

from kd_cache.cli.console import Screen
from kd_cache.cli.guard import guard_notes, guard_table
from kd_cache.cli.inputs import named, task_of
from kd_cache.commands import Report, Run, Table
from kd_cache.errors import worst_exit_code
from kd_cache.prepare.audit import audit
from kd_cache.prepare.census import census


def check(run: Run, screen: Screen, target: str | None) -> Report:
    """Audit the manifest, and show everything that was found."""
    task = task_of(run.values)
    found = audit(**named(run.values, task), target=None if target is None else task.chosen(target))
    for note in (*guard_notes(found.look), *found.notes):
        screen.note(note)
    lines: list[str | Table] = [guard_table(found.manifest)]
    for problem in found.problems:
        lines += ["", *str(problem).split("\n")]
    if not found.problems:
        lines.append("Nothing is wrong.")
    report = {
        "manifest": str(found.manifest.path),
        "sha256": found.manifest.digest,
        "samples": len(found.manifest),
        "devices": census(found.manifest),
        "locations_known": [found.look.located, found.look.locatable],
        "shared_locations": len(found.look.shared_locations),
        "problems": [{"kind": type(each).__name__, "message": each.message} for each in found.problems],
        "missing": found.missing,
        "notes": found.notes,
    }
    return Report(report, lines, worst_exit_code(problem.exit_code for problem in found.problems))
