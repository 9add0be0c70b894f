"""Training one teacher from a manifest and features to a checkpoint: who trains on what, from where, and what is kept.

- *city*: A and the target's train samples, city labels.
- *city2scene*: the city teacher's backbone, frozen, and a scene head; A's train samples alone, scene labels.
- *scene*: A's train samples alone, scene labels.

Validation is by location. ``test`` is only measured, after everything is chosen.
"""

from __future__ import annotations

import copy
import filecmp
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
from kd_cache.fingerprint import canonical_json, weights_digest
from kd_cache.manifest import Sample, sample_key
from kd_cache.pipeline.device import environment, refuse_training_precision, training_numerics
from kd_cache.provenance import Provenance
from kd_cache.store.atomic import make_directory, store_errors, write_atomic
from kd_cache.store.keys import KeyFinder
from kd_cache.train.checkpoint_file import MOST_RECORD
from kd_cache.train.clips import Clips, class_names
from kd_cache.train.evaluation import evaluated, test_clips
from kd_cache.train.head import Standardised
from kd_cache.train.job import FRESH, TrainJob, TrainReport
from kd_cache.train.loop import Loop, Progress, foreseen, score
from kd_cache.train.metrics import measure
from kd_cache.train.nets import WarmStart, city_net, embedding_dim, is_city2scene, make_head, make_net, warm_start
from kd_cache.train.own_net import own_code
from kd_cache.train.pretraining import Pretrained, code_version, key_of
from kd_cache.train.run_folder import BEST, Last, RunFolder, checkpoint_names
from kd_cache.train.settings import AUTO as AUTO_PRESET
from kd_cache.train.settings import (
    CITY,
    CITY2SCENE,
    FROZEN,
    FULL_MODEL,
    GENTLE,
    SCRATCH,
    Settings,
    Stage,
    stages_of,
)
from kd_cache.watch import Watcher
from teachers.builtin import ARCHITECTURE_VERSION, ARCHITECTURES, City2Scene, SideBySide, architecture_of
from teachers.checkpoint import read_weights, save_checkpoint
from teachers.embeddings import FOLDER, Source, described, made_with, side_by_side


def train_teacher(job: TrainJob, watcher: Watcher | None = None) -> TrainReport:
    """Train a teacher, or take it from where it was trained before.

    Raises:
        UsageError: settings or a manifest that make no sense together; a label that is missing.
        DataLeakageError: a location that cannot be held out.
        CheckpointError: a checkpoint to start from that does not fit.
        FeatureError: a feature that cannot be read.
        TrainingError: the training diverged, learnt nothing, or changed what was frozen.
        StoreError: a file cannot be written.
    """
    return _Training(job, watcher or Watcher()).run()


