"""One look at a cache: index, pending records, packs, permitted list and plan, each read once and remembered.

A command takes one `Snapshot` and hands it down. Every refusal about a cache's state is worded here. `Snapshot.again`
looks anew, and reads only what has changed: packs and permitted lists never change under their names, and an index or a
pending record that was written anew is another file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from kd_cache.errors import CorruptError, KDCacheError, MissingLogitsError, StaleError, StoreError, shown
from kd_cache.files.atomic import store_errors
from kd_cache.store.accuracy import Accuracy, alarm, measure
from kd_cache.store.cache import CacheFolder, PackSet, no_cache, opened, refuse_link
from kd_cache.store.current import Current, current_of
from kd_cache.store.index import INDEX_NAME, Index, State, index_state
from kd_cache.store.origin import Origin
from kd_cache.store.pack import Pack
from kd_cache.store.pending import age_with, read_pending
from kd_cache.store.permitted import Permitted
from kd_cache.store.plan import BatchPlan, load_plan
from kd_cache.store.preamble import Span
from kd_cache.store.union import Union
from kd_cache.watch import Watcher

GO_ON = "Run the same kd-cache dump again; it continues where it stopped."
_RESTORE = "Restore its packs, or run kd-cache dump again."


@dataclass
class _Memory:
    """What was read so far, under what tells it from a later version of itself."""

    index: tuple[State, bool, Index | KDCacheError | None] | None = None
    pending: dict[Path, tuple[State, Index | KDCacheError]] = field(default_factory=dict)
    packs: dict[Path, Pack] = field(default_factory=dict)
    plan: tuple[State, BatchPlan | None] | None = None
    permitted: dict[str, Permitted] = field(default_factory=dict)
    unions: dict[tuple[object, ...], Union] = field(default_factory=dict)
    accuracies: dict[tuple[tuple[Path, ...], str], Accuracy] = field(default_factory=dict)


class Snapshot:
    """A cache at one moment. Nothing is read before it is asked for, but the index, and nothing twice.

    Where only some keys are ``needed``, its packs are those that may hold them.

    Attributes:
        folder: the cache's paths.
        state: which version of the index was read, so that nobody else's is overwritten.
        index: the checked index; ``None`` where there is none, or none that can be read.
        trouble: why an index that is there cannot be used: `StaleError` for an older script's, `CorruptError` for a
            damaged one, `StoreError` for a newer format or a file that cannot be read.
    """

    def __init__(
        self, folder: CacheFolder, *, maps: bool = False, needed: Span | None = None, memory: _Memory | None = None
    ) -> None:
        self.folder = folder
        self._maps, self._needed = maps, needed
        self._memory = memory or _Memory()
        self.state = folder.index_state()
        content = self._read_index()
        self.index = content if isinstance(content, Index) else None
        self.trouble = content if isinstance(content, KDCacheError) else None

    def again(self, *, maps: bool | None = None) -> Snapshot:
        """The cache as it is now; what has not changed is not read again. ``maps`` asks for the index's maps."""
        maps = self._maps if maps is None else maps
        return Snapshot(self.folder, maps=maps, needed=self._needed, memory=self._memory)

    def _read_index(self) -> Index | KDCacheError | None:
        kept = self._memory.index
        if kept is not None and self.state is not None and kept[0] == self.state and (kept[1] or not self._maps):
            return kept[2]
        content: Index | KDCacheError | None
        try:
            content = self.folder.index(maps=self._maps)
        except (StaleError, CorruptError, StoreError) as error:
            content = error
        self._memory.index = (self.state, self._maps, content)
        return content

    def wrote(self, index: Index, state: State, permitted: Permitted | None = None) -> None:
        """Remember an index, with its maps, and a permitted list that this process just put in place."""
        self._memory.index = (state, True, index)
        self.state = state
        if permitted is not None:
            self._memory.permitted[permitted.name] = permitted

    # -- what state it is in ------------------------------------------------------------------------------------------

    @property
    def is_older(self) -> bool:
        """Whether an older script wrote it: no ``kd_cache`` in its index, nothing that could be checked."""
        return isinstance(self.trouble, StaleError)

    @property
    def is_damaged(self) -> bool:
        return isinstance(self.trouble, CorruptError)

    @property
    def is_begun(self) -> bool:
        """Whether there are packs, or a place for them: then a dump was here."""
        return self.folder.packs_path.is_dir()

    @property
    def renamed(self) -> StaleError | None:
        """Set where the index is of another adaptation than the folder's name says."""
        return self._of_another([] if self.index is None else [self.index])

    def _of_another(self, records: Iterable[Index]) -> StaleError | None:
        for record in records:
            adaptation = record.record.get("adaptation", self.folder.path.name)
            if adaptation != self.folder.path.name:
                return StaleError(
                    f"{shown(self.folder.path)} holds the cache of {shown(adaptation)}",
                    hint="It was copied or renamed; give the folder its own name back, or use another --cache-root.",
                )
        return None

    @property
    def refusal(self) -> KDCacheError | None:
        """Why this is no finished cache that could be read; ``None`` where it is one. Its name may be another."""
        if isinstance(self.trouble, StaleError):
            return StaleError(self.trouble.message, hint="Bring its rows in with kd-cache adopt.")
        if self.trouble is not None or self.index is not None:
            return self.trouble
        if self.is_begun:
            what = f"{shown(self.folder.path)} is unfinished: its dump did not finish, it has no {INDEX_NAME}"
            return MissingLogitsError(what, hint=f"{GO_ON} If it was split into parts: kd-cache seal.")
        return no_cache(self.folder.path)

    def finished(self) -> Index:
        """The index of a finished cache. Raises the `refusal` of any other."""
        if self.index is None:
            raise self.refusal or AssertionError("a snapshot has an index or a reason why not")
        return self.index

    def known(self, watcher: Watcher) -> Index | None:
        """The index, for a command that will write it anew: ``None`` where there is none, or a damaged one (noted).

        Raises:
            StaleError: an older script's cache, or another adaptation's.
            StoreError: a newer format, or an index that cannot be read.
        """
        if isinstance(self.trouble, CorruptError):
            watcher.note(f"{self.trouble.message}; sealing writes it anew from the packs")
        elif self.trouble is not None:
            raise self.refusal or self.trouble
        renamed = self.renamed or self._of_another(self.pending)
        if renamed is not None:
            raise renamed
        return self.index

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def origins(self) -> dict[str, Origin]:
        """The teachers that the index names; none without an index."""
        return {} if self.index is None else self.index.origins

    @property
    def named(self) -> set[str]:
        """Teachers that the index, a pending record or a pack names. Only their folders are the view's."""
        records = [self.origins, *(record.origins for record in self.pending)]
        return {name for origins in records for name in origins} | {pack.origin.teacher for pack in self.packs.good}

    @cached_property
    def _pending(self) -> tuple[list[Index], list[KDCacheError]]:
        return read_pending(self.folder, self._memory.pending)

    @property
    def pending(self) -> list[Index]:
        """What dumps are making that the index does not tell of, the oldest first."""
        return list(self._pending[0])

    @property
    def damaged_pending(self) -> list[KDCacheError]:
        """What is wrong with pending records that cannot be read."""
        return self._pending[1]

    @property
    def next_generation(self) -> int:
        """The number of a run that has read all this: one more than the largest."""
        records = [*([] if self.index is None else [self.index]), *self.pending]
        ages = [age_with(record, name) for record in records for name in ("", *record.record["teachers"])]
        return 1 + max((age.generation for age in ages), default=0)

    @cached_property
    def packs(self) -> PackSet:
        """All packs, or those that may hold keys that are needed, checked to their last byte."""
        found = self.folder.packs(known=self._memory.packs, needed=self._needed)
        self._memory.packs = {pack.path: pack for pack in found.good}
        return found

    @cached_property
    def plan(self) -> BatchPlan | None:
        """The batch plan; where its file is lost or damaged, the copy in the index. Raises `StoreError`."""
        return self.saved_plan or BatchPlan.from_json(({} if self.index is None else self.index.record).get("plan"))

    @cached_property
    def saved_plan(self) -> BatchPlan | None:
        """The batch plan in its file. Raises `StoreError` if that is there and cannot be read."""
        with store_errors(self.folder.plan_path, "look at"):
            state = index_state(self.folder.plan_path) if self.folder.path.is_dir() else None
        if self._memory.plan is None or state is None or self._memory.plan[0] != state:
            self._memory.plan = (state, load_plan(self.folder.plan_path))
        return self._memory.plan[1]

    @cached_property
    def permitted(self) -> Permitted | None:
        """The permitted samples that the index names; ``None`` where it names none (kd-cache 0.1 wrote none).

        Raises:
            FileNotFoundError: it is gone.
            CorruptError, StoreError: it is not as it was written, or cannot be read.
        """
        entry = None if self.index is None else self.index.record.get("permitted")
        if self.index is None or entry is None:
            return None
        if entry["file"] not in self._memory.permitted:
            found = self.folder.permitted(self.index)
            if found is not None:
                self._memory.permitted[entry["file"]] = found
        return self._memory.permitted.get(entry["file"])

    def _named(self, name: str) -> list[str]:
        """The file names of the packs that the index names for a teacher, in key order."""
        entry = {} if self.index is None else self.index.record["teachers"].get(name, {})
        return [named for named, _ in entry.get("packs", ())]

    def served_paths(self, teachers: Iterable[str]) -> list[Path]:
        """The packs that the index names for these teachers."""
        return [self.folder.packs_path / named for name in teachers for named in self._named(name)]

    def served_packs(self, name: str, check: str = "full") -> list[Pack]:
        """The packs that the index names for a teacher, in key order: all that readers are given of it.

        At least one. ``check`` as for `open_pack`.

        Raises:
            MissingLogitsError: the index names none, or one is not there.
            CorruptError: one is damaged, or they are others than the index tells of.
        """
        named = self._served_names(name)
        with store_errors(self.folder.packs_path, "look at"):
            refuse_link(self.folder.packs_path)
        packs = [self._served_pack(name, each, check) for each in named]
        for before, pack in pairwise(packs):
            if before.keys[-1].tobytes() >= pack.keys[0].tobytes():
                raise CorruptError(
                    f"the packs {shown(before.path)} and {shown(pack.path)} are not in the order of keys"
                )
        return packs

    def _served_names(self, name: str) -> list[str]:
        self.finished()
        if not (named := self._named(name)):
            what = f"{shown(self.folder.path)} holds no rows of {name} as its index describes them"
            raise MissingLogitsError(what, hint=_RESTORE)
        return named

    def _served_pack(self, name: str, named: str, check: str) -> Pack:
        path = self.folder.packs_path / named
        found = self._memory.packs.get(path) or opened(path, check)
        if found is None:
            what = f"{shown(self.folder.path)} lacks the pack {shown(named)} that its index names"
            raise MissingLogitsError(what, hint=_RESTORE)
        if isinstance(found, CorruptError):
            raise found
        made, origin = found.origin, self.finished().origins[name]
        if (made.teacher, made.fingerprint.digest, made.views) != (name, origin.fingerprint.digest, origin.views):
            raise CorruptError(f"the pack {shown(found.path)} is not of the teacher that the index names it for")
        return found

    def served(self, name: str) -> Union | None:
        """The rows that readers are given of a teacher, as far as their packs are there and whole, or ``None``."""
        named = self._named(name)
        packs = [pack for pack in self.packs.of(self.finished().origins[name]) if pack.path.name in named]
        return self.union_of(*packs) if packs else None

    def union(self, origin: Origin, without: Collection[Path] = (), first: Collection[str] = ()) -> Union | None:
        """All rows of one origin that writers know, but those of some packs; ``None`` if there are none.

        Those of the packs called as in ``first``, by default as the index names them, count before others.
        Of rows with more views those of the origin count.
        """
        cut = [pack.of_views(origin.views) for pack in self.packs.of(origin) if pack.path not in without]
        packs = [pack for pack in cut if pack is not None]
        return self.union_of(*packs, first=first or self._named(origin.teacher)) if packs else None

    def union_of(self, *packs: Pack, first: Collection[str] = ()) -> Union:
        """All rows of packs that share one origin; those of the packs called as in ``first`` count before others."""
        key = (frozenset(first), *map(id, packs))  # a union keeps its packs, so that no other object gets their ids
        if key not in self._memory.unions:
            self._memory.unions[key] = Union(packs, first)
        return self._memory.unions[key]

    def accuracy(self, union: Union | None, permitted: Permitted) -> Accuracy:
        """How often rows of a union name their sample's scene. Measured once for the same packs and labels."""
        if union is None:
            return measure(None, permitted)
        key = (tuple(pack.path for pack in union.packs), permitted.name)
        if key not in self._memory.accuracies:
            self._memory.accuracies[key] = measure(union, permitted)
        return self._memory.accuracies[key]

    def current(self, watcher: Watcher) -> Current:
        """What is current for whoever makes it so: index, pending records, or what is left of them.

        Raises as `known` and `current_of`.
        """
        index = self.known(watcher)
        for error in self.damaged_pending:
            watcher.note(f"{error.message}; it is passed over")
        return current_of(self.folder, index, self.pending, lambda: self.packs)

    def refuse_wrong_joins(self, kept: Mapping[str, Origin]) -> None:
        """Look before rows are kept for good: one that is fresh under a wrong key would never be scored again.

        Args:
            kept: the teachers whose fresh rows are to be kept.

        Raises:
            CorruptError: a teacher's rows are not those that the index was written with.
        """
        permitted = None
        with suppress(FileNotFoundError, CorruptError):  # nothing to compare with; it is about to be written anew
            permitted = self.permitted
        if self.index is None or permitted is None:
            return
        for name, origin in self.origins.items():
            if name in kept and kept[name].fingerprint.digest == origin.fingerprint.digest:
                now = self.accuracy(self.served(name), permitted)
                wrong = alarm(now, self.index.record["teachers"][name])
                if wrong is not None:
                    raise CorruptError(f"{name}: {wrong}", hint="kd-cache repair scores them again.")
