"""Every bit flipped, every length cut: a reader gives right values or a typed refusal, and the audit names the file.

Each damage is done in place to a small finished cache, then `LogitCache` reads every row and the audit looks at
everything, in a forked child: a crash or a hang is counted, it does not end the suite. ``KD_CACHE_FAULTS=full`` tries
every bit and every length; `make faults` tries all of them where a byte has a meaning of its own (a pack's first 64
bytes, the header of a ``.npy``, the index's last 64 bytes) and an even spread of the rest; the gate a few of each.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny_teachers
from conftest import TINY, World
from fault_tools import FULL, LIMIT, often
from hostile_fence import Work, each_fenced
from store_fixtures import (
    MadeCache,
    Rows,
    byte_rows,
    forks,
    md5,
    name_in_index,
    named_packs,
    names,
    origin,
    seal_bytes,
    two_teachers,
)
from typer.testing import CliRunner

from kd_cache.care.verify import VerifyJob, verify_cache
from kd_cache.cli import app
from kd_cache.errors import KDCacheError
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.store import pack as pack_module
from kd_cache.store.cache import CacheFolder
from kd_cache.store.pack import open_pack
from kd_cache.store.snapshot import Snapshot

pytestmark = [pytest.mark.faults, LIMIT, forks]

ONE = ("--teacher", "tiny=tiny_teachers:linear", "--only", "tiny")
RIGHT, REFUSED, WRONG = "right", "refused", "served wrong"
REPORTED, UNREPORTED = "reported", "not reported"
UNTYPED, CRASHED, HUNG = "untyped error", "crashed", "hung"
Check = Callable[[], str]
"""Looks at the damaged cache and says which of these it saw."""


# -- damage -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """What happens to a file: bytes replaced (or appended, at its end), and its end cut off."""

    what: str
    patches: tuple[tuple[int, bytes], ...] = ()
    size: int | None = None

    def on(self, content: bytes) -> bytes:
        damaged = bytearray(content[: self.size])
        for at, piece in self.patches:
            damaged[at : at + len(piece)] = piece
        return bytes(damaged)


def flip(content: bytes, bit: int) -> Damage:
    return Damage(f"bit {bit} flipped", ((bit // 8, bytes([content[bit // 8] ^ 1 << bit % 8])),))


def spread(count: int, most: int, critical: Sequence[int] = ()) -> list[int]:
    """Numbers below ``count``: all of them in full, else the critical ones and about ``most``, evenly spaced.

    In the gate a twelfth of these.
    """
    if FULL:
        return list(range(count))
    step = max(1, count // most) | 1  # odd, so that every bit of a byte has its turn
    chosen = sorted({*range(0, count, step), *(number for number in critical if 0 <= number < count)})
    return chosen[:: often(13, 1, 1)]


def single_faults(content: bytes, critical: Sequence[int], most: int = 500) -> list[Damage]:
    """Single-bit flips, truncations, and one byte appended. ``critical``: the bytes whose every bit is always tried."""
    size = len(content)
    bits = spread(8 * size, most, [8 * byte + bit for byte in critical for bit in range(8)])
    lengths = spread(size, most // 4, [0, 1, size - 1, *critical])
    surplus = range(256) if FULL else b"\0\n }1\xff"[: often(2, 5, 5)]
    return [
        *(flip(content, bit) for bit in bits),
        *(Damage(f"cut to {length} bytes", size=length) for length in lengths),
        *(Damage(f"byte {byte} appended", ((size, bytes([byte])),)) for byte in surplus),
    ]


def sector_faults(content: bytes, sector: int = 512, most: int = 200) -> list[Damage]:
    """Sectors zeroed, swapped, or overwritten with each other, and bursts of random bytes; whatever makes a change."""
    starts = range(0, len(content), sector)
    pieces = {start: content[start : start + sector] for start in starts}
    pairs = [(a, b) for a in starts for b in starts if a != b and len(pieces[a]) == len(pieces[b])]
    random = np.random.default_rng(20)
    bursts = [(int(random.integers(len(content))), random.bytes(int(random.integers(2, 65)))) for _ in range(most)]
    damages = [
        *(Damage(f"sector at {at} zeroed", ((at, bytes(len(piece))),)) for at, piece in pieces.items()),
        *(Damage(f"sectors {a} and {b} swapped", ((a, pieces[b]), (b, pieces[a]))) for a, b in pairs if a < b),
        *(Damage(f"sector {a} written over {b}", ((b, pieces[a]),)) for a, b in pairs),
        *(Damage(f"{len(piece)} random bytes at {at}", ((at, piece[: len(content) - at]),)) for at, piece in bursts),
    ]
    changing = [damage for damage in damages if damage.on(content) != content]
    return [changing[number] for number in spread(len(changing), most)]


# -- trying it, where neither a crash nor a hang ends the suite -------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """What each check saw, over all damages tried, and remarks on what it should not have seen."""

    seen: dict[str, Counter[str]]
    notes: list[str]

    def of(self, check: str) -> dict[str, int]:
        return dict(self.seen[check])


def trial(path: Path, damages: Sequence[Damage], checks: dict[str, Check], scratch: Path) -> Tally:
    """Do each damage to ``path`` and run the checks on it, in a child that may crash or hang: then all of them did."""
    content = path.read_bytes()

    def tried(damage: Damage) -> Work:
        def work() -> dict[str, Any]:
            path.write_bytes(damage.on(content))
            return {"value": {name: seen_by(check) for name, check in checks.items()}}

        return work

    try:
        outcomes = each_fenced([([tried(damage)], scratch) for damage in damages])
    finally:
        path.write_bytes(content)
    tally = Tally({name: Counter() for name in checks}, [])
    for damage, (outcome,) in zip(damages, outcomes, strict=True):
        died = HUNG if outcome.killed in ("SIGPROF", "SIGALRM") else CRASHED
        for name, seen in (outcome.value or dict.fromkeys(checks, died)).items():
            tally.seen[name][seen.partition(":")[0]] += 1
            if seen not in (RIGHT, REFUSED, REPORTED):
                tally.notes.append(f"{damage.what}: {name}: {seen}")
    return tally


def seen_by(check: Check) -> str:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 (an untyped error is what is looked for)
        return f"{UNTYPED}: {error!r}"


# -- the cache and what looks at it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A cache made by ``kd-cache dump``, never damaged itself, and what its rows are."""

    world: World
    files: tuple[str, ...]
    expected: bytes

    def find(self, pattern: str) -> Path:
        return next(iter(sorted(self.world.cache.glob(pattern))))


