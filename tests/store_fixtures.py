"""Rows, packs and caches made directly, without a teacher; and packs forged with plain h5py."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash

from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import origin_entry, read_index, write_index
from kd_cache.store.origin import Fingerprint, Origin
from kd_cache.store.pack import Pack, write_pack

# Python 3.12 warns of any fork in a process with threads; torch has threads, and DataLoader forks.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")

NUMPY_OF = {"fp32": "<f4", "fp16": "<f2"}


def origin(teacher: str = "scene", classes: int = 3, dtype: str = "fp32", kind: str = "logits", **parts: str) -> Origin:
    named = {"weights": f"weights of {teacher}", "architecture": "tiny/1", "dtype": dtype} | parts
    return Origin(teacher, Fingerprint(named), kind, classes, dtype)


@dataclass
class Rows:
    """Rows sorted by key, with plain Python to look at them by file."""

    files: list[str]
    keys: np.ndarray
    inputs: np.ndarray
    logits: np.ndarray

    @classmethod
    def of(cls, files: Sequence[str], classes: int = 3, dtype: str = "fp32", seed: int = 0, inputs: int = 0) -> Rows:
        """Random rows; a row depends on its file's name and ``seed`` alone, its input on the name and ``inputs``."""
        ordered = sorted(files, key=md5)
        logits = [np.random.default_rng([seed, *md5(file)]).normal(0, 3, classes) for file in ordered]
        return cls(
            ordered,
            byte_rows([md5(file) for file in ordered]),
            byte_rows([md5(f"{inputs} {file}") for file in ordered]),
            np.array(logits, dtype=NUMPY_OF[dtype]).reshape(len(ordered), classes),
        )

    def __len__(self) -> int:
        return len(self.files)

    def part(self, numbers: Sequence[int]) -> Rows:
        chosen = np.array(sorted(numbers), dtype=np.int64)
        return Rows([self.files[n] for n in chosen], self.keys[chosen], self.inputs[chosen], self.logits[chosen])

    def write(self, directory: Path, made_by: Origin, block: int = 65_536) -> Path:
        names = [file.encode() for file in self.files]
        return write_pack(directory, made_by, self.keys, self.inputs, names, self.logits.__getitem__, block)

    def by_file(self) -> dict[str, np.ndarray]:
        return dict(zip(self.files, self.logits, strict=True))


def md5(file: str) -> bytes:
    return hashlib.md5(file.encode(), usedforsecurity=False).digest()


def byte_rows(items: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(items), np.uint8).reshape(-1, 16)


def names(count: int, start: int = 0) -> list[str]:
    return [f"x/clip-{number}-a.npy" for number in range(start, start + count)]


@dataclass
class MadeCache:
    """A finished cache of these rows, with its view written by ``np.save``."""

    path: Path
    rows: dict[str, Rows]
    origins: dict[str, Origin]

    def oracle(self, teacher: str, file: str) -> np.ndarray:
        """What ``np.load`` reads from the view."""
        return np.load(self.path / teacher / f"{md5(file).hex()}.npy")

    def stacked(self, files: Sequence[str], teachers: Sequence[str] | None = None) -> np.ndarray:
        """``[B, T, C]`` by the view alone."""
        chosen = list(self.rows) if teachers is None else teachers
        return np.stack([np.stack([self.oracle(teacher, file) for teacher in chosen]) for file in files])

    def write_index(self, **record: Any) -> None:
        packs = CacheFolder(self.path).packs(self.origins, "off")
        largest = {name: max(packs.of(made_by), key=len) for name, made_by in self.origins.items()}
        named = {name: [[pack.path.name, len(pack)]] for name, pack in largest.items()}
        entries = {
            name: {**origin_entry(made_by), "rows": len(self.rows[name]), "packs": named[name], "earlier": []}
            for name, made_by in self.origins.items()
        }
        for name, extra in record.pop("entries", {}).items():
            entries[name].update(extra)
        maps = {
            name: {file: f"{self.path}/{name}/{md5(file).hex()}.npy" for file in rows.files}
            for name, rows in self.rows.items()
        }
        common = set.intersection(*[set(rows.files) for rows in self.rows.values()])
        content = {"adaptation": "A2b", "files": True, "missing": {}, "manifest": {"sha256": ""}}
        content |= record | {"teachers": entries}
        write_index(self.path / "cache_index.json", len(common), maps, content)


