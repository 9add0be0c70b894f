"""Serving logits: every row joined to its own file, or an error that says why not: one contract for all readers."""

from __future__ import annotations

import gc
import hashlib
import json
import mmap
import multiprocessing
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, World
from store_fixtures import (
    MadeCache,
    Rows,
    byte_rows,
    forks,
    make_cache,
    md5,
    name_in_index,
    named_packs,
    names,
    origin,
    snapshot,
    two_teachers,
)
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
    random_split,
)

from kd_cache import keys as keys_module
from kd_cache.cli.info import _reading
from kd_cache.errors import CorruptError, MissingLogitsError, StaleError, UsageError
from kd_cache.files import mapped, page_cache
from kd_cache.serve import placement
from kd_cache.serve.logit_cache import CachedDataset, LogitCache
from kd_cache.store.cache import CacheFolder
from kd_cache.store.origin import Fingerprint
from kd_cache.store.pack import write_pack

TORCH = {"fp32": torch.float32, "fp16": torch.float16}
GIB = 1 << 30
READERS: dict[str, dict[str, Any]] = {
    f"{place}, {verify}": {"preload": place == "table", "verify": verify}
    for place in ("table", "mapped")
    for verify in ("full", "lazy", "off")
}
"""Where rows come from, and when they are checked: what is served must not depend on it."""
Open = Callable[..., LogitCache]


@pytest.fixture(params=READERS)
def opening(request: pytest.FixtureRequest) -> Open:
    """`LogitCache.open` in one of these ways."""
    return lambda *args, **more: LogitCache.open(*args, **READERS[request.param] | more)


@pytest.fixture
def cache(tmp_path: Path) -> MadeCache:
    return two_teachers(tmp_path / "A2b")


def shuffled(files: Sequence[str], seed: int = 0) -> list[str]:
    return [files[number] for number in np.random.default_rng(seed).permutation(len(files))]


def same(logits: torch.Tensor, expected: np.ndarray) -> None:
    assert logits.is_contiguous()
    np.testing.assert_array_equal(logits.numpy(), expected)


# -- what is served ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 700])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("packs", [1, 3])
def test_rows_and_batches_are_those_of_the_plain_files(
    tmp_path: Path, opening: Open, dtype: str, packs: int, classes: int
) -> None:
    """700 classes: rows wide enough for their first values to be read ahead, and batches of several blocks."""
    made = two_teachers(tmp_path / "A2b", 300 if classes > 3 else 40, classes, dtype, packs)
    everything = made.rows["scene"].files
    files = shuffled(everything)[:-15]
    for teachers in (None, ["scene", "city2scene"], ["scene"]):
        opened = opening(made.path, teachers)
        assert opened.teachers == tuple(teachers or ("city2scene", "scene"))
        assert (opened.num_classes, len(opened), opened.files) == (classes, len(everything), everything)
        rows, expected = opened.rows(files), made.stacked(files, teachers)
        assert (rows.dtype, rows.shape) == (torch.int64, (len(files),))
        assert opened.batch(rows).dtype == TORCH[dtype]
        for asked in (rows, files, rows.numpy(), rows.int()):
            same(opened.batch(asked), expected)
        for other in (torch.float32, torch.float64):
            same(opened.batch(rows, other), expected.astype(str(other)[6:]))
        same(opened.batch(rows[1::3]), expected[1::3])
        same(opened.batch(rows.numpy()[::-2]), expected[::-2])
        same(opened.batch(rows.repeat(2)), np.concatenate([expected, expected]))
        same(opened.batch(rows[:0]), expected[:0])
        same(opened.batch([]), expected[:0])
        same(opened.tensor(files=files), expected)
        same(opened.tensor(), made.stacked(everything, teachers))


def test_a_cache_opens_by_folder_or_index_by_text_or_path(cache: MadeCache) -> None:
    expected = cache.stacked(names(3))
    for path in (cache.path, cache.path / "cache_index.json", str(cache.path), f"{cache.path}/cache_index.json"):
        opened = LogitCache.open(path)
        assert (opened.path, opened.target) == (cache.path, "b")
        same(opened.batch(names(3)), expected)


def test_a_tensor_has_the_teachers_in_the_order_asked_for(cache: MadeCache) -> None:
    opened, files = LogitCache.open(cache.path), shuffled(names(40))[:9]
    for teachers in (["scene"], ["scene", "city2scene"]):
        found = opened.tensor(teachers, files, device=torch.device("cpu"))
        same(found.contiguous(), cache.stacked(files, teachers))
    with pytest.raises(MissingLogitsError, match="not opened: city;"):
        opened.tensor(["city"])


def test_what_a_batch_gives_may_be_changed_without_changing_the_cache(cache: MadeCache, opening: Open) -> None:
    opened = opening(cache.path)
    opened.batch(names(5)).zero_()
    opened.tensor().zero_()
    same(opened.batch(names(5)), cache.stacked(names(5)))


