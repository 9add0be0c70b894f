"""Everything a training is told, and what it means: stages with a freeze level, a learning rate and an augmentation.

`OPTIONS` says it on the command line. Importing this imports no torch, because help is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Final, Literal, get_type_hints

from kd_cache.errors import UsageError, shown
from kd_cache.options import DATA, MAX_SEED, RUN, Option
from kd_cache.options import OPTIONS as COMMON
from kd_cache.score.factory import without_folder

CITY, CITY2SCENE, SCENE = "city", "city2scene", "scene"
ROLES: Final = (SCENE, CITY2SCENE, CITY)
RANK: Final = "rank"
"""The role of a net that is no teacher: it learns which of two samples is the better one."""
SCRATCH, FROZEN, FULL_MODEL, BACKBONE, AUTO = "scratch", "frozen", "full-model", "backbone", "auto"
PRESETS: Final = (AUTO, SCRATCH, FROZEN, FULL_MODEL, BACKBONE)
GENTLE: Final = 1e-4
"""Above this learning rate a pre-trained model is untrained before it is tuned."""
_PRESETS: Final[Mapping[str, tuple[int, float, tuple[tuple[int, int, float, str, str], ...]]]] = {
    SCRATCH: (40, 3e-3, ((0, 0, 1, "moderate", "cosine"),)),
    FROZEN: (200, 1e-2, ((2, 0, 1, "off", "cosine"),)),  # a head over embeddings computed once learns in no time
    FULL_MODEL: (30, GENTLE, ((2, 5, 1, "off", "constant"), (1, 8, 0.5, "moderate", "constant"),
                              (0, 0, 0.3, "moderate", "constant"))),
    BACKBONE: (30, GENTLE, ((2, 10, 1, "off", "constant"), (1, 2, 2, "moderate", "constant"),
                            (0, 0, 2, "moderate", "cosine"))),
}  # fmt: skip
"""By where the weights come from: the epochs and the first learning rate that it takes where nothing is said, and its
stages: level, epochs (of the last one those that are left), learning rate as a multiple of the first, augmentation,
schedule."""
_LEVEL_AUGMENT: Final = {2: "off", 1: "moderate", 0: "moderate"}
SIZES: Final = ("base_channels", "channels_multiplier", "expansion_rate", "channels")
"""Settings that only some architectures have (their ``sizes``)."""
NET, STAGES, AUGMENT, OPTIMISER = "Net", "Stages", "Augmentation", "Optimiser"
"""Panels of help."""
_STAGE_KEYS: Final = ("level", "epochs", "lr", "augment", "schedule")
_SCHEDULES: Final = ("cosine", "constant")


AUGMENTATIONS: Final = ("mixup", "time_mask", "freq_mask", "time_roll", "freq_mixstyle", "device_response")
"""Settings that augment; ``None`` leaves each to the stage."""


def label_of(role: str) -> str:
    """Which label a role learns: a city teacher cities, a ranker winners, all others scenes."""
    return {CITY: "city", RANK: "winner"}.get(role, "scene")


@dataclass(frozen=True)
class Augmentation:
    """How strongly clips are changed; 0 leaves a change out.

    Attributes:
        time_roll: clips are rolled in time by up to this share of their length.
        time_mask, freq_mask: one stretch of up to this share of the frames (mel bins) takes the clip's mean
            (SpecAugment, Park et al. 2019, arXiv 1904.08779).
        mixup: α of the Beta(α, α) that two clips and their labels are mixed by (Zhang et al. 2018, arXiv 1710.09412).
        freq_mixstyle: the probability that a batch's frequency-wise statistics are mixed between its clips (MixStyle,
            Zhou et al. 2021, arXiv 2104.02008, over frequency bins as Schmid et al. have it for DCASE 2022).
        mixstyle_alpha: α of the Beta(α, α) they are mixed by.
        device_response: largest height, in the features' unit, of each of three random smooth bumps over frequency that
            are added, as another microphone would; three clips in ten get a noise floor too.
    """

    time_roll: float = 0.0
    time_mask: float = 0.0
    freq_mask: float = 0.0
    mixup: float = 0.0
    freq_mixstyle: float = 0.0
    mixstyle_alpha: float = 0.3
    device_response: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value, most = getattr(self, each.name), _MOST.get(each.name, 1.0)
            if not 0 <= value <= most:
                raise UsageError(f"{each.name} is {value}, expected 0 to {most}")

    @property
    def is_off(self) -> bool:
        return self == Augmentation(mixstyle_alpha=self.mixstyle_alpha)

    def changed(self, **values: Any) -> Augmentation:
        """With other values where they are not ``None``."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


