"""Every bit flipped, every length cut: a reader gives right values or a typed refusal, and the audit names the file.

Each damage is done in place to a small finished cache, then `LogitCache` reads every row and the audit looks at
everything, in a forked child: a crash or a hang is counted, it does not end the suite. ``KD_CACHE_FAULTS=full`` tries
every bit and every length; `make faults` tries all of them where a byte has a meaning of its own (a pack's first 64
bytes, the header of a ``.npy``, the index's last 64 bytes) and an even spread of the rest; the gate a few of each.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny_teachers
from conftest import TINY, World
from fault_tools import FULL, LIMIT, often
from store_fixtures import (
    MadeCache,
    Rows,
    byte_rows,
    forks,
    md5,
    name_in_index,
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
from kd_cache.store.index import read_index
from kd_cache.store.snapshot import Snapshot

pytestmark = [pytest.mark.faults, LIMIT, forks]

ONE = ("--teacher", "tiny=tiny_teachers:linear", "--only", "tiny")
HANG_SECONDS = 120
RIGHT, REFUSED, WRONG = "right", "refused", "served wrong"
REPORTED, UNREPORTED = "reported", "not reported"
UNTYPED, CRASHED, HUNG = "untyped error", "crashed", "hung"
OUTCOMES = ("untried", RIGHT, REFUSED, WRONG, REPORTED, UNREPORTED, UNTYPED, CRASHED, HUNG)

Check = Callable[[], str]
"""Looks at the damaged cache and says which of `OUTCOMES` it saw."""


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


@contextmanager
def damaging(path: Path) -> Iterator[Callable[[Damage], None]]:
    """``damage(one)`` does this one damage to the file, and none of those before. It is whole again at the end."""
    content = path.read_bytes()
    with path.open("r+b", buffering=0) as file:

        def put(wanted: bytes) -> None:
            os.pwrite(file.fileno(), wanted, 0)
            os.ftruncate(file.fileno(), len(wanted))

        try:
            yield lambda damage: put(damage.on(content))
        finally:
            put(content)
    assert path.read_bytes() == content


# -- trying it, where neither a crash nor a hang ends the suite -------------------------------------------------------


@dataclass
class Tally:
    """What each check saw, over all damages tried."""

    tried: Counter[str] = field(default_factory=Counter)
    seen: dict[str, Counter[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def of(self, check: str) -> dict[str, int]:
        return dict(self.seen[check])

    @property
    def line(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.tried.items())
        results = "; ".join(
            f"{check}: {', '.join(f'{count:,} {outcome}' for outcome, count in sorted(found.items()))}"
            for check, found in self.seen.items()
        )
        return f"{self.tried.total():,} faults ({kinds}) in {self.seconds:.1f} s → {results}"


def kind(damage: Damage) -> str:
    words = (("flipped", "flips"), ("cut", "truncations"), ("appended", "appended"))
    return next((name for word, name in words if word in damage.what), "multi-byte")


def trial(path: Path, damages: Sequence[Damage], checks: dict[str, Check], scratch: Path) -> Tally:
    """Do each damage to ``path`` and run the checks on it, in a forked child; a fresh one after a crash or a hang."""
    began = time.monotonic()
    content = path.read_bytes()
    # A byte per damage and check, shared with the child: which of OUTCOMES it saw.
    shared = mmap.mmap(-1, max(1, len(damages) * len(checks)))
    seen = np.frombuffer(shared, np.uint8)[: len(damages) * len(checks)].reshape(len(damages), len(checks))
    notes = scratch / "notes.txt"
    notes.touch()
    while len(untried := np.flatnonzero((seen == 0).any(axis=1))):
        start = int(untried[0])
        end = in_child(lambda start=start: observe(path, damages, start, checks, seen, notes), seen)  # type: ignore[misc]
        path.write_bytes(content)
        if end is not None:
            at = int(np.flatnonzero((seen == 0).any(axis=1))[0])
            seen[at][seen[at] == 0] = OUTCOMES.index(end)
            with notes.open("a") as file:
                file.write(f"{damages[at].what}: {end}\n")
    found = {name: Counter(OUTCOMES[code] for code in seen[:, at].tolist()) for at, name in enumerate(checks)}
    lines = notes.read_text(errors="replace").splitlines()
    return Tally(Counter(map(kind, damages)), found, lines[:20], time.monotonic() - began)


def observe(
    path: Path, damages: Sequence[Damage], start: int, checks: dict[str, Check], seen: np.ndarray, notes: Path
) -> None:
    """What the child does, from the damage numbered ``start`` on."""
    with damaging(path) as damage, notes.open("a") as file:
        for number in range(start, len(damages)):
            damage(damages[number])
            for at, check in enumerate(checks.values()):
                try:
                    outcome = check()
                except Exception as error:  # noqa: BLE001 (an untyped error is what is looked for)
                    outcome = UNTYPED
                    file.write(f"{damages[number].what}: {error!r}\n")
                if outcome in (WRONG, UNREPORTED):
                    file.write(f"{damages[number].what}: {outcome}\n")
                seen[number, at] = OUTCOMES.index(outcome)


def in_child(work: Callable[[], None], progress: np.ndarray) -> str | None:
    """Run ``work`` in a forked child; says if it crashed, or hung without changing ``progress``."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    done, since = -1, time.monotonic()
    ended, status = 0, 0
    try:
        while not ended:
            time.sleep(0.005)
            ended, status = os.waitpid(child, os.WNOHANG)
            now = int(np.count_nonzero(progress))
            if now != done:
                done, since = now, time.monotonic()
            elif time.monotonic() - since > HANG_SECONDS:
                return HUNG
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return CRASHED if status else None


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


