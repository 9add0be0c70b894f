"""What only a GPU can show, in one run of at most eight minutes: ``make gpu``.

Each check passes, fails or is skipped, with figures. ``--dry-run``, or a machine without CUDA, runs all of them on the
CPU with small sizes: that shows that this script works, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks import bench_dump
from benchmarks.harness import RESULTS, Report, machine
from kd_cache.dataset.dataset import Dataset
from kd_cache.errors import KDCacheError
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.score.job import DumpReport
from kd_cache.score.storage_cost import kl_divergence
from kd_cache.score.teacher import Teacher
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.train.job import TrainJob
from kd_cache.train.settings import Settings
from teachers.recipes import train_teacher

CPU = torch.device("cpu")
SAMPLE = Path(__file__).parent.parent / "data/sample"
TOLERANCE = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
"""What a dump may differ by from one in fp32 on the CPU, as a share of the largest logit."""
MINUTES = 7.0
"""No check is started later than that."""
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Sizes:
    """How much is done. ``out_of_memory`` is a batch that does not fit into ``memory`` bytes of the device."""

    architectures: tuple[str, ...]
    frames: int
    samples: int
    out_of_memory: int
    memory: int
    share: float
    epochs: int


ON_GPU = Sizes(("cp_resnet", "cnn14"), 101, 256, 2048, 2 << 30, 1.0, 3)
DRY = Sizes(("cp_resnet",), 48, 16, 16, 0, 0.3, 1)


class SkippedError(Exception):
    """A check that this machine cannot run; says why."""


@dataclass(frozen=True)
class Result:
    """What became of a check."""

    check: str
    result: str
    figures: str
    seconds: float


class Checks:
    """The checks of one machine, over data sets in ``root``. Each gives its figures, or raises what went wrong."""

    def __init__(self, device: torch.device, root: Path, *, dry: bool) -> None:
        self.device, self.root, self.dry = device, root, dry
        self.sizes = DRY if dry else ON_GPU
        self._references: dict[str, np.ndarray] = {}
        self._count = 0

    def table(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Every check by name, the quick and important ones first."""
        for architecture in self.sizes.architectures:
            yield f"dump parity with the CPU, {architecture}, fp32", partial(self.parity, architecture, "fp32")
        for architecture in self.sizes.architectures:
            for precision in ("tf32", "bf16", "fp16"):
                yield f"dump, {architecture}, {precision}", partial(self.parity, architecture, precision)
        yield "the same bytes twice", self.repeats
        yield "out of memory: batches are halved", self.out_of_memory
        yield "training, --deterministic: the same weights twice", self.deterministic
        for precision in ("tf32", "bf16", "fp16"):
            yield f"training, {precision}", partial(self.training, precision)
        yield "dump --compile", self.compiled
        yield "dump --ray local", self.on_ray
        yield "bench_dump --quick", self.bench

    # -- dumps --------------------------------------------------------------------------------------------------------

    def parity(self, architecture: str, precision: str) -> str:
        """The logits of a dump on the device are those of one on the CPU in fp32, within a tolerance."""
        if precision == "tf32" and self.device == CPU:
            raise SkippedError("TF32 exists on CUDA devices only")
        reference = self.reference(architecture)
        found, report = self.dumped(architecture, self.sizes.samples, precision=precision)
        figures = agreement(found, reference, TOLERANCE[precision])
        costs = [each.precision_cost for each in report.teachers.values() if each.precision_cost is not None]
        return figures + "".join(f"; as the dump says: KL {cost.sum / max(cost.rows, 1):.1e}" for cost in costs)

    def repeats(self) -> str:
        """Two dumps make equal bytes, also with other numbers of workers."""
        one, _ = self.dumped("cp_resnet", self.sizes.samples, workers=0)
        two, _ = self.dumped("cp_resnet", self.sizes.samples, workers=3)
        if one.tobytes() != two.tobytes():
            raise AssertionError(f"{int((one != two).sum())} of {one.size} values differ")
        return f"{one.nbytes:,} bytes"

    def out_of_memory(self) -> str:
        """A batch that does not fit is scored in halves; the values stay."""
        architecture, count = self.sizes.architectures[-1], self.sizes.out_of_memory
        with self.little_memory():
            found, report = self.dumped(architecture, count, batch_size=count, cramped=self.device == CPU)
        if report.halved_to is None:
            raise AssertionError(f"{count} samples at once fitted into {self.sizes.memory:,} bytes")
        reference, _ = self.dumped(architecture, count, batch_size=16)
        difference = agreement(found, reference, 1e-3)
        return f"{count} → {report.halved_to} at once{' (simulated)' if self.device == CPU else ''}; {difference}"

    def compiled(self) -> str:
        """torch.compile gives the same values, within a tolerance."""
        reference, plain = self.dumped("cp_resnet", self.sizes.samples)
        quick = partial(torch.compile, backend="eager")  # no C++ compiler needed, and no minutes
        with mock.patch.object(torch, "compile", quick) if self.dry else mock.MagicMock():
            found, report = self.dumped("cp_resnet", self.sizes.samples, compiled=True)
        figures = agreement(found, reference, 1e-3)
        return f"{figures}; {plain.seconds:.1f} s → {report.seconds:.1f} s, compilation included"

    def on_ray(self) -> str:
        """Two parts on Ray give the rows of one process."""
        if self.dry:
            raise SkippedError("the tests do this on the CPU")
        if importlib.util.find_spec("ray") is None:
            raise SkippedError("Ray is not installed")
        return self.ray_against_one_process()

    def ray_against_one_process(self) -> str:
        """The sample, dumped by the command line on this device: once plainly, once on Ray."""
        plain, _ = self.commanded()
        found, seconds = self.commanded("--ray", "local", "--parts", "2")
        return f"{agreement(found, plain, TOLERANCE['fp32'])}; {seconds:.1f} s, the start of Ray included"

    def commanded(self, *options: str) -> tuple[np.ndarray, float]:
        """Logits ``[N, 2, C]`` of `kd-cache dump --target b`, and the seconds that it took."""
        self._count += 1
        root, began = self.root / f"cache-{self._count}", time.monotonic()
        command = [sys.executable, "-m", "kd_cache", "dump", "--target", "b", "--device", self.device.type, *options]
        done = subprocess.run(
            [*command, "--cache-root", str(root)], cwd=SAMPLE.parent.parent, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise AssertionError(done.stderr[-500:])
        cache = LogitCache.open(root / "A2b")
        return cache.batch(sorted(cache.files)).float().numpy(), time.monotonic() - began

    def bench(self) -> str:
        """The dump against batch 1, and against forward passes alone (`bench_dump`)."""
        report = Report("dump", quick=True)
        chosen = [bench_dump.Case("cp_resnet", "fp32", 48, 32, 4)] if self.dry else bench_dump.cases(self.device, True)
        for case in chosen:
            bench_dump.measure(report, case, self.device, rounds=1)
        ways = [row for row in report.rows if row.ratio is not None]
        return "; ".join(f"{row.case}: {row.value:,.0f} {row.unit}, {row.ratio:.2g} × {row.against}" for row in ways)

    def reference(self, architecture: str) -> np.ndarray:
        """Logits ``[N, 2, C]`` of a dump in fp32 on the CPU."""
        if architecture not in self._references:
            found, _ = self.dumped(architecture, self.sizes.samples, device=CPU, batch_size=8)
            self._references[architecture] = found
        return self._references[architecture]

    def dumped(
        self, architecture: str, samples: int, *, device: torch.device | None = None, cramped: bool = False, **job: Any
    ) -> tuple[np.ndarray, DumpReport]:
        """Logits ``[N, 2, C]`` in the order of the files, and the report, of a dump into a cache of its own."""
        folder = self.root / f"{samples}-clips"
        if not folder.exists():
            bench_dump.make_data(folder, self.sizes.frames, samples)
        teachers = bench_dump.make_teachers(architecture)
        for teacher in teachers.values() if cramped else ():
            _cramp(teacher, samples // 4)
        self._count += 1
        data, root = Dataset.load("b", folder / "dataset.json"), self.root / f"cache-{self._count}"
        report = dump_logits(DumpJob(root, data, teachers, device or self.device, files=False, **job))
        cache = LogitCache.open(report.cache)
        return cache.batch(sorted(cache.files)).float().numpy(), report

    @contextmanager
    def little_memory(self) -> Iterator[None]:
        """The device has no more than the sizes say; on a CPU the teachers refuse large batches instead."""
        if self.device == CPU:
            yield
            return
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(self.sizes.memory / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()

    # -- training -----------------------------------------------------------------------------------------------------

    def deterministic(self) -> str:
        """Two trainings with ``--deterministic`` end at the same bits."""
        one, two = self.trained(deterministic=True), self.trained(deterministic=True)
        differing = [name for name in one if not torch.equal(one[name], two[name])]
        if differing:
            raise AssertionError(f"{len(differing)} of {len(one)} tensors differ: {', '.join(differing[:3])}")
        return f"{len(one)} tensors"

    def training(self, precision: str) -> str:
        """A mixed-precision training ends without a loss that is not finite."""
        if self.device == CPU and precision != "bf16":
            raise SkippedError(f"training in {precision} needs a CUDA device")
        if not all(tensor.isfinite().all() for tensor in self.trained(precision=precision).values()):
            raise AssertionError("weights are not finite")
        return f"{self.sizes.epochs} epochs"

    def trained(self, **settings: Any) -> dict[str, torch.Tensor]:
        """The weights that a scene teacher's training on the sample ends with."""
        self._count += 1
        job = TrainJob(
            Settings("scene", epochs=self.sizes.epochs, quick_experiment=self.sizes.share, **settings),
            Dataset.load("A", SAMPLE / "dataset.json"),
            self.root / f"outputs-{self._count}",
            self.device,
            publish=False,
        )
        return load_file(train_teacher(job).checkpoint)


def _cramp(teacher: Teacher, room: int) -> None:
    """Let a teacher run out of memory with more than ``room`` samples."""
    net = cast(Any, teacher)
    forward = net.forward

    def cramped(features: torch.Tensor) -> torch.Tensor:
        if len(features) > room:
            raise torch.OutOfMemoryError("simulated")
        return cast(torch.Tensor, forward(features))

    net.forward = cramped


def agreement(found: np.ndarray, reference: np.ndarray, tolerance: float) -> str:
    """How far logits ``[N, T, C]`` are apart. Raises AssertionError beyond ``tolerance`` of the largest logit."""
    if found.shape != reference.shape:
        raise AssertionError(f"expected logits {reference.shape}, found {found.shape}")
    difference = float(np.abs(found - reference).max() / np.abs(reference).max())
    rows = [array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (reference, found)]
    flips = int((rows[0].argmax(axis=1) != rows[1].argmax(axis=1)).sum())
    figures = f"differs by {difference:.1e} of the largest logit (allowed {tolerance:.0e}), "
    figures += f"{flips} of {len(rows[0])} argmax, KL {float(kl_divergence(*rows).mean()):.1e}"
    if not difference <= tolerance:
        raise AssertionError(figures)
    return figures


def run_all(checks: Checks, until: float) -> list[Result]:
    """Every check in turn; one that fails keeps none from running, lack of time does."""
    results = []
    for name, check in checks.table():
        began = time.monotonic()
        try:
            if began > until:
                raise SkippedError("no time left")
            result, figures = PASSED, check()
        except SkippedError as reason:
            result, figures = SKIPPED, str(reason)
        except (AssertionError, KDCacheError, RuntimeError, SystemExit) as error:
            result, figures = FAILED, f"{type(error).__name__}: {error}"
        results.append(Result(name, result, figures, round(time.monotonic() - began, 1)))
        print(f"{result:8}{results[-1].seconds:6.1f} s  {name}: {figures}", flush=True)
    return results


def main() -> int:
    """0 where nothing failed."""
    parser = argparse.ArgumentParser(description=str(__doc__))
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small sizes")
    parser.add_argument("--out", type=Path, help="folder of gpu.json (default: benchmarks/results)")
    asked = parser.parse_args()
    dry = asked.dry_run or not torch.cuda.is_available()
    device = CPU if dry else torch.device("cuda")
    where = f"CPU ({torch.get_num_threads()} threads), a dry run" if dry else torch.cuda.get_device_name(device)
    print(f"on {where}\n", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(Checks(device, Path(folder), dry=dry), began + 60 * MINUTES)
    content = {
        "benchmark": "gpu",
        "dry_run": dry,
        "device": where,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine(),
        "checks": [asdict(result) for result in results],
    }
    path = (asked.out or (RESULTS / "quick" if dry else RESULTS)) / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    counts = [f"{sum(each.result == state for each in results)} {state}" for state in (PASSED, FAILED, SKIPPED)]
    print(f"\n{', '.join(counts)} on {where}, {content['seconds']} s\nwritten: {path}")
    return int(any(result.result == FAILED for result in results))


if __name__ == "__main__":
    sys.exit(main())
