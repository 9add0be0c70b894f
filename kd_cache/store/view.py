"""The view: one plain ``.npy`` per row, for code that knows nothing of packs. It can always be rebuilt from them.

A view that is not there yet is written into a temporary folder beside its place, file by file, and the folder gets its
name when all of it is there. Where a folder stands already, a row that is missing or differs is written under a
temporary name and renamed. So whatever stops the writer, what has a row's name is a whole row. Files are not fsynced
one by one: the packs are the truth, and a view that a power cut thinned out is rebuilt from them.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_cache.errors import CorruptError, MissingLogitsError, StoreError, UsageError, shown
from kd_cache.files.atomic import (
    TEMPORARY,
    make_directory,
    store_errors,
    sync_directory,
    temporary_beside,
    temporary_name,
)
from kd_cache.files.npy import parse_header

if TYPE_CHECKING:
    from kd_cache.store.origin import Origin
    from kd_cache.store.pack import Pack

ROW_FILE_NAME = re.compile(r"[0-9a-f]{32}\.npy\Z")
Blocks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
"""Gives keys ``[n, 16]`` and rows ``[n, C]``, block by block, and all again when it is called again."""

_WRITERS = 2
"""Threads that create files: file systems lock a folder while a name is added, so more gain nothing."""
_AT_ONCE = 8192
"""Rows that are compared with their files together."""
_ALONE = 2048
"""Fewer rows than this are not worth a second thread."""
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_LOOK = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW


@lru_cache(maxsize=16)
def _header(dtype: str, classes: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(classes, dtype))
    return buffer.getvalue()[: -classes * np.dtype(dtype).itemsize or None]


def row_file_bytes(row: np.ndarray) -> bytes:
    """The ``.npy`` file of one ``[C]`` row, byte for byte as ``np.save`` writes it."""
    return _header(row.dtype.str, len(row)) + row.tobytes()


def view_name(key: bytes) -> str:
    return f"{key.hex()}.npy"


def view_names(keys: np.ndarray) -> list[str]:
    """The file name of each of ``[N, 16]`` keys."""
    text = keys.tobytes().hex()
    return [f"{text[at : at + 32]}.npy" for at in range(0, len(text), 32)]


def without_files(origins: Mapping[str, Origin], asked: bool | None = None) -> list[str]:
    """Teachers whose rows are no vectors that a file could hold: a cache of one of them has no view.

    Raises `UsageError` where a view is ``asked`` for all the same.
    """
    found = [name for name, origin in origins.items() if origin.topk or origin.views]
    if found and asked:
        raise UsageError(
            f"there are no .npy files of {', '.join(map(shown, found))}: top-k rows, and rows of views, are no vectors "
            "of all classes",
            hint="kd_cache.LogitCache reads them; of top-k rows its dense(T) makes vectors.",
        )
    return found


class _Files:
    """The row files of a block: their names, and their bytes one after the other."""

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        if len(keys) != len(rows):
            raise ValueError(f"{len(keys)} keys for {len(rows)} rows")
        head = np.frombuffer(_header(rows.dtype.str, rows.shape[1]), np.uint8)
        content = np.empty((len(rows), len(head) + rows.shape[1] * rows.itemsize), np.uint8)
        content[:, : len(head)] = head
        content[:, len(head) :] = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
        self.names = view_names(keys)
        self.size = content.shape[1]
        self._bytes = content.reshape(-1).data

    def __len__(self) -> int:
        return len(self.names)

    def content(self, number: int) -> memoryview:
        return self._bytes[number * self.size : (number + 1) * self.size]


def write_view(directory: Path, blocks: Blocks, advance: Callable[[int], None] = lambda count: None) -> int:
    """Make ``directory`` hold the files of these rows; other files in it stay. Returns how many had to be written.

    ``advance`` hears of each block when it is done.

    Raises:
        StoreError: naming the file that cannot be written, or read and compared.
    """
    if not os.path.lexists(directory):
        written = _write_folder(directory, blocks, advance)
        if written is not None:
            return written
    make_directory(directory)
    written = 0
    for keys, rows in blocks():
        stale = [number for number, _ in differing(directory, keys, rows)]
        write_rows(directory, keys[stale], rows[stale])
        written += len(stale)
        advance(len(keys))
    return written


def _write_folder(directory: Path, blocks: Blocks, advance: Callable[[int], None]) -> int | None:
    """Write a view that is not there, and put it in place as a whole; ``None`` if another process was faster."""
    make_directory(directory.parent)
    written = 0
    with store_errors(directory, "write rows into"), _temporary_folder(directory) as temporary:
        with _opened(temporary) as folder:
            for keys, rows in blocks():
                _in_threads(_Files(keys, rows), directory, lambda name, content: _create(folder, name, content))
                written += len(keys)
                advance(len(keys))
        try:
            temporary.replace(directory)
        except OSError:  # another process was faster, or this file system renames no folders: file by file, then
            return None
        sync_directory(directory.parent)
    return written


@contextmanager
def _temporary_folder(directory: Path) -> Iterator[Path]:
    """A new folder beside ``directory`` under a unique temporary name; what is still there at the end goes."""
    temporary = directory.with_name(temporary_name())
    try:
        temporary.mkdir()  # in here: a signal may come as soon as it is there
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # what went wrong first is what the user must read
        raise
    if temporary.exists():
        shutil.rmtree(temporary)


def write_rows(directory: Path, keys: np.ndarray, rows: np.ndarray) -> None:
    """Write rows ``[N, C]`` under their keys ``[N, 16]`` into a folder that is there; each file appears whole.

    Raises:
        StoreError: naming the file that cannot be written.
    """
    if not len(keys):
        return
    files = _Files(keys, rows)
    with (
        store_errors(directory, "write rows into"),
        temporary_beside(directory / "row.npy") as temporary,
        _opened(directory) as folder,
    ):
        for number, name in enumerate(files.names):
            try:
                _create(folder, temporary.name, files.content(number))
                os.replace(temporary.name, name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError as error:
                raise _told(error, directory / name, "write") from error


def _create(folder: int, name: str, content: memoryview) -> None:
    """Create a file in an opened folder."""
    descriptor = os.open(name, _CREATE, 0o666, dir_fd=folder)
    try:
        written = os.write(descriptor, content)
        while written < len(content):  # just before a disk is full
            written += os.write(descriptor, content[written:])
    finally:
        os.close(descriptor)


def _in_threads(files: _Files, directory: Path, write: Callable[[str, memoryview], None]) -> None:
    """Call ``write`` for each file, in a few threads where that pays. The first error ends all of them."""
    failed = False

    def work(numbers: range) -> None:
        nonlocal failed
        try:
            for number in numbers:
                if failed:
                    return
                write(name := files.names[number], files.content(number))
        except BaseException as error:
            failed = True
            if isinstance(error, OSError):
                raise _told(error, directory / name, "write") from error
            raise

    count = len(files)
    if count < _ALONE:
        work(range(count))
        return
    with ThreadPoolExecutor(_WRITERS - 1, thread_name_prefix="write") as pool:
        others = [
            pool.submit(work, range(count * part // _WRITERS, count * (part + 1) // _WRITERS))
            for part in range(1, _WRITERS)
        ]
        work(range(count // _WRITERS))
        for other in others:
            other.result()


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    """The folder's descriptor: its files are then found without looking up the whole path for each."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def stored_names(directory: Path) -> set[str]:
    """Names of the files in a teacher's view, temporaries left out. A missing folder has none."""
    with store_errors(directory, "list"):
        try:
            return {name for name in os.listdir(directory) if not name.startswith(TEMPORARY)}
        except FileNotFoundError:
            return set()


