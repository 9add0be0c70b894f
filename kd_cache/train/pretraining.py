"""Weights of city teachers that were trained before, under a key that covers everything they depend on.

    outputs/pretrained/<key>/
    ├── weights.safetensors
    └── entry.json            the key, its parts in words, the SHA-256 of the weights, and how good they were

An entry appears as a whole folder. It is used only where every part of the key is the same and its weights have the
SHA-256 that they were saved with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

import kd_cache
from kd_cache.errors import shown
from kd_cache.files.atomic import (
    TEMPORARY_NAME,
    make_directory,
    open_file,
    remove_folder,
    store_errors,
    sync_directory,
    temporary_name,
    write_atomic,
)
from kd_cache.store.origin import canonical_json

WEIGHTS, ENTRY = "weights.safetensors", "entry.json"
_OURS: Final = (WEIGHTS, ENTRY)
_KEY_SHOWN: Final = 32
_NAME: Final = re.compile(r"[0-9a-f]{32}\Z")
_OLD: Final = 3600


@cache
def code_version(further: tuple[Path, ...] = ()) -> str:
    """The version of kd-cache and a SHA-256 over the code that trains: of this package, and in ``further`` folders."""
    digest = hashlib.sha256()
    for root in (Path(__file__).parent, *further):
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{path.relative_to(root)}".encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{kd_cache.__version__}+{digest.hexdigest()[:16]}"


def key_of(parts: Mapping[str, Any] | list[Any]) -> str:
    """64 hex digits that change with any of the parts."""
    return hashlib.sha256(canonical_json(parts)).hexdigest()


@dataclass(frozen=True)
class Entry:
    """Cached weights. ``damage`` says why they cannot be used, if so."""

    path: Path
    parts: dict[str, Any]
    created: str
    measured: dict[str, Any]
    damage: str | None = None

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS


class Pretrained:
    """The entries in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, parts: Mapping[str, Any]) -> Entry | None:
        """The entry of this key, whole or damaged; ``None`` where there is none."""
        path = self._place(key_of(parts))
        return _read(path) if _is_folder(path) else None

    def nearest(self, parts: Mapping[str, Any]) -> list[str]:
        """In what the most similar entry differs; nothing where there is none. Nobody's weights are read for it."""
        parts = json.loads(canonical_json(parts))  # as entries have them: lists, not tuples
        told = [differing_parts(entry.parts, parts) for entry in self.entries(check=False) if entry.parts]
        return min(told, key=len, default=[])

    def entries(self, *, check: bool = True) -> list[Entry]:
        """All of them, the oldest first. ``check`` looks at their weights, too."""
        if not _is_folder(self.root):
            return []
        with store_errors(self.root, "look into"):
            folders = [path for path in self.root.iterdir() if path.is_dir() and _NAME.match(path.name)]
            found = [_read(path, check=check) for path in folders]
            return sorted(found, key=lambda entry: (entry.created, entry.path.name))

    def save(self, parts: Mapping[str, Any], weights: Path, measured: Mapping[str, Any]) -> None:
        """Keep a copy of ``weights`` in place of what was there. Raises `StoreError`."""
        with store_errors(weights, "read"):
            content = weights.read_bytes()
        key = key_of(parts)
        entry = {
            "key": key,
            "parts": parts,
            "sha256": hashlib.sha256(content).hexdigest(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "measured": dict(measured),
        }
        make_directory(self.root)
        with store_errors(self.root, "write into"):
            self._sweep()
            made = self.root / temporary_name()
            try:
                made.mkdir()
                write_atomic(made / WEIGHTS, content)
                write_atomic(made / ENTRY, json.dumps(entry, indent=1).encode())
                self._put_in_place(made, self._place(key))
            finally:
                _remove_made(made)

    def _sweep(self) -> None:
        """Remove what processes that were killed left behind more than an hour ago."""
        for path in self.root.iterdir():
            with suppress(OSError):  # it may be gone
                if TEMPORARY_NAME.match(path.name) and time.time() - path.stat().st_mtime > _OLD:
                    _remove_made(path)

    def _put_in_place(self, made: Path, path: Path) -> None:
        """At every moment the earlier entry is there or the new one, or, for the time of two renames, none.

        What else somebody put into the earlier one goes over into the new one.
        """
        aside = made.with_name(f"{made.name}-old")
        if _is_folder(path):
            for each in [each for each in path.iterdir() if each.name not in _OURS]:
                each.rename(made / each.name)
            os.utime(path)  # or another process would take it for a leftover
            path.rename(aside)
        try:
            made.rename(path)
        except BaseException:
            with suppress(FileNotFoundError):
                aside.rename(path)
            raise
        try:
            sync_directory(self.root)
        finally:
            _remove_made(aside)

    def remove(self, parts: Mapping[str, Any]) -> bool:
        """Remove the entry of this key, if there is one, and no other file. Raises `StoreError`."""
        path = self._place(key_of(parts))
        if not _is_folder(path):
            return False
        with store_errors(path, "remove"):
            remove_folder(path, _OURS)
        return True

    def _place(self, key: str) -> Path:
        return self.root / key[:_KEY_SHOWN]


def _remove_made(path: Path) -> None:
    """Remove a folder that an entry was made in, as far as kd-cache wrote what is in it."""
    with suppress(OSError):
        remove_folder(path, [name for name in os.listdir(path) if name in _OURS or TEMPORARY_NAME.match(name)])


def _is_folder(path: Path) -> bool:
    with store_errors(path, "look into"):
        return path.is_dir()


def _read(path: Path, *, check: bool = True) -> Entry:
    try:
        with open_file(path / ENTRY) as file:
            entry = json.loads(file.read())
        if not isinstance(entry["parts"], dict):
            raise ValueError("its parts are no settings by name")
        if entry["measured"] and not isinstance(entry["measured"].get("validation"), dict):
            raise ValueError("it does not say how good the weights are")
        found = Entry(path, entry["parts"], str(entry["created"]), dict(entry["measured"]))
        if key_of(found.parts) != entry["key"] or not entry["key"].startswith(path.name):
            return replace(found, damage="its key is not that of its parts")
        if check:
            with open_file(path / WEIGHTS) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return replace(found, damage="its weights are not the bytes that were saved")
        return found
    except OSError as error:
        return Entry(path, {}, "", {}, f"it cannot be read: {error.strerror or error}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Entry(path, {}, "", {}, f"{ENTRY} is damaged: {shown(error)}")


def differing_parts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of the parts in which two keys differ, with both values where they are short."""
    told = []
    for name in sorted({*one, *other}):
        mine, theirs = one.get(name), other.get(name)
        if mine == theirs:
            continue
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            told += [f"{name}.{inner}" for inner in differing_parts(mine, theirs)]
        else:
            values = f" {mine!r} → {theirs!r}"
            told.append(name + (values if len(values) < 80 else ""))
    return told
