"""Where the samples of an HDF5 file of features are, as a program of its own found out."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from kd_cache.errors import FeatureError, shown


class Stored(NamedTuple):
    """How the values of a sample are stored; or ``refused``, why they cannot be read.

    ``chunks`` are ``[samples, frames, bins]``, ``None`` where the values lie one after the other; ``filters`` in the
    order in which they were applied. ``rest`` is the shape after the first axis, of samples that are not ``[T, F]``.
    """

    dtype: np.dtype[Any] = np.dtype("<f4")
    chunks: tuple[int, ...] | None = None
    filters: tuple[str, ...] = ()
    refused: str | None = None
    rest: tuple[int, ...] | None = None


class Samples(NamedTuple):
    """Where the samples of a file are, a row for each: about 100 bytes.

    Attributes:
        names: the row of each name.
        by_path: the names are paths to datasets, in which HDF5 passes over ``//`` and ``./``.
        starts: ``[N]``, the byte of the first value, or the number of the first chunk.
        shapes: ``[N, 2]``, frames and bins, or the length of the first axis and of all others together.
        stored: ``[N]``, which of ``kinds``.
        chunks: ``[chunks, 3]``: offset, size, and the mask of the filters that were left out.
    """

    names: Names
    by_path: bool
    starts: np.ndarray
    shapes: np.ndarray
    stored: np.ndarray
    kinds: Sequence[Stored]
    chunks: np.ndarray


class Names:
    """Which row has a name: sorted hashes, and the names themselves to compare with."""

    def __init__(self, blob: bytes, lengths: np.ndarray) -> None:
        self._blob = blob
        self._ends = np.cumsum(lengths)
        each = (blob[start:end] for start, end in pairwise([0, *self._ends.tolist()]))
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, each), np.uint64, len(lengths))
        self._rows = np.argsort(hashes, kind="stable").astype(np.int32)
        self._hashes = hashes[self._rows]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> bytes:
        return self._blob[int(self._ends[row - 1]) if row else 0 : int(self._ends[row])]

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The row of each; -1 for one that is not there."""
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, names), np.uint64, len(names))
        places = np.searchsorted(self._hashes, hashes).tolist()
        return [self._row(name, place, found) for name, place, found in zip(names, places, hashes, strict=True)]

    def _row(self, name: bytes, place: int, found: np.uint64) -> int:
        while place < len(self._hashes) and self._hashes[place] == found:
            row = int(self._rows[place])
            if self[row] == name:
                return row
            place += 1
        return -1

    def twice(self) -> bytes | None:
        """A name that more than one row has."""
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        rows = self._rows[np.union1d(same, same + 1)].tolist()
        counts = Counter(self[row] for row in rows)
        return next((name for name, count in counts.items() if count > 1), None)


def scanned(path: Path, *, anything: bool = False) -> Samples:
    """What `kd_cache.dataset.packed_scan` says of the file. Raises `FeatureError`."""
    program = [
        sys.executable,
        "-P",
        str(Path(__file__).with_name("packed_scan.py")),
        str(path),
        *(["any"] if anything else []),
    ]
    own = {"OPENBLAS_NUM_THREADS": "1", "HDF5_USE_FILE_LOCKING": "FALSE", "HDF5_PLUGIN_PRELOAD": "::"}
    done = subprocess.run(program, capture_output=True, check=False, env={**os.environ, **own})  # noqa: S603
    what = f"the features {shown(path)}"
    if done.returncode == 1 and done.stdout:
        raise FeatureError(f"{what}: {shown(done.stdout.decode(errors='replace')[:1000])}")
    try:
        if done.returncode:
            raise ValueError
        with np.load(io.BytesIO(done.stdout), allow_pickle=False) as told:
            samples = _samples({name: told[name] for name in told.files})
    except (ValueError, KeyError, TypeError, EOFError, OSError, zlib.error, zipfile.BadZipFile):
        raise FeatureError(f"{what}: HDF5 cannot read them: the file is damaged, or takes it too long") from None
    twice = samples.names.twice()
    if twice is not None:
        raise FeatureError(f"{what} name {shown(twice.decode(errors='replace'))} more than once")
    return samples


def _samples(told: Mapping[str, np.ndarray]) -> Samples:
    """The findings, each number of a plausible size: what they point to is checked when it is read."""
    names = Names(told["names"].tobytes(), told["lengths"])
    kinds = [
        Stored(refused=str(kind["refused"]))
        if "refused" in kind
        else Stored(
            np.dtype(kind["dtype"]),
            None if kind["chunks"] is None else tuple(kind["chunks"]),
            tuple(kind["filters"]),
            rest=None if kind["rest"] is None else tuple(kind["rest"]),
        )
        for kind in json.loads(told["kinds"].tobytes())
    ]
    shapes = np.stack([told["frames"], told["bins"]], axis=1).astype(np.int32)
    return Samples(
        names, bool(told["by_path"]), told["starts"], shapes, told["which"].astype(np.int16), kinds, told["chunks"]
    )
