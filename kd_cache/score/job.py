"""The settings of a dump, and its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.views import Augmented, Policy
from kd_cache.score.storage_cost import StorageCost
from kd_cache.score.teacher import Teacher, teacher_origin
from kd_cache.store.cache import CacheFolder
from kd_cache.store.origin import Origin
from kd_cache.store.publish import Published
from kd_cache.store.snapshot import Snapshot

if TYPE_CHECKING:
    import torch

NEW = "new"
"""Why a sample is scored that has no row yet."""
DEFAULT_BATCH = {"cpu": 32, "cuda": 256}


@dataclass(frozen=True)
class DumpJob:
    """Everything a dump needs to know.

    Attributes:
        cache_root: as the user wrote it; the cache is the folder in it that is called as the adaptation.
        data: what is scored.
        teachers: by name, in the order of the index.
        notes: further content of a teacher's index entry (its checkpoint, for example).
        batch_size: the most samples scored at once; ``None`` chooses by device, ``auto`` by measuring.
        check_cached: score a few rows again that are there, of teachers whose code is not built in (`cached_rows`).
        reread: read every feature, also where nobody touched its file since a dump read it.
        compiled: run the teachers through ``torch.compile``.
        shard_size, shard_seconds: finished rows are committed after so many samples or seconds.
        workers: threads that read features ahead; 0 reads in place.
        files: whether the cache has a view; ``None`` writes one below `VIEW_BELOW` samples, and where there is one.
        on_bad_sample: ``stop`` at a sample that cannot be scored, or ``skip`` it and list it as missing.
        policy, views: how inputs are augmented, and into how many views, the clean one included; ``None`` and 0: not.
        view: score this one alone (`of_view`).
        part: ``(i, n)`` scores part i of n (0 ≤ i < n), commits it, and leaves view and index to a seal.
        planned: the files of all samples that batches are planned for, where those are more than this cache's.
        min_accuracy: with a lower share of labelled source rows that a teacher names rightly nothing becomes current.
        record: what the index keeps about the run (settings, policy, tool version).
    """

    cache_root: Path
    data: Dataset
    teachers: Mapping[str, Teacher]
    device: torch.device
    dtype: str = "fp32"
    precision: str = "fp32"
    batch_size: int | Literal["auto"] | None = None
    compiled: bool = False
    check_cached: bool = True
    reread: bool = False
    skip_existing: bool = True
    files: bool | None = None
    on_bad_sample: str = "stop"
    workers: int = 2
    seed: int = 42
    shard_size: int = 4096
    shard_seconds: float = 5.0
    policy: Policy | None = None
    views: int = 0
    view: int | None = None
    part: tuple[int, int] | None = None
    planned: Sequence[str] = ()
    min_accuracy: float | None = None
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> CacheFolder:
        return CacheFolder(self.cache_root / self.data.adaptation)

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """What this job's rows are made by. Computed once: digesting large weights takes a while."""
        return {
            name: teacher_origin(
                name,
                teacher,
                precision=self.precision,
                dtype=self.dtype,
                front_end=self.data.manifest.front_end_text,
                policy=None if self.policy is None else self.policy.text,
                views=self.views,
            )
            for name, teacher in self.teachers.items()
        }

    @property
    def by_view(self) -> list[DumpJob]:
        """A job for each view: of augmented features, and rows that hold that view. Itself, where there are none."""
        return [self] if self.policy is None else [self._of_view(self.policy, view) for view in range(self.views)]

    def _of_view(self, policy: Policy, view: int) -> DumpJob:
        source: Any = Augmented(self.data.features, policy, view)
        job = replace(self, view=view, data=replace(self.data, features=source))
        job.__dict__["origins"] = {name: origin.of_views((view,)) for name, origin in self.origins.items()}
        return job


@dataclass
class TeacherReport:
    """Samples of one teacher by what became of them; ``rescored`` by reason.

    ``cost`` is what storing in half precision cost, ``precision_cost`` what computing below fp32 did, on a sample.
    """

    scored: int = 0
    skipped: int = 0
    rescored: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    cost: StorageCost | None = None
    precision_cost: StorageCost | None = None

    def count(self, state: str) -> None:
        """One more sample was scored, because it was new or for the reason given."""
        if state == NEW:
            self.scored += 1
        else:
            self.rescored[state] += 1

    def as_json(self) -> dict[str, Any]:
        return {
            "scored": self.scored,
            "skipped": self.skipped,
            "rescored": dict(self.rescored),
            "dropped": self.dropped,
            "storage_cost": None if self.cost is None else self.cost.as_json(),
            "precision_cost": None if self.precision_cost is None else self.precision_cost.as_json(),
        }


@dataclass
class DumpReport:
    """What a dump did, or with ``dry_run`` would do. ``missing`` maps files that could not be scored to the reason.

    ``part_size`` is the number of samples in this process's part, all of them where the work was not split. ``busy``
    maps each stage to the part of the time that it worked. ``halved_to`` is the number of rows scored at once after
    memory ran out, ``None`` where it did not. ``snapshot`` is the cache as the dump left it, for who reads on.
    ``replaced`` says of each teacher whose rows were others' before how those differ (``dtype: fp32 → fp16``).
    """

    cache: Path
    permitted: int
    part_size: int
    per_device: dict[str, int]
    teachers: dict[str, TeacherReport]
    missing: dict[str, str] = field(default_factory=dict)
    samples_scored: int = 0
    seconds: float = 0.0
    bytes_planned: int = 0
    published: Published | None = None
    busy: dict[str, float] = field(default_factory=dict)
    halved_to: int | None = None
    snapshot: Snapshot | None = None
    replaced: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Samples scored per second, whatever the number of teachers."""
        return self.samples_scored / self.seconds if self.seconds else 0.0
