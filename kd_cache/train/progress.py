"""Where a training is, what each epoch was worth, and which one is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Rank = tuple[bool, float, float]
ACCURACY: Final = "accuracy"
MACRO: Final = "macro_accuracy"
LAST_EPOCH: Final = "last"
"""What the epoch that is kept is chosen by: a figure of validation, or none (the last one is kept)."""


@dataclass
class Progress:
    """Where a training is: epochs done in the current stage, and what was measured so far.

    ``select`` is what the kept epoch is chosen by, ``best`` its `rank`. ``stage_best`` and ``stage_loss`` are the best
    rank and the lowest loss of the stage, ``since_best`` the epochs since either improved: over few clips accuracy
    moves in steps.
    ``averaged`` counts the steps that are in the averaged weights.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    best: Rank | None = None
    stage_best: Rank | None = None
    stage_loss: float | None = None
    since_best: int = 0
    averaged: int = 0
    random_loss: float | None = None
    start_loss: float | None = None
    diverging: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    drifted: list[str] = field(default_factory=list)
    select: str = ACCURACY

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Progress:
        """Raises ``TypeError`` for what is no progress."""
        found = cls(**content)
        for name in ("best", "stage_best"):
            rank = getattr(found, name)
            setattr(found, name, None if rank is None else tuple(rank))
        return found

    def add(self, measured: dict[str, Any]) -> bool:
        """Count an epoch; whether it is the best so far."""
        self.history.append(measured)
        rank, loss = self.rank(measured), measured["val_log_loss"]
        self.since_best += 1
        if self.stage_loss is None or loss < self.stage_loss:
            self.stage_loss, self.since_best = loss, 0
        keeps_all = self.select == LAST_EPOCH
        if self.stage_best is None or keeps_all or rank > self.stage_best:
            self.stage_best, self.since_best = rank, 0
        is_best = self.best is None or keeps_all or rank > self.best
        if is_best:
            self.best = rank
        return is_best

    def end_stage(self) -> None:
        self.stage, self.epoch, self.step, self.since_best = self.stage + 1, 0, 0, 0
        self.stage_best = self.stage_loss = None

    @property
    def best_epoch(self) -> int:
        """The one that is kept, counted over all stages, from 1; 0 before there is any."""
        ranks = [self.rank(row) for row in self.history]
        if not ranks or self.select == LAST_EPOCH:
            return len(ranks)
        return ranks.index(max(ranks)) + 1

    @property
    def has_learnt(self) -> bool:
        """Whether any epoch was below random weights' loss."""
        return any(self._is_below_chance(row) for row in self.history)

    def rank(self, measured: Mapping[str, Any]) -> Rank:
        """An epoch's validation. By accuracy: below random weights' loss or not, accuracy, −log loss; by macro
        accuracy: that and −log loss. The higher the better.
        """
        loss = measured["val_log_loss"]
        if self.select == ACCURACY:
            return self._is_below_chance(measured), measured["val_accuracy"], -loss
        return True, measured["val_macro_accuracy"], -loss

    def _is_below_chance(self, measured: Mapping[str, Any]) -> bool:
        return self.random_loss is None or bool(measured["val_log_loss"] < self.random_loss)
