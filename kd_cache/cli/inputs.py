"""From options to the data set they name, and to its cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kd_cache.cli.teachers import SAMPLE
from kd_cache.dataset.dataset import Dataset, feature_source
from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.inputs import own_data
from kd_cache.dataset.task import Task
from kd_cache.dataset.task_file import DEFAULT, load_task
from kd_cache.errors import UsageError, shown
from kd_cache.score.factory import resolve_factory, users_code
from kd_cache.store.cache import CacheFolder

_NAMED = (
    "data_root",
    "features",
    "num_scenes",
    "num_cities",
    "allow_shared_locations",
    "allow_outside",
    "max_manifest_bytes",
    "max_feature_bytes",
)
Note = Callable[[str], None]


def task_of(options: Mapping[str, Any]) -> Task:
    """The task that ``--task`` names, or the one that is built in."""
    return DEFAULT if options.get("task") is None else load_task(options["task"])


def folder_of(options: Mapping[str, Any]) -> CacheFolder:
    """The cache of a task and its target. Raises `UsageError` for a target that is none."""
    task = task_of(options)
    return CacheFolder(options["cache_root"] / task.adaptation(task.chosen(options["target"])))


def named(options: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What the options say of a data set, as `Dataset.load` takes it; the sample's manifest where none is named."""
    found = {"json_path": options["json_path"] or SAMPLE / "dataset.json", **{name: options[name] for name in _NAMED}}
    found |= {"rename_map": options["rename_map"]} if "rename_map" in options else {}
    if task != DEFAULT:  # it says how many classes there are
        if options["json_path"] is None:
            raise UsageError(f"no data of the task {shown(task.name)} is named", hint="Pass --json-path or --dataset.")
        found |= {"num_scenes": None, "num_cities": None}
    return {**found, "task": task}


def source_at(place: Path, options: Mapping[str, Any], *, anything: bool = False) -> FeatureSource:
    """Features in a folder, or in one HDF5 file, that no manifest is about. Raises as `feature_source`."""
    packed, root = (None, place) if place.is_dir() else (place, place.parent)
    return feature_source(root, packed, options["allow_outside"], options["max_feature_bytes"], anything=anything)


def own_features(options: Mapping[str, Any], task: Task) -> FeatureSource | None:
    """The student's own features; ``None`` where it is given those of its teachers."""
    place = options["student_features"]
    return None if place is None else source_at(place, options, anything=task.anything)


def data_of(
    target: str | None,
    options: Mapping[str, Any],
    task: Task | None = None,
    note: Note = lambda _: None,
    *,
    absent: bool = False,
    tables: Path | None = None,
) -> Dataset:
    """Read the manifest, or take the data set in Python, and pass it through the guard.

    ``absent``: no feature is asked for; they need not be at hand. ``tables`` is where a samples table may be.

    Raises as `Dataset.load` and `own_data`.
    """
    task = task or task_of(options)
    factory = options.get("dataset")
    if factory is None:
        return Dataset.load(target, **named(options, task), absent=absent, tables=tables)
    made = resolve_factory(factory)
    with users_code(lambda why: UsageError(f"the factory {shown(factory)} of the data set failed: {why}")):
        dataset = made()
    most = options["max_feature_bytes"]
    return own_data(dataset, task, target=target, unguarded=options["unguarded"], max_feature_bytes=most, note=note)
