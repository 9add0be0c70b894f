"""From the tables to typer: a command's parameters, made when that command is asked for."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from kd_cache.cli.commands import all_commands, beside
from kd_cache.cli.console import print_json_error
from kd_cache.cli.help import print_command_help, print_group_help
from kd_cache.cli.running import run_command
from kd_cache.cli.settings_file import check_environment, read_file
from kd_cache.commands import Command, Group
from kd_cache.errors import UsageError, shown
from kd_cache.options import PREFIX, Option

PROGRAM = "kd-cache"
_UnreadableError: Any = typer.BadParameter.__base__  # which typer itself does not export
SETTINGS = {
    # Those who come from the older script write --cache_root; it means --cache-root.
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}


def parameter(option: Option) -> inspect.Parameter:
    """The option as typer is told of it."""
    shared: dict[str, Any] = {"help": option.help, "metavar": option.metavar or None}
    shared |= {"min": option.low, "max": option.high, "show_envvar": False}
    if len({choice.casefold() for choice in option.choices}) == len(option.choices):
        shared["case_sensitive"] = False  # where no two are alike, "B" can only mean "b"
    if option.parse is not None:
        shared["parser"] = _parser(option.parse)
    if option.name == "config":
        shared |= {"callback": read_file, "is_eager": True}
    if option.positional:
        told: Any = typer.Argument(**shared)
    else:
        decls = [f"{option.flags[0]}/{option.flags[1]}", *option.flags[2:]] if option.off else option.flags
        told = typer.Option(*decls, envvar=option.envvar, **shared)
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[Any if option.parse else option.kind, told],
        default=inspect.Parameter.empty if option.default is ... else option.default,
    )


def _parser(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            raise typer.BadParameter(error.message) from error

    return read


def _refuse_odd(parameter: Any, ctx: Any, value: Any) -> None:
    """No option has a use for an empty text or for a number that is none, wherever they come from."""
    if value == parameter.default:
        return
    for each in value if isinstance(value, list | tuple) else [value]:
        if each == "":
            raise typer.BadParameter("it is empty", ctx, parameter)
        if isinstance(each, float) and not math.isfinite(each):
            raise typer.BadParameter(f"{each} is not a finite number", ctx, parameter)


class TableArgument(TyperArgument):
    """An argument that takes no empty text."""

    def process_value(self, ctx: Any, value: Any) -> Any:
        _refuse_odd(self, ctx, value)
        return super().process_value(ctx, value)


class TableOption(TyperOption):
    """An option that refuses to be given twice where it takes one value: the first would be lost without a word."""

    def process_value(self, ctx: Any, value: Any) -> Any:
        _refuse_odd(self, ctx, value)
        found = super().process_value(ctx, value)
        _refuse_odd(self, ctx, found)
        return found

    def add_to_parser(self, parser: Any, ctx: Any) -> None:
        takes_many, self.multiple = self.multiple, True  # so that the parser hands over every value
        super().add_to_parser(parser, ctx)
        self.multiple = takes_many

    def handle_parse_result(self, ctx: Any, opts: Mapping[str, Any], args: list[str]) -> Any:
        if not self.multiple and (values := opts.get(self.name or "")) is not None:
            if len(values) > 1 and not (self.is_flag and len(set(values)) == 1):
                yes_no = {True: self.opts[0], False: (*self.secondary_opts, "")[0]}
                each = [str(yes_no[value] if self.is_flag else shown(value)) for value in values]
                raise typer.BadParameter(f"{self.opts[0]} takes one value and is given {' and '.join(each)}", ctx)
            opts = {**opts, self.name or "": values[0]}
        return super().handle_parse_result(ctx, opts, args)


class TableCommand(TyperCommand):
    """A command that its line of the table describes."""

    entry: Command

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing and not {"-h", "--help"}.intersection(args):
            check_environment()
        return super().parse_args(ctx, _spelled_out(self.entry, args))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        print_command_help(self.entry, beside(self.entry))


def _spelled_out(entry: Command, args: list[str]) -> list[str]:
    """``--use-fp16`` as ``--dtype fp16``; so is ``KD_CACHE_USE_FP16=1``, where ``KD_CACHE_DTYPE`` says nothing."""
    switches = {flag: (each.flags[0], value) for each in entry.options for flag, value in each.stands_for}
    words = [word for arg in args for word in switches.get(arg.replace("_", "-"), (arg,))]
    for each in entry.options:
        for name, value in each.switches:
            said = os.environ.get(PREFIX + name.upper(), "").lower()
            is_given = any(word.partition("=")[0].replace("_", "-") in each.flags for word in words)
            if not is_given and each.envvar not in os.environ and said in ("1", "true", "t", "yes", "y", "on"):
                words = [each.flags[0], value, *words]
    return words


@functools.cache
def built(name: str) -> Any:
    """The command of that name, made once."""
    entry = all_commands()[0][name]

    def callback(ctx: typer.Context, **values: Any) -> None:
        run_command(entry, ctx, values, as_json=values.get("as_json", False), debug=values.get("debug", False))

    given = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    callback.__signature__ = inspect.Signature([*given, *map(parameter, entry.options)])  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name.rpartition(" ")[2], cls=TableCommand, help=entry.help, context_settings=SETTINGS)(callback)
    made = typer.main.get_command(app)
    made.entry = entry  # type: ignore[attr-defined]
    for each in made.params:
        # typer has no way to ask for them
        each.__class__ = TableArgument if isinstance(each, TyperArgument) else TableOption
    return made


class _Lazy(Mapping[str, Any]):
    """Commands by the word after ``prefix``; each is made when it is looked up."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __getitem__(self, word: str) -> Any:
        commands, groups = all_commands()
        name = self.prefix + word
        return _group(groups[name]) if name in groups else built(commands[name].name)

    def __iter__(self) -> Iterator[str]:
        commands, groups = all_commands()
        words = [name.removeprefix(self.prefix) for name in commands if name.startswith(self.prefix)]
        firsts = {word: word.partition(" ")[0] for word in words}
        # Two words below one that is a command itself are a command beside it.
        return iter(dict.fromkeys(first if self.prefix + first in groups else word for word, first in firsts.items()))

    def __len__(self) -> int:
        return len(list(iter(self)))


