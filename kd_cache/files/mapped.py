"""A file's bytes as a read-only array: read where it is small, mapped where it is large.

Python's own maps each keep a file descriptor; an interrupted dump may leave more packs than a process may open. So the
map is made by the C library and the file is closed. It is private, because some file systems have no shared maps (FUSE
with direct_io, many cloud and archive mounts); where they have no maps at all, the file is read into memory.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import weakref

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
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
    held = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(held, _LIBC.munmap, address, size).atexit = False  # arrays may outlive that
    return np.frombuffer(memoryview(held).toreadonly(), np.uint8)


def _mapped(descriptor: int, size: int) -> int | None:
    address: int = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 0)
    if address != _FAILED:
        return address
    code = ctypes.get_errno()
    if code in _NO_MAPS:
        return None
    raise OSError(code, os.strerror(code))


def expect_random(array: np.ndarray) -> None:
    """Have the kernel read the pages of a map that are asked for and not their neighbours. Small packs are no maps."""
    held: object = array
    while isinstance(held, np.ndarray | memoryview):
        held = held.base if isinstance(held, np.ndarray) else held.obj
    if isinstance(held, ctypes.Array) and hasattr(mmap, "MADV_RANDOM"):
        _LIBC.madvise(ctypes.addressof(held), ctypes.sizeof(held), mmap.MADV_RANDOM)
