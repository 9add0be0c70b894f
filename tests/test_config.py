"""Settings: command line over environment over file over default, and nothing in a file goes unheard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from conftest import Run
from typer.testing import CliRunner, Result

from kd_cache.cli import app as real_app
from kd_cache.cli import options as opt
from kd_cache.cli.config import given, resolved_settings
from kd_cache.errors import UsageError

app = typer.Typer()


@app.command("show")
def show(
    ctx: typer.Context,
    target: Annotated[
        Literal["b", "c", "s1"], typer.Option("--target", "--target-name", envvar="KD_CACHE_TARGET")
    ] = "b",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, envvar="KD_CACHE_BATCH_SIZE")] = 32,
    seconds: Annotated[float, typer.Option("--seconds")] = 5.0,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing/--no-skip-existing", envvar="KD_CACHE_SKIP_EXISTING")
    ] = True,
    cache_root: opt.CacheRootOption = Path("cache"),
    allow_outside: opt.AllowOutsideOption = [],  # noqa: B006 (typer copies it)
    only: opt.OnlyOption = [],  # noqa: B006
    as_json: opt.JsonOption = False,
    config: opt.ConfigOption = None,
) -> None:
    """Print what was resolved."""
    content = {**resolved_settings(ctx), "given": sorted(name for name in ctx.params if given(ctx, name))}
    typer.echo(json.dumps(content))


@app.command("other")
def other(seed: Annotated[int, typer.Option("--seed")] = 1, config: opt.ConfigOption = None) -> None:
    """Another command, with a setting of its own."""


Show = Callable[..., Result]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder without settings in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    for name in ("TARGET", "BATCH_SIZE", "SKIP_EXISTING", "CACHE_ROOT", "ALLOW_OUTSIDE", "ONLY", "CONFIG", "JSON"):
        monkeypatch.delenv(f"KD_CACHE_{name}", raising=False)
    return tmp_path


def invoke(*args: str) -> Result:
    result = CliRunner().invoke(app, ["show", *args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def resolved(*args: str) -> dict[str, Any]:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def refusal(*args: str) -> str:
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())


def config(text: str | bytes, name: str = "kd-cache.yaml") -> None:
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)


# -- who wins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command_line", "environment", "file", "wins", "source"),
    [
        ("1", "2", "3", 1, "commandline"),
        ("1", None, "3", 1, "commandline"),
        ("1", "2", None, 1, "commandline"),
        (None, "2", "3", 2, "environment"),
        (None, "2", None, 2, "environment"),
        (None, None, "3", 3, "default_map"),
        (None, None, None, 32, "default"),
        ("32", None, "3", 32, "commandline"),
    ],
)
def test_command_line_over_environment_over_file_over_default(
    monkeypatch: pytest.MonkeyPatch,
    command_line: str | None,
    environment: str | None,
    file: str | None,
    wins: int,
    source: str,
) -> None:
    if environment is not None:
        monkeypatch.setenv("KD_CACHE_BATCH_SIZE", environment)
    if file is not None:
        config(f"batch_size: {file}")
    found = resolved(*([] if command_line is None else ["--batch-size", command_line]))
    assert found["values"]["batch_size"] == wins
    assert found["sources"]["batch_size"] == source
    assert ("batch_size" in found["given"]) == (source != "default")


@pytest.mark.parametrize(("switch", "wins"), [("--no-skip-existing", False), ("--skip-existing", True)])
def test_a_switch_on_the_command_line_wins_over_the_file(switch: str, wins: bool) -> None:
    config(f"skip_existing: {str(not wins).lower()}")
    assert resolved(switch)["values"]["skip_existing"] is wins
    assert resolved()["values"]["skip_existing"] is not wins


def test_a_list_on_the_command_line_replaces_the_files() -> None:
    config("only: [a, b]")
    assert resolved("--only", "c")["values"]["only"] == ["c"]
    assert resolved()["values"]["only"] == ["a", "b"]


def test_what_the_file_leaves_out_keeps_its_default() -> None:
    config("target: c")
    found = resolved()
    assert (found["values"]["target"], found["values"]["cache_root"]) == ("c", "cache")
    assert found["given"] == ["config", "target"] or found["given"] == ["target"]


# -- which file --------------------------------------------------------------------------------------------------------


def test_kd_cache_yaml_in_the_working_folder_is_picked_up() -> None:
    assert resolved()["values"]["target"] == "b"
    config("target: c")
    found = resolved()
    assert found["values"]["target"] == "c"
    assert found["values"]["config"] == "kd-cache.yaml"


def test_a_named_file_is_taken_instead_of_the_one_in_the_folder() -> None:
    config("target: c\nbatch_size: 7")
    config("target: s1", "mine.yaml")
    found = resolved("--config", "mine.yaml")["values"]
    assert (found["target"], found["batch_size"], found["config"]) == ("s1", 32, "mine.yaml")


def test_the_environment_may_name_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    config("target: s1", "mine.yaml")
    monkeypatch.setenv("KD_CACHE_CONFIG", "mine.yaml")
    assert resolved()["values"]["target"] == "s1"


def test_the_position_of_config_on_the_command_line_does_not_matter() -> None:
    config("batch_size: 7\ntarget: c", "mine.yaml")
    for args in (["--config", "mine.yaml", "--target", "s1"], ["--target", "s1", "--config", "mine.yaml"]):
        found = resolved(*args)["values"]
        assert (found["target"], found["batch_size"]) == ("s1", 7)


@pytest.mark.parametrize("text", ["", "\n", "# only a remark\n", "---\n", "null", "\ufeff"])
def test_an_empty_file_sets_nothing(text: str) -> None:
    config(text)
    assert resolved()["values"]["target"] == "b"


def test_a_null_in_the_file_sets_nothing() -> None:
    config("target:\nonly: ~")
    found = resolved()
    assert (found["values"]["target"], found["values"]["only"]) == ("b", [])
    assert "target" not in found["given"]


def test_a_byte_order_mark_is_no_part_of_the_first_name() -> None:
    config("\ufefftarget: c")
    assert resolved()["values"]["target"] == "c"


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch_size", "batch-size"])
def test_hyphens_and_underscores_mean_the_same(name: str) -> None:
    config(f"{name}: 7")
    assert resolved()["values"]["batch_size"] == 7


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("json", "as_json"), ("as_json", "as_json"), ("target_name", "target"), ("target", "target")],
)
def test_a_setting_may_have_every_name_that_its_option_has(name: str, parameter: str) -> None:
    config(f"{name}: {'true' if parameter == 'as_json' else 'c'}")
    assert resolved()["values"][parameter] in (True, "c")


@pytest.mark.parametrize("text", ["seed: 3", "seed: 3\ntarget: c"])
def test_settings_of_another_command_are_known_and_left_to_it(text: str) -> None:
    config(text)
    assert "seed" not in resolved()["values"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("targt: c", "unknown setting targt; is it target?"),
        ("batchsize: 3", "is it batch_size?"),
        ("no_skip_existing: true", "is it skip_existing?"),
        ("xyzzy: 3", "unknown setting xyzzy"),
        ("config: other.yaml", "unknown setting config"),
        ("help: true", "unknown setting help"),
        ("Target: c", "unknown setting Target; is it target?"),
        ("--target: c", "unknown setting __target; is it target?"),
        ("xyzzy:", "unknown setting xyzzy"),
        ('"a\\e[2Jb": 3', r"unknown setting a\x1b[2Jb"),
    ],
)
def test_an_unknown_setting_is_an_error_with_a_suggestion(text: str, said: str) -> None:
    config(text)
    message = refusal()
    assert said in message
    assert "kd-cache.yaml" in message


def test_a_far_name_gets_no_suggestion() -> None:
    config("xyzzy: 3")
    assert "is it" not in refusal()


@pytest.mark.parametrize("text", ["target: b\ntarget: c", "batch-size: 1\nbatch_size: 2", "target: b\ntarget_name: c"])
def test_a_setting_given_twice_is_an_error(text: str) -> None:
    config(text)
    assert "set more than once" in refusal()


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("only: [a, b]", {"only": ["a", "b"]}),
        ("only:\n  - a\n  - b", {"only": ["a", "b"]}),
        ("only: a", {"only": ["a"]}),
        ("only: []", {"only": []}),
        ("only: [1, 2.5]", {"only": ["1", "2.5"]}),
        ("allow_outside: [/x, y]", {"allow_outside": ["/x", "y"]}),
        ("cache_root: 2024", {"cache_root": "2024"}),
        ("cache_root: 'a b/é'", {"cache_root": "a b/é"}),
        ("batch_size: '7'", {"batch_size": 7}),
        ("seconds: 2", {"seconds": 2.0}),
        ("seconds: 1e-3", {"seconds": 0.001}),
        ("skip_existing: no", {"skip_existing": False}),
        ("x: &a [p]\nonly: *a", None),
        ("only: &a [p, q]", {"only": ["p", "q"]}),
    ],
)
def test_values_and_lists_are_taken_as_the_command_line_would_take_them(
    text: str, values: dict[str, Any] | None
) -> None:
    config(text)
    if values is None:
        assert "unknown setting x" in refusal()
        return
    found = resolved()["values"]
    assert {name: found[name] for name in values} == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("target: {b: 1}", "target must be a value or a list, not a section"),
        ("dump:\n  target: b", "unknown setting dump"),
        ("only: {a: 1}", "only must be a value or a list, not a section"),
        ("only: [{a: 1}]", "only must be a text or a number"),
        ("only: [[a]]", "only must be a text or a number"),
        ("only: [a, null]", "only must be a text or a number"),
        ("only: [true]", "only must be a text or a number"),
        ("target: [b]", "target must be one value, not a list"),
        ("skip_existing: [true]", "skip_existing must be one value, not a list"),
        ("skip_existing: 1", "skip_existing must be true or false (without quotes), found 1"),
        ("skip_existing: 'false'", "skip_existing must be true or false (without quotes), found false"),
        ("batch_size: true", "batch_size must be a text or a number"),
        ("batch_size: 2.5", "Invalid value for '--batch-size'"),
        ("batch_size: many", "Invalid value for '--batch-size'"),
        ("batch_size: 0", "Invalid value for '--batch-size'"),
        ("target: no", "target must be a text or a number; put it in quotes"),
        ("target: s4", "'s4' is not one of"),
        ("cache_root: 2024-01-01", "cache_root must be a text or a number; put it in quotes"),
        ('cache_root: "a\\0b"', "Invalid value for '--cache-root'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error(text: str, said: str) -> None:
    config(text)
    assert said in refusal()


def test_a_flood_of_references_is_refused_at_once() -> None:
    levels = "\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 30))
    config(f"x0: &x0 [a]\n{levels}\nonly: *x29")
    assert "unknown setting x0" in refusal()
    config("only: &a [&b [&c [d, d], *c], *b, *b]")
    assert "only must be a text or a number" in refusal()


# -- files that are no settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("target: [b", "is not YAML"),
        ("target: b: c", "is not YAML"),
        ("\ttarget: b", "is not YAML"),
        ("target: 'b", "is not YAML"),
        (b"target: \xff", "is not YAML"),
        (b"\x00\x01\x02", "is not YAML"),
        ("target: \x1b[2J", "is not YAML"),
        ("*nothing", "is not YAML"),
        ("a: b\n---\na: b", "is not YAML"),
        ("[" * 3000, "is not YAML"),
        ("a: " * 3000, "is not YAML"),
        ("target", "expected settings such as 'target: b'"),
        ("- target: b", "expected settings such as 'target: b'"),
        ("3", "expected settings such as 'target: b'"),
        ("1: b", "expected settings such as 'target: b'"),
        ("[a]: b", "is not YAML"),
        ("{}: b", "is not YAML"),
    ],
)
def test_what_is_no_file_of_settings_is_an_error_that_names_it(text: str | bytes, said: str) -> None:
    config(text)
    message = refusal()
    assert said in message
    assert "kd-cache.yaml" in message
    assert "\x1b" not in message


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
def test_tags_of_python_objects_are_never_constructed(value: str) -> None:
    for text in (f"target: {value}", f"only: [{value}]", f"? {value}\n: b", value):
        config(text)
        assert "is not YAML" in refusal()
        assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["none.yaml", ".", "n" * 300, "kd-cache.yaml/x"])
def test_a_named_file_that_cannot_be_read_is_an_error(name: str) -> None:
    assert "cannot read" in refusal("--config", name)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_resolved_settings_have_values_sources_and_a_hash_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE_CACHE_ROOT", "caches")
    config("only: [a]")
    found = resolved("--target", "c", "--seconds", "inf")
    assert found["values"] == {
        "allow_outside": [],
        "as_json": False,
        "batch_size": 32,
        "cache_root": "caches",
        "config": "kd-cache.yaml",
        "only": ["a"],
        "seconds": "inf",
        "skip_existing": True,
        "target": "c",
    }
    expected = {
        "allow_outside": "default",
        "as_json": "default",
        "batch_size": "default",
        "cache_root": "environment",
        "only": "default_map",
        "seconds": "commandline",
        "skip_existing": "default",
        "target": "commandline",
    }
    assert {name: source for name, source in found["sources"].items() if name != "config"} == expected
    text = json.dumps(found["values"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert found["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_path_that_no_json_can_keep_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["show", "--cache-root", "caf\udce9"])
    assert isinstance(result.exception, UsageError)
    assert r"cache_root is caf\udce9, which is not UTF-8" in result.exception.message


def test_equal_values_have_equal_hashes_wherever_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {resolved("--batch-size", "7")["sha256"]}
    monkeypatch.setenv("KD_CACHE_BATCH_SIZE", "7")
    hashes.add(resolved()["sha256"])
    assert len(hashes) == 1
    assert resolved("--batch-size", "8")["sha256"] not in hashes


# -- the real commands -------------------------------------------------------------------------------------------------


def test_kd_cache_reads_its_cache_root_in_the_same_order(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*args: str) -> str:
        result = run("verify", *args)
        assert result.exit_code == 3, result.output
        return str(result.stderr)

    assert "under cache" in searched()
    config("cache_root: from-file")
    assert "under from-file" in searched()
    monkeypatch.setenv("KD_CACHE_CACHE_ROOT", "from-environment")
    assert "under from-environment" in searched()
    assert "under from-command-line" in searched("--cache-root", "from-command-line")
    assert "under with_underscores" in searched("--cache_root", "with_underscores")


@pytest.mark.parametrize("command", ["dump", "verify"])
def test_kd_cache_refuses_an_unknown_setting_and_a_wrong_value(run: Run, command: str) -> None:
    config("traget: b")
    result = run(command)
    assert result.exit_code == 2
    assert "is it target?" in " ".join(result.stderr.replace("│", " ").split())
    config("target: s4")
    result = run(command)
    assert result.exit_code == 2
    assert "s4" in result.stderr


def test_kd_cache_takes_what_it_requires_from_the_environment_or_the_file(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--target" in run("dump", "--json-path", "none.json").stderr
    config("target: b\njson_path: from-file.json")
    result = run("dump")
    assert result.exit_code == 2
    assert "from-file.json" in result.stderr
    monkeypatch.setenv("KD_CACHE_TARGET", "c")
    monkeypatch.setenv("KD_CACHE_JSON_PATH", "from-environment.json")
    assert "from-environment.json" in run("dump").stderr


def test_one_file_may_hold_the_settings_of_all_commands(run: Run) -> None:
    config("recompute: false\nshard_size: 3\nnum_verify: 2\nall: false\ncache_root: here")
    result = run("verify")
    assert result.exit_code == 3, result.output
    assert "under here" in result.stderr


@pytest.mark.parametrize(("command", "stop"), [("dump", "--batch-size"), ("verify", "--n")])
def test_every_option_can_be_set_by_its_own_name_in_a_file(run: Run, command: str, stop: str) -> None:
    def said(text: str) -> str:
        config(text)
        return str(run(command, stop, "0").stderr)  # 0 is refused right after the file was read

    assert "unknown setting xyzzy" in said("xyzzy:")
    for parameter in typer.main.get_command(real_app).commands[command].params:  # type: ignore[attr-defined]
        for option in parameter.opts:
            if option.startswith("--") and option not in ("--config", "--help"):
                assert f"Invalid value for '{stop}" in said(f"{option[2:]}:"), option


def test_a_variable_in_the_environment_sets_the_option_it_is_named_for() -> None:
    commands = typer.main.get_command(real_app).commands  # type: ignore[attr-defined]
    for parameter in commands["dump"].params:
        long = next((option for option in parameter.opts if option.startswith("--")), None)
        if parameter.name != "config" and long not in ("--help", None):
            assert parameter.envvar == "KD_CACHE_" + long[2:].replace("-", "_").upper()
