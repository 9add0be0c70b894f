"""Scoring: fixed-shape batches through every teacher, reproducibly.

On a GPU a batch is started and left running while the next is made ready: features leave and logits come back through
pinned memory, without waiting. On a CPU a batch is scored at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kd_cache.errors import KDCacheError, TeacherError, shown
from kd_cache.score.device import full_precision
from kd_cache.score.factory import users_code
from kd_cache.score.given import Given, each, of_arrays, shape_in_words, size_of, split
from kd_cache.score.self_test import refuse_unsteady
from kd_cache.score.stages import COPYING, SCORING, Busy
from kd_cache.score.teacher import Teacher
from kd_cache.watch import Stopped

AHEAD = 2
"""Batches that a GPU has before it when the next is made ready: it must never wait for Python."""


@dataclass(eq=False)
class Batch:
    """Samples of one shape on their way through the same teachers, each at its own slot of ``size``.

    ``rows`` maps a slot to the sample's number and its input: features ``[T, F]``, or an array of one shape and dtype.
    """

    size: int
    teachers: frozenset[str]
    rows: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """Results of one batch: ``numbers`` of its n samples, and by teacher ``[n, C]`` float32 logits or an error.

    ``exact`` holds the logits of the same samples in full precision, for the batches that are compared.
    """

    numbers: list[int]
    logits: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[str, TeacherError] = field(default_factory=dict)
    exact: dict[str, np.ndarray] = field(default_factory=dict)


class _UnscoredError(Exception):
    """A teacher cannot score these samples."""


@dataclass(frozen=True)
class _Running:
    """A batch whose results may still be under way: tensors ``[size, C]`` on the host, valid when ``done`` is."""

    scored: Scored
    slots: list[int]
    logits: dict[str, torch.Tensor]
    exact: dict[str, torch.Tensor]
    events: list[torch.cuda.Event]


class Engine:
    """Scores batches of fixed shape. Use inside `device.numerics`.

    Args:
        teachers: by name; moved to ``device`` and to evaluation mode.
        compiled: run them through ``torch.compile``.
        precision: what they compute in; where it is given, each is tested with its first batch (`refuse_unsteady`).
        compare: score batch 1, 2, 4, 8, … in full precision as well (`Scored.exact`).
        busy: hears how long copying and scoring take.
        note: hears what a person should know.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        device: torch.device,
        *,
        compiled: bool = False,
        precision: str | None = None,
        compare: bool = False,
        busy: Busy | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.device = device
        self.teachers = {name: _placed(name, teacher, device) for name, teacher in teachers.items()}
        self.most_rows: int | None = None
        self._calls = {name: _compiled(teacher) if compiled else teacher for name, teacher in self.teachers.items()}
        self._precision, self._untested = precision, set(teachers if precision else ())
        self._compare = compare
        self._busy = busy or Busy()
        self._note = note
        self._count = 0
        self._running: deque[_Running] = deque()

    @property
    def halved(self) -> bool:
        """Whether memory ran out, so that batches are scored in parts: their last bits may differ from other runs'."""
        return self.most_rows is not None

    def submit(self, batch: Batch) -> Iterator[Scored]:
        """Start on a batch; gives batches that are done by now, in the order of their submission."""
        self._running.append(self._start(batch))
        while len(self._running) > (AHEAD if self.device.type == "cuda" else 0):
            yield self._result(self._running.popleft())

    def finish(self) -> Iterator[Scored]:
        """Wait for what is still running."""
        while self._running:
            yield self._result(self._running.popleft())

    def score(self, batch: Batch) -> Scored:
        """Score the samples of a batch with its teachers, and wait for that.

        Empty slots are filled with a sample that is there: what stands in other slots does not touch a row's bits.
        A teacher that refuses these features, or returns anything but ``[size, C]``, has an error in the result.

        Raises:
            TeacherError: a teacher failed in a way that it did not foresee, or memory is too small for one sample.
        """
        return self._result(self._start(batch))

    def forward(self, name: str, features: Given) -> torch.Tensor:
        """``[B, C]`` of features ``[B, T, F]`` on the device, all at once. Raises as the teacher does."""
        return self._calls[name](features)  # type: ignore[arg-type]  # of a data set of dictionaries it takes those

    def _start(self, batch: Batch) -> _Running:
        self._count += 1
        marks = [self._mark()]
        with self._busy.doing(COPYING):
            features = self._to_device(batch)
        marks.append(self._mark())
        running = _Running(Scored([number for number, _ in batch.rows.values()]), list(batch.rows), {}, {}, marks)
        compare = self._compare and self._count & (self._count - 1) == 0
        for name in self.teachers:
            if name not in batch.teachers:
                continue
            try:
                running.logits[name] = self._to_host(self._run(name, features))
                if name in self._untested:
                    self._test(name, features, running.logits[name])
                if compare:
                    with full_precision():
                        running.exact[name] = self._to_host(self._run(name, features))
            except _UnscoredError as error:
                running.scored.errors[name] = TeacherError(str(error))
        marks.append(self._mark())
        return running

    def _test(self, name: str, features: Given, logits: torch.Tensor) -> None:
        self._untested.discard(name)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        teacher: Any = self.teachers[name]
        refuse_unsteady(
            name, teacher, str(self._precision), features, logits, lambda batch: self._to_host(self._run(name, batch))
        )

    def _result(self, running: _Running) -> Scored:
        if self.device.type == "cuda":
            started, copied, done = running.events
            try:
                done.synchronize()
            except RuntimeError as error:
                raise TeacherError(f"a teacher failed on {self.device}: {shown(error)}") from error
            self._busy.add(COPYING, started.elapsed_time(copied) / 1000)
            self._busy.add(SCORING, copied.elapsed_time(done) / 1000)
        for mine, theirs in ((running.scored.logits, running.logits), (running.scored.exact, running.exact)):
            mine.update({name: logits.numpy()[running.slots] for name, logits in theirs.items()})
        return running.scored

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return _NEVER
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def _to_device(self, batch: Batch) -> Given:
        """``[size, T, F]``, through pinned memory where there is a GPU (torch keeps and reuses it)."""
        filler = next(iter(batch.rows.values()))[1]
        arrays = [batch.rows[slot][1] if slot in batch.rows else filler for slot in range(batch.size)]
        padded = of_arrays(arrays, pinned=self.device.type == "cuda")
        return each(padded, lambda tensor: tensor.to(self.device, non_blocking=True))

    def _to_host(self, logits: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return logits.to(torch.float32, copy=True)  # the teacher may use its buffer again
        logits = logits.float()
        host = torch.empty(logits.shape, dtype=torch.float32, pin_memory=True)
        return host.copy_(logits, non_blocking=True)

    def _run(self, name: str, features: Given) -> torch.Tensor:
        if self.device.type == "cuda":  # measured on the device: the call only starts the work
            return self._in_parts(name, features)
        with self._busy.doing(SCORING):
            return self._in_parts(name, features)

    def _in_parts(self, name: str, features: Given) -> torch.Tensor:
        """All rows at once; where memory is too small for that, halves of it, of those halves, …"""
        while True:
            parts = split(features, self.most_rows or size_of(features))
            try:
                # A teacher may write into what it is given, and give the same buffer each time.
                if len(parts) == 1:
                    return self._checked(name, each(features, torch.clone))
                return torch.cat([self._checked(name, each(part, torch.clone)).clone() for part in parts])
            except _OutOfMemoryError as error:
                if size_of(parts[0]) == 1:
                    why = f" ({text})" if (text := shown(error)) else ""
                    raise TeacherError(
                        f"teacher {name}: there is not enough memory to score one sample of shape "
                        f"{shape_in_words(features, 1)}{why}"
                    ) from error
                self.most_rows = size_of(parts[0]) // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._note(
                f"out of memory with {size_of(parts[0])} samples at once: going on with {self.most_rows}; the last "
                "bits of these rows may differ from those of other runs (a smaller --batch-size avoids that)"
            )

    def _checked(self, name: str, features: Given) -> torch.Tensor:
        try:
            logits = self.forward(name, features)
        except KDCacheError as error:
            raise _UnscoredError(f"teacher {name}: {error.message}") from error
        except (KeyboardInterrupt, Stopped):
            raise
        except BaseException as error:  # sys.exit(0) in a teacher's code must not end this program with 0
            if is_out_of_memory(error):
                raise _OutOfMemoryError(error) from error
            raise TeacherError(
                f"teacher {name} failed on features of shape {shape_in_words(features)}: "
                f"{type(error).__name__}: {shown(error)}"
            ) from error
        frames = getattr(self.teachers[name], "num_frames", None)
        row = (self.teachers[name].num_classes,) if frames is None else (frames, self.teachers[name].num_classes)
        expected = (size_of(features), *row)
        found = _misfit(logits, expected)
        if found is not None:
            why = "" if frames is None else "; all rows of a cache have one number of frames: crop or pad the inputs"
            raise _UnscoredError(
                f"teacher {name} must return floating-point {list(expected)}, it returned {found}{why}"
            )
        return logits if frames is None else logits.reshape(size_of(features), -1)


