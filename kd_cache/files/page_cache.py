"""Free memory, and advice to the kernel about maps that do not fit into it."""

from __future__ import annotations

import mmap

import numpy as np

_RANDOM = getattr(mmap, "MADV_RANDOM", None)


def expect_random(array: np.ndarray) -> None:
    """Have the kernel read the pages that are asked for and not their neighbours. Small packs are no maps."""
    mapping: object = array
    while isinstance(mapping, np.ndarray | memoryview):
        mapping = mapping.base if isinstance(mapping, np.ndarray) else mapping.obj
    if isinstance(mapping, mmap.mmap) and _RANDOM is not None:
        mapping.madvise(_RANDOM)


def available_memory() -> int:
    """Bytes that can be used without pushing others out; 0 where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
