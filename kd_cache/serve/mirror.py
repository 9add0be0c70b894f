"""Caches at an URL: a checked copy on this disk is what is opened, read and mapped.

The store is asked when a cache is opened, and never afterwards: clients of object stores do not survive a fork, and
workers of a loader need none.
"""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from kd_cache.errors import MissingLogitsError, StoreError, UsageError, shown
from kd_cache.options import MIRROR, OFFLINE, home_path, is_url
from kd_cache.remote.url import checked_url
from kd_cache.serve.pull import pull_cache
from kd_cache.store.cache import CacheFolder

_DEFAULT = "~/.cache/kd-cache/mirror"
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def local_copy(path: str | Path, *, offline: bool | None = None) -> Path:
    """The folder of a cache: ``path`` itself or, of an URL, the copy in the mirror, brought up to date.

    Args:
        offline: use the copy as it is and ask nobody; by default what ``KD_CACHE_OFFLINE`` says.

    Raises:
        MissingLogitsError: there is no finished cache at the URL, or offline no copy of it.
        As `pull_cache` besides.
    """
    if not is_url(text := str(path)):
        return home_path(path)
    if not isinstance(path, str):
        raise UsageError(f"{shown(text)}: an URL is a text, not a Path, which takes a / away")
    url = checked_url(text)
    folder = CacheFolder(mirror_of(url))
    is_there = folder.index_path.is_file()
    if _is_offline() if offline is None else offline:
        if not is_there:
            raise MissingLogitsError(
                f"there is no copy of {shown(url)} in {shown(folder.path)}", hint="Open it once with a network."
            )
        return folder.path
    try:
        pull_cache(url, folder.path, check="auto", parts=False)
    except StoreError as error:
        copy = f"The copy in {shown(folder.path)} can be used as it is: offline=True, or {OFFLINE}=1."
        raise StoreError(error.message, hint=copy if is_there else error.hint) from error
    return folder.path


def mirror_of(url: str) -> Path:
    """Where the copy of what is at an URL (from `checked_url`) is kept."""
    root = home_path(os.environ.get(MIRROR) or _DEFAULT)
    return root / xxhash.xxh3_128_hexdigest(url.encode()) / url.rpartition("/")[2]


def _is_offline() -> bool:
    said = os.environ.get(OFFLINE, "").lower()
    if said not in (*_YES, *_NO):
        raise UsageError(f"{OFFLINE} is {shown(said)}, expected 1 or 0")
    return said in _YES
