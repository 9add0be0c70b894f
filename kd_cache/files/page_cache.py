"""Advice to the kernel about mapped packs: bring them in now, or do not read around what is asked for."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import numpy as np

_WILL_NEED = getattr(mmap, "MADV_WILLNEED", None)
_POPULATE_READ = 22 if sys.platform == "linux" else None  # since 5.14; Python has no name for it
_RANDOM = getattr(mmap, "MADV_RANDOM", None)


def read_ahead(array: np.ndarray) -> None:
    """Have the kernel read the file behind a mapped array, from its start to its end, while we go on."""
    _advise(array, _WILL_NEED)


def populate(array: np.ndarray) -> None:
    """Read what is missing and enter every page into this process's tables, so that no read has to wait for that.

    Random rows of a freshly mapped file cost a page fault each, which takes longer than copying them.
    """
    with suppress(OSError):  # an older kernel: the faults come one by one, as ever
        _advise(array, _POPULATE_READ)


def expect_random(array: np.ndarray) -> None:
    """Have the kernel read the pages that are asked for and not their neighbours."""
    _advise(array, _RANDOM)


def available_memory() -> int:
    """Bytes that can be used without pushing others out; 0 where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def _advise(array: np.ndarray, advice: int | None) -> None:
    """Advice for the whole file of an array; none for small packs, which are read and not mapped."""
    mapping: object = array
    while isinstance(mapping, np.ndarray | memoryview):
        mapping = mapping.base if isinstance(mapping, np.ndarray) else mapping.obj
    if isinstance(mapping, mmap.mmap) and advice is not None:
        mapping.madvise(advice)
