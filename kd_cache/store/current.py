"""Which rows of a cache are current: the newest word on each teacher, of the index and of dumps it does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kd_cache.errors import CorruptError, MissingLogitsError, StaleError, shown
from kd_cache.store.cache import CacheFolder, PackSet, teacher_in_name
from kd_cache.store.entry import joined
from kd_cache.store.index import Index, is_teacher_name
from kd_cache.store.origin import Origin
from kd_cache.store.pending import Age, age_with, is_known
from kd_cache.store.view import ROW_FILE_NAME, stored_names


@dataclass(frozen=True)
class Current:
    """The current teachers, what is kept of each, files that could not be scored, and the newest run's record."""

    origins: dict[str, Origin]
    entries: dict[str, dict[str, Any]]
    missing: dict[str, str]
    record: Mapping[str, Any]


def current_of(
    folder: CacheFolder, index: Index | None, pending: Sequence[Index], packs: Callable[[], PackSet]
) -> Current:
    """What is current; where index and pending records are lost, what the packs say, if these leave no choice.

    Raises:
        MissingLogitsError: nothing was begun here.
        StaleError: dumps that had not read each other made a teacher's rows with different weights.
        CorruptError: without an index, packs leave open which rows are current, or a teacher's are all damaged.
    """
    # Of equal age the index is the last: a seal's is as old as the dump that it goes by.
    records = sorted([*pending, *([] if index is None else [index])], key=lambda each: Age.of(each.record))
    found = Current({}, {}, {}, records[-1].record if records else {})
    for record in records:
        found.missing.update(record.missing)
    words = [(age_with(record, name), name, record) for record in records for name in record.record["teachers"]]
    words = [word for word in words if word[2] is index or not is_known(index, word[1], word[2])]
    # Of those that had not read each other the index's word is the last: it is what readers have.
    words.sort(key=lambda word: (word[0].generation, word[2] is index and word[0].generation > 0, word[0].begun))
    for when, name, record in words:
        _take(found, when, name, record)
    _refuse_undecided(folder, index, words)
    if index is not None:  # in the order that readers are used to
        ordered = dict.fromkeys([*index.origins, *found.origins])
        found = replace(found, origins={name: found.origins[name] for name in ordered})
    elif not records or folder.index_path.exists():
        found.origins.update(packs().sole_origins(found.origins))
        _refuse_forgotten(folder, packs(), found)
    if not found.origins:
        raise MissingLogitsError(f"{shown(folder.path)} holds nothing to seal", hint="Run kd-cache dump.")
    return found


def _refuse_undecided(folder: CacheFolder, index: Index | None, words: Sequence[tuple[Age, str, Index]]) -> None:
    """Two dumps made a teacher's rows with other weights, and neither had read the other: which is current?"""
    last = {name: (age.generation, record) for age, name, record in words}
    for age, name, record in words:
        generation, newest = last[name]
        known, other = (each.record["teachers"][name]["fingerprint"] for each in (newest, record))
        if age.generation == generation > 0 and newest is not index and known != other:
            raise StaleError(
                f"{shown(folder.path)}: two dumps at the same time made rows of {name} with different fingerprints "
                f"({known[:16]}… and {other[:16]}…): which is current?",
                hint=f"Run kd-cache dump (a part of it, with --shard, will do) with the {name} that is to count.",
            )


def _take(found: Current, when: Age, name: str, record: Index) -> None:
    """One record's word on a teacher, in place of an older one or joined to one of the same fingerprint."""
    origin = record.origins[name]
    same = name in found.origins and found.origins[name].fingerprint.digest == origin.fingerprint.digest
    found.origins[name] = origin
    words = joined(found.entries[name] if same else {}, record.record["teachers"][name])
    found.entries[name] = words | when.beside(found.record)


def _refuse_forgotten(folder: CacheFolder, packs: PackSet, current: Current) -> None:
    """Without an index, a teacher of whom no pack can be read would leave the cache, and nobody would notice."""
    traces = {teacher_in_name(path) for path in packs.damaged}
    if folder.path.is_dir():
        traces |= {
            directory.name
            for directory in folder.view_folders()
            if any(map(ROW_FILE_NAME.match, stored_names(directory)))
        }
    forgotten = sorted(name for name in traces - current.origins.keys() if is_teacher_name(name))
    if forgotten and current.origins:
        names = ", ".join(forgotten)
        raise CorruptError(
            f"{shown(folder.path)} has no index that can be read, and no pack of {names} that can be read",
            hint=f"Run kd-cache dump with all teachers that the cache is to hold. If {names} are not among them, their "
            "damaged packs go, and their .npy files stay without an index that names them.",
        )
