"""``kd-cache repair``: score again or rebuild what an audit reports, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.console import Screen, reporting_errors
from kd_cache.errors import UsageError, shown, worst_exit_code

if TYPE_CHECKING:
    from kd_cache.cli.saved import Saved
    from kd_cache.repair import RepairReport
    from kd_cache.store.folder import CacheFolder

EXAMPLES = """Examples:

kd-cache repair

kd-cache repair --target b --recompute"""


@reporting_errors
def repair_command(
    ctx: typer.Context,
    target: opt.AnyTargetOption = None,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Score every sample again first: rows that come out otherwise are replaced, adopted ones confirmed.",
            envvar="KD_CACHE_RECOMPUTE",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = False,
    cache_root: opt.CacheRootOption = Path("cache"),
    json_path: opt.JsonPathOption = None,
    data_root: opt.DataRootOption = None,
    features: opt.FeaturesOption = None,
    num_scenes: opt.NumScenesOption = 10,
    num_cities: opt.NumCitiesOption = 12,
    allow_shared_locations: opt.AllowSharedOption = False,
    allow_outside: opt.AllowOutsideOption = [],  # noqa: B006 (typer copies it)
    on_bad_sample: Annotated[
        opt.BadSample | None,
        typer.Option(
            "--on-bad-sample",
            help="Stop at a sample that cannot be scored, or skip it and list it as missing. (default: as dumped)",
            envvar="KD_CACHE_ON_BAD_SAMPLE",
            show_envvar=False,
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    city2scene_teacher_ckpt: opt.City2SceneOption = None,
    scene_teacher_ckpt: opt.SceneOption = None,
    teacher: opt.TeacherOption = [],  # noqa: B006
    device: opt.DeviceOption = "auto",
    workers: opt.WorkersOption = 2,
    max_manifest_bytes: opt.MaxManifestOption = opt.MAX_MANIFEST,
    max_feature_bytes: opt.MaxFeatureOption = opt.MAX_FEATURE,
    max_checkpoint_bytes: opt.MaxCheckpointOption = opt.MAX_CHECKPOINT,
    config: opt.ConfigOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Verify everything, mend what is wrong, verify again. What is whole is not touched.

    Data and teacher options that are not given are taken from what the dump saved with the cache. Exits with the status
    of the second verification.
    """
    from kd_cache.cli.verify_run import chosen_caches

    with Screen(quiet=quiet, as_json=as_json) as screen:
        reports = [_repair_one(ctx, folder, screen) for folder in chosen_caches(ctx, screen)]
        for report in reports:
            _print(report, screen)
        code = worst_exit_code(report.after.exit_code for report in reports)
        screen.result_json({"exit_code": code, "caches": [report.as_json() for report in reports]})
    if code:
        raise typer.Exit(code)


def _repair_one(ctx: typer.Context, folder: CacheFolder, screen: Screen) -> RepairReport:
    from kd_cache.cli.saved import run_record, saved_inputs, saved_teachers, saved_with
    from kd_cache.manifest import SOURCE
    from kd_cache.pipeline.device import environment, resolve_device
    from kd_cache.repair import RepairJob, repair_cache
    from kd_cache.verify import VerifyJob

    options = ctx.params
    target = folder.path.name.removeprefix(f"{SOURCE}2")
    saved = saved_with(folder, screen)
    _refuse_to_guess(ctx, folder, saved)
    inputs = saved_inputs(ctx, saved, target)
    loaded = saved_teachers(ctx, saved, target)
    device = resolve_device(options["device"])
    audit = VerifyJob(
        folder,
        inputs.manifest,
        inputs.selection,
        inputs.source,
        teachers=loaded.teachers,
        unchecked=loaded.unchecked,
        n=None,
        recompute=options["recompute"],
        device=device,
    )
    job = RepairJob(
        audit,
        folder.path.parent,
        on_bad_sample=options["on_bad_sample"] or saved.values.get("on_bad_sample", "stop"),
        workers=options["workers"],
        notes=loaded.notes,
        record={**run_record(ctx, inputs), "environment": environment(device)},
    )
    return repair_cache(job, screen)


def _refuse_to_guess(ctx: typer.Context, folder: CacheFolder, saved: Saved) -> None:
    """The sample is no default here: a repair by another manifest would throw everything away."""
    from kd_cache.cli.config import given

    if "json_path" not in saved.paths and not given(ctx, "json_path"):
        raise UsageError(
            f"nothing in {shown(folder.path)} says which dataset it is of: its index is lost, or names none",
            hint="Pass the dataset JSON with --json-path, and the other options that it was dumped with.",
        )


def _print(report: RepairReport, screen: Screen) -> None:
    from kd_cache.cli.report import problem_lines, verify_table

    screen.result(*problem_lines(report.before.worst_first))
    for name, count in report.confirmed.items():
        screen.result(f"{name}: {count:,} adopted rows were confirmed by scoring them again")
    for name, count in report.scored.items():
        screen.result(f"{name}: {count:,} rows scored")
    if report.rebuilt:
        screen.result("view and index rebuilt from the packs")
    if not report.before.problems and not report.rebuilt:
        screen.result("Nothing to repair.")
    for note in report.after.notes:
        screen.note(note)
    if report.after.teachers:
        screen.result("", verify_table(report.after))
    if report.before.problems:
        screen.result(*problem_lines(report.after.worst_first), "")
