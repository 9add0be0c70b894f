"""A student's data loader: features, the labels it may see, and the teachers' logits, for permitted samples only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kd_cache.dataset.dataset import feature_source
from kd_cache.dataset.features import MAX_BYTES, FeatureSource
from kd_cache.dataset.guard import refuse_outside, selected
from kd_cache.dataset.manifest import IGNORED, Manifest, Sample, load_manifest
from kd_cache.dataset.task import Task
from kd_cache.errors import StaleError, UsageError, shown
from kd_cache.serve.attach import CachedDataset, Gathered
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.serve.parcel import sent_batch
from kd_cache.serve.sample_columns import SampleColumns
from kd_cache.store.classes import misplaced

Transform = Callable[[torch.Tensor], torch.Tensor]


class FeatureDataset(Dataset[tuple[torch.Tensor, Sample]]):
    """``(features [T, F] float32, Sample)`` of manifest samples; integers as they are.

    With ``scored`` (``[N, teachers, 16]`` u1, and ``[N]`` bool saying where it counts) a feature that is not the one
    the teachers scored is a `StaleError`.
    """

    def __init__(
        self,
        source: FeatureSource,
        samples: Sequence[Sample],
        transform: Transform | None = None,
        scored: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self.source = source
        self.samples = SampleColumns(samples)
        self.transform = transform
        self.scored = scored

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, Sample]:
        sample = self.samples[number]
        feature = self.source.read(sample.file)
        if self.scored is not None and self.scored[1][number]:
            digests = self.scored[0][number].tobytes()
            if digests != feature.digest * (len(digests) // len(feature.digest)):
                raise _another(sample)
        array = feature.array
        features = torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else array.dtype))
        return (features if self.transform is None else self.transform(features)), sample


def _another(sample: Sample) -> StaleError:
    return StaleError(
        f"feature {shown(sample.file)} is not the one that the teachers scored",
        hint="Run kd-cache dump again. If your student's front end differs on purpose, pass check_features=False.",
    )


def collate_samples(items: list[tuple[torch.Tensor, Sample]], source: int = 0) -> dict[str, Any]:
    """The batch of `student_loader` without the logits. Shorter features are padded with zeros at their end.

    ``source`` is the number of the source domain.
    """
    features, samples = zip(*items, strict=True)
    domain = torch.tensor([sample.domain for sample in samples])
    source_mask = domain == source
    scene = torch.tensor([_label(sample.scene_label) for sample in samples])
    return {
        "features": torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True),
        "num_frames": torch.tensor([len(feature) for feature in features]),
        "scene_label": torch.where(source_mask, scene, IGNORED),
        "city_label": torch.tensor([_label(sample.city_label) for sample in samples]),
        "domain": domain,
        "device_id": [sample.device_id for sample in samples],
        "path": [sample.file for sample in samples],
        "source_mask": source_mask,
        "target_mask": ~source_mask,
    }


def _label(label: int | None) -> int:
    return IGNORED if label is None else label


@dataclass(frozen=True)
class _StudentCollate:
    data: CachedDataset

    def __call__(self, batch: Gathered | list[Any]) -> dict[str, Any]:
        base, logits = self.data.collate(batch)
        return sent_batch({**base, "teacher_logits": logits})


def student_loader(
    manifest: Manifest | str | Path,
    data_root: str | Path,
    cache: LogitCache | str | Path,
    batch_size: int,
    *,
    target: str | None = None,
    files: Iterable[str] | None = None,
    transform: Transform | None = None,
    shuffle: bool = True,
    num_workers: int = 0,
    allow_shared_locations: bool = False,
    allow_outside: Sequence[str | Path] = (),
    max_feature_bytes: int = MAX_BYTES,
    features: str | Path | None = None,
    dtype: torch.dtype | None = torch.float32,
    check_features: bool = True,
    **loader_options: Any,
) -> DataLoader[dict[str, Any]]:
    """A DataLoader over the permitted train samples of A and the target, with the teachers' logits.

    Args:
        manifest: a loaded manifest or its path; the guard of the dump stands here too.
        data_root: the features' folder.
        cache: an opened cache or its path.
        batch_size: B.
        target: the target device; by default the cache's.
        files: train on these only; each must be permitted.
        transform: applied to each feature ``[T, F]`` float32, in the worker.
        allow_shared_locations, allow_outside, max_feature_bytes, features: as for the dump.
        dtype: of the logits; ``None`` keeps the stored one.
        check_features: refuse a feature that is not the one the teachers scored. Turn it off where the student's
            front end differs from the teachers'.
        loader_options: passed to ``torch.utils.data.DataLoader`` (``pin_memory``, ``drop_last``, ``generator``, …).

    Yields dicts: ``features`` [B, T, F] float32 (padded to the longest of the batch), ``num_frames`` [B],
    ``scene_label`` [B] int64 (−100 for every target sample: the protocol forbids its label), ``city_label`` [B],
    ``domain`` [B], ``device_id`` and ``path`` (lists of B), ``teacher_logits`` [B, teachers, C], ``source_mask`` and
    ``target_mask`` [B] bool.

    Raises:
        DataLeakageError: the manifest leaks, or ``files`` names a sample that is not permitted.
        MissingLogitsError: the cache lacks a sample.
        UsageError: a teacher names the task's classes in another order than the labels have.
        StaleError: while iterating, a feature changed since the dump.
    """
    cache = cache if isinstance(cache, LogitCache) else LogitCache.open(cache)
    if not isinstance(manifest, Manifest):
        counts = cache.label_counts
        sizes = counts.get("num_scenes"), counts.get("num_cities")
        manifest = load_manifest(manifest, task=cache.task, num_scenes=sizes[0], num_cities=sizes[1])
    target = _target(cache, target, manifest.task)
    root = Path(data_root).expanduser()
    task = manifest.task
    selection = selected(manifest, target, allow_shared_locations=allow_shared_locations, data_root=root)
    samples: Sequence[Sample] = selection.samples
    if files is not None:
        wanted = list(files)
        refuse_outside(selection, wanted)
        by_file = {sample.file: sample for sample in samples}
        samples = [by_file[file] for file in wanted]
    refuse_misplaced(cache, task)
    for warning in cache.doubts(task.cities):
        warnings.warn(warning, stacklevel=2)
    scored = _scored(cache, samples) if check_features else None
    packed = None if features is None else Path(features).expanduser()
    source = feature_source(root, packed, [*map(Path, allow_outside)], max_feature_bytes, manifest.bins, task.anything)
    base = FeatureDataset(source, samples, transform, scored)
    collate = partial(collate_samples, source=task.domain_of[task.source])
    data = cache.attach(base, [sample.file for sample in samples], dtype=dtype, collate=collate)
    return DataLoader(
        data,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        collate_fn=_StudentCollate(data),
        **loader_options,
    )


def refuse_misplaced(cache: LogitCache, task: Task) -> None:
    """Raise `UsageError` where a teacher names the task's classes in another order than the labels have."""
    for name, names in cache.class_names.items():
        if (why := misplaced(names, task.scenes, task.cities)) is not None:
            raise UsageError(f"{name}: {why}", hint="Its logits and the labels would not speak of the same classes.")


def _scored(cache: LogitCache, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray] | None:
    """The input digests of these samples' rows, and where there is a row (``on_miss="nan"`` allows for none)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attach resolves the same files, warns and counts
        misses = cache.misses
        rows = cache.rows([sample.file for sample in samples])
        cache.misses = misses
    present = (rows >= 0).numpy()
    digests = cache.input_digests(rows.clamp(min=0)) if present.any() else None
    return None if digests is None else (digests, present)


def _target(cache: LogitCache, target: str | None, task: Task) -> str:
    if target is None and cache.target is None:
        raise UsageError(f"the folder name of {shown(cache.path)} does not say its target; pass target=…")
    if target is not None and cache.target is not None and target != cache.target:
        made_for = f"{task.source} → {cache.target}"
        raise UsageError(f"the cache {shown(cache.path)} is for {made_for}, not for target {shown(target)}")
    return target or str(cache.target)
