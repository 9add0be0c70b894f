"""A data set that passed the guard: its manifest, the permitted samples, and where their features are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kd_cache.dataset.features import MAX_BYTES as MAX_FEATURE_BYTES
from kd_cache.dataset.features import AbsentFeatures, FeatureSource
from kd_cache.dataset.guard import Selection, chosen_samples, select, selected
from kd_cache.dataset.manifest import MAX_BYTES as MAX_MANIFEST_BYTES
from kd_cache.dataset.manifest import LaterSamples, Manifest, Sample, load_manifest
from kd_cache.dataset.manifest_file import manifest_digest
from kd_cache.dataset.packed import PackedFeatures
from kd_cache.dataset.provenance import Provenance
from kd_cache.dataset.renames import Names, Rule, read_rules
from kd_cache.dataset.samples_table import SamplesTable, find_table, make_table, table_name
from kd_cache.dataset.task import DCASE, Task
from kd_cache.dataset.task_file import as_record
from kd_cache.errors import FeatureError, ManifestError, shown
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
        table: the samples table that this was read from; ``table_name`` is what one is called. Without a manifest's
            file there is none.
    """

    manifest: Manifest
    selection: Selection
    features: FeatureSource
    paths: Mapping[str, Any] = field(default_factory=dict)
    rules: Sequence[Rule] = ()
    unguarded: bool = False
    table: SamplesTable | None = None
    table_name: str = ""

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
        tables: Path | None = None,
    ) -> Dataset:
        """Read a manifest and pass it through the guard, before anything else is touched.

        Args:
            target: the target device; the task's source selects its samples alone. ``None`` where there are none.
            json_path: the manifest.
            data_root: the folder its files are relative to; by default the manifest's own.
            features: one HDF5 file that holds all features; the data root then only says how the manifest's paths are
                meant.
            absent: the features are not at hand, and are not asked for.
            tables: a folder; where it holds the samples table of this, that is mapped, and the manifest only parsed if
                another sample than a permitted one is asked for.
            rename_map: rules, or files of them, for samples that had other paths when the teachers were made.

        Raises what `load_manifest`, `select`, `FeatureSource`, `PackedFeatures` and `read_rules` raise.
        """
        target = target if target == task.source else ",".join(task.several(target))
        root = json_path.parent if data_root is None else data_root
        labels: dict[str, Any] = {"task": task, "num_scenes": num_scenes, "num_cities": num_cities}
        allowed: dict[str, Any] = {"allow_shared_locations": allow_shared_locations, "data_root": root}
        places = [os.path.realpath(path) for path in (root, features or root, *allow_outside)]
        told = {
            "task": {each.name: getattr(task, each.name) for each in fields(task)},
            "classes": [num_scenes or task.num_classes, num_cities or len(task.cities)],
            "target": target,
            "shared": allow_shared_locations,
            "places": places,
            "max_feature_bytes": max_feature_bytes,
        }

        def parsed() -> Manifest:
            return load_manifest(json_path, max_bytes=max_manifest_bytes, **labels)

        table = None
        if tables is not None and tables.is_dir():
            digest = manifest_digest(json_path, max_manifest_bytes)
            table = find_table(tables, table_name(digest, told), root)
        if table is not None:
            manifest, selection = _mapped(table, digest, target, task, json_path, parsed)
        else:
            manifest = parsed()
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
        named = table_name(manifest.digest, told)
        return cls(manifest, selection, source, paths, read_rules(rename_map), table=table, table_name=named)

    def samples_table(
        self, directory: Path, workers: int = 2, watcher: Watcher | None = None, *, make: bool = True
    ) -> SamplesTable | None:
        """What the parts of a dump map in place of parsing the manifest and reading others' headers.

        It is made in ``directory`` (a cache's ``pending``) where it is not there, unless ``make`` is off. ``None``
        where the samples are not from a manifest's file. Raises `StoreError`.
        """
        if self.root is None or not self.table_name:
            return None
        found = self.table or find_table(directory, self.table_name, self.root)
        if found is None and make:
            path = directory / self.table_name
            make_table(path, self.manifest, self.selection, self.features, self.root, workers, watcher)
            found = find_table(directory, self.table_name, self.root)
        return found

    def for_target(self, target: str, *, allow_shared_locations: bool = False) -> Dataset:
        """The same data for another target. Raises as `select`."""
        chosen = select(self.manifest, target, allow_shared_locations=allow_shared_locations, data_root=self.root)
        return replace(self, selection=chosen, table=None, table_name="")

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


def _mapped(
    table: SamplesTable, digest: str, target: str, task: Task, path: Path, parsed: Callable[[], Manifest]
) -> tuple[Manifest, Selection]:
    """Manifest and selection as a table tells of them; both are only ``parsed`` if it does not tell enough."""

    def samples() -> Sequence[Sample]:
        if (now := parsed()).digest != digest:
            raise ManifestError(f"the manifest {shown(path)} changed while it was in use; run the command again")
        return now.samples

    head, keys = table.head, table.keys
    manifest = Manifest(LaterSamples(head["samples"], samples), digest, path.expanduser(), task, head["front_end"])
    chosen = LaterSamples(len(keys), lambda: chosen_samples(manifest, target))
    shared = tuple(head["shared_locations"])
    selection = Selection(target, chosen, head["located"], head["locatable"], shared, task)
    # Where `cached_property` would keep them, had they been made of the samples.
    vars(selection).update(keys=keys, labels=table.labels, by_key=table.files, per_device=head["per_device"])
    return manifest, selection


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
