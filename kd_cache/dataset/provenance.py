"""What a teacher learnt from: the keys of its training and validation samples, kept in its checkpoint.

A teacher that saw a test file in training gives students soft labels that leak it, whatever files are scored. So a dump
and an audit compare what a teacher says of itself with the samples that the manifest permits (`guard`). Beside the keys
it may keep the digests of the features, by which a sample is known again under another name (`renames`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kd_cache.keys import KeyFinder, keys_of

_KEY = np.dtype("V16")


@dataclass(frozen=True, eq=False)
class Provenance:
    """The keys (MD5 of the manifest's path) of the samples that trained a teacher, and of those that validated it.

    Each ``[N, 16]`` u1, ascending, without repeats. ``complete`` is whether that is all: of a teacher that stands on
    another one which says nothing of itself, it is not. ``inputs`` are the digests of the features that were learnt
    from, one for each of ``keys``, zeros where it is not known; ``None`` where none is.
    """

    trained: np.ndarray
    validated: np.ndarray
    complete: bool = True
    inputs: np.ndarray | None = None

    @classmethod
    def of(cls, trained: Iterable[str], validated: Iterable[str] = (), inputs: np.ndarray | None = None) -> Provenance:
        """Of manifest files; ``inputs`` ``[n, 16]`` u1 are their features' digests, first those that trained."""
        one, other = keys_of(trained), keys_of(validated)
        made = cls(_ascending(one), _ascending(other))
        return made if inputs is None else made.with_inputs(np.concatenate([one, other]), inputs)

    @classmethod
    def unknown(cls) -> Provenance:
        """Of a part that says nothing of itself."""
        return cls(_ascending(keys_of([])), _ascending(keys_of([])), complete=False)

    @property
    def digest(self) -> str:
        """SHA-256 over all of it, as 64 hex digits."""
        count = len(self.trained).to_bytes(8, "little")
        rest = b"" if self.complete else b"and more"
        return hashlib.sha256(count + self.trained.tobytes() + self.validated.tobytes() + rest).hexdigest()

    @property
    def keys(self) -> np.ndarray:
        """``[N, 16]`` u1: all of them, ascending."""
        return _ascending(np.concatenate([self.trained, self.validated]))

    def together(self, other: Provenance) -> Provenance:
        """Of a teacher that is made of two. A sample that trained either counts as training."""
        trained = _ascending(np.concatenate([self.trained, other.trained]))
        validated = _ascending(np.concatenate([self.validated, other.validated]))
        both = Provenance(
            trained,
            validated[~np.isin(_whole(validated), _whole(trained))],
            complete=self.complete and other.complete,
        )
        told = [(each.keys, each.inputs) for each in (self, other) if each.inputs is not None]
        return both.with_inputs(*map(np.concatenate, zip(*told, strict=True))) if told else both

    def with_inputs(self, keys: np.ndarray, inputs: np.ndarray) -> Provenance:
        """The same with the digests ``[n, 16]`` of some keys' features; of two for one key the first that is told."""
        told = inputs.any(axis=1)
        ordered, first = np.unique(_whole(keys[told]), return_index=True)
        at = KeyFinder(ordered.view(np.uint8).reshape(-1, _KEY.itemsize)).find(self.keys)
        found = np.zeros((len(at), _KEY.itemsize), np.uint8)
        found[at >= 0] = inputs[told][first[at[at >= 0]]]
        return replace(self, inputs=found if found.any() else None)

    def renamed(self, names: Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]]) -> Provenance:
        """The same samples under other keys: ``names(keys, inputs)`` gives those of each, ``[n, 16]`` u1."""
        keys = self.keys
        inputs = np.zeros_like(keys) if self.inputs is None else self.inputs
        called = names(keys, inputs)
        trained = KeyFinder(self.trained).find(keys) >= 0
        sides = [_joined([called[at] for at in np.flatnonzero(side).tolist()]) for side in (trained, ~trained)]
        made = Provenance(_ascending(sides[0]), _ascending(sides[1]), self.complete)
        return made.with_inputs(_joined(called), np.repeat(inputs, [len(each) for each in called], axis=0))

    def has_trained(self, files: Iterable[str]) -> np.ndarray:
        """``[N]`` bool: which of these files trained."""
        found: np.ndarray = np.isin(_whole(keys_of(files)), _whole(self.trained))
        return found

    def as_json(self) -> dict[str, Any]:
        content = {
            "trained": base64.b64encode(self.trained.tobytes()).decode("ascii"),
            "validated": base64.b64encode(self.validated.tobytes()).decode("ascii"),
            "complete": self.complete,
            "sha256": self.digest,
        }
        if self.inputs is None:
            return content
        told = base64.b64encode(self.inputs.tobytes()).decode("ascii")
        return {**content, "inputs": told, "inputs_sha256": self._inputs_digest(self.inputs)}

    def _inputs_digest(self, inputs: np.ndarray) -> str:
        return hashlib.sha256(self.digest.encode() + inputs.tobytes()).hexdigest()

    @classmethod
    def from_json(cls, content: object) -> Provenance:
        """As `as_json` gave it. Raises ``ValueError`` for anything else."""
        if not isinstance(content, Mapping):
            raise ValueError("expected an object")
        complete = content.get("complete", True)
        if not isinstance(complete, bool):
            raise ValueError("complete is neither true nor false")
        found = cls(_decoded(content.get("trained")), _decoded(content.get("validated")), complete)
        if found.digest != content.get("sha256"):
            raise ValueError("its digest is not that of its keys")
        if content.get("inputs") is None:
            return found
        inputs = _items(content["inputs"])
        if len(inputs) != len(found.keys) or found._inputs_digest(inputs) != content.get("inputs_sha256"):
            raise ValueError("its inputs are not those of its keys")
        return replace(found, inputs=inputs)


def without_inputs(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `Provenance.as_json` gave, without the features' digests: half as long."""
    return {name: value for name, value in content.items() if not name.startswith("inputs")}


def _whole(keys: np.ndarray) -> np.ndarray:
    """``[N, 16]`` u1 as ``[N]``, one element a key. numpy compares those as bytes."""
    return np.ascontiguousarray(keys).view(_KEY).reshape(-1)


def _ascending(keys: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.unique(_whole(keys)).view(np.uint8).reshape(-1, _KEY.itemsize)
    return found


def _joined(keys: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros((0, _KEY.itemsize), np.uint8), *keys])


def _decoded(text: object) -> np.ndarray:
    return _ascending(_items(text))


def _items(text: object) -> np.ndarray:
    try:
        content = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError) as error:
        raise ValueError("its keys are not base64") from error
    if content is None or len(content) % _KEY.itemsize:
        raise ValueError("its keys are not 16 bytes each")
    return np.frombuffer(content, np.uint8).reshape(-1, _KEY.itemsize)