def make_cache(path: Path, rows: Mapping[str, Rows], origins: Mapping[str, Origin], packs: int = 1) -> MadeCache:
    """Rows by teacher, with view and index; further ``packs`` are those of the dump, of which no reader knows."""
    cache = MadeCache(path, dict(rows), dict(origins))
    (path / "packs").mkdir(parents=True)
    for name, mine in rows.items():
        (path / name).mkdir()
        for number in range(packs):
            mine.part(range(number, len(mine), packs)).write(path / "packs", origins[name])
        mine.write(path / "packs", origins[name])
        for file, row in mine.by_file().items():
            np.save(path / name / f"{md5(file).hex()}.npy", row)
    cache.write_index()
    return cache


def two_teachers(path: Path, count: int = 40, classes: int = 3, dtype: str = "fp32", packs: int = 1) -> MadeCache:
    """``city2scene`` and ``scene`` over the same files."""
    teachers = ("city2scene", "scene")
    rows = {name: Rows.of(names(count), classes, dtype, seed=seed) for seed, name in enumerate(teachers)}
    return make_cache(path, rows, {name: origin(name, classes, dtype) for name in teachers}, packs)


def write_older(path: Path, rows: Mapping[str, Mapping[str, np.ndarray]], where: str | Path = "/elsewhere") -> Path:
    """A cache as the older script leaves it: plain row files, and an index of nothing but paths below ``where``."""
    index: dict[str, Any] = {}
    for name, mine in rows.items():
        (path / name).mkdir(parents=True)
        for file, row in mine.items():
            np.save(path / name / f"{md5(file).hex()}.npy", row)
        index[name] = {file: f"{where}/{name}/{md5(file).hex()}.npy" for file in mine}
    index["num_samples"] = max(map(len, rows.values()))
    (path / "cache_index.json").write_text(json.dumps(index, indent=1))
    return path


# -- forging ----------------------------------------------------------------------------------------------------------


def plain_pack(file: h5py.File, rows: Rows, made_by: Origin) -> None:
    """The documented content of a pack, written with plain h5py."""
    texts = {
        "format_version": "1",
        "teacher": made_by.teacher,
        "fingerprint": made_by.fingerprint.digest,
        "parts": json.dumps(dict(made_by.fingerprint.parts), sort_keys=True, separators=(",", ":")),
        "value_kind": made_by.value_kind,
        "class_names": "null",
        "dtype": made_by.dtype,
    }
    for name, text in texts.items():
        file.attrs[name] = np.bytes_(text.encode())
    encoded = [name.encode() for name in rows.files]
    file["keys"], file["inputs"], file["logits"] = rows.keys, rows.inputs, rows.logits
    file["checksums"] = checksums(rows, made_by)
    file["file_offsets"] = np.cumsum([0, *map(len, encoded)]).astype("<u8")
    file["files"] = np.frombuffer(b"".join(encoded), np.uint8)


def checksums(rows: Rows, made_by: Origin) -> np.ndarray:
    """As the format describes them: xxh3-64 over key, input, fingerprint and the row's bytes."""
    made = bytes.fromhex(made_by.fingerprint.digest)
    parts = zip(rows.keys, rows.inputs, rows.logits, strict=True)
    return np.array(
        [xxhash.xxh3_64_intdigest(k.tobytes() + i.tobytes() + made + r.tobytes()) for k, i, r in parts], "<u8"
    )


