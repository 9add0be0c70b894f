"""What libhdf5 reads and writes through, so that it never touches a file itself.

A write that fails inside libhdf5 (a full disk, a quota, an I/O error) was measured to crash the whole process when the
HDF5 file is closed. So libhdf5 writes into `Outlet`, which never fails to its face and keeps the first error for the
caller; and it reads from bytes that are already in memory and checked, so that it cannot see others.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np

from kd_cache.files.atomic import write_all

LIBVER = ("v110", "v110")
"""One fixed version of the format, both ends of the range."""


class Outlet:
    """A file to write HDF5 through. After the first error it swallows the rest; ``raise_failure`` tells of that error.

    Args:
        file: opened for reading and writing, unbuffered.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._failure: BaseException | None = None

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        return (self._file.read(size) or b"").ljust(size, b"\0")

    def write(self, content: bytearray) -> int:
        try:
            if self._failure is None:
                write_all(self._file, content)
        except BaseException as error:  # noqa: BLE001 (libhdf5 must not see it; raise_failure raises it again)
            self._failure = error
        return len(content)

    def truncate(self, size: int) -> int:
        try:
            if self._failure is None:
                self._file.truncate(size)
        except BaseException as error:  # noqa: BLE001 (as above)
            self._failure = error
        return size

    def flush(self) -> None:
        """Nothing is buffered here; the caller fsyncs."""


class _Image:
    """Bytes in memory that h5py takes for a file. Beyond their end is an error, never garbage."""

    def __init__(self, content: np.ndarray) -> None:
        self._content = content
        self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (len(self._content) if whence == io.SEEK_END else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        end = self._position + size
        if end > len(self._content):
            raise EOFError(f"{size} bytes at {self._position} end behind the file")
        return self._content[self._position : end].tobytes()


@contextmanager
def reading_hdf5(content: np.ndarray) -> Iterator[Any]:
    """The HDF5 file whose bytes are ``content`` (u1, the user block included)."""
    with h5py.File(_Image(content), "r", libver=LIBVER) as file:
        yield file


@contextmanager
def writing_hdf5(outlet: Outlet, user_block: int, mode: str = "w", aligned: int = 64) -> Iterator[Any]:
    """A new HDF5 file behind a user block, or (``r+``) one to go on with. Raises what kept it from being written.

    What gets its place meanwhile begins at a multiple of ``aligned`` bytes in the file.
    """
    size = {"userblock_size": user_block} if mode == "w" else {}
    file = h5py.File(outlet, mode, libver=LIBVER, alignment_threshold=1, alignment_interval=aligned, **size)
    try:
        yield file
    finally:
        try:
            file.close()
        except RuntimeError as error:  # an interrupt between two writes
            raise OSError(errno.EIO, f"HDF5 was interrupted ({error})") from error
    outlet.raise_failure()
