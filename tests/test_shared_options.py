"""Options that several commands have mean the same in all of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, TINY, Run, World
from store_fixtures import snapshot, two_teachers

from kd_cache.cli.commands import all_commands
from kd_cache.commands import Command
from kd_cache.options import Option

DATA = ("--target", "b", "--json-path", "dataset.json")
COMMANDS: dict[str, tuple[str, ...]] = {
    "dump": ("dump", *DATA, *TINY, "--only", "tiny", "--only", "other"),
    "verify": ("verify", *DATA, *TINY),
    "info": ("info", "cache/A2b"),
    "seal": ("seal", *DATA),
    "merge": ("merge", "whole/A2b", *DATA),
    "repair": ("repair", *DATA, *TINY),
    "diff": ("diff", "whole/A2b", "cache/A2b"),
    "gc": ("gc", "cache/A2b"),
    "push": ("push", "cache/A2b", "file://pushed"),
    "export": ("export", "cache/A2b", "--to", "tsv", "--output", "out"),
    "adopt": ("adopt", "rows.tsv", *DATA),
    "check": ("check", *DATA),
    "prepare": ("prepare", "csv", ".", "--table", "train=all.tsv", "--out", "prepared"),
}


@pytest.fixture
def world(cached: World) -> World:
    """A finished cache; a copy and rows to adopt beside it."""
    shutil.copytree(cached.cache.parent, cached.root / "whole")
    rows = "".join(f"{file}\t0.5\t-1\n" for file in cached.permitted())
    (cached.root / "all.tsv").write_text("file\tscene\tdevice\nx.wav\tbus\ta\n")
    (cached.root / "rows.tsv").write_text("file\ta\tb\n" + rows)
    return cached


@pytest.mark.parametrize("command", COMMANDS)
def test_json_prints_one_object_and_nothing_else(run: Run, world: World, command: str) -> None:
    result = run(*COMMANDS[command], "--json")
    assert result.exit_code == 0, result.output
    assert isinstance(json.loads(result.stdout), dict)


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (("gc", "nowhere"), "MissingLogitsError", 3),
        (("dump", "--target", "b", "--json-path", "nowhere.json"), "ManifestError", 2),
        (("dump", "--target", "nobody"), "UsageError", 2),
        (("dump", *DATA, "--unknown"), "UsageError", 2),
        (("unknown",), "UsageError", 2),
    ],
)
def test_an_error_is_a_document_with_json_too(run: Run, world: World, arguments: Any, kind: str, code: int) -> None:
    result = run(*arguments, "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["exit_code"], error["kind"]) == (code, code, kind)
    assert error["message"].split("\n")[0][:40] in " ".join(result.stderr.replace("│", " ").split())
    assert run(*arguments).stdout == ""


COMMAND_TABLE = [each for name, each in all_commands()[0].items() if name != "report"]  # it notes what it cannot read
PATHS = {(each.name, each.help): (command, each) for command in COMMAND_TABLE for each in command.options}
PATHS = {key: found for key, found in PATHS.items() if found[1].is_path and key[0] != "allow_outside"}
REQUIRED = {"target": "b", "to": "npy", "arch": "cp_resnet", "limits": "dcase", "shape": "43,256", "label": "scene"}
REQUIRED |= {"model": "tiny=tiny_teachers:linear", "layout": "csv", "source": "rows.pt", "folder": "."}
REQUIRED |= {"json_path": "dataset.json", "table": "train=all.tsv", "out": "out", "url": "memory://store"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("key", PATHS, ids=lambda key: f"{PATHS[key][0].name} {key[0]}")
def test_a_path_that_never_ends_ends_a_command_at_once(run: Run, tmp_path: Path, key: tuple[str, str]) -> None:
    """Every option that names a path, of a command that has it: a pipe nobody writes to, a device without an end."""
    os.mkfifo("fifo")
    (tmp_path / "all.tsv").write_text("file\tscene\tdevice\nx.wav\tbus\ta\n")
    shutil.copy(REPO / "data/sample/dataset.json", tmp_path)
    two_teachers(tmp_path / "cache/A2b")
    torch.save(torch.zeros(4, 10), "rows.pt")
    command, hostile = PATHS[key]
    for value in ("fifo", "/dev/zero"):
        arguments = [*command.name.split(), *needed(command, hostile, value)]
        result = run(*arguments)
        assert (result.exit_code in (1, 2, 3), result.stdout) == (True, ""), result.output
        assert value in result.stderr or command.name.startswith(
            ("train", "student", "report")
        )  # these say what data lack


def needed(command: Command, hostile: Option, value: str) -> Iterator[object]:
    """The arguments that a command cannot do without, and the hostile one."""
    named = {"json_path", "target"} - ({"target"} if command.name == "sample-data" else set())
    for each in command.options:
        if each.name == hostile.name:
            given: object = value
        elif each.name == "only" and hostile.name.endswith("_teacher_ckpt"):
            given = hostile.name.removesuffix("_teacher_ckpt")
        elif (each.name, hostile.name) == ("views", "policy"):
            given = 2
        elif each.default is ... or each.name in named or (command.name, each.name) == ("prepare", "table"):
            given = REQUIRED.get(each.name, "cache/A2b")
        else:
            continue
        yield from [given] if each.positional else [each.flags[0], given]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "info"])
def test_quiet_prints_nothing_where_nothing_is_wrong(run: Run, world: World, command: str) -> None:
    result = run(*COMMANDS[command], "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def flip(world: World) -> None:
    path = next((world.cache / "packs").glob("tiny-*.h5"))
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def lose_a_feature(world: World) -> None:
    world.feature(world.permitted()[0]).unlink()


def relabel(world: World) -> None:
    world.rows[0]["scene_label"] = 5
    world.write()


@pytest.mark.parametrize(
    ("command", "wrong", "more", "code", "says"),
    [
        ("verify", flip, (), 4, "corrupt: tiny"),
        ("verify", relabel, (), 5, "stale: "),
        ("repair", lose_a_feature, (), 1, "unchecked: x/"),
        ("dump", lose_a_feature, ("--on-bad-sample", "skip"), 3, "missing: x/"),
        ("dump", lose_a_feature, ("--on-bad-sample", "skip", "--dry-run"), 3, "missing: x/"),
        ("adopt", lose_a_feature, ("--on-bad-sample", "skip"), 3, "missing: x/"),
    ],
)
def test_quiet_says_why_a_command_does_not_exit_with_0(
    run: Run, world: World, command: str, wrong: Callable[[World], None], more: tuple[str, ...], code: int, says: str
) -> None:
    wrong(world)
    result = run(*COMMANDS[command], *more, "--quiet")
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert says in result.stderr


@pytest.mark.parametrize(("command", "code"), [("dump", 2), ("merge", 3), ("diff", 3), ("export", 3)])
def test_a_teacher_that_nobody_has_is_named_and_nothing_changes(
    run: Run, world: World, command: str, code: int
) -> None:
    before = snapshot(world.root)
    result = run(*COMMANDS[command], "--only", "ghost")
    assert (result.exit_code, "ghost" in result.stderr) == (code, True), result.output
    assert snapshot(world.root) == before


@pytest.mark.parametrize("command", ["verify", "repair", "gc"])
def test_where_nothing_is_named_and_no_cache_is_there_it_is_a_miss(run: Run, world: World, command: str) -> None:
    options = [part for part in COMMANDS[command][1:] if part not in (*DATA, "cache/A2b")]
    result = run(command, *options, "--cache-root", "nowhere")
    assert (result.exit_code, "there is no cache under nowhere" in result.stderr) == (3, True), result.output


@pytest.mark.parametrize("command", ["verify", "info", "repair", "gc"])
def test_without_a_target_every_cache_under_the_root_is_meant(run: Run, world: World, command: str) -> None:
    run("dump", "--target", "c", "--json-path", "dataset.json", *TINY, "--only", "tiny")
    options = [part for part in COMMANDS[command][1:] if part not in (*DATA, "cache/A2b")]
    assert '"cache/A2b"' in (said := run(command, *options, "--json").stdout)
    assert '"cache/A2c"' in said


@pytest.mark.parametrize("command", ["verify", "repair"])
def test_a_cache_is_named_by_its_path_its_index_its_folder_or_its_target(run: Run, world: World, command: str) -> None:
    options = ("--json-path", "dataset.json", *TINY)
    for named in (
        ["cache/A2b"],
        ["cache/A2b/cache_index.json"],
        ["cache"],
        ["whole", "--target", "B"],
        ["--target", "B"],
    ):
        result = run(command, *named, *options)
        assert result.exit_code == 0, result.output
        assert "cache/A2b: " in result.stdout or named[0] == "whole"
    wrong = run(command, "cache/A2b", "--target", "c", *options)
    assert (wrong.exit_code, "cache/A2b is not the cache of target c" in wrong.stderr) == (2, True)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("info", "cache/A2c"), "kd-cache dump --target c"),
        (("gc", "cache/A2s1"), "kd-cache dump --target s1"),
        (("info", "other/A2c"), "kd-cache dump --target c --cache-root other"),
        (("diff", "cache/A2b", "cache/A2c"), "kd-cache dump --target c"),
        (("gc", "cache"), "there is no cache at cache; it holds the caches A2b"),
        (("export", "cache", "--to", "npy"), "Name one of them: cache/A2b"),
    ],
)
def test_where_no_cache_is_the_command_that_makes_it_is_named(
    run: Run, world: World, args: tuple[str, ...], says: str
) -> None:
    result = run(*args)
    assert (result.exit_code, says in result.stderr) == (3, True), result.output
