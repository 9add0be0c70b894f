"""How long work tells what it is doing, without knowing who listens; and how it is told to stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Stopped(SystemExit):
    """A signal asked this process to end. Any other ``SystemExit`` comes from somebody's code."""


class Watcher:
    """Hears of a run's stages and remarks. This one ignores them; the command line shows them."""

    def stage(self, name: str, total: int, unit: str = "samples") -> None:
        """A stage of ``total`` samples begins; with ``unit`` "MB" of so many bytes."""

    def advance(self, count: int) -> None:
        """So many more samples of the current stage are done."""

    def saved(self, count: int) -> None:
        """So many samples that the current stage advanced over are durable from now on; bad ones never are."""

    def parts(self, done: int, total: int) -> None:
        """So many of the parts that the work was split into are done."""

    def busy(self, shares: Mapping[str, float]) -> None:
        """The part of the time that each stage of the work has been busy, from 0 to 1, the busiest first."""

    def epoch(self, measured: Mapping[str, Any]) -> None:
        """An epoch of a training is done: ``stage``, ``epoch``, ``train_loss`` and what validation gave."""

    def note(self, text: str) -> None:
        """Something a person should know: what was found, decided or healed."""
