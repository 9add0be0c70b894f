"""The tables and what is made of them: parameters, help, plug-ins, variables in the environment."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import typing
from pathlib import Path
from typing import Any

import pytest
from conftest import Run as Call
from conftest import World
from plugin_fixtures import config, said_in
from plugin_fixtures import nowhere as nowhere
from plugin_fixtures import plugin as plugin

from kd_cache.cli import commands, parser, settings_file
from kd_cache.cli.help import said, spelled
from kd_cache.commands import EXIT_CODES, Command
from kd_cache.options import ENVIRONMENT, FIRST, OPTIONS, Option

pytestmark = pytest.mark.usefixtures("nowhere")

TABLE = tuple(commands.all_commands()[0].values())  # those of teachers among them
NAMES = {option.name for command in TABLE for option in command.options}
EVERY = [(command, option) for command in TABLE for option in command.options if not option.positional]


def two_values(option: Option) -> tuple[str, str]:
    """Texts of two values, the first of them not the default."""
    if option.is_switch:
        return str(not option.default).lower(), str(bool(option.default)).lower()
    if option.choices:
        first, second = sorted(option.choices, key=lambda choice: choice == option.default)[:2]
        return first, second
    if option.name == "dtype":
        return "topk:7", "fp16"
    if "," in option.metavar:
        count = option.metavar.count(",")
        return "17" + ",18" * count, "18" + ",17" * count
    number = any(kind in (int, float) for kind in (option.bare, *typing.get_args(option.bare)))
    if number or option.parse:
        fractions = ("0.5", "0.25") if option.low is None or option.low < 1 else ("2", "3")
        return fractions if option.high is not None and option.high < 18 else ("17", "18")
    return "one", "two"


def resolve(command: Command, *args: str) -> Any:
    """What typer makes of it."""
    words = ["x" for option in command.options if option.positional]
    for option in command.options:
        if option.default is ... and not option.positional:
            words += [option.flags[0], *(option.choices or ["x"])[:1]]
    return parser.built(command.name).make_context(command.name, [*words, *args])


def on_command_line(option: Option, flag: str, text: str) -> list[str]:
    if not option.is_switch:
        return [flag, text]
    return [flag] if text == "true" else [option.flags[1]] if option.off else []


@pytest.mark.parametrize("command", TABLE, ids=lambda command: command.name)
def test_command_line_over_environment_over_file_over_default(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all options at once, in the first spelling of each, then in the second, …: to parse takes its time."""
    others = [each for each in command.options if each.name != "config"]
    options = [each for each in others if not each.positional and each.default is not ...]
    first, second = ({each.name: two_values(each)[turn] for each in options} for turn in (0, 1))
    flags = {each.name: [flag for flag in each.flags if flag[:5] != "--no-"] for each in options}
    keys = {
        each.name: [
            key for key in sorted({*each.spellings} - {*dict(each.switches)}) if key == each.name or key not in NAMES
        ]
        for each in options
    }

    def found(*args: str) -> tuple[dict[str, Any], dict[str, str]]:
        ctx = resolve(command, *args)
        names = [each.name for each in options]
        return {name: ctx.params[name] for name in names}, {n: ctx.get_parameter_source(n).name for n in names}

    def line(turn: int) -> list[str]:
        spelled = {name: each[min(turn, len(each) - 1)] for name, each in flags.items()}
        return [word for each in options for word in on_command_line(each, spelled[each.name], first[each.name])]

    values, sources = found()
    assert set(sources.values()) <= {"DEFAULT"}
    assert all(values[each.name] == each.default for each in options if not each.is_list)
    on_line = found(*line(0))[0]
    for turn in range(1, max(map(len, flags.values()), default=0)):
        assert repr(found(*line(turn))[0]) == repr(on_line), "every spelling means the same"
    for turn in range(max(map(len, keys.values())) if len(others) < len(command.options) else 0):
        told = {each.name: keys[each.name][min(turn, len(keys[each.name]) - 1)] for each in options}
        texts = {each.name: first[each.name] if each.is_switch else f"'{first[each.name]}'" for each in options}
        config("\n".join(f"{key.replace('_', '-')}: {texts[name]}" for name, key in told.items()))
        values, sources = found()
        assert {name: repr(value) for name, value in values.items()} == {n: repr(v) for n, v in on_line.items()}
        assert set(sources.values()) == {"DEFAULT_MAP"}
    for each in options:
        monkeypatch.setenv(each.envvar, second[each.name])
    values, sources = found()
    assert set(sources.values()) <= {"ENVIRONMENT"}
    assert not [name for name, value in values.items() if repr(value) == repr(on_line[name])]
    values, sources = found(*line(0))
    for each in options:
        if on_command_line(each, flags[each.name][0], first[each.name]):
            assert repr(values[each.name]) == repr(on_line[each.name]), each.name


