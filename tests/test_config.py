"""Settings: command line over environment over file over default, for every option; nothing goes unheard."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import Run as Call
from typer.testing import Result

from kd_cache.cli import commands, parser, settings_file
from kd_cache.cli.help import said, spelled
from kd_cache.cli.legacy import legacy_options
from kd_cache.commands import EXIT_CODES, GROUP, Command, Group, Plugin, Report, Run, Table
from kd_cache.errors import CorruptError, UsageError
from kd_cache.options import DATA, ENVIRONMENT, FIRST, OPTIONS, Option, changed

# -- a plug-in to try it all with --------------------------------------------------------------------------------------


def show(run: Run, target: str, batch_size: int) -> Report:
    """Tell what was resolved."""
    assert (target, batch_size) == (run.values["target"], run.values["batch_size"])
    content = {**run.record(), "given": sorted(filter(run.given, run.values))}
    return Report(content, [Table("Target", ["It", "is"], [["target", target]]), "a line"], 3 if target == "s1" else 0)


def fail() -> Report:
    raise CorruptError("it is broken", hint="Mend it.")


def both(run: Run) -> Report:
    """Each section's values, and without what the command line says of others."""
    parts = {name: run.section(name).values["epochs"] for name in ("one", "two")}
    assert run.section("two").values["only"] == run.values["only"]
    return Report({"own": run.values["epochs"], **parts, "shared": run.section("one", ()).values["epochs"]})


EPOCHS = Option("epochs", int, "How long.", DATA, 7, low=1)
SHOW = Command(
    "show",
    "test_config:show",
    "Print what was resolved.",
    (
        changed("target", kind=Literal["b", "c", "s1"], default="b"),
        Option("batch_size", int, "Samples at once.", DATA, 32, low=1),
        Option("seconds", float, "How long.", DATA, 5.0),
        Option("stage", list[str], "In order.", DATA, [], keyed=True),
        changed("dtype", stands_for=(("--use-fp16", "fp16"),)),
        *("skip_existing", "cache_root", "allow_outside", "only", "as_json", "config"),
    ),
)
PLUGIN = Plugin(
    (
        SHOW,
        Command("fail", "test_config:fail", "Fail.", ("config",)),
        Command("group one", "test_config:both", "One.", (EPOCHS, "only", "config", "as_json")),
        Command("group all", "test_config:both", "Both.", (EPOCHS, "only", "config", "as_json")),
    ),
    (Group("group", "Two of a kind.", ("one", "two")),),
)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The entry points of the group; the plug-in's at first."""
    found = ["test_config:PLUGIN"]
    genuine = importlib.metadata.entry_points

    def points(**which: Any) -> Any:
        if which != {"group": GROUP}:
            return genuine(**which)
        return [importlib.metadata.EntryPoint("mine", value, GROUP) for value in found]

    def forget() -> None:
        for cached in (commands.all_commands, parser.built, parser._group):
            cached.cache_clear()

    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    forget()
    yield found
    forget()


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder without settings in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for option in commands.all_options() for name in option.variables]:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


class Shown:
    """``kd-cache show``, as it resolves or refuses what is set."""

    def __init__(self, run: Call) -> None:
        self.run = run

    def __call__(self, *args: str) -> dict[str, Any]:
        result = self.run("show", "--json", *args)
        assert result.exit_code == (3 if "s1" in result.stdout else 0), result.output
        return json.loads(result.stdout)  # type: ignore[no-any-return]

    def refusal(self, *args: str) -> str:
        result = self.run("show", *args)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        return said_in(result)


def said_in(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture
def shown(run: Call, plugin: list[str]) -> Shown:
    return Shown(run)


def config(text: str | bytes, name: str = "kd-cache.yaml") -> None:
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)


# -- every option of every command -------------------------------------------------------------------------------------

TABLE = commands.COMMANDS
EVERY = [(command, option) for command in TABLE for option in command.options if not option.positional]


def two_values(option: Option) -> tuple[str, str]:
    """Texts of two values that are not the default."""
    if option.is_switch:
        return str(not option.default).lower(), str(bool(option.default)).lower()
    if option.choices:
        return tuple(choice for choice in option.choices if choice != option.default)[:2]  # type: ignore[return-value]
    number = any(kind in (int, float) for kind in (option.bare, *typing.get_args(option.bare)))
    return ("17", "18") if number else ("one", "two")


def resolve(command: Command, *args: str) -> Any:
    """What typer makes of it."""
    words = [word for option in command.options if option.positional for word in ["x"]]
    words += [] if command.name != "export" else ["--to", "npy"]
    words += ["--target", "c"] if "target" in {option.name for option in command.options} else []
    return parser.built(command.name).make_context(command.name, [*words, *args])


