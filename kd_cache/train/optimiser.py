"""What a step is made of: loss, optimiser and learning rate, and the average of the weights that come of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_cache.train.augment import Mixed
from kd_cache.train.clips import Clips
from kd_cache.train.freezing import trainable_parameters
from kd_cache.train.settings import Settings, Stage


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


def make_optimiser(net: nn.Module, stage: Stage, settings: Settings) -> torch.optim.Optimizer:
    """Of what is trainable. Weight decay for matrices and kernels; none for biases and batch norms."""
    parameters = [parameter for _, parameter in trainable_parameters(net)]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, stage.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)
    return torch.optim.AdamW(groups, stage.lr)


def state_of(optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """The optimiser's tensors and the scaler's, by name."""
    found: dict[str, Tensor] = {}
    for number, values in optimiser.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                found[f"optimiser.{number}.{name}"] = value
    if scaler.is_enabled():
        state = scaler.state_dict()
        found["scaler"] = torch.tensor([state["scale"], float(state["_growth_tracker"])], dtype=torch.float64)
    return found


def restore(optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler, kept: Mapping[str, Tensor]) -> None:
    """Give both what `state_of` said of them."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in kept.items():
        kind, _, rest = name.partition(".")
        if kind == "optimiser":
            number, _, key = rest.partition(".")
            states.setdefault(int(number), {})[key] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
    for parameter, values in optimiser.state.items():  # laid out in memory as they would be had nothing happened
        for name, value in values.items():
            if isinstance(value, Tensor) and name != "step":
                values[name] = torch.empty_like(parameter).copy_(value)
    if "scaler" in kept:
        scale, growth = kept["scaler"].tolist()
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})


class Schedule:
    """The learning rate of each step of a stage: up a line while it warms up, then constant or down half a cosine."""

    def __init__(self, stage: Stage, settings: Settings, per_epoch: int) -> None:
        self._stage = stage
        self._steps = per_epoch * stage.epochs
        # A stage of a few epochs must not be all warm-up.
        self._warmup = min(round(settings.warmup_epochs * per_epoch), self._steps // 3)

    def lr(self, step: int) -> float:
        if step < self._warmup:
            return self._stage.lr * (step + 1) / (self._warmup + 1)
        if self._stage.schedule == "constant":
            return self._stage.lr
        way = (step - self._warmup) / max(self._steps - self._warmup, 1)
        return self._stage.lr * (1 + math.cos(math.pi * way)) / 2


@torch.no_grad()
def average(averaged: nn.Module, net: nn.Module, decay: float) -> None:
    """``averaged`` ← decay · averaged + (1 − decay) · net, each tensor once; counters are copied."""
    for old, new in zip(_tensors(averaged), _tensors(net), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def _tensors(net: nn.Module) -> list[Tensor]:
    """What a checkpoint keeps, each tensor once, whatever its names."""
    return list({id(tensor): tensor for tensor in net.state_dict(keep_vars=True).values()}.values())
