"""Where the rows of an opened cache are read from: ``LogitCache.open(preload=…)``. Imports no torch."""

from __future__ import annotations

from kd_cache.errors import UsageError, shown
from kd_cache.files.page_cache import available_memory

FULLY_CHECKED = 10**9
"""Packs of up to so many bytes together are checked when they are opened, larger ones as they are read."""
TABLE_BYTES = 1 << 30
"""Up to this size all rows are gathered into one ``[N, T, C]`` table."""
WORKER_TABLE_BYTES = 1 << 26
"""The same for a cache that a worker process opens for itself: it shares maps with others, but not a table."""

PLACES = {
    "table": "one table in memory",
    "mapped": "mapped packs, read as rows are asked for",
}


def checked(preload: bool | str) -> bool | str:
    """``preload`` if it is one of True, False, ``auto``. Raises `UsageError`."""
    if not isinstance(preload, bool) and preload != "auto":
        raise UsageError(f"preload is {shown(preload)}, expected True, False or auto")
    return preload


def check_of(verify: str, preload: bool | str, pack_bytes: int) -> str:
    """How packs of so many bytes are checked: what ``verify="auto"`` means."""
    if verify != "auto":
        return verify
    return "full" if preload is True or pack_bytes <= FULLY_CHECKED else "lazy"


def choose(preload: bool | str, table_bytes: int, *, is_lazy: bool, in_worker: bool = False) -> str:
    """One of `PLACES`.

    Args:
        table_bytes: what the logits of all rows and opened teachers take, as a table or mapped.
        is_lazy: rows are checked when they are first read. A table would read, and so check, all of them now.
        in_worker: a process that opens the cache for itself beside others that do the same.
    """
    if preload is False:
        return "mapped"
    if in_worker:
        return "table" if table_bytes <= WORKER_TABLE_BYTES and not is_lazy else "mapped"
    if preload is True or (table_bytes <= TABLE_BYTES and not is_lazy):
        return "table"
    return "mapped"


def fits(size: int) -> bool:
    """Whether so much can be kept in memory beside what a training needs there."""
    return size <= available_memory() // 2
