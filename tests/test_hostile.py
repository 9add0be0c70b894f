"""Hostile files, each met by the real command in a fenced child: a typed error, nothing run, nothing written outside."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, World
from hostile_checkpoints import CANARY, CHECKPOINTS, EVIL, good, saved
from hostile_fence import MEMORY, Outcome, command, fenced, picture, python
from store_fixtures import forks
from typer.testing import CliRunner

from kd_cache.cli import app

pytestmark = forks

DATA = ("--json-path", "dataset.json")
OWN = (*TINY, "--only", "tiny", "--only", "other")
DUMP = ("dump", "--target", "b", *DATA)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Four samples of A and two of b, dumped with two tiny teachers."""
    made = World(tmp_path_factory.mktemp("template"))
    for number in range(4):
        made.add(number, "A", "train")
    for number in range(4, 6):
        made.add(number, "b", "train", frames=16)
    made.add(6, "A", "test")
    made.write()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.root)
        result = CliRunner().invoke(app, [*DUMP, *OWN])
    assert result.exit_code == 0, result.output
    return made


@pytest.fixture
def world(template: World, tmp_path: Path) -> World:
    """A copy of the template, for one test to spoil."""
    shutil.copytree(template.root, tmp_path / "w", symlinks=True)
    return World(tmp_path / "w", template.rows)


def refused(outcome: Outcome, code: int, kind: str | None, *words: str) -> None:
    """The child came back by itself, with this exit status, type and words, and nothing that a terminal would obey."""
    assert outcome.killed is None, outcome
    assert (outcome.code, outcome.kind) == (code, kind), outcome.said
    for word in words:
        assert word in outcome.said
    for alarm in ("Traceback", "unexpected ", "MemoryError", "\x1b", "Warning"):
        assert alarm not in outcome.said
    assert outcome.grown < MEMORY


def at_the_fence(world: World, *arguments: object) -> Outcome:
    """Run the command; whatever it does, it changes nothing but the cache."""
    before = picture(world.root, "cache")
    outcome = fenced(command(*arguments), world.root)
    assert picture(world.root, "cache") == before
    return outcome


# -- the fence itself --------------------------------------------------------------------------------------------------


def test_the_fence_lets_good_work_through(world: World) -> None:
    outcome = at_the_fence(world, *DUMP, *OWN)
    assert (outcome.killed, outcome.code, outcome.kind) == (None, 0, None), outcome.said
    assert "every permitted sample is cached and fresh" in outcome.stdout


def test_the_fence_stops_a_child_that_hangs(tmp_path: Path) -> None:
    def hang() -> dict[str, object]:
        while True:
            pass

    assert fenced(hang, tmp_path, seconds=0.2).killed == "SIGALRM"


def test_the_fence_refuses_memory(tmp_path: Path) -> None:
    assert fenced(python(lambda: len(bytes(MEMORY))), tmp_path).kind == "MemoryError"
    modest = fenced(python(lambda: len(b"x" * (MEMORY // 2))), tmp_path)
    assert modest.killed is None
    assert modest.grown >= MEMORY // 2


def test_the_fence_sees_a_crash_and_what_was_printed_on_the_way(tmp_path: Path) -> None:
    import os

    def crash() -> dict[str, object]:
        os.write(2, b"terminate called")
        os.abort()

    outcome = fenced(crash, tmp_path)
    assert (outcome.killed, outcome.stderr) == ("SIGABRT", "terminate called")


def test_the_fence_sees_what_a_payload_does(world: World) -> None:
    """Loaded as nobody should, the pickles used here do run, and leave a file that the picture shows."""
    import torch

    CHECKPOINTS["os.system in a zip"].make(world.root)
    before = picture(world.root, "cache")
    fenced(python(lambda: str(torch.load(EVIL, weights_only=False))), world.root)
    assert picture(world.root, "cache").keys() - before.keys() == {CANARY}


# -- checkpoints -------------------------------------------------------------------------------------------------------

WITH_EVIL = (*DUMP, "--scene-teacher-ckpt", EVIL, "--only", "scene")


def test_a_good_checkpoint_in_the_same_place_is_loaded(world: World) -> None:
    saved(good())(world.root)
    assert at_the_fence(world, *WITH_EVIL, "--dry-run").code == 0


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused(world: World, case: str) -> None:
    CHECKPOINTS[case].make(world.root)
    before = picture(world.root)
    refused(at_the_fence(world, *WITH_EVIL), 1, "CheckpointError", EVIL, *CHECKPOINTS[case].says)
    assert picture(world.root) == before, "a refused dump changes nothing"
