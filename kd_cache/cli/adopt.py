"""``kd-cache adopt``: bring rows that something else made into a cache, marked unverified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.console import Screen, reporting_errors, table
from kd_cache.errors import shown

if TYPE_CHECKING:
    from kd_cache.adopt import AdoptReport

EXAMPLES = """Examples:

kd-cache adopt cache/A2b --target b

kd-cache adopt exported/scene.tsv --target b --name adopted_scene

kd-cache adopt scene.pt --target b --files-list train_files.txt --on-bad-sample skip"""


@reporting_errors
def adopt_command(
    ctx: typer.Context,
    source: Annotated[
        Path, typer.Argument(help="The folder of an older script's cache, a tensor (.pt) with its files, or a .tsv.")
    ],
    target: opt.RequiredTargetOption,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="The teacher's name in the cache. (default: as the source says, or the file's name)",
            envvar="KD_CACHE_NAME",
            show_envvar=False,
            rich_help_panel=opt.TEACHERS,
        ),
    ] = None,
    files_list: Annotated[
        Path | None,
        typer.Option(
            "--files-list",
            help="Files of a bare tensor in the order of its rows: a JSON list, or one a line.  "
            "(default: <stem>.files.json beside it)",
            envvar="KD_CACHE_FILES_LIST",
            show_envvar=False,
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    value_kind: Annotated[
        Literal["logits", "log_probs", "probs", "sigmoid"] | None,
        typer.Option(
            "--value-kind",
            help="What the rows are. (default: as the source says, else logits)",
            envvar="KD_CACHE_VALUE_KIND",
            show_envvar=False,
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    # Not "dtype": in a settings file that is the dump's.
    text_dtype: Annotated[
        opt.DType | None,
        typer.Option(
            "--dtype",
            help="What the numbers of a .tsv are stored as. (default: fp32)",
            envvar="KD_CACHE_TEXT_DTYPE",
            show_envvar=False,
            rich_help_panel=opt.DATA,
        ),
    ] = None,
    json_path: opt.JsonPathOption = None,
    data_root: opt.DataRootOption = None,
    features: opt.FeaturesOption = None,
    num_scenes: opt.NumScenesOption = 10,
    num_cities: opt.NumCitiesOption = 12,
    allow_shared_locations: opt.AllowSharedOption = False,
    allow_outside: opt.AllowOutsideOption = [],  # noqa: B006 (typer copies it)
    on_bad_sample: Annotated[
        opt.BadSample,
        typer.Option(
            "--on-bad-sample",
            help="Stop at a feature or a row that cannot be used, or skip it, list it as missing and exit 3.",
            envvar="KD_CACHE_ON_BAD_SAMPLE",
            show_envvar=False,
            rich_help_panel=opt.DATA,
        ),
    ] = "stop",
    cache_root: opt.CacheRootOption = Path("cache"),
    files: Annotated[
        bool | None,
        typer.Option(
            "--files/--no-files",
            help="Whether the cache has a view of one <md5>.npy per row. (default: as it is, or yes)",
            envvar="KD_CACHE_FILES",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = None,
    workers: opt.WorkersOption = 2,
    max_manifest_bytes: opt.MaxManifestOption = opt.MAX_MANIFEST,
    max_feature_bytes: opt.MaxFeatureOption = opt.MAX_FEATURE,
    max_source_bytes: Annotated[
        int,
        typer.Option(
            "--max-source-bytes",
            min=1,
            help="A larger file to adopt is refused unread.",
            envvar="KD_CACHE_MAX_SOURCE_BYTES",
            show_envvar=False,
            rich_help_panel=opt.LIMITS,
        ),
    ] = 1 << 35,
    config: opt.ConfigOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Bring rows that something else made into a cache. They stay marked as unverified.

    Rows are joined to samples by file name; those of samples that are not permitted are left out.
    """
    from kd_cache.cli.inputs import load_inputs
    from kd_cache.cli.saved import run_record

    with Screen(quiet=quiet, as_json=as_json) as screen:
        # The guard comes first: nothing is read of the source for a manifest that leaks.
        inputs = load_inputs(
            target,
            json_path,
            data_root,
            features,
            num_scenes=num_scenes,
            num_cities=num_cities,
            allow_shared_locations=allow_shared_locations,
            allow_outside=allow_outside,
            max_manifest_bytes=max_manifest_bytes,
            max_feature_bytes=max_feature_bytes,
        )
        from kd_cache.adopt import AdoptJob, adopt_rows

        job = AdoptJob(
            source,
            cache_root,
            inputs.manifest,
            inputs.selection,
            inputs.source,
            name=name,
            files_list=files_list,
            value_kind=value_kind,
            dtype=text_dtype,
            files=files,
            on_bad_sample=on_bad_sample,
            workers=workers,
            max_bytes=max_source_bytes,
            record=run_record(ctx, inputs),
        )
        report = adopt_rows(job, screen)
        screen.result(*_lines(report))
        screen.result_json(report.as_json())
    if report.missing:
        raise typer.Exit(3)


def _lines(report: AdoptReport) -> list[Any]:
    rows = [
        [
            name,
            f"{one.rows:,}",
            f"{one.origin.num_classes} {one.origin.value_kind}, {one.origin.dtype}",
            f"{one.left_out:,}",
            f"{one.missing:,}",
            "unknown" if one.accuracy is None else str(one.accuracy),
        ]
        for name, one in report.teachers.items()
    ]
    title = f"{shown(report.cache)}: {report.permitted:,} permitted samples"
    columns = [
        "Teacher (unverified)",
        "Rows",
        "Values",
        "Not permitted",
        "Missing",
        "Accuracy on A",
    ]
    lines: list[Any] = [table(title, columns, rows)]
    lines.append("Adopted rows are unverified: kd-cache repair --recompute scores them again with their teacher.")
    for number, (file, reason) in enumerate(report.missing.items()):
        if number == 20:
            lines.append(f"… and {len(report.missing) - 20:,} more missing samples")
            break
        lines.append(f"missing: {shown(file)}: {shown(reason)}")
    return lines
