"""Batches on their way out of a worker: small tensors in the message itself.

Torch sends every tensor through shared memory of its own, which takes about as long as reading several features. A
batch of logits and labels is some kilobytes, so it travels with the message. What arrives is an ordinary tuple or dict.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from kd_cache.serve.topk import TopK

_SMALL = 1 << 18
"""Bytes up to which a tensor is sent in the message."""


class _Pair(tuple[Any, ...]):
    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _received_pair, tuple(map(_packed, self))


class _Batch(dict[str, Any]):
    def __reduce__(self) -> tuple[Any, ...]:
        return _received_batch, ({name: _packed(value) for name, value in self.items()},)


def sent_pair(batch: Any, logits: Any) -> tuple[Any, Any]:
    """``(batch, logits)``, ready to be sent if this is a worker."""
    return (batch, logits) if get_worker_info() is None else _Pair((batch, logits))


def sent_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """``batch``, ready to be sent if this is a worker."""
    return batch if get_worker_info() is None else _Batch(batch)


_PLAIN = {torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_PLAIN.add(torch.bool)  # not complex numbers; and what is a negated view of some is no plain array either


def _packed(value: Any) -> Any:
    """The tensor's array where it is small, plain and alone, each of a `TopK`; everything else as it is."""
    if isinstance(value, TopK):
        return value.map(_packed)
    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.dtype not in _PLAIN:
        return value
    if not value.is_cpu or value.requires_grad or value.is_neg() or value.nbytes > _SMALL:
        return value
    return _Array(value.numpy())


class _Array:
    """An array that was a tensor (others may be in a user's batch, and stay arrays)."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


def _unpacked(value: Any) -> Any:
    if isinstance(value, TopK):
        return value.map(_unpacked)
    return torch.from_numpy(value.array) if isinstance(value, _Array) else value


def _received_pair(*parts: Any) -> tuple[Any, ...]:
    return tuple(map(_unpacked, parts))


def _received_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: _unpacked(value) for name, value in batch.items()}
