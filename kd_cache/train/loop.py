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
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kd_cache.errors import TrainingError, UsageError
from kd_cache.score.device import AUTOCAST
from kd_cache.train.augment import Mixed, augmented
from kd_cache.train.clips import Clips
from kd_cache.train.evaluation import measure, score
from kd_cache.train.freezing import Frozen, trainable_parameters
from kd_cache.train.optimiser import Schedule, average, class_weights, cross_entropy, make_optimiser, restore, state_of
from kd_cache.train.progress import ACCURACY, Progress
from kd_cache.train.run_folder import RunFolder, Step
from kd_cache.train.settings import Augmentation, Settings, Stage
from kd_cache.watch import Watcher

DIVERGED: Final = 3.0
"""A training loss so many times that of random weights, for so many epochs, has diverged."""
DRIFT: Final = 0.2
_LOOK: Final = 50
"""Batches between two looks at the loss: each makes a GPU wait."""


class Objective(Protocol):
    """What a batch costs, where that is not cross-entropy alone."""

    def start_epoch(self, epoch: int, epochs: int, /) -> None:
        """Epochs are counted from 0, over all stages."""

    def __call__(self, logits: Tensor, rows: np.ndarray, mixed: Mixed, /) -> Tensor:
        """Of logits ``[B, C]`` float32 of these rows of the training clips."""


@dataclass
class Learner:
    """What is trained, and on what.

    Attributes:
        net: on the device; features ``[B, …]`` float32 → logits ``[B, C]``.
        train, validation: what to learn from and what to choose the best epoch by.
        name: for what a person reads.
        is_warm: the weights were trained before; losses are compared with theirs.
        random_loss: the validation loss of random weights; the best epoch must be below it.
        objective: what is minimised in place of cross-entropy.
        is_source: ``[N]`` bool: which training clips are one half of each batch, the others being the other half;
            ``None``: batches are of all clips alike.
        select: what the epoch that is kept is chosen by (`Progress.select`).
    """

    net: nn.Module
    train: Clips
    validation: Clips
    name: str = ""
    is_warm: bool = False
    random_loss: float | None = None
    objective: Objective | None = None
    is_source: np.ndarray | None = None
    select: str = ACCURACY


