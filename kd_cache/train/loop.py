"""The training loop: stages of epochs, each of which is validated, kept and can be gone on from.

Everything random in an epoch follows from the seed, the stage and the epoch, so a training that goes on from its last
epoch makes the same steps as one that was never interrupted.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_cache.errors import KDCacheError, TeacherError, TrainingError, UsageError, shown
from kd_cache.pipeline.engine import is_out_of_memory
from kd_cache.train.augment import Augmentation, Mixed, augmented
from kd_cache.train.clips import Clips
from kd_cache.train.freezing import Frozen, trainable_parameters
from kd_cache.train.metrics import measure
from kd_cache.train.settings import Settings, Stage
from kd_cache.watch import Watcher

AUTOCAST: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
DIVERGED: Final = 3.0
"""A training loss so many times that of random weights, for so many epochs, has diverged."""
DRIFT: Final = 0.2
EPOCH_COLUMNS: Final = (
    "stage",
    "epoch",
    "train_loss",
    "val_accuracy",
    "val_macro_accuracy",
    "val_log_loss",
    "seconds",
)
"""What is told of each epoch."""
_LOOK: Final = 50
"""Batches between two looks at the loss: each makes a GPU wait."""


Rank = tuple[bool, float, float]


@dataclass
class Progress:
    """Where a training is: epochs done in the current stage, and what was measured so far.

    ``best`` is the `rank` of the epoch that is kept. ``stage_best`` and ``stage_loss`` are the best rank and the lowest
    loss of the stage, ``since_best`` the epochs since either improved: over few clips accuracy moves in steps.
    ``averaged`` counts the steps that are in the averaged weights.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    best: Rank | None = None
    stage_best: Rank | None = None
    stage_loss: float | None = None
    since_best: int = 0
    averaged: int = 0
    random_loss: float | None = None
    start_loss: float | None = None
    diverging: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    drifted: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Progress:
        """Raises ``TypeError`` for what is no progress."""
        found = cls(**content)
        for name in ("best", "stage_best"):
            rank = getattr(found, name)
            setattr(found, name, None if rank is None else tuple(rank))
        return found

    def rank(self, measured: Mapping[str, Any]) -> Rank:
        """An epoch's validation: below random weights' loss or not, accuracy, −log loss. The higher the better."""
        loss = measured["val_log_loss"]
        return self.random_loss is None or loss < self.random_loss, measured["val_accuracy"], -loss


@dataclass(frozen=True)
class Step:
    """One step of the optimiser, for the log."""

    stage: int
    epoch: int
    step: int
    lr: float
    loss: Tensor


