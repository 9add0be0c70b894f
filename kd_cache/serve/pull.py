"""A cache from an URL to this disk: the index first, into memory; then what it names, checked; the index last.

Whenever it ends, what lies under a final name is whole, and an index finds its packs. What comes is a cache as any
other, without a view.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kd_cache.errors import CorruptError, MissingLogitsError, StaleError, StoreError, listed, shown
from kd_cache.files.atomic import make_directory, open_file, store_errors, write_atomic
from kd_cache.files.turns import in_turn
from kd_cache.remote.fetch import fetch
from kd_cache.remote.store import Entry, RemoteStore
from kd_cache.remote.url import checked_url, open_store
from kd_cache.serve.placement import check_of
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import INDEX_NAME, MOST_BYTES, Index, index_of_bytes
from kd_cache.store.names import PACK_NAME, PENDING_NAME
from kd_cache.store.pack import open_pack
from kd_cache.store.pending import Age
from kd_cache.store.permitted import read_permitted
from kd_cache.store.plan import MOST_BYTES as MOST_PLAN
from kd_cache.store.plan import BatchPlan, load_plan, plan_of_bytes
from kd_cache.store.upstream import Upstream, read_upstream, write_upstream
from kd_cache.watch import Watcher

_ATTEMPTS = 3


@dataclass(frozen=True)
class Pulled:
    """What a pull came to. ``finished`` is false where parts came, which wait for ``kd-cache seal``."""

    url: str
    cache: Path
    files: int
    bytes: int
    there_already: int
    changed: bool
    finished: bool

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "cache": str(self.cache)}


def pull_cache(
    url: str, path: Path, watcher: Watcher | None = None, *, check: str = "full", parts: bool = True
) -> Pulled:
    """Bring the cache at an URL into the folder ``path``, or bring the one there up to date.

    Args:
        check: how packs that are there already are looked at, ``full`` or ``auto``, as for `LogitCache.open`; damaged
            ones are fetched again.
        parts: whether parts that nobody sealed are fetched, where there is no index.

    Raises:
        MissingLogitsError: there is no cache at the URL.
        CorruptError: something there is not what its name says; what was good has come, the index stays as it was.
        StaleError: the folder holds another cache than was pulled into it, or the URL an older index than before.
        StoreError: the store cannot be read in time, or the disk not be written or has no room.
        UsageError: no such URL.
    """
    store, folder, watcher = open_store(checked_url(url)), CacheFolder(path), watcher or Watcher()
    for attempt in range(_ATTEMPTS):
        pull = _Pull(store, folder, watcher, check)
        try:
            return pull.index_and_packs() or pull.parts(wanted=parts)
        except CorruptError:
            # A push may have put another index in place, and removed what the one before named.
            if attempt + 1 == _ATTEMPTS or not pull.is_outdated():
                raise
    raise AssertionError


class _Pull:
    """One attempt."""

    def __init__(self, store: RemoteStore, folder: CacheFolder, watcher: Watcher, check: str) -> None:
        self.store, self.folder, self.watcher, self.check = store, folder, watcher, check
        self.etag: str | None = None
        self.seen: Upstream | None = None
        with suppress(CorruptError):  # then nothing is known of what was here
            self.seen = read_upstream(folder, store.url)
        self.state = folder.index_state()
        self.held = self._held()
        self.mine = None if self.held is None else self.held.without_view
        self.files = self.bytes = self.there_already = 0

    def _held(self) -> Index | None:
        try:
            return self.folder.index(maps=False)
        except CorruptError as error:
            self.watcher.note(f"{error.message}; the one at the URL takes its place")
            return None

    def is_outdated(self) -> bool:
        now = self.store.head(INDEX_NAME)
        return now is not None and now.etag != self.etag

    # -- a finished cache ---------------------------------------------------------------------------------------------

    def index_and_packs(self) -> Pulled | None:
        """``None`` where the URL has no index."""
        is_known = self.seen is not None and self.mine is not None and self.seen.is_of(self.mine)
        found = self.store.get(INDEX_NAME, MOST_BYTES, self.seen.etag if is_known and self.seen else None)
        if found is None:
            return None
        self.etag = found.etag
        index = self.held if found.content is None else index_at(self.store, found.content)
        if index is None:
            raise AssertionError("only a known index is asked for on a condition")
        theirs = index.without_view
        self._refuse_loss(index, theirs)
        wanted = [f"packs/{name}" for name in index.packs]
        wanted += [index.record["permitted"]["file"]] if index.record.get("permitted") else []
        self._fetch(dict.fromkeys(wanted))
        if theirs != self.mine:
            self._keep_plan(BatchPlan.from_json(index.record.get("plan")), replace=self.held is not None)
            with in_turn(self.folder.path):
                write_atomic(self.folder.index_path, theirs, lambda: self._refuse_interference(theirs))
        write_upstream(self.folder, self.store.url, Upstream.of(theirs, found.etag))
        return self._pulled(changed=theirs != self.mine, finished=True)

    def _refuse_loss(self, index: Index, theirs: bytes) -> None:
        """Only an index that was pulled is replaced, by one that is not older, and never one with a view."""
        if self.held is None or self.mine is None or theirs == self.mine:
            return
        where, elsewhere = shown(self.folder.path), "Pull into another folder"
        if self.seen is None or not self.seen.is_of(self.mine):
            raise StaleError(
                f"{where} is not as it was last pulled from {shown(self.store.url)}, or pushed there; a pull would "
                "lose what it holds",
                hint=f"{elsewhere}; kd-cache merge brings the rows of both together.",
            )
        if self.held.record.get("files"):
            raise StaleError(f"{where} has a view, which a pull would leave behind", hint=f"{elsewhere}.")
        if Age.of(index.record) < Age.of(self.held.record):
            raise StaleError(
                f"{shown(self.store.url)} has an older index than the one that {where} was pulled from",
                hint=f"{elsewhere}, if that is meant.",
            )

    def _refuse_interference(self, theirs: bytes) -> None:
        """Another pull may have been quicker; anything else that came meanwhile stays."""
        if self.folder.index_state() != self.state and self.folder.index_path.read_bytes() != theirs:
            raise StaleError(f"{shown(self.folder.path)} changed while it was pulled", hint="Run the same again.")

    def _keep_plan(self, plan: BatchPlan | None, *, replace: bool) -> None:
        """Rows that are scored here later must be scored in the batches of those that came."""
        held = load_plan(self.folder.plan_path)
        if plan is None or plan == held:
            return
        if held is not None and not replace:
            raise StaleError(
                f"{shown(self.folder.path)} holds rows that were scored in other batches than those at "
                f"{shown(self.store.url)}",
                hint="Pull into another folder; dump all parts with the same --batch-size.",
            )
        plan.save(self.folder.plan_path)

    # -- parts --------------------------------------------------------------------------------------------------------

    def parts(self, *, wanted: bool) -> Pulled:
        """Packs and pending records of dumps that nobody sealed."""
        url = shown(self.store.url)
        if not self.store.lists:
            raise MissingLogitsError(f"there is no {INDEX_NAME} at {url}, and a web server does not list parts")
        entries = {entry.name: entry for entry in self.store.list()}
        records = sorted(name for name in entries if _is_in("pending", name) and PENDING_NAME.match(name[8:]))
        packs = {name: entry for name, entry in entries.items() if _is_in("packs", name) and PACK_NAME.match(name[6:])}
        if not records and not packs:
            raise MissingLogitsError(f"there is no cache at {url}", hint="Make one: kd-cache push CACHE URL")
        if not wanted:
            raise MissingLogitsError(
                f"{url} holds parts that nobody sealed",
                hint=f"kd-cache pull {url} CACHE, kd-cache seal, kd-cache push CACHE {url}",
            )
        contents = {name: self._record(name) for name in records}
        found = self.store.get("plan.json", MOST_PLAN)
        make_directory(self.folder.path)
        if found is not None:
            plan = plan_of_bytes(found.content or b"")
            if plan is None:
                raise CorruptError(f"the batch plan {url}/plan.json is damaged", hint="Push a part again.")
            self._keep_plan(plan, replace=False)
        self._fetch(packs)
        make_directory(self.folder.pending_path)
        changed = self.files > 0
        for name, content in contents.items():
            if not _holds(self.folder.path / name, content):
                write_atomic(self.folder.path / name, content)
                changed = True
        return self._pulled(changed=changed, finished=False)

    def _record(self, name: str) -> bytes:
        found = self.store.get(name, MOST_BYTES)
        if found is None or found.content is None:
            raise StaleError(f"{shown(self.store.url)}/{name} went while it was pulled", hint="Run the same again.")
        index_at(self.store, found.content, name)
        return found.content

    # -- both ---------------------------------------------------------------------------------------------------------

    def _fetch(self, wanted: Mapping[str, Entry | None]) -> None:
        """Fetch the files that are not here, or damaged. Entries are asked for where they are not known."""
        make_directory(self.folder.packs_path)
        sizes = [path.stat().st_size for name in wanted if (path := self.folder.path / name).is_file()]
        check = check_of(self.check, False, sum(sizes))
        lacking = [name for name in wanted if not self._is_here(name, check)]
        entries = [wanted[name] or self.store.head(name) for name in lacking]
        if gone := [name for name, entry in zip(lacking, entries, strict=True) if entry is None]:
            raise CorruptError(
                f"{shown(self.store.url)} lacks files that its index names\n{listed(gone)}",
                hint="Where the cache is whole, kd-cache push sends them again.",
            )
        there = [entry for entry in entries if entry is not None]
        total = sum(entry.size for entry in there)
        with store_errors(self.folder.path, "look at"):
            free = shutil.disk_usage(self.folder.path).free
        if total > free:
            raise StoreError(f"{shown(self.folder.path)} needs {total:,} bytes, its disk has {free:,} left")
        if there:
            self.watcher.stage("fetching", total, "MB")
        for entry in there:
            fetch(self.store, entry, self.folder.path / entry.name, _checked, self.watcher)
        self.files, self.bytes, self.there_already = len(there), total, len(wanted) - len(there)

    def _is_here(self, name: str, check: str) -> bool:
        path = self.folder.path / name
        try:
            _checked(path, path.name, check)
        except (CorruptError, FileNotFoundError):
            return False
        return True

    def _pulled(self, *, changed: bool, finished: bool) -> Pulled:
        counts = self.files, self.bytes, self.there_already
        return Pulled(self.store.url, self.folder.path, *counts, changed, finished)


def index_at(store: RemoteStore, content: bytes, name: str = INDEX_NAME) -> Index:
    """A checked index that lies at an URL. Raises as `read_index`, naming the URL."""
    try:
        return index_of_bytes(Path(name), content)
    except (CorruptError, StaleError) as error:
        hint = "Where the cache is whole, kd-cache push --replace puts it there again."
        raise type(error)(f"{shown(store.url)}: {error.message}", hint=hint) from error


def _checked(path: Path, name: str, check: str = "full") -> None:
    """Raises `CorruptError` where a pack or permitted list is not what its name says, ``FileNotFoundError``."""
    if name.endswith(".h5"):
        open_pack(path, check, name)
    else:
        read_permitted(path, name)


def _is_in(folder: str, name: str) -> bool:
    return name.startswith(f"{folder}/") and name.count("/") == 1


def _holds(path: Path, content: bytes) -> bool:
    with suppress(OSError), open_file(path) as file:
        return file.readall() == content
    return False
