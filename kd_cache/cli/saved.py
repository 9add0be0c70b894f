"""What a dump saved with its cache, for the commands that come after it: options that are given take its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from kd_cache.cli.config import given
from kd_cache.cli.console import Screen
from kd_cache.cli.inputs import Inputs, load_inputs
from kd_cache.cli.teachers import BUILT_IN, load_teachers
from kd_cache.store.folder import CacheFolder
from kd_cache.store.index import Index
from kd_cache.teacher import Teacher, TeacherSpec, parse_teacher


@dataclass(frozen=True)
class Saved:
    """Settings and paths by the names of the options, and what is known of the teachers."""

    values: Mapping[str, Any]
    paths: Mapping[str, Any]
    teachers: Sequence[str]
    checkpoints: Mapping[str, str]
    built_in: Sequence[str]


NOTHING = Saved({}, {}, (), {}, ())


def saved_in(index: Index | None) -> Saved:
    """What an index says."""
    return NOTHING if index is None else _saved(index.record, index.record["teachers"])


def saved_with(folder: CacheFolder, screen: Screen) -> Saved:
    """What the newest dump says, whether an index tells of it yet or not.

    Raises:
        MissingLogitsError: no dump was begun there.
    """
    from kd_cache.seal import current_in

    current = current_in(folder, screen)
    return _saved(current.newest.record, current.entries)


def _saved(record: Mapping[str, Any], teachers: Mapping[str, Mapping[str, Any]]) -> Saved:
    settings = record.get("settings", {})
    sources = {name: entry.get("source", {}) for name, entry in teachers.items()}
    checkpoints = {name: source["checkpoint"] for name, source in sources.items() if "checkpoint" in source}
    built_in = [name for name, source in sources.items() if source.get("built_in") and name in BUILT_IN]
    return Saved(settings.get("values", {}), settings.get("paths", {}), list(teachers), checkpoints, built_in)


def saved_inputs(ctx: typer.Context, saved: Saved, target: str) -> Inputs:
    """Manifest, guard and features. Raises as `load_inputs`."""

    def chosen(name: str, kept: Mapping[str, Any]) -> Any:
        return ctx.params[name] if given(ctx, name) or name not in kept else kept[name]

    json_path = chosen("json_path", saved.paths)
    data_root = chosen("data_root", saved.paths)
    return load_inputs(
        target,
        None if json_path is None else Path(json_path).expanduser(),
        None if data_root is None else Path(data_root).expanduser(),
        num_scenes=chosen("num_scenes", saved.values),
        num_cities=chosen("num_cities", saved.values),
        allow_shared_locations=chosen("allow_shared_locations", saved.values),
        allow_outside=[Path(path).expanduser() for path in chosen("allow_outside", saved.paths)],
    )


def saved_teachers(ctx: typer.Context, saved: Saved) -> tuple[dict[str, Teacher], dict[str, tuple[str, bool]]]:
    """The cache's teachers that can be loaded; and why others cannot, and whether that is a problem."""
    own = {spec.name: spec for spec in map(parse_teacher, ctx.params["teacher"])}
    specs: list[TeacherSpec] = []
    unchecked: dict[str, tuple[str, bool]] = {}
    for name in saved.teachers:
        if name in own:
            specs.append(own[name])
        elif name in saved.built_in:
            option = f"{name}_teacher_ckpt"
            path = ctx.params[option] if given(ctx, option) else saved.checkpoints.get(name)
            if path is None or not Path(path).expanduser().is_file():
                where = "its checkpoint was not saved with the cache" if path is None else f"{path} does not exist"
                unchecked[name] = (f"{where}; pass --{option.replace('_', '-')}", True)
            else:
                specs.append(TeacherSpec(name, BUILT_IN[name], Path(path).expanduser()))
        else:
            unchecked[name] = ("it is your own; pass it with --teacher", False)
    scenes, cities = (
        ctx.params[name] if given(ctx, name) else saved.values.get(name, ctx.params[name])
        for name in ("num_scenes", "num_cities")
    )
    return load_teachers(specs, scenes, cities), unchecked
