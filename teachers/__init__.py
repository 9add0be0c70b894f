"""The built-in teachers: City2Scene, scene and city teachers, of CNN14 or CP-ResNet, and how they are trained.

This package is a plug-in: it stands on kd_cache, which finds it through entry points and imports it nowhere. Importing
it does not import torch, because ``kd-cache --help`` asks it for its commands; what needs torch is imported when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_cache.train.checkpoint import save_checkpoint as save_checkpoint
    from kd_cache.train.checkpoint_file import checkpoint_limit as checkpoint_limit
    from kd_cache.train.cp_resnet import CPResNet as CPResNet
    from teachers.cnn14 import CNN14 as CNN14
    from teachers.loading import LoadedTeacher as LoadedTeacher
    from teachers.loading import city as city
    from teachers.loading import city2scene as city2scene
    from teachers.loading import load_teacher as load_teacher
    from teachers.loading import own_teacher as own_teacher
    from teachers.loading import scene as scene
    from teachers.two_parts import City2Scene as City2Scene

_MODULE_OF = {
    "CNN14": "teachers.cnn14",
    "CPResNet": "kd_cache.train.cp_resnet",
    "City2Scene": "teachers.two_parts",
    "checkpoint_limit": "kd_cache.train.checkpoint_file",
    "save_checkpoint": "kd_cache.train.checkpoint",
    **dict.fromkeys(
        ("LoadedTeacher", "city", "city2scene", "load_teacher", "own_teacher", "scene"), "teachers.loading"
    ),
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return __all__
