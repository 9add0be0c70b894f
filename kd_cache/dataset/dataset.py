"""A data set that passed the guard: its manifest, the permitted samples, and where their features are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kd_cache.dataset.features import MAX_BYTES as MAX_FEATURE_BYTES
from kd_cache.dataset.features import AbsentFeatures, FeatureSource
from kd_cache.dataset.guard import Selection, select, selected
from kd_cache.dataset.manifest import MAX_BYTES as MAX_MANIFEST_BYTES
from kd_cache.dataset.manifest import Manifest, load_manifest
from kd_cache.dataset.packed import PackedFeatures
from kd_cache.dataset.provenance import Provenance
from kd_cache.dataset.renames import Names, Rule, read_rules
from kd_cache.dataset.task import DCASE, Task
from kd_cache.dataset.task_file import as_record
from kd_cache.errors import FeatureError, shown
from kd_cache.watch import Watcher


@dataclass(frozen=True)
class Dataset:
    """What every job is given.

    Attributes:
        manifest: all samples.
        selection: the permitted ones, for one target.
        features: reads what the teachers are given.
        paths: where all of it lies, by the names of the options, absolute: later commands find it there.
        rules: what was called otherwise when the teachers were made (`renames`).
        unguarded: the task has groups, and nobody knows which of them are held out.
    """

    manifest: Manifest
    selection: Selection
    features: FeatureSource
    paths: Mapping[str, Any] = field(default_factory=dict)
    rules: Sequence[Rule] = ()
    unguarded: bool = False

    @classmethod
    def load(
        cls,
        target: str | None,
        json_path: Path,
        data_root: Path | None = None,
        features: Path | None = None,
        *,
        task: Task = DCASE,
        num_scenes: int | None = None,
        num_cities: int | None = None,
        allow_shared_locations: bool = False,
        allow_outside: Sequence[Path] = (),
        rename_map: Sequence[str] = (),
        max_manifest_bytes: int = MAX_MANIFEST_BYTES,
        max_feature_bytes: int = MAX_FEATURE_BYTES,
        absent: bool = False,
    ) -> Dataset:
        """Read a manifest and pass it through the guard, before anything else is touched.

        Args:
            target: the target device; the task's source selects its samples alone. ``None`` where there are none.
            json_path: the manifest.
            data_root: the folder its files are relative to; by default the manifest's own.
            features: one HDF5 file that holds all features; the data root then only says how the manifest's paths are
                meant.
            absent: the features are not at hand, and are not asked for.
            rename_map: rules, or files of them, for samples that had other paths when the teachers were made.

        Raises what `load_manifest`, `select`, `FeatureSource`, `PackedFeatures` and `read_rules` raise.
        """
        target = target if target == task.source else ",".join(task.several(target))
        root = json_path.parent if data_root is None else data_root
        manifest = load_manifest(
            json_path, task=task, num_scenes=num_scenes, num_cities=num_cities, max_bytes=max_manifest_bytes
        )
        allowed: dict[str, Any] = {"allow_shared_locations": allow_shared_locations, "data_root": root}
        selection = selected(manifest, target, **allowed)
        paths: dict[str, Any] = {
            "json_path": str(json_path.absolute()),
            "data_root": str(root.absolute()),
            "allow_outside": [str(path.absolute()) for path in allow_outside],
        }
        if features is not None:
            paths["features"] = str(features.absolute())
        if rename_map:
            paths["rename_map"] = [text if "=" in text else str(Path(text).absolute()) for text in rename_map]
        source = (
            AbsentFeatures(features or root)
            if absent
            else feature_source(root, features, allow_outside, max_feature_bytes, manifest.bins, task.anything)
        )
        return cls(manifest, selection, source, paths, read_rules(rename_map))

    def for_target(self, target: str, *, allow_shared_locations: bool = False) -> Dataset:
        """The same data for another target. Raises as `select`."""
        chosen = select(self.manifest, target, allow_shared_locations=allow_shared_locations, data_root=self.root)
        return replace(self, selection=chosen)

    @property
    def task(self) -> Task:
        return self.manifest.task

    @property
    def target(self) -> str:
        return self.selection.target

    @property
    def root(self) -> Path | None:
        """The folder that the manifest's files are relative to; ``None`` where it was not loaded from one."""
        return Path(self.paths["data_root"]) if "data_root" in self.paths else None

    @property
    def adaptation(self) -> str:
        """What the cache of this selection is called; what is made of several caches ``A2b+c``."""
        return self.task.adaptation(self.target.replace(",", "+"))

    @cached_property
    def names(self) -> Names:
        """Finds samples that teachers know under other names."""
        return Names(self.manifest, self.features, self.rules, self.selection.finder)

    @property
    def described(self) -> dict[str, Any]:
        """What an index says of the data it was made from; and a pending record, where their features are."""
        selection = self.selection
        return {
            "adaptation": self.adaptation,
            "num_permitted": len(selection.samples),
            "per_device": selection.per_device,
            "manifest": {"path": str(self.manifest.path or self.features.told), "sha256": self.manifest.digest},
            "features_at": self.features.place,
            **as_record(self.task),
            **({"unguarded": True} if self.unguarded else {}),
            "split_policy": {
                "selected": [*dict.fromkeys([self.task.source, selection.target])],
                "split": "train",
                "locations_known": [selection.located, selection.locatable],
                "shared_locations": len(selection.shared_locations),
            },
        }


def feature_source(
    root: Path,
    features: Path | None,
    allow_outside: Sequence[Path],
    max_bytes: int,
    bins: int | None = None,
    anything: bool = False,
) -> FeatureSource:
    """What reads the features: one HDF5 file where it is named, else files below the data root."""
    if features is not None:
        return PackedFeatures(features, max_bytes, bins, anything)
    return FeatureSource(root, allow_outside, max_bytes, bins, anything)


def provenances(teachers: Mapping[str, Any], data: Dataset, watcher: Watcher) -> dict[str, Provenance | None]:
    """What each teacher says of its training (``None``: nothing), its samples called as the manifest calls them now."""
    found: dict[str, Provenance | None] = {}
    for name, teacher in teachers.items():
        found[name] = told = getattr(teacher, "provenance", None)
        if told is None:
            continue
        found[name], by_input, by_rule = data.names.recognised(told)
        if by_input or by_rule:
            watcher.note(
                f"{shown(name)}: of the {len(told.keys):,} samples that made it, {by_input:,} are known by their "
                f"features and {by_rule:,} by --rename-map, under other names"
            )
    return found


def nothing_readable(count: int) -> FeatureError:
    """Every feature bad at once: they are somewhere else, and the rows that the cache holds must not go for that."""
    return FeatureError(
        f"none of the {count} features can be read; the cache stays as it is", hint="Check --data-root."
    )
