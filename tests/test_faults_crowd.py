"""Many processes at once on one cache: dumps of overlapping parts, seals, readers. Nothing locks; nothing is lost."""

from __future__ import annotations

import random
import time

import pytest
from fault_checks import (
    SEALING,
    Arguments,
    Place,
    check_rows,
    check_same,
    check_served,
    dumping,
    make_place,
    stored_rows,
)
from fault_disk import Tree, put_tree
from fault_tools import MARKS, Outcome, ended_at_last, host, often, readers

pytestmark = MARKS

SEED = 20261121
OVERLAPPING = [dumping("--shard", part) for part in ("0/5", "1/5", "2/5", "3/5", "4/5", "0/3", "1/3", "2/3")]
"""Every sample is in two parts."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("crowd"), source=20, target=12)


@pytest.fixture(scope="module")
def finished(place: Place) -> Tree:
    """What one process makes of it."""
    put_tree(place.disk, {})
    return place.finish(dumping())


def at_once(
    place: Place, *commands: Arguments, latest: float = 0.0, draw: random.Random | None = None
) -> list[Outcome]:
    """Start commands together, or each at a moment of its own up to ``latest`` seconds; wait for all."""
    moments = [draw.uniform(0, latest) if draw else 0.0 for _ in commands]
    began, running = time.monotonic(), []
    with ended_at_last(running):
        for moment, arguments in sorted(zip(moments, commands, strict=True), key=lambda start: start[0]):
            time.sleep(max(0.0, began + moment - time.monotonic()))
            running.append(host().start(*arguments, cwd=place.root))
        return [command.wait() for command in running]


def test_eight_dumps_of_overlapping_parts_and_a_seal_equal_one_process(place: Place, finished: Tree) -> None:
    times = often(1, 2, 20)
    for _ in range(times):
        put_tree(place.disk, {})
        outcomes = at_once(place, *OVERLAPPING)
        assert [outcome.code for outcome in outcomes] == [0] * len(OVERLAPPING), outcomes
        check_rows(place.cache, place.right, {})
        check_same(place.finish(SEALING), finished)
    print(f"\n{times} times 8 processes at once, then a seal: each time the bytes of one process")


def test_two_seals_at_once_beside_a_dump_lose_nothing(place: Place, finished: Tree) -> None:
    draw = random.Random(SEED)  # noqa: S311 (moments, not a secret)
    put_tree(place.disk, {})
    parts = place.finish(dumping("--shard", "0/2"), dumping("--shard", "1/2"))
    rounds, rows, refused = often(2, 6, 50), 0, 0
    for number in range(rounds):
        put_tree(place.disk, parts)
        acknowledged = stored_rows(place.cache)
        # A dump that finds its rows there; or one that is to score them again, which may have to say that a seal came
        # between: what was scored anew cannot be told any more from what it was to take the place of.
        again = bool(number % 2)
        dump = dumping("--shard-size", "3", *(["--no-skip-existing"] if again else []))
        outcomes = at_once(place, SEALING, SEALING, dump, draw=draw)
        codes = sorted(outcome.code for outcome in outcomes)
        assert codes == [0, 0, 0] or (again and codes == [0, 0, 3]), outcomes
        refused += codes[-1] == 3
        rows += len(check_rows(place.cache, place.right, acknowledged))
        assert check_served(place.cache, place.right) == 2 * place.samples
        check_same(place.finish(SEALING), finished)
    print(f"\n{rounds} rounds of two seals beside a dump (seed {SEED}): {rows} rows, 0 lost, {refused} dumps refused")


def test_seals_beside_a_part_that_is_still_scored_refuse_or_are_complete(place: Place, finished: Tree) -> None:
    draw = random.Random(SEED)  # noqa: S311 (as above)
    put_tree(place.disk, {})
    half = place.finish(dumping("--shard", "0/2"))
    for _ in range(often(1, 4, 50)):
        put_tree(place.disk, half)
        acknowledged = stored_rows(place.cache)
        outcomes = at_once(place, dumping("--shard", "1/2"), SEALING, SEALING, draw=draw)
        assert {outcome.code for outcome in outcomes} <= {0, 3}, outcomes
        assert any(outcome.code == 0 for outcome in outcomes)
        check_rows(place.cache, place.right, acknowledged)
        assert check_served(place.cache, place.right) in (0, 2 * place.samples)
        check_same(place.finish(SEALING), finished)


def test_readers_see_one_generation_while_others_are_sealed(place: Place, finished: Tree) -> None:
    """Weights change back and forth; a reader must never see rows of the one beside rows of the other."""
    put_tree(place.disk, finished)
    generations = {rescoring: _fingerprints(place, rescoring) for rescoring in (False, True)}
    seals = often(4, 6, 50)  # an even number: the last weights are not the first
    with readers(8, place.cache, place.right, place.root) as read:
        for number in range(seals):
            weights = "weights.txt" if number % 2 else ""
            again = ["--no-skip-existing"] if number % 4 > 1 else []
            if again:
                place.finish(dumping("--shard-size", "3", *again, weights=weights))
            else:
                place.finish(dumping("--shard", "0/2", weights=weights), dumping("--shard", "1/2", weights=weights))
            place.finish(SEALING)
    for tally in read:
        assert len(tally.sets) > 1, "a reader did not see the weights change"
        assert all(size == place.samples and made_by in generations.values() for size, made_by in tally.sets)
    reads, rows = sum(tally.rounds for tally in read), sum(tally.rows for tally in read)
    print(f"\n8 readers beside {seals} seals: {reads} reads of {rows} rows, 0 wrong")


def _fingerprints(place: Place, rescoring: bool) -> dict[str, str]:
    """Made by hand: the teachers' fingerprints in the rows that are known to be right, in the order they were made."""
    order: dict[str, list[str]] = {}
    for teacher, made_by, _ in place.right:
        if made_by not in order.setdefault(teacher, []):
            order[teacher].append(made_by)
    return {teacher: made[int(rescoring)] for teacher, made in order.items()}
