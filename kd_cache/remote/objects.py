"""`RemoteStore` by obstore: S3, Google Cloud Storage, Azure, a web server, a folder, memory.

obstore tries again by itself: five times in all, with growing pauses, for what a server answers with 5xx, for lost and
refused connections and for reads that stall, in the middle of a body as well.
"""

from __future__ import annotations

import functools
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kd_cache.errors import ChangedError, StoreError, UsageError, shown
from kd_cache.files.atomic import store_errors
from kd_cache.files.turns import in_turn
from kd_cache.remote.store import PIECE, Entry, Found
from kd_cache.watch import Watcher

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta, PutResult
    from obstore.store import ObjectStore as AnyStore

T = TypeVar("T")

_AT_ONCE = 4
"""Pieces that are sent at the same time."""


@dataclass
class Patience:
    """How long a store is waited for, in seconds, and how often it is asked."""

    connect: float = 10.0
    stalled: float = 60.0
    tries: int = 5
    pause: float = 0.5
    """Before the second try; it doubles each time."""


PATIENCE = Patience()


class ObjectStore:
    """What lies below one URL."""

    def __init__(self, url: str, *, writing: bool) -> None:
        try:
            import obstore
        except ImportError as error:
            raise UsageError("caches at an URL need obstore", hint="pip install kd-cache[remote]") from error
        self.url = url
        self.lists = not url.startswith("http")
        self._by = obstore
        with self._errors("open"):
            self._store = _opened(url, writing=writing)

    def head(self, name: str) -> Entry | None:
        with self._errors("look at", name):
            try:
                return _entry(heard(lambda: self._by.head(self._store, name)))
            except FileNotFoundError:
                return None

    def get(self, name: str, most: int, unless: str | None = None) -> Found | None:
        with self._errors("read", name):
            try:
                options: GetOptions = {} if unless is None else {"if_none_match": unless}
                result = heard(lambda: self._by.get(self._store, name, options=options))
                if (size := result.meta["size"]) > most:
                    raise StoreError(f"{self._named(name)} has {size} bytes, expected at most {most}")
                return Found(heard(lambda: bytes(result.bytes())), result.meta["e_tag"])
            except FileNotFoundError:
                return None
            except self._by.exceptions.NotModifiedError:
                return Found(None, unless)

    def get_range(self, name: str, start: int, stop: int, etag: str | None) -> bytes:
        with self._errors("read", name):
            try:
                # A weak ETag is that of a text's meaning: no server finds it equal.
                same: GetOptions = {} if etag is None or etag.startswith("W/") else {"if_match": etag}
                options: GetOptions = {"range": (start, stop), **same}
                content = heard(lambda: bytes(self._by.get(self._store, name, options=options).bytes()))
            except FileNotFoundError as error:
                raise ChangedError(f"{self._named(name)} is gone") from error
        if len(content) != stop - start:
            raise ChangedError(f"{self._named(name)} has other bytes than it had when it was looked at")
        return content

    def put_file(self, name: str, path: Path, watcher: Watcher) -> None:
        with store_errors(path, "read"):
            counted = _Counted(path, watcher)
        with self._errors("write", name), counted as file:
            try:
                heard(lambda: self._by.put(self._store, name, file, chunk_size=PIECE, max_concurrency=_AT_ONCE))
            except Exception:
                if file.failure is not None:  # obstore makes an error of its own of it
                    raise file.failure from None
                raise

    def put_if(self, name: str, content: bytes, etag: str | None) -> str | None:
        with self._errors("write", name):
            if etag is not None and self.url.startswith("file:"):
                return self._replaced_in_folder(name, content, etag)
            mode: Any = "create" if etag is None else {"e_tag": etag}
            result: PutResult = heard(lambda: self._by.put(self._store, name, content, mode=mode))
            return result["e_tag"]

    def _replaced_in_folder(self, name: str, content: bytes, etag: str) -> str | None:
        """A file system replaces a file on no condition: whoever pushes to a folder waits for the one who does."""
        with in_turn(Path(self.url.removeprefix("file://"))):
            now = self.head(name)
            if now is None or now.etag != etag:
                raise ChangedError(f"{self._named(name)} is another by now")
            return self._by.put(self._store, name, content)["e_tag"]

    def list(self) -> list[Entry]:
        with self._errors("list"):
            return heard(lambda: [_entry(meta) for batch in self._by.list(self._store) for meta in batch])

    def delete(self, name: str) -> None:
        with self._errors("remove", name):
            try:
                heard(lambda: self._by.delete(self._store, name))
            except FileNotFoundError:
                return

    def _named(self, name: str) -> str:
        return shown(f"{self.url}/{name}" if name else self.url)

    @contextmanager
    def _errors(self, doing: str, name: str = "") -> Iterator[None]:
        """Turn what obstore raises into a `StoreError` that names the URL and the cause."""
        changed = (self._by.exceptions.AlreadyExistsError, self._by.exceptions.PreconditionError)
        try:
            yield
        except StoreError:
            raise
        except changed as error:
            raise ChangedError(f"{self._named(name)} is another by now") from error
        except (self._by.exceptions.BaseError, OSError, ValueError, RuntimeError) as error:
            raise StoreError(f"cannot {doing} {self._named(name)}: {_cause(error)}") from error


def heard(call: Callable[[], T]) -> T:
    """Call it on a thread of its own: obstore hears no signal while it waits, and it may wait for minutes."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 (it is raised below)
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _opened(url: str, *, writing: bool) -> AnyStore:
    from obstore.store import LocalStore, from_url

    if url.startswith("memory:"):
        return _in_memory(url)
    if url.startswith("file:"):
        return LocalStore(url.removeprefix("file://"), mkdir=writing)
    allowed = url.startswith("http:") or os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    # A slow line is not a stalled one: a request as a whole may take its time.
    return from_url(
        url,
        client_options={
            "connect_timeout": timedelta(seconds=PATIENCE.connect),
            "read_timeout": timedelta(seconds=PATIENCE.stalled),
            "timeout": timedelta(days=1),
            "allow_http": allowed,
        },
        retry_config={
            "max_retries": PATIENCE.tries - 1,
            "backoff": {"init_backoff": timedelta(seconds=PATIENCE.pause), "base": 2},
            "retry_timeout": timedelta(seconds=PATIENCE.tries * (PATIENCE.connect + PATIENCE.stalled)),
        },
    )


@functools.cache
def _in_memory(url: str) -> AnyStore:
    """One for each URL, as long as this process lives: for tests."""
    from obstore.store import MemoryStore

    return MemoryStore()


def _entry(meta: ObjectMeta) -> Entry:
    return Entry(meta["path"], meta["size"], meta["e_tag"], meta["last_modified"].timestamp())


def _cause(error: BaseException) -> str:
    """The first line of what obstore says; what stands in the query of an URL may be a signature."""
    text = str(error).split("\n\nDebug source")[0]
    return shown(re.sub(r"\?[^\s\"']+", "?…", " ".join(text.split())))[:500]


class _Counted(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, watcher: Watcher) -> None:
        super().__init__(path)
        self._path, self._watcher = path, watcher
        self.failure: BaseException | None = None

    def read(self, size: int | None = -1, /) -> bytes | Any:
        try:
            with store_errors(self._path, "read"):
                piece = super().read(-1 if size is None else size)
            self._watcher.advance(len(piece or b""))
        except BaseException as error:
            self.failure = error
            raise
        return piece
