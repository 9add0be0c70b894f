"""One teacher out of several: logits ``[B, K, C]`` → logits ``[B, C]`` of what they say together.

Every way gives logits whose softmax at the loss's temperature T is the fused distribution. A weighted sum of logits is
the geometric (log) pool, which is the same at every T; the mean of probabilities (linear pool) is not, so it is told T.
The mean of the losses towards each teacher has exactly the gradient of the linear pool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from kd_cache.distill.recipe import numbers_by_name
from kd_cache.errors import UsageError, shown
from kd_cache.serve.topk import NOTHING, TopK
from kd_cache.store.names import MODES

WEIGHTS: Final = "weights:"
FITTED: Final = ("fit", "gate")
SHARPEST: Final = 1e-3
"""What is added to an entropy, in nats: a teacher without doubt counts a thousand times, not without bound."""


class Fusion(Protocol):
    """``logits`` ``[B, K, C]`` → ``[B, C]``, for use at ``temperature``; ``labels`` ``[B]`` int64, negative: none."""

    def __call__(self, logits: Tensor, labels: Tensor | None, temperature: float, /) -> Tensor: ...


def fuse(
    logits: Tensor | TopK,
    mode: str | Fusion = "mean",
    *,
    teachers: Sequence[str] = (),
    labels: Tensor | None = None,
    temperature: float = 1.0,
) -> Any:
    """Logits ``[B, C]`` float32 of one teacher made of ``logits`` ``[B, K, C]``.

    Of a `TopK` of one teacher, or where ``mode`` names one, it is that teacher's `TopK`. Of several the rest of each is
    spread evenly over its other classes (`TopK.dense` at the temperature); ``entropy``, ``label`` and a gate, which
    need the exact distributions, refuse them.

    Args:
        mode: ``mean`` of the logits; ``probs``, the mean of the probabilities; ``entropy``, weights by 1 / entropy;
            ``label``, weights by each teacher's probability of the label (CA-MKD, Zhang et al. 2022, arXiv 2201.00007),
            and by 1 / entropy where there is none; ``weights:a=0.7,b=0.3``; a teacher's name; or what `fit` and
            `fit_gate` gave.
        teachers: their names in the order of ``logits``, as ``LogitCache.teachers`` has them.
        labels: ``[B]`` int64 for ``label``; negative where a row has none. Never a target's.
        temperature: at which the result will be used.

    Raises:
        UsageError: logits of another shape, an unknown mode, or one that must be fitted first.
    """
    if isinstance(logits, TopK):
        return _fused_topk(logits, fusion_of(mode, teachers), labels, temperature)
    if logits.ndim != 3 or (teachers and logits.shape[1] != len(teachers)):
        expected = f"[B, {len(teachers)}, C]" if teachers else "[B, teachers, C]"
        raise UsageError(f"expected the teachers' logits as {expected}, found {list(logits.shape)}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return fusion_of(mode, teachers)(wide, labels, temperature)


def fusion_of(mode: str | Fusion, teachers: Sequence[str] = ()) -> Fusion:
    """The function behind a mode's name. Raises `UsageError` as `fuse` does."""
    if taken := [name for name in teachers if name in MODES]:
        raise UsageError(f"a teacher is called {taken[0]}, which is the name of a mode", hint="Dump it under another.")
    if not isinstance(mode, str):
        return mode.ordered(teachers) if isinstance(mode, Weights) and teachers else mode
    if mode in _BY_NAME:
        return _BY_NAME[mode]
    if mode.startswith(WEIGHTS):
        return Weights.parse(mode.removeprefix(WEIGHTS)).ordered(teachers)
    if mode in teachers:
        return partial(_alone, list(teachers).index(mode))
    if mode in FITTED:
        how = "fit(cache, selection, provenances)" if mode == "fit" else "fit_gate(held_out(cache, …))"
        raise UsageError(f"{mode} must be fitted first: pass what kd_cache.distill.{how} gives")
    known = [*_BY_NAME, f"{WEIGHTS}NAME=X,…", *teachers]
    raise UsageError(f"no fusion is called {shown(mode)}; known: {', '.join(known)}")


def refuse_unfit_for_topk(fusion: Fusion) -> None:
    """Raise `UsageError` for a fusion that weighs teachers by what they say of every class."""
    if fusion in (_entropy, _label) or isinstance(fusion, Gate):
        raise UsageError(
            "entropy, label and gate weigh teachers by what they say of every class, and top-k rows hold only the most "
            "probable",
            hint="Take mean, probs, weights:…, fit, or one teacher.",
        )


