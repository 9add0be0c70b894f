"""``kd-cache repair``: score again or rebuild what an audit reports, and nothing else."""

from __future__ import annotations

from kd_cache.care.repair import RepairJob, RepairReport, repair_cache
from kd_cache.care.verify import VerifyJob
from kd_cache.cli.console import Screen
from kd_cache.cli.report import problem_lines, verify_table
from kd_cache.cli.saved import Saved, run_record, saved_data, saved_in, saved_teachers, saved_with
from kd_cache.cli.verify import chosen_caches
from kd_cache.commands import Report, Run, Table
from kd_cache.errors import UsageError, shown, worst_exit_code
from kd_cache.score.device import environment, resolve_device
from kd_cache.store.cache import CacheFolder
from kd_cache.store.snapshot import Snapshot


def repair(run: Run, screen: Screen) -> Report:
    """Verify, mend, verify again; the second verification's status counts."""
    reports = [_repair_one(run, folder, screen) for folder in _repairable(run, screen)]
    code = worst_exit_code(report.after.exit_code for report in reports)
    for note in [note for report in reports for note in report.after.notes]:
        screen.note(note)
    content = {"exit_code": code, "caches": [report.as_json() for report in reports]}
    return Report(content, [line for report in reports for line in _lines(report)], code)


def _repairable(run: Run, screen: Screen) -> list[CacheFolder]:
    """The caches that were named; of all under a root those that a command line can score again."""
    folders = chosen_caches(run, screen)
    if run.values["target"] is not None or len(folders) == 1 or run.given("json_path"):
        return folders
    found = []
    for folder in folders:
        index = Snapshot(folder).index
        if index is not None and not {"json_path", "dataset"} & {*saved_in(index).paths}:
            screen.note(f"{folder.path} was scored from Python and is passed over: kd_cache.score repairs it")
        else:
            found.append(folder)
    return found


def _repair_one(run: Run, folder: CacheFolder, screen: Screen) -> RepairReport:
    options = run.values
    snapshot = Snapshot(folder, maps=True)
    saved = saved_with(snapshot, screen)
    if snapshot.index is not None:  # a dump that has not finished may have been begun with a wrong data root
        saved = saved_in(snapshot.index)
    _refuse_to_guess(run, folder, saved)
    target = saved.target(folder)
    data = saved_data(run, saved, target)
    loaded = saved_teachers(run, saved, target, screen)
    device = resolve_device(options["device"])
    audit = VerifyJob(
        snapshot,
        data,
        teachers=loaded.teachers,
        unchecked=loaded.unchecked,
        n=None,
        recompute=options["recompute"],
        device=device,
    )
    job = RepairJob(
        audit,
        folder.path.parent,
        on_bad_sample=run.recall(saved.values, saved.paths)["on_bad_sample"] or "stop",
        workers=options["workers"],
        notes=loaded.notes,
        record={**run_record(run, data), "environment": environment(device)},
    )
    return repair_cache(job, screen)


def _refuse_to_guess(run: Run, folder: CacheFolder, saved: Saved) -> None:
    """The sample is no default here: a repair by another manifest would throw everything away."""
    if "json_path" not in saved.paths and not run.given("json_path") and run.values["dataset"] is None:
        raise UsageError(
            f"nothing in {shown(folder.path)} says which dataset it is of: its index is lost, or names none",
            hint="Pass the dataset JSON with --json-path, and the other options that it was dumped with.",
        )


def _lines(report: RepairReport) -> list[str | Table]:
    lines: list[str | Table] = [str(line) for line in problem_lines(report.before)]  # no failures: most are mended now
    lines += [
        f"{name}: {n:,} adopted rows were confirmed by scoring them again" for name, n in report.confirmed.items() if n
    ]
    lines += [
        f"{name}: {n:,} adopted rows are not what it gives; they were replaced"
        for name, n in report.replaced.items()
        if n
    ]
    lines += [f"{name}: {count:,} rows scored" for name, count in report.scored.items()]
    if report.rebuilt:
        lines.append("view and index rebuilt from the packs")
    if not report.before.problems and not report.rebuilt:
        lines.append("Nothing to repair.")
    if report.after.teachers:
        lines += ["", verify_table(report.after)]
    if report.before.problems:
        lines += [*problem_lines(report.after), ""]
    return lines
