"""The dump against the way that scripts do it: one sample at a time, one teacher after the other.

Both read the same files and end with the same files on disk: one ``.npy`` per sample and teacher (kd-cache's packs,
index and checks on top). The third way is the ceiling: nothing but the forward passes, on batches that lie in memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Report, Row, options
from kd_cache.cli.console import Screen
from kd_cache.dataset.dataset import Dataset
from kd_cache.score.device import numerics
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.score.engine import Engine
from kd_cache.score.job import DumpReport
from kd_cache.score.teacher import Teacher
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.train.architectures import architectures
from teachers.loading import LoadedTeacher
from teachers.two_parts import City2Scene

BINS = 64
TOLERANCE = 1e-5
"""Of the largest logit: what two ways of computing in float32 may differ by."""


@dataclass(frozen=True)
class Case:
    """How much of what is scored. ``alone`` samples are enough to measure the slow way."""

    architecture: str
    precision: str
    frames: int
    samples: int
    alone: int

    def __str__(self) -> str:
        return f"{self.architecture}, {self.precision}, [{self.frames}, {BINS}]"


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Sizes such that each takes seconds on the device."""
    if device.type == "cuda":
        few = 8 if quick else 1
        return [
            Case(name, precision, frames, samples // few, alone // few)
            for frames, scale in ((101, 1), (1001, 8))
            for name, precision, samples, alone in (
                ("cnn14", "fp32", 16_384 // scale, 200),
                ("cnn14", "bf16", 32_768 // scale, 200),
                ("cp_resnet", "fp32", 65_536 // scale, 200),
                ("cp_resnet", "bf16", 65_536 // scale, 200),
            )
        ]
    few = 4 if quick else 1
    return [
        Case("cnn14", "fp32", 101, 128 // few, 16 // few),
        Case("cnn14", "bf16", 101, 512 // few, 16 // few),  # long enough for what comparing with fp32 costs to thin out
        Case("cp_resnet", "fp32", 101, 2048 // few, 128 // few),
        Case("cp_resnet", "bf16", 101, 2048 // few, 128 // few),
    ]


def make_data(root: Path, frames: int, count: int) -> list[str]:
    """``count`` features in small files, and their manifest."""
    folder = root / "features"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    files = [f"features/clip-{number:06d}-a.npy" for number in range(count)]
    for file in files:
        np.save(root / file, draw.standard_normal((frames, BINS), np.float32))
    rows = [
        {"file": file, "scene_label": n % 10, "city_label": n % 12, "domain": n % 2, "device_id": "Ab"[n % 2]}
        for n, file in enumerate(files)
    ]
    (root / "dataset.json").write_text(json.dumps({"train": rows, "val": [], "test": []}))
    return files


def make_teachers(architecture: str) -> dict[str, Teacher]:
    """Both teachers, untrained: what they say does not change how long they take."""
    torch.manual_seed(0)
    kind = architectures()[architecture]
    city = kind(12)
    nets: dict[str, nn.Module] = {
        "city2scene": City2Scene(city, nn.Linear(city.embedding_dim, 10)),
        "scene": kind(10),
    }
    for net in nets.values():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):  # so that activations neither vanish nor explode
                module.running_var.mul_(0.5)  # type: ignore[union-attr]
    made: dict[str, Any] = {name: LoadedTeacher(cast(Any, net), source="untrained") for name, net in nets.items()}
    return made


# -- the ways ---------------------------------------------------------------------------------------------------------


def one_at_a_time(
    root: Path, files: list[str], teachers: Mapping[str, Teacher], device: torch.device, case: Case
) -> dict[str, np.ndarray]:
    """Our own version of the usual script: every teacher reads every file and scores it alone; np.save of each row."""
    rows = {}
    for name, teacher in teachers.items():
        out = root / "alone" / name
        out.mkdir(parents=True, exist_ok=True)
        found = []
        for file in files:
            features = torch.from_numpy(np.load(root / file)).unsqueeze(0).to(device)
            with torch.no_grad(), _autocast(device, case.precision):
                logits = teacher(features).squeeze(0).float().cpu().numpy()
            np.save(out / f"{hashlib.md5(file.encode(), usedforsecurity=False).hexdigest()}.npy", logits)
            found.append(logits)
        rows[name] = np.stack(found)
    return rows


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def with_kd_cache(
    root: Path, teachers: Mapping[str, Teacher], device: torch.device, case: Case, batch_size: int | None
) -> DumpReport:
    job = DumpJob(
        cache_root=root / "cache",
        data=Dataset.load("b", root / "dataset.json"),
        teachers=teachers,
        device=device,
        precision=case.precision,
        batch_size=batch_size,
        workers=2 if device.type == "cpu" else 8,
    )
    with Screen(quiet=True, as_json=True) as screen:
        return dump_logits(job, screen)


def resident(teachers: Mapping[str, Teacher], device: torch.device, case: Case, batch_size: int) -> Callable[[], float]:
    """The ceiling: gives the samples per second of forward passes alone, on one batch that stays on the device."""
    features = torch.randn(batch_size, case.frames, BINS, device=device)
    rounds = max(1, case.samples // batch_size)
    engine = Engine(teachers, device)

    def measure() -> float:
        with numerics(device, case.precision, 0):
            for name in teachers:
                engine.forward(name, features)
            _wait(device)
            began = time.perf_counter()
            for _ in range(rounds):
                for name in teachers:
                    engine.forward(name, features)
            _wait(device)
            return rounds * batch_size / (time.perf_counter() - began)

    return measure


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- side by side -----------------------------------------------------------------------------------------------------


def measure(report: Report, case: Case, device: torch.device, rounds: int) -> None:
    """The ways in turns; the best of the rounds of each, as nothing but disturbance makes one slower."""
    teachers, plain = make_teachers(case.architecture), make_teachers(case.architecture)
    for teacher in plain.values():  # as scripts have them
        cast(nn.Module, teacher).to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    batch = 32 if device.type == "cpu" else 256
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = make_data(root, case.frames, case.samples)
        Engine(teachers, device)  # moves them
        ceiling = resident(teachers, device, case, batch)
        some = files[: case.alone]
        one_at_a_time(root, some[:2], plain, device, case)  # warm
        rates: dict[str, list[float]] = {"alone": [], "ceiling": [], "kd-cache": []}
        for _ in range(rounds):
            began = time.perf_counter()
            alone = one_at_a_time(root, some, plain, device, case)
            rates["alone"].append(len(some) / (time.perf_counter() - began))
            rates["ceiling"].append(ceiling())
            shutil.rmtree(root / "cache", ignore_errors=True)
            began = time.perf_counter()
            told = with_kd_cache(root, teachers, device, case, batch)
            rates["kd-cache"].append(case.samples / (time.perf_counter() - began))
            rates.setdefault("scoring", []).append(told.samples_scored / told.seconds)
        difference = _difference(root, some, alone)
    best = {way: max(each) for way, each in rates.items()}
    _check(case, difference)
    _tell(report, case, device, best, told, difference)


def _difference(root: Path, files: list[str], alone: Mapping[str, np.ndarray]) -> float:
    """The largest difference from the other way's logits, relative to the largest logit."""
    cache = LogitCache.open(root / "cache" / "A2b", ["city2scene", "scene"])
    found = cache.batch(files).numpy()
    reference = np.stack([alone["city2scene"], alone["scene"]], axis=1)
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def _check(case: Case, difference: float) -> None:
    allowed = TOLERANCE if case.precision == "fp32" else 0.05
    if not difference <= allowed:
        raise SystemExit(f"{case}: the two ways differ by {difference:.1e} of the largest logit, allowed {allowed:.0e}")


def _tell(
    report: Report,
    case: Case,
    device: torch.device,
    best: Mapping[str, float],
    told: DumpReport,
    difference: float,
) -> None:
    on_gpu = device.type == "cuda"
    times = best["kd-cache"] / best["alone"]
    least = 100.0 if on_gpu else 5.0
    aimed = case.architecture == "cnn14" and (on_gpu or case.precision == "fp32")
    target, met = (f"≥ {least:.0f} ×", times >= least) if aimed else ("", None)
    unit, slow = "samples/s", "batch 1, one teacher after the other"
    report.add(Row(str(case), slow, best["alone"], unit))
    busy = ", ".join(f"{stage} {share:.0%}" for stage, share in told.busy.items())
    note = f"differs by {difference:.0e}; busy: {busy}"
    report.add(Row(str(case), "kd-cache dump", best["kd-cache"], unit, "batch 1", times, target, met, note))
    share = best["scoring"] / best["ceiling"]
    target, met = ("≥ 0.9 ×", share >= 0.9) if on_gpu and case.architecture == "cnn14" else ("", None)
    way = "kd-cache, until the last commit"
    report.add(Row(str(case), way, best["scoring"], unit, "the ceiling", share, target, met))
    report.add(Row(str(case), "the ceiling: forward passes alone", best["ceiling"], unit))


def main() -> None:
    """On the GPU if there is one, else on the CPU."""
    asked = options(str(__doc__))
    report = Report("dump", asked.quick)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        report.skip("GPU cases, T=1001 and the GPU line of the targets: this machine has no CUDA device")
    for case in cases(device, asked.quick):
        measure(report, case, device, rounds=1 if asked.quick else 2)
    report.save(asked.out)


if __name__ == "__main__":
    main()
