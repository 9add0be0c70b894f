"""What a built-in architecture is: a net that embeds and classifies, is built by settings, and from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from torch import Tensor, nn


class Backbone(nn.Module):
    """A net over log-mels: ``[B, T, F]`` float → logits ``[B, num_classes]``, by way of an embedding.

    Parts, for fine-tuning in stages, are said by the names of their tensors: the *head* is ``classifier_prefix``, which
    ``embed`` does not use; the *neck* are ``neck_prefixes``; everything else is the *backbone* in the narrow sense.
    """

    classifier_prefix: ClassVar[str]
    neck_prefixes: ClassVar[tuple[str, ...]] = ()
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