_MOST: Final = {"mixup": 10.0, "mixstyle_alpha": 10.0, "device_response": 10.0}
_MODERATE: Final = Augmentation(time_roll=1.0, freq_mixstyle=0.4, device_response=1.0)
LEVELS: Final = {
    "off": Augmentation(),
    "moderate": _MODERATE,
    "full": _MODERATE.changed(time_mask=0.1, freq_mask=0.1, mixup=0.2),
}
"""Names for what a stage of training asks for."""


@dataclass(frozen=True)
class Stage:
    """One part of a training: ``epochs`` at freeze ``level``, from learning rate ``lr`` on."""

    level: int
    epochs: int
    lr: float
    augment: str = "off"
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("level", self.level in (0, 1, 2), "0, 1 or 2"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("lr", 0 < self.lr <= 10, "more than 0 and at most 10"),
            ("augment", self.augment in LEVELS, ", ".join(LEVELS)),
            ("schedule", self.schedule in _SCHEDULES, " or ".join(_SCHEDULES)),
        ):
            if not good:
                raise UsageError(f"a stage's {name} is {shown(getattr(self, name))}, expected {expected}")


def parse_stage(text: str) -> Stage:
    """``level=1,epochs=5,lr=5e-5[,augment=moderate][,schedule=constant]``. Raises `UsageError`."""
    found: dict[str, str] = {}
    for item in text.split(","):
        key, separator, value = item.strip().partition("=")
        if not separator or key not in _STAGE_KEYS or key in found:
            raise UsageError(
                f"--stage {shown(text)}: found {shown(item)}, expected each of {', '.join(_STAGE_KEYS)} once"
            )
        found[key] = value.strip()
    if missing := [key for key in ("level", "epochs", "lr") if key not in found]:
        raise UsageError(f"--stage {shown(text)}: {', '.join(missing)} is missing")
    try:
        level, epochs, lr = int(found["level"]), int(found["epochs"]), float(found["lr"])
    except ValueError as error:
        raise UsageError(f"--stage {shown(text)}: {shown(error)}") from error
    augment = found.get("augment", _LEVEL_AUGMENT.get(level, "off"))
    return Stage(level, epochs, lr, augment, found.get("schedule", "cosine"))


def widths(text: str) -> tuple[int, ...]:
    """``1024,1024``, or ``none`` for a linear head. Raises `UsageError`."""
    parts = [] if text.strip().lower() == "none" else [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) <= 1 << 16 for part in parts):
        raise UsageError(f"expected widths such as 1024,1024, or none, found {text!r}")
    return tuple(map(int, parts))


def four_widths(text: str) -> tuple[int, ...]:
    """``8,8,16,24``. Raises `UsageError`."""
    found = widths(text)
    if len(found) != 4:
        raise UsageError(f"expected four widths such as 8,8,16,24, found {text!r}")
    return found


def _of(panel: str, default: Any, text: str, **more: Any) -> Any:
    """A field that a person can set: what its option says beyond name and type."""
    return field(default=default, metadata={"panel": panel, "help": text, **more})


