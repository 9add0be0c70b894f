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

from torch import Tensor, nn

from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import CheckpointError, StaleError, UsageError, shown
from kd_cache.score.teacher import teacher_fingerprint
from kd_cache.store.origin import weights_digest
from kd_cache.train.embeddings import VALUE_KIND, Embeddings, extracted
from teachers.loading import LoadedTeacher, load_teacher
from teachers.two_parts import used_by_embed


class EmbeddingTeacher(nn.Module):
    """A teacher's backbone as something that a dump can score with: ``[B, T, F]`` → embeddings ``[B, D]``."""

    value_kind = VALUE_KIND

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
    """One extracted source, and the backbone it was made with."""

    rows: Embeddings
    teacher: LoadedTeacher

    @classmethod
    def open(cls, folder: Path, name: str) -> Source:
        """Open a source that was extracted, and load its backbone.

        Raises:
            UsageError: there is no such source, or it is of a user's own net.
            StaleError: the checkpoint is not the one that it was made with.
            CheckpointError: the checkpoint is gone.
        """
        index = extracted(folder, name)
        checkpoint = index.record["teachers"][name].get("source", {}).get("checkpoint")
        if not checkpoint:
            raise UsageError(
                f"the embeddings {shown(name)} are of a net of your own: there is no net that a teacher could stand on",
                hint="A ranker can (kd-cache train rank); a teacher stands on --checkpoint of kd-cache train extract.",
            )
        if not Path(checkpoint).is_file():
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
        return cls(Embeddings.open(folder, name), teacher)


def source_name(teacher: LoadedTeacher) -> str:
    """What an extraction is called where nobody says: the architecture, and the start of the weights' digest."""
    return f"{teacher.architecture.replace('+', '_')}-{EmbeddingTeacher(teacher).fingerprint_parts()['weights'][:8]}"


def made_with(sources: Sequence[Source]) -> Provenance | None:
    """The provenance of all backbones together; ``None`` where none says anything."""
    told = [source.teacher.provenance for source in sources]
    if all(one is None for one in told):
        return None
    return reduce(Provenance.together, (one or Provenance.unknown() for one in told))


def described(sources: Sequence[Source]) -> list[Any]:
    """What the key of a training keeps of its sources, in their order."""
    return [[source.rows.name, EmbeddingTeacher(source.teacher).fingerprint_parts()] for source in sources]
