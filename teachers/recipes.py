"""How each teacher is trained.

- *city*: A and the target's train samples, city labels.
- *city2scene*: the city teacher's backbone, frozen, and a scene head; A's train samples alone, scene labels.
- *scene*: A's train samples alone, scene labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd_cache.errors import CheckpointError, TrainingError, UsageError, shown
from kd_cache.score.teacher import compare_front_end
from kd_cache.train.architectures import architecture_of, architectures
from kd_cache.train.checkpoint import read_weights
from kd_cache.train.clips import Clips
from kd_cache.train.embeddings import FOLDER, side_by_side
from kd_cache.train.evaluation import embedded
from kd_cache.train.freezing import digest_of
from kd_cache.train.job import TrainJob, TrainReport
from kd_cache.train.loop import Learner
from kd_cache.train.nets import Standardised, WarmStart, embedding_dim, make_head, make_net, warm_start
from kd_cache.train.pretraining import key_of
from kd_cache.train.progress import Progress
from kd_cache.train.run_folder import RunFolder
from kd_cache.train.settings import CITY, CITY2SCENE, FROZEN, FULL_MODEL, SCENE, Settings
from kd_cache.train.state_dicts import CITY_PREFIX, HEAD_PREFIX
from kd_cache.train.training import Training
from kd_cache.watch import Watcher
from teachers.embeddings import Source, described, made_with
from teachers.loading import load_teacher
from teachers.two_parts import City2Scene, SideBySide


def train_teacher(job: TrainJob, watcher: Watcher | None = None) -> TrainReport:
    """Train a teacher, or take it from where it was trained before. Raises as `Training.run`."""
    return RECIPES[job.settings.role](job, watcher).run()


class SceneTraining(Training):
    """A net, from chance or a checkpoint."""

    code = (Path(__file__).parent,)


class CityTraining(SceneTraining):
    """The same by city; its weights are kept, for the City2Scene teachers that stand on them."""

    keeps_weights = True


class City2SceneTraining(Training):
    """A scene head on a city teacher's backbone.

    The head's inputs are standardised while it trains. Where it trains alone, on what the backbone makes of unchanged
    clips, the backbone embeds them once.
    """

    code = (Path(__file__).parent,)
    sources: tuple[Source, ...] = ()
    head_alone = False

    def build(self) -> tuple[nn.Module, WarmStart | None]:
        city, below = self._city_net()
        self.inherit(below.provenance)
        if below.front_end:  # what was extracted was compared when it was
            compare_front_end("the backbone", below.front_end, self.job.data.manifest, self.watcher)
        if below.provenance is None:
            self.watcher.note("what the backbone was trained on is not known: its checkpoint says nothing of it")
        net = City2Scene(city, make_head(embedding_dim(city), self.settings))
        if self.job.init is None:
            return net, replace(below, kind=FROZEN)
        start = self.started_from(self.job.init, net)
        return net, replace(start, sha256=f"{below.sha256}+{start.sha256}")

    def architecture(self) -> str | None:
        inner: Any = self.net.city_model
        return architecture_of(inner)  # of several backbones the tensors tell

    def learner(self, folder: RunFolder) -> Learner:
        net: Any = self.net
        if self.job.init is not None:
            return super().learner(folder)
        seen = self._embedded(net.city_model, self.train, "train")
        head = Standardised(net.scene_head, seen.stacked()).to(self.job.device)
        folder.tensors_of = partial(_teacher_tensors, net.city_model)
        if not (self.job.cached_features and self._trains_head_only()):
            return Learner(City2Scene(net.city_model, head), self.train, self.validation)
        self.head_alone = folder.head_alone = True
        self._backbone_before = _backbone_digest(net)
        return Learner(head, seen, self._embedded(net.city_model, self.validation, "validation"))

    def finish(self, learner: Learner, folder: RunFolder, progress: Progress) -> None:
        if not self.head_alone:
            return
        if _backbone_digest(self.net) != self._backbone_before:
            raise TrainingError("the backbone changed while its head was trained", hint="The run is not to be used.")
        said = (
            f"the backbone is bit for bit what it was (sha256 {self._backbone_before[:16]}…), its batch norms included"
        )
        progress.frozen.append(said)
        self.watcher.note(f"{learner.name}: {said}")
        folder.put_best_together(learner.net)

    def measured(self, best: nn.Module, clips: Clips, which: str) -> dict[str, Any]:
        """A head's metrics are of what its backbone makes of the clips, once for all heads on that one."""
        if self.head_alone and isinstance(best, City2Scene):
            clips = self._embedded(best.city_model, clips, f"stored {which}", extracted=False)
            best = best.scene_head
        return super().measured(best, clips, which)

    def _city_net(self) -> tuple[nn.Module, WarmStart]:
        """What the head stands on."""
        job = self.job
        if job.embeddings:
            return self._extracted()
        if job.backbone is None:
            raise UsageError("a City2Scene teacher needs a city teacher", hint="Pass --city-teacher-ckpt.")
        whole = job.backbone == job.init and is_city2scene(job.backbone)
        return city_net(job.backbone, self.settings, whole=whole)

    def _extracted(self) -> tuple[nn.Module, WarmStart]:
        """The backbones of extracted sources, side by side if there are several."""
        job, folder = self.job, self.job.output_dir / FOLDER / self.job.place
        if len(set(job.embeddings)) < len(job.embeddings):
            raise UsageError(f"the same embeddings are named twice: {', '.join(job.embeddings)}")
        self.sources = tuple(Source.open(folder, name) for name in job.embeddings)
        backbones = [source.teacher.backbone for source in self.sources]
        net = backbones[0] if len(backbones) == 1 else SideBySide(backbones)
        for source in self.sources:
            if source.teacher.provenance is None:
                self.watcher.note(f"what the embeddings {shown(source.rows.name)} were made with is not known")
        told = f"embeddings of {', '.join(job.embeddings)} in {shown(folder)}, {net.embedding_dim} wide"
        return net, WarmStart(FULL_MODEL, told, key_of(described(self.sources)), made_with(self.sources))

    def _embedded(self, backbone: nn.Module, clips: Clips, which: str, *, extracted: bool = True) -> Clips:
        """The samples with their embeddings for features, extracted before or computed now; once for all that share."""
        job = self.job
        name = f"{which} embeddings"
        if name not in job.shared:
            if self.sources and extracted:
                files = [sample.file for sample in clips.samples]
                rows = side_by_side([source.rows for source in self.sources], files, clips.digests)
                job.shared[name] = Clips.of_rows(clips.samples, rows)
            else:
                job.shared[name] = embedded(backbone, clips, job.device, self.settings.batch_size, self.watcher)
        found = job.shared[name].part(range(len(clips)))
        found.scenes, found.cities = clips.scenes, clips.cities
        return found

    def _trains_head_only(self) -> bool:
        """Whether every stage trains a scene head on what the backbone makes of unchanged clips."""
        return all(stage.level == 2 and self.settings.augmentation(stage).is_off for stage in self.stages)


