"""``kd-cache verify``: audit caches against the manifest, the features and the teachers."""

from __future__ import annotations

from secrets import randbits

from kd_cache.care.problems import VerifyReport
from kd_cache.care.verify import VerifyJob, state_problem, verify_cache
from kd_cache.cli.console import Screen
from kd_cache.cli.inputs import task_of
from kd_cache.cli.report import accuracy_lines, problem_lines, verify_table
from kd_cache.cli.saved import saved_data, saved_in, saved_teachers
from kd_cache.commands import Report, Run, Table
from kd_cache.dataset.task_file import DEFAULT, recorded_task
from kd_cache.errors import UsageError, shown, worst_exit_code
from kd_cache.score.device import resolve_device
from kd_cache.store.cache import CacheFolder, find_caches, no_finished_cache
from kd_cache.store.snapshot import Snapshot


def verify(run: Run, screen: Screen, verify_seed: int | None) -> Report:
    """Audit each cache."""
    drawn = randbits(32) if verify_seed is None else verify_seed
    reports = [_verify_one(run, folder, drawn, screen) for folder in chosen_caches(run, screen)]
    lines: list[str | Table] = []
    for report in reports:
        for note in report.notes:
            screen.note(note)
        lines += [verify_table(report)] if report.teachers else []
        lines += [*accuracy_lines(report), *problem_lines(report), ""]
    code = worst_exit_code(report.exit_code for report in reports)
    return Report({"exit_code": code, "seed": drawn, "caches": [report.as_json() for report in reports]}, lines, code)


def chosen_caches(run: Run, screen: Screen) -> list[CacheFolder]:
    """The cache that was named, by its path or by ``--target``, or every finished one under the root."""
    root, target, path = run.values["cache_root"], run.values["target"], run.values["cache"]
    if path is not None:
        folder = CacheFolder.at(path)
        if folder.is_anything or not find_caches(path, DEFAULT.is_adaptation):
            if target not in (None, _target_in(folder)):
                raise UsageError(f"{shown(path)} is not the cache of target {target}", hint="Name one of the two.")
            return [folder]
        root = path
    task = task_of(run.values)
    if target is not None or not task.has_domains:
        return [CacheFolder(root / task.adaptation(each)) for each in task.several(target)]
    found = find_caches(root, DEFAULT.is_adaptation)
    folders = [folder for folder in found if _target_in(folder)]
    for folder in found:
        if folder not in folders:
            screen.note(f"{folder.path} is not named after a target and is passed over")
    if not folders:
        raise no_finished_cache(root, DEFAULT.is_adaptation)
    return folders


def _target_in(folder: CacheFolder) -> str | None:
    """The target that a cache's folder is named after, by the task that made it; ``None`` where it is not."""
    named = DEFAULT.target_in(folder.path.name)
    index = None if named else Snapshot(folder).index
    return named if index is None else recorded_task(index.record).target_in(folder.path.name)


def _verify_one(run: Run, folder: CacheFolder, seed: int, screen: Screen) -> VerifyReport:
    options = run.values
    snapshot = Snapshot(folder, maps=True)
    problem = state_problem(snapshot)
    if problem is not None and not run.given("json_path") and options["dataset"] is None:
        return VerifyReport(str(folder.path), seed, everything=options["everything"], problems=[problem])
    saved = saved_in(None if problem else snapshot.index)
    target = saved.target(folder)
    data = saved_data(run, saved, target)
    device = resolve_device(options["device"]) if options["recompute"] else None
    loaded = saved_teachers(run, saved, target, screen)
    return verify_cache(
        VerifyJob(
            snapshot,
            data,
            teachers=loaded.teachers,
            unchecked=loaded.unchecked,
            n=None if options["everything"] else options["n"],
            seed=seed,
            precision=options["precision"],
            dtype=options["dtype"],
            recompute=options["recompute"],
            min_accuracy=options["min_accuracy"],
            device=device,
        ),
        screen,
    )
