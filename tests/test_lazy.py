"""`LogitCache.open(verify=…)`: what is checked when, what is never believed unchecked; and one generation at a time."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from conftest import Run, World
from store_fixtures import MadeCache, Rows, byte_rows, forks, md5, named_packs, names, origin, two_teachers
from torch.utils.data import DataLoader, TensorDataset

import kd_cache.serve.placement as placement_module
import kd_cache.store.pack as pack_module
from kd_cache import CorruptError, LogitCache, MissingLogitsError, StoreError
from kd_cache.store.cache import CacheFolder
from kd_cache.store.pack import CHECKED_AT_ONCE, Pack
from kd_cache.store.permitted import Permitted
from kd_cache.store.snapshot import Snapshot

ROWS = 3 * CHECKED_AT_ONCE + 100
"""Four blocks, the last one not full."""


def big(path: Path) -> MadeCache:
    """One teacher, without a view."""
    files = sorted(names(ROWS), key=md5)
    keys = byte_rows([md5(file) for file in files])
    logits = np.random.default_rng(5).normal(0, 3, (ROWS, 3)).astype("<f4")
    rows = Rows(files, keys, keys, logits)
    (path / "packs").mkdir(parents=True)
    made = MadeCache(path, {"scene": rows}, {"scene": origin("scene")})
    rows.write(path / "packs", made.origins["scene"])
    made.write_index()
    return made


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> MadeCache:
    return big(tmp_path_factory.mktemp("big") / "A2b")


@pytest.fixture
def made(kept: MadeCache, tmp_path: Path) -> MadeCache:
    """A copy to damage."""
    copy = MadeCache(tmp_path / "A2b", kept.rows, kept.origins)
    shutil.copytree(kept.path, copy.path)
    copy.write_index()
    return copy


def only_pack(made: MadeCache) -> Path:
    (path,) = (made.path / "packs").iterdir()
    return path


def damage(path: Path, dataset: str, row: int) -> None:
    """Flip a bit in the last byte of a row (of a key, that leaves the order as it is)."""
    with h5py.File(path) as file:
        width = file[dataset].dtype.itemsize * int(np.prod(file[dataset].shape[1:], dtype=int))
        at = file[dataset].id.get_offset() + (row + 1) * width - 1
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each digest of a whole pack, and how many rows each look at checksums, was over (minus)."""
    seen: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(xxhash, name)

        @staticmethod
        def xxh3_128_digest(content: Any) -> bytes:
            seen.append(len(content))
            return xxhash.xxh3_128_digest(content)

    checksums = pack_module.row_checksums

    def counting(fingerprint: Any, keys: np.ndarray, *rest: Any) -> np.ndarray:
        seen.append(-len(keys))
        return checksums(fingerprint, keys, *rest)

    monkeypatch.setattr(pack_module, "xxhash", Counting())
    monkeypatch.setattr(pack_module, "row_checksums", counting)
    return seen


# -- what is checked when ---------------------------------------------------------------------------------------------


def test_full_hashes_every_byte_at_once_and_nothing_later(made: MadeCache, hashed: list[int]) -> None:
    size = only_pack(made).stat().st_size
    cache = LogitCache.open(made.path, verify="full")
    assert hashed == [size - 512]
    cache.batch(torch.arange(ROWS))
    assert hashed == [size - 512]


def test_lazy_hashes_nothing_at_open_and_each_block_once(made: MadeCache, hashed: list[int]) -> None:
    cache = LogitCache.open(made.path, verify="lazy")
    assert cache.preloaded == "mapped"
    rows = cache.rows(made.rows["scene"].files)
    assert hashed == []
    np.testing.assert_array_equal(cache.batch(rows[700:702])[:, 0].numpy(), made.rows["scene"].logits[700:702])
    assert hashed == [-CHECKED_AT_ONCE]
    cache.batch(rows[512:1024])
    assert hashed == [-CHECKED_AT_ONCE]
    cache.batch(torch.tensor([1, ROWS - 1, 3, ROWS - 1]))
    assert hashed == [-CHECKED_AT_ONCE, -CHECKED_AT_ONCE, -(ROWS % CHECKED_AT_ONCE)]
    np.testing.assert_array_equal(cache.tensor()[:, 0].numpy(), made.rows["scene"].logits)
    cache.batch(rows)
    assert sum(hashed) == -ROWS


def test_off_hashes_nothing_ever(made: MadeCache, hashed: list[int]) -> None:
    """Documented: it believes the disk, so a damaged row is served as it is there."""
    damage(only_pack(made), "logits", 5)
    cache = LogitCache.open(made.path, verify="off")
    served = cache.tensor()[:, 0].numpy()
    assert hashed == []
    assert np.flatnonzero((served != made.rows["scene"].logits).any(axis=1)).tolist() == [5]


