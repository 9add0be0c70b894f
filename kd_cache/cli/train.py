"""``kd-cache train``: teachers from features and a manifest, and the chain that ends in a verified cache."""

from __future__ import annotations

import typer

from kd_cache.cli.console import reporting_errors
from kd_cache.cli.train_options import TrainOptions, signature_for

EXAMPLES = """Examples:

kd-cache train all --target b

kd-cache train city --target b --epochs 50 --config configs/cp_resnet.yaml

kd-cache train city2scene --target b --city-teacher-ckpt outputs/teacher_city/A2b/best.safetensors

kd-cache train scene --arch cnn14 --precision bf16"""

train_app = typer.Typer(
    name="train",
    help="Train teachers: city, City2Scene and scene, each validated by recording location.",
    no_args_is_help=True,
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)


def _city(ctx: typer.Context, options: TrainOptions) -> None:
    """Train a city classifier on A and the target: city labels only."""
    from kd_cache.cli.train_run import run_train

    run_train(ctx, "city", options)


def _city2scene(ctx: typer.Context, options: TrainOptions) -> None:
    """Train a scene head on a city teacher's frozen backbone: scene labels of A only.

    The city teacher is the one given, else one of the same data and settings, trained here where none is cached.
    Options about stages, augmentation and optimiser are the head's; the city teacher's come from the settings file.
    """
    from kd_cache.cli.train_run import run_train

    run_train(ctx, "city2scene", options)


def _scene(ctx: typer.Context, options: TrainOptions) -> None:
    """Train a scene classifier on A only."""
    from kd_cache.cli.train_run import run_train

    run_train(ctx, "scene", options)


def _all(ctx: typer.Context, options: TrainOptions) -> None:
    """Train the chain for a target (city, City2Scene, scene), then dump and verify its cache.

    A settings file may have a section for each teacher (city, city2scene, scene) and one for all of them (train).
    """
    from kd_cache.cli.train_run import run_train_all

    run_train_all(ctx, options)


_NOT_CITY = ("city_teacher_ckpt", "cached_features", "cache_root")
for _name, _work, _without in (
    ("city", _city, _NOT_CITY),
    ("city2scene", _city2scene, ("cache_root",)),
    ("scene", _scene, ("target", *_NOT_CITY)),
    ("all", _all, ("city_teacher_ckpt", "init")),
):
    _command = signature_for(_work, _without)
    _command.__name__, _command.__doc__ = f"train_{_name}", _work.__doc__
    train_app.command(_name, epilog=EXAMPLES)(reporting_errors(_command))