def told(capsys: pytest.CaptureFixture[str], name: str, tally: Tally) -> None:
    """The count tried is for whoever runs the suite."""
    with capsys.disabled():
        print(f"\n{name}: {tally.line}")


# -- single faults ----------------------------------------------------------------------------------------------------

# Which bytes have every bit tried in the default run too.
CRITICAL: dict[str, Callable[[int], Sequence[int]]] = {
    "packs/tiny-*.h5": lambda size: range(64),
    "tiny/*.npy": lambda size: range(128),
    "permitted-*.npy": lambda size: range(128, 148),
    "cache_index.json": lambda size: range(size - 64, size),
}


def test_the_undamaged_cache_reads_right_and_verifies(finished: Finished) -> None:
    assert [reader(finished, verify)() for verify in ("auto", "full", "lazy", "off")] == [RIGHT] * 4
    assert verify_cache(audit_job(finished)).problems == []


@pytest.mark.parametrize("which", ["packs/tiny-*.h5", "cache_index.json", "permitted-*.npy"])
def test_no_damage_to_what_readers_use_gives_a_wrong_value_and_the_audit_names_it(
    finished: Finished, which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished.find(which)
    content = path.read_bytes()
    damages = single_faults(content, CRITICAL[which](len(content)))
    checks = {"full": reader(finished), "lazy": reader(finished, "lazy"), "audit": auditor(finished, path)}
    tally = trial(path, damages, checks, tmp_path)
    told(capsys, which, tally)
    assert tally.of("full") == {REFUSED: len(damages)}, tally.notes
    # Lazily, what lies in no row that is read and in no structure goes unnoticed, and harms nobody.
    assert tally.of("lazy").keys() <= {REFUSED, RIGHT if "packs" in which else REFUSED}, tally.notes
    assert tally.of("audit") == {REPORTED: len(damages)}, tally.notes


def test_a_reader_told_to_believe_the_disk_does_not_crash_or_hang_on_a_damaged_pack(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished.find("packs/tiny-*.h5")
    damages = single_faults(path.read_bytes(), ())
    tally = trial(path, damages, {"off": reader(finished, "off")}, tmp_path)
    told(capsys, "packs/tiny-*.h5", tally)
    assert tally.of("off").keys() <= {RIGHT, REFUSED, WRONG}, tally.notes


def test_damage_to_the_view_does_not_reach_a_reader_and_the_audit_names_the_file(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished.find("tiny/*.npy")
    content = path.read_bytes()
    damages = single_faults(content, CRITICAL["tiny/*.npy"](len(content)), most=100)
    tally = trial(path, damages, {"audit": auditor(finished, path)}, tmp_path)
    told(capsys, "tiny/*.npy", tally)
    assert tally.of("audit") == {REPORTED: len(damages)}, tally.notes
    some = damages[:: often(11, 11, 1)]
    tally = trial(path, some, {"full": reader(finished)}, tmp_path)
    told(capsys, "tiny/*.npy", tally)
    assert tally.of("full") == {RIGHT: len(some)}, tally.notes


@pytest.mark.parametrize("which", ["plan.json", "pending/*.json"])
def test_damage_to_what_only_a_dump_reads_does_not_reach_a_reader(
    finished: Finished, which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished.find(which)
    damages = single_faults(path.read_bytes(), (), most=100)
    damages = damages[:: -(-len(damages) // 1_000)]  # readers do not open it: every bit would show no more
    tally = trial(path, damages, {"full": reader(finished)}, tmp_path)
    told(capsys, which, tally)
    assert tally.of("full") == {RIGHT: len(damages)}, tally.notes


@pytest.mark.parametrize("which", ["packs/tiny-*.h5", "tiny/*.npy", "cache_index.json"])
def test_the_command_names_the_damaged_file_too(finished: Finished, which: str) -> None:
    path = finished.find(which)
    content = path.read_bytes()
    size = len(content)
    damages = [
        *(flip(content, bit) for bit in range(3, 8 * size, size // 2 | 1)),
        *(Damage(f"cut to {length} bytes", size=length) for length in (0, size // 2, size - 1)),
        Damage("a line end appended", ((size, b"\n"),)),
    ]
    options = ["verify", "--target", "b", "--all", "--cache-root", str(finished.world.cache.parent)]
    with damaging(path) as damage:
        for one in damages:
            damage(one)
            result = CliRunner().invoke(app, [*options, *ONE[:2]], prog_name="kd-cache", env={"COLUMNS": "300"})
            assert result.exit_code in (1, 4), (one.what, result.output)
            assert path.name in result.stdout, one.what
            assert "Traceback" not in result.output


# -- damage of many bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["packs/tiny-*.h5", "tiny/*.npy", "cache_index.json"])
def test_lost_and_swapped_sectors_and_bursts_are_refused_and_named(
    finished: Finished, which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished.find(which)
    damages = sector_faults(path.read_bytes(), sector=64 if path.suffix == ".npy" else 512)
    tally = trial(path, damages, {"full": reader(finished), "audit": auditor(finished, path)}, tmp_path)
    told(capsys, which, tally)
    assert tally.of("full") == {RIGHT if path.suffix == ".npy" else REFUSED: len(damages)}, tally.notes
    assert tally.of("audit") == {REPORTED: len(damages)}, tally.notes


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
    content, places = path.read_bytes(), row_bytes(path)
    shutil.rmtree(finished.world.cache / "tiny")
    for a, b in PAIRS:
        path.unlink()
        path = seal_bytes(path.parent, swapped_rows(content, places, which, a, b).on(content)[512:], "tiny")
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


def test_damage_to_a_mapped_pack_is_refused(
    mapped: MadeCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        *sector_faults_of_a_large_file(content),
    ]
    checks = {verify: reading(mapped.path, some, expected, verify) for verify in ("full", "lazy")}
    assert [check() for check in checks.values()] == [RIGHT, RIGHT]
    tally = trial(path, damages, checks, tmp_path)
    told(capsys, "a mapped pack", tally)
    assert tally.of("full") == {REFUSED: len(damages)}, tally.notes
    assert tally.of("lazy").keys() <= {RIGHT, REFUSED}, tally.notes


def test_damage_to_one_of_many_packs_gives_no_wrong_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One for each of two teachers is the readers'; of the others, of dumps that were killed, they know nothing."""
    made = two_teachers(tmp_path / "A2b", count=12, packs=3)
    named = {entry["pack"] for entry in read_index(made.path / "cache_index.json").record["teachers"].values()}
    made.rows["scene"].part([1, 5, 6]).write(made.path / "packs", made.origins["scene"])
    expected = made.stacked(names(12)).tobytes()
    checks = {verify: reading(made.path, names(12), expected, verify) for verify in ("full", "lazy")}
    assert [check() for check in checks.values()] == [RIGHT, RIGHT]
    for path in sorted((made.path / "packs").iterdir())[:: often(4, 4, 1)]:
        content = path.read_bytes()
        bits = range(0, 8 * len(content), 8 * len(content) // often(12, 40, 500) | 1)
        damages = [flip(content, bit) for bit in bits]
        tally = trial(path, damages, checks, tmp_path)
        told(capsys, "one of seven packs", tally)
        assert tally.of("full") == {REFUSED if path.name in named else RIGHT: len(damages)}, tally.notes
        assert tally.of("lazy").keys() <= {RIGHT, REFUSED}, tally.notes


def sector_faults_of_a_large_file(content: bytes, sector: int = 512) -> list[Damage]:
    """Random sectors zeroed, and random pairs swapped."""
    random = np.random.default_rng(6)
    damages = []
    for _ in range(often(3, 10, 300)):
        a, b = (int(at) * sector for at in random.choice(len(content) // sector, 2, replace=False))
        one, other = content[a : a + sector], content[b : b + sector]
        damages += [
            Damage(f"sector at {a} zeroed", ((a, bytes(sector)),)),
            Damage(f"sectors {a} and {b} swapped", ((a, other), (b, one))),
        ]
    return [damage for damage in damages if damage.on(content) != content]


# -- the trial itself -------------------------------------------------------------------------------------------------


def test_a_check_that_crashes_hangs_or_is_fooled_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle of this file: a faulty product must show."""
    monkeypatch.setattr("test_faults_bits.HANG_SECONDS", 0.5)
    path = tmp_path / "file"
    path.write_bytes(bytes(5))

    def check() -> str:
        at = path.read_bytes().index(1)
        if at == 1:
            faulthandler.disable()  # it would print where
            os.kill(os.getpid(), signal.SIGSEGV)
        if at == 2:
            time.sleep(60)
        if at == 3:
            raise ValueError("nobody expects this")
        return WRONG if at == 4 else RIGHT

    damages = [Damage(f"byte {at} set", ((at, b"\1"),)) for at in range(5)]
    tally = trial(path, damages, {"check": check}, tmp_path)
    assert tally.of("check") == {RIGHT: 1, CRASHED: 1, HUNG: 1, UNTYPED: 1, WRONG: 1}
    assert tally.notes[-2:] == ["byte 3 set: ValueError('nobody expects this')", "byte 4 set: served wrong"]
    assert path.read_bytes() == bytes(5)
