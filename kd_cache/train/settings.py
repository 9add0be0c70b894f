"""Everything a training is told, and what it means: stages with a freeze level, a learning rate and an augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Final

from kd_cache.errors import UsageError, shown
from kd_cache.score.factory import without_folder
from kd_cache.train.augment import LEVELS, Augmentation

CITY, CITY2SCENE, SCENE = "city", "city2scene", "scene"
ROLES: Final = (SCENE, CITY2SCENE, CITY)
SCRATCH, FROZEN, FULL_MODEL, BACKBONE, AUTO = "scratch", "frozen", "full-model", "backbone", "auto"
PRESETS: Final = (AUTO, SCRATCH, FROZEN, FULL_MODEL, BACKBONE)
EPOCHS: Final = {SCRATCH: 40, FROZEN: 200, FULL_MODEL: 30, BACKBONE: 30}
"""What a preset takes where nothing is said. A head over embeddings computed once learns in no time."""
GENTLE: Final = 1e-4
"""Above this learning rate a pre-trained model is untrained before it is tuned."""
RATES: Final = {SCRATCH: 3e-3, FROZEN: 1e-2, FULL_MODEL: GENTLE, BACKBONE: GENTLE}
_LEVEL_AUGMENT: Final = {2: "off", 1: "moderate", 0: "moderate"}
_STAGE_KEYS: Final = ("level", "epochs", "lr", "augment", "schedule")
_SCHEDULES: Final = ("cosine", "constant")


def label_of(role: str) -> str:
    """Which label a role learns: a city teacher cities, all others scenes."""
    return "city" if role == CITY else "scene"


@dataclass(frozen=True)
class Stage:
    """One part of a training: ``epochs`` at freeze ``level``, from learning rate ``lr`` on."""

    level: int
    epochs: int
    lr: float
    augment: str = "off"
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        wrong = next(
            (
                f"{name} is {shown(value)}, expected {expected}"
                for name, value, good, expected in (
                    ("level", self.level, self.level in (0, 1, 2), "0, 1 or 2"),
                    ("epochs", self.epochs, self.epochs >= 1, "1 or more"),
                    ("lr", self.lr, 0 < self.lr <= 10, "more than 0 and at most 10"),
                    ("augment", self.augment, self.augment in LEVELS, ", ".join(LEVELS)),
                    ("schedule", self.schedule, self.schedule in _SCHEDULES, " or ".join(_SCHEDULES)),
                )
                if not good
            ),
            None,
        )
        if wrong:
            raise UsageError(f"a stage's {wrong}")


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


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a training's weights come to, besides the data.

    Attributes:
        role: one of `ROLES`: what the net is to be, and what its folder is called after.
        arch: ``cp_resnet``, another of `architectures`, ``module:factory`` or ``path/to/file.py:factory``.
        epochs: of all stages together, ``None`` for the preset's own; a preset gives each its part.
        lr: of the preset's first stage, ``None`` for the preset's own; later ones keep their proportion to it.
        feature_dim: width of the embedding, ``None`` for the architecture's own.
        mlp_hidden_dims: hidden widths of the classifier, or of a City2Scene teacher's scene head; ``None`` for the
            architecture's own (a linear scene head).
        stages: given one by one, in place of a preset.
        mixup … device_response: in place of what a stage's augmentation has for them.
        ema: decay of the averaged weights, which then validate and are kept; 0 leaves them out. Over few clips they
            make validation much less a matter of luck.
        accumulate: batches whose gradients are added up for one step.
        clip: largest norm of the gradient; 0 does not clip.
        patience: epochs of a stage without a better validation before it ends; 0 goes on to the end.
        precision: fp32, tf32, bf16 or fp16 (mixed, with float32 weights).
        quick_experiment: the share of the locations that is used.
    """

    role: str
    arch: str = "cp_resnet"
    epochs: int | None = None
    batch_size: int = 32
    lr: float | None = None
    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    momentum: float = 0.9
    warmup_epochs: float = 6.0
    seed: int = 42
    val_ratio: float = 0.1
    fold: int = 0
    feature_dim: int | None = None
    mlp_hidden_dims: tuple[int, ...] | None = None
    dropout: float = 0.3
    preset: str = AUTO
    stages: tuple[Stage, ...] = ()
    direct_unfreeze: bool = False
    mixup: float | None = None
    time_mask: float | None = None
    freq_mask: float | None = None
    time_roll: float | None = None
    freq_mixstyle: float | None = None
    device_response: float | None = None
    label_smoothing: float = 0.0
    class_weights: str = "none"
    ema: float = 0.97
    accumulate: int = 1
    clip: float = 0.0
    patience: int = 10
    precision: str = "fp32"
    compile: bool = False
    drop_last: bool = False
    deterministic: bool = False
    quick_experiment: float = 1.0
    feature_spec: str = ""
    num_scenes: int = 10
    num_cities: int = 12
    shuffle_labels: bool = False

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UsageError(f"{name} is {value}, expected {least:g} to {most:g}")
        self.augmentation(Stage(0, 1, 1.0, "moderate"))  # raises for what is out of its range

    @property
    def label(self) -> str:
        """``city`` or ``scene``: what it learns."""
        return label_of(self.role)

    @property
    def num_classes(self) -> int:
        return self.num_cities if self.label == "city" else self.num_scenes

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


