"""What storing logits in half precision, or only the most probable, costs, measured on the rows of the run."""

from __future__ import annotations

from typing import Any

import numpy as np

from kd_cache.store.origin import Origin
from kd_cache.store.topk import BLOCK, TEMPERATURES, TopKCodec


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


class TopKCost(StorageCost):
    """Running KL(fp32 ‖ stored, the rest spread evenly) at each temperature, and the probability that is the rest's."""

    def __init__(self, codec: TopKCodec) -> None:
        super().__init__("logits")
        self._codec = codec
        self._sums = np.zeros((len(TEMPERATURES), 2))  # of the KL, of the rest
        self._largest = np.zeros(len(TEMPERATURES))

    def add(self, exact: np.ndarray, stored: np.ndarray) -> None:
        """Count rows: ``[n, C]`` as computed, and ``[n, W]`` as stored."""
        self.rows += len(exact)
        step = max(1, BLOCK // self._codec.classes)
        for start in range(0, len(exact), step):
            rows, values = stored[start : start + step], exact[start : start + step].astype(np.float64)
            values -= values.max(axis=1, keepdims=True)
            powers = np.exp(values / TEMPERATURES[-1])
            for number in reversed(range(len(TEMPERATURES))):
                cost, rest = self._measured(values, powers, rows, TEMPERATURES[number])
                self._sums[number] += cost.sum(), rest.sum()
                self._largest[number] = max(self._largest[number], cost.max())
                powers *= powers  # the exponentials at half the temperature

    def _measured(
        self, values: np.ndarray, powers: np.ndarray, rows: np.ndarray, temperature: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """``[n]`` each: Σ p log p − Σ p log q, and the probability of the rest.

        ``values`` are logits ``[n, C]``, the largest 0, and ``powers`` their exponentials at the temperature.
        """
        total = powers.sum(axis=1)
        own = np.einsum("nc,nc->n", powers, values) / (total * temperature) - np.log(total)
        inside, rest = self._codec.softened(rows, temperature)
        ids = self._codec.split(rows)["ids"].astype(np.int64)
        probs = np.take_along_axis(powers, ids, axis=1) / total[:, None]
        is_some = np.isfinite(rest)
        each = np.where(is_some, rest, 0) - np.log(self._codec.classes - self._codec.k)
        others = np.where(is_some, 1 - probs.sum(axis=1), 0) * each
        return np.maximum(own - (probs * inside).sum(axis=1) - others, 0.0), np.exp(rest)

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"rows": self.rows}
        for number, temperature in enumerate(TEMPERATURES):
            mean, outside = (self._sums[number] / max(self.rows, 1)).tolist()
            at = "" if temperature == 1 else f"_t{temperature:g}"
            found |= {f"kl_mean{at}": mean, f"kl_max{at}": float(self._largest[number]), f"outside{at}": outside}
        return found


def cost_of(origin: Origin) -> StorageCost | None:
    """What measures the cost of storing rows so; ``None`` where there is none."""
    if origin.topk is not None:
        return TopKCost(origin.topk)
    return StorageCost(origin.value_kind) if origin.dtype == "fp16" else None


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
