"""How good a net is: accuracy, calibration, and what an early exit at some confidence would give; of all and by group.

On the validation locations, and on ``test``, which chose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.guard import places_of_sample
from kd_cache.dataset.manifest import Sample
from kd_cache.dataset.task import Task
from kd_cache.errors import TeacherError, UsageError
from kd_cache.score.storage_cost import log_softmax
from kd_cache.train.clips import Clips, class_names
from kd_cache.train.division import locations_of
from kd_cache.train.job import TrainJob
from kd_cache.train.resampling import Cells, Interval, draws, interval_of
from kd_cache.watch import Watcher

GROUPS: Final = ("source", "target", "other", "unseen")
"""Devices by what they are to the teacher: source, target, others of the training sets, never trained on."""


def evaluated(
    net: nn.Module,
    clips: Clips,
    job: TrainJob,
    besides: Callable[[np.ndarray, np.ndarray, np.ndarray, Sequence[str]], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Metrics over the clips that have a label, as JSON values: of all, and by device, device group and city.

    ``besides`` says what else is told of their logits, labels, locations (`places_of`) and device groups.
    """
    settings, data = job.settings, job.data
    labels = clips.labels(settings.label).numpy()
    labelled = clips.part(np.flatnonzero(labels >= 0).tolist())
    if not len(labelled):
        return {"samples": 0}
    logits = score(net, labelled, job.device, settings.batch_size)
    labels = labelled.labels(settings.label).numpy()
    places, groups = places_of(labelled.samples, data)[0], groups_of(labelled.samples, data.task, data.target)
    names = class_names(data.task, settings.label, settings.num_classes)
    return {
        **measure(logits, labels).as_json(),
        "intervals": intervals(logits, labels, places, settings.seed),
        "class_names": names,
        "by": measure_groups(logits, labels, groups, places, settings.seed),
        "device_by_class": crossed(logits, labels, groups["device"], names),
        **(besides(logits, labels, places, groups["device_group"]) if besides else {}),
    }


def places_of(samples: Sequence[Sample], data: Dataset) -> tuple[np.ndarray, int]:
    """``[N]`` ints, equal where the location is, and how many rows name none: each of those has one of its own.

    They are numbered by name, so that `intervals` draws the same whatever the order of the rows.
    """
    placed = [number for number, sample in enumerate(samples) if places_of_sample(sample, data.task)]
    found = np.full(len(samples), -1)
    places = locations_of([samples[number] for number in placed], data.task, data.root)
    for at, place in enumerate(sorted(places, key=lambda place: place.name)):
        found[[placed[number] for number in place.samples]] = at
    alone = sorted(np.flatnonzero(found < 0).tolist(), key=lambda number: samples[number].file)
    found[alone] = np.arange(len(places), len(places) + len(alone))
    return found, len(alone)


def groups_of(samples: Sequence[Sample], task: Task, target: str) -> dict[str, list[str]]:
    """The group of each sample by kind: ``device``, ``device_group`` and ``city``."""
    return {
        "device": [sample.device_id for sample in samples],
        "device_group": [group_of(sample, task, target) for sample in samples],
        "city": ["not known" if each.city_label is None else task.city(each.city_label) for each in samples],
    }


def group_of(sample: Sample, task: Task, target: str) -> str:
    """One of `GROUPS`."""
    if sample.device_id == task.source:
        return "source"
    if sample.device_id in target.split(","):
        return "target"
    return "unseen" if sample.device_id in task.unseen else "other"


def headline(results: Mapping[str, Any], what: str = "accuracy") -> dict[str, float | None]:
    """Accuracy on the validation locations and on the test clips of source and target."""
    found: dict[str, float | None] = {"validation": results["validation"].get(what)}
    groups = (results.get("test") or {}).get("by", {}).get("device_group", {})
    for group in ("source", "target"):
        found[f"test, {group}"] = groups.get(group, {}).get(what)
    return found


def score(
    net: nn.Module, clips: Clips, device: torch.device, batch_size: int, call: Callable[[Tensor], Tensor] | None = None
) -> np.ndarray:
    """Logits ``[N, C]`` float32 in evaluation mode, in the order of the clips; or what ``call`` gives instead."""
    net.eval()
    return scored(call or net, clips, device, batch_size)


@torch.inference_mode()
def scored(call: Callable[[Tensor], Tensor], clips: Clips, device: torch.device, batch_size: int) -> np.ndarray:
    """``[N, C]`` float32: what ``call`` makes of the clips' features ``[B, T, F]``, in their order."""
    found: np.ndarray | None = None
    for rows, features in clips.load(clips.in_order(batch_size), device):
        logits = call(features.to(device)).float().cpu().numpy()
        if found is None:
            found = np.empty((len(clips), logits.shape[1]), np.float32)
        found[rows] = logits
    return np.empty((0, 0), np.float32) if found is None else found


