"""A student's training: the loop and the run folder of any training, with teachers' rows from a cache in its loss.

It learns from A and the target, with hard labels of A alone, and is validated on A's held-out locations: those that its
teachers were validated on, with the same ratio and fold. Labels of the target are out of its reach from the first line.
"""

from __future__ import annotations

import copy
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

from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.guard import Selection
from kd_cache.dataset.manifest import IGNORED, Sample
from kd_cache.dataset.provenance import Provenance
from kd_cache.distill.fitting import fit_gate, fit_weights, held_out, singles
from kd_cache.distill.fusion import Fusion, Weights, fuse
from kd_cache.distill.losses import NEED_LABELS
from kd_cache.distill.objective import CE, DistillLoss
from kd_cache.distill.recipe import Recipe
from kd_cache.distill.views import EpochViews
from kd_cache.errors import FeatureError, StaleError, UnfitError, UsageError, listed, shown
from kd_cache.score.reading import read_digests
from kd_cache.score.teacher import OWN_FEATURES
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.serve.student_loader import refuse_misplaced
from kd_cache.serve.topk import TopK
from kd_cache.store.names import MODES
from kd_cache.train.augment import Mixed
from kd_cache.train.clips import Clips
from kd_cache.train.division import Division, divide
from kd_cache.train.evaluation import evaluated, score
from kd_cache.train.job import TrainJob, TrainReport
from kd_cache.train.loop import Learner
from kd_cache.train.nets import WarmStart
from kd_cache.train.progress import MACRO
from kd_cache.train.resampling import Cells
from kd_cache.train.run_folder import RunFolder
from kd_cache.train.settings import AUGMENTATIONS, Stage
from kd_cache.train.training import Training
from kd_cache.watch import Watcher

FOLDER: Final = "student"
ALIKE: Final = ("mean", "probs")
UNEQUAL: Final = 0.2
"""A teacher that is worse by more than this share of the rows is warned of where all count alike."""
_MEASURED: Final = ("fitted_on", "validation_that_trained")
"""What is said of a student that its weights do not depend on."""


