"""Whether vectors are what their teacher says they are: a softmax stored as "logits" would be softened twice."""

from __future__ import annotations

import numpy as np

_FEWEST = 4  # so few rows may look like anything by chance
_TOLERANCE = 2e-2  # half precision rounds a sum of probabilities this far


def contradiction(value_kind: str, rows: np.ndarray) -> str | None:
    """Why rows ``[n, C]`` cannot be of this kind; ``None`` where nothing speaks against it.

    Looks at a whole batch: every row sums to one and none is negative (probabilities), or every row's exponentials do
    (log probabilities). Fewer than four rows, or a single class, prove nothing.
    """
    if len(rows) < _FEWEST or rows.shape[1] < 2:
        return None
    values = rows.astype(np.float64)
    within = bool((values >= 0).all() and (values <= 1 + _TOLERANCE).all())
    probs = within and bool((np.abs(values.sum(axis=1) - 1) < _TOLERANCE).all())
    log_probs = bool((values <= _TOLERANCE).all() and (np.abs(np.exp(values).sum(axis=1) - 1) < _TOLERANCE).all())
    if value_kind == "logits" and (probs or log_probs):
        return f"are {'probabilities' if probs else 'log probabilities'}, not logits: every row sums to one"
    if value_kind == "probs" and not probs:
        return "are not probabilities: rows do not sum to one"
    if value_kind == "log_probs" and not log_probs:
        return "are not log probabilities: their exponentials do not sum to one"
    if value_kind == "sigmoid" and not within:
        return "are not sigmoid outputs: they do not lie between 0 and 1"
    return None
