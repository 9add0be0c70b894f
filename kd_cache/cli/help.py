"""Help on a terminal: nothing is cut, what does not fit beside its option goes below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.text import Text

from kd_cache.commands import EXIT_CODES, Command
from kd_cache.options import FIRST, OPTIONS, Option

_INDENT, _COLUMN = 2, 24
_NO_BOUND = 10**9  # nobody is near it


def spelled(option: Option) -> str:
    """``-n, --n N``: how it is written on the command line."""
    if option.positional:
        return option.metavar or (option.name.upper() if option.default is ... else f"[{option.name.upper()}]")
    flags = sorted(option.flags, key=lambda flag: flag.startswith("--"))
    return ", ".join([f"{', '.join(flags)} {option.value}".strip(), *(flag for flag, _ in option.stands_for)])


def said(option: Option) -> str:
    """What it does, its bounds, and its default."""
    bounds = [f"from {option.low:,g}"] if option.low is not None else []
    bounds += [f"to {option.high:,g}"] if option.high is not None and option.high < _NO_BOUND else []
    notes = [f"{flag}: {value}" for flag, value in option.stands_for] + ([" ".join(bounds)] if bounds else [])
    notes += ["required"] if option.default is ... else []
    notes += [f"default: {option.shown_default}"] if option.shown_default else []
    return f"{option.help} ({'; '.join(notes)})" if notes else option.help


def print_command_help(command: Command, beside: Mapping[str, str]) -> None:
    """A command: what it does, its options by panel, the commands ``beside`` it, examples, exit codes."""
    console = Console()
    arguments = "".join(f" {spelled(option)}" for option in command.options if option.positional)
    _usage(console, f"kd-cache {command.name} [OPTIONS]{arguments}", [command.help, command.details])
    for panel, options in command.panels.items():
        _panel(console, panel, {spelled(option): said(option) for option in options})
    if beside:
        _panel(console, "Commands beside it", beside)
    if command.examples:
        console.print(Text("\nExamples", style="bold"))
        for example in command.examples:
            console.print(Text(f"  {example}"), soft_wrap=True)
    console.print(Text("\nExit codes: " + ", ".join(f"{code} {EXIT_CODES[code]}" for code in command.exit_codes)))


def print_group_help(
    path: str, summary: str, commands: Mapping[str, str], own: Mapping[str, str], *, whole: bool
) -> None:
    """A group of commands; of the ``whole`` program also the options that people need first, and the exit codes."""
    console = Console()
    _usage(console, f"{path} [OPTIONS] COMMAND [ARGS]…", [summary])
    _panel(console, "Commands", dict(commands))
    if whole:
        _panel(console, "Options of most commands", {spelled(OPTIONS[name]): said(OPTIONS[name]) for name in FIRST})
        _panel(console, "Options", own)
        console.print(Text("\nExit codes: " + ", ".join(f"{code} {what}" for code, what in EXIT_CODES.items())))


def _usage(console: Console, line: str, paragraphs: list[str]) -> None:
    console.print(Text.assemble(("Usage: ", "bold"), line))
    for paragraph in filter(None, paragraphs):
        console.print()
        for part in _wrapped(paragraph, console.width - _INDENT):
            console.print(Text(" " * _INDENT).append_text(part), soft_wrap=True)


def _panel(console: Console, title: str, rows: Mapping[str, str]) -> None:
    console.print(Text(f"\n{title}", style="bold"))
    for line in _lines(rows, console.width):
        console.print(line, soft_wrap=True)


def _lines(rows: Mapping[str, str], width: int) -> Iterator[Text]:
    """Each row's name, and what it says in the column beside it, or below where the name is long."""
    column = min(_COLUMN, max(map(len, rows)) + _INDENT + 2)
    for name, text in rows.items():
        told = _wrapped(text, width - column)
        head = Text(" " * _INDENT).append(name, style="cyan")
        if len(head) + 2 > column:
            yield head
        else:
            yield head.append(" " * (column - len(head))).append_text(told.pop(0))
        for rest in told:
            yield Text(" " * column).append_text(rest)


def _wrapped(text: str, width: int) -> list[Text]:
    lines = Text(text).wrap(Console(width=width), max(width, 20))
    for line in lines:
        line.rstrip()
    return list(lines)
