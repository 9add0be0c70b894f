"""``kd-cache merge``: one cache of what several machines scored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.console import Screen, reporting_errors, table
from kd_cache.cli.seal import FilesOption, sealed_lines
from kd_cache.errors import shown

if TYPE_CHECKING:
    from kd_cache.cli.saved import Saved
    from kd_cache.merge import MergeReport
    from kd_cache.store.folder import CacheFolder

EXAMPLES = """Examples:

kd-cache merge parts/one/A2b parts/two/A2b --target b

kd-cache merge /mnt/machine2/cache/A2b --target b --only scene --json"""


@reporting_errors
def merge_command(
    ctx: typer.Context,
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Caches of the same target; only read.")],
    target: opt.RequiredTargetOption,
    cache_root: opt.CacheRootOption = Path("cache"),
    only: opt.OnlyOption = [],  # noqa: B006 (typer copies it)
    json_path: opt.JsonPathOption = None,
    data_root: opt.DataRootOption = None,
    features: opt.FeaturesOption = None,
    num_scenes: opt.NumScenesOption = 10,
    num_cities: opt.NumCitiesOption = 12,
    allow_shared_locations: opt.AllowSharedOption = False,
    allow_outside: opt.AllowOutsideOption = [],  # noqa: B006
    files: FilesOption = None,
    workers: opt.WorkersOption = 2,
    max_manifest_bytes: opt.MaxManifestOption = opt.MAX_MANIFEST,
    max_feature_bytes: opt.MaxFeatureOption = opt.MAX_FEATURE,
    config: opt.ConfigOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Bring the rows of other caches, finished or not, into the cache of a target, and seal it. Needs no teacher.

    Rows that the manifest does not permit are left out. Data options that are not given are those saved with the cache,
    or with the first source.
    """
    from kd_cache.cli.saved import saved_inputs
    from kd_cache.manifest import SOURCE
    from kd_cache.merge import MergeJob, merge_caches
    from kd_cache.store.folder import CacheFolder, refuse_file_as_root

    refuse_file_as_root(cache_root)
    folder = CacheFolder(cache_root / f"{SOURCE}2{target}")
    with Screen(quiet=quiet, as_json=as_json) as screen:
        saved = _saved(folder, sources[0])
        inputs = saved_inputs(ctx, saved, target)
        job = MergeJob(
            folder,
            sources,
            inputs.manifest,
            inputs.selection,
            inputs.source,
            f"{cache_root}/{folder.path.name}",
            only=only,
            paths=inputs.paths,
            files=files,
            workers=workers,
        )
        report = merge_caches(job, screen)
        screen.result(_table(report), "", *sealed_lines(report.sealed))
        screen.result_json(report.as_json())
    if report.sealed.missing:
        raise typer.Exit(3)


def _saved(folder: CacheFolder, source: Path) -> Saved:
    """What the destination says of its data, or where there is none the first source."""
    from kd_cache.cli.saved import saved_in
    from kd_cache.errors import CorruptError, MissingLogitsError
    from kd_cache.merge import told_in
    from kd_cache.store.folder import CacheFolder

    try:
        return saved_in(told_in(folder)[-1])
    except (MissingLogitsError, CorruptError):  # the merge itself says what it is
        return saved_in(told_in(CacheFolder(source))[-1])


def _table(report: MergeReport) -> Any:
    """What each source had."""
    rows = [
        [f"{shown(brought.source)}: {name}", f"{count:,}", f"{brought.not_permitted[name]:,}"]
        for brought in report.sources
        for name, count in brought.rows.items()
    ]
    return table("Merged", ["Source", "Rows", "Not permitted"], rows)
