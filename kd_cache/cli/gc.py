"""``kd-cache gc``: remove what killed processes, old weights and old manifests left in caches."""

from __future__ import annotations

from pathlib import Path

from kd_cache.care.gc import GcReport, caches_below, find_garbage, remove_garbage
from kd_cache.cli.console import Screen, size
from kd_cache.commands import Report
from kd_cache.dataset.task_file import DEFAULT
from kd_cache.errors import shown
from kd_cache.store.cache import CacheFolder

MOST_SHOWN = 20


def gc(
    screen: Screen, cache: Path | None, cache_root: Path, older_than: int, drop_unfinished: bool, dry_run: bool
) -> Report:
    """Remove what nothing needs, or say what that would be."""
    folders = caches_below(cache_root, DEFAULT.is_adaptation) if cache is None else [CacheFolder(cache)]
    reports = [find_garbage(folder.path, older_than, drop_unfinished=drop_unfinished) for folder in folders]
    for report in reports:  # all was looked at before anything is removed
        if not dry_run:
            remove_garbage(report)
        _show(screen, report, dry_run=dry_run)
    content = {"dry_run": dry_run, "older_than": older_than, "caches": [report.as_json() for report in reports]}
    return Report(content | {"bytes": sum(report.size for report in reports)})


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
