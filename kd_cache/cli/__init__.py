"""The command line: the only code that prints or exits. Imports of torch happen inside the commands."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Annotated

import typer

import kd_cache
from kd_cache.cli import adopt, diff, dump, export, gc, info, merge, repair, seal, verify
from kd_cache.cli.sample_data import sample_data_command
from kd_cache.cli.train import train_app

app = typer.Typer(
    name="kd-cache",
    help="Run teachers once over a training set, keep their logits, and serve them to students: "
    "never a wrong, stale, corrupt or leaked row.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Those who come from the older script write --cache_root; it means --cache-root.
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
app.command("dump", epilog=dump.EXAMPLES)(dump.dump_command)
app.command("seal", epilog=seal.EXAMPLES)(seal.seal_command)
app.command("verify", epilog=verify.EXAMPLES)(verify.verify_command)
app.command("repair", epilog=repair.EXAMPLES)(repair.repair_command)
app.command("info", epilog=info.EXAMPLES)(info.info_command)
app.command("diff", epilog=diff.EXAMPLES)(diff.diff_command)
app.command("export", epilog=export.EXAMPLES)(export.export_command)
app.command("adopt", epilog=adopt.EXAMPLES)(adopt.adopt_command)
app.command("gc", epilog=gc.EXAMPLES)(gc.gc_command)
app.command("merge", epilog=merge.EXAMPLES)(merge.merge_command)
app.command("sample-data")(sample_data_command)
app.add_typer(train_app)


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
    """Exit codes: 0 ok, 1 error, 2 usage, 3 misses, 4 corrupt, 5 stale, 6 data leakage, 130 Ctrl-C, 143 SIGTERM."""


_STOPPING = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 10.0
_stopped_at = 0.0


def _stop(number: int, frame: object) -> None:
    """Ctrl-C, and SIGTERM as job schedulers send it: unwind, so that a dump commits what it has scored."""
    global _stopped_at
    _stopped_at = time.monotonic()
    for each in _STOPPING:
        signal.signal(each, _already_stopping)  # a second one would interrupt that
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode must not fail a finished dump
    app()
