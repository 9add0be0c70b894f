"""``kd-cache dump``: score a training set with every teacher, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.console import reporting_errors

EXAMPLES = """Examples:

kd-cache dump --target b

kd-cache dump --target s1 --json-path dataset.json --data-root features --dtype fp16

kd-cache dump --target b --teacher big=my_teachers:big,ckpt=big.pt --only big

kd-cache dump --target b --shard 0/4

kd-cache dump --target b --dry-run --json"""


@reporting_errors
def dump_command(
    ctx: typer.Context,
    target: opt.RequiredTargetOption,
    json_path: opt.JsonPathOption = None,
    data_root: opt.DataRootOption = None,
    features: opt.FeaturesOption = None,
    num_scenes: opt.NumScenesOption = 10,
    num_cities: opt.NumCitiesOption = 12,
    allow_shared_locations: opt.AllowSharedOption = False,
    allow_outside: opt.AllowOutsideOption = [],  # noqa: B006 (typer copies it)
    on_bad_sample: Annotated[
        opt.BadSample,
        typer.Option(
            "--on-bad-sample",
            help="Stop at a sample that cannot be scored, or skip it, list it as missing and exit 3.",
            envvar="KD_CACHE_ON_BAD_SAMPLE",
            show_envvar=False,
            rich_help_panel=opt.DATA,
        ),
    ] = "stop",
    city2scene_teacher_ckpt: opt.City2SceneOption = None,
    scene_teacher_ckpt: opt.SceneOption = None,
    teacher: opt.TeacherOption = [],  # noqa: B006
    only: opt.OnlyOption = [],  # noqa: B006
    cache_root: opt.CacheRootOption = Path("cache"),
    dtype: Annotated[
        opt.DType,
        typer.Option(
            "--dtype",
            help="How logits are stored; fp16 reports the KL it cost.",
            envvar="KD_CACHE_DTYPE",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = "fp32",
    use_fp16: Annotated[
        bool,
        typer.Option(
            "--use-fp16",
            help="The same as --dtype fp16.",
            envvar="KD_CACHE_USE_FP16",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing/--no-skip-existing",
            help="Keep fresh rows, or score everything again.",
            envvar="KD_CACHE_SKIP_EXISTING",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = True,
    files: Annotated[
        bool,
        typer.Option(
            "--files/--no-files",
            help="Also write the view: one <md5>.npy per sample and teacher.",
            envvar="KD_CACHE_FILES",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = True,
    num_verify: Annotated[
        int,
        typer.Option(
            "--num-verify",
            min=0,
            help="Random samples to verify afterwards; a failed verification is a failed dump.",
            envvar="KD_CACHE_NUM_VERIFY",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = 10,
    reread: Annotated[
        bool,
        typer.Option(
            "--reread/--no-reread",
            help="Read every feature, also where nobody touched its file since the last dump read it.",
            envvar="KD_CACHE_REREAD",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = False,
    device: opt.DeviceOption = "auto",
    precision: Annotated[
        opt.Precision,
        typer.Option(
            "--precision",
            help="Compute precision; a part of the fingerprint. fp32 turns TF32 off.",
            envvar="KD_CACHE_PRECISION",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = "fp32",
    compile: Annotated[  # noqa: A002 (what the option is called)
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Run the teachers through torch.compile: minutes to begin with, faster afterwards, other last bits.",
            envvar="KD_CACHE_COMPILE",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = False,
    batch_size: Annotated[
        Any,  # an integer or "auto"; typer knows no such union
        typer.Option(
            "--batch-size",
            metavar="N|auto",
            parser=opt.batch_size,
            help="Most samples scored at once; auto measures the largest that still makes it faster. "
            "(default: 32 on a CPU, 256 on a GPU)",
            envvar="KD_CACHE_BATCH_SIZE",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    workers: opt.WorkersOption = 2,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            min=0,
            max=2**63 - 1,
            help="Seed of torch's random numbers, for teachers that use any.",
            envvar="KD_CACHE_SEED",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = 42,
    shard_size: Annotated[
        int,
        typer.Option(
            "--shard-size",
            min=1,
            help="Commit finished rows after this many samples …",
            envvar="KD_CACHE_SHARD_SIZE",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = 4096,
    shard_seconds: Annotated[
        float,
        typer.Option(
            "--shard-seconds",
            min=0,
            help="… or after so many seconds, whichever comes first.",
            envvar="KD_CACHE_SHARD_SECONDS",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = 5.0,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="i/n",
            help="Score part i of n (from 0/n) and leave the rest to others; kd-cache seal makes all parts current.  "
            "(default: RANK/WORLD_SIZE or SLURM_ARRAY_TASK_ID/_COUNT if set, else everything)",
            envvar="KD_CACHE_SHARD",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    max_manifest_bytes: opt.MaxManifestOption = opt.MAX_MANIFEST,
    max_feature_bytes: opt.MaxFeatureOption = opt.MAX_FEATURE,
    max_checkpoint_bytes: opt.MaxCheckpointOption = opt.MAX_CHECKPOINT,
    config: opt.ConfigOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what would be scored, and how many bytes it takes.",
            envvar="KD_CACHE_DRY_RUN",
            show_envvar=False,
            rich_help_panel=opt.OUTPUT,
        ),
    ] = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Score the permitted train samples of A and a target with every teacher, and keep the logits.

    Every option can also be set as an environment variable (KD_CACHE_TARGET, KD_CACHE_CACHE_ROOT, …) or in
    kd-cache.yaml (target: b).
    """
    options = dict(locals())
    # Everything else needs numpy, and then torch: --help must not wait for them.
    from kd_cache.cli.dump_run import DumpOptions, run_dump

    run_dump(options.pop("ctx"), DumpOptions(**options))
