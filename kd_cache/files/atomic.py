"""Files that are whole or absent: written under a unique temporary name, made durable, then renamed into place."""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import stat
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kd_cache.errors import StoreError, shown

TEMPORARY = ".tmp-"
"""Temporary names start with this; readers ignore them, whoever left them behind."""
TEMPORARY_NAME = re.compile(r"\.tmp-[0-9]+-[0-9a-f]{16}(-old)?\Z")
"""Exactly as this module makes them: what is called otherwise is another's, and is never removed."""

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM)
_told: set[int] = set()
"""File systems of which a warning was given."""


def temporary_name() -> str:
    return f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"


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
    temporary = path.with_name(temporary_name())
    try:
        yield temporary
    except BaseException:
        with suppress(OSError):  # what went wrong first is what the user must read, not that the disk is gone for good
            temporary.unlink()
        raise
    temporary.unlink(missing_ok=True)


def write_atomic(
    path: Path, content: bytes | Iterable[bytes | memoryview], before: Callable[[], None] | None = None
) -> os.stat_result:
    """Write ``content``, whole or in pieces, durably: after this returns, ``path`` holds it even if the power fails.

    ``before`` is called when all is written, just before it is put in place; what it raises keeps the old file. Returns
    the status of the new file, which tells it from whatever another process puts in its place.
    """
    pieces = (content,) if isinstance(content, bytes) else content
    with store_errors(path, "write"), temporary_beside(path) as temporary:
        with temporary.open("xb") as file:
            file.writelines(pieces)  # buffered, so that it writes everything or raises
            file.flush()
            os.fsync(file.fileno())
            status = os.fstat(file.fileno())
        if before is not None:
            before()
        temporary.replace(path)
        sync_directory(path.parent)
        return status


def write_all(file: io.RawIOBase, content: bytes | bytearray) -> None:
    """Write every byte: one call may write less than it was given, just before a disk is full."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def sync_directory(directory: Path) -> None:
    """Make renames and removals in ``directory`` durable, where the file system can."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_opened_directory(descriptor, directory)
    finally:
        os.close(descriptor)


def sync_opened_directory(descriptor: int, directory: Path) -> None:
    """`sync_directory` of one that is open. Warns once where the file system has no fsync of folders, as old CIFS,
    VirtualBox and some FUSE have none: then the order of what is on the disk is its own. Any other error is raised.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _told:
            _told.add(device)
            warnings.warn(
                f"the file system of {shown(directory)} cannot fsync a folder ({error.strerror}): what is saved "
                "survives a killed process, but the last files may be missing after a power cut",
                stacklevel=2,
            )


def remove_files(directory: Path, paths: Collection[Path]) -> None:
    """Remove files of one folder, durably; some may be gone already."""
    for path in paths:
        with store_errors(path, "remove"):
            path.unlink(missing_ok=True)
    if paths:
        with store_errors(directory, "sync"):
            sync_directory(directory)


def remove_folder(directory: Path, names: Collection[str]) -> bool:
    """Remove these files of a folder, and the folder if nothing else is in it; whether it went. Raises ``OSError``."""
    for name in names:
        (directory / name).unlink(missing_ok=True)
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def make_directory(directory: Path) -> None:
    """Create ``directory`` and its parents, durably; a file in the way is a `StoreError`."""
    with store_errors(directory, "create the folder"):
        created = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        for path in created:
            sync_directory(path.parent)


def open_file(path: Path) -> io.FileIO:
    """Open a plain file for reading, unbuffered. Raises ``OSError`` for anything else, and never waits for a FIFO."""
    file = io.FileIO(path, "r", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "it is not a regular file")