class Keeper(Protocol):
    """Where a training keeps what it makes. See `kd_cache.train.run_folder.RunFolder`."""

    def keep_best(self, net: nn.Module) -> None:
        """The weights with the best validation so far."""

    def keep_last(self, net: nn.Module, state: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Everything that is needed to go on after this epoch."""

    def keep_steps(self, steps: Sequence[Step]) -> None:
        """The epoch's steps."""


class Loop:
    """Trains ``net`` in place.

    Args:
        net: on the device; features ``[B, …]`` float32 → logits ``[B, C]``.
        train, validation: what to learn from and what to choose the best epoch by.
        stages: in turn.
        name: what is trained, for what a person is told.
        is_warm: the weights were trained before; losses are compared with theirs.
        random_loss: the validation loss of random weights; the best epoch must be below it.
    """

    def __init__(
        self,
        net: nn.Module,
        train: Clips,
        validation: Clips,
        settings: Settings,
        stages: Sequence[Stage],
        device: torch.device,
        keeper: Keeper,
        watcher: Watcher,
        *,
        random_loss: float,
        is_warm: bool = False,
        name: str = "",
    ) -> None:
        self._name = f"{name}, " if name else ""
        self.net, self.train, self.validation = net, train, validation
        self.settings, self.stages, self.device = settings, stages, device
        self._keeper, self._watcher, self._is_warm = keeper, watcher, is_warm
        self.progress = Progress(random_loss=random_loss)
        self.averaged = copy.deepcopy(net) if settings.ema else None
        self._resumed: Mapping[str, Tensor] = {}
        self._call: nn.Module = torch.compile(net) if settings.compile else net  # type: ignore[assignment]
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._weights = self._class_weights()

    def go_on(self, progress: Progress, state: Mapping[str, Tensor]) -> None:
        """Continue after an earlier run's last epoch; ``state`` is what was kept beside its weights."""
        self.progress, self._resumed = progress, state
        if self.averaged is not None:
            self.averaged.load_state_dict(
                {name: state[f"ema.{name}"].to(self.device) for name in self.averaged.state_dict()}
            )

    def run(self) -> None:
        """Every stage to its end.

        Raises:
            TrainingError: the loss is not finite or diverges, or something frozen changed, or nothing was learnt.
        """
        done = self.progress
        if self._is_warm and done.start_loss is None:
            done.start_loss = self._validated()["log_loss"]
        while done.stage < len(self.stages):
            self._run_stage(done.stage, self.stages[done.stage])
            done.stage, done.epoch, done.step, done.since_best = done.stage + 1, 0, 0, 0
            done.stage_best = done.stage_loss = None
            self._resumed = {}
        self._refuse_unlearnt()

    # -- a stage ------------------------------------------------------------------------------------------------------

    def _run_stage(self, number: int, stage: Stage) -> None:
        done, settings = self.progress, self.settings
        frozen = Frozen.at(self.net, stage.level)
        if self.averaged is not None:
            frozen.copy_to(self.averaged)
        self._watcher.note(
            f"{self._name}stage {number + 1} of {len(self.stages)}: {stage.epochs} epochs at {stage.lr:g}; {frozen}"
        )
        optimiser = self._optimiser(stage)
        if self._resumed:
            self._restore(optimiser)
        self._watcher.stage(f"{self._name}stage {number + 1}", (stage.epochs - done.epoch) * len(self.train))
        # Looked at before an epoch, not after: a run that was killed in between must stop where it would have stopped.
        while done.epoch < stage.epochs and not (settings.patience and done.since_best >= settings.patience):
            began = time.monotonic()
            loss = self._epoch(number, stage, frozen, optimiser)
            frozen.check(self.averaged)
            done.epoch += 1
            validated = self._validated()
            self._tell_of_drift(validated["log_loss"])
            measured = {
                "stage": number + 1,
                "epoch": done.epoch,
                "train_loss": loss,
                **{f"val_{name}": value for name, value in validated.items()},
                "seconds": time.monotonic() - began,
            }
            done.history.append(measured)
            rank, loss_now = done.rank(measured), validated["log_loss"]
            done.since_best += 1
            if done.stage_loss is None or loss_now < done.stage_loss:
                done.stage_loss, done.since_best = loss_now, 0
            if done.stage_best is None or rank > done.stage_best:
                done.stage_best, done.since_best = rank, 0
            if done.best is None or rank > done.best:
                done.best = rank
                self._keeper.keep_best(self.averaged or self.net)
            self._refuse_divergence(loss)
            self._keeper.keep_last(self.net, self._state(optimiser), asdict(done))
            self._watcher.epoch(done.history[-1])
        if done.epoch < stage.epochs:
            self._watcher.note(
                f"{self._name}stage {number + 1} ends after epoch {done.epoch}: for {settings.patience} epochs neither "
                "validation accuracy nor loss got better"
            )
        if frozen.names:
            said = f"stage {number + 1}: the {len(frozen.names)} frozen tensors are bit for bit what they were"
            done.frozen.append(said)
            self._watcher.note(f"{self._name}{said}")

    def _epoch(self, number: int, stage: Stage, frozen: Frozen, optimiser: torch.optim.Optimizer) -> float:
        """One epoch; returns the mean loss."""
        done, settings = self.progress, self.settings
        chance = torch.Generator().manual_seed(_seed(settings.seed, number, done.epoch, "order and augmentation"))
        torch.manual_seed(_seed(settings.seed, number, done.epoch, "dropout"))
        batches = self.train.shuffled(settings.batch_size, chance, drop_last=settings.drop_last)
        if not batches:
            raise UsageError(
                f"no batch of {settings.batch_size} clips of one shape is full, and --drop-last (--compile) leaves out "
                f"all others: there are {len(self.train)} clips to train on",
                hint="Give a smaller --batch-size.",
            )
        schedule = _Schedule(stage, settings, math.ceil(len(batches) / settings.accumulate))
        frozen.train()
        labels = self.train.labels(settings.label)
        losses: list[tuple[int, Tensor]] = []
        steps: list[Step] = []
        how = settings.augmentation(stage)
        for at, (rows, features) in enumerate(self.train.load(batches, self.device), start=1):
            loss = self._loss(features, labels[rows], how, chance)
            # By its share of the step's clips: the last batch of a shape is smaller, the last step has fewer batches.
            first = (at - 1) // settings.accumulate * settings.accumulate
            together = sum(map(len, batches[first : first + settings.accumulate]))
            self._scaler.scale(loss * (len(rows) / together)).backward()  # type: ignore[no-untyped-call]
            losses.append((len(rows), loss.detach()))
            if at % settings.accumulate == 0 or at == len(batches):
                lr = schedule.lr(done.step)
                self._step(optimiser, lr)
                steps.append(Step(number + 1, done.epoch + 1, done.step, lr, loss.detach()))
                done.step += 1
            if at % _LOOK == 0 or at == len(batches):
                self._refuse_infinite(losses[-_LOOK:], schedule.lr(done.step - 1))
            self._watcher.advance(len(rows))
        self._keeper.keep_steps(steps)
        return float(sum(count * loss.double().cpu() for count, loss in losses) / sum(count for count, _ in losses))

    def _loss(self, features: Tensor, labels: Tensor, how: Augmentation, chance: torch.Generator) -> Tensor:
        features, labels = features.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        mixed = Mixed(features) if how.is_off else augmented(features, how, chance)
        with self._autocast():
            logits = self._call(mixed.features)
        return _cross_entropy(logits.float(), labels, mixed, self._weights, self.settings.label_smoothing)

    def _refuse_infinite(self, losses: Sequence[tuple[int, Tensor]], lr: float) -> None:
        values = torch.stack([loss for _, loss in losses])
        if not torch.isfinite(values).all():
            raise TrainingError(
                f"the training loss became {float(values[~torch.isfinite(values)][0])} in epoch "
                f"{self.progress.epoch + 1} of stage {self.progress.stage + 1}, near step {self.progress.step} "
                f"(learning rate {lr:.3g}, {self.settings.precision})",
                hint=self._cause(),
            )

    def _step(self, optimiser: torch.optim.Optimizer, lr: float) -> None:
        for group in optimiser.param_groups:
            group["lr"] = lr
        if self.settings.clip:
            self._scaler.unscale_(optimiser)
            parameters = [parameter for _, parameter in trainable_parameters(self.net)]
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self._scaler.step(optimiser)
        self._scaler.update()
        optimiser.zero_grad(set_to_none=True)
        if self.averaged is not None:
            # Of the steps alone, by Adam's correction of its start: the weights of the beginning would stay for long.
            ema, number = self.settings.ema, self.progress.averaged
            self.progress.averaged += 1
            _average(self.averaged, self.net, (ema - ema ** (number + 1)) / (1 - ema ** (number + 1)))

    def _cause(self) -> str:
        bad = [name for name, tensor in self.net.state_dict().items() if not torch.isfinite(tensor).all()]
        if bad:
            return f"The weights are not finite either ({bad[0]}, …): steps are too large. Lower --lr, or --clip 1."
        if self.settings.precision in AUTOCAST:
            return f"The weights are finite: {self.settings.precision} overflowed. Use --precision fp32, or bf16."
        return "The weights are finite: a batch gave logits too large for a loss. Lower --lr, or pass --clip 1."

    # -- validation ---------------------------------------------------------------------------------------------------

    def _validated(self) -> dict[str, float]:
        logits = score(self.averaged or self.net, self.validation, self.device, self.settings.batch_size)
        if not np.isfinite(logits).all():
            raise TrainingError(
                f"validation logits are not finite after epoch {self.progress.epoch} of stage "
                f"{self.progress.stage + 1}",
                hint=self._cause(),
            )
        found = measure(logits, self.validation.labels(self.settings.label).numpy())
        return {"accuracy": found.accuracy, "macro_accuracy": found.macro_accuracy, "log_loss": found.log_loss}

    def _tell_of_drift(self, loss: float) -> None:
        before = self.progress.start_loss
        if not before or abs(loss - before) <= DRIFT * before:
            return
        where = "above" if loss > before else "below"
        if where not in self.progress.drifted:
            self.progress.drifted.append(where)
            self._watcher.note(
                f"drift: since epoch {self.progress.epoch} of stage {self.progress.stage + 1} the validation loss "
                f"({loss:.3f}) is more than {DRIFT:.0%} {where} the warm start's ({before:.3f})"
            )

    def _refuse_divergence(self, loss: float) -> None:
        done = self.progress
        random_loss = done.random_loss or math.log(self.settings.num_classes)
        done.diverging = done.diverging + 1 if loss > DIVERGED * random_loss else 0
        if done.diverging >= DIVERGED:
            raise TrainingError(
                f"training diverged: its loss has been above {DIVERGED * random_loss:.2f}, {DIVERGED:g} times that of "
                f"random weights, for {done.diverging} epochs (now {loss:.2f})",
                hint="Lower --lr, or pass --clip 1.",
            )

    def _refuse_unlearnt(self) -> None:
        done = self.progress
        if done.best is None or done.best[0] or self.settings.shuffle_labels:
            return
        lowest = min(row["val_log_loss"] for row in done.history)
        told = (
            f"nothing was learnt: the lowest validation loss is {lowest:.3f}, that of random weights "
            f"{done.random_loss:.3f}"
        )
        if self.settings.quick_experiment < 1:  # a part of the locations may be too little to learn from
            self._watcher.note(told)
            return
        raise TrainingError(
            told,
            hint="Check the labels; train for more --epochs, with another --lr, or a shorter --warmup-epochs.",
        )

    # -- what a step needs --------------------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = AUTOCAST.get(self.settings.precision)
        return nullcontext() if kind is None else torch.autocast(self.device.type, dtype=kind)

    def _optimiser(self, stage: Stage) -> torch.optim.Optimizer:
        """Weight decay for matrices and kernels; none for biases and batch norms."""
        settings = self.settings
        parameters = [parameter for _, parameter in trainable_parameters(self.net)]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if settings.optimizer == "sgd":
            return torch.optim.SGD(groups, stage.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)
        return torch.optim.AdamW(groups, stage.lr)

    def _class_weights(self) -> Tensor | None:
        """Each class as heavy as its samples are rare (N / (C · n_c)), classes without samples 0."""
        if self.settings.class_weights == "none":
            return None
        labels = self.train.labels(self.settings.label)
        counts = torch.bincount(labels, minlength=self.settings.num_classes).float()
        weights = torch.where(counts > 0, len(labels) / (self.settings.num_classes * counts.clamp_min(1)), 0.0)
        return weights.to(self.device)

    # -- going on -----------------------------------------------------------------------------------------------------

    def _state(self, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The optimiser's tensors, the scaler's and the averaged weights, by name."""
        found: dict[str, Tensor] = {}
        for number, values in optimiser.state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    found[f"optimiser.{number}.{name}"] = value
        if self._scaler.is_enabled():
            scaler = self._scaler.state_dict()
            found["scaler"] = torch.tensor([scaler["scale"], float(scaler["_growth_tracker"])], dtype=torch.float64)
        if self.averaged is not None:
            found |= {f"ema.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        return found

    def _restore(self, optimiser: torch.optim.Optimizer) -> None:
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._resumed.items():
            kind, _, rest = name.partition(".")
            if kind == "optimiser":
                number, _, key = rest.partition(".")
                states.setdefault(int(number), {})[key] = tensor
        optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
        for parameter, values in optimiser.state.items():  # laid out in memory as they would be had nothing happened
            for name, value in values.items():
                if isinstance(value, Tensor) and name != "step":
                    values[name] = torch.empty_like(parameter).copy_(value)
        if "scaler" in self._resumed:
            scale, growth = self._resumed["scaler"].tolist()
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})


def foreseen(error: Exception, settings: Settings) -> KDCacheError | None:
    """What a person can do about an error of torch's; ``None`` for one that nobody foresaw."""
    first = (shown(error).splitlines() or [""])[0]
    if is_out_of_memory(error):
        return TrainingError(
            f"there is not enough memory for batches of {settings.batch_size} clips ({first})",
            hint="Give a smaller --batch-size, with --accumulate if the steps are to stay as large.",
        )
    if "more than 1 value per channel" in str(error):
        return TrainingError("batch norm learns nothing from a batch of one clip", hint="Give --batch-size 2 or more.")
    if settings.deterministic and "deterministic" in str(error):
        return TrainingError(
            f"this device cannot repeat this net's training to the bit: {first}",
            hint="Leave out --deterministic, or train on the CPU.",
        )
    if settings.compile and type(error).__module__.startswith("torch._"):
        return TrainingError(
            f"torch.compile failed: {type(error).__name__}: {first}",
            hint="It needs a C++ compiler; or leave out --compile.",
        )
    if ":" in settings.arch:
        return TeacherError(
            f"{shown(settings.arch)} failed: {type(error).__name__}: {first}",
            hint="It gets features [B, T, F], of one shape in a batch. Run again with --debug to see where it failed.",
        )
    return None


class _Schedule:
    """The learning rate of each step of a stage: up a line while it warms up, then constant or down half a cosine."""

    def __init__(self, stage: Stage, settings: Settings, per_epoch: int) -> None:
        self._stage = stage
        self._steps = per_epoch * stage.epochs
        # A stage of a few epochs must not be all warm-up.
        self._warmup = min(round(settings.warmup_epochs * per_epoch), self._steps // 3)

    def lr(self, step: int) -> float:
        if step < self._warmup:
            return self._stage.lr * (step + 1) / (self._warmup + 1)
        if self._stage.schedule == "constant":
            return self._stage.lr
        way = (step - self._warmup) / max(self._steps - self._warmup, 1)
        return self._stage.lr * (1 + math.cos(math.pi * way)) / 2


def _cross_entropy(
    logits: Tensor, labels: Tensor, mixed: Mixed, weights: Tensor | None, label_smoothing: float
) -> Tensor:
    """Mean over the batch, by the classes' weights; a mixed clip counts for both of its labels, by their shares."""

    def towards(targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits, targets, weight=weights, label_smoothing=label_smoothing, reduction="none")
        return loss, torch.ones_like(loss) if weights is None else weights[targets]

    loss, weight = towards(labels)
    if mixed.share is not None and mixed.partner is not None:
        other_loss, other_weight = towards(labels[mixed.partner])
        loss = mixed.share * loss + (1 - mixed.share) * other_loss
        weight = mixed.share * weight + (1 - mixed.share) * other_weight
    return loss.sum() / weight.sum()


@torch.no_grad()
def _average(averaged: nn.Module, net: nn.Module, decay: float) -> None:
    """``averaged`` ← decay · averaged + (1 − decay) · net, each tensor once; counters are copied."""
    for old, new in zip(_tensors(averaged), _tensors(net), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def _tensors(net: nn.Module) -> list[Tensor]:
    """What a checkpoint keeps, each tensor once, whatever its names."""
    return list({id(tensor): tensor for tensor in net.state_dict(keep_vars=True).values()}.values())


@torch.inference_mode()
def score(net: nn.Module, clips: Clips, device: torch.device, batch_size: int) -> np.ndarray:
    """Logits ``[N, C]`` float32 in evaluation mode, in the order of the clips."""
    net.eval()
    found: np.ndarray | None = None
    for rows, features in clips.load(clips.in_order(batch_size), device):
        logits = net(features.to(device)).float().cpu().numpy()
        if found is None:
            found = np.empty((len(clips), logits.shape[1]), np.float32)
        found[rows] = logits
    return np.empty((0, 0), np.float32) if found is None else found


def _seed(*parts: int | str) -> int:
    """A seed that says what it is for, so that no two streams are the same."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
