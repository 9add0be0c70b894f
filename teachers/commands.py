"""The commands ``kd-cache train …``: their options and examples. What they do is in `teachers.training_runs`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from kd_cache.commands import Command, Group, Plugin
from kd_cache.options import DATA_LIMITS, DATASET, OUTPUT, SHOWING, TEACHERS, Option, Target, changed
from kd_cache.train.settings import AUGMENT, AUGMENTATION, OPTIMISER, SIZES, STAGES
from kd_cache.train.settings import OPTIONS as SETTINGS

START = "Start"


_CHOICES: dict[str, Any] = {"metavar": "", "otherwise": ""}  # these targets are known; a cache's are its task's
TARGET = changed(
    "target",
    kind=Literal["b", "c", "s1", "s2", "s3", "all"],
    help="Target device; all for each of them.",
    default=...,
    **_CHOICES,
)
ONE_TARGET = changed("target", kind=Target, default=..., **_CHOICES)
ANY_TARGET = changed(
    "target",
    kind=Literal["global", "b", "c", "s1", "s2", "s3", "all"],
    help="A scene teacher learns from A alone: one serves every target.",
    default="global",
    **_CHOICES,
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
    "rename_map",
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
    "report",
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
    examples=("kd-cache train city --target b --channels 8,8,16,24 --epochs 20",),
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
    ("kd-cache train all --target b --channels 8,8,16,24 --epochs 20 --cache-root cache/trained",),
    ("output_dir", "arch", "epochs"),
    (0, 1, 2, 3, 4, 5, 6),
)
EXTRACT = Command(
    "train extract",
    "teachers.training_runs:extract",
    "Embed the permitted train samples with backbones of teachers or nets of your own, once, for all that train on "
    "them.",
    (
        ONE_TARGET,
        Option("checkpoint", list[str], "The teacher whose backbone embeds; repeatable.", TEACHERS, [],
               otherwise="name: architecture and weights' digest", metavar="[NAME=]PATH"),
        changed("teacher", help="A net of your own that embeds, with the value_kind embedding; repeatable. Its code "
                "runs."),
        *DATASET,
        "rename_map",
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

PAIRS = "Pairs"
_OF = {option.name: option for option in SETTINGS}
RANK = Command(
    "train rank",
    "teachers.ranking:rank",
    "Train a ranker: which of two samples is the better one, from pairs that reviewers judged.",
    (
        Option("pairs", Path, "CSV, TSV or JSON with a, b, winner, agreement, reviewers, series.", PAIRS),
        Option("min_agreement", float, "Leave out pairs of which a smaller share of the reviewers agrees.", PAIRS, 0.7,
               low=0, high=1),
        Option("min_reviewers", int, "Leave out pairs that fewer have judged.", PAIRS, 2, low=0),
        Option("ties", Literal["out", "half"], "Leave ties in votes out, or learn from them as half a win for each.",
               PAIRS, "out"),
        replace(_OF["val_ratio"], help="The share of the groups of series that is held out for validation.",
                default=0.15, panel=PAIRS, high=0.5),
        Option("test_ratio", float, "And for the test at the end.", PAIRS, 0.15, low=0, high=0.5),
        replace(_OF["fold"], help="Which groups validate: 0, 1, … hold out different ones; test stays.", panel=PAIRS),
        replace(_OF["quick_experiment"], help="Use only this share of the groups of series; publishes nothing.",
                panel=PAIRS),
        replace(EMBEDDINGS, help="Stand on these extracted embeddings (kd-cache train extract); repeatable, side by "
                "side."),
        Option("freeze", Literal["none", "partial", "full"] | None, "Without --embeddings: freeze nothing of the "
               "trunk, all but its neck, or all of it.", START, None, "none"),
        replace(_OF["arch"], help=f"The trunk, without --embeddings: {_OF['arch'].help}"),
        *(_OF[each] for each in SIZES),
        replace(INIT, help="Start the trunk from this checkpoint."),
        Option("name", str | None, "Of the folder of the run.", OUTPUT, None, "embeddings, or end_to_end"),
        replace(OUTPUT_DIR, help="The ranker goes to its folder rank/A2<target>/<name>; embeddings are there too."),
        replace(ONE_TARGET, help="The pairs' samples are train samples of A and of this device."), *DATASET, RESUME,
        replace(_OF["feature_dim"], otherwise="64 over embeddings, else the architecture's"),
        replace(_OF["mlp_hidden_dims"], help="Hidden widths of the scorer.", otherwise="64"),
        replace(_OF["dropout"], default=0.1, help="Between the layers of the scorer."),
        replace(_OF["epochs"], default=40, kind=int, otherwise="", help="At most."),
        replace(_OF["lr"], otherwise="0.003; 0.0001 of a trunk that was trained before", help="Learning rate."),
        *(_OF[name] for name in (
            "patience", "batch_size", "optimizer", "weight_decay", "momentum", "warmup_epochs", "label_smoothing",
            "ema", "accumulate", "clip", "seed", "deterministic", "precision", "compile", "shuffle_labels")),
        Option("augment", Literal["off", "moderate", "full"], "Without --embeddings: how much clips are changed, both "
               "of a pair alike. The options below change what it has; with off they are all there is.", AUGMENT,
               "off"),
        *AUGMENTATION,
        "device", "workers", "report", *DATA_LIMITS, "max_checkpoint_bytes", "config", *SHOWING,
    ),
    "Whole series are held out, and series that share a sample are one group. Swapping a and b gives exactly 1 − P.",
    (
        "kd-cache train rank --target b --json-path images/dataset.json --pairs images/pairs.csv --embeddings looks",
    ),
    ("pairs", "embeddings", "freeze", "min_agreement", "min_reviewers"),
    (0, 1, 2, 3, 4, 5, 6),
)  # fmt: skip

PLUGIN = Plugin(
    (CITY, CITY2SCENE, SCENE, ALL, EXTRACT, RANK),
    (
        Group(
            "train",
            "Train teachers (city, City2Scene, scene), each validated by recording location, and rankers.",
            ("city", "city2scene", "scene", "rank"),
        ),
    ),
)
