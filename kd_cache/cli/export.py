"""``kd-cache export``: a cache's rows as a tensor with its list of files, a table of text, or plain ``.npy`` files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.console import Screen, reporting_errors, size, table
from kd_cache.errors import UsageError, listed, shown

if TYPE_CHECKING:
    from kd_cache.export import ExportReport
    from kd_cache.store.folder import CacheFolder

EXAMPLES = """Examples:

kd-cache export cache/A2b --to tsv --output exported

kd-cache export cache/A2b --to pt --only scene --output exported

kd-cache export cache/A2b --to npy"""


@reporting_errors
def export_command(
    to: Annotated[
        Literal["npy", "pt", "tsv"],
        typer.Option(
            "--to",
            help="pt: a tensor and its list of files per teacher; tsv: a table per teacher; npy: a file per row.",
            envvar="KD_CACHE_TO",
            show_envvar=False,
            rich_help_panel=opt.OUTPUT,
        ),
    ],
    cache: Annotated[
        Path | None,
        typer.Argument(
            help="A finished cache, such as cache/A2b. (default: the only one under ./cache)", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Folder to write into. (default: only for npy: the cache's own view)",
            envvar="KD_CACHE_OUTPUT",
            show_envvar=False,
            rich_help_panel=opt.OUTPUT,
        ),
    ] = None,
    only: opt.OnlyOption = [],  # noqa: B006 (typer copies it)
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the files of an earlier export.",
            envvar="KD_CACHE_OVERWRITE",
            show_envvar=False,
            rich_help_panel=opt.OUTPUT,
        ),
    ] = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Write a cache's rows for other programs. Needs no teacher, no manifest and no features.

    Rows are those that a student would be served, in the order of their keys (the MD5 of their file).
    """
    from kd_cache.export import ExportJob, export_logits

    with Screen(quiet=quiet, as_json=as_json) as screen:
        folder = _folder(cache)
        report = export_logits(ExportJob(folder, to, output, only, overwrite), screen)
        screen.result(_table(report))
        screen.result_json(report.as_json())


def _folder(path: Path | None) -> CacheFolder:
    """The cache that was named, or the only one."""
    from kd_cache.store.folder import CacheFolder, find_caches, no_finished_cache

    if path is not None:
        return CacheFolder(path.parent if path.is_file() else path)
    root = Path("cache")
    found = find_caches(root)
    if not found:
        raise no_finished_cache(root)
    if len(found) > 1:
        raise UsageError(
            f"there are {len(found)} caches under {shown(root)}; say which\n"
            + listed([folder.path for folder in found]),
            hint=f"kd-cache export {found[0].path} …",
        )
    return found[0]


def _table(report: ExportReport) -> Any:
    rows = [[one.teacher, f"{one.rows:,}", size(one.bytes), str(one.path)] for one in report.teachers]
    title = f"{shown(report.cache)} as {report.to}: {report.num_samples:,} samples complete"
    return table(title, ["Teacher", "Rows", "Size", "Path"], rows)
