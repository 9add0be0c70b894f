"""Scoring: fixed-shape batches through every teacher, reproducibly."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
import torch

from kd_cache.errors import KDCacheError, TeacherError, UsageError, shown
from kd_cache.plan import Shape
from kd_cache.teacher import Teacher

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda`` or ``cuda:i``. Raises `UsageError` if it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    """
    Deterministic algorithms, TF32 exactly as asked for (matmul's and cuDNN's), autocast for bf16 and fp16.

    Everything global is put back afterwards.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UsageError("precision tf32 exists on CUDA devices only", hint="Use --precision fp32.")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this set
    before = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    tf32 = precision == "tf32"
    _set_numerics(tf32, tf32, False, True, False)
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


def _set_numerics(matmul_tf32: bool, cudnn_tf32: bool, benchmark: bool, deterministic: bool, warn_only: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@dataclass
class Batch:
    """Samples of one shape that wait to be scored together by the same teachers."""

    teachers: frozenset[str]
    numbers: list[int] = field(default_factory=list)
    arrays: list[np.ndarray] = field(default_factory=list)


class Engine:
    """
    Scores padded batches. Use inside `numerics`.

    Args:
        teachers: by name; moved to ``device`` and to evaluation mode.
    """

    def __init__(self, teachers: Mapping[str, Teacher], device: torch.device) -> None:
        self.device = device
        self.teachers = {name: _placed(teacher, device) for name, teacher in teachers.items()}

    def score(self, batch: Batch, size: int) -> dict[str, np.ndarray]:
        """
        ``{teacher: [n, C] float32}`` for the n ≤ ``size`` samples of a batch, computed in a batch of ``size``.

        The batch is filled up by repeating its last sample.

        Raises:
            TeacherError: a teacher failed, or returned anything but ``[size, C]``.
        """
        count = len(batch.arrays)
        padded = np.empty((size, *batch.arrays[0].shape), np.float32)
        for row, array in enumerate(batch.arrays):
            padded[row] = array
        padded[count:] = padded[count - 1]
        features = torch.from_numpy(padded).to(self.device)
        results = {name: self._run(name, features) for name in self.teachers if name in batch.teachers}
        return {name: logits[:count].float().cpu().numpy() for name, logits in results.items()}

    def _run(self, name: str, features: torch.Tensor) -> torch.Tensor:
        teacher = self.teachers[name]
        try:
            logits = teacher(features)
        except KDCacheError:
            raise
        except Exception as error:
            raise TeacherError(
                f"teacher {name} failed on features of shape {list(features.shape)}: "
                f"{type(error).__name__}: {shown(error)}"
            ) from error
        expected = (len(features), teacher.num_classes)
        if not isinstance(logits, torch.Tensor) or logits.shape != expected or not logits.is_floating_point():
            found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise TeacherError(f"teacher {name} must return floating-point {list(expected)}, it returned {found}")
        return logits


def _placed(teacher: Teacher, device: torch.device) -> Teacher:
    moved: Any = teacher
    if callable(getattr(moved, "to", None)):
        moved = moved.to(device)
    if callable(getattr(moved, "eval", None)):
        moved = moved.eval()
    return moved  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Scored:
    """Results of one batch: ``numbers`` as given to `Batcher.add`, ``logits[teacher]`` ``[n, C]`` float32."""

    numbers: list[int]
    logits: dict[str, np.ndarray]


class Batcher:
    """
    Collects features by shape until a batch of the planned size is full, and scores it.

    Args:
        size_of: the planned batch size of a shape ``(T, F)``.
    """

    def __init__(self, engine: Engine, size_of: Callable[[Shape], int]) -> None:
        self._engine = engine
        self._size_of = size_of
        self._waiting: dict[tuple[Shape, frozenset[str]], Batch] = {}

    def add(self, number: int, array: np.ndarray, teachers: frozenset[str]) -> Iterator[Scored]:
        """Take one sample for these teachers; gives a batch when one is full."""
        shape = (array.shape[0], array.shape[1])
        batch = self._waiting.setdefault((shape, teachers), Batch(teachers))
        batch.numbers.append(number)
        batch.arrays.append(array)
        if len(batch.arrays) == self._size_of(shape):
            del self._waiting[shape, teachers]
            yield self._score(batch)

    def finish(self) -> Iterator[Scored]:
        """Score what still waits, padded."""
        while self._waiting:
            key = min(self._waiting, key=lambda key: (key[0], sorted(key[1])))
            yield self._score(self._waiting.pop(key))

    def _score(self, batch: Batch) -> Scored:
        shape = (batch.arrays[0].shape[0], batch.arrays[0].shape[1])
        return Scored(batch.numbers, self._engine.score(batch, self._size_of(shape)))
