"""``kd-cache evaluate``: how good a teacher or student is, on rows with labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kd_cache.cli.console import Screen, percent
from kd_cache.cli.inputs import data_of, own_features
from kd_cache.cli.saved import saved_in, teachers_of
from kd_cache.cli.teachers import load_teachers
from kd_cache.commands import Report, Run, Table, points
from kd_cache.dataset.task_file import DEFAULT
from kd_cache.errors import UsageError, shown
from kd_cache.files.atomic import make_directory, write_atomic
from kd_cache.options import OPTIONS, OWN_TEACHERS, home_path
from kd_cache.prepare.dataset_json import refuse_other
from kd_cache.score.device import resolve_device
from kd_cache.score.teacher import Teacher, TeacherSpec, parse_teacher
from kd_cache.store.cache import CacheFolder
from kd_cache.store.snapshot import Snapshot
from kd_cache.train.checkpoint import read_weights
from kd_cache.train.checkpoint_file import checkpoint_limit
from kd_cache.train.evaluation_job import EvaluationJob
from kd_cache.train.evaluation_job import evaluate as evaluated
from kd_cache.train.settings import CITY, CITY2SCENE, RANK, SCENE

_KINDS = {"device_group": "Device group", "device": "Device", "city": "City", "scene": "Scene"}
_MOST_ACROSS = 20
"""A table of more classes is only in the JSON, and in --csv."""
_COLUMNS = ("Rows", "Accuracy", "95 %", "Macro", "Log loss", "ECE", "Brier")


def evaluate(
    run: Run, screen: Screen, model: str, target: str | None, label: Literal["scene", "city"] | None
) -> Report:
    """Load, score, measure."""
    values = run.values
    table: Path | None = values["csv"]
    if table is not None:
        refuse_other(table, {b""}, overwrite=True)  # what can never be written is told of before anything is scored
    _refuse_idle(run)
    with checkpoint_limit(values["max_checkpoint_bytes"]):
        spec = model_spec(model)
    limits = (values["num_scenes"], values["num_cities"], values["max_checkpoint_bytes"])
    # The guard first: no code of a user runs over a manifest that leaks.
    data = data_of(target or DEFAULT.source, values)
    teacher = load_teachers([spec], *limits, screen)[spec.name]
    label = label or ("city" if getattr(teacher, "role", None) == CITY else "scene")
    refuse_other_classes(spec.name, teacher, label, values)
    job = EvaluationJob(
        name=spec.name,
        teacher=teacher,
        data=data,
        label=label,
        device=resolve_device(values["device"]),
        own_features=own_features(values, data.task),
        rivals=_rivals(run, screen),
        **{name: values[name] for name in ("split", "val_ratio", "fold", "batch_size", "workers", "seed")},
    )
    content = {"model": model, **evaluated(job, screen)}
    lines = _lines(content)
    if table is not None:
        written = _csv(content["device_by_class"])
        refuse_other(table, {written}, overwrite=values["overwrite"])
        make_directory(table.parent)
        write_atomic(table, written)
        lines += ["", shown(table)]
    return Report(content, lines)


def _refuse_idle(run: Run) -> None:
    """Raise `UsageError` for an option about teachers where there are none."""
    for name in OWN_TEACHERS:
        if run.values["against"] is None and run.sources.get(name) == "commandline":
            flag, told = OPTIONS[name].flags[0], run.values[name]
            raise UsageError(f"{flag} {shown(told)} is about a teacher of --against, which is not given")


def _rivals(run: Run, screen: Screen) -> dict[str, Teacher]:
    """The teachers of the cache that the net is to be compared with."""
    place: Path | None = run.values["against"]
    if place is None:
        return {}
    index = Snapshot(folder := CacheFolder(place)).finished()
    found = teachers_of(run, index, saved_in(index).target(folder), screen, "nothing is compared with it")
    if not found:
        raise UsageError(f"no teacher of {shown(place)} can be loaded", hint="Pass --teacher, or its checkpoint.")
    return found


def _csv(table: Mapping[str, Any]) -> bytes:
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["device", "class", "samples", "accuracy"])
    for device, counts, shares in zip(table["devices"], table["samples"], table["accuracy"], strict=True):
        out.writerows(zip([device] * len(counts), table["classes"], counts, shares, strict=True))
    return text.getvalue().encode()


def model_spec(text: str) -> TeacherSpec:
    """What ``CKPT`` or ``NAME=module:factory[,ckpt=PATH]`` means. Raises `UsageError`, `CheckpointError`."""
    path = home_path(text)
    if path.is_file():
        weights = read_weights(path)
        role = weights.record.get("role") or (CITY2SCENE if weights.has_two_parts else SCENE)
        if role == RANK:
            raise UsageError(
                f"{shown(text)} is a ranker, which tells no classes apart",
                hint="How good it is stands in results.json of its run.",
            )
        return TeacherSpec(str(role), str(role), path)
    if "=" in text:
        return parse_teacher(text)
    raise UsageError(
        f"{shown(text)} is neither a checkpoint nor NAME=module:factory",
        hint="kd-cache train leaves checkpoints in outputs/teacher_…/best.safetensors.",
    )


def refuse_other_classes(name: str, teacher: Teacher, label: str, values: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a net with more or fewer classes than there are scenes (or cities)."""
    option = "num_cities" if label == "city" else "num_scenes"
    if teacher.num_classes != values[option]:
        flag = f"--{option.replace('_', '-')}"
        raise UsageError(
            f"{shown(name)} has {teacher.num_classes} classes, and there are {values[option]} ({flag})",
            hint=f"Pass {flag} {teacher.num_classes}, or the --label that it tells apart.",
        )


def _lines(content: Mapping[str, Any]) -> list[str | Table]:
    title = (
        f"{shown(content['name'])} on {content['split']}: {content['samples']:,} rows of {content['locations']:,} "
        f"locations, {content['label']}s"
    )
    lines: list[str | Table] = [Table(title, ["", *_COLUMNS], [["all", *_cells(content)]])]
    for kind, name in _KINDS.items():
        rows = [[group, *_cells(figures)] for group, figures in content["by"][kind].items()]
        lines += ["", Table("", [name, *_COLUMNS], rows)]
    crossed = content["device_by_class"]
    if len(crossed["classes"]) <= _MOST_ACROSS:
        rows = [
            [device, *map(percent, each)] for device, each in zip(crossed["devices"], crossed["accuracy"], strict=True)
        ]
        lines += ["", Table("Accuracy by device and class", ["Device", *crossed["classes"]], rows)]
    if content["against"]:
        rows = [[name, *_difference(each)] for name, each in content["against"].items()]
        lines += [
            "",
            Table("Difference to teachers, in points", ["Teacher", "Accuracy", "− it", "95 %", "Macro"], rows),
        ]
    return lines


def _difference(rival: Mapping[str, Any]) -> list[str]:
    apart = rival["difference"]
    accuracy, between = apart["accuracy"]["value"], apart["accuracy"]["interval"]
    told = "–" if between is None else " to ".join(map(points, between))
    return [percent(rival["accuracy"]), points(accuracy), told, points(apart["macro_accuracy"]["value"])]


def _cells(figures: Mapping[str, Any]) -> list[str]:
    interval = (figures["intervals"] or {}).get("accuracy")
    return [
        f"{figures['samples']:,}",
        percent(figures["accuracy"]),
        "–" if interval is None else f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}",
        percent(figures["macro_accuracy"]),
        *(f"{figures[name]:.3f}" for name in ("log_loss", "ece", "brier")),
    ]