class _Training:
    def __init__(self, job: TrainJob, watcher: Watcher) -> None:
        self.job, self.settings, self.watcher = job, job.settings, watcher
        refuse_training_precision(job.device, job.settings.precision)
        self._refuse_unlabelled()
        if "features" not in job.shared:
            # By key, as a dump has them: the manifest's order changes no weights.
            listed = [s for side in (job.division.train, job.division.validation) for s in sorted(side, key=_by_key)]
            job.shared["features"] = Clips.read(job.source, listed, job.workers, watcher)
        clips, count = job.shared["features"], len(job.division.train)
        self.train, self.validation = clips.part(range(count)), clips.part(range(count, len(clips)))
        self._tell_of_equal_features()
        if self.settings.shuffle_labels:
            chance = np.random.default_rng(self.settings.seed)
            self.train = self.train.with_labels_of(chance.permutation(len(self.train)))
            self.validation = self.validation.with_labels_of(chance.permutation(len(self.validation)))
        self.inherited: Provenance | None = None
        self.sources: list[Source] = []
        self.net, self.start = self._net()
        self.stages = self._stages()
        self.parts = self._key_parts()
        self.key = key_of(self.parts)
        self.pretrained = Pretrained(job.output_dir / "pretrained")

    def run(self) -> TrainReport:
        try:
            return self._run()
        except (KDCacheError, OSError):
            raise
        except Exception as error:
            if (told := foreseen(error, self.settings)) is None:
                raise
            raise told from error

    def _run(self) -> TrainReport:
        job, settings = self.job, self.settings
        self._announce()
        if job.resume == FRESH:
            while (folder := self._unfinished()) is not None:  # or the next run would go on with them
                folder.give_up()
            if settings.role == CITY and self.pretrained.remove(self.parts):
                self.watcher.note(f"removed the cached weights of key {self.key[:16]}…, as --resume fresh asks")
        elif (report := self._gone_on()) is not None or (
            settings.role == CITY and (report := self._from_cache()) is not None
        ):
            return report
        config = {"key": self.key, **self._config(), **job.record}
        return self._trained(RunFolder.new(job.home, self.record, config, half=job.half), None)

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

    def _tell_of_equal_features(self) -> None:
        ordered = np.unique(self.train.digests, axis=0)
        same = int((KeyFinder(np.ascontiguousarray(ordered)).find(self.validation.digests) >= 0).sum())
        if same:
            self.watcher.note(
                f"{same:,} validation features are byte for byte a training sample's, under another location: the "
                "validation is better than it should be"
            )

    def _net(self) -> tuple[nn.Module, WarmStart | None]:
        """The net to train, and where its weights come from if they are no chance."""
        job, settings = self.job, self.settings
        if settings.role == CITY2SCENE:
            net, start = self._on_city_teacher()
        else:
            net, start = make_net(settings, settings.num_classes, settings.seed), None
        if job.init is not None:
            start = self._started_from(job.init, net, start)
        return net, start

    def _started_from(self, path: Path, net: nn.Module, below: WarmStart | None) -> WarmStart:
        """Weights for ``net`` from a checkpoint, over those of a city teacher ``below`` where it has none."""
        start = warm_start(net, path, self.settings)
        if start.provenance is None:
            self.watcher.note(f"what {shown(path)} was trained on is not known: it says nothing of it")
        if start.kind == FULL_MODEL and start.provenance is not None:
            self.inherited = None  # nothing is left of what was below
        self._inherit(start.provenance)
        return start if below is None else replace(start, sha256=f"{below.sha256}+{start.sha256}")

    def _inherit(self, made: Provenance | None) -> None:
        """What this starts from, or stands on, was made with that; ``None`` where it does not say."""
        made = made or Provenance.unknown()
        self.inherited = made if self.inherited is None else self.inherited.together(made)

    def _on_city_teacher(self) -> tuple[nn.Module, WarmStart]:
        """A new scene head on the backbone of the city teacher."""
        job, settings = self.job, self.settings
        if job.embeddings:
            city, start = self._on_embeddings()
        elif job.backbone is not None:
            whole = job.backbone == job.init and is_city2scene(job.backbone)
            city, start = city_net(job.backbone, settings, whole=whole)
        else:
            raise UsageError("a City2Scene teacher needs a city teacher", hint="Pass --city-teacher-ckpt.")
        self._inherit(start.provenance)
        if start.provenance is None:
            self.watcher.note("what the backbone was trained on is not known: its checkpoint says nothing of it")
        return City2Scene(city, make_head(embedding_dim(city), settings, settings.seed)), replace(start, kind=FROZEN)

    def _on_embeddings(self) -> tuple[nn.Module, WarmStart]:
        """The backbones of extracted sources, side by side if there are several."""
        folder = self.job.output_dir / FOLDER / self.job.place
        if len(set(self.job.embeddings)) < len(self.job.embeddings):
            raise UsageError(f"the same embeddings are named twice: {', '.join(self.job.embeddings)}")
        self.sources = [Source.open(folder, name) for name in self.job.embeddings]
        backbones = [source.teacher.backbone for source in self.sources]
        net = backbones[0] if len(backbones) == 1 else SideBySide(backbones)
        for source in self.sources:
            if source.teacher.provenance is None:
                self.watcher.note(f"what the embeddings {shown(source.name)} were made with is not known")
        told = f"embeddings of {', '.join(self.job.embeddings)} in {shown(folder)}, {net.embedding_dim} wide"
        return net, WarmStart(FULL_MODEL, told, key_of(described(self.sources)), made_with(self.sources))

    def _stages(self) -> tuple[Stage, ...]:
        settings = self.settings
        stages = stages_of(settings, SCRATCH if self.start is None else self.start.kind)
        if settings.stages and (settings.epochs, settings.lr, settings.preset) != (None, None, AUTO_PRESET):
            self.watcher.note("the stages are given one by one: --epochs, --lr and --preset are not used")
        if self.start is not None and self.start.kind == FULL_MODEL:
            for number, stage in enumerate(stages, start=1):
                if stage.lr > GENTLE:
                    self.watcher.note(
                        f"stage {number} starts at a learning rate of {stage.lr:g}: above {GENTLE:g} a whole model is "
                        "untrained before it is tuned"
                    )
        return stages

    def _key_parts(self) -> dict[str, Any]:
        """Everything that the weights depend on, in words, by what it is about."""
        job, selection, label = self.job, self.job.selection, self.settings.label
        where = environment(job.device)
        parts = {
            **self.settings.key_parts(),
            "data": {"train": self.train.digest(label), "validation": self.validation.digest(label)},
            "selection": {"target": selection.target},
            "stages": [asdict(stage) for stage in self.stages],
            "net": own_code(self.settings.arch, self.net),
            "cached_features": self.job.cached_features,
            "start": None if self.start is None else {"kind": self.start.kind, "sha256": self.start.sha256},
            "code": code_version(),
            "environment": {name: where[name] for name in ("device", "instruction_set", "torch", "cuda")}
            | self._threads_or_cudnn(),
            "storage": "float16" if job.half else "float32",
        }
        found: dict[str, Any] = json.loads(canonical_json(parts))  # as an entry's file gives them back
        return found

    def _threads_or_cudnn(self) -> dict[str, Any]:
        if self.job.device.type == "cpu":
            return {"threads": torch.get_num_threads()}
        return {"cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]

    def _config(self) -> dict[str, Any]:
        settings = asdict(self.settings)
        settings["mlp_hidden_dims"] = list(self.settings.mlp_hidden_dims or ())
        del settings["stages"]
        return {
            "settings": settings,
            "stages": [asdict(stage) for stage in self.stages],
            "net": self.parts["net"],
            "cached_features": self.job.cached_features,
            "start": None if self.start is None else self.start.told,
            "place": self.job.place,
            "manifest_sha256": self.job.manifest.digest,
        }

    @cached_property
    def record(self) -> dict[str, Any]:
        """What each checkpoint of the run says of itself."""
        settings, job = self.settings, self.job
        made = Provenance.of(
            (sample.file for sample in self.train.samples), (sample.file for sample in self.validation.samples)
        )
        if self.inherited is not None:
            made = made.together(self.inherited)
        most = MOST_RECORD[".pth" if job.pth else ".safetensors"] // 22 - 1000
        if len(made.trained) + len(made.validated) > most:  # now, not after the last epoch
            raise UsageError(
                f"{len(made.trained) + len(made.validated):,} samples would make this teacher, and a checkpoint can "
                f"name {most:,}",
                hint="Leave out --pth, whose files hold less, or use --quick-experiment.",
            )
        return {
            # Of several backbones the tensors tell; of a user's own net only its factory knows.
            "architecture": known if (known := architecture_of(self.net)) in ARCHITECTURES else None,
            "architecture_version": ARCHITECTURE_VERSION,
            "role": settings.role,
            "class_names": class_names(settings.label, settings.num_classes),
            "value_kind": "logits",
            "feature_spec": settings.feature_spec or None,
            "provenance": made.as_json(),
            "training": {
                "key": self.key,
                "place": job.place,
                "manifest_sha256": job.manifest.digest,
                "seed": settings.seed,
                "stages": [asdict(stage) for stage in self.stages],
                "code": code_version(),
            },
        }

    def _announce(self) -> None:
        division = self.job.division
        self.watcher.note(
            f"{self.settings.role} for {self.job.place}: {len(self.train):,} training samples of "
            f"{division.train_locations:,} locations, {len(self.validation):,} validation samples of "
            f"{division.validation_locations:,} others; key {self.key[:16]}…"
        )
        if self.start is not None:
            self.watcher.note(self.start.told)
        if lost := self.train.left_out(self.settings.batch_size, drop_last=self.settings.drop_last):
            why = "fill no batch with others of their shape, and --drop-last (--compile) leaves out all others"
            if not self.settings.drop_last:
                why = "are alone with their shape, and batch norm learns nothing from one"
            self.watcher.note(f"{lost:,} training clips {why}: they are not trained on")
        seen = None if self.inherited is None else self.inherited.has_trained(s.file for s in self.validation.samples)
        if seen is not None and seen.any():
            self.watcher.note(
                f"{int(seen.sum()):,} validation samples trained what this starts from: the validation is better than "
                "it should be (give both the same --val-ratio, --fold and --quick-experiment)"
            )

    # -- weights that are there already -------------------------------------------------------------------------------

    def _from_cache(self) -> TrainReport | None:
        """What a city teacher of this very key came to before; ``None`` where it must be trained."""
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
            best = self._net_of(read_weights(entry.weights, frozenset(self.net.state_dict())).tensors)
            results = {**entry.measured, **self._figures(best, head_alone=False)}
        return self._reported("cached", entry.weights, None, results)

    # -- training -----------------------------------------------------------------------------------------------------

    def _trained(self, folder: RunFolder, last: Last | None) -> TrainReport:
        try:
            return self._run_in(folder, last)
        finally:
            folder.close()

    def _run_in(self, folder: RunFolder, last: Last | None) -> TrainReport:
        job, settings = self.job, self.settings
        if job.tensorboard:
            folder.log_for_tensorboard()
        with training_numerics(job.device, settings.precision, deterministic=settings.deterministic):
            whole, train, validation = self.net.to(job.device), self.train, self.validation
            whole.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.2 to 1.5 × as fast on a CPU
            net: nn.Module = whole
            if isinstance(whole, City2Scene) and job.init is None:
                seen = self._embedded(whole.city_model, train, "train")
                head = Standardised(whole.scene_head, seen.stacked()).to(job.device)
                folder.tensors_of = partial(_teacher_tensors, whole.city_model)
                if job.cached_features and self._trains_head_only():
                    net, train, folder.head_alone = head, seen, True
                    validation = self._embedded(whole.city_model, validation, "validation")
                else:
                    net = City2Scene(whole.city_model, head)
            random_loss = None if last is None else last[2].random_loss
            if random_loss is None:
                random_loss = _random_loss(net, validation, settings, job.device)
            loop = Loop(
                net,
                train,
                validation,
                settings,
                self.stages,
                job.device,
                folder,
                self.watcher,
                random_loss=random_loss,
                name=f"{settings.role} {job.place}",
                is_warm=job.init is not None and self.start is not None and self.start.kind == FULL_MODEL,
            )
            if last is not None:
                self._go_on(folder, last, loop)
            before = _backbone_digest(whole) if folder.head_alone else None
            loop.run()
            if before is not None:
                self._prove_frozen(whole, before, loop.progress)
                folder.put_best_together(net)
            results = self._results(folder, loop)
        report = self._reported("trained" if last is None else "resumed", folder.path / BEST, folder.path, results)
        if job.publish and not settings.shuffle_labels:
            self._save_pretrained(folder.path / BEST, results)
        folder.write_results(results)  # last: whoever is killed before publishes again
        return report

    def _reported(self, how: str, weights: Path, run: Path | None, results: dict[str, Any]) -> TrainReport:
        """What became of it, after its weights are published if they are to be."""
        job, settings = self.job, self.settings
        published = job.publish and not settings.shuffle_labels and settings.quick_experiment == 1
        if job.publish and settings.quick_experiment < 1:
            self.watcher.note(f"a quick experiment publishes nothing: its weights are {shown(weights)}")
        checkpoint, there = weights, job.home / BEST
        if published and not job.replace and there.is_file():
            published = _same(there, weights)
            checkpoint = there if published else weights
            if not published:
                self.watcher.note(
                    f"{shown(there)} is of another training and stays; to stand on it, pass --city-teacher-ckpt"
                )
        elif published:
            checkpoint = publish(job, weights, results, self.watcher)
        return TrainReport(settings.role, job.place, how, checkpoint, run, results, published)

    def _embedded(self, backbone: nn.Module, clips: Clips, which: str, *, extracted: bool = True) -> Clips:
        """The samples with their embeddings for features, extracted before or computed now; once for all that share."""
        job = self.job
        name = f"{which} embeddings"
        if name not in job.shared:
            if self.sources and extracted:
                rows = side_by_side(self.sources, [sample.file for sample in clips.samples], clips.digests)
                job.shared[name] = Clips.of_rows(clips.samples, rows)
            else:
                job.shared[name] = embedded(backbone, clips, job.device, self.settings.batch_size, self.watcher)
        found = job.shared[name].part(range(len(clips)))
        found.scenes, found.cities = clips.scenes, clips.cities
        return found

    def _prove_frozen(self, net: nn.Module, before: str, progress: Progress) -> None:
        """The backbone that the embeddings are of must be what it was."""
        if _backbone_digest(net) != before:
            raise TrainingError("the backbone changed while its head was trained", hint="The run is not to be used.")
        said = f"the backbone is bit for bit what it was (sha256 {before[:16]}…), its batch norms included"
        progress.frozen.append(said)
        self.watcher.note(f"{self.settings.role} {self.job.place}: {said}")

    def _trains_head_only(self) -> bool:
        """Whether every stage trains a scene head on what the backbone makes of unchanged clips."""
        return all(stage.level == 2 and self.settings.augmentation(stage).is_off for stage in self.stages)

    def _go_on(self, folder: RunFolder, last: Last, loop: Loop) -> None:
        tensors, state, progress = last
        loop.net.load_state_dict(tensors)
        loop.go_on(progress, state)
        self.watcher.note(
            f"going on with {shown(folder.path)}: {len(loop.progress.history)} epochs are done, stage "
            f"{loop.progress.stage + 1}"
        )

    def _results(self, folder: RunFolder, loop: Loop) -> dict[str, Any]:
        """Metrics of the best epoch's weights as they were stored."""
        job, settings, done = self.job, self.settings, loop.progress
        return {
            "key": self.key,
            "role": settings.role,
            "place": job.place,
            **self._figures(self._net_of(folder.best()), head_alone=folder.head_alone),
            "random_weights_log_loss": done.random_loss,
            "warm_start_log_loss": done.start_loss,
            "epochs": len(done.history),
            "best_epoch": _best_epoch(done),
            "frozen": done.frozen,
            "net": self.parts["net"],
            "cached_features": self.job.cached_features,
            "start": None if self.start is None else self.start.told,
            "locations": {
                "train": job.division.train_locations,
                "validation": job.division.validation_locations,
            },
            "shuffled_labels": settings.shuffle_labels,
        }

    def _figures(self, best: nn.Module, *, head_alone: bool) -> dict[str, Any]:
        """What ``best`` is worth on the clips as they are now."""
        measured = partial(self._measured, best, head_alone=head_alone)
        return {
            "validation": measured(self.validation, "validation"),
            "test": self._measured_on_test(measured),
            "chance": 1 / self.settings.num_classes,
        }

    def _measured(self, best: nn.Module, clips: Clips, which: str, *, head_alone: bool) -> dict[str, Any]:
        """Metrics of ``best``. A head's: on what its backbone makes of the clips, once for all heads on that one."""
        net: nn.Module = best
        if head_alone and isinstance(best, City2Scene):
            clips = self._embedded(best.city_model, clips, f"stored {which}", extracted=False)
            net = best.scene_head
        return evaluated(net, clips, self.settings, self.job.selection.target, self.job.device)

    def _measured_on_test(self, measured: Callable[[Clips, str], dict[str, Any]]) -> dict[str, Any] | None:
        """Test clips that cannot be read or scored are a remark: nothing was chosen by them."""
        job = self.job
        try:
            if "test" not in job.shared:
                job.shared["test"] = test_clips(job.manifest, job.source, job.workers, self.watcher)
            if not len(job.shared["test"]):
                return None
            return measured(job.shared["test"], "test")
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

    def _save_pretrained(self, weights: Path, results: Mapping[str, Any]) -> None:
        if self.settings.role != CITY:
            return
        try:
            self.pretrained.save(self.parts, weights, results)
        except (StoreError, OSError) as error:
            reason = error.message if isinstance(error, KDCacheError) else error.strerror
            self.watcher.note(f"the weights were not cached for later runs: {reason}")


def _by_key(sample: Sample) -> str:
    return sample_key(sample.file)


def publish(job: TrainJob, weights: Path, results: Mapping[str, Any], watcher: Watcher) -> Path:
    """Put ``weights`` beside the runs as ``best.safetensors`` (and ``best.pth``), each whole. Raises `StoreError`."""
    home = job.home
    make_directory(home)
    checkpoint = home / BEST
    with store_errors(weights, "read"):
        content = weights.read_bytes()
    if checkpoint.is_file() and not _same(checkpoint, weights):
        watcher.note(f"{shown(checkpoint)} was of another training, and is replaced")
    write_atomic(checkpoint, content)
    if not job.pth:  # one of other weights must not stand beside it
        with store_errors(home / "best.pth", "remove"):
            (home / "best.pth").unlink(missing_ok=True)
    else:
        held = read_weights(checkpoint)
        beside = {
            "epoch": results.get("best_epoch", 0),
            "optimizer_state_dict": {},
            "val_acc": results["validation"].get("accuracy"),
            "val_loss": results["validation"].get("log_loss"),
        }
        save_checkpoint(home / "best.pth", checkpoint_names(held.tensors), held.record, beside)
    return checkpoint


def _same(one: Path, other: Path) -> bool:
    with store_errors(one, "read"):
        return filecmp.cmp(one, other, shallow=False)


def _backbone_digest(net: nn.Module) -> str:
    """SHA-256 of the tensors of a City2Scene teacher's backbone; of nothing for another net."""
    return weights_digest({name: value for name, value in net.state_dict().items() if name.startswith("city_model.")})


def _random_loss(net: nn.Module, clips: Clips, settings: Settings, device: torch.device) -> float:
    """The validation loss of the same net with random weights: what any training must beat."""
    blank = copy.deepcopy(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for module in blank.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    logits = score(blank.to(device), clips, device, settings.batch_size)
    return measure(logits, clips.labels(settings.label).numpy()).log_loss


def _teacher_tensors(backbone: nn.Module, net: nn.Module) -> dict[str, Tensor]:
    """The City2Scene teacher that a head over ``backbone``, or a whole net with such a head, is."""
    head: Any = net.scene_head if isinstance(net, City2Scene) else net
    backbone = net.city_model if isinstance(net, City2Scene) else backbone  # an averaged net has its own
    folded: nn.Module = head.folded()
    found = {f"city_model.{name}": tensor for name, tensor in backbone.state_dict().items()}
    return found | {f"scene_head.{name}": tensor for name, tensor in folded.state_dict().items()}


def embedded(net: nn.Module, clips: Clips, device: torch.device, batch_size: int, watcher: Watcher) -> Clips:
    """The same samples with their embeddings ``[D]`` for features: what a head over a frozen backbone sees."""
    watcher.stage("embedding", len(clips))
    rows = score(_Embedding(net), clips, device, batch_size)
    watcher.advance(len(clips))
    return Clips.of_rows(clips.samples, rows)


class _Embedding(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.net.embed(features)  # type: ignore[operator]
        return found


def _best_epoch(done: Progress) -> int:
    """Counted over all stages, from 1."""
    ranks = [done.rank(row) for row in done.history]
    return ranks.index(max(ranks)) + 1 if ranks else 0
