"""How much memory is free."""

from __future__ import annotations


def available_memory() -> int:
    """Bytes that can be used without pushing others out; 0 where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
