"""``kd-cache prepare``: audio and its tables to a manifest and features."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kd_cache.cli.console import Screen
from kd_cache.cli.guard import guard_table
from kd_cache.commands import Report, Run
from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.front_end import FRONT_ENDS, FrontEnd, chosen
from kd_cache.dataset.manifest import LISTS
from kd_cache.errors import UsageError, shown
from kd_cache.prepare.audio import Codecs
from kd_cache.prepare.census import census
from kd_cache.prepare.containers import npy_names
from kd_cache.prepare.dataset_json import NAME, guarded, manifest_bytes, refuse_other, write_manifest
from kd_cache.prepare.layouts import Prepared, parse_tables, prepare_rows, tau_tables

LAYOUTS = ("tau", "csv")


def prepare(run: Run, screen: Screen, out: Path, overwrite: bool) -> Report:
    """Read the tables, guard what they say, make the features if asked to, and write the manifest last."""
    folder: Path = run.values["folder"]
    front_end, words = _front_end(run)
    npy = run.values["npy"]
    prepared = _rows(run, folder)
    for note in prepared.notes:
        screen.note(note)
    files = [row.file for split in LISTS for row in prepared.rows.get(split, ())]
    names = npy_names(files) if npy else files
    called = dict(zip(files, names, strict=True))
    rows = {split: [row._replace(file=called[row.file]) for row in each] for split, each in prepared.rows.items()}
    path, content = out / NAME, manifest_bytes(rows, prepared.task, words)
    allowed = run.values["allow_shared_locations"]
    manifest = guarded(content, path, prepared.task, allow_shared_locations=allowed, data_root=folder)
    without = manifest_bytes(rows, prepared.task, None)  # features may be added to what is there
    refuse_other(path, {content, without}, overwrite=overwrite)
    source = FeatureSource(folder, run.values["allow_outside"], run.values["max_feature_bytes"])
    made: dict[str, Any] = {}
    if front_end is None:
        made["missing_audio"] = _note_missing(source, files, screen)
    else:
        made = _features(run, (source, files, names), (front_end, words or {}), screen)
    write_manifest(path, content)
    report: dict[str, Any] = {
        "manifest": str(path),
        "sha256": manifest.digest,
        "samples": len(manifest),
        "devices": census(manifest),
        "tables": {name or "all": str(table) for name, table in prepared.tables.items()},
        "notes": prepared.notes,
        **made,
    }
    return Report(report, [guard_table(manifest), *_lines(path, made)])


def _front_end(run: Run) -> tuple[FrontEnd | None, dict[str, Any] | None]:
    """The front end that is asked for, and the manifest's words for it."""
    name = run.values["front_end"]
    given = {each.name: run.values[each.name] for each in fields(FrontEnd) if run.values[each.name] is not None}
    if name is not None:
        return chosen(name, given)
    if given or run.values["npy"]:
        raise UsageError(
            f"{', '.join(given) or 'npy'}: no features are asked for", hint=f"--features {'|'.join(FRONT_ENDS)}"
        )
    return None, None


def _note_missing(source: FeatureSource, files: list[str], screen: Screen) -> int:
    missing = source.missing(files)
    if missing:
        screen.note(f"{len(missing):,} of {len(files):,} audio files are not there, such as {next(iter(missing))}")
    return len(missing)


def _features(
    run: Run,
    audio: tuple[FeatureSource, list[str], list[str]],
    front_end: tuple[FrontEnd, dict[str, Any]],
    screen: Screen,
) -> dict[str, Any]:
    """Make them, and what there is to say of that."""
    if audio[1] == []:
        raise UsageError("no row is left to make features of")
    Codecs.load()  # before torch, which takes seconds
    from kd_cache.prepare.extract import ExtractJob, extract

    out, npy, workers = run.values["out"], run.values["npy"], run.values["workers"]
    began = time.monotonic()
    job = ExtractJob(*audio, *front_end, out, npy=npy, workers=workers, overwrite=run.values["overwrite"])
    done = extract(job, screen)
    seconds = time.monotonic() - began
    return {
        "features": str(done.path),
        "front_end": front_end[1],
        "made": done.made,
        "seconds": seconds,
        "clips_per_second": done.made / seconds,
    }


def _lines(path: Path, made: Mapping[str, Any]) -> list[str]:
    lines = [f"written: {shown(path)}"]
    if "features" in made:
        name, assumed = made["front_end"]["name"], ", ".join(made["front_end"]["assumed"])
        rate = f"{made['made']:,} clips in {made['seconds']:.1f} s, {made['clips_per_second']:,.0f} clips/s"
        packed = f" --features {shlex.quote(made['features'])}" if made["features"] != str(path.parent) else ""
        lines += [
            f"features by {name}: {shown(made['features'])} ({rate})",
            f"assumed of the front end: {assumed}",
            f"next: kd-cache dump --target … --json-path {shlex.quote(str(path))}{packed}",
        ]
    return lines


def _rows(run: Run, folder: Path) -> Prepared:
    layout, texts, subset = run.values["layout"], run.values["table"], run.values["subset"]
    if layout not in LAYOUTS:
        raise UsageError(f"no layout is called {shown(layout)}", hint=f"Layouts: {', '.join(LAYOUTS)}.")
    if layout == "tau" and texts:
        raise UsageError("--table names the tables of the layout csv; in the layout tau they have their own names")
    if layout == "csv" and not texts:
        raise UsageError(
            "the layout csv needs a table of samples", hint="Name yours: --table train=PATH, or --table PATH."
        )
    if layout == "csv" and subset is not None:
        raise UsageError("--subset is for the layout tau; name the table of a subset: --table train=PATH")
    tables = parse_tables(texts) if layout == "csv" else tau_tables(folder, subset)
    return prepare_rows(tables, run.values["columns"], max_bytes=run.values["max_manifest_bytes"])
