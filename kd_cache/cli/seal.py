"""``kd-cache seal``: make current what several dumps committed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.console import Screen, reporting_errors, size, table
from kd_cache.errors import shown

EXAMPLES = """Examples:

kd-cache dump --target b --shard 0/2

kd-cache dump --target b --shard 1/2

kd-cache seal --target b"""

# Where no dump has left a word: a seal computes nothing itself.
UNKNOWN_ENVIRONMENT = {"device": "not known", "torch": "not known"}

FilesOption = Annotated[
    bool | None,
    typer.Option(
        "--files/--no-files",
        help="Whether the cache has a view. (default: as its dumps said)",
        envvar="KD_CACHE_FILES",
        show_envvar=False,
        rich_help_panel=opt.CACHE,
    ),
]


@reporting_errors
def seal_command(
    ctx: typer.Context,
    target: opt.RequiredTargetOption,
    cache_root: opt.CacheRootOption = Path("cache"),
    json_path: opt.JsonPathOption = None,
    data_root: opt.DataRootOption = None,
    features: opt.FeaturesOption = None,
    num_scenes: opt.NumScenesOption = 10,
    num_cities: opt.NumCitiesOption = 12,
    allow_shared_locations: opt.AllowSharedOption = False,
    allow_outside: opt.AllowOutsideOption = [],  # noqa: B006 (typer copies it)
    files: FilesOption = None,
    workers: opt.WorkersOption = 2,
    max_manifest_bytes: opt.MaxManifestOption = opt.MAX_MANIFEST,
    max_feature_bytes: opt.MaxFeatureOption = opt.MAX_FEATURE,
    config: opt.ConfigOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Merge the packs of all dumps into one per teacher, write view and index. Needs no teacher.

    Data options that are not given are taken from what the dumps saved with the cache.
    """
    from kd_cache.cli.saved import run_record, saved_inputs, saved_with
    from kd_cache.manifest import SOURCE
    from kd_cache.seal import SealJob, seal_cache
    from kd_cache.store.folder import CacheFolder

    folder = CacheFolder(cache_root / f"{SOURCE}2{target}")
    with Screen(quiet=quiet, as_json=as_json) as screen:
        inputs = saved_inputs(ctx, saved_with(folder, screen), target)
        job = SealJob(
            folder,
            inputs.manifest,
            inputs.selection,
            inputs.source,
            files=files,
            workers=workers,
            record={**run_record(ctx, inputs), "environment": UNKNOWN_ENVIRONMENT},
            shown_path=f"{cache_root}/{folder.path.name}",
        )
        report = seal_cache(job, screen)
        screen.result(*sealed_lines(report))
        screen.result_json(report.as_json())
    if report.missing:
        raise typer.Exit(3)


def sealed_lines(report: Any) -> list[Any]:
    done = report.published
    rows = [[name, f"{done.rows[name]:,}", f"{done.left_out[name]:,}"] for name in done.rows]
    title = f"{shown(report.cache)}: {report.permitted:,} permitted samples"
    lines: list[Any] = [table(title, ["Teacher", "Rows", "Left out"], rows)]
    lines.append(
        f"{size(done.pack_bytes)} of packs, {done.view_written:,} .npy files written, {done.view_removed:,} removed; "
        f"{done.num_samples:,} samples complete"
    )
    for number, (file, reason) in enumerate(report.missing.items()):
        if number == 20:
            lines.append(f"… and {len(report.missing) - 20:,} more missing samples")
            break
        lines.append(f"missing: {shown(file)}: {shown(reason)}")
    return lines
