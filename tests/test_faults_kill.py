"""Commands killed with SIGKILL at random moments while others work and a student reads."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass, field

import pytest
from fault_checks import (
    SEALING,
    Arguments,
    Place,
    acknowledged_samples,
    check_rows,
    check_same,
    complete_samples,
    dumping,
    exporting,
    make_place,
)
from fault_disk import Tree, put_tree
from fault_tools import MARKS, Rows, ended_at_last, host, often, readers

pytestmark = MARKS

SEED = 20261121
Pair = tuple[Arguments, Arguments]

WHOLE: Pair = (dumping(), dumping("--shard-size", "3"))
PARTS: Pair = (dumping("--shard", "0/2"), dumping("--shard", "1/2", "--shard-size", "3"))
SEALS: Pair = (SEALING, SEALING)
SEAL_AND_DUMP: Pair = (SEALING, dumping("--shard-size", "3"))
EXPORTS: Pair = (exporting("pt"), exporting("npy"))
EXPORT_AND_DUMP: Pair = (exporting("tsv"), dumping("--no-skip-existing"))
EXPORTED = (exporting("pt"), exporting("npy"), exporting("tsv"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("kills"), source=20, target=12)


@dataclass
class Kills:
    """Kills, and what was found after each."""

    place: Place
    draw: random.Random
    acknowledged: Rows = field(default_factory=dict)
    kills: int = 0
    rows: int = 0
    said: int = 0
    reads: int = 0
    rows_read: int = 0

    def whole_life(self, number: int, finished: Tree, exported: Tree) -> None:
        """A cache from nothing to finished and exported, with kills at every stage and a reader beside."""
        put_tree(self.place.disk, {})
        self.acknowledged = {}
        with readers(1, self.place.cache, self.place.right, self.place.root) as read:
            begin = PARTS if number % 2 else WHOLE
            self.disturb(begin)
            self.disturb(begin)
            if begin is PARTS:
                self.place.finish(*PARTS)
            self.disturb(SEALS if begin is PARTS else WHOLE)
            self.disturb(SEAL_AND_DUMP if begin is PARTS else WHOLE)
            check_same(self.place.finish(SEALING if begin is PARTS else dumping()), finished)
            self.disturb(EXPORTS)
            self.disturb(EXPORT_AND_DUMP)
            check_same(self.place.finish(dumping(), *EXPORTED), exported)
            self._check()
        assert [size for size, _ in read[0].sets] == [self.place.samples], "a reader saw another set of samples"
        self.rows += len(self.acknowledged)
        self.reads += read[0].rounds
        self.rows_read += read[0].rows

    def disturb(self, pair: Pair) -> None:
        """Start both commands and kill each at a moment of its own, drawn over the time that the pair takes."""
        running = [host().start(*arguments, cwd=self.place.root) for arguments in pair]
        with ended_at_last(running):
            for moment, command in sorted((self.draw.uniform(0, SECONDS[pair]), number) for number in range(2)):
                victim = running[command]
                victim.ended(max(0.0, victim.began + moment - time.monotonic()))
                victim.send(signal.SIGKILL)
                outcome = victim.wait()
                # A seal and an export need what a killed dump may not have made yet: then they must say so.
                assert outcome.code in (-signal.SIGKILL, 0, 1, 3), outcome
                assert "unexpected" not in outcome.stderr, outcome
                self.kills += outcome.code == -signal.SIGKILL
                said = acknowledged_samples(outcome.stderr)
                assert said <= complete_samples(self._check())
                self.said += said

    def _check(self) -> Rows:
        """Every row that was ever seen is there, whatever else still runs."""
        rows = check_rows(self.place.cache, self.place.right, self.acknowledged)
        self.acknowledged |= rows
        return rows


SECONDS: dict[Pair, float] = {}


def measure(place: Place) -> tuple[Tree, Tree]:
    """How long each pair takes where nothing is killed, and what the disk holds when all is done."""
    put_tree(place.disk, {})
    for pair in (WHOLE, SEAL_AND_DUMP, SEALS, EXPORTS, EXPORT_AND_DUMP):
        _time(place, pair)
    put_tree(place.disk, {})
    _time(place, PARTS)
    put_tree(place.disk, {})
    return place.finish(dumping()), place.finish(*EXPORTED)


def _time(place: Place, pair: Pair) -> None:
    began = time.monotonic()
    running = [host().start(*arguments, cwd=place.root) for arguments in pair]
    assert [command.wait().code for command in running] == [0, 0]
    SECONDS[pair] = time.monotonic() - began


def test_kills_at_random_moments_cost_nothing_acknowledged_and_serve_nothing_wrong(place: Place) -> None:
    finished, exported = measure(place)
    done, lives = Kills(place, random.Random(SEED)), 0  # noqa: S311 (moments of kills, not a secret)
    while done.kills < often(1, 60, 1000) or not done.said:
        done.whole_life(lives, finished, exported)
        lives += 1
    assert done.reads > 0
    print(
        f"\nseed {SEED}: {done.kills} kills in {lives} caches, {done.rows} acknowledged rows, 0 lost; "
        f"{done.reads} reads of {done.rows_read} rows beside them, 0 wrong"
    )
