"""Hostile files meet the real command in a fenced child: a typed error, nothing run, nothing written outside."""

from __future__ import annotations

import faulthandler
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, World
from hostile_checkpoints import CANARY, CHECKPOINTS, EVIL, good, saved
from hostile_data import FEATURES, GOOD, MANIFESTS, NFC, NFD, PATHS
from hostile_fence import MEMORY, Outcome, all_fenced, command, fenced, picture, python
from store_fixtures import forks
from typer.testing import CliRunner

from kd_cache.cli import app

pytestmark = forks

DATA = ("--json-path", "dataset.json", "--data-root", ".")
OWN = (*TINY, "--only", "tiny", "--only", "other")
DUMP = ("dump", "--target", "b", *DATA)
VERIFY = ("verify", "--all", *DATA, *TINY)


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
        for arguments in ([*DUMP, *OWN], VERIFY, ["info"]):  # so that all modules are imported before the forks
            result = CliRunner().invoke(app, list(arguments))
            assert result.exit_code == 0, result.output
    return made


@pytest.fixture
def world(template: World, tmp_path: Path) -> Iterator[World]:
    """A copy of the template, for one test to spoil, and beside it a folder that is none of its business."""
    shutil.copytree(template.root, tmp_path / "w", symlinks=True)
    (tmp_path / "outside").mkdir()
    np.save(tmp_path / "outside" / "secret.npy", GOOD)
    yield World(tmp_path / "w", [dict(row) for row in template.rows])
    shutil.rmtree(tmp_path / "w")  # some of it is large


def refused(outcome: Outcome, code: int, kind: str | None, *words: str) -> None:
    """The child came back by itself, with this exit status, type and words, and nothing that a terminal would obey."""
    assert outcome.killed is None, outcome
    assert (outcome.code, outcome.kind) == (code, kind), outcome.said
    for word in words:
        assert word in outcome.said
    for alarm in ("Traceback", "error: unexpected", "MemoryError", "\x1b", "\x07", "Warning"):
        assert alarm not in outcome.said
    assert outcome.grown < MEMORY


def at_the_fence(world: World, *arguments: object) -> Outcome:
    """Run the command; whatever it does, it changes nothing but the cache."""
    (outcome,) = all_at_the_fence(world, arguments)
    return outcome


