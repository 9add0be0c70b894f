"""What a training leaves: ``runs/<time>/`` with weights, settings, history and results; the best weights beside it.

outputs/teacher_city/A2b/
├── best.safetensors          of the last finished run; replaced as a whole
└── runs/2026-01-31T12-00-00/
    ├── config.yaml           every setting as resolved, the stages, and the run's key
    ├── best.safetensors      the epoch with the best validation (where a head alone trains: once it is trained)
    ├── best_head.safetensors such a head until then: its backbone may be a thousand times as large
    ├── last.safetensors      the last epoch, and what is needed to go on after it (of a head alone, just the head)
    ├── history.csv           one row per epoch
    ├── steps.csv             one row per step: learning rate and loss
    └── results.json          written last: a run without it is unfinished

from __future__ import annotations
"""

from __future__ import annotations

import copy
import csv
import fcntl
import filecmp
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from torch import Tensor, nn

from kd_cache.errors import CheckpointError, StoreError, UsageError, shown
from kd_cache.files.atomic import (
    TEMPORARY_NAME,
    make_directory,
    remove_files,
    remove_folder,
    store_errors,
    write_atomic,
)
from kd_cache.train.checkpoint import (
    STATE_PREFIX,
    checkpoint_names,
    naming,
    net_names,
    save_checkpoint,
)
from kd_cache.train.checkpoint_file import RECORD_ENTRY, read_content
from kd_cache.train.job import TrainJob, TrainReport
from kd_cache.train.progress import Progress
from kd_cache.watch import Watcher

BEST, BEST_HEAD, LAST, CONFIG, HISTORY, STEPS, RESULTS = (
    "best.safetensors",
    "best_head.safetensors",
    "last.safetensors",
    "config.yaml",
    "history.csv",
    "steps.csv",
    "results.json",
)
NET: Final = "net."
"""Where the net that trains is not the one that is kept, it lies in the state of a run under this prefix."""
LOCK: Final = ".lock"
_MOST_CONFIG: Final = 1 << 20
_COUNTS: Final = ("stage", "epoch")
_STEP_COLUMNS: Final = ("stage", "epoch", "step", "lr", "loss")


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


@dataclass(frozen=True)
class Step:
    """One step of the optimiser, for the log."""

    stage: int
    epoch: int
    step: int
    lr: float
    loss: Tensor


Last = tuple[dict[str, Tensor], dict[str, Tensor], Progress]
"""Of a run's last epoch: the net that trained, the state of the training, and how far it was."""


