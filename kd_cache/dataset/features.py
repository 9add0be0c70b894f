"""Inputs: one plain ``.npy`` per sample, read strictly and never outside its root.

A task says what they are: features, floats of shape ``[T, F]`` with one F for all, or any tensor of numbers.

A file is opened once, without following a link out of the data root and without ever blocking on a FIFO; its header is
parsed by this module (no pickle, no surprises), its size must be exact, its values finite.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import xxhash

from kd_cache.errors import FeatureError, UsageError, listed, shown
from kd_cache.files.npy import FLOATS, MAX_HEADER, NUMBERS, check_size, parse_header, read_array

MAX_BYTES = 1 << 24
"""A feature file above this is refused by default: one second of log-mel takes about 25 kB, and a dump holds dozens."""
PATH_MAX = 4096
_HALF_EXPONENT = np.uint16(0x7C00)
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW


class Feature(NamedTuple):
    """One sample's input as stored, ``array`` (C order, read-only), and its digest.

    Features are ``[T, F]`` of float32 or float16. Of an augmented input ``array`` is what came of it, ``digest`` still
    the clean one's, and ``draws`` ``[D]`` u4 say what was done (`kd_cache.dataset.views`).
    """

    array: np.ndarray
    digest: bytes
    draws: np.ndarray | None = None


StatRow = tuple[int, int, int, int, int]
UNKNOWN: StatRow = (-1, -1, -1, -1, -1)


def stat_row(status: os.stat_result) -> StatRow:
    """Device, inode, size, mtime and ctime in nanoseconds, as int64; -1 throughout for what is not a regular file."""
    if not stat.S_ISREG(status.st_mode):
        return UNKNOWN
    device, inode = (n if n < 1 << 63 else n - (1 << 64) for n in (status.st_dev, status.st_ino))
    return device, inode, status.st_size, status.st_mtime_ns, status.st_ctime_ns


IN_PYTHON, NAMES_ALONE = "a data set in Python", "names alone"
"""What stands in an index for the manifest's path where there is none."""


