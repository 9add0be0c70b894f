"""Parts on a cluster, without one: what the driver makes of what becomes of them, what a worker does, and recipes."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPO, Run, World
from fault_tools import TIER
from store_fixtures import snapshot

import kd_cache.cli.on_ray
import kd_cache.cluster.driver
import kd_cache.cluster.worker
from kd_cache.cli.parser import built
from kd_cache.cluster.driver import PartsRun, parts_of
from kd_cache.cluster.ray_tasks import Cluster, Crashed
from kd_cache.cluster.worker import PartReport, kept, score_part
from kd_cache.errors import CheckpointError, DataLeakageError, KDCacheError, StaleError
from kd_cache.watch import Watcher

DONE = PartReport(10, 10, {"tiny": (10, 0, {}, 0)}, ["said once"])
NEVER = "never"


@dataclass
class Standin:
    """A cluster with two slots whose parts end, one at a time, as they are told to: `DONE` where nothing is said."""

    told: dict[int, list[Any]] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)
    most: int = 0
    interrupted: bool = False

    def slots(self) -> int:
        return 2

    def submit(self, part: tuple[int, int]) -> Any:
        self.started.append(part[0])
        return part[0], len(self.started)

    def wait(self, running: list[Any], seconds: float) -> list[Any]:
        self.most = max(self.most, len(running))
        if self.told.get(running[0][0]) != [NEVER]:
            return running[:1]
        if not self.interrupted:
            raise KeyboardInterrupt
        return []

    def result(self, reference: Any) -> Any:
        outcomes = self.told.get(reference[0])
        outcome = outcomes.pop(0) if outcomes else DONE
        if isinstance(outcome, Crashed):
            raise outcome
        return outcome

    def interrupt(self) -> bool:
        self.interrupted = True
        return True


class Heard(Watcher):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = 0
        self.parts_done = (0, 0)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, count: int) -> None:
        self.done += count

    def parts(self, done: int, total: int) -> None:
        self.parts_done = done, total


def driven(cluster: Standin, count: int = 6) -> tuple[PartsRun, Heard]:
    heard = Heard()
    return PartsRun(cluster, count, lambda part: f"samples of {part[0]}", heard), heard  # type: ignore[arg-type]


CRASH = Crashed("The worker died unexpectedly")


def test_parts_are_handed_out_as_slots_are_free() -> None:
    run, heard = driven(cluster := Standin())
    run.run()
    assert cluster.started == list(range(6))
    assert cluster.most == 3  # one waits, so that a cluster may grow for it
    assert (heard.done, heard.parts_done, len(run.reports)) == (60, (6, 6), 6)


def test_a_part_whose_process_died_is_started_again() -> None:
    run, heard = driven(Standin({1: [CRASH, CRASH]}))
    run.run()
    assert run.attempts == {0: 1, 1: 3, 2: 1, 3: 1, 4: 1, 5: 1}
    assert len(run.reports) == 6
    assert "part 1 of 6 is started again after The worker died unexpectedly" in heard.notes


def test_a_part_whose_process_dies_three_times_is_given_up_and_the_others_are_done() -> None:
    run, _ = driven(cluster := Standin({1: [CRASH, CRASH, CRASH]}))
    with pytest.raises(KDCacheError, match=r"part 1 of 6 \(samples of 1\) ended 3 times without a word: The worker"):
        run.run()
    assert len(run.reports) == 5
    assert cluster.started.count(1) == 3


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ({0: [StaleError("stale")]}, StaleError),
        ({0: [StaleError("stale")], 1: [DataLeakageError("leak")], 2: [CRASH]}, DataLeakageError),
        ({0: [DataLeakageError("leak")], 1: [StaleError("stale")]}, DataLeakageError),
    ],
)
def test_an_error_stops_the_parts_that_are_not_started_and_the_worst_one_counts(
    told: dict[int, list[Any]], kind: type[KDCacheError]
) -> None:
    codes = [each for outcomes in told.values() for each in outcomes]
    run, heard = driven(cluster := Standin(told))
    with pytest.raises(kind) as raised:
        run.run()
    assert cluster.started == [0, 1, 2]  # those that were with it are not tried again
    others = {str(each) for each in codes if isinstance(each, KDCacheError) and each is not raised.value}
    assert {note.partition(": ")[2] for note in heard.notes if "another part" in note} == others


def test_an_interrupt_lets_parts_commit_but_waits_for_none_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd_cache.cluster.driver, "_PATIENCE", 0.05)
    run, _ = driven(cluster := Standin({2: [NEVER]}))
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert cluster.interrupted
    assert len(run.reports) == 2


@pytest.mark.parametrize(
    ("samples", "slots", "count"),
    [(0, 2, 1), (340, 2, 1), (10_000, 2, 8), (10_000, 100, 39), (10**8, 8, 1526), (10**6, 0, 16)],
)
def test_there_are_several_parts_for_each_slot_but_no_small_ones(samples: int, slots: int, count: int) -> None:
    assert parts_of(samples, slots) == count


# -- a worker ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ordered:
    proof: Path
    act: Callable[[], Any]

    def dump(self, part: tuple[int, int], watcher: Watcher) -> Any:
        return self.act()


class OursError(CheckpointError):
    """As a user's module may define one: the driver does not have it."""


