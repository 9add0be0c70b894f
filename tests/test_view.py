"""The view: one plain ``.npy`` per row, as ``np.save`` writes it."""

from __future__ import annotations

import errno
import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import MadeCache, Rows, md5, names, no_file_over, snapshot, two_teachers

from kd_cache import load_cached_logits_batch
from kd_cache.errors import CorruptError, MissingLogitsError, StoreError
from kd_cache.store.view import (
    Blocks,
    differing,
    read_row_file,
    row_file_bytes,
    stored_names,
    view_name,
    view_names,
    write_rows,
    write_view,
)

FIVE = Rows.of(names(5), 10, "fp16")


def blocks(rows: Rows = FIVE, size: int = 2) -> Blocks:
    """``rows``, so many at a time."""
    return lambda: ((rows.keys[at : at + size], rows.logits[at : at + size]) for at in range(0, len(rows), size))


@pytest.fixture
def view(tmp_path: Path) -> Path:
    write_view(tmp_path / "scene", blocks())
    return tmp_path / "scene"


def path_of(view: Path, number: int) -> Path:
    return view / f"{md5(FIVE.files[number]).hex()}.npy"


def problems(view: Path) -> dict[str, bool]:
    """By file name: is it missing (else it differs)?"""
    return {FIVE.files[number]: missing for number, missing in differing(view, FIVE.keys, FIVE.logits)}


@given(st.integers(0, 600), st.sampled_from(["<f4", "<f2"]), st.integers(0, 99))
def test_a_row_file_is_what_np_save_writes(classes: int, dtype: str, seed: int) -> None:
    row = np.random.default_rng(seed).normal(size=classes).astype(dtype)
    saved = io.BytesIO()
    np.save(saved, row)
    assert row_file_bytes(row) == saved.getvalue()


def test_files_are_named_by_key_and_np_load_reads_them(view: Path) -> None:
    assert stored_names(view) == {f"{md5(file).hex()}.npy" for file in FIVE.files}
    assert view_name(md5("")) == "d41d8cd98f00b204e9800998ecf8427e.npy"
    for file, row in FIVE.by_file().items():
        loaded = np.load(view / f"{md5(file).hex()}.npy", allow_pickle=False)
        assert (loaded.dtype.str, loaded.tobytes()) == ("<f2", row.tobytes())
    assert problems(view) == {}


def test_what_is_written_is_counted_and_no_temporary_stays(tmp_path: Path) -> None:
    told: list[int] = []
    assert write_view(tmp_path / "a" / "scene", blocks(), told.append) == 5
    assert told == [2, 2, 1]
    files = snapshot(tmp_path)
    assert {Path(name).name for name in files} == set(view_names(FIVE.keys))
    assert set(files.values()) == {row_file_bytes(row) for row in FIVE.logits}
    assert os.listdir(tmp_path / "a") == ["scene"]
    assert write_view(tmp_path / "a" / "scene", blocks(), told.append) == 0
    assert told == [2, 2, 1] * 2
    assert write_view(tmp_path / "none", blocks(FIVE.part([]))) == 0
    assert (tmp_path / "none").is_dir()


def test_a_view_that_stands_is_mended_and_other_files_in_it_stay(view: Path) -> None:
    path_of(view, 0).unlink()
    path_of(view, 3).write_bytes(b"")
    (view / "notes.txt").write_text("mine")
    before = path_of(view, 1).stat()
    assert write_view(view, blocks()) == 2
    assert problems(view) == {}
    assert path_of(view, 1).stat().st_ino == before.st_ino
    (view / ".tmp-1-2").write_bytes(b"half a row of another writer")
    assert stored_names(view) == {*view_names(FIVE.keys), "notes.txt"}
    assert stored_names(view.parent / "nothing") == set()


def test_many_rows_are_written_by_several_threads(tmp_path: Path) -> None:
    many = Rows.of(names(5000), 3)
    assert write_view(tmp_path / "scene", blocks(many, 4000)) == 5000
    assert list(differing(tmp_path / "scene", many.keys, many.logits)) == []
    assert path_of(tmp_path / "scene", 0).name in stored_names(tmp_path / "scene")


