"""``kd-cache dump``: score a training set with every teacher, once."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from secrets import randbits
from typing import Any, Literal

from kd_cache.care.problems import VerifyReport
from kd_cache.care.verify import VerifyJob, verify_cache
from kd_cache.cli.console import Screen, cost_in_words, size
from kd_cache.cli.dump_job import DumpOptions, Part, job_of, loaded_with, specs_of
from kd_cache.cli.guard import guard_notes, guard_table
from kd_cache.cli.inputs import data_of, task_of
from kd_cache.cli.on_ray import dump_on_ray, refuse_odd
from kd_cache.cli.parts import part_of
from kd_cache.cli.progress import rate_in_words
from kd_cache.cli.remote import pushed_lines
from kd_cache.cli.report import missing_lines, problem_lines, verify_table
from kd_cache.cli.saved import run_record
from kd_cache.commands import Report, Run, Table
from kd_cache.dataset.dataset import Dataset
from kd_cache.errors import UsageError, shown, worst_exit_code
from kd_cache.exchange.push import open_for_parts, push_cache, push_parts
from kd_cache.prepare.census import census
from kd_cache.remote.url import checked_url, open_store
from kd_cache.score.device import resolve_device
from kd_cache.score.dump import DumpJob, DumpReport, dump_logits, lenders, plan_dumps, refuse_unfit
from kd_cache.score.storage_cost import StorageCost
from kd_cache.score.teacher import Teacher, TeacherSpec
from kd_cache.store.accuracy import Accuracy, in_words, stored_apart
from kd_cache.store.cache import CacheFolder, refuse_file_as_root
from kd_cache.store.snapshot import Snapshot


def dump(run: Run, screen: Screen, dry_run: bool) -> Report:
    """Guard, load, score, verify."""
    options = run.to(DumpOptions)
    refuse_odd(options)
    # On a cluster the driver does everything, whatever started it.
    part, said = part_of(options.shard) if options.ray is None else (None, "")
    datas = _guarded(run, options, screen, part)
    for data in datas:
        _announce(screen, data)
    if (part is not None or options.ray is not None) and len(datas) > 1:
        raise UsageError(
            "a part is of one target's cache",
            hint="Leave out --shard or --ray, or dump one --target after another.",
        )
    if part is not None:
        screen.remark(f"part {part[0]} of {part[1]} (by {said}), counted from 0")
    _refuse_push(options.push, len(datas), part)
    refuse_file_as_root(options.cache_root)
    if options.ray is not None and not dry_run:
        job, report = dump_on_ray(run, options, datas[0], screen)
        code, content = _reported(job, report, options.num_verify, screen)
        return Report(content | _pushed(job, options.push, code, screen), exit_code=code)
    loaded: dict[TeacherSpec, Teacher] = {}
    jobs = [_job(run, options, data, part, screen, loaded) for data in datas]
    if len(jobs) > 1:
        planned = sorted({file for data in datas for file in data.selection.listed})
        jobs = [replace(job, planned=planned) for job in jobs]
    if dry_run:
        plans = [
            _planned(report, data, first=data is datas[0]) for report, data in zip(plan_dumps(jobs), datas, strict=True)
        ]
        return plans[0] if len(jobs) == 1 else _together(datas, plans)
    if len(jobs) > 1:
        refuse_unfit(jobs)
    reports = []
    for number, job in enumerate(jobs):
        size = _size_of(jobs[0]) if number and job.batch_size == "auto" else job.batch_size
        job = replace(job, batch_size=size) if size != job.batch_size else job
        code, content = dump_and_report(job, options.num_verify, screen, lenders(jobs, number))
        reports.append(Report(content | _pushed(job, options.push, code, screen), exit_code=code))
    return reports[0] if len(jobs) == 1 else _together(datas, reports)


def _refuse_push(url: str | None, targets: int, part: Part) -> None:
    """Before anything is scored: what could not be pushed afterwards."""
    if url is None:
        return
    if targets > 1:
        raise UsageError("an URL holds one target's cache", hint="Dump one --target after another.")
    if part is None:
        open_store(checked_url(url), writing=True).list()
    else:
        open_for_parts(url)


def _pushed(job: DumpJob, url: str | None, code: int, screen: Screen) -> dict[str, Any]:
    """Send what this dump made, unless it failed; gives what the report for a program has besides."""
    if url is None or code not in (0, 3):
        return {}
    path = job.folder.path
    done = push_cache(path, url, screen) if job.part is None else push_parts(path, url, screen)
    screen.result(*pushed_lines(done))
    return {"push": done.as_json()}


def _guarded(run: Run, options: DumpOptions, screen: Screen, part: Part) -> list[Dataset]:
    """The data of each target: the guard looks at all of them before any teacher is loaded.

    It has done so already where a part finds the table of the samples.
    """
    task = task_of(run.values)
    first, *others = task.several(options.target)
    tables = None if part is None or others else CacheFolder(options.cache_root / task.adaptation(first)).pending_path
    data = data_of(first, run.values, task, screen.note, tables=tables)
    shared = run.values["allow_shared_locations"]
    return [data, *(data.for_target(target, allow_shared_locations=shared) for target in others)]


def _size_of(job: DumpJob) -> int | Literal["auto"] | None:
    """The batch size that was measured for the first cache: the others are scored with the same."""
    plan = Snapshot(job.folder).saved_plan
    return job.batch_size if plan is None else plan.batch_size


def _together(datas: Sequence[Dataset], reports: Sequence[Report]) -> Report:
    content = {"targets": {data.target: report.content for data, report in zip(datas, reports, strict=True)}}
    lines = [line for report in reports for line in report.lines]
    return Report(content, lines, worst_exit_code(report.exit_code for report in reports))


def _planned(report: DumpReport, data: Dataset, *, first: bool) -> Report:
    content = {"dry_run": True, **_as_json(report), "devices": census(data.manifest)}
    current = [f"{name}: other rows would become current ({how})" for name, how in report.replaced.items()]
    lines: list[str | Table] = [guard_table(data.manifest)] if first else []
    lines += ["", _plan_table(report), *current, _plan_line(report)]
    return Report(content, [*lines, *missing_lines(report.missing)], 3 if report.missing else 0)


def dump_and_report(
    job: DumpJob, num_verify: int, screen: Screen, lent_by: Sequence[CacheFolder] = ()
) -> tuple[int, dict[str, Any]]:
    """Dump, verify some, and show what came of it; gives the exit status, and the report for a program."""
    for name, note in job.notes.items():
        if ", " in (read_from := note.get("source", {}).get("read_from", "")):  # not simply what the file holds
            screen.remark(f"{name}: weights read from {read_from}")
    return _reported(job, dump_logits(job, screen, lent_by), num_verify, screen)


def _reported(job: DumpJob, report: DumpReport, num_verify: int, screen: Screen) -> tuple[int, dict[str, Any]]:
    # A part has no index yet; what it wrote was read back before it was put in place.
    verified = None if job.part is not None else _verify(job, report, num_verify, screen)
    screen.result(_summary_table(report), *_summary_lines(job, report))
    if verified is not None:
        screen.result("", verify_table(verified), *problem_lines(verified))
    if report.published is not None:
        screen.result(f"A page of it: kd-cache report {shlex.quote(str(report.cache))}")
    content = {**_as_json(report), "verification": None if verified is None else verified.as_json()}
    codes = [3 if report.missing else 0, 0 if verified is None else verified.exit_code]
    return worst_exit_code(codes), content


def _job(
    run: Run, options: DumpOptions, data: Dataset, part: Part, screen: Screen, loaded: dict[TeacherSpec, Teacher]
) -> DumpJob:
    """``loaded`` are teachers that serve several targets."""
    specs = specs_of(run, options, data)
    resolve_device(options.device)  # refused before a teacher is loaded, which takes a while
    new = [spec for spec in specs if spec not in loaded]
    loaded |= dict(zip(new, loaded_with(options, new, screen).values(), strict=True))
    return job_of(options, data, {spec: loaded[spec] for spec in specs}, run_record(run, data), part)


def _announce(screen: Screen, data: Dataset) -> None:
    selection = data.selection
    if not data.task.has_domains:
        screen.remark(f"{data.task.name}: {len(selection.samples):,} permitted train samples")
    counts = ", ".join(f"{count:,} of {device}" for device, count in selection.per_device.items())
    if data.task.has_domains:
        screen.remark(
            f"{data.task.source} → {selection.target}: {len(selection.samples):,} permitted train samples ({counts})"
        )
    for note in guard_notes(selection):
        screen.note(note)


def _verify(job: DumpJob, report: DumpReport, count: int, screen: Screen) -> VerifyReport | None:
    if count == 0:
        return None
    return verify_cache(
        VerifyJob(
            report.snapshot or Snapshot(job.folder, maps=True),
            job.data,
            teachers=job.teachers,
            only=list(job.teachers) or None,  # workers of a cluster have them
            n=count,
            seed=randbits(32),
        ),
        screen,
    )


def _summary_table(report: DumpReport) -> Table:
    rows = []
    for name, result in report.teachers.items():
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in result.rescored.items())
        rescored = f"{result.rescored.total():,}" + (f" ({reasons})" if reasons else "")
        rows.append([name, f"{result.scored:,}", f"{result.skipped:,}", rescored, f"{result.dropped:,}"])
    columns = ["Teacher", "Scored", "Skipped (fresh)", "Rescored (stale)", "Dropped"]
    part = "" if report.part_size == report.permitted else f", {report.part_size:,} of them in this part"
    return Table(f"{shown(report.cache)}: {report.permitted:,} permitted samples{part}", columns, rows)


def _summary_lines(job: DumpJob, report: DumpReport) -> list[str]:
    lines = [f"{name}: other rows are current now ({how})" for name, how in report.replaced.items()]
    if report.samples_scored == 0 and not report.missing and not report.replaced:
        what = "permitted sample" if job.part is None else "sample of this part"
        lines.append(f"Nothing to score: every {what} is cached and fresh.")
    elif report.samples_scored:
        lines.append(
            f"{report.samples_scored:,} samples scored in {report.seconds:.1f} s, {rate_in_words(report.rate)} "
            f"samples/s on {job.device}, {job.precision}, stored as {job.dtype}"
        )
        if report.busy:
            lines.append("busy: " + ", ".join(f"{stage} {share:.0%}" for stage, share in report.busy.items()))
    if report.published is not None:
        done = report.published
        lines.append(
            f"{size(done.pack_bytes)} of packs, {done.view_written:,} .npy files written, {done.view_removed:,} removed"
            f"; {done.num_samples:,} samples complete"
        )
        for name, kept in done.accuracy.items():
            lines += in_words(name, Accuracy.from_json(kept), stored_apart({"held_out": done.held_out.get(name)}))
    if job.part is not None:
        lines.append(f"Part {job.part[0]} of {job.part[1]} is committed; when all are: {_seal_command(job)}")
    for name, result in report.teachers.items():
        lines += _cost_line(f"{name}: storing as {job.dtype}", result.cost)
        lines += _cost_line(f"{name}: {job.precision} against fp32", result.precision_cost)
    return [*lines, *missing_lines(report.missing)]


def _cost_line(what: str, measured: StorageCost | None) -> list[str]:
    return [] if measured is None or not measured.rows else [f"{what}, {cost_in_words(measured.as_json())}"]


def _seal_command(job: DumpJob) -> str:
    root = "" if str(job.cache_root) == "cache" else f" --cache-root {shlex.quote(str(job.cache_root))}"
    task = job.record.get("settings", {}).get("values", {}).get("task")
    of_task = "" if task is None else f" --task {shlex.quote(task)}"
    return f"kd-cache seal{f' --target {job.data.target}' if job.data.task.has_domains else ''}{of_task}{root}"


def _plan_table(report: DumpReport) -> Table:
    rows = [
        [name, f"{result.scored:,}", f"{result.skipped:,}", f"{result.rescored.total():,}", f"{result.dropped:,}"]
        for name, result in report.teachers.items()
    ]
    columns = ["Teacher", "To score", "Fresh", "Stale", "To drop"]
    return Table(f"{shown(report.cache)}: what kd-cache dump would do", columns, rows)


def _plan_line(report: DumpReport) -> str:
    return f"{report.samples_scored:,} samples to read and score, about {size(report.bytes_planned)} of logits to store"


def _as_json(report: DumpReport) -> dict[str, Any]:
    content: dict[str, Any] = {
        "cache": str(report.cache),
        "permitted": report.permitted,
        "part_size": report.part_size,
        "per_device": report.per_device,
        "teachers": {name: result.as_json() for name, result in report.teachers.items()},
        "samples_scored": report.samples_scored,
        "missing": report.missing,
        "seconds": report.seconds,
        "samples_per_second": report.rate,
        "busy": report.busy,
        "halved_to": report.halved_to,
    }
    if report.published is None:
        return content | {"bytes": report.bytes_planned}
    done: Mapping[str, Any] = vars(report.published)
    return content | {"bytes": report.published.pack_bytes, "published": dict(done)}
