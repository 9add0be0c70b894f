"""Many packs side by side: the rows of one, under numbers that mean the same wherever they are read from."""

from __future__ import annotations

import gc
import mmap
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_fixtures import MadeCache, Rows, forks, names, origin
from test_lazy import damage
from torch.utils.data import DataLoader, TensorDataset

from kd_cache import BatchLoader, CorruptError, LogitCache
from kd_cache.files import mapped
from kd_cache.keys import KeyFinder
from kd_cache.store import pack as pack_module
from kd_cache.store.cache import CacheFolder
from kd_cache.store.pack import CHECKED_AT_ONCE, Pack, open_pack
from kd_cache.store.shelf import STEP, RowNumbers, Shelf
from kd_cache.store.snapshot import Snapshot

FILES = [names(1500)[number] for number in np.random.default_rng(3).permutation(1500)]
CUTS = (0, 1, 2, 40, 552, 1065, 1066, 1200, 1490, 1500)
"""Nine packs: of one row, of a whole block of checks, of one row more than that."""
OTHER_CUTS = (0, 700, 1500)
HOLES = [1, STEP - 1, STEP + 1, 3 * STEP - 1, 8 * STEP - 1]
READERS: list[dict[str, Any]] = [
    {"preload": preload, "verify": verify} for preload in (True, False) for verify in ("full", "lazy")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeCache:
    """Two teachers, each with all its rows in one pack, without a view; beside it their rows in many."""
    rows = {name: Rows.of(FILES, seed=seed) for seed, name in enumerate(("city2scene", "scene"))}
    made = MadeCache(tmp_path_factory.mktemp("shelf") / "A2b", rows, {name: origin(name) for name in rows})
    (made.path / "packs").mkdir(parents=True)
    for name, mine in rows.items():
        for span in {(0, 1500), *pairwise(CUTS), *(pairwise(OTHER_CUTS) if name == "scene" else ())}:
            mine.part(range(*span)).write(made.path / "packs", made.origins[name])
    made.write_index()
    return made


def cut(made: MadeCache, folder: Path, **cuts: Sequence[int]) -> MadeCache:
    """The same packs, of which an index names several of each teacher; by default as `CUTS` has them."""
    copy = MadeCache(folder / "A2b", made.rows, made.origins)
    shutil.copytree(made.path / "packs", copy.path / "packs", copy_function=os.link)
    opened = [open_pack(path, "off") for path in (copy.path / "packs").iterdir()]
    there = {(pack.origin.teacher, pack.keys[0].tobytes(), len(pack)): pack.path.name for pack in opened}
    entries = {
        name: {
            "packs": [[there[name, mine.keys[a].tobytes(), b - a], b - a] for a, b in pairwise(cuts.get(name, CUTS))]
        }
        for name, mine in made.rows.items()
    }
    copy.write_index(entries=entries)
    return copy


@pytest.fixture
def shelved(made: MadeCache, tmp_path: Path) -> MadeCache:
    return cut(made, tmp_path)


def expected(made: MadeCache, files: Sequence[str]) -> np.ndarray:
    """``[B, T, C]``."""
    at = {file: number for number, file in enumerate(made.rows["scene"].files)}
    return np.stack([mine.logits[[at[file] for file in files]] for mine in made.rows.values()], axis=1)


def serves(cache: LogitCache, made: MadeCache) -> None:
    """All rows in every way, and none under a number that is none."""
    some = FILES[:300]
    rows, right = cache.rows(some), expected(made, some)
    np.testing.assert_array_equal(cache.batch(rows).numpy(), right)
    np.testing.assert_array_equal(cache.batch(rows, torch.float64).numpy(), right)
    np.testing.assert_array_equal(cache.batch(rows[:7], out=torch.empty(7, 2, 3)).numpy(), right[:7])
    inputs = np.stack([mine.inputs for mine in made.rows.values()], axis=1)
    every = made.rows["scene"].files
    assert cache.files == every
    assert len(cache) == len(every)
    assert torch.equal(cache.rows(every), cache.all_rows())
    np.testing.assert_array_equal(cache.tensor().numpy(), expected(made, every))
    found = cache.input_digests(cache.all_rows())
    assert found is not None
    np.testing.assert_array_equal(found, inputs)
    batches = [logits for (logits,) in BatchLoader(cache, batch_size=400, dtype=None)]
    np.testing.assert_array_equal(torch.cat(batches).numpy(), expected(made, every))


@pytest.mark.parametrize("opened", READERS, ids=str)
@pytest.mark.parametrize("mapped_from", [1, pack_module.MAPPED])
def test_rows_of_many_packs_are_those_of_one(
    shelved: MadeCache, monkeypatch: pytest.MonkeyPatch, opened: dict[str, Any], mapped_from: int
) -> None:
    monkeypatch.setattr(pack_module, "MAPPED", mapped_from)
    cache = LogitCache.open(shelved.path, **opened)
    serves(cache, shelved)
    assert cache.all_rows()[[0, 1, 2, 3, -1]].tolist() == [0, STEP, 2 * STEP, 2 * STEP + 1, 8 * STEP + 9]
    serves(pickle.loads(pickle.dumps(cache)), shelved)  # noqa: S301 (made here)


@pytest.mark.parametrize("on_miss", ["raise", "nan"])
@pytest.mark.parametrize("opened", READERS[::3], ids=str)
def test_numbers_that_are_no_rows_are_refused(shelved: MadeCache, opened: dict[str, Any], on_miss: str) -> None:
    cache = LogitCache.open(shelved.path, on_miss=on_miss, **opened)
    for wrong, why in (
        *((hole, f"{hole} is no row: it lies between two packs") for hole in HOLES),
        *((number, "rows must lie in") for number in (8 * STEP + 10, 1 << 40, -2, -STEP)),
    ):
        for asked in (torch.tensor([0, wrong]), np.array([wrong])):
            with pytest.raises(IndexError, match=why):
                cache.batch(asked)
        with pytest.raises(IndexError, match=why):
            cache.batch(torch.tensor([wrong]), out=torch.empty(1, 2, 3))
    if on_miss == "nan":
        assert cache.batch(torch.tensor([-1, STEP])).isnan().all(dim=(1, 2)).tolist() == [True, False]


def test_of_one_pack_numbers_count_without_holes(made: MadeCache) -> None:
    assert torch.equal(LogitCache.open(made.path).all_rows(), torch.arange(1500))
    for counts in ([STEP, 3], [STEP, 2 * STEP, STEP]):
        numbers = RowNumbers(counts)
        assert not numbers.has_holes
        assert numbers.all().tolist() == list(range(sum(counts)))


def test_readers_open_what_the_index_names_and_sort_nothing(made: MadeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever dumps and parts commit beside it: nothing of that is read, or costs more than its name."""
    opened: list[str] = []
    genuine = pack_module.open_file
    monkeypatch.setattr(pack_module, "open_file", lambda path: (opened.append(path.name), genuine(path))[1])
    monkeypatch.setattr(np, "lexsort", None)
    cache = LogitCache.open(made.path, preload=False)
    cache.batch(FILES)
    named = Snapshot(CacheFolder(made.path)).served_paths(made.rows)
    assert sorted(opened) == sorted(path.name for path in named)


@pytest.mark.filterwarnings("ignore:.*promises 1,500 rows of scene, found 700:UserWarning")
@pytest.mark.parametrize("preload", [True, False])
def test_teachers_whose_packs_are_cut_elsewhere_or_lack_rows_meet_by_key(
    made: MadeCache, tmp_path: Path, preload: bool
) -> None:
    for number, cuts in enumerate((OTHER_CUTS, (0, 1500), OTHER_CUTS[:2])):
        cache = LogitCache.open(cut(made, tmp_path / str(number), scene=cuts).path, preload=preload)
        assert torch.equal(cache.all_rows(), torch.arange(len(cache)))
        both = made.rows["scene"].files[cuts[0] : cuts[-1]]
        assert cache.files == both
        np.testing.assert_array_equal(cache.tensor().numpy(), expected(made, both))


@forks
@pytest.mark.parametrize(("preload", "start"), [(True, "fork"), (False, "fork"), (False, "spawn")])
def test_workers_gather_by_the_same_numbers(shelved: MadeCache, preload: bool, start: str) -> None:
    data = LogitCache.open(shelved.path, preload=preload).attach(TensorDataset(torch.arange(1500)), FILES)
    options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": start, "shuffle": True}
    seen = 0
    for (numbers,), logits in DataLoader(data, 400, collate_fn=data.collate, **options):
        np.testing.assert_array_equal(logits.numpy(), expected(shelved, [FILES[one] for one in numbers.tolist()]))
        seen += len(numbers)
    assert seen == 1500


@pytest.mark.parametrize("number", [0, 4, 8])
@pytest.mark.parametrize("preload", [True, False])
def test_damage_in_one_of_many_packs_is_found_where_it_is_read(
    made: MadeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, preload: bool
) -> None:
    monkeypatch.setattr(pack_module, "MAPPED", 1)
    made = cut(made, tmp_path)
    path = list(Snapshot(CacheFolder(made.path)).served_paths(["scene"]))[number]
    content = path.read_bytes()
    path.unlink()  # it is another name of a pack that others read
    path.write_bytes(content)
    damage(path, "logits", 0)
    with pytest.raises(CorruptError, match=path.name):
        LogitCache.open(made.path, verify="full")
    if preload:
        with pytest.raises(CorruptError, match=f"{path.name}.*row 0 does not match"):
            LogitCache.open(made.path, verify="lazy", preload=True)
        return
    cache = LogitCache.open(made.path, verify="lazy", preload=False)
    here = range(CUTS[number], min(CUTS[number] + 512, CUTS[number + 1]))
    others = np.setdiff1d(np.arange(1500), here)
    numbers = cache.all_rows().numpy()
    right = expected(made, made.rows["scene"].files)
    np.testing.assert_array_equal(cache.batch(numbers[others]).numpy(), right[others])
    for one in (numbers[[here[0]]], numbers, numbers[here[-1:]]):
        with pytest.raises(CorruptError, match=f"{path.name}.*row 0 does not match"):
            cache.batch(one)
    np.testing.assert_array_equal(cache.batch(numbers[others]).numpy(), right[others])


def test_packs_that_are_checked_already_are_asked_no_more(made: MadeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    touch = Pack.touch

    def counted(self: Pack, wanted: np.ndarray) -> None:
        asked.append(len(self))
        touch(self, wanted)

    paths = [path for path in (made.path / "packs").glob("scene-*") if len(open_pack(path, "off")) in (700, 800)]
    opened = sorted((open_pack(path, "lazy") for path in paths), key=lambda pack: pack.keys[0].tobytes())
    shelf, right = Shelf(opened), made.rows["scene"].logits
    monkeypatch.setattr(Pack, "touch", counted)
    everyone = shelf.numbers.all()
    for numbers, then in (([3, 4], [700]), ([5], [700]), (everyone[:0], [700]), (everyone, [700, 700, 800])):
        rows = np.searchsorted(everyone, np.array(numbers, np.int64))
        np.testing.assert_array_equal(shelf.take(everyone[rows]), right[rows])
        assert asked == then
    assert not shelf.is_lazy
    np.testing.assert_array_equal(shelf.take(everyone), right)
    assert asked == [700, 700, 800]


# -- addresses --------------------------------------------------------------------------------------------------------

PAGE = mmap.PAGESIZE


def in_file(path: Path, seed: int) -> np.ndarray:
    """The bytes of a file from its second page on, as they are mapped."""
    path.write_bytes(np.random.default_rng(seed).bytes(3 * PAGE + 100))
    with path.open("rb", buffering=0) as file:
        return mapped.file_content(file, 1)[PAGE:]  # type: ignore[arg-type]


def maps_of(folder: Path) -> int:
    """How many parts of its files this process has mapped."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count(f"{folder}/")


def test_parts_of_files_lie_side_by_side_until_nobody_looks_at_them(tmp_path: Path) -> None:
    arrays = [in_file(tmp_path / "a", 1), np.arange(50, dtype=np.uint8), in_file(tmp_path / "b", 2)]
    places, right = [0, 4 * PAGE, 5 * PAGE], np.zeros(7 * PAGE + 100, np.uint8)
    for array, place in zip(arrays, places, strict=True):
        right[place : place + len(array)] = array
    assert maps_of(tmp_path) == 2
    for _ in range(3):
        parts = zip(arrays, [tmp_path / "a", tmp_path / "none", tmp_path / "b"], places, strict=True)
        found = mapped.side_by_side(parts, len(right))
        assert found is not None
        some = found[5 * PAGE :]
        del found
        np.testing.assert_array_equal(some, right[5 * PAGE :])
        assert not some.flags.writeable
        assert maps_of(tmp_path) == 4
        del some
        assert maps_of(tmp_path) == 2
    parts = zip(arrays, [tmp_path / "a", tmp_path / "none", tmp_path / "b"], places, strict=True)
    found = mapped.side_by_side(parts, len(right))
    assert found is not None
    for array, place in zip(arrays, places, strict=True):
        np.testing.assert_array_equal(found[place : place + len(array)], array)


def _no_maps(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mapped._LIBC, "mmap", lambda *_: mapped._FAILED)


def _no_maps_of_files(path: Path, patch: pytest.MonkeyPatch) -> None:
    genuine = mapped._LIBC.mmap
    patch.setattr(mapped._LIBC, "mmap", lambda *how: mapped._FAILED if how[4] >= 0 else genuine(*how))


WITHOUT: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "another system": lambda _, patch: patch.setattr(mapped.sys, "platform", "win32"),
    "no maps": _no_maps,
    "no maps of files": _no_maps_of_files,
    "a file that is gone": lambda path, _: path.unlink(),
    "another file": lambda path, _: (path.rename(path.parent / "x"), path.write_bytes(bytes(3 * PAGE + 100))),
}


@pytest.mark.parametrize("why", WITHOUT)
def test_what_cannot_lie_side_by_side_is_left_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    array = in_file(tmp_path / "a", 1)
    assert mapped.side_by_side([(array, tmp_path / "a", 0)], len(array)) is not None
    assert mapped.side_by_side([(array[64:], tmp_path / "a", 0)], len(array)) is None  # it begins within a page
    with monkeypatch.context() as patch:
        WITHOUT[why](tmp_path / "a", patch)
        assert mapped.side_by_side([(array, tmp_path / "a", 0)], len(array)) is None
    assert maps_of(tmp_path) == 1


@pytest.mark.parametrize("preload", [True, False])
def test_without_one_stretch_rows_are_gathered_pack_by_pack(
    shelved: MadeCache, monkeypatch: pytest.MonkeyPatch, preload: bool
) -> None:
    monkeypatch.setattr(mapped.sys, "platform", "win32")
    cache = LogitCache.open(shelved.path, verify="lazy", preload=preload)
    assert [rows._shelf.logits for rows in cache._rows_of] == [None, None]
    serves(cache, shelved)


def test_caches_that_are_closed_leave_no_addresses_behind(shelved: MadeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "MAPPED", 1)
    for _ in range(3):
        cache = LogitCache.open(shelved.path, preload=False)
        cache.batch(cache.all_rows())
        assert maps_of(shelved.path) == 36, "nine packs of two teachers, whole and their rows"
        del cache
        assert maps_of(shelved.path) == 0


def test_a_pack_whose_rows_are_all_checked_is_not_asked_beside_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows.of(names(2 * CHECKED_AT_ONCE), 3)
    for part in range(2):
        rows.part(range(part, len(rows), 2)).write(tmp_path, origin())
    shelf = Shelf([open_pack(path, "lazy") for path in tmp_path.iterdir()])
    asked: list[str] = []
    touch = Pack.touch

    def counted(self: Pack, wanted: np.ndarray) -> None:
        asked.append(self.path.name)
        touch(self, wanted)

    monkeypatch.setattr(Pack, "touch", counted)
    everything = shelf.numbers.all()
    first, expected = everything[:5], rows.logits[KeyFinder(rows.keys).find(shelf.keys)]
    np.testing.assert_array_equal(shelf.take(first), expected[:5])
    assert asked == [shelf.packs[0].path.name]  # the other holds none of these
    for _ in range(2):
        np.testing.assert_array_equal(shelf.take(everything), expected)
        shelf.touch(everything)
        assert asked == [pack.path.name for pack in shelf.packs]  # the first was a single block
    assert shelf.take(everything[:0]).shape == (0, 3)
