"""The commands ``kd-cache train …``: their options and examples. What they do is in `teachers.training_runs`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from kd_cache.commands import Command, Group, Plugin
from kd_cache.errors import UsageError
from kd_cache.options import DATA, DATA_LIMITS, DATASET, MAX_SEED, OUTPUT, RUN, SHOWING, TEACHERS, Option, changed

START, NET, STAGES, AUGMENT, OPTIMISER = "Start", "Net", "Stages", "Augmentation", "Optimiser"


def widths(text: str) -> tuple[int, ...]:
    """``1024,1024``, or ``none`` for a linear head. Raises `UsageError`."""
    parts = [] if text.strip().lower() == "none" else [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) <= 1 << 16 for part in parts):
        raise UsageError(f"expected widths such as 1024,1024, or none, found {text!r}")
    return tuple(map(int, parts))


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


def _share(name: str, text: str) -> Option:
    return Option(name, float | None, text, AUGMENT, None, low=0, high=1)


_TRAINING: tuple[str | Option, ...] = (
    TARGET,
    *DATASET,
    Option("val_ratio", float, "The share of each city's locations that is held out for validation.", DATA, 0.1, low=0),
    Option("fold", int, "Which locations are held out: 0, 1, … choose others.", DATA, 0, low=0),
    Option("quick_experiment", float, "Use only this share of each city's locations; publishes nothing.", DATA, 1.0,
           low=0, high=1),
    Option("feature_spec", str, "The front end in words; kept with the teacher and its logits.", DATA, ""),
    OUTPUT_DIR,
    CACHE_ROOT,
    CITY_TEACHER,
    EMBEDDINGS,
    INIT,
    Option("resume", Literal["auto", "fresh"],
           "Go on with an unfinished run and use cached pre-training (auto), or neither.", START, "auto"),
    Option("arch", str, "cp_resnet, cnn14, or a factory of your own: module:factory, or path/to/file.py:factory.", NET,
           "cp_resnet"),
    Option("feature_dim", int | None, "Width of the embedding.", NET, None, "92 or 2048", low=2),
    Option("mlp_hidden_dims", Any, "Hidden widths of the classifier (cnn14) or of the scene head.", NET, None,
           "1024,1024; a linear scene head", metavar="W,W|none", parse=widths),
    Option("dropout", float, "Dropout in a classifier or head with hidden layers.", NET, 0.3, low=0,
           high=0.95),
    Option("preset", Literal["auto", "scratch", "frozen", "full-model", "backbone"],
           "Which stages; auto chooses by where the weights come from.", STAGES, "auto"),
    Option("stage", list[str], "One stage of your own, in place of a preset; repeatable, in order.", STAGES, [],
           metavar="level=2,epochs=5,lr=1e-4[,augment=off][,schedule=constant]", keyed=True),
    Option("direct_unfreeze", bool, "Permit a stage at level 0 straight after one at level 2.", STAGES, False),
    Option("epochs", int | None, "Epochs of all stages of a preset together.", STAGES, None,
           "40, 200 of a frozen backbone's head", low=1),
    Option("patience", int, "End a stage after so many epochs without a better validation; 0: never.", STAGES, 10,
           low=0),
    CACHED_FEATURES,
    Option("mixup", float | None, "α of mixup (0.1 to 0.4 is usual): clips and labels are blended in pairs.", AUGMENT,
           None, low=0),
    _share("time_mask", "Largest share of frames that is masked."),
    _share("freq_mask", "Largest share of mel bins that is masked."),
    _share("time_roll", "Largest share of a clip that it is rolled by."),
    _share("freq_mixstyle", "Probability that a batch trades frequency statistics."),
    Option("device_response", float | None, "Height of the random frequency responses that clips get.", AUGMENT, None,
           low=0, high=10),
    Option("batch_size", int, "Clips in a batch.", OPTIMISER, 32, low=1),
    Option("lr", float | None, "Learning rate of the first stage; later ones keep their proportion.", OPTIMISER, None,
           low=0),
    SWEEP,
    Option("optimizer", Literal["adamw", "sgd"], "AdamW, or SGD with momentum.", OPTIMISER, "adamw"),
    Option("weight_decay", float, "Weight decay of matrices and kernels (not of biases and norms).", OPTIMISER, 1e-2,
           low=0),
    Option("momentum", float, "Nesterov momentum of sgd.", OPTIMISER, 0.9, low=0, high=0.999),
    Option("warmup_epochs", float, "Epochs in which the learning rate rises (at most a third of a stage).", OPTIMISER,
           6.0, low=0),
    Option("label_smoothing", float, "This share of a label is spread over all classes.", OPTIMISER, 0.0, low=0,
           high=0.9),
    Option("class_weights", Literal["none", "balanced"], "balanced gives rare classes a larger weight.", OPTIMISER,
           "none"),
    Option("ema", float, "Decay of averaged weights, which are then the ones kept; 0: none.", OPTIMISER, 0.97, low=0,
           high=0.99999),
    Option("accumulate", int, "Batches per optimiser step.", OPTIMISER, 1, low=1),
    Option("clip", float, "Largest norm of the gradient; 0: no limit.", OPTIMISER, 0.0, low=0),
    Option("drop_last", bool, "Leave out an epoch's incomplete batch.", OPTIMISER, False),
    changed("seed", help="Seed of all randomness.", high=MAX_SEED),
    Option("deterministic", bool, "Only algorithms that repeat to the bit on this machine.", RUN, False),
    changed("precision", help="Mixed precision of forward and backward pass; weights stay float32."),
    changed("compile", help="Train through torch.compile (implies --drop-last)."),
    "device",
    "workers",
    Option("pth", bool, "Also write best.pth, under the names of older pipelines.", OUTPUT, False),
    Option("half", bool, "Store weights as float16.", OUTPUT, False),
    Option("tensorboard", bool, "Also log for TensorBoard (pip install tensorboard).", OUTPUT, False),
    Option("shuffle_labels", bool, "A control that must end at chance: train on shuffled labels, publish nothing.", RUN,
           False),
    *DATA_LIMITS,
    "max_checkpoint_bytes",
    "config",
    *SHOWING,
)  # fmt: skip

_ONLY_A_HEAD = (CITY_TEACHER, CACHED_FEATURES, EMBEDDINGS, SWEEP, CACHE_ROOT)
_FIRST = ("output_dir", "arch", "epochs", "init")


def _training(without: Collection[Option]) -> tuple[str | Option, ...]:
    return tuple(option for option in _TRAINING if option not in without)


CITY = Command(
    "train city",
    "teachers.training_runs:train_city",
    "Train a city classifier on A and the target: city labels only.",
    _training(_ONLY_A_HEAD),
    examples=("kd-cache train city --target b",),
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
    ("kd-cache train all --target b --cache-root cache/trained",),
    ("output_dir", "arch", "epochs"),
    (0, 1, 2, 3, 4, 5, 6),
)
EXTRACT = Command(
    "train extract",
    "teachers.extraction:extract",
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