def _share(text: str) -> Any:
    return _of(AUGMENT, None, text, low=0, high=1)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a training's weights come to, besides the data.

    ``role`` is one of `ROLES`, or `RANK`: what the net is to be, and what its folder is called after. ``epochs`` and
    ``lr`` are those of a preset, which gives each stage its part; ``stages`` are given one by one, in its place. A
    ``None`` stands for what the architecture, the preset or the stage's augmentation has of its own. Over few clips
    averaged weights (``ema``) make validation much less a matter of luck.
    """

    role: str
    val_ratio: float = _of(DATA, 0.1, "The share of each city's locations that is held out for validation.", low=0)
    fold: int = _of(DATA, 0, "Which locations: 0, 1, … hold out different ones.", low=0)
    quick_experiment: float = _of(
        DATA, 1.0, "Use only this share of each city's locations; publishes nothing.", low=0, high=1
    )
    feature_spec: str = _of(DATA, "", "The front end in words; kept with the teacher and its logits.")
    num_scenes: int = 10
    num_cities: int = 12
    arch: str = _of(
        NET,
        "cp_resnet",
        "cp_mobile, cp_resnet, bc_resnet, tf_sepnet, cnn14, or a factory of your own: module:factory, or "
        "path/to/file.py:factory.",
        names_code=True,
    )
    base_channels: int | None = _of(
        NET, None, "Channels that all others follow from (cp_mobile: in eights, bc_resnet, tf_sepnet).",
        otherwise="32, 40, 64", low=4, high=1024,
    )  # fmt: skip
    channels_multiplier: float | None = _of(
        NET, None, "How much wider each stage is than the one before (cp_mobile).", otherwise="1.8", low=1, high=8
    )
    expansion_rate: float | None = _of(
        NET, None, "How much wider a block is inside (cp_mobile).", otherwise="2.1", low=1, high=16
    )
    channels: tuple[int, ...] | None = _of(
        NET, None, "Channels of the four blocks (cp_resnet).", kind=Any, otherwise="32,32,64,92", metavar="N,N,N,N",
        parse=four_widths,
    )  # fmt: skip
    feature_dim: int | None = _of(
        NET, None, "Width of the embedding (cp_resnet, cnn14).", otherwise="92 or 2048", low=2
    )
    mlp_hidden_dims: tuple[int, ...] | None = _of(
        NET, None, "Hidden widths of the classifier (cnn14) or of the scene head.", kind=Any,
        otherwise="1024,1024; a linear scene head", metavar="W,W|none", parse=widths,
    )  # fmt: skip
    dropout: float = _of(NET, 0.3, "Between the layers of a classifier or head with hidden ones.", low=0, high=0.95)
    preset: Literal["auto", "scratch", "frozen", "full-model", "backbone"] = _of(
        STAGES, "auto", "What the stages are; auto goes by where the weights come from."
    )
    stages: tuple[Stage, ...] = ()
    direct_unfreeze: bool = _of(STAGES, False, "Permit a stage at level 0 straight after one at level 2.")
    epochs: int | None = _of(
        STAGES, None, "Of all stages of a preset together.", otherwise="40, 200 of a frozen backbone's head", low=1
    )
    patience: int | None = _of(
        STAGES, None, "Epochs without a better validation that end a stage; 0 never.",
        otherwise="a quarter of the stage's, 10 at least", low=0,
    )  # fmt: skip
    mixup: float | None = _of(
        AUGMENT, None, "α of mixup (0.1 to 0.4 is usual): clips and labels are blended in pairs.", low=0, high=10
    )
    time_mask: float | None = _share("Largest share of frames that is masked.")
    freq_mask: float | None = _share("Largest share of mel bins that is masked.")
    time_roll: float | None = _share("Largest share of a clip that it is rolled by.")
    freq_mixstyle: float | None = _share("Probability that a batch trades frequency statistics.")
    device_response: float | None = _of(
        AUGMENT, None, "Height of the random frequency responses that clips get.", low=0, high=10
    )
    batch_size: int = _of(OPTIMISER, 32, "Clips in a batch.", low=1)
    lr: float | None = _of(
        OPTIMISER, None, "Learning rate of the first stage; later ones keep their proportion.", low=0
    )
    optimizer: Literal["adamw", "sgd"] = _of(OPTIMISER, "adamw", "AdamW, or SGD with momentum.")
    weight_decay: float = _of(OPTIMISER, 1e-2, "Of matrices and kernels, not of biases and norms.", low=0)
    momentum: float = _of(OPTIMISER, 0.9, "Of sgd (Nesterov).", low=0, high=0.999)
    warmup_epochs: float = _of(
        OPTIMISER, 6.0, "The learning rate rises for so long (at most a third of a stage).", low=0
    )
    label_smoothing: float = _of(OPTIMISER, 0.0, "Spread over all classes.", low=0, high=0.9)
    class_weights: Literal["none", "balanced"] = _of(OPTIMISER, "none", "Weigh rare classes up.")
    ema: float = _of(
        OPTIMISER, 0.97, "Decay of averaged weights, which are then the ones kept; 0: none.", low=0, high=0.99999
    )
    accumulate: int = _of(OPTIMISER, 1, "Batches for one step.", low=1)
    clip: float = _of(OPTIMISER, 0.0, "Largest norm of the gradient; 0: any.", low=0)
    drop_last: bool = _of(OPTIMISER, False, "Leave out an epoch's incomplete batch.")
    seed: int = _of(RUN, 42, "Of everything random.", high=MAX_SEED)
    deterministic: bool = _of(RUN, False, "Only algorithms that repeat to the bit on this machine.")
    precision: str = _of(RUN, "fp32", "Mixed precision of forward and backward pass; weights stay float32.")
    compile: bool = _of(RUN, False, "Train through torch.compile (implies --drop-last).")
    shuffle_labels: bool = _of(RUN, False, "A control on chance: train on shuffled labels, publish nothing.")

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value, low, high = getattr(self, option.name), option.low, option.high
            if value is None or low is None:
                continue
            if not low <= value <= (_NO_LIMIT if high is None else high):  # not-a-number is in no range
                bounds = f"{low:g} or more" if high is None else f"{low:g} to {high:g}"
                raise UsageError(f"{option.name} is {value}, expected {bounds}")

    @property
    def label(self) -> str:
        """``city``, ``scene`` or ``winner``: what it learns."""
        return label_of(self.role)

    @property
    def num_classes(self) -> int:
        return {"city": self.num_cities, "winner": 2}.get(self.label, self.num_scenes)

    def patience_of(self, stage: Stage) -> int:
        """Epochs without a better validation that end it: a head of 200 epochs may begin slower than a net of 40."""
        return max(stage.epochs // 4, 10) if self.patience is None else self.patience

    @property
    def sizes(self) -> dict[str, Any]:
        """Those of `SIZES` that are given."""
        return {name: value for name in SIZES if (value := getattr(self, name)) is not None}

    def augmentation(self, stage: Stage) -> Augmentation:
        """What a stage's ``augment`` means with these settings."""
        if stage.augment == "off":
            return LEVELS["off"]
        return LEVELS[stage.augment].changed(
            mixup=self.mixup,
            time_mask=self.time_mask,
            freq_mask=self.freq_mask,
            time_roll=self.time_roll,
            freq_mixstyle=self.freq_mixstyle,
            device_response=self.device_response,
        )

    def key_parts(self) -> dict[str, Any]:
        """The settings by what they are about, for a key that changes with any of them.

        Without those that only say what the stages are (`stages_of`): the same stages are the same training.
        """
        values = {name: value for name, value in asdict(self).items() if name not in _OF_STAGES}
        values["arch"] = without_folder(self.arch)
        groups = {name: {key: values.pop(key) for key in keys} for name, keys in _GROUPS.items()}
        return {**groups, "optimiser": values}


