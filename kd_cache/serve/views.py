"""One view of each row: rows of several views as readers gather them.

A row's views lie one after the other, so view v of row r is vector r · V + v of the same bytes: one gather, as without
views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_cache.dataset.views import Policy
from kd_cache.errors import UsageError, shown
from kd_cache.serve.resolve import Resolver
from kd_cache.serve.rows import TeacherRows
from kd_cache.store.index import Index
from kd_cache.store.shelf import RowNumbers

_BLOCK = 16_384


View = int | torch.Tensor | np.ndarray | None
"""Which view of each row: one for all, or ``[B]`` integers; ``None`` is the clean one."""


class ViewRows:
    """A teacher's vectors, each view of each row under its own number r · V + v, to whoever gathers them."""

    def __init__(self, rows: TeacherRows) -> None:
        self._rows = rows
        self.width, self.dtype, self.expect_random = rows.width // rows.views, rows.dtype, rows.expect_random
        self.take_into = rows.take_views_into

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """``[Q, C]``."""
        out = np.empty((len(numbers), self.width), self.dtype)
        self.take_into(numbers, out)
        return out

    def fill(self, out: np.ndarray) -> None:
        """Copy all vectors, each to its number in ``[limit · V, C]``."""
        each = out.reshape(-1, self._rows.views, self.width)
        numbers = self._rows.numbers.all()
        for start in range(0, len(numbers), _BLOCK):
            part = numbers[start : start + _BLOCK]
            each[part] = self._rows.take(part).reshape(-1, *each.shape[1:])


class _Numbers:
    """The numbers of vectors, as `RowNumbers` are those of rows."""

    def __init__(self, rows: RowNumbers, views: int) -> None:
        self.limit, self.has_holes, self._count = rows.limit * views, rows.has_holes, len(rows) * views

    def __len__(self) -> int:
        return self._count


def vectors(tables: Sequence[TeacherRows], positions: Sequence[np.ndarray | None], numbers: RowNumbers) -> Any:
    """What a `Gatherer` is to take of rows: themselves, or where they have several views each of these as a row."""
    if tables[0].views == 1:
        return tables, positions, numbers
    views = np.arange(tables[0].views)
    flat = [None if each is None else (each[:, None] * len(views) + views).reshape(-1) for each in positions]
    return [ViewRows(rows) for rows in tables], flat, _Numbers(numbers, len(views))


def checked_view(view: View, views: int, rows: int) -> Any:
    """A view as a number, or as integers ``[B]`` int64. Raises `UsageError`, ``IndexError``."""
    if view is None:
        return 0
    numbers = np.asarray(view)
    if numbers.dtype.kind not in "iu" or numbers.shape not in ((), (rows,)):
        raise UsageError(
            f"expected view as an integer, or one for each of {rows} rows, found {numbers.dtype} {list(numbers.shape)}"
        )
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < views:
        raise IndexError(f"views must lie in [0, {views}), found {numbers.min()} to {numbers.max()}")
    return numbers.astype(np.int64) if numbers.ndim else int(numbers)


class InputsRead:
    """What a `LogitCache` knows of the inputs that were scored, and of their views."""

    path: Path
    views: int
    _rows_of: Sequence[TeacherRows]
    _resolver: Resolver
    _first: int
    _index: Index | None
    rows: Callable[[Any], torch.Tensor]
    batch: Callable[..., torch.Tensor]
    _numbers: Callable[..., np.ndarray]

    def all_views(
        self, rows: torch.Tensor | np.ndarray | Sequence[str], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """``[B, V, T, C]``: every view of these rows or files. Raises as `batch`."""
        if not isinstance(rows, (torch.Tensor, np.ndarray)):
            rows = self.rows(rows)
        numbers = self._numbers(rows, self._first)
        every = np.tile(np.arange(self.views), len(numbers))
        logits = self.batch(np.repeat(numbers, self.views), dtype, view=every)
        return logits.view(-1, self.views, *logits.shape[1:])

    def draws(self, rows: torch.Tensor | np.ndarray, view: View = None) -> torch.Tensor:
        """``[B, D]`` int64: what was drawn for a view of each row; `kd_cache.replay_views` makes its input of them.

        Raises IndexError as `batch`, `UsageError` for a cache without views.
        """
        numbers = self._numbers(rows)
        at = checked_view(view, self.views, len(numbers))
        found = self._rows_of[0].draws(self._resolver.position(0, numbers))
        if found is None:
            raise UsageError(f"{shown(self.path)} has no views", hint="kd-cache dump --views makes them.")
        return torch.from_numpy(found[np.arange(len(numbers)), at].astype(np.int64))

    @property
    def view_policy(self) -> Policy | None:
        """How the inputs of views were augmented; ``None`` where there are none."""
        text = self._rows_of[0].policy
        return None if text is None else Policy.from_text(text)

    def input_digests(self, rows: torch.Tensor) -> np.ndarray | None:
        """``[B, teachers, 16]`` u1: the digest of the features that each teacher scored, by rows from `rows`.

        `kd_cache.FeatureSource.read` gives the digest of a feature as it is now. ``None`` for a cache of an older
        script, which kept none. Raises IndexError for a row that is none.
        """
        numbers = self._numbers(rows)
        if self._index is None:
            return None
        parts = [part.inputs(self._resolver.position(number, numbers)) for number, part in enumerate(self._rows_of)]
        return np.stack(parts, axis=1)
