"""Files that are whole or absent: written under a unique temporary name, made durable, then renamed into place."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kd_cache.errors import StoreError, shown

TEMPORARY = ".tmp-"
"""Temporary names start with this; readers ignore them, whoever left them behind."""


@contextmanager
def store_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an ``OSError`` into a `StoreError` that names the path and the cause."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot {doing} {shown(path)}: {error.strerror or error}") from error


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A unique name in the folder of ``path``; whatever is still there at the end is removed."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
    try:
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` durably: after this returns, ``path`` holds it even if the power fails."""
    with store_errors(path, "write"), temporary_beside(path) as temporary:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Create ``directory`` and its parents; a file in the way is a `StoreError`."""
    with store_errors(directory, "create the folder"):
        directory.mkdir(parents=True, exist_ok=True)
