"""Heads over embeddings: untrained, and with inputs that are standardised while they train and not when kept."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kd_cache.train.layers import mlp
from kd_cache.train.settings import Settings


def make_head(inputs: int, settings: Settings, seed: int) -> nn.Linear | nn.Sequential:
    """An untrained scene head over embeddings ``[B, inputs]``: linear, or with hidden layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.mlp_hidden_dims:
            return mlp(inputs, settings.mlp_hidden_dims, settings.num_classes, settings.dropout)
        linear = nn.Linear(inputs, settings.num_classes)
    # A convex problem: where it begins does not matter, and at zero every class is as likely as any other.
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Standardised(nn.Module):
    """``head((x − mean) / scale)``: embeddings ``[B, D]`` → logits ``[B, C]``.

    The embedding of a frozen backbone has directions of very different size, in which a linear layer learns at very
    different speed. ``mean`` and ``scale`` ``[D]`` are constants of the training embeddings; `folded` is the same
    function as a plain head.
    """

    classifier_prefix = ""  # all of it is a head
    mean: Tensor
    scale: Tensor

    def __init__(self, head: nn.Linear | nn.Sequential, embeddings: Tensor) -> None:
        super().__init__()
        self.head = head
        exact = embeddings.double()
        mean, deviation = exact.mean(dim=0), exact.std(dim=0, correction=0)
        # What is constant in training says nothing: scaled up, its first other value would drown everything else.
        scale = torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1.0)
        self.register_buffer("mean", mean.to(embeddings.dtype))
        self.register_buffer("scale", scale.to(embeddings.dtype))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((x - self.mean) / self.scale)
        return logits

    @property
    def out_features(self) -> int:
        return _layers(self.head)[-1].out_features

    @torch.no_grad()
    def folded(self) -> nn.Linear | nn.Sequential:
        """A plain head that takes embeddings as they are; equal up to rounding."""
        plain = copy.deepcopy(self.head)
        first = _layers(plain)[0]
        weight = first.weight.double() / self.scale.double()
        first.bias.copy_(first.bias.double() - weight @ self.mean.double())
        first.weight.copy_(weight)
        return plain


def _layers(head: nn.Linear | nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