def test_a_given_tensor_is_filled_whatever_its_dtype_and_strides(tmp_path: Path, opening: Open) -> None:
    made = two_teachers(tmp_path / "A2b", dtype="fp16")
    opened = opening(made.path)
    rows, expected = opened.rows(names(9)), made.stacked(names(9))
    outs = [
        torch.empty(9, 2, 3, dtype=torch.float16),
        torch.empty(9, 2, 3),
        torch.empty(2, 9, 3, dtype=torch.float16).transpose(0, 1),
        torch.empty(9, 4, 3, dtype=torch.float16)[:, 1:3],
        torch.empty(18, 2, 3)[::2],
    ]
    for out in outs:
        assert opened.batch(rows, out=out) is out
        np.testing.assert_array_equal(out.numpy(), expected.astype(out.numpy().dtype))
        assert opened.batch(names(9), out.dtype, out) is out
    assert opened.batch(rows, out=torch.empty(9, 2, 3, device="meta")).device.type == "meta"
    for shape, dtype in (((8, 2, 3), "float16"), ((9, 3, 2), "float16"), ((9, 6), "float16"), ((9, 2, 3), "int64")):
        misfit = torch.full(shape, 7, dtype=getattr(torch, dtype))
        with pytest.raises(UsageError, match=r"expected out as floating-point \[9, 2, 3\], found"):
            opened.batch(names(9), out=misfit)
        assert (misfit == 7).all()
    with pytest.raises(UsageError, match=r"expected out as torch.float64 "):
        opened.batch(names(9), torch.float64, torch.empty(9, 2, 3))


def test_a_moved_copied_or_read_only_cache_opens(cache: MadeCache, tmp_path: Path) -> None:
    expected = cache.stacked(names(5))
    copied = shutil.copytree(cache.path, tmp_path / "elsewhere" / "mine")
    shutil.move(cache.path, tmp_path / "A2c")
    for path in (copied, tmp_path / "A2c"):
        for file in path.rglob("*"):
            file.chmod(0o555 if file.is_dir() else 0o444)
        path.chmod(0o555)
        before = snapshot(path)
        same(LogitCache.open(path).batch(names(5)), expected)
        assert snapshot(path) == before
        path.chmod(0o755)
    assert [LogitCache.open(path).target for path in (copied, tmp_path / "A2c")] == ["b", "b"]  # what was dumped


def test_an_opened_cache_needs_no_view_and_survives_what_happens_on_disk(cache: MadeCache, opening: Open) -> None:
    expected = cache.stacked(names(40))
    for name in cache.rows:
        shutil.rmtree(cache.path / name)
    opened = opening(cache.path)
    shutil.rmtree(cache.path)
    same(opened.batch(names(40)), expected)


def test_opening_builds_no_object_per_row(tmp_path: Path) -> None:
    count = 20_000
    files = sorted(names(count), key=md5)
    keys = byte_rows([md5(file) for file in files])
    logits = np.arange(3 * count, dtype="<f4").reshape(count, 3)
    (tmp_path / "packs").mkdir()
    made_by = origin("scene")
    write_pack(tmp_path / "packs", made_by, keys, keys, [file.encode() for file in files], logits.__getitem__)
    made = MadeCache(tmp_path, {"scene": Rows(files, keys, keys, logits)}, {"scene": made_by})
    made.write_index()
    LogitCache.open(tmp_path)
    gc.collect()
    before = sys.getallocatedblocks()
    opened = LogitCache.open(tmp_path)
    assert sys.getallocatedblocks() - before < count // 10
    same(opened.batch(files[::-1]), logits[::-1][:, None])


# -- where it comes from ----------------------------------------------------------------------------------------------


def test_the_table_is_made_at_once_on_request_and_else_before_it_is_needed(cache: MadeCache) -> None:
    assert LogitCache.open(cache.path, preload=True)._table is not None
    for use in (lambda opened: opened.rows(names(1)), lambda opened: opened.batch(torch.tensor([3]))):
        opened = LogitCache.open(cache.path)
        assert (opened.preloaded, opened._table) == ("table", None)
        use(opened)
        assert opened._table is not None
    mapped = LogitCache.open(cache.path, preload=False)
    mapped.prepare()
    assert (mapped.preloaded, mapped._table) == ("mapped", None)


def test_auto_picks_by_size_and_check() -> None:
    for size in (40, GIB, GIB + 1):
        for lazy in (True, False):
            auto = "table" if size <= GIB and not lazy else "mapped"
            chosen = [placement.choose(preload, size, is_lazy=lazy) for preload in ("auto", True, False)]
            assert chosen == [auto, "table", "mapped"]
    for preload in (True, "auto"):  # a worker of its own shares maps, but no table
        workers = {1 << 26: "table", (1 << 26) + 1: "mapped", 4 * GIB: "mapped"}
        assert {n: placement.choose(preload, n, is_lazy=False, in_worker=True) for n in workers} == workers


@pytest.mark.parametrize(
    ("verify", "preload", "size", "check"),
    [
        ("auto", "auto", 10**9 + 1, "lazy"),
        ("auto", True, 10**9 + 1, "full"),
        ("auto", False, 10**9, "full"),
        ("off", True, 10**9, "off"),
    ],
)
def test_preloading_everything_checks_everything_at_once(verify: str, preload: Any, size: int, check: str) -> None:
    assert placement.check_of(verify, preload, size) == check


