"""``kd-cache seal``: make current what several dumps committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_cache.care.seal import AS_SCORED, SealJob, seal_cache
from kd_cache.cli.console import Screen, size
from kd_cache.cli.inputs import folder_of
from kd_cache.cli.report import missing_lines
from kd_cache.cli.saved import run_record, saved_data, saved_with
from kd_cache.commands import Report, Run, Table
from kd_cache.errors import shown
from kd_cache.options import InputsAre
from kd_cache.store.snapshot import Snapshot

# Where no dump has left a word: a seal computes nothing itself.
UNKNOWN_ENVIRONMENT = {"device": "not known", "torch": "not known"}


def seal(
    run: Run,
    screen: Screen,
    target: str | None,
    cache_root: Path,
    files: bool | None,
    inputs: InputsAre,
    pack_bytes: int | None,
    workers: int,
) -> Report:
    """Merge packs, write view and index."""
    snapshot = Snapshot(folder_of(run.values))
    data = saved_data(run, saved_with(snapshot, screen), target, absent=inputs == AS_SCORED)
    job = SealJob(
        snapshot,
        data,
        files=files,
        inputs=inputs,
        pack_bytes=pack_bytes,
        workers=workers,
        record={**run_record(run, data), "environment": UNKNOWN_ENVIRONMENT},
        shown_path=f"{cache_root}/{snapshot.folder.path.name}",
    )
    report = seal_cache(job, screen)
    return Report(report.as_json(), sealed_lines(report), 3 if report.missing else 0)


def sealed_lines(report: Any) -> list[str | Table]:
    done = report.published
    rows = [[name, f"{done.rows[name]:,}", f"{done.left_out[name]:,}"] for name in done.rows]
    title = f"{shown(report.cache)}: {report.permitted:,} permitted samples"
    return [
        Table(title, ["Teacher", "Rows", "Left out"], rows),
        f"{size(done.pack_bytes)} of packs, {done.view_written:,} .npy files written, {done.view_removed:,} removed; "
        f"{done.num_samples:,} samples complete",
        *missing_lines(report.missing),
    ]
