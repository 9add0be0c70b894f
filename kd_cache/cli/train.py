"""``kd-cache train``: teachers from features and a manifest, and the chain that ends in a verified cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.console import reporting_errors
from kd_cache.cli.train_options import TrainOptions, signature_for

EXAMPLES = """Examples:

kd-cache train all --target b

kd-cache train city --target b --epochs 50 --config configs/cp_resnet.yaml

kd-cache train city2scene --target b --city-teacher-ckpt outputs/teacher_city/A2b/best.safetensors

kd-cache train scene --arch cnn14 --precision bf16

kd-cache train extract --target b --checkpoint city=outputs/teacher_city/A2b/best.safetensors

kd-cache train city2scene --target b --embeddings city --mlp-hidden-dims 64 --sweep lr=1e-3/1e-2,dropout=0/0.3"""

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


_NOT_CITY = ("city_teacher_ckpt", "cached_features", "embeddings", "sweep", "cache_root")
for _name, _work, _without in (
    ("city", _city, _NOT_CITY),
    ("city2scene", _city2scene, ("cache_root",)),
    ("scene", _scene, _NOT_CITY),
    ("all", _all, ("city_teacher_ckpt", "embeddings", "sweep", "init")),
):
    _command = signature_for(_work, _without, is_global=_name == "scene")
    _command.__name__, _command.__doc__ = f"train_{_name}", _work.__doc__
    train_app.command(_name, epilog=EXAMPLES)(reporting_errors(_command))


@train_app.command("extract", epilog=EXAMPLES)
@reporting_errors
def extract_command(
    ctx: typer.Context,
    target: opt.RequiredTargetOption,
    checkpoint: Annotated[
        list[str],
        typer.Option(
            "--checkpoint",
            metavar="[NAME=]PATH",
            help="The teacher whose backbone embeds; repeatable.  (default name: architecture and weights' digest)",
            envvar="KD_CACHE_CHECKPOINT",
            show_envvar=False,
            rich_help_panel=opt.TEACHERS,
        ),
    ],
    json_path: opt.JsonPathOption = None,
    data_root: opt.DataRootOption = None,
    features: opt.FeaturesOption = None,
    num_scenes: opt.NumScenesOption = 10,
    num_cities: opt.NumCitiesOption = 12,
    allow_shared_locations: opt.AllowSharedOption = False,
    allow_outside: opt.AllowOutsideOption = [],  # noqa: B006 (typer copies it)
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output-dir",
            help="The embeddings go to its folder embeddings/A2<target>.",
            envvar="KD_CACHE_OUTPUT_DIR",
            show_envvar=False,
            rich_help_panel=opt.OUTPUT,
        ),
    ] = Path("outputs"),
    device: opt.DeviceOption = "auto",
    workers: opt.WorkersOption = 2,
    max_manifest_bytes: opt.MaxManifestOption = opt.MAX_MANIFEST,
    max_feature_bytes: opt.MaxFeatureOption = opt.MAX_FEATURE,
    max_checkpoint_bytes: opt.MaxCheckpointOption = opt.MAX_CHECKPOINT,
    config: opt.ConfigOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Embed the permitted train samples with the backbones of teachers, once, for heads that train on them.

    The same engine and packs as for logits: a rerun embeds only what is new or changed.
    """
    from kd_cache.cli.train_extract import run_extract

    run_extract(ctx)
