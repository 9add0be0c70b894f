"""Making rows current: seal each teacher's packs, bring the view in line with them, write the index.

What the new index makes superfluous goes only once it stands: whenever a machine stops, the index on disk finds its
rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.accuracy import measure
from kd_cache.errors import MissingLogitsError, StoreError, listed, shown
from kd_cache.store.atomic import store_errors
from kd_cache.store.folder import CacheFolder, PackSet
from kd_cache.store.index import Index, IndexChangedError, State, origin_entry, write_index
from kd_cache.store.keys import KeyFinder, keys_of, sorted_order
from kd_cache.store.pack import Origin, Pack, open_pack
from kd_cache.store.permitted import Permitted
from kd_cache.store.seal import Sealed, remove_files, seal
from kd_cache.store.union import Union
from kd_cache.store.view import ROW_FILE_NAME, stored_names, view_names, write_view
from kd_cache.watch import Watcher

_BLOCK = 8192
_EARLIER = 20


@dataclass(frozen=True)
class Promise:
    """The rows a cache is to hold: permitted files (manifest order) and the digest of each one's current features.

    ``known[i]`` is False where the feature could not be read: such a file keeps no row. ``permitted`` are all files,
    with or without a row, and their labels.
    """

    files: Sequence[str]
    inputs: np.ndarray
    known: np.ndarray
    permitted: Permitted

    @cached_property
    def sorted_rows(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Keys and inputs ``[Q, 16]`` and names of the files with known features, keys ascending."""
        known = np.flatnonzero(self.known)
        keys = keys_of(self.files)[known]
        order = sorted_order(keys)
        return keys[order], self.inputs[known][order], [self.files[number] for number in known[order]]


@dataclass
class Published:
    """What publishing did; ``rows``, ``left_out``, ``packs`` and ``accuracy`` by teacher."""

    rows: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    num_samples: int = 0
    pack_bytes: int = 0
    view_written: int = 0
    view_removed: int = 0
    packs: dict[str, str] = field(default_factory=dict)
    accuracy: dict[str, dict[str, int]] = field(default_factory=dict)


def publish(
    folder: CacheFolder,
    shown_path: str,
    origins: Mapping[str, Origin],
    promise: Promise,
    record: Mapping[str, Any],
    entries: Mapping[str, Mapping[str, Any]],
    *,
    earlier: Index | None,
    files: bool,
    asked: Collection[str],
    missing: Collection[str],
    replaced: Sequence[Path] = (),
    state: State,
    hint: str,
    watcher: Watcher,
) -> Published:
    """Seal, rebuild the view, write the index.

    Args:
        shown_path: the cache's path as the user wrote it; the index's paths start with it.
        origins: every teacher the cache holds from now on, in order.
        promise: the rows to keep; every other row of these origins is left out.
        record: what ``kd_cache`` says besides the teachers.
        entries: further content of a teacher's entry.
        files: whether the cache has a view.
        asked: the teachers just scored: each must hold every row of the promise, but for the ``missing`` files.
        replaced: packs whose rows must not be used although they look fresh (they were scored again).
        state: of the index as ``earlier`` was read, so that nobody else's index is overwritten.
        hint: what to do where rows are missing.

    Raises:
        IndexChangedError: the index is another by now.
        MissingLogitsError: rows of the teachers asked for are not there; the index stays as it was.
        StoreError: the cache cannot be written.
    """
    done = Published()
    sealed: dict[str, Pack | None] = {}
    superfluous = set(replaced)
    for name, origin in origins.items():
        expected = set(missing) if name in asked else None
        sealed[name], merged = _seal_teacher(folder, origin, promise, replaced, expected, hint, done, watcher)
        superfluous.update(merged)
    done.num_samples = _held_by_all(sealed.values())
    maps = _bring_view_in_line(folder, shown_path, sealed, promise.files, files, done, watcher)
    record = {
        **record,
        "files": files,
        "permitted": {"file": promise.permitted.write(folder.path), "count": len(promise.permitted)},
        "teachers": {
            name: _entry(origin, entries.get(name, {}), sealed[name], earlier, promise.permitted)
            for name, origin in origins.items()
        },
    }
    done.accuracy = {name: entry["accuracy"] for name, entry in record["teachers"].items()}
    write_index(folder.index_path, done.num_samples, maps, record, state=state)
    current = set(done.packs.values())
    remove_files(folder.packs_path, sorted(path for path in superfluous if path.name not in current))
    return done