def test_a_table_that_does_not_fit_is_refused_in_words(cache: MadeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = LogitCache.open(cache.path)
    monkeypatch.setattr(opened._gatherer, "shape", (1 << 38, 2, 1 << 20))
    with pytest.raises(UsageError, match="do not fit into memory"):
        opened.prepare()


def test_the_kernel_is_told_of_random_reads_where_maps_do_not_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[int] = []

    monkeypatch.setattr(mapped._LIBC, "madvise", lambda address, size, advice: advised.append(advice))
    made = two_teachers(tmp_path / "large/A2b", count=200, classes=3000)
    LogitCache.open(made.path, preload=False)
    assert advised == []  # it would fit: what is read around a row is read for good
    monkeypatch.setattr(placement, "available_memory", lambda: 0)
    LogitCache.open(made.path, preload=False)
    assert advised == [mmap.MADV_RANDOM] * 2
    LogitCache.open(two_teachers(tmp_path / "small/A2b").path, preload=False)
    assert len(advised) == 2  # small packs are no maps


def test_a_system_that_does_not_tell_its_free_memory_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert page_cache.available_memory() > 0
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert page_cache.available_memory() == 0


def test_teachers_of_the_same_samples_share_their_keys(cache: MadeCache) -> None:
    one, other = LogitCache.open(cache.path)._rows_of
    assert one.keys is other.keys
    assert one.finder is other.finder
    assert one.has_names_of(other)
    assert not one.has_names_of(LogitCache.open(two_teachers(cache.path.parent / "x" / "A2b", 39).path)._rows_of[0])


def test_info_says_where_batches_will_come_from_by_the_packs_of_the_teachers_alone(
    cached: World, run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = LogitCache.open(world.cache)
    shown = run("info", world.cache).stdout
    assert "one table in memory" in shown
    assert "checked when opened" in shown
    ((teachers, chosen),) = json.loads(run("info", world.cache, "--json").stdout)["caches"][0]["reading"].items()
    assert teachers == ", ".join(opened.teachers)
    assert chosen == {"preload": opened.preloaded, "verify": "full", "table_bytes": opened._gatherer.nbytes}
    index = CacheFolder(world.cache).index()
    assert index is not None
    packs = dict.fromkeys(named_packs(index.path).values(), 400_000_000)
    more = dict.fromkeys(packs, 600_000_000)
    for sizes, verify in ((packs, "full"), (packs | {f"old-{'0' * 32}.h5": 10**10}, "full"), (more, "lazy")):
        assert [each["verify"] for each in _reading(index, sizes).values()] == [verify]
    monkeypatch.setattr(placement, "TABLE_BYTES", 0)
    assert [each["preload"] for each in _reading(index, packs).values()] == ["mapped"]


# -- refusing ---------------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_not_there_or_asked_for_twice_and_other_words_are_refused(cache: MadeCache) -> None:
    with pytest.raises(MissingLogitsError, match=r"no logits of city .*it holds city2scene, scene"):
        LogitCache.open(cache.path, ["scene", "city"])
    with pytest.raises(MissingLogitsError, match="no logits of any teacher"):
        LogitCache.open(cache.path, [])
    with pytest.raises(UsageError, match="once"):
        LogitCache.open(cache.path, ["scene", "scene"])
    for word in ("on_miss", "verify", "preload"):
        for wrong in ("zero", None, 1):
            with pytest.raises(UsageError, match=f"{word} is .*{wrong}.*, expected "):
                LogitCache.open(cache.path, **{word: wrong})  # type: ignore[arg-type]


def test_expected_fingerprints_are_accepted_as_digits_or_parts(cache: MadeCache) -> None:
    mine = {name: made_by.fingerprint for name, made_by in cache.origins.items()}
    assert LogitCache.open(cache.path).fingerprints == {name: one.digest for name, one in mine.items()}
    assert list(LogitCache.open(cache.path, ["scene"]).fingerprints) == ["scene"]
    for expect in (mine, LogitCache.open(cache.path).fingerprints, {"scene": mine["scene"].digest.upper()}):
        LogitCache.open(cache.path, expect=expect)


def test_another_fingerprint_is_refused_and_the_part_is_named(cache: MadeCache) -> None:
    held = cache.origins["scene"].fingerprint
    earlier = Fingerprint(dict(held.parts) | {"weights": "the first training"})
    cache.write_index(entries={"scene": {"earlier": [dict(earlier.parts)]}})
    for expected in (earlier, earlier.digest, earlier.digest.upper()):
        with pytest.raises(StaleError) as caught:
            LogitCache.open(cache.path, expect={"scene": expected})
        assert "scene: expected" in caught.value.message
        assert "weights: the first training → weights of scene" in caught.value.message
        assert "architecture:" not in caught.value.message
    with pytest.raises(StaleError, match=r"no teacher with that fingerprint.*architecture: tiny/1"):
        LogitCache.open(cache.path, expect={"scene": "0" * 64})
    for nonsense in ("", "abc", "0" * 63, "g" * 64, "0" * 65):
        with pytest.raises(UsageError, match="expected a fingerprint of 64 hex digits"):
            LogitCache.open(cache.path, expect={"scene": nonsense})
    with pytest.raises(UsageError, match="expect names city"):
        LogitCache.open(cache.path, expect={"city": "0" * 64})
    with pytest.raises(UsageError, match="expect names city2scene"):
        LogitCache.open(cache.path, ["scene"], expect={"city2scene": "0" * 64})


def test_values_of_another_kind_are_refused_and_never_converted(tmp_path: Path) -> None:
    rows = Rows.of(names(4))
    made = make_cache(
        tmp_path / "A2b",
        {"scene": rows, "old": rows},
        {"scene": origin("scene"), "old": origin("old", kind="log_probs")},
    )
    with pytest.raises(UsageError, match="old stores log_probs, not logits"):
        LogitCache.open(made.path)
    LogitCache.open(made.path, ["scene"])
    same(LogitCache.open(made.path, ["old"], value_kind="log_probs").batch(names(4)), made.stacked(names(4), ["old"]))


@pytest.mark.parametrize("other", [("scene", 4, "fp32"), ("scene", 3, "fp16")])
def test_teachers_of_another_size_or_dtype_are_opened_separately(tmp_path: Path, other: tuple[str, int, str]) -> None:
    rows = {"city": Rows.of(names(4)), "scene": Rows.of(names(4), *other[1:])}
    made = make_cache(tmp_path / "A2b", rows, {"city": origin("city"), "scene": origin(*other)})
    with pytest.raises(UsageError, match=f"city: 3 classes, fp32, scene: {other[1]} classes, {other[2]}"):
        LogitCache.open(made.path)
    for name in rows:
        same(LogitCache.open(made.path, [name]).batch(names(4)), made.stacked(names(4), [name]))


def test_no_cache_and_an_unfinished_one_are_told_apart(cache: MadeCache, tmp_path: Path) -> None:
    with pytest.raises(MissingLogitsError, match="there is no cache at"):
        LogitCache.open(tmp_path / "nothing")
    with pytest.raises(KeyError, match="there is no cache at"):
        LogitCache.open(tmp_path)
    (cache.path / "cache_index.json").unlink()
    with pytest.raises(MissingLogitsError, match="did not finish"):
        LogitCache.open(cache.path)


def test_a_damaged_pack_of_a_teacher_that_is_not_opened_does_not_matter(cache: MadeCache) -> None:
    (pack,) = (cache.path / "packs").glob("scene-*")
    pack.write_bytes(pack.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=pack.name):
        LogitCache.open(cache.path)
    same(LogitCache.open(cache.path, ["city2scene"]).batch(names(3)), cache.stacked(names(3), ["city2scene"]))


def test_packs_that_are_gone_are_missed(cache: MadeCache) -> None:
    (pack,) = (cache.path / "packs").glob("scene-*")
    pack.unlink()
    with pytest.raises(MissingLogitsError, match=f"lacks the pack {pack.name} that its index names"):
        LogitCache.open(cache.path)


@pytest.mark.parametrize("weights", ["weights of scene", "trained again"])
@pytest.mark.parametrize(("count", "start", "seed", "inputs"), [(40, 0, 9, 0), (9, 0, 5, 1), (60, 30, 1, 0)])
def test_packs_that_the_index_does_not_name_change_nothing(
    cache: MadeCache, opening: Open, count: int, start: int, seed: int, inputs: int, weights: str
) -> None:
    """A dump at work, one that was killed, a backup of another cache: other bits, other features, further samples."""
    rows = Rows.of(names(count, start), seed=seed, inputs=inputs)
    rows.write(cache.path / "packs", origin("scene", weights=weights))
    opened = opening(cache.path, strict=True)
    assert len(opened) == 40
    same(opened.batch(names(40)), cache.stacked(names(40)))


def test_a_pack_of_another_teacher_under_the_name_in_the_index_is_refused(cache: MadeCache) -> None:
    path = Rows.of(names(40), seed=9).write(cache.path / "packs", origin("scene", weights="trained again"))
    name_in_index(path)
    with pytest.raises(CorruptError, match=f"{path.name} is not of the teacher that the index names it for"):
        LogitCache.open(cache.path)


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_miss", ["raise", "nan"])
def test_whatever_is_no_row_number_is_refused(cache: MadeCache, opening: Open, on_miss: str) -> None:
    opened = opening(cache.path, on_miss=on_miss)
    low, high = -(1 << 63), (1 << 63) - 1
    for wrong in ([40], [0, 40, 1], [-2], [0, -2], [low], [high], [3, low, 5], [low + 1], [high - 1]):
        with pytest.raises(IndexError, match=r"rows must lie in \[0, 40\)"):
            opened.batch(torch.tensor(wrong))
    for odd in (
        torch.zeros(2), torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.uint8), np.zeros(2, np.uint64),
        torch.zeros(1, 2, dtype=torch.int64), torch.tensor(3), np.array(["x/clip-0-a.npy"]),
    ):  # fmt: skip
        with pytest.raises(IndexError, match=r"rows must be integers \[B\]"):
            opened.batch(odd)
    with pytest.raises(UsageError, match="files as texts, found 0 \\(int\\) at position 0"):
        opened.batch([0, 1])  # type: ignore[list-item]
    if on_miss == "raise":
        with pytest.raises(IndexError, match="found -1 to 0"):
            opened.batch(torch.tensor([0, -1]))


def test_a_miss_lists_every_file_and_why(tmp_path: Path) -> None:
    rows = {"city2scene": Rows.of(names(10)), "scene": Rows.of(names(8))}
    made = make_cache(tmp_path / "A2b", rows, {name: origin(name) for name in rows})
    made.write_index(missing={"x/gone.npy": "feature x/gone.npy does not exist"})
    opened = LogitCache.open(made.path)
    assert set(opened.files) == set(names(8))
    with pytest.raises(MissingLogitsError) as caught:
        opened.rows([*names(10), "x/gone.npy", "x/new.npy", "x/\ud800.npy", "x/\x1b[31m.npy"])
    lines = caught.value.message.splitlines()
    assert lines[0] == f"6 of 14 files have no logits in {made.path}"
    unknown = "not in the cache: not in the manifest"
    for file, reason in {
        "x/clip-8-a.npy": "only city2scene scored it",
        "x/clip-9-a.npy": "only city2scene scored it",
        "x/gone.npy": "could not be scored (feature x/gone.npy does not exist)",
        "x/new.npy": unknown,
        r"x/\ud800.npy": unknown,
        r"x/\x1b[31m.npy": unknown,
    }.items():
        assert any(line.startswith(f"  {file}: {reason}") for line in lines), file
    with pytest.raises(KeyError):
        opened.batch(["x/new.npy"])


@pytest.mark.parametrize("packs", [1, 2])
def test_many_files_are_resolved_as_few_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packs: int) -> None:
    monkeypatch.setattr("kd_cache.serve.resolve._MANY", 10)
    made = two_teachers(tmp_path / "A2b", packs=packs)
    cache = LogitCache.open(made.path)
    files = names(40)[::-1]
    same(cache.batch(files), made.stacked(files))
    with pytest.raises(KeyError):
        cache.rows([*files, "x/\ud800.npy"])


