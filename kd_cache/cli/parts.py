"""Which part of a dump this process does: ``--shard i/n``, or ``env``, what a launcher or job array says."""

from __future__ import annotations

import os
import re

from kd_cache.errors import UsageError, shown

_TEXT = re.compile(r"([0-9]{1,9})/([0-9]{1,9})\Z")


def part_of(text: str | None) -> tuple[tuple[int, int] | None, str]:
    """``(i, n)`` with 0 ≤ i < n, and where that comes from; ``None`` where the work is not split.

    ``env`` asks the environment: ``RANK`` of ``WORLD_SIZE`` (torchrun), or ``SLURM_ARRAY_TASK_ID`` of
    ``SLURM_ARRAY_TASK_COUNT``, counted from ``SLURM_ARRAY_TASK_MIN`` in steps of ``SLURM_ARRAY_TASK_STEP``. Nothing
    else does: an array over targets must not dump a part of each.

    Raises:
        UsageError: no such part, two parts are named, or a launcher is at work and ``--shard`` says nothing.
    """
    if text is None:
        _refuse_to_guess()
        return None, ""
    if text == "env":
        return _in_environment()
    match = _TEXT.match(text)
    if match is None:
        raise UsageError(f"--shard is {shown(text)}, expected env, or i/n, for example 0/4 for the first of four")
    return _part(int(match[1]), int(match[2]), f"--shard {text}"), "--shard"


def _refuse_to_guess() -> None:
    for name in ("RANK", "SLURM_ARRAY_TASK_ID"):
        if name in os.environ:
            raise UsageError(
                f"{name} is set, so this process may be one of several; --shard does not say if they share a dump",
                hint="Pass --shard env if each scores a part of it, --shard 0/1 if this one scores everything.",
            )


def _in_environment() -> tuple[tuple[int, int] | None, str]:
    found = {name: part for name, part in (("RANK", _rank()), ("SLURM_ARRAY_TASK_ID", _array())) if part is not None}
    if len(found) > 1:
        raise UsageError(
            "RANK and SLURM_ARRAY_TASK_ID both split the work", hint="Say which part is meant with --shard i/n."
        )
    return next(((part, name) for name, part in found.items()), (None, ""))


def _rank() -> tuple[int, int] | None:
    world = _number("WORLD_SIZE")
    return (
        None if world is None or "RANK" not in os.environ else _part(_number("RANK") or 0, world, "RANK of WORLD_SIZE")
    )


def _array() -> tuple[int, int] | None:
    task, count = _number("SLURM_ARRAY_TASK_ID"), _number("SLURM_ARRAY_TASK_COUNT")
    if task is None or count is None:
        return None
    first, step = _number("SLURM_ARRAY_TASK_MIN") or 0, _number("SLURM_ARRAY_TASK_STEP") or 1
    number, rest = divmod(task - first, step)
    last = _number("SLURM_ARRAY_TASK_MAX")
    uneven = last is not None and last - first != step * (count - 1)
    if count and (rest or uneven or not 0 <= number < count):
        raise UsageError(
            f"the job array's tasks are not evenly spaced: {task} is not one of {count} from {first} in steps of {step}"
            + (f" to {last}" if uneven else ""),
            hint="Say which part is meant with --shard i/n.",
        )
    return _part(number, count, "SLURM_ARRAY_TASK_ID of SLURM_ARRAY_TASK_COUNT")


def _part(number: int, count: int, said: str) -> tuple[int, int] | None:
    if not 0 <= number < count:
        raise UsageError(
            f"{said}: there is no part {number} of {count}",
            hint=f"Parts count from 0: 0/{max(count, 1)} to {max(count, 1) - 1}/{max(count, 1)}.",
        )
    return None if count == 1 else (number, count)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UsageError(f"{name} in the environment is {shown(text)!r}, expected a number")
    return int(text)