def _raises(error: BaseException) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "kind", "text"),
    [
        (_raises(OursError("no weights", hint="here")), CheckpointError, "no weights\nhere"),
        (_raises(ZeroDivisionError("by zero")), KDCacheError, "unexpected ZeroDivisionError: by zero"),
    ],
)
def test_an_error_travels(act: Callable[[], Any], kind: type[KDCacheError], text: str, tmp_path: Path) -> None:
    (proof := tmp_path / "proof").touch()
    outcome = pickle.loads(pickle.dumps(score_part(Ordered(proof, act), (3, 8))))  # noqa: S301 (our own)
    assert (type(outcome), str(outcome)) == (kind, text)


def test_a_worker_that_does_not_see_the_driver_s_disk_says_so(tmp_path: Path) -> None:
    outcome = score_part(Ordered(tmp_path / "proof", _raises(AssertionError())), (0, 8))
    assert isinstance(outcome, KDCacheError)
    assert outcome.exit_code == 1
    assert "does not see the cache root" in outcome.message
    assert str(tmp_path) in outcome.message


def test_a_worker_is_interrupted_when_the_driver_takes_its_file_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kd_cache.cluster.worker, "_LOOK", 0.01)
    (proof := tmp_path / "proof").touch()

    def act() -> None:
        proof.unlink()
        for _ in range(1000):
            time.sleep(0.01)

    outcome = score_part(Ordered(proof, act), (0, 8))
    assert "interrupted" in str(outcome)


def test_what_started_the_machine_says_nothing_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "1")
    (proof := tmp_path / "proof").touch()
    score_part(Ordered(proof, _raises(KDCacheError("enough"))), (0, 8))
    assert not [name for name in os.environ if name.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM"))]


def test_what_is_loaded_is_kept_until_its_file_changes(tmp_path: Path) -> None:
    path, made = tmp_path / "weights", iter(range(9))
    assert [kept("a", path, lambda: next(made)) for _ in range(2)] == [0, 0]
    path.write_text("1")
    assert [kept("a", path, lambda: next(made)) for _ in range(2)] == [1, 1]
    assert kept("b", None, lambda: next(made)) == 2


# -- the command ------------------------------------------------------------------------------------------------------

RAY = ("dump", "--target", "b", "--ray")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((*RAY, "10.0.0.1"), "--ray is 10.0.0.1, expected auto, local, or host:port"),
        ((*RAY, "ray://head:10001"), "expected auto, local, or host:port"),
        ((*RAY, "local", "--shard", "0/2"), "--shard names a part, and --ray hands out all of them"),
        ((*RAY, "local", "--device", "cuda:1"), "Ray chooses which GPU"),
        ((*RAY, "local", "--device", "cpu", "--ray-gpus", "1"), "contradict each other"),
        ((*RAY, "local", "--batch-size", "auto"), "--batch-size auto cannot be used for a part"),
        ((*RAY, "local", "--no-skip-existing"), "a part cannot score again"),
        ((*RAY, "local", "--min-accuracy", "0.5"), "--min-accuracy is about a whole cache"),
        (("dump", "--target", "b,c", "--ray", "local"), "a part is of one target's cache"),
        (("dump", "--target", "b", "--parts", "8"), "--parts is for --ray, which is not given"),
        (("dump", "--target", "b", "--ray-gpus", "1"), "--ray-gpus is for --ray"),
        (("dump", "--target", "b", "--ray-storage", "s3://b/A2b"), "--ray-storage is for --ray"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...], text: str, run: Run, world: World) -> None:
    result = run(*arguments, "--json-path", world.json_path, "--teacher", "tiny=tiny_teachers:linear", "--only", "tiny")
    assert result.exit_code == 2
    assert text in result.stderr.replace("\n", " ")
    assert not (world.root / "cache").exists()


