"""What ``kd-cache info`` tells of a folder that ``kd-cache train`` writes into."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from kd_cache.cli.console import percent
from kd_cache.commands import Table
from kd_cache.errors import CheckpointError
from kd_cache.files.atomic import open_file

_MOST = 1 << 24


def trained_teachers(outputs: Path) -> list[dict[str, Any]]:
    """The published nets below ``outputs``, or in it, each with what its run measured where that is still there."""
    places = ("teacher_*/*/", "student/*/*/", "rank/*/*/", "")
    found = sorted({path for place in places for path in outputs.glob(f"{place}best.safetensors")})
    return [_teacher(path) for path in found]


def _teacher(path: Path) -> dict[str, Any]:
    from kd_cache.dataset.provenance import Provenance  # brings numpy; the next ones torch
    from kd_cache.train.checkpoint import read_record
    from kd_cache.train.evaluation import headline

    try:
        record = read_record(path)
    except CheckpointError as error:
        return {"path": str(path), "damage": error.message}
    training, made_with = record.get("training"), record.get("provenance")
    training = training if isinstance(training, dict) else {}
    made = None if made_with is None else Provenance.from_json(made_with)
    told: dict[str, Any] = {
        "path": str(path),
        "damage": None,
        "role": _role(record),
        "place": training.get("place"),
        "key": training.get("key"),
        "trained_on": None if made is None else len(made.trained),
        "validated_on": None if made is None else len(made.validated),
        "accuracy": None,
    }
    for results in sorted(path.parent.glob("runs/*/results.json"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            with open_file(results) as file:
                content = json.loads(file.read(_MOST))
            if content["key"] == told["key"]:
                accuracy = {where: value and float(value) for where, value in headline(content).items()}
                return {**told, "accuracy": accuracy, "run": str(results.parent)}
    return told


def _role(record: dict[str, Any]) -> Any:
    distilled = record.get("distillation")
    return f"student ({distilled.get('mode')})" if isinstance(distilled, dict) else record.get("role")


def teachers_table(teachers: list[dict[str, Any]]) -> Table:
    rows = []
    for teacher in teachers:
        if teacher["damage"]:
            rows.append([teacher["path"], "damaged", "", "", "", ""])
            continue
        accuracy = teacher["accuracy"] or {}
        rows.append(
            [
                teacher["path"],
                f"{teacher['role'] or 'not known'} {teacher['place'] or ''}".strip(),
                "not known" if teacher["trained_on"] is None else f"{teacher['trained_on']:,}",
                *(percent(accuracy.get(where)) for where in ("validation", "test, source", "test, target")),
            ]
        )
    return Table(
        "Trained teachers, students and rankers",
        ["File", "What", "Trained on", "Validation", "Test, A", "Test, target"],
        rows,
    )


def pretrained_entries(outputs: Path) -> list[dict[str, Any]]:
    """The cached pre-training at ``outputs``, or below it."""
    root = outputs if outputs.name == "pretrained" else outputs / "pretrained"
    if not root.is_dir():
        return []
    from kd_cache.train.pretraining import Pretrained  # brings torch

    return [
        {
            "path": str(entry.path),
            "created": entry.created,
            "damage": entry.damage,
            "validation_accuracy": (entry.measured.get("validation") or {}).get("accuracy"),
            "parts": entry.parts,
        }
        for entry in Pretrained(root).entries()
    ]


def entry_lines(entry: dict[str, Any]) -> list[str]:
    """A cached pre-training and its key parts; what was left to a default is left out."""
    lines = [f"{entry['path']}: cached pre-training of a city teacher, {entry['created'] or 'date not known'}"]
    if entry["damage"]:
        lines.append(f"damaged   {entry['damage']}; it will be trained again")
    if entry["validation_accuracy"] is not None:
        lines.append(f"accuracy  {100 * entry['validation_accuracy']:.1f} % of the validation samples")
    for name, part in entry["parts"].items():
        told = str(part)
        if isinstance(part, dict):
            told = ", ".join(f"{key}={value}" for key, value in part.items() if value is not None)
        if part is not None and told:
            lines.append(f"  {name:<13} {told}")
    return [*lines, ""]