class RunFolder:
    """One run's folder.

    Args:
        record: what each checkpoint says of itself.
        half: store weights as float16.

    Attributes:
        tensors_of: gives the tensors of what is kept of a net that trains: its own, or those of the teacher that it is
            the head of.
        head_alone: whether the net that trains is just that head.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], lock: int | None, *, half: bool = False) -> None:
        self.path = path
        self.tensors_of: Callable[[Any], Mapping[str, Tensor]] = own_tensors
        self.head_alone = False
        self._record, self._half, self._lock = dict(record), half, lock
        self._board: Any = None

    @classmethod
    def new(cls, home: Path, record: Mapping[str, Any], config: Mapping[str, Any], *, half: bool = False) -> RunFolder:
        """Make ``home/runs/<time>/``, this process's alone, and write down the settings."""
        make_directory(home / "runs")
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
        for name in chain([stamp], (f"{stamp}-{number}" for number in count(1))):
            path = home / "runs" / name
            with store_errors(path, "create"), suppress(FileExistsError):
                path.mkdir()
                break
        lock = _lock(path)
        write_atomic(path / CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode())
        return cls(path, record, lock, half=half)

    @classmethod
    def unfinished(cls, home: Path, key: str, record: Mapping[str, Any], *, half: bool = False) -> RunFolder | None:
        """The newest run in ``home/runs`` of this key that has an epoch, no results, and nobody at work on it."""
        for path in sorted((home / "runs").glob("*/"), reverse=True):
            if not _is_unfinished(path) or _key(path) != key:
                continue
            lock = _lock(path)
            if lock is not None and _is_unfinished(path):
                for leftover in path.iterdir():  # of a process that was killed while it wrote
                    if TEMPORARY_NAME.match(leftover.name):
                        leftover.unlink(missing_ok=True)
                return cls(path, record, lock, half=half)
            if lock is not None:
                os.close(lock)
        return None

    def close(self) -> None:
        """Let others go on with this run, if it is unfinished. What one without an epoch has written is removed."""
        if (self.path / RESULTS).exists():
            (self.path / LOCK).unlink(missing_ok=True)
        elif not any(self.path.glob("*.safetensors*")):
            with suppress(OSError):
                board = self.path / "tensorboard"
                if self._board is not None:
                    self._board.close()
                    remove_folder(board, [path.name for path in board.glob(f"events.out.tfevents.*.{os.getpid()}.*")])
                remove_folder(self.path, (CONFIG, HISTORY, STEPS, LOCK))
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def give_up(self) -> None:
        """Nobody is to go on with this run."""
        with store_errors(self.path / LAST, "rename"):
            (self.path / LAST).rename(self.path / f"{LAST}.given-up")
        self.close()

    # -- what the loop keeps ------------------------------------------------------------------------------------------

    def keep_best(self, net: nn.Module) -> None:
        if self.head_alone:
            save_checkpoint(self.path / BEST_HEAD, net.state_dict(), self._record)
        else:
            self._write_best(net)

    def put_best_together(self, head: nn.Module) -> None:
        """Write the teacher of the best head. ``head`` is the net that trained. Raises `CheckpointError`."""
        best = copy.deepcopy(head)
        content = self._read(BEST_HEAD)
        best.load_state_dict({name: content[name] for name in best.state_dict()})
        self._write_best(best)

    def _write_best(self, net: nn.Module) -> None:
        kept = checkpoint_names(self.tensors_of(net))
        rounded = {name: _half(tensor) if self._half else tensor for name, tensor in kept.items()}
        save_checkpoint(self.path / BEST, rounded, self._record)

    def keep_last(self, net: nn.Module, state: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        kept = dict(state)
        if self.tensors_of is own_tensors:
            tensors = checkpoint_names(net.state_dict())
        else:
            tensors, kept = {}, kept | {f"{NET}{name}": tensor for name, tensor in net.state_dict().items()}
        tensors |= {f"{STATE_PREFIX}{name}": value for name, value in kept.items()}
        history: Sequence[Mapping[str, Any]] = progress["history"]
        self._log({name: value for name, value in history[-1].items() if name not in _COUNTS}, len(history))
        self._write_history(history)
        save_checkpoint(self.path / LAST, tensors, {**self._record, "progress": dict(progress)})

    def log_for_tensorboard(self) -> None:
        """From now on also write ``tensorboard/``. Raises `UsageError` where the package is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "--tensorboard needs the package tensorboard", hint="pip install -c constraints.txt -e '.[tensorboard]'"
            ) from error
        self._board = SummaryWriter(str(self.path / "tensorboard"))

    def _log(self, values: Mapping[str, float], at: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, at)
            self._board.flush()

    def keep_steps(self, steps: Sequence[Step]) -> None:
        """Append an epoch's steps; those of an epoch that is done again are replaced."""
        for step in steps:
            self._log({f"stage {step.stage}/lr": step.lr, f"stage {step.stage}/loss": float(step.loss)}, step.step)
        path, text = self.path / STEPS, io.StringIO()
        out = csv.writer(text, lineterminator="\n")
        with store_errors(path, "write"):
            out.writerow(_STEP_COLUMNS)
            if path.is_file():
                first = (steps[0].stage, steps[0].step) if steps else (0, 0)
                with path.open(encoding="utf-8", errors="replace", newline="") as file:
                    out.writerows(row for row in csv.reader(file) if (at := _place(row)) is not None and at < first)
            for step in steps:
                out.writerow((step.stage, step.epoch, step.step, f"{step.lr:.8g}", f"{float(step.loss):.8g}"))
        write_atomic(path, text.getvalue().encode())

    def _write_history(self, history: Sequence[Mapping[str, Any]]) -> None:
        text = io.StringIO()
        out = csv.DictWriter(text, EPOCH_COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(history)
        write_atomic(self.path / HISTORY, text.getvalue().encode())

    def write_results(self, results: Mapping[str, Any]) -> None:
        """The mark of a finished run."""
        write_atomic(self.path / RESULTS, json.dumps(results, indent=1, allow_nan=False).encode())
        with suppress(OSError):
            (self.path / BEST_HEAD).unlink(missing_ok=True)

    def best(self) -> dict[str, Tensor]:
        """The best weights under the names of the net, as they are stored. Raises `CheckpointError`."""
        content = self._read(BEST)
        content.pop(RECORD_ENTRY, None)
        return net_names(content)

    def _read(self, name: str) -> dict[Any, Any]:
        with naming(self.path / name):
            return read_content(self.path / name)[0]

    # -- what is there ------------------------------------------------------------------------------------------------

    def last(self) -> Last:
        """The net that trained, the state and the progress of the last epoch. Raises `CheckpointError`."""
        path, content = self.path / LAST, self._read(LAST)
        try:
            progress = Progress.from_json(json.loads(content.pop(RECORD_ENTRY))["progress"])
            if not isinstance(progress.history, list):
                raise TypeError("its history is no list")
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{shown(path)} does not say how far the run was: {shown(error)}") from error
        self._read(BEST_HEAD if (self.path / BEST_HEAD).exists() else BEST)  # now, not when the training is done
        state = {name.removeprefix(STATE_PREFIX): value for name, value in content.items() if _is_state(name)}
        trained = {name.removeprefix(NET): value for name, value in state.items() if name.startswith(NET)}
        kept = {name: value for name, value in content.items() if not _is_state(name)}
        return trained or net_names(kept), state, progress


def _is_unfinished(path: Path) -> bool:
    return (path / LAST).is_file() and not (path / RESULTS).exists()


def finished(home: Path, key: str) -> dict[str, Any] | None:
    """The results of the newest finished run in ``home/runs`` of this key; ``None`` where there is none."""
    for path in sorted((home / "runs").glob("*/"), reverse=True):
        with suppress(OSError, ValueError, RecursionError):
            results = json.loads((path / RESULTS).read_bytes())
            if isinstance(results, dict) and results.get("key") == key:
                return results
    return None


def _key(path: Path) -> str | None:
    """The key that a run's settings have; ``None`` where nobody can say what it was a run of."""
    try:
        with (path / CONFIG).open(encoding="utf-8") as file:
            config = yaml.safe_load(file.read(_MOST_CONFIG))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return config.get("key") if isinstance(config, dict) else None


def _lock(path: Path) -> int | None:
    """Hold the run for as long as this process lives; ``None`` where another one does."""
    with store_errors(path / LOCK, "open"):
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks: then nobody can be seen at work, as before there were any
    return descriptor


def own_tensors(net: nn.Module) -> Mapping[str, Tensor]:
    """All tensors of a net that is kept as it is."""
    state: dict[str, Tensor] = net.state_dict()
    return state


def _half(tensor: Tensor) -> Tensor:
    """As float16, unless a number is too large for that."""
    rounded = tensor.half() if tensor.is_floating_point() else tensor
    return rounded if not tensor.is_floating_point() or bool(torch.isfinite(rounded).all()) else tensor


def _is_state(name: str) -> bool:
    return name.startswith(STATE_PREFIX)


def _place(row: list[str]) -> tuple[int, int] | None:
    """Stage and step of a row; ``None`` for what is none."""
    plain = len(row) == len(_STEP_COLUMNS) and row[0].isdecimal() and row[2].isdecimal()
    return (int(row[0]), int(row[2])) if plain else None


def published(job: TrainJob, report: TrainReport, watcher: Watcher) -> TrainReport:
    """What became of a training, after its weights are published if they are to be. Raises as `publish`."""
    settings, there = job.settings, job.home / BEST
    if job.publish and settings.quick_experiment < 1:
        watcher.note(f"a quick experiment publishes nothing: its weights are {shown(report.checkpoint)}")
    if not job.publish or settings.shuffle_labels or settings.quick_experiment < 1:
        return report
    if job.replace or not there.is_file():
        publish(job, report.checkpoint, report.results, watcher)
    elif not same_bytes(there, report.checkpoint):
        watcher.note(f"{shown(there)} is of another training and stays; to stand on it, pass --city-teacher-ckpt")
        return report
    return replace(report, checkpoint=there, published=True)


def publish(job: TrainJob, weights: Path, results: Mapping[str, Any], watcher: Watcher) -> None:
    """Put ``weights`` beside the runs as ``best.safetensors`` (and ``best.pth``), each whole. Raises `StoreError`."""
    home = job.home
    make_directory(home)
    checkpoint, pth = home / BEST, home / "best.pth"
    with store_errors(weights, "read"):
        content = weights.read_bytes()
    if pth.is_file() and not _hold_the_same(checkpoint, pth):
        _set_aside(pth, watcher)
    elif not job.pth:  # one of other weights must not stand beside it
        remove_files(home, [pth])
    if checkpoint.is_file() and not same_bytes(checkpoint, weights):
        if _recorded(checkpoint) is None:
            _set_aside(checkpoint, watcher)
        else:
            watcher.note(f"{shown(checkpoint)} was of another training, and is replaced")
    write_atomic(checkpoint, content)
    if job.pth:
        with naming(checkpoint):
            record, tensors = _content(checkpoint)
        beside = {
            "epoch": results.get("best_epoch", 0),
            "optimizer_state_dict": {},
            "val_acc": results["validation"].get("accuracy"),
            "val_loss": results["validation"].get("log_loss"),
        }
        save_checkpoint(pth, tensors, json.loads(record), beside)


def _content(checkpoint: Path) -> tuple[str, dict[str, Tensor]]:
    """Record and tensors (float32) of a checkpoint, under the names that they were saved with."""
    content, _, _ = read_content(checkpoint)
    for entry in [name for name, value in content.items() if isinstance(value, dict)]:
        start = "" if entry == "model_state_dict" else f"{entry}."
        content |= {f"{start}{name}": value for name, value in content.pop(entry).items()}
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    found = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    return str(content.get(RECORD_ENTRY, "{}")), found


def _recorded(checkpoint: Path) -> tuple[str, dict[str, Tensor]] | None:
    """The content of a checkpoint that kd-cache wrote: it says so itself, and its checksum holds."""
    try:
        found = _content(checkpoint)
    except (CheckpointError, StoreError):
        return None
    return None if found[0] == "{}" else found


def _hold_the_same(checkpoint: Path, pth: Path) -> bool:
    """Whether a ``.pth`` is the one that was written beside these weights."""
    one = _recorded(checkpoint) if checkpoint.is_file() else None
    other = None if one is None else _recorded(pth)
    if one is None or other is None or one[0] != other[0] or one[1].keys() != other[1].keys():
        return False
    return all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())


def _set_aside(path: Path, watcher: Watcher) -> None:
    """Give a file that kd-cache did not write another name: it may be all that there is of somebody's weights."""
    names = (path.with_name(f"{path.stem}.earlier-{number}{path.suffix}") for number in count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    with store_errors(path, "rename"):
        path.rename(aside)
    watcher.note(f"{shown(path)} was not written by kd-cache; it is {shown(aside)} now")


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are equal. Raises `StoreError`."""
    with store_errors(one, "read"):
        return filecmp.cmp(one, other, shallow=False)
