"""A student from rows: losses, fusion of teachers, and what they and hard labels make together.

Importing this imports no torch; what needs it is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_cache.distill.fitting import HeldOut, fit, fit_gate, fit_weights, held_out
    from kd_cache.distill.fusion import Gate, Weights, fuse
    from kd_cache.distill.losses import (
        LOSSES,
        ab,
        bce,
        dcase,
        dist,
        dkd,
        hard,
        js,
        kl,
        logit_std,
        mse,
        nkd,
        rkl,
        rld,
        skew,
        soft_ce,
        wttm,
    )
    from kd_cache.distill.objective import DistillLoss
    from kd_cache.distill.recipe import RECIPES, Recipe

__all__ = [
    "LOSSES",
    "RECIPES",
    "DistillLoss",
    "Gate",
    "HeldOut",
    "Recipe",
    "Weights",
    "ab",
    "bce",
    "dcase",
    "dist",
    "dkd",
    "fit",
    "fit_gate",
    "fit_weights",
    "fuse",
    "hard",
    "held_out",
    "js",
    "kl",
    "logit_std",
    "mse",
    "nkd",
    "rkl",
    "rld",
    "skew",
    "soft_ce",
    "wttm",
]

_HOME = {
    **dict.fromkeys(("Gate", "Weights", "fuse"), "fusion"),
    **dict.fromkeys(("HeldOut", "fit", "fit_gate", "fit_weights", "held_out"), "fitting"),
    "DistillLoss": "objective",
    **dict.fromkeys(("RECIPES", "Recipe"), "recipe"),
}
"""Where a name is; the others are losses."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'losses')}"), name)