class TableGroup(TyperGroup):
    """``kd-cache``, or a group of its commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.prefix = "" if self.name == PROGRAM else f"{self.name} "
        self.commands = _Lazy(self.prefix)  # type: ignore[assignment]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            all_commands()
        except UsageError as error:
            raise typer.BadParameter(error.message) from error
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Errors of a command line that nobody could read are documents too, where ``--json`` stands in it."""
        words = [*ctx._protected_args, *ctx.args]
        try:
            return super().invoke(ctx)
        except _UnreadableError as error:
            if not self.prefix and "--json" in words:
                print_json_error(error.format_message(), None, error.exit_code, "UsageError")
            raise

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """``student compare …`` is the command of that name, ``student …`` the one it stands beside."""
        two = " ".join(args[:2])
        if " " in two and two in self.commands:
            return two, self.commands[two], args[2:]
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        own = {", ".join(each.opts): each.help or "" for each in self.get_params(ctx) if isinstance(each, TyperOption)}
        print_group_help(ctx.command_path, self.help or "", self.lines(), own, whole=ctx.parent is None)

    def lines(self) -> dict[str, str]:
        """What each of its commands is for, in one line."""
        commands, groups = all_commands()
        names = {word: self.prefix + word for word in self.commands}
        return {word: (groups[name] if name in groups else commands[name]).help for word, name in names.items()}


@functools.cache
def _group(group: Group) -> Any:
    app = typer.Typer(
        name=group.name, cls=TableGroup, help=group.help, add_completion=False, no_args_is_help=True,
        pretty_exceptions_enable=False, context_settings=SETTINGS,
    )  # fmt: skip
    app.callback()(lambda: None)
    return typer.main.get_command(app)
