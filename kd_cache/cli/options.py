"""Options that several commands share, each with its environment variable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kd_cache.cli.config import read_config
from kd_cache.cli.console import at_home as at_home

Target = Literal["b", "c", "s1", "s2", "s3"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
DType = Literal["fp32", "fp16"]
BadSample = Literal["stop", "skip"]

# As in kd_cache.manifest, .features and .train.checkpoint_file; importing those takes numpy and torch.
MAX_MANIFEST, MAX_FEATURE, MAX_CHECKPOINT = 1 << 30, 1 << 24, 4 << 30
MAX_BATCH = 1 << 16  # kd_cache.plan

DATA, TEACHERS, CACHE, RUN, LIMITS, OUTPUT = "Data", "Teachers", "Cache", "Run", "Limits", "Output"

AnyTargetOption = Annotated[
    Target | None,
    typer.Option(
        "--target",
        "--target-name",
        help="Just the cache of this target. (default: every cache under the root)",
        envvar="KD_CACHE_TARGET",
        show_envvar=False,
        rich_help_panel=CACHE,
    ),
]
RequiredTargetOption = Annotated[
    Target,
    typer.Option(
        "--target",
        "--target-name",
        help="Target device; the cache holds train samples of A and of it.",
        envvar="KD_CACHE_TARGET",
        show_envvar=False,
        rich_help_panel=DATA,
    ),
]
JsonPathOption = Annotated[
    Path | None,
    typer.Option(
        "--json-path",
        help="Dataset JSON (manifest). (default: data/sample/dataset.json)",
        envvar="KD_CACHE_JSON_PATH",
        show_envvar=False,
        rich_help_panel=DATA,
    ),
]
DataRootOption = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        help="Folder that the manifest's files are relative to. (default: the manifest's folder)",
        envvar="KD_CACHE_DATA_ROOT",
        show_envvar=False,
        rich_help_panel=DATA,
    ),
]
FeaturesOption = Annotated[
    Path | None,
    typer.Option(
        "--features",
        help="One HDF5 file that holds the features, instead of files below the data root.",
        envvar="KD_CACHE_FEATURES",
        show_envvar=False,
        rich_help_panel=DATA,
    ),
]
NumScenesOption = Annotated[
    int,
    typer.Option(
        "--num-scenes",
        min=1,
        help="Scene classes; checked against the checkpoints.",
        envvar="KD_CACHE_NUM_SCENES",
        show_envvar=False,
        rich_help_panel=DATA,
    ),
]
NumCitiesOption = Annotated[
    int,
    typer.Option(
        "--num-cities",
        min=1,
        help="City classes; checked against the checkpoints.",
        envvar="KD_CACHE_NUM_CITIES",
        show_envvar=False,
        rich_help_panel=DATA,
    ),
]
AllowSharedOption = Annotated[
    bool,
    typer.Option(
        "--allow-shared-locations",
        help="Permit a recording location in both train and test (recorded with the cache).",
        envvar="KD_CACHE_ALLOW_SHARED_LOCATIONS",
        show_envvar=False,
        rich_help_panel=DATA,
    ),
]
AllowOutsideOption = Annotated[
    list[Path],
    typer.Option(
        "--allow-outside",
        help="Permit features in this folder outside the data root. Repeatable.",
        envvar="KD_CACHE_ALLOW_OUTSIDE",
        show_envvar=False,
        rich_help_panel=DATA,
    ),
]
City2SceneOption = Annotated[
    Path | None,
    typer.Option(
        "--city2scene-teacher-ckpt",
        help="City2Scene checkpoint, .safetensors or .pth.  "
        "(default: the sample's; with your own data outputs/teacher_city2scene/A2<target>/best.*)",
        envvar="KD_CACHE_CITY2SCENE_TEACHER_CKPT",
        show_envvar=False,
        rich_help_panel=TEACHERS,
    ),
]
SceneOption = Annotated[
    Path | None,
    typer.Option(
        "--scene-teacher-ckpt",
        help="Scene checkpoint, .safetensors or .pth.  "
        "(default: the sample's; with your own data outputs/teacher_scene/global/best.*)",
        envvar="KD_CACHE_SCENE_TEACHER_CKPT",
        show_envvar=False,
        rich_help_panel=TEACHERS,
    ),
]
TeacherOption = Annotated[
    list[str],
    typer.Option(
        "--teacher",
        metavar="NAME=module:factory[,ckpt=PATH]",
        help="A further teacher of your own; repeatable. Its code runs, so it is never taken from a cache.",
        envvar="KD_CACHE_TEACHER",
        show_envvar=False,
        rich_help_panel=TEACHERS,
    ),
]
OnlyOption = Annotated[
    list[str],
    typer.Option(
        "--only",
        metavar="NAME",
        help="Just this teacher; repeatable.",
        envvar="KD_CACHE_ONLY",
        show_envvar=False,
        rich_help_panel=TEACHERS,
    ),
]
CacheRootOption = Annotated[
    Path,
    typer.Option(
        "--cache-root",
        help="Folder of the caches; one per target, A2<target>.",
        envvar="KD_CACHE_CACHE_ROOT",
        show_envvar=False,
        rich_help_panel=CACHE,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:i]",
        help="Where the teachers run.",
        envvar="KD_CACHE_DEVICE",
        show_envvar=False,
        rich_help_panel=RUN,
    ),
]
WorkersOption = Annotated[
    int,
    typer.Option(
        "--workers",
        min=0,
        help="Threads that read features ahead.",
        envvar="KD_CACHE_WORKERS",
        show_envvar=False,
        rich_help_panel=RUN,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with settings. (default: kd-cache.yaml if present)",
        envvar="KD_CACHE_CONFIG",
        callback=read_config,
        is_eager=True,
        rich_help_panel=RUN,
    ),
]
MaxManifestOption = Annotated[
    int,
    typer.Option(
        "--max-manifest-bytes",
        min=1,
        help="A larger dataset JSON is refused unread.",
        envvar="KD_CACHE_MAX_MANIFEST_BYTES",
        show_envvar=False,
        rich_help_panel=LIMITS,
    ),
]
MaxFeatureOption = Annotated[
    int,
    typer.Option(
        "--max-feature-bytes",
        min=1,
        help="A larger feature file is refused unread.",
        envvar="KD_CACHE_MAX_FEATURE_BYTES",
        show_envvar=False,
        rich_help_panel=LIMITS,
    ),
]
MaxCheckpointOption = Annotated[
    int,
    typer.Option(
        "--max-checkpoint-bytes",
        min=1,
        help="A larger checkpoint is refused unread.",
        envvar="KD_CACHE_MAX_CHECKPOINT_BYTES",
        show_envvar=False,
        rich_help_panel=LIMITS,
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as JSON, and nothing else, on standard output.",
        envvar="KD_CACHE_JSON",
        show_envvar=False,
        rich_help_panel=OUTPUT,
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet", help="Print errors only.", envvar="KD_CACHE_QUIET", show_envvar=False, rich_help_panel=OUTPUT
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Show the traceback of an error.",
        envvar="KD_CACHE_DEBUG",
        show_envvar=False,
        rich_help_panel=OUTPUT,
    ),
]


def batch_size(text: str) -> int | str:
    """A number that a batch plan may hold, or ``auto``."""
    if text == "auto" or (text.isdecimal() and text.isascii() and len(text) < 10 and 0 < int(text) <= MAX_BATCH):
        return text if text == "auto" else int(text)
    raise typer.BadParameter(f"expected a number from 1 to {MAX_BATCH:,}, or auto, found {text!r}")
