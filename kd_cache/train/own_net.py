"""Nets of a user's own: the code that they are, and a trained one as a teacher."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd_cache.errors import CheckpointError, shown
from kd_cache.fingerprint import weights_digest
from kd_cache.teacher import resolve_factory
from kd_cache.train.layers import mlp_widths
from kd_cache.train.nets import embedding_dim, fill_matching, make_head, make_net, provenance_of
from kd_cache.train.settings import CITY2SCENE, FULL_MODEL, LABEL, Settings
from teachers.builtin import ARCHITECTURES, City2Scene, under
from teachers.checkpoint import Weights, read_record, read_weights


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
    title, record = shown(os.fspath(path)), read_record(path)
    role, names = record.get("role"), record.get("class_names")
    if role not in LABEL or not names:
        raise CheckpointError(
            f"{title} does not say which teacher of which classes it is",
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
    kind, told = fill_matching(net, dict(weights.tensors), title, whole=True)
    if kind != FULL_MODEL:
        raise CheckpointError(f"{title} is no whole {arch}: {told}")
    return OwnTeacher(net, weights, settings)


def _source_digest(arch: str, net: nn.Module) -> str:
    """SHA-256 over the files of the net's own code: of its factory, its modules, and what those import beside them.

    By what the files say, not by what happens to be imported: one net has one digest in every process.
    """
    factory: Any = resolve_factory(arch)
    while isinstance(factory, functools.partial):
        factory = factory.func
    names = {arch.partition(":")[0], str(factory.__module__), *(type(part).__module__ for part in net.modules())}
    sources: dict[str, bytes] = {}
    for name in sorted(names):
        path = Path(getattr(sys.modules.get(name), "__file__", None) or "").resolve()
        if path.suffix == ".py" and path.is_file() and name.partition(".")[0] not in _VERSIONED:
            depth = name.count(".") + (path.name == "__init__.py")
            _add_sources(path, path.parents[depth], sources)
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


_VERSIONED = {"torch", "kd_cache", "teachers"}
"""A training's key has their versions."""
_INSTALLED = {"site-packages", "dist-packages"}


def _add_sources(path: Path, root: Path, sources: dict[str, bytes]) -> None:
    """Add a file below ``root``, where its imports are looked for, and those of them that lie there too."""
    name = path.relative_to(root).as_posix()
    if name in sources or not path.is_file():
        return
    sources[name] = path.read_bytes()
    for imported in _imports(sources[name], Path(name)):
        top = imported.parts[0] if imported.parts else ""
        # Of what is installed just the package itself: its neighbours are others' packages.
        if top in _VERSIONED or (_INSTALLED & set(root.parts) and top != Path(name).parts[0]):
            continue
        _add_sources(root / imported.with_suffix(".py"), root, sources)
        _add_sources(root / imported / "__init__.py", root, sources)


def _imports(source: bytes, place: Path) -> list[Path]:
    """Where modules lie that a file at ``place`` imports, without suffix, from the folder that imports start in."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Path(*alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = place.parents[node.level - 1] if 0 < node.level <= len(place.parents) else Path()
            module = package.joinpath(*(node.module or "").split("."))
            found += [module, *(module / alias.name for alias in node.names)]
    return [path for path in found if path.parts]
