"""The first 512 bytes of a pack: what it is, its digest, and which keys it holds.

    0     8   magic  b"KDCPACK\\n"
    8     4   format version, little-endian
    12    8   length of everything after the first 512 bytes, little-endian
    20    16  xxh3-128 of everything after the first 512 bytes, big-endian; also the <digest> in the file's name
    36    16  first key          ┐
    52    16  last key           │ since format 2; zeros in format 1
    68    8   rows               │
    76    8   xxh3-64 of these   ┘
    84    428 zeros

The keys are there so that who needs some rows need not open every pack. They are believed for nothing else: whoever
opens a pack compares them with what it holds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import xxhash

from kd_cache.files.atomic import open_file
from kd_cache.store.origin import FILE_VERSION

MAGIC = b"KDCPACK\n"
USER_BLOCK = 512
_HEAD = struct.Struct("<8sIQ16s")
_SPAN = struct.Struct("<16s16sQ")
_SUM = struct.Struct("<Q")


@dataclass(frozen=True)
class Span:
    """First and last key of a pack, and how many rows it has."""

    first: bytes
    last: bytes
    rows: int

    @classmethod
    def of(cls, keys: np.ndarray) -> Self:
        """That of ascending keys ``[N, 16]``; of none one that meets no other."""
        if not len(keys):
            return cls(b"\xff" * 16, b"", 0)
        return cls(keys[0].tobytes(), keys[-1].tobytes(), len(keys))

    def meets(self, other: Span) -> bool:
        return self.first <= other.last and other.first <= self.last


def is_apart(path: Path, needed: Span) -> bool:
    """Whether a pack holds none of the keys ``needed``, as far as its first bytes can tell: they alone are read."""
    try:
        with open_file(path) as file:
            block = file.read(USER_BLOCK) or b""
    except OSError:  # what is wrong with it, who opens it will say
        return False
    span = Preamble.read(block).span if len(block) == USER_BLOCK else None
    return span is not None and not span.meets(needed)


@dataclass(frozen=True)
class Preamble:
    """What the first bytes say. ``span`` is ``None`` in format 1, and where its bytes do not match their hash."""

    magic: bytes
    version: int
    length: int
    digest: bytes
    span: Span | None

    @classmethod
    def read(cls, block: bytes) -> Self:
        """Of at least `USER_BLOCK` bytes, whatever they are."""
        body = block[_HEAD.size : _HEAD.size + _SPAN.size]
        (stored,) = _SUM.unpack_from(block, _HEAD.size + _SPAN.size)
        magic, version, length, digest = _HEAD.unpack_from(block)
        known = (magic, version) == (MAGIC, FILE_VERSION) and stored == xxhash.xxh3_64_intdigest(body)
        return cls(magic, version, length, digest, Span(*_SPAN.unpack(body)) if known else None)

    @classmethod
    def new(cls, length: int, digest: bytes, keys: np.ndarray) -> Self:
        return cls(MAGIC, FILE_VERSION, length, digest, Span.of(keys))

    def block(self) -> bytes:
        """The `USER_BLOCK` bytes that say this, and nothing besides."""
        content = _HEAD.pack(self.magic, self.version, self.length, self.digest)
        if self.span is not None:
            body = _SPAN.pack(self.span.first, self.span.last, self.span.rows)
            content += body + _SUM.pack(xxhash.xxh3_64_intdigest(body))
        return content.ljust(USER_BLOCK, b"\0")
