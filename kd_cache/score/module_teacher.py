"""A plain ``torch.nn.Module`` as a teacher: what the contract asks for beyond calling it is found out."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from kd_cache.errors import TeacherError, shown
from kd_cache.score.factory import users_code
from kd_cache.score.given import Given, each, of_arrays, shape_in_words
from kd_cache.score.teacher import Teacher, check_teacher

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class ModuleTeacher(nn.Module):
    """A net, and what is known of it: the number of classes from its output, its architecture from its modules."""

    def __init__(self, net: nn.Module, row: torch.Size, value_kind: str, architecture: str) -> None:
        super().__init__()
        self.net = net
        self.num_classes, self.value_kind = row[-1], value_kind
        self.num_frames = row[0] if len(row) == 2 else None
        self.class_names = getattr(net, "class_names", None)
        self.provenance = getattr(net, "provenance", None)
        self.architecture = architecture

    def forward(self, inputs: Given) -> Any:
        return self.net(inputs)

    def fingerprint_parts(self) -> Mapping[str, str]:
        return {"architecture": self.architecture}


def as_teacher(
    name: str, given: Any, example: np.ndarray, value_kind: str = "logits", note: Callable[[str], None] = lambda _: None
) -> Teacher:
    """``given`` where it keeps the contract, else a `ModuleTeacher` of it.

    Args:
        example: one input, which is scored once to see how many classes there are.
        value_kind: of a plain module that has no ``value_kind``.
        note: hears of what had to be derived.

    Raises:
        TeacherError: it is neither, or does not score the example as ``[1, C]``, or ``[1, L, C]`` for L frames.
    """
    if isinstance(given, nn.Module) and not callable(getattr(given, "fingerprint_parts", None)):
        given = _wrapped(name, given, example, value_kind, note)
    check_teacher(name, given)
    return given  # type: ignore[no-any-return]


@contextmanager
def kept_modes(nets: Iterable[nn.Module]) -> Iterator[None]:
    """Leave every module of some nets in training or evaluation mode, as it was."""
    modes = {part: part.training for net in nets for part in net.modules()}
    try:
        yield
    finally:
        for part, was_training in modes.items():
            part.training = was_training


def _wrapped(
    name: str, net: nn.Module, example: np.ndarray, value_kind: str, note: Callable[[str], None]
) -> ModuleTeacher:
    batch = of_arrays([example])
    where = next((each.device for each in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    failed = f"teacher {name} failed on an input of {shape_in_words(batch, 1)}"
    with kept_modes([net]), users_code(lambda why: TeacherError(f"{failed}: {why}")), torch.inference_mode():
        out = net.eval()(each(batch, lambda tensor: tensor.to(where)))
    if not isinstance(out, torch.Tensor) or out.ndim not in (2, 3) or len(out) != 1:
        found = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise TeacherError(
            f"teacher {name} must return [B, C], or [B, L, C] for L frames; it returned {found} for one input"
        )
    architecture = getattr(net, "architecture", None)
    if not isinstance(architecture, str):
        architecture = derived_architecture(net)
        note(
            f"{shown(name)}: its architecture is derived from its modules and their code ({architecture}); give it an "
            'attribute architecture = "mine/1" whose version you change when its numbers change'
        )
    kind = getattr(net, "value_kind", value_kind)
    return ModuleTeacher(net, out.shape[1:], kind, architecture)


def derived_architecture(net: nn.Module) -> str:
    """The class, and a digest over its printed modules and the source of all classes that are not torch's own."""
    classes = {type(part) for part in net.modules() if not type(part).__module__.startswith("torch.")}
    texts = [_ADDRESS.sub("", repr(net))]
    for kind in sorted(classes, key=lambda kind: (kind.__module__, kind.__qualname__)):
        try:
            texts.append(inspect.getsource(kind))
        except (OSError, TypeError):  # typed at a prompt
            texts.append(f"{kind.__module__}.{kind.__qualname__}")
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
    return f"{type(net).__qualname__}/{digest[:16]}"
