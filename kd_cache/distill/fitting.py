"""Fitting a fusion, on the one kind of rows that may decide it: labelled source rows that trained no teacher.

On rows that trained them teachers look better than they are, each by another amount, and a target's labels or a test
sample must decide nothing. So what is fitted takes a `HeldOut`, and that is made of a cache, a guarded selection and
what the teachers say of their training, and of nothing else.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kd_cache.dataset.guard import Selection
from kd_cache.dataset.provenance import Provenance
from kd_cache.distill.fusion import Gate, Weights
from kd_cache.errors import UnfitError
from kd_cache.keys import KeyFinder, keys_of
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.serve.student_loader import refuse_misplaced
from kd_cache.train.division import locations_of
from kd_cache.train.evaluation import measure

LEAST: Final = 20
"""With fewer rows than this nothing is fitted."""
FOLDS: Final = 5
_PRIOR: Final = 10.0
"""Standard deviation of a weight, in units of its teacher's own spread: far above any calibrated teacher. It counts
where the teachers are right on every row, and likelihood alone would make them infinitely sure."""


class HeldOut:
    """Labelled source rows of locations that no teacher trained on.

    Attributes:
        teachers: K names.
        files: N.
        logits: ``[N, K, C]`` float32; of teachers that score each frame the mean over a row's frames.
        labels: ``[N]`` int64.
        places: ``[N]`` int64, equal where the location is, numbered in an order by chance.
        chose_epoch: how many of the rows validated a teacher, and so chose its epoch.
    """

    def __init__(self, cache: LogitCache, selection: Selection, provenances: Mapping[str, Provenance | None]) -> None:
        """See `held_out`."""
        self.teachers = cache.teachers
        known = [_complete(name, provenances.get(name)) for name in self.teachers]
        everyone, task = selection.samples, selection.task
        refuse_misplaced(cache, task)
        trained = np.logical_or.reduce([each.has_trained(selection.listed) for each in known])
        samples, places = [], []
        for place in sorted(locations_of(everyone, task), key=lambda place: _chance(place.name)):
            if trained[list(place.samples)].any():
                continue  # the clips of one place sound alike, and a target's are twins of A's
            mine = [everyone[number] for number in place.samples]
            mine = [each for each in mine if each.device_id == task.source and each.scene_label is not None]
            samples += mine
            places += [place.name] * len(mine)
        self.files = [sample.file for sample in samples]
        self.labels = torch.tensor([sample.scene_label for sample in samples], dtype=torch.int64)
        logits = cache.batch(cache.rows(self.files), torch.float32)
        self.logits: Tensor = logits if cache.topk is None else logits.dense()
        if cache.frames is not None:
            self.logits = self.logits.mean(dim=2)
        number_of = {name: number for number, name in enumerate(dict.fromkeys(places))}
        self.places = np.array([number_of[name] for name in places], np.int64)
        keys = keys_of(self.files)
        self.chose_epoch = int(
            np.logical_or.reduce([KeyFinder(each.validated).find(keys) >= 0 for each in known]).sum()
        )

    def __len__(self) -> int:
        return len(self.files)


def held_out(cache: LogitCache, selection: Selection, provenances: Mapping[str, Provenance | None]) -> HeldOut:
    """The rows that may decide how much each teacher counts.

    Args:
        cache: an opened cache of logits.
        selection: what the manifest permits (`kd_cache.select`).
        provenances: of every teacher by name: its attribute ``provenance``.

    Raises:
        UsageError: a teacher that does not say all that it was trained on, or has its classes in another order than
            the labels.
        MissingLogitsError: the cache lacks one of the rows.
    """
    return HeldOut(cache, selection, provenances)


def fit(cache: LogitCache, selection: Selection, provenances: Mapping[str, Provenance | None]) -> Weights:
    """Weights of the teachers by likelihood on held-out rows; the mean, with a warning, where there are too few.

    Arguments as for `held_out`. Minimises the cross-entropy of softmax(Σ β_k t_k) over β ≥ 0, which is convex. It
    calibrates too: Σ β is an inverse temperature. ``measured`` has ``rows``, ``chose_epoch``, and log loss and accuracy
    of each teacher, of the mean, and of the fit (``fit`` by folds over locations: no row judges weights it chose).
    """
    try:
        return fit_weights(held_out(cache, selection, provenances))
    except UnfitError as error:
        warnings.warn(f"the teachers' mean is taken in place of a fit: {error.message}", stacklevel=2)
        return Weights(dict.fromkeys(cache.teachers, 1 / len(cache.teachers)))


def fit_weights(rows: HeldOut) -> Weights:
    """As `fit`, of rows that are there already. Raises `UsageError` for fewer than 20."""
    _refuse_few(rows)
    logits = rows.logits.double()
    apart = torch.empty_like(logits[:, 0])
    for fold in range(FOLDS):
        mine = torch.from_numpy(rows.places % FOLDS == fold)
        if mine.any():  # fewer than five locations leave folds empty
            beta = likeliest(logits[~mine], rows.labels[~mine]) if not mine.all() else _even(logits)
            apart[mine] = (logits[mine] * beta[:, None]).sum(dim=1)
    judged = {**singles(rows), **_judged({"mean": logits.mean(dim=1), "fit": apart}, rows.labels)}
    beta = likeliest(logits, rows.labels)
    measured = {"rows": len(rows), "chose_epoch": rows.chose_epoch, **judged}
    return Weights(dict(zip(rows.teachers, beta.tolist(), strict=True)), measured)


def singles(rows: HeldOut) -> dict[str, Any]:
    """Log loss and accuracy of each teacher. Raises `UnfitError` for fewer than 20 rows."""
    _refuse_few(rows)
    logits = rows.logits.double()
    return _judged({name: logits[:, number] for number, name in enumerate(rows.teachers)}, rows.labels)


def fit_gate(rows: HeldOut, *, seed: int = 0, steps: int = 200, lr: float = 3e-3, decay: float = 0.1) -> Gate:
    """A gate trained by the cross-entropy of its fused logits. Raises `UsageError` for fewer than 20 rows."""
    _refuse_few(rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(rows.teachers, rows.logits.shape[2])
    optimiser = torch.optim.AdamW(gate.parameters(), lr, weight_decay=decay)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(gate(rows.logits), rows.labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return gate.requires_grad_(False).eval()


def likeliest(logits: Tensor, labels: Tensor) -> Tensor:
    """``[K]`` β ≥ 0 with the least cross-entropy of Σ β_k t_k: ``logits`` ``[N, K, C]`` float64, ``labels`` ``[N]``.

    Newton's method on what is free of the bound (Bertsekas 1982), in units of each teacher's spread, so that the
    scale of its logits does not matter.
    """
    centred = logits - logits.mean(dim=2, keepdim=True)
    spread = centred.square().mean(dim=(0, 2)).sqrt()
    spread = torch.where(spread > 0, spread, 1)
    z = centred / spread[:, None]
    found = _even(logits) * spread
    for _ in range(100):
        loss, slope, curve = _likelihood(z, labels, found)
        free = (found > 0) | (slope < 0)
        if not free.any() or slope[free].abs().max() <= 1e-9 * len(z):
            break
        step = torch.zeros_like(found)
        step[free] = torch.linalg.solve(curve[free][:, free], slope[free])
        found, is_better = _shortened(z, labels, found, step, loss)
        if not is_better:
            break
    return found / spread


def _shortened(z: Tensor, labels: Tensor, start: Tensor, step: Tensor, loss: Tensor) -> tuple[Tensor, bool]:
    """The step, halved until the loss falls, and whether it ever did."""
    for halvings in range(50):
        tried = (start - step / 2**halvings).clamp(min=0)
        if _likelihood(z, labels, tried)[0] < loss:
            return tried, True
    return start, False


def _likelihood(z: Tensor, labels: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """−log likelihood with the prior, its gradient ``[K]`` and Hessian ``[K, K]``."""
    log_probs = (z * beta[:, None]).sum(dim=1).log_softmax(dim=1)
    probs = log_probs.exp()
    expected = (z * probs[:, None]).sum(dim=2)  # [N, K]
    of_label = z.gather(2, labels[:, None, None].expand(-1, z.shape[1], 1))[:, :, 0]
    loss = -log_probs.gather(1, labels[:, None]).sum() + (beta / _PRIOR).square().sum() / 2
    slope = (expected - of_label).sum(dim=0) + beta / _PRIOR**2
    apart = z - expected[:, :, None]
    curve = torch.einsum("nkc,nlc->kl", apart * probs[:, None], apart)
    return loss, slope, curve + torch.eye(len(beta), dtype=z.dtype) / _PRIOR**2


def _judged(fused: Mapping[str, Tensor], labels: Tensor) -> dict[str, Any]:
    found = {name: measure(logits.numpy(), labels.numpy()) for name, logits in fused.items()}
    return {name: {"log_loss": each.log_loss, "accuracy": each.accuracy} for name, each in found.items()}


def _even(logits: Tensor) -> Tensor:
    return torch.full((logits.shape[1],), 1 / logits.shape[1], dtype=logits.dtype)


def _refuse_few(rows: HeldOut) -> None:
    if len(rows) < LEAST:
        raise UnfitError(
            f"{len(rows)} labelled source rows trained none of the teachers, fewer than {LEAST}: too few to fit",
            hint="Train the teachers with the same --val-ratio and --fold, or take another fusion.",
        )


def _complete(name: str, provenance: Provenance | None) -> Provenance:
    if provenance is None or not provenance.complete:
        how_much = "nothing" if provenance is None else "not all"
        raise UnfitError(
            f"{name} says {how_much} of what it was trained on, so nobody knows which rows are held out",
            hint="Train it with kd-cache train, or take another fusion than fit and gate.",
        )
    return provenance


def _chance(place: str) -> bytes:
    return hashlib.sha256(place.encode()).digest()
