"""The lines of the command table that are about students."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from kd_cache.cli import notes
from kd_cache.commands import Command
from kd_cache.distill.recipe import parse_modes, parse_temperature
from kd_cache.errors import UsageError, shown
from kd_cache.options import DATA, DATA_LIMITS, DATASET, LIMITS, OUTPUT, OWN_TEACHERS, RUN, SHOWING, Option, targets
from kd_cache.train.settings import OPTIONS as TRAINING
from kd_cache.train.settings import SIZES

KD, KD_WEIGHT = "Distillation", "Weight of distillation"
_NOT_OF_STUDENTS = ("quick_experiment", "class_weights", "label_smoothing", "shuffle_labels", "preset",
                    "direct_unfreeze")  # fmt: skip
_OF_TRAINING = {option.name: option for option in TRAINING}
_ARCH = replace(_OF_TRAINING["arch"], default="cp_mobile")
_MODE = Option("teacher_mode", str, "ce (no teacher), fit (weights by held-out rows), mean, probs, gate, entropy, "
               "label, weights:a=0.7,b=0.3, or one teacher's name.", KD, "fit", metavar="MODE")  # fmt: skip
_TAUGHT: tuple[str | Option, ...] = (
    Option("recipe", Literal["default", "city2scene", "dcase"], "Where the numbers below begin.", KD, "default"),
    Option("loss", str | None, "kl, soft_ce, dcase, hard, rkl, js, skew, ab, mse, dkd, rld, nkd, wttm, dist, "
           "logit_std or bce.", KD, None, "kl", metavar="NAME"),
    Option("loss_option", list[str], "A further parameter of the loss, such as beta=4; repeatable.", KD, [],
           metavar="NAME=X"),
    Option("temperature", Any, "Of student and teachers; 4:1 goes there in a line.", KD, None, "the loss's own",
           metavar="X[:X]", parse=parse_temperature),
    Option("kd_alpha", float | None, "The weight of distillation; hard labels have the rest.", KD, None, "0.5",
           low=0, high=1),
    Option("apply_kd_to", Literal["target", "all", "source"] | None, "The rows that are distilled.", KD, None,
           "target"),
    Option("normalise", Literal["batch", "mask"] | None, "Divide by the batch's rows, or each sum by its own.", KD,
           None, "batch"),
    Option("kd_weighting", Literal["none", "pmax", "threshold", "entropy"] | None,
           "Weigh a row by the teachers' confidence.", KD_WEIGHT, None, "none"),
    Option("confidence_threshold", float | None, "Of --kd-weighting threshold.", KD_WEIGHT, None, "0", low=0,
           high=1),
    Option("raw_weights", bool, "Leave those weights as they are; else they are divided by their mean.", KD_WEIGHT,
           False),
    Option("balance", bool, "Half of each batch is of A, half of the target; the fewer are drawn again.", KD_WEIGHT,
           False),
    Option("kd_warmup_epochs", int | None, "Epochs without distillation.", KD_WEIGHT, None, "0", low=0),
    Option("kd_ramp_epochs", int | None, "Epochs over which it then grows.", KD_WEIGHT, None,
           "0; of dkd 20, where no warm-up is given either", low=0),
    Option("keep_ce", bool, "Hard labels keep the weight 1.", KD_WEIGHT, False),
    Option("select", Literal["best", "last"], "Keep the epoch with the best macro accuracy on held-out locations of A "
           "(of equals the one with the least log loss), or the last one.", RUN, "best"),
    "cache_root", *DATASET, "student_features", "task", "rename_map", *OWN_TEACHERS,
    # Not "subset": in a settings file that is the one that prepare reads.
    Option("subset_table", Path | None, "Use only the train samples that this table lists (split25.csv), in validation "
           "and fusion too; joined by file name.", DATA, None, "all that are permitted", flag="--subset"),
    # Not "views": in a settings file that is how many a dump makes.
    Option("on_views", bool, "Each epoch takes one view of every clip (kd-cache dump --views), exactly as the teachers "
           "scored it; nothing else is done to it.", DATA, False, flag="--views"),
    Option("check_views", int, "So many of an epoch's views are compared by digest with what was scored.", DATA, 64,
           low=0),
    Option("output_dir", Path, "The student goes to its folder student/A2<target>/<mode>.", OUTPUT,
           Path("outputs")),
    Option("init", Path | None, "Start from this checkpoint.", RUN, None),
    Option("resume", Literal["auto", "fresh"], "Go on with an unfinished run of the same key, or begin anew.", RUN,
           "auto"),
    *(_ARCH if option.name == "arch" else option for option in TRAINING if option.name not in _NOT_OF_STUDENTS),
    "device", "workers",
    Option("pth", bool, "Also write best.pth, under the names of older pipelines.", OUTPUT, False),
    Option("half", bool, "Store weights as float16.", OUTPUT, False),
    Option("tensorboard", bool, "Also log for TensorBoard (pip install tensorboard).", OUTPUT, False),
    "report", *DATA_LIMITS, "max_checkpoint_bytes", "config", *SHOWING,
)  # fmt: skip
_TARGETS = targets(
    help="Target device, whose cache teaches. Of several one student learns, from all of their caches.",
)
_TAUGHT_NOTE = (
    "Validated on locations of A that are held out; test is measured once, at the end. Labels of the target are never "
    "looked at. Data options that are not given are those saved with the cache."
)

STUDENT = Command(
    "student",
    "kd_cache.cli.student:student",
    "Train a student on A and a target: hard labels of A, and the teachers of a cache.",
    (_TARGETS, _MODE, *_TAUGHT),
    _TAUGHT_NOTE,
    (
        "kd-cache student --target b --arch cp_resnet --epochs 3",
        "kd-cache student --target b --arch cp_resnet --teacher-mode ce --epochs 2",
        "kd-cache evaluate outputs/student/A2b/fit/best.safetensors --target b",
    ),
    ("teacher_mode", "recipe", "epochs", "output_dir"),
    (0, 1, 2, 3, 4, 5, 6),
    notes=notes.STUDENT,
)  # fmt: skip

COMPARE = Command(
    "student compare",
    "kd_cache.cli.student:compare",
    "Say what teachers are worth: students of several modes and seeds, against a twin without teachers.",
    (
        _TARGETS,
        Option("modes", Any, "Modes as of --teacher-mode; ce is always among them.", KD, None,
               "mean, fit, and each teacher alone", metavar="MODE,…", parse=parse_modes),
        Option("seeds", int, "How many seeds, from --seed on.", KD, 3, low=1, high=1000),
        *(option for option in _TAUGHT if getattr(option, "name", option) not in ("pth", "tensorboard")),
    ),
    "All of one seed begin with the same weights and see the same batches. What is trained already is kept.",
    ("kd-cache student compare --target b --modes mean --seeds 1 --arch cp_resnet --epochs 2",),
    ("modes", "seeds", "recipe", "epochs", "output_dir"),
    (0, 1, 2, 3, 4, 5, 6),
    notes=notes.COMPARE,
)  # fmt: skip

_MODEL = Option("model", str, "A checkpoint, or a net of your own (its code runs).", "Arguments", positional=True,
                metavar="CKPT|NAME=module:factory[,ckpt=PATH]")  # fmt: skip


def parse_shape(text: str) -> tuple[int, int]:
    """``65,256`` or ``1,65,256``: frames and bins of one clip. Raises `UsageError`."""
    numbers = text.split(",")
    if len(numbers) == 3 and numbers[0].strip() == "1":
        numbers = numbers[1:]
    if len(numbers) != 2 or not all(each.strip().isdecimal() and 0 < int(each) <= 1 << 20 for each in numbers):
        raise UsageError(f"expected frames and bins such as 65,256, found {shown(text)}")
    return int(numbers[0]), int(numbers[1])


PREDICT = Command(
    "student predict",
    "kd_cache.cli.student_models:predict",
    "Write a student's decisions and probabilities on unlabelled clips, as challenges want them.",
    (
        _MODEL,
        # Not "features": in a settings file that is the file that a dump reads.
        Option("features_at", Path, "Folder of .npy features, or one HDF5 file.", DATA, flag="--features"),
        Option("table", Path | None, "Table of the clips to predict, with a column filename; its order is kept.", DATA,
               None, "every .npy of the folder"),
        Option("output", Path, "File to write.", OUTPUT, Path("submission.tsv")),
        Option("overwrite", bool, "Replace a file that differs.", OUTPUT, False),
        "num_scenes", "num_cities", "allow_outside", "device", _OF_TRAINING["batch_size"], "workers",
        "max_feature_bytes", "max_checkpoint_bytes", "config", *SHOWING,
    ),
    examples=(
        "kd-cache student predict data/sample/teachers/teacher_scene/global/best.safetensors "
        "--features data/sample/features --output cache/submission.tsv",
    ),
    first=("table", "output"),
    notes=notes.PREDICT,
)  # fmt: skip

COMPLEXITY = Command(
    "student complexity",
    "kd_cache.cli.student_models:complexity",
    "Count a net's parameters, their bytes, and its multiply-accumulates (MACs) on one clip.",
    (
        replace(_MODEL, kind=str | None, default=None, otherwise="--arch, untrained"),
        Option("shape", Any, "Frames and bins of the clip.", DATA, None, "the manifest's first train feature",
               metavar="T,F", parse=parse_shape),
        Option("limits", Literal["none", "dcase"], "Exit with 1 beyond 128,000 bytes or 30 M MACs (dcase).", LIMITS,
               "none"),
        Option("stored_as", Literal["fp32", "fp16", "int8"], "What bytes --limits are about.", LIMITS, "fp16"),
        _ARCH, *(_OF_TRAINING[name] for name in (*SIZES, "feature_dim", "mlp_hidden_dims")),
        *DATASET, *DATA_LIMITS, "max_checkpoint_bytes", "config", *SHOWING,
    ),
    examples=("kd-cache student complexity --arch cp_mobile --shape 65,256 --limits dcase --json",),
    first=("arch", "shape", "limits", "stored_as"),
    notes=notes.COMPLEXITY,
)  # fmt: skip
