"""The net that a training begins with: built from settings, then given weights whose every name is accounted for."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kd_cache.errors import CheckpointError, KDCacheError, TeacherError, UsageError, listed, shown
from kd_cache.fingerprint import weights_digest
from kd_cache.provenance import Provenance
from kd_cache.teacher import resolve_factory
from teachers.builtin import ARCHITECTURES, City2Scene, under
from teachers.checkpoint import Weights, load_teacher, read_weights
from teachers.cnn14 import CNN14, EMBEDDING, HIDDEN, mlp, mlp_widths
from teachers.cp_resnet import CHANNELS, CPResNet
from teachers.training.freezing import BACKBONE, HEAD, UNUSED, necks_of, parts_of
from teachers.training.settings import BACKBONE as FROM_BACKBONE
from teachers.training.settings import CITY, CITY2SCENE, FULL_MODEL, LABEL, Settings


def make_net(settings: Settings, num_classes: int, seed: int) -> nn.Module:
    """An untrained net, on the CPU: features ``[B, T, F]`` → logits ``[B, num_classes]``. One seed, one net.

    Raises:
        UsageError: an architecture that is not known, or settings that it does not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.arch == "cnn14":
            hidden = HIDDEN if settings.mlp_hidden_dims is None else settings.mlp_hidden_dims
            return CNN14(
                num_classes, embedding=settings.feature_dim or EMBEDDING, hidden=hidden, dropout=settings.dropout
            )
        if settings.arch == "cp_resnet":
            if settings.mlp_hidden_dims:
                raise UsageError(
                    "cp_resnet ends in a convolution: it has no hidden layers for --mlp-hidden-dims",
                    hint="Leave it out, or train the head of a City2Scene teacher with it.",
                )
            return CPResNet(num_classes, (*CHANNELS[:3], settings.feature_dim or CHANNELS[3]))
        return _own_net(settings.arch, num_classes)


def _own_net(arch: str, num_classes: int) -> nn.Module:
    if ":" not in arch:
        raise UsageError(f"no architecture is called {shown(arch)}; known: {', '.join(ARCHITECTURES)}, module:factory")
    factory: Any = resolve_factory(arch)
    try:
        net = factory(num_classes)
    except KDCacheError:
        raise
    except Exception as error:
        raise TeacherError(f"the factory {shown(arch)} failed: {type(error).__name__}: {shown(error)}") from error
    if not isinstance(net, nn.Module):
        raise TeacherError(f"the factory {shown(arch)} must return a torch.nn.Module, found {type(net).__name__}")
    return net