def finish(root: Path, teachers: Sequence[str], read: Sequence[str]) -> Finished:
    """Dump three samples; the values expected of ``read`` are those that ``np.load`` finds in the view."""
    world = World(root)
    for number, device in enumerate("AAb"):
        world.add(number, device, "train", frames=4)
    world.write()
    options = ["dump", "--target", "b", "--json-path", str(world.json_path), *teachers]
    with chdir(root):
        for part in ([], ["--shard", "0/2"]):  # the part leaves its record for a seal to come
            result = CliRunner().invoke(app, [*options, *part], prog_name="kd-cache")
            assert result.exit_code == 0, result.output
    files = tuple(world.permitted())
    rows = np.stack([[np.load(world.view(teacher, file)) for teacher in read] for file in files])
    for at, (file, teacher) in enumerate((file, teacher) for file in files for teacher in read):
        weight = getattr(tiny_teachers, {"tiny": "linear"}.get(teacher, teacher))(None).weight.numpy()
        by_hand = np.load(world.feature(file)).astype("f8").mean(axis=0) @ weight
        np.testing.assert_allclose(rows.reshape(-1, 10)[at], by_hand, atol=1e-4)
    return Finished(world, files, rows.tobytes())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(tmp_path_factory.mktemp("one"), ONE, ["tiny"])


@pytest.fixture(scope="module")
def made_of_two(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(tmp_path_factory.mktemp("two"), (*TINY, "--only", "tiny", "--only", "other"), ["tiny", "other"])


@pytest.fixture
def finished(made: Finished, tmp_path: Path) -> Finished:
    """A copy of the cache to damage; the data stay where they are."""
    return copied(made, tmp_path)


def copied(made: Finished, tmp_path: Path) -> Finished:
    shutil.copytree(made.world.cache, tmp_path / "cache" / "A2b")
    return Finished(Copy(made.world.root, made.world.rows, tmp_path / "cache" / "A2b"), made.files, made.expected)


@dataclass
class Copy(World):
    """A world whose cache is elsewhere."""

    at: Path = Path()

    @property
    def cache(self) -> Path:
        return self.at


def reading(path: Path, files: Sequence[str], expected: bytes, verify: str = "full") -> Check:
    """Open the cache and read these rows by their files' names."""

    def check() -> str:
        try:
            values = LogitCache.open(path, verify=verify, strict=True).batch(files).numpy()
        except KDCacheError:
            return REFUSED
        return RIGHT if values.tobytes() == expected else WRONG

    return check


def reader(cache: Finished, verify: str = "full") -> Check:
    return reading(cache.world.cache, cache.files, cache.expected, verify)


def audit_job(cache: Finished) -> VerifyJob:
    """The job of ``kd-cache verify --all``, teachers loaded."""
    teachers = {"tiny": tiny_teachers.linear(None), "other": tiny_teachers.other(None)}
    return VerifyJob(Snapshot(CacheFolder(cache.world.cache)), cache.world.data(), teachers=teachers, n=None)


def auditor(cache: Finished, path: Path) -> Check:
    """Everything is verified; a problem must name the damaged file."""
    job = audit_job(cache)

    def check() -> str:
        report = verify_cache(job)
        named = any(path.name in f"{problem.file} {problem.reason}" for problem in report.problems)
        return REPORTED if named and report.exit_code else UNREPORTED

    return check


# -- single faults ----------------------------------------------------------------------------------------------------


def test_the_undamaged_cache_reads_right_and_verifies(finished: Finished) -> None:
    assert [reader(finished, verify)() for verify in ("auto", "full", "lazy", "off")] == [RIGHT] * 4
    assert verify_cache(audit_job(finished)).problems == []


@pytest.mark.parametrize("which", ["packs/tiny-*.h5", "cache_index.json", "permitted-*.npy", "tiny/*.npy"])
def test_no_damage_gives_a_wrong_value_and_the_audit_names_it(finished: Finished, which: str, tmp_path: Path) -> None:
    """Flips, cuts, bytes appended; lost and swapped sectors, and bursts. A reader does not use the view's files."""
    path = finished.find(which)
    content = path.read_bytes()
    view, size = which == "tiny/*.npy", len(content)
    critical = {".h5": range(96), ".json": range(size - 64, size)}.get(path.suffix, range(128, 148))
    damages = single_faults(content, critical, most=100 if view else 500)
    damages += sector_faults(content, sector=512 if size > 512 else 64)
    checks = {"full": reader(finished), "lazy": reader(finished, "lazy"), "audit": auditor(finished, path)}
    if "packs" in which:
        checks["off"] = reader(finished, "off")
    tally = trial(path, damages, checks, tmp_path)
    read = RIGHT if view else REFUSED
    assert tally.of("full") == {read: len(damages)}, tally.notes
    # Lazily, what lies in no row that is read and in no structure goes unnoticed, and harms nobody.
    assert tally.of("lazy").keys() <= {read, RIGHT if "packs" in which else read}, tally.notes
    assert tally.of("audit") == {REPORTED: len(damages)}, tally.notes
    # A reader told to believe the disk neither crashes nor hangs.
    assert "off" not in checks or tally.of("off").keys() <= {RIGHT, REFUSED, WRONG}, tally.notes


def test_no_damage_to_a_pack_of_top_k_rows_gives_a_wrong_value(tmp_path: Path) -> None:
    made_by, rows = origin("wide", 512, "topk:3", num_classes="512"), Rows.of(names(3), 512)
    rows.logits, _ = made_by.encoded(rows.logits)
    (tmp_path / "packs").mkdir()
    path = rows.write(tmp_path / "packs", made_by)
    MadeCache(tmp_path, {"wide": rows}, {"wide": made_by}).write_index(files=False)

    def dense(verify: str) -> bytes:
        return bytes(LogitCache.open(tmp_path, verify=verify, strict=True).batch(rows.files).dense(2.0).numpy().data)

    def reading_topk(verify: str) -> Check:
        def check() -> str:
            try:
                return RIGHT if dense(verify) == expected else WRONG
            except KDCacheError:
                return REFUSED

        return check

    expected = dense("full")
    damages = single_faults(path.read_bytes(), range(64))
    tally = trial(path, damages, {each: reading_topk(each) for each in ("full", "lazy")}, tmp_path)
    assert tally.of("full") == {REFUSED: len(damages)}, tally.notes
    assert tally.of("lazy").keys() <= {REFUSED, RIGHT}, tally.notes


@pytest.mark.parametrize("which", ["plan.json", "pending/*.json"])
def test_damage_to_what_only_a_dump_reads_does_not_reach_a_reader(
    finished: Finished, which: str, tmp_path: Path
) -> None:
    path = finished.find(which)
    damages = single_faults(path.read_bytes(), (), most=100)
    damages = damages[:: -(-len(damages) // 1_000)]  # readers do not open it: every bit would show no more
    tally = trial(path, damages, {"full": reader(finished)}, tmp_path)
    assert tally.of("full") == {RIGHT: len(damages)}, tally.notes


ROW_DATASETS = ("keys", "inputs", "checksums", "logits")


def row_bytes(path: Path) -> dict[str, tuple[int, int]]:
    """Where a pack's row-wise datasets lie in the file: offset, and bytes per row; by h5py alone."""
    with h5py.File(path, "r") as file:
        sets = {name: file[name] for name in ROW_DATASETS}
        return {name: (one.id.get_offset(), one.nbytes // len(one)) for name, one in sets.items()}


def swapped_rows(content: bytes, places: dict[str, tuple[int, int]], which: Sequence[str], a: int, b: int) -> Damage:
    """Rows ``a`` and ``b`` change places in these datasets."""
    patches = []
    for name in which:
        start, width = places[name]
        one, other = (content[start + row * width : start + (row + 1) * width] for row in (a, b))
        patches += [(start + a * width, other), (start + b * width, one)]
    return Damage(f"rows {a} and {b} of {'+'.join(which)} swapped", tuple(patches))


WHICH = [*((name,) for name in ROW_DATASETS), ("logits", "checksums"), ("keys", "inputs"), ("inputs", "logits")]
PAIRS = [(0, 1), (0, 2), (1, 2)]


def test_rows_swapped_between_two_keys_are_refused_and_named(finished: Finished, tmp_path: Path) -> None:
    path = finished.find("packs/tiny-*.h5")
    content, places = path.read_bytes(), row_bytes(path)
    damages = [swapped_rows(content, places, which, a, b) for which in WHICH for a, b in PAIRS]
    tally = trial(path, damages, {"full": reader(finished), "audit": auditor(finished, path)}, tmp_path)
    assert tally.of("full") == {REFUSED: len(damages)}, tally.notes
    assert tally.of("audit") == {REPORTED: len(damages)}, tally.notes


@pytest.mark.parametrize("which", WHICH, ids="+".join)
def test_the_audit_finds_swapped_rows_by_their_own_checksums_even_under_a_correct_digest(
    finished: Finished, which: tuple[str, ...]
) -> None:
    """The file's digest and name say that all is well: what is left are the row checksums (and the view)."""
    path = finished.find("packs/tiny-*.h5")
    content, places, keys = path.read_bytes(), row_bytes(path), open_pack(path).keys
    shutil.rmtree(finished.world.cache / "tiny")
    for a, b in PAIRS:
        path.unlink()
        path = seal_bytes(path.parent, swapped_rows(content, places, which, a, b).on(content)[512:], "tiny", keys=keys)
        name_in_index(path)
        problems = verify_cache(audit_job(finished)).problems
        found = {(problem.kind, problem.file) for problem in problems if problem.kind == "corrupt"}
        found.discard(("corrupt", "(all rows)"))  # the accuracy, where the swap moved it
        assert reader(finished, "lazy")() == REFUSED
        by_row = sorted(finished.files, key=md5)
        unsorted = "keys" in which
        assert found == ({("corrupt", str(path))} if unsorted else {("corrupt", by_row[row]) for row in (a, b)})


def test_files_in_each_others_place_are_refused_and_named(made_of_two: Finished, tmp_path: Path) -> None:
    cache = copied(made_of_two, tmp_path)
    tiny, other, view, another_view, index = (
        cache.find(pattern) for pattern in ("packs/tiny-*", "packs/other-*", "tiny/e*", "tiny/d*", "cache_index.json")
    )
    assert reader(cache)() == RIGHT

    def is_now(path: Path) -> Damage:
        return Damage(f"it is {path.name} now", ((0, path.read_bytes()),), size=0)

    places = {
        tiny: ([is_now(other), is_now(index), is_now(view)], REFUSED),
        index: ([is_now(tiny), is_now(view)], REFUSED),
        view: ([is_now(another_view), is_now(cache.world.cache / "other" / view.name), is_now(tiny)], RIGHT),
    }
    for path, (damages, expected) in places.items():
        tally = trial(path, damages, {"full": reader(cache), "audit": auditor(cache, path)}, tmp_path)
        assert tally.of("full") == {expected: len(damages)}, tally.notes
        assert tally.of("audit") == {REPORTED: len(damages)}, tally.notes
    first, second = tiny.read_bytes(), other.read_bytes()
    tiny.write_bytes(second)
    other.write_bytes(first)
    assert reader(cache)() == REFUSED
    assert auditor(cache, tiny)() == auditor(cache, other)() == REPORTED


# -- a pack that is mapped --------------------------------------------------------------------------------------------

MANY = 12_000


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> MadeCache:
    """One teacher's pack of more than a mebibyte, so that it is mapped rather than read."""
    files = sorted(names(MANY), key=md5)
    keys = byte_rows([md5(file) for file in files])
    logits = np.random.default_rng(5).normal(0, 3, (MANY, 10)).astype("<f4")
    path = tmp_path_factory.mktemp("mapped") / "A2b"
    (path / "packs").mkdir(parents=True)
    made = MadeCache(path, {"scene": Rows(files, keys, keys, logits)}, {"scene": origin("scene", 10)})
    pack = made.rows["scene"].write(path / "packs", made.origins["scene"])
    assert pack.stat().st_size > pack_module.MAPPED
    made.write_index()
    return made


def test_damage_to_a_mapped_pack_is_refused(mapped: MadeCache, tmp_path: Path) -> None:
    (path,) = (mapped.path / "packs").iterdir()
    rows = mapped.rows["scene"]
    some = [*rows.files[::97], *rows.files]
    expected = rows.logits[::97].tobytes() + rows.logits.tobytes()
    content = path.read_bytes()
    bits = range(0, 8 * len(content), 8 * len(content) // often(12, 90, 4_000) | 1)
    sizes = range(0, len(content), len(content) // often(4, 20, 500) | 1)
    damages = [
        *(flip(content, bit) for bit in bits),
        *(Damage(f"cut to {size} bytes", size=size) for size in sizes),
    ]
    checks = {verify: reading(mapped.path, some, expected, verify) for verify in ("full", "lazy")}
    assert [check() for check in checks.values()] == [RIGHT, RIGHT]
    tally = trial(path, damages, checks, tmp_path)
    assert tally.of("full") == {REFUSED: len(damages)}, tally.notes
    assert tally.of("lazy").keys() <= {RIGHT, REFUSED}, tally.notes


def test_damage_to_one_of_many_packs_gives_no_wrong_value(tmp_path: Path) -> None:
    """One for each of two teachers is the readers'; of the others, of dumps that were killed, they know nothing."""
    made = two_teachers(tmp_path / "A2b", count=12, packs=3)
    named = set(named_packs(made.path / "cache_index.json").values())
    made.rows["scene"].part([1, 5, 6]).write(made.path / "packs", made.origins["scene"])
    expected = made.stacked(names(12)).tobytes()
    checks = {verify: reading(made.path, names(12), expected, verify) for verify in ("full", "lazy")}
    assert [check() for check in checks.values()] == [RIGHT, RIGHT]
    for path in sorted((made.path / "packs").iterdir())[:: often(4, 4, 1)]:
        content = path.read_bytes()
        bits = range(0, 8 * len(content), 8 * len(content) // often(12, 40, 500) | 1)
        damages = [flip(content, bit) for bit in bits]
        tally = trial(path, damages, checks, tmp_path)
        assert tally.of("full") == {REFUSED if path.name in named else RIGHT: len(damages)}, tally.notes
        assert tally.of("lazy").keys() <= {RIGHT, REFUSED}, tally.notes


# -- the trial itself -------------------------------------------------------------------------------------------------


def test_a_check_that_crashes_fails_or_is_fooled_is_counted(tmp_path: Path) -> None:
    """The oracle of this file: a faulty product must show. (That one which hangs does: test_hostile.)"""
    path = tmp_path / "file"
    path.write_bytes(bytes(4))

    def check() -> str:
        at = path.read_bytes().index(1)
        if at == 1:
            faulthandler.disable()  # it would print where
            os.kill(os.getpid(), signal.SIGSEGV)
        if at == 2:
            raise ValueError("nobody expects this")
        return WRONG if at == 3 else RIGHT

    damages = [Damage(f"byte {at} set", ((at, b"\1"),)) for at in range(4)]
    tally = trial(path, damages, {"check": check}, tmp_path)
    assert tally.of("check") == {RIGHT: 1, CRASHED: 1, UNTYPED: 1, WRONG: 1}
    assert tally.notes[1:] == [
        "byte 2 set: check: untyped error: ValueError('nobody expects this')",
        "byte 3 set: check: served wrong",
    ]
    assert path.read_bytes() == bytes(4)
