"""A small world to train in: a few cities with several locations each, clips that scene and city can be told from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World

from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.task import DCASE
from kd_cache.train.job import TrainJob
from kd_cache.train.settings import Settings
from kd_cache.watch import Watcher
from teachers.recipes import train_teacher

torch.set_num_threads(1)  # nets this small do not gain from more, and a loaded machine loses much

FRAMES, BINS = 12, 20
SCENES_HERE, CITIES_HERE, PLACES = 3, 3, 4


def add_clip(world: World, scene: int, city: int, place: int, device: str, split: str) -> str:
    """One clip: a bump in frequency for the scene, one in time for the city, and noise of its own."""
    number = 100 * scene + 10 * city + place
    file = f"x/{DCASE.scenes[scene]}-{DCASE.cities[city]}-{number}-{len(world.rows)}-{device.lower()}.npy"
    random = np.random.default_rng(len(world.rows))
    clip = 0.3 * random.normal(size=(FRAMES, BINS))
    clip[:, 6 * scene : 6 * scene + 4] += 2
    clip[4 * city : 4 * city + 3] += 1.5
    world.write_feature(file, clip.astype(np.float32))
    world.rows.append(
        {
            "file": file,
            "scene_label": scene,
            "city_label": city,
            "domain": DCASE.domain_of[device],
            "device_id": device,
            "split": split,
        }
    )
    return file


@pytest.fixture
def town(tmp_path: Path) -> World:
    """36 training locations with a clip of A each, every third with a twin on b; 9 test locations with A, b and s4."""
    return built(tmp_path)


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a city teacher of the town, trained once for all who stand on it; not to be changed."""
    return train_teacher(job(built(tmp_path_factory.mktemp("city")), "city")).checkpoint


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a scene teacher of the town, as `city`."""
    return train_teacher(job(built(tmp_path_factory.mktemp("scene")), "scene")).checkpoint


def built(root: Path) -> World:
    world = World(root)
    for scene in range(SCENES_HERE):
        for city in range(CITIES_HERE):
            for place in range(PLACES):
                add_clip(world, scene, city, place, "A", "train")
                if place % 3 == 0:
                    add_clip(world, scene, city, place, "b", "train")
            for device in ("A", "b", "s4"):
                add_clip(world, scene, city, 9, device, "test")
    return world.write()


def settings(role: str, **changed: Any) -> Settings:
    """Quick ones: a narrow net, few epochs, nothing augmented."""
    quick: dict[str, Any] = {
        "epochs": 3,
        "feature_dim": 8,
        "num_scenes": 3,
        "num_cities": 3,
        "batch_size": 4,
        "ema": 0.0,
    }
    plain = dict.fromkeys(("time_roll", "freq_mixstyle", "device_response"), 0.0)  # a town is too small for them
    rate = {"lr": 0.03} if role != "city2scene" else {"lr": 0.1, "epochs": 20}
    return replace(Settings(role), **{**quick, **plain, **rate, **changed})


def job(world: World, role: str, target: str = "b", **changed: Any) -> TrainJob:
    """A training in ``world``; settings and the job's own fields by their names."""
    own = {name: changed.pop(name) for name in list(changed) if name in TrainJob.__dataclass_fields__}
    target = DCASE.source if role == "scene" else target
    return TrainJob(
        **{
            "settings": settings(role, **changed),
            "data": Dataset.load(target, world.json_path, num_scenes=3, num_cities=3),
            "output_dir": world.root / "outputs",
            "device": torch.device("cpu"),
            "workers": 0,
            **own,
        }
    )


class Listening(Watcher):
    """Keeps what it is told; interrupts after so many epochs, as a person would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.epochs: list[dict[str, Any]] = []
        self._stop_after = stop_after

    def note(self, text: str) -> None:
        self.notes.append(text)

    def epoch(self, measured: Any) -> None:
        self.epochs.append(dict(measured))
        if len(self.epochs) == self._stop_after:
            raise KeyboardInterrupt

    def told(self, text: str) -> bool:
        return any(text in note for note in self.notes)


OWN = """
import torch

class Small(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.module = torch.nn.Linear(240, classes)

    def forward(self, x):
        return self.module(x.flatten(1))

def small(classes):
    return Small(classes)
"""


@pytest.fixture
def own_net(town: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module like `OWN`, and say what ``--arch`` calls its net; it is forgotten after the test."""
    monkeypatch.syspath_prepend(town.root)

    def written(source: str) -> str:
        (town.root / "mine_net.py").write_text(source)
        return "mine_net:small"

    yield written
    sys.modules.pop("mine_net", None)