class FeatureSource:
    """Reads the features of manifest files.

    Args:
        root: data root; relative files lie below it.
        allow_outside: further folders or files that absolute files and links may lead to.
        max_bytes: a larger file is refused unread.
        bins: F of every feature; by default any.
        anything: an input may have any shape (an axis at least, none empty) and any dtype of `NUMBERS`.

    Raises:
        UsageError: the root is not a folder.
    """

    told = IN_PYTHON
    witness, excuse = "their files' size and times", " (was it written through a memory map?)"
    """What says that a feature did not change, and how it may be deceived."""

    def __init__(
        self,
        root: str | Path,
        allow_outside: Iterable[str | Path] = (),
        max_bytes: int = MAX_BYTES,
        bins: int | None = None,
        anything: bool = False,
    ) -> None:
        self.root = Path(root)
        self.max_bytes, self.bins, self.anything = max_bytes, bins, anything
        if not self.root.is_dir():
            raise UsageError(f"the data root {shown(root)} is not a folder", hint="Pass it with --data-root.")
        self._permitted = tuple(os.path.realpath(path) for path in (root, *allow_outside))
        self._directories: dict[str, tuple[str, bool]] = {}

    @property
    def place(self) -> str:
        """Where the features are, links resolved: elsewhere, files of the same names are others."""
        return os.path.realpath(self.root)

    def read(self, file: str) -> Feature:
        """The whole array, checked and digested.

        Raises:
            FeatureError: missing, outside the root, not a plain file, malformed, truncated, not finite, or not what
                the task takes (``[T, F]`` of float16 or float32).
        """
        try:
            descriptor, status = self.open(file)
            try:
                content = _read_all(descriptor, status.st_size, self.max_bytes)
            finally:
                os.close(descriptor)
            array = read_array(content, self._dtypes)
            check_array(array, self.bins, anything=self.anything)
        except (ValueError, OSError) as error:
            raise self._error(file, error) from None
        return Feature(array, input_digest(array))

    @property
    def _dtypes(self) -> tuple[str, ...]:
        return NUMBERS if self.anything else FLOATS

    def try_read(self, file: str) -> Feature | FeatureError:
        """As `read`, with the error as the result: for those who go on without the sample."""
        try:
            return self.read(file)
        except FeatureError as error:
            return error

    def read_many(self, files: Sequence[str]) -> list[Feature | FeatureError]:
        """As `try_read` of each, in their order: what a thread that reads ahead takes at once."""
        return [self.try_read(file) for file in files]

    def stat_many(self, files: Sequence[str]) -> np.ndarray:
        """``[N, 5]`` int64: device, inode, size, mtime and ctime in nanoseconds of each file, which is not opened.

        A row of -1 is a file that only `read` can judge: missing, a link, not a regular file, too large, outside the
        permitted places.
        """
        rows = [UNKNOWN] * len(files)
        for number, file in enumerate(files):
            with suppress(ValueError, OSError):
                path, inside = self._path(file)
                if inside or self._is_permitted(path):
                    status = os.lstat(path)
                    if status.st_size <= self.max_bytes:
                        rows[number] = stat_row(status)
        return np.array(rows, np.int64).reshape(-1, 5)

    def missing(self, files: Sequence[str]) -> dict[str, str]:
        """Which of them are not there or cannot be opened, and why. Nothing is read."""
        return {file: self._error(file, error).message for file, error in self._unopened(files)}

    def _unopened(self, files: Sequence[str]) -> Iterator[tuple[str, Exception]]:
        for number in np.flatnonzero(self.stat_many(files)[:, 0] < 0).tolist():
            try:
                self._look(files[number])
            except (ValueError, OSError) as error:
                yield files[number], error

    def _absent(self, files: Sequence[str]) -> list[str]:
        """Those that are not there at all: what is wrong with another, only reading tells."""
        return [file for file, error in self._unopened(files) if isinstance(error, FileNotFoundError)]

    def _look(self, file: str) -> None:
        descriptor, status = self.open(file)
        os.close(descriptor)
        _refuse_large(status.st_size, self.max_bytes)

    def shape(self, file: str) -> tuple[int, ...]:
        """``(T, F)``, or what shape it is, from the header alone: values are not looked at. Raises as `read` does."""
        try:
            descriptor, status = self.open(file)
            try:
                header = parse_header(os.read(descriptor, MAX_HEADER + 12), self._dtypes)
                check_size(header, status.st_size)
            finally:
                os.close(descriptor)
            return checked_shape(header.shape, anything=self.anything)
        except (ValueError, OSError) as error:
            raise self._error(file, error) from None

    def refusal(self, file: str, error: FeatureError, files: Sequence[str]) -> FeatureError:
        """What to raise where ``file`` cannot be done without: if it is missing, it names all of ``files`` that are."""
        missing = self._absent(files) if self._absent([file]) else []
        if not missing:
            return error
        others = (name for name in _other_spellings(missing[0]) if name != missing[0])
        there = next((name for name in others if not self.missing([name])), None)
        hint = error.hint
        if there is not None:
            hint = f"{shown(there)} is there: the manifest must call it so, or --data-root is another folder."
        if len(missing) == 1:
            return FeatureError(error.message, hint=hint)
        return FeatureError(
            f"{len(missing):,} of {len(files):,} features are missing {self._place_in_words}\n{listed(missing)}",
            hint=hint,
        )

    @property
    def _place_in_words(self) -> str:
        return f"under {shown(self.root)}"

    def open(self, file: str) -> tuple[int, os.stat_result]:
        """A descriptor of the file, for the caller to close, and its status. Raises ``ValueError`` and ``OSError``."""
        path, inside = self._path(file)
        if not inside:
            self._refuse_outside(path)
        try:
            descriptor = os.open(path, _OPEN)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            # The file itself is a link: follow it to its end, and open that only if it is in a permitted place.
            target = os.path.realpath(path, strict=True)
            self._refuse_outside(target)
            descriptor = os.open(target, _OPEN)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise ValueError("it is not a regular file")
        return descriptor, status

    def _path(self, file: str) -> tuple[str, bool]:
        """The path without links, but for the file itself, and whether all that is in its folder may be read."""
        if len(file) > PATH_MAX:  # no system opens it, and to look for links in it takes long
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        cut = file.rfind("/") + 1
        known = self._directories.get(file[:cut])
        if known is None:
            real = os.path.realpath(os.path.join(self.root, file[:cut])).rstrip("/")  # noqa: PTH118 (as written)
            known = self._directories[file[:cut]] = (f"{real}/", self._is_permitted(real))
        return known[0] + file[cut:], known[1]

    def _is_permitted(self, path: str) -> bool:
        return any(path == root or path.startswith(root.rstrip("/") + "/") for root in self._permitted)

    def _refuse_outside(self, path: str) -> None:
        if not self._is_permitted(path):
            raise ValueError(
                f"it lies outside the data root {shown(self.root)}; permit its folder with --allow-outside"
            )

    def _error(self, file: str, error: Exception) -> FeatureError:
        where = f"feature {shown(file)} ({self._place_in_words})"
        if isinstance(error, FileNotFoundError):
            return FeatureError(f"{where} does not exist", hint="Check --data-root, or restore the file.")
        reason = error.strerror if isinstance(error, OSError) and error.strerror else shown(error)
        return FeatureError(f"{where}: {reason}")


class AbsentFeatures(FeatureSource):
    """Features that are not at hand: where they were is known, and nothing can be read."""

    def __init__(self, place: Path) -> None:
        self.root, self.max_bytes, self.bins, self.anything = place, MAX_BYTES, None, True

    def open(self, file: str) -> tuple[int, os.stat_result]:
        raise ValueError("the features are not at hand")


