"""What nets over log-mels are made of: the built-in ones' common shape, their layers, and the input they take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Self

from torch import Tensor, nn

from kd_cache.errors import TeacherError, UsageError


class Backbone(nn.Module):
    """A net over log-mels: ``[B, T, F]`` float → logits ``[B, num_classes]``, by way of an embedding.

    Parts, for fine-tuning in stages, are said by the names of their tensors: the *head* is ``classifier_prefix``, which
    ``embed`` does not use; the *neck* are ``neck_prefixes``; everything else is the *backbone* in the narrow sense.
    """

    classifier_prefix: ClassVar[str]
    neck_prefixes: ClassVar[tuple[str, ...]] = ()
    sizes: ClassVar[tuple[str, ...]] = ()  # the settings of its own, of `kd_cache.train.settings.SIZES`
    bare_prefixes: ClassVar[tuple[str, ...]] = ()  # what names of published weights that it can start from lack
    num_classes: int

    @classmethod
    def sized(
        cls, num_classes: int, width: int | None, hidden: tuple[int, ...] | None, dropout: float, **sizes: Any
    ) -> Self:
        """An untrained net by settings: ``width`` of the embedding, ``hidden`` widths of the classifier, and ``sizes``.

        Raises `UsageError` for a setting that this architecture does not have, ``ValueError`` for impossible sizes.
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


class ConvolutionalHead(Backbone):
    """A net that ends in a 1×1 convolution to classes and a global mean, so that frames and bins are free."""

    title: ClassVar[str]
    least: ClassVar[tuple[int, int]] = (1, 1)
    """Frames and bins that it needs."""

    @classmethod
    def by_sizes(cls, num_classes: int, **sizes: Any) -> Self:
        """An untrained net; of ``sizes`` those that are given. Raises ``ValueError`` as `sized`."""
        raise NotImplementedError

    @classmethod
    def sized(
        cls, num_classes: int, width: int | None, hidden: tuple[int, ...] | None, dropout: float, **sizes: Any
    ) -> Self:
        if hidden:
            raise UsageError(
                f"{cls.title} ends in a convolution: it has no hidden layers for --mlp-hidden-dims",
                hint="Leave it out, or train the head of a City2Scene teacher with it.",
            )
        if width is not None:
            raise UsageError(f"{cls.title} has no --feature-dim", hint=f"Its width is said by {flags(cls.sizes)}.")
        return cls.by_sizes(num_classes, **sizes)

    def feature_map(self, x: Tensor) -> Tensor:
        """``[B, 1, F, T]`` → ``[B, embedding_dim, F', T']``."""
        raise NotImplementedError

    def embed(self, x: Tensor) -> Tensor:
        """``[B, T, F]`` → ``[B, embedding_dim]``: the global mean of the feature map."""
        return self._mapped(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.get_submodule(self.classifier_prefix[:-1])(self._mapped(x))
        return logits.mean(dim=(2, 3))

    def _mapped(self, x: Tensor) -> Tensor:
        require_log_mel(self.title, x, *self.least)
        return self.feature_map(x.transpose(1, 2).unsqueeze(1))


def convolution(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    relu: bool = True,
) -> nn.Sequential:
    """Convolution without bias, padded by half its kernel, batch norm, ReLU: [B, C_in, F, T] → [B, C_out, F', T']."""
    padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else []))


def flags(names: Sequence[str]) -> str:
    """Settings as a command line has them: ``--base-channels, --expansion-rate``."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


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
