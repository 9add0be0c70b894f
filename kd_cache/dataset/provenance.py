"""What a teacher learnt from: the keys of its training and validation samples, kept in its checkpoint.

A teacher that saw a test file in training gives students soft labels that leak it, whatever files are scored. So a dump
and an audit compare what a teacher says of itself with the samples that the manifest permits (`guard`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_cache.keys import keys_of

_KEY = np.dtype("V16")


@dataclass(frozen=True, eq=False)
class Provenance:
    """The keys (MD5 of the manifest's path) of the samples that trained a teacher, and of those that validated it.

    Each ``[N, 16]`` u1, ascending, without repeats. ``complete`` is whether that is all: of a teacher that stands on
    another one which says nothing of itself, it is not.
    """

    trained: np.ndarray
    validated: np.ndarray
    complete: bool = True

    @classmethod
    def of(cls, trained: Iterable[str], validated: Iterable[str] = ()) -> Provenance:
        """Of manifest files."""
        return cls(_ascending(keys_of(trained)), _ascending(keys_of(validated)))

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
        return Provenance(
            trained,
            validated[~np.isin(_whole(validated), _whole(trained))],
            complete=self.complete and other.complete,
        )

    def has_trained(self, files: Iterable[str]) -> np.ndarray:
        """``[N]`` bool: which of these files trained."""
        found: np.ndarray = np.isin(_whole(keys_of(files)), _whole(self.trained))
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "trained": base64.b64encode(self.trained.tobytes()).decode("ascii"),
            "validated": base64.b64encode(self.validated.tobytes()).decode("ascii"),
            "complete": self.complete,
            "sha256": self.digest,
        }

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
        return found


def _whole(keys: np.ndarray) -> np.ndarray:
    """``[N, 16]`` u1 as ``[N]``, one element a key. numpy compares those as bytes."""
    return np.ascontiguousarray(keys).view(_KEY).reshape(-1)


def _ascending(keys: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.unique(_whole(keys)).view(np.uint8).reshape(-1, _KEY.itemsize)
    return found


def _decoded(text: object) -> np.ndarray:
    try:
        content = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError) as error:
        raise ValueError("its keys are not base64") from error
    if content is None or len(content) % _KEY.itemsize:
        raise ValueError("its keys are not 16 bytes each")
    return _ascending(np.frombuffer(content, np.uint8).reshape(-1, _KEY.itemsize))
