"""What one task does: score a part, in a process that keeps its teachers for the next part."""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kd_cache.errors import KDCacheError, StoreError, shown
from kd_cache.score.job import DumpReport
from kd_cache.watch import Watcher

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_")
"""Variables of whoever started the node: they say nothing of a task."""
_LOOK = 0.5
"""Seconds between looks for the driver's file."""


class Order(Protocol):
    """What every task is told; it travels by pickle."""

    @property
    def proof(self) -> Path | None:
        """A file that the driver made in the cache root for this run, and takes away to interrupt it; absolute.

        ``None`` where machines share no disk.
        """

    def dump(self, part: tuple[int, int], watcher: Watcher) -> DumpReport:
        """Dump this part; data and teachers are `kept` for the next one."""


@dataclass(frozen=True)
class PartReport:
    """What became of a part: all that a task sends back, a kilobyte at most.

    ``teachers`` are by name how many samples were scored, skipped, scored again by reason, and how many the cache holds
    that are not permitted.
    """

    samples: int
    scored: int
    teachers: Mapping[str, tuple[int, int, Mapping[str, int], int]]
    notes: list[str] = field(default_factory=list)


class _Notes(Watcher):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        if sum(map(len, self.notes)) + len(text) <= 400:
            self.notes.append(text)


def score_part(order: Order, part: tuple[int, int]) -> PartReport | KDCacheError:
    """Score part i of n. An error is given back, not raised: what a task raises comes in Ray's words."""
    for name in [name for name in os.environ if name.startswith(_LAUNCHERS)]:
        del os.environ[name]
    watcher = _Notes()
    try:
        with nullcontext() if order.proof is None else _interruptible(order.proof):
            report = order.dump(part, watcher)
    except KDCacheError as error:
        # Of a class that the driver has, whatever a user's code made of it.
        kinds = (each for each in type(error).__mro__ if each.__module__ == KDCacheError.__module__)
        kind: type[KDCacheError] = next(kinds)
        return kind(error.message, hint=error.hint)
    except KeyboardInterrupt:
        return KDCacheError("a part was interrupted: the driver's file in the cache root is gone", hint="Run it again.")
    except Exception as error:  # noqa: BLE001 (what a worker prints is lost: the error must say it)
        return KDCacheError(f"unexpected {type(error).__name__}: {shown(error)}")
    found = report.teachers.items()
    teachers = {name: (each.scored, each.skipped, dict(each.rescored), each.dropped) for name, each in found}
    return PartReport(report.part_size, report.samples_scored, teachers, watcher.notes)


@contextmanager
def _interruptible(proof: Path) -> Iterator[None]:
    """As Ctrl-C would, the end of ``proof`` interrupts what is done here: then it commits what it has scored.

    Not `ray.cancel`, which aborts the driver (Ray 2.60) if a task ends meanwhile. Raises `StoreError` where the file
    never was: two disks of one path are the quietest way to lose a run.
    """
    if not proof.exists():
        raise StoreError(
            f"the machine {os.uname().nodename} does not see the cache root {shown(proof.parent)} of the driver, where "
            "what it scores is to be kept",
            hint="Name a folder that all machines share with --cache-root, or pass --ray-storage URL.",
        )
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_LOOK):
            if not proof.exists():
                _thread.interrupt_main()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


_KEPT: dict[Hashable, tuple[Hashable, Any]] = {}


def kept(what: Hashable, path: Path | None, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, made once in this process, and anew when the file at ``path`` is another."""
    state: Hashable = None
    with suppress(OSError):  # whoever reads it says what is wrong with it
        if path is not None:
            status = path.stat()
            state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if what not in _KEPT or _KEPT[what][0] != state:
        _KEPT.pop(what, None)  # before the next one is there: memory may hold one only
        _KEPT[what] = state, make()
    return _KEPT[what][1]