def test_the_twentieth_miss_is_the_last_one_listed(cache: MadeCache) -> None:
    with pytest.raises(MissingLogitsError) as caught:
        LogitCache.open(cache.path).rows(names(150))
    assert caught.value.message.count("\n  x/clip-") == 20
    assert "110 of 150 files" in caught.value.message
    assert "… and 90 more (110 in all)" in caught.value.message


def test_one_text_is_no_list_of_files(cache: MadeCache) -> None:
    for call in (LogitCache.open(cache.path).rows, LogitCache.open(cache.path).batch):
        with pytest.raises(UsageError, match="put it in a list"):
            call("x/clip-0-a.npy")


def test_another_spelling_of_a_path_is_another_file(cache: MadeCache) -> None:
    opened = LogitCache.open(cache.path)
    for spelling in ("./x/clip-0-a.npy", "x//clip-0-a.npy", "X/clip-0-a.npy", "clip-0-a.npy", "x/clip-0-a.npy "):
        with pytest.raises(MissingLogitsError):
            opened.rows([spelling])


def test_nan_on_request_is_counted_announced_and_never_another_row(cache: MadeCache, opening: Open) -> None:
    opened = opening(cache.path, on_miss="nan")
    files = ["x/new.npy", *names(3), "x/newer.npy"]
    with pytest.warns(UserWarning, match=r"2 of 5 files have no logits in .*; they are served as NaN"):
        rows = opened.rows(files)
    assert (opened.misses, (rows == -1).tolist()) == (2, [True, False, False, False, True])
    for batch in (opened.batch(rows), opened.batch(rows, torch.float64), opened.batch(rows, out=torch.zeros(5, 2, 3))):
        same(batch[1:4], cache.stacked(names(3)))
        assert batch[[0, 4]].isnan().all()
    with pytest.warns(UserWarning, match="2 of 5"):
        assert opened.batch(files)[0].isnan().all()
    same(opened.batch(opened.rows(names(3))), cache.stacked(names(3)))
    assert opened.misses == 4


