"""Packs: immutable HDF5 files of rows, all of one teacher and one fingerprint.

Layout of ``<teacher>-<digest>.h5``: 512 bytes that `preamble` describes, then HDF5: keys [N,16] u1 (sorted), inputs
[N,16] u1, checksums [N] <u8, logits [N,C] <f4 or <f2 (in their place rows [N,W] u1 where dtype is topk:K; from a
multiple of 4,096 on; in format 1, as all others, of 64), file_offsets [N+1] <u8, files [M] u1 (UTF-8 paths, one after
the other); attributes: what made the rows.
With views: logits [N,V,C], and views [V] <u4 (their numbers), draws [N,V,D] <u4 (what was drawn).

A pack is whole or absent. Its bytes are checked before libhdf5 sees them (and libhdf5 sees nothing else), its structure
is checked before a byte is believed, and then its datasets are views of those bytes: no HDF5 handle stays open.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from kd_cache.errors import CorruptError, KDCacheError, StoreError, shown
from kd_cache.files.atomic import open_file, store_errors, sync_directory, temporary_beside, write_all
from kd_cache.files.hdf5 import Outlet, reading_hdf5, writing_hdf5
from kd_cache.files.mapped import file_content
from kd_cache.keys import are_ascending, keys_of_bytes
from kd_cache.store.file_names import FileNames, stretches
from kd_cache.store.names import is_teacher_name
from kd_cache.store.origin import FILE_VERSION, VALUE_KINDS, Fingerprint, Origin, canonical_json, is_dtype
from kd_cache.store.preamble import MAGIC, USER_BLOCK, Preamble, Span
from kd_cache.store.rows import PAGE, cut_views, datasets_of, flat_views, values_name
from kd_cache.store.rows import row_checksums as row_checksums

MAX_ATTRIBUTE = 60_000
MAPPED = 1 << 20
"""Packs of at least this size are memory-mapped. Smaller ones are read: a process may have only so many maps, and an
interrupted dump can leave thousands of small packs."""
CHECKED_AT_ONCE = 512
"""Rows whose checksums are compared together where a pack is checked as it is read."""
_AT_ONCE = 1 << 16
"""Checksums of so many rows are made together: memory does not grow with a pack."""
CHECKS = ("full", "lazy", "off")

_ATTRIBUTES = ("format_version", "teacher", "fingerprint", "parts", "value_kind", "class_names", "dtype")


@dataclass(frozen=True)
class Pack:
    """One opened pack: every array is a read-only view of the file's bytes."""

    path: Path
    origin: Origin
    keys: np.ndarray  # [N, 16] u1, sorted
    inputs: np.ndarray  # [N, 16] u1
    checksums: np.ndarray  # [N] u8
    logits: np.ndarray  # [N, C], of V views [N, V · C]; or top-k rows [N, W] u1
    file_offsets: np.ndarray  # [N + 1] u8
    files_blob: np.ndarray  # [M] u1
    draws: np.ndarray | None = None  # [N, V · D] u4, where there are views
    unchecked: np.ndarray | None = None  # [blocks] bool: nobody has looked at these yet; None where all is checked
    whole: Pack | None = field(
        default=None, kw_only=True
    )  # what these views were cut out of: checksums are of its rows

    def of_views(self, views: tuple[int, ...]) -> Pack | None:
        """Neighbouring views of all rows as a pack of their own, without a copy; ``None`` where it lacks one."""
        if views == self.origin.views:
            return self
        if self.draws is None or not set(views) <= set(self.origin.views):
            return None
        if views not in self._cuts:
            origin, held = self.origin.of_views(views), self.origin.views
            logits, draws = (cut_views(each, held, views) for each in (self.logits, self.draws))
            self._cuts[views] = replace(self, origin=origin, logits=logits, draws=draws, whole=self.whole or self)
        return self._cuts[views]

    @cached_property
    def _cuts(self) -> dict[tuple[int, ...], Pack]:
        return {}

    def touch(self, rows: np.ndarray) -> None:
        """Check the blocks in which ``rows`` lie, each the first time. Raises `CorruptError`."""
        if self.unchecked is None:
            return
        blocks = rows // CHECKED_AT_ONCE
        pending = self.unchecked[blocks]
        if not pending.any():
            return
        for block in np.unique(blocks[pending]).tolist():
            start = block * CHECKED_AT_ONCE
            wrong = self.wrong_rows(np.arange(start, min(start + CHECKED_AT_ONCE, len(self))))
            if wrong:
                raise _damaged(self.path, f"row {wrong[0]} does not match its checksum")
            self.unchecked[block] = False

    def __len__(self) -> int:
        return len(self.keys)

    def file_bytes(self, row: int) -> bytes:
        """The manifest path of a row, UTF-8."""
        return self.files_blob[int(self.file_offsets[row]) : int(self.file_offsets[row + 1])].tobytes()

    def name_lengths(self, rows: np.ndarray | slice) -> np.ndarray:
        """``[n]`` int64: how many bytes the manifest paths of these rows have."""
        return np.diff(self.file_offsets.view(np.int64))[rows]

    def names_blob(self, rows: np.ndarray) -> np.ndarray:
        """``[M]`` u1: the manifest paths of these rows, UTF-8, one after the other."""
        starts = self.file_offsets.view(np.int64)[rows]
        blob: np.ndarray = self.files_blob[stretches(starts, self.file_offsets.view(np.int64)[rows + 1] - starts)]
        return blob

    def file(self, row: int) -> str:
        """The manifest path of a row. Raises `CorruptError` if it is not UTF-8."""
        try:
            return self.file_bytes(row).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _damaged(self.path, f"the file name of row {row} is not UTF-8") from error

    @cached_property
    def files(self) -> list[str]:
        """The manifest paths of all rows. Raises `CorruptError` if one is not UTF-8."""
        names = self._names(slice(0, len(self)))
        try:
            return [name.decode("utf-8") for name in names]
        except UnicodeDecodeError:
            return [self.file(row) for row in range(len(self))]  # says which

    def _names(self, part: slice) -> list[bytes]:
        """The manifest paths of neighbouring rows, UTF-8."""
        offsets = self.file_offsets[part.start : part.stop + 1].astype(np.int64)
        first, *ends = (offsets - offsets[0]).tolist()
        blob = self.files_blob[int(offsets[0]) : int(offsets[-1])].tobytes()
        return [blob[start:end] for start, end in zip([first, *ends], ends, strict=False)]

    def wrong_rows(self, rows: np.ndarray | None = None) -> list[int]:
        """Those of ``rows`` (all by default) whose checksum, or whose key, is not that of what is stored beside it."""
        if self.whole is not None:
            return self.whole.wrong_rows(rows)
        rows = np.arange(len(self)) if rows is None else rows
        wrong = []
        for start in range(0, len(rows), _AT_ONCE):
            block = rows[start : start + _AT_ONCE]
            first, last = int(block[0]), int(block[-1])
            if np.array_equal(block, np.arange(first, last + 1)):  # neighbours need not be copied one by one
                part = slice(first, last + 1)
                bad = self._is_wrong(part, self._names(part))
            else:
                bad = self._is_wrong(block, list(map(self.file_bytes, block.tolist())))
            wrong += block[bad].tolist()
        return wrong

    def _is_wrong(self, rows: slice | np.ndarray, names: list[bytes]) -> np.ndarray:
        keys = self.keys[rows]
        draws = None if self.draws is None else self.draws[rows]
        expected = row_checksums(self.origin.fingerprint, keys, self.inputs[rows], self.logits[rows], draws)
        wrong: np.ndarray = (expected != self.checksums[rows]) | (keys_of_bytes(names) != keys).any(axis=1)
        if draws is not None:  # each begins with the number of its view
            views = self.origin.views
            wrong |= (draws.reshape(len(draws), len(views), -1)[:, :, 0] != views).any(axis=1)
        return wrong


