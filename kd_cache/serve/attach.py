"""Logits beside the items of a dataset, gathered once per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from kd_cache.errors import UsageError
from kd_cache.serve.parcel import sent_pair


class Rows(Protocol):
    """What an opened cache gives: row numbers of files, and their logits (see `LogitCache`)."""

    def rows(self, files: Sequence[str], /) -> torch.Tensor: ...
    def prepare(self) -> None: ...
    def batch(self, rows: torch.Tensor | np.ndarray, dtype: torch.dtype | None, /) -> Any: ...


class Gathered:
    """One batch on its way from ``__getitems__`` to ``collate``: base items, and their logits ``[B, T, C]`` or `TopK`.

    To any other collate function it is a list of ``(item, logits [T, C])``.
    """

    def __init__(self, items: list[Any], logits: Any) -> None:
        self.items = items
        self.logits = logits

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        return self.items[number], self.logits[number]


class CachedDataset(Dataset[Any]):
    """A map-style dataset with logits beside each item. Made by `LogitCache.attach`."""

    def __init__(
        self,
        cache: Rows,
        dataset: Dataset[Any],
        keys: Sequence[str],
        dtype: torch.dtype | None,
        collate: Callable[[list[Any]], Any],
    ) -> None:
        size = len(dataset)  # type: ignore[arg-type]
        if len(keys) != size:
            raise UsageError(f"expected one key per item: the dataset has {size} items, found {len(keys)} keys")
        self.cache = cache
        self.dataset = dataset
        self._rows = cache.rows(keys).numpy()
        cache.prepare()  # here, so that forked workers share what is made
        self._dtype = dtype
        self._collate = collate

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> tuple[Any, Any]:
        """``(item, logits [T, C])``; for a list of numbers (a batch sampler's) what `collate` makes of them."""
        if isinstance(number, list | tuple) or (isinstance(number, torch.Tensor | np.ndarray) and number.ndim):
            return self.collate(self.__getitems__([int(one) for one in number]))
        row = self._rows[int(number)]
        return self.dataset[number], self.cache.batch(np.array([row]), self._dtype)[0]

    def __getitems__(self, numbers: Sequence[int]) -> Gathered:
        """A whole batch, its logits gathered at once. torch's DataLoader calls this; ``collate`` takes it."""
        fetch = getattr(self.dataset, "__getitems__", None)
        items = list(fetch(numbers)) if callable(fetch) else [self.dataset[number] for number in numbers]
        if len(items) != len(numbers):
            raise UsageError(f"the dataset gave {len(items)} items for {len(numbers)} numbers: whose logits are whose?")
        rows = torch.from_numpy(self._rows[np.asarray(numbers, np.int64)])
        return Gathered(items, self.cache.batch(rows, self._dtype))

    def collate(self, batch: Gathered | list[tuple[Any, Any]] | tuple[Any, Any]) -> tuple[Any, Any]:
        """``(base batch, logits [B, T, C] or TopK)``, be the batch gathered at once, item by item, or ready already."""
        if isinstance(batch, tuple):
            return batch
        if isinstance(batch, Gathered):
            return sent_pair(self._collate(batch.items), batch.logits)
        return sent_pair(self._collate([item for item, _ in batch]), default_collate([logits for _, logits in batch]))
