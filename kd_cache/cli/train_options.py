"""The options of ``kd-cache train …``, said once: each command shows those that mean something to it."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kd_cache.cli import options as opt

DATA, START, NET, STAGES, AUGMENT, OPTIMISER = "Data", "Start", "Net", "Stages", "Augmentation", "Optimiser"
LoopPrecision = opt.Precision
Preset = Literal["auto", "scratch", "frozen", "full-model", "backbone"]
Level = Literal["off", "moderate", "full"]


def _option(name: str, text: str, panel: str, **more: Any) -> Any:
    variable = "KD_CACHE_" + name.removeprefix("--").partition("/")[0].replace("-", "_").upper()
    return typer.Option(name, help=text, rich_help_panel=panel, envvar=variable, show_envvar=False, **more)


def _widths(text: str) -> tuple[int, ...]:
    """``1024,1024``, or ``none`` for a linear head."""
    parts = [] if text.strip().lower() == "none" else [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) <= 1 << 16 for part in parts):
        raise typer.BadParameter(f"expected widths such as 1024,1024, or none, found {text!r}")
    return tuple(map(int, parts))


TargetOrAll = Literal["b", "c", "s1", "s2", "s3", "all"]
AnyTarget = Annotated[
    Literal["global", "b", "c", "s1", "s2", "s3", "all"],
    _option("--target", "A scene teacher learns from A alone: one serves every target.", DATA),
]


@dataclass(frozen=True)
class TrainOptions:
    """Every option of every training command, by its name; `signature_for` makes a command's of them."""

    target: Annotated[TargetOrAll, _option("--target", "Target device; all for each of them.", DATA)]
    json_path: opt.JsonPathOption = None
    data_root: opt.DataRootOption = None
    features: opt.FeaturesOption = None
    num_scenes: opt.NumScenesOption = 10
    num_cities: opt.NumCitiesOption = 12
    allow_shared_locations: opt.AllowSharedOption = False
    allow_outside: opt.AllowOutsideOption = field(default_factory=list)
    val_ratio: Annotated[
        float,
        _option("--val-ratio", "The share of each city's locations that is held out for validation.", DATA, min=0.0),
    ] = 0.1
    fold: Annotated[int, _option("--fold", "Which locations: 0, 1, … hold out different ones.", DATA, min=0)] = 0
    quick_experiment: Annotated[
        float,
        _option(
            "--quick-experiment",
            "Use only this share of each city's locations; publishes nothing.",
            DATA,
            min=0.0,
            max=1.0,
        ),
    ] = 1.0
    feature_spec: Annotated[
        str, _option("--feature-spec", "The front end in words; kept with the teacher and its logits.", DATA)
    ] = ""
    output_dir: Annotated[
        Path, _option("--output-dir", "Where checkpoints, runs and cached pre-training are kept.", DATA)
    ] = Path("outputs")
    city_teacher_ckpt: Annotated[
        Path | None,
        _option(
            "--city-teacher-ckpt",
            "The city teacher to stand on.  (default: one of the same settings, trained if it is not cached)",
            START,
        ),
    ] = None
    embeddings: Annotated[
        list[str],
        _option(
            "--embeddings",
            "Put the head on these extracted embeddings instead (kd-cache train extract); repeatable, side by side.",
            START,
            metavar="NAME",
        ),
    ] = field(default_factory=list)
    init: Annotated[
        Path | None, _option("--init", "Start from this checkpoint: a whole model, or one whose head is new.", START)
    ] = None
    resume: Annotated[
        Literal["auto", "fresh"],
        _option("--resume", "Go on with an unfinished run and use cached pre-training (auto), or neither.", START),
    ] = "auto"
    arch: Annotated[str, _option("--arch", "cp_resnet, cnn14, or module:factory of your own.", NET)] = "cp_resnet"
    feature_dim: Annotated[
        int | None, _option("--feature-dim", "Width of the embedding.  (default: 92 or 2048)", NET, min=2)
    ] = None
    mlp_hidden_dims: Annotated[
        Any,
        _option(
            "--mlp-hidden-dims",
            "Hidden widths of the classifier (cnn14) or of the scene head.  (default: 1024,1024; a linear scene head)",
            NET,
            metavar="W,W|none",
            parser=_widths,
        ),
    ] = None
    dropout: Annotated[
        float,
        _option("--dropout", "Between the layers of a classifier or head with hidden ones.", NET, min=0.0, max=0.95),
    ] = 0.3
    preset: Annotated[
        Preset,
        _option("--preset", "What the stages are; auto goes by where the weights come from.", STAGES),
    ] = "auto"
    stage: Annotated[
        list[str],
        _option(
            "--stage",
            "One stage of your own, in place of a preset; repeatable, in order.",
            STAGES,
            metavar="level=2,epochs=5,lr=1e-4[,augment=off][,schedule=constant]",
        ),
    ] = field(default_factory=list)
    direct_unfreeze: Annotated[
        bool, _option("--direct-unfreeze", "Permit a stage at level 0 straight after one at level 2.", STAGES)
    ] = False
    epochs: Annotated[
        int | None,
        _option(
            "--epochs",
            "Of all stages of a preset together.  (default: 40, 200 of a frozen backbone's head)",
            STAGES,
            min=1,
        ),
    ] = None
    patience: Annotated[
        int, _option("--patience", "Epochs without a better validation that end a stage; 0 never.", STAGES, min=0)
    ] = 10
    cached_features: Annotated[
        bool,
        _option("--cached-features/--no-cached-features", "Train a head alone on embeddings computed once.", STAGES),
    ] = True
    mixup: Annotated[
        float | None,
        _option(
            "--mixup", "α of mixup (0.1 to 0.4 is usual): clips and labels are blended in pairs.", AUGMENT, min=0.0
        ),
    ] = None
    time_mask: Annotated[
        float | None, _option("--time-mask", "Largest share of frames that is masked.", AUGMENT, min=0.0, max=1.0)
    ] = None
    freq_mask: Annotated[
        float | None, _option("--freq-mask", "Largest share of mel bins that is masked.", AUGMENT, min=0.0, max=1.0)
    ] = None
    time_roll: Annotated[
        float | None, _option("--time-roll", "Largest share of a clip that it is rolled by.", AUGMENT, min=0.0, max=1.0)
    ] = None
    freq_mixstyle: Annotated[
        float | None,
        _option("--freq-mixstyle", "Probability that a batch trades frequency statistics.", AUGMENT, min=0.0, max=1.0),
    ] = None
    device_response: Annotated[
        float | None,
        _option(
            "--device-response", "Height of the random frequency responses that clips get.", AUGMENT, min=0.0, max=10.0
        ),
    ] = None
    batch_size: Annotated[int, _option("--batch-size", "Clips in a batch.", OPTIMISER, min=1)] = 32
    lr: Annotated[
        float | None,
        _option("--lr", "Learning rate of the first stage; later ones keep their proportion.", OPTIMISER, min=0.0),
    ] = None
    sweep: Annotated[
        str | None,
        _option(
            "--sweep",
            "Train a head for each combination over one extraction; the best by validation is kept.",
            OPTIMISER,
            metavar="lr=1e-3/1e-2,dropout=0/0.3",
        ),
    ] = None
    optimizer: Annotated[Literal["adamw", "sgd"], _option("--optimizer", "AdamW, or SGD with momentum.", OPTIMISER)] = (
        "adamw"
    )
    weight_decay: Annotated[
        float, _option("--weight-decay", "Of matrices and kernels, not of biases and norms.", OPTIMISER, min=0.0)
    ] = 1e-2
    momentum: Annotated[float, _option("--momentum", "Of sgd (Nesterov).", OPTIMISER, min=0.0, max=0.999)] = 0.9
    warmup_epochs: Annotated[
        float,
        _option(
            "--warmup-epochs", "The learning rate rises for so long (at most a third of a stage).", OPTIMISER, min=0.0
        ),
    ] = 6.0
    label_smoothing: Annotated[
        float, _option("--label-smoothing", "Spread over all classes.", OPTIMISER, min=0.0, max=0.9)
    ] = 0.0
    class_weights: Annotated[
        Literal["none", "balanced"], _option("--class-weights", "Weigh rare classes up.", OPTIMISER)
    ] = "none"
    ema: Annotated[
        float,
        _option(
            "--ema",
            "Decay of averaged weights, which are then the ones kept; 0: none.",
            OPTIMISER,
            min=0.0,
            max=0.99999,
        ),
    ] = 0.97
    accumulate: Annotated[int, _option("--accumulate", "Batches for one step.", OPTIMISER, min=1)] = 1
    clip: Annotated[float, _option("--clip", "Largest norm of the gradient; 0: any.", OPTIMISER, min=0.0)] = 0.0
    drop_last: Annotated[bool, _option("--drop-last", "Leave out an epoch's incomplete batch.", OPTIMISER)] = False
    seed: Annotated[int, _option("--seed", "Of everything random.", opt.RUN, min=0, max=2**63 - 1)] = 42
    deterministic: Annotated[
        bool,
        _option("--deterministic", "Only algorithms that repeat to the bit on this machine.", opt.RUN),
    ] = False
    precision: Annotated[
        LoopPrecision,
        _option("--precision", "Mixed precision of forward and backward pass; weights stay float32.", opt.RUN),
    ] = "fp32"
    compile: Annotated[
        bool, _option("--compile/--no-compile", "Train through torch.compile (implies --drop-last).", opt.RUN)
    ] = False
    device: opt.DeviceOption = "auto"
    workers: opt.WorkersOption = 2
    pth: Annotated[bool, _option("--pth", "Also write best.pth, under the names of older pipelines.", opt.OUTPUT)] = (
        False
    )
    half: Annotated[bool, _option("--half", "Store weights as float16.", opt.OUTPUT)] = False
    tensorboard: Annotated[
        bool, _option("--tensorboard", "Also log for TensorBoard (pip install tensorboard).", opt.OUTPUT)
    ] = False
    shuffle_labels: Annotated[
        bool, _option("--shuffle-labels", "A control on chance: train on shuffled labels, publish nothing.", opt.RUN)
    ] = False
    cache_root: opt.CacheRootOption = Path("cache")
    max_manifest_bytes: opt.MaxManifestOption = opt.MAX_MANIFEST
    max_feature_bytes: opt.MaxFeatureOption = opt.MAX_FEATURE
    max_checkpoint_bytes: opt.MaxCheckpointOption = opt.MAX_CHECKPOINT
    config: opt.ConfigOption = None
    as_json: opt.JsonOption = False
    quiet: opt.QuietOption = False
    debug: opt.DebugOption = False


def signature_for(
    work: Callable[[typer.Context, TrainOptions], None], without: Collection[str], *, is_global: bool = False
) -> Callable[..., None]:
    """A command that takes the options (``without`` left out) and hands them to ``work``.

    ``is_global``: it makes a teacher for every target, so that none need be named.
    """
    hints = typing.get_type_hints(TrainOptions, include_extras=True)
    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for each in fields(TrainOptions):
        if each.name in without:
            continue
        kind, default = hints[each.name], _default(each)
        if each.name == "target" and is_global:
            kind, default = AnyTarget, "global"
        parameters.append(
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        )

    def command(**given: Any) -> None:
        ctx = given.pop("ctx")
        left_out: dict[str, Any] = {each.name: _default(each) for each in fields(TrainOptions) if each.name in without}
        work(ctx, TrainOptions(**left_out, **given))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _default(each: Field[Any]) -> Any:
    if each.default_factory is not MISSING:
        return each.default_factory()
    return inspect.Parameter.empty if each.default is MISSING else each.default
