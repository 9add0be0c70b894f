"""Batches for students that need logits, labels and other tensors but load nothing per item: no DataLoader, no workers.

for logits, labels in BatchLoader(cache, files, labels, batch_size=256, shuffle=True):
    ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kd_cache.errors import UsageError
from kd_cache.serve.logit_cache import LogitCache

DEVICE_TABLE_BYTES = 1 << 30
"""Up to this size the logits of all files are kept on the device; above it every batch is sent there."""


class BatchLoader:
    """Yields ``(logits [B, T, C], *tensors [B, …])``, one tuple per batch, in a new order each time with ``shuffle``.

    Of a top-k cache the first is a `TopK`.

    Args:
        files: whose rows; all files of the cache (in the order of ``cache.files``) with ``None``.
        tensors: each with one entry per file, in their order: labels, embeddings, whatever the student learns from.
        generator: of the shuffling, as torch's DataLoader takes it.
        drop_last: leave out a last batch of fewer than ``batch_size`` files.
        dtype: of the logits; ``None`` keeps the stored one.
        device: where the batches are wanted.

    Raises:
        MissingLogitsError: as `LogitCache.rows`, before the first batch.
        UsageError: a tensor of another length, or no batch size.
    """

    def __init__(
        self,
        cache: LogitCache,
        files: Sequence[str] | None = None,
        *tensors: torch.Tensor,
        batch_size: int,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        rows = cache.all_rows() if files is None else cache.rows(files)
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, expected at least 1")
        for number, tensor in enumerate(tensors):
            if not tensor.ndim or len(tensor) != len(rows):
                raise UsageError(
                    f"tensor {number} has shape {list(tensor.shape)}, expected one entry for each of {len(rows)} files"
                )
        cache.prepare()
        self.cache = cache
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator
        self.drop_last = drop_last
        self._dtype = dtype
        self._device = torch.device(device)
        self._tensors = [tensor.to(self._device) for tensor in tensors]
        self._rows = rows
        size = len(rows) * len(cache.teachers) * cache.width * cache.dtype.itemsize
        self._table = None
        if self._device.type != "cpu" and size <= DEVICE_TABLE_BYTES and cache.topk is None:
            self._table = cache.batch(rows).to(self._device)

    def __len__(self) -> int:
        """How many batches."""
        whole, left = divmod(len(self._rows), self.batch_size)
        return whole + (left > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        order = torch.randperm(len(self._rows), generator=self.generator) if self.shuffle else None
        rows = self._rows if order is None else self._rows[order]
        there = None if order is None else order.to(self._device)
        for number in range(len(self)):
            part = slice(number * self.batch_size, (number + 1) * self.batch_size)
            at = None if there is None else there[part]
            logits = self._logits(rows[part], part if at is None else at)
            # Copies also where a view would do: what a student does to its batch must not come back in the next epoch.
            aligned = (tensor[part].clone() if at is None else tensor.index_select(0, at) for tensor in self._tensors)
            yield logits, *aligned

    def _logits(self, rows: torch.Tensor, there: slice | torch.Tensor) -> Any:
        """The logits of these rows of the cache, which are ``there`` in the table on the device, if there is one."""
        if self._table is not None:
            return self._table[there].to(self._dtype or self._table.dtype, copy=isinstance(there, slice))
        if self._device.type == "cpu":
            return self.cache.batch(rows, self._dtype)
        logits = self.cache.batch(rows)
        if self._device.type == "cuda":
            logits = logits.pin_memory()
        logits = logits.to(self._device, non_blocking=True)
        return logits if self.cache.topk is not None else logits.to(self._dtype or logits.dtype)
