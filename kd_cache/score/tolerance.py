"""What difference between two scorings is still the same number.

Relative to the largest centred logit of the row; batches of another size alone move float32 by up to 6e-6. Top-k rows
are compared in what they say: relative to their largest log-probability.
"""

from __future__ import annotations

import numpy as np

from kd_cache.store.topk import TopKCodec

TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 1e-2, "bf16": 5e-2}
_MOST = 1e-3


def most_allowed(precision: str) -> float:
    """What no teacher's own noise excuses: rows farther apart are other rows."""
    return max(_MOST, 2 * TOLERANCE[precision])


def deviation(now: np.ndarray, stored: np.ndarray, value_kind: str) -> float:
    """Largest difference of two rows ``[C]`` relative to the largest magnitude; logits are centred first."""
    a, b = _centred(now, value_kind), _centred(stored, value_kind)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float32).tiny))


def agrees(now: np.ndarray, stored: np.ndarray, value_kind: str, tolerance: float) -> bool:
    """Whether two rows are the same result within ``tolerance``, and name the same class where that is clear."""
    a, b = _centred(now, value_kind), _centred(stored, value_kind)
    allowed = np.full(len(b), tolerance * np.abs(b).max())
    if stored.dtype == np.float16:
        allowed += np.spacing(np.abs(stored)).astype(np.float64)
    if not (np.abs(a - b) <= allowed).all():  # also where either is not finite
        return False
    ranked = np.sort(b)
    clear = len(b) > 1 and ranked[-1] - ranked[-2] > 2 * allowed.max()
    return not clear or bool(a.argmax() == b.argmax())


def topk_deviation(now: np.ndarray, stored: np.ndarray, codec: TopKCodec) -> float:
    """How far logits ``[C]`` are from a top-k row, beyond a step of float16, relative to its largest logarithm.

    The log-probabilities that the stored ids have now, and the K largest of now whichever they are, must both be those
    of the row: so equal ones may change places. What all others have together must be too, and the sum of all.
    """
    own, row = (codec.split(each)[0] for each in (codec.encode(now[None]), stored[None]))
    kept, rest, whole = (row[name].astype(np.float64) for name in ("log_probs", "rest", "logsumexp"))
    step = np.spacing(np.abs(row["log_probs"])).astype(np.float64)
    at_ids = now[row["ids"]].astype(np.float64) - own["logsumexp"]
    others = np.zeros_like(rest)  # also where nothing is left
    np.subtract(own["rest"], rest, out=others, where=own["rest"] != row["rest"])
    size = max(np.abs(kept).max(), np.abs(rest[np.isfinite(rest)]).max(initial=1e-6))
    apart = [
        (np.abs(at_ids - kept) - step).max(),
        (np.abs(own["log_probs"] - kept) - step).max(),
        np.abs(others).max() / 2,  # the logits and the sum of all may both have moved
        np.abs(own["logsumexp"] - whole) * size / max(abs(whole), size),
    ]
    return float(max(*apart, 0.0) / size)


def _centred(row: np.ndarray, value_kind: str) -> np.ndarray:
    values = row.astype(np.float64)
    centred: np.ndarray = values - values.mean() if value_kind in ("logits", "log_probs") else values
    return centred
