"""Architectures by name: ours, and those that packages bring through the entry-point group ``kd_cache.nets``.

Their checkpoints are recognised by the tensors alone. A net of one's own needs no entry point: it is named
``module:factory``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Final

import torch
from torch import Tensor, nn

from kd_cache.errors import CheckpointError, listed, shown
from kd_cache.train.bc_resnet import BCResNet
from kd_cache.train.cp_mobile import CPMobile
from kd_cache.train.cp_resnet import CPResNet
from kd_cache.train.layers import Backbone
from kd_cache.train.tf_sepnet import TFSepNet

ENTRY_POINTS: Final = "kd_cache.nets"
ARCHITECTURE_VERSION: Final = "1"
"""Version of every backbone; it changes when the same tensors would give other numbers."""


@cache
def architectures() -> Mapping[str, type[Backbone]]:
    """Name → class, sorted by name."""
    brought = {entry.name: entry.load() for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    own = {"bc_resnet": BCResNet, "cp_mobile": CPMobile, "cp_resnet": CPResNet, "tf_sepnet": TFSepNet}
    return dict(sorted({**own, **brought}.items()))


def architecture_of(net: nn.Module) -> str | None:
    """The name of a backbone; ``None`` for any other net."""
    return next((name for name, kind in architectures().items() if isinstance(net, kind)), None)


@cache
def known_names() -> Mapping[str, frozenset[str]]:
    """Architecture → every tensor name it may have. On the meta device this costs no memory."""
    with torch.device("meta"):
        return {name: frozenset(kind.largest().state_dict()) for name, kind in architectures().items()}


def recognised(names: Iterable[str]) -> str | None:
    """The architecture that shares most names with ``names``, or None when none shares any."""
    found = set(names)
    best = max(known_names(), key=lambda architecture: len(known_names()[architecture] & found))
    return best if known_names()[best] & found else None


def backbone_from(tensors: Mapping[str, Tensor], stated: str | None, entry: str) -> Backbone:
    """The net that ``tensors`` are the weights of, all of them; sizes are read from the tensors.

    ``stated`` is the architecture the record gives, if any; ``entry`` leads the names in messages. Raises
    CheckpointError listing every name that is missing, unexpected or of another shape.
    """
    architecture = stated or recognised(tensors)
    if architecture is None or not known_names()[architecture] & tensors.keys():
        hint = "Another network comes in as --teacher NAME=module:factory; see docs/teachers.md."
        for name, kind in architectures().items():
            if any(f"{start}{tensor}" in known_names()[name] for start in kind.bare_prefixes for tensor in tensors):
                hint = f"These are published weights that {name} can start from: kd-cache train --arch {name} --init."
        raise CheckpointError(
            f"expected the weights of {stated or ' or '.join(architectures())}, found {len(tensors)} tensors"
            f" and none of its names, for example:\n{listed(sorted(tensors), most=5)}",
            hint=hint,
        )
    net = _untrained(architecture, tensors)
    fill(net, tensors, f"{architecture} ({entry})")
    return net


def _untrained(architecture: str, tensors: Mapping[str, Tensor]) -> Backbone:
    """The net of the sizes that ``tensors`` have, on the meta device."""
    with torch.device("meta"):
        try:
            return architectures()[architecture].for_tensors(tensors)
        except (ValueError, RuntimeError, OverflowError) as error:  # e.g. odd channels in groups
            raise CheckpointError(
                f"these shapes make no {architecture}: {shown(error)}",
                hint="A network of another layout comes in as --teacher name=module:factory.",
            ) from error


def is_whole(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every tensor of an architecture is among these, by name."""
    architecture = recognised(tensors)
    if architecture is None:
        return False
    try:
        expected = _untrained(architecture, tensors).state_dict()
    except CheckpointError:
        return False
    return all(name in tensors or is_counter(name) for name in expected)


def fill(net: nn.Module, tensors: Mapping[str, Tensor], title: str) -> None:
    """Give the meta-device ``net`` its tensors, without a copy, after comparing every name and shape."""
    expected = net.state_dict()
    counters = {name for name in expected if is_counter(name)}
    problems = {
        "missing": [name for name in expected if name not in tensors and name not in counters],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{shown(name)}: expected {list(expected[name].shape)}, found {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in expected and name not in counters and tensor.shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        raise _misfit(problems, title)
    # Inference uses no counters, so theirs are zero whether the file has them or not.
    zeros = {name: torch.zeros((), dtype=torch.int64) for name in counters}
    net.load_state_dict({**tensors, **zeros}, assign=True)


def _misfit(problems: Mapping[str, list[str]], title: str) -> CheckpointError:
    counts = ", ".join(f"{len(names)} {what}" for what, names in problems.items() if names)
    lists = "\n".join(f"{what}:\n{listed(names)}" for what, names in problems.items() if names)
    return CheckpointError(
        f"the weights do not fit {title}: {counts}\n{lists}",
        hint="Check that this is the whole checkpoint of this architecture; a partial load is never used.",
    )


def is_counter(name: str) -> bool:
    """Of batch norm; some exports have it as a float."""
    return name.rsplit(".", 1)[-1] == "num_batches_tracked"