def test_two_files_with_one_key_are_an_error_and_not_each_others_row(
    cache: MadeCache, opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two paths of equal MD5 can be made; kd-cache keeps the paths, so it notices."""
    genuine = hashlib.md5
    twins = {b"x/twin1-a.npy": names(1)[0].encode(), b"x/a-longer-twin.npy": names(1)[0].encode()}

    def colliding(name: bytes, usedforsecurity: bool = True) -> Any:
        return genuine(twins.get(name, name), usedforsecurity=usedforsecurity)

    for packs in (1, 2):
        opened = opening(two_teachers(cache.path.parent / f"{packs}" / "A2b", packs=packs).path)
        with monkeypatch.context() as patch:
            patch.setattr(keys_module, "_md5", colliding)
            for twin in twins:
                with pytest.raises(CorruptError, match=f"{twin.decode()} and x/clip-0-a.npy have the same MD5 key"):
                    opened.rows([*names(40, 0), twin.decode()])
            opened.rows(names(40))


@pytest.mark.parametrize("held", [(range(10), range(5, 15)), (range(10), range(3, 5)), (range(2, 4), range(10))])
def test_teachers_that_hold_different_files_share_those_of_both(
    tmp_path: Path, opening: Open, held: tuple[range, range]
) -> None:
    everything = Rows.of(names(15))
    rows = {f"t{n}": everything.part([everything.files.index(names(15)[i]) for i in one]) for n, one in enumerate(held)}
    made = make_cache(tmp_path / "A2b", rows, {name: origin(name) for name in rows})
    opened = opening(made.path)
    both = [names(15)[number] for number in held[0] if number in held[1]]
    assert set(opened.files) == set(both)
    same(opened.batch(both), made.stacked(both))
    same(opened.tensor(), made.stacked(opened.files))


# -- older scripts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def older(tmp_path: Path) -> MadeCache:
    """What an older script leaves: plain files and a plain index whose paths hold where it ran."""
    made = two_teachers(tmp_path / "cache" / "A2b")
    shutil.rmtree(made.path / "packs")
    rewrite_older(made)
    return made


def rewrite_older(made: MadeCache, **changes: dict[str, str]) -> None:
    maps = {
        teacher: {file: f"old/place/{teacher}/{md5(file).hex()}.npy" for file in rows.files}
        for teacher, rows in made.rows.items()
    }
    for teacher, change in changes.items():
        maps[teacher] |= change
    (made.path / "cache_index.json").write_text(json.dumps({**maps, "num_samples": 40}))


def open_older(path: Path, *args: Any, **options: Any) -> LogitCache:
    with pytest.warns(UserWarning, match="older script.*Nothing can be checked: not the teachers' weights"):
        return LogitCache.open(path, *args, **options)


@pytest.mark.parametrize("preload", [True, False])
def test_an_older_cache_opens_with_a_warning_and_serves_its_rows(older: MadeCache, preload: bool) -> None:
    opened = open_older(older.path, preload=preload)
    assert (opened.teachers, opened.target, opened.fingerprints) == (("city2scene", "scene"), "b", {})
    moved = shutil.copytree(older.path, older.path.parent / "mine")
    assert open_older(moved).target is None  # nothing but the folder's name could say it
    files = shuffled(names(40))
    same(opened.batch(files), older.stacked(files))
    assert opened.input_digests(opened.rows(files)) is None  # that script kept none
    same(opened.tensor(["scene"]).contiguous(), older.stacked(opened.files, ["scene"]))
    same(open_older(older.path, ["scene"]).batch(files), older.stacked(files, ["scene"]))
    with pytest.raises(MissingLogitsError, match=r"x/new\.npy: not in the cache"):
        opened.rows(["x/new.npy"])


def test_an_older_cache_cannot_promise_a_fingerprint(older: MadeCache) -> None:
    with pytest.raises(StaleError, match="fingerprints are unknown"):
        open_older(older.path, expect={"scene": "0" * 64})


def test_an_older_cache_lacks_what_it_lacks(older: MadeCache) -> None:
    with pytest.raises(MissingLogitsError, match="no logits of city"):
        open_older(older.path, ["city"])
    with pytest.raises(MissingLogitsError, match="any teacher"):
        open_older(older.path, [])
    (older.path / "scene" / f"{md5(names(1)[0]).hex()}.npy").unlink()
    with pytest.raises(MissingLogitsError, match="in the index, but not on disk"):
        open_older(older.path)
    open_older(older.path, ["city2scene"])


def test_older_teachers_of_different_size_are_opened_separately(older: MadeCache) -> None:
    for file in names(40):
        np.save(older.path / "scene" / f"{md5(file).hex()}.npy", np.zeros(5, "f4"))
    with pytest.raises(UsageError, match="separately"):
        open_older(older.path)
    assert open_older(older.path, ["scene"]).num_classes == 5


# -- to other processes -----------------------------------------------------------------------------------------------


def sent(cache: LogitCache) -> LogitCache:
    return pickle.loads(pickle.dumps(cache))  # noqa: S301 (made here)


def test_a_pickled_cache_is_small_and_serves_the_same_rows(cache: MadeCache, opening: Open) -> None:
    opened = opening(cache.path, ["scene", "city2scene"])
    rows = opened.rows(names(40))
    assert len(pickle.dumps(opened)) < 2000
    other = sent(opened)
    assert (other.teachers, other.path, other.target) == (opened.teachers, opened.path, "b")
    same(other.batch(rows), cache.stacked(names(40), ["scene", "city2scene"]))
    with pytest.warns(UserWarning, match="NaN"):
        assert sent(LogitCache.open(cache.path, on_miss="nan")).rows(["x/new.npy"]).tolist() == [-1]


def test_a_pickled_older_cache_serves_the_same_rows(older: MadeCache) -> None:
    opened = open_older(older.path)
    same(sent(opened).batch(opened.rows(names(40))), older.stacked(names(40)))


def now_holds(made: MadeCache, rows: Rows) -> None:
    (pack,) = (made.path / "packs").glob("scene-*")
    pack.unlink()
    rows.write(made.path / "packs", made.origins["scene"])
    made.rows["scene"] = rows
    made.write_index()


def changed_rows(made: MadeCache) -> None:
    now_holds(made, Rows.of(names(40), seed=7, inputs=1))


def more_rows(made: MadeCache) -> None:
    now_holds(made, Rows.of(names(41)))


def sealed_anew(made: MadeCache) -> None:
    now_holds(made, made.rows["scene"].part(range(39)))


def another_teacher(made: MadeCache) -> None:
    made.origins["scene"] = origin("scene", weights="trained again")
    Rows.of(names(40), seed=8).write(made.path / "packs", made.origins["scene"])
    made.write_index()


def overwritten_by_the_older_script(made: MadeCache) -> None:
    rewrite_older(made)


@pytest.mark.parametrize(
    "change", [changed_rows, more_rows, sealed_anew, another_teacher, overwritten_by_the_older_script]
)
def test_row_numbers_never_meet_another_generation_of_the_cache(
    cache: MadeCache, change: Callable[[MadeCache], None]
) -> None:
    pickled = pickle.dumps(LogitCache.open(cache.path))
    change(cache)
    with pytest.raises(StaleError, match="changed while it was being read"):
        pickle.loads(pickled)  # noqa: S301 (made here)


def test_a_cache_that_vanished_is_missed_where_it_is_needed(cache: MadeCache) -> None:
    pickled = pickle.dumps(LogitCache.open(cache.path))
    (cache.path / "cache_index.json").unlink()
    with pytest.raises(MissingLogitsError, match="did not finish"):
        pickle.loads(pickled)  # noqa: S301 (made here)


def test_another_process_makes_no_large_table_of_its_own(cache: MadeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for preload, limit, place in (("auto", 1 << 26, "table"), (True, 1 << 26, "table"), (True, 10, "mapped")):
        monkeypatch.setattr(placement, "WORKER_TABLE_BYTES", limit)
        there = sent(LogitCache.open(cache.path, preload=preload))
        assert (there.preloaded, there._table) == (place, None)
        same(there.batch(names(40)), cache.stacked(names(40)))
    assert sent(LogitCache.open(cache.path, preload=False)).preloaded == "mapped"


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
    context = multiprocessing.get_context("fork")
    answer: Any = context.Queue()
    child = context.Process(target=private_bytes_of, args=(cache, rows, answer))
    child.start()
    grown = answer.get(timeout=500)
    child.join()
    assert cache._gatherer.nbytes > 20_000_000
    assert grown < 5_000_000


def test_an_older_cache_whose_rows_or_files_changed_is_stale(older: MadeCache) -> None:
    pickled = pickle.dumps(open_older(older.path))
    new = "x/new.npy"
    np.save(older.path / "scene" / f"{md5(new).hex()}.npy", np.zeros(3, "f4"))
    rewrite_older(older, scene={new: f"{md5(new).hex()}.npy"})
    with pytest.raises(StaleError, match="changed"):
        pickle.loads(pickled)  # noqa: S301 (made here)


# -- attach -----------------------------------------------------------------------------------------------------------


class Numbers(Dataset[int]):
    """Item i is the number of its file."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: int) -> int:
        return self.numbers[at]


class Batched(Numbers):
    """Fetches a batch at once, as torch's DataLoader asks for it."""

    def __getitems__(self, at: list[int]) -> list[int]:
        return [self.numbers[one] for one in at]


class Forgetful(Numbers):
    """Leaves out what it could not read: then nothing says whose logits are whose."""

    def __getitems__(self, at: list[int]) -> list[int]:
        return [self.numbers[one] for one in at][1:]


ORDER = [int(number) for number in np.random.default_rng(3).permutation(40)]
BASES: dict[str, Callable[[], Dataset[int]]] = {
    "plain": lambda: Numbers(ORDER),
    "batched": lambda: Batched(ORDER),
    "subset": lambda: Subset(Numbers(range(40)), ORDER),
    "concat": lambda: ConcatDataset([Numbers(ORDER[:15]), Batched(ORDER[15:])]),
}
Around = Callable[[CachedDataset], Dataset[Any]]
AROUND: dict[str, Around] = {
    "itself": lambda data: data,
    "subset": lambda data: Subset(data, [*range(30, 40), *range(20)]),
    "subset of a subset": lambda data: Subset(Subset(data, list(range(1, 40))), [5, 3, 38, 3]),
    "split": lambda data: random_split(data, [10, 30])[1],
    "concat": lambda data: ConcatDataset([Subset(data, [7, 8, 9]), data]),
}
DRAWN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "in order": lambda data: {"batch_size": 7},
    "shuffled": lambda data: {"batch_size": 7, "shuffle": True},
    "last dropped": lambda data: {"batch_size": 7, "drop_last": True},
    "weighted": lambda data: {"batch_size": 7, "sampler": WeightedRandomSampler(np.ones(len(data)), 50)},
    "by batch sampler": lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), 7, drop_last=False)},
    "batches as items": lambda data: {"batch_size": None, "sampler": BatchSampler(RandomSampler(data), 7, False)},
    "one by one": lambda data: {"batch_size": None},
    "of one": lambda data: {"batch_size": 1},
}


