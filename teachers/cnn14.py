"""PANNs CNN14 (Kong et al. 2020, arXiv 1912.10211) over a precomputed log-mel.

Six convolution blocks and a fully connected embedding, then a three-layer classifier. Two things differ
from the published audio tagger: there is no batch norm over mel bins at the input, and the pooling at the
end is a mean over time, then maximum plus mean over frequency. The state-dict names are those of the
existing checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Self

import torch.nn.functional as F
from torch import Tensor, nn

from kd_cache.train.layers import Backbone, mlp, mlp_widths, require_log_mel, rows

CHANNELS: Final = (64, 128, 256, 512, 1024, 2048)
EMBEDDING: Final = 2048
HIDDEN: Final = (1024, 1024)
LEAST: Final = 32
"""Smallest T and F: each of the five 2×2 poolings halves both."""


class ConvBlock(nn.Module):
    """Twice convolution 3×3 without bias, batch norm, ReLU: [B, C_in, F, T] → [B, C_out, F, T]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class ProjectionHead(nn.Module):
    """Linear, batch norm, ReLU, Linear over the embedding: [B, D] → [B, P]. Few checkpoints have one."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.head(x)
        return projected


class CNN14Features(nn.Module):
    """Log-mel [B, T, F] float32 → embedding [B, 2048].

    ``channels`` are the outputs of the six blocks and ``embedding`` the outputs of ``fc1``. ``projection``
    gives the widths (hidden, output) of the optional projection head, or None for a net without one.
    """

    def __init__(
        self,
        channels: Sequence[int] = CHANNELS,
        embedding: int = EMBEDDING,
        projection: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        inputs = (1, *channels[:-1])
        for number, (before, after) in enumerate(zip(inputs, channels, strict=True), start=1):
            self.add_module(f"conv_block{number}", ConvBlock(before, after))
        self.fc1 = nn.Linear(channels[-1], embedding)
        self.bn1 = nn.BatchNorm1d(embedding)
        self.projection_head = None if projection is None else ProjectionHead(embedding, *projection)
        self.embedding_dim = embedding if projection is None else projection[1]

    def forward(self, x: Tensor) -> Tensor:
        require_log_mel("CNN14", x, LEAST, LEAST)
        x = x.transpose(1, 2).unsqueeze(1)  # [B, 1, F, T]
        for number in range(1, 7):
            block = self.get_submodule(f"conv_block{number}")
            x = block(x)
            if number < 6:  # after block 6 the pooling is 1×1
                x = F.avg_pool2d(x, 2)
            x = F.dropout(x, 0.2, block.training)  # none behind a block that is frozen
        x = x.mean(dim=3)  # over time: [B, C, F']
        x = x.amax(dim=2) + x.mean(dim=2)  # over frequency: [B, C]
        x = F.dropout(x, 0.5, self.training)
        x = F.dropout(F.relu(self.bn1(self.fc1(x))), 0.5, self.training)
        return x if self.projection_head is None else self.projection_head(x)


class CNN14(Backbone):
    """Log-mel [B, T, F] float32 → logits [B, num_classes].

    ``channels``, ``embedding`` and ``projection`` are those of `CNN14Features`; ``hidden`` are the hidden widths of
    the classifier (1024 and 1024 in the existing checkpoints). There is no softmax at the end. T and F must be at
    least 32, else TeacherError.

    Parts, for fine-tuning in stages: the *backbone* are the six convolution blocks, the *neck* is ``fc1`` with its
    batch norm and the projection head where there is one, the *head* is the classifier.
    """

    classifier_prefix: ClassVar[str] = "classifier."
    neck_prefixes: ClassVar[tuple[str, ...]] = (
        "feature_extractor.fc1.",
        "feature_extractor.bn1.",
        "feature_extractor.projection_head.",
    )

    bare_prefixes: ClassVar[tuple[str, ...]] = ("feature_extractor.",)  # PANNs has conv_block1 to fc1 by themselves

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int] = CHANNELS,
        embedding: int = EMBEDDING,
        hidden: Sequence[int] = HIDDEN,
        projection: tuple[int, int] | None = None,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.feature_extractor = CNN14Features(channels, embedding, projection)
        self.classifier = mlp(self.embedding_dim, hidden, num_classes, dropout)

    @classmethod
    def sized(
        cls, num_classes: int, width: int | None, hidden: tuple[int, ...] | None, dropout: float, **sizes: Any
    ) -> Self:
        layers = HIDDEN if hidden is None else hidden
        return cls(num_classes, embedding=width or EMBEDDING, hidden=layers, dropout=dropout)

    @classmethod
    def largest(cls) -> Self:
        return cls(10, projection=(1, 1))

    @classmethod
    def for_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        features = "feature_extractor."
        projection = None
        if any(name.startswith(f"{features}projection_head.") for name in tensors):
            head = f"{features}projection_head.head"
            projection = (
                rows(tensors, f"{head}.0.weight", EMBEDDING),
                rows(tensors, f"{head}.3.weight", EMBEDDING),
            )
        blocks = enumerate(CHANNELS, start=1)
        *hidden, classes = mlp_widths(tensors, cls.classifier_prefix, (*HIDDEN, 10))
        return cls(
            classes,
            [rows(tensors, f"{features}conv_block{i}.conv2.weight", default) for i, default in blocks],
            rows(tensors, f"{features}fc1.weight", EMBEDDING),
            hidden,
            projection,
        )

    @property
    def embedding_dim(self) -> int:
        """Width of what ``embed`` returns: 2048 as published."""
        return self.feature_extractor.embedding_dim

    def embed(self, x: Tensor) -> Tensor:
        """[B, T, F] → [B, 2048], through the projection head where there is one."""
        embedding: Tensor = self.feature_extractor(x)
        return embedding

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.embed(x))
        return logits