@pytest.mark.parametrize("command", TABLE, ids=lambda command: command.name)
def test_an_option_of_one_value_is_refused_where_it_is_given_twice(command: Command) -> None:
    for option in command.options:
        if option.positional or option.is_list or (option.is_switch and not option.off):
            continue
        first, second = two_values(option)
        twice = [option.flags[0], option.flags[1]] if option.off else [option.flags[0], first, option.flags[-1], second]
        named = twice if option.off else [first, second]
        words = ["x" for each in command.options if each.positional]
        says = f"{option.flags[0]} takes one value and is given {' and '.join(named)}"
        for args in (twice, [twice[0].replace("-", "_").replace("__", "--"), *twice[1:]]):
            with pytest.raises(Exception, match=says):
                parser.built(command.name).make_context(command.name, [*words, *args])
    assert resolve(command, "--json", "--json").params["as_json"]


def test_a_choice_is_known_in_capitals() -> None:
    for command, option in EVERY:
        for choice in option.choices:
            if option.default is not ...:
                made = resolve(command, option.flags[0], choice.upper())
                assert made.params[option.name] == choice, f"{command.name} {option.name}"


def test_every_option_has_a_variable_and_a_key_of_its_own() -> None:
    for command, option in EVERY:
        assert option.envvar in ("KD_CACHE_" + option.name.upper(), "KD_CACHE_JSON", "KD_CACHE_ALL")
        others = [each for each in command.options if each is not option]
        for names in ("flags", "variables", "spellings"):
            taken = {name for each in others for name in getattr(each, names)}
            assert not taken & {*getattr(option, names)}, f"{command.name}: {option.name}"


def kinds_asked_for(command: Command) -> dict[str, Any]:
    """The types that the command's function, and the dataclasses beside it, say its options have."""
    function = pkgutil.resolve_name(command.target)
    asked = typing.get_type_hints(function)
    for value in vars(importlib.import_module(function.__module__)).values():
        if dataclasses.is_dataclass(value) and value.__module__ == function.__module__:
            asked |= typing.get_type_hints(value)
    return asked


