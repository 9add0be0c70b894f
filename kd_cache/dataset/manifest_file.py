"""The bytes of a manifest: one strict JSON value, or a row on every line of a ``.jsonl``, which may have any size."""

from __future__ import annotations

import codecs
import gc
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_cache.errors import ManifestError, shown
from kd_cache.files.strict_json import strict_json

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_BYTES = 1 << 30
"""A manifest above this is refused by default: a million samples take about 200 MB."""
MAX_LINE = 1 << 20


class TooLargeError(ValueError):
    """A file that is not read for its size."""


def has_lines(path: Path) -> bool:
    """Whether a manifest has a row on every line, by its name."""
    return path.suffix.lower() == ".jsonl"


def json_lines(path: Path, digest: _Hash) -> Iterator[tuple[int, Any]]:
    """The number of each line, from 1, and the JSON value in it; ``digest`` takes the file's bytes.

    Raises:
        ManifestError: the file cannot be read, or a line is not strict JSON (`parse_json`) or has more than a MiB.
    """
    with manifest_errors(path), _plain(path, None) as file:
        left = os.fstat(file.fileno()).st_size
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            digest.update(line)
            left -= len(line)
            where = f"{shown(path)}, line {number},"
            if len(line) > MAX_LINE:
                raise ManifestError(f"{where} has more than {MAX_LINE:,} bytes", hint="Put one row on each line.")
            yield number, parse_json(line, where, is_line=True)
        if left:
            raise ValueError("it changes while it is read")


def manifest_digest(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """`Manifest.digest` of a file, which is not parsed. Raises `ManifestError`: too large, or it cannot be read."""
    path = path.expanduser()
    with manifest_errors(path), _plain(path, None if has_lines(path) else max_bytes) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def manifest_errors(path: Path) -> Iterator[None]:
    """Turn what keeps a file from being read into a `ManifestError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ManifestError(
            f"cannot read the manifest {shown(path)}: {shown(reason)}",
            hint="A manifest with a row on every line, called ….jsonl, may have any size."
            if isinstance(error, TooLargeError)
            else "Pass the dataset JSON with --json-path.",
        ) from error


def read_plain(path: Path, most: int) -> bytes:
    """The bytes of a regular file."""
    with _plain(path, most) as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(size + 1)  # a read that names no size would go on for as long as the file grows
        if len(raw) != size:
            raise ValueError("it changes while it is read")
        return raw


@contextmanager
def _plain(path: Path, most: int | None) -> Iterator[BufferedReader]:
    """A regular file, opened: opening anything else could block, or never end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        if most is not None and found.st_size > most:
            raise TooLargeError(
                f"it has {found.st_size} bytes, expected at most {most}; --max-manifest-bytes permits more"
            )
        yield file


@contextmanager
def without_collection() -> Iterator[None]:
    """Making a million objects that all stay, Python would look through all of them for cycles again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def parse_json(raw: bytes, name: str, *, is_line: bool = False) -> Any:
    """Strict JSON: UTF-8 without byte-order mark, no duplicate keys, no NaN or Infinity. Raises `ManifestError`."""
    try:
        return strict_json(raw)
    except RecursionError as error:
        raise ManifestError(f"{name} is not a manifest: it is nested too deeply") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"{name} is not valid UTF-8 JSON: {shown(error)}", hint=None if is_line else _what_else(raw)
        ) from error


def _what_else(raw: bytes) -> str | None:
    """What may be done with a file that holds rows, but no JSON."""
    if raw.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "Save it as UTF-8 without a byte-order mark."
    first = raw[:4096].partition(b"\n")[0].strip()
    if not first.startswith((b"{", b"[")) and any(mark in first for mark in (b",", b"\t", b";")):
        return "It looks like a table: kd-cache prepare csv makes a manifest of one (kd-cache prepare csv --help)."
    if first.startswith(b"{") and first.endswith(b"}"):
        return "It looks like JSON lines: call it ….jsonl, or put all rows into one list, [row, row, …]."
    return None
