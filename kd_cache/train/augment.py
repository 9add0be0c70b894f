"""Augmentation of log-mel batches while they train. Randomness comes from a generator that the caller seeds."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from kd_cache.errors import UsageError


@dataclass(frozen=True)
class Augmentation:
    """How strongly clips are changed; 0 leaves a change out.

    Attributes:
        time_roll: clips are rolled in time by up to this share of their length.
        time_mask, freq_mask: one stretch of up to this share of the frames (mel bins) takes the clip's mean
            (SpecAugment, Park et al. 2019, arXiv 1904.08779).
        mixup: α of the Beta(α, α) that two clips and their labels are mixed by (Zhang et al. 2018, arXiv 1710.09412).
        freq_mixstyle: the probability that a batch's frequency-wise statistics are mixed between its clips (MixStyle,
            Zhou et al. 2021, arXiv 2104.02008, over frequency bins as Schmid et al. have it for DCASE 2022).
        mixstyle_alpha: α of the Beta(α, α) they are mixed by.
        device_response: largest height, in the features' unit, of each of three random smooth bumps over frequency that
            are added, as another microphone would; three clips in ten get a noise floor too.
    """

    time_roll: float = 0.0
    time_mask: float = 0.0
    freq_mask: float = 0.0
    mixup: float = 0.0
    freq_mixstyle: float = 0.0
    mixstyle_alpha: float = 0.3
    device_response: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, most = getattr(self, field.name), _MOST.get(field.name, 1.0)
            if not 0 <= value <= most:
                raise UsageError(f"{field.name} is {value}, expected 0 to {most}")

    @property
    def is_off(self) -> bool:
        return self == Augmentation(mixstyle_alpha=self.mixstyle_alpha)

    def changed(self, **values: Any) -> Augmentation:
        """With other values where they are not ``None``."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


_MOST: Final = {"mixup": 10.0, "mixstyle_alpha": 10.0, "device_response": 10.0}
_MODERATE: Final = Augmentation(time_roll=1.0, freq_mixstyle=0.4, device_response=1.0)
LEVELS: Final = {
    "off": Augmentation(),
    "moderate": _MODERATE,
    "full": _MODERATE.changed(time_mask=0.1, freq_mask=0.1, mixup=0.2),
}
"""Names for what a stage of training asks for."""


class Mixed(NamedTuple):
    """A batch and its labels: each clip is ``share`` [B] of its own and the rest of its partner, clip ``partner`` [B].

    Both are ``None`` where nothing was mixed.
    """

    features: Tensor
    share: Tensor | None = None
    partner: Tensor | None = None


def augmented(x: Tensor, how: Augmentation, chance: torch.Generator) -> Mixed:
    """A changed copy of ``x`` [B, T, F]. ``chance`` is a generator of the CPU: a seed means one thing everywhere."""
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
