"""URLs of stores: which are understood, and which are refused because they carry a secret."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from kd_cache.errors import UsageError, shown
from kd_cache.options import SCHEMES, is_url
from kd_cache.remote.hub import HubStore
from kd_cache.remote.objects import ObjectStore
from kd_cache.remote.store import RemoteStore

_READ_ONLY = ("https", "http")
_HERE = ("127.0.0.1", "localhost", "::1")


def checked_url(url: str) -> str:
    """The one spelling of an URL: no ``/`` at its end, ``file://`` with an absolute path.

    Raises:
        UsageError: another scheme; a user, password, query or fragment in it, which the message does not repeat; plain
            http to another machine.
    """
    if not is_url(url) or "://" not in url:
        raise UsageError(f"expected an URL that starts with {', '.join(f'{each}://' for each in SCHEMES)}",
                         hint="A cache on a disk is named by its folder.")  # fmt: skip
    scheme, rest = url.split("://", 1)
    if scheme == "file":
        return f"file://{os.path.normpath(Path(rest).expanduser().absolute())}"
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise UsageError(f"{scheme}://… is no URL: {error}") from error
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UsageError(
            f"the URL {scheme}://… has a user, a password, a query or a fragment: it is written down, so it must not",
            hint="Credentials are taken from the environment, as the store's own tools read them.",
        )
    if not host and scheme != "memory":
        raise UsageError(f"{shown(url)} names no {'host' if scheme in _READ_ONLY else 'bucket'}")
    if {"", ".", ".."} & {*url.rstrip("/").split("/")[3:]}:
        raise UsageError(f"{shown(url)} is not a plain path")
    if scheme == "http" and host not in _HERE:
        raise UsageError(f"{shown(url)} is not encrypted", hint="Use https://.")
    return url.rstrip("/")


def open_store(url: str, *, writing: bool = False) -> RemoteStore:
    """What lies below an URL (from `checked_url`). Nothing is asked yet.

    Raises:
        UsageError: what it takes is not installed, or the store can only be read.
        StoreError: the store cannot be set up, as where a folder is not there or the environment is incomplete.
    """
    scheme = url.split("://", 1)[0]
    if writing and scheme in _READ_ONLY:
        raise UsageError(
            f"{shown(url)} can only be read: a web server takes no files", hint="Push to the store behind it."
        )
    return HubStore(url) if scheme == "hf" else ObjectStore(url, writing=writing)
