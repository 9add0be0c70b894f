"""The net that a training begins with: built from settings, then given weights whose every name is accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import CheckpointError, TeacherError, UsageError, listed, shown
from kd_cache.score.factory import resolve_factory, users_code
from kd_cache.train.architectures import architectures
from kd_cache.train.checkpoint import read_weights
from kd_cache.train.freezing import BACKBONE, HEAD, UNUSED, necks_of, parts_of
from kd_cache.train.settings import BACKBONE as FROM_BACKBONE
from kd_cache.train.settings import FULL_MODEL, Settings, label_of
from kd_cache.train.state_dict import is_counter


def make_net(settings: Settings, num_classes: int, seed: int) -> nn.Module:
    """An untrained net, on the CPU: features ``[B, T, F]`` → logits ``[B, num_classes]``. One seed, one net.

    Raises:
        UsageError: an architecture that is not known, or settings that it does not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if (kind := architectures().get(settings.arch)) is not None:
            return kind.sized(num_classes, settings.feature_dim, settings.mlp_hidden_dims, settings.dropout)
        return _own_net(settings.arch, num_classes)


def _own_net(arch: str, num_classes: int) -> nn.Module:
    if ":" not in arch:
        raise UsageError(
            f"no architecture is called {shown(arch)}; known: {', '.join(architectures())}, module:factory",
            hint="Name a factory of your own as module:factory, or as path/to/file.py:factory.",
        )
    factory = resolve_factory(arch)
    with users_code(lambda why: TeacherError(f"the factory {shown(arch)} failed: {why}")):
        net = factory(num_classes)
    if not isinstance(net, nn.Module):
        raise TeacherError(f"the factory {shown(arch)} must return a torch.nn.Module, found {type(net).__name__}")
    return net


def embedding_dim(net: nn.Module) -> int:
    """Width of what ``net.embed`` gives. Raises `TeacherError` for a net that has none."""
    width = getattr(net, "embedding_dim", None)
    if not isinstance(width, int) or not callable(getattr(net, "embed", None)):
        raise TeacherError(
            f"{type(net).__name__} has no embed(features) and embedding_dim, so no head can be put on it"
        )
    return width


@dataclass(frozen=True)
class WarmStart:
    """What was loaded into a net: its ``kind`` (a whole model, or a backbone), how much, and from where."""

    kind: str
    told: str
    sha256: str
    provenance: Provenance | None


def warm_start(net: nn.Module, path: Path, settings: Settings, *, whole: bool = False, within: str = "") -> WarmStart:
    """Give ``net`` the weights of a checkpoint: all of them, or at least its whole backbone.

    The head of a teacher of another label (cities, where this one learns scenes) is not taken. ``whole``: nothing may
    be in the file that the net has not. ``within``: where the names of the net's backbone start with this, a backbone
    by itself is taken too.

    Raises:
        CheckpointError: no name fits, or not the whole backbone; the message lists what does not.
    """
    weights = read_weights(path, frozenset(net.state_dict()))
    tensors = weights.tensors
    if label_of(weights.record.get("role") or settings.role) != settings.label:
        # What it tells apart is something else, of however many classes.
        parts = parts_of(net)
        tensors = {name: tensor for name, tensor in tensors.items() if parts.get(name) != HEAD}
    if not any(name.startswith(within) for name in tensors):
        tensors = {f"{within}{name}": tensor for name, tensor in tensors.items()}
    kind, told = fill_matching(net, tensors, shown(path), whole=whole)
    return WarmStart(kind, f"{told}, from {shown(path)} ({weights.source})", weights.sha256, weights.provenance)


def fill_matching(net: nn.Module, tensors: dict[str, Tensor], title: str, *, whole: bool = False) -> tuple[str, str]:
    """Copy the tensors whose name and shape the net has; says how many. Raises as `warm_start`."""
    state, parts = net.state_dict(), parts_of(net)
    wanted = [name for name in state if not is_counter(name) and parts[name] != UNUSED]
    fits = {name for name in wanted if name in tensors and _is_like(tensors[name], state[name])}
    matched = [name for name in wanted if name in fits]
    told = f"{len(matched)} of {len(wanted)} tensors loaded"
    new = [name for name in wanted if name not in fits]
    lost = [name for name in new if parts[name] == BACKBONE]
    unknown = [name for name in tensors if name not in state]
    # A part of what an embedding is made by, as CNN14's projection head is: without it the head stands on another one.
    dropped = [name for name in unknown if whole or name.startswith(necks_of(net))]
    if not matched or lost or dropped:
        what = f"{len(dropped)} tensors are of a part that this net has not; they are"
        if not matched or lost:
            what = "no tensor of the net is" if not matched else f"{len(lost)} tensors of its backbone are not"
        missing = {name: state[name] for name in new}
        raise _unfit(f"{title}: {told}; {what}", tensors, missing, dropped or unknown)
    with torch.no_grad():
        for name in [*matched, *(name for name in tensors if parts.get(name) == UNUSED)]:
            if _is_like(tensors[name], state[name]):
                state[name].copy_(tensors[name])
    kind = FULL_MODEL if len(matched) == len(wanted) else FROM_BACKBONE
    if new:
        told += f" (new: {_few(new)})"
    if unknown:
        told += f" ({len(unknown)} of the file are not the net's and are left out: {_few(unknown)})"
    return kind, told


def _unfit(
    said: str, tensors: Mapping[str, Tensor], missing: Mapping[str, Tensor], others: Sequence[str]
) -> CheckpointError:
    """``missing`` are the net's tensors that the file's ``tensors`` do not fit, ``others`` what it has besides."""
    shapes = [
        f"{shown(name)}: expected {list(tensor.shape)}"
        + (f", found {_described(tensors[name])}" if name in tensors else ", missing")
        for name, tensor in missing.items()
    ]
    return CheckpointError(
        f"{said} in the checkpoint, which has {len(tensors)} tensors\n{listed(shapes)}\n"
        f"{listed(f'{shown(name)}: unexpected' for name in others)}".rstrip(),
        hint="Give a checkpoint of this architecture (--arch, --feature-dim), or train from scratch.",
    )


def _is_like(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.is_floating_point() == other.is_floating_point()


def _described(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f"{str(tensor.dtype).removeprefix('torch.')} "
    return f"{kind}{list(tensor.shape)}"


def _few(names: list[str]) -> str:
    return f"{', '.join(map(shown, names[:6]))}{', …' if len(names) > 6 else ''}"
