"""What a dump saved with its cache, for the commands that come after it: options that are given take its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kd_cache
from kd_cache.cli.console import Screen
from kd_cache.cli.inputs import data_of, task_of
from kd_cache.cli.teachers import BUILT_IN, SAMPLE, default_checkpoint, described, load_teachers, of_target
from kd_cache.commands import Run
from kd_cache.dataset.dataset import Dataset, provenances
from kd_cache.dataset.features import IN_PYTHON, NAMES_ALONE
from kd_cache.dataset.provenance import Provenance
from kd_cache.dataset.task import Task
from kd_cache.dataset.task_file import DEFAULT, recorded_task
from kd_cache.errors import CheckpointError, UsageError, shown
from kd_cache.score.teacher import Teacher, TeacherSpec, parse_teacher, teacher_fingerprint
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import Index
from kd_cache.store.snapshot import Snapshot


@dataclass(frozen=True)
class Saved:
    """Settings and paths by the names of the options, and what is known of the teachers.

    ``known`` are the teachers of which a dump says where they came from; nobody can say that of adopted ones.
    """

    values: Mapping[str, Any]
    paths: Mapping[str, Any]
    teachers: Sequence[str]
    checkpoints: Mapping[str, str]
    built_in: Sequence[str]
    known: Sequence[str]
    task: Task = DEFAULT
    made_of: str = ""

    def target(self, folder: CacheFolder) -> str:
        """Of the cache in this folder, by its name."""
        return self.task.target_in(folder.path.name) or folder.path.name


NOTHING = Saved({}, {}, (), {}, (), ())


def saved_in(index: Index | None) -> Saved:
    """What an index says."""
    return NOTHING if index is None else _saved(index.record, index.record["teachers"])


def saved_with(snapshot: Snapshot, screen: Screen) -> Saved:
    """What the newest dump says, whether the index knows it yet or not.

    Raises:
        MissingLogitsError: no dump was begun there.
    """
    current = snapshot.current(screen)
    return _saved(current.record, {name: current.entries.get(name, {}) for name in current.origins})


def _saved(record: Mapping[str, Any], teachers: Mapping[str, Mapping[str, Any]]) -> Saved:
    settings = record.get("settings", {})
    sources = {name: entry.get("source", {}) for name, entry in teachers.items()}
    checkpoints = {name: source["checkpoint"] for name, source in sources.items() if "checkpoint" in source}
    known = [name for name, entry in teachers.items() if "source" in entry]
    built_in = [name for name, source in sources.items() if source.get("built_in") and name in BUILT_IN]
    values, paths = settings.get("values", {}), settings.get("paths", {})
    made_of = record.get("manifest", {}).get("path", "")
    task = recorded_task(record)
    return Saved(values, paths, list(teachers), checkpoints, built_in, known, task, made_of)


def saved_data(run: Run, saved: Saved, target: str | None, *, absent: bool = False) -> Dataset:
    """Manifest, guard and features, which may be ``absent``. Raises as `data_of`."""
    if saved.made_of in (IN_PYTHON, NAMES_ALONE) and run.values.get("dataset") is None and not run.given("json_path"):
        raise UsageError(
            f"the cache is of {saved.made_of}, and a cache runs no code: what its rows were scored from is not known",
            hint="Pass --dataset module:factory, or file.py:factory.",
        )
    # A data root that is given now, and not in the file that serves every command, means the files below it.
    without = {"features"} if run.said("data_root") else set()
    recalled = run.recall(saved.values, {name: path for name, path in saved.paths.items() if name not in without})
    for name in ("json_path", "data_root", "features"):
        recalled[name] = None if recalled[name] is None else Path(recalled[name])
    recalled["allow_outside"] = [Path(path) for path in recalled["allow_outside"]]
    if not run.given("rename_map"):
        recalled["rename_map"] = saved.paths.get("rename_map", [])
    # Limits are never as saved: a cache from elsewhere must not raise the caps that protect from it.
    task = task_of(run.values) if run.given("task") else saved.task
    return data_of(target, {**run.values, **recalled}, task, absent=absent)


@dataclass(frozen=True)
class Loaded:
    """The cache's teachers that can be loaded, and of the others why they cannot and whether that is a problem."""

    teachers: dict[str, Teacher]
    specs: list[TeacherSpec]
    unchecked: dict[str, tuple[str, bool]]

    @property
    def notes(self) -> dict[str, dict[str, Any]]:
        """What the index is to say of where they came from."""
        return {spec.name: {"source": described(spec, self.teachers[spec.name])} for spec in self.specs}


