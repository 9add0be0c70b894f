"""Augmentation of log-mel batches while they train. Randomness comes from a generator that the caller seeds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_cache.train.settings import Augmentation


class Mixed(NamedTuple):
    """A batch and its labels: each clip is ``share`` [B] of its own and the rest of its partner, clip ``partner`` [B].

    Both are ``None`` where nothing was mixed.
    """

    features: Tensor
    share: Tensor | None = None
    partner: Tensor | None = None


def augmented(x: Tensor, how: Augmentation, chance: torch.Generator) -> Mixed:
    """A changed copy of ``x`` [B, T, F]. ``chance`` is a generator of the CPU: a seed means one thing everywhere.

    Of pairs [B, 2, T, F] both clips are changed alike: else what was changed would decide which is the better one.
    """
    if x.ndim == 4:
        same = chance.get_state()
        first = augmented(x[:, 0], how, chance)
        chance.set_state(same)
        return first._replace(features=torch.stack([first.features, augmented(x[:, 1], how, chance).features], dim=1))
    if how.time_roll:
        x = _rolled(x, how.time_roll, chance)
    if how.device_response:
        x = _recoloured(x, how.device_response, chance)
    if how.freq_mixstyle and _uniform(chance).item() < how.freq_mixstyle:
        x = _restyled(x, how.mixstyle_alpha, chance)
    if how.time_mask:
        x = _masked(x, 1, how.time_mask, chance)
    if how.freq_mask:
        x = _masked(x, 2, how.freq_mask, chance)
    if not how.mixup:
        return Mixed(x)
    share = _beta(how.mixup, len(x), chance).to(x.device)
    partner = torch.randperm(len(x), generator=chance).to(x.device)
    return Mixed(_between(x, x[partner], share[:, None, None]), share, partner)


def _uniform(chance: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=chance)


def _beta(alpha: float, count: int, chance: torch.Generator) -> Tensor:
    """``[count]`` of Beta(α, α), as X / (X + Y) of two Gamma(α) variables."""
    concentration = torch.full((2, count), float(alpha))
    x, y = torch._standard_gamma(concentration, generator=chance)
    # Both may underflow to zero for a small α; the limit of the ratio is then 0 or 1, and either is a fair draw.
    ratio = torch.where(x + y > 0, x / (x + y).clamp_min(1e-30), torch.ones(()))
    return torch.maximum(ratio, 1 - ratio)  # the clip's own label is never the lesser one


def _between(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return share * one + (1 - share) * other


def _rolled(x: Tensor, most: float, chance: torch.Generator) -> Tensor:
    batch, frames, _ = x.shape
    start = (most * frames * _uniform(chance, batch, 1)).long()
    index = (torch.arange(frames) + start) % frames  # [B, T]
    return x.gather(1, index.to(x.device)[:, :, None].expand_as(x))


def _recoloured(x: Tensor, height: float, chance: torch.Generator) -> Tensor:
    """Each clip with a smooth response of three random bumps over the mel bins, some with a floor of noise."""
    batch, _, bins = x.shape
    heights = height * (2 * _uniform(chance, batch, 3, 1) - 1)
    centres = bins * _uniform(chance, batch, 3, 1)
    widths = bins * (0.06 + 0.16 * _uniform(chance, batch, 3, 1))
    response = (heights / (1 + ((torch.arange(bins) - centres) / widths) ** 2)).sum(dim=1)  # [B, F]
    coloured = x + response[:, None, :].to(x.device)
    floor = (-1.5 * height * _uniform(chance, batch, 1, 1)).to(x.device)
    raised = (_uniform(chance, batch, 1, 1) < 0.3).to(x.device)
    return torch.where(raised, torch.maximum(coloured, floor), coloured)


def _restyled(x: Tensor, alpha: float, chance: torch.Generator) -> Tensor:
    """Each clip's mean and deviation per mel bin, moved towards those of another clip of the batch."""
    mean, deviation = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True, correction=0) + 1e-6  # [B, 1, F]
    share = _beta(alpha, len(x), chance).to(x.device)[:, None, None]
    partner = torch.randperm(len(x), generator=chance).to(x.device)
    return (x - mean) / deviation * _between(deviation, deviation[partner], share) + _between(
        mean, mean[partner], share
    )


def _masked(x: Tensor, axis: int, most: float, chance: torch.Generator) -> Tensor:
    batch, size = len(x), x.shape[axis]
    length = ((int(most * size) + 1) * _uniform(chance, batch, 1)).floor()
    start = ((size - length + 1) * _uniform(chance, batch, 1)).floor()
    place = torch.arange(size)
    hidden = (place >= start) & (place < start + length)  # [B, size]
    hidden = (hidden[:, :, None] if axis == 1 else hidden[:, None, :]).to(x.device)
    return torch.where(hidden, x.mean(dim=(1, 2), keepdim=True), x)