_MOST_COMPILED = 4096
_NEVER: Any = None
"""The mark of a device on which every call waits for its end."""


class _OutOfMemoryError(Exception):
    """Memory, the device's or the host's, was too small."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or on a CPU, or Python could not get the memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _misfit(logits: Any, expected: tuple[int, ...]) -> str | None:
    """What a teacher returned in place of a plain tensor of this shape; ``None`` where it is one."""
    if not isinstance(logits, torch.Tensor):
        return type(logits).__name__
    if logits.is_nested or logits.layout is not torch.strided or logits.is_meta:
        return "a nested tensor" if logits.is_nested else "a meta tensor" if logits.is_meta else "a sparse tensor"
    if logits.shape == expected and logits.is_floating_point():
        return None
    return f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"


def _placed(name: str, teacher: Teacher, device: torch.device) -> Teacher:
    moved: Any = teacher
    with users_code(lambda why: TeacherError(f"teacher {name} cannot be made ready on {device}: {why}")):
        if callable(getattr(moved, "to", None)):
            moved = moved.to(device)
        if callable(getattr(moved, "eval", None)):
            moved = moved.eval()
    return moved  # type: ignore[no-any-return]


def _compiled(teacher: Teacher) -> Callable[[torch.Tensor], torch.Tensor]:
    # Each shape is worth its own code. Beyond its limits torch would go on without compiling, silently: then the last
    # bits would depend on the order of the shapes.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _MOST_COMPILED
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(teacher, dynamic=False)
