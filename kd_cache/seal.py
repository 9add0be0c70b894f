"""Sealing a cache that several processes filled: one pack per teacher, the view, and the index that makes them current.

Which rows are current is what the dumps themselves wrote down (`pending`), or the index where there is nothing newer.
No teacher is loaded. Every permitted feature is read, because a row of a feature that has changed is stale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.accuracy import refuse_wrong_joins
from kd_cache.errors import CorruptError, FeatureError, MissingLogitsError, StaleError, shown
from kd_cache.features import FeatureSource
from kd_cache.finish import Ending, finish, nothing_readable
from kd_cache.manifest import Manifest
from kd_cache.pending import begun, begun_with, read_pending
from kd_cache.pipeline.reading import read_ahead
from kd_cache.publish import Published
from kd_cache.splits import Selection
from kd_cache.store.folder import CacheFolder, PackSet, refuse_renamed, teacher_in_name
from kd_cache.store.index import Index, is_teacher_name
from kd_cache.store.keys import keys_of
from kd_cache.store.pack import Origin
from kd_cache.store.view import stored_names
from kd_cache.watch import Watcher


@dataclass(frozen=True)
class SealJob:
    """What to seal.

    Attributes:
        folder: the cache.
        files: whether it is to have a view; ``None`` leaves that as the dump said.
        workers: threads that read features.
        record: what the index is to say of the run where no dump has left a record.
        shown_path: the cache's path as the user wrote it, with which the index's paths start; ``None`` leaves that as
            the dump said.
    """

    folder: CacheFolder
    manifest: Manifest
    selection: Selection
    source: FeatureSource
    files: bool | None = None
    workers: int = 2
    record: Mapping[str, Any] = field(default_factory=dict)
    shown_path: str | None = None


@dataclass
class SealReport:
    """What a seal did. ``missing`` maps files that the dumps could not score to the reason."""

    cache: Path
    permitted: int
    missing: dict[str, str]
    published: Published

    def as_json(self) -> dict[str, Any]:
        return {
            "cache": str(self.cache),
            "permitted": self.permitted,
            "missing": self.missing,
            "published": vars(self.published),
        }


@dataclass(frozen=True)
class Current:
    """What dumps and index say is current: the newest word on each teacher counts."""

    origins: dict[str, Origin]
    entries: dict[str, dict[str, Any]]
    missing: dict[str, str]
    record: Mapping[str, Any]


def seal_cache(job: SealJob, watcher: Watcher | None = None) -> SealReport:
    """Merge what dumps committed and make it current.

    Equal rows give equal bytes: the result is that of one dump in one process.

    Raises:
        MissingLogitsError: nothing was begun here, or rows of a permitted sample are not there; nothing changes.
        FeatureError: a feature cannot be read that no dump listed as missing, or none can.
        StaleError: the cache of an older script.
        CorruptError: logits are joined to wrong rows.
        StoreError: the cache cannot be written.
    """
    watcher = watcher or Watcher()
    packs = job.folder.packs()
    for error in packs.damaged.values():
        watcher.note(error.message)
    earlier = _earlier(job.folder, watcher)
    current = _current(job.folder, packs, earlier, watcher)
    refuse_wrong_joins(job.folder, packs, earlier, current.origins)
    inputs, known = read_digests(job.source, job.selection.files, current.missing, job.workers, watcher)
    if not known.any():
        raise nothing_readable(len(known))
    missing = _still_missing(job.selection.files, inputs, known, packs, current)
    shown_path = job.shown_path or str(current.record.get("shown_path", job.folder.path))
    further = {key: value for key, value in job.record.items() if key not in current.record}
    record = {**current.record, **further, "shown_path": shown_path}
    end = Ending(
        job.folder,
        shown_path,
        job.manifest,
        job.selection,
        inputs,
        known,
        current.origins,
        _without_results(record),
        bool(record.get("files", True)) if job.files is None else job.files,
        packs,
        entries=current.entries,
        missing=missing,
        earlier=earlier,
        hint=_what_is_missing(read_pending(job.folder, Watcher())),
    )
    return SealReport(job.folder.path, len(job.selection.files), missing, finish(end, watcher))


def _earlier(folder: CacheFolder, watcher: Watcher) -> Index | None:
    try:
        index = folder.index(maps=False)
        refuse_renamed(folder, index)
        return index
    except CorruptError as error:
        watcher.note(f"{error.message}; it is written anew")
        return None
    except StaleError as error:
        raise StaleError(error.message, hint=error.hint or "Bring its rows in with kd-cache adopt.") from error


def current_in(folder: CacheFolder, watcher: Watcher | None = None) -> Current:
    """The newest word on each teacher. Raises as `seal_cache`, of what is not there or cannot be read."""
    watcher = watcher or Watcher()
    return _current(folder, None, _earlier(folder, watcher), watcher)


def _current(folder: CacheFolder, packs: PackSet | None, earlier: Index | None, watcher: Watcher) -> Current:
    """From the index and what dumps wrote down; where both are lost, from the packs, if these leave no choice.

    ``packs`` are those of the folder, ``None`` to open them if they are needed.
    """
    told = ([] if earlier is None else [earlier]) + read_pending(folder, watcher)
    told.sort(key=lambda index: begun(index.record))
    found = Current({}, {}, {}, told[-1].record if told else {})
    for index in told:
        refuse_renamed(folder, index)
        found.missing.update(index.missing)
    words = [(begun_with(index, name), name, index) for index in told for name in index.record["teachers"]]
    for when, name, index in sorted(words, key=lambda word: word[0]):
        if index is not earlier and _is_told(earlier, name, index):
            continue
        origin = index.origins[name]
        same = name in found.origins and found.origins[name].fingerprint.digest == origin.fingerprint.digest
        found.origins[name] = origin
        kept = found.entries.get(name, {}) if same else {}
        own = {} if when == begun(found.record) else {"begun": when}
        found.entries[name] = _merged(kept, index.record["teachers"][name]) | own
    if earlier is not None:  # in the order that readers are used to
        ordered = dict.fromkeys([*earlier.origins, *found.origins])
        found = replace(found, origins={name: found.origins[name] for name in ordered})
    if earlier is None and (not told or folder.index_path.exists()):
        packs = packs or folder.packs()
        found.origins.update(packs.sole_origins(found.origins))
        _refuse_forgotten(folder, packs, found)
    if not found.origins:
        raise MissingLogitsError(f"{shown(folder.path)} holds nothing to seal", hint="Run kd-cache dump.")
    return found


def _is_told(earlier: Index | None, name: str, record: Index) -> bool:
    """Whether the index counts what this record says of a teacher: a crash just after the index leaves both."""
    entry = None if earlier is None else earlier.record["teachers"].get(name)
    if earlier is None or entry is None:
        return False
    same = entry["fingerprint"] == record.record["teachers"][name]["fingerprint"]
    return bool(same and begun_with(record, name) <= begun_with(earlier, name))


def _refuse_forgotten(folder: CacheFolder, packs: PackSet, current: Current) -> None:
    """Without an index, a teacher of whom no pack can be read would leave the cache, and nobody would be told."""
    traces = {teacher_in_name(path) for path in packs.damaged}
    if folder.path.is_dir():
        traces |= {directory.name for directory in folder.view_folders() if stored_names(directory)}
    forgotten = sorted(name for name in traces - current.origins.keys() if is_teacher_name(name))
    if forgotten and current.origins:
        names = ", ".join(forgotten)
        raise CorruptError(
            f"{shown(folder.path)} has no index that can be read, and no pack of {names} that can be read",
            hint=f"Run kd-cache dump with all teachers that the cache is to hold; what is left of {names} goes if they "
            "are not among them.",
        )


def _merged(kept: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Two entries of one fingerprint: costs of storage were measured by each process over its own rows."""
    merged = {key: value for key, value in kept.items() if key != "begun"}
    merged |= {key: entry[key] for key in ("source", "adopted", "storage_cost") if key in entry}
    if "storage_cost" in kept and "storage_cost" in entry:
        merged["storage_cost"] = _added(kept["storage_cost"], entry["storage_cost"])
    return merged


