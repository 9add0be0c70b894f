"""``kd-cache prepare``: audio and its tables to a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_cache.cli.census import guard_table
from kd_cache.cli.console import Screen
from kd_cache.commands import Report, Run
from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.task import DCASE
from kd_cache.errors import UsageError, shown
from kd_cache.prepare.census import census
from kd_cache.prepare.dataset_json import NAME, guarded, manifest_bytes, refuse_other, write_manifest
from kd_cache.prepare.layouts import Prepared, parse_tables, prepare_rows, tau_tables

LAYOUTS = ("tau", "csv")


def prepare(run: Run, screen: Screen, out: Path, overwrite: bool) -> Report:
    """Read the tables, guard what they say, and write the manifest."""
    folder: Path = run.values["folder"]
    prepared = _rows(run, folder)
    for note in prepared.notes:
        screen.note(note)
    path = out / NAME
    content = manifest_bytes(prepared.rows, DCASE, None)
    allowed = run.values["allow_shared_locations"]
    manifest = guarded(content, path, DCASE, allow_shared_locations=allowed, data_root=folder)
    refuse_other(path, content, overwrite=overwrite)
    files = [sample.file for sample in manifest]
    missing = FeatureSource(folder, run.values["allow_outside"]).missing(files)
    if missing:
        screen.note(f"{len(missing):,} of {len(files):,} audio files are not there, such as {next(iter(missing))}")
    write_manifest(path, content)
    report: dict[str, Any] = {
        "manifest": str(path),
        "sha256": manifest.digest,
        "samples": len(manifest),
        "devices": census(manifest),
        "tables": {name or "all": str(table) for name, table in prepared.tables.items()},
        "notes": prepared.notes,
        "missing_audio": len(missing),
    }
    return Report(report, [guard_table(manifest), f"written: {shown(path)}"])


def _rows(run: Run, folder: Path) -> Prepared:
    layout, texts, subset = run.values["layout"], run.values["table"], run.values["subset"]
    if layout not in LAYOUTS:
        raise UsageError(f"no layout is called {shown(layout)}", hint=f"Layouts: {', '.join(LAYOUTS)}.")
    if (layout == "tau") == bool(texts):
        raise UsageError("--table names the tables of the layout csv; in the layout tau they have their own names")
    tables = parse_tables(texts) if layout == "csv" else tau_tables(folder, subset)
    return prepare_rows(tables, run.values["columns"], DCASE, run.values["max_manifest_bytes"])
