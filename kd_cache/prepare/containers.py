"""Features on disk, in the two ways that dumps read: one HDF5 file, or an ``.npy`` each."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.errors import UsageError, listed, shown
from kd_cache.files.atomic import make_directory, store_errors, sync_directory, temporary_beside
from kd_cache.files.hdf5 import Outlet, writing_hdf5

_BLOCK = 256
_USER_BLOCK = 512


def write_packed(
    path: Path, names: Sequence[str], frames: Sequence[int], bins: int, arrays: Iterable[np.ndarray]
) -> None:
    """Write one HDF5 file, whole or not at all; equal arguments give equal bytes.

    Where all clips are of one length it holds ``features`` ``[N, T, F]`` float32 and ``files`` ``[N]``, else a dataset
    ``[T, F]`` for each, called by its name.

    Raises:
        StoreError: it cannot be written.
        UsageError: lengths differ, and a name is a folder in another's.
    """
    make_directory(path.parent)
    with store_errors(path, "write"), temporary_beside(path) as temporary:
        with temporary.open("x+b", buffering=0) as raw:
            outlet = Outlet(raw)
            with writing_hdf5(outlet, _USER_BLOCK) as file:
                if len(set(frames)) == 1:
                    _one_array(file, names, (len(names), frames[0], bins), arrays)
                else:
                    _one_each(file, names, arrays)
            os.fsync(raw.fileno())
        temporary.replace(path)
        sync_directory(path.parent)


def _one_array(file: Any, names: Sequence[str], shape: tuple[int, int, int], arrays: Iterable[np.ndarray]) -> None:
    rows = file.create_dataset("features", shape, "<f4")
    waiting: list[np.ndarray] = []
    done = 0
    for array in arrays:
        waiting.append(array)
        if len(waiting) == _BLOCK or done + len(waiting) == shape[0]:
            rows[done : done + len(waiting)] = np.stack(waiting)
            done += len(waiting)
            waiting.clear()
    file["files"] = list(names)


def _one_each(file: Any, names: Sequence[str], arrays: Iterable[np.ndarray]) -> None:
    above = {"/".join(name.split("/")[:depth]) for name in names for depth in range(1, name.count("/") + 1)}
    clashing = sorted(above & {*names})
    if clashing:
        raise UsageError(
            f"{len(clashing)} names are folders of others\n{listed(clashing)}", hint="Pass --npy, or rename them."
        )
    for name, array in zip(names, arrays, strict=True):
        file.create_dataset(name, data=array.astype("<f4", copy=False))


def write_npy(folder: Path, names: Sequence[str], arrays: Iterable[np.ndarray]) -> None:
    """Write each array as a file below ``folder``, whole or not at all. Raises `StoreError`."""
    folders: set[Path] = set()
    for name, array in zip(names, arrays, strict=True):
        path = folder / name
        if path.parent not in folders:
            make_directory(path.parent)
            folders.add(path.parent)
        content = io.BytesIO()
        np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
        with store_errors(path, "write"), temporary_beside(path) as temporary:
            temporary.write_bytes(content.getvalue())
            temporary.replace(path)
    for each in folders:
        with store_errors(each, "sync"):
            sync_directory(each)


def npy_names(files: Sequence[str]) -> list[str]:
    """What features are called as files of their own: the audio's names with another suffix. Raises `UsageError`."""
    names = [str(Path(file).with_suffix(".npy")) for file in files]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 1000 else []
        raise UsageError(
            f"several files differ in their suffix alone\n{listed(map(shown, twice))}", hint="Leave out --npy."
        )
    return names