def all_at_the_fence(world: World, *commands: Sequence[object]) -> list[Outcome]:
    """Run these commands one after the other; all that they may change is the cache."""
    around = world.root.parent
    before = picture(around, "w/cache")
    outcomes = all_fenced([command(*arguments) for arguments in commands], world.root)
    assert picture(around, "w/cache") == before
    assert len(outcomes) == len(commands), outcomes
    return outcomes


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
    assert fenced(python(lambda: len(bytes(MEMORY + (8 << 20)))), tmp_path).kind == "MemoryError"
    modest = fenced(python(lambda: len(b"x" * (MEMORY // 2))), tmp_path)
    assert modest.killed is None
    assert modest.grown > MEMORY // 3


def test_the_fence_sees_a_crash_and_what_was_printed_on_the_way(tmp_path: Path) -> None:
    def crash() -> dict[str, object]:
        faulthandler.disable()
        os.write(2, b"terminate called")
        os.abort()

    outcome = fenced(crash, tmp_path)
    assert (outcome.killed, outcome.stderr) == ("SIGABRT", "terminate called")


def test_the_fence_sees_what_a_payload_does(world: World) -> None:
    """Loaded as nobody should, the pickles used here do run, and leave a file that the picture shows."""
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


# -- features ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEATURES)
def test_a_hostile_feature_is_refused(world: World, case: str) -> None:
    victim = world.permitted()[0]
    FEATURES[case].make(world.feature(victim))
    before = picture(world.root)
    scored, audit = all_at_the_fence(world, [*DUMP, *OWN], VERIFY)
    refused(scored, 1, "FeatureError", victim, FEATURES[case].says)
    if case == "another F":  # a feature like any other, but not the one that was scored
        refused(audit, 5, None, f"{victim}: its feature file is not the one that was scored")
    else:
        refused(audit, 1, None, f"{victim}: its freshness cannot be checked", FEATURES[case].says)
    after = picture(world.root)
    if case == "another F":
        after["cache/A2b/plan.json"] = before["cache/A2b/plan.json"]  # it grew by a shape
    assert after == before


def test_a_hostile_feature_can_be_skipped_and_its_row_goes(world: World) -> None:
    """The row is of a feature that no longer exists: it is not served."""
    victim = world.permitted()[0]
    FEATURES["objects"].make(world.feature(victim))
    refused(at_the_fence(world, *DUMP, *OWN, "--on-bad-sample", "skip"), 3, None, f"missing: {victim}", "its dtype")
    assert not world.view("tiny", victim).exists()


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PATHS)
def test_a_hostile_path_is_refused(world: World, case: str) -> None:
    name = PATHS[case].make(world)
    world.rows[0]["file"] = name
    world.write()
    before = picture(world.root)
    scored, *audits = all_at_the_fence(world, [*DUMP, *OWN], VERIFY, [*VERIFY, "--json"])
    refused(scored, PATHS[case].code, PATHS[case].kind, PATHS[case].says)
    for audit in audits:
        assert audit.code in (1, 2, 3, 6)
        refused(audit, audit.code, audit.kind)
    assert picture(world.root) == before


def test_devices_are_refused_even_where_permitted(world: World) -> None:
    world.rows[0]["file"] = "/dev/zero"
    world.write()
    outcome = at_the_fence(world, *DUMP, *OWN, "--allow-outside", "/dev")
    refused(outcome, 1, "FeatureError", "feature /dev/zero", "not a regular file")


def test_names_that_only_unicode_tells_apart_are_two_samples(world: World) -> None:
    for number, name in enumerate((NFC, NFD)):
        world.rows[number]["file"] = name
        world.write_feature(name, GOOD + number)
    world.write()
    assert at_the_fence(world, *DUMP, *OWN).code == 0
    rows = [np.load(world.view("tiny", name)) for name in (NFC, NFD)]
    assert (rows[0] != rows[1]).any()
    assert at_the_fence(world, *VERIFY).code == 0


def test_a_path_is_a_sample_exactly_as_it_is_written(world: World) -> None:
    name = world.permitted()[0].replace("/", "//")
    world.rows[0]["file"] = name
    world.write()
    assert at_the_fence(world, *DUMP, *OWN).code == 0
    assert world.view("tiny", name).exists()


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "packs", "\x1b[2J", "x\0", "é", "n" * 65, ""])
def test_a_teacher_cannot_be_named_after_a_place(world: World, name: str) -> None:
    before = picture(world.root)
    outcome = at_the_fence(world, *DUMP, "--teacher", f"{name}=tiny_teachers:linear")
    refused(outcome, 2, "UsageError", "cannot be a teacher's name")
    assert picture(world.root) == before


# -- manifests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(world: World, case: str) -> None:
    world.json_path.write_bytes(MANIFESTS[case].change(world.json_path.read_bytes()))
    before = picture(world.root)
    for outcome in all_at_the_fence(world, [*DUMP, *OWN], VERIFY):
        refused(outcome, 2, "ManifestError", "dataset.json", MANIFESTS[case].says)
    assert picture(world.root) == before


@pytest.mark.parametrize("what", ["FIFO", "folder", "device", "loop", "4 GB that take no room"])
def test_what_is_no_manifest_is_refused_unread(world: World, what: str) -> None:
    path = world.json_path
    path.unlink()
    if what == "FIFO":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what in ("device", "loop"):
        path.symlink_to("/dev/zero" if what == "device" else path.name)
    else:
        path.touch()
        os.truncate(path, 4 << 30)
    says = {"loop": "symbolic links", "folder": "a directory", "4 GB that take no room": "--max-manifest-bytes"}
    for outcome in all_at_the_fence(world, [*DUMP, *OWN], VERIFY):
        refused(outcome, 2, "ManifestError", says.get(what, "not a regular file"))
