"""The job of a training, what it writes down of itself (key, settings, record), and its report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import UsageError
from kd_cache.score.device import environment
from kd_cache.store.origin import canonical_json
from kd_cache.train.architectures import ARCHITECTURE_VERSION
from kd_cache.train.checkpoint_file import MOST_RECORD
from kd_cache.train.clips import Clips, class_names
from kd_cache.train.division import Division, divide, subsample
from kd_cache.train.nets import WarmStart
from kd_cache.train.settings import Settings, Stage

GLOBAL = "global"
AUTO, FRESH = "auto", "fresh"


@dataclass(frozen=True)
class TrainJob:
    """Everything a training needs to know.

    Attributes:
        settings: see `Settings`.
        data: the permitted train samples: of the source and the target, or of the source alone for a scene teacher.
        output_dir: the checkpoint is ``<output_dir>/teacher_<role>/A2<target>/best.safetensors`` (scene: ``global``).
        backbone: the city teacher's checkpoint, for City2Scene; a whole City2Scene teacher's if it is ``init`` too.
        init: a checkpoint to start from.
        resume: ``auto`` goes on with an unfinished run of the same key, and takes a city teacher's weights from
            earlier ones; ``fresh`` does neither, and removes what is cached under this key.
        embeddings: names of extracted sources that a City2Scene teacher's head stands on, in place of ``backbone``.
        cached_features: train a head that alone trains on embeddings that are computed once.
        publish: put the best weights beside the runs.
        replace: also where those of another training are.
        shared: what trainings on the same samples share: features, and what a backbone makes of them.
        pth: write ``best.pth`` too.
        half: store weights as float16.
    """

    settings: Settings
    data: Dataset
    output_dir: Path
    device: torch.device
    backbone: Path | None = None
    init: Path | None = None
    resume: str = AUTO
    workers: int = 2
    embeddings: tuple[str, ...] = ()
    cached_features: bool = True
    publish: bool = True
    replace: bool = True
    pth: bool = False
    half: bool = False
    tensorboard: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)
    shared: dict[str, Clips] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """``A2b``, …, or ``global``."""
        return GLOBAL if self.data.target == self.data.task.source else self.data.adaptation

    @property
    def features(self) -> FeatureSource:
        """Reads what the net learns from."""
        return self.data.features

    @property
    def home(self) -> Path:
        return self.output_dir / f"teacher_{self.settings.role}" / self.place

    @cached_property
    def division(self) -> Division:
        """Who trains and who validates. Raises as `divide`."""
        settings = self.settings
        samples, task, root = self.data.selection.samples, self.data.task, self.data.root
        if settings.quick_experiment < 1:
            samples = subsample(samples, settings.quick_experiment, task=task, data_root=root)
        division = divide(samples, task=task, ratio=settings.val_ratio, fold=settings.fold, data_root=root)
        # Nothing learns the target's scene labels. A city teacher and the head on it hold out the same locations.
        return division.only([self.data.task.source]) if settings.label == "scene" else division


@dataclass(frozen=True)
class TrainReport:
    """What became of a training. ``how`` is ``trained``, ``resumed`` or ``cached``."""

    role: str
    place: str
    how: str
    checkpoint: Path
    run: Path | None
    results: dict[str, Any]
    published: bool

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "checkpoint": str(self.checkpoint), "run": None if self.run is None else str(self.run)}


def key_parts(
    job: TrainJob,
    train: Clips,
    validation: Clips,
    stages: Sequence[Stage],
    start: WarmStart | None,
    own_code: list[str] | None,
    code: str,
) -> dict[str, Any]:
    """Everything that the weights depend on, in words, by what it is about. ``code`` is the version of what trains."""
    label, where = job.settings.label, environment(job.device)
    parts = {
        **job.settings.key_parts(),
        "data": {"train": train.digest(label), "validation": validation.digest(label)},
        "selection": {"target": job.data.target},
        "stages": [asdict(stage) for stage in stages],
        "net": own_code,
        "cached_features": job.cached_features,
        "start": None if start is None else {"kind": start.kind, "sha256": start.sha256},
        "code": code,
        "environment": {name: where[name] for name in ("device", "instruction_set", "torch", "cuda")}
        | _threads_or_cudnn(job.device),
        "storage": "float16" if job.half else "float32",
    }
    found: dict[str, Any] = json.loads(canonical_json(parts))  # as an entry's file gives them back
    return found


def _threads_or_cudnn(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"threads": torch.get_num_threads()}
    return {"cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]


def run_config(job: TrainJob, stages: Sequence[Stage]) -> dict[str, Any]:
    """Every setting as resolved, for the run's folder."""
    settings = {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(job.settings).items()
    }
    settings["mlp_hidden_dims"] = settings["mlp_hidden_dims"] or []
    del settings["stages"]
    return {
        "settings": settings,
        "stages": [asdict(stage) for stage in stages],
        "place": job.place,
        "manifest_sha256": job.data.manifest.digest,
    }


def checkpoint_record(
    job: TrainJob, architecture: str | None, made: Provenance, stages: Sequence[Stage], key: str, code: str
) -> dict[str, Any]:
    """What each checkpoint of a run says of itself. Raises `UsageError` where too many samples made it to name them."""
    settings, samples = job.settings, len(made.trained) + len(made.validated)
    most = MOST_RECORD[".pth" if job.pth else ".safetensors"] // 22 - 1000
    if samples > most:  # now, not after the last epoch
        raise UsageError(
            f"{samples:,} samples would make this teacher, and a checkpoint can name {most:,}",
            hint="Leave out --pth, whose files hold less, or use --quick-experiment.",
        )
    return {
        "architecture": architecture,
        "architecture_version": ARCHITECTURE_VERSION,
        "role": settings.role,
        "class_names": class_names(job.data.task, settings.label, settings.num_classes),
        "value_kind": "logits",
        "feature_spec": settings.feature_spec or job.data.manifest.front_end_text,
        "provenance": made.as_json(),
        "training": {
            "key": key,
            "place": job.place,
            "manifest_sha256": job.data.manifest.digest,
            "seed": settings.seed,
            "stages": [asdict(stage) for stage in stages],
            "code": code,
        },
    }