def make_head(inputs: int, settings: Settings, seed: int) -> nn.Linear | nn.Sequential:
    """An untrained scene head over embeddings ``[B, inputs]``: linear, or with hidden layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.mlp_hidden_dims:
            return mlp(inputs, settings.mlp_hidden_dims, settings.num_classes, settings.dropout)
        linear = nn.Linear(inputs, settings.num_classes)
    # A convex problem: where it begins does not matter, and at zero every class is as likely as any other.
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


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


def warm_start(net: nn.Module, path: Path, settings: Settings) -> WarmStart:
    """Give ``net`` the weights of a checkpoint: all of them, or at least its whole backbone.

    The head of a teacher of another label (cities, where this one learns scenes) is not taken.

    Raises:
        CheckpointError: no name fits, or not the whole backbone; the message lists what does not.
    """
    weights = read_weights(path, frozenset(net.state_dict()))
    tensors, label = weights.tensors, LABEL[settings.role]
    if LABEL.get(weights.record.get("role") or settings.role) != label:
        # What it tells apart is something else, of however many classes.
        parts = parts_of(net)
        tensors = {name: tensor for name, tensor in tensors.items() if parts.get(name) != HEAD}
    if isinstance(net, City2Scene) and not any(name.startswith("city_model.") for name in tensors):
        tensors = {f"city_model.{name}": tensor for name, tensor in tensors.items()}
    kind, told = fill_matching(net, tensors, shown(path))
    return WarmStart(kind, f"{told}, from {shown(path)} ({weights.source})", weights.sha256, _provenance(weights))


def city_net(path: Path, settings: Settings, *, whole: bool = False) -> tuple[nn.Module, WarmStart]:
    """The city teacher in a checkpoint: of a known architecture as it is there, of one's own as ``settings`` make it.

    ``whole``: the checkpoint is of a whole City2Scene teacher, which has one.

    Raises:
        CheckpointError: it is no whole city teacher.
        TeacherError: a net that has no embedding.
    """
    if settings.arch in ARCHITECTURES:
        teacher = load_teacher(path, role=CITY2SCENE if whole else CITY)
        told = f"backbone {teacher.architecture}, {teacher.backbone.embedding_dim} wide, from {shown(path)}"
        return teacher.backbone, WarmStart(FULL_MODEL, told, teacher.checkpoint_sha256 or "", teacher.provenance)
    net = make_net(settings, settings.num_cities, settings.seed)
    start = warm_start(net, path, replace(settings, role=CITY))
    if start.kind != FULL_MODEL:
        raise CheckpointError(f"{shown(path)} is no whole {settings.arch}: {start.told}")
    embedding_dim(net)
    return net, start


def own_code(arch: str, net: nn.Module) -> list[str] | None:
    """What a net of a user's own is, as far as that can be told: its code's SHA-256, and its tensors' before training.

    ``None`` for a built-in architecture, which the code version covers.
    """
    if arch in ARCHITECTURES:
        return None
    return [_source_digest(arch, net), weights_digest(net.state_dict())]


def _source_digest(arch: str, net: nn.Module) -> str:
    """SHA-256 over the files of the net's own code: of its factory, its modules, and what those import beside them."""
    factory: Any = resolve_factory(arch)
    while isinstance(factory, functools.partial):
        factory = factory.func
    waiting = [_module(arch.partition(":")[0]), _module(factory), *map(_module, map(type, net.modules()))]
    homes = [_home(module) for module in waiting]
    roots = {home for home in homes if home is not None and (home == homes[0] or not _is_installed(home))}
    sources: dict[str, bytes] = {}
    while waiting:
        module = waiting.pop()
        path = None if module is None else _file(module)
        if module is None or path is None or module.__name__ in sources:
            continue
        below = [path.relative_to(root) for root in roots if path.is_relative_to(root)]
        if all(map(_is_installed, below)):
            continue
        sources[module.__name__] = path.read_bytes()
        waiting += map(_module, list(vars(module).values()))
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def _module(value: object) -> ModuleType | None:
    """A module, the one of that name, or the one that something is from."""
    if inspect.ismodule(value):
        return value
    name = value if isinstance(value, str) else getattr(value, "__module__", None)
    return sys.modules.get(name) if isinstance(name, str) else None


def _file(module: ModuleType) -> Path | None:
    """The module's source; ``None`` where it has none (made in memory, or compiled)."""
    path = Path(getattr(module, "__file__", None) or "")
    return path.resolve() if path.suffix == ".py" and path.is_file() else None


def _home(module: ModuleType | None) -> Path | None:
    """The folder of a module, or of the outermost package that it is in."""
    path = None if module is None else _file(module)
    if module is None or path is None:
        return None
    depth = module.__name__.count(".") + (path.name == "__init__.py")
    return path.parents[max(depth - 1, 0)]


def _is_installed(path: Path) -> bool:
    return "site-packages" in path.parts


class OwnTeacher(nn.Module):
    """A trained net of a user's own, as something that a dump can score with: [B, T, F] → logits [B, C]."""

    value_kind = "logits"

    def __init__(self, net: nn.Module, weights: Weights, settings: Settings) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.num_classes = settings.num_classes
        self.class_names = tuple(weights.record.get("class_names") or ()) or None
        self.provenance, self.source, self.checkpoint_sha256 = _provenance(weights), weights.source, weights.sha256
        self._parts = {"architecture": f"{settings.arch}/{_source_digest(settings.arch, net)[:16]}"}
        if isinstance(weights.record.get("feature_spec"), str):
            self._parts["feature_spec"] = weights.record["feature_spec"]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def fingerprint_parts(self) -> dict[str, str]:
        return dict(self._parts)