@pytest.mark.parametrize("count", [5, 5000])
def test_a_view_is_not_there_before_all_of_it_is(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows.of(names(count), 3)
    create, last = os.open, view_names(rows.keys[-1:])[0]

    def fails(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        assert not (tmp_path / "scene").exists()
        if path == last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return create(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(StoreError, match=rf"cannot write .*scene/{last}: No space left"):
        write_view(tmp_path / "scene", blocks(rows, 4000))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("theirs", [FIVE, FIVE.part([0, 3]), FIVE.part([])])
def test_another_process_that_is_faster_keeps_its_folder(tmp_path: Path, theirs: Rows) -> None:
    def late() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from blocks()()
        if not (tmp_path / "scene").exists():
            write_view(tmp_path / "scene", blocks(theirs))

    assert write_view(tmp_path / "scene", late) == 5 - len(theirs)
    assert problems(tmp_path / "scene") == {}
    assert os.listdir(tmp_path) == ["scene"]


@pytest.mark.parametrize("size", [0, 1, 100, 147])
def test_a_full_disk_leaves_no_torn_row(tmp_path: Path, size: int) -> None:
    assert len(row_file_bytes(FIVE.logits[0])) == 148
    for before in ([], ["scene"]):
        with (
            no_file_over(size),
            pytest.raises(StoreError, match=r"cannot write .*scene/[0-9a-f]{32}\.npy: File too large"),
        ):
            write_view(tmp_path / "scene", blocks())
        assert os.listdir(tmp_path) == before
        assert snapshot(tmp_path) == {}
        (tmp_path / "scene").mkdir(exist_ok=True)


def test_a_failing_rename_leaves_the_old_row_and_no_temporary(view: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(view)

    def fails(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(StoreError, match="Input/output error"):
        write_rows(view, FIVE.keys, FIVE.logits + np.float16(1))
    assert snapshot(view) == before


def test_a_missing_row_and_a_swapped_pair_are_found(view: Path) -> None:
    path_of(view, 0).unlink()
    one, two = path_of(view, 1).read_bytes(), path_of(view, 2).read_bytes()
    path_of(view, 1).write_bytes(two)
    path_of(view, 2).write_bytes(one)
    assert problems(view) == {FIVE.files[0]: True, FIVE.files[1]: False, FIVE.files[2]: False}
    assert problems(view.parent / "nothing") == dict.fromkeys(FIVE.files, True)


@pytest.mark.parametrize("what", ["link", "dangling link", "loop", "folder", "fifo", "socket"])
def test_what_stands_in_a_rows_place_is_reported_and_not_followed(
    view: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = path_of(view, 2)
    content = path.read_bytes()
    path.unlink()
    (view / "same.npy").write_bytes(content)  # even the right bytes do not count when they are elsewhere
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        monkeypatch.chdir(view)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    else:
        path.symlink_to({"link": "same.npy", "dangling link": "nowhere", "loop": path.name}[what])
    assert problems(view) == {FIVE.files[2]: False}
    with pytest.raises(CorruptError, match=path.name):
        read_row_file(path)
    if what == "folder":
        with pytest.raises(StoreError, match=path.name):
            write_rows(view, FIVE.keys, FIVE.logits)
    else:
        write_rows(view, FIVE.keys, FIVE.logits)
        assert (path.is_symlink(), path.read_bytes()) == (False, content)
    assert (view / "same.npy").read_bytes() == content
    assert not [name for name in os.listdir(view) if name.startswith(".tmp-")]


def test_a_folder_that_cannot_be_made_or_listed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "scene").write_text("a file")
    for call in (
        lambda: write_rows(tmp_path / "scene", FIVE.keys, FIVE.logits),
        lambda: write_view(tmp_path / "scene", blocks()),
        lambda: list(differing(tmp_path / "scene", FIVE.keys, FIVE.logits)),
        lambda: stored_names(tmp_path / "scene"),
    ):
        with pytest.raises(StoreError, match="scene"):
            call()


# -- the index alone --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> MadeCache:
    return two_teachers(tmp_path / "A2b", classes=10)


def test_a_batch_by_the_index_alone_is_in_the_order_asked_for(cache: MadeCache) -> None:
    index = json.loads((cache.path / "cache_index.json").read_text())
    files = [*reversed(cache.rows["scene"].files), cache.rows["scene"].files[0]]
    batch = load_cached_logits_batch(index, files)
    assert (batch.shape, batch.dtype) == ((41, 10), np.float32)
    np.testing.assert_array_equal(batch, cache.stacked(files, ["city2scene"])[:, 0])
    np.testing.assert_array_equal(
        load_cached_logits_batch(index, files, teacher="scene"), cache.stacked(files, ["scene"])[:, 0]
    )


def test_a_miss_by_the_index_alone_raises_and_never_gives_another_row(cache: MadeCache) -> None:
    index = json.loads((cache.path / "cache_index.json").read_text())
    with pytest.raises(MissingLogitsError, match="no teacher city"):
        load_cached_logits_batch(index, names(1), teacher="city")
    with pytest.raises(MissingLogitsError, match="no teacher num_samples"):
        load_cached_logits_batch(index, names(1), teacher="num_samples")
    with pytest.raises(KeyError, match=r"clip-40-a\.npy"):
        load_cached_logits_batch(index, names(41))
    (cache.path / "scene" / f"{md5(names(1)[0]).hex()}.npy").unlink()
    with pytest.raises(MissingLogitsError, match="does not exist"):
        load_cached_logits_batch(index, names(1), teacher="scene")
