"""A plug-in to try the command line with, and what tests of settings have in common."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import Run as Call
from typer.testing import Result

from kd_cache.cli import commands, parser
from kd_cache.commands import GROUP, Command, Group, Plugin, Report, Run, Table
from kd_cache.errors import CorruptError
from kd_cache.options import DATA, Option, changed


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
    "plugin_fixtures:show",
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
        Command("show epochs", "plugin_fixtures:both", "Just those.", (EPOCHS, "only", "config", "as_json")),
        Command("fail", "plugin_fixtures:fail", "Fail.", ("config",)),
        Command("group one", "plugin_fixtures:both", "One.", (EPOCHS, "only", "config", "as_json")),
        Command("group all", "plugin_fixtures:both", "Both.", (EPOCHS, "only", "config", "as_json")),
    ),
    (Group("group", "Two of a kind.", ("one", "two")),),
)


SAME = Plugin((Command("dump", "plugin_fixtures:fail", "Not ours.", ()),))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The entry points of the group; the plug-in's at first."""
    found = ["plugin_fixtures:PLUGIN"]
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


@pytest.fixture
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