def on_command_line(option: Option, flag: str, text: str) -> list[str]:
    if not option.is_switch:
        return [flag, text]
    return [flag] if text == "true" else [option.flags[1]] if option.off else []


@pytest.mark.parametrize("command", TABLE, ids=lambda command: command.name)
def test_command_line_over_environment_over_file_over_default(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_file = "config" in {option.name for option in command.options}
    for option in command.options:
        if option.positional or option.name in ("config", "target", "to") or len(set(two_values(option))) < 2:
            continue
        first, second = two_values(option)
        name = option.name

        def found(*args: str, name: str = name) -> tuple[Any, str]:
            ctx = resolve(command, *args)
            return ctx.params[name], ctx.get_parameter_source(name).name

        assert found() == (option.default if not option.is_list else tuple(option.default), "DEFAULT") or option.is_list
        from_line = {flag: found(*on_command_line(option, flag, first)) for flag in option.flags if flag[:5] != "--no-"}
        values = {repr(value) for value, _ in from_line.values()}
        assert len(values) == 1, f"{name}: every spelling means the same"
        if has_file:
            for key in option.spellings:
                if key == name or key not in OPTIONS:
                    config(f"{key.replace('_', '-')}: {first}" if option.is_switch else f"{key}: '{first}'")
                    assert (repr(found()[0]), found()[1]) == (values.copy().pop(), "DEFAULT_MAP"), key
        monkeypatch.setenv(option.envvar, second)
        from_environment, source = found()
        assert source == "ENVIRONMENT"
        assert repr(from_environment) not in values
        if args := on_command_line(option, option.flags[0], first):
            assert repr(found(*args)[0]) in values
        monkeypatch.delenv(option.envvar)
        Path("kd-cache.yaml").unlink(missing_ok=True)


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
    assert list(inspect.signature(function).parameters) == list(dict.fromkeys(inspect.signature(function).parameters))
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
            assert kind == known[name].kind, name
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
        assert all(f"\n  {command.name} " in printed for command in TABLE)


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


@pytest.mark.parametrize(
    ("value", "says"), [("test_config:SAME", "second command dump"), ("nothing_like_this:X", "cannot be loaded")]
)
def test_a_plug_in_that_cannot_be_is_named(run: Call, plugin: list[str], value: str, says: str) -> None:
    plugin[:] = [value]
    result = run("info")
    assert result.exit_code == 2
    assert says in said_in(result)


SAME = Plugin((Command("dump", "test_config:fail", "Not ours.", ()),))


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
    for option in (*commands.all_options(), *legacy_options()):
        for name in option.variables:
            monkeypatch.setenv(name, "x")
    settings_file.check_environment()


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_list_on_the_command_line_replaces_the_files(shown: Shown) -> None:
    config("only: [a, b]")
    assert shown("--only", "c")["values"]["only"] == ["c"]
    assert shown()["values"]["only"] == ["a", "b"]


def test_which_file_is_read(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown()["values"]["config"] is None
    config("target: c\nbatch_size: 7")
    found = shown()
    assert (found["values"]["target"], found["values"]["config"]) == ("c", "kd-cache.yaml")
    assert {"target", "batch_size"} <= set(found["given"])
    assert "cache_root" not in found["given"]
    config("target: s1", "mine.yaml")
    for args in (("--config", "mine.yaml"), ("--seconds", "1", "--config", "mine.yaml")):
        values = shown(*args)["values"]
        assert (values["target"], values["batch_size"], values["config"]) == ("s1", 32, "mine.yaml")
    monkeypatch.setenv("KD_CACHE_CONFIG", "mine.yaml")
    assert shown()["values"]["target"] == "s1"
    for name in ("none.yaml", ".", "n" * 300, "kd-cache.yaml/x"):
        assert "cannot read" in shown.refusal("--config", name)


@pytest.mark.parametrize(
    "text", ["", "\n", "# only a remark\n", "---\n", "null", "\ufeff", "target:\nonly: ~", "seed: 3\nto: tsv\narch: x"]
)
def test_what_sets_nothing_of_this_command(shown: Shown, text: str) -> None:
    config(text)
    values = shown()["values"]
    assert (values["target"], values["only"]) == ("b", [])
    assert "seed" not in values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("only:\n  - a\n  - b", {"only": ["a", "b"]}),
        ("only: a", {"only": ["a"]}),
        ("only: []", {"only": []}),
        ("only: [1, 2.5]", {"only": ["1", "2.5"]}),
        ("only: &a [p, q]", {"only": ["p", "q"]}),
        ("allow_outside: [/x, y]", {"allow_outside": ["/x", "y"]}),
        ("cache_root: 2024", {"cache_root": "2024"}),
        ("cache_root: 'a b/é'", {"cache_root": "a b/é"}),
        ("seconds: 2", {"seconds": 2.0}),
        ("seconds: 1e-3", {"seconds": 0.001}),
        ("skip_existing: no", {"skip_existing": False}),
        ("stage: [{level: 2, lr: 1e-4}, level=0]", {"stage": ["level=2,lr=1e-4", "level=0"]}),
        ("stage: {level: 2}", {"stage": ["level=2"]}),
        ("\ufefftarget_name: c", {"target": "c"}),
        ("json: true\nuse_fp16: true", {"as_json": True, "dtype": "fp16"}),
        ("use_fp16: false", {"dtype": "fp32"}),
    ],
)
def test_values_are_taken_as_the_command_line_would_take_them(shown: Shown, text: str, values: dict[str, Any]) -> None:
    config(text)
    found = shown()["values"]
    assert {name: found[name] for name in values} == values