def _other_spellings(file: str) -> Iterator[str]:
    """What a feature may be called in place of ``file``: with slashes, ``.npy`` for a sound, without outer folders."""
    plain = file.replace("\\", "/")
    stem = plain[: -len(PurePosixPath(plain).suffix) or None]
    for name in (plain, f"{stem}.npy", stem):
        yield from (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
        parts = name.split("/")
        yield from ("/".join(parts[number:]) for number in range(1, len(parts)))


def checked_shape(shape: tuple[int, ...], *, anything: bool = False) -> tuple[int, ...]:
    """The shape; ``ValueError`` for one that an input cannot have."""
    if anything and (not shape or 0 in shape):
        raise ValueError(f"its shape is {list(shape)}, expected an axis at least, and none of length 0")
    if not anything and (len(shape) != 2 or 0 in shape):
        raise ValueError(f"its shape is {list(shape)}, expected [frames, bins] with at least one of each")
    return shape


def check_array(array: np.ndarray, bins: int | None = None, *, anything: bool = False) -> None:
    """Raise ``ValueError`` for what is not finite, or not ``[T, F]`` with F = ``bins``; for ``anything`` see above."""
    if array.dtype.names is not None:
        _check_fields(array, anything=anything)
        return
    shape = checked_shape(array.shape, anything=anything)
    if bins is not None and shape[1:] != (bins,):
        if len(shape) != 2:
            raise ValueError(f"its shape is {list(shape)}, the manifest's front end makes [frames, {bins}]")
        turned = "; is it [bins, frames]?" if array.shape[0] == bins else ""
        raise ValueError(f"it has {array.shape[1]} bins, the manifest's front end has {bins}{turned}")
    if array.dtype.kind == "f" and not _is_finite(array):
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32))
        place = tuple(map(int, np.unravel_index(int(finite.argmin()), shape)))
        named = f"frame {place[0]}, bin {place[1]}" if len(place) == 2 else str(list(place))
        raise ValueError(f"its value at {named} is {array[place]}, expected finite numbers")


def _check_fields(array: np.ndarray, *, anything: bool) -> None:
    if not anything:
        raise ValueError("it is a dictionary of tensors, expected features [frames, bins], as the task's inputs are")
    for name in array.dtype.names or ():
        try:
            check_array(array[name], anything=True)
        except ValueError as error:
            raise ValueError(f"{shown(name)}: {error}") from None


def shape_of(array: np.ndarray) -> tuple[int, ...]:
    """What inputs are planned into batches by: the shape; of a dictionary those of its tensors, one after the other."""
    names = array.dtype.names
    return array.shape if names is None else sum((array.dtype[name].shape for name in names), ()) or (1,)


def _is_finite(array: np.ndarray) -> bool:
    """Whether every value is. What numpy does for half precision takes ten times as long as a look at the exponents."""
    if array.itemsize == 2:
        return bool((array.view(np.uint16) & _HALF_EXPONENT).max() < _HALF_EXPONENT)
    # No square is negative: a value that is not finite leaves a sum that is not. For longer ones BLAS starts threads.
    if array.itemsize == 4 and array.size <= 8192 and np.vdot(array, array) < np.inf:
        return True
    with np.errstate(over="ignore"):  # what is too large for float32 is not what a teacher could be given
        return bool(np.isfinite(array.astype(np.float32)).all())  # the sum of finite squares may overflow, too


def _refuse_large(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"it has {size} bytes, expected at most {most}; --max-feature-bytes permits more")


def _read_all(descriptor: int, size: int, most: int) -> bytes:
    """The whole file in one read; a byte more than its ``size`` is asked for, to notice where it grows."""
    _refuse_large(size, most)
    content = os.read(descriptor, size + 1)
    if len(content) == size:
        return content
    parts = [content]
    while chunk := os.read(descriptor, size + 1):
        parts.append(chunk)
        if sum(map(len, parts)) > most:
            raise ValueError("it grows while it is read")
    return b"".join(parts)


def input_digest(array: np.ndarray) -> bytes:
    """16 bytes of xxh3-128 over dtype, shape and C-order contents of a feature array.

    The container does not matter: the same array as ``.npy``, in Fortran order or packed elsewhere digests equally. Of
    a dictionary (a record ``[1]``) names, dtypes and shapes count, and the contents in the order of the names.
    """
    digest = xxhash.xxh3_128()
    if array.dtype.names is not None:
        digest.update(repr(array.dtype.descr).encode("utf-8", "surrogatepass"))
        digest.update(array.tobytes())
        return digest.digest()
    digest.update(f"{array.dtype.str}{array.shape}".encode("ascii"))
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