def saved_teachers(run: Run, saved: Saved, target: str, screen: Screen) -> Loaded:
    """Load those that the options name, and the built-in ones from where the dump found them."""
    own = {spec.name: spec for spec in of_target([parse_teacher(text) for text in run.values["teacher"]], target)}
    specs: list[TeacherSpec] = []
    unchecked: dict[str, tuple[str, bool]] = {}
    for name in saved.teachers:
        if name in own:
            specs.append(own[name])
        elif name in BUILT_IN and (name in saved.built_in or name not in saved.known):
            path = _checkpoint(run, saved, name, target)
            if isinstance(path, Path) and path.is_file():
                specs.append(TeacherSpec(name, BUILT_IN[name], path))
            else:
                where = f"{path} does not exist" if isinstance(path, Path) else path
                unchecked[name] = (f"{where}; pass --{name}-teacher-ckpt", True)
        else:
            unchecked[name] = ("it is your own; pass it with --teacher", False)
    recalled, most = run.recall(saved.values, saved.paths), run.values["max_checkpoint_bytes"]
    sizes = recalled["num_scenes"], recalled["num_cities"]
    return Loaded(load_teachers(specs, *sizes, most, screen), specs, unchecked)


def saved_provenances(
    run: Run, index: Index, target: str, screen: Screen, data: Dataset | None = None
) -> dict[str, Provenance | None]:
    """What each teacher of the cache says of its training, if it is still the one whose rows are there.

    ``data``: its samples are called as they are there now.
    """
    teachers = teachers_of(run, index, target, screen, "what it was trained on is not known")
    found: dict[str, Provenance | None] = dict.fromkeys(index.origins)
    for name, teacher in teachers.items():
        found[name] = getattr(teacher, "provenance", None)
        if data is not None:
            found |= provenances({name: teacher}, data, screen)
    return found


def teachers_of(run: Run, index: Index, target: str, screen: Screen, without: str) -> dict[str, Teacher]:
    """The teachers whose rows are in the cache; of one that cannot be had, a note of why and what is ``without`` it."""
    loaded = saved_teachers(run, saved_in(index), target, screen)
    found: dict[str, Teacher] = {}
    for name, origin in index.origins.items():
        if name not in loaded.teachers:
            why = loaded.unchecked.get(name, ("", False))[0]
            screen.note(f"{shown(name)}: {without}: {why}")
            continue
        parts, teacher = origin.fingerprint.parts, loaded.teachers[name]
        now = teacher_fingerprint(
            teacher,
            precision=parts["precision"],
            dtype=parts["dtype"],
            front_end=parts.get("front_end"),
            policy=origin.policy,
        )
        if now.digest != origin.fingerprint.digest:
            screen.note(f"{shown(name)}: its checkpoint is not the one whose rows are cached: {without}")
            continue
        found[name] = teacher
    return found


def _checkpoint(run: Run, saved: Saved, name: str, target: str) -> Path | str:
    """Where a built-in teacher's weights are, or why that is not known."""
    option = f"{name}_teacher_ckpt"
    if run.given(option):
        return Path(str(run.values[option]).replace("{target}", target))
    if name in saved.checkpoints:
        return Path(saved.checkpoints[name])
    if name in saved.known:
        return "its checkpoint was not saved with the cache"
    try:
        return default_checkpoint(name, target, own_data=not _is_the_sample(run, saved))
    except CheckpointError as error:
        return error.message


def _is_the_sample(run: Run, saved: Saved) -> bool:
    path = run.recall(saved.values, saved.paths)["json_path"]
    return path is None or Path(path).absolute() == (SAMPLE / "dataset.json").absolute()


def run_record(run: Run, data: Dataset) -> dict[str, Any]:
    """What the index keeps of a run: which tool, when, by which settings. Later commands take their paths from it."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "tool": f"kd-cache {kd_cache.__version__}",
        "created": created,
        "settings": {**run.record(), "paths": dict(data.paths)},
    }
