"""From row numbers to logits ``[B, T, C]``: out of one table in memory, or out of every teacher's packs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

from kd_cache.errors import UsageError
from kd_cache.serve.placement import fits
from kd_cache.serve.rows import TeacherRows
from kd_cache.serve.topk import TopK
from kd_cache.serve.views import vectors
from kd_cache.store.shelf import RowNumbers
from kd_cache.store.take import WIDE, take_rows
from kd_cache.store.topk import TopKCodec

_BLOCK = 1 << 20
"""So many bytes of rows are gathered, then put in their place while they are still in the processor's cache."""
_FEW = 8192
"""Up to so many narrow values a call costs more than its copying, and torch's own gather has the cheaper call."""
_NEAR = 1 << 24
"""A table of up to so many bytes is near the processor: torch's gather is as quick there, numpy's only farther off."""


class Gatherer:
    """Gathers rows of all teachers at once. ``place`` is one of `kd_cache.serve.placement.PLACES`.

    Row ``numbers`` are those of the teachers' common rows and are not checked here. What they leave out has its place
    in the table, too, which nobody ever writes or reads: so numbers mean the same in every place.
    Of rows of V views each view is a vector of its own, with the number r · V + v.
    """

    def __init__(
        self, tables: Sequence[TeacherRows], positions: Sequence[np.ndarray | None], numbers: RowNumbers, place: str
    ):
        tables, positions, numbers = vectors(tables, positions, numbers)
        self._teachers = tables
        self._positions = positions  # each teacher's own numbers of the common rows; None where they are the same
        self._is_table = place == "table"
        self._count, self._has_holes = len(numbers), numbers.has_holes
        self.shape = (numbers.limit, len(tables), tables[0].width)
        self._width = self.shape[1] * self.shape[2]  # values in a row of all teachers
        self.dtype = tables[0].dtype
        self.torch_dtype = {1: torch.uint8, 2: torch.float16}.get(self.dtype.itemsize, torch.float32)
        self._is_narrow_table = self._is_table and self._width * self.dtype.itemsize < WIDE
        self._is_near = self.nbytes <= _NEAR
        if not self._is_table and not fits(self.nbytes):
            for rows in tables:
                rows.expect_random()  # what the kernel would read around them pushes out what was read before

    @cached_property
    def _table(self) -> np.ndarray:
        """``[limit, T * C]``: made when it is first needed, before workers are forked that could share it."""
        try:
            table = np.empty(self.shape, self.dtype)
        except MemoryError as error:
            raise UsageError(
                f"{self.nbytes / 1e9:.1f} GB of logits do not fit into memory", hint='Pass preload="auto" or False.'
            ) from error
        for number, rows in enumerate(self._teachers):
            positions = self._positions[number]
            if positions is None:
                rows.fill(table[:, number])
            else:
                table[:, number] = rows.take(positions)
        return table.reshape(self.shape[0], self._width)

    @cached_property
    def _tensor(self) -> torch.Tensor:
        """The table as ``[limit, T, C]``."""
        return torch.from_numpy(self._table.reshape(self.shape))

    @property
    def nbytes(self) -> int:
        """What the logits of all rows take."""
        return self._count * self._width * self.dtype.itemsize

    @property
    def has_table(self) -> bool:
        """Whether the table is there by now."""
        return "_table" in self.__dict__

    def prepare(self) -> None:
        """Make the table now, if there is to be one."""
        if self._is_table:
            self._table  # noqa: B018 (reading it makes it)

    def few(self, rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor | None:
        """The quickest way for small batches and tables, else ``None``. Torch checks these rows: `IndexError`."""
        if not self._is_narrow_table or self._has_holes or rows.ndim != 1 or rows.dtype is not torch.int64:
            return None
        if not self._is_near and len(rows) * self._width > _FEW:
            return None
        if out is None:
            return self._tensor.index_select(0, rows)
        if out.dtype == self.torch_dtype and out.is_cpu:
            return torch.index_select(self._tensor, 0, rows, out=out)
        return None

    def fresh(self, rows: np.ndarray, dtype: torch.dtype | None) -> torch.Tensor:
        """A new tensor ``[B, T, C]`` in ``dtype``, by default the stored one."""
        shape = (len(rows), self.shape[1], self.shape[2])
        if dtype is not None and dtype != self.torch_dtype and not self._is_record:
            return self._into_tensor(rows, torch.empty(shape, dtype=dtype))
        out = np.empty(shape, self.dtype)
        self._into(rows, out)
        logits = torch.from_numpy(out)
        return logits if dtype is None else logits.to(dtype)

    def into(self, rows: np.ndarray, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` ``[B, T, C]`` of any floating dtype, strides and device."""
        if out.dtype == self.torch_dtype and out.is_cpu and out.is_contiguous():
            self._into(rows, out.numpy())
            return out
        if self._is_record:
            return out.copy_(self.fresh(rows, None))
        return self._into_tensor(rows, out)

    def with_nan(self, rows: np.ndarray, dtype: torch.dtype | None, out: torch.Tensor | None) -> torch.Tensor:
        """As `fresh` or `into`; rows of a miss, -1, are NaN."""
        present = np.flatnonzero(rows >= 0)
        if out is None:
            out = torch.empty((len(rows), *self.shape[1:]), dtype=dtype or self.torch_dtype)
        out.fill_(float("nan"))
        out[torch.from_numpy(present).to(out.device)] = self.fresh(rows[present], out.dtype).to(out.device)
        return out

    def most_probable(self, rows: np.ndarray, codec: TopKCodec, dtype: torch.dtype | None) -> TopK:
        """Top-k rows ``[B, T]``; those of a miss, -1, are NaN."""
        missed = rows < 0
        if not missed.any():
            stored = np.empty((len(rows), *self.shape[1:]), np.uint8)
            self._into(rows, stored)
            return TopK.of(stored, codec, dtype or torch.float32)
        stored = np.zeros((len(rows), *self.shape[1:]), np.uint8)
        stored[~missed] = self.fresh(rows[~missed], None).numpy()
        found = TopK.of(stored, codec, dtype or torch.float32)
        for values in (found.log_probs, found.rest):
            values[torch.from_numpy(missed)] = float("nan")
        return found

    @property
    def _is_record(self) -> bool:
        """Whether all teachers' logits of a row lie side by side."""
        return self._is_table or len(self._teachers) == 1

    def _into(self, rows: np.ndarray, out: np.ndarray) -> None:
        if self._is_table:
            take_rows(self._table, rows, out.reshape(len(rows), self._width))
        elif len(self._teachers) == 1:
            self._take(0, rows, out.reshape(len(rows), self._width))
        else:
            for part, scratch in self._blocks(rows, 1):
                for number in range(len(self._teachers)):
                    self._take(number, rows[part], scratch[0])
                    out[part, number] = scratch[0]

    def _into_tensor(self, rows: np.ndarray, out: torch.Tensor) -> torch.Tensor:
        """The same with a conversion, while a block is at hand."""
        for part, scratch in self._blocks(rows, len(self._teachers)):
            for number in range(len(self._teachers)):
                self._take(number, rows[part], scratch[number])
            out[part] = torch.from_numpy(scratch).transpose(0, 1)
        return out

    def _blocks(self, rows: np.ndarray, teachers: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Slices of the batch, each with room for ``[teachers, b, C]`` that the next one uses again."""
        step = max(64, _BLOCK // (self._width * self.dtype.itemsize))
        scratch = np.empty((teachers, min(step, len(rows)), self.shape[2]), self.dtype)
        for start in range(0, len(rows), step):
            part = slice(start, min(start + step, len(rows)))
            yield part, scratch[:, : part.stop - start]

    def _take(self, number: int, rows: np.ndarray, out: np.ndarray) -> None:
        positions = self._positions[number]
        self._teachers[number].take_into(rows if positions is None else positions[rows], out)
