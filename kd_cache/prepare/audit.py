"""Everything that is wrong with a manifest, at once and counted: no feature is read, and no teacher is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_cache.dataset.dataset import feature_source
from kd_cache.dataset.features import MAX_BYTES as MAX_FEATURE_BYTES
from kd_cache.dataset.guard import Look, look_through
from kd_cache.dataset.manifest import MAX_BYTES, Manifest, load_manifest
from kd_cache.dataset.task import Task
from kd_cache.dataset.task_file import DEFAULT
from kd_cache.errors import KDCacheError, ManifestError, MissingLogitsError, UsageError, listed


@dataclass(frozen=True)
class Audit:
    """What came of it: ``problems`` of one kind each, and the files that are missing, with the reason."""

    manifest: Manifest
    look: Look
    problems: list[KDCacheError]
    missing: dict[str, str]
    notes: list[str]


def audit(
    json_path: Path,
    data_root: Path | None = None,
    features: Path | None = None,
    *,
    target: str | None = None,
    task: Task = DEFAULT,
    num_scenes: int | None = None,
    num_cities: int | None = None,
    allow_shared_locations: bool = False,
    allow_outside: Sequence[Path] = (),
    max_manifest_bytes: int = MAX_BYTES,
    max_feature_bytes: int = MAX_FEATURE_BYTES,
) -> Audit:
    """Read a manifest, pass it through the guard, and look for its files. Arguments as for `Dataset.load`.

    Args:
        target: look only for the files that its cache needs; by default for all.

    Raises:
        ManifestError: the manifest is none at all. What is wrong with its rows is among the problems.
        UsageError, FeatureError: there is no such data root or file of features, or it is damaged.
    """
    faults: list[str] = []
    root = json_path.parent if data_root is None else data_root
    manifest = load_manifest(
        json_path,
        task=task,
        num_scenes=num_scenes,
        num_cities=num_cities,
        max_bytes=max_manifest_bytes,
        faults=faults,
    )
    look = look_through(manifest, allow_shared_locations=allow_shared_locations, data_root=root)
    source = feature_source(root, features, allow_outside, max_feature_bytes, anything=task.anything)
    devices = {manifest.task.source, target}
    wanted = [
        sample for sample in manifest if target is None or (sample.split == "train" and sample.device_id in devices)
    ]
    missing = source.missing([sample.file for sample in wanted])
    problems: list[KDCacheError] = []
    if faults:
        problems.append(ManifestError(f"{len(faults):,} rows cannot be read\n{listed(faults)}"))
    problems += look.violations
    if target is not None and not {sample.device_id for sample in wanted} >= devices:
        problems.append(UsageError(f"{manifest.task.source} or {target} has no train samples"))
    if missing:
        told = f"{len(missing):,} of {len(wanted):,} files are missing\n{listed(missing.values())}"
        problems.append(MissingLogitsError(told, hint="Check --data-root or --features."))
    return Audit(manifest, look, problems, missing, _unlabelled(manifest))


def _unlabelled(manifest: Manifest) -> list[str]:
    """Classes that no labelled train sample of the source has: nothing can learn them."""
    task = manifest.task
    source = [sample for sample in manifest if sample.split == "train" and sample.device_id == task.source]
    absent = {*range(len(task.scenes))} - {sample.scene_label for sample in source}
    if not source:
        of = f" of {task.source}" if task.has_domains else ""
        return [f"there is no train sample{of}: a dump needs some, in the split train, written exactly so"]
    names = ", ".join(task.scenes[label] for label in sorted(absent))
    return [f"no train sample of {task.source} is labelled {names}"] if absent else []