def _added(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    rows = a["rows"] + b["rows"]
    added: dict[str, Any] = {}
    for key in a:
        if key.endswith("_mean"):
            added[key] = (a[key] * a["rows"] + b[key] * b["rows"]) / max(rows, 1)
        else:
            added[key] = max(a[key], b[key]) if key.endswith("_max") else a[key] + b[key]
    return added


def _still_missing(
    files: Sequence[str], inputs: np.ndarray, known: np.ndarray, packs: PackSet, current: Current
) -> dict[str, str]:
    """Of what any dump could not score, that which no other one did."""
    listed = [number for number, file in enumerate(files) if file in current.missing]
    absent = ~known[listed]
    keys = keys_of(files[number] for number in listed)
    for origin in current.origins.values():
        union = packs.union(origin)
        absent |= True if union is None else union.match(keys, inputs[listed]) < 0
    return {files[number]: current.missing[files[number]] for number, gone in zip(listed, absent, strict=True) if gone}


def _what_is_missing(pending: Sequence[Index]) -> str:
    """Which parts have not run, as far as those that have can tell."""
    parts = [part for record in pending if isinstance(part := record.record.get("part"), list) and len(part) == 2]
    lost: dict[int, set[int]] = {}
    for number, count in parts:
        lost.setdefault(count, set(range(min(count, 10_000)))).discard(number)
    for count, numbers in lost.items():
        if numbers:
            names = ", ".join(f"{number}/{count}" for number in sorted(numbers)[:20])
            return f"These parts have not run: {names}. Run kd-cache dump --shard for them, then seal again."
    return "Run kd-cache dump again (with the same --shard, if the work was split), then seal."


def _without_results(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run without what this publication says itself."""
    results = ("teachers", "digest", "format_version", "missing", "permitted", "part")
    return {key: value for key, value in record.items() if key not in results}


def read_digests(
    source: FeatureSource, files: Sequence[str], missing: Mapping[str, str], workers: int, watcher: Watcher
) -> tuple[np.ndarray, np.ndarray]:
    """``[N, 16]`` digests of features as they are now, and ``[N]`` bool: which could be read.

    Raises:
        FeatureError: a feature cannot be read, and nobody listed it as ``missing``.
    """
    inputs, known = np.zeros((len(files), 16), np.uint8), np.zeros(len(files), bool)
    watcher.stage("reading features", len(files))
    with closing(read_ahead(source, files, workers)) as chunks:
        for number, feature in enumerate(chain.from_iterable(chunks)):
            if not isinstance(feature, FeatureError):
                inputs[number] = np.frombuffer(feature.digest, np.uint8)
                known[number] = True
            elif files[number] not in missing:
                raise FeatureError(feature.message, hint=feature.hint or "Mend it, or dump with --on-bad-sample skip.")
            watcher.advance(1)
    return inputs, known
