"""The code of a net of a user's own: what a key or a fingerprint must change with."""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from kd_cache.score.factory import PRIVATE, is_file, load_file, resolve_factory
from kd_cache.store.origin import weights_digest
from kd_cache.train.architectures import architectures

_VERSIONED = {"torch", "kd_cache", "teachers"}
"""A training's key has their versions."""
_INSTALLED = {"site-packages", "dist-packages"}


def own_code(arch: str, net: nn.Module) -> list[str] | None:
    """What a net of a user's own is, as far as that can be told: its code's SHA-256, and its tensors' before training.

    ``None`` for a built-in architecture, which the code version covers.
    """
    if arch in architectures():
        return None
    return [source_digest(arch, net), weights_digest(net.state_dict())]


def source_digest(arch: str, net: nn.Module) -> str:
    """SHA-256 over the files of the net's own code: of its factory, its modules, and what those import beside them.

    By what the files say, not by what happens to be imported: one net has one digest in every process, in any folder.
    """
    factory: Any = resolve_factory(arch)
    while isinstance(factory, functools.partial):
        factory = factory.func
    where = arch.rpartition(":")[0]
    first = load_file(Path(where)).__name__ if is_file(where) else where
    names = {first, str(factory.__module__), *(type(part).__module__ for part in net.modules())}
    starts = []
    for name in sorted(names):
        path = Path(getattr(sys.modules.get(name), "__file__", None) or "").resolve()
        if path.suffix == ".py" and path.is_file() and name.partition(".")[0] not in _VERSIONED:
            depth = 0 if name.startswith(PRIVATE) else name.count(".") + (path.name == "__init__.py")
            starts.append((path.parents[depth], path.relative_to(path.parents[depth])))
    digest = hashlib.sha256()
    for name, source in sorted(imported_sources(starts).items()):
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def imported_sources(starts: Iterable[tuple[Path, Path]]) -> dict[str, bytes]:
    """The files at ``starts``, each a root and a path below it, and all that they import from below their roots."""
    sources: dict[str, bytes] = {}
    waiting = list(starts)
    while waiting:
        root, place = waiting.pop()
        if place.as_posix() in sources or not (root / place).is_file():
            continue
        sources[place.as_posix()] = (root / place).read_bytes()
        try:
            tree = ast.parse(sources[place.as_posix()])
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            named = []
            if isinstance(node, ast.Import):
                named = [Path(*alias.name.split(".")) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = place.parents[node.level - 1] if 0 < node.level <= len(place.parents) else Path()
                module = package.joinpath(*(node.module or "").split("."))
                named = [module, *(module / alias.name for alias in node.names)]
            for imported in named:
                top = imported.parts[0] if imported.parts else ""
                # Of what is installed just the package itself: its neighbours are others' packages.
                others = _INSTALLED & set(root.parts) and top != place.parts[0]
                if top and top not in _VERSIONED and not others:
                    waiting += [(root, imported.with_suffix(".py")), (root, imported / "__init__.py")]
    return sources
