"""What a person sees: progress and remarks on standard error, results on standard output, errors without traceback."""

from __future__ import annotations

import functools
import json
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import rich.table
import typer
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from kd_cache.cli.progress import Progress
from kd_cache.commands import Failure, Table
from kd_cache.errors import KDCacheError, shown
from kd_cache.options import home_path
from kd_cache.watch import Stopped, Watcher

P = ParamSpec("P")
R = TypeVar("R")

_LOG_SECONDS = 5.0
_PIPE_WIDTH = 160
_PACKAGE = Path(__file__).parents[1]


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
            message, hint, code = error.message, error.hint, error.exit_code
            cause: BaseException = error
        except KeyboardInterrupt as error:
            message, hint = "interrupted; what was committed is kept, and the same command goes on from there", None
            code, cause = 130, error
        except (typer.Exit, typer.Abort, Stopped):
            raise
        except (Exception, SystemExit, GeneratorExit) as error:  # noqa: BLE001 (the last line of defence: say it)
            message = f"unexpected {type(error).__name__}: {shown(error)}"
            if isinstance(error, OSError) and error.filename is not None:
                message = f"cannot use {shown(error.filename)}: {error.strerror}"
            hint, code = "Run again with --debug to see where.", 1
            cause = error if isinstance(error, Exception) else RuntimeError(message)
        _tell_error(type(cause).__name__, message, hint, code, as_json=bool(kwargs.get("as_json")))
        if kwargs.get("debug"):
            raise cause
        raise typer.Exit(code)

    return wrapped


def at_home(value: Any) -> Any:
    """Paths from a file or the environment may start with ``~``, which no shell has replaced there."""
    if isinstance(value, list | tuple):
        return type(value)(at_home(item) for item in value)
    return home_path(value) if isinstance(value, Path) else value


def _tell_error(kind: str, message: str, hint: str | None, code: int, *, as_json: bool) -> None:
    _print_error(message, hint)
    if as_json:
        print_json_error(message, hint, code, kind)


def print_json_error(message: str, hint: str | None, exit_code: int, kind: str) -> None:
    """What ended a command, for a program: all that is on standard output then."""
    error = {"kind": kind, "message": message, "hint": hint, "exit_code": exit_code}
    sys.stdout.write(json.dumps({"error": error}, indent=1) + "\n")


def _print_error(message: str, hint: str | None) -> None:
    console = Console(stderr=True)
    text = Text("error: ", style="bold red")
    text.append("\n".join(shown(line) for line in message.split("\n")), style="not bold default")
    _print(console, text)
    if hint:
        _print(console, Text("\n".join(shown(line) for line in hint.split("\n")), style="dim"))


