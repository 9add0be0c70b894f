"""What lies where in an HDF5 file of features: a program of its own, because libhdf5 reads bytes that nobody checked.

No checksum stands before such a file, and libhdf5 was measured to crash and to hang on damaged ones. So it looks at the
file here, in a process with little memory and little time, and says names, shapes and places of the samples. It is run
by `kd_cache.dataset.packed`, which reads the values without libhdf5.

The samples are either datasets ``[T, F]`` anywhere in the file, called by their names, or the rows of a dataset
``features`` ``[N, T, F]``, called by a dataset ``files`` ``[N]``. With ``any`` as second word, samples may
have any shape and be integers.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5f, h5g, h5l, h5o, h5t, h5z

MOST_SAMPLES = 1 << 24
MOST_MEMORY = 4 << 30
_MOST_DEPTH = 32
_MOST_KINDS = 1 << 12
_MOST_LENGTH = 1 << 28
_NAME_BYTES = 4096
_A_SECOND_OF_BYTES = 2_000_000
"""For so much of the file a second of computing is granted; the smallest datasets take a tenth of that."""

_FLOATS = (("<f4", h5t.IEEE_F32LE), ("<f2", h5t.IEEE_F16LE))
_NUMBERS = (
    *_FLOATS, ("<f8", h5t.IEEE_F64LE), ("|u1", h5t.STD_U8LE), ("|i1", h5t.STD_I8LE), ("<i2", h5t.STD_I16LE),
    ("<i4", h5t.STD_I32LE), ("<i8", h5t.STD_I64LE), ("<u2", h5t.STD_U16LE), ("<u4", h5t.STD_U32LE),
    ("<u8", h5t.STD_U64LE),
)  # fmt: skip
_FRAMES = "[frames, bins] with at least one of each"
_FILTERS = {h5z.FILTER_SHUFFLE: "shuffle", h5z.FILTER_DEFLATE: "gzip"}


class Unfit(Exception):  # noqa: N818 (a finding, not a failure)
    """Why a sample, or the whole file, cannot be read."""


class Findings:
    """What is known of the samples so far: a row for each, and how its values are stored."""

    def __init__(self, user_block: int, anything: bool = False) -> None:
        self.user_block, self.anything = user_block, anything
        self.names: list[bytes] = []
        self.starts: list[int] = []
        self.frames: list[int] = []
        self.bins: list[int] = []
        self.which: list[int] = []
        self.kinds: dict[str, int] = {}
        self.chunks: list[np.ndarray] = []
        self.num_chunks = 0
        self.by_path = True

    def add(self, name: bytes, start: int, shape: tuple[int, ...], kind: int) -> None:
        if len(self.names) == MOST_SAMPLES:
            raise Unfit(f"it holds more than {MOST_SAMPLES} samples")
        self.names.append(name)
        self.starts.append(start)
        self.frames.append(shape[0])
        self.bins.append(math.prod(shape[1:]))
        self.which.append(kind)

    def kind(self, **kind: Any) -> int:
        """The number of a way to be stored."""
        if len(self.kinds) > _MOST_KINDS:
            raise Unfit(f"its samples are stored in more than {_MOST_KINDS} ways")
        return self.kinds.setdefault(json.dumps(kind), len(self.kinds))

    def add_chunks(self, chunks: np.ndarray) -> int:
        """Keep a dataset's chunks; the number of the first."""
        self.chunks.append(chunks)
        self.num_chunks += len(chunks)
        return self.num_chunks - len(chunks)

    def write(self, file: Any) -> None:
        """All of it, as an ``.npz``."""
        arrays: dict[str, Any] = {
            "names": np.frombuffer(b"".join(self.names), np.uint8),
            "lengths": np.array([len(name) for name in self.names], np.int64),
            "starts": np.array(self.starts, np.int64),
            "frames": np.array(self.frames, np.int64),
            "bins": np.array(self.bins, np.int64),
            "which": np.array(self.which, np.int64),
            "chunks": np.concatenate([np.zeros((0, 3), np.int64), *self.chunks]),
            "by_path": np.array(self.by_path),
            "kinds": np.frombuffer(f"[{','.join(self.kinds)}]".encode(), np.uint8),
        }
        np.savez(file, **arrays)


