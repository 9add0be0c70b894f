"""TF-SepNet (Cai et al. 2024, arXiv 2309.08200): kernels over bins and kernels over frames, side by side; depth 17.

BC-ResNet's stages, with a third pooling before the last. The size that was a student in DCASE 2024 (64 base channels,
arXiv 2408.14862) has 126,858 parameters with ten classes, and takes 29,419,648 multiply-accumulates for 512 mels and 64
frames: within the challenge's limits, stored as int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from kd_cache.train.bc_resnet import DROPOUT, Staged
from kd_cache.train.layers import convolution, rows


class Path(nn.Module):
    """A depthwise convolution along one axis, the mean over that axis, a 1×1 convolution, and the input added.

    [B, C, F, T] → the same. ``axis``: 2 for bins, 3 for frames.
    """

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.along = convolution(channels, channels, (3, 1) if axis == 2 else (1, 3), groups=channels)
        self.mixed = convolution(channels, channels, 1)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.mixed(self.along(x).mean(dim=self.axis, keepdim=True)))
        return x + y


class SeparateBlock(nn.Module):
    """Channels shuffled, one half of them along bins, the other along frames: [B, C_in, F, T] → [B, C_out, F, T]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.transition = convolution(inputs, outputs, 1) if inputs != outputs else None
        self.bins, self.frames = Path(outputs // 2, 2), Path(outputs // 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.transition is None else self.transition(x)
        one, other = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).chunk(2, dim=1)
        return torch.cat([self.bins(one), self.frames(other)], dim=1)


class TFSepNet(Staged):
    """Log-mel [B, T, F] float32 → logits [B, num_classes], from 29 frames and bins on.

    Raises ``ValueError`` for base channels that are no multiple of 4: every block's are halved.
    """

    title: ClassVar[str] = "TF-SepNet"
    least: ClassVar[tuple[int, int]] = (29, 29)
    pooled: ClassVar[tuple[int, ...]] = (1, 2, 3)
    base: ClassVar[int] = 64

    def __init__(self, num_classes: int, base: int) -> None:
        if base < 4 or base % 4:
            raise ValueError(f"base channels must be a multiple of 4, found {base}")
        super().__init__(num_classes, base)

    def make_stem(self, base: int) -> nn.Module:
        half = base // 2
        return nn.Sequential(convolution(1, half, 3, stride=2), convolution(half, 2 * base, 3, stride=2, groups=half))

    def make_block(self, inputs: int, outputs: int) -> nn.Module:
        return SeparateBlock(inputs, outputs)

    @classmethod
    def for_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(rows(tensors, "head.weight", 10), 2 * rows(tensors, "stem.0.0.weight", cls.base // 2))