def embedded(net: nn.Module, clips: Clips, device: torch.device, batch_size: int, watcher: Watcher) -> Clips:
    """The same samples with their embeddings ``[D]`` for features: what a head over a frozen backbone sees."""
    watcher.stage("embedding", len(clips))
    rows = score(net, clips, device, batch_size, call=net.embed)  # type: ignore[arg-type]
    watcher.advance(len(clips))
    return Clips.of_rows(clips.samples, rows)


FIGURES: Final = ("accuracy", "macro_accuracy", "log_loss", "ece", "brier")
"""What is told of a group of samples."""
BINS: Final = 15
THRESHOLDS: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Metrics:
    """Over N samples of C classes; probabilities are the softmax of the logits.

    Attributes:
        accuracy: the share of samples whose highest logit is their label's (of equal ones the first counts).
        macro_accuracy: the mean of ``per_class`` over the classes that occur.
        log_loss: mean negative log probability of the label, in nats.
        ece: expected calibration error over 15 bins of equal width of the highest probability: Σ (n_b/N)·|accuracy_b
            − confidence_b| (Guo et al. 2017, arXiv 1706.04599).
        ece_equal_mass: the same over 15 bins of (nearly) equally many samples; equal confidences share a bin.
        brier: mean over samples of the sum over classes of (probability − 1[label])², from 0 to 2 (Brier 1950).
        per_class: of each class's samples the share that is right; ``None`` for a class without samples.
        confusion: ``[C][C]`` counts, rows are labels, columns are decisions.
        early_exit: for each threshold the share of samples at least as confident (``coverage``) and their accuracy
            (``None`` where there are none).
        reliability: what ``ece`` is made of: of each bin that holds samples its ``low`` and ``high`` end, ``count``,
            mean ``confidence`` and ``accuracy``.
    """

    samples: int
    accuracy: float
    macro_accuracy: float
    log_loss: float
    ece: float
    ece_equal_mass: float
    brier: float
    per_class: list[float | None]
    confusion: list[list[int]]
    early_exit: list[dict[str, float | None]]
    reliability: list[dict[str, float]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(logits: np.ndarray, labels: np.ndarray) -> Metrics:
    """Metrics of logits ``[N, C]`` float against ``labels`` ``[N]`` integers in [0, C).

    Raises:
        UsageError: no samples, or a label that is no class.
        TeacherError: logits that are not finite.
    """
    _refuse_unmeasurable(logits, labels)
    samples, classes = logits.shape
    labels = labels.astype(np.int64)  # narrower ones would overflow below
    log_probs = log_softmax(logits.astype(np.float64))
    probs = np.exp(log_probs)
    decisions = logits.argmax(axis=1)
    right = decisions == labels
    confidence = probs[np.arange(samples), decisions]
    confusion = np.bincount(labels * classes + decisions, minlength=classes * classes).reshape(classes, classes)
    occurring = confusion.sum(axis=1)
    recall = np.divide(confusion.diagonal(), occurring, out=np.zeros(classes), where=occurring > 0)
    truth = np.zeros((samples, classes))
    truth[np.arange(samples), labels] = 1
    return Metrics(
        samples=samples,
        accuracy=float(right.mean()),
        macro_accuracy=float(recall[occurring > 0].mean()),
        log_loss=float(-log_probs[np.arange(samples), labels].mean()),
        ece=_calibration_error(confidence, right, _bins_of_equal_width(confidence)),
        ece_equal_mass=_calibration_error(confidence, right, _bins_of_equal_mass(confidence)),
        brier=float(((probs - truth) ** 2).sum(axis=1).mean()),
        per_class=[float(share) if count else None for share, count in zip(recall, occurring, strict=True)],
        confusion=confusion.tolist(),
        early_exit=[_early_exit(confidence, right, threshold) for threshold in THRESHOLDS],
        reliability=reliability(confidence, right),
    )


def _refuse_unmeasurable(logits: np.ndarray, labels: np.ndarray) -> None:
    """Raises as `measure`."""
    if not len(labels):
        raise UsageError("there are no samples to measure")
    samples, classes = logits.shape
    if labels.shape != (samples,):
        raise UsageError(f"expected one label per row of logits: {samples} rows, labels {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise UsageError(f"labels must lie in [0, {classes}), found {labels.min()} to {labels.max()}")
    if not np.isfinite(logits).all():
        raise TeacherError("the logits to measure are not finite")


def measure_groups(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: Mapping[str, Sequence[str]],
    places: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Count and figures by group: ``groups`` maps a kind (device, city) to each sample's group of it.

    With ``places`` also their ``intervals``.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, of_sample in groups.items():
        names = np.array(of_sample)
        found[kind] = {}
        for name in sorted(set(of_sample)):
            its = names == name
            mine = measure(logits[its], labels[its])
            found[kind][name] = {"samples": mine.samples} | {figure: getattr(mine, figure) for figure in FIGURES}
            if places is not None:
                found[kind][name]["intervals"] = intervals(logits[its], labels[its], places[its], seed)
    return found


def crossed(
    logits: np.ndarray, labels: np.ndarray, devices: Sequence[str], names: Sequence[str]
) -> dict[str, list[Any]]:
    """How many rows each device (down) has of each class that occurs (across), and which share of them is right."""
    classes, column = np.unique(labels, return_inverse=True)
    known, row = np.unique(devices, return_inverse=True)
    cell, shape = row * len(classes) + column, (len(known), len(classes))
    rows = np.bincount(cell, minlength=len(known) * len(classes))
    right = np.bincount(cell, logits.argmax(axis=1) == labels, len(rows))
    shares = [float(part / count) if count else None for part, count in zip(right, rows, strict=True)]
    return {
        "devices": known.tolist(),
        "classes": [names[number] for number in classes],
        "samples": rows.reshape(shape).tolist(),
        "accuracy": [shares[start : start + len(classes)] for start in range(0, len(shares), len(classes))],
    }


def apart(
    one: np.ndarray, other: np.ndarray, labels: np.ndarray, places: np.ndarray, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Figures of logits ``one`` less those of ``other``, ``[N, C]`` of the same rows, each with its interval.

    Both nets are measured on the same draws of locations. Raises as `measure`.
    """
    mine, its = measure(one, labels), measure(other, labels)
    drawn = [Cells.of(logits, labels, places).drawn(seed) for logits in (one, other)]
    return {
        figure: {
            "value": getattr(mine, figure) - getattr(its, figure),
            "interval": interval_of(drawn[0][figure] - drawn[1][figure]) if drawn[0] and drawn[1] else None,
        }
        for figure in ("accuracy", "macro_accuracy", "log_loss", "brier")
    }


def intervals(logits: np.ndarray, labels: np.ndarray, places: np.ndarray, seed: int = 0) -> dict[str, Interval] | None:
    """Where accuracy, macro accuracy, log loss and Brier score lie with 95 % confidence; ``None`` of a single place.

    ``places`` ``[N]``: equal where the location is (`kd_cache.train.resampling`). Raises as `measure`.
    """
    _refuse_unmeasurable(logits, labels)
    return Cells.of(logits, labels, places).intervals(seed)


def interval_of_mean(values: np.ndarray, places: np.ndarray, seed: int = 0) -> Interval | None:
    """Where the mean of ``[N]`` values lies with 95 % confidence, drawn as for `intervals`; ``None`` of one place."""
    names, place = np.unique(places, return_inverse=True)
    chosen = draws(len(names), seed)
    return (
        interval_of((chosen @ np.bincount(place, values)) / (chosen @ np.bincount(place))) if len(names) > 1 else None
    )


def _bins_of_equal_width(confidence: np.ndarray) -> np.ndarray:
    """Which of the bins [0, 1/15), …, [14/15, 1] each confidence is in."""
    edges = np.linspace(0, 1, BINS + 1)
    return np.searchsorted(edges[1:-1], confidence, side="right")


def _bins_of_equal_mass(confidence: np.ndarray) -> np.ndarray:
    edges = np.quantile(confidence, np.linspace(0, 1, BINS + 1))
    return np.searchsorted(edges[1:-1], confidence, side="right")


def _calibration_error(confidence: np.ndarray, right: np.ndarray, bins: np.ndarray) -> float:
    # Of each bin n_b · |accuracy_b − confidence_b| is the absolute sum of what its samples differ by.
    gaps = np.bincount(bins, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """A reliability diagram's bins, as `Metrics` describes them, of ``[N]`` highest probabilities and ``[N]`` bools."""
    bins = _bins_of_equal_width(confidence)
    return [
        {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "count": int((bins == number).sum()),
            "confidence": float(confidence[bins == number].mean()),
            "accuracy": float(right[bins == number].mean()),
        }
        for number in np.unique(bins).tolist()
    ]


def _early_exit(confidence: np.ndarray, right: np.ndarray, threshold: float) -> dict[str, float | None]:
    sure = confidence >= threshold
    accuracy = float(right[sure].mean()) if sure.any() else None
    return {"threshold": threshold, "coverage": float(sure.mean()), "accuracy": accuracy}
