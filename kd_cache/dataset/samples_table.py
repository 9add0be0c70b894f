"""The samples table: what the parts of a dump need of a manifest and of the features' headers, read once for all.

A part that finds it maps it: it parses no manifest, and reads no header of another part's feature. A table is made of
permitted samples only, after the guard has looked at the whole manifest, and its name says of what: the manifest's
bytes, task, target, what the guard was told to let pass, where the features are. Where anything differs, or folders
have become links since, the table is another one. It is nothing but a shortcut: lost or damaged, it is made anew.

Layout of ``pending/samples-<digest of all that>.bin``, numbers little-endian, every piece padded with zeros to a
multiple of 64 bytes: magic ``b"KDCTABLE"``, version (u4), length of the head (u8), xxh3-128 of all after these 64
bytes (16 bytes, big-endian); the head (JSON); then, in key order, keys u1 [N, 16], labels i4 [N], shapes u2 or u4 [N]
(1: the first that the head lists; 0: the header could not be read), offsets u8 [N+1] and names u1 [M] (UTF-8).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import xxhash

import kd_cache
from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.guard import Places, Selection
from kd_cache.dataset.manifest import Manifest
from kd_cache.errors import FeatureError
from kd_cache.files.atomic import make_directory, open_file, write_atomic
from kd_cache.files.mapped import file_content
from kd_cache.files.strict_json import misfit, strict_json
from kd_cache.keys import are_ascending
from kd_cache.watch import Watcher

Shape = tuple[int, ...]
_MAGIC, _VERSION = b"KDCTABLE", 1
_HEAD = struct.Struct("<8sIQ16s")
_ALIGNED = 64
_MAPPED = 1 << 20
_BLOCK = 8192
_COLUMNS = {"keys": (("|u1",), 2), "labels": (("<i4",), 1), "shapes": (("<u2", "<u4"), 1), "offsets": (("<u8",), 1)}
_COLUMNS |= {"names": (("|u1",), 1)}
_FACTS = {
    "shapes": [[int]],
    "columns": {...: [(str, [int])]},
    "samples": int,
    "per_device": {...: int},
    "located": int,
    "locatable": int,
    "shared_locations": [str],
    "front_end": (None, {}),
    "folders": [str],
    "real": str,
}


def table_name(digest: str, told: Mapping[str, Any]) -> str:
    """What the table of a manifest is called: ``digest`` is the SHA-256 of its bytes, ``told`` all that it went by."""
    made_by = [_VERSION, kd_cache.__version__, digest, told]
    content = json.dumps(made_by, sort_keys=True, default=_in_full).encode("utf-8", "surrogatepass")
    return f"samples-{xxhash.xxh3_128_hexdigest(content)}.bin"


def _in_full(value: Any) -> Any:
    return [value.pattern, value.flags] if isinstance(value, re.Pattern) else dict(value)


class MappedNames(Sequence[str]):
    """Texts that lie one after the other in a file; each is decoded when it is asked for."""

    def __init__(self, offsets: np.ndarray, names: np.ndarray) -> None:
        self._offsets, self._names = offsets, names

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, number: int, /) -> str: ...
    @overload
    def __getitem__(self, number: slice, /) -> list[str]: ...
    def __getitem__(self, number: int | slice, /) -> str | list[str]:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        at = range(len(self))[number]
        return self._names[int(self._offsets[at]) : int(self._offsets[at + 1])].tobytes().decode("utf-8")


@dataclass(frozen=True)
class SamplesTable:
    """An opened table. ``head`` is what it says of all samples; arrays are read-only and in key order."""

    path: Path
    head: Mapping[str, Any]
    keys: np.ndarray  # [N, 16] u1
    labels: np.ndarray  # [N] i4
    numbers: np.ndarray  # [N] u2 or u4, of their shapes
    files: MappedNames

    @property
    def shapes(self) -> list[Shape]:
        """Every shape; the first has the number 1."""
        return [tuple(shape) for shape in self.head["shapes"]]

    def counts(self, until: int | None = None) -> dict[Shape, int]:
        """How many samples have each shape, of the first ones or of all."""
        counts = np.bincount(self.numbers[:until], minlength=len(self.shapes) + 1).tolist()
        return {shape: count for shape, count in zip(self.shapes, counts[1:], strict=True) if count}

    def unreadable(self, until: int | None = None) -> list[int]:
        """The samples whose header could not be read, of the first ones or of all."""
        found: list[int] = np.flatnonzero(self.numbers[:until] == 0).tolist()
        return found

    def remove(self) -> None:
        """For who finds that features have other shapes by now. What is mapped stays so."""
        self.path.unlink(missing_ok=True)


def find_table(directory: Path, name: str, data_root: Path) -> SamplesTable | None:
    """The table of this name; ``None`` where there is none that is whole, or folders are other ones since."""
    try:
        table = _opened(directory / name)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return table if _real(table.head["folders"], data_root) == table.head["real"] else None


def _opened(path: Path) -> SamplesTable:
    """Raises ``OSError`` and ``ValueError``."""
    with open_file(path) as file:
        content = file_content(file, _MAPPED)
    if len(content) < _ALIGNED:
        raise ValueError("it is truncated")
    magic, version, length, digest = _HEAD.unpack_from(content[:_ALIGNED].tobytes())
    if (magic, version) != (_MAGIC, _VERSION) or xxhash.xxh3_128_digest(content[_ALIGNED:].data) != digest:
        raise ValueError("its bytes do not match their digest")
    head = strict_json(content[_ALIGNED : _ALIGNED + length].tobytes())
    if not isinstance(head, dict) or head.keys() != _FACTS.keys() or (wrong := misfit(head, _FACTS)) is not None:
        raise ValueError(f"its head is none: {wrong}")
    columns = dict(_columns(content, _padded(_ALIGNED + length), head["columns"]))
    offsets, names = columns["offsets"], columns["names"]
    fit = {len(columns[name]) for name in ("keys", "labels", "shapes")} == {len(offsets) - 1}
    if not fit or offsets[-1] != len(names) or (offsets[1:] < offsets[:-1]).any() or not are_ascending(columns["keys"]):
        raise ValueError("its columns disagree")
    return SamplesTable(path, head, columns["keys"], columns["labels"], columns["shapes"], MappedNames(offsets, names))


def _columns(content: np.ndarray, start: int, told: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    if told.keys() != _COLUMNS.keys():
        raise ValueError("its columns are others")
    for name, (kinds, axes) in _COLUMNS.items():
        kind, shape = told[name]
        if kind not in kinds or len(shape) != axes:
            raise ValueError(f"{name} is another kind of column")
        size = math.prod(shape) * np.dtype(kind).itemsize
        yield name, content[start : start + size].view(kind).reshape(shape)
        start += _padded(size)
    if start != len(content):
        raise ValueError("it has another length")


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def make_table(
    path: Path,
    manifest: Manifest,
    selection: Selection,
    features: FeatureSource,
    data_root: Path,
    workers: int = 2,
    watcher: Watcher | None = None,
) -> None:
    """Read the header of every permitted feature, and write the table durably; two that do so write the same.

    Raises:
        StoreError: it cannot be written.
    """
    names = [file.encode("utf-8") for file in selection.by_key]
    shapes, numbers = _numbered(_headers(features, selection.by_key, workers, watcher or Watcher()), len(names))
    offsets = np.zeros(len(names) + 1, "<u8")
    np.cumsum(np.fromiter(map(len, names), np.int64, len(names)), out=offsets[1:])
    columns = {
        "keys": selection.keys,
        "labels": selection.labels.astype("<i4"),
        "shapes": numbers,
        "offsets": offsets,
        "names": np.frombuffer(b"".join(names), np.uint8),
    }
    folders = sorted({sample.file.rpartition("/")[0] for sample in manifest})
    head = {
        "shapes": shapes,
        "columns": {name: [column.dtype.str, column.shape] for name, column in columns.items()},
        "samples": len(manifest),
        "per_device": selection.per_device,
        "located": selection.located,
        "locatable": selection.locatable,
        "shared_locations": selection.shared_locations,
        "front_end": manifest.front_end,
        "folders": folders,
        "real": _real(folders, data_root),
    }
    text = json.dumps(head, ensure_ascii=False).encode("utf-8", "surrogatepass")
    pieces: list[bytes | memoryview] = []
    for piece in (memoryview(text), *(np.ascontiguousarray(column).data for column in columns.values())):
        pieces += [piece.cast("B"), bytes(-piece.nbytes % _ALIGNED)]
    digest = xxhash.xxh3_128()
    for each in pieces:
        digest.update(each)
    first = _HEAD.pack(_MAGIC, _VERSION, len(text), digest.digest()).ljust(_ALIGNED, b"\0")
    make_directory(path.parent)
    write_atomic(path, [first, *pieces])


def _real(folders: Iterable[str], data_root: Path) -> str:
    """What tells whether folders are the same ones still: a link among them can make two files of two splits one."""
    places = Places(data_root)
    digest = hashlib.sha256()
    for folder in folders:
        digest.update(places.plain(f"{folder}/x" if folder else "x").encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _headers(
    features: FeatureSource, files: Sequence[str], workers: int, watcher: Watcher
) -> Iterator[list[Shape | None]]:
    """The shapes of the features' headers, some at a time, in their order; ``None`` for one that cannot be read."""

    def read(start: int) -> list[Shape | None]:
        return [_header(features, file) for file in files[start : start + _BLOCK]]

    watcher.stage("reading headers", len(files))
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="headers") as pool:
        for found in pool.map(read, range(0, len(files), _BLOCK)):
            watcher.advance(len(found))
            yield found


def _header(features: FeatureSource, file: str) -> Shape | None:
    try:
        return features.shape(file)
    except FeatureError:
        return None


def _numbered(blocks: Iterable[list[Shape | None]], count: int) -> tuple[list[Shape], np.ndarray]:
    """Every shape in the order in which they come, and the number ``[N]`` of each sample's: 0 where it has none."""
    known: dict[Shape | None, int] = {None: 0}
    numbers = np.zeros(count, "<u4")
    at = 0
    for block in blocks:
        numbers[at : at + len(block)] = [known.setdefault(shape, len(known)) for shape in block]
        at += len(block)
    shapes = [shape for shape in known if shape is not None]
    return shapes, numbers.astype("<u2") if len(known) <= 1 << 16 else numbers
