"""BC-ResNet for acoustic scenes (BC-ResNet-ASC: Kim et al. 2021, arXiv 2111.06531; blocks: arXiv 2106.04140), depth 15.

Nine blocks of broadcasted residuals in four stages, with residual normalization between them. With 80 base channels it
has the paper's 315 k parameters (314,970 with ten classes); with 40, a size for students, 85,890.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_cache.train.layers import ConvolutionalHead, convolution, rows

WIDTHS: Final = ((1, 1), (1.5, 1.5), (2, 2), (2.5, 2.5, 2.5))
"""Channels of the blocks of each stage, as multiples of the base; the stem has twice the base."""
BANDS: Final = 4
DROPOUT: Final = 0.1


def residual_norm(x: Tensor) -> Tensor:
    """Each clip's bins normalised over channels and frames, and 0.1 of what they were: [B, C, F, T] → the same."""
    variance, mean = torch.var_mean(x, dim=(1, 3), keepdim=True)
    return 0.1 * x + (x - mean) / torch.sqrt(variance + 1e-5)


class SubSpectralNorm(nn.Module):
    """Batch norm of each of four bands of bins by itself: [B, C, F, T] → the same; F is 4 or more."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bands = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(BANDS))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.tensor_split(BANDS, dim=2)
        return torch.cat([norm(part) for norm, part in zip(self.bands, parts, strict=True)], dim=2)


class BroadcastedBlock(nn.Module):
    """A convolution over bins, and one over frames of its mean over bins that is added to every bin.

    [B, C_in, F, T] → [B, C_out, F, T]. With as many channels as before the input is added; else a 1×1 convolution is
    the first thing.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.transition = convolution(inputs, outputs, 1) if inputs != outputs else None
        self.over_bins = nn.Conv2d(outputs, outputs, (3, 1), padding=(1, 0), groups=outputs, bias=False)
        self.norm = SubSpectralNorm(outputs)
        self.over_frames = convolution(outputs, outputs, (1, 3), groups=outputs, relu=False)
        self.mixed = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.dropout = nn.Dropout2d(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.over_bins(x if self.transition is None else self.transition(x)))
        frames = self.dropout(self.mixed(F.silu(self.over_frames(y.mean(dim=2, keepdim=True)))))
        return F.relu(y + frames if self.transition is not None else x + y + frames)


class Staged(ConvolutionalHead):
    """What BC-ResNet and TF-SepNet share: a stem, four stages of blocks, residual norms and poolings between them.

    Parts, for fine-tuning in stages: the *neck* is the last stage, the *head* is ``head``.
    """

    sizes: ClassVar[tuple[str, ...]] = ("base_channels",)
    classifier_prefix: ClassVar[str] = "head."
    neck_prefixes: ClassVar[tuple[str, ...]] = ("stage4.",)
    pooled: ClassVar[tuple[int, ...]]
    """Stages that a 2×2 pooling follows."""
    base: ClassVar[int]

    def __init__(self, num_classes: int, base: int) -> None:
        super().__init__()
        self.num_classes, inputs = num_classes, 2 * base
        self.stem = self.make_stem(base)
        for stage, widths in enumerate(WIDTHS, start=1):
            blocks = nn.Sequential()
            for width in widths:
                blocks.append(self.make_block(inputs, int(width * base)))
                inputs = int(width * base)
            self.add_module(f"stage{stage}", blocks)
        self.head = nn.Conv2d(inputs, num_classes, 1)

    def make_stem(self, base: int) -> nn.Module:
        """[B, 1, F, T] → [B, 2 · base, F', T']."""
        raise NotImplementedError

    def make_block(self, inputs: int, outputs: int) -> nn.Module:
        """[B, inputs, F, T] → [B, outputs, F, T]."""
        raise NotImplementedError

    @classmethod
    def by_sizes(cls, num_classes: int, **sizes: Any) -> Self:
        return cls(num_classes, sizes.get("base_channels", cls.base))

    @property
    def embedding_dim(self) -> int:
        return self.head.in_channels

    def feature_map(self, x: Tensor) -> Tensor:
        x = residual_norm(self.stem(x))
        for stage in range(1, len(WIDTHS) + 1):
            x = residual_norm(self.get_submodule(f"stage{stage}")(x))
            if stage in self.pooled:
                x = F.max_pool2d(x, 2)
        return x


class BCResNet(Staged):
    """Log-mel [B, T, F] float32 → logits [B, num_classes], from 7 frames and 31 bins on."""

    title: ClassVar[str] = "BC-ResNet"
    least: ClassVar[tuple[int, int]] = (7, 31)
    pooled: ClassVar[tuple[int, ...]] = (1, 2)
    base: ClassVar[int] = 40

    def make_stem(self, base: int) -> nn.Module:
        return convolution(1, 2 * base, 5, stride=2)

    def make_block(self, inputs: int, outputs: int) -> nn.Module:
        return BroadcastedBlock(inputs, outputs)

    @classmethod
    def for_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(rows(tensors, "head.weight", 10), max(1, rows(tensors, "stem.0.weight", 2 * cls.base) // 2))
