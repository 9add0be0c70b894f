"""How long work tells what it is doing, without knowing who listens."""

from __future__ import annotations


class Watcher:
    """Hears of a run's stages and remarks. This one ignores them; the command line shows them."""

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` samples begins."""

    def advance(self, count: int) -> None:
        """So many more samples of the current stage are done."""

    def saved(self) -> None:
        """Everything that the current stage has advanced over is durable from now on."""

    def note(self, text: str) -> None:
        """Something a person should know: what was found, decided or healed."""