def forge(
    directory: Path,
    build: Callable[[h5py.File], None],
    teacher: str = "scene",
    version: int = 1,
    keys: np.ndarray | None = None,
) -> Path:
    """A pack whose user block and name are right, whatever ``build`` puts into it; by default of format 1."""
    draft = directory / "draft"
    with h5py.File(draft, "w", libver=("v110", "v110"), userblock_size=512, alignment_interval=64) as file:
        build(file)
    content = draft.read_bytes()
    draft.unlink()
    return seal_bytes(directory, content[512:], teacher, version, keys)


def seal_bytes(
    directory: Path, body: bytes, teacher: str = "scene", version: int = 1, keys: np.ndarray | None = None
) -> Path:
    """``body`` behind a correct user block, under the name that it asks for; of format 2 where ``keys`` are given."""
    digest = xxhash.xxh3_128_digest(body)
    span = b"" if keys is None else keys[0].tobytes() + keys[-1].tobytes() + struct.pack("<Q", len(keys))
    if span:
        version, span = max(version, 2), span + struct.pack("<Q", xxhash.xxh3_64_intdigest(span))
    block = (struct.pack("<8sIQ16s", b"KDCPACK\n", version, len(body), digest) + span).ljust(512, b"\0")
    path = directory / f"{teacher}-{digest.hex()}.h5"
    path.write_bytes(block + body)
    return path


# -- faults -----------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int | None = None) -> None:
    """Change one bit of a file, by default in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 0x10
    path.write_bytes(content)


def rewrite(pack: Pack, rows: np.ndarray) -> Path:
    """The same pack with other logits, every checksum right, in the index too if there is one."""
    pack.path.unlink()
    names = [file.encode() for file in pack.files]
    path = write_pack(pack.path.parent, pack.origin, pack.keys, pack.inputs, names, rows.__getitem__)
    name_in_index(path)
    return path


def named_packs(index: Path) -> dict[str, str]:
    """The one pack that an index names for each teacher."""
    entries = read_index(index, maps=False).record["teachers"]
    return {name: named for name, entry in entries.items() for ((named, _),) in [entry["packs"]]}


def name_in_index(pack: Path) -> None:
    """Have the index of its cache name this pack for its teacher, whatever it named before."""
    index_path = pack.parent.parent / "cache_index.json"
    if index_path.exists():
        index = read_index(index_path)
        entry = index.record["teachers"][pack.name.rpartition("-")[0]]
        entry["packs"] = [[pack.name, entry["rows"]]]
        record = {key: value for key, value in index.record.items() if key not in ("format_version", "digest")}
        write_index(index_path, index.num_samples, index.maps, record)


@contextmanager
def flipping(path: Path) -> Iterator[Callable[[int], None]]:
    """``flip(bit)`` flips a bit of the file and puts the one before back. The file is whole again at the end."""
    content = path.read_bytes()
    last: list[int] = []
    with path.open("r+b", buffering=0) as file:

        def put(at: int, byte: int) -> None:
            os.pwrite(file.fileno(), bytes([byte]), at)

        def flip(bit: int) -> None:
            if last:
                put(last[0], content[last[0]])
            last[:] = [bit // 8]
            put(bit // 8, content[bit // 8] ^ 1 << bit % 8)

        yield flip
        if last:
            put(last[0], content[last[0]])
    assert path.read_bytes() == content


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """A disk that is full, for real: the kernel writes up to ``size`` bytes of a file, then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class DeadError(BaseException):
    """The process is gone: nothing it would still do happens."""


@contextmanager
def dying(at: int = 1 << 62) -> Iterator[list[str]]:
    """From call number ``at`` on, no name changes any more. Yields what was called until then."""
    did: list[str] = []

    def mortal(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if len(did) >= at:
                raise DeadError
            did.append(f"{name} {args[1] if name in ('replace', 'rename') else args[0]}")
            return real(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, mortal(name, getattr(os, name)))
        yield did
