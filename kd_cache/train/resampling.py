"""How sure a figure is: the bootstrap (Efron 1979) over whole locations.

The clips of one location are right and wrong together: drawn one by one they would claim more certainty than there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from kd_cache.score.storage_cost import log_softmax

DRAWS: Final = 1000
COVERED: Final = 0.95
Interval = tuple[float, float]
_SUMS: Final = ("rows", "right", "log_loss", "brier")


@dataclass(frozen=True)
class Cells:
    """Sums over the samples of one location, group and class each: all that any figure of drawn locations needs.

    Attributes:
        places: ``[M]``, numbers or text.
        groups: ``[M]`` text.
        labels: ``[M]`` int64 in [0, ``classes``).
        sums: ``[M, 4]`` float64: samples, those decided rightly, their log loss, their Brier score.
    """

    places: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    sums: np.ndarray
    classes: int

    @classmethod
    def of(
        cls, logits: np.ndarray, labels: np.ndarray, places: np.ndarray, groups: Sequence[str] | None = None
    ) -> Cells:
        """Of logits ``[N, C]``, labels ``[N]`` in [0, C), and locations ``[N]``, equal where they are."""
        labels, count = labels.astype(np.int64), len(labels)
        log_probs = log_softmax(logits.astype(np.float64))
        truth = np.eye(logits.shape[1])[labels]
        each = np.stack(
            [
                np.ones(count),
                logits.argmax(axis=1) == labels,
                -log_probs[np.arange(count), labels],
                ((np.exp(log_probs) - truth) ** 2).sum(axis=1),
            ],
            axis=1,
        )
        names, place = np.unique(places, return_inverse=True)
        kinds, group = np.unique(np.asarray(groups or [""] * count), return_inverse=True)
        cells, cell = np.unique(np.stack([place, group, labels], axis=1), axis=0, return_inverse=True)
        sums = np.stack([np.bincount(cell.reshape(-1), column) for column in each.T], axis=1)
        return cls(names[cells[:, 0]], kinds[cells[:, 1]], cells[:, 2], sums, logits.shape[1])

    def as_json(self) -> dict[str, Any]:
        """A list per column."""
        columns = {"location": self.places, "group": self.groups, "label": self.labels}
        found = {name: column.tolist() for name, column in columns.items()}
        return {"classes": self.classes, **found, **dict(zip(_SUMS, self.sums.T.tolist(), strict=True))}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Cells:
        """As `as_json` gave it."""
        places, groups = np.array(content["location"]), np.array(content["group"], dtype=str)
        sums = np.array([content[name] for name in _SUMS], dtype=np.float64).T
        return cls(places, groups, np.array(content["label"], np.int64), sums, int(content["classes"]))

    def of_group(self, group: str) -> Cells:
        """Those of one group."""
        mine = self.groups == group
        return Cells(self.places[mine], self.groups[mine], self.labels[mine], self.sums[mine], self.classes)

    def drawn(self, seed: int = 0) -> dict[str, np.ndarray] | None:
        """Accuracy, macro accuracy, log loss and Brier score of each draw, ``[draws]``; ``None`` of a single location.

        The draws depend on the number of locations and the seed alone, so that figures of two nets on the same samples
        are of the same draws. A class that a draw lacks does not count in its macro accuracy.
        """
        names, place = np.unique(self.places, return_inverse=True)
        if len(names) < 2:
            return None
        cell, size = place * self.classes + self.labels, len(names) * self.classes
        chosen = draws(len(names), seed)
        by_class = (np.bincount(cell, column, minlength=size).reshape(len(names), -1) for column in self.sums.T)
        rows, right, loss, brier = (chosen @ sums for sums in by_class)  # [draws, C]
        recall = np.divide(right, rows, out=np.zeros_like(rows), where=rows > 0)
        return {
            "accuracy": right.sum(axis=1) / rows.sum(axis=1),
            "macro_accuracy": recall.sum(axis=1) / (rows > 0).sum(axis=1),
            "log_loss": loss.sum(axis=1) / rows.sum(axis=1),
            "brier": brier.sum(axis=1) / rows.sum(axis=1),
        }

    def intervals(self, seed: int = 0) -> dict[str, Interval] | None:
        """Where each figure lies with 95 % confidence."""
        drawn = self.drawn(seed)
        return None if drawn is None else {name: interval_of(values) for name, values in drawn.items()}


def interval_of(drawn: np.ndarray) -> Interval:
    """Between which values 95 % of the draws lie."""
    low, high = np.quantile(drawn, [(1 - COVERED) / 2, (1 + COVERED) / 2]).tolist()
    return low, high


@lru_cache(maxsize=8)
def draws(count: int, seed: int) -> np.ndarray:
    """``[draws, count]`` float64: how often each location is in each draw."""
    return np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=DRAWS).astype(np.float64)
