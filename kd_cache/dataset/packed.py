"""Features in one HDF5 file instead of many small ones: one dataset per sample, or one array and a list of files.

libhdf5 is kept away from the values. A program of its own (`packed_scan`) says once what lies where, and then
samples are read with plain reads at their offsets: by many threads at once, in forked workers, and never from a file
that has changed since. gzip and shuffle are undone here. There is no checksum in such a file: whether a value is the
one that was written, only the input digest kept with every row can tell.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import weakref
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.dataset.features import MAX_BYTES, UNKNOWN, Feature, FeatureSource, check_array, input_digest, stat_row
from kd_cache.dataset.packed_samples import Stored, scanned
from kd_cache.errors import FeatureError, UsageError, shown

_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_MOST_CHUNK = 1 << 26
"""No chunk is larger when it is unpacked; and so much of unpacked chunks that hold several samples is kept."""


class PackedFeatures(FeatureSource):
    """Reads the features of manifest files from one HDF5 file; safe to share between threads, forked or pickled.

    Args:
        path: the file. Either each sample is a dataset ``[T, F]`` that is called as the manifest's ``file`` (``/``
            makes groups), or there are ``features`` ``[N, T, F]`` and ``files`` ``[N]`` (strings). float32 or float16;
            contiguous, or chunked and perhaps compressed by gzip, with or without shuffle.
        max_bytes: a larger sample is refused unread.
        bins: F of every feature; by default any.
        anything: samples may have any shape and dtype; ``features`` is then ``[N, …]``.

    Raises:
        UsageError: there is no such file.
        FeatureError: it is not an HDF5 file of features, or names a sample twice.
    """

    def __init__(
        self, path: str | Path, max_bytes: int = MAX_BYTES, bins: int | None = None, anything: bool = False
    ) -> None:
        self.path = Path(path).absolute()
        self.max_bytes, self.bins, self.anything = max_bytes, bins, anything
        self._attach()
        self._version = stat_row(os.fstat(self._descriptor))
        self._samples = scanned(self.path, anything=anything)
        with suppress(OSError):  # what was looked through must be what is open here
            if stat_row(self.path.stat()) == self._version:
                return
        raise FeatureError(self._changed)

    def _attach(self) -> None:
        try:
            self._descriptor = os.open(self.path, _OPEN)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(
                f"cannot read the features {shown(self.path)}: {reason}", hint="Check --features."
            ) from None
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise UsageError(f"the features {shown(self.path)} are not a regular file", hint="Check --features.")
        weakref.finalize(self, os.close, self._descriptor)
        self._unpacked: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        left_here = ("_descriptor", "_unpacked")
        return {name: value for name, value in self.__dict__.items() if name not in left_here}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._attach()

    @property
    def place(self) -> str:
        return os.path.realpath(self.path)

    # -- what every source of features does ----------------------------------------------------------------------------

    def read(self, file: str) -> Feature:
        (found,) = self.read_many([file])
        if isinstance(found, FeatureError):
            raise found
        return found

    def read_many(self, files: Sequence[str]) -> list[Feature | FeatureError]:
        found = [self._read(file, row) for file, row in zip(files, self._rows(files), strict=True)]
        if stat_row(os.fstat(self._descriptor)) != self._version:  # places may be other samples' now
            return [FeatureError(f"feature {shown(file)}: {self._changed}") for file in files]
        return found

    def stat_many(self, files: Sequence[str]) -> np.ndarray:
        """``[N, 5]`` int64: the numbers of the one file for each sample that it holds, rows of -1 for the others."""
        here = stat_row(os.fstat(self._descriptor))
        known = here if here == self._version else UNKNOWN
        return np.array([UNKNOWN if row < 0 else known for row in self._rows(files)], np.int64).reshape(-1, 5)

    def shape(self, file: str) -> tuple[int, ...]:
        (row,) = self._rows([file])
        try:
            return self._place(row)[1]
        except (ValueError, OSError) as error:
            raise self._error(file, error) from None

    def _look(self, file: str) -> None:
        self._place(self._rows([file])[0])

    # -- one sample ----------------------------------------------------------------------------------------------------

    def _rows(self, files: Sequence[str]) -> list[int]:
        """The row of each, -1 for a file that is not there."""
        if self._samples.by_path:
            files = [_as_hdf5_does(file) for file in files]
        return self._samples.names.find([file.encode("utf-8", "surrogatepass") for file in files])

    def _read(self, file: str, row: int) -> Feature | FeatureError:
        try:
            stored, shape = self._place(row)
            start = int(self._samples.starts[row])
            if stored.chunks is None:
                size = math.prod(shape) * stored.dtype.itemsize
                array = np.ndarray(shape, stored.dtype, self._bytes(start, size))
            else:
                array = self._assembled(stored, stored.chunks, shape, start, row)
            check_array(array, self.bins, anything=self.anything)
        except (ValueError, OSError, zlib.error) as error:
            return self._error(file, error)
        return Feature(array, input_digest(array))

    def _place(self, row: int) -> tuple[Stored, tuple[int, ...]]:
        """How the sample is stored, and its shape ``(T, F)``. Raises ``ValueError`` for one that cannot be read."""
        if row < 0:
            raise FileNotFoundError(errno.ENOENT, "it is not there")
        stored = self._samples.kinds[self._samples.stored[row]]
        if stored.refused is not None:
            raise ValueError(stored.refused)
        frames, bins = self._samples.shapes[row].tolist()
        size = frames * bins * stored.dtype.itemsize
        if size > self.max_bytes:
            raise ValueError(
                f"it has {size} bytes, expected at most {self.max_bytes}; --max-feature-bytes permits more"
            )
        return stored, (frames, bins) if stored.rest is None else (frames, *stored.rest)

    def _bytes(self, start: int, size: int) -> bytes:
        content = os.pread(self._descriptor, size, start)
        while len(content) < size:
            more = os.pread(self._descriptor, size - len(content), start + len(content))
            if not more:
                raise ValueError("it ends behind the end of the file")
            content += more
        return content

    def _assembled(
        self, stored: Stored, chunks: tuple[int, ...], shape: tuple[int, ...], start: int, row: int
    ) -> np.ndarray:
        """``[T, F]``, or of whatever shape, out of chunks."""
        several, *steps = chunks
        array = np.empty(shape, stored.dtype)
        grid = [-(-length // step) for length, step in zip(shape, steps, strict=True)]
        for number, corner in enumerate(np.ndindex(*grid), start):
            chunk = self._chunk(number, stored, chunks)[row % several]
            place = array[tuple(slice(at * step, (at + 1) * step) for at, step in zip(corner, steps, strict=True))]
            place[...] = chunk[tuple(map(slice, place.shape))]
        array.flags.writeable = False
        return array

    def _chunk(self, number: int, stored: Stored, shape: tuple[int, ...]) -> np.ndarray:
        """``[samples, frames, bins]``; one that several samples share is kept for a while.

        Without a lock, which a fork might copy while it is held: the worst is that two threads unpack the same.
        """
        known = self._unpacked.get(number)
        if known is not None:
            return known
        room = math.prod(shape) * stored.dtype.itemsize
        offset, size, left_out = self._samples.chunks[number].tolist()
        if max(room, size) > _MOST_CHUNK:
            raise ValueError(f"its chunks have more than {_MOST_CHUNK} bytes")
        content = unpacked(self._bytes(offset, size), stored, room, left_out)
        chunk = np.ndarray(shape, stored.dtype, content)
        if shape[0] > 1:
            self._unpacked[number] = chunk
            for oldest in list(self._unpacked)[: -max(1, _MOST_CHUNK // room)]:
                self._unpacked.pop(oldest, None)
        return chunk

    # -- what is said --------------------------------------------------------------------------------------------------

    @property
    def _place_in_words(self) -> str:
        return f"in {shown(self.path)}"

    @property
    def _changed(self) -> str:
        return f"{shown(self.path)} was changed while it was in use; run the command again"

    def _error(self, file: str, error: Exception) -> FeatureError:
        where = f"feature {shown(file)} ({self._place_in_words})"
        if isinstance(error, FileNotFoundError):
            names = self._samples.names
            example = f", such as {shown(names[0].decode(errors='replace'))}" if len(names) else ""
            return FeatureError(
                f"{where} does not exist", hint=f"The file holds {len(names)} samples{example}. Check --features."
            )
        reason = error.strerror if isinstance(error, OSError) and error.strerror else shown(error)
        return FeatureError(f"{where}: {reason}")


def _as_hdf5_does(file: str) -> str:
    if "//" in file or "./" in file or file.startswith("/"):
        return "/".join(part for part in file.split("/") if part not in ("", "."))
    return file


def unpacked(content: bytes, stored: Stored, room: int, left_out: int) -> bytes:
    """The ``room`` bytes of a chunk, its filters undone but for those left out. Raises ``ValueError``, `zlib.error`."""
    for number, name in reversed(list(enumerate(stored.filters))):
        if left_out >> number & 1:
            continue
        if name == "gzip":
            stream = zlib.decompressobj()
            content = stream.decompress(content, room + 1)
            if not stream.eof or stream.unused_data:
                raise ValueError("a chunk of it is not whole")
        else:
            if len(content) != room:
                break
            content = np.frombuffer(content, np.uint8).reshape(stored.dtype.itemsize, -1).T.tobytes()
    if len(content) != room:
        raise ValueError(f"a chunk of it has {len(content)} bytes, expected {room}")
    return content
