"""A teacher's samples under the names that a manifest gives them now.

A teacher keeps the keys of the samples that made it, and a key is the MD5 of a path as it was written then. Where the
manifest does not list a key, its sample is looked for by the digest of its feature, which the teacher may keep beside
it, and then by a user's rules for what was called otherwise. What is found nowhere keeps its key, and the guard refuses
it as a sample that the manifest does not list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd_cache.dataset.features import Feature, FeatureSource
from kd_cache.dataset.manifest import Manifest
from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import UsageError, shown
from kd_cache.files.atomic import store_errors
from kd_cache.keys import KeyFinder, keys_of, sorted_order

Rule = tuple[str, str]
_AT_ONCE = 64


def read_rules(texts: Iterable[str]) -> list[Rule]:
    """``old=new`` each, of whole paths or of folders (either may be empty), or a file of such lines (or with a tab).

    Raises `UsageError` for what is neither, `StoreError` for a file that cannot be read.
    """
    return [_rule(line, shown(text)) for text in texts for line in _lines(text)]


def _lines(text: str) -> list[str]:
    path = Path(text)
    if "=" in text:
        return [text]
    with store_errors(path, "read the rules in"):
        if not path.is_file():
            raise UsageError(
                f"--rename-map {shown(text)}: expected OLD=NEW, or a file of such lines; there is no such file"
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UsageError(f"--rename-map {shown(text)}: the file is not UTF-8: {error}") from error
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _rule(line: str, where: str) -> Rule:
    old, separator, new = line.partition("\t" if "\t" in line else "=")
    old, new = old.strip().rstrip("/"), new.strip().rstrip("/")
    if not separator or old == new:
        raise UsageError(f"--rename-map {where}: expected OLD=NEW, found {shown(line)}")
    return old, new


def old_names(file: str, rules: Sequence[Rule]) -> Iterator[str]:
    """What a file was called, by each rule that speaks of it or of a folder it is in."""
    for old, new in rules:
        if not new:
            yield f"{old}/{file}"
        elif file == new and old:
            yield old
        elif file.startswith(f"{new}/"):
            yield f"{old}{file[len(new) :]}".removeprefix("" if old else "/")


class Recognised(NamedTuple):
    """A provenance in the manifest's names, and how many samples were found by their feature and by a rule."""

    provenance: Provenance
    by_input: int
    by_rule: int


class Names:
    """Finds a manifest's rows by what a teacher keeps of its samples. Features are read once, and only if needed."""

    def __init__(
        self, manifest: Manifest, features: FeatureSource, rules: Sequence[Rule], permitted: KeyFinder
    ) -> None:
        self._manifest = manifest
        self._features, self._rules, self._permitted = features, rules, permitted

    @cached_property
    def _files(self) -> list[str]:
        return [row.file for row in self._manifest]

    @cached_property
    def _keys(self) -> np.ndarray:
        return keys_of(self._files)

    @cached_property
    def _finder(self) -> KeyFinder:
        return KeyFinder(self._keys[sorted_order(self._keys)])

    def recognised(self, made: Provenance, distrusted: np.ndarray | None = None) -> Recognised:
        """``distrusted`` ``[n, 16]`` u1 are keys that are another sample's by now, though the manifest lists them."""
        keys = made.keys
        doubted = distrusted is not None and len(distrusted) > 0
        if not doubted and (self._permitted.find(keys) >= 0).all():
            return Recognised(made, 0, 0)  # as nearly always: the manifest's other rows are not looked at
        unlisted = self._finder.find(keys) < 0
        if distrusted is not None and doubted:
            unlisted |= KeyFinder(distrusted[sorted_order(distrusted)]).find(keys) >= 0
        if not unlisted.any() or (made.inputs is None and not self._rules):
            return Recognised(made, 0, 0)
        counts = {"input": 0, "rule": 0}

        def names(keys: np.ndarray, inputs: np.ndarray) -> list[np.ndarray]:
            found = []
            for number, key in enumerate(keys):
                how, rows = self._rows(key, inputs[number]) if unlisted[number] else ("", [])
                if rows:
                    counts[how] += 1
                found.append(self._keys[rows] if rows else keys[number : number + 1])
            return found

        return Recognised(made.renamed(names), counts["input"], counts["rule"])

    def _rows(self, key: np.ndarray, digest: np.ndarray) -> tuple[str, list[int]]:
        rows = self._by_input.get(digest.tobytes(), []) if digest.any() else []
        return ("input", rows) if rows else ("rule", self._by_old_key.get(key.tobytes(), []))

    @cached_property
    def _by_input(self) -> Mapping[bytes, list[int]]:
        """The rows of every feature that can be read: what is held out may have a permitted row's bytes."""
        found: dict[bytes, list[int]] = {}
        for start in range(0, len(self._files), _AT_ONCE):
            for number, feature in enumerate(self._features.read_many(self._files[start : start + _AT_ONCE]), start):
                if isinstance(feature, Feature):
                    found.setdefault(feature.digest, []).append(number)
        return found

    @cached_property
    def _by_old_key(self) -> Mapping[bytes, list[int]]:
        found: dict[bytes, list[int]] = {}
        for number, file in enumerate(self._files):
            for key in keys_of(old_names(file, self._rules)):
                found.setdefault(key.tobytes(), []).append(number)
        return found
