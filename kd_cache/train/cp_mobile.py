"""CP-Mobile, the student of the baselines of DCASE's task 1 in 2024 and 2025 (Schmid et al., DCASE 2023 report).

Inverted residual blocks, as MobileNet's, in stages of 3, 2 and 1. The baseline's has 61,148 parameters with 10 classes,
and takes 29,419,156 multiply-accumulates for a clip of 256 mels and 65 frames. Its checkpoints' names are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Self

import torch.nn.functional as F
from torch import Tensor, nn

from kd_cache.train.layers import ConvolutionalHead, convolution, rows

BASE, MULTIPLIER, EXPANSION = 32, 1.8, 2.1
BLOCKS: Final = ((1, 2, 3), (4, 5), (6,))
"""Numbers of the blocks, by stage."""
STRIDES: Final[Mapping[int, tuple[int, int]]] = {3: (1, 2), 4: (2, 1)}
"""Of blocks, in frequency and time; 1 of all others."""
_STAGE_OF: Final = {block: stage for stage, blocks in enumerate(BLOCKS) for block in blocks}
CHANNELS, EXPANDED = (32, 56, 104), (64, 64, 64, 64, 120, 120)


def in_eights(width: float) -> int:
    """The nearest multiple of 8 that is no less than 90 % of ``width`` (Howard et al. 2017, arXiv 1704.04861)."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * width else nearest + 8


class InvertedResidual(nn.Module):
    """1×1 to ``expanded`` channels, depthwise 3×3, 1×1 to ``outputs``: [B, C_in, F, T] → [B, C_out, F', T'].

    With as many channels as before the input is added, where there is a stride as its mean over 3×3.
    """

    def __init__(self, inputs: int, outputs: int, expanded: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.block = nn.Sequential(
            convolution(inputs, expanded, 1),
            convolution(expanded, expanded, 3, stride=stride, groups=expanded),
            convolution(expanded, outputs, 1, relu=False),
        )
        self.has_shortcut, self.stride = inputs == outputs, stride

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        if self.has_shortcut:
            y = y + (x if self.stride == (1, 1) else F.avg_pool2d(x, 3, self.stride, padding=1))
        return F.relu(y)


class CPMobile(ConvolutionalHead):
    """Log-mel [B, T, F] float32 → logits [B, num_classes], of any T and F.

    ``channels`` are those of the three stages, ``expanded`` those inside each of the six blocks, and ``stem`` those of
    the two strided convolutions before them.

    Parts, for fine-tuning in stages: the *neck* is the last stage, the *head* is ``feed_forward``.
    """

    title: ClassVar[str] = "CP-Mobile"
    sizes: ClassVar[tuple[str, ...]] = ("base_channels", "channels_multiplier", "expansion_rate")
    classifier_prefix: ClassVar[str] = "feed_forward."
    neck_prefixes: ClassVar[tuple[str, ...]] = ("stages.s3.",)

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int] = CHANNELS,
        expanded: Sequence[int] = EXPANDED,
        stem: tuple[int, int] = (8, 32),
    ) -> None:
        super().__init__()
        self.num_classes, self.channels = num_classes, tuple(channels)
        self.in_c = nn.Sequential(convolution(1, stem[0], 3, stride=2), convolution(*stem, 3, stride=2))
        self.stages, inputs = nn.Sequential(), stem[1]
        for stage, numbers in enumerate(BLOCKS):
            blocks = nn.Sequential()
            for number in numbers:
                block = InvertedResidual(inputs, channels[stage], expanded[number - 1], STRIDES.get(number, (1, 1)))
                blocks.add_module(f"b{number}", block)
                inputs = channels[stage]
            self.stages.add_module(f"s{stage + 1}", blocks)
        self.feed_forward = nn.Sequential(nn.Conv2d(inputs, num_classes, 1, bias=False), nn.BatchNorm2d(num_classes))
        for layer in self.modules():
            # Without storage there is nothing to draw, and torch would load its compiler for it: two seconds.
            if isinstance(layer, nn.Conv2d) and not layer.weight.is_meta:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    @classmethod
    def by_sizes(cls, num_classes: int, **sizes: Any) -> Self:
        base = in_eights(sizes.get("base_channels", BASE))
        multiplier, expansion = sizes.get("channels_multiplier", MULTIPLIER), sizes.get("expansion_rate", EXPANSION)
        channels = [in_eights(base * multiplier**stage) for stage in range(len(BLOCKS))]
        inputs = [base, *(channels[_STAGE_OF[block]] for block in list(_STAGE_OF)[:-1])]
        return cls(num_classes, channels, [in_eights(width * expansion) for width in inputs], (base // 4, base))

    @classmethod
    def for_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        def outputs(layer: str, default: int) -> int:
            return rows(tensors, f"{layer}.0.weight", default)

        blocks = {block: f"stages.s{stage + 1}.b{block}.block" for block, stage in _STAGE_OF.items()}
        return cls(
            outputs("feed_forward", 10),
            [outputs(f"{blocks[numbers[0]]}.2", width) for numbers, width in zip(BLOCKS, CHANNELS, strict=True)],
            [outputs(f"{name}.0", width) for name, width in zip(blocks.values(), EXPANDED, strict=True)],
            (outputs("in_c.0", 8), outputs("in_c.1", 32)),
        )

    @property
    def embedding_dim(self) -> int:
        return self.channels[-1]

    def feature_map(self, x: Tensor) -> Tensor:
        features: Tensor = self.stages(self.in_c(x))
        return features