def write_pack(
    directory: Path,
    origin: Origin,
    keys: np.ndarray,
    inputs: np.ndarray,
    files: Sequence[bytes] | FileNames,
    take: Callable[[slice], np.ndarray],
    block: int = 65_536,
    draws: Callable[[slice], np.ndarray] | None = None,
) -> Path:
    """Write one durable pack into ``directory`` and return its path.

    Args:
        keys, inputs: ``[N, 16]`` u1, keys strictly ascending, N ≥ 1.
        files: the N manifest paths, UTF-8, as a sequence of them or, of many rows, as `FileNames`.
        take: gives the rows of a slice as ``[n, C]`` in the stored dtype, so that any N fits in memory.
        draws: gives theirs as ``[n, V · D]`` u4, where the origin has views.

    Equal arguments give equal bytes and so the same name: writing a pack twice is harmless.

    Raises:
        StoreError: naming the path and the cause; nothing is left behind.
    """
    if not 0 < len(keys) == len(inputs) == len(files) or not are_ascending(keys):
        raise ValueError("a pack needs at least one row, and as many inputs and files as ascending keys")
    target = directory / f"{origin.teacher}-new.h5"
    with store_errors(directory, "write a pack into"), temporary_beside(target) as temporary:
        with temporary.open("x+b", buffering=0) as file:
            names = files if isinstance(files, FileNames) else FileNames.of(files)
            _write_hdf5(file, origin, keys, inputs, names, take, block, draws)
            digest = _seal_user_block(file, keys)
        final = directory / f"{origin.teacher}-{digest.hex()}.h5"
        try:
            _open_checked(temporary, final.name)
        except CorruptError as error:
            raise StoreError(f"{error}\nThe disk did not keep what was written to it.") from error
        temporary.replace(final)
        sync_directory(directory)
    return final


