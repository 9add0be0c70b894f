"""Rows that something else made: a tensor of ``torch.save`` and its list of files, a table of text, an older cache.

Everything here is read without trust. Only files are opened, nothing in them is run, nothing is guessed: rows are
joined by the file names that come with them, never by position alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.errors import CorruptError, KDCacheError, MissingLogitsError, UsageError, listed, shown
from kd_cache.files.atomic import open_file, store_errors
from kd_cache.files.pickle_scan import PickleScan, unlisted
from kd_cache.files.strict_json import strict_json
from kd_cache.files.torch_zip import NotFromTorchError, UnreadablePickleError, brief, pickle_in, read_without_code
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import INDEX_NAME, read_older_maps
from kd_cache.store.older import older_row
from kd_cache.store.origin import STORED, VALUE_KINDS
from kd_cache.store.snapshot import Snapshot
from kd_cache.watch import Watcher

FILE_COLUMN = "file"
LOGIT_COLUMN = "logit_{}"
TENSOR, TABLE, OLDER = "pt", "tsv", "older cache"
MOST_BYTES = 1 << 35
"""A larger file is refused unread, unless asked for: ten million rows of 527 classes take 21 GB."""
MOST_PICKLE = 1 << 28
MOST_LIST = 1 << 30
_FEW_STEPS = 100_000
MOST_LINE = 1 << 24
_SAFE = re.compile(r"collections\.OrderedDict|torch\.\w+Storage|torch\._utils\._rebuild_(tensor_v2|parameter)")
_KNOWN = ("teacher", "fingerprint", "parts", "value_kind", "class_names", "dtype", "rows", "sha256", "files")
_ROWS = 16_384


@dataclass(frozen=True)
class Foreign:
    """One teacher's rows from outside, those of permitted samples.

    Attributes:
        teacher: the name that the source suggests.
        kind: what the source is.
        table: ``[M, C]`` float32 or float16; ``files[i]`` is row ``numbers[i]`` of it.
        left_out: how many rows are of samples that are not permitted.
        bad: permitted files whose row cannot be read, with the error.
    """

    teacher: str
    kind: str
    files: list[str]
    numbers: np.ndarray
    table: np.ndarray
    left_out: int
    value_kind: str | None = None
    class_names: tuple[str, ...] | None = None
    bad: Mapping[str, KDCacheError] = field(default_factory=dict)


class _Everything(frozenset[str]):
    """Whatever a source names."""

    def __contains__(self, name: object) -> bool:
        return True


def named_files(path: Path, files_list: Path | None = None, max_bytes: int = MOST_BYTES) -> list[str]:
    """The files whose rows a source holds. Arguments and errors as for `read_source`."""
    found = read_source(path, _Everything(), files_list=files_list, max_bytes=max_bytes)
    return list(dict.fromkeys(file for foreign in found for file in foreign.files))


def _set(names: Collection[str]) -> Collection[str]:
    return names if isinstance(names, _Everything) else frozenset(names)


def read_source(
    path: Path,
    permitted: Collection[str],
    *,
    files_list: Path | None = None,
    dtype: str | None = None,
    max_bytes: int = MOST_BYTES,
    watcher: Watcher | None = None,
) -> list[Foreign]:
    """Read what is at ``path``; its content decides what it is.

    Args:
        path: a folder of the older script, a file of ``torch.save``, or a table as ``kd-cache export`` writes it.
        permitted: the files whose rows are wanted.
        files_list: the rows' files, for a bare tensor whose list is not beside it.
        dtype: ``fp32`` or ``fp16``: what the numbers of a table are (by default fp32).
        max_bytes: a larger file is refused unread.

    Raises:
        UsageError: it is none of these, or not complete and plain.
        CorruptError: rows and list are not those that were exported together.
        StoreError: it cannot be read.
    """
    with store_errors(path, "read"):
        is_folder = path.is_dir()
        head = b"" if is_folder else _head(path, max_bytes)
    if files_list is not None and not head.startswith(b"PK"):
        raise UsageError("--files-list belongs to a tensor; what was named is none", hint="Leave it out.")
    if is_folder:
        if dtype is not None:
            raise UsageError("--dtype is for tables of text; this source has types of its own")
        return _read_older(CacheFolder(path), permitted, watcher or Watcher())
    if head.startswith(b"PK\x03\x04"):
        return [_read_tensor(path, permitted, files_list, dtype)]
    if _starts_as_table(head):
        return [_read_table(path, permitted, dtype or "fp32")]
    raise UsageError(
        f"{shown(path)}: expected a file of torch.save, a table whose first column is {FILE_COLUMN!r}, or the folder "
        f"of a cache; found {_look(head)}"
    )


def files_list_of(path: Path) -> Path:
    """Where the list of files beside a tensor is: ``scene.pt`` has ``scene.files.json``."""
    return path.with_suffix(".files.json")


def _head(path: Path, max_bytes: int) -> bytes:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UsageError(
                f"{shown(path)} has {size} bytes, expected at most {max_bytes}",
                hint="If it is meant to be that large, pass --max-source-bytes.",
            )
        return file.read(512) or b""


def _starts_as_table(head: bytes) -> bool:
    first = head.removeprefix(b"\xef\xbb\xbf").split(b"\t", 1)[0]
    return b"\t" in head and first.strip(b'"') == FILE_COLUMN.encode()


def _look(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head[0] == 0x80:
        return "a pickle, or a file of torch.save before 1.6 (save it again with a newer torch)"
    return f"a file that starts with {shown(head[:40].decode('ascii', 'backslashreplace'))}"


# -- which rows are wanted --------------------------------------------------------------------------------------------


def _wanted(path: Path, files: Sequence[str], permitted: Collection[str]) -> np.ndarray:
    """Row numbers of permitted files. Raises `UsageError` where a file has two rows."""
    first: dict[str, int] = {}
    twice: list[str] = []
    for number, file in enumerate(files):
        if file in first:
            twice.append(f"{file} (row {first[file]} and row {number})")
        first.setdefault(file, number)
    if twice:
        raise UsageError(
            f"{shown(path)}: {len(twice)} files have more than one row (counted from 0)\n{listed(twice)}",
            hint="Which one is right? Leave the others out.",
        )
    allowed = _set(permitted)
    return np.array([number for number, file in enumerate(files) if file in allowed], np.int64)


# -- a tensor and its list of files -----------------------------------------------------------------------------------


def _read_tensor(path: Path, permitted: Collection[str], files_list: Path | None, dtype: str | None) -> Foreign:
    content = _load(path)
    if isinstance(content, dict):
        if files_list is not None:
            raise UsageError(f"{shown(path)} has a list of files of its own", hint="Leave out --files-list.")
        _check_dict(path, content)
        table, said = _array(path, content["logits"]), {"files": content["files"]}
        name = shown(path)
    else:
        table, list_path = _array(path, content), files_list or files_list_of(path)
        said, name = _read_list(path, list_path), shown(list_path)
    files = _checked_files(name, said["files"])
    if len(files) != len(table):
        raise UsageError(f"{shown(path)} has {len(table)} rows, but {name} names {len(files)} files")
    _check_said(path, name, said, table)
    stored = next(key for key, value in STORED.items() if np.dtype(value) == table.dtype)
    if dtype not in (None, stored):
        raise UsageError(f"{shown(path)} holds {stored}, not {dtype}; rows are never converted")
    numbers = _wanted(path, files, permitted)
    names = said.get("class_names")
    return Foreign(
        str(said.get("teacher", path.stem)),
        TENSOR,
        [files[number] for number in numbers.tolist()],
        numbers,
        table,
        len(files) - len(numbers),
        said.get("value_kind"),
        None if names is None else tuple(names),
    )


def _check_dict(path: Path, content: Mapping[Any, Any]) -> None:
    if set(content) != {"logits", "files"}:
        raise UsageError(
            f"{shown(path)}: expected a tensor, or a dict of 'logits' and 'files' and nothing else; found a dict of "
            f"{', '.join(repr(shown(key)) for key in list(content)[:10]) or 'nothing'}",
            hint="Save the tensor of one teacher alone, and pass the list of its files with --files-list.",
        )


def _array(path: Path, value: Any) -> np.ndarray:
    """The numbers ``[N, C]`` of a tensor that is plain and whole."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise UsageError(f"{shown(path)}: expected a tensor [rows, classes], found a {type(value).__name__}")
    if value.layout != torch.strided or value.device.type != "cpu" or value.ndim != 2 or 0 in value.shape:
        raise UsageError(f"{shown(path)}: expected a plain tensor [rows, classes], found shape {list(value.shape)}")
    if value.dtype not in (torch.float32, torch.float16):
        raise UsageError(
            f"{shown(path)}: expected float32 or float16, found {str(value.dtype).removeprefix('torch.')}",
            hint="Save it again with .float().",
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UsageError(f"{shown(path)}: its shape {list(value.shape)} promises more numbers than it holds")
    array: np.ndarray = value.detach().contiguous().numpy()
    return array


def _check_said(path: Path, name: str, said: Mapping[str, Any], table: np.ndarray) -> None:
    """The list must be of this tensor, where it says of which it is."""
    kind, names = said.get("value_kind"), said.get("class_names")
    if kind is not None and kind not in VALUE_KINDS:
        raise UsageError(f"{name}: value_kind is {shown(kind)}, expected one of {', '.join(VALUE_KINDS)}")
    if names is not None and not (
        isinstance(names, list) and len(names) == table.shape[1] and all(isinstance(one, str) for one in names)
    ):
        raise UsageError(f"{name}: class_names must be {table.shape[1]} texts, one per column")
    digest = said.get("sha256")
    if digest is not None and digest != hashlib.sha256(np.ascontiguousarray(table).data).hexdigest():
        raise CorruptError(
            f"{shown(path)} does not hold the rows that {name} was written with",
            hint="Export both again, or pass the right list with --files-list.",
        )


def _load(path: Path) -> Any:
    """The content of a file of ``torch.save``, tensors and plain containers only."""
    with store_errors(path, "read"), open_file(path) as raw:
        before = os.fstat(raw.fileno())
        with _refusing(path, "the file is damaged, or not of torch.save"):
            protocol = _check_archive(path, raw, before.st_size)
            content = _weights_only(raw, protocol)
        after = os.fstat(raw.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UsageError(f"{shown(path)} changed while it was read", hint="Wait until it is written, then retry.")
    return content


@contextmanager
def _refusing(path: Path, what: str) -> Iterator[None]:
    """Hostile bytes lead a parser to any error at all; none may escape."""
    try:
        yield
    except KDCacheError:
        raise
    except UnreadablePickleError as error:
        raise UsageError(f"{shown(path)}: {error}", hint=error.hint) from error
    except Exception as error:
        raise UsageError(f"{shown(path)}: {what} ({brief(error)})") from error


def _check_archive(path: Path, raw: io.FileIO, size: int) -> int:
    """Refuse, before torch sees it, what could unpack to any size or call anything; gives the pickle's protocol."""
    try:
        pickled = pickle_in(raw, size, MOST_PICKLE)
    except NotFromTorchError as error:
        raise UsageError(f"{shown(path)}: {error}") from error
    scan = PickleScan(pickled, 1, most_steps=_FEW_STEPS + len(pickled) // 4)  # a name takes two, and many bytes
    if foreign := unlisted(scan.calls, _SAFE, ()):
        raise UsageError(
            f"{shown(path)} calls more than a tensor needs; it was refused and nothing ran\n{listed(foreign)}",
            hint="Save the bare tensor again: torch.save(tensor, path).",
        )
    if scan.excess or not scan.whole:
        why = scan.excess or "its pickle breaks off"
        raise UsageError(f"{shown(path)}: its structure is larger than a tensor and a list of files need: {why}")
    raw.seek(0)
    return scan.protocol


def _weights_only(raw: io.FileIO, protocol: int) -> Any:
    buffered = io.BufferedReader(raw)
    try:
        return read_without_code(buffered, protocol)
    finally:
        buffered.detach()  # the file is the caller's to close


# -- lists of files ---------------------------------------------------------------------------------------------------


def _read_list(path: Path, list_path: Path) -> dict[str, Any]:
    """A list of files as ``{"files": […]}``, with what an export's list says besides."""
    if not os.path.lexists(list_path):
        raise UsageError(
            f"{shown(path)} is a bare tensor, and {shown(list_path)}, the list of its files, does not exist",
            hint="Pass it with --files-list: a JSON list, or one file a line, in the order of the rows.",
        )
    text = _text(list_path, MOST_LIST)
    if list_path.suffix.lower() != ".json":
        return {"files": _lines(list_path, text)}
    with _refusing(list_path, "it is not JSON"):
        content = strict_json(text)
    if isinstance(content, list):
        return {"files": content}
    if not isinstance(content, dict) or "files" not in content or not set(content) <= set(_KNOWN):
        raise UsageError(f"{shown(list_path)}: expected a list of files, or what kd-cache export wrote beside a tensor")
    return content


def _lines(path: Path, text: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if "" in lines:
        raise UsageError(f"{shown(path)}: line {lines.index('') + 1} is empty, expected one file a line")
    return lines


def _checked_files(name: str, files: Any) -> list[str]:
    if not isinstance(files, list):
        raise UsageError(f"{name}: expected a list of files, found a {type(files).__name__}")
    for number, file in enumerate(files):
        if not isinstance(file, str) or not file:
            raise UsageError(
                f"{name}: item {number} (counted from 0) is not the name of a file but {shown(file)[:200]!r}"
            )
    return files


def _text(path: Path, most: int) -> str:
    with store_errors(path, "read"), open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UsageError(f"{shown(path)} has {size} bytes, expected at most {most}")
        raw = file.readall()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown(path)} is not UTF-8 (byte {error.start})") from None


# -- a table of text --------------------------------------------------------------------------------------------------


def _read_table(path: Path, permitted: Collection[str], dtype: str) -> Foreign:
    allowed = _set(permitted)
    names: list[str] = []
    kept: list[str] = []
    blocks: list[np.ndarray] = []
    block: list[list[float]] = []
    with store_errors(path, "read"), open_file(path) as raw, _refusing(path, "it is not a table of text"):
        reader = csv.reader(_text_lines(raw), delimiter="\t", strict=True)
        columns = _header(path, next(reader))
        for cells in reader:
            names.append(_name_of(path, reader.line_num, cells, len(columns)))
            if names[-1] in allowed:
                kept.append(names[-1])
                block.append(_numbers(path, reader.line_num, cells[1:]))
            if len(block) == _ROWS:
                blocks.append(_stored(block, dtype))
                block = []
    if not names:
        raise UsageError(f"{shown(path)} has a header and no rows")
    _wanted(path, names, ())  # finds what is there twice
    blocks.append(_stored(block, dtype).reshape(len(block), len(columns)))
    unnamed = columns == [LOGIT_COLUMN.format(number) for number in range(len(columns))]
    return Foreign(
        path.stem,
        TABLE,
        kept,
        np.arange(len(kept)),
        np.concatenate(blocks),
        len(names) - len(kept),
        class_names=None if unnamed else tuple(columns),
    )


def _text_lines(raw: io.FileIO) -> Iterator[str]:
    """Lines as they are, quoted line breaks included, never more than a bounded piece of text at once."""
    with io.TextIOWrapper(io.BufferedReader(raw), "utf-8-sig", newline="") as text:
        while line := text.readline(MOST_LINE):
            if len(line) == MOST_LINE:
                raise ValueError(f"a line has more than {MOST_LINE} characters")
            yield line


def _header(path: Path, cells: list[str]) -> list[str]:
    columns = cells[1:]
    if not columns or len(set(columns)) != len(columns):
        raise UsageError(f"{shown(path)}: expected the header {FILE_COLUMN!r} and one name per class, each once")
    return columns


def _name_of(path: Path, line: int, cells: list[str], classes: int) -> str:
    if len(cells) != classes + 1 or not cells[0]:
        raise UsageError(
            f"{shown(path)}: the row that ends in line {line} has {len(cells)} cells, expected a file and "
            f"{classes} numbers"
        )
    return cells[0]


def _numbers(path: Path, line: int, cells: list[str]) -> list[float]:
    try:
        text = "".join(cells)
        if "_" in text or not text.isascii():  # float() takes 1_000 and ١ for numbers
            raise ValueError
        return [float(cell) for cell in cells]
    except ValueError:
        raise UsageError(f"{shown(path)}: the row that ends in line {line} holds something else than numbers") from None


def _stored(block: list[list[float]], dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as that
        return np.array(block, np.float64).astype(STORED[dtype])


# -- a cache of the older script --------------------------------------------------------------------------------------


def _read_older(folder: CacheFolder, permitted: Collection[str], watcher: Watcher) -> list[Foreign]:
    snapshot = Snapshot(folder)
    if snapshot.is_older:
        maps = read_older_maps(folder.index_path)
        return [_older(folder, name, paths, _set(permitted), watcher) for name, paths in maps.items()]
    if snapshot.trouble is not None:
        raise snapshot.trouble
    if snapshot.index is None:
        raise UsageError(f"the folder {shown(folder.path)} has no {INDEX_NAME}", hint="Name a cache, a .pt or a .tsv.")
    raise UsageError(
        f"{shown(folder.path)} is a cache of kd-cache already; there is nothing to adopt",
        hint="To bring it into another cache, use kd-cache merge.",
    )


def _older(
    folder: CacheFolder, name: str, paths: Mapping[str, str], permitted: Collection[str], watcher: Watcher
) -> Foreign:
    """One teacher's row files; those of samples that are not permitted are not even opened."""
    wanted = [file for file in paths if file in permitted]
    kept: list[str] = []
    rows: list[np.ndarray] = []
    bad: dict[str, KDCacheError] = {}
    watcher.stage(f"reading rows of {name}", len(wanted))
    for file in wanted:
        try:
            # Its paths hold only where that script ran; the files are found beside the index, wherever it was moved.
            row = older_row(folder.view_path(name) / Path(paths[file]).name, file)
        except (CorruptError, MissingLogitsError) as error:
            bad[file] = error
        else:
            kept.append(file)
            rows.append(row)
        watcher.advance(1)
    return Foreign(
        name, OLDER, kept, np.arange(len(kept)), _one_table(name, kept, rows), len(paths) - len(wanted), bad=bad
    )


def _one_table(name: str, files: Sequence[str], rows: Sequence[np.ndarray]) -> np.ndarray:
    said: Callable[[np.ndarray], str] = lambda row: f"{len(row)} of {row.dtype}"  # noqa: E731
    for file, row in zip(files, rows, strict=True):
        if (len(row), row.dtype) != (len(rows[0]), rows[0].dtype):
            raise UsageError(
                f"the rows of {name} differ: {shown(files[0])} has {said(rows[0])}, {shown(file)} has {said(row)}"
            )
    return np.stack(rows) if rows else np.empty((0, 0), np.float32)