def test_without_ray_the_extra_is_named(run: Run, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run(*RAY, "auto", "--json-path", world.json_path)
    assert result.exit_code == 2
    assert "pip install 'kd-cache[ray]'" in result.stderr


def test_a_head_that_does_not_answer_is_told_at_once(run: Run, world: World) -> None:
    pytest.importorskip("ray")
    with socket.socket() as taken:  # and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run(*RAY, address, "--json-path", world.json_path, "--teacher", "tiny=tiny_teachers:linear")
    assert result.exit_code == 1
    assert f"no Ray cluster answers at --ray {address}" in result.stderr
    assert "ray start --head" in result.stderr


class Local(Cluster):
    """Runs each part here when it is submitted, in another folder, from the bytes that would travel."""

    def __init__(self, elsewhere: Path) -> None:
        self._elsewhere = elsewhere
        self.sent: list[int] = []

    has_gpus = False

    def prepare(self, order: Any, gpus: float) -> None:
        assert gpus == 0
        self._pickled = pickle.dumps(order)

    def slots(self) -> int:
        return 3

    def submit(self, part: tuple[int, int]) -> Any:
        here = Path.cwd()
        os.chdir(self._elsewhere)
        try:
            report = pickle.dumps(score_part(pickle.loads(self._pickled), part))  # noqa: S301 (our own)
        finally:
            os.chdir(here)
        self.sent.append(len(report))
        return part, report

    def wait(self, running: list[Any], seconds: float) -> list[Any]:
        return running[:1]

    def result(self, reference: Any) -> Any:
        return pickle.loads(reference[1])  # noqa: S301 (our own)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Local:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    made = Local(elsewhere)

    @contextmanager
    def connected(address: str) -> Iterator[Local]:
        yield made

    monkeypatch.setattr(kd_cache.cli.on_ray, "connected", connected)
    monkeypatch.setattr(kd_cache.cluster.worker, "_KEPT", {})
    return made


MINE = "from tiny_teachers import linear, unloadable\n"


def test_parts_that_run_elsewhere_make_what_one_process_makes(local: Local, run: Run, world: World) -> None:
    """Every path is relative to where the driver runs."""
    (world.root / "mine.py").write_text(MINE)
    (world.root / "w.txt").write_text("5")
    mine = ("--teacher", "mine=mine.py:linear,ckpt=w.txt", "--only", "mine", "--json-path", "dataset.json")
    dump = ("dump", "--target", "b", *mine, "--batch-size", "4", "--allow-outside", "elsewhere", "--data-root", ".")
    assert run(*dump).exit_code == 0
    expected = {name: content for name, content in snapshot(world.cache).items() if name != "cache_index.json"}
    (world.cache.parent).rename(world.root / "plain")

    result = run(*dump, "--ray", "local", "--parts", "3", "--json")
    assert result.exit_code == 0, result.output
    assert {name: content for name, content in snapshot(world.cache).items() if name != "cache_index.json"} == expected
    assert "3 parts on Ray, 3 at once, on cpu" in result.stderr
    assert re.search(r'"samples_scored": 20\b', result.stdout)
    assert max(local.sent) < 1024
    assert list(world.cache.parent.iterdir()) == [world.cache]  # the driver's file is gone
    again = run(*dump, "--ray", "local", "--parts", "7")
    assert again.exit_code == 0
    assert "Nothing to score" in again.stdout


def test_parts_of_machines_without_a_common_disk_meet_at_an_url(
    local: Local, run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each machine has a home of its own; a rerun on another one scores nothing again."""
    pytest.importorskip("obstore")
    (world.root / "mine.py").write_text(MINE)
    mine = ("--teacher", "mine=mine.py:linear", "--only", "mine", "--json-path", "dataset.json")
    dump = ("dump", "--target", "b", *mine)
    assert run(*dump).exit_code == 0
    expected = {name: content for name, content in snapshot(world.cache).items() if name != "cache_index.json"}
    world.cache.parent.rename(world.root / "plain")
    stored = (*dump, "--ray", "auto", "--parts", "3", "--ray-storage", f"file://{world.root}/store/A2b")
    for home, scored in (("one", 20), ("two", 0)):
        monkeypatch.setenv("HOME", str(world.root / home))
        monkeypatch.setattr(kd_cache.cluster.worker, "_KEPT", {})
        result = run(*stored, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["samples_scored"] == scored
        assert {
            name: content for name, content in snapshot(world.cache).items() if name != "cache_index.json"
        } == expected
    result = run(*dump, "--ray", "auto", "--ray-storage", "s3://user:secret@bucket/A2b")
    assert result.exit_code == 2
    assert "secret" not in result.output


@pytest.mark.parametrize(("slots", "started"), [(3, 4), (0, 1)])
def test_an_error_of_a_part_is_the_command_s(
    slots: int, started: int, local: Local, run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "slots", lambda: slots)
    (world.root / "mine.py").write_text(MINE)
    lost = ("--teacher", "lost=mine.py:unloadable", "--only", "lost", "--json-path", "dataset.json")
    result = run("dump", "--target", "b", *lost, "--ray", "auto", "--parts", "20")
    assert result.exit_code == 1
    assert "my disk is gone" in result.stderr
    assert len(local.sent) == started
    assert ("no machine of the cluster can run a part now" in result.stderr) == (slots == 0)


# -- the recipes ------------------------------------------------------------------------------------------------------

RECIPES = re.findall(r"```(\w+)\n(.*?)```", (REPO / "docs/clusters.md").read_text(), re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Every kd-cache command in a text, as words."""
    for found in re.findall(r"kd-cache ((?:dump|seal|push|pull) [^\"'#\n;&|]*)", text):
        yield shlex.split(found.partition(' --shard"')[0])


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_recipes_can_be_read_and_their_commands_are_ours(number: int) -> None:
    language, text = RECIPES[number]
    if language == "yaml":
        text = str(yaml.safe_load(text))
    elif language == "py":
        compile(text, "recipe", "exec")
    else:
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for name, *arguments in commands(text):
        arguments = [re.sub(r"\$\w+/(\d+|\$\w+)", "0/2", each) for each in arguments]
        built(name).make_context(name, [*arguments, *(["0/2"] if arguments[-1] == "--shard" else [])])


@pytest.mark.faults
@pytest.mark.skipif(TIER == "one", reason="two processes that import torch: make faults starts them")
def test_the_recipe_for_torchrun_makes_what_one_process_makes(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(REPO / "data")
    recipe = next(text for _, text in RECIPES if text.startswith("torchrun"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    for script in (recipe, "kd-cache dump --target b"):
        subprocess.run(["bash", "-e"], input=script, text=True, cwd=tmp_path, env=environment, check=True)
    found, plain = (snapshot(tmp_path / folder / "A2b") for folder in ("cache/torchrun", "cache"))
    assert {name for name, content in plain.items() if found.get(name) != content} <= {"cache_index.json", "seen.bin"}
