"""One training: from a manifest and features to a checkpoint, gone on with where it was stopped.

Validation is by location. ``test`` is only measured, after everything is chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kd_cache.dataset.manifest import Sample
from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import (
    CheckpointError,
    FeatureError,
    KDCacheError,
    StaleError,
    StoreError,
    TeacherError,
    TrainingError,
    UsageError,
    listed,
    shown,
)
from kd_cache.keys import KeyFinder, sample_key
from kd_cache.score.device import refuse_training_precision, training_numerics
from kd_cache.score.engine import is_out_of_memory
from kd_cache.train.architectures import architecture_of
from kd_cache.train.checkpoint import read_weights
from kd_cache.train.clips import Clips
from kd_cache.train.evaluation import evaluated, measure, score
from kd_cache.train.job import FRESH, TrainJob, TrainReport, checkpoint_record, key_parts, run_config
from kd_cache.train.loop import Learner, Loop
from kd_cache.train.nets import WarmStart, make_net, own_code, warm_start
from kd_cache.train.pretraining import Pretrained, code_version, key_of
from kd_cache.train.progress import Progress
from kd_cache.train.run_folder import BEST, Last, RunFolder, published
from kd_cache.train.settings import AUTO, FULL_MODEL, GENTLE, SCRATCH, Settings, Stage, stages_of
from kd_cache.watch import Watcher


class Training:
    """One training. A recipe overrides what the net is (`build`), what of it the loop trains (`learner`), and so on.

    Attributes:
        code: folders of the recipe's own code, which its keys change with.
        stands_on: what made a training besides its own rows, for a person.
        units: what a row is called, and what rows are kept together by.
        keeps_weights: whether later runs of the same key take the weights from ``<output_dir>/pretrained``.
        inherited: the samples that made what the net starts from, or stands on.
    """

    code: ClassVar[tuple[Path, ...]] = ()
    stands_on: ClassVar[str] = "what this starts from"
    units: ClassVar[tuple[str, str]] = ("samples", "locations")
    keeps_weights: ClassVar[bool] = False

    def __init__(self, job: TrainJob, watcher: Watcher | None = None) -> None:
        self.job, self.settings, self.watcher = job, job.settings, watcher or Watcher()
        refuse_training_precision(job.device, job.settings.precision)
        self._refuse_unlabelled()
        self.train, self.validation = self._clips()
        self._tell_of_equal_features()
        if self.settings.shuffle_labels:
            chance = np.random.default_rng(self.settings.seed)
            self.train = self.train.with_labels_of(chance.permutation(len(self.train)))
            self.validation = self.validation.with_labels_of(chance.permutation(len(self.validation)))
        self.inherited: Provenance | None = None
        self.net, self.start = self.build()
        self.stages = self._stages()
        net_code = own_code(self.settings.arch, self.net)
        version = code_version(self.code)
        self.parts = key_parts(job, self.train, self.validation, self.stages, self.start, net_code, version)
        self.parts |= self.further_parts()
        self.key = key_of(self.parts)
        self.pretrained = Pretrained(job.output_dir / "pretrained")

    def run(self) -> TrainReport:
        """Train, or take what was trained before.

        Raises:
            UsageError: settings or a manifest that make no sense together; a label that is missing.
            DataLeakageError: a location that cannot be held out.
            CheckpointError: a checkpoint to start from that does not fit.
            FeatureError: a feature that cannot be read.
            TrainingError: the training diverged, learnt nothing, or changed what was frozen.
            StoreError: a file cannot be written.
        """
        try:
            return self._run()
        except (KDCacheError, OSError):
            raise
        except Exception as error:
            if (told := foreseen(error, self.settings)) is None:
                raise
            raise told from error

    # -- what a recipe decides ----------------------------------------------------------------------------------------

    def build(self) -> tuple[nn.Module, WarmStart | None]:
        """The net to train, on the CPU, and where its weights come from if they are no chance."""
        net = make_net(self.settings, self.settings.num_classes)
        return net, None if self.job.init is None else self.started_from(self.job.init, net)

    def architecture(self) -> str | None:
        """The architecture that the record names; ``None`` for a net of a user's own, which only its factory knows."""
        return architecture_of(self.net)

    def learner(self, folder: RunFolder) -> Learner:
        """What the loop trains: the net, which is on the device by now, or a part of it."""
        return Learner(self.net, self.train, self.validation)

    def finish(self, learner: Learner, folder: RunFolder, progress: Progress) -> None:
        """Put the best weights together, if the loop did not keep them whole."""

    def measured(self, best: nn.Module, clips: Clips, which: str) -> dict[str, Any]:
        """Metrics of ``best`` on ``clips``, which are called ``which``."""
        return evaluated(best, clips, self.job)

    @property
    def title(self) -> str:
        """What it is called for a person."""
        return self.settings.role

    def further_parts(self) -> dict[str, Any]:
        """What else the weights depend on, for the key, as JSON values."""
        return {}

    # -- for recipes --------------------------------------------------------------------------------------------------

    def started_from(self, path: Path, net: nn.Module) -> WarmStart:
        """Weights for ``net`` from a checkpoint."""
        start = warm_start(net, path, self.settings)
        if start.provenance is None:
            self.watcher.note(f"what {shown(path)} was trained on is not known: it says nothing of it")
        if start.kind == FULL_MODEL and start.provenance is not None:
            self.inherited = None  # nothing is left of what was below
        self.inherit(start.provenance)
        return start

    def inherit(self, made: Provenance | None) -> None:
        """What this starts from, or stands on, was made with that; ``None`` where it does not say."""
        made = Provenance.unknown() if made is None else self.job.data.names.recognised(made).provenance
        self.inherited = made if self.inherited is None else self.inherited.together(made)

    # -- before -------------------------------------------------------------------------------------------------------

    def _refuse_unlabelled(self) -> None:
        label = f"{self.settings.label}_label"
        division = self.job.division
        bare = [sample.file for sample in (*division.train, *division.validation) if getattr(sample, label) is None]
        if bare:
            raise UsageError(
                f"{len(bare)} of the samples that a {self.settings.role} teacher learns from have no {label}\n"
                f"{listed(bare)}",
                hint="Give them one in the manifest.",
            )

    def _clips(self) -> tuple[Clips, Clips]:
        """What trains and what validates."""
        job = self.job
        if "features" not in job.shared:
            # By key, as a dump has them: the manifest's order changes no weights.
            sides = (job.division.train, job.division.validation)
            ordered = [sample for side in sides for sample in sorted(side, key=_by_key)]
            job.shared["features"] = Clips.read(job.features, ordered, job.workers, self.watcher)
        clips, count = job.shared["features"], len(job.division.train)
        return clips.part(range(count)), clips.part(range(count, len(clips)))

    def held_out(self) -> Mapping[str, Clips]:
        """What must have nothing in common with what trains, by its name."""
        return {"validation": self.validation}

    def _tell_of_equal_features(self) -> None:
        ordered = KeyFinder(np.ascontiguousarray(np.unique(self.train.digests, axis=0)))
        for name, clips in self.held_out().items():
            if same := int((ordered.find(clips.digests) >= 0).sum()):
                self.watcher.note(
                    f"{same:,} {name} features are byte for byte a training sample's, of other {self.units[1]}: the "
                    f"{name} is better than it should be"
                )

    def _stages(self) -> tuple[Stage, ...]:
        settings = self.settings
        stages = stages_of(settings, SCRATCH if self.start is None else self.start.kind)
        if settings.stages and (settings.epochs, settings.lr, settings.preset) != (None, None, AUTO):
            self.watcher.note("the stages are given one by one: --epochs, --lr and --preset are not used")
        if self.start is not None and self.start.kind == FULL_MODEL:
            for number, stage in enumerate(stages, start=1):
                if stage.lr > GENTLE:
                    self.watcher.note(
                        f"stage {number} starts at a learning rate of {stage.lr:g}: above {GENTLE:g} a whole model is "
                        "untrained before it is tuned"
                    )
        return stages

    @cached_property
    def record(self) -> dict[str, Any]:
        """What each checkpoint of the run says of itself."""
        made = Provenance.of(
            (sample.file for sample in self.train.samples),
            (sample.file for sample in self.validation.samples),
            np.concatenate([self.train.digests, self.validation.digests]),
        )
        if self.inherited is not None:
            made = made.together(self.inherited)
        return checkpoint_record(self.job, self.architecture(), made, self.stages, self.key, self.parts["code"])

    @property
    def _facts(self) -> dict[str, Any]:
        """What both the settings and the results of a run say of its net."""
        return {
            "net": self.parts["net"],
            "cached_features": self.job.cached_features,
            "start": None if self.start is None else self.start.told,
        }

    def _announce(self) -> None:
        division, (rows, places) = self.job.division, self.units
        self.watcher.note(
            f"{self.title} for {self.job.place}: {len(self.train):,} training {rows} of "
            f"{division.train_locations:,} {places}, {len(self.validation):,} validation {rows} of "
            f"{division.validation_locations:,} others; key {self.key[:16]}…"
        )
        if self.start is not None:
            self.watcher.note(self.start.told)
        if lost := self.train.left_out(self.settings.batch_size, drop_last=self.settings.drop_last):
            why = "fill no batch with others of their shape, and --drop-last (--compile) leaves out all others"
            if not self.settings.drop_last:
                why = "are alone with their shape, and batch norm learns nothing from one"
            self.watcher.note(f"{lost:,} training clips {why}: they are not trained on")
        made = self.inherited or Provenance.unknown()
        for name, clips in self.held_out().items():
            if seen := int(made.has_trained(sample.file for sample in clips.samples).sum()):
                self.watcher.note(
                    f"{seen:,} of {len(clips):,} {name} samples trained {self.stands_on}: the {name} is better than it "
                    "should be (give both the same --val-ratio, --fold and --quick-experiment)"
                )

    # -- weights that are there already -------------------------------------------------------------------------------

    def _run(self) -> TrainReport:
        self._announce()
        if self.job.resume == FRESH:
            while (folder := self._unfinished()) is not None:  # or the next run would go on with them
                folder.give_up()
            if self.keeps_weights and self.pretrained.remove(self.parts):
                self.watcher.note(f"removed the cached weights of key {self.key[:16]}…, as --resume fresh asks")
        elif (report := self._gone_on()) is not None or (
            self.keeps_weights and (report := self._from_cache()) is not None
        ):
            return report
        config = {"key": self.key, **run_config(self.job, self.stages), **self._facts, **self.job.record}
        return self._trained(RunFolder.new(self.job.home, self.record, config, half=self.job.half), None)

    def _gone_on(self) -> TrainReport | None:
        """The rest of an unfinished run; ``None`` where there is none that can be gone on with."""
        folder = self._unfinished()
        if folder is None:
            return None
        try:
            last = folder.last()
        except CheckpointError as error:
            self.watcher.note(f"cannot go on with {shown(folder.path)}: {error.message}; training anew")
            folder.give_up()
            return None
        return self._trained(folder, last)

    def _unfinished(self) -> RunFolder | None:
        return RunFolder.unfinished(self.job.home, self.key, self.record, half=self.job.half)

    def _from_cache(self) -> TrainReport | None:
        """What a training of this very key came to before; ``None`` where there is none."""
        try:
            entry = self.pretrained.find(self.parts)
            nearest = self.pretrained.nearest(self.parts) if entry is None else []
        except StoreError as error:
            self.watcher.note(f"cached pre-training cannot be looked for: {error.message}")
            return None
        if entry is None:
            if nearest:
                self.watcher.note(f"no cached weights of this key; the nearest differ in {', '.join(nearest)}")
            return None
        if entry.damage is not None:
            self.watcher.note(f"the cached weights {shown(entry.path)} are damaged ({entry.damage}): training again")
            return None
        self.watcher.note(
            f"pre-training skipped: {shown(entry.path)} of {entry.created} has the same data, selection, fold, front "
            "end, architecture, augmentation, optimiser settings, seed, code and environment"
        )
        # Measured anew, on the clips that are there now.
        with training_numerics(self.job.device, self.settings.precision, deterministic=self.settings.deterministic):
            best = self._net_of(read_weights(entry.weights, [self.net.state_dict().keys()]).tensors)
            results = {**entry.measured, **self._figures(best)}
        return self._reported("cached", entry.weights, None, results)

    # -- training -----------------------------------------------------------------------------------------------------

    def _trained(self, folder: RunFolder, last: Last | None) -> TrainReport:
        job, settings = self.job, self.settings
        try:
            if job.tensorboard:
                folder.log_for_tensorboard()
            with training_numerics(job.device, settings.precision, deterministic=settings.deterministic):
                progress = self._through_the_loop(folder, last)
                results = self._results(folder, progress)
            how = "trained" if last is None else "resumed"
            report = self._reported(how, folder.path / BEST, folder.path, results)
            if self.keeps_weights and job.publish and not settings.shuffle_labels:
                self._keep_weights(folder.path / BEST, results)
            folder.write_results(results)  # last: whoever is killed before publishes again
            return report
        finally:
            folder.close()

    def _through_the_loop(self, folder: RunFolder, last: Last | None) -> Progress:
        job = self.job
        self.net.to(job.device)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.2 to 1.5 × as fast on a CPU
        learner = self.learner(folder)
        learner.name = f"{self.title} {job.place}"
        learner.is_warm = job.init is not None and self.start is not None and self.start.kind == FULL_MODEL
        learner.random_loss = None if last is None else last[2].random_loss
        if learner.random_loss is None:
            learner.random_loss = random_loss(learner.net, learner.validation, self.settings, job.device)
        loop = Loop(learner, self.settings, self.stages, job.device, folder, self.watcher)
        if last is not None:
            tensors, state, progress = last
            loop.net.load_state_dict(tensors)
            loop.go_on(progress, state)
            self.watcher.note(
                f"going on with {shown(folder.path)}: {len(progress.history)} epochs are done, stage "
                f"{progress.stage + 1}"
            )
        loop.run()
        self.finish(learner, folder, loop.progress)
        return loop.progress

    def _results(self, folder: RunFolder, done: Progress) -> dict[str, Any]:
        """Metrics of the best epoch's weights as they were stored."""
        division = self.job.division
        return {
            "key": self.key,
            "role": self.settings.role,
            "place": self.job.place,
            **self._figures(self._net_of(folder.best())),
            "random_weights_log_loss": done.random_loss,
            "warm_start_log_loss": done.start_loss,
            "epochs": len(done.history),
            "best_epoch": done.best_epoch,
            "frozen": done.frozen,
            **self._facts,
            "locations": {"train": division.train_locations, "validation": division.validation_locations},
            "shuffled_labels": self.settings.shuffle_labels,
        }

    def _figures(self, best: nn.Module) -> dict[str, Any]:
        """What ``best`` is worth on the clips as they are now."""
        return {
            "validation": self.measured(best, self.validation, "validation"),
            "test": self._measured_on_test(best),
            "chance": 1 / self.settings.num_classes,
        }

    def _measured_on_test(self, best: nn.Module) -> dict[str, Any] | None:
        """Test clips that cannot be read or scored are a remark: nothing was chosen by them."""
        job = self.job
        try:
            if "test" not in job.shared:
                samples = [sample for sample in job.data.manifest if sample.split == "test"]
                job.shared["test"] = Clips.read(job.features, samples, job.workers, self.watcher)
            if not len(job.shared["test"]):
                return None
            return self.measured(best, job.shared["test"], "test")
        except (FeatureError, StaleError, TeacherError, RuntimeError) as error:
            reason = error.message if isinstance(error, KDCacheError) else shown(error)
            self.watcher.note(f"test was not measured: {reason}")
            return None

    def _net_of(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the net with these weights, on the device."""
        net = copy.deepcopy(self.net)
        net.load_state_dict({**net.state_dict(), **tensors})
        return net.to(self.job.device)

    # -- what is kept -------------------------------------------------------------------------------------------------

    def _reported(self, how: str, weights: Path, run: Path | None, results: dict[str, Any]) -> TrainReport:
        report = TrainReport(self.settings.role, self.job.place, how, weights, run, results, published=False)
        return published(self.job, report, self.watcher)

    def _keep_weights(self, weights: Path, results: Mapping[str, Any]) -> None:
        try:
            self.pretrained.save(self.parts, weights, results)
        except (StoreError, OSError) as error:
            reason = error.message if isinstance(error, KDCacheError) else error.strerror
            self.watcher.note(f"the weights were not cached for later runs: {reason}")


def _by_key(sample: Sample) -> str:
    return sample_key(sample.file)


def random_loss(net: nn.Module, clips: Clips, settings: Settings, device: torch.device) -> float:
    """The validation loss of the same net with random weights: what any training must beat."""
    blank = copy.deepcopy(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for module in blank.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    logits = score(blank.to(device), clips, device, settings.batch_size)
    return measure(logits, clips.labels(settings.label).numpy()).log_loss


def foreseen(error: Exception, settings: Settings) -> KDCacheError | None:
    """What a person can do about an error of torch's; ``None`` for one that nobody foresaw."""
    first = (shown(error).splitlines() or [""])[0]
    if is_out_of_memory(error):
        return TrainingError(
            f"there is not enough memory for batches of {settings.batch_size} clips ({first})",
            hint="Give a smaller --batch-size, with --accumulate if the steps are to stay as large.",
        )
    if "more than 1 value per channel" in str(error):
        return TrainingError("batch norm learns nothing from a batch of one clip", hint="Give --batch-size 2 or more.")
    if settings.deterministic and "deterministic" in str(error):
        return TrainingError(
            f"this device cannot repeat this net's training to the bit: {first}",
            hint="Leave out --deterministic, or train on the CPU.",
        )
    if settings.compile and type(error).__module__.startswith("torch._"):
        return TrainingError(
            f"torch.compile failed: {type(error).__name__}: {first}",
            hint="It needs a C++ compiler; or leave out --compile.",
        )
    if ":" in settings.arch:
        return TeacherError(
            f"{shown(settings.arch)} failed: {type(error).__name__}: {first}",
            hint="It gets features [B, T, F], of one shape in a batch. Run again with --debug to see where it failed.",
        )
    return None