def scan(path: str, anything: bool = False) -> Findings:
    """Look through the file. Raises `Unfit`, and whatever h5py makes of a malformed file."""
    file = h5f.open(path.encode("utf-8", "surrogateescape"), h5f.ACC_RDONLY)
    root = h5g.open(file, b"/")
    found = Findings(file.get_create_plist().get_userblock(), anything)
    if {b"features", b"files"} <= set(_links(root)):
        _scan_rows(root, found)
    else:
        _scan_datasets(root, b"", found, set(), 0)
    return found


def _links(group: Any) -> dict[bytes, int]:
    """The kind of each link by its name."""
    links: dict[bytes, int] = {}

    def keep(name: bytes, link: Any) -> None:
        if len(links) == MOST_SAMPLES:
            raise Unfit(f"it holds more than {MOST_SAMPLES} samples")
        links[bytes(name)] = link.type

    group.links.iterate(keep, info=True)
    return links


def _scan_datasets(group: Any, prefix: bytes, found: Findings, above: set[bytes], depth: int) -> None:
    """Every dataset of the group and of those in it."""
    identity = bytes(repr(h5o.get_info(group).addr), "ascii")
    if identity in above or depth > _MOST_DEPTH:
        raise Unfit(f"its groups are nested in themselves, or more than {_MOST_DEPTH} deep")
    for name, link in _links(group).items():
        full = prefix + name
        if link != h5l.TYPE_HARD:
            found.add(full, 0, (0, 0), found.kind(refused="it is a link to elsewhere"))
            continue
        entry = h5o.open(group, name)
        if isinstance(entry, h5g.GroupID):
            _scan_datasets(entry, full + b"/", found, above | {identity}, depth + 1)
        else:
            _scan_one(entry, full, found)


def _scan_one(dataset: Any, name: bytes, found: Findings) -> None:
    try:
        if not isinstance(dataset, h5d.DatasetID):
            raise Unfit("it is not a dataset")
        shape = dataset.shape
        if not shape or (len(shape) != 2 and not found.anything) or 0 in shape:
            expected = "an axis at least, and none of length 0" if found.anything else _FRAMES
            raise Unfit(f"its shape is {list(shape or ())}, expected {expected}")
        start, kind = _stored(dataset, (1, *shape), found)
    except Unfit as error:
        start, shape, kind = 0, (0, 0), found.kind(refused=str(error))
    found.add(name, start, shape, kind)


