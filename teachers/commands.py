"""The commands ``kd-cache train …``: their options and examples. What they do is in `teachers.training_runs`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

from kd_cache.commands import Command, Group, Plugin
from kd_cache.options import DATA_LIMITS, DATASET, OUTPUT, SHOWING, TEACHERS, Option, changed
from kd_cache.train.settings import OPTIMISER, STAGES
from kd_cache.train.settings import OPTIONS as SETTINGS

START = "Start"


TARGET = changed("target", kind=Literal["b", "c", "s1", "s2", "s3", "all"], help="Target device; all for each of them.")
ANY_TARGET = changed(
    "target",
    kind=Literal["global", "b", "c", "s1", "s2", "s3", "all"],
    help="A scene teacher learns from A alone: one serves every target.",
    default="global",
)
CACHE_ROOT = changed("cache_root", panel=OUTPUT)
OUTPUT_DIR = Option(
    "output_dir", Path, "Where checkpoints, runs and cached pre-training are kept.", OUTPUT, Path("outputs")
)
CITY_TEACHER = Option("city_teacher_ckpt", Path | None, "The city teacher to stand on.", START, None,
                      "one of the same settings, trained if it is not cached")  # fmt: skip
EMBEDDINGS = Option("embeddings", list[str], "Put the head on these extracted embeddings instead (kd-cache train "
                    "extract); repeatable, side by side.", START, [], metavar="NAME")  # fmt: skip
INIT = Option("init", Path | None, "Start from this checkpoint: a whole model, or one whose head is new.", START, None)
CACHED_FEATURES = Option(
    "cached_features", bool, "Train a head alone on embeddings computed once.", STAGES, True, off=True
)
SWEEP = Option("sweep", str | None, "Train a head for each combination over one extraction; the best by validation is "
               "kept.", OPTIMISER, None, metavar="lr=1e-3/1e-2,dropout=0/0.3")  # fmt: skip


RESUME = Option("resume", Literal["auto", "fresh"],
                "Go on with an unfinished run and use cached pre-training (auto), or neither.", START,
                "auto")  # fmt: skip
STAGE = Option("stage", list[str], "One stage of your own, in place of a preset; repeatable, in order.", STAGES, [],
               metavar="level=2,epochs=5,lr=1e-4[,augment=off][,schedule=constant]", keyed=True)  # fmt: skip

_TRAINING: tuple[str | Option, ...] = (
    TARGET,
    *DATASET,
    OUTPUT_DIR,
    CACHE_ROOT,
    CITY_TEACHER,
    EMBEDDINGS,
    INIT,
    RESUME,
    *SETTINGS,
    STAGE,
    CACHED_FEATURES,
    SWEEP,
    "device",
    "workers",
    Option("pth", bool, "Also write best.pth, under the names of older pipelines.", OUTPUT, False),
    Option("half", bool, "Store weights as float16.", OUTPUT, False),
    Option("tensorboard", bool, "Also log for TensorBoard (pip install tensorboard).", OUTPUT, False),
    *DATA_LIMITS,
    "max_checkpoint_bytes",
    "config",
    *SHOWING,
)

_ONLY_A_HEAD = (CITY_TEACHER, CACHED_FEATURES, EMBEDDINGS, SWEEP, CACHE_ROOT)
_FIRST = ("output_dir", "arch", "epochs", "init")


def _training(without: Collection[Option]) -> tuple[str | Option, ...]:
    return tuple(option for option in _TRAINING if option not in without)


CITY = Command(
    "train city",
    "teachers.training_runs:train_city",
    "Train a city classifier on A and the target: city labels only.",
    _training(_ONLY_A_HEAD),
    examples=("kd-cache train city --target b --epochs 5",),
    first=_FIRST,
    exit_codes=(0, 1, 2, 6),
)
CITY2SCENE = Command(
    "train city2scene",
    "teachers.training_runs:train_city2scene",
    "Train a scene head on a city teacher's frozen backbone: scene labels of A only.",
    _training((CACHE_ROOT,)),
    "The city teacher is the one given, else one of the same data and settings, trained here where none is cached. "
    "Options about stages, augmentation and optimiser are the head's; the city teacher's come from the settings file.",
    (
        "kd-cache train city2scene --target b --city-teacher-ckpt outputs/teacher_city/A2b/best.safetensors",
        "kd-cache train city2scene --target b --embeddings city --epochs 60 --sweep lr=0.01/0.1,weight-decay=0.01/0.1",
    ),
    ("city_teacher_ckpt", "sweep", "output_dir"),
    (0, 1, 2, 5, 6),
)
SCENE = Command(
    "train scene",
    "teachers.training_runs:train_scene",
    "Train a scene classifier on A only.",
    (ANY_TARGET, *_training((TARGET, *_ONLY_A_HEAD))),
    examples=("kd-cache train scene --quick-experiment 0.5 --epochs 3",),
    first=_FIRST,
    exit_codes=(0, 1, 2, 6),
)
ALL = Command(
    "train all",
    "teachers.training_runs:train_all",
    "Train the chain for a target (city, City2Scene, scene), then dump and verify its cache.",
    _training((CITY_TEACHER, EMBEDDINGS, SWEEP, INIT)),
    "A settings file may have a section for each teacher (city, city2scene, scene) and one for all of them (train).",
    ("kd-cache train all --target b --epochs 5 --cache-root cache/trained",),
    ("output_dir", "arch", "epochs"),
    (0, 1, 2, 3, 4, 5, 6),
)
EXTRACT = Command(
    "train extract",
    "teachers.training_runs:extract",
    "Embed the permitted train samples with the backbones of teachers, once, for heads that train on them.",
    (
        "target",
        Option("checkpoint", list[str], "The teacher whose backbone embeds; repeatable.", TEACHERS,
               otherwise="name: architecture and weights' digest", metavar="[NAME=]PATH"),
        *DATASET,
        replace(OUTPUT_DIR, help="The embeddings go to its folder embeddings/A2<target>."),
        "device",
        "workers",
        *DATA_LIMITS,
        "max_checkpoint_bytes",
        "config",
        *SHOWING,
    ),
    "The same engine and packs as for logits: a rerun embeds only what is new or changed.",
    (
        "kd-cache train extract --target b --checkpoint city=outputs/teacher_city/A2b/best.safetensors "
        "--checkpoint scene=outputs/teacher_scene/global/best.safetensors",
    ),
    ("output_dir",),
    (0, 1, 2, 3, 4, 5, 6),
)  # fmt: skip

PLUGIN = Plugin(
    (CITY, CITY2SCENE, SCENE, ALL, EXTRACT),
    (
        Group(
            "train",
            "Train teachers: city, City2Scene and scene, each validated by recording location.",
            ("city", "city2scene", "scene"),
        ),
    ),
)
