"""Embeddings computed once and kept as rows of packs: the same engine, format and checks as for logits.

``kd-cache train extract`` writes them to ``<output_dir>/embeddings/A2<target>/``; a head trains on one source, or on
several side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import CheckpointError, StaleError, UsageError, shown
from kd_cache.score.teacher import teacher_fingerprint
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.store.cache import CacheFolder
from kd_cache.store.origin import weights_digest
from teachers.loading import LoadedTeacher, load_teacher
from teachers.two_parts import used_by_embed

FOLDER = "embeddings"


class EmbeddingTeacher(nn.Module):
    """A teacher's backbone as something that a dump can score with: ``[B, T, F]`` → embeddings ``[B, D]``."""

    value_kind = "embedding"

    def __init__(self, teacher: LoadedTeacher) -> None:
        super().__init__()
        self.net = teacher.backbone
        self.num_classes: int = teacher.backbone.embedding_dim
        self.provenance: Provenance | None = teacher.provenance
        self.source, self.checkpoint_sha256 = teacher.source, teacher.checkpoint_sha256
        self._parts = teacher.fingerprint_parts()

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.net.embed(x)
        return embedding

    def fingerprint_parts(self) -> dict[str, str]:
        architecture = self._parts["architecture"].partition("+")[0]
        weights = weights_digest(used_by_embed(self.net))
        return {**self._parts, "architecture": f"{architecture}+embedding", "weights": weights}


@dataclass(frozen=True)
class Source:
    """One extracted source: its name, the backbone it was made with, and the SHA-256 of that one's checkpoint."""

    name: str
    teacher: LoadedTeacher
    cache: LogitCache

    @classmethod
    def open(cls, folder: Path, name: str) -> Source:
        """Open a source that was extracted, and load its backbone.

        Raises:
            UsageError: there is no such source.
            StaleError: the checkpoint is not the one that it was made with.
            CheckpointError: the checkpoint is gone.
        """
        index = CacheFolder(folder).index(maps=False) if folder.is_dir() else None
        if index is None or name not in index.origins:
            found = ", ".join(index.origins) if index is not None else "none"
            raise UsageError(
                f"no embeddings are called {shown(name)} in {shown(folder)} (there: {found})",
                hint="Run kd-cache train extract first; it says what it calls them.",
            )
        checkpoint = index.record["teachers"][name].get("source", {}).get("checkpoint")
        if not checkpoint or not Path(checkpoint).is_file():
            raise CheckpointError(
                f"the checkpoint of the embeddings {shown(name)} is not there: {shown(checkpoint)}",
                hint="A teacher on these embeddings needs it. Put it back, or extract again.",
            )
        teacher, origin = load_teacher(checkpoint), index.origins[name]
        parts = origin.fingerprint.parts
        now = teacher_fingerprint(
            EmbeddingTeacher(teacher),
            precision=parts["precision"],
            dtype=origin.dtype,
            front_end=parts.get("front_end"),
        )
        if now.digest != origin.fingerprint.digest:
            raise StaleError(
                f"the embeddings {shown(name)} were made by another teacher than {shown(checkpoint)} is now "
                f"({origin.fingerprint.difference(now)})",
                hint="Run kd-cache train extract again.",
            )
        return cls(name, teacher, LogitCache.open(folder, [name], value_kind=EmbeddingTeacher.value_kind))

    def rows(self, files: Sequence[str], digests: np.ndarray) -> np.ndarray:
        """``[N, D]`` float32: the embeddings of these files.

        Args:
            digests: ``[N, 16]`` u1, of the features as they are now.

        Raises:
            MissingLogitsError: a file that was not extracted.
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
        return self.cache.batch(rows, torch.float32)[:, 0].numpy()


def source_name(teacher: LoadedTeacher) -> str:
    """What an extraction is called where nobody says: the architecture, and the start of the weights' digest."""
    return f"{teacher.architecture.replace('+', '_')}-{EmbeddingTeacher(teacher).fingerprint_parts()['weights'][:8]}"


def side_by_side(sources: Sequence[Source], files: Sequence[str], digests: np.ndarray) -> np.ndarray:
    """``[N, ΣD]`` float32: the embeddings of all sources, in their order. Raises as `Source.rows`."""
    return np.concatenate([source.rows(files, digests) for source in sources], axis=1)


def made_with(sources: Sequence[Source]) -> Provenance | None:
    """The provenance of all backbones together; ``None`` where none says anything."""
    told = [source.teacher.provenance for source in sources]
    if all(one is None for one in told):
        return None
    return reduce(Provenance.together, (one or Provenance.unknown() for one in told))


def described(sources: Sequence[Source]) -> list[Any]:
    """What the key of a training keeps of its sources, in their order."""
    return [[source.name, EmbeddingTeacher(source.teacher).fingerprint_parts()] for source in sources]
