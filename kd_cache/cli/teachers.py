"""Which teachers a command loads: the two built-in ones and a user's own, all through the same door."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd_cache.cli.console import Screen
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.task_file import DEFAULT
from kd_cache.errors import CheckpointError, UsageError, shown
from kd_cache.files.atomic import store_errors
from kd_cache.score.teacher import Teacher, TeacherSpec, parse_teacher

BUILT_IN = {"city2scene": "city2scene", "scene": "scene"}
SAMPLE = Path("data/sample")
_SAMPLE_TEACHERS = SAMPLE / "teachers"
_TRAINED = Path("outputs")
_FILES = ("best.safetensors", "best.pth")


def teacher_specs(
    data: Dataset,
    checkpoints: dict[str, Path | None],
    own: Sequence[str],
    only: Sequence[str],
    *,
    own_data: bool,
) -> list[TeacherSpec]:
    """The teachers to load, built-in ones first.

    Args:
        data: its target names the folder of the City2Scene checkpoint; of another task nothing is built in.
        checkpoints: of built-in teachers, where given.
        own: ``--teacher`` texts.
        only: names to restrict to.
        own_data: whether the user brought data; then the sample's checkpoints are no default.

    Raises:
        UsageError: a name given twice, or ``only`` names a teacher that is not there.
        CheckpointError: a built-in teacher without checkpoint.
    """
    further = [parse_teacher(text) for text in own]
    own_names = [spec.name for spec in further]
    ours = [name for name in BUILT_IN if data.task == DEFAULT or checkpoints.get(name) is not None]
    names = [*(name for name in ours if name not in own_names), *own_names]  # one's own replaces a built-in one
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two teachers are called {name}; give --teacher another NAME")
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UsageError(f"--only names {', '.join(map(shown, unknown))}; the teachers are {', '.join(names)}")
    wanted = set(only) or set(names)
    if not wanted:
        raise UsageError(f"no teacher of the task {shown(data.task.name)} is named", hint="Pass --teacher NAME=….")
    built_in = [
        TeacherSpec(name, BUILT_IN[name], checkpoints.get(name) or default_checkpoint(name, data.target, own_data))
        for name in ours
        if name in wanted and name not in own_names
    ]
    return of_target(built_in + [spec for spec in further if spec.name in wanted], data.target)


def of_target(specs: Sequence[TeacherSpec], target: str) -> list[TeacherSpec]:
    """The same with the target's name for every ``{target}`` in a checkpoint's path."""
    return [
        replace(spec, checkpoint=spec.checkpoint and Path(str(spec.checkpoint).replace("{target}", target)))
        for spec in specs
    ]


def default_checkpoint(name: str, target: str, own_data: bool) -> Path:
    """Where a built-in teacher's weights are when nobody says. Raises `CheckpointError` if they are not there."""
    folder = {"city2scene": f"teacher_city2scene/A2{target}", "scene": "teacher_scene/global"}[name]
    root = _TRAINED if own_data else _SAMPLE_TEACHERS
    candidates = [root / folder / file for file in _FILES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"no checkpoint for the {name} teacher: tried {' and '.join(map(str, candidates))}",
        hint=f"Pass --{name}-teacher-ckpt PATH, or leave it out with --only and the teachers you have.",
    )


def described(spec: TeacherSpec, teacher: Teacher) -> dict[str, Any]:
    """Where a teacher came from, for the index: never anything that a reader would run."""
    source: dict[str, Any] = {"built_in": spec.factory == BUILT_IN.get(spec.name)}
    if spec.checkpoint is not None:
        source["checkpoint"] = str(spec.checkpoint.absolute())
        loaded = getattr(teacher, "checkpoint_sha256", None)
        if isinstance(loaded, str):  # what was read, whatever is at that path by now
            source["checkpoint_sha256"] = loaded
        elif spec.checkpoint.is_file():
            with store_errors(spec.checkpoint, "read"), spec.checkpoint.open("rb") as file:
                source["checkpoint_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    read_from = getattr(teacher, "source", None)
    if isinstance(read_from, str):
        source["read_from"] = read_from
    return source


def load_teachers(
    specs: Sequence[TeacherSpec], num_scenes: int, num_cities: int, max_checkpoint_bytes: int, screen: Screen
) -> dict[str, Teacher]:
    """Load them, and check the built-in ones' sizes. Raises `CheckpointError` and what `TeacherSpec.load` raises.

    The screen is told of each before, for it may take a while.
    """
    from kd_cache.train.checkpoint_file import checkpoint_limit

    loaded = {}
    for spec in specs:
        source = f" from {spec.checkpoint}" if spec.checkpoint else ""
        screen.remark(f"loading the teacher {spec.name}{source}")
        with checkpoint_limit(max_checkpoint_bytes):
            teacher = spec.load()
        if spec.factory == BUILT_IN.get(spec.name):
            _check_size(spec, "scenes", teacher.num_classes, num_scenes)
            cities = getattr(teacher, "num_cities", None)
            if cities is not None:
                _check_size(spec, "cities", cities, num_cities)
        loaded[spec.name] = teacher
    return loaded


def _check_size(spec: TeacherSpec, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise CheckpointError(
            f"{shown(spec.checkpoint)} has {found} {what}, expected {expected} as --num-{what} says",
            hint=f"Pass --num-{what} {found}, or the right checkpoint.",
        )