def check_joined(cache: MadeCache, loader: DataLoader[Any]) -> int:
    """Every row of every batch must be that of its own file; gives the number of rows seen."""
    seen = 0
    for numbers, logits in loader:
        items = torch.as_tensor(numbers).reshape(-1).tolist()
        rows = logits.reshape(-1, 2, 3)
        assert rows.dtype == torch.float32
        np.testing.assert_array_equal(rows.numpy(), cache.stacked([names(40)[number] for number in items]))
        seen += len(items)
    return seen


def attached(cache: MadeCache, base: str, opening: Open = LogitCache.open, **options: Any) -> CachedDataset:
    return opening(cache.path).attach(BASES[base](), [names(40)[number] for number in ORDER], **options)


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("base", BASES)
def test_every_row_is_its_own_files_however_batches_are_drawn(cache: MadeCache, base: str, drawn: str) -> None:
    data = attached(cache, base)
    options = DRAWN[drawn](data)
    seen = check_joined(cache, DataLoader(data, collate_fn=data.collate, **options))
    assert seen == {"last dropped": 35, "weighted": 50}.get(drawn, 40)


@pytest.mark.parametrize("collate", ["its own", "torch's"])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("base", ["plain", "batched"])
def test_every_row_is_its_own_files_whatever_is_around(cache: MadeCache, base: str, around: str, collate: str) -> None:
    data = attached(cache, base)
    whole = AROUND[around](data)
    collating = {"collate_fn": data.collate} if collate == "its own" else {}
    assert check_joined(cache, DataLoader(whole, 7, shuffle=True, **collating)) == len(whole)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator:UserWarning")