class Loop:
    """Trains the learner's net in place, through ``stages`` in turn."""

    def __init__(
        self,
        learner: Learner,
        settings: Settings,
        stages: Sequence[Stage],
        device: torch.device,
        keeper: RunFolder,
        watcher: Watcher,
    ) -> None:
        self._name = f"{learner.name}, " if learner.name else ""
        self.net, self.train, self.validation = learner.net, learner.train, learner.validation
        self.settings, self.stages, self.device = settings, stages, device
        self._keeper, self._watcher, self._is_warm = keeper, watcher, learner.is_warm
        self._objective, self._is_source = learner.objective, learner.is_source
        self.progress = Progress(random_loss=learner.random_loss, select=learner.select)
        self.averaged = copy.deepcopy(self.net) if settings.ema else None
        self._resumed: Mapping[str, Tensor] = {}
        self._call: nn.Module = torch.compile(self.net) if settings.compile else self.net  # type: ignore[assignment]
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        weights = class_weights(self.train, settings)
        self._weights = None if weights is None else weights.to(device)

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
            done.end_stage()
            self._resumed = {}
        self._refuse_unlearnt()

    # -- a stage ------------------------------------------------------------------------------------------------------

    def _run_stage(self, number: int, stage: Stage) -> None:
        done, patience = self.progress, self.settings.patience_of(stage)
        frozen = Frozen.at(self.net, stage.level)
        if self.averaged is not None:
            frozen.copy_to(self.averaged)
        self._watcher.note(
            f"{self._name}stage {number + 1} of {len(self.stages)}: {stage.epochs} epochs at {stage.lr:g}; {frozen}"
        )
        optimiser = make_optimiser(self.net, stage, self.settings)
        if self._resumed:
            restore(optimiser, self._scaler, self._resumed)
        clips = sum(map(len, self._batches(torch.Generator())))
        self._watcher.stage(f"{self._name}stage {number + 1}", (stage.epochs - done.epoch) * clips)
        # Looked at before an epoch, not after: a run that was killed in between must stop where it would have stopped.
        while done.epoch < stage.epochs and not (patience and done.since_best >= patience):
            self._run_epoch(number, stage, frozen, optimiser)
        if done.epoch < stage.epochs:
            self._watcher.note(
                f"{self._name}stage {number + 1} ends after epoch {done.epoch}: for {patience} epochs neither "
                "validation accuracy nor loss got better"
            )
        if frozen.names:
            said = f"stage {number + 1}: the {len(frozen.names)} frozen tensors are bit for bit what they were"
            done.frozen.append(said)
            self._watcher.note(f"{self._name}{said}")

    def _run_epoch(self, number: int, stage: Stage, frozen: Frozen, optimiser: torch.optim.Optimizer) -> None:
        """Train, validate, keep."""
        done, began = self.progress, time.monotonic()
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
        if done.add(measured):
            self._keeper.keep_best(self.averaged or self.net)
        self._refuse_divergence(loss)
        self._keeper.keep_last(self.net, self._state(optimiser), asdict(done))
        self._watcher.epoch(measured)

    def _epoch(self, number: int, stage: Stage, frozen: Frozen, optimiser: torch.optim.Optimizer) -> float:
        """Every batch once; returns the mean loss."""
        done, settings = self.progress, self.settings
        chance = torch.Generator().manual_seed(_seed(settings.seed, number, done.epoch, "order and augmentation"))
        torch.manual_seed(_seed(settings.seed, number, done.epoch, "dropout"))
        batches = self._batches(chance)
        schedule = Schedule(stage, settings, math.ceil(len(batches) / settings.accumulate))
        frozen.train()
        if self._objective is not None:
            self._objective.start_epoch(len(done.history), sum(each.epochs for each in self.stages))
        losses: list[tuple[int, Tensor]] = []
        steps: list[Step] = []
        how = settings.augmentation(stage)
        for at, (rows, features) in enumerate(self.train.load(batches, self.device), start=1):
            loss = self._loss(features, rows, how, chance)
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

    def _batches(self, chance: torch.Generator) -> list[np.ndarray]:
        settings = self.settings
        size, drop_last = settings.batch_size, settings.drop_last
        if self._is_source is None:
            batches = self.train.shuffled(size, chance, drop_last=drop_last)
        else:
            batches = self.train.balanced(size, chance, self._is_source, drop_last=drop_last)
        if not batches:
            raise UsageError(
                f"no batch of {settings.batch_size} clips of one shape is full, and --drop-last (--compile) leaves out "
                f"all others: there are {len(self.train)} clips to train on",
                hint="Give a smaller --batch-size.",
            )
        return batches

    def _loss(self, features: Tensor, rows: np.ndarray, how: Augmentation, chance: torch.Generator) -> Tensor:
        features = features.to(self.device, non_blocking=True)
        mixed = Mixed(features) if how.is_off else augmented(features, how, chance)
        with self._autocast():
            logits = self._call(mixed.features)
        if self._objective is not None:
            return self._objective(logits.float(), rows, mixed)
        labels = self.train.labels(self.settings.label)[rows].to(self.device, non_blocking=True)
        return cross_entropy(logits.float(), labels, mixed, self._weights, self.settings.label_smoothing)

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
            average(self.averaged, self.net, (ema - ema ** (number + 1)) / (1 - ema ** (number + 1)))

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
        if self._objective is not None:  # another unit: its own first epoch is what it is compared with
            random_loss = max(random_loss, done.history[0]["train_loss"])
        done.diverging = done.diverging + 1 if loss > DIVERGED * random_loss else 0
        if done.diverging >= DIVERGED:
            raise TrainingError(
                f"training diverged: its loss has been above {DIVERGED * random_loss:.2f}, {DIVERGED:g} times that of "
                f"random weights, for {done.diverging} epochs (now {loss:.2f})",
                hint="Lower --lr, or pass --clip 1.",
            )

    def _refuse_unlearnt(self) -> None:
        done = self.progress
        if done.best is None or done.has_learnt or self.settings.shuffle_labels:
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

    def _state(self, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The optimiser's tensors, the scaler's and the averaged weights, by name."""
        found = state_of(optimiser, self._scaler)
        if self.averaged is not None:
            found |= {f"ema.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        return found

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = AUTOCAST.get(self.settings.precision)
        return nullcontext() if kind is None else torch.autocast(self.device.type, dtype=kind)


def _seed(*parts: int | str) -> int:
    """A seed that says what it is for, so that no two streams are the same."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
