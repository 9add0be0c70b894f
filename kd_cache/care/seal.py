"""Sealing a cache that several processes filled: one pack per teacher, the view, and the index that makes them current.

Which rows are current is what the dumps themselves wrote down, or the index where there is nothing newer. No teacher is
loaded. A row of a feature that has changed is stale, so every permitted feature is read, but for those that the parts
read and whose files nobody has touched since (`score.unchanged`). Where the features are not at hand, rows can be taken
``as-scored``: as of the features that the parts say they read. The index keeps that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.dataset.dataset import Dataset, nothing_readable
from kd_cache.errors import StaleError, listed
from kd_cache.options import InputsAre
from kd_cache.score.reading import read_digests
from kd_cache.score.unchanged import Seen, noted_digests
from kd_cache.store.current import Current
from kd_cache.store.index import Index
from kd_cache.store.origin import Origin
from kd_cache.store.publish import Change, Published, Wanted, publish
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.view import without_files
from kd_cache.watch import Watcher

AS_SCORED: InputsAre = "as-scored"


@dataclass(frozen=True)
class SealJob:
    """What to seal.

    Attributes:
        snapshot: the cache.
        data: what it is to hold.
        files: whether it is to have a view; ``None`` leaves that as the dump said.
        workers: threads that read features.
        inputs: what the features are now: ``unchanged`` where nobody touched the file since a part read it, and read
            elsewhere; all ``read``; or not looked at, and taken ``as-scored``.
        pack_bytes: what a pack is not expected to exceed; ``None`` leaves that as the index says.
        record: what the index is to say of the run where no dump has left a record.
        shown_path: the cache's path as the user wrote it, with which the index's paths start; ``None`` leaves that as
            the dump said.
    """

    snapshot: Snapshot
    data: Dataset
    files: bool | None = None
    workers: int = 2
    inputs: InputsAre = "unchanged"
    pack_bytes: int | None = None
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


def seal_cache(job: SealJob, watcher: Watcher | None = None) -> SealReport:
    """Merge what dumps committed and make it current.

    Equal rows give equal bytes: the result is that of one dump in one process.

    Raises:
        MissingLogitsError: nothing was begun here, or rows of a permitted sample are not there; nothing changes.
        FeatureError: a feature cannot be read that no dump listed as missing, or none can.
        StaleError: the cache of an older script; rows of several features of one sample, taken ``as-scored``.
        CorruptError: logits are joined to wrong rows.
        StoreError: the cache cannot be written.
    """
    watcher = watcher or Watcher()
    snapshot, selection = job.snapshot, job.data.selection
    for error in snapshot.packs.damaged.values():
        watcher.note(error.message)
    current = snapshot.current(watcher)
    snapshot.refuse_wrong_joins(current.origins)
    without_files(current.origins, job.files)
    seen = Seen.load(snapshot.folder.seen_path), Seen.of_parts(snapshot.pending)
    inputs, known = (_as_scored if job.inputs == AS_SCORED else _digests)(job, current, seen, watcher)
    if not known.any() and job.inputs != AS_SCORED:
        raise nothing_readable(len(known))
    shown_path = job.shown_path or str(current.record.get("shown_path", snapshot.folder.path))
    further = {key: value for key, value in job.record.items() if key not in current.record}
    record = {**current.record, **further, "shown_path": shown_path, **job.data.described}
    record.pop("inputs", None)
    if job.inputs == AS_SCORED:
        record |= {"inputs": AS_SCORED, **{at: current.record[at] for at in ("features_at",) if at in current.record}}
    if "settings" in record:  # later commands find there what was read here, wherever the newest dump has read
        record["settings"] = {**record["settings"], "paths": dict(job.data.paths)}
    change = Change(
        shown_path,
        Wanted.of(selection, inputs[selection.order], known[selection.order]),
        current.origins,
        record,
        bool(record.get("files", True)) if job.files is None else job.files,
        entries=current.entries,
        pack_bytes=job.pack_bytes,
        missing={file: current.missing[file] for file in selection.listed if file in current.missing},
        hint=_how_parts_differ(snapshot.pending) or _what_is_missing(snapshot.pending),
    )
    if len(seen[1]):
        seen[0].and_newer(seen[1]).only(selection.keys).save(snapshot.folder.seen_path)  # before the parts' go
    published = publish(snapshot, change, watcher)
    return SealReport(snapshot.folder.path, len(selection.listed), published.missing, published)


def _digests(
    job: SealJob, current: Current, seen: tuple[Seen, Seen], watcher: Watcher
) -> tuple[np.ndarray, np.ndarray]:
    """``[N, 16]`` digests of the permitted features in the manifest's order, and ``[N]`` which could be read."""
    files, features = job.data.selection.listed, job.data.features
    known, inputs = np.zeros(len(files), bool), np.zeros((len(files), 16), np.uint8)
    if job.inputs != "read":
        known, inputs = noted_digests(seen[1], seen[0], features, files, job.data.selection.listed_keys, watcher)
    rest = np.flatnonzero(~known)
    unread = [files[number] for number in rest.tolist()]
    inputs[rest], known[rest] = read_digests(features, unread, current.missing, job.workers, watcher)
    return inputs, known


def _as_scored(
    job: SealJob, current: Current, seen: tuple[Seen, Seen], watcher: Watcher
) -> tuple[np.ndarray, np.ndarray]:
    """As `_digests`, of the features as they were: as a part noted, else as of the only rows that there are.

    Raises:
        StaleError: rows of several features of one sample, and no part says which it read last.
    """
    selection, keys = job.data.selection, job.data.selection.keys
    inputs, known, open_ = np.zeros((len(keys), 16), np.uint8), np.zeros(len(keys), bool), np.zeros(len(keys), bool)
    for union in filter(None, map(job.snapshot.union, current.origins.values())):
        at = selection.finder.find(union.keys)  # [M], the sample of each row
        held, rows = at[at >= 0], np.flatnonzero(at >= 0)
        first = ~union.repeats[rows] & ~known[held]
        inputs[held[first]], known[held[first]] = union.inputs[rows[first]], True
        open_[held[(union.inputs[rows] != inputs[held]).any(axis=1)]] = True
    noted, digests = seen[1].noted(keys)
    inputs[noted], known[noted] = digests[noted], True
    if (undecided := np.flatnonzero(open_ & ~noted)).size:
        files = [selection.by_key[number] for number in undecided.tolist()]
        raise StaleError(
            f"{len(files):,} samples have rows of several features, and no part says which was last\n{listed(files)}",
            hint="Seal where the features are, without --inputs as-scored.",
        )
    watcher.note(
        "no feature was looked at: rows are taken for those of the features as they were when they were scored"
    )
    in_turn = np.empty(len(keys), np.int64)
    in_turn[selection.order] = np.arange(len(keys))
    return inputs[in_turn], known[in_turn]


def _how_parts_differ(pending: Sequence[Index]) -> str:
    """Parts of one teacher that do not fit together, where there are any."""
    made: dict[str, dict[str, tuple[str, Origin]]] = {}
    for record in pending:
        number, count = record.record.get("part") or (0, 1)
        for name, origin in record.origins.items():
            made.setdefault(name, {})[origin.fingerprint.digest] = f"{number}/{count}", origin
    for name, kinds in made.items():
        if len(kinds) > 1:
            (one, first), (other, second), *_ = kinds.values()
            how = f"{one} and {other} of {name} differ ({first.fingerprint.difference(second.fingerprint)})"
            return f"Parts {how}: dump one of them as the other was, then seal again."
    return ""


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
