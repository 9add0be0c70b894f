"""Packs: immutable HDF5 files of rows, all of one teacher and one fingerprint.

Layout of ``<teacher>-<digest>.h5``::

    0     8   magic  b"KDCPACK\\n"
    8     4   format version, little-endian
    12    8   length of everything after the first 512 bytes, little-endian
    20    16  xxh3-128 of everything after the first 512 bytes, big-endian; also the <digest> in the file's name
    36    476 zeros
    512   …   HDF5: keys [N,16] u1 (sorted), inputs [N,16] u1, checksums [N] <u8, logits [N,C] <f4 or <f2,
              file_offsets [N+1] <u8, files [M] u1 (UTF-8 paths, one after the other); attributes: what made the rows

A pack is whole or absent. It is checked before libhdf5 sees it, its structure is checked before a byte is believed, and
then its datasets are memory-mapped at their offsets: no HDF5 handle stays open.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from kd_cache.errors import CorruptError, KDCacheError, StoreError, shown
from kd_cache.fingerprint import FORMAT_VERSION, Fingerprint, canonical_json
from kd_cache.store.atomic import store_errors, sync_directory, temporary_beside
from kd_cache.store.keys import key_columns

MAGIC = b"KDCPACK\n"
USER_BLOCK = 512
_PREAMBLE = struct.Struct("<8sIQ16s")
MAX_ATTRIBUTE = 60_000
STORED = {"fp32": "<f4", "fp16": "<f2"}
VALUE_KINDS = ("logits", "log_probs", "probs", "sigmoid")
# Datasets in the order in which they are written, with dtype and the shape of one entry (None: given by the origin).
_DATASETS: dict[str, tuple[str | None, tuple[int, ...]]] = {
    "keys": ("|u1", (16,)),
    "inputs": ("|u1", (16,)),
    "checksums": ("<u8", ()),
    "logits": (None, ()),
    "file_offsets": ("<u8", ()),
    "files": ("|u1", ()),
}


@dataclass(frozen=True)
class Origin:
    """What made the rows of a pack; ``dtype`` is ``fp32`` or ``fp16``."""

    teacher: str
    fingerprint: Fingerprint
    value_kind: str
    num_classes: int
    dtype: str
    class_names: tuple[str, ...] | None = None

    @property
    def stored(self) -> np.dtype[Any]:
        return np.dtype(STORED[self.dtype])


@dataclass(frozen=True)
class Pack:
    """One opened pack: every array is a view of the mapped file."""

    path: Path
    origin: Origin
    keys: np.ndarray  # [N, 16] u1, sorted
    inputs: np.ndarray  # [N, 16] u1
    checksums: np.ndarray  # [N] u8
    logits: np.ndarray  # [N, C]
    file_offsets: np.ndarray  # [N + 1] u8
    files_blob: np.ndarray  # [M] u1

    def __len__(self) -> int:
        return len(self.keys)

    def file_bytes(self, row: int) -> bytes:
        """The manifest path of a row, UTF-8."""
        return self.files_blob[int(self.file_offsets[row]) : int(self.file_offsets[row + 1])].tobytes()

    @cached_property
    def files(self) -> list[str]:
        """The manifest paths of all rows."""
        return [self.file_bytes(row).decode("utf-8") for row in range(len(self))]

    def wrong_rows(self, rows: np.ndarray) -> list[int]:
        """Those of ``rows`` whose checksum, or whose key, is not that of what is stored beside it."""
        parts = (self.keys[rows], self.inputs[rows], self.logits[rows])
        expected = row_checksums(self.origin.fingerprint, *parts)
        wrong = expected != self.checksums[rows]
        for number, row in enumerate(rows.tolist()):
            wrong[number] |= (
                hashlib.md5(self.file_bytes(row), usedforsecurity=False).digest() != self.keys[row].tobytes()
            )
        return [int(row) for row in rows[wrong]]


def row_checksums(fingerprint: Fingerprint, keys: np.ndarray, inputs: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """``[N]`` u8: xxh3-64 of key, input digest, fingerprint (32 bytes) and the row's bytes, in this order."""
    count = len(keys)
    made_by = np.frombuffer(bytes.fromhex(fingerprint.digest), np.uint8)
    row_bytes = np.ascontiguousarray(logits).view(np.uint8).reshape(count, -1)
    records = np.concatenate([keys, inputs, np.broadcast_to(made_by, (count, 32)), row_bytes], axis=1)
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(record) for record in records), np.uint64, count)


