"""The documents are true: every command and snippet runs as printed, every option and public name is documented."""

from __future__ import annotations

import contextlib
import gc
import io
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import REPO
from typer.testing import CliRunner

import kd_cache
from kd_cache.cli import app
from kd_cache.cli.reference import reference

REFERENCE = (REPO / "docs/commands.md").read_text()
TRAINING = REPO / "docs/training.md"
OTHERS = [REPO / "README.md", *sorted(set((REPO / "docs").glob("*.md")) - {TRAINING})]
DOCS = "".join(path.read_text() for path in [*OTHERS, TRAINING])

ELSEWHERE = {
    "make demo": "each of its commands runs here, the students for fewer epochs",
    "make test": "this test is a part of it",
    "make faults": "minutes; .ci/run runs it",
    "make bench": "minutes",
    "make gpu": "tests/test_gpu_checks.py runs it without a GPU",
    "pip install -c constraints.txt -e .": "what this test runs in was installed so",
    "KD_CACHE_FAULTS=full pytest -m faults": "hours",
}
"""Printed commands that are not run here, and why."""


def printed(text: str) -> list[tuple[str, list[str]]]:
    """The commands in a document's blocks of console, each with the output that is printed below it."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:].partition("  #")[0].strip(), []))
            else:
                found[-1][1].append(line)
    return found


def leaves(command: Any, name: str = "") -> dict[str, Any]:
    """Every command by its whole name, those of groups included."""
    below = getattr(command, "commands", None)
    if below is None:
        return {name: command}
    return {
        whole: leaf for word, each in below.items() for whole, leaf in leaves(each, f"{name} {word}".strip()).items()
    }


LEAVES = leaves(typer.main.get_command(app))


class Root:
    """A copy of the repository as far as documents need it, in which printed things run, one after the other."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.done: set[str] = set()
        shutil.copytree(REPO / "data", path / "data")
        (path / "docs").symlink_to(REPO / "docs")
        monkeypatch.chdir(path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("KD_CACHE_MIRROR", str(path / "mirror"))
        monkeypatch.setenv("KD_CACHE_REPORT", "no")  # of all that is trained here; `kd-cache report` itself runs

    def run(self, document: Path) -> None:
        """Its commands that have not run yet, and its blocks of Python, in the order in which they are printed."""
        for language, block in re.findall(r"```(console|python)\n(.*?)```", document.read_text(), re.DOTALL):
            if language == "console":
                for command, shown in printed(f"```console\n{block}```"):
                    if command not in self.done and command not in ELSEWHERE:
                        self.done.add(command)
                        self.command(command, shown)
                continue
            if named := re.match(r"# (my_\w+\.py)\n", block):
                Path(named[1]).write_text(block)
            self.python(block)

    def command(self, command: str, shown: list[str]) -> None:
        program, *arguments = shlex.split(command)
        if program == "python":
            output = self.python(Path(arguments[0]).read_text())
        else:
            assert program == "kd-cache", f"nothing runs {command!r}: what is ELSEWHERE has a reason"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{command}\n{result.output}"
            output = result.output
        missing = set(map(lasting, shown)) - set(map(lasting, output.splitlines()))
        assert not missing, f"{command}: printed, but not among\n{output}"

    def python(self, block: str) -> str:
        """Run it as a program would be, warnings as errors (but for files that nobody closes); what it printed."""
        printed = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", ResourceWarning)
            exec(compile(block, "block", "exec"), {"__name__": "__main__"})  # noqa: S102 (our own documents)
            gc.collect()
        return printed.getvalue()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Root]:
    """With one thread: several would only wait for each other where other tests run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Root(tmp_path, monkeypatch)
    torch.set_num_threads(threads)


def lasting(line: str) -> str:
    """A line of output without what differs from run to run: times, rates, seeds."""
    line = re.sub(r"^busy: .*", "busy: …", line)
    return re.sub(r"[\d.,]+ (?:s|samples/s)\b|seed \d+|loss [\d.]+|on \d+%", "…", line).rstrip()


@pytest.mark.timeout(900)  # some forty commands, each with its own start
def test_what_the_readme_and_the_docs_print_runs(root: Root) -> None:
    root.done.update(command for command, _ in printed(TRAINING.read_text()))  # those run below
    for document in OTHERS:
        if document.name != "commands.md":
            root.run(document)
    root.run(REPO / "docs/commands.md")  # what no other document has
    learnt = root.python(Path("docs/student_loop.py").read_text())
    agreement = [int(text) for text in re.findall(r"on (\d+)%", learnt)]
    assert len(agreement) == 10
    assert agreement[-1] > max(agreement[0], 40)


@pytest.mark.timeout(900)  # it trains seven nets
def test_what_the_training_doc_prints_runs(root: Root) -> None:
    root.run(TRAINING)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len((REPO / "README.md").read_text().splitlines()) <= 200
    for document in [*OTHERS, TRAINING]:
        for link in re.findall(r"\]\(([^)#:]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_no_document_names_a_file_of_ours_that_is_not_there() -> None:
    tops = "kd_cache|teachers|benchmarks|tests|configs"
    for document in [*OTHERS, TRAINING, REPO / "data/sample/README.md"]:
        for name in re.findall(rf"`((?:{tops})/[\w./]+\.py)`", document.read_text()):
            assert (REPO / name).exists(), f"{document.name}: {name}"
        for name in re.findall(r"`(test_\w+\.py)`", document.read_text()):
            assert (REPO / "tests" / name).exists(), f"{document.name}: {name}"


def test_every_command_has_an_example() -> None:
    commands = [command for command, _ in printed(DOCS)]
    for name in LEAVES:
        assert any(command.startswith(f"kd-cache {name}") for command in commands), name


def test_commands_md_is_what_the_table_says() -> None:
    assert reference() == REFERENCE, "python -m kd_cache.cli.reference > docs/commands.md"


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_every_command_and_option_has_help(name: str) -> None:
    command = LEAVES[name]
    assert command.help
    assert f"kd-cache {name}" in DOCS
    for parameter in command.params:
        assert parameter.help, parameter.name
    assert CliRunner().invoke(app, [*name.split(), "--help"]).exit_code == 0


def test_exported_names_are_the_public_names_and_exist() -> None:
    assert sorted(kd_cache.__all__) == kd_cache.__all__
    assert set(kd_cache.__all__) == set(kd_cache._MODULE_OF)
    for name in kd_cache.__all__:
        assert getattr(kd_cache, name).__name__ in (name, f"kd_cache.{name}")
    with pytest.raises(AttributeError, match="nothing_like_this"):
        kd_cache.nothing_like_this  # noqa: B018
    assert dir(kd_cache) == kd_cache.__all__


def test_the_version_is_the_packages() -> None:
    assert f'version = "{kd_cache.__version__}"' in (REPO / "pyproject.toml").read_text()
    assert kd_cache.__version__ in (REPO / "CHANGELOG.md").read_text()
    assert kd_cache.__version__ in CliRunner().invoke(app, ["--version"]).stdout