def read_row_file(path: Path) -> bytes | None:
    """The bytes of a row's file, ``None`` if there is none; never more than 16 MiB of it.

    Raises:
        CorruptError: a link, a folder or a FIFO stands in its place; it is not followed.
        StoreError: it cannot be read.
    """
    with store_errors(path, "read"):
        try:
            descriptor = os.open(path, _LOOK)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
                raise _in_the_way(path) from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _in_the_way(path)
            return os.read(descriptor, 1 << 24)
        finally:
            os.close(descriptor)


def _told(error: OSError, path: Path, doing: str) -> StoreError:
    return StoreError(f"cannot {doing} {shown(path)}: {error.strerror or error}")


def _in_the_way(path: Path) -> CorruptError:
    return CorruptError(f"{shown(path)} is a link, a folder or a device, expected a plain file", hint="Remove it.")


def differing(directory: Path, keys: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, bool]]:
    """``(number, is_missing)`` of each row whose file is absent or not byte for byte the row's.

    Raises:
        StoreError: naming the file that cannot be read.
    """
    files = _Files(keys, rows)
    with store_errors(directory, "look into"), ExitStack() as stack:
        try:
            folder = stack.enter_context(_opened(directory))
        except FileNotFoundError:
            yield from ((number, True) for number in range(len(files)))
            return
        for number, name in enumerate(files.names):
            try:
                descriptor = os.open(name, _LOOK, dir_fd=folder)
                try:
                    content = os.read(descriptor, files.size + 1)
                finally:
                    os.close(descriptor)
            except OSError as error:
                # A link, a socket, a folder: not to be followed, and not the row's file.
                if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EAGAIN):
                    raise _told(error, directory / name, "read") from error
                yield number, error.errno == errno.ENOENT
                continue
            if content != files.content(number):  # a FIFO has nothing to give
                yield number, False