def write_pack(
    directory: Path,
    origin: Origin,
    keys: np.ndarray,
    inputs: np.ndarray,
    files: list[bytes],
    take: Callable[[slice], np.ndarray],
    block: int = 65_536,
) -> Path:
    """Write one durable pack into ``directory`` and return its path.

    Args:
        keys, inputs: ``[N, 16]`` u1, keys strictly ascending, N ≥ 1.
        files: the N manifest paths, UTF-8.
        take: gives the rows of a slice as ``[n, C]`` in the stored dtype, so that any N fits in memory.

    Equal arguments give equal bytes and so the same name: writing a pack twice is harmless.

    Raises:
        StoreError: naming the path and the cause; nothing is left behind.
    """
    target = directory / f"{origin.teacher}-new.h5"
    with store_errors(directory, "write a pack into"), temporary_beside(target) as temporary:
        _write_hdf5(temporary, origin, keys, inputs, files, take, block)
        digest = _seal_user_block(temporary)
        final = directory / f"{origin.teacher}-{digest.hex()}.h5"
        try:
            _open_checked(temporary, final.name)
        except CorruptError as error:
            raise StoreError(f"{error}\nThe disk did not keep what was written to it.") from error
        temporary.replace(final)
        sync_directory(directory)
    return final


def _write_hdf5(
    path: Path,
    origin: Origin,
    keys: np.ndarray,
    inputs: np.ndarray,
    files: list[bytes],
    take: Callable[[slice], np.ndarray],
    block: int,
) -> None:
    count = len(keys)
    offsets = np.zeros(count + 1, "<u8")
    np.cumsum([len(file) for file in files], out=offsets[1:])
    with h5py.File(
        path,
        "x",
        libver=("v110", "v110"),
        userblock_size=USER_BLOCK,
        alignment_threshold=1,
        alignment_interval=64,
    ) as pack:
        for name, value in _attributes(origin).items():
            pack.attrs[name] = value
        pack.create_dataset("keys", data=keys, track_times=False)
        pack.create_dataset("inputs", data=inputs, track_times=False)
        checksums = pack.create_dataset("checksums", (count,), "<u8", track_times=False)
        logits = pack.create_dataset("logits", (count, origin.num_classes), origin.stored, track_times=False)
        for start in range(0, count, block):
            part = slice(start, min(start + block, count))
            rows = take(part)
            logits[part] = rows
            checksums[part] = row_checksums(origin.fingerprint, keys[part], inputs[part], rows)
        pack.create_dataset("file_offsets", data=offsets, track_times=False)
        blob = np.frombuffer(b"".join(files), np.uint8)
        pack.create_dataset("files", data=blob, track_times=False)


def _attributes(origin: Origin) -> dict[str, np.bytes_]:
    texts = {
        "format_version": str(FORMAT_VERSION),
        "teacher": origin.teacher,
        "fingerprint": origin.fingerprint.digest,
        "parts": canonical_json(dict(origin.fingerprint.parts)).decode(),
        "value_kind": origin.value_kind,
        "class_names": json.dumps(origin.class_names, ensure_ascii=False),
        "dtype": origin.dtype,
    }
    for name, text in texts.items():
        if len(text.encode()) > MAX_ATTRIBUTE:
            raise StoreError(f"{name} of teacher {shown(origin.teacher)} takes more than {MAX_ATTRIBUTE} bytes")
    return {name: np.bytes_(text.encode()) for name, text in texts.items()}


def _seal_user_block(path: Path) -> bytes:
    """Fill the user block, fsync, and return the digest."""
    with path.open("r+b") as file:
        file.seek(USER_BLOCK)
        digest = xxhash.xxh3_128()
        length = 0
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            length += len(chunk)
        file.seek(0)
        file.write(_PREAMBLE.pack(MAGIC, FORMAT_VERSION, length, digest.digest()).ljust(USER_BLOCK, b"\0"))
        file.flush()
        os.fsync(file.fileno())
    return digest.digest()


def open_pack(path: Path) -> Pack:
    """Open and check a pack: user block, digest of every byte, structure.

    Raises:
        CorruptError: naming the file and what is wrong with it.
        StoreError: a newer format, or the file cannot be read.
        FileNotFoundError: it is not there (any more).
    """
    try:
        return _open_checked(path, path.name)
    except (FileNotFoundError, KDCacheError):
        raise
    except OSError as error:
        raise StoreError(f"cannot read the pack {shown(path)}: {error.strerror or error}") from error


def _open_checked(path: Path, name: str) -> Pack:
    """`open_pack` for a file that will be called ``name``."""
    if path.stat().st_size < USER_BLOCK:
        raise _damaged(path, "it is truncated within its first 512 bytes")
    content = np.memmap(path, np.uint8, mode="c")
    digest = _check_user_block(path, content)
    if name.removesuffix(".h5").rpartition("-")[2] != digest.hex():
        raise _damaged(path, f"its name does not carry its digest {digest.hex()}")
    try:
        with h5py.File(path, "r", libver=("v110", "v110")) as file:
            origin = _read_origin(path, file)
            arrays = _map_datasets(path, file, content, origin)
    except KDCacheError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"HDF5 cannot read it ({shown(error)})") from error
    if name.removesuffix(".h5").rpartition("-")[0] != origin.teacher:
        raise _damaged(path, f"its name does not carry its teacher {shown(origin.teacher)}")
    pack = Pack(path, origin, *arrays)
    _check_keys_and_offsets(pack)
    return pack


