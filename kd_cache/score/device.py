"""Where teachers run, and how exactly: devices, and everything global that the last bits of a number depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import h5py
import numpy as np
import torch

from kd_cache.errors import UsageError, shown

_CPU = torch.device("cpu")
_ANYTHING, _ERROR = 0, 2  # torch's debug modes: with 2 an operation without a deterministic implementation is an error
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    with ExitStack() as stack:
        stack.enter_context(_globals(device, precision, deterministic=True))
        torch.manual_seed(seed)
        stack.enter_context(torch.inference_mode())
        if precision in AUTOCAST:
            stack.enter_context(torch.autocast(device.type, dtype=AUTOCAST[precision]))
        yield


@contextmanager
def training_numerics(device: torch.device, precision: str, *, deterministic: bool) -> Iterator[None]:
    """TF32 exactly as asked for, on request only deterministic algorithms. Everything global is put back afterwards.

    Raises `UsageError` for a precision that the device does not have.
    """
    refuse_training_precision(device, precision)
    with _globals(device, precision, deterministic=deterministic):
        yield


def refuse_training_precision(device: torch.device, precision: str) -> None:
    """Raise `UsageError` for a precision that nothing can be trained in on this device."""
    if precision == "fp16" and device.type != "cuda":
        raise UsageError("training in fp16 needs a CUDA device", hint="Use --precision fp32, or bf16.")
    _refuse_tf32(device, precision)


def _refuse_tf32(device: torch.device, precision: str) -> None:
    if precision == "tf32" and device.type != "cuda":
        raise UsageError("precision tf32 exists on CUDA devices only", hint="Use --precision fp32.")


@contextmanager
def _globals(device: torch.device, precision: str, *, deterministic: bool) -> Iterator[None]:
    _refuse_tf32(device, precision)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this set
    before = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_deterministic_debug_mode(),
    )
    tf32 = precision == "tf32"
    _set_numerics(tf32, tf32, not deterministic, _ERROR if deterministic else _ANYTHING)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        _set_numerics(*before)


def _set_numerics(matmul_tf32: bool, cudnn_tf32: bool, benchmark: bool, deterministic: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    torch.backends.cudnn.benchmark = benchmark
    # Not use_deterministic_algorithms: that imports the whole compiler, more than a second, to set the same flag.
    torch.set_deterministic_debug_mode(deterministic)


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside `numerics`: float32 without autocast and TF32, for comparison with a cheaper precision."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