def test_use_fp16_is_another_spelling_of_dtype_fp16(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    def dtype(*args: str) -> str:
        return str(shown(*args)["values"]["dtype"])

    assert dtype("--use-fp16") == dtype("--use_fp16") == dtype("--dtype", "fp32", "--use-fp16") == "fp16"
    assert dtype("--use-fp16", "--dtype", "fp32") == "fp32"
    config("use_fp16: true")
    assert (dtype(), dtype("--dtype", "fp32")) == ("fp16", "fp32")
    config("dtype: fp32")
    monkeypatch.setenv("KD_CACHE_USE_FP16", "1")
    assert (dtype(), dtype("--dtype", "fp32")) == ("fp16", "fp32")
    monkeypatch.setenv("KD_CACHE_DTYPE", "fp32")
    assert dtype() == "fp32"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # Names
        ("targt: c", "unknown setting targt; is it target?"),
        ("batchsize: 3", "is it batch_size?"),
        ("no_skip_existing: true", "is it skip_existing?"),
        ("xyzzy:", "unknown setting xyzzy"),
        ("config: other.yaml", "unknown setting config"),
        ("help: true", "unknown setting help"),
        ("Target: c", "unknown setting Target; is it target?"),
        ("--target: c", "unknown setting __target; is it target?"),
        ('"a\\e[2Jb": 3', r"unknown setting a\x1b[2Jb"),
        ("x: &a [p]\nonly: *a", "unknown setting x"),
        ("target: b\ntarget: c", "set more than once"),
        ("batch-size: 1\nbatch_size: 2", "set more than once"),
        ("target: b\ntarget_name: c", "set more than once"),
        ("dtype: fp32\nuse_fp16: true", "set more than once"),
        # Values
        ("target: {b: 1}", "target must be a value or a list, not a section"),
        ("dump:\n  target: b", "unknown setting dump"),
        ("only: {a: 1}", "only must be a value or a list, not a section"),
        ("only: [{a: 1}]", "only must be a text or a number"),
        ("only: [[a]]", "only must be a text or a number"),
        ("only: [a, null]", "only must be a text or a number"),
        ("only: [true]", "only must be a text or a number"),
        ("only: &a [&b [&c [d, d], *c], *b, *b]", "only must be a text or a number"),
        ("target: [b]", "target must be one value, not a list"),
        ("skip_existing: [true]", "skip_existing must be one value, not a list"),
        ("skip_existing: 1", "skip_existing must be true or false (without quotes), found 1"),
        ("use_fp16: 'false'", "use_fp16 must be true or false (without quotes), found false"),
        ("batch_size: true", "batch_size must be a text or a number"),
        ("batch_size: 2.5", "Invalid value for '--batch-size'"),
        ("batch_size: many", "Invalid value for '--batch-size'"),
        ("batch_size: 0", "Invalid value for '--batch-size'"),
        ("target: no", "target must be a text or a number; put it in quotes"),
        ("target: s4", "'s4' is not one of"),
        ("cache_root: 2024-01-01", "cache_root must be a text or a number; put it in quotes"),
        ('cache_root: "a\\0b"', "Invalid value for '--cache-root'"),
        # No settings at all
        *[(text, "is not YAML") for text in (
            "target: [b", "target: b: c", "\ttarget: b", "target: 'b", b"target: \xff", b"\x00\x01\x02",
            "target: \x1b[2J", "*nothing", "a: b\n---\na: b", "[" * 3000, "a: " * 3000, "[a]: b", "{}: b",
        )],
        *[(text, "expected settings such as 'target: b'") for text in ("target", "- target: b", "3", "1: b")],
        ("target: b" + " " * (1 << 14), "has more than 16384 characters"),
    ],
)  # fmt: skip
def test_what_is_no_setting_is_an_error_that_names_it_and_the_file(shown: Shown, text: str | bytes, says: str) -> None:
    config(text)
    message = shown.refusal()
    assert says in message
    assert "kd-cache.yaml" in message or "Invalid value for" in message or "is not one of" in message
    assert "\x1b" not in message
    assert ("is it" in message) == ("is it" in says) or "unknown setting" not in message or says.endswith(("dump", "J"))


