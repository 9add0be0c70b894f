"""Batches without a DataLoader: each row its own file's, each label beside its own row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from store_fixtures import MadeCache, names, two_teachers

from kd_cache import BatchLoader, LogitCache, MissingLogitsError, UsageError

FILES = [names(40)[number] for number in np.random.default_rng(3).permutation(40)]
NUMBERS = torch.arange(40)
PLACES = {"table": True, "mapped": False}


@pytest.fixture
def made(tmp_path: Path) -> MadeCache:
    return two_teachers(tmp_path / "A2b", dtype="fp16")


@pytest.fixture(params=PLACES)
def cache(made: MadeCache, request: pytest.FixtureRequest) -> LogitCache:
    return LogitCache.open(made.path, preload=PLACES[request.param])


def seen(loader: BatchLoader, made: MadeCache, dtype: torch.dtype = torch.float32) -> list[int]:
    """The numbers that came, each checked against the view."""
    found = []
    for logits, numbers in loader:
        assert (logits.dtype, logits.is_contiguous()) == (dtype, True)
        expected = made.stacked([FILES[number] for number in numbers.tolist()])
        np.testing.assert_array_equal(logits.float().numpy(), expected.astype("f4"))
        found += numbers.tolist()
    return found


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 40, 64])
def test_in_order_every_file_comes_once(cache: LogitCache, made: MadeCache, batch_size: int, drop_last: bool) -> None:
    loader = BatchLoader(cache, FILES, NUMBERS, batch_size=batch_size, drop_last=drop_last)
    assert len(loader) == (40 // batch_size if drop_last else -(-40 // batch_size))
    for _ in range(2):
        assert seen(loader, made) == list(range(40 - 40 % batch_size if drop_last else 40))
        for logits, numbers in loader:  # what a student does to a batch does not come back
            logits.zero_()
            numbers.zero_()


def test_shuffled_every_file_comes_once_in_an_order_that_a_generator_repeats(
    cache: LogitCache, made: MadeCache
) -> None:
    def epochs(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        loader = BatchLoader(cache, FILES, NUMBERS, batch_size=7, shuffle=True, generator=generator)
        return [seen(loader, made) for _ in range(2)]

    first, second = epochs(1)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert epochs(1) == [first, second]
    assert epochs(2)[0] != first


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, None])
def test_the_stored_dtype_or_another_is_given(cache: LogitCache, made: MadeCache, dtype: torch.dtype | None) -> None:
    loader = BatchLoader(cache, FILES, NUMBERS, batch_size=16, dtype=dtype)
    assert seen(loader, made, dtype or torch.float16) == list(range(40))


def test_all_files_of_the_cache_come_by_default(cache: LogitCache, made: MadeCache) -> None:
    batches = list(BatchLoader(cache, batch_size=16))
    assert [len(batch) for batch in batches] == [1, 1, 1]
    np.testing.assert_array_equal(torch.cat([logits for (logits,) in batches]), made.stacked(cache.files))


@pytest.mark.parametrize("kept", [True, False], ids=["table on the device", "sent batch by batch"])
def test_on_a_device_rows_and_tensors_are_the_same(
    cache: LogitCache, made: MadeCache, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_cache.serve.batch_loader.DEVICE_TABLE_BYTES", 480 if kept else 479)
    loader = BatchLoader(cache, FILES, NUMBERS, batch_size=7, shuffle=True, device="meta")
    assert (loader._table is not None) == kept
    assert [tuple(logits.shape) for logits, _ in loader] == [(7, 2, 3)] * 5 + [(5, 2, 3)]
    assert {(t.device.type, t.dtype) for batch in loader for t in batch} == {
        ("meta", torch.float32),
        ("meta", torch.int64),
    }
    # The same way with values to look at: the "device" is this machine.
    loader._device = torch.device("cpu")
    loader._tensors = [NUMBERS]
    loader._table = cache.batch(cache.rows(FILES)) if kept else None
    loader.shuffle = False
    for logits, numbers in loader:
        logits.zero_()
        numbers.zero_()
    assert seen(loader, made) == list(range(40))
    loader.shuffle = True
    assert sorted(seen(loader, made)) == list(range(40))


def test_missing_files_are_an_error_before_the_first_batch_or_nan(made: MadeCache) -> None:
    files = [*FILES[:3], "x/new.npy"]
    with pytest.raises(MissingLogitsError, match=r"x/new\.npy"):
        BatchLoader(LogitCache.open(made.path), files, batch_size=2)
    with pytest.warns(UserWarning, match="served as NaN"):
        loader = BatchLoader(LogitCache.open(made.path, on_miss="nan"), files, batch_size=4)
    ((logits,),) = loader
    assert logits.isnan().all(dim=(1, 2)).tolist() == [False, False, False, True]


def test_what_does_not_fit_is_refused(cache: LogitCache) -> None:
    with pytest.raises(UsageError, match="batch_size is 0"):
        BatchLoader(cache, batch_size=0)
    for wrong in (torch.arange(39), torch.tensor(3)):
        with pytest.raises(UsageError, match=r"tensor 1 has shape .*expected one entry for each of 40 files"):
            BatchLoader(cache, FILES, NUMBERS, wrong, batch_size=4)
    with pytest.raises(UsageError, match="put it in a list"):
        BatchLoader(cache, "x/clip-0-a.npy", batch_size=4)
