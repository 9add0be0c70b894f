"""Student epochs: features through a DataLoader, with logits and without; and logits alone, without a DataLoader."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from benchmarks.harness import Report, Row, in_turns, options
from benchmarks.made_cache import TEACHERS, expected_rows, make_cache, names
from kd_cache import BatchLoader, LogitCache, student_loader
from kd_cache.dataset.features import FeatureSource
from kd_cache.serve.student_loader import FeatureDataset, collate_samples

BATCH = 64
FRAMES, BINS = 101, 64
OFF, OURS, FILES = "no logits", "kd-cache", "np.load of logits per sample"
Epoch = Callable[[], Any]


class Features(Dataset[Any]):
    """``np.load`` of a feature, and of the teachers' logits where their paths are given."""

    def __init__(self, paths: list[Path], logits: list[list[Path]] | None = None) -> None:
        self.paths = paths
        self.logits = logits

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        feature = torch.from_numpy(np.load(self.paths[number]))
        if self.logits is None:
            return feature
        return feature, torch.from_numpy(np.stack([np.load(path) for path in self.logits[number]])).float()


class World:
    """Features of ``count`` samples, a manifest, a cache, and the same logits as files."""

    def __init__(self, root: Path, count: int) -> None:
        self.root = root
        self.files = [file.replace("-scene", f"-{number}") for number, file in enumerate(names(count))]
        random = np.random.default_rng(0)
        (root / self.files[0]).parent.mkdir(parents=True)
        rows = []
        for number, file in enumerate(self.files):
            np.save(root / file, random.standard_normal((FRAMES, BINS), np.float32))
            device = {"domain": number % 2, "device_id": "Ab"[number % 2]}
            rows.append({"file": file, "scene_label": number % 10, "split": "train", **device})
        self.manifest = root / "dataset.json"
        self.manifest.write_text(json.dumps({"train": rows, "val": [], "test": []}))
        source = FeatureSource(root)
        digests = np.frombuffer(b"".join(source.read(file).digest for file in self.files), np.uint8).reshape(-1, 16)
        self.cache = LogitCache.open(make_cache(root / "cache", self.files, 10, digests))
        rows_of = self.cache.rows(self.files).numpy()
        self.logits = torch.from_numpy(expected_rows(count, 10)[rows_of]).float()
        self.logit_paths = []
        for teacher in TEACHERS:
            (root / teacher).mkdir()
        for number, row in enumerate(self.logits.half().numpy()):
            paths = [root / teacher / f"{number:07d}.npy" for teacher in TEACHERS]
            for path, each in zip(paths, row, strict=True):
                np.save(path, each)
            self.logit_paths.append(paths)

    @property
    def paths(self) -> list[Path]:
        return [self.root / file for file in self.files]


def loading(world: World, workers: int) -> dict[str, DataLoader[Any]]:
    """A user's own features, loaded with ``np.load``: alone, with logits attached, with logits from files."""
    chosen: dict[str, Any] = {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0}
    data = world.cache.attach(Features(world.paths), world.files)
    return {
        OFF: DataLoader(Features(world.paths), shuffle=True, **chosen),
        OURS: DataLoader(data, shuffle=True, collate_fn=data.collate, **chosen),
        FILES: DataLoader(Features(world.paths, world.logit_paths), shuffle=True, **chosen),
    }


def reading(world: World, workers: int) -> dict[str, DataLoader[Any]]:
    """kd-cache's own checked reading of features: without logits, with them."""
    chosen: dict[str, Any] = {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0}
    with_logits = student_loader(world.manifest, world.root, world.cache, **chosen)
    attached: Any = with_logits.dataset
    base = FeatureDataset(FeatureSource(world.root), attached.dataset.samples)
    return {OFF: DataLoader(base, shuffle=True, collate_fn=collate_samples, **chosen), OURS: with_logits}


def check(world: World, loader: DataLoader[Any]) -> None:
    """One epoch in order: every sample's own features beside its own logits."""
    chosen: dict[str, Any] = {"batch_size": BATCH, "num_workers": loader.num_workers, "collate_fn": loader.collate_fn}
    at = 0
    for batch in DataLoader(loader.dataset, **chosen):
        both = (batch["features"], batch.get("teacher_logits")) if isinstance(batch, dict) else batch
        features, logits = both if isinstance(both, list | tuple) else (both, None)
        expected = torch.stack([torch.from_numpy(np.load(path)) for path in world.paths[at : at + BATCH]])
        if not torch.equal(features, expected):
            raise AssertionError("features are not their samples'")
        if logits is not None and not torch.equal(logits, world.logits[at : at + BATCH]):
            raise AssertionError("logits are not their samples'")
        at += len(features)


