"""``kd-cache gc``: remove what killed processes, old weights and old manifests left in caches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.console import Screen, reporting_errors, size
from kd_cache.errors import shown

if TYPE_CHECKING:
    from kd_cache.gc import GcReport

EXAMPLES = """Examples:

kd-cache gc --dry-run

kd-cache gc cache/A2b

kd-cache gc --older-than 86400 --json"""

MOST_SHOWN = 20


@reporting_errors
def gc_command(
    cache: Annotated[
        Path | None, typer.Argument(help="A cache. (default: every cache under the root)", show_default=False)
    ] = None,
    cache_root: opt.CacheRootOption = Path("cache"),
    older_than: Annotated[
        int,
        typer.Option(
            "--older-than",
            metavar="SECONDS",
            min=0,
            max=10**10,
            help="Leave what is younger: a running dump or seal may be making it. With 0, nothing else may run.",
            envvar="KD_CACHE_OLDER_THAN",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = 3600,
    config: opt.ConfigOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what would be removed, and why.",
            envvar="KD_CACHE_DRY_RUN",
            show_envvar=False,
            rich_help_panel=opt.OUTPUT,
        ),
    ] = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Remove temporaries of killed processes, superseded packs, and files that no index promises.

    A row that the index or an unfinished dump needs is never removed, nor is a file that does not look like ours.
    """
    from kd_cache.gc import caches_below, find_garbage, remove_garbage
    from kd_cache.store.folder import CacheFolder

    with Screen(quiet=quiet, as_json=as_json) as screen:
        folders = caches_below(cache_root) if cache is None else [CacheFolder(cache)]
        reports = [find_garbage(folder.path, older_than) for folder in folders]  # all, before anything is removed
        for report in reports:
            if not dry_run:
                remove_garbage(report)
            _show(screen, report, dry_run=dry_run)
        content = {"dry_run": dry_run, "older_than": older_than, "caches": [report.as_json() for report in reports]}
        screen.result_json(content | {"bytes": sum(report.size for report in reports)})


def _show(screen: Screen, report: GcReport, *, dry_run: bool) -> None:
    for note in (*report.notes, *[f"{message}; it is left as it is" for message in report.damaged]):
        screen.note(note)
    what = "would be freed" if dry_run else "freed"
    count = len(report.garbage)
    screen.result(f"{shown(report.cache)}: {size(report.size)} in {count:,} file{'' if count == 1 else 's'} {what}")
    screen.result(*_lines(report), "")


def _lines(report: GcReport) -> list[str]:
    """One line for each thing; of the row files, of which there may be a million, the first."""
    lines: list[str] = []
    left_out = rows = 0
    for item in report.garbage:
        rows += item.kind == "row file"
        if item.kind == "row file" and rows > MOST_SHOWN:
            left_out += 1
        else:
            lines.append(f"  {size(item.size):>9}  {item.kind}: {item.path}: {item.reason}")
    if left_out:
        lines.append(f"  … and {left_out:,} more row files; --json lists them all")
    return lines
