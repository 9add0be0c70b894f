"""The command line: the only code that prints or exits. A command is imported when it runs (`commands`)."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import Annotated

import typer

import kd_cache
from kd_cache.cli.parser import PROGRAM, SETTINGS, TableGroup
from kd_cache.cli.streams import forgiving_streams
from kd_cache.watch import Stopped

app = typer.Typer(
    name=PROGRAM,
    cls=TableGroup,
    help="Run teachers once over a training set, keep their logits, and serve them to students: "
    "never a wrong, stale, corrupt or leaked row.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kd-cache {kd_cache.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """The options of ``kd-cache`` itself."""


_STOPPING = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 10.0
_stopped_at = 0.0


def _stop(number: int, frame: object) -> None:
    """Ctrl-C, and SIGTERM as job schedulers send it: unwind, so that a dump commits what it has scored."""
    global _stopped_at
    _stopped_at = time.monotonic()
    for each in _STOPPING:
        signal.signal(each, _already_stopping)  # a second one would interrupt that
    raise KeyboardInterrupt if number == signal.SIGINT else Stopped(128 + number)


def _already_stopping(number: int, frame: object) -> None:
    """For a while. Then whatever holds up the end is interrupted as well."""
    if time.monotonic() - _stopped_at > _PATIENCE:
        _stop(number, frame)
    with suppress(OSError):
        os.write(2, b"already stopping, as soon as what was scored is saved\n")


def main() -> None:
    """Entry point of ``kd-cache``."""
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and shells have it for what runs behind
            signal.signal(number, _stop)
    with forgiving_streams():
        app()
