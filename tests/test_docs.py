"""The documents are true: every command and snippet runs as printed, every option and public name is documented."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import REPO
from typer.testing import CliRunner

import kd_cache
from kd_cache.cli import app
from kd_cache.cli.reference import reference

REFERENCE = (REPO / "docs/commands.md").read_text()
DOCS = (REPO / "README.md").read_text() + (REPO / "docs/training.md").read_text()


def printed(text: str) -> list[str]:
    """The commands in a document's blocks of console."""
    lines = [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ kd-cache")]


COMMANDS = printed(DOCS)


def leaves(command: Any, name: str = "") -> dict[str, Any]:
    """Every command by its whole name, those of groups included."""
    below = getattr(command, "commands", None)
    if below is None:
        return {name: command}
    return {
        whole: leaf for word, each in below.items() for whole, leaf in leaves(each, f"{name} {word}".strip()).items()
    }


LEAVES = leaves(typer.main.get_command(app))
SNIPPETS = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("readme")
    shutil.copytree(REPO / "data", made / "data")
    return made


@pytest.mark.timeout(600)  # two dozen commands, each with its own start
def test_every_printed_command_and_snippet_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for snippet in SNIPPETS:
        if named := re.match(r"# (my_\w+\.py)\n", snippet):
            Path(named[1]).write_text(snippet)
    for command in COMMANDS:
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}"
    for snippet in SNIPPETS:
        script = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", snippet]
        shown = subprocess.run(script, capture_output=True, text=True, check=False, env=os.environ)
        assert shown.returncode == 0, snippet + shown.stderr


def test_every_example_of_a_commands_help_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(REPO / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for name in LEAVES:
        assert any(command.startswith(f"kd-cache {name}") for command in [*printed(REFERENCE), *COMMANDS]), name
    for command in printed(REFERENCE):
        if not command.startswith("kd-cache train"):  # minutes; docs/training.md has them
            result = CliRunner().invoke(app, shlex.split(command)[1:])
            assert result.exit_code == 0, f"{command}\n{result.output}"


def test_the_demos_student_loop_learns_from_the_cache(root: Path) -> None:
    if not (root / "cache/A2b/cache_index.json").exists():
        pytest.skip("needs the dump of the README test, which did not run")
    shown = subprocess.run(
        [sys.executable, str(REPO / "docs/student_loop.py")], cwd=root, capture_output=True, text=True, check=True
    )
    agreement = [int(text) for text in re.findall(r"on (\d+)%", shown.stdout)]
    assert len(agreement) == 10
    assert agreement[-1] > max(agreement[0], 40)


def test_commands_md_is_what_the_table_says() -> None:
    assert reference() == REFERENCE, "python -m kd_cache.cli.reference > docs/commands.md"


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_every_command_and_option_has_help(name: str) -> None:
    command = LEAVES[name]
    assert command.help
    assert f"kd-cache {name}" in DOCS + REFERENCE
    for parameter in command.params:
        assert parameter.help, parameter.name
    assert CliRunner().invoke(app, [*name.split(), "--help"]).exit_code == 0


def test_exported_names_are_the_public_names_and_exist() -> None:
    assert sorted(kd_cache.__all__) == kd_cache.__all__
    assert set(kd_cache.__all__) == set(kd_cache._MODULE_OF)
    for name in kd_cache.__all__:
        assert getattr(kd_cache, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_like_this"):
        kd_cache.nothing_like_this  # noqa: B018
    assert dir(kd_cache) == kd_cache.__all__


def test_the_version_is_the_packages() -> None:
    assert f'version = "{kd_cache.__version__}"' in (REPO / "pyproject.toml").read_text()
    assert kd_cache.__version__ in (REPO / "CHANGELOG.md").read_text()
    assert kd_cache.__version__ in CliRunner().invoke(app, ["--version"]).stdout
