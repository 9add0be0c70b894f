"""A student's training: the loop and the run folder of any training, with teachers' rows from a cache in its loss.

It learns from A and the target, with hard labels of A alone, and is validated on A's held-out locations: those that its
teachers were validated on, with the same ratio and fold. Labels of the target are out of its reach from the first line.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from kd_cache.dataset.guard import Selection
from kd_cache.dataset.manifest import IGNORED, Sample
from kd_cache.dataset.provenance import Provenance
from kd_cache.distill.fitting import fit_gate, fit_weights, held_out
from kd_cache.distill.fusion import Fusion, Weights
from kd_cache.distill.objective import CE, DistillLoss
from kd_cache.distill.recipe import Recipe
from kd_cache.errors import StaleError, UnfitError, UsageError, listed, shown
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.serve.student_loader import refuse_misplaced
from kd_cache.store.names import MODES
from kd_cache.train.augment import Mixed
from kd_cache.train.clips import Clips
from kd_cache.train.division import Division, divide
from kd_cache.train.job import TrainJob, TrainReport
from kd_cache.train.loop import Learner
from kd_cache.train.nets import WarmStart
from kd_cache.train.run_folder import RunFolder
from kd_cache.train.training import Training
from kd_cache.watch import Watcher

FOLDER: Final = "student"


@dataclass(frozen=True)
class StudentJob(TrainJob):
    """As `TrainJob`, of the role ``scene``, and:

    Attributes:
        cache: the folder of the cache that its teachers' rows come from, or those of several targets.
        mode: ``ce``, ``fit``, ``gate``, or another mode of `kd_cache.distill.fuse`.
        recipe: the numbers of the objective.
        provenances: by teacher what it says of its training; ``None`` where it says nothing.
        subset: the files that it may use, where they are not all that are permitted.
        own_home: the folder of its runs, in place of ``<output_dir>/student/A2<target>/<mode>``.
    """

    cache: Path | tuple[Path, ...] = Path("cache")
    mode: str = "fit"
    recipe: Recipe = field(default_factory=Recipe)
    provenances: Mapping[str, Provenance | None] = field(default_factory=dict)
    subset: frozenset[str] | None = None
    own_home: Path | None = None

    @property
    def home(self) -> Path:
        return self.own_home or self.output_dir / FOLDER / self.place / self.mode.partition(":")[0]

    @cached_property
    def division(self) -> Division:
        """A and the target train, held-out locations of A validate. Raises as `divide`."""
        data, settings = self.data, self.settings
        # Of all that is permitted: what is held out from a subset's students is what was held out from the teachers.
        found = divide(
            data.selection.samples,
            task=data.task,
            ratio=settings.val_ratio,
            fold=settings.fold,
            data_root=data.root,
            # The teachers' own division: places that only a target knows would move it.
            heard=lambda sample: sample.device_id == data.task.source,
        )
        sides = (found.train, found.only([data.task.source]).validation)
        train, validation = (tuple(each for each in side if self.may_use(each)) for side in sides)
        if not train or not validation:
            raise UsageError(
                f"the subset leaves {len(train)} samples to train on and {len(validation)} of A to validate on",
                hint="Give a larger --subset, or another --val-ratio or --fold.",
            )
        return Division(train, validation, found.place_of)

    def may_use(self, sample: Sample) -> bool:
        """Whether it is in the subset."""
        return self.subset is None or sample.file in self.subset

    @property
    def selection(self) -> Selection:
        """What is permitted, of the subset."""
        found = self.data.selection
        return replace(found, samples=tuple(filter(self.may_use, found.samples)))


class StudentTraining(Training):
    """One student, from chance or a checkpoint."""

    code = (Path(__file__).parent,)
    job: StudentJob

    def _refuse_unlabelled(self) -> None:
        """Rows of A have labels, or their manifest is refused; those of the target need none."""

    def _clips(self) -> tuple[Clips, Clips]:
        train, validation = super()._clips()
        self.is_source = torch.tensor([sample.device_id == self.job.data.task.source for sample in train.samples])
        train.scenes = torch.where(self.is_source, train.scenes, IGNORED)
        return train, validation

    def build(self) -> tuple[nn.Module, WarmStart | None]:
        net, start = super().build()
        self.teachers: Tensor | None = None
        self.said: dict[str, Any] = {"mode": self.job.mode, "recipe": asdict(self.job.recipe), "teachers": {}}
        fusion: str | Fusion = CE
        names: tuple[str, ...] = ()
        if self.job.mode != CE:
            cache = self._opened()
            self.teachers, names = self._rows(cache), cache.teachers
            fusion = self._fusion(cache)
            for name in names:
                self.inherit(self.job.provenances.get(name))
        self.objective = DistillLoss(fusion, teachers=names, recipe=self.job.recipe)
        if self.teachers is not None and self.job.recipe.weighting != "none":
            self.said["mean_weight"] = self.objective.scale_weights(self.teachers, self.is_source, self.train.scenes)
        return net, start

    def _opened(self) -> LogitCache:
        mode = self.job.mode
        cache = opened(self.job, self.watcher)
        if mode in cache.teachers and mode not in MODES:
            cache = opened(self.job, Watcher(), [mode])
        if cache.target != self.job.data.target:
            raise UsageError(f"{shown(cache.path)} is no cache for the target {self.job.data.target}")
        if cache.num_classes != self.settings.num_scenes:
            raise UsageError(
                f"the teachers have {cache.num_classes} classes, and there are {self.settings.num_scenes} scenes",
                hint="Pass --num-scenes.",
            )
        refuse_misplaced(cache, self.job.data.task)
        self.said["teachers"] = cache.fingerprints
        return cache

    def _rows(self, cache: LogitCache) -> Tensor:
        """``[N, K, C]`` float32: the teachers' logits of the clips that train, which are the ones they scored.

        Raises `StaleError` for a feature that changed since, `MissingLogitsError` for one without a row.
        """
        files = [sample.file for sample in self.train.samples]
        rows = cache.rows(files)
        scored = cache.input_digests(rows)
        if scored is not None:
            changed = np.flatnonzero((scored != self.train.digests[:, None]).any(axis=(1, 2))).tolist()
            if changed:
                raise StaleError(
                    f"{len(changed)} features are not those that the teachers scored\n"
                    f"{listed(files[number] for number in changed)}",
                    hint="Run kd-cache dump again.",
                )
        return cache.batch(rows, torch.float32)

    def _fusion(self, cache: LogitCache) -> str | Fusion:
        mode = self.job.mode
        if mode == "gate":
            return fit_gate(held_out(cache, self.job.selection, self.job.provenances), seed=self.settings.seed)
        if mode != "fit":
            return mode
        try:
            fitted = fit_weights(held_out(cache, self.job.selection, self.job.provenances))
        except UnfitError as error:
            self.watcher.note(f"the teachers' mean is taken in place of a fit: {error.message}")
            fitted = Weights(dict.fromkeys(cache.teachers, 1 / len(cache.teachers)))
        self.said |= {"weights": dict(fitted.of), "fitted_on": dict(fitted.measured)}
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in fitted.of.items())
        self.watcher.note(f"weights of the teachers: {weights}")
        return fitted

    @property
    def title(self) -> str:
        return f"student ({self.job.mode})"

    def further_parts(self) -> dict[str, Any]:
        rows = b"" if self.teachers is None else self.teachers.numpy().tobytes()
        made = self.job.provenances if self.job.mode != CE else {}
        told = {name: None if each is None else each.digest for name, each in made.items()}
        said = {name: value for name, value in self.said.items() if name != "fitted_on"}
        return {"distillation": {**said, "rows": hashlib.sha256(rows).hexdigest(), "provenances": told}}

    @cached_property
    def record(self) -> dict[str, Any]:
        return {**super().record, "distillation": self.said}

    @property
    def _facts(self) -> dict[str, Any]:
        return {**super()._facts, "distillation": self.said}

    def learner(self, folder: RunFolder) -> Learner:
        return Learner(self.net, self.train, self.validation, objective=_Taught(self))


def opened(job: StudentJob, watcher: Watcher, teachers: Sequence[str] | None = None) -> LogitCache:
    """The cache, or the caches of several targets as one; what there is to say of them is a note."""
    paths = (job.cache,) if isinstance(job.cache, Path) else job.cache
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cache = LogitCache.open(paths, teachers)
    for each in told:
        watcher.note(str(each.message))
    return cache


class _Taught:
    """The objective over rows of the clips that train."""

    def __init__(self, training: StudentTraining) -> None:
        device = training.job.device
        self._objective = training.objective.to(device)
        self._teachers = None if training.teachers is None else training.teachers.to(device)
        self._labels, self._is_source = training.train.scenes.to(device), training.is_source.to(device)
        self._watcher, self._ratio = training.watcher, 0.0

    def start_epoch(self, epoch: int, epochs: int, /) -> None:
        ratio = self._objective.seen.ratio
        if ratio and not self._ratio:
            self._ratio = ratio
            self._watcher.note(f"a distilled row weighs {ratio:.3g} times as much as one with a hard label")
        self._objective.start_epoch(epoch, epochs)

    def __call__(self, logits: Tensor, rows: np.ndarray, mixed: Mixed, /) -> Tensor:
        at = torch.from_numpy(rows).to(logits.device)
        teachers = None if self._teachers is None else self._teachers[at]
        loss: Tensor = self._objective(
            logits, teachers, self._labels[at], self._is_source[at], partner=mixed.partner, share=mixed.share
        )
        return loss


def train_student(job: StudentJob, watcher: Watcher | None = None) -> TrainReport:
    """Train a student, or go on with its unfinished run. Raises as `Training.run`, `LogitCache.open` and `fuse`."""
    return StudentTraining(job, watcher).run()
