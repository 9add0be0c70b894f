"""What a person sees: progress and remarks on standard error, results on standard output, errors without traceback."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import rich.table
import typer
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from kd_cache.commands import Failure, Table
from kd_cache.errors import KDCacheError, UsageError, shown
from kd_cache.watch import Watcher

P = ParamSpec("P")
R = TypeVar("R")

_LOG_SECONDS = 5.0
_PIPE_WIDTH = 160


def reporting_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors into a message and an exit status; ``--debug`` shows the traceback as well.

    A ``~`` in a path is replaced here for every command, in what it is given and in its context.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            kwargs.update({name: at_home(value) for name, value in kwargs.items()})
            ctx: Any = kwargs.get("ctx")
            if ctx is not None:
                ctx.params.update({name: value for name, value in kwargs.items() if name in ctx.params})
            return command(*args, **kwargs)
        except KDCacheError as error:
            _print_error(error.message, error.hint)
            code = error.exit_code
            cause: BaseException = error
        except KeyboardInterrupt as error:
            _print_error("interrupted; what was committed is kept, and the same command goes on from there", None)
            code, cause = 130, error
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # noqa: BLE001 (the last line of defence: say it, exit non-zero)
            _print_error(f"unexpected {type(error).__name__}: {error}", "Run again with --debug to see where.")
            code, cause = 1, error
        if kwargs.get("debug"):
            raise cause
        raise typer.Exit(code)

    return wrapped


def at_home(value: Any) -> Any:
    """Paths from a file or the environment may start with ``~``, which no shell has replaced there."""
    if isinstance(value, list | tuple):
        return type(value)(at_home(item) for item in value)
    try:
        return value.expanduser() if isinstance(value, Path) else value
    except RuntimeError as error:  # nobody is called so
        raise UsageError(f"{shown(str(value))}: {error}") from error


def _print_error(message: str, hint: str | None) -> None:
    console = Console(stderr=True, soft_wrap=True)
    text = Text("error: ", style="bold red")
    text.append("\n".join(shown(line) for line in message.split("\n")), style="not bold default")
    console.print(text)
    if hint:
        console.print(Text("\n".join(shown(line) for line in hint.split("\n")), style="dim"))


class Screen(Watcher):
    """Shows a run: a progress bar with rate and ETA on a terminal, a line every few seconds elsewhere."""

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.stderr = Console(stderr=True, soft_wrap=True)
        # In a pipe there is no edge to keep: names stay whole, so that they can be searched for.
        self.stdout = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH)
        self._progress: Progress | None = None
        self._task: Any = None
        self._noted: set[str] = set()
        self._name, self._total, self._done, self._busy, self._epoch = "", 0, 0, "", ""
        self._began = self._logged = time.monotonic()

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def stage(self, name: str, total: int) -> None:
        self._close()
        self._name, self._total, self._done, self._busy, self._epoch = name, total, 0, "", ""
        self._began = self._logged = time.monotonic()
        if self.quiet or not self.stderr.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[saved]}"),
            TextColumn("{task.fields[busy]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.stderr,
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(name, total=total, rate="", saved="", busy="")

    def advance(self, count: int) -> None:
        self._done += count
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        if self._progress is not None:
            self._progress.update(self._task, advance=count, rate=f"{rate:,.0f} samples/s")
            return
        if not self.quiet and time.monotonic() - self._logged >= _LOG_SECONDS:
            self._logged = time.monotonic()
            left = (self._total - self._done) / max(rate, 1e-9)
            busy = f" · {self._busy}" if self._busy else ""
            busy += f" · {self._epoch}" if self._epoch else ""
            done = f"{self._done:,}/{self._total:,}"
            self.remark(f"{self._name}: {done} · {rate:,.0f} samples/s · ETA {left:,.0f} s{busy}")

    def saved(self, count: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, saved=f"saved {count:,}")
        else:
            self.remark(f"saved: {count:,}/{self._total:,} samples")

    def busy(self, shares: Mapping[str, float]) -> None:
        self._busy = " · ".join(f"{stage} {share:.0%}" for stage, share in shares.items())
        if self._progress is not None:
            self._progress.update(self._task, busy=self._busy)

    def epoch(self, measured: Mapping[str, Any]) -> None:
        told = (
            f"epoch {measured['epoch']}: loss {measured['train_loss']:.3f}, validation "
            f"{measured['val_accuracy']:.1%}, loss {measured['val_log_loss']:.3f}"
        )
        if self._progress is not None:
            self._progress.update(self._task, saved=told)
        else:
            self._epoch = told

    def note(self, text: str) -> None:
        """Once: what is read twice need not be told of twice."""
        if text not in self._noted:
            self._noted.add(text)
            self.remark(f"note: {text}")

    def remark(self, text: str) -> None:
        """One line on standard error."""
        if not self.quiet:
            self.stderr.print(Text(shown(text)))

    def result(self, *parts: Table | str) -> None:
        """What the command was asked for, for a person."""
        self._close()
        for part in parts:
            if isinstance(part, Failure) and self.quiet:
                self.stderr.print(Text(shown(part)))
            elif self.quiet or self.as_json:
                continue
            elif isinstance(part, str):
                self.stdout.print(Text(shown(part)), soft_wrap=True)
            else:
                self.stdout.print(_drawn(part))

    def result_json(self, content: Any) -> None:
        """What the command was asked for, for a program: the only thing on standard output."""
        self._close()
        if self.as_json:
            sys.stdout.write(json.dumps(content, indent=1) + "\n")

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _drawn(table: Table) -> Group:
    """A plain table below its title; every cell is printed as it is, never as markup."""
    made = rich.table.Table(show_edge=False, pad_edge=False)
    for number, column in enumerate(table.columns):
        made.add_column(Text(column), justify="left" if number == 0 else "right", overflow="fold")
    for row in table.rows:
        made.add_row(*[Text(shown(cell)) for cell in row])
    return Group(Text(table.title, style="table.title"), made)  # not the table's own, which it would fold at its width


def percent(share: float | None) -> str:
    """A share of 1 for a person; a dash where it is not known."""
    return "–" if share is None else f"{100 * share:.1f} %"


def size(count: int) -> str:
    """Bytes for a person."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError
