"""Every system call of a commit, a seal and an export fails, meets a signal, and is the last before a power cut."""

from __future__ import annotations

import errno
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import pytest
from fault_checks import (
    SCENARIOS,
    Place,
    Scenario,
    acknowledged_samples,
    check_after,
    check_exported,
    check_outcome,
    check_rows,
    check_same,
    check_served,
    complete_samples,
    make_place,
    make_scenario,
    stored_rows,
)
from fault_disk import CUTS, ROW_FILE, UNNAMED, Call, Disk, Tree, calls, is_temporary, put_tree, tree
from fault_tools import FULL, MARKS, NEEDS_SHIM, TIER, Fault, often

pytestmark = [*MARKS, NEEDS_SHIM]

T = TypeVar("T")
SEED = 20261121
EVERY = ("dump", "seal", "export pt", "export tsv", "export npy")
"""In a full run each call of these commands is broken in each way, and of the others a sample."""
_CHANGES = ("create", "write", "rename", "mkdir", "truncate")


@dataclass(frozen=True)
class _Kind:
    """A way for a call to go wrong; ``sticky`` operations go on failing afterwards."""

    how: str
    code: int = 0
    sticky: tuple[str, ...] = ()


_EINTR = _Kind("error", errno.EINTR)
_EIO = _Kind("error", errno.EIO)
_EMFILE = _Kind("error", errno.EMFILE)
_ENOSPC = _Kind("error", errno.ENOSPC)
_FULL = _Kind("error", errno.ENOSPC, _CHANGES)
_READ_ONLY = _Kind("error", errno.EROFS, (*_CHANGES, "unlink"))
_GONE = _Kind("error", errno.EIO, (*_CHANGES, "unlink", "fsync", "open", "read", "list"))
_KILL = _Kind("kill before")

_SIGNALS = tuple(
    _Kind("signal", number, again) for number in (signal.SIGINT, signal.SIGTERM) for again in ((), ("fsync",))
)
"""Just before any call; and again at every later fsync."""

KINDS: dict[str, tuple[_Kind, ...]] = {
    "open": (_EMFILE, _EIO, _EINTR),
    "create": (_EMFILE, _FULL, _READ_ONLY, _EIO, _EINTR, _KILL),
    "write": (_ENOSPC, _FULL, _EIO, _GONE, _Kind("short"), _EINTR, _KILL),
    "fsync": (_EIO, _GONE, _ENOSPC, _EINTR, _KILL),
    "rename": (_ENOSPC, _EIO, _READ_ONLY, _KILL),
    "unlink": (_EIO, _READ_ONLY, _KILL),
    "mkdir": (_FULL, _READ_ONLY, _EIO, _KILL),
    "truncate": (_ENOSPC, _EIO, _EINTR, _KILL),
    "close": (_EIO, _ENOSPC, _KILL),
    "read": (_EIO, _EINTR),
    "list": (_EIO, _EMFILE),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("calls"), source=8, target=4)


@pytest.fixture(scope="module")
def dump(place: Place) -> Scenario:
    return make_scenario(place, "dump")


@pytest.fixture(scope="module", params=SCENARIOS)
def scenario(request: pytest.FixtureRequest, place: Place) -> Scenario:
    return make_scenario(place, request.param)


def recorded(scenario: Scenario) -> list[Call]:
    """The calls of the scenario's command, which nothing breaks."""
    scenario.set_up()
    record = scenario.place.root / "record"
    outcome = scenario.place.run(*scenario.arguments, fault=Fault(scenario.place.disk, record))
    assert outcome.code == 0, outcome
    return calls(record)


@pytest.fixture(scope="module")
def record(scenario: Scenario) -> list[Call]:
    return recorded(scenario)


# -- the calls as they are --------------------------------------------------------------------------------------------


def test_the_record_has_every_call_that_changes_the_disk(scenario: Scenario, record: list[Call]) -> None:
    disk = Disk(scenario.place.disk, scenario.before)
    for call in record:
        disk.apply(call)
    assert disk.visible() == tree(scenario.place.disk)


def test_files_are_made_under_temporary_names_that_no_two_processes_share(dump: Scenario) -> None:
    made = [{call.path for call in recorded(dump) if call.what == "create" and call.result >= 0} for _ in range(2)]
    assert all(is_temporary(path) for path in made[0] | made[1])
    shared = {path for path in made[0] & made[1] if not path.endswith(UNNAMED)}
    assert made[0]
    assert not shared, f"temporary names used twice: {shared}"


# -- calls that fail --------------------------------------------------------------------------------------------------


def test_a_call_that_fails_is_named_and_costs_nothing_that_was_there(scenario: Scenario, record: list[Call]) -> None:
    faults = [fault for call in record for fault in _faults(scenario, call)]
    if TIER == "one":
        chosen = one_of_each_kind(faults, scenario.name)
    else:
        chosen = spread(faults, often(0, 40, len(faults) if scenario.name in EVERY else 400), scenario.name)
    counted: Counter[str] = Counter()
    failures = []
    for fault in chosen:
        try:
            counted[try_fault(scenario, fault)] += 1
        except AssertionError as error:
            failures.append(str(error))
    print(f"\n{scenario.name}: {len(chosen)} of {len(faults)} faults tried: {dict(counted)}, {len(failures)} failed")
    assert not failures, "\n\n".join(failures[:20])


def one_of_each_kind(faults: list[Fault], name: str) -> list[Fault]:
    """One fault of each kind, drawn with `SEED`; the scenarios share the kinds among them."""
    draw = random.Random(f"{SEED} {name}")  # noqa: S311 (as below)
    kinds = sorted({(fault.how, fault.code, fault.sticky) for fault in faults})
    mine = kinds[SCENARIOS.index(name) :: len(SCENARIOS)]
    return [draw.choice([fault for fault in faults if (fault.how, fault.code, fault.sticky) == kind]) for kind in mine]


def spread(items: list[T], most: int, name: str) -> list[T]:
    """So many of them at most: one out of each stretch of equal length, drawn with `SEED`."""
    draw = random.Random(f"{SEED} {name}").random  # noqa: S311 (a sample of tests, not a secret)
    count = min(most, len(items))
    return [items[int((number + draw()) * len(items) / count)] for number in range(count)]


def _faults(scenario: Scenario, call: Call) -> Iterator[Fault]:
    for kind in (*KINDS.get(call.what, ()), *(_SIGNALS if call.number >= 0 else ())):
        yield Fault(scenario.place.disk, None, call.number, kind.how, kind.code, kind.sticky)


def try_fault(scenario: Scenario, fault: Fault) -> str:
    """Break one call; what became of it. Fails where the promise is not kept."""
    scenario.set_up()
    outcome = scenario.place.run(*scenario.arguments, fault=fault)
    killed = fault.how.startswith("kill")
    if killed:
        assert outcome.code in (-signal.SIGKILL, 0), outcome
    else:
        check_outcome(outcome, fault)
    check_after(scenario, outcome, fault, left=killed or (fault.how == "error" and bool(fault.sticky)))
    return "killed" if outcome.code < 0 else "refused" if outcome.code else "harmless"


# -- power cuts -------------------------------------------------------------------------------------------------------


def test_a_power_cut_after_any_call_costs_nothing_acknowledged(scenario: Scenario, record: list[Call]) -> None:
    states = check_cuts(scenario, record)
    chosen = spread(states, often(1, 4, len(states)), scenario.name)
    for state in chosen:
        put_tree(scenario.place.disk, state)
        check_same(scenario.place.finish(*scenario.again), scenario.after)
    print(f"\n{scenario.name}: {len(states)} different disks after a power cut, {len(chosen)} resumed")


def check_cuts(scenario: Scenario, done: list[Call]) -> list[Tree]:
    """Check every disk that a power cut could leave; returns those that differ in more than temporaries."""
    place = scenario.place
    disk = Disk(place.disk, scenario.before)
    acknowledged, samples = scenario.acknowledged, 0
    seen: dict[int, Tree] = {}
    for call in done:
        if call.what == "say" and b"saved:" in call.content:
            put_tree(place.disk, disk.visible())
            acknowledged = acknowledged | stored_rows(place.cache)
            samples = acknowledged_samples(call.content.decode())
        if not disk.apply(call) or (call.what != "rename" and is_temporary(call.path)):
            continue  # nothing but a temporary is another
        for cut in CUTS:
            state = disk.after_a_cut(cut)
            known = hash((samples, tuple(sorted(item for item in state.items() if _matters(*item)))))
            if known in seen:
                continue
            seen[known] = state
            put_tree(place.disk, state)
            try:
                assert samples <= complete_samples(check_rows(place.cache, place.right, acknowledged))
                check_served(place.cache, place.right, whole=scenario.whole)
                check_exported(scenario, durable=True)
            except AssertionError as error:
                raise AssertionError(f"{scenario.name}, power cut ({cut}) after call {call}: {error}") from error
    for cut in CUTS:
        finished = disk.after_a_cut(cut)
        check_same(_without_row_files(finished), _without_row_files(disk.visible()))
    return list(seen.values())


def _matters(name: str, content: bytes | None) -> bool:
    """Whether a state differs for our purposes. The view is for other readers; its states are for the full run."""
    return content is not None and not is_temporary(name) and (FULL or not ROW_FILE.match(f"/{name}"))


def _without_row_files(content: Tree) -> Tree:
    return {name: data for name, data in content.items() if not ROW_FILE.match(f"/{name}")}