def test_a_flood_of_references_is_refused_at_once(shown: Shown) -> None:
    levels = "\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 30))
    config(f"x0: &x0 [a]\n{levels}\nonly: *x29")
    assert "unknown setting x0" in shown.refusal()
    config("<<: {target: c}")
    assert "merge keys (<<) are not settings" in shown.refusal()


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [ran]",
        "!!python/object/new:os.mkdir [ran]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [a]",
        "!mine x",
    ],
)
def test_tags_of_python_objects_are_never_constructed(shown: Shown, value: str) -> None:
    for text in (f"target: {value}", f"only: [{value}]", f"? {value}\n: b", value):
        config(text)
        assert "is not YAML" in shown.refusal()
        assert not Path("ran").exists()


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_the_record_has_values_sources_and_a_hash_of_the_values(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE_CACHE_ROOT", "caches")
    config("only: [a]")
    found = shown("--target", "c", "--seconds", "inf")
    assert found["values"] == {
        "allow_outside": [], "as_json": True, "batch_size": 32, "cache_root": "caches", "config": "kd-cache.yaml",
        "dtype": "fp32", "only": ["a"], "seconds": "inf", "skip_existing": True, "stage": [], "target": "c",
    }  # fmt: skip
    sources = {name: found["sources"][name] for name in ("cache_root", "only", "seconds", "skip_existing")}
    assert list(sources.values()) == ["environment", "default_map", "commandline", "default"]
    text = json.dumps(found["values"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert found["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setenv("KD_CACHE_TARGET", "c")
    assert shown("--seconds", "inf")["sha256"] == found["sha256"] != shown()["sha256"]


def test_a_path_that_no_json_can_keep_is_a_usage_error(shown: Shown) -> None:
    assert r"cache_root is caf\udce9, which is not UTF-8" in shown.refusal("--cache-root", "caf\udce9")


def test_what_is_recalled_and_what_is_never_written_down() -> None:
    unkept = {option.name for _, option in EVERY if not option.kept}
    assert unkept == {"teacher", "shard"}
    run = Run(commands.SEAL, {"num_scenes": 3, "json_path": None, "features": Path("x")}, {"features": "commandline"})
    saved = run.recall({"num_scenes": 10, "json_path": "relative"}, {"json_path": "/a", "features": "/b"})
    assert saved == {"json_path": "/a", "features": Path("x"), "num_scenes": 10}
    with pytest.raises(UsageError, match="expected a number from 1 to 65,536, or auto"):
        next(option for _, option in EVERY if option.parse).parse("0")  # type: ignore[misc]


# -- the real commands -------------------------------------------------------------------------------------------------


def test_kd_cache_reads_its_cache_root_in_the_same_order(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*args: str) -> str:
        result = run("verify", *args)
        assert result.exit_code == 3, result.output
        return str(result.stderr)

    assert "under cache" in searched()
    config("cache_root: from-file\nrecompute: false\nshard_size: 3\nall: false\ntrain: {epochs: 3}")
    assert "under from-file" in searched()
    monkeypatch.setenv("KD_CACHE_CACHE_ROOT", "from-environment")
    assert "under from-environment" in searched()
    assert "under from-command-line" in searched("--cache-root", "from-command-line")
    assert "under with_underscores" in searched("--cache_root", "with_underscores")


def test_kd_cache_takes_what_it_requires_from_the_environment_or_the_file(
    run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--target" in run("dump", "--json-path", "none.json").stderr
    config("target: b\njson_path: from-file.json")
    result = run("dump")
    assert result.exit_code == 2
    assert "from-file.json" in result.stderr
    monkeypatch.setenv("KD_CACHE_TARGET", "c")
    monkeypatch.setenv("KD_CACHE_JSON_PATH", "from-environment.json")
    assert "from-environment.json" in run("dump").stderr