def rows_of(directory: Path, names: Collection[str], packs: Iterable[Pack]) -> set[str]:
    """Those of the files ``names`` that are, byte for byte, the file of a row of one of these packs under its key.

    These kd-cache wrote. Whatever else lies in the folder may be somebody's own, and is not removed.
    """
    left = set(names)
    for pack in packs:
        numbers = np.array([at for at, name in enumerate(view_names(pack.keys)) if name in left] if left else [], int)
        for start in range(0, len(numbers), _AT_ONCE):
            part = numbers[start : start + _AT_ONCE]
            others = {number for number, _ in differing(directory, pack.keys[part], pack.logits[part])}
            left -= {name for at, name in enumerate(view_names(pack.keys[part])) if at not in others}
    return {*names} - left


def is_row(path: Path) -> bool:
    """Whether a file is what `row_file_bytes` makes of some row."""
    try:
        content = read_row_file(path) or b""
        header = parse_header(content)
    except (CorruptError, ValueError):
        return False
    return (
        len(header.shape) == 1
        and header.size == len(content)
        and content.startswith(_header(header.dtype.str, header.shape[0]))
    )


def in_the_way(directory: Path, pack: Pack, known: Iterable[Pack]) -> list[str]:
    """The files under names of a pack's rows that kd-cache did not write: not the row of any pack that is ``known``.

    A file that a power cut left empty, cut short or full of zeros is nobody's.
    """
    there = stored_names(directory)
    if not there:
        return []
    names = view_names(pack.keys)
    taken = [number for number, name in enumerate(names) if name in there]
    differs = [taken[at] for at, _ in differing(directory, pack.keys[taken], pack.logits[taken])]
    ours = rows_of(directory, {names[number] for number in differs}, known)
    return [
        names[number]
        for number in differs
        if names[number] not in ours and not _is_torn(directory / names[number], row_file_bytes(pack.logits[number]))
    ]


def _is_torn(path: Path, whole: bytes) -> bool:
    content = read_row_file(path)
    return content is not None and (whole.startswith(content) or not content.strip(b"\0"))


def load_cached_logits_batch(
    cache_index: Mapping[str, Any], file_paths: Iterable[str], teacher: str = "city2scene"
) -> np.ndarray:
    """``[B, C]`` logits by the JSON index alone: the unchecked path, for code written against that index.

    Args:
        cache_index: the parsed ``cache_index.json``; its paths hold in the folder where the dump ran.
        file_paths: manifest paths.
        teacher: whose logits.

    Nothing is verified: not the teacher's weights, not the features, not the bytes. `kd_cache.LogitCache` does.

    Raises:
        MissingLogitsError: the index has no such teacher or file, or the row's file is not there.
    """
    paths = cache_index.get(teacher)
    if not isinstance(paths, Mapping):
        raise MissingLogitsError(f"the index holds no teacher {shown(teacher)}")
    rows = []
    for file in file_paths:
        if file not in paths:
            raise MissingLogitsError(f"the index holds no {teacher} logits of {shown(file)}")
        try:
            rows.append(np.load(paths[file], allow_pickle=False))
        except FileNotFoundError:
            raise MissingLogitsError(
                f"{shown(paths[file])} ({teacher} logits of {shown(file)}) does not exist",
                hint="The index's paths hold only in the folder where kd-cache dump ran.",
            ) from None
    return np.stack(rows)