def own_teacher(arch: str, path: str | os.PathLike[str], *, num_cities: int = 12) -> OwnTeacher:
    """The teacher of a net of one's own in a checkpoint that ``kd-cache train --arch module:factory`` wrote.

    For ``--teacher``: ``def scene(ckpt): return own_teacher("my_nets:small", ckpt)``.

    Args:
        arch: the factory, as it was given to ``--arch``.
        num_cities: what a City2Scene teacher's city teacher was made for.

    Raises:
        CheckpointError: the file does not say which teacher it is, or its names and shapes are not this net's.
    """
    weights = read_weights(path)
    role, names = weights.record.get("role"), weights.record.get("class_names")
    if role not in LABEL or not names:
        raise CheckpointError(
            f"{shown(os.fspath(path))} does not say which teacher of which classes it is",
            hint="kd-cache train writes that into its checkpoints.",
        )
    cities = num_cities if role == CITY2SCENE else len(names)
    settings = Settings(role, arch=arch, num_scenes=len(names), num_cities=cities)
    net = make_net(settings, cities, settings.seed)
    weights = read_weights(path, frozenset(net.state_dict()))
    if role == CITY2SCENE:
        head = under(weights.tensors, "scene_head.")
        hidden = mlp_widths(head, "", (embedding_dim(net), len(names)))[:-1] if "weight" not in head else []
        settings = replace(settings, mlp_hidden_dims=tuple(hidden))
        net = City2Scene(net, make_head(embedding_dim(net), settings, settings.seed))
    kind, told = fill_matching(net, dict(weights.tensors), shown(os.fspath(path)))
    if kind != FULL_MODEL:
        raise CheckpointError(f"{shown(os.fspath(path))} is no whole {arch}: {told}")
    return OwnTeacher(net, weights, settings)


def _provenance(weights: Weights) -> Provenance | None:
    made_with = weights.record.get("provenance")
    return None if made_with is None else Provenance.from_json(made_with)


def fill_matching(net: nn.Module, tensors: dict[str, Tensor], title: str) -> tuple[str, str]:
    """Copy the tensors whose name and shape the net has; says how many. Raises as `warm_start`."""
    state, parts = net.state_dict(), parts_of(net)
    wanted = [name for name in state if not name.endswith("num_batches_tracked") and parts[name] != UNUSED]
    fits = {name for name in wanted if name in tensors and tensors[name].shape == state[name].shape}
    matched = [name for name in wanted if name in fits]
    told = f"{len(matched)} of {len(wanted)} tensors loaded"
    new = [name for name in wanted if name not in fits]
    lost = [name for name in new if parts[name] == BACKBONE]
    unknown = [name for name in tensors if name not in state]
    # A part of what an embedding is made by, as CNN14's projection head is: without it the head stands on another one.
    dropped = [name for name in unknown if name.startswith(tuple(necks_of(net)))]
    if not matched or lost or dropped:
        what = f"{len(dropped)} tensors are of a part that this net has not; they are"
        if not matched or lost:
            what = "no tensor of the net is" if not matched else f"{len(lost)} tensors of its backbone are not"
        shapes = [
            f"{shown(name)}: expected {list(state[name].shape)}"
            + (f", found {list(tensors[name].shape)}" if name in tensors else ", missing")
            for name in new
        ]
        others = [f"{shown(name)}: unexpected" for name in (dropped or unknown)]
        raise CheckpointError(
            f"{title}: {told}; {what} in the checkpoint, which has {len(tensors)} tensors\n{listed(shapes)}\n"
            f"{listed(others)}".rstrip(),
            hint="Give a checkpoint of this architecture (--arch, --feature-dim), or train from scratch.",
        )
    with torch.no_grad():
        for name in [*matched, *(name for name in tensors if parts.get(name) == UNUSED)]:
            if tensors[name].shape == state[name].shape:
                state[name].copy_(tensors[name])
    kind = FULL_MODEL if len(matched) == len(wanted) else FROM_BACKBONE
    if new:
        told += f" (new: {_few(new)})"
    if unknown:
        told += f" ({len(unknown)} of the file are not the net's and are left out: {_few(unknown)})"
    return kind, told


def _few(names: list[str]) -> str:
    return f"{', '.join(map(shown, names[:6]))}{', …' if len(names) > 6 else ''}"
