"""Making rows current: merge each teacher's packs, bring the view in line, write the permitted list and the index.

The only writer of what a finished cache consists of. What the new index makes superfluous goes only once it stands:
whenever a machine stops, the index on disk finds its rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.errors import CorruptError, MissingLogitsError, StoreError, listed, shown
from kd_cache.files.atomic import make_directory, remove_files, store_errors
from kd_cache.files.turns import in_turn
from kd_cache.keys import KeyFinder
from kd_cache.store.accuracy import measured_apart, refuse_below
from kd_cache.store.cache import CacheFolder, teacher_in_name
from kd_cache.store.change import Change as Change
from kd_cache.store.change import Published as Published
from kd_cache.store.change import Wanted as Wanted
from kd_cache.store.entry import carried
from kd_cache.store.index import (
    Index,
    IndexChangedError,
    keep_older_index,
    origin_entry,
    read_older_maps,
    write_index,
)
from kd_cache.store.interleave import Views
from kd_cache.store.origin import Origin
from kd_cache.store.pack import write_part
from kd_cache.store.pending import Age, age_with, forget, protected
from kd_cache.store.published_view import PublishedView, row_files
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.unfinished import Unfinished
from kd_cache.store.union import PACK_BYTES, Merged, Union, merge_packs
from kd_cache.store.view import (
    without_files,
)
from kd_cache.watch import Watcher

_EARLIER = 20
_RESULTS = (
    "teachers",
    "digest",
    "format_version",
    "missing",
    "permitted",
    "part",
    "features_at",
    "superseded",
    "pack_bytes",
)


def publish(snapshot: Snapshot, change: Change, watcher: Watcher) -> Published:
    """Make a change current, again where another process wrote the index meanwhile: its teachers stay in it.

    Raises:
        MissingLogitsError: rows of the teachers asked for are not there; the index stays as it was.
        TeacherError: a teacher's accuracy is below what the change asks for; the index stays as it was.
        StoreError: the cache cannot be written, or its index keeps changing.
    """
    before = snapshot.index
    make_directory(snapshot.folder.path)
    with in_turn(snapshot.folder.path):
        for _ in range(100):
            publication = _Publication(snapshot := snapshot.again(), change, before, watcher)
            try:
                published = publication.run()
            except IndexChangedError:
                continue
            if publication.stands():
                publication.clean_up()
                return published
    raise _restless(snapshot.folder)


def publish_view(snapshot: Snapshot, shown_path: str, watcher: Watcher) -> Published:
    """Write the view of a finished cache from the packs that its index names, and name it in the index.

    What the index says besides stays as it is. A view that is there already is brought in line.

    Raises:
        MissingLogitsError, StaleError: this is no finished cache, or a pack that the index names is gone.
        CorruptError: a damaged index or pack; nothing is written then.
        StoreError: the cache cannot be written, or another process wrote the index meanwhile.
    """
    with in_turn(snapshot.folder.path):
        return _publish_view(snapshot.again(), shown_path, watcher)


def _publish_view(snapshot: Snapshot, shown_path: str, watcher: Watcher) -> Published:
    folder, index = snapshot.folder, snapshot.finished()
    rows: dict[str, Union | None] = {
        name: snapshot.union_of(*snapshot.served_packs(name)) if entry["packs"] else None
        for name, entry in index.record["teachers"].items()
    }
    done = Published(num_samples=index.num_samples)
    done.rows = {name: 0 if union is None else len(union) for name, union in rows.items()}
    keys = {file: row_file for union in rows.values() for file, row_file in row_files(union)}
    ordered = sorted(keys, key=keys.__getitem__)  # nothing here knows the manifest's order
    view = PublishedView(snapshot, shown_path, done, watcher, {*rows} if index.record.get("files") else ())
    maps = view.bring_in_line(rows, ordered, wanted=True)
    kept = {key: value for key, value in index.record.items() if key not in ("format_version", "digest")}
    try:
        write_index(folder.index_path, index.num_samples, maps, {**kept, "files": True}, state=snapshot.state)
    except IndexChangedError as error:
        raise StoreError(
            f"the index {shown(folder.index_path)} changed while the view was written",
            hint="Run the same command again.",
        ) from error
    return done


def _restless(folder: CacheFolder) -> StoreError:
    return StoreError(f"the index {shown(folder.index_path)} keeps changing; try again when the other dumps are done")


class _Publication:
    """One attempt, on the cache as ``snapshot`` found it.

    Args:
        before: the index as the command found it, for where it was lost since.
    """

    def __init__(self, snapshot: Snapshot, change: Change, before: Index | None, watcher: Watcher) -> None:
        self.snapshot, self.change, self.watcher = snapshot, change, watcher
        self.folder = snapshot.folder
        if snapshot.trouble is not None and not (snapshot.is_older or snapshot.is_damaged):
            raise snapshot.trouble
        self.earlier = snapshot.index or before
        found = {} if self.earlier is None else self.earlier.origins
        self.others = {name: each for name, each in {**change.others, **found}.items() if name not in change.origins}
        self.pending = snapshot.pending  # as they are now: one that is written meanwhile is not overtaken
        self.unfinished = Unfinished(self.pending, change, self.earlier)
        self.done = Published()
        kept = self.earlier.record.get("pack_bytes", PACK_BYTES) if self.earlier else PACK_BYTES
        self._pack_bytes = change.pack_bytes or kept
        self._number = {file: number for number, file in enumerate(change.wanted.files)} if change.missing else {}

    @property
    def origins(self) -> dict[str, Origin]:
        """All teachers: in the order asked for where that names all, else in the order readers are used to."""
        merged = {**self.change.origins, **self.others}
        before = list(self.earlier.origins) if self.earlier and self.others else []
        return {name: merged[name] for name in dict.fromkeys([*before, *merged]) if name in merged}

    def run(self) -> Published:
        """Raises `IndexChangedError` where the index is another by now."""
        self._keep_plan()
        change, done, origins = self.change, self.done, self.origins
        rows: dict[str, Union | None] = {}
        superfluous = set(change.replaced)
        for name, origin in origins.items():
            rows[name], merged = self._merge(origin)
            superfluous.update(merged)
        self._refuse_inaccurate(rows)
        done.num_samples = _held_by_all(rows.values())
        viewed, withdrawn = self._viewed(), self._withdraw(rows)
        if self.snapshot.again().state != self.snapshot.state:
            raise IndexChangedError  # no row of the view may change under an index that names it
        view = PublishedView(self.snapshot, change.shown_path, done, self.watcher, viewed, withdrawn)
        has_view = change.files and not without_files(origins)
        maps = view.bring_in_line(rows, change.wanted.listed, wanted=has_view)
        permitted = change.wanted.permitted
        record = {
            **{key: value for key, value in change.record.items() if key not in _RESULTS},
            "plan": None if (plan := self.snapshot.again().saved_plan) is None else plan.as_json(),
            "missing": {file: reason for file, reason in change.missing.items() if file in done.missing},
            "files": has_view,
            **({} if self._pack_bytes == PACK_BYTES else {"pack_bytes": self._pack_bytes}),
            "permitted": {"file": permitted.write(self.folder.path), "count": len(permitted)},
            "teachers": {name: self._entry(origin, rows[name]) for name, origin in origins.items()},
            **self.unfinished.described(superfluous),
        }
        done.accuracy = {name: entry["accuracy"] for name, entry in record["teachers"].items()}
        done.held_out = {name: entry["held_out"] for name, entry in record["teachers"].items() if "held_out" in entry}
        if self.snapshot.is_older:
            self.watcher.note(keep_older_index(self.folder.index_path))
        written = write_index(self.folder.index_path, done.num_samples, maps, record, state=self.snapshot.state)
        self.snapshot.wrote(*written, permitted)
        self.written = written[0]
        self.superfluous = superfluous
        return done

    def _refuse_inaccurate(self, rows: Mapping[str, Union | None]) -> None:
        if self.change.min_accuracy is None:
            return
        for name in self.change.origins:
            if (union := rows.get(name)) is not None:
                accuracy = self.snapshot.accuracy(union, self.change.wanted.permitted)
                refuse_below(name, accuracy, self.change.min_accuracy)

    def stands(self) -> bool:
        """Whether the index names our teachers: another process's, put in place a moment after ours, may not."""
        self.now = self.snapshot.again()
        index = self.now.index or self.earlier
        return index is not None and self.change.origins.keys() <= index.record["teachers"].keys()

    def clean_up(self) -> None:
        """Remove what became useless: merged packs, overtaken pending records, damaged packs, rows no longer permitted.

        Another process may have written the index since ours: what that one names stays.
        """
        current = {name for names in self.done.packs.values() for name in names}
        current |= {path.name for path in self.now.served_paths(self.now.origins)}
        remove_files(self.folder.packs_path, sorted(path for path in self.superfluous if path.name not in current))
        indexes = [index for index in (self.written, self.earlier) if index is not None]
        forget(self.folder, self.unfinished.overtaken(self.pending), indexes)
        if self.change.wanted.known.any():
            for name, count in self.done.unread.items():
                if count:
                    self.watcher.note(f"{name}: {count:,} rows were kept although their features cannot be read now")
        for name in self.others:
            if left_out := self.done.left_out[name]:
                what = f"{left_out} rows went, no longer permitted or no longer fresh; it was not asked"
                self.watcher.note(f"{name}: {what}")
        self._remove_damaged(current)
        if gone := self._remove_forbidden(current):
            self.watcher.note(f"{gone} superseded rows went, because their pack held samples no longer permitted")

    def _withdraw(self, rows: Mapping[str, Union | None]) -> dict[str, Mapping[str, str]]:
        """Before a row of the view changes: an index without its teacher's files. Who goes by these fails from then on.

        Whoever goes by the packs finds in it what was there before. Returns the maps of before, by teacher.
        """
        index = self.snapshot.index
        if index is None or not index.record.get("files"):
            return {}
        changing = [name for name in index.origins if not self._keeps_rows(index, name, rows.get(name))]
        maps = _maps_of(self.snapshot) if changing else {}
        if any(maps.get(name) for name in changing):
            kept = {name: {} if name in changing else files for name, files in maps.items()}
            record = {key: value for key, value in index.record.items() if key not in ("format_version", "digest")}
            path, state = self.folder.index_path, self.snapshot.state
            self.snapshot.wrote(*write_index(path, index.num_samples, kept, record, state=state))
        return {name: maps[name] for name in changing if name in maps}

    def _keeps_rows(self, index: Index, name: str, union: Union | None) -> bool:
        """Whether no row of a teacher becomes another; some may go or come."""
        named = [file for file, _ in index.record["teachers"][name]["packs"]]
        if union is None or {*named} <= {pack.path.name for pack in union.packs}:
            return True
        before = [pack for pack in self.snapshot.packs.good if pack.path.name in named]
        if len(before) < len(named):
            return False
        found = [(union.find(pack.keys), pack.checksums) for pack in before]
        return all(bool((union.checksums[at[at >= 0]] == checksums[at >= 0]).all()) for at, checksums in found)

    # -- one teacher --------------------------------------------------------------------------------------------------

    def _merge(self, origin: Origin) -> tuple[Union | None, list[Path]]:
        """One teacher's rows, and the packs that those they lie in stand for; anew where another dump does the same."""
        name, wanted = origin.teacher, self.change.wanted
        asked = name in self.change.origins
        missing = self.change.missing if asked else {}
        required = np.full(len(wanted.keys), asked)
        required[[self._number[file] for file in missing if file in self._number]] = False
        now = self.snapshot
        for _ in range(100):
            views = Views(now, origin, wanted, self.unfinished, self.change.replaced)
            now = views.interleave()
            union = now.union(origin, self.change.replaced, self.change.standing.get(name, ()))
            inputs, unread = self.unfinished.inputs(union)
            result = merge_packs(self.folder.packs_path, union, wanted.keys, inputs, required, unread, self._pack_bytes)
            lost = np.flatnonzero(result.absent & required)
            if len(lost):
                raise self._lost(name, [f"{wanted.files[at]}{views.lacking(at)}" for at in lost.tolist()], now)
            now = now.again()
            packs = [pack for pack in now.packs.good if pack.path in result.paths]
            if len(packs) == len(result.paths):
                merged = now.union_of(*packs) if packs else None
                self._count(name, merged, result)
                kept = self.unfinished.packs(union, merged, self.folder.packs_path)
                superfluous = [path for path in result.merged if path not in kept]
                return merged, superfluous + views.superfluous(merged)
        raise StoreError(f"the packs of {name} keep changing; run the same command again when the other dumps are done")

    def _lost(self, name: str, files: list[str], snapshot: Snapshot) -> MissingLogitsError:
        errors = [error for path, error in snapshot.packs.damaged.items() if teacher_in_name(path) == name]
        damaged = "".join(f"\n{error.message}" for error in errors)
        message = f"{name}: {len(files)} permitted samples have no row{damaged}\n{listed(files)}"
        return MissingLogitsError(message, hint=self.change.hint)

    def _count(self, name: str, union: Union | None, result: Merged) -> None:
        if result.disagreements:
            self.watcher.note(
                f"{name}: {len(result.disagreements)} samples were scored twice with different bits (other hardware or "
                f"batch shape?); what the index named is kept, else the first pack by name; first such sample: "
                f"{result.disagreements[0]}"
            )
        self.done.left_out[name] = result.left_out
        self.done.unread[name] = int((~result.absent & ~self.change.wanted.known).sum())
        lacking = [file for file in self.change.missing if file in self._number and result.absent[self._number[file]]]
        self.done.missing.update((file, self.change.missing[file]) for file in lacking)
        self.done.rows[name] = 0 if union is None else len(union)
        if union is not None:
            self.done.packs[name] = [pack.path.name for pack in union.packs]
            for pack in union.packs:
                with store_errors(pack.path, "look at"):
                    self.done.pack_bytes += pack.path.stat().st_size

    def _entry(self, origin: Origin, union: Union | None) -> dict[str, Any]:
        """A teacher's entry in the index; where this change adds nothing, what the earlier one said stays."""
        name = origin.teacher
        before = self.earlier.record["teachers"].get(name, {}) if self.earlier else {}
        same = before.get("fingerprint") == origin.fingerprint.digest
        # Adopted rows say so themselves: the mark outlives an index that was damaged.
        mark = {"adopted": {"source": "unknown"}} if "adopted" in origin.fingerprint.parts else {}
        accuracy = self.snapshot.accuracy(union, self.change.wanted.permitted)
        return {
            **origin_entry(origin),
            **mark,
            **(carried(before) if same else {}),
            **(self.change.entries.get(name, {}) if name in self.change.origins else {}),
            **self._age(name).beside(self.change.record),
            "rows": 0 if union is None else len(union),
            "packs": [] if union is None else [[pack.path.name, len(pack)] for pack in union.packs],
            "accuracy": accuracy.as_json(),
            "measured": accuracy.measured,
            **measured_apart(
                self.change.wanted.permitted, self.change.trained.get(name), accuracy, before if same else {}
            ),
            "earlier": _earlier_parts(before, origin),
        }

    def _age(self, name: str) -> Age:
        """The age of what the index is to say of a teacher: this run's or, for a seal, that of the dump it goes by.

        What is said of a teacher that is carried over is as old as it was.
        """
        held = self.earlier is not None and name in self.earlier.record["teachers"]
        before = age_with(self.earlier, name) if self.earlier is not None and held else Age(0, 0)
        if name not in self.change.origins:
            return before
        entry = self.change.entries.get(name, {})
        own = Age.of(entry if "begun" in entry else self.change.record)
        # An index that another dump wrote meanwhile is read by now, and overtaken.
        return own._replace(generation=before.generation + 1) if before.generation > own.generation > 0 else own

    # -- around it ----------------------------------------------------------------------------------------------------

    def _viewed(self) -> set[str]:
        """Teachers whose view an index names, ours or an older script's: differing files in it are brought in line.

        Where a damaged index can no longer say whose views there were, all teachers' are.
        """
        if self.snapshot.is_older:
            with suppress(CorruptError):
                return {*read_older_maps(self.folder.index_path)}
        if self.snapshot.is_damaged:
            return {*self.origins}
        return {*self.earlier.origins} if self.earlier is not None and self.earlier.record.get("files") else set()

    def _keep_plan(self) -> None:
        """Restore a lost or damaged batch plan from the index's copy: another one would make other last bits."""
        if self.snapshot.saved_plan is None and self.snapshot.plan is not None:
            self.snapshot.plan.save(self.folder.plan_path)

    def _remove_damaged(self, current: Collection[str]) -> None:
        """Remove damaged packs, but not ``current`` ones, nor those of teachers not asked: somebody may mend them."""
        if self.change.keep_damaged:
            return
        for path in self.snapshot.packs.damaged:
            # Scoring the same rows again gives the same name: then the damaged file has been replaced already.
            if teacher_in_name(path) not in self.others and path.name not in current and not path.is_dir():
                with store_errors(path, "remove"):
                    path.unlink(missing_ok=True)

    def _remove_forbidden(self, served: Collection[str]) -> int:
        """Remove superseded packs that hold a sample which is no longer permitted; returns how many rows went.

        Those ``served`` stay: another process's index may name them by now.
        """
        permitted = KeyFinder(self.change.wanted.keys)
        origins, unfinished = self.origins, protected(self.pending)
        gone = 0
        for pack in self.snapshot.packs.good:
            current = origins.get(pack.origin.teacher)
            same = current is not None and current.fingerprint.digest == pack.origin.fingerprint.digest
            if same or pack.path.name in served:
                continue
            kept = np.flatnonzero(permitted.find(pack.keys) >= 0)
            if len(kept) < len(pack):
                if len(kept) and (pack.origin.teacher, pack.origin.fingerprint.digest) in unfinished:
                    write_part(self.folder.packs_path, pack, kept)  # a dump can go on from the others
                    gone -= len(kept)
                gone += len(pack)
                with store_errors(pack.path, "remove"):
                    pack.path.unlink(missing_ok=True)
        return gone


def _maps_of(snapshot: Snapshot) -> Mapping[str, Mapping[str, str]]:
    """The maps of the index as this snapshot found it. Raises `IndexChangedError` where it is another by now."""
    now = snapshot.again(maps=True)
    if now.index is None or now.state != snapshot.state:
        raise IndexChangedError
    return now.index.maps


def _held_by_all(rows: Iterable[Union | None]) -> int:
    """How many samples every one of these has a row of."""
    keys: np.ndarray | None = None
    for union in rows:
        if union is None:
            return 0
        keys = union.keys if keys is None else keys[union.find(keys) >= 0]
    return 0 if keys is None else len(keys)


def _earlier_parts(before: Mapping[str, Any], origin: Origin) -> list[Mapping[str, str]]:
    """Parts of the fingerprints this teacher had before, newest first."""
    known = [before["parts"], *before["earlier"]] if before else []
    return [parts for parts in known if parts != dict(origin.fingerprint.parts)][:_EARLIER]
