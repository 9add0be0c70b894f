"""How good a net that is there already is: any teacher or student, on labelled rows that did not make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from kd_cache.dataset.dataset import Dataset, provenances
from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.manifest import Sample
from kd_cache.errors import DataLeakageError, TeacherError, UsageError, listed, shown
from kd_cache.keys import KeyFinder, keys_of
from kd_cache.score.device import numerics
from kd_cache.score.factory import users_code
from kd_cache.score.self_test import refuse_unsteady
from kd_cache.score.teacher import Teacher, compare_front_ends
from kd_cache.score.value_kind import RowCheck
from kd_cache.store.classes import misplaced
from kd_cache.train.clips import Clips, class_names
from kd_cache.train.division import divide
from kd_cache.train.evaluation import (
    apart,
    crossed,
    groups_of,
    intervals,
    measure,
    measure_groups,
    places_of,
    scored,
)
from kd_cache.watch import Watcher

VAL, TEST = "val", "test"
_SCALES: Final = ("logits", "log_probs", "probs")


@dataclass(frozen=True)
class EvaluationJob:
    """What to evaluate, and on what.

    Attributes:
        name, teacher: a net that keeps the `Teacher` contract.
        data: what the manifest permits, for the target that device groups are named by.
        split: ``test``: the manifest's test rows. ``val``: the held-out locations of the train rows, as
            ``kd-cache train`` divides them with this ``val_ratio`` and ``fold``; of scene labels those of A alone.
        label: ``scene`` or ``city``.
        seed: of the intervals' draws.
        own_features: reads the features of a student that has its own, in place of the manifest's.
        rivals: nets that the difference to is told of, on the same rows (with the manifest's features).
    """

    name: str
    teacher: Teacher
    data: Dataset
    split: str
    label: str
    device: torch.device
    val_ratio: float = 0.1
    fold: int = 0
    batch_size: int = 32
    workers: int = 2
    seed: int = 0
    own_features: FeatureSource | None = None
    rivals: Mapping[str, Teacher] = field(default_factory=dict)


def evaluate(job: EvaluationJob, watcher: Watcher) -> dict[str, Any]:
    """Metrics of all and by device, device group, city and scene, each with its interval, as JSON values.

    Raises:
        DataLeakageError: a test row made the net, as its provenance says.
        UsageError: no labelled rows, values that no probability follows from, or classes in another order than the
            labels.
        TeacherError: the net fails, does not give what it says, or was trained with another front end.
        FeatureError: a feature cannot be read.
    """
    task = job.data.task
    if why := misplaced(getattr(job.teacher, "class_names", None), task.scenes, task.cities):
        raise UsageError(
            f"{shown(job.name)}: {why}", hint="Its outputs and the labels do not speak of the same classes."
        )
    compare_front_ends({job.name: job.teacher}, job.data, watcher, job.own_features)
    samples = _labelled(job)
    counts = _made_with(job, job.name, job.teacher, samples, watcher)
    clips = Clips.read(job.own_features or job.data.features, samples, job.workers, watcher)
    logits = logits_of(job.name, job.teacher, clips, job.device, job.batch_size)
    labels, names = clips.labels(job.label).numpy(), class_names(task, job.label, job.teacher.num_classes)
    places, unplaced = places_of(samples, job.data)
    if unplaced:
        watcher.note(
            f"{unplaced:,} rows name no location: each counts as its own, so the intervals are narrower than they "
            "should be"
        )
    groups = groups_of(samples, task, job.data.target)
    groups["scene"] = [_scene(sample, job) for sample in samples]
    return {
        "name": job.name,
        "split": job.split,
        "label": job.label,
        "target": job.data.target,
        "locations": len(np.unique(places)),
        **counts,
        **measure(logits, labels).as_json(),
        "intervals": intervals(logits, labels, places, job.seed),
        "class_names": names,
        "by": measure_groups(logits, labels, groups, places, job.seed),
        "device_by_class": crossed(logits, labels, groups["device"], names),
        "against": _against(job, clips, logits, places, watcher),
    }


def _against(
    job: EvaluationJob, clips: Clips, logits: np.ndarray, places: np.ndarray, watcher: Watcher
) -> dict[str, dict[str, Any]]:
    """Of each rival its accuracy on these rows, and how much better the net is."""
    found: dict[str, dict[str, Any]] = {}
    if job.rivals and job.own_features is not None:
        clips = Clips.read(job.data.features, clips.samples, job.workers, watcher)
    labels = clips.labels(job.label).numpy()
    for name, rival in job.rivals.items():
        if rival.num_classes != job.teacher.num_classes:
            raise UsageError(
                f"{shown(name)} has {rival.num_classes} classes, {shown(job.name)} {job.teacher.num_classes}"
            )
        counts = _made_with(job, name, rival, clips.samples, watcher)
        its = logits_of(name, rival, clips, job.device, job.batch_size)
        accuracy = measure(its, labels).accuracy
        found[name] = {**counts, "accuracy": accuracy, "difference": apart(logits, its, labels, places, job.seed)}
    return found


def _labelled(job: EvaluationJob) -> list[Sample]:
    data = job.data
    if job.split == TEST:
        rows: Sequence[Sample] = [sample for sample in data.manifest if sample.split == "test"]
    else:
        permitted = data.selection.samples
        division = divide(permitted, task=data.task, ratio=job.val_ratio, fold=job.fold, data_root=data.root)
        if job.label == "scene":
            division = division.only([data.task.source])
        rows = division.validation
    found = [sample for sample in rows if getattr(sample, f"{job.label}_label") is not None]
    if not found:
        raise UsageError(
            f"none of the {len(rows)} {job.split} rows has a {job.label} label, so there is nothing to evaluate on",
            hint="Check --json-path, --split and --label.",
        )
    return found


def _made_with(
    job: EvaluationJob, name: str, teacher: Teacher, samples: Sequence[Sample], watcher: Watcher
) -> dict[str, int | None]:
    """How many of the rows trained the net, and how many chose its epoch; ``None`` where it does not say."""
    provenance = provenances({name: teacher}, job.data, watcher)[name]
    if provenance is None:
        watcher.note(f"{shown(name)} says nothing of what it was trained on: it may have seen these rows")
        return {"trained_on": None, "chose_epoch": None}
    keys = keys_of(sample.file for sample in samples)
    trained = KeyFinder(provenance.trained).find(keys) >= 0
    validated = KeyFinder(provenance.validated).find(keys) >= 0
    if job.split == TEST and (trained | validated).any():
        made = [samples[number].file for number in np.flatnonzero(trained | validated).tolist()]
        raise DataLeakageError(
            f"{shown(name)} was trained or validated on {len(made)} of {len(samples)} test rows\n{listed(made)}",
            hint="A figure on them says nothing. Train it on this manifest's train rows, or give its own manifest.",
        )
    if trained.any():
        watcher.note(
            f"{int(trained.sum()):,} of {len(samples):,} rows trained {shown(name)}: the figures are better than "
            "they should be (give the --target, --val-ratio and --fold that it was trained with)"
        )
    elif validated.any():
        watcher.note(f"{int(validated.sum()):,} of the rows chose its epoch: they are held out from training only")
    return {"trained_on": int(trained.sum()), "chose_epoch": int(validated.sum())}


def logits_of(name: str, teacher: Teacher, clips: Clips, device: torch.device, batch_size: int) -> np.ndarray:
    """``[N, C]``: values whose softmax are the net's probabilities. Raises `UsageError`, `TeacherError`."""
    kind, classes, name = teacher.value_kind, teacher.num_classes, shown(name)
    if kind not in _SCALES:
        raise UsageError(f"{name} gives {kind}; only of {', '.join(_SCALES)} probabilities of the classes follow")

    unlooked = [True]

    def checked(features: Tensor) -> Tensor:
        values: Any = teacher(features)
        expected = (len(features), classes)
        if not isinstance(values, Tensor) or values.shape != expected or not values.is_floating_point():
            found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise TeacherError(f"{name} must return floating-point {list(expected)}, it returned {found}")
        if unlooked:
            unlooked.clear()
            refuse_unsteady(name, teacher, "fp32", features, values.cpu(), teacher)
        return values

    with users_code(lambda why: TeacherError(f"{name} cannot be evaluated on {device}: {why}")):
        for ready, given in (("to", (device,)), ("eval", ())):
            if callable(method := getattr(teacher, ready, None)):
                teacher = method(*given)
        with numerics(device, "fp32", 0):
            values = scored(checked, clips, device, batch_size)
    if not np.isfinite(values).all():
        raise TeacherError(f"{name} gave values that are not finite")
    (check := RowCheck(kind)).add(values)
    if why := check.contradiction():
        raise TeacherError(f"the values of {name} {why}")
    return np.log(np.maximum(values, np.finfo(np.float32).tiny)) if kind == "probs" else values


def _scene(sample: Sample, job: EvaluationJob) -> str:
    """Its scene's name. Of the target's train rows nobody asks."""
    task, label = job.data.task, sample.scene_label
    if label is None or (job.split == VAL and sample.device_id != task.source):
        return "not known"
    return task.scenes[label] if label < len(task.scenes) else f"scene {label}"
