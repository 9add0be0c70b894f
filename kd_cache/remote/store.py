"""A place for whole files: what every kind of store can do, and how it says what went wrong.

Stores are made for one push or pull and thrown away: their clients do not survive a fork, so none is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from kd_cache.watch import Watcher

PIECE = 16 << 20
"""Files go in pieces of so many bytes, in both directions."""


class Entry(NamedTuple):
    """A file of a store. ``name`` is relative to the URL, ``modified`` in seconds since 1970, by the store's clock.

    ``etag`` tells one content of a name from the next; ``None`` where the store has none.
    """

    name: str
    size: int
    etag: str | None
    modified: float


class Found(NamedTuple):
    """A small file's content; ``None`` where it is still the one that the caller knows."""

    content: bytes | None
    etag: str | None


class RemoteStore(Protocol):
    """What lies below one URL. Every method raises `StoreError`, which names the URL and the cause, after five tries.

    Attributes:
        url: as `checked_url` gives it.
        lists: whether it can say what it holds; a plain web server cannot.
    """

    url: str
    lists: bool

    def head(self, name: str) -> Entry | None:
        """The file's size and ETag; ``None`` if there is none."""

    def get(self, name: str, most: int, unless: str | None = None) -> Found | None:
        """A small file's content; ``None`` if there is none. One larger than ``most`` bytes is refused unread.

        With ``unless``, an ETag, nothing is sent where the file still has it.
        """

    def get_range(self, name: str, start: int, stop: int, etag: str | None) -> bytes:
        """Bytes ``start`` to ``stop``. Raises `ChangedError` where the file has another ETag by now, or is gone."""

    def put_file(self, name: str, path: Path, watcher: Watcher) -> None:
        """Send a file, in pieces; it appears whole or not at all. The watcher hears of its bytes."""

    def put_if(self, name: str, content: bytes, etag: str | None) -> str | None:
        """Write a small file where it has this ETag or, with ``None``, where there is none. Gives its new ETag.

        Raises `ChangedError` where it is another by now; nothing is replaced then.
        """

    def list(self) -> list[Entry]:
        """All files below the URL. An empty list means that there are none, never that they could not be listed."""

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""