def _held_by_all(packs: Iterable[Pack | None]) -> int:
    """How many samples have a row in every one of these packs."""
    keys: np.ndarray | None = None
    for pack in packs:
        if pack is None:
            return 0
        keys = pack.keys if keys is None else keys[KeyFinder(pack.keys).find(keys) >= 0]
    return 0 if keys is None else len(keys)


def make_view(folder: CacheFolder, shown_path: str, watcher: Watcher) -> Published:
    """Write the view of a finished cache from the packs that its index names, and name it in the index.

    What the index says besides stays as it is. A view that is there already is brought in line.

    Raises:
        MissingLogitsError: there is no index, or a pack that it names is gone.
        CorruptError: a damaged index or pack; nothing is written then.
        StoreError: the cache cannot be written, or another process wrote the index meanwhile.
    """
    state = folder.index_state()
    index = folder.index(maps=False)
    if index is None:
        raise MissingLogitsError(f"{shown(folder.path)} has no index: its dump did not finish", hint="Run it again.")
    sealed = {name: _named_pack(folder, entry) for name, entry in index.record["teachers"].items()}
    done = Published(num_samples=index.num_samples)
    for name, pack in sealed.items():
        done.rows[name] = 0 if pack is None else len(pack)
    files = {file for pack in sealed.values() if pack is not None for file in pack.files}
    ordered = sorted(files, key=lambda file: keys_of([file]).tobytes())  # nothing here knows the manifest's order
    maps = _bring_view_in_line(folder, shown_path, sealed, ordered, True, done, watcher)
    kept = {key: value for key, value in index.record.items() if key not in ("format_version", "digest")}
    try:
        write_index(folder.index_path, index.num_samples, maps, {**kept, "files": True}, state=state)
    except IndexChangedError as error:
        raise StoreError(
            f"the index {shown(folder.index_path)} changed while the view was written",
            hint="Run the same command again.",
        ) from error
    return done


def _named_pack(folder: CacheFolder, entry: Mapping[str, Any]) -> Pack | None:
    """The pack that an index entry names, checked."""
    if entry["pack"] is None:
        return None
    try:
        return open_pack(folder.packs_path / entry["pack"])
    except FileNotFoundError as error:
        raise MissingLogitsError(
            f"{shown(folder.path)} lacks the pack {shown(entry['pack'])} that its index names",
            hint="Restore it, or run kd-cache dump again.",
        ) from error


def _entry(
    origin: Origin, further: Mapping[str, Any], pack: Pack | None, earlier: Index | None, permitted: Permitted
) -> dict[str, Any]:
    """A teacher's entry in the index."""
    accuracy = measure(None if pack is None else Union([pack]), permitted)
    # Adopted rows say so themselves: the mark outlives an index that was damaged.
    mark = {"adopted": {"source": "unknown"}} if "adopted" in origin.fingerprint.parts else {}
    return {
        **origin_entry(origin),
        **mark,
        **further,
        "rows": 0 if pack is None else len(pack),
        "pack": None if pack is None else pack.path.name,
        "accuracy": accuracy.as_json(),
        "measured": accuracy.measured,
        "earlier": _earlier_parts(earlier, origin),
    }


def _seal_teacher(
    folder: CacheFolder,
    origin: Origin,
    promise: Promise,
    replaced: Sequence[Path],
    missing: set[str] | None,
    hint: str,
    done: Published,
    watcher: Watcher,
) -> tuple[Pack | None, list[Path]]:
    """Seal one teacher's packs and open the result, again where another dump seals at the same time.

    Returns the pack, and the packs that it stands for.
    """
    name = origin.teacher
    keys, inputs, files = promise.sorted_rows
    required = None if missing is None else np.array([file not in missing for file in files], bool)
    for _ in range(100):
        packs = folder.packs([name])
        mine = [pack for pack in packs.of(origin) if pack.path not in replaced]
        result = seal(folder.packs_path, mine, keys, inputs, required)
        lost = [] if required is None else [files[row] for row in np.flatnonzero(result.absent & required)]
        if lost:
            damaged = "".join(f"\n{error.message}" for error in packs.damaged.values())
            raise MissingLogitsError(
                f"{name}: {len(lost)} permitted samples have no row{damaged}\n{listed(lost)}", hint=hint
            )
        try:
            pack = None if result.path is None else open_pack(result.path)
            done.pack_bytes += 0 if pack is None else pack.path.stat().st_size
        except FileNotFoundError:
            continue  # sealed away by another dump; its pack holds the rows now
        _tell(watcher, name, result)
        done.left_out[name] = result.left_out
        done.rows[name] = 0 if pack is None else len(pack)
        if pack is not None:
            done.packs[name] = pack.path.name
        return pack, result.merged
    raise StoreError(f"the packs of {name} keep changing; run the same command again when the other dumps are done")


