"""Whether vectors are what their teacher says they are: a softmax stored as "logits" would be softened twice.

Looked at over all rows of a run, whatever batches they come in. A run is refused only where its numbers obey a law that
logits do not know: sums of one, of a hundred, of any other constant, or bounds that they crowd. Where that is merely
plausible it is a remark.
"""

from __future__ import annotations

import numpy as np

_SURE = 8  # so few numbers may sum to one by chance
_MANY = 40  # so few numbers may lie between two bounds by chance
_TOLERANCE = 2e-2  # so far a sum of probabilities is rounded in half precision, or in a table of few digits
_EXACT = 1e-3  # sums of a net that says nearly the same of every sample must be nearer to prove anything
_MOVED = 0.1  # a value that differs so much between samples is no bias
_SPREAD = 0.5  # numbers closer together may be the logits of a net that has learnt nothing yet
_WIDE = 0.18  # of sigmoids of numbers as large as one: their standard deviation is 0.2
_SEVERAL = 8  # classes, of which each would have to have the same bias
_CROWDED = -0.05  # a log sigmoid that is sure comes so near to its bound


class RowCheck:
    """Watches the finite rows of one teacher, block by block. Memory and time do not grow with what it has seen.

    ``contradiction`` may be asked after each block: what it says of few rows it would say of any more like them.
    """

    def __init__(self, value_kind: str) -> None:
        self._kind = value_kind
        self._rows = self._constant = self._columns = 0
        self._least, self._most = np.inf, -np.inf
        self._sums = (np.inf, -np.inf)
        self._weights = (np.inf, -np.inf)  # of rows' exponentials
        self._total = self._squares = self._weight = 0.0  # of all values, of their squares, of all exponentials
        self._crowded = self._topped = 0  # rows whose largest value is next to zero; whose is exactly zero
        self._first: np.ndarray | None = None
        self._moved = 0.0  # farthest that a value is from the first row's

    def add(self, rows: np.ndarray) -> None:
        """Look at rows ``[n, C]``, all finite."""
        if not len(rows):
            return
        values = rows.astype(np.float64)  # of the largest floats no difference fits into float32
        self._first = values[0].copy() if self._first is None else self._first
        self._moved = max(self._moved, float(np.abs(values - self._first).max()))
        self._rows, self._columns = self._rows + len(rows), rows.shape[1]
        least, most = rows.min(axis=1), rows.max(axis=1)
        self._constant += int((least == most).sum())
        self._least, self._most = min(self._least, float(least.min())), max(self._most, float(most.max()))
        if self._least < -_TOLERANCE and self._most > _TOLERANCE:
            return  # of both signs: no law that is looked for allows that
        sums = values.sum(axis=1)
        self._sums = _widened(self._sums, sums)
        self._total += float(sums.sum())
        self._squares += float(np.square(values).sum())
        if self._most <= _TOLERANCE:
            weights = np.exp(values).sum(axis=1)
            self._weights = _widened(self._weights, weights)
            self._weight += float(weights.sum())
            self._crowded += int((most > _CROWDED).sum())
            self._topped += int((most == 0).sum())

    def contradiction(self) -> str | None:
        """Why the rows cannot be of their kind; ``None`` where nothing speaks against it. One class proves nothing."""
        if self._columns < 2 or self._numbers < _SURE:
            return None
        if self._kind == "logits":
            return self._law()
        if self._kind == "probs" and not self._are_probs:
            return "are not probabilities: rows do not sum to one"
        if self._kind == "log_probs" and not self._are_log_probs:
            return "are not log probabilities: their exponentials do not sum to one"
        if self._kind == "sigmoid" and not self._are_shares:
            return "are not sigmoid outputs: they do not lie between 0 and 1"
        return None

    def remark(self) -> str | None:
        """What is suspicious of the rows and proves nothing: a dead teacher, or bounds that logits rarely keep."""
        if self._rows < 4 or self._kind == "embedding":
            return None
        if self._constant == self._rows and self._columns > 1:
            what = "zero" if self._least == self._most == 0 else "the same value in every class"
            return f"all {self._rows:,} rows are {what}: a dead teacher, or a failed export?"
        if self._moved == 0:
            return f"all {self._rows:,} rows are equal: the teacher does not look at its input, or an export failed"
        if self._constant and self._columns > 1:
            return f"{self._constant:,} of {self._rows:,} rows have the same value in every class"
        if self._kind == "logits" and self._columns > 1 and self._numbers >= _MANY:
            if self._are_shares:
                return "every value lies between 0 and 1, as a sigmoid's do: are these logits?"
            if self._least >= 0 or self._most <= 0:
                bound = "no value is negative" if self._least >= 0 else "no value is above 0, as of a log sigmoid"
                return f"{bound}: are these logits?"
        return None

    @property
    def _numbers(self) -> int:
        return self._rows * self._columns

    @property
    def _are_shares(self) -> bool:
        return self._least >= 0 and self._most <= 1 + _TOLERANCE

    @property
    def _are_probs(self) -> bool:
        return self._are_shares and _are_near(self._sums, 1, self._tolerance)

    @property
    def _are_log_probs(self) -> bool:
        return self._most <= _TOLERANCE and _are_near(self._weights, 1, self._tolerance)

    @property
    def _tolerance(self) -> float:
        return _TOLERANCE if self._kind != "logits" or self._moved >= _MOVED else _EXACT

    def _law(self) -> str | None:
        """The law that numbers obey which are called logits, and are none."""
        if self._most == 0 and self._topped == self._rows:
            return None  # logits less the largest of their row, as is done against overflow: no softmax notices
        if self._are_probs or self._are_log_probs:
            return (
                f"are {'probabilities' if self._are_probs else 'log probabilities'}, not logits: every row sums to one"
            )
        if self._numbers < _MANY or self._rows < 4:
            return None
        total = self._sums[1]
        is_hundred = self._most <= 100 * (1 + _TOLERANCE) and _are_near(self._sums, 100, _TOLERANCE)
        is_whole = self._columns > 2 and self._least >= 0 and self._moved >= _MOVED * total > _MOVED
        if is_whole and (is_hundred or _are_near(self._sums, total, _EXACT)):
            what = "percentages" if is_hundred else "shares of a whole"
            return f"are {what}, not logits: no value is negative, and every row sums to {total:.4g}"
        if self._are_shares and self._least > 0 and self._are_sigmoids:
            return "are sigmoid outputs, not logits: every value lies between 0 and 1"
        if self._most <= 0 and self._are_log_sigmoids:
            return "are log sigmoids, not logits: no value is above 0, and their exponentials do not sum to one"
        return None

    @property
    def _are_sigmoids(self) -> bool:
        """Of numbers between 0 and 1: whether they make use of that room, or all stay around the sigmoid of nothing.

        Small logits with heavy tails may keep to that room by chance: few of them lie far from the others, and they do
        not gather at its ends. Two classes are too few to tell.
        """
        mean = self._total / self._numbers
        is_wide = self._squares / self._numbers - mean**2 >= _WIDE**2 or min(mean, 1 - mean) < _MOVED
        is_spread = self._most - self._least >= _SPREAD and self._moved >= _SPREAD / 2
        is_sure = self._columns > 2 and is_spread and is_wide
        is_shy = self._least > 0.25 and self._most < 0.75 and abs(mean - 0.5) < _MOVED
        return is_sure or (is_shy and self._columns >= _SEVERAL and self._moved > 0)

    @property
    def _are_log_sigmoids(self) -> bool:
        """Of numbers below 0: whether they crowd below it, or their exponentials are as often below 1/2 as above."""
        is_sure = self._crowded * 4 >= self._rows >= 20 and abs(self._weight / self._rows - 1) > _MOVED
        is_even = self._columns >= _SEVERAL and abs(self._weight / self._numbers - 0.5) < _MOVED
        return (is_sure and self._moved >= _SPREAD / 2) or (is_even and self._moved > 0)


def _widened(bounds: tuple[float, float], values: np.ndarray) -> tuple[float, float]:
    return min(bounds[0], float(values.min())), max(bounds[1], float(values.max()))


def _are_near(bounds: tuple[float, float], value: float, tolerance: float) -> bool:
    return max(abs(bound - value) for bound in bounds) < tolerance * abs(value)
