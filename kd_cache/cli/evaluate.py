"""``kd-cache evaluate``: how good a teacher or student is, on rows with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kd_cache.cli.console import Screen, percent
from kd_cache.cli.inputs import data_of, own_features
from kd_cache.cli.teachers import load_teachers
from kd_cache.commands import Report, Run, Table
from kd_cache.dataset.task_file import DEFAULT
from kd_cache.errors import UsageError, shown
from kd_cache.options import home_path
from kd_cache.score.device import resolve_device
from kd_cache.score.teacher import Teacher, TeacherSpec, parse_teacher
from kd_cache.train.checkpoint import read_weights
from kd_cache.train.checkpoint_file import checkpoint_limit
from kd_cache.train.evaluation_job import EvaluationJob
from kd_cache.train.evaluation_job import evaluate as evaluated
from kd_cache.train.settings import CITY, CITY2SCENE, RANK, SCENE

_KINDS = {"device_group": "Device group", "device": "Device", "city": "City", "scene": "Scene"}
_COLUMNS = ("Rows", "Accuracy", "95 %", "Macro", "Log loss", "ECE", "Brier")


def evaluate(
    run: Run, screen: Screen, model: str, target: str | None, label: Literal["scene", "city"] | None
) -> Report:
    """Load, score, measure."""
    values = run.values
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
        **{name: values[name] for name in ("split", "val_ratio", "fold", "batch_size", "workers", "seed")},
    )
    content = {"model": model, **evaluated(job, screen)}
    return Report(content, _lines(content))


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


def _lines(content: Mapping[str, Any]) -> Sequence[str | Table]:
    title = (
        f"{shown(content['name'])} on {content['split']}: {content['samples']:,} rows of {content['locations']:,} "
        f"locations, {content['label']}s"
    )
    lines: list[str | Table] = [Table(title, ["", *_COLUMNS], [["all", *_cells(content)]])]
    for kind, name in _KINDS.items():
        rows = [[group, *_cells(figures)] for group, figures in content["by"][kind].items()]
        lines += ["", Table("", [name, *_COLUMNS], rows)]
    return lines


def _cells(figures: Mapping[str, Any]) -> list[str]:
    interval = (figures["intervals"] or {}).get("accuracy")
    return [
        f"{figures['samples']:,}",
        percent(figures["accuracy"]),
        "–" if interval is None else f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}",
        percent(figures["macro_accuracy"]),
        *(f"{figures[name]:.3f}" for name in ("log_loss", "ece", "brier")),
    ]
