"""Train the sample's teachers, as a DCASE pipeline would: ``python -m teachers.train_sample``.

For each target device a city classifier (A and target, city labels only), and on its frozen backbone a linear scene
head (A only): City2Scene. Beside them one scene classifier (A only). No scene label of a target is ever read for
training, and ``test`` serves only to report: the number of epochs is fixed and the last weights are the ones saved.
Every run also trains on shuffled labels, a control that must end at chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_cache.manifest import CITIES, SCENES, SOURCE, Sample, load_manifest
from teachers.cp_resnet import CPResNet

EPOCHS = 20
SEED = 0
BATCH = 32
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
HEAD_VIEWS = 4
HEAD_PENALTY = 3e-3  # ridge on the scene head, in units of standardised embeddings
CHANCE = 1 / len(SCENES)  # ten scenes, ten cities, all equally frequent in test

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Clips:
    """A part of the sample in memory; the three tensors and ``devices`` run in parallel."""

    features: Tensor  # [N, T, F] float32
    scenes: Tensor  # [N] int64
    cities: Tensor  # [N] int64
    devices: tuple[str, ...]

    def of(self, *devices: str) -> Clips:
        """Only the clips of these devices."""
        rows = torch.tensor([row for row, device in enumerate(self.devices) if device in devices])
        kept = tuple(device for device in self.devices if device in devices)
        return Clips(self.features[rows], self.scenes[rows], self.cities[rows], kept)

    def shuffled(self, seed: int) -> Clips:
        """The control: every clip with the labels of another, each label as frequent as before."""
        chance = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.devices), generator=chance)
        return Clips(self.features, self.scenes[order], self.cities[order], self.devices)


class Scores(NamedTuple):
    """Accuracy on the test clips of device A and of the target."""

    source: float
    target: float


class Trained(NamedTuple):
    """A city model with the scene head fitted to its embedding."""

    city: CPResNet
    head: nn.Linear

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.city.embed(x))
        return logits


def load_clips(root: Path) -> tuple[Clips, Clips, str]:
    """The sample's train clips, its test clips, and the digest of the manifest that lists them."""
    manifest = load_manifest(root / "dataset.json")
    train = [sample for sample in manifest if sample.split == "train"]
    test = [sample for sample in manifest if sample.split == "test"]
    return _read(root, train), _read(root, test), manifest.digest


def _read(root: Path, samples: Sequence[Sample]) -> Clips:
    arrays = [np.load(root / sample.file).astype(np.float32) for sample in samples]
    return Clips(
        torch.from_numpy(np.stack(arrays)),
        torch.tensor([sample.scene_label for sample in samples]),
        torch.tensor([sample.city_label for sample in samples]),
        tuple(sample.device_id for sample in samples),
    )


def train_classifier(x: Tensor, labels: Tensor, classes: int, *, epochs: int, seed: int) -> CPResNet:
    """Fit CP-ResNet to ``x`` [N, T, F] and ``labels`` [N]; the same seed gives the same weights on one machine."""
    chance = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CPResNet(classes)
    batches = len(x) // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LEARNING_RATE, epochs * batches)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=chance)
        for rows in order[: batches * BATCH].split(BATCH):
            loss = F.cross_entropy(model(augmented(x[rows], chance)), labels[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return model.eval()


def augmented(x: Tensor, chance: torch.Generator) -> Tensor:
    """Roll in time, and colour as another device would: a smooth response, and for some clips a noise floor."""
    batch, frames, _ = x.shape
    start = torch.randint(frames, (batch, 1), generator=chance)
    index = (torch.arange(frames) + start) % frames  # [B, T]
    rolled = x.gather(1, index[:, :, None].expand_as(x))
    coloured = rolled + _response(batch, x.shape[2], chance)[:, None, :]
    floor = -1.5 * torch.rand(batch, 1, 1, generator=chance)
    raised = torch.rand(batch, 1, 1, generator=chance) < 0.3
    return torch.where(raised, torch.maximum(coloured, floor), coloured)


def _response(batch: int, bands: int, chance: torch.Generator) -> Tensor:
    """A random smooth curve over the mel bands for every clip: [B, F]."""
    height = 2 * torch.rand(batch, 3, 1, generator=chance) - 1
    centre = bands * torch.rand(batch, 3, 1, generator=chance)
    width = 4 + 10 * torch.rand(batch, 3, 1, generator=chance)
    return (height / (1 + ((torch.arange(bands) - centre) / width) ** 2)).sum(dim=1)


def fit_scene_head(model: CPResNet, clips: Clips) -> nn.Linear:
    """Multinomial ridge regression from the frozen embedding to scenes; standardisation is folded into the weights."""
    chance = torch.Generator().manual_seed(0)
    views = [clips.features, *(augmented(clips.features, chance) for _ in range(HEAD_VIEWS))]
    scenes = clips.scenes.repeat(len(views))
    with torch.no_grad():
        embedding = torch.cat([model.embed(x) for x in views])  # [N * views, 92]
    mean, scale = embedding.mean(0), embedding.std(0) + 1e-6
    standard = (embedding - mean) / scale
    weight = torch.zeros(len(SCENES), standard.shape[1], requires_grad=True)
    bias = torch.zeros(len(SCENES), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(standard, weight, bias), scenes)
        value = value + HEAD_PENALTY * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    head = nn.Linear(standard.shape[1], len(SCENES))
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - (weight / scale * mean).sum(dim=1))
    return head.eval()


@torch.no_grad()
def accuracy(model: Model, x: Tensor, labels: Tensor) -> float:
    """The share of clips whose highest logit is their label's."""
    return float((model(x).argmax(dim=1) == labels).float().mean())


class Bench:
    """One run: the sample, the settings, and the figures that come out."""

    def __init__(self, root: Path, *, seed: int, epochs: int, shuffle: bool) -> None:
        train, self.test, self.digest = load_clips(root)
        self.train = train.shuffled(seed) if shuffle else train
        self.seed = seed
        self.epochs = epochs

    def fit_scene(self) -> CPResNet:
        """The scene teacher: device A only."""
        clips = self.train.of(SOURCE)
        return train_classifier(clips.features, clips.scenes, len(SCENES), epochs=self.epochs, seed=self.seed)

    def fit_city2scene(self, target: str) -> Trained:
        """City labels of A and the target, then scene labels of A."""
        clips = self.train.of(SOURCE, target)
        city = train_classifier(clips.features, clips.cities, len(CITIES), epochs=self.epochs, seed=self.seed)
        return Trained(city, fit_scene_head(city, self.train.of(SOURCE)))

    def scene_scores(self, model: Model, target: str) -> Scores:
        """Scene accuracy on test."""
        source, other = self.test.of(SOURCE), self.test.of(target)
        return Scores(
            accuracy(model, source.features, source.scenes), accuracy(model, other.features, other.scenes)
        )

    def city_scores(self, model: Model, target: str) -> Scores:
        """City accuracy on test."""
        source, other = self.test.of(SOURCE), self.test.of(target)
        return Scores(
            accuracy(model, source.features, source.cities), accuracy(model, other.features, other.cities)
        )
