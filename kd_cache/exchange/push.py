"""A cache to an URL: packs first, each checked in full before it is sent; the index last, on a condition.

Whenever it ends, the index at the URL finds its packs. Of two pushes at once one wins, and the other says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kd_cache.errors import ChangedError, CorruptError, MissingLogitsError, StaleError, StoreError, shown
from kd_cache.files.atomic import open_file, store_errors
from kd_cache.remote.store import PIECE, Entry, RemoteStore
from kd_cache.remote.url import checked_url, open_store
from kd_cache.serve.pull import index_at
from kd_cache.store.cache import CacheFolder, opened
from kd_cache.store.index import INDEX_NAME, MOST_BYTES, Index
from kd_cache.store.names import PACK_NAME
from kd_cache.store.pending import protected
from kd_cache.store.permitted import read_permitted
from kd_cache.store.plan import MOST_BYTES as MOST_PLAN
from kd_cache.store.plan import BatchPlan
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.upstream import Upstream, read_upstream, write_upstream
from kd_cache.watch import Watcher

_DAY = 86_400


@dataclass
class Pushed:
    """What a push came to. ``index`` is ``sent``, ``same``, or ``none`` where parts were pushed."""

    url: str
    cache: Path
    index: str = "none"
    sent: list[str] = field(default_factory=list)
    there_already: int = 0
    bytes: int = 0
    healed: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "cache": str(self.cache)}


def push_cache(
    path: Path,
    url: str,
    watcher: Watcher | None = None,
    *,
    replace: bool = False,
    check: bool = False,
    prune_days: float | None = None,
) -> Pushed:
    """Send a finished cache, or of an unfinished one what its dumps committed (`push_parts`).

    Args:
        replace: put it in the place of an index that this cache was not pulled from.
        check: download what is there already and compare, instead of believing name and size.
        prune_days: afterwards remove packs that the index does not name and that are older than so many days.

    Raises:
        StaleError: the URL has another index than the one this cache was pulled from or pushed as, or another push
            was quicker. Nothing is replaced.
        CorruptError: a pack here is damaged; it is not sent.
        MissingLogitsError: there is no cache here, or a pack of it is gone.
        StoreError, UsageError: the store cannot be reached or written, or the URL is none.
    """
    url, folder = checked_url(url), CacheFolder.at(path)
    snapshot = Snapshot(folder)
    if snapshot.index is None and snapshot.trouble is None and snapshot.pending:
        return push_parts(path, url, watcher, check=check)
    index = snapshot.finished()
    store = open_store(url, writing=True)
    push = _Push(store, folder, watcher or Watcher(), check)
    theirs, etag = _there(store, replace=replace)
    ours, seen = index.without_view, read_upstream(folder, url)
    known = theirs is None or theirs == ours or (seen is not None and seen.is_of(theirs))
    if not (known or replace):
        raise StaleError(
            f"{shown(url)} has another index than the one that {shown(folder.path)} was pulled from, or pushed as",
            hint="Pull it into another folder and look. --replace puts this cache in its place.",
        )
    files = [*(f"packs/{name}" for name in index.packs), *_permitted(index)]
    listing = push.send(files)
    push.send_plan(BatchPlan.from_json(index.record.get("plan")), listing, replace=True)
    if theirs != ours:
        etag = _put_index(store, ours, etag)
        push.done.index = "sent"
        if push.done.there_already:  # a push that prunes may have removed what nothing named so far
            push.send(files, again=True)
    else:
        push.done.index = "same"
    try:
        write_upstream(folder, url, Upstream.of(ours, etag))
    except StoreError as error:  # a cache that is mounted read-only was pushed all the same
        push.watcher.note(f"{error.message}; what is pushed next from here needs --replace")
    if prune_days is not None:
        push.prune(index, etag, prune_days * _DAY)
    return push.done


def push_parts(path: Path, url: str, watcher: Watcher | None = None, *, check: bool = False) -> Pushed:
    """Send what the dumps of a node committed: packs, batch plan, and last the pending records. Others' stay.

    Raises:
        StaleError: the URL has an index, so nobody would pull parts from there; or another batch plan.
        As `push_cache` besides.
    """
    folder = CacheFolder.at(path)
    store = open_for_parts(url)
    snapshot = Snapshot(folder)
    push = _Push(store, folder, watcher or Watcher(), check)
    ours = protected(snapshot.pending)
    teachers = {name for name, _ in ours}
    packs = folder.packs(teachers)
    for error in packs.damaged.values():
        raise error
    mine = [pack for pack in packs.good if (pack.origin.teacher, pack.origin.fingerprint.digest) in ours]
    listing = push.send([f"packs/{pack.path.name}" for pack in mine])
    push.send_plan(snapshot.plan, listing, replace=False)
    for record in snapshot.pending:
        push.put(f"pending/{record.path.name}")
    return push.done


def open_for_parts(url: str) -> RemoteStore:
    """The store that parts go to; asked before anything is scored. Raises as `push_parts`."""
    store = open_store(checked_url(url), writing=True)
    if INDEX_NAME in [entry.name for entry in store.list()]:
        raise StaleError(
            f"{shown(store.url)} has a finished cache; parts beside it would be pulled by nobody",
            hint="Push the parts under an URL of their own.",
        )
    return store


def _there(store: RemoteStore, *, replace: bool) -> tuple[bytes | None, str | None]:
    """The index at the URL, as it is without a view, and its ETag. One that is to be replaced may be damaged."""
    found = store.get(INDEX_NAME, MOST_BYTES)
    if found is None or found.content is None:
        return None, None
    try:
        return index_at(store, found.content).without_view, found.etag
    except (CorruptError, StaleError):
        if not replace:
            raise
        return b"", found.etag


def _put_index(store: RemoteStore, content: bytes, etag: str | None) -> str | None:
    try:
        return store.put_if(INDEX_NAME, content, etag)
    except ChangedError as error:
        # A first try may have come through although its answer did not.
        found = store.get(INDEX_NAME, MOST_BYTES)
        if found is not None and found.content == content:
            return found.etag
        raise StaleError(
            f"another push to {shown(store.url)} was quicker; its index stays",
            hint="Pull it into another folder and look. --replace puts this cache in its place.",
        ) from error


def _permitted(index: Index) -> list[str]:
    entry = index.record.get("permitted")
    return [] if entry is None else [entry["file"]]


class _Push:
    """One push of a cache's files."""

    def __init__(self, store: RemoteStore, folder: CacheFolder, watcher: Watcher, check: bool) -> None:
        self.store, self.folder, self.watcher, self.check = store, folder, watcher, check
        self.done = Pushed(store.url, folder.path)

    def send(self, names: Iterable[str], *, again: bool = False) -> Mapping[str, Entry]:
        """Send the files that are not there with their size, or other than they are here; gives what was there."""
        listing = {entry.name: entry for entry in self.store.list()}
        sizes = [(name, self._size(name)) for name in names]
        held = [(name, size) for name, size in sizes if name in listing and listing[name].size == size]
        lacking = [each for each in sizes if each not in held]
        if self.check and not again:
            self.watcher.stage("comparing", sum(size for _, size in held), "MB")
            differing = [(name, size) for name, size in held if not self._is_same(listing[name])]
            self.done.healed = [name for name, _ in differing]
            lacking += differing
        if lacking:
            self.watcher.stage("sending", sum(size for _, size in lacking), "MB")
        for name, _ in lacking:
            self._refuse_damaged(name)
            self.put(name)
        self.done.there_already = len(held) - len(self.done.healed)
        return listing

    def put(self, name: str) -> None:
        path = self.folder.path / name
        with store_errors(path, "look at"):
            self.done.bytes += path.stat().st_size
        self.store.put_file(name, path, self.watcher)
        self.done.sent.append(name)

    def _size(self, name: str) -> int:
        path = self.folder.path / name
        with store_errors(path, "look at"):
            try:
                return path.stat().st_size
            except FileNotFoundError:
                raise self._gone(name) from None

    def _gone(self, name: str) -> MissingLogitsError:
        return MissingLogitsError(
            f"{shown(self.folder.path)} lacks {name}, which its index names",
            hint="Restore its packs, or run kd-cache dump again.",
        )

    def _refuse_damaged(self, name: str) -> None:
        """Every byte is compared with the digest in the file's name."""
        path = self.folder.path / name
        if not name.endswith(".h5"):
            read_permitted(path)
        elif (pack := opened(path)) is None:
            raise self._gone(name)
        elif isinstance(pack, CorruptError):
            raise pack

    def _is_same(self, entry: Entry) -> bool:
        """Whether a file there has the bytes of the one here."""
        path = self.folder.path / entry.name
        with suppress(ChangedError), store_errors(path, "read"), open_file(path) as file:
            for start in range(0, entry.size, PIECE):
                stop = min(start + PIECE, entry.size)
                if self.store.get_range(entry.name, start, stop, entry.etag) != file.read(stop - start):
                    return False
                self.watcher.advance(stop - start)
            return True
        return False

    def send_plan(self, plan: BatchPlan | None, listing: Mapping[str, Entry], *, replace: bool) -> None:
        """The batch plan. Parts that were scored in other batches than those there do not belong together."""
        if plan is None:
            return
        found = self.store.get("plan.json", MOST_PLAN) if "plan.json" in listing else None
        if found is not None and found.content == plan.content:
            return
        if found is not None and not replace:
            raise self._other_plan()
        try:
            self.store.put_if("plan.json", plan.content, None if found is None else found.etag)
        except ChangedError as error:
            now = self.store.get("plan.json", MOST_PLAN)
            if not replace and (now is None or now.content != plan.content):
                raise self._other_plan() from error
            return  # the index says it, too
        self.done.sent.append("plan.json")

    def _other_plan(self) -> StaleError:
        return StaleError(
            f"{shown(self.store.url)} has parts that were scored in other batches than those in "
            f"{shown(self.folder.path)}",
            hint="Dump all parts with the same --batch-size, or push these under another URL.",
        )

    def prune(self, index: Index, etag: str | None, seconds: float) -> None:
        """Remove old packs that the index does not name. Another push's index, put there meanwhile, ends it."""
        now = self.store.head(INDEX_NAME)
        if now is None or now.etag != etag:
            return
        named = {f"packs/{name}" for name in index.packs}
        for entry in self.store.list():
            folder, _, name = entry.name.rpartition("/")
            is_pack = folder == "packs" and PACK_NAME.match(name) is not None
            if is_pack and entry.name not in named and time.time() - entry.modified > seconds:
                self.store.delete(entry.name)
                self.done.pruned.append(entry.name)
