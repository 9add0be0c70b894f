"""What a student is taught by: the numbers of an objective. Importing this imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from kd_cache.errors import UsageError, shown
from kd_cache.store.names import MODES_BEFORE

APPLY_TO: Final = ("target", "all", "source")
NORMALISE: Final = ("batch", "mask")
WEIGHTINGS: Final = ("none", "pmax", "threshold", "entropy")


@dataclass(frozen=True)
class Recipe:
    """How hard labels and teachers are joined (`kd_cache.distill.DistillLoss`).

    Attributes:
        loss: a name of `kd_cache.distill.LOSSES`; ``options`` are its further parameters.
        alpha: the weight of distillation; hard labels have 1 − α.
        temperature: of student and teachers; ``None``: the loss's own (4 of ``kl``). With ``temperature_end`` it goes
            there in a line over the epochs.
        apply_to: the rows that are distilled: of the ``target``, of the ``source``, or ``all``.
        normalise: ``batch`` divides both sums by the batch's rows; ``mask`` each by its own rows, which makes a target
            row many times as heavy as a source row where a batch has few of them.
        weighting: what a row's distillation is multiplied by, of the fused teacher at T = 1: ``pmax`` its highest
            probability, ``threshold`` whether that reaches ``confidence_threshold``, ``entropy`` 1 − H / log C.
        raw_weights: those weights as they are; else `DistillLoss.scale_weights` divides them by their mean.
        warmup_epochs: epochs without distillation; over the next ``ramp_epochs`` its weight grows to α in a line.
        keep_ce: hard labels have the weight 1 at all times, so that the loss keeps its scale after a warm-up.
    """

    loss: str = "kl"
    options: Mapping[str, float] = field(default_factory=dict)
    alpha: float = 0.5
    temperature: float | None = None
    temperature_end: float | None = None
    apply_to: str = "target"
    normalise: str = "batch"
    weighting: str = "none"
    confidence_threshold: float = 0.0
    raw_weights: bool = False
    warmup_epochs: int = 0
    ramp_epochs: int = 0
    keep_ce: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("apply_to", APPLY_TO), ("normalise", NORMALISE), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {shown(getattr(self, name))}, expected {', '.join(allowed)}")
        for name in ("alpha", "confidence_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        for name in ("warmup_epochs", "ramp_epochs"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.temperature_end is not None and self.temperature is None:
            raise UsageError("temperature_end without a temperature to begin with")

    @property
    def has_schedule(self) -> bool:
        """Whether epochs differ."""
        return bool(self.warmup_epochs or self.ramp_epochs or self.temperature_end is not None)

    def alpha_at(self, epoch: int) -> float:
        """The weight of distillation in an epoch, counted from 0."""
        since = epoch - self.warmup_epochs
        if since < 0:
            return 0.0
        return self.alpha if since >= self.ramp_epochs else self.alpha * (since + 1) / self.ramp_epochs

    def temperature_at(self, epoch: int, epochs: int) -> float | None:
        """The temperature in one of so many epochs; ``None``: the loss's own."""
        if self.temperature is None or self.temperature_end is None:
            return self.temperature
        way = min(epoch / max(epochs - 1, 1), 1)
        return self.temperature + way * (self.temperature_end - self.temperature)


DKD_RAMP: Final = 20
"""Epochs over which the weight of ``dkd`` grows on the command line, as in its authors' code (arXiv 2203.08679)."""

RECIPES: Final[Mapping[str, Recipe]] = {
    "default": Recipe(),
    "city2scene": Recipe(temperature=4.0, alpha=0.7, normalise="mask"),
    "dcase": Recipe(loss="dcase", temperature=2.0, alpha=0.98, apply_to="all"),
}
"""Bundles by name: ours, that of the City2Scene pipeline, and CP-JKU's of 2023 (λ = 1 − α = 0.02)."""


def parse_modes(text: str) -> list[str]:
    """``ce,fit,weights:a=0.7,b=0.3``: modes by commas; those within weights are theirs. Raises `UsageError`."""
    found: list[str] = []
    for part in map(str.strip, text.split(",")):
        if not part:
            raise UsageError(f"expected modes such as ce,mean,fit, found {shown(text)}")
        if found and found[-1].startswith("weights:") and "=" in part:
            found[-1] += f",{part}"
        else:
            found.append(MODES_BEFORE.get(part, part))
    return found


def parse_temperature(text: str) -> tuple[float, float | None]:
    """``4``, or ``4:1`` for a line from 4 to 1 over the epochs. Raises `UsageError`."""
    start, colon, end = text.partition(":")
    try:
        found = float(start), float(end) if colon else None
    except ValueError:
        found = (math.nan, None)
    if not all(0 < value < math.inf for value in found if value is not None):
        raise UsageError(f"expected a temperature such as 4, or 4:1, found {shown(text)}")
    return found


def parse_options(texts: Sequence[str]) -> dict[str, float]:
    """``beta=4``: further parameters of a loss. Raises `UsageError`."""
    return numbers_by_name(texts, lambda text: f"--loss-option {text}: expected each parameter once, as NAME=X")


def numbers_by_name(texts: Iterable[str], wrong: Callable[[str], str]) -> dict[str, float]:
    """``NAME=X``, each name once. Raises `UsageError` with what ``wrong`` says of the first text that is not so."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not name or name in found or math.isnan(number):
            raise UsageError(wrong(shown(text)))
        found[name] = number
    return found
