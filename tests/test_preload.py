"""Where batches come from (``preload``), what they are copied into (``out``), and which row numbers are refused."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, World
from store_fixtures import MadeCache, Rows, forks, names, origin, two_teachers

from kd_cache import LogitCache, StaleError, UsageError
from kd_cache.cli.info import _reading
from kd_cache.files import page_cache
from kd_cache.serve import placement
from kd_cache.store.pack import CHECKED_AT_ONCE
from kd_cache.store.take import take_rows
from kd_cache.store.union import Union

PLACES: dict[str, Any] = {"table": True, "mapped": False}
GIB = 1 << 30


@pytest.fixture
def made(tmp_path: Path) -> MadeCache:
    return two_teachers(tmp_path / "A2b", dtype="fp16")


def equal(logits: torch.Tensor, expected: np.ndarray) -> None:
    assert logits.shape == expected.shape
    np.testing.assert_array_equal(logits.numpy(), expected.astype(logits.numpy().dtype))


# -- preload ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("packs", [1, 4])
@pytest.mark.parametrize("classes", [3, 700])
def test_every_place_serves_the_same_rows(tmp_path: Path, place: str, packs: int, classes: int) -> None:
    """700 classes: rows wide enough for their first values to be read ahead, and batches of several blocks."""
    made = two_teachers(tmp_path / "A2b", count=300, classes=classes, dtype="fp16", packs=packs)
    for teachers in (None, ["scene"], ["scene", "city2scene"]):
        cache = LogitCache.open(made.path, teachers, preload=PLACES[place])
        assert cache.preloaded == place
        files = [names(300)[number] for number in np.random.default_rng(0).permutation(300)]
        expected = made.stacked(files, teachers)
        for dtype in (None, torch.float32, torch.float64):
            logits = cache.batch(files, dtype)
            assert logits.is_contiguous()
            equal(logits, expected)


def test_the_table_is_made_at_once_on_request_and_else_before_it_is_needed(made: MadeCache) -> None:
    assert LogitCache.open(made.path, preload=True)._table is not None
    cache = LogitCache.open(made.path)
    assert (cache.preloaded, cache._table) == ("table", None)
    cache.rows(names(1))
    assert cache._table is not None
    cache = LogitCache.open(made.path)
    cache.batch(torch.tensor([3]))
    assert cache._table is not None
    mapped = LogitCache.open(made.path, preload=False)
    mapped.prepare()
    equal(mapped.batch(names(40)), made.stacked(names(40)))
    assert mapped._table is None


def test_auto_picks_by_size_check_and_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "available_memory", lambda: 8 * GIB)
    sizes = {GIB: "table", GIB + 1: "warmed", 4 * GIB: "warmed", 4 * GIB + 1: "mapped"}
    assert {size: placement.choose("auto", size, is_lazy=False) for size in sizes} == sizes
    assert placement.choose("auto", 40, is_lazy=True) == "warmed"
    assert {placement.choose(True, size, is_lazy=lazy) for size in sizes for lazy in (True, False)} == {"table"}
    assert {placement.choose(False, size, is_lazy=lazy) for size in sizes for lazy in (True, False)} == {"mapped"}
    workers = {1 << 26: "table", (1 << 26) + 1: "mapped", 4 * GIB: "mapped"}
    for preload in (True, "auto"):
        found = {size: placement.choose(preload, size, is_lazy=False, in_worker=True) for size in workers}
        assert found == workers


def test_preloading_everything_checks_everything_at_once() -> None:
    assert placement.check_of("auto", "auto", 10**9 + 1) == "lazy"
    assert placement.check_of("auto", True, 10**9 + 1) == "full"
    assert placement.check_of("auto", False, 10**9) == "full"
    assert placement.check_of("off", True, 10**9) == "off"


@pytest.mark.parametrize("wrong", ["yes", "table", None, 1, 0])
def test_another_preload_is_refused(made: MadeCache, wrong: Any) -> None:
    with pytest.raises(UsageError, match="expected True, False or auto"):
        LogitCache.open(made.path, preload=wrong)


def test_a_table_that_does_not_fit_is_refused_in_words(made: MadeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LogitCache.open(made.path)
    monkeypatch.setattr(cache._gatherer, "shape", (1 << 40, 2, 1 << 20))
    with pytest.raises(UsageError, match="do not fit into memory"):
        cache.prepare()


def test_advice_reaches_the_maps_of_large_packs_and_small_ones_need_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[int] = []
    monkeypatch.setattr(page_cache, "_RANDOM", 17)
    monkeypatch.setattr(page_cache, "_WILL_NEED", 19)
    monkeypatch.setattr(page_cache, "_POPULATE_READ", 23)

    class Mapping(page_cache.mmap.mmap):
        def madvise(self, option: int, *_: int) -> None:
            advised.append(option)

    monkeypatch.setattr("kd_cache.store.pack.mmap.mmap", Mapping)
    made = two_teachers(tmp_path / "large/A2b", count=200, classes=3000)
    assert min(path.stat().st_size for path in (made.path / "packs").iterdir()) > 1 << 20
    LogitCache.open(made.path, preload=False)
    assert advised == []  # it would fit into memory: what is read around a row is read for good
    with monkeypatch.context() as patch:
        patch.setattr(placement, "available_memory", lambda: 0)
        LogitCache.open(made.path, preload=False)
    assert advised == [17, 17]
    monkeypatch.setattr(placement, "TABLE_BYTES", 0)
    cache = LogitCache.open(made.path)
    assert advised == [17, 17, 19, 19]
    for _ in range(2):
        cache.attach(torch.utils.data.TensorDataset(torch.arange(2)), names(2))
    assert advised == [17, 17, 19, 19, 23, 23]  # once is enough
    LogitCache.open(two_teachers(tmp_path / "small/A2b").path, preload=False)
    assert len(advised) == 6


def test_a_kernel_that_does_not_know_the_advice_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = two_teachers(tmp_path / "A2b", count=200, classes=3000)
    monkeypatch.setattr(page_cache, "_POPULATE_READ", 9999)
    monkeypatch.setattr(placement, "TABLE_BYTES", 0)
    cache = LogitCache.open(made.path)
    cache.prepare()
    equal(cache.batch(names(200)), made.stacked(names(200)))
    monkeypatch.setattr(page_cache, "_POPULATE_READ", None)
    LogitCache.open(made.path).prepare()


def test_a_system_that_does_not_tell_its_free_memory_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert page_cache.available_memory() > 0
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert page_cache.available_memory() == 0


def test_another_process_makes_no_large_table_of_its_own(made: MadeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for preload in ("auto", True):
        sent = pickle.dumps(LogitCache.open(made.path, preload=preload))
        there = pickle.loads(sent)  # noqa: S301 (our own)
        assert (there.preloaded, there._table) == ("table", None)
        with monkeypatch.context() as patch:
            patch.setattr(placement, "WORKER_TABLE_BYTES", 10)
            there = pickle.loads(sent)  # noqa: S301 (our own)
        assert there.preloaded == "mapped"
        equal(there.batch(names(40)), made.stacked(names(40)))
    assert pickle.loads(pickle.dumps(LogitCache.open(made.path, preload=False))).preloaded == "mapped"  # noqa: S301


def private_bytes_of(cache: LogitCache, rows: torch.Tensor, answer: Any) -> None:
    """In a forked child: by how much its private memory grows while it reads everything."""

    def private() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))

    cache.batch(rows[:64])
    before = private()
    for start in range(0, len(rows), 64):
        cache.batch(rows[start : start + 64])
    answer.put(private() - before)


@forks
def test_a_forked_worker_copies_nothing_of_the_table(tmp_path: Path) -> None:
    made = two_teachers(tmp_path / "A2b", count=1000, classes=3000)
    cache = LogitCache.open(made.path)
    rows = cache.rows(names(1000))
    cache.prepare()
    context = multiprocessing.get_context("fork")
    answer: Any = context.Queue()
    child = context.Process(target=private_bytes_of, args=(cache, rows, answer))
    child.start()
    grown = answer.get(timeout=500)
    child.join()
    assert cache._gatherer.nbytes > 20_000_000
    assert grown < 5_000_000


# -- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_given_tensor_is_filled_whatever_its_dtype_and_strides(made: MadeCache, place: str) -> None:
    cache = LogitCache.open(made.path, preload=PLACES[place])
    rows, expected = cache.rows(names(9)), made.stacked(names(9))
    outs = {
        "stored": torch.empty(9, 2, 3, dtype=torch.float16),
        "wider": torch.empty(9, 2, 3),
        "other way round": torch.empty(2, 9, 3, dtype=torch.float16).transpose(0, 1),
        "part of more": torch.empty(9, 4, 3, dtype=torch.float16)[:, 1:3],
        "wider part": torch.empty(18, 2, 3)[::2],
    }
    for out in outs.values():
        assert cache.batch(rows, out=out) is out
        equal(out, expected)
    assert cache.batch(names(9), out=outs["wider"]) is outs["wider"]
    assert cache.batch(rows, torch.float32, outs["wider"]) is outs["wider"]
    assert cache.batch(rows, out=torch.empty(9, 2, 3, device="meta")).device.type == "meta"


@pytest.mark.parametrize("place", PLACES)
def test_missing_rows_are_nan_in_a_given_tensor_too(made: MadeCache, place: str) -> None:
    cache = LogitCache.open(made.path, on_miss="nan", preload=PLACES[place])
    rows = torch.tensor([-1, *cache.rows(names(3)).tolist(), -1])
    out = torch.zeros(5, 2, 3)
    assert cache.batch(rows, out=out) is out
    equal(out[1:4], made.stacked(names(3)))
    assert out[[0, 4]].isnan().all()


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(8, 2, 3, dtype=torch.float16),
        torch.empty(9, 3, 2, dtype=torch.float16),
        torch.empty(9, 6, dtype=torch.float16),
        torch.empty(9, 2, 3, dtype=torch.int64),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_and_left_alone(made: MadeCache, out: torch.Tensor) -> None:
    before = out.clone()
    with pytest.raises(UsageError, match=r"expected out as floating-point \[9, 2, 3\], found"):
        LogitCache.open(made.path).batch(names(9), out=out)
    np.testing.assert_array_equal(out.numpy(), before.numpy())
    with pytest.raises(UsageError, match=r"expected out as torch.float64 "):
        LogitCache.open(made.path).batch(names(9), torch.float64, torch.empty(9, 2, 3))


# -- row numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_row_numbers_of_any_signed_width_and_stride_count(made: MadeCache, place: str, dtype: str) -> None:
    cache = LogitCache.open(made.path, preload=PLACES[place])
    rows = cache.rows(names(12)).numpy().astype(dtype)
    equal(cache.batch(rows[::-2]), made.stacked(names(12)[::-2]))
    equal(cache.batch(torch.from_numpy(rows)[1::3]), made.stacked(names(12)[1::3]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("on_miss", ["raise", "nan"])
def test_whatever_is_no_row_number_is_refused(made: MadeCache, place: str, on_miss: str) -> None:
    cache = LogitCache.open(made.path, preload=PLACES[place], on_miss=on_miss)
    low, high = -(1 << 63), (1 << 63) - 1
    for wrong in ([40], [0, 40, 1], [-2], [0, -2], [low], [high], [3, low, 5], [low + 1], [high - 1]):
        with pytest.raises(IndexError, match=r"rows must lie in \[0, 40\)"):
            cache.batch(torch.tensor(wrong))
    for odd in (
        torch.zeros(2), torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.uint8), np.zeros(2, np.uint64),
        torch.zeros(1, 2, dtype=torch.int64), torch.tensor(3), np.array(["x/clip-0-a.npy"]),
    ):  # fmt: skip
        with pytest.raises(IndexError, match=r"rows must be integers \[B\]"):
            cache.batch(odd)
    with pytest.raises(UsageError, match="expected files as texts"):
        cache.batch([0, 1])  # type: ignore[list-item]
    if on_miss == "raise":
        with pytest.raises(IndexError, match="found -1 to 0"):
            cache.batch(torch.tensor([0, -1]))


def test_rows_are_copied_from_where_they_are() -> None:
    source = np.arange(5000, dtype="<f4").reshape(10, 500)
    out = np.empty((3, 500), "<f4")
    take_rows(source, np.array([9, 0, 4]), out)
    np.testing.assert_array_equal(out, source[[9, 0, 4]])
    take_rows(source[:, :3].copy(), np.array([], np.int64), out[:0, :3].copy())


# -- many packs, checked as they are read -----------------------------------------------------------------------------


def test_packs_that_are_checked_already_are_asked_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kd_cache.store.pack import Pack, open_pack

    rows = Rows.of(names(2 * CHECKED_AT_ONCE), 3)
    for part in range(2):
        rows.part(range(part, len(rows), 2)).write(tmp_path, origin())
    union = Union([open_pack(path, "lazy") for path in tmp_path.iterdir()])
    asked: list[str] = []
    touch = Pack.touch

    def counted(self: Pack, wanted: np.ndarray) -> None:
        asked.append(self.path.name)
        touch(self, wanted)

    monkeypatch.setattr(Pack, "touch", counted)
    first = np.flatnonzero(union.pack_no == 0)[:5]
    np.testing.assert_array_equal(union.take(first), rows.logits[first])
    assert asked == [union.packs[0].path.name]  # the other holds none of these
    everything = np.arange(len(union))
    np.testing.assert_array_equal(union.take(everything), rows.logits)
    assert asked == [union.packs[0].path.name, union.packs[1].path.name]  # the first was a single block
    union.take(everything)
    union.touch(everything)
    assert len(asked) == 2
    assert union.take(everything[:0]).shape == (0, 3)


def test_teachers_of_the_same_samples_share_their_keys(made: MadeCache) -> None:
    one, other = LogitCache.open(made.path)._rows_of
    assert one.keys is other.keys
    assert one.finder is other.finder
    assert one.has_names_of(other)
    assert not one.has_names_of(LogitCache.open(two_teachers(made.path.parent / "x" / "A2b", 39).path)._rows_of[0])


@pytest.mark.parametrize("packs", [1, 2])
def test_many_files_are_resolved_as_few_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packs: int) -> None:
    monkeypatch.setattr("kd_cache.serve.resolve._MANY", 10)
    made = two_teachers(tmp_path / "A2b", packs=packs)
    cache = LogitCache.open(made.path)
    files = names(40)[::-1]
    equal(cache.batch(files), made.stacked(files))
    with pytest.raises(KeyError):
        cache.rows([*files, "x/\ud800.npy"])


# -- info -------------------------------------------------------------------------------------------------------------


def test_info_says_where_batches_will_come_from(cached: World, run: Run, world: World) -> None:
    cache = LogitCache.open(world.cache)
    shown = run("info", world.cache).stdout
    assert "one table in memory" in shown
    assert "checked when opened" in shown
    content = json.loads(run("info", world.cache, "--json").stdout)["caches"][0]["reading"]
    ((teachers, chosen),) = content.items()
    assert teachers == ", ".join(cache.teachers)
    assert chosen == {"preload": cache.preloaded, "verify": "full", "table_bytes": cache._gatherer.nbytes}


def test_info_counts_the_packs_of_the_teachers_alone(dump: Run, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from kd_cache.store.cache import CacheFolder

    assert dump().exit_code == 0
    index = CacheFolder(world.cache).index()
    assert index is not None
    packs = {f"{name}-{'0' * 32}.h5": 400_000_000 for name in index.origins}
    assert [each["verify"] for each in _reading(index, packs).values()] == ["full"]
    assert [each["verify"] for each in _reading(index, packs | {f"old-{'0' * 32}.h5": 10**10}).values()] == ["full"]
    more = dict.fromkeys(packs, 600000000)
    assert [each["verify"] for each in _reading(index, more).values()] == ["lazy"]
    monkeypatch.setattr(placement, "TABLE_BYTES", 0)
    assert [each["preload"] for each in _reading(index, packs).values()] == ["warmed"]


def test_a_changed_cache_is_still_refused_in_another_process(made: MadeCache) -> None:
    sent = pickle.dumps(LogitCache.open(made.path, preload=False))
    Rows.of(names(1, 50), dtype="fp16").write(made.path / "packs", made.origins["scene"])
    with pytest.raises(StaleError, match="changed while it was being read"):
        pickle.loads(sent)  # noqa: S301 (our own)