def drop_forbidden(folder: CacheFolder, packs: PackSet, origins: Mapping[str, Origin], files: Sequence[str]) -> int:
    """Remove superseded packs that hold a sample which is no longer permitted; returns how many rows went."""
    keys = keys_of(files)
    permitted = KeyFinder(keys[sorted_order(keys)])
    gone = 0
    for pack in packs.good:
        current = origins.get(pack.origin.teacher)
        if current is not None and current.fingerprint.digest == pack.origin.fingerprint.digest:
            continue
        if (permitted.find(pack.keys) < 0).any():
            gone += len(pack)
            with store_errors(pack.path, "remove"):
                pack.path.unlink(missing_ok=True)
    return gone


def _tell(watcher: Watcher, name: str, result: Sealed) -> None:
    if result.disagreements:
        watcher.note(
            f"{name}: {len(result.disagreements)} samples were scored twice with different bits (other hardware or "
            f"batch shape?); the first pack by name is kept, first such sample: {result.disagreements[0]}"
        )


def _bring_view_in_line(
    folder: CacheFolder,
    shown_path: str,
    sealed: Mapping[str, Pack | None],
    files: Sequence[str],
    wanted: bool,
    done: Published,
    watcher: Watcher,
) -> dict[str, dict[str, str]]:
    """Write what the view lacks, remove what it must not have, and return the index's maps."""
    for directory in folder.view_folders():
        if directory.is_symlink():
            raise StoreError(f"{shown(directory)} is a link; a view must be a folder of its own", hint="Remove it.")
        if directory.name not in sealed:
            done.view_removed += _prune_view(directory, set())  # of a teacher that no index promises
    if wanted:
        watcher.stage("writing .npy files", sum(done.rows.values()))
    maps: dict[str, dict[str, str]] = {}
    for name, pack in sealed.items():
        directory = folder.view_path(name)
        promised: dict[str, str] = {}
        if wanted and pack is not None:
            done.view_written += _write_view(directory, pack, watcher)
            held = dict(zip(pack.files, view_names(pack.keys), strict=True))
            promised = {file: held[file] for file in files if file in held}
        done.view_removed += _prune_view(directory, set(promised.values()))
        maps[name] = {file: f"{shown_path}/{name}/{row_file}" for file, row_file in promised.items()}
    return maps


def _write_view(directory: Path, pack: Pack, watcher: Watcher) -> int:
    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(pack), _BLOCK):
            yield pack.keys[start : start + _BLOCK], pack.logits[start : start + _BLOCK]

    return write_view(directory, blocks, watcher.advance)


def _prune_view(directory: Path, promised: set[str]) -> int:
    """Remove row files that nothing promises. Files that do not look like ours are left alone."""
    surplus = [name for name in stored_names(directory) - promised if ROW_FILE_NAME.match(name)]
    for name in surplus:
        with store_errors(directory / name, "remove"):
            (directory / name).unlink(missing_ok=True)
    return len(surplus)


def _earlier_parts(earlier: Index | None, origin: Origin) -> list[Mapping[str, str]]:
    """Parts of the fingerprints this teacher had before, newest first."""
    if earlier is None or origin.teacher not in earlier.record["teachers"]:
        return []
    entry = earlier.record["teachers"][origin.teacher]
    known = [entry["parts"], *entry["earlier"]]
    return [parts for parts in known if parts != dict(origin.fingerprint.parts)][:_EARLIER]