@pytest.mark.parametrize("teachers", [["scene"], None])
def test_auto_is_full_up_to_a_limit_of_the_opened_teachers_packs_and_lazy_above(
    tmp_path: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch, teachers: list[str] | None
) -> None:
    made = two_teachers(tmp_path / "A2b", packs=2)
    chosen = teachers or list(made.rows)
    named = named_packs(made.path / "cache_index.json")
    sizes = [(made.path / "packs" / named[name]).stat().st_size for name in chosen]
    assert placement_module.FULLY_CHECKED == 10**9
    for limit, place in ((sum(sizes), "table"), (sum(sizes) - 1, "mapped")):
        hashed.clear()
        monkeypatch.setattr(placement_module, "FULLY_CHECKED", limit)
        cache = LogitCache.open(made.path, teachers)
        assert cache.preloaded == place, "a table of everything would check everything at once, row by row"
        assert sorted(hashed) == (sorted(size - 512 for size in sizes) if place == "table" else [])
    cache.batch(torch.arange(40))
    assert sum(hashed) == -40 * len(chosen)


# -- what a damaged row does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 511, 600, ROWS - 1])
@pytest.mark.parametrize("dataset", ["keys", "logits", "inputs", "checksums"])
def test_a_damaged_block_is_refused_whenever_it_is_read_and_the_others_are_served(
    made: MadeCache, dataset: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "MAPPED", 1)
    path, rows, start = only_pack(made), made.rows["scene"], row // 512 * 512
    damage(path, dataset, row)
    with pytest.raises(CorruptError, match=path.name):
        LogitCache.open(made.path, verify="full")
    cache = LogitCache.open(made.path, verify="lazy")
    others = np.r_[0:start, start + 512 : ROWS]
    np.testing.assert_array_equal(cache.batch(others)[:, 0].numpy(), rows.logits[others])
    refused: list[Callable[[], object]] = [
        *(lambda asked=asked: cache.batch(np.array(asked)) for asked in ([row], [start], [0, row], range(ROWS))),
        cache.tensor,
        lambda: cache.input_digests(torch.tensor([1, row])),
    ]
    for ask in refused:
        with pytest.raises(CorruptError, match=rf"{path.name}.*row {row} does not match its checksum"):
            ask()
    np.testing.assert_array_equal(cache.batch(others[::-1].copy())[:, 0].numpy(), rows.logits[others[::-1]])


def test_a_damaged_file_name_is_damage_and_no_collision(made: MadeCache) -> None:
    path, rows = only_pack(made), made.rows["scene"]
    with h5py.File(path) as file:
        at = int(file["files"].id.get_offset()) + int(file["file_offsets"][601]) - 1
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    cache = LogitCache.open(made.path, verify="lazy")
    with pytest.raises(CorruptError, match="row 600 does not match"):
        cache.rows(rows.files)
    with pytest.raises(CorruptError, match="row 600 does not match"):
        _ = cache.files
    np.testing.assert_array_equal(cache.batch(rows.files[:512])[:, 0].numpy(), rows.logits[:512])


def test_a_damaged_key_is_no_other_samples_row_and_its_miss_says_what_to_do(made: MadeCache) -> None:
    rows = made.rows["scene"]
    make_permitted(made)
    damage(only_pack(made), "keys", 600)
    with pytest.warns(UserWarning, match="promises 1,636 rows of scene, found 1,635"):
        cache = LogitCache.open(made.path, verify="lazy")
    with pytest.raises(MissingLogitsError, match="its row is gone or damaged") as caught:
        cache.rows(rows.files)
    assert rows.files[600] in caught.value.message
    assert caught.value.message.count(".npy") == 1
    with pytest.raises(MissingLogitsError, match="not in the manifest of the dump"):
        cache.rows(["never/seen.npy"])
    np.testing.assert_array_equal(cache.batch(rows.files[:512])[:, 0].numpy(), rows.logits[:512])


def make_permitted(made: MadeCache) -> None:
    keys = made.rows["scene"].keys
    name = Permitted.of(keys, np.full(len(keys), -1)).write(made.path)
    made.write_index(permitted={"file": name, "count": len(keys)})


# -- in workers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fork", "spawn"])
@forks
def test_workers_check_what_they_read(made: MadeCache, start: str) -> None:
    """Those that inherit an opened cache, and those that open it anew: right rows until the damaged block."""
    path, rows = only_pack(made), made.rows["scene"]
    damage(path, "logits", ROWS - 1)
    data = LogitCache.open(made.path, verify="lazy").attach(TensorDataset(torch.arange(ROWS)), rows.files)
    loader: DataLoader[Any] = DataLoader(
        data, 400, collate_fn=data.collate, num_workers=1, multiprocessing_context=start
    )
    seen: list[int] = []

    def read() -> None:
        for (numbers,), logits in loader:
            np.testing.assert_array_equal(logits[:, 0].numpy(), rows.logits[numbers.numpy()])
            seen.append(len(numbers))

    with pytest.raises(CorruptError, match=path.name):
        read()
    assert seen


