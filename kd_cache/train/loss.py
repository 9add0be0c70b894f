"""What a training minimises: cross-entropy with mixed labels, class weights and label smoothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_cache.train.augment import Mixed
from kd_cache.train.clips import Clips
from kd_cache.train.settings import Settings


def cross_entropy(
    logits: Tensor, labels: Tensor, mixed: Mixed, weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """Mean over the batch, by the classes' weights; a mixed clip counts for both of its labels, by their shares."""

    def towards(targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits, targets, weight=weights, label_smoothing=label_smoothing, reduction="none")
        return loss, torch.ones_like(loss) if weights is None else weights[targets]

    loss, weight = towards(labels)
    if mixed.share is not None and mixed.partner is not None:
        other_loss, other_weight = towards(labels[mixed.partner])
        loss = mixed.share * loss + (1 - mixed.share) * other_loss
        weight = mixed.share * weight + (1 - mixed.share) * other_weight
    return loss.sum() / weight.sum()


def class_weights(clips: Clips, settings: Settings) -> Tensor | None:
    """Each class as heavy as its samples are rare (N / (C · n_c)), classes without samples 0."""
    if settings.class_weights == "none":
        return None
    labels = clips.labels(settings.label)
    counts = torch.bincount(labels, minlength=settings.num_classes).float()
    return torch.where(counts > 0, len(labels) / (settings.num_classes * counts.clamp_min(1)), 0.0)
