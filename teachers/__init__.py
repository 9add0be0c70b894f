"""The built-in teachers: City2Scene, scene and city teachers, of CNN14 or CP-ResNet.

The factories are what the entry-point group ``kd_cache.teachers`` and ``--teacher name=module:factory`` expect: a
checkpoint's path in, a scoring module out. This package is a plug-in: it stands on kd_cache, which finds it through
entry points and imports it nowhere.
"""

from __future__ import annotations

from pathlib import Path

from kd_cache.errors import CheckpointError
from kd_cache.train.checkpoint import save_checkpoint
from kd_cache.train.checkpoint_file import checkpoint_limit
from kd_cache.train.cp_resnet import CPResNet
from teachers.city2scene import City2Scene
from teachers.cnn14 import CNN14
from teachers.loading import LoadedTeacher, load_teacher
from teachers.own_teacher import own_teacher

__all__ = [
    "CNN14",
    "CPResNet",
    "City2Scene",
    "LoadedTeacher",
    "checkpoint_limit",
    "city",
    "city2scene",
    "load_teacher",
    "own_teacher",
    "save_checkpoint",
    "scene",
]


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