_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "epochs": (1, 1_000_000),
    "batch_size": (1, 1 << 20),
    "weight_decay": (0, 1000),
    "momentum": (0, 0.999),
    "warmup_epochs": (0, 1_000_000),
    "seed": (0, 2**63 - 1),
    "fold": (0, 2**63 - 1),
    "dropout": (0, 0.95),
    "label_smoothing": (0, 0.9),
    "ema": (0, 0.99999),
    "accumulate": (1, 1 << 20),
    "clip": (0, 1e30),
    "patience": (0, 1_000_000),
    "quick_experiment": (0, 1),
}
"""Smallest and largest; not-a-number is in no range."""

_OF_STAGES: Final = {"epochs", "lr", "preset", "stages", "direct_unfreeze"}
_GROUPS: Final[Mapping[str, Sequence[str]]] = {
    "role": ("role", "num_scenes", "num_cities", "shuffle_labels"),
    "fold": ("val_ratio", "fold", "quick_experiment"),
    "front_end": ("feature_spec",),
    "architecture": ("arch", "feature_dim", "mlp_hidden_dims", "dropout"),
    "augmentation": ("mixup", "time_mask", "freq_mask", "time_roll", "freq_mixstyle", "device_response"),
    "seed": ("seed", "deterministic"),
}


def stages_of(settings: Settings, start: str) -> tuple[Stage, ...]:
    """The stages of a training whose weights come from ``start`` (`SCRATCH`, `FROZEN`, `FULL_MODEL`, `BACKBONE`).

    From a whole model: 5 epochs of the head at 1e-4, 8 of neck and head at 5e-5, the rest of everything at 3e-5. From
    a backbone: 10 epochs of the head at 1e-4, 2 of neck and head at 2e-4, the rest of everything from 2e-4 down a
    cosine.

    Raises:
        UsageError: too few epochs for the preset, or everything is unfrozen straight after the head.
    """
    if settings.stages:
        _refuse_direct_unfreeze(settings)
        return settings.stages
    preset = start if settings.preset == AUTO else settings.preset
    if preset not in EPOCHS:
        raise UsageError(f"no preset is called {shown(preset)}; known: {', '.join(PRESETS)}")
    epochs = EPOCHS[preset] if settings.epochs is None else settings.epochs
    first = RATES[preset] if settings.lr is None else settings.lr
    if preset == SCRATCH:
        return (Stage(0, epochs, first, "moderate"),)
    if preset == FROZEN:
        return (Stage(2, epochs, first, "off"),)
    if preset == FULL_MODEL:
        fixed = [Stage(2, 5, first, "off", "constant"), Stage(1, 8, first / 2, "moderate", "constant")]
        last, schedule = 0.3 * first, "constant"
    else:
        fixed = [Stage(2, 10, first, "off", "constant"), Stage(1, 2, 2 * first, "moderate", "constant")]
        last, schedule = 2 * first, "cosine"
    rest = epochs - sum(stage.epochs for stage in fixed)
    if rest < 1:
        raise UsageError(
            f"--preset {preset} needs more than {epochs - rest} epochs, found --epochs {epochs}",
            hint="Give more epochs, or the stages one by one with --stage.",
        )
    return (*fixed, Stage(0, rest, last, "moderate", schedule))


def _refuse_direct_unfreeze(settings: Settings) -> None:
    levels = [stage.level for stage in settings.stages]
    if (2, 0) in pairwise(levels) and not settings.direct_unfreeze:
        raise UsageError(
            "a stage at level 0 comes straight after one at level 2: the head's first gradients would untrain the "
            "backbone",
            hint="Put a stage at level 1 between them, or pass --direct-unfreeze.",
        )
