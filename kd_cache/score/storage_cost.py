"""What storing logits in half precision costs, measured on the rows of the run."""

from __future__ import annotations

from typing import Any

import numpy as np


class StorageCost:
    """Running KL(fp32 ‖ stored) at temperature 1, and how often the largest class changed.

    For ``probs`` and ``sigmoid`` rows, where that KL has no meaning, the largest absolute error stands in for it.
    """

    def __init__(self, value_kind: str) -> None:
        self.value_kind = value_kind
        self.rows = 0
        self.flips = 0
        self.sum = 0.0
        self.largest = 0.0

    def add(self, exact: np.ndarray, stored: np.ndarray) -> None:
        """Count rows ``[n, C]``: as computed (float32) and as stored."""
        if not len(exact):
            return
        exact64, stored64 = exact.astype(np.float64), stored.astype(np.float64)
        self.rows += len(exact)
        self.flips += int((exact64.argmax(axis=1) != stored64.argmax(axis=1)).sum())
        if self.value_kind in ("logits", "log_probs"):
            cost = kl_divergence(exact64, stored64)
        else:
            cost = np.abs(exact64 - stored64).max(axis=1)
        self.sum += float(cost.sum())
        self.largest = max(self.largest, float(cost.max()))

    def as_json(self) -> dict[str, Any]:
        measure = "kl" if self.value_kind in ("logits", "log_probs") else "absolute_error"
        return {
            "rows": self.rows,
            f"{measure}_mean": self.sum / max(self.rows, 1),
            f"{measure}_max": self.largest,
            "argmax_flips": self.flips,
        }


def kl_divergence(of: np.ndarray, to: np.ndarray) -> np.ndarray:
    """``[n]`` KL(softmax(of) ‖ softmax(to)) of ``[n, C]`` float64 logits, in nats."""
    log_p, log_q = log_softmax(of), log_softmax(to)
    # Rounding may leave a sum of tiny terms below zero; a divergence is not.
    cost: np.ndarray = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0)
    return cost


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """``[n, C]`` log probabilities of ``[n, C]`` logits, in their own precision."""
    shifted: np.ndarray = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