def test_a_pickled_cache_is_checked_in_the_same_way(made: MadeCache, hashed: list[int]) -> None:
    for verify, checked in (("lazy", ROWS), ("off", 0)):
        hashed.clear()
        cache = LogitCache.open(made.path, verify=verify)
        copy = pickle.loads(pickle.dumps(cache))  # noqa: S301 (our own)
        assert hashed == []
        assert copy.preloaded == ("mapped" if verify == "lazy" else "table")
        np.testing.assert_array_equal(copy.tensor()[:, 0].numpy(), made.rows["scene"].logits)
        assert sum(hashed) == -checked


# -- one generation ---------------------------------------------------------------------------------------------------


class Generations:
    """Two states of one cache folder, each with the rows that a reader of it may get."""

    def __init__(self, world: World, old: Path, new: Path) -> None:
        self.cache, self._states = world.cache, {"old": old, "new": new}
        self.rows = {name: self.served(path) for name, path in self._states.items()}
        assert self.rows["old"] != self.rows["new"]

    @staticmethod
    def served(path: Path) -> dict[str, bytes]:
        cache = LogitCache.open(path)
        files = cache.files
        return {file: row.numpy().tobytes() for file, row in zip(files, cache.batch(files), strict=True)}

    def put(self, name: str) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
        shutil.copytree(self._states[name], self.cache)

    def overlay(self, name: str) -> None:
        """Turn the cache into this state as a seal does: what is new, the index, then what is superfluous goes."""
        there, state = self.cache, self._states[name]
        for path in sorted(state.rglob("*")):
            if path.is_file() and path.name != "cache_index.json":
                (there / path.relative_to(state)).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, there / path.relative_to(state))
        shutil.copyfile(state / "cache_index.json", there / ".tmp-1-1")
        (there / ".tmp-1-1").replace(there / "cache_index.json")
        for path in there.rglob("*"):
            if path.is_file() and not (state / path.relative_to(there)).exists():
                path.unlink()


def _shrunk(world: World) -> None:
    world.rows = world.rows[7:]


def _grown(world: World) -> None:
    for number in range(60, 66):
        world.add(number, "A", "train")


def _moved(world: World) -> None:
    """As many samples as before, but others."""
    _shrunk(world)
    for number in range(60, 67):
        world.add(number, "A", "train")


CHANGES: dict[str, Callable[[World], None]] = {"shrunk": _shrunk, "grown": _grown, "moved": _moved}


@pytest.fixture(params=CHANGES)
def generations(request: pytest.FixtureRequest, dump: Run, world: World, tmp_path: Path) -> Generations:
    """The manifest changed, so that rows went, came, or both."""
    assert dump().exit_code == 0
    shutil.copytree(world.cache, tmp_path / "old" / "A2b")
    CHANGES[request.param](world)
    world.write()
    assert dump().exit_code == 0
    shutil.copytree(world.cache, tmp_path / "new" / "A2b")
    return Generations(world, tmp_path / "old" / "A2b", tmp_path / "new" / "A2b")


@pytest.mark.parametrize("step", ["index_state", "index", "permitted", "served_packs"])
def test_a_reader_that_opens_while_another_seals_gets_one_generation_whole(
    generations: Generations, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    for when in ("before", "after"):
        for verify in ("full", "lazy"):
            generations.put("old")
            with monkeypatch.context() as patched:
                done = _sealing(generations, patched, step, when)
                cache = LogitCache.open(generations.cache, verify=verify)
            files = cache.files
            got = {file: row.numpy().tobytes() for file, row in zip(files, cache.batch(files), strict=True)}
            assert done
            assert got in generations.rows.values()


def _sealing(generations: Generations, patched: pytest.MonkeyPatch, step: str, when: str) -> list[bool]:
    """Have the cache sealed once, before or after a reader takes this step."""
    done: list[bool] = []
    owner: type = Snapshot if step == "served_packs" else CacheFolder
    asked = getattr(owner, step)

    def meanwhile() -> None:
        if not done:
            done.append(True)
            generations.overlay("new")

    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if when == "before":
            meanwhile()
        found = asked(self, *args, **kwargs)
        meanwhile()
        return found

    patched.setattr(owner, step, stepping)
    return done


def test_a_reader_that_always_comes_too_late_says_so(generations: Generations, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process never rests: an error, and no endless loop."""
    generations.put("old")
    turns: Iterator[str] = iter(["new", "old"] * 1000)
    served_packs = Snapshot.served_packs

    def restless(self: Snapshot, *args: Any, **kwargs: Any) -> list[Pack]:
        generations.put(next(turns))
        for path in self.folder.pack_paths():
            path.unlink()
        return served_packs(self, *args, **kwargs)

    monkeypatch.setattr(Snapshot, "served_packs", restless)
    with pytest.raises(StoreError, match="keeps changing"):
        LogitCache.open(generations.cache)
