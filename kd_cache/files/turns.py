"""Taking turns at a folder: whoever would change it waits for the one who does, where the file system can tell.

No promise rests on this: a network's file system may know no locks, and nobody waits for ever. It only keeps processes
on one machine from working against each other.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 60.0
"""Seconds after which one goes on without its turn: the other may have been stopped (Ctrl-Z) and never end."""
_PAUSE = 0.02


@contextmanager
def in_turn(directory: Path) -> Iterator[None]:
    """Hold a folder's lock, which leaves no file behind and goes with the process that holds it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # what is wrong with it, the work itself will say
        yield
        return
    try:
        until = time.monotonic() + PATIENCE
        while _is_held(descriptor) and time.monotonic() < until:
            time.sleep(_PAUSE)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has it open too
    finally:
        with suppress(OSError):  # nothing was written through it
            os.close(descriptor)


def _is_held(descriptor: int) -> bool:
    """Whether somebody else has the lock; it is ours otherwise, if the file system knows locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # ENOLCK, ENOTSUP, EBADF: no locks here
        return False
    return False