def test_pinned_batches_are_the_same(cache: MadeCache) -> None:
    data = attached(cache, "plain")
    assert check_joined(cache, DataLoader(data, 7, collate_fn=data.collate, pin_memory=True)) == 40


def test_single_items_come_with_their_logits(cache: MadeCache) -> None:
    data = attached(cache, "plain")
    assert len(data) == 40
    for at in (0, 17, 39):
        for index in (at, np.int64(at), torch.tensor(at)):
            item, logits = data[index]
            assert item == ORDER[at]
            same(logits, cache.stacked([names(40)[ORDER[at]]])[0])
    numbers, logits = data[[3, 1]]
    assert numbers.tolist() == [ORDER[3], ORDER[1]]
    same(logits, cache.stacked([names(40)[number] for number in numbers]))


def test_the_stored_dtype_or_another_is_given(tmp_path: Path) -> None:
    made = two_teachers(tmp_path / "A2b", dtype="fp16")
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        data = attached(made, "plain", dtype=dtype)
        assert data[3][1].dtype == expected
        assert data.collate(data.__getitems__([1, 2]))[1].dtype == expected


def test_a_collate_of_ones_own_gets_the_items_alone(cache: MadeCache) -> None:
    data = LogitCache.open(cache.path).attach(Numbers(range(40)), names(40), collate=lambda items: ["mine", *items])
    (first, logits), *_ = DataLoader(data, 4, collate_fn=data.collate)
    assert first == ["mine", 0, 1, 2, 3]
    same(logits, cache.stacked(names(4)))


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_returns_fewer_items_is_refused(cache: MadeCache, workers: int) -> None:
    data = LogitCache.open(cache.path).attach(Forgetful(range(40)), names(40))
    options: Any = {"num_workers": 1, "multiprocessing_context": "fork"} if workers else {}
    with pytest.raises(UsageError, match="gave 6 items for 7"):
        list(DataLoader(data, 7, collate_fn=data.collate, **options))


def test_wrong_keys_are_refused_at_once(cache: MadeCache) -> None:
    opened = LogitCache.open(cache.path)
    with pytest.raises(UsageError, match="40 items, found 39 keys"):
        opened.attach(Numbers(range(40)), names(39))
    with pytest.raises(MissingLogitsError, match=r"x/new\.npy"):
        opened.attach(Numbers(range(2)), [names(1)[0], "x/new.npy"])


@forks
def test_nan_rows_of_missing_files_reach_the_batch(cache: MadeCache) -> None:
    opened = LogitCache.open(cache.path, on_miss="nan")
    with pytest.warns(UserWarning, match="1 of 3 files"):
        data = opened.attach(Numbers([0, 1, 2]), [names(1)[0], "x/new.npy", names(3)[2]])
    for workers in (0, 2):
        options = {"multiprocessing_context": "fork"} if workers else {}
        ((_, logits),) = DataLoader(data, 3, collate_fn=data.collate, num_workers=workers, **options)  # type: ignore[arg-type]
        assert logits.isnan().all(dim=(1, 2)).tolist() == [False, True, False]
        same(logits[[0, 2]], cache.stacked([names(1)[0], names(3)[2]]))
