"""``kd-cache export``: a cache's rows as a tensor with its list of files, a table of text, or plain ``.npy`` files."""

from __future__ import annotations

from pathlib import Path

from kd_cache.cli.console import Screen, size
from kd_cache.commands import Report, Table
from kd_cache.dataset.task_file import DEFAULT
from kd_cache.errors import UsageError, listed, shown
from kd_cache.exchange.export import ExportJob, ExportReport, export_logits
from kd_cache.options import ExportFormat
from kd_cache.store.cache import CacheFolder, find_caches, no_finished_cache


def export(
    screen: Screen, cache: Path | None, to: ExportFormat, output: Path | None, only: list[str], overwrite: bool
) -> Report:
    """Write a cache's rows for other programs."""
    report = export_logits(ExportJob(_folder(cache), to, output, only, overwrite), screen)
    return Report(report.as_json(), [_table(report)])


def _folder(path: Path | None) -> CacheFolder:
    """The cache that was named, or the only one."""
    if path is not None:
        return CacheFolder.at(path)
    root = Path("cache")
    found = find_caches(root, DEFAULT.is_adaptation)
    if not found:
        raise no_finished_cache(root, DEFAULT.is_adaptation)
    if len(found) > 1:
        raise UsageError(
            f"there are {len(found)} caches under {shown(root)}; say which\n"
            + listed([folder.path for folder in found]),
            hint=f"kd-cache export {found[0].path} …",
        )
    return found[0]


def _table(report: ExportReport) -> Table:
    rows = [[one.teacher, f"{one.rows:,}", size(one.bytes), str(one.path)] for one in report.teachers]
    title = f"{shown(report.cache)} as {report.to}: {report.num_samples:,} samples complete"
    return Table(title, ["Teacher", "Rows", "Size", "Path"], rows)
