"""``kd-cache verify``: audit caches against the manifest, the features and the teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.console import reporting_errors

EXAMPLES = """Examples:

kd-cache verify --n 100

kd-cache verify --target b --all --recompute

kd-cache verify --n 100 --json | python -m json.tool"""


@reporting_errors
def verify_command(
    ctx: typer.Context,
    target: opt.AnyTargetOption = None,
    n: Annotated[
        int,
        typer.Option(
            "--n",
            "-n",
            min=1,
            help="How many random samples of those the manifest promises.",
            envvar="KD_CACHE_N",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = 100,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Every sample, and also rows and files that nothing promises.",
            envvar="KD_CACHE_ALL",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Score the samples again and compare.",
            envvar="KD_CACHE_RECOMPUTE",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = False,
    # Not "seed": in a settings file that is the dump's, and would take the freshness out of every draw.
    verify_seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            max=2**63 - 1,
            help="Which samples to draw. (default: fresh randomness, printed)",
            envvar="KD_CACHE_VERIFY_SEED",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = None,
    cache_root: opt.CacheRootOption = Path("cache"),
    json_path: opt.JsonPathOption = None,
    data_root: opt.DataRootOption = None,
    features: opt.FeaturesOption = None,
    num_scenes: opt.NumScenesOption = 10,
    num_cities: opt.NumCitiesOption = 12,
    allow_shared_locations: opt.AllowSharedOption = False,
    allow_outside: opt.AllowOutsideOption = [],  # noqa: B006 (typer copies it)
    city2scene_teacher_ckpt: opt.City2SceneOption = None,
    scene_teacher_ckpt: opt.SceneOption = None,
    teacher: opt.TeacherOption = [],  # noqa: B006
    dtype: Annotated[
        opt.DType | None,
        typer.Option(
            "--dtype",
            help="Storage type to expect. (default: as dumped)",
            envvar="KD_CACHE_DTYPE",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = None,
    precision: Annotated[
        opt.Precision | None,
        typer.Option(
            "--precision",
            help="Compute precision to expect. (default: as dumped)",
            envvar="KD_CACHE_PRECISION",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    device: opt.DeviceOption = "auto",
    max_manifest_bytes: opt.MaxManifestOption = opt.MAX_MANIFEST,
    max_feature_bytes: opt.MaxFeatureOption = opt.MAX_FEATURE,
    max_checkpoint_bytes: opt.MaxCheckpointOption = opt.MAX_CHECKPOINT,
    config: opt.ConfigOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Check that everything promised is there, intact, fresh and permitted. Changes nothing.

    Data and teacher options that are not given are taken from what the dump saved with the cache.
    """
    # Everything else needs numpy, and then torch: --help must not wait for them.
    from kd_cache.cli.verify_run import run_verify

    run_verify(ctx)
