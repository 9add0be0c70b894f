"""Embeddings that were computed once and kept as rows of packs, as what a net learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import CheckpointError, MissingLogitsError, StaleError, UsageError, shown
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import Index
from kd_cache.train.checkpoint import read_weights

FOLDER: Final = "embeddings"
"""Below the output folder; ``kd-cache train extract`` writes there."""
VALUE_KIND: Final = "embedding"


def extracted(folder: Path, name: str) -> Index:
    """The index of the sources in ``folder``, which has one of this name. Raises `UsageError`."""
    index = CacheFolder(folder).index(maps=False) if folder.is_dir() else None
    if index is None or name not in index.origins:
        found = ", ".join(index.origins) if index is not None else "none"
        raise UsageError(
            f"no embeddings are called {shown(name)} in {shown(folder)} (there: {found})",
            hint="Run kd-cache train extract first; it says what it calls them.",
        )
    return index


@dataclass(frozen=True)
class Embeddings:
    """The rows of one source that was extracted, and where its entry says that it is from."""

    name: str
    cache: LogitCache
    made_by: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, name: str) -> Embeddings:
        """Open a source that was extracted. Raises `UsageError` where there is none of this name."""
        made_by = extracted(folder, name).record["teachers"][name].get("source", {})
        return cls(name, LogitCache.open(folder, [name], value_kind=VALUE_KIND), made_by)

    @property
    def described(self) -> list[Any]:
        """Its name, the fingerprint of what made it, and its width."""
        return [self.name, self.cache.fingerprints[self.name], self.cache.num_classes]

    @property
    def provenance(self) -> Provenance | None:
        """What the checkpoint that it was made with says of its samples, if it is still there, and the same."""
        path = self.made_by.get("checkpoint")
        try:
            weights = read_weights(path) if path else None
        except CheckpointError:
            return None
        same = weights is not None and weights.sha256 == self.made_by.get("checkpoint_sha256")
        return weights.provenance if weights is not None and same else None

    def rows(self, files: Sequence[str], digests: np.ndarray) -> np.ndarray:
        """``[N, D]`` float32: the embeddings of these files.

        Args:
            digests: ``[N, 16]`` u1, of the features as they are now.

        Raises:
            MissingLogitsError: files that were not extracted.
            StaleError: a feature that changed since.
        """
        rows = self.cache.rows(files)
        then = self.cache.input_digests(rows)
        changed = [] if then is None else np.flatnonzero((then[:, 0] != digests).any(axis=1)).tolist()
        if changed:
            raise StaleError(
                f"{len(changed)} features changed since the embeddings {shown(self.name)} were extracted, for example "
                f"{shown(files[changed[0]])}",
                hint="Run kd-cache train extract again.",
            )
        found: np.ndarray = self.cache.batch(rows, torch.float32)[:, 0].numpy()
        return found


def side_by_side(sources: Sequence[Embeddings], files: Sequence[str], digests: np.ndarray) -> np.ndarray:
    """``[N, ΣD]`` float32: the embeddings of all sources, in their order, joined by key.

    Raises as `Embeddings.rows`; what is missing is said of all sources at once.
    """
    lacking = []
    for source in sources:
        try:
            source.cache.rows(files)
        except MissingLogitsError as error:
            lacking.append(f"embeddings {shown(source.name)}: {error.message}")
    if lacking:
        raise MissingLogitsError("\n".join(lacking), hint="Run kd-cache train extract again.")
    return np.concatenate([source.rows(files, digests) for source in sources], axis=1)
