"""Distillation losses, one number per row.

Each takes ``student`` and ``teacher``, logits ``[B, C]`` (raw, before softmax), and gives ``[B]``; of logits
``[B, L, C]`` of L frames the mean over them. What several rows make together (masks, weights, the division by B) is the
objective's. Half precision is computed in float32. Everything
comes from log-probabilities, so that loss and gradient stay finite for any finite logits. ``ls`` and ``lt`` are the
log-softmax of student and teacher at temperature T; the factor T² keeps the gradient's size where T changes (Hinton et
al. 2015, arXiv 1503.02531). Every loss raises `UsageError` for logits of other shapes, and for parameters out of range.
`kl` also takes a `TopK` as the teacher; the others refuse one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_cache.errors import UsageError
from kd_cache.serve.topk import NOTHING, TopK

FLOOR: Final = 1e-3
"""Spreads below this are taken for it: a constant row has no direction, and would have a gradient without bound."""

Loss = Callable[..., Tensor]


def _over_frames(loss: Loss) -> Loss:
    """Each frame is a row, and has its row's label; a row's loss is the mean over its frames."""

    @wraps(loss)
    def mean_over_frames(student: Tensor, teacher: Tensor | TopK, *labels: Any, **options: Any) -> Tensor:
        if isinstance(teacher, TopK):
            return _to_topk(loss.__name__, student, teacher, **options)
        if student.ndim != 3 or teacher.shape != student.shape:
            return loss(student, teacher, *labels, **options)
        count, frames = student.shape[:2]
        each = [label if label is None else label.repeat_interleave(frames) for label in labels]
        named = {
            name: value.repeat_interleave(frames) if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
        return loss(student.flatten(0, 1), teacher.flatten(0, 1), *each, **named).view(count, frames).mean(dim=1)

    return mean_over_frames


@_over_frames
def kl(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T² KL(t‖s) = T² Σ e^lt (lt − ls): the usual loss of distillation.

    Of a `TopK` ``[B, K]`` it is over K + 1 classes, the last of which is all that are not among the K: never more than
    over all. T is 1, 2 or 4 then.
    """
    ls, lt = _log_probs(student, teacher, temperature)
    return temperature**2 * _divergence(lt, ls)