def student_step() -> Callable[[torch.Tensor], Any]:
    """A small convolutional student's step, so that an epoch is not loading alone."""
    torch.manual_seed(0)
    student = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5, stride=3), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 5, stride=3), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)

    def step(features: torch.Tensor) -> None:
        optimizer.zero_grad()
        student(features[:, None]).square().mean().backward()
        optimizer.step()

    return step


def epoch(loader: DataLoader[Any], step: Callable[[torch.Tensor], Any] | None) -> Epoch:
    def run() -> None:
        for batch in loader:
            if step is not None:
                step(
                    batch["features"]
                    if isinstance(batch, dict)
                    else batch[0]
                    if isinstance(batch, list | tuple)
                    else batch
                )

    return run


def with_features(report: Report, world: World, seconds: float) -> None:
    count = len(world.files)
    for workers in (0, 2):
        for how, made in (("np.load features", loading), ("student_loader", reading)):
            loaders = made(world, workers)
            for loader in loaders.values():
                check(world, loader)
            for train in (False, True):
                step = student_step() if train else None
                case = f"{how}, {workers} workers, {'small student' if train else 'loading alone'}"
                took = in_turns({name: epoch(loader, step) for name, loader in loaders.items()}, seconds)
                report.add(Row(case, OFF, count / took[OFF] / 1e3, "k samples/s"))
                for name, each in took.items():
                    if name == OFF:
                        continue
                    aimed = name == OURS
                    slower = f"{(each / took[OFF] - 1) * 100:+.1f} % time"
                    target: tuple[str, bool | None] = (
                        ("≤ 10 % slower", each / took[OFF] <= 1.1) if aimed else ("", None)
                    )
                    report.add(
                        Row(case, name, count / each / 1e3, "k samples/s", OFF, took[OFF] / each, *target, slower)
                    )


def logits_alone(report: Report, folder: Path, count: int, seconds: float) -> None:
    """For a student that learns from logits and labels (or embeddings in memory) alone."""
    files = names(count)
    cache = LogitCache.open(make_cache(folder / "alone", files, 10))
    labels = torch.arange(count)
    data = cache.attach(TensorDataset(labels), files)
    items = TensorDataset(cache.tensor(files=files).float(), labels)
    batches = BatchLoader(cache, files, labels, batch_size=256, shuffle=True)
    expected = torch.from_numpy(expected_rows(count, 10))[cache.rows(files)]
    for logits, numbers in batches:
        if not torch.equal(logits, expected[numbers].float()):
            raise AssertionError("logits are not their labels'")
    item_wise: Any = DataLoader(items, 256, shuffle=True, collate_fn=default_collate)

    def run(loader: Any) -> Epoch:
        return lambda: sum(1 for _ in loader)

    ways = {
        "BatchLoader": run(batches),
        "DataLoader over attach": run(DataLoader(data, 256, shuffle=True, collate_fn=data.collate)),
        "DataLoader over a TensorDataset": run(item_wise),
    }
    took = in_turns(ways, seconds, at_least=3)
    case = f"logits and labels alone, {count:,} × 10, batches of 256"
    report.add(Row(case, "BatchLoader", count / took["BatchLoader"] / 1e6, "M samples/s"))
    for name, each in list(took.items())[1:]:
        report.add(Row(case, name, count / each / 1e6, "M samples/s", "BatchLoader", took["BatchLoader"] / each))


def main() -> None:
    chosen = options(__doc__)
    report = Report("loader", chosen.quick)
    torch.set_num_threads(1)  # as in a worker, so that 0 and 2 workers differ in the workers alone
    with tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as folder:
        world = World(Path(folder), 600 if chosen.quick else 3000)
        with_features(report, world, 2 if chosen.quick else 20)
        logits_alone(report, Path(folder), 50_000 if chosen.quick else 300_000, 2 if chosen.quick else 15)
    report.save(chosen.out)


if __name__ == "__main__":
    main()
