"""Scoring: fixed-shape batches through every teacher, reproducibly."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
import torch

from kd_cache.errors import KDCacheError, TeacherError, UsageError, shown
from kd_cache.plan import Place, Shape
from kd_cache.teacher import Teacher

_CPU = torch.device("cpu")
_ERROR = 2  # torch's debug mode: an operation without a deterministic implementation is an error
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """``auto`` (a GPU, else the CPU), ``cpu``, ``cuda`` or ``cuda:i``. Raises `UsageError` if it is absent.

    ``auto`` takes the GPU of ``LOCAL_RANK`` where a launcher has set that, else the first.
    """
    if name == "auto":
        local = os.environ.get("LOCAL_RANK", "")
        count = torch.cuda.device_count()
        return torch.device(f"cuda:{int(local) % count}" if local.isdecimal() else "cuda") if count else _CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {shown(name)!r}, expected auto, cpu, cuda or cuda:i")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name} is not available: this machine has {torch.cuda.device_count()} CUDA devices",
            hint="Use --device cpu or --device auto.",
        )
    return device


def environment(device: torch.device) -> dict[str, str]:
    """What, besides the fingerprint, the last bits of a number depend on."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "cuda": (torch.version.cuda or "none") if on_gpu else "none",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "platform": platform.platform(),
    }


@contextmanager
def numerics(device: torch.device, precision: str, seed: int) -> Iterator[None]:
    """Deterministic algorithms, TF32 exactly as asked for (matmul's and cuDNN's), autocast for bf16 and fp16.

    Everything global is put back afterwards.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UsageError("precision tf32 exists on CUDA devices only", hint="Use --precision fp32.")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this set
    before = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_deterministic_debug_mode(),
    )
    tf32 = precision == "tf32"
    _set_numerics(tf32, tf32, False, _ERROR)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            torch.manual_seed(seed)
            stack.enter_context(torch.inference_mode())
            if precision in _AUTOCAST:
                stack.enter_context(torch.autocast(device.type, dtype=_AUTOCAST[precision]))
            yield
    finally:
        _set_numerics(*before)


def _set_numerics(matmul_tf32: bool, cudnn_tf32: bool, benchmark: bool, deterministic: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    torch.backends.cudnn.benchmark = benchmark
    # Not use_deterministic_algorithms: that imports the whole compiler, more than a second, to set the same flag.
    torch.set_deterministic_debug_mode(deterministic)


@dataclass(eq=False)
class Batch:
    """Samples of one shape on their way through the same teachers, each at its own slot of ``size``.

    ``rows`` maps a slot to the sample's number and its features ``[T, F]``.
    """

    size: int
    teachers: frozenset[str]
    rows: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """Results of one batch: ``numbers`` of its n samples, and by teacher ``[n, C]`` float32 logits or an error."""

    numbers: list[int]
    logits: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[str, TeacherError] = field(default_factory=dict)


class _UnscoredError(Exception):
    """A teacher cannot score these samples."""


class Engine:
    """Scores batches of fixed shape. Use inside `numerics`.

    Args:
        teachers: by name; moved to ``device`` and to evaluation mode.
    """

    def __init__(self, teachers: Mapping[str, Teacher], device: torch.device) -> None:
        self.device = device
        self.teachers = {name: _placed(teacher, device) for name, teacher in teachers.items()}

    def score(self, batch: Batch) -> Scored:
        """Score the samples of a batch with its teachers.

        Empty slots are filled with a sample that is there: what stands in other slots does not touch a row's bits.
        A teacher that refuses these features, or returns anything but ``[size, C]``, has an error in the result.

        Raises:
            TeacherError: a teacher failed in a way that it did not foresee (out of memory, say).
        """
        slots = list(batch.rows)
        filler = batch.rows[slots[0]][1]
        padded = np.empty((batch.size, *filler.shape), np.float32)
        for slot in range(batch.size):
            padded[slot] = batch.rows[slot][1] if slot in batch.rows else filler
        features = torch.from_numpy(padded).to(self.device)
        scored = Scored([number for number, _ in batch.rows.values()])
        for name in self.teachers:
            if name not in batch.teachers:
                continue
            try:
                scored.logits[name] = self._run(name, features).float().cpu().numpy()[slots]
            except _UnscoredError as error:
                scored.errors[name] = TeacherError(str(error))
        return scored

    def _run(self, name: str, features: torch.Tensor) -> torch.Tensor:
        teacher = self.teachers[name]
        try:
            logits = teacher(features)
        except KDCacheError as error:
            raise _UnscoredError(f"teacher {name}: {error.message}") from error
        except Exception as error:
            raise TeacherError(
                f"teacher {name} failed on features of shape {list(features.shape)}: "
                f"{type(error).__name__}: {shown(error)}"
            ) from error
        expected = (len(features), teacher.num_classes)
        if not isinstance(logits, torch.Tensor) or logits.shape != expected or not logits.is_floating_point():
            found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise _UnscoredError(f"teacher {name} must return floating-point {list(expected)}, it returned {found}")
        return logits


def _placed(teacher: Teacher, device: torch.device) -> Teacher:
    moved: Any = teacher
    if callable(getattr(moved, "to", None)):
        moved = moved.to(device)
    if callable(getattr(moved, "eval", None)):
        moved = moved.eval()
    return moved  # type: ignore[no-any-return]


class Batcher:
    """Puts samples into batches of one shape, each at its planned slot, and scores a batch when it is full.

    Where only some samples are to be scored, a few batches are kept open at once, so that little of them stays empty;
    never more than ``most_samples`` samples or ``most_bytes`` bytes of features (or two batches) wait.
    """

    _OPEN = 8
    _MOST_BYTES = 256 << 20

    def __init__(self, engine: Engine, most_bytes: int = _MOST_BYTES, most_samples: int = 1024) -> None:
        self._engine = engine
        self._most = (most_bytes, most_samples)
        self._open: dict[tuple[Shape, frozenset[str]], list[Batch]] = {}
        self._bytes = self._samples = 0

    def add(self, number: int, array: np.ndarray, teachers: frozenset[str], place: Place) -> Iterator[Scored]:
        """Take one sample for these teachers; gives what had to be scored to make room, or has become full."""
        shape = (array.shape[0], array.shape[1])
        batches = self._open.setdefault((shape, teachers), [])
        batch = next((batch for batch in batches if place.slot not in batch.rows), None)
        if batch is None:
            if len(batches) == self._OPEN:
                yield self._score(max(batches, key=lambda batch: len(batch.rows)), batches)
            batch = Batch(place.size, teachers)
            batches.append(batch)
        batch.rows[place.slot] = (number, array)
        self._bytes += array.nbytes
        self._samples += 1
        if len(batch.rows) == batch.size:
            yield self._score(batch, batches)
        room = (max(self._most[0], 2 * place.size * array.nbytes), max(self._most[1], 2 * place.size))
        while self._bytes > room[0] or self._samples > room[1]:
            # Many shapes with few samples each: what waits must not grow with the data set.
            fullest, among = max(
                ((batch, batches) for batches in self._open.values() for batch in batches),
                key=lambda pair: len(pair[0].rows) / pair[0].size,
            )
            yield self._score(fullest, among)

    def finish(self) -> Iterator[Scored]:
        """Score what is still open."""
        for batches in self._open.values():
            while batches:
                yield self._score(batches[0], batches)

    def _score(self, batch: Batch, among: list[Batch]) -> Scored:
        among.remove(batch)
        self._bytes -= sum(array.nbytes for _, array in batch.rows.values())
        self._samples -= len(batch.rows)
        return self._engine.score(batch)