@_over_frames
def soft_ce(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """−T² Σ e^lt ls: cross-entropy with soft targets. The gradient is that of `kl`."""
    ls, lt = _log_probs(student, teacher, temperature)
    return -(temperature**2) * (lt.exp() * ls).sum(dim=1)


@_over_frames
def dcase(student: Tensor, teacher: Tensor, *, temperature: float = 2.0) -> Tensor:
    """`kl` divided by C: what ``kl_div(reduction="mean")`` makes of it in the recipes of CP-JKU."""
    return kl(student, teacher, temperature=temperature) / student.shape[1]


@_over_frames
def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's decision (pseudo labels): `kl` with a teacher at T → 0."""
    student, teacher = _pair(student, teacher)
    return F.cross_entropy(student, teacher.argmax(dim=1), reduction="none")


@_over_frames
def rkl(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T² KL(s‖t): the student avoids what the teacher holds for impossible."""
    ls, lt = _log_probs(student, teacher, temperature)
    return temperature**2 * _divergence(ls, lt)


@_over_frames
def js(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T² (KL(t‖m) + KL(s‖m)) / 2 with m = (s + t) / 2; at most T² log 2."""
    ls, lt = _log_probs(student, teacher, temperature)
    middle = torch.logaddexp(ls, lt) - math.log(2)
    return temperature**2 * (_divergence(lt, middle) + _divergence(ls, middle)) / 2


@_over_frames
def skew(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, share: float = 0.1) -> Tensor:
    """T² KL(t‖share·t + (1−share)·s) (DistiLLM, Ko et al. 2024, arXiv 2402.03898); 0 < share < 1."""
    if not 0 < share < 1:
        raise UsageError(f"the share of skew is {share}, expected more than 0 and less than 1")
    ls, lt = _log_probs(student, teacher, temperature)
    return temperature**2 * _divergence(lt, torch.logaddexp(lt + math.log(share), ls + math.log1p(-share)))


@_over_frames
def ab(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, alpha: float = 0.9, beta: float = 0.2) -> Tensor:
    """T² times the α-β divergence, α, β > 0 (ABKD, Wang et al. 2025, arXiv 2505.04560).

    Σ t^(α+β) / (β(α+β)) + Σ s^(α+β) / (α(α+β)) − Σ t^α s^β / (αβ).
    """
    if alpha <= 0 or beta <= 0:
        raise UsageError(f"alpha and beta of ab are {alpha} and {beta}, expected more than 0")
    ls, lt = _log_probs(student, teacher, temperature)
    total = alpha + beta

    def summed(logs: Tensor) -> Tensor:
        return torch.logsumexp(logs, dim=1).exp()

    own = summed(total * lt) / (beta * total) + summed(total * ls) / (alpha * total)
    return temperature**2 * (own - summed(alpha * lt + beta * ls) / (alpha * beta))


@_over_frames
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over classes of the squared difference of centred logits: twice the limit of `kl` at T → ∞."""
    student, teacher = _pair(student, teacher)
    return (_centred(student) - _centred(teacher)).square().mean(dim=1)


@_over_frames
def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """T² (α TCKD + β NCKD) (Zhao et al. 2022, arXiv 2203.08679): label against the rest, and within the rest; C ≥ 3.

    ``labels`` as for `nkd`. With the weights α = 1, β = 1 − p_t(label) it is `kl`.
    """
    ls, lt = _log_probs(student, teacher, temperature)
    _refuse_two_classes("dkd", ls)
    at = targets(teacher, labels)[:, None]
    of_label = _divergence(_binary(lt, at), _binary(ls, at))
    within = _divergence(_without(lt, at).log_softmax(dim=1), _without(ls, at).log_softmax(dim=1))
    return temperature**2 * (alpha * of_label + beta * within)


@_over_frames
def rld(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    label_temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Refined logit distillation (Sun et al. 2024, arXiv 2408.07703); ``labels`` as for `nkd`.

    α times the binary KL between the teacher's confidence in its decision and the student's in the label, and β times
    the KL among the classes that the teacher holds for less likely than the label (0 where those are fewer than two).
    """
    ls, lt = _log_probs(student, teacher, label_temperature)
    at = targets(teacher, labels)[:, None]
    confident = _divergence(_binary(lt, lt.argmax(dim=1, keepdim=True)), _binary(ls, at))
    student, teacher = _pair(student, teacher)
    below = teacher < teacher.gather(1, at)
    # A row without a class below keeps all of them, and counts for nothing.
    kept = below | (below.sum(dim=1, keepdim=True) < 2)
    ls, lt = (torch.where(kept, z / temperature, -math.inf).log_softmax(dim=1) for z in (student, teacher))
    among = torch.where(kept, lt.exp() * torch.where(kept, lt - ls, 0), 0).sum(dim=1)
    among = torch.where(below.sum(dim=1) < 2, 0, among)
    return alpha * label_temperature**2 * confident + beta * temperature**2 * among


@_over_frames
def nkd(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, *, temperature: float = 1.0, gamma: float = 1.5
) -> Tensor:
    """−p_t(label) log p_s(label) − γ T² Σ p̂_t log p̂_s (Yang et al. 2023, arXiv 2303.13005); C ≥ 3.

    ``p̂`` are the probabilities at T among the other classes. ``labels`` ``[B]`` int64; of a row whose label is negative
    (none is known, as of a target's), and without ``labels`` of every row, the teacher's decision stands for it.
    """
    ls, lt = _log_probs(student, teacher, 1.0)
    _refuse_two_classes("nkd", ls)
    at = targets(teacher, labels)[:, None]
    of_label = -lt.gather(1, at).exp() * ls.gather(1, at)
    student, teacher = _pair(student, teacher)
    ls, lt = _log_probs(_without(student, at), _without(teacher, at), temperature)
    return of_label[:, 0] - gamma * temperature**2 * (lt.exp() * ls).sum(dim=1)


@_over_frames
def wttm(student: Tensor, teacher: Tensor, *, gamma: float = 0.1) -> Tensor:
    """U KL(q‖s) with q = p_t^γ / U and U = Σ p_t^γ; the student at T = 1 (Zheng and Yang 2024, arXiv 2402.11148)."""
    ls, lt = _log_probs(student, teacher, 1.0)
    mass = torch.logsumexp(gamma * lt, dim=1, keepdim=True)
    return mass[:, 0].exp() * _divergence(gamma * lt - mass, ls)


@_over_frames
def dist(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None = None,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """T² (β (1 − ρ over classes) + γ (1 − ρ over rows)), ρ Pearson's (Huang et al. 2022, arXiv 2205.10536).

    The second term compares each class's column over the batch, so it is the same for all rows; with fewer than two it
    is 0. ``rows`` ``[B]`` bool: those that count; the loss of the others is 0. Splitting the batch changes it.
    """
    ls, lt = _log_probs(student, teacher, temperature)
    counted = torch.ones(len(ls), dtype=torch.bool, device=ls.device) if rows is None else rows
    s, t = ls.exp(), lt.exp()
    found = beta * (1 - _correlation(s, t, dim=1))
    if int(counted.sum()) >= 2:
        found = found + gamma * (1 - _correlation(s[counted], t[counted], dim=0).mean())
    return temperature**2 * torch.where(counted, found, 0)


@_over_frames
def logit_std(student: Tensor, teacher: Tensor, *, temperature: float = 2.0) -> Tensor:
    """`kl` of standardised logits (Sun et al. 2024, arXiv 2403.01427): scale and shift of a row do not matter.

    The standard deviation is floored at `FLOOR`; the published 1e-7 gives a constant row a gradient of 10⁶.
    """
    student, teacher = (_centred(z) / _spread(z) for z in _pair(student, teacher))
    return kl(student, teacher, temperature=temperature)


@_over_frames
def bce(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Σ over classes of the binary cross-entropy with the targets σ(t/T): for multi-label teachers."""
    _refuse_temperature(temperature)
    student, teacher = _pair(student, teacher)
    wanted = (teacher / temperature).sigmoid()
    return F.binary_cross_entropy_with_logits(student, wanted, reduction="none").sum(dim=1)


LOSSES: Final[Mapping[str, Callable[..., Tensor]]] = {
    each.__name__: each
    for each in (kl, soft_ce, dcase, hard, rkl, js, skew, ab, mse, dkd, rld, nkd, wttm, dist, logit_std, bce)
}
"""By name."""
NEED_LABELS: Final = frozenset({"dkd", "rld", "nkd"})


def targets(teacher: Tensor, labels: Tensor | None) -> Tensor:
    """``[B]`` int64: the labels, and where there is none (it is negative) the teacher's decision."""
    decided = teacher.argmax(dim=1)
    return decided if labels is None else torch.where(labels >= 0, labels, decided)


def _to_topk(name: str, student: Tensor, teacher: TopK, *, temperature: float = 4.0, **options: Any) -> Tensor:
    """`kl` to the most probable classes of a teacher and all others as one."""
    if name != "kl":
        raise UsageError(
            f"{name} needs the teacher's logit of every class, and top-k rows hold only the most probable",
            hint="Take kl, or dump with --dtype fp16.",
        )
    if student.ndim != 2 or teacher.ids.ndim != 2 or student.shape != (len(teacher), teacher.num_classes):
        raise UsageError(
            f"expected the student's logits as [B, {teacher.num_classes}] and a TopK [B, K], found "
            f"{list(student.shape)} and {list(teacher.ids.shape)}",
            hint="Of several teachers take one, topk[:, 0], or make them one by kd_cache.distill.fuse.",
        )
    inside, rest = teacher.softened(temperature)
    ls = (student.to(torch.promote_types(student.dtype, torch.float32)) / temperature).log_softmax(dim=1)
    others = torch.logsumexp(ls.scatter(1, teacher.ids, -math.inf), dim=1, keepdim=True)
    lt = torch.cat([inside, rest[:, None]], dim=1).clamp(min=NOTHING)
    return temperature**2 * _divergence(lt, torch.cat([ls.gather(1, teacher.ids), others], dim=1))


# -- parts ------------------------------------------------------------------------------------------------------------


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32, or float64 where one is: ``[B, C]`` of one shape, for nothing may be broadcast."""
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[1] < 2:
        raise UsageError(
            f"expected logits of student and teacher as [B, C] of one shape, found {list(student.shape)} and "
            f"{list(teacher.shape)}",
            hint="Teachers [B, T, C] are made one by kd_cache.distill.fuse.",
        )
    kind = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(kind), teacher.to(kind)


def _refuse_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise UsageError(f"the temperature is {temperature}, expected a number more than 0")


def _log_probs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    _refuse_temperature(temperature)
    student, teacher = _pair(student, teacher)
    return (student / temperature).log_softmax(dim=1), (teacher / temperature).log_softmax(dim=1)


def _divergence(lp: Tensor, lq: Tensor) -> Tensor:
    """KL(p‖q) of log-probabilities ``[B, C]``."""
    return (lp.exp() * (lp - lq)).sum(dim=1)


def _without(z: Tensor, at: Tensor) -> Tensor:
    """``[B, C−1]``: each row without its class ``at`` ``[B, 1]``."""
    kept = torch.arange(z.shape[1] - 1, device=z.device).expand(len(z), -1)
    return z.gather(1, kept + (kept >= at))


def _binary(log_probs: Tensor, at: Tensor) -> Tensor:
    """``[B, 2]`` log-probabilities: of the class ``at``, and of all others together."""
    return torch.cat([log_probs.gather(1, at), torch.logsumexp(_without(log_probs, at), dim=1, keepdim=True)], dim=1)


def _centred(z: Tensor, dim: int = 1) -> Tensor:
    return z - z.mean(dim=dim, keepdim=True)


def _spread(z: Tensor) -> Tensor:
    """``[B, 1]``: standard deviation (of C − 1 degrees of freedom), at least `FLOOR`."""
    return z.var(dim=1, keepdim=True).clamp(min=FLOOR**2).sqrt()


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = (_centred(z, dim) for z in (a, b))
    a, b = (z / z.square().sum(dim=dim, keepdim=True).clamp(min=FLOOR**2).sqrt() for z in (a, b))
    return (a * b).sum(dim=dim)


def _refuse_two_classes(name: str, logits: Tensor) -> None:
    if logits.shape[1] < 3:
        raise UsageError(
            f"{name} compares the classes beside the label, so it needs three classes or more; these logits have "
            f"{logits.shape[1]}",
            hint="Use kl.",
        )
