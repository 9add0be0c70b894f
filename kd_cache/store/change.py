"""What is to become current, and what publishing it did: what dump, seal, repair, adopt and merge hand to `publish`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kd_cache.store.origin import Origin
from kd_cache.store.permitted import Permitted

ANOTHER_MANIFEST = "Did another dump run here with another manifest? Run the same command again."


class Keyed(Protocol):
    """Permitted samples, in the order of their keys; ``listed`` are their files in the manifest's order."""

    @property
    def listed(self) -> Sequence[str]: ...
    @property
    def by_key(self) -> Sequence[str]: ...
    @property
    def keys(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Wanted:
    """The rows a cache is to hold: all permitted samples, in the order of their keys.

    Attributes:
        files: their manifest paths; ``listed`` are the same in the manifest's order, in which the index lists them.
        keys, inputs: ``[N, 16]`` u1: their keys, ascending, and the digests of their features as they are now.
        known: ``[N]`` bool: where it is False the feature could not be read just now, and the sample keeps its row.
        permitted: their keys and labels.
    """

    files: Sequence[str]
    listed: Sequence[str]
    keys: np.ndarray
    inputs: np.ndarray
    known: np.ndarray
    permitted: Permitted

    @classmethod
    def of(cls, samples: Keyed, inputs: np.ndarray, known: np.ndarray) -> Wanted:
        """All of these samples; ``inputs`` and ``known`` in the order of their keys."""
        permitted = Permitted.of(samples.keys, samples.labels)
        return cls(samples.by_key, samples.listed, samples.keys, inputs, known, permitted)


@dataclass(frozen=True)
class Change:
    """What is to become current.

    Attributes:
        shown_path: the cache's path as the user wrote it; the index's paths start with it.
        wanted: the rows to keep; every other row goes.
        origins: the teachers whose every row must be there, but for the ``missing`` files.
        record: what the index is to say of the run and its data; what is a result of publishing is left out of it.
        files: whether the cache has a view.
        others: further teachers that the cache held, where no index says so.
        entries: further content of the teachers' entries; ``begun`` where the record's is not a teacher's own.
        missing: files that could not be scored, with the reason.
        standing: by teacher the packs, by name, that stand for those that the index names: what was right in them.
        replaced: packs whose rows must not be used although they look fresh (they were scored again).
        keep_damaged: leave damaged packs where they are.
        trained: by teacher the keys of the samples that trained it, where it says so.
        min_accuracy: the least that each of ``origins`` must reach.
        pack_bytes: what a pack is not expected to exceed; ``None``: as the index says.
        hint: what to do where rows are missing.
    """

    shown_path: str
    wanted: Wanted
    origins: Mapping[str, Origin]
    record: Mapping[str, Any]
    files: bool
    others: Mapping[str, Origin] = field(default_factory=dict)
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    standing: Mapping[str, Collection[str]] = field(default_factory=dict)
    replaced: Sequence[Path] = ()
    keep_damaged: bool = False
    trained: Mapping[str, np.ndarray] = field(default_factory=dict)
    min_accuracy: float | None = None
    pack_bytes: int | None = None
    hint: str = ANOTHER_MANIFEST


@dataclass
class Published:
    """What publishing did; ``rows``, ``left_out``, ``unread`` (kept, though nobody could read their features now),
    ``packs``, ``accuracy`` and ``held_out`` by teacher. ``missing``: the change's, as far as some teacher lacks a row
    of the file.
    """

    rows: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    num_samples: int = 0
    pack_bytes: int = 0
    view_written: int = 0
    view_removed: int = 0
    packs: dict[str, list[str]] = field(default_factory=dict)
    accuracy: dict[str, dict[str, int]] = field(default_factory=dict)
    held_out: dict[str, dict[str, int]] = field(default_factory=dict)