@dataclass(frozen=True)
class StudentJob(TrainJob):
    """As `TrainJob`, of the role ``scene``, and:

    Attributes:
        cache: the folder of the cache that its teachers' rows come from, or those of several targets.
        mode: ``ce``, ``fit``, ``gate``, or another mode of `kd_cache.distill.fuse`.
        recipe: the numbers of the objective.
        provenances: by teacher what it says of its training; ``None`` where it says nothing.
        select: the epoch that is kept: of the best macro accuracy on A's held-out locations (`MACRO`), or the last one
            (`LAST_EPOCH`).
        balance: half of each batch is of A, half of the target: of the one with fewer rows they are drawn again.
        subset: the files that it may use, where they are not all that are permitted.
        own_features: reads the student's own features of the same samples, in place of those that its teachers scored.
        on_views: each epoch takes one view of every clip, as the teachers scored it (`EpochViews`).
        check_views: so many of an epoch's clips are compared by digest with what was scored.
        own_home: the folder of its runs, in place of ``<output_dir>/student/A2<target>/<mode>``.
        scored: what trainings share that have features of their own: digests of those that teachers score.
    """

    cache: Path | tuple[Path, ...] = Path("cache")
    mode: str = "fit"
    recipe: Recipe = field(default_factory=Recipe)
    provenances: Mapping[str, Provenance | None] = field(default_factory=dict)
    select: str = MACRO
    balance: bool = False
    subset: frozenset[str] | None = None
    own_features: FeatureSource | None = None
    on_views: bool = False
    check_views: int = 64
    own_home: Path | None = None
    scored: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe.loss == "dist" and self.settings.accumulate > 1:
            raise UsageError(
                f"the loss dist compares the rows of a whole batch, and --accumulate {self.settings.accumulate} would "
                "cut it",
                hint="Give a larger --batch-size in its place, or another loss.",
            )
        if self.on_views and self.own_features is not None:
            raise UsageError("the student's own features are not those that were augmented: --views goes without them")
        if self.on_views and (given := [name for name in AUGMENTATIONS if getattr(self.settings, name)]):
            raise UsageError(
                f"with --views a student sees exactly what its teachers scored: leave out {', '.join(given)}"
            )
        if self.balance and self.settings.batch_size % 2:
            raise UsageError(
                f"half of a batch of {self.settings.batch_size} cannot be of A: --balance needs an even one"
            )

    @property
    def features(self) -> FeatureSource:
        return self.own_features or self.data.features

    @property
    def home(self) -> Path:
        return self.own_home or self.output_dir / FOLDER / self.place / self.mode.partition(":")[0]

    @cached_property
    def division(self) -> Division:
        """A and the target train, held-out locations of A validate. Raises as `divide`."""
        found = self._divided
        sides = (found.train, found.only([self.data.task.source]).validation)
        train, validation = (tuple(each for each in side if self.may_use(each)) for side in sides)
        if not train or not validation:
            raise UsageError(
                f"the subset leaves {len(train)} samples to train on and {len(validation)} of A to validate on",
                hint="Give a larger --subset, or another --val-ratio or --fold.",
            )
        return Division(train, validation, found.place_of)

    @property
    def unseen(self) -> list[Sample]:
        """Train rows of the target at held-out locations: they neither train nor validate."""
        source = self.data.task.source
        return [each for each in self._divided.validation if each.device_id != source and self.may_use(each)]

    @cached_property
    def _divided(self) -> Division:
        data, settings = self.data, self.settings
        # Of all that is permitted: what is held out from a subset's students is what was held out from the teachers.
        return divide(
            data.selection.samples,
            task=data.task,
            ratio=settings.val_ratio,
            fold=settings.fold,
            data_root=data.root,
            # The teachers' own division: places that only a target knows would move it.
            heard=lambda sample: sample.device_id == data.task.source,
        )

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
    stands_on = "what this starts from, or a teacher"
    job: StudentJob

    def _refuse_unlabelled(self) -> None:
        """Rows of A have labels, or their manifest is refused; those of the target need none."""

    def _clips(self) -> tuple[Clips, Clips]:
        self._refuse_without_own_features()
        train, validation = super()._clips()
        if self.job.own_features is not None and len(bins := {shape[1:] for shape in train.shapes}) > 1:
            raise FeatureError(f"the student's own features are of different sizes: {sorted(map(list, bins))}")
        self.is_source = torch.tensor([sample.device_id == self.job.data.task.source for sample in train.samples])
        train.scenes = torch.where(self.is_source, train.scenes, IGNORED)
        return train, validation

    def _refuse_without_own_features(self) -> None:
        """All samples without one are told of at once; those of test only leave test unmeasured."""
        job = self.job
        if job.own_features is None or "features" in job.shared:
            return
        files = [sample.file for sample in (*job.division.train, *job.division.validation, *job.unseen)]
        if missing := job.own_features.missing(files):
            raise FeatureError(
                f"{len(missing):,} of {len(files):,} samples have no feature of the student's own\n"
                f"{listed(missing.values())}",
                hint="Check --student-features: its features are called as in the manifest.",
            )
        tests = [sample.file for sample in job.data.manifest if sample.split == "test"]
        if missing := job.own_features.missing(tests):
            self.watcher.note(f"{len(missing):,} of {len(tests):,} test samples have no feature of the student's own")

    def build(self) -> tuple[nn.Module, WarmStart | None]:
        net, start = super().build()
        self.teachers: Tensor | TopK | None = None
        job = self.job
        self.said: dict[str, Any] = {
            "mode": job.mode, "recipe": asdict(job.recipe), "select": job.select, "balance": job.balance,
            "teachers": {},
        }  # fmt: skip
        if job.balance:
            self._tell_of_balance()
        fusion: str | Fusion = CE
        names: tuple[str, ...] = ()
        self.views: EpochViews | None = None
        if job.mode != CE:
            cache = self._opened()
            self.teachers, names = self._rows(cache, self.train), cache.teachers
            self._take_views(cache)
            self.unseen = self._unseen()
            self.told_unseen = self._rows(cache, self.unseen)
            fusion = self._fusion(cache)
            for name in names:
                self.inherit(job.provenances.get(name))
            self.said["validation_that_trained"] = {name: self._validation_that_trained(name) for name in names}
            if job.recipe.loss in NEED_LABELS and job.recipe.apply_to != "source":
                self.watcher.note(
                    f"{job.recipe.loss} needs a label: for rows of the target the teachers' decision stands for it"
                )
        elif job.on_views:
            self._take_views(opened(job, Watcher()))  # the same inputs as with teachers
        self.objective = DistillLoss(fusion, teachers=names, recipe=job.recipe)
        if isinstance(self.teachers, TopK):
            self.objective.refuse_beyond_topk()
        if self.teachers is not None and self.job.recipe.weighting != "none":
            self.said["mean_weight"] = self.objective.scale_weights(self.teachers, self.is_source, self.train.scenes)
        return net, start

    def _take_views(self, cache: LogitCache) -> None:
        if self.job.on_views:
            self._rows(cache, self.train)  # what is augmented is what was scored
            self.views = EpochViews(cache, self.train, self.settings.seed, self.job.check_views)
            self.said["views"] = self.views.described

    def _stages(self) -> tuple[Stage, ...]:
        stages = super()._stages()
        return tuple(replace(each, augment="off") for each in stages) if self.job.on_views else stages

    def _tell_of_balance(self) -> None:
        is_source, size, drop_last = self.is_source.numpy(), self.settings.batch_size, self.settings.drop_last
        batches = self.train.balanced(size, torch.Generator(), is_source, drop_last=drop_last)
        drawn = np.bincount(np.concatenate([np.empty(0, np.int64), *batches]), minlength=len(is_source))
        a, b = (float(drawn[side].mean()) for side in (is_source, ~is_source))
        self.said["drawn"] = {"source": a, "target": b}
        task = self.job.data.task
        self.watcher.note(
            f"balanced batches: an epoch draws each clip of {task.source} {a:.3g} times, each of "
            f"{self.job.data.target} {b:.3g} times"
        )

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
        for told in cache.accuracies:
            self.watcher.note(told)
        for doubt in cache.doubts(self.job.data.task.cities):
            self.watcher.note(doubt)
        self.said["teachers"] = cache.fingerprints
        return cache

    def _unseen(self) -> Clips:
        """What the student and its teachers are compared on; nothing is chosen by it."""
        job = self.job
        if "unseen" not in job.shared:
            job.shared["unseen"] = Clips.read(job.features, job.unseen, job.workers, self.watcher)
        return job.shared["unseen"]

    def _validation_that_trained(self, name: str) -> int | None:
        """How many of the validation rows trained a teacher; ``None`` where it does not say."""
        made = self.job.provenances.get(name)
        if made is None or not made.complete:
            return None
        return int(made.has_trained(sample.file for sample in self.validation.samples).sum())

    def _rows(self, cache: LogitCache, clips: Clips) -> Any:
        """``[N, K, C]`` float32, or a `TopK`: the teachers' logits of clips, which are the ones they scored.

        Raises `StaleError` for a feature that changed since, `MissingLogitsError` for one without a row.
        """
        files = [sample.file for sample in clips.samples]
        rows = cache.rows(files)
        scored = cache.input_digests(rows)
        if scored is not None:
            digests, known = self._scored_now(clips)
            changed = np.flatnonzero(known & (scored != digests[:, None]).any(axis=(1, 2))).tolist()
            if changed:
                raise StaleError(
                    f"{len(changed)} features are not those that the teachers scored\n"
                    f"{listed(files[number] for number in changed)}",
                    hint="Run kd-cache dump again.",
                )
        return cache.batch(rows, torch.float32)

    def _scored_now(self, clips: Clips) -> tuple[np.ndarray, np.ndarray]:
        """``[N, 16]`` digests of what teachers score as it is now, and ``[N]`` bool: which of it is at hand."""
        job, files = self.job, [sample.file for sample in clips.samples]
        if job.own_features is None:
            return clips.digests, np.ones(len(files), bool)
        read = job.scored
        if unread := [file for file in files if file not in read]:
            may_lack = dict.fromkeys(unread, "")
            digests, known = read_digests(job.data.features, unread, may_lack, job.workers, self.watcher)
            read |= dict(zip(unread, digests, strict=True))
            if lost := int((~known).sum()):
                self.watcher.note(
                    f"{lost:,} of {len(unread):,} features that the teachers scored are not at hand: whether they are "
                    "still the same is not known"
                )
        found = np.array([read[file] for file in files], np.uint8).reshape(-1, 16)
        return found, np.asarray(found.any(axis=1))

    def _fusion(self, cache: LogitCache) -> str | Fusion:
        mode = self.job.mode
        if mode == "gate":
            return fit_gate(held_out(cache, self.job.selection, self.job.provenances), seed=self.settings.seed)
        if mode != "fit":
            self._tell_of_unequal(cache)
            return mode
        try:
            fitted = fit_weights(held_out(cache, self.job.selection, self.job.provenances))
        except UnfitError as error:
            self.watcher.note(f"the teachers' mean is taken in place of a fit: {error.message}")
            fitted = Weights(dict.fromkeys(cache.teachers, 1 / len(cache.teachers)))
        self.said |= {"weights": dict(fitted.of), "fitted_on": dict(fitted.measured)}
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in fitted.of.items())
        self.watcher.note(f"weights of the teachers: {weights}{_judged(fitted.measured)}")
        return fitted

    def _tell_of_unequal(self, cache: LogitCache) -> None:
        """Where all count alike, a poor teacher spoils what a good one says."""
        if self.job.mode not in ALIKE or len(cache.teachers) < 2:
            return
        try:
            found = singles(held_out(cache, self.job.selection, self.job.provenances))
        except UnfitError:
            return  # nobody knows
        shares = {name: figures["accuracy"] for name, figures in found.items()}
        best = max(shares, key=shares.__getitem__)
        for name, share in shares.items():
            if shares[best] - share > UNEQUAL:
                self.watcher.note(
                    f"{name} is right on {share:.1%} of the rows that are held out from training, {best} on "
                    f"{shares[best]:.1%}: under {self.job.mode} both count alike (fit weighs them)"
                )

    @property
    def title(self) -> str:
        return f"student ({self.job.mode})"

    def further_parts(self) -> dict[str, Any]:
        told = self.teachers.tensors if isinstance(self.teachers, TopK) else (self.teachers,)
        rows = b"".join(each.numpy().tobytes() for each in told if each is not None)
        made = self.job.provenances if self.job.mode != CE else {}
        provenances = {name: None if each is None else each.digest for name, each in made.items()}
        said = {name: value for name, value in self.said.items() if name not in _MEASURED}
        return {"distillation": {**said, "rows": hashlib.sha256(rows).hexdigest(), "provenances": provenances}}

    @cached_property
    def record(self) -> dict[str, Any]:
        record = {**super().record, "distillation": self.said}
        if self.job.own_features is not None:
            first = self.train.samples[0].file
            digest = self.train.digests[0].tobytes().hex()
            record |= {
                "feature_spec": self.settings.feature_spec or None,
                OWN_FEATURES: {"file": first, "digest": digest},
            }
        return record

    @property
    def _facts(self) -> dict[str, Any]:
        return {**super()._facts, "distillation": self.said}

    def learner(self, folder: RunFolder) -> Learner:
        is_source = self.is_source.numpy() if self.job.balance else None
        more: dict[str, Any] = {"is_source": is_source, "select": self.job.select}
        train = copy.copy(self.train)
        train.changed = None if self.views is None else self.views.replay
        return Learner(self.net, train, self.validation, objective=_Taught(self), **more)

    def measured(self, best: nn.Module, clips: Clips, which: str) -> dict[str, Any]:
        return evaluated(best, clips, self.job, self._by_location)

    def _by_location(
        self, logits: np.ndarray, labels: np.ndarray, places: np.ndarray, groups: Sequence[str]
    ) -> dict[str, Any]:
        """What a comparison of students on drawn locations needs."""
        return {"by_location": Cells.of(logits, labels, places, groups).as_json()}

    def _figures(self, best: nn.Module) -> dict[str, Any]:
        return {**super()._figures(best), "agreement": self._agreement(best)}

    def _agreement(self, best: nn.Module) -> dict[str, Any] | None:
        """How often the student decides as the fused teachers do, on clips of the target that neither trained on."""
        if self.teachers is None or not len(self.unseen):
            return None
        logits = score(best, self.unseen, self.job.device, self.settings.batch_size)
        nobody = torch.full((len(logits),), IGNORED)
        fused = fuse(self.told_unseen, self.objective.fusion or CE, labels=nobody)
        decided = fused.ids[:, 0] if isinstance(fused, TopK) else fused.argmax(dim=1)
        return {"rows": len(logits), "share": float((logits.argmax(axis=1) == decided.numpy()).mean())}


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
        self._watcher, self._ratio, self._views = training.watcher, 0.0, training.views

    def start_epoch(self, epoch: int, epochs: int, /) -> None:
        if self._views is not None:
            rows = self._views.begin(epoch)
            self._teachers = None if self._teachers is None else rows.to(self._labels.device)
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


def _judged(measured: Mapping[str, Any]) -> str:
    """What the fit knows of each teacher, of the mean and of itself, in words."""
    figures = {name: each for name, each in measured.items() if isinstance(each, Mapping)}
    if not figures:
        return ""
    told = "; ".join(f"{name} {each['log_loss']:.3f}, {each['accuracy']:.1%}" for name, each in figures.items())
    return (
        f"; log loss and accuracy on {measured['rows']:,} rows that are held out from training "
        f"({measured['chose_epoch']:,} of them chose a teacher's epoch): {told}"
    )


def train_student(job: StudentJob, watcher: Watcher | None = None) -> TrainReport:
    """Train a student, or go on with its unfinished run. Raises as `Training.run`, `LogitCache.open` and `fuse`."""
    return StudentTraining(job, watcher).run()
