"""Nets of a user's own: the code that they are, and a trained one as a teacher."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from kd_cache.errors import CheckpointError, shown
from kd_cache.fingerprint import weights_digest
from kd_cache.teacher import resolve_factory
from teachers.builtin import ARCHITECTURES, City2Scene, under
from teachers.checkpoint import Weights, read_weights
from teachers.cnn14 import mlp_widths
from teachers.training.nets import embedding_dim, fill_matching, make_head, make_net, provenance_of
from teachers.training.settings import CITY2SCENE, FULL_MODEL, LABEL, Settings


def own_code(arch: str, net: nn.Module) -> list[str] | None:
    """What a net of a user's own is, as far as that can be told: its code's SHA-256, and its tensors' before training.

    ``None`` for a built-in architecture, which the code version covers.
    """
    if arch in ARCHITECTURES:
        return None
    return [_source_digest(arch, net), weights_digest(net.state_dict())]


class OwnTeacher(nn.Module):
    """A trained net of a user's own, as something that a dump can score with: [B, T, F] → logits [B, C]."""

    value_kind = "logits"

    def __init__(self, net: nn.Module, weights: Weights, settings: Settings) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.num_classes = settings.num_classes
        self.class_names = tuple(weights.record.get("class_names") or ()) or None
        self.provenance, self.source, self.checkpoint_sha256 = provenance_of(weights), weights.source, weights.sha256
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
