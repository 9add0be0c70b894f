"""Train the sample's teachers, as a DCASE pipeline would: ``python -m teachers.train_sample``.

For each target device a city classifier (A and target, city labels only), and on its frozen backbone a linear scene
head (A only): City2Scene. Beside them one scene classifier (A only). No scene label of a target is ever read for
training, and ``test`` serves only to report: the number of epochs is fixed and the last weights are the ones saved.
Every run also trains on shuffled labels, a control that must end at chance.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_cache.manifest import CITIES, SCENES, SOURCE, TARGETS, Sample, load_manifest
from teachers.builtin import ARCHITECTURE_VERSION, City2Scene, LoadedTeacher
from teachers.checkpoint import CITY_ENTRY, HEAD_ENTRY, load_teacher, save_checkpoint
from teachers.cp_resnet import CPResNet

EPOCHS = 30
SEED = 0
BATCH = 32
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
HEAD_VIEWS = 16  # augmented copies of the train clips that the scene head sees
HEAD_PENALTY = 3e-4  # ridge on the scene head, in units of standardised embeddings
CHANCE = 1 / len(SCENES)  # ten scenes, ten cities, all equally frequent in test

CHECKPOINT = "best.safetensors"
_LABELS = {"city": "cities", "city2scene": "scenes", "scene": "scenes"}


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
        for rows in order[: batches * BATCH].view(batches, BATCH):
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


def fit_scene_head(model: CPResNet, clips: Clips, seed: int) -> nn.Linear:
    """A linear map from the frozen embedding to scenes, fitted to the clips and to augmented views of them."""
    chance = torch.Generator().manual_seed(seed)
    views = [clips.features, *(augmented(clips.features, chance) for _ in range(HEAD_VIEWS))]
    with torch.no_grad():
        embedding = torch.cat([model.embed(view) for view in views])  # [N * views, 92]
    mean, scale = embedding.mean(0), embedding.std(0) + 1e-6
    weight, bias = _ridge((embedding - mean) / scale, clips.scenes.repeat(len(views)))
    head = nn.Linear(len(mean), len(SCENES))
    with torch.no_grad():
        head.weight.copy_(weight / scale)  # standardisation is folded in: the head takes embeddings as they are
        head.bias.copy_(bias - (weight / scale * mean).sum(dim=1))
    return head.eval()


def _ridge(x: Tensor, scenes: Tensor) -> tuple[Tensor, Tensor]:
    """Multinomial regression with a square penalty: convex, so it ends at one optimum."""
    weight = torch.zeros(len(SCENES), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(SCENES), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), scenes) + HEAD_PENALTY * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


class Bench:
    """One run over the sample: its clips, the settings, and the teachers trained on them."""

    def __init__(self, root: Path, *, seed: int, epochs: int, shuffle: bool = False) -> None:
        train, self.test, self.digest = load_clips(root)
        self.train = train.shuffled(seed) if shuffle else train
        self.seed = seed
        self.epochs = epochs

    def fit_scene(self) -> CPResNet:
        """The scene teacher: device A only."""
        clips = self.train.of(SOURCE)
        return self._fit(clips, clips.scenes, len(SCENES))

    def fit_city2scene(self, target: str) -> City2Scene:
        """City labels of A and the target, then scene labels of A."""
        clips = self.train.of(SOURCE, target)
        city = self._fit(clips, clips.cities, len(CITIES))
        return City2Scene(city, fit_scene_head(city, self.train.of(SOURCE), self.seed))

    def _fit(self, clips: Clips, labels: Tensor, classes: int) -> CPResNet:
        return train_classifier(clips.features, labels, classes, epochs=self.epochs, seed=self.seed)

    def accuracy(self, model: nn.Module, device: str, *, of: str = "scenes") -> float:
        """The share of the device's test clips whose highest logit is their label's."""
        clips = self.test.of(device)
        labels = clips.scenes if of == "scenes" else clips.cities
        with torch.no_grad():
            return float((model(clips.features).argmax(dim=1) == labels).float().mean())

    def scores(self, scene: LoadedTeacher, city2scene: LoadedTeacher, target: str) -> dict[str, Scores]:
        """City, City2Scene and scene accuracy on A and on the target."""
        judged: dict[str, nn.Module] = {"city": city2scene.backbone, "city2scene": city2scene, "scene": scene}
        return {
            name: Scores(*(self.accuracy(model, device, of=_LABELS[name]) for device in (SOURCE, target)))
            for name, model in judged.items()
        }


def run(bench: Bench, targets: Sequence[str], out: Path) -> dict[str, dict[str, Scores]]:
    """Train every teacher, save it under ``out``, and return the figures of what was saved, by target."""
    scene = _saved_scene(out, bench, bench.fit_scene())
    figures = {}
    for target in targets:
        city2scene = _saved_city2scene(out, bench, target, bench.fit_city2scene(target))
        figures[target] = bench.scores(scene, city2scene, target)
    return figures


def _saved_scene(out: Path, bench: Bench, model: CPResNet) -> LoadedTeacher:
    path = out / "teacher_scene" / "global" / CHECKPOINT
    return _saved(path, model.state_dict(), bench, "scene", "all")


def _saved_city2scene(out: Path, bench: Bench, target: str, model: City2Scene) -> LoadedTeacher:
    tensors = {f"{CITY_ENTRY}.{name}": value for name, value in model.city_model.state_dict().items()}
    tensors |= {f"{HEAD_ENTRY}.{name}": value for name, value in model.scene_head.state_dict().items()}
    path = out / "teacher_city2scene" / f"A2{target}" / CHECKPOINT
    return _saved(path, tensors, bench, "city2scene", target)


def _saved(path: Path, tensors: Mapping[str, Tensor], bench: Bench, role: str, target: str) -> LoadedTeacher:
    """Save the weights as float16, half the bytes, and return the teacher that the file holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    record = {
        "architecture": "cp_resnet",
        "architecture_version": ARCHITECTURE_VERSION,
        "role": role,
        "class_names": list(SCENES),
        "value_kind": "logits",
        "training": {
            "command": f"python -m teachers.train_sample --target {target} --seed {bench.seed} --epochs {bench.epochs}",
            "epochs": bench.epochs,
            "manifest_sha256": bench.digest,
            "seed": bench.seed,
        },
    }
    save_checkpoint(path, rounded, record)
    return load_teacher(path, role=role)


