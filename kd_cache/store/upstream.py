"""``remote.json``: which index of a store this cache was last pushed as or pulled from.

Whoever pushes replaces only an index that he has seen. ``{"seen": {URL: {"index": digest, "etag": …}}}``;
the digest is the xxh3-128 of the index at the URL, byte for byte. A cache is complete without.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from kd_cache.errors import CorruptError, shown
from kd_cache.files.atomic import open_file, store_errors, write_atomic
from kd_cache.files.strict_json import misfit, strict_json
from kd_cache.store.cache import CacheFolder

UPSTREAM_NAME = "remote.json"
_MOST = 1 << 20
_SHAPE = {"seen": {...: {"index": str, "etag": (None, str)}}}


@dataclass(frozen=True)
class Upstream:
    """What was last seen at an URL."""

    index: str
    etag: str | None

    @classmethod
    def of(cls, content: bytes, etag: str | None) -> Upstream:
        """Of an index's bytes and their ETag there."""
        return cls(xxhash.xxh3_128_hexdigest(content), etag)

    def is_of(self, content: bytes) -> bool:
        return self.index == xxhash.xxh3_128_hexdigest(content)


def read_upstream(folder: CacheFolder, url: str) -> Upstream | None:
    """What this cache remembers of an URL; ``None`` where it never met it. Raises `CorruptError`, `StoreError`."""
    entry = _read(folder).get(url)
    return None if entry is None else Upstream(entry["index"], entry["etag"])


def write_upstream(folder: CacheFolder, url: str, upstream: Upstream) -> None:
    """Remember it. Where nothing is new, nothing is written."""
    seen = _read(folder)
    if seen.get(url) != asdict(upstream):
        content = json.dumps({"seen": {**seen, url: asdict(upstream)}}, indent=1) + "\n"
        write_atomic(folder.path / UPSTREAM_NAME, content.encode())


def _read(folder: CacheFolder) -> dict[str, Any]:
    path = folder.path / UPSTREAM_NAME
    with store_errors(path, "read"):
        try:
            with open_file(path) as file:
                raw = file.read(_MOST) or b""
        except FileNotFoundError:
            return {}
    try:
        content = strict_json(raw)
        if not isinstance(content, dict) or misfit(content, _SHAPE) is not None:
            raise ValueError("it has another shape")
        return {url: {"index": each["index"], "etag": each["etag"]} for url, each in content["seen"].items()}
    except (ValueError, LookupError, RecursionError) as error:
        raise CorruptError(
            f"{shown(path)}, which says what was last pushed or pulled, is damaged: {shown(error)}",
            hint="Remove it: the cache is complete without. A push needs --replace then.",
        ) from error
