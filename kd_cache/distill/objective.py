"""Hard labels and teachers in one loss, for a user's own loop and for ours.

    L = (1/B) Σ_i [ hard_i (1−a) CE_i + soft_i a w_i KD_i ]

``hard`` are source rows with a label, ``soft`` the rows that the recipe distils, ``a`` the weight of the epoch, ``w``
by the fused teacher's confidence. Both sums are divided by the rows of the batch: a row weighs the same in any batch.
Where nets score each frame, a row's two losses are their means over its frames.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cache.dataset.manifest import IGNORED
from kd_cache.distill.fusion import Fusion, fuse, fusion_of, refuse_unfit_for_topk
from kd_cache.distill.losses import LOSSES, NEED_LABELS
from kd_cache.distill.recipe import Recipe
from kd_cache.errors import MissingLogitsError, UsageError, shown
from kd_cache.serve.topk import TopK
from kd_cache.store.topk import at_temperature

CE: Final = "ce"
"""The mode without a teacher: the twin that every distillation is compared with."""


@dataclass(frozen=True)
class Seen:
    """What an epoch's batches held: rows, those with a hard label, those distilled, and those without a teacher's row;
    batches in which nothing counted; and the weight of a distilled row over that of a hard one (``None`` of neither).
    """

    rows: int
    hard: int
    soft: int
    missing: int
    idle_batches: int
    ratio: float | None


class DistillLoss(nn.Module):
    """The loss of a batch: a number to call ``backward`` on.

        objective = DistillLoss("mean", teachers=cache.teachers, alpha=0.5, temperature=4)
        for epoch in range(epochs):
            objective.start_epoch(epoch, epochs)
            for batch in student_loader(…):
                logits = student(batch["features"])
                loss = objective(logits, batch["teacher_logits"], batch["scene_label"], batch["source_mask"])

    Args:
        fusion: a mode of `fuse`, or what `fit` or `fit_gate` gave; ``ce`` for hard labels alone.
        teachers: their names in the order of the logits.
        recipe: the numbers; ``changed`` are fields of it to change.
        on_missing: ``raise`` where a row of the teachers is not finite (``LogitCache.open(on_miss="nan")`` gives such
            rows), or ``skip`` its distillation, and count it.

    Raises:
        UsageError: an unknown loss or fusion, an option that the loss has not, parameters out of range.
    """

    def __init__(
        self,
        fusion: str | Fusion = "mean",
        *,
        teachers: Sequence[str] = (),
        recipe: Recipe | None = None,
        on_missing: str = "raise",
        **changed: Any,
    ) -> None:
        super().__init__()
        self.recipe = replace(recipe or Recipe(), **changed)
        if self.recipe.loss not in LOSSES:
            raise UsageError(f"no loss is called {shown(self.recipe.loss)}; known: {', '.join(LOSSES)}")
        if on_missing not in ("raise", "skip"):
            raise UsageError(f"on_missing is {shown(on_missing)}, expected raise or skip")
        self.fusion = None if fusion == CE else fusion_of(fusion, teachers)
        self.on_missing = on_missing
        self._loss, self._options = LOSSES[self.recipe.loss], dict(self.recipe.options)
        self._own_temperature = _default_temperature(self.recipe)
        self._scale, self._frames = 1.0, 1
        self._started = not self.recipe.has_schedule
        self._set_epoch(0, 1)

    # -- epochs -------------------------------------------------------------------------------------------------------

    def start_epoch(self, epoch: int, epochs: int = 1) -> None:
        """Take the weight and temperature of an epoch (counted from 0, of so many), and count anew."""
        self._started = True
        self._set_epoch(epoch, epochs)

    def _set_epoch(self, epoch: int, epochs: int) -> None:
        self.alpha = 0.0 if self.fusion is None else self.recipe.alpha_at(epoch)
        temperature = self.recipe.temperature_at(epoch, epochs)
        if self._own_temperature is not None:
            self._options["temperature"] = self._own_temperature if temperature is None else temperature
        self._counts: Tensor | float = 0.0

    @property
    def temperature(self) -> float:
        """Of the epoch: of the loss and of the teachers' fusion."""
        return float(self._options.get("temperature", 1.0))

    @property
    def hard_weight(self) -> float:
        """What cross-entropy is multiplied by in this epoch."""
        return 1.0 if self.recipe.keep_ce else 1 - self.alpha

    @property
    def seen(self) -> Seen:
        """What the batches of this epoch held so far."""
        counts = self._counts.tolist() if isinstance(self._counts, Tensor) else [0.0] * 7
        rows, hard, soft, missing, idle = map(int, counts[:5])
        ratio = counts[6] / soft / (counts[5] / hard) if soft and hard and counts[5] else None
        return Seen(rows, hard, soft, missing, idle, ratio)

    # -- a batch ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | TopK | None,
        labels: Tensor,
        source_mask: Tensor,
        *,
        partner: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:
        """The batch's loss, float32; 0 where no row counts.

        Args:
            student: logits ``[B, C]``, or ``[B, L, C]`` of L frames, each of which has its row's label.
            teacher: logits ``[B, K, C]``, or ``[B, C]`` of teachers that are fused already, or a `TopK` of either
                shape, for the loss ``kl`` without weighting; ``None`` only with ``ce``.
                Of frames ``[B, K, L, C]``, or ``[B, L, C]``.
            labels: ``[B]`` int64, negative where there is none. Those of target rows are not looked at.
            source_mask: ``[B]`` bool, which rows are of the source.
            partner, share: of mixup, ``[B]``: clip i is ``share[i]`` of its own and the rest clip ``partner[i]``. Both
                losses are mixed alike; a partner without label or logits adds nothing to that part.

        Raises:
            MissingLogitsError: a row that is distilled has no finite logits, with ``on_missing="raise"``.
            UsageError: shapes that do not fit, or a schedule whose epoch nobody gave (`start_epoch`).
        """
        if not self._started:
            raise UsageError(
                "this recipe changes from epoch to epoch, and nobody said which one this is",
                hint="Call start_epoch(epoch, epochs) at the beginning of each.",
            )
        _refuse_misfit(student, teacher, labels, source_mask)
        if student.ndim == 3:
            self._frames = student.shape[1]
            at = torch.arange(self._frames, device=student.device)
            partner = None if partner is None else (partner[:, None] * self._frames + at).flatten()
            teacher, labels, source_mask, share = self._each_frame(teacher, labels, source_mask, share)
            student = student.flatten(0, 1)
        else:
            self._frames = 1
        student = student.to(torch.promote_types(student.dtype, torch.float32))
        is_hard = source_mask & (labels >= 0)
        labels = torch.where(is_hard, labels, IGNORED)  # no label of a target goes on from here
        soft = self._soft(teacher, labels, source_mask)
        hard_weight, soft_weight = self._row_weights(is_hard, soft)

        def towards(of: Tensor) -> Tensor:
            """Each row's loss with the labels and the teacher of row ``of``."""
            found = hard_weight * F.cross_entropy(student, labels[of], reduction="none", ignore_index=IGNORED)
            if soft is None or not self.alpha:
                return found
            rows, weights = soft.rows[of], soft.weights[of]
            loss = self._per_row(student, soft.logits[of], labels[of], rows & (weights > 0))
            return found + torch.where(rows, soft_weight * weights * loss, 0)

        loss = towards(torch.arange(len(student), device=student.device))
        if partner is not None and share is not None:
            loss = share * loss + (1 - share) * towards(partner)
        return loss.sum()

    def _each_frame(self, teacher: Any, *of_rows: Tensor | None) -> tuple[Any, ...]:
        """Every frame as a row: ``[B, K, L, C]`` as ``[B·L, K, C]``, and what rows have once for each of them."""
        if teacher is not None:
            teacher = (teacher if teacher.ndim == 3 else teacher.transpose(1, 2)).flatten(0, 1)
        return teacher, *(each if each is None else each.repeat_interleave(self._frames) for each in of_rows)

    def scale_weights(self, teacher: Tensor | TopK, source_mask: Tensor, labels: Tensor | None = None) -> float:
        """Divide the confidence weights by their mean over these rows, all that an epoch distils; returns that mean.

        So a threshold does not make steps smaller; with ``raw_weights`` nothing is divided. ``teacher`` is
        ``[N, K, C]``, or ``[N, K, L, C]``; ``source_mask``, ``labels`` are ``[N]``.
        Raises `UsageError` where no row has any weight.
        """
        self._scale, self._frames = 1.0, 1
        if isinstance(teacher, Tensor) and teacher.ndim == 4:
            self._frames = teacher.shape[2]
            teacher, source_mask, labels = self._each_frame(teacher, source_mask, labels)
        if labels is not None:
            labels = torch.where(source_mask, labels, IGNORED)
        soft = self._soft(teacher, labels, source_mask)
        mean = 0.0 if soft is None or not soft.rows.any() else float(soft.weights[soft.rows].mean())
        if not mean:
            raise UsageError(
                f"no row that is distilled has a weight: {self.recipe.weighting} at "
                f"{self.recipe.confidence_threshold:g} leaves none",
                hint="Lower the confidence threshold.",
            )
        self._scale = 1.0 if self.recipe.raw_weights else mean
        return mean

    def _soft(self, teacher: Tensor | TopK | None, labels: Tensor | None, source_mask: Tensor) -> _Soft | None:
        """What the teachers say to this batch; ``None`` without teachers."""
        if self.fusion is None:
            return None
        if teacher is None:
            raise UsageError(f"there are no teacher logits; only the mode {CE} goes without")
        if isinstance(teacher, TopK):
            self.refuse_beyond_topk()
            present = torch.isfinite(teacher.log_probs).flatten(1).all(dim=1)
        else:
            teacher = teacher.detach().to(torch.promote_types(teacher.dtype, torch.float32))
            present = torch.isfinite(teacher).flatten(1).all(dim=1)
        everyone = torch.ones_like(source_mask)
        wanted = {"target": ~source_mask, "source": source_mask, "all": everyone}[self.recipe.apply_to]
        if self._frames > 1:  # a row is there with all of its frames, or not at all
            present = present.view(-1, self._frames).all(dim=1).repeat_interleave(self._frames)
        missing = wanted & ~present
        if self.on_missing == "raise" and bool(missing.any()):
            raise MissingLogitsError(
                f"{int(missing.sum()) // self._frames} of {len(teacher) // self._frames} rows to distil have no finite "
                "teacher logits",
                hint="Dump them, or pass on_missing='skip' to distil the others and count these.",
            )
        # A row that counts for nothing must be finite all the same: 0 · NaN would be NaN, in the gradient too.
        if isinstance(teacher, TopK):
            teacher = teacher.map(partial(_finite, present, -1.0))
        else:
            teacher = _finite(present, 0.0, teacher)
        fused = self._fused(teacher, labels, self.temperature)
        weights = torch.ones(len(fused), device=present.device)
        if self.recipe.weighting != "none":
            weights = self._confidence(self._fused(teacher, labels, 1.0)) / self._scale
        return _Soft(fused, wanted & present, weights, missing)

    def refuse_beyond_topk(self) -> None:
        """Raise `UsageError` for what cannot be had of top-k rows."""
        recipe = self.recipe
        if recipe.loss != "kl" or recipe.weighting != "none" or recipe.temperature_end is not None:
            raise UsageError(
                "top-k rows are for the loss kl at one temperature without weighting; this is the loss "
                f"{recipe.loss}, weighting {recipe.weighting}, to temperature {recipe.temperature_end}",
                hint="Dump with --dtype fp16 for that.",
            )
        at_temperature(self.temperature)
        if self.fusion is not None:
            refuse_unfit_for_topk(self.fusion)

    def _fused(self, teacher: Tensor | TopK, labels: Tensor | None, temperature: float) -> Any:
        if self.fusion is None or (teacher.ids if isinstance(teacher, TopK) else teacher).ndim == 2:
            return teacher
        return fuse(teacher, self.fusion, labels=labels, temperature=temperature)

    def _confidence(self, fused: Tensor) -> Tensor:
        log_probs = fused.log_softmax(dim=1)
        highest = log_probs.amax(dim=1).exp()
        if self.recipe.weighting == "pmax":
            return highest
        if self.recipe.weighting == "threshold":
            return (highest >= self.recipe.confidence_threshold).to(highest.dtype)
        return 1 + (log_probs.exp() * log_probs).sum(dim=1) / math.log(log_probs.shape[1])

    def _per_row(self, student: Tensor, fused: Tensor | TopK, labels: Tensor, counted: Tensor) -> Tensor:
        name = self.recipe.loss
        more = [labels] if name in NEED_LABELS else [counted] if name == "dist" else []
        return self._loss(student, fused, *more, **self._options)

    def _row_weights(self, is_hard: Tensor, soft: _Soft | None) -> tuple[Tensor, Tensor]:
        """What each row's two losses are multiplied by. Counts what is in the batch."""
        hard_rows = is_hard.sum()
        soft_rows, missing = (hard_rows * 0,) * 2 if soft is None else (soft.rows.sum(), soft.missing.sum())
        rows = torch.full_like(hard_rows, len(is_hard))
        by_mask = self.recipe.normalise == "mask"
        hard_weight = self.hard_weight / (hard_rows.clamp(min=1) if by_mask else rows)
        soft_weight = self.alpha / (soft_rows.clamp(min=1) if by_mask else rows)
        idle = (hard_rows == 0) & (soft_rows == 0)
        # The weights of a batch count by its rows, as a step does: the last one of an epoch is smaller.
        weights = [hard_weight * hard_rows * rows, soft_weight * soft_rows * rows]
        counts = [*(each // self._frames for each in (rows, hard_rows, soft_rows, missing)), idle, *weights]
        self._counts = self._counts + torch.stack([each.double() for each in counts])
        return hard_weight, soft_weight


def _finite(present: Tensor, value: float, values: Tensor) -> Tensor:
    """``[B, …]``, the rows that are not there replaced."""
    if not values.is_floating_point():
        return values
    return torch.where(present.view(-1, *[1] * (values.ndim - 1)), values, value)


class _Soft(NamedTuple):
    """A batch's fused teacher ``[B, C]``, and by row ``[B]``: distilled or not, its weight, wanted but not there."""

    logits: Any
    rows: Tensor
    weights: Tensor
    missing: Tensor


def _default_temperature(recipe: Recipe) -> float | None:
    """The loss's own; ``None`` where it has none. Raises `UsageError` for options that it has not."""
    parameters = inspect.signature(LOSSES[recipe.loss]).parameters
    known = [name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY and name != "temperature"]
    if unknown := [name for name in recipe.options if name not in known]:
        raise UsageError(
            f"the loss {recipe.loss} has no option {shown(unknown[0])}; it has {', '.join(known) or 'none'}"
        )
    if "temperature" not in parameters:
        if recipe.temperature is not None:
            raise UsageError(f"the loss {recipe.loss} has no temperature; leave it out")
        return None
    return float(parameters["temperature"].default)


def _refuse_misfit(student: Tensor, teacher: Tensor | TopK | None, labels: Tensor, source_mask: Tensor) -> None:
    rows = len(student)
    if student.ndim not in (2, 3):
        raise UsageError(f"expected the student's logits as [B, C], or [B, frames, C], found {list(student.shape)}")
    if labels.shape != (rows,) or source_mask.shape != (rows,) or source_mask.dtype != torch.bool:
        raise UsageError(
            f"expected labels and a bool source_mask for each of {rows} rows, found {list(labels.shape)} and "
            f"{source_mask.dtype} {list(source_mask.shape)}"
        )
    if isinstance(teacher, TopK):
        if len(teacher) != rows or student.ndim != 2 or teacher.num_classes != student.shape[-1]:
            raise UsageError(
                f"expected top-k rows of {rows} samples and {student.shape[-1]} classes, found {len(teacher)} and "
                f"{teacher.num_classes}"
            )
        return
    if teacher is None:
        return
    row = student.shape[1:]
    if teacher.ndim not in (len(row) + 1, len(row) + 2) or len(teacher) != rows or teacher.shape[-len(row) :] != row:
        expected = ", ".join(map(str, (rows, "teachers", *row)))
        raise UsageError(f"expected the teachers' logits as [{expected}], found {list(teacher.shape)}")
