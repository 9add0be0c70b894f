"""``kd-cache merge``: one cache of what several machines scored."""

from __future__ import annotations

from pathlib import Path

from kd_cache.care.merge import MergeJob, MergeReport, merge_caches, records_in
from kd_cache.cli.console import Screen
from kd_cache.cli.inputs import folder_of
from kd_cache.cli.saved import Saved, saved_data, saved_in
from kd_cache.cli.seal import sealed_lines
from kd_cache.commands import Report, Run, Table
from kd_cache.errors import CorruptError, MissingLogitsError, shown
from kd_cache.store.cache import CacheFolder, refuse_file_as_root
from kd_cache.store.snapshot import Snapshot


def merge(
    run: Run,
    screen: Screen,
    sources: list[Path],
    target: str | None,
    cache_root: Path,
    only: list[str],
    files: bool | None,
    workers: int,
) -> Report:
    """Bring the rows of other caches into the target's, and seal it."""
    refuse_file_as_root(cache_root)
    snapshot = Snapshot(folder_of(run.values))
    job = MergeJob(
        snapshot,
        saved_data(run, _saved(snapshot, sources[0]), target),
        sources,
        f"{cache_root}/{snapshot.folder.path.name}",
        only=only,
        files=files,
        workers=workers,
    )
    report = merge_caches(job, screen)
    return Report(
        report.as_json(), [_table(report), "", *sealed_lines(report.sealed)], 3 if report.sealed.missing else 0
    )


def _saved(snapshot: Snapshot, source: Path) -> Saved:
    """What the destination says of its data, or where there is none the first source."""
    try:
        return saved_in(records_in(snapshot)[-1])
    except (MissingLogitsError, CorruptError):  # the merge itself says what it is
        return saved_in(records_in(Snapshot(CacheFolder(source)))[-1])


def _table(report: MergeReport) -> Table:
    """What each source had."""
    rows = [
        [f"{shown(brought.source)}: {name}", f"{count:,}", f"{brought.not_permitted[name]:,}"]
        for brought in report.sources
        for name, count in brought.rows.items()
    ]
    return Table("Merged", ["Source", "Rows", "Not permitted"], rows)