@pytest.mark.parametrize("command", TABLE, ids=lambda command: command.name)
def test_a_commands_function_takes_what_the_table_gives(command: Command) -> None:
    known = {option.name: option for option in command.options}
    for name, kind in kinds_asked_for(command).items():
        if name not in ("run", "screen", "return") and known[name].parse is None:
            assert kind == known[name].kind or (kind is str and known[name].choices), name
    assert set(command.exit_codes) <= set(EXIT_CODES)


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", *(command.name for command in TABLE)])
def test_help_at_80_columns_cuts_nothing_and_begins_with_what_is_needed_first(
    run: Call, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = run(*name.split(), "--help").stdout
    lines = printed.split("\nExamples\n")[0].splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(printed.split())
    options = [OPTIONS[one] for one in FIRST] if not name else parser.built(name).entry.options
    for option in options:
        assert f" {spelled(option)} {' '.join(said(option).split())}" in f" {text} ", option.name
        for part in (*option.flags, *option.choices, option.shown_default):
            assert part in text, (option.name, part)
    if name:
        first = list(parser.built(name).entry.panels.values())[:2]
        assert all(len(panel) <= 10 for panel in first)
        required = [option for option in options if option.default is ...]
        assert all(option in [*first[0], *first[-1]] for option in required)
    else:
        assert len(FIRST) == 10
        assert all(f"\n  {command.name} " in printed for command in commands.COMMANDS)


def test_help_has_colour_on_a_terminal_only(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" not in run("dump", "--help").stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in run("dump", "--help").stdout


# -- plug-ins ----------------------------------------------------------------------------------------------------------


def test_a_plug_in_brings_commands_that_are_shown_as_ours_are(run: Call, plugin: list[str]) -> None:
    assert {"show", "fail", "group"} <= {line.split()[0] for line in run("--help").stdout.splitlines() if line}
    assert "Two of a kind." in run("group", "--help").stdout
    assert "How long. (from 1; default: 7)" in run("group", "one", "-h").stdout
    result = run("show", "--target", "s1")
    assert result.exit_code == 3
    assert result.stdout.splitlines()[0] == "Target"
    assert result.stdout.splitlines()[-1] == "a line"
    broken = run("fail")
    assert (broken.exit_code, broken.stdout) == (4, "")
    assert broken.stderr == "error: it is broken\nMend it.\n"
    assert "Did you mean 'show'" in said_in(run("shw"))


def test_a_section_of_the_file_is_of_the_command_called_like_it(run: Call, plugin: list[str]) -> None:
    def found(*args: str) -> dict[str, Any]:
        return json.loads(run("group", *args, "--json").stdout)  # type: ignore[no-any-return]

    config("epochs: 1\nonly: [a]\ngroup: {epochs: 2}\ntwo: {epochs: 4}\none: {}")
    assert found("one") == found("all") == {"own": 2, "one": 2, "two": 4, "shared": 2}
    config("one: {epochs: 3}\ntwo: {epochs: 4}")
    assert found("one") == {"own": 3, "one": 3, "two": 4, "shared": 3}
    assert found("all", "--epochs", "9") == {"own": 9, "one": 9, "two": 9, "shared": 3}
    for text, says in (("one: {epochs: 0}", "one: epochs:"), ("two: {epoch: 4}", "is it epochs?")):
        config(text)
        refused = run("group", "all")
        assert refused.exit_code == 2
        assert says in said_in(refused)


def test_a_command_may_stand_beside_the_one_that_its_first_word_is(
    run: Call, plugin: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config("epochs: 5\nbatch_size: 3")
    assert json.loads(run("show", "--json").stdout)["values"]["batch_size"] == 3
    assert json.loads(run("show", "epochs", "--json").stdout)["own"] == 5
    monkeypatch.setenv("KD_CACHE_EPOCHS", "6")
    assert json.loads(run("show", "epochs", "--json").stdout)["own"] == 6
    assert "Usage: kd-cache show epochs [OPTIONS]" in run("show", "epochs", "--help").stdout
    for asked in (("--help",), ("show", "--help")):
        assert "show epochs" in run(*asked).stdout
    assert "extra argument" in said_in(run("show", "epoch"))


@pytest.mark.parametrize(
    ("value", "says"), [("plugin_fixtures:SAME", "second command dump"), ("nothing_like_this:X", "cannot be loaded")]
)
def test_a_plug_in_that_cannot_be_is_named(run: Call, plugin: list[str], value: str, says: str) -> None:
    plugin[:] = [value]
    result = run("info")
    assert result.exit_code == 2
    assert says in said_in(result)


# -- the environment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["verify", "info", "gc"])
def test_a_variable_that_no_command_knows_is_an_error(run: Call, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    for name in (*ENVIRONMENT, "KD_CACHE_EPOCHS", "KD_CACHE_SHARD", "KD_CACHE_TO"):  # of others
        monkeypatch.setenv(name, "x")
    assert "unknown variable" not in run(command).stderr
    monkeypatch.setenv("KD_CACHE_CACH_ROOT", "x")
    result = run(command)
    assert result.exit_code == 2
    assert "unknown variable KD_CACHE_CACH_ROOT in the environment; is it KD_CACHE_CACHE_ROOT?" in said_in(result)
    assert run(command, "--help").exit_code == run("--version").exit_code == 0


def test_a_variable_of_any_command_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in commands.all_options():
        for name in option.variables:
            monkeypatch.setenv(name, "x")
    settings_file.check_environment()


# -- odd values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", TABLE, ids=lambda command: command.name)
@pytest.mark.parametrize("text", ["", "nan", "inf", "-inf"])
def test_no_option_takes_an_empty_text_or_a_number_that_is_none(command: Command, text: str) -> None:
    for option in command.options:
        takes = option.bare is float or (text == "" and not option.is_switch)
        if option.positional or not takes or option.default in (..., text):
            continue
        with pytest.raises(Exception, match=r"empty|finite|greater|less|range"):
            resolve(command, option.flags[0], text)


def test_a_settings_file_that_is_none_is_refused_and_never_waited_for(run: Call, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("pipe", "/dev/zero", "/proc/self/mem", "."):
        result = run("gc", "--config", path)
        assert (result.exit_code, f"cannot read {path}" in said_in(result)) == (2, True), result.output


@pytest.mark.parametrize(
    "command",
    [
        "evaluate ~nosuchuser/x",
        "prepare csv . --table ~nosuchuser/x --out o",
        "dump --target b --teacher x=m:f,ckpt=~nosuchuser/x --only x",
        "dump --target b --teacher x=~nosuchuser/x.py:f --only x",
    ],
)
def test_a_home_of_nobody_is_said_wherever_a_path_is_a_part_of_a_text(run: Call, world: World, command: str) -> None:
    result = run(*command.split(), *(() if command.startswith("prepare") else ("--json-path", world.json_path)))
    assert (result.exit_code, "~nosuchuser/x" in said_in(result)) == (2, True), result.output


def test_a_checkpoint_that_cannot_be_read_is_named(run: Call, world: World) -> None:
    mem = "/proc/self/mem"  # its factory does not look at it
    teacher = f"tiny=tiny_teachers:other,ckpt={mem}"
    result = run("dump", "--target", "b", "--json-path", world.json_path, "--teacher", teacher, "--only", "tiny")
    assert (result.exit_code, f"cannot read {mem}: Input/output error" in said_in(result)) == (1, True), result.output
