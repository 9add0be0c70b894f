"""What ``kd-cache verify`` does, once its options are read."""

from __future__ import annotations

from secrets import randbits
from typing import TYPE_CHECKING

import typer

from kd_cache.cli.config import given
from kd_cache.cli.console import Screen
from kd_cache.cli.report import problem_lines, verify_table
from kd_cache.cli.saved import saved_in, saved_inputs, saved_teachers
from kd_cache.errors import worst_exit_code
from kd_cache.manifest import SOURCE, TARGETS
from kd_cache.store.folder import CacheFolder, find_caches, no_finished_cache

if TYPE_CHECKING:
    from kd_cache.problems import VerifyReport


def run_verify(ctx: typer.Context) -> None:
    """Audit each cache and report. Exits with the command's status if that is not 0."""
    options = ctx.params
    with Screen(quiet=options["quiet"], as_json=options["as_json"]) as screen:
        folders = chosen_caches(ctx, screen)
        drawn = randbits(32) if options["verify_seed"] is None else options["verify_seed"]
        reports = [_verify_one(ctx, folder, drawn, screen) for folder in folders]
        for report in reports:
            for note in report.notes:
                screen.note(note)
            if report.teachers:
                screen.result(verify_table(report))
            screen.result(*problem_lines(report.worst_first))
            screen.result("")
        code = worst_exit_code(report.exit_code for report in reports)
        screen.result_json({"exit_code": code, "seed": drawn, "caches": [report.as_json() for report in reports]})
    if code:
        raise typer.Exit(code)


def chosen_caches(ctx: typer.Context, screen: Screen) -> list[CacheFolder]:
    """The cache of ``--target``, or every finished one under the root."""
    root, target = ctx.params["cache_root"], ctx.params["target"]
    if target is not None:
        return [CacheFolder(root / f"{SOURCE}2{target}")]
    found = find_caches(root)
    folders = [folder for folder in found if folder.path.name.removeprefix(f"{SOURCE}2") in TARGETS]
    for folder in found:
        if folder not in folders:
            screen.note(f"{folder.path} is not named after a target ({', '.join(TARGETS)}) and is passed over")
    if not folders:
        raise no_finished_cache(root)
    return folders


def _verify_one(ctx: typer.Context, folder: CacheFolder, seed: int, screen: Screen) -> VerifyReport:
    from kd_cache.problems import VerifyReport
    from kd_cache.verify import VerifyJob, open_index, verify_cache

    options = ctx.params
    target = folder.path.name.removeprefix(f"{SOURCE}2")
    index, problem = open_index(folder, maps=False)
    if index is None and not given(ctx, "json_path"):
        return VerifyReport(str(folder.path), seed, everything=options["everything"], problems=problem)
    saved = saved_in(index)
    inputs = saved_inputs(ctx, saved, target)
    device = None
    if options["recompute"]:
        from kd_cache.pipeline.device import resolve_device

        device = resolve_device(options["device"])
    loaded = saved_teachers(ctx, saved, target)
    return verify_cache(
        VerifyJob(
            folder,
            inputs.manifest,
            inputs.selection,
            inputs.source,
            teachers=loaded.teachers,
            unchecked=loaded.unchecked,
            n=None if options["everything"] else options["n"],
            seed=seed,
            precision=options["precision"],
            dtype=options["dtype"],
            recompute=options["recompute"],
            device=device,
        ),
        screen,
    )