class Screen(Watcher):
    """Shows a run: a progress bar with rate and ETA on a terminal, a line every few seconds elsewhere."""

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.stderr = Console(stderr=True)
        # In a pipe there is no edge to keep: names stay whole, so that they can be searched for.
        self.stdout = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH)
        self._live: Live | None = None
        self._progress = Progress()
        self._noted: set[str] = set()
        self._before, self._shown = warnings.catch_warnings(), warnings.showwarning
        self._logged = time.monotonic()

    def __enter__(self) -> Screen:
        self._before.__enter__()
        warnings.showwarning = self._warned  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        self._before.__exit__(None, None, None)
        self._close()

    def _warned(self, message: Warning | str, kind: type[Warning], file: str, line: int, *more: Any) -> None:
        """What a library's user gets as a warning, a command's gets as a note; others' warnings are theirs."""
        if Path(file).is_relative_to(_PACKAGE):
            self.note(str(message))
        else:
            self._shown(message, kind, file, line, *more)

    def stage(self, name: str, total: int, unit: str = "samples") -> None:
        self._close()
        self._progress = Progress(name, total, unit=unit)
        self._logged = time.monotonic()
        if not self.quiet and self.stderr.is_terminal:
            self._live = Live(self._progress, console=self.stderr, transient=True, refresh_per_second=4)
            self._live.start()

    def advance(self, count: int) -> None:
        self._progress.advance(count)
        if self._live is None and not self.quiet and time.monotonic() - self._logged >= _LOG_SECONDS:
            self._logged = time.monotonic()
            self.remark(
                f"{self._progress.name}: {' · '.join([*self._progress.figures, *self._progress.extras.values()])}"
            )

    def saved(self, count: int) -> None:
        if self._live is not None:
            self._progress.extras["saved"] = f"saved {count:,}"
        else:
            self.remark(f"saved: {count:,}/{self._progress.total:,} samples")

    def parts(self, done: int, total: int) -> None:
        self._progress.extras["parts"] = f"{done:,}/{total:,} parts"

    def busy(self, shares: Mapping[str, float]) -> None:
        self._progress.extras["busy"] = " · ".join(f"{stage} {share:.0%}" for stage, share in shares.items())

    def epoch(self, measured: Mapping[str, Any]) -> None:
        self._progress.extras["epoch"] = (
            f"epoch {measured['epoch']}: loss {measured['train_loss']:.3f}, validation "
            f"{measured['val_accuracy']:.1%}, loss {measured['val_log_loss']:.3f}"
        )

    def note(self, text: str) -> None:
        """Once: what is read twice need not be told of twice."""
        if text not in self._noted:
            self._noted.add(text)
            self.remark(f"note: {text}")

    def remark(self, text: str) -> None:
        """One line on standard error."""
        if not self.quiet:
            _print(self.stderr, Text(shown(text)))

    def result(self, *parts: Table | str) -> None:
        """What the command was asked for, for a person."""
        self._close()
        for part in parts:
            if isinstance(part, Failure) and self.quiet:
                _print(self.stderr, Text(shown(part)))
            elif self.quiet or self.as_json:
                continue
            elif isinstance(part, str):
                _print(self.stdout, Text(shown(part)))
            else:
                self.stdout.print(_drawn(part, self.stdout.width), crop=False)

    def result_json(self, content: Any) -> None:
        """What the command was asked for, for a program: the only thing on standard output."""
        self._close()
        if self.as_json:
            sys.stdout.write(json.dumps(content, indent=1) + "\n")

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _print(console: Console, text: Text) -> None:
    """A line, whole where no terminal shows it; on one it is broken between words, and never within one."""
    lines = list(text.split("\n", allow_blank=True)) if console.is_terminal else []
    for line in lines:
        at = 0
        parts = textwrap.wrap(line.plain, console.width, break_long_words=False, break_on_hyphens=False)
        for part in parts or [""]:
            at = line.plain.index(part, at)
            console.print(line[at : at + len(part)], soft_wrap=True)
            at += len(part)
    if not lines:
        console.print(text, soft_wrap=True)


def _drawn(table: Table, width: int) -> Group:
    """A plain table below its title; every cell is printed as it is, never as markup, and no word of it is broken.

    What is too wide for that is written cell by cell.
    """
    made = rich.table.Table(show_edge=False, pad_edge=False)
    cells = [[shown(cell) for cell in row] for row in table.rows]
    widest = [max(map(cell_len, " ".join(column).split(" "))) for column in zip(table.columns, *cells, strict=True)]
    for number, (column, least) in enumerate(zip(table.columns, widest, strict=True)):
        made.add_column(Text(column), justify="left" if number == 0 else "right", min_width=least)
    for row in cells:
        made.add_row(*map(Text, row))
    title = Text(table.title, style="table.title", overflow="ignore")  # not the table's own, which it would fold
    if sum(widest) + 3 * (len(widest) - 1) <= width:
        return Group(title, made)
    names = max(map(cell_len, table.columns[1:]), default=0)
    lines = []
    for first, *others in cells:
        beside = zip(table.columns[1:], others, strict=True)
        lines += [first, *[f"  {name:<{names}}  {cell}" for name, cell in beside]]
    return Group(title, *[Text(line, overflow="ignore", no_wrap=True) for line in lines])


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


def cost_in_words(cost: Mapping[str, Any]) -> str:
    """What a teacher's ``storage_cost`` or ``precision_cost`` says."""
    told = ", ".join(f"{key.replace('_', ' ')} {value:.2g}" for key, value in cost.items() if key != "rows")
    return f"over {cost['rows']:,} rows: {told}"
