"""What a batch of a top-k cache is: the most probable classes of each row, and what all others have together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from kd_cache.store.topk import TopKCodec, at_temperature

NOTHING = -1e4
"""Log-probabilities below this are taken for it where they are weighed: 0 · −∞ would be no number."""


@dataclass(frozen=True, eq=False)
class TopK:
    """Rows of any leading shape, ``[B, T]`` as a cache gives them; an index takes some, as of a tensor: ``rows[:, 0]``.

    Attributes:
        ids: ``[…, K]`` int64, the classes, the most probable first.
        log_probs: ``[…, K]`` float32, theirs at temperature 1.
        rest: ``[…, 3]`` float32, the log-probability of all other classes together at temperature 1, 2 and 4.
        num_classes: C.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor
    num_classes: int

    @classmethod
    def of(cls, rows: np.ndarray, codec: TopKCodec, dtype: torch.dtype = torch.float32) -> TopK:
        """Of ``[…, W]`` u1 rows as they are stored; ``dtype`` is that of ``log_probs``."""
        split = codec.split(rows)
        ids, rest = (torch.from_numpy(split[name].astype(kind)) for name, kind in (("ids", "i8"), ("rest", "f4")))
        # Rows have an even size, so torch can read these where they are; its conversion is 5 times as fast as numpy's.
        return cls(ids, torch.from_numpy(split["log_probs"]).to(dtype), rest, codec.classes)

    def softened(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """``[…, K]`` and ``[…]`` log-probabilities at a temperature: of the ids, and of all others together.

        What the ids have together is what the rest leaves, so that all sum to one whatever float16 rounded.
        Raises `UsageError` for a temperature but 1, 2 and 4.
        """
        rest = self.rest[..., at_temperature(temperature)]
        inside = (self.log_probs / temperature).log_softmax(dim=-1)
        return inside + torch.log(-torch.expm1(rest)).unsqueeze(-1), rest

    def dense(self, temperature: float = 1.0) -> Tensor:
        """``[…, C]`` log-probabilities at a temperature, the rest spread evenly over the other classes.

        Raises `UsageError` for a temperature but 1, 2 and 4.
        """
        inside, rest = self.softened(temperature)
        each = rest - math.log(self.num_classes - self.ids.shape[-1])
        return each.unsqueeze(-1).repeat(*[1] * each.ndim, self.num_classes).scatter_(-1, self.ids, inside)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``ids``, ``log_probs`` and ``rest``."""
        return self.ids, self.log_probs, self.rest

    def map(self, change: Callable[[Tensor], Any]) -> TopK:
        """The same change of each of the three tensors."""
        ids, log_probs, rest = map(change, self.tensors)
        return TopK(ids, log_probs, rest, self.num_classes)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: Any) -> TopK:
        return self.map(lambda each: each[at])

    def to(self, device: str | torch.device, non_blocking: bool = False) -> TopK:
        return self.map(lambda each: each.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> TopK:
        """Called by a DataLoader that pins."""
        return self.map(lambda each: each.pin_memory())

    @staticmethod
    def stack(rows: Sequence[TopK]) -> TopK:
        """Rows of one shape as one batch, as ``torch.stack`` does."""
        ids, log_probs, rest = map(torch.stack, zip(*(row.tensors for row in rows), strict=True))
        return TopK(ids, log_probs, rest, rows[0].num_classes)


def _collated(batch: Sequence[TopK], *, collate_fn_map: Any = None) -> TopK:
    return TopK.stack(batch)


default_collate_fn_map[TopK] = _collated