def table(runs: Mapping[str, dict[str, dict[str, Scores]]]) -> str:
    """The figures in per cent, as a Markdown table: each run (true, shuffled) has a column for A and for the target."""
    names = [f"{name} labels, {where}" for name in runs for where in ("A test", "target test")]
    lines = [f"| target | teacher | {' | '.join(names)} | chance |", "|---" * (len(names) + 3) + "|"]
    for target, teachers in next(iter(runs.values())).items():
        for teacher in teachers:
            values = [100 * value for figures in runs.values() for value in figures[target][teacher]]
            cells = " | ".join(f"{value:.0f}" for value in values)
            lines.append(f"| {target} | {teacher} | {cells} | {100 * CHANCE:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, and print the table."""
    options = _parser().parse_args(argv)
    # Two threads, always: sums split over another number of threads round otherwise.
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    targets = TARGETS if options.target == "all" else (options.target,)
    settings = {"seed": options.seed, "epochs": options.epochs}
    runs = {}
    if not options.shuffle_labels:
        out = options.out or options.root / "teachers"
        runs["true"] = run(Bench(options.root, **settings), targets, out)
    with tempfile.TemporaryDirectory() as scratch:
        runs["shuffled"] = run(Bench(options.root, **settings, shuffle=True), targets, Path(scratch))
    sys.stdout.write(f"Accuracy in per cent on test locations, seed {options.seed}\n\n{table(runs)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m teachers.train_sample", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("data/sample"), help="where dataset.json lies")
    parser.add_argument("--target", choices=(*TARGETS, "all"), default="all", help="target device")
    parser.add_argument("--out", type=Path, help="where teachers are saved (default: ROOT/teachers)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--shuffle-labels", action="store_true", help="only the control on shuffled labels; saves nothing"
    )
    return parser


if __name__ == "__main__":
    main()
