"""A file's bytes as a read-only array: read where it is small, mapped where it is large.

Python's own maps each keep a file descriptor; an interrupted dump may leave more packs than a process may open. So the
map is made by the C library and the file is closed. It is private, because some file systems have no shared maps (FUSE
with direct_io, many cloud and archive mounts); where they have no maps at all, the file is read into memory.

Parts of many files can be mapped side by side, as one array (`side_by_side`).
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kd_cache.files.atomic import open_file

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FIXED = 0x10
"""``MAP_FIXED`` of Linux and macOS."""
_FAILED = ctypes.c_void_p(-1).value
_NO_MAPS = (errno.ENODEV, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS)


def file_content(file: io.FileIO, mapped_from: int) -> np.ndarray:
    """``[size]`` u1, the bytes of an opened file, which may be closed afterwards. Raises ``OSError``.

    Args:
        mapped_from: files of at least so many bytes are mapped. One that is cut short later ends who reads it (SIGBUS).
    """
    size = os.fstat(file.fileno()).st_size
    address = _mapped(file.fileno(), size) if size >= max(mapped_from, 1) else None
    if address is None:
        return np.frombuffer(file.readall(), np.uint8)
    held = _held(address, size)
    held.version = _version(file)  # type: ignore[attr-defined]
    return np.frombuffer(memoryview(held).toreadonly(), np.uint8)


def side_by_side(parts: Iterable[tuple[np.ndarray, Path, int]], size: int) -> np.ndarray | None:
    """``[size]`` u1: the bytes of several arrays, each at its place in one stretch of addresses; zeros between them.

    Arrays that lie in a mapped file are mapped once more from it, others are copied.

    Args:
        parts: contiguous arrays, the file that each was read from, and its place, a multiple of a page's size.

    Returns ``None`` where that cannot be had: another system, a file system without maps, an array that begins within
    a page of its file, a file that is another by now.
    """
    if sys.platform not in ("linux", "darwin"):
        return None
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if address == _FAILED:
        return None
    held = _held(address, size)
    try:
        if not all(_is_put(array, path, address + place) for array, path, place in parts):
            return None
    except OSError:
        return None
    return np.frombuffer(memoryview(held).toreadonly(), np.uint8)


def expect_random(array: np.ndarray) -> None:
    """Have the kernel read the pages of a map that are asked for and not their neighbours. Small packs are no maps."""
    held = _map_of(array)
    if held is not None and hasattr(mmap, "MADV_RANDOM"):
        _LIBC.madvise(ctypes.addressof(held), ctypes.sizeof(held), mmap.MADV_RANDOM)


def _mapped(descriptor: int, size: int) -> int | None:
    address: int = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 0)
    if address != _FAILED:
        return address
    code = ctypes.get_errno()
    if code in _NO_MAPS:
        return None
    raise OSError(code, os.strerror(code))


def _held(address: int, size: int) -> ctypes.Array[ctypes.c_ubyte]:
    """Mapped addresses that are given back when no array looks at them any more."""
    held = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(held, _LIBC.munmap, address, size).atexit = False  # arrays may outlive that
    return held


def _map_of(array: np.ndarray) -> ctypes.Array[ctypes.c_ubyte] | None:
    """The map that an array is a view of; ``None`` where its bytes were read."""
    held: object = array
    while isinstance(held, np.ndarray | memoryview):
        held = held.base if isinstance(held, np.ndarray) else held.obj
    return held if isinstance(held, ctypes.Array) else None


def _version(file: io.FileIO) -> tuple[int, ...]:
    """What tells a file from another of its name."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_put(array: np.ndarray, path: Path, address: int) -> bool:
    """Have an array's bytes at an address, within a stretch that is reserved. Raises ``OSError``."""
    begin: int = array.ctypes.data
    held = _map_of(array)
    if held is None:
        anywhere = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
        if _LIBC.mmap(address, array.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, anywhere, -1, 0) != address:
            return False
        ctypes.memmove(address, begin, array.nbytes)
        return True
    offset = begin - ctypes.addressof(held)
    if offset % mmap.PAGESIZE:
        return False
    with open_file(path) as file:
        if _version(file) != getattr(held, "version", None):
            return False
        there = _LIBC.mmap(address, array.nbytes, mmap.PROT_READ, mmap.MAP_PRIVATE | _FIXED, file.fileno(), offset)
    return bool(there == address)