def write_part(directory: Path, pack: Pack, rows: np.ndarray) -> Path:
    """A pack of some of another's rows (numbers, ascending), durable when this returns. Raises as `write_pack`."""
    names = FileNames(pack.name_lengths(rows), lambda part: pack.names_blob(rows[part]))
    keys, inputs = pack.keys[rows], pack.inputs[rows]
    drawn = pack.draws
    draws = None if drawn is None else (lambda part: drawn[rows[part]])
    return write_pack(directory, pack.origin, keys, inputs, names, lambda part: pack.logits[rows[part]], draws=draws)


def _write_hdf5(
    file: io.FileIO,
    origin: Origin,
    keys: np.ndarray,
    inputs: np.ndarray,
    names: FileNames,
    take: Callable[[slice], np.ndarray],
    block: int,
    draws: Callable[[slice], np.ndarray] | None,
) -> None:
    count, views = len(keys), origin.views
    if bool(views) != (draws is not None) or bool(views) != (origin.policy is not None):
        raise ValueError("rows have draws where their origin has views of a policy, and only there")
    offsets = np.zeros(count + 1, "<u8")
    np.cumsum(names.lengths, out=offsets[1:])
    outlet = Outlet(file)
    with writing_hdf5(outlet, USER_BLOCK) as pack:
        for name, value in attributes_of(origin).items():
            pack.attrs[name] = value
        pack.create_dataset("keys", data=keys, track_times=False)
        pack.create_dataset("inputs", data=inputs, track_times=False)
        pack.create_dataset("checksums", (count,), "<u8", track_times=False)[:1] = 0  # gives it its place
        shape = (count, len(views), origin.width // len(views)) if views else (count, origin.width)
        pack.create_dataset(values_name(origin.dtype), shape, origin.stored, track_times=False)
        pack.create_dataset("file_offsets", data=offsets, track_times=False)
        files = pack.create_dataset("files", (int(offsets[-1]),), "|u1", track_times=False)
        for start in range(0, count, block):
            stop = min(start + block, count)
            files[int(offsets[start]) : int(offsets[stop])] = names.blob(slice(start, stop))
            outlet.raise_failure()
        if draws is not None:
            first = draws(slice(0, 1)).reshape(1, len(views), -1)
            pack.create_dataset("draws", (count, *first.shape[1:]), "<u4", track_times=False)[:1] = first
            pack.create_dataset("views", data=np.array(views, "<u4"), track_times=False)
    with writing_hdf5(outlet, USER_BLOCK, "r+", PAGE) as pack:  # HDF5 has one alignment for all that is placed
        checksums, logits = pack["checksums"], pack[values_name(origin.dtype)]
        for start in range(0, count, block):
            part = slice(start, min(start + block, count))
            rows = take(part)
            if rows.dtype != origin.stored or rows.shape != (part.stop - start, origin.width):
                raise ValueError(
                    f"expected {origin.width} values (classes) of {origin.dtype}, found {rows.dtype} {rows.shape}"
                )
            logits[part] = rows.reshape(len(rows), *shape[1:])
            mine = None if draws is None else draws(part)
            checksums[part] = row_checksums(origin.fingerprint, keys[part], inputs[part], rows, mine)
            if mine is not None:
                pack["draws"][part] = mine.reshape(len(rows), len(views), -1)
            outlet.raise_failure()


def attributes_of(origin: Origin) -> dict[str, np.bytes_]:
    """What a pack says of its rows. Raises `StoreError` where that is more than an HDF5 attribute holds."""
    texts = (
        str(FILE_VERSION),
        origin.teacher,
        origin.fingerprint.digest,
        canonical_json(dict(origin.fingerprint.parts)).decode(),
        origin.value_kind,
        json.dumps(origin.class_names, ensure_ascii=False),
        origin.dtype,
    )
    for name, text in zip(_ATTRIBUTES, texts, strict=True):
        if len(text.encode()) > MAX_ATTRIBUTE:
            raise StoreError(
                f"{name} of teacher {shown(origin.teacher)} takes more than {MAX_ATTRIBUTE} bytes",
                hint="Leave class_names out, or shorten them." if name == "class_names" else None,
            )
    return {name: np.bytes_(text.encode()) for name, text in zip(_ATTRIBUTES, texts, strict=True)}


def _seal_user_block(file: io.FileIO, keys: np.ndarray) -> bytes:
    """Fill the user block, fsync, and return the digest."""
    file.seek(USER_BLOCK)
    digest = xxhash.xxh3_128()
    length = 0
    while chunk := file.read(1 << 22):
        digest.update(chunk)
        length += len(chunk)
    file.seek(0)
    write_all(file, Preamble.new(length, digest.digest(), keys).block())
    os.fsync(file.fileno())
    return digest.digest()


def open_pack(path: Path, check: str = "full", name: str | None = None) -> Pack:
    """Open a pack and check its structure.

    Args:
        name: what it will be called, where it still has a temporary name.
        check: ``full`` compares the digest of every byte at once; ``lazy`` leaves that, and `Pack.touch` compares the
            checksums of rows when they are first read; ``off`` compares none.

    Raises:
        CorruptError: naming the file and what is wrong with it.
        StoreError: a newer format, or the file cannot be read.
        FileNotFoundError: it is not there (any more).
    """
    try:
        return _open_checked(path, name or path.name, check)
    except (FileNotFoundError, KDCacheError):
        raise
    except OSError as error:
        raise StoreError(f"cannot read the pack {shown(path)}: {error.strerror or error}") from error


def _open_checked(path: Path, name: str, check: str = "full") -> Pack:
    """`open_pack` for a file that will be called ``name``."""
    content = _content(path)
    preamble = _check_preamble(path, content)
    if check == "full" and xxhash.xxh3_128_digest(content[USER_BLOCK:].data) != preamble.digest:
        raise _damaged(path, "its bytes do not match their digest")
    if name.removesuffix(".h5").rpartition("-")[2] != preamble.digest.hex():
        raise _damaged(path, f"its name does not carry its digest {preamble.digest.hex()}")
    try:
        with reading_hdf5(content) as file:
            texts = _read_attributes(path, file, preamble.version)
            arrays = _view_datasets(path, file, content, texts["dtype"], preamble.version)
        views = tuple(arrays.pop().tolist()) if len(arrays) == 8 else ()
        pack = Pack(path, _origin(path, texts, arrays[3].shape[1], views), *arrays)
    except KDCacheError:
        raise
    except Exception as error:  # what h5py makes of a malformed file is anybody's guess
        _raise_interrupt(error)
        raise _damaged(path, f"HDF5 cannot read it ({shown(error)})") from error
    if name.removesuffix(".h5").rpartition("-")[0] != pack.origin.teacher:
        raise _damaged(path, f"its name does not carry its teacher {shown(pack.origin.teacher)}")
    _check_keys_and_offsets(pack)
    if check == "full" and preamble.version > 1 and preamble.span != Span.of(pack.keys):
        raise _damaged(path, "its first bytes tell of other keys than it holds")
    if check == "lazy":
        pack = replace(pack, unchecked=np.ones(-(-len(pack) // CHECKED_AT_ONCE), bool))
    return pack


def _raise_interrupt(error: BaseException | None) -> None:
    """A signal that came within libhdf5's reading of our bytes is no damage, whatever h5py made of it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        error = error.__cause__ or error.__context__


def _damaged(path: Path, why: str) -> CorruptError:
    return CorruptError(f"the pack {shown(path)} is damaged: {why}", hint="kd-cache dump scores its rows again.")


def _content(path: Path) -> np.ndarray:
    """The file's bytes, read-only."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < USER_BLOCK:
            raise _damaged(path, f"it is truncated within its first {USER_BLOCK} bytes")
        return file_content(file, MAPPED)


def _check_preamble(path: Path, content: np.ndarray) -> Preamble:
    block = content[:USER_BLOCK].tobytes()
    preamble = Preamble.read(block)
    if preamble.magic != MAGIC:
        raise _damaged(path, "it does not start as a pack does")
    if preamble.version > FILE_VERSION:
        if _is_of_this_version(path, content, preamble.digest):
            raise _damaged(path, "it has this kd-cache's format, but its first bytes name a newer one")
        raise StoreError(
            f"the pack {shown(path)} has format version {preamble.version}, this kd-cache reads up to {FILE_VERSION}",
            hint="Update kd-cache.",
        )
    if preamble.version < 1 or preamble.block() != block:
        raise _damaged(path, f"its first {USER_BLOCK} bytes are not as they were written")
    if preamble.length != len(content) - USER_BLOCK:
        raise _damaged(path, f"expected {preamble.length + USER_BLOCK} bytes, found {len(content)}")
    return preamble


def _is_of_this_version(path: Path, content: np.ndarray, digest: bytes) -> bool:
    """Whether only the version in the user block is wrong: a flipped bit must not pass for a pack of the future."""
    if xxhash.xxh3_128_digest(content[USER_BLOCK:].data) != digest:
        return False
    try:
        with reading_hdf5(content) as file:
            return 1 <= int(file.attrs["format_version"]) <= FILE_VERSION
    except Exception:  # noqa: BLE001 (a newer format may be anything)
        return False


def _read_attributes(path: Path, file: Any, version: int) -> dict[str, str]:
    texts, attributes = {}, file.attrs
    for name in _ATTRIBUTES:
        attribute = attributes.get_id(name) if name in attributes else None
        if attribute is None or attribute.shape != () or attribute.dtype.kind != "S":
            raise _damaged(path, f"its attribute {name} is missing or not a fixed-length string")
        texts[name] = attributes[name].decode("utf-8")
    if texts["format_version"] != str(version):
        raise _damaged(path, f"its format version is {shown(texts['format_version'])}, but not in its first bytes")
    if not is_teacher_name(texts["teacher"]):  # it becomes a folder: ".." would be the folder above
        raise _damaged(path, f"{shown(texts['teacher'])!r} is no teacher's name")
    if not is_dtype(texts["dtype"]) or texts["value_kind"] not in VALUE_KINDS:
        raise _damaged(path, "its dtype or value kind is unknown")
    return texts


def _origin(path: Path, texts: Mapping[str, str], width: int, views: tuple[int, ...]) -> Origin:
    parts, names = json.loads(texts["parts"]), json.loads(texts["class_names"])
    if not isinstance(parts, dict) or not all(isinstance(value, str) for value in parts.values()):
        raise _damaged(path, "its fingerprint's parts are not texts")
    fingerprint = Fingerprint(parts)
    if fingerprint.digest != texts["fingerprint"]:
        raise _damaged(path, "its fingerprint is not that of its parts")
    kept = None if names is None else tuple(map(str, names if isinstance(names, list) else ()))
    made = Origin(texts["teacher"], fingerprint, texts["value_kind"], width, texts["dtype"], kept, views)
    vectors = (made.frames or 1) * (len(views) or 1)
    made = replace(made, num_classes=_told_classes(parts) if made.topk else width // vectors)
    if made.topk and (made.topk.refusal() or made.frames):
        raise _damaged(path, "it is none that top-k rows are made of")
    if made.width != width:
        what = f"rows of {made.width} bytes" if made.topk else f"{made.frames} frames"
        raise _damaged(path, f"its logits are no {what}")
    if (made.policy is None) != (not views):
        raise _damaged(path, "it has views without a policy, or a policy without views")
    if kept is not None and len(kept) != made.num_classes:
        raise _damaged(path, "its class names do not fit its logits")
    return made


def _told_classes(parts: Mapping[str, str]) -> int:
    """C of a teacher whose rows do not have it."""
    told = parts.get("num_classes", "")
    return int(told[:10]) if told.isascii() and told.isdecimal() else 0


def _view_datasets(path: Path, file: Any, content: np.ndarray, dtype: str, version: int) -> list[np.ndarray]:
    datasets = datasets_of(dtype, version, has_views="views" in file)
    if set(file) != set(datasets):
        raise _damaged(path, f"expected the datasets {', '.join(datasets)}, found {shown(', '.join(file))}")
    for name in datasets:  # all links before any is followed
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise _damaged(path, f"{name} is a link to elsewhere")
    arrays = [
        _view_dataset(path, file[name], content, np.dtype(kind), axes, aligned)
        for name, (kind, axes, aligned) in datasets.items()
    ]
    if "views" in datasets:
        arrays[3], arrays[6] = flat_views(arrays[3], *arrays[6:])
    count, classes = arrays[3].shape
    expected = [(count, 16), (count, 16), (count,), (count, classes), (count + 1,), arrays[5].shape]
    if [array.shape for array in arrays[: len(expected)]] != expected:
        raise _damaged(path, "its datasets disagree about the number of rows")
    return arrays


def _view_dataset(
    path: Path, dataset: Any, content: np.ndarray, dtype: np.dtype[Any], axes: int, aligned: int
) -> np.ndarray:
    """The dataset's bytes in the file, if they are stored there plainly: contiguous, unfiltered, written."""
    plain = isinstance(dataset, h5py.Dataset) and dataset.dtype == dtype
    settings = dataset.id.get_create_plist() if plain else None
    if (
        settings is None
        or settings.get_layout() != h5py.h5d.CONTIGUOUS
        or settings.get_external_count()
        or settings.get_nfilters()
        or len(dataset.shape) != axes
    ):
        raise _damaged(path, f"{shown(dataset.name)} is not a plain contiguous dataset of {dtype} with {axes} axes")
    size = math.prod(dataset.shape) * dtype.itemsize
    offset = dataset.id.get_offset()
    if offset is None or offset % aligned or offset + size > len(content) or dataset.id.get_storage_size() != size:
        raise _damaged(path, f"{shown(dataset.name)} does not lie in the file")
    return content[offset : offset + size].view(dtype).reshape(dataset.shape)


def _check_keys_and_offsets(pack: Pack) -> None:
    if not are_ascending(pack.keys):
        raise _damaged(pack.path, "its keys are not sorted")
    offsets = pack.file_offsets
    if offsets[0] != 0 or offsets[-1] != len(pack.files_blob) or (offsets[1:] < offsets[:-1]).any():
        raise _damaged(pack.path, "its file names are not laid out one after the other")