_NO_LIMIT: Final = 10**30
_KINDS = get_type_hints(Settings)
OPTIONS: Final = tuple(
    replace(COMMON.get(each.name, Option(each.name, _KINDS[each.name], "", "")), default=each.default, **each.metadata)
    for each in fields(Settings)
    if each.metadata
)
"""The settings as a command line has them, with their limits: one table for both."""
AUGMENTATION: Final = tuple(option for option in OPTIONS if option.panel == AUGMENT)

_OF_STAGES: Final = {"epochs", "lr", "preset", "stages", "direct_unfreeze"}
_GROUPS: Final[Mapping[str, Sequence[str]]] = {
    "role": ("role", "num_scenes", "num_cities", "shuffle_labels"),
    "fold": ("val_ratio", "fold", "quick_experiment"),
    "front_end": ("feature_spec",),
    "architecture": ("arch", *SIZES, "feature_dim", "mlp_hidden_dims", "dropout"),
    "augmentation": AUGMENTATIONS,
    "seed": ("seed", "deterministic"),
}


def stages_of(settings: Settings, start: str) -> tuple[Stage, ...]:
    """The stages of a training whose weights come from ``start`` (`SCRATCH`, `FROZEN`, `FULL_MODEL`, `BACKBONE`).

    Raises:
        UsageError: too few epochs for the preset, or everything is unfrozen straight after the head.
    """
    if settings.stages:
        _refuse_direct_unfreeze(settings)
        return settings.stages
    preset = start if settings.preset == AUTO else settings.preset
    if preset not in _PRESETS:
        raise UsageError(f"no preset is called {shown(preset)}; known: {', '.join(PRESETS)}")
    epochs, first, plan = _PRESETS[preset]
    epochs, first = settings.epochs or epochs, first if settings.lr is None else settings.lr
    before = sum(stage[1] for stage in plan)
    if epochs <= before:
        raise UsageError(
            f"--preset {preset} needs more than {before} epochs, found --epochs {epochs}",
            hint="Give more epochs, or the stages one by one with --stage.",
        )
    return tuple(
        Stage(level, count or epochs - before, share * first, augment, schedule)
        for level, count, share, augment, schedule in plan
    )


def _refuse_direct_unfreeze(settings: Settings) -> None:
    levels = [stage.level for stage in settings.stages]
    if (2, 0) in pairwise(levels) and not settings.direct_unfreeze:
        raise UsageError(
            "a stage at level 0 comes straight after one at level 2: the head's first gradients would untrain the "
            "backbone",
            hint="Put a stage at level 1 between them, or pass --direct-unfreeze.",
        )
