"""One contract for every container of features: files in a folder, and the two layouts of one HDF5 file."""

from __future__ import annotations

import gc
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_fixtures import forks
from test_packed_features import FILES, arrays, as_datasets, as_rows

from kd_cache.dataset.features import Feature, FeatureSource, input_digest
from kd_cache.dataset.packed import PackedFeatures
from kd_cache.errors import FeatureError, shown

Make = Callable[..., FeatureSource]


def as_files(root: Path, values: np.ndarray, files: list[str] = FILES, **options: int) -> FeatureSource:
    for name, value in zip(files, values, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / name).open("wb") as file:
            np.save(file, value)
    return FeatureSource(root, **options)


def packed_by(write: Callable[..., Path], **stored: Any) -> Make:
    def made(root: Path, values: np.ndarray, files: list[str] = FILES, **options: int) -> FeatureSource:
        return PackedFeatures(write(root / "f.h5", values, files, **stored), **options)

    return made


def as_contiguous_rows(path: Path, values: np.ndarray, files: list[str]) -> Path:
    """With names of one length, as numpy writes them."""
    return as_rows(path, values, np.array([name.encode() for name in files]))


WAYS: dict[str, Make] = {
    "files": as_files,
    "datasets": packed_by(as_datasets),
    "shuffled datasets": packed_by(as_datasets, compression="gzip", compression_opts=9, shuffle=True),
    "rows": packed_by(as_rows, compression="gzip"),
    "contiguous rows": packed_by(as_contiguous_rows),
}


@pytest.fixture(params=WAYS)
def make(request: pytest.FixtureRequest) -> Make:
    return WAYS[request.param]


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_a_feature_is_its_array_read_only_with_its_shape_and_digest(tmp_path: Path, make: Make, dtype: str) -> None:
    values = arrays(dtype)
    source = make(tmp_path, values)
    for name, value in zip(FILES, values, strict=True):
        found = source.read(name)
        np.testing.assert_array_equal(found.array, value)
        assert found.array.dtype == np.dtype(dtype)
        assert found.array.flags.c_contiguous
        assert not found.array.flags.writeable
        assert found.digest == input_digest(value)
        assert source.shape(name) == (9, 5)


def test_many_are_read_in_order_with_errors_in_their_places(tmp_path: Path, make: Make) -> None:
    values = arrays()
    values[1, 2, 3] = np.nan
    source = make(tmp_path, values)
    asked = ["d.npy", "none.npy", FILES[1], "d.npy", "\ud800"]
    found = source.read_many(asked)
    assert [isinstance(one, FeatureError) for one in found] == [False, True, True, False, True]
    for file, one in zip(asked, found, strict=True):
        alone = source.try_read(file)
        if isinstance(one, Feature):
            assert isinstance(alone, Feature)
            assert one.array.tobytes() == alone.array.tobytes() == values[FILES.index(file)].tobytes()
            assert one.digest == alone.digest
        else:
            assert isinstance(alone, FeatureError)
            assert one.message == alone.message
    assert "none.npy" in str(found[1])
    assert "does not exist" in str(found[1])
    assert "x/deep/b.npy" in str(found[2])
    assert "frame 2, bin 3 is nan" in str(found[2])
    assert source.read_many([]) == []


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        ("x\\deep\\b.npy", "x/deep/b.npy"),
        ("x/a.wav", "x/a.npy"),
        ("x\\a.wav", "x/a.npy"),
        ("x/c.npy", "x/c"),
        ("u\u0308.npy", "ü.npy"),
        ("data/features/x/a.npy", "x/a.npy"),
        ("none.npy", None),
    ],
)
def test_missing_features_are_all_named_and_what_is_there_in_their_place(
    tmp_path: Path, make: Make, asked: str, there: str | None
) -> None:
    source = make(tmp_path, arrays())
    error = source.try_read(asked)
    assert isinstance(error, FeatureError)
    alone = source.refusal(asked, error, [*FILES, asked])
    assert alone.message == error.message
    assert (f"{there} is there" in str(alone.hint)) == (there is not None)
    both = source.refusal(asked, error, [asked, *FILES, "gone/y.npy"])
    assert both.message.startswith("2 of 7 features are missing ")
    assert [line.strip() for line in both.message.splitlines()[1:]] == [shown(asked), "gone/y.npy"]
    assert source.refusal(FILES[0], error, [FILES[0], "gone/y.npy"]) is error, "of one that is there"


def test_a_larger_feature_than_is_allowed_is_refused_by_the_options_name(tmp_path: Path, make: Make) -> None:
    with pytest.raises(FeatureError, match="--max-feature-bytes"):
        make(tmp_path, arrays(), max_bytes=100).read(FILES[0])


def test_five_numbers_tell_the_versions_of_a_feature_apart(tmp_path: Path, make: Make) -> None:
    source = make(tmp_path, arrays())
    before = source.stat_many(["none.npy", *FILES])
    assert (before.shape, before.dtype) == ((6, 5), np.int64)
    assert (before[0] == -1).all()
    assert (before[1:] > 0).all()
    other = tmp_path / "other"
    other.mkdir()
    make(other, arrays() + 1)
    (place,) = [path for path in (tmp_path / "f.h5", tmp_path / FILES[0]) if path.exists()]
    (other / place.relative_to(tmp_path)).replace(place)
    after = source.stat_many([FILES[0]])
    assert (after[0] != before[1]).any()
    assert source.stat_many([]).shape == (0, 5)


@forks
def test_threads_forks_and_pickles_share_a_source(tmp_path: Path, make: Make) -> None:
    files = [f"d{number % 7}/{number}.npy" for number in range(40)]
    values = np.stack([np.full((3, 2), number, np.float32) for number in range(40)])
    source = make(tmp_path, values, files)
    sources, wrong = (source, pickle.loads(pickle.dumps(source))), []  # noqa: S301 (what DataLoader does)

    def work(of: FeatureSource) -> None:
        wrong.extend(file for file, value in zip(files, values, strict=True) if (of.read(file).array != value).any())

    child = os.fork()
    if child == 0:
        work(source)
        os._exit(len(wrong))
    assert os.waitpid(child, 0)[1] == 0
    threads = [threading.Thread(target=work, args=(sources[number % 2],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_descriptor_is_left_open(tmp_path: Path, make: Make) -> None:
    source = make(tmp_path, arrays())
    gc.collect()  # what earlier tests left, so that it does not go in between
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        source.read_many([*FILES, "none.npy"])
        source.shape(FILES[0])
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
