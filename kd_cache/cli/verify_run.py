"""What ``kd-cache verify`` does, once its options are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import randbits
from typing import TYPE_CHECKING, Any

import typer

from kd_cache.cli.config import given
from kd_cache.cli.console import Screen
from kd_cache.cli.inputs import Inputs, load_inputs
from kd_cache.cli.report import problem_lines, verify_table
from kd_cache.cli.teachers import BUILT_IN, load_teachers
from kd_cache.errors import worst_exit_code
from kd_cache.manifest import SOURCE, TARGETS
from kd_cache.store.folder import CacheFolder, find_caches, no_finished_cache
from kd_cache.store.index import Index
from kd_cache.teacher import Teacher, TeacherSpec, parse_teacher

if TYPE_CHECKING:
    from kd_cache.verify import VerifyReport


def run_verify(ctx: typer.Context) -> None:
    """Audit each cache and report. Exits with the command's status if that is not 0."""
    options = ctx.params
    with Screen(quiet=options["quiet"], as_json=options["as_json"]) as screen:
        folders = _caches(Path(options["cache_root"]).expanduser(), options["target"], screen)
        drawn = randbits(32) if options["verify_seed"] is None else options["verify_seed"]
        reports = [_verify_one(ctx, folder, drawn, screen) for folder in folders]
        for report in reports:
            for note in report.notes:
                screen.note(note)
            if report.teachers:
                screen.result(verify_table(report))
            screen.result(*problem_lines(report.worst_first))
            screen.result("")
        code = worst_exit_code(report.exit_code for report in reports)
        screen.result_json({"exit_code": code, "seed": drawn, "caches": [report.as_json() for report in reports]})
    if code:
        raise typer.Exit(code)


def _caches(root: Path, target: str | None, screen: Screen) -> list[CacheFolder]:
    if target is not None:
        return [CacheFolder(root / f"{SOURCE}2{target}")]
    found = find_caches(root)
    folders = [folder for folder in found if folder.path.name.removeprefix(f"{SOURCE}2") in TARGETS]
    for folder in found:
        if folder not in folders:
            screen.note(f"{folder.path} is not named after a target ({', '.join(TARGETS)}) and is passed over")
    if not folders:
        raise no_finished_cache(root)
    return folders


@dataclass(frozen=True)
class _Saved:
    """What the dump saved with a cache; everything in it may be overridden by options."""

    values: Mapping[str, Any]
    paths: Mapping[str, Any]
    teachers: Sequence[str]
    checkpoints: Mapping[str, str]
    built_in: Sequence[str]


def _saved(index: Index | None) -> _Saved:
    if index is None:
        return _Saved({}, {}, (), {}, ())
    settings = index.record["settings"]
    sources = {name: entry.get("source", {}) for name, entry in index.record["teachers"].items()}
    checkpoints = {name: source["checkpoint"] for name, source in sources.items() if "checkpoint" in source}
    built_in = [name for name, source in sources.items() if source.get("built_in") and name in BUILT_IN]
    return _Saved(settings["values"], settings["paths"], list(index.origins), checkpoints, built_in)


def _verify_one(ctx: typer.Context, folder: CacheFolder, seed: int, screen: Screen) -> VerifyReport:
    from kd_cache.verify import VerifyJob, VerifyReport, open_index, verify_cache

    options = ctx.params
    target = folder.path.name.removeprefix(f"{SOURCE}2")
    index, problem = open_index(folder)
    if index is None and not given(ctx, "json_path"):
        return VerifyReport(str(folder.path), seed, everything=options["everything"], problems=problem)
    saved = _saved(index)
    inputs = _inputs(ctx, saved, target)
    device = None
    if options["recompute"]:
        from kd_cache.engine import resolve_device

        device = resolve_device(options["device"])
    teachers, unchecked = _teachers(ctx, saved)
    return verify_cache(
        VerifyJob(
            folder,
            inputs.manifest,
            inputs.selection,
            inputs.source,
            teachers=teachers,
            unchecked=unchecked,
            n=None if options["everything"] else options["n"],
            seed=seed,
            precision=options["precision"],
            dtype=options["dtype"],
            recompute=options["recompute"],
            device=device,
        ),
        screen,
    )


def _inputs(ctx: typer.Context, saved: _Saved, target: str) -> Inputs:
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


def _teachers(ctx: typer.Context, saved: _Saved) -> tuple[dict[str, Teacher], dict[str, tuple[str, bool]]]:
    """The cache's teachers that can be loaded, and why others cannot."""
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
