"""Code that a person names: ``module:factory``, ``path/to/file.py:factory``, or a name that a package registered.

A file is loaded by its path, so it is found whatever its folder is called, and whatever else has that name. It lives
in a private package of its own: files beside it are imported as ``from .other import …``, and can neither hide an
installed module nor be mistaken for another folder's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd_cache.errors import KDCacheError, UsageError, shown
from kd_cache.options import home_path
from kd_cache.watch import Stopped

ENTRY_POINTS = "kd_cache.teachers"
PRIVATE = "_kd_cache_file_"
"""Packages of files that were loaded by their path start with this."""


def resolve_factory(name: str) -> Callable[..., Any]:
    """The factory called ``name``; one without a colon is an entry point of `ENTRY_POINTS`. Raises `UsageError`."""
    where, colon, attribute = name.rpartition(":")
    if not colon:
        return _callable(name, _registered(name).load)
    if is_file(where):
        return _callable(name, lambda: _in_file(Path(where), attribute))
    return _callable(name, lambda: _import(name))


def is_file(where: str) -> bool:
    """Whether what stands before the colon is a file's path, and no module's name."""
    return where.endswith(".py") or "/" in where


def without_folder(name: str) -> str:
    """``file.py:factory`` of ``path/to/file.py:factory``; other names as they are. Keys must not depend on a path."""
    where, colon, attribute = name.rpartition(":")
    return f"{Path(where).name}:{attribute}" if colon and is_file(where) else name


def absolute_factory(name: str) -> str:
    """The same factory, found from any folder: a file's path is made absolute."""
    where, colon, attribute = name.rpartition(":")
    return f"{home_path(where).absolute()}:{attribute}" if colon and is_file(where) else name


def load_file(path: Path) -> types.ModuleType:
    """The module in a file, run once per process.

    Raises:
        UsageError: there is no such file.
        Exception: whatever the file raises.
    """
    path = home_path(path).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(
            f"cannot import {shown(path)}: it is no Python file",
            hint="Name one that is there: path/to/file.py:factory.",
        )
    package = PRIVATE + hashlib.sha256(str(path.parent).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    name = f"{package}.{path.stem.replace('.', '%2e')}"
    if name in sys.modules:
        return sys.modules[name]
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(path.parent)]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018 (a .py file always has a loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def users_code(as_error: Callable[[str], KDCacheError]) -> Iterator[None]:
    """Run a user's code: whatever it raises is an error of ours, ``sys.exit(0)`` too; errors of ours stay as they are.

    Ctrl-C and the end that a signal asks for are nobody's error. ``as_error`` is given the kind and the text.
    """
    try:
        yield
    except (KDCacheError, KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:
        raise as_error(f"{type(error).__name__}: {shown(error)}") from error


def _in_file(path: Path, attribute: str) -> Any:
    found: Any = load_file(path)
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise UsageError(f"{shown(path)} has no {shown(attribute) or 'factory after the colon'}")
        found = getattr(found, name)
    return found


def _registered(name: str) -> importlib.metadata.EntryPoint:
    known = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name not in known.names:
        raise UsageError(
            f"no teacher is registered as {shown(name)!r} (known: {', '.join(sorted(known.names)) or 'none'})",
            hint="Name its factory: --teacher NAME=module:factory, or NAME=path/to/file.py:factory.",
        )
    return known[name]


def _import(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except ModuleNotFoundError:
        if "" in sys.path:
            raise
        sys.path.append("")  # a user's module lies in the folder where the command runs
        return pkgutil.resolve_name(name)


def _callable(name: str, load: Callable[[], Any]) -> Callable[..., Any]:
    with users_code(lambda why: UsageError(f"cannot import {shown(name)}: {why}")):
        factory = load()
    if not callable(factory):
        raise UsageError(
            f"{shown(name)} is not callable; expected factory(ckpt) for a teacher, factory(num_classes) for a net"
        )
    return factory  # type: ignore[no-any-return]