def _damaged(path: Path, why: str) -> CorruptError:
    return CorruptError(f"the pack {shown(path)} is damaged: {why}", hint="kd-cache dump scores its rows again.")


def _check_user_block(path: Path, content: np.ndarray) -> bytes:
    block = content[:USER_BLOCK].tobytes()
    magic, version, length, digest = _PREAMBLE.unpack_from(block)
    if magic != MAGIC:
        raise _damaged(path, "it does not start as a pack does")
    if version > FORMAT_VERSION and not any(block[_PREAMBLE.size :]):
        raise StoreError(
            f"the pack {shown(path)} has format version {version}, this kd-cache reads up to {FORMAT_VERSION}",
            hint="Update kd-cache.",
        )
    if version != FORMAT_VERSION or any(block[_PREAMBLE.size :]):
        raise _damaged(path, "its first 512 bytes are not as they were written")
    if length != len(content) - USER_BLOCK:
        raise _damaged(path, f"expected {length + USER_BLOCK} bytes, found {len(content)}")
    if xxhash.xxh3_128_digest(content[USER_BLOCK:].data) != digest:
        raise _damaged(path, "its bytes do not match their digest")
    return bytes(digest)


def _read_origin(path: Path, file: h5py.File) -> Origin:
    texts = {}
    for name in ("format_version", "teacher", "fingerprint", "parts", "value_kind", "class_names", "dtype"):
        value = file.attrs.get(name)
        if not isinstance(value, bytes):
            raise _damaged(path, f"its attribute {name} is missing or not a fixed-length string")
        texts[name] = value.decode("utf-8")
    parts, names = json.loads(texts["parts"]), json.loads(texts["class_names"])
    fingerprint = Fingerprint(parts)
    if texts["format_version"] != str(FORMAT_VERSION) or fingerprint.digest != texts["fingerprint"]:
        raise _damaged(path, "its fingerprint is not that of its parts")
    if texts["dtype"] not in STORED or texts["value_kind"] not in VALUE_KINDS:
        raise _damaged(path, "its dtype or value kind is unknown")
    classes = file["logits"].shape[1]
    if names is not None and (not isinstance(names, list) or len(names) != classes):
        raise _damaged(path, "its class names do not fit its logits")
    kept = None if names is None else tuple(map(str, names))
    return Origin(texts["teacher"], fingerprint, texts["value_kind"], classes, texts["dtype"], kept)


def _map_datasets(path: Path, file: h5py.File, content: np.ndarray, origin: Origin) -> list[np.ndarray]:
    if set(file) != set(_DATASETS):
        raise _damaged(path, f"expected the datasets {', '.join(_DATASETS)}, found {shown(', '.join(file))}")
    arrays = []
    for name, (dtype, _) in _DATASETS.items():
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise _damaged(path, f"{name} is a link to elsewhere")
        arrays.append(_map_dataset(path, file[name], content, np.dtype(dtype or origin.stored)))
    count = len(arrays[0])
    shapes = [(count, *entry) for _, entry in _DATASETS.values()]
    shapes[3] = (count, origin.num_classes)
    shapes[4] = (count + 1,)
    shapes[5] = arrays[5].shape[:1]
    if [array.shape for array in arrays] != shapes:
        raise _damaged(path, "its datasets disagree about the number of rows")
    return arrays


def _map_dataset(path: Path, dataset: Any, content: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """The dataset's bytes in the mapped file, if they are stored there plainly: contiguous, unfiltered, written."""
    plain = isinstance(dataset, h5py.Dataset) and dataset.dtype == dtype
    settings = dataset.id.get_create_plist() if plain else None
    if (
        settings is None
        or settings.get_layout() != h5py.h5d.CONTIGUOUS
        or settings.get_external_count()
        or settings.get_nfilters()
    ):
        raise _damaged(path, f"{shown(dataset.name)} is not a plain contiguous dataset of {dtype}")
    size = dataset.size * dtype.itemsize
    offset = dataset.id.get_offset()
    if offset is None or offset % 64 or offset + size > len(content) or dataset.id.get_storage_size() != size:
        raise _damaged(path, f"{shown(dataset.name)} does not lie in the file")
    return content[offset : offset + size].view(dtype).reshape(dataset.shape)


def _check_keys_and_offsets(pack: Pack) -> None:
    high, low = key_columns(pack.keys)
    ascending = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))
    if not ascending.all():
        raise _damaged(pack.path, "its keys are not sorted")
    offsets = pack.file_offsets
    if offsets[0] != 0 or offsets[-1] != len(pack.files_blob) or (offsets[1:] < offsets[:-1]).any():
        raise _damaged(pack.path, "its file names are not laid out one after the other")
