"""Parts on a Ray cluster whose workers, machines and driver are killed: two nodes on this machine, one disk."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World
from fault_disk import is_temporary
from fault_tools import HERE, MARKS, TIER, Command, Outcome, ended_at_last, host, often
from store_fixtures import snapshot
from tiny_teachers import Linear

pytestmark = [
    *MARKS,
    pytest.mark.skipif(TIER == "one", reason="a cluster takes half a minute to start: make faults starts one"),
    # Ray leaves its log files and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

SAMPLES, PARTS, BATCH, PACE, SECONDS = 96, 8, 4, 0.15, 0.5
TWICE = SECONDS / PACE * BATCH + BATCH
"""Rows that a kill may cost: those of `SECONDS`, and one batch."""


class Logged(Linear):
    """Slow. Writes down each batch that is scored to be kept: process, and first values. Dies where it must."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        files = {Path(frame.filename).name for frame in traceback.extract_stack()}
        folder = Path(os.environ["KD_TEST_LOG"])
        if not {"cached_rows.py", "self_test.py"} & files:
            rows = " ".join(map(repr, sorted({float(value) for value in features[:, 0, 0]})))
            with (folder / "log").open("a") as log:
                log.write(f"{os.getpid()} {rows}\n")
            time.sleep(PACE)
        fatal = folder / "fatal"
        if fatal.exists() and any(float(value) == float(fatal.read_text()) for value in features[:, 0, 0]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(features)


def logged(ckpt: Path | None) -> Logged:
    return Logged(1 if ckpt is None else int(ckpt.read_text()), architecture="logged/1")


@dataclass
class Site:
    """A data set, a cluster, and what a plain dump makes of the one without the other."""

    world: World
    log: Path
    cluster: Any = None
    nodes: list[Any] = field(default_factory=list)
    right: dict[str, bytes] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[object, ...]:
        return (
            "dump", "--target", "b", "--json-path", "dataset.json", "--teacher", "logged=test_faults_ray:logged",
            "--only", "logged", "--batch-size", BATCH, "--shard-seconds", SECONDS,
        )  # fmt: skip

    def start(self, *further: object) -> Command:
        ray = ("--ray", self.cluster.address, "--parts", PARTS)
        return host().start(*self.arguments, *ray, *further, cwd=self.world.root)

    def finish(self, *further: object) -> Outcome:
        command = self.start(*further)
        with ended_at_last([command]):
            return command.wait()

    def batches(self) -> list[tuple[int, list[float]]]:
        """What was scored: the process, and each row by its first value."""
        lines = (self.log / "log").read_text().splitlines()
        return [(int(pid), [*map(float, rows)]) for pid, *rows in (line.split() for line in lines)]

    def begin(self) -> None:
        """Nothing is cached, and nobody has scored anything."""
        shutil.rmtree(self.world.cache.parent, ignore_errors=True)
        (self.log / "log").write_text("")

    def check(self, kills: int) -> int:
        """The cache is that of one process; few rows were scored twice: how many."""
        found = {name: content for name, content in snapshot(self.world.cache).items() if not is_temporary(name)}
        assert {name: found.get(name) for name in self.right} == self.right
        assert found.keys() - self.right.keys() <= {"cache_index.json", "seen.bin"}
        twice = sum(len(rows) for _, rows in self.batches()) - SAMPLES
        assert 0 <= twice <= kills * TWICE
        return twice

    def add_node(self) -> None:
        with self.told():
            self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=80 << 20))

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """What the nodes have in their environment, a launcher's words among it."""
        names = {"KD_TEST_LOG": str(self.log), "HOME": str(self.log), "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**names, "RANK": "7", "SLURM_JOB_ID": "1"}.items():
                patch.setenv(name, value)
            yield


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster

    root = tmp_path_factory.mktemp("ray")
    world = World(root)
    for number in range(SAMPLES):
        world.add(number, "A" if number < 80 else "b", "train")
    made = Site(world.write(), root)
    (root / "log").touch()
    assert host().run(*made.arguments, cwd=root, env={"KD_TEST_LOG": str(root)}).code == 0
    made.right = {k: v for k, v in snapshot(world.cache).items() if k not in ("cache_index.json", "seen.bin")}
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
    with made.told():
        made.cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            made.add_node()
        yield made
    finally:
        made.cluster.shutdown()


def test_a_dump_on_ray(site: Site) -> None:
    site.begin()
    outcome = site.finish()
    assert outcome.code == 0, outcome
    assert site.check(0) == 0
    assert len({pid for pid, _ in site.batches()}) == 2
    outcome = site.finish()
    assert outcome.code == 0
    assert "Nothing to score" in outcome.stdout, outcome


def test_a_dump_on_machines_that_share_no_disk(site: Site) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed: pip install -e '.[remote]'")
    site.begin()
    storage = ("--ray-storage", f"file://{site.world.root}/store/A2b")
    assert site.finish(*storage).code == 0
    site.check(0)
    outcome = site.finish(*storage)
    assert "Nothing to score" in outcome.stdout, outcome
    site.check(0)


# -- kills ------------------------------------------------------------------------------------------------------------


def workers(site: Site) -> list[int]:
    """The processes of this test's nodes that have scored something, and live."""
    return [pid for pid in dict.fromkeys(pid for pid, _ in site.batches()) if Path(f"/proc/{pid}").exists()]


def kill_worker(site: Site, running: Command, draw: random.Random) -> None:
    """In its second part, or later."""
    if alive := workers(site):
        os.kill(draw.choice(alive), signal.SIGKILL)


def kill_raylet(site: Site, running: Command, draw: random.Random) -> None:
    """A machine goes, and another comes."""
    site.cluster.remove_node(site.nodes.pop(draw.randrange(len(site.nodes))), allow_graceful=False)
    site.add_node()


def kill_driver(site: Site, running: Command, draw: random.Random) -> None:
    running.send(signal.SIGKILL)
    assert running.wait().code in (-signal.SIGKILL, 0)


def interrupt_driver(site: Site, running: Command, draw: random.Random) -> None:
    running.send(signal.SIGINT)
    outcome = running.wait(60)
    assert outcome.code in (0, 130), str(outcome)
    assert outcome.code == 0 or "interrupted; what was committed is kept" in outcome.stderr


Kill = Callable[[Site, Command, random.Random], None]


@pytest.mark.parametrize("kill", [kill_worker, kill_raylet, kill_driver, interrupt_driver])
def test_what_is_killed_costs_a_few_rows_of_time(site: Site, kill: Kill) -> None:
    """The first kill comes when a process is in its second part; further ones come at any moment."""
    draw, twice, seconds = random.Random(kill.__name__), [], 0.0  # noqa: S311 (moments of kills, not a secret)
    for number in range(often(1, 1, 20)):
        site.begin()
        began = time.monotonic()
        command = site.start()
        with ended_at_last([command]):
            if number == 0:
                await_batches(site, command, 2 * SAMPLES // PARTS // BATCH + 2)
                seconds = 2 * (time.monotonic() - began)
            else:
                command.ended(draw.uniform(0, seconds))
            kill(site, command, draw)
            outcome = command.wait()
        assert outcome.code in (0, 130, -signal.SIGKILL), outcome
        if outcome.code or number:
            outcome = site.finish()
            assert outcome.code == 0, outcome
        twice.append(site.check(2 if kill is kill_driver else 1))  # its workers go with it
    print(f"\n{kill.__name__}: {len(twice)} times, rows scored twice: {twice}, allowed {TWICE:.0f}")


def await_batches(site: Site, command: Command, count: int) -> None:
    """Until so many batches are begun: with two processes, one of them is in its second part."""
    while len(site.batches()) < count:
        assert not command.ended(0.02), command.wait()


# -- what no retry heals ----------------------------------------------------------------------------------------------


def test_a_teacher_that_kills_its_process_is_tried_three_times(site: Site) -> None:
    site.begin()
    file = site.world.permitted()[17]
    value = float(np.load(site.world.feature(file))[0, 0])
    (site.log / "fatal").write_text(repr(value))
    try:
        outcome = site.finish()
    finally:
        (site.log / "fatal").unlink()
    assert outcome.code == 1, outcome
    assert f"of {PARTS} (samples " in outcome.stderr
    assert f"of {SAMPLES} in the order of their keys" in outcome.stderr
    assert "ended 3 times" in outcome.stderr
    batches = [rows for _, rows in site.batches() if value in rows]
    assert len(batches) == 3
    assert not (site.world.cache / "cache_index.json").exists()
    site.log.joinpath("log").write_text("")
    assert site.finish().code == 0
    assert sum(len(rows) for _, rows in site.batches()) <= SAMPLES // PARTS  # the other parts were committed


def test_an_error_is_told_as_without_a_cluster(site: Site) -> None:
    """A checkpoint that is missing: each part that was started tries it once."""
    site.begin()
    lost = ("--teacher", f"lost=test_faults_ray:logged,ckpt={site.world.root / 'lost.txt'}", "--only", "lost")
    plain = host().run(*site.arguments, *lost, cwd=site.world.root)
    outcome = site.finish(*lost)
    assert plain.code == outcome.code != 0, outcome
    error = plain.stderr[plain.stderr.index("error:") :]
    assert error in outcome.stderr
    assert "started again" not in outcome.stderr
