"""Running a command: what it was given, its function with the values that this one names, and the report it gives."""

from __future__ import annotations

import contextlib
import inspect
import pkgutil
import sys
from collections.abc import Mapping
from typing import Any

import typer

from kd_cache.cli.console import Screen, at_home, reporting_errors
from kd_cache.cli.settings_file import FILE
from kd_cache.commands import Command, Report, Run
from kd_cache.errors import UsageError


@reporting_errors
def run_command(entry: Command, ctx: typer.Context, values: Mapping[str, Any], *, as_json: bool, debug: bool) -> None:
    """Run it, show its report, and exit with its status if that is not 0."""
    sources = {name: str(source.name).lower() for name in values if (source := ctx.get_parameter_source(name))}

    def read(name: str, text: Any) -> Any:
        parameter: Any = next(each for each in ctx.command.params if each.name == name)
        try:
            value = at_home(parameter.process_value(ctx, text))
            return list(value) if parameter.multiple else value
        except typer.BadParameter as error:
            raise UsageError(error.message) from error

    at_last = {name: at_home(value) for name, value in values.items()}
    run = Run(entry, at_last, sources, ctx.meta.get(FILE, {}), read)
    with Screen(quiet=at_last.get("quiet", False), as_json=as_json) as screen:
        # What a teacher prints is no part of the document.
        with contextlib.redirect_stdout(sys.stderr) if screen.as_json else contextlib.nullcontext():
            report = called(run, screen)
        screen.result(*report.lines)
        screen.result_json(report.content)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def called(run: Run, screen: Screen) -> Report:
    """The command's function, with the values that it names."""
    function = pkgutil.resolve_name(run.command.target)
    known = {**run.values, "run": run, "screen": screen}
    report: Report = function(**{name: known[name] for name in inspect.signature(function).parameters})
    return report
