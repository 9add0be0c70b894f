"""What a teacher is given: a tensor, or where inputs are dictionaries a tensor by each of their names.

An input of several tensors is kept as one numpy record ``[1]`` (`kd_cache.dataset.inputs.as_array`), whose dtype says
names, dtypes and shapes; so inputs of one dtype fit into one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Given = torch.Tensor | dict[str, torch.Tensor]


def each(given: Given, change: Callable[[torch.Tensor], torch.Tensor]) -> Given:
    """The same with every tensor changed."""
    if isinstance(given, torch.Tensor):
        return change(given)
    return {name: change(tensor) for name, tensor in given.items()}


def size_of(given: Given) -> int:
    """The number of samples."""
    return len(given if isinstance(given, torch.Tensor) else next(iter(given.values())))


def split(given: Given, size: int) -> list[Given]:
    """Parts of so many samples; the last one may be smaller."""
    if isinstance(given, torch.Tensor):
        return list(torch.split(given, size))
    parts = zip(*(torch.split(tensor, size) for tensor in given.values()), strict=True)
    return [dict(zip(given, part, strict=True)) for part in parts]


def shape_in_words(given: Given, first: int = 0) -> str:
    """``[8, 3, 32, 32]``, or one by name; without the axes before ``first``."""
    if isinstance(given, torch.Tensor):
        return str(list(given.shape[first:]))
    return ", ".join(f"{name} {list(tensor.shape[first:])}" for name, tensor in given.items())


def scored_dtype(array: np.ndarray) -> np.dtype[Any]:
    """What a teacher is given of an input: floats as float32, integers and truth values as they are."""
    return _scored(array.dtype)


def _scored(kind: np.dtype[Any]) -> np.dtype[Any]:
    if kind.names is not None:
        return np.dtype([(name, _scored(kind[name].base), kind[name].shape) for name in kind.names])
    return np.dtype(np.float32) if kind.kind == "f" else kind


def filled(
    shape: tuple[int, ...],
    kind: np.dtype[Any],
    size: int,
    fill: Callable[[np.ndarray, str | None], None],
    *,
    pinned: bool = False,
) -> Given:
    """``size`` inputs of this shape and dtype (`scored_dtype`), in memory that ``fill(array, name)`` writes."""

    def one(shape: tuple[int, ...], kind: np.dtype[Any], name: str | None) -> torch.Tensor:
        dtype = torch.from_numpy(np.empty(0, kind)).dtype
        made = torch.empty((size, *shape), dtype=dtype, pin_memory=pinned)
        fill(made.numpy(), name)
        return made

    if kind.names is None:
        return one(shape, kind, None)
    return {name: one(kind[name].shape, kind[name].base, name) for name in kind.names}


def of_arrays(arrays: list[np.ndarray], *, pinned: bool = False) -> Given:
    """A batch of inputs that have one shape and dtype."""

    def fill(into: np.ndarray, name: str | None) -> None:
        for number, array in enumerate(arrays):
            into[number] = array if name is None else array[name][0]

    return filled(arrays[0].shape, scored_dtype(arrays[0]), len(arrays), fill, pinned=pinned)