RECIPES: Mapping[str, type[Training]] = {CITY: CityTraining, CITY2SCENE: City2SceneTraining, SCENE: SceneTraining}


def is_city2scene(path: Path) -> bool:
    """Whether a checkpoint is that of a whole City2Scene teacher. Raises `CheckpointError`."""
    return read_weights(path).has_two_parts


def city_net(path: Path, settings: Settings, *, whole: bool = False) -> tuple[nn.Module, WarmStart]:
    """The city teacher in a checkpoint: of a known architecture as it is there, of one's own as ``settings`` make it.

    ``whole``: the checkpoint is of a whole City2Scene teacher, which has one.

    Raises:
        CheckpointError: it is no whole city teacher.
        TeacherError: a net that has no embedding.
    """
    if settings.arch in architectures():
        teacher = load_teacher(path, role=CITY2SCENE if whole else CITY)
        told = f"backbone {teacher.architecture}, {teacher.backbone.embedding_dim} wide, from {shown(path)}"
        front_end = teacher.fingerprint_parts()["feature_spec"]
        sha256, provenance = teacher.checkpoint_sha256 or "", teacher.provenance
        return teacher.backbone, WarmStart(FULL_MODEL, told, sha256, provenance, front_end)
    net = make_net(settings, settings.num_cities)
    start = warm_start(net, path, replace(settings, role=CITY), whole=True)
    if start.kind != FULL_MODEL:
        raise CheckpointError(f"{shown(path)} is no whole {settings.arch}: {start.told}")
    embedding_dim(net)
    return net, start


def _backbone_digest(net: nn.Module) -> str:
    """SHA-256 of the tensors of a City2Scene teacher's backbone."""
    return digest_of(net, [name for name in net.state_dict() if name.startswith(CITY_PREFIX)])


def _teacher_tensors(backbone: nn.Module, net: nn.Module) -> dict[str, Tensor]:
    """The City2Scene teacher that a head over ``backbone``, or a whole net with such a head, is."""
    head: Any = net.scene_head if isinstance(net, City2Scene) else net
    backbone = net.city_model if isinstance(net, City2Scene) else backbone  # an averaged net has its own
    folded: nn.Module = head.folded()
    found = {f"{CITY_PREFIX}{name}": tensor for name, tensor in backbone.state_dict().items()}
    return found | {f"{HEAD_PREFIX}{name}": tensor for name, tensor in folded.state_dict().items()}