def _fused_topk(rows: TopK, fusion: Fusion, labels: Tensor | None, temperature: float) -> Any:
    """A `TopK` ``[B]`` of ``[B, T]``, or logits for use at ``temperature`` made of vectors of all classes."""
    refuse_unfit_for_topk(fusion)
    if isinstance(fusion, partial) and fusion.func is _alone:
        return rows[:, fusion.args[0]]
    if fusion in (_mean, _probs) and rows.ids.shape[1] == 1:
        return rows[:, 0]
    return fusion(temperature * rows.dense(temperature).clamp(min=NOTHING), labels, temperature)


def _mean(logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    return logits.mean(dim=1)


def _probs(logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    log_probs = (logits / temperature).log_softmax(dim=2)
    return temperature * (torch.logsumexp(log_probs, dim=1) - math.log(logits.shape[1]))


def _alone(number: int, logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    return logits[:, number]


def _entropy(logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    return _pooled(logits, _by_entropy(logits))


def _label(logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    if labels is None:
        raise UsageError("the fusion label weighs teachers by the label, and got no labels")
    known = labels >= 0
    at = labels.clamp(min=0)[:, None, None].expand(-1, logits.shape[1], 1)
    of_label = logits.log_softmax(dim=2).gather(2, at)[:, :, 0].softmax(dim=1)  # p_k(y) / Σ p_j(y)
    return _pooled(logits, torch.where(known[:, None], of_label, _by_entropy(logits)))


def _by_entropy(logits: Tensor) -> Tensor:
    """``[B, K]``: weights by 1 / entropy, which sum to 1."""
    log_probs = logits.log_softmax(dim=2)
    sure = 1 / (SHARPEST - (log_probs.exp() * log_probs).sum(dim=2))
    return sure / sure.sum(dim=1, keepdim=True)


def _pooled(logits: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k t_k for weights ``[K]`` or ``[B, K]``. No matrix product: its last bits would depend on the batch."""
    return (logits * weights.to(logits.dtype)[..., None]).sum(dim=1)


_BY_NAME: Final[Mapping[str, Fusion]] = {"mean": _mean, "probs": _probs, "entropy": _entropy, "label": _label}


@dataclass(frozen=True)
class Weights:
    """A log pool with a weight per teacher, each at least 0.

    Attributes:
        of: the weights by the teachers' names, in the order of the logits.
        measured: what is known of them, as JSON values: see `kd_cache.distill.fit`.
    """

    of: Mapping[str, float]
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(0 <= weight < math.inf for weight in self.of.values()) or not any(self.of.values()):
            said = ", ".join(f"{shown(name)}={weight:g}" for name, weight in self.of.items())
            raise UsageError(f"the weights of teachers are {said}; expected 0 or more, and one of them more")

    @classmethod
    def parse(cls, text: str) -> Weights:
        """``scene=0.7,city2scene=0.3``. Raises `UsageError`."""
        said = f"{WEIGHTS}{shown(text)}"
        items = (item.strip() for item in text.split(","))
        return cls(numbers_by_name(items, lambda item: f"{said}: found {item}, expected each teacher once as NAME=X"))

    def ordered(self, teachers: Sequence[str]) -> Weights:
        """In the order of these teachers; those without a weight have 0. Raises `UsageError`."""
        if unknown := [name for name in self.of if name not in teachers]:
            raise UsageError(
                f"there is a weight for {', '.join(map(shown, unknown))}; the teachers are "
                f"{', '.join(teachers) or 'not named (pass teachers=cache.teachers)'}"
            )
        return Weights({name: self.of.get(name, 0.0) for name in teachers}, self.measured)

    def __call__(self, logits: Tensor, labels: Tensor | None, temperature: float, /) -> Tensor:
        if logits.shape[1] != len(self.of):
            raise UsageError(f"{len(self.of)} weights ({', '.join(self.of)}) for {logits.shape[1]} teachers")
        return _pooled(logits, torch.tensor(list(self.of.values()), dtype=torch.float32, device=logits.device))


class Gate(nn.Module):
    """Weights of the log pool by a small net from all teachers' logits: Linear K·C → 64, ReLU, → K, softmax.

    It begins as the mean. `kd_cache.distill.fit_gate` trains it; it takes no further part in training.
    """

    def __init__(self, teachers: Sequence[str], num_classes: int, hidden: int = 64) -> None:
        super().__init__()
        self.teachers, self.num_classes = tuple(teachers), num_classes
        self.hidden = nn.Linear(len(self.teachers) * num_classes, hidden)
        self.out = nn.Linear(hidden, len(self.teachers))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, logits: Tensor, labels: Tensor | None = None, temperature: float = 1.0, /) -> Tensor:
        if logits.shape[1:] != (len(self.teachers), self.num_classes):
            raise UsageError(
                f"the gate is of {', '.join(self.teachers)} with {self.num_classes} classes; found logits "
                f"{list(logits.shape)}"
            )
        centred = logits - logits.mean(dim=2, keepdim=True)
        return _pooled(logits, self.out(self.hidden(centred.flatten(1)).relu()).softmax(dim=1))