def _scan_rows(root: Any, found: Findings) -> None:
    """The layout of one array and a list of files."""
    links = _links(root)
    for name in (b"features", b"files"):
        if links[name] != h5l.TYPE_HARD:
            raise Unfit(f"its {name.decode()} is a link to elsewhere")
    dataset, files = h5o.open(root, b"features"), h5o.open(root, b"files")
    if not isinstance(dataset, h5d.DatasetID) or not isinstance(files, h5d.DatasetID):
        raise Unfit("its features and files are not both datasets")
    shape = dataset.shape
    if not shape or 0 in shape or (len(shape) < 2 if found.anything else len(shape) != 3):
        expected = "samples, …" if found.anything else "samples, frames, bins"
        raise Unfit(f"the shape of its features is {list(shape or ())}, expected [{expected}]")
    names = _names(files, shape[0])
    found.by_path = False
    start, kind = _stored(dataset, shape, found)
    count, *sample = shape
    stored = json.loads(list(found.kinds)[kind])
    if stored["chunks"] is None:
        step = math.prod(sample) * np.dtype(stored["dtype"]).itemsize
        starts = list(range(start, start + count * step, step))
    else:  # the first of the chunks that a row lies in
        rows, across = stored["chunks"][0], math.prod(_grid(shape, stored["chunks"])[1:])
        starts = [start + row // rows * across for row in range(count)]
    for name, first in zip(names, starts, strict=True):
        found.add(name, first, tuple(sample), kind)


def _names(files: Any, count: int) -> list[bytes]:
    if files.shape != (count,):
        raise Unfit(f"the shape of its files is {list(files.shape or ())}, expected [{count}], one for each row")
    if count > MOST_SAMPLES:
        raise Unfit(f"it holds more than {MOST_SAMPLES} samples")
    kind, settings = files.get_type(), files.get_create_plist()
    if not isinstance(kind, h5t.TypeStringID):
        raise Unfit("its files are not strings")
    if settings.get_layout() == h5d.VIRTUAL or settings.get_external_count():
        raise Unfit("its files lie in another file")
    if not kind.is_variable_str() and kind.get_size() > _NAME_BYTES:
        raise Unfit(f"its files have room for more than {_NAME_BYTES} bytes")
    names = h5py.Dataset(files)[()].tolist()
    if max(map(len, names)) > _NAME_BYTES:
        raise Unfit(f"its files have names of more than {_NAME_BYTES} bytes")
    return names  # type: ignore[no-any-return]


def _stored(dataset: Any, shape: tuple[int, ...], found: Findings) -> tuple[int, int]:
    """Where the values of ``shape`` ``[N, T, F]`` begin (the byte, or the first chunk's number), and their kind.

    Of samples that are not ``[T, F]`` the kind says what comes after the first axis.
    """
    datatype = dataset.get_type()
    dtype = next((name for name, known in (_NUMBERS if found.anything else _FLOATS) if datatype.equal(known)), None)
    if dtype is None:
        expected = "a number" if found.anything else "float32 or float16"
        raise Unfit(f"its dtype is not {expected} (little-endian)")
    rest = None if len(shape) == 3 else list(shape[2:])
    if max(shape) > _MOST_LENGTH:
        raise Unfit(f"its shape is {list(shape[1:])}")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    offset = dataset.get_offset()
    if offset is not None:  # contiguous, written, and in this file
        if dataset.get_storage_size() != size:
            raise Unfit("it is not stored whole")
        return offset, found.kind(dtype=dtype, chunks=None, filters=[], rest=rest)
    settings = dataset.get_create_plist()
    layout = settings.get_layout()
    if layout != h5d.CHUNKED:
        elsewhere = layout == h5d.VIRTUAL or settings.get_external_count()
        written = "it lies in another file" if elsewhere else "it was never written"
        raise Unfit(written if layout != h5d.COMPACT else "it is stored in its header (compact)")
    if found.user_block:
        raise Unfit("it is chunked behind a user block; write it without one")
    filters = [settings.get_filter(number)[0] for number in range(settings.get_nfilters())]
    if not set(filters) <= set(_FILTERS) or len(set(filters)) != len(filters):
        raise Unfit("it is compressed otherwise than by gzip (with or without shuffle); write it anew")
    chunks = tuple(settings.get_chunk())
    chunks = chunks if len(dataset.shape) == len(shape) else (1, *chunks)
    first = found.add_chunks(_chunk_table(dataset, shape, chunks))
    return first, found.kind(dtype=dtype, chunks=chunks, filters=[_FILTERS[number] for number in filters], rest=rest)


def _grid(shape: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-length // step) for length, step in zip(shape, chunks, strict=True))


def _chunk_table(dataset: Any, shape: tuple[int, ...], chunks: tuple[int, ...]) -> np.ndarray:
    """``[chunks, 3]``: the byte where each begins, its size in the file, and which filters were left out."""
    grid = _grid(shape, chunks)
    if math.prod(grid) > MOST_SAMPLES:
        raise Unfit(f"it has more than {MOST_SAMPLES} chunks")
    table = np.full((math.prod(grid), 3), -1, np.int64)

    def keep(chunk: Any) -> None:
        number = 0
        for at, step, most in zip((0, *chunk.chunk_offset)[-len(grid) :], chunks, grid, strict=True):
            if at >= step * most:
                raise Unfit("it has a chunk outside its shape")
            number = number * most + at // step
        table[number] = chunk.byte_offset, chunk.size, chunk.filter_mask

    dataset.chunk_iter(keep)
    if (table[:, 0] < 0).any():
        raise Unfit("it was never written, or not whole")
    return table


def _limit(size: int) -> None:
    """Little memory, little time, and no core file: a hostile file costs seconds, whatever libhdf5 makes of it."""
    seconds = 3 + size // _A_SECOND_OF_BYTES
    for what, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, MOST_MEMORY), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, hard))


def main() -> None:
    """Write the findings of ``sys.argv[1]`` to standard output; exit 1 with a reason there that a person can read."""
    path = sys.argv[1]
    try:
        _limit(Path(path).stat().st_size)
        found = scan(path, sys.argv[2:] == ["any"])
    except Unfit as error:
        sys.stdout.write(str(error))
        sys.exit(1)
    except MemoryError:
        sys.stdout.write(f"to look through it takes more than {MOST_MEMORY >> 30} GiB of memory")
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 (what h5py makes of a malformed file is anybody's guess)
        sys.stdout.write(f"HDF5 cannot read it ({error})")
        sys.exit(1)
    found.write(sys.stdout.buffer)


if __name__ == "__main__":
    main()
