"""The settings of a training, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kd_cache.dataset.dataset import Dataset
from kd_cache.train.clips import Clips
from kd_cache.train.division import Division, divide, subsample
from kd_cache.train.settings import Settings

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
    def home(self) -> Path:
        return self.output_dir / f"teacher_{self.settings.role}" / self.place

    @cached_property
    def division(self) -> Division:
        """Who trains and who validates. Raises as `divide`."""
        settings = self.settings
        samples, root = self.data.selection.samples, self.data.root
        if settings.quick_experiment < 1:
            samples = subsample(samples, settings.quick_experiment, data_root=root)
        division = divide(samples, ratio=settings.val_ratio, fold=settings.fold, data_root=root)
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
        return {
            "role": self.role,
            "place": self.place,
            "how": self.how,
            "checkpoint": str(self.checkpoint),
            "published": self.published,
            "run": None if self.run is None else str(self.run),
            "results": self.results,
        }
