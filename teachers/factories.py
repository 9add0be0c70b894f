"""What ``--teacher name=teachers:scene`` calls: a checkpoint's path in, a scoring module out."""

from __future__ import annotations

from pathlib import Path

from kd_cache.errors import CheckpointError
from teachers.loading import LoadedTeacher, load_teacher


def scene(ckpt: Path | None) -> LoadedTeacher:
    """A scene classifier, trained on the source device."""
    return _loaded("scene", ckpt)


def city2scene(ckpt: Path | None) -> LoadedTeacher:
    """A city teacher's frozen backbone with a linear scene head."""
    return _loaded("city2scene", ckpt)


def city(ckpt: Path | None) -> LoadedTeacher:
    """A city classifier, trained on source and target device."""
    return _loaded("city", ckpt)


def _loaded(role: str, ckpt: Path | None) -> LoadedTeacher:
    if ckpt is None:
        raise CheckpointError(
            f"the {role} teacher has no checkpoint",
            hint="Give its path; outputs/teacher_…/best.safetensors is where training leaves it.",
        )
    return load_teacher(ckpt, role=role)
