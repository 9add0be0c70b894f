"""CP-ResNet, a residual net with a restricted receptive field (Koutini et al., arXiv 2105.12395).

The layout is that of the field's small teachers: 127,684 parameters with ten classes, and 28.8 M
multiply-accumulates for a 1-s clip of 256 mels and 43 frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Self

import torch.nn.functional as F
from torch import Tensor, nn

from kd_cache.errors import UsageError
from kd_cache.train.layers import ConvolutionalHead, rows

CHANNELS: Final = (32, 32, 64, 92)
"""Output channels of the four residual blocks; the stem has as many as the first."""

KERNELS: Final = ((3, 1), (3, 3), (3, 3), (3, 1))
"""Sizes of the two square kernels of each block."""

GROUPS: Final = (1, 1, 2, 1)
"""Groups of every convolution of a block, its shortcut included."""

LEAST_FRAMES: Final = 5
LEAST_BINS: Final = 17
"""Smallest input that survives the strided stem and the poolings: (17 - 3) // 2 + 1 = 8 bins = 2 · 2 · 2."""


class ResidualBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``: [B, C_in, F, T] → [B, C_out, F, T].

    The shortcut is the identity, or a 1×1 convolution with batch norm where the number of channels changes.
    """

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, int], groups: int = 1) -> None:
        super().__init__()
        first, second = kernels
        self.conv1 = nn.Conv2d(inputs, outputs, first, padding=first // 2, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, second, padding=second // 2, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class CPResNet(ConvolutionalHead):
    """Log-mel [B, T, F] float32 → logits [B, num_classes].

    The head is fully convolutional (1×1 convolution to classes, batch norm, global mean), so T and F are free
    from 5 frames and 17 bins on. ``channels`` are the outputs of the four residual blocks. The third block's
    convolutions have two groups, so its number of channels, and the second's, must be even.

    Parts, for fine-tuning in stages: the *backbone* are the stem and the first three blocks, the *neck* is the fourth
    block, the *head* is ``head``.
    """

    title: ClassVar[str] = "CP-ResNet"
    least: ClassVar[tuple[int, int]] = (LEAST_FRAMES, LEAST_BINS)
    sizes: ClassVar[tuple[str, ...]] = ("channels",)
    classifier_prefix: ClassVar[str] = "head."
    neck_prefixes: ClassVar[tuple[str, ...]] = ("block4.",)

    def __init__(self, num_classes: int, channels: tuple[int, int, int, int] = CHANNELS) -> None:
        if odd := [width for width in channels[1:3] if width % 2]:
            raise ValueError(f"channels of the second and third block must be even, found {odd[0]}")
        super().__init__()
        self.num_classes = num_classes
        self.channels = channels
        self.stem = nn.Sequential(
            nn.Conv2d(1, channels[0], 5, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(),
        )
        inputs = (channels[0], *channels[:-1])
        for number, shape in enumerate(zip(inputs, channels, KERNELS, GROUPS, strict=True), start=1):
            self.add_module(f"block{number}", ResidualBlock(*shape))
        self.head = nn.Sequential(nn.Conv2d(channels[-1], num_classes, 1, bias=False), nn.BatchNorm2d(num_classes))

    @classmethod
    def sized(
        cls, num_classes: int, width: int | None, hidden: tuple[int, ...] | None, dropout: float, **sizes: Any
    ) -> Self:
        if width is not None and "channels" in sizes:
            raise UsageError("--channels says the width of the embedding, and so does --feature-dim: give one of them")
        if width is not None:
            sizes = {"channels": (*CHANNELS[:3], width)}
        return super().sized(num_classes, None, hidden, dropout, **sizes)

    @classmethod
    def by_sizes(cls, num_classes: int, **sizes: Any) -> Self:
        return cls(num_classes, sizes.get("channels", CHANNELS))

    @classmethod
    def for_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        a, b, c, d = (
            rows(tensors, f"block{number}.conv2.weight", default) for number, default in enumerate(CHANNELS, start=1)
        )
        return cls(rows(tensors, "head.0.weight", 10), (a, b, c, d))

    @property
    def embedding_dim(self) -> int:
        """Width of what ``embed`` returns: 92 as published."""
        return self.channels[-1]

    def feature_map(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = F.max_pool2d(self.get_submodule("block1")(x), (2, 1))  # halves frequency, keeps time
        x = F.max_pool2d(self.get_submodule("block2")(x), (2, 1))
        x = self.get_submodule("block3")(x)
        features: Tensor = self.get_submodule("block4")(x)
        return features
