"""What a student makes of clips that nobody has labelled, as the field's challenges want it handed in."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.manifest import Sample
from kd_cache.dataset.task import Task
from kd_cache.errors import FeatureError, UsageError, listed, shown
from kd_cache.prepare.tables import read_table
from kd_cache.score.storage_cost import log_softmax
from kd_cache.score.teacher import Teacher
from kd_cache.store.classes import misplaced
from kd_cache.train.clips import Clips, class_names
from kd_cache.train.evaluation import measure, measure_groups
from kd_cache.train.evaluation_job import logits_of
from kd_cache.watch import Watcher

AUDIO: Final = "audio/"
"""The folder that tables of a data set name and submissions leave out."""


@dataclass(frozen=True)
class PredictionJob:
    """What to score: ``files`` has the name of each clip, and the feature that ``source`` reads for it."""

    name: str
    teacher: Teacher
    source: FeatureSource
    files: dict[str, str]
    task: Task
    device: torch.device
    batch_size: int = 32
    workers: int = 2


@dataclass(frozen=True)
class Predictions:
    """``probabilities`` ``[N, C]`` float64 of clips by name, at temperature 1."""

    names: Sequence[str]
    class_names: Sequence[str]
    probabilities: np.ndarray

    def as_tsv(self) -> str:
        """``filename``, ``scene_label`` and a column per class; every number reads back exactly."""
        text = io.StringIO()
        out = csv.writer(text, delimiter="\t", lineterminator="\n")
        out.writerow(["filename", "scene_label", *self.class_names])
        decided = self.probabilities.argmax(axis=1).tolist()
        for name, scene, row in zip(self.names, decided, self.probabilities.tolist(), strict=True):
            out.writerow([name, self.class_names[scene], *map(repr, row)])
        return text.getvalue()


def labels_of(table: Path, classes: Sequence[str]) -> dict[str, tuple[int, str]]:
    """The class and the device (or "not known") of each clip of a table that has a scene there.

    Raises:
        ManifestError: no table.
        UsageError: a scene that is none of the classes.
    """
    read = read_table(table, {})
    if "scene" not in read.columns:
        return {}
    number_of, found, wrong = {name: number for number, name in enumerate(classes)}, {}, []
    for _, row in read.rows:
        name, scene = row[read.columns["file"]].removeprefix(AUDIO), row[read.columns["scene"]]
        if not scene:
            continue
        if scene not in number_of:
            wrong.append(f"{name}: {scene}")
            continue
        device = row[read.columns["device"]] if "device" in read.columns else "not known"
        found[name] = (number_of[scene], device)
    if wrong:
        raise UsageError(
            f"{len(wrong):,} clips of {shown(table)} are of a scene that the net does not know\n{listed(wrong)}",
            hint=f"It knows {', '.join(classes)}.",
        )
    return found


def worth(found: Predictions, labels: Mapping[str, tuple[int, str]]) -> dict[str, Any] | None:
    """Figures of all labelled clips, by class and by device; ``None`` without labels."""
    known = [number for number, name in enumerate(found.names) if name in labels]
    if not known:
        return None
    scenes, devices = zip(*(labels[found.names[number]] for number in known), strict=True)
    # A probability of 0 would have a loss without bound.
    logits = np.log(np.maximum(found.probabilities[known], np.finfo(np.float64).tiny))
    truth = np.array(scenes)
    groups = {"class_wise": [found.class_names[scene] for scene in scenes], "device_wise": list(devices)}
    of_all = measure(logits, truth)
    figures = {name: getattr(of_all, name) for name in ("samples", "accuracy", "macro_accuracy", "log_loss")}
    by = measure_groups(logits, truth, groups)
    kept = ("samples", "accuracy", "log_loss")
    return figures | {
        kind: {group: {name: each[name] for name in kept} for group, each in of_kind.items()}
        for kind, of_kind in by.items()
    }


def predict(job: PredictionJob, watcher: Watcher) -> Predictions:
    """Score every clip.

    Raises:
        UsageError: no clips, or classes in another order than the task's scenes.
        FeatureError: a feature cannot be read.
        TeacherError: the net fails, or does not give what it says.
    """
    if not job.files:
        raise UsageError("there are no clips to predict")
    if why := misplaced(getattr(job.teacher, "class_names", None), job.task.scenes):
        raise UsageError(f"{shown(job.name)}: {why}", hint="It must tell scenes apart.")
    samples = [Sample(file, None, None, -1, "", "test", None, None) for file in job.files.values()]
    clips = Clips.read(job.source, samples, job.workers, watcher)
    logits = logits_of(job.name, job.teacher, clips, job.device, job.batch_size)
    names = class_names(job.task, "scene", job.teacher.num_classes)
    return Predictions(list(job.files), names, np.exp(log_softmax(logits.astype(np.float64))))


def files_below(folder: Path) -> dict[str, str]:
    """Every ``.npy`` below a folder by the name of its clip: ``audio/x.npy`` is of ``x.wav``. Raises `UsageError`."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.npy") if path.is_file())
    return _by_name([(f"{file.removesuffix('.npy')}.wav", file) for file in found])


def listed_files(table: Path, source: FeatureSource) -> dict[str, str]:
    """The clips of a table, in its order, with the feature of each: called like it or ending in ``.npy``, in the same
    folder or without ``audio/``.

    Raises:
        ManifestError: no table with a column of file names.
        UsageError: a clip that is listed twice.
        FeatureError: a clip without a feature.
    """
    read = read_table(table, {})
    names = [row[read.columns["file"]] for _, row in read.rows]
    found: dict[str, str] = {}
    for start in ("", AUDIO):
        for end in (None, ".npy"):
            spelled = {name: _spelled(name.removeprefix(start), end) for name in names if name not in found}
            absent = source.missing(list(spelled.values()))
            found |= {name: file for name, file in spelled.items() if file not in absent}
    if lost := [name for name in names if name not in found]:
        raise FeatureError(
            f"{len(lost):,} of {len(names):,} clips of {shown(table)} have no feature\n{listed(lost)}",
            hint="Check --features.",
        )
    return _by_name([(name, found[name]) for name in names])


def _spelled(name: str, end: str | None) -> str:
    if end is None:
        return name
    stem, dot, _ = name.rpartition(".")
    return f"{stem if dot else name}{end}"


def _by_name(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    names = Counter(name.removeprefix(AUDIO) for name, _ in pairs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UsageError(f"{len(twice)} clips are there more than once\n{listed(twice)}")
    return {name.removeprefix(AUDIO): file for name, file in pairs}
