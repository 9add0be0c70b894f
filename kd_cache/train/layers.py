"""What nets over log-mels are made of: the built-in ones' common shape, their layers, and the input they take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, Self

from torch import Tensor, nn

from kd_cache.errors import TeacherError


class Backbone(nn.Module):
    """A net over log-mels: ``[B, T, F]`` float → logits ``[B, num_classes]``, by way of an embedding.

    Parts, for fine-tuning in stages, are said by the names of their tensors: the *head* is ``classifier_prefix``, which
    ``embed`` does not use; the *neck* are ``neck_prefixes``; everything else is the *backbone* in the narrow sense.
    """

    classifier_prefix: ClassVar[str]
    neck_prefixes: ClassVar[tuple[str, ...]] = ()
    bare_prefixes: ClassVar[tuple[str, ...]] = ()  # what names of published weights that it can start from lack
    num_classes: int

    @classmethod
    def sized(cls, num_classes: int, width: int | None, hidden: tuple[int, ...] | None, dropout: float) -> Self:
        """An untrained net by settings: ``width`` of the embedding, ``hidden`` widths of the classifier.

        Raises `UsageError` for a setting that this architecture does not have.
        """
        raise NotImplementedError

    @classmethod
    def for_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """An untrained net whose sizes are those of a checkpoint's tensors."""
        raise NotImplementedError

    @classmethod
    def largest(cls) -> Self:
        """The variant that has every tensor name there can be."""
        return cls.sized(10, None, None, 0.0)

    @property
    def embedding_dim(self) -> int:
        """Width of what ``embed`` returns."""
        raise NotImplementedError

    def embed(self, x: Tensor) -> Tensor:
        """``[B, T, F]`` → embeddings ``[B, embedding_dim]``."""
        raise NotImplementedError


_LAYER: Final = re.compile("[0-9]{1,2}", re.ASCII)


def require_log_mel(architecture: str, x: Tensor, least_frames: int, least_bins: int) -> None:
    """Raise TeacherError unless ``x`` is a float [B, T, F] with T and F large enough for the poolings."""
    expected = f"{architecture} takes float features [B, T, F] with T >= {least_frames} and F >= {least_bins}"
    if x.ndim != 3 or not x.is_floating_point():
        raise TeacherError(f"{expected}, found {str(x.dtype).removeprefix('torch.')} {list(x.shape)}")
    if x.shape[1] < least_frames or x.shape[2] < least_bins:
        raise TeacherError(
            f"{expected}, found T={x.shape[1]}, F={x.shape[2]}",
            hint="Leave shorter clips out of the dump, or check that the features are stored as [T, F].",
        )


def rows(tensors: Mapping[str, Tensor], name: str, default: int) -> int:
    """How many outputs the weight ``name`` has; ``default`` where it is absent or no weight at all.

    Sizes come from here when a net is built for a checkpoint; what does not fit is reported by the
    comparison of all names and shapes that follows, so nothing is refused here.
    """
    tensor = tensors.get(name)
    return default if tensor is None or not tensor.shape else tensor.shape[0]


def mlp(inputs: int, hidden: Sequence[int], outputs: int, dropout: float) -> nn.Sequential:
    """Linear layers with ReLU and dropout between: [B, inputs] → [B, outputs]. Their names are 0, 3, 6, …"""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def mlp_widths(tensors: Mapping[str, Tensor], prefix: str, default: Sequence[int]) -> list[int]:
    """How many outputs each layer of an `mlp` has, read from the weights under ``prefix``, the first layer first.

    As many layers as the highest number among the names says; widths that are not there are those of ``default``.
    """
    numbers = [name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)]
    last = max((int(number) for number in numbers if _LAYER.fullmatch(number)), default=3 * (len(default) - 1))
    depth = last // 3 + 1
    hidden = [*default[:-1], *([default[0]] * depth)][: depth - 1]
    return [rows(tensors, f"{prefix}{3 * layer}.weight", width) for layer, width in enumerate([*hidden, default[-1]])]
