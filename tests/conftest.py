"""Small worlds to cache: a manifest, features and teachers in a temporary folder, and the command line to run there."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.testing
from hypothesis import HealthCheck, settings
from typer.testing import CliRunner, Result

import kd_cache.files.turns
import kd_cache.score.unchanged
from kd_cache.cli import app
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.task import DCASE
from kd_cache.keys import sample_key
from kd_cache.store.index import read_index, write_index

REPO = Path(__file__).parent.parent
SAMPLE = REPO / "data" / "sample"

# Machines under load must not fail a property; time is never what a test asserts.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

# Making the sixteen commands takes longer than most of them take to run: each process makes them once.
typer.testing._get_command = functools.cache(typer.testing._get_command)

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # there are as many workers as cores: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# A DataLoader that ended with an error waits so long for each of its workers, 5 seconds, when it is thrown away.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5

Run = Callable[..., Result]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process is left with it at the end: the README's commands."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")


def pytest_collection_finish() -> None:
    """Thousands of tests are no garbage: neither we nor the many processes forked from here need look at them again."""
    gc.collect()
    gc.freeze()


def kaiming(net: torch.nn.Module, seed: int = 0) -> None:
    """Weights of a plausible scale for a net of ReLUs, from a seed; biases zero, batch norms the identity."""
    draw = torch.Generator().manual_seed(seed)
    for part in net.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=draw)
            if part.bias is not None:
                torch.nn.init.zeros_(part.bias)


@dataclass
class World:
    """A data set in a folder. Change ``rows`` and call `write`."""

    root: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def json_path(self) -> Path:
        return self.root / "dataset.json"

    @property
    def cache(self) -> Path:
        return self.root / "cache" / "A2b"

    def write(self) -> World:
        lists: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
        for row in self.rows:
            lists[row["split"]].append(row)
        self.json_path.write_text(json.dumps(lists))
        return self

    def data(self, target: str = "b") -> Dataset:
        """The guarded data set that a job is given."""
        return Dataset.load(target, self.json_path)

    def permitted(self, target: str = "b") -> list[str]:
        return [r["file"] for r in self.rows if r["split"] == "train" and r["device_id"] in ("A", target)]

    def feature(self, file: str) -> Path:
        return self.root / file

    def write_feature(self, file: str, array: np.ndarray) -> None:
        path = self.feature(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)

    def add(self, number: int, device: str, split: str, frames: int = 12, bins: int = 20) -> str:
        """One more row with a feature of its own; its location is its number, so that no two share one."""
        scene, city = DCASE.scenes[number % 10], DCASE.cities[number % 12]
        file = f"x/{scene}-{city}-{number}-0-{device.lower()}.npy"
        self.rows.append(
            {
                "file": file,
                "scene_label": number % 10,
                "city_label": number % 12,
                "domain": DCASE.domain_of[device],
                "device_id": device,
                "split": split,
            }
        )
        random = np.random.default_rng(number)
        self.write_feature(file, random.normal(size=(frames, bins)).astype(np.float32))
        return file

    def view(self, teacher: str, file: str) -> Path:
        return self.cache / teacher / f"{sample_key(file)}.npy"

    def packs(self, teacher: str = "") -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.cache / "packs").glob(f"{teacher}*.h5"))}


@pytest.fixture(autouse=True)
def _no_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No feature is old enough to be noted: whether ``seen.bin`` is there must not depend on how fast a test is."""
    monkeypatch.setattr(kd_cache.score.unchanged, "SETTLED", 1 << 62)


@pytest.fixture(autouse=True)
def _no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a turn: a rival inside another's work, as tests plant it, would for a minute."""
    monkeypatch.setattr(kd_cache.files.turns, "PATIENCE", 0.0)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """12 samples of A and 8 of b in train with three lengths, 5 of c, 4 test rows with an unseen device among them."""
    made = World(tmp_path)
    for number in range(12):
        made.add(number, "A", "train", frames=(12, 12, 16)[number % 3])
    for number in range(12, 20):
        made.add(number, "b", "train", frames=(12, 24)[number % 2])
    for number in range(20, 25):
        made.add(number, "c", "train")
    for number, device in zip(range(25, 29), ("A", "b", "s4", "s6"), strict=True):
        made.add(number, device, "test")
    return made.write()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Run ``kd-cache`` in this process, in the test's folder. See ``result.exit_code``, ``.stdout`` and ``.stderr``."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("KD_CACHE_REPORT", "no")  # a page takes longer than a small training

    def call(*args: object) -> Result:
        result = CliRunner().invoke(app, [str(arg) for arg in args], prog_name="kd-cache")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "Traceback" not in result.output
        return result

    return call


TINY = ("--teacher", "tiny=tiny_teachers:linear", "--teacher", "other=tiny_teachers:other")


@pytest.fixture
def dump(run: Run, world: World) -> Run:
    """Dump ``world`` with two tiny teachers of the user's own; further arguments are passed on."""

    def call(*args: object) -> Result:
        chosen: tuple[object, ...] = (*TINY, "--only", "tiny", "--only", "other")
        return run("dump", "--target", "b", "--json-path", world.json_path, *chosen, *args)

    return call


_DUMPED: dict[tuple[str, str], tuple[Path, Path]] = {}
"""By module and data: where a cache is kept for `cached`, and the root of the world that it was made in."""


@pytest.fixture
def cached(request: pytest.FixtureRequest, dump: Run, world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world and what ``dump()`` makes of it: dumped once for all tests of a module, and copied for the others."""
    digest = hashlib.sha256()
    for path in sorted(path for path in world.root.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(world.root)}\n".encode() + path.read_bytes())
    key = (request.module.__name__, digest.hexdigest())
    if key not in _DUMPED:
        result = dump()
        assert result.exit_code == 0, result.output
        kept = tmp_path_factory.mktemp("dumped") / "cache"
        shutil.copytree(world.cache.parent, kept)
        _DUMPED[key] = kept, world.root
        return world
    kept, root = _DUMPED[key]
    shutil.copytree(kept, world.cache.parent)
    as_if_dumped_in(world.root, world.cache, root)
    return world


def as_if_dumped_in(root: Path, cache: Path, elsewhere: Path) -> None:
    """Let the paths that a copied cache was dumped with lead to ``root`` in place of ``elsewhere``."""
    index = read_index(cache / "cache_index.json")
    record = json.loads(json.dumps(dict(index.record)).replace(str(elsewhere), str(root)))
    write_index(index.path, index.num_samples, index.maps, record)
