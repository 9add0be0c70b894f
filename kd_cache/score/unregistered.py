"""What a teacher computes with besides its state dict: buffers that are not saved, tensors and numbers in attributes.

PyTorch saves parameters and persistent buffers alone. A mean that is a plain tensor, a temperature, a second net in a
list make numbers just as well, so they are a part of the fingerprint, where there are any.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import logging
import types
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kd_cache.store.origin import canonical_json, weights_digest

_CONTRACT = {
    "num_classes",
    "num_bins",
    "num_frames",
    "value_kind",
    "class_names",
    "provenance",
    "source",
    "checkpoint_sha256",
    "training",
}
_OF_MODULES = set(vars(nn.Module()))
_WITHOUT_STATE = (
    str, bytes, type(None), enum.Enum, Path, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
    types.ModuleType, logging.Logger, torch.device, torch.dtype, np.dtype, torch.jit.ScriptModule,
)  # fmt: skip
_MOST = 100_000
"""No walk goes on for ever, whatever a teacher holds."""


@dataclasses.dataclass
class Unregistered:
    """Tensors and numbers by where they were found, and attributes of which nobody knows what they hold."""

    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    numbers: dict[str, str] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)

    @property
    def digest(self) -> str | None:
        """SHA-256 of all of it, as 64 hex digits; ``None`` where there is nothing, as for most teachers."""
        if not self.tensors and not self.numbers:
            return None
        return hashlib.sha256(canonical_json([weights_digest(self.tensors), self.numbers])).hexdigest()


def unregistered(teacher: Any, state: Mapping[str, Any]) -> Unregistered:
    """Look through a teacher's attributes, modules, lists, dicts and dataclasses; ``state`` is its state dict.

    Numbers count in classes of a user's own; what torch's own layers are set to, ``architecture`` stands for.
    """
    found = Unregistered()
    known = {_place(value) for value in state.values() if isinstance(value, torch.Tensor)}
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", teacher)]
    while waiting and len(seen) < _MOST:
        path, value = waiting.pop()
        if isinstance(value, torch.Tensor | np.ndarray):
            _take_tensor(found, path, value, known)
        elif isinstance(value, bool | int | float | complex | np.number | np.bool_):
            found.numbers[path] = repr(value.item() if isinstance(value, np.generic) else value)
        elif isinstance(value, _WITHOUT_STATE) or id(value) in seen:
            continue
        else:
            seen.add(id(value))
            inside = list(_inside(value, is_teacher=not path))
            if not inside and not _is_container(value):
                found.unknown.append(f"{path} ({type(value).__name__})")
            waiting += [(f"{path}.{name}" if path else name, each) for name, each in inside]
    found.unknown.sort()
    return found


def _take_tensor(found: Unregistered, path: str, value: Any, known: set[Any]) -> None:
    try:
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        if tensor.numel() and _place(tensor) not in known:
            weights_digest({"": tensor})
            found.tensors[path] = tensor
    except (RuntimeError, TypeError, NotImplementedError):  # sparse, on no device, of objects
        found.unknown.append(f"{path} ({type(value).__name__})")


def _place(tensor: torch.Tensor) -> Any:
    """Where its numbers are: a state dict gives other objects for the same memory."""
    try:
        return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)
    except RuntimeError:
        return id(tensor)


def _is_container(value: Any) -> bool:
    kinds = (list, tuple, set, frozenset, Mapping, nn.Module, partial)
    return isinstance(value, kinds) or dataclasses.is_dataclass(value)


def _inside(value: Any, *, is_teacher: bool) -> Iterator[tuple[str, Any]]:
    """What a value holds, by name; nothing for an object of which that is not known."""
    if isinstance(value, nn.Module):
        yield from [*value._parameters.items(), *value._buffers.items(), *value._modules.items()]
        is_own = not type(value).__module__.startswith("torch.")
        yield from ((name, each) for name, each in vars(value).items() if is_own and _counts(name))
    elif isinstance(value, Mapping):
        yield from ((str(name), each) for name, each in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(number), each) for number, each in enumerate(value))
    elif isinstance(value, partial):
        yield from [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    elif is_teacher or dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace):
        yield from ((name, each) for name, each in getattr(value, "__dict__", {}).items() if _counts(name))


def _counts(name: str) -> bool:
    return name not in _OF_MODULES and name not in _CONTRACT
