"""``cache_index.json``: what a finished cache holds, made by what. Written last, atomically, digested to its last byte.

The maps ``{"city2scene": {file: path}, …}`` are for existing code; kd-cache's own readers use the packs and the entry
``kd_cache``. That entry stands at the end, so that it can be read without parsing a million paths.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import EllipsisType
from typing import Any, NoReturn

import xxhash

from kd_cache.errors import CorruptError, StaleError, StoreError, shown
from kd_cache.files.atomic import open_file, store_errors, write_atomic
from kd_cache.files.strict_json import misfit, strict_json
from kd_cache.options import MAX_VIEWS
from kd_cache.store.names import INDEX_NAME as INDEX_NAME
from kd_cache.store.names import is_teacher_name as is_teacher_name
from kd_cache.store.origin import FILE_VERSION, VALUE_KINDS, Fingerprint, Origin, is_dtype
from kd_cache.store.permitted import PERMITTED_NAME

_UNSET = "0" * 32
_TAIL = '"digest": "{}"\n }}\n}}\n'
_UNSET_TAIL = _TAIL.format(_UNSET).encode("ascii")
_END = b'\n "num_samples": '
_LINES = 16_384
_BLOCK = 1 << 22
_MOST = MOST_BYTES = 1 << 30
_MOST_UNSEALED = 1 << 27
"""Larger indexes are refused unread: one of ours takes about 130 bytes per sample and teacher (none with --no-files).
What does not end with its own digest is at best an older script's, and those are small."""
_TOO_LARGE = "Leave the view out with --no-files; its paths are what makes an index large."
VIEW_BELOW = 1_000_000
"""From so many samples on a view is written only where it is asked for: a million files take minutes, as readers do."""


def is_pack_file(value: Any) -> bool:
    """Whether it may be the name of a pack beside an index."""
    return isinstance(value, str) and os.sep not in value and value.endswith(".h5")


_TEXTS = {...: str}
_TEACHER = {
    "fingerprint": str,
    "parts": _TEXTS,
    "value_kind": VALUE_KINDS.__contains__,
    "num_classes": lambda value: type(value) is int and value > 0,
    "class_names": (None, [str]),
    "dtype": lambda value: isinstance(value, str) and is_dtype(value),
    "views": lambda value: type(value) is int and 0 < value <= MAX_VIEWS,
    "rows": int,
    "pack": lambda value: value is None or is_pack_file(value),
    "packs": [
        lambda value: (
            isinstance(value, list)
            and len(value) == 2
            and is_pack_file(value[0])
            and type(value[1]) is int
            and value[1] > 0
        )
    ],
    "earlier": [_TEXTS],
    "source": {"checkpoint": str, "checkpoint_sha256": str, "read_from": str, "built_in": bool},
    "accuracy": (None, {"correct": int, "rows": int}),
    "measured": str,
    "generation": int,
    "storage_cost": (None, {...: (int, float)}),
    "begun": int,
}
_RECORD = {
    "adaptation": str,
    "begun": int,
    "generation": int,
    "created": str,
    "features_at": str,
    "inputs": str,
    "tool": str,
    "files": bool,
    "shown_path": str,
    "missing": _TEXTS,
    "num_permitted": int,
    "per_device": {...: int},
    "manifest": {"path": str, "sha256": str},
    "split_policy": {"shared_locations": int},
    "environment": _TEXTS,
    "permitted": (None, {"file": lambda value: isinstance(value, str) and PERMITTED_NAME.match(value), "count": int}),
    "settings": {
        "values": {"num_scenes": int, "num_cities": int, "allow_shared_locations": bool},
        "sources": _TEXTS,
        "paths": {"json_path": str, "data_root": str, "features": str, "allow_outside": [str], "rename_map": [str]},
    },
    "pack_bytes": lambda value: type(value) is int and value > 0,
    "superseded": {...: int},
    "teachers": {...: _TEACHER},
}
"""What an entry of ``kd_cache`` must be, where it is there; others are nobody's business."""


@dataclass(frozen=True)
class Index:
    """A checked index: ``maps`` as existing code reads them, ``record`` is ``kd_cache``, as format 2 has it.

    ``maps`` is empty where the index was read without them.
    """

    path: Path
    num_samples: int
    maps: Mapping[str, Mapping[str, str]]
    record: Mapping[str, Any]

    @property
    def origins(self) -> dict[str, Origin]:
        """The current origin of each teacher, in the order of the dump."""
        return {name: _origin(name, entry) for name, entry in self.record["teachers"].items()}

    @property
    def packs(self) -> list[str]:
        """The file names of the packs that it names."""
        return [file for entry in self.record["teachers"].values() for file, _ in entry["packs"]]

    @property
    def without_view(self) -> bytes:
        """The file of the same index without a view: what stands in a copy elsewhere, where its paths do not hold."""
        kept = {key: value for key, value in self.record.items() if key != "digest"}
        plain = {**kept, "files": False, "digest": _UNSET}
        return b"".join(_pieces(self.path, self.num_samples, {name: {} for name in self.record["teachers"]}, plain))

    @property
    def missing(self) -> dict[str, str]:
        """Permitted files that could not be scored, with the reason."""
        return dict(self.record["missing"])

    def known_fingerprint(self, teacher: str, digest: str) -> Fingerprint | None:
        """The parts of a fingerprint that ``teacher`` has or once had here, so that a refusal can name what differs."""
        entry = self.record["teachers"][teacher]
        for parts in (entry["parts"], *entry["earlier"]):
            if Fingerprint(parts).digest == digest:
                return Fingerprint(parts)
        return None


def _origin(name: str, entry: Mapping[str, Any]) -> Origin:
    names = entry["class_names"]
    return Origin(
        name,
        Fingerprint(entry["parts"]),
        entry["value_kind"],
        entry["num_classes"],
        entry["dtype"],
        None if names is None else tuple(names),
        tuple(range(entry.get("views", 0))),
    )


def origin_entry(origin: Origin) -> dict[str, Any]:
    """A teacher's entry in ``kd_cache.teachers``; `Index.origins` reads it back."""
    return {
        "fingerprint": origin.fingerprint.digest,
        "parts": dict(origin.fingerprint.parts),
        "value_kind": origin.value_kind,
        "num_classes": origin.num_classes,
        "class_names": origin.class_names,
        "dtype": origin.dtype,
        **({"views": len(origin.views)} if origin.views else {}),
    }


class IndexChangedError(Exception):
    """Another process wrote the index meanwhile; not for users: whoever writes looks again."""


State = tuple[int, int, int] | None


def index_state(path: Path) -> State:
    """What tells one version of an index from another: every write makes a new file. ``None`` if there is none."""
    try:
        return _version(path.stat())
    except FileNotFoundError:
        return None


def _version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_size


def write_index(
    path: Path,
    num_samples: int,
    maps: Mapping[str, Mapping[str, str]],
    record: Mapping[str, Any],
    *,
    state: State | EllipsisType = ...,
) -> tuple[Index, State]:
    """Write the index durably; its digest covers every byte of the file. Returns it as `read_index` would, and what
    `index_state` gives as long as it stands.

    Raises:
        IndexChangedError: ``state`` was given (from `index_state`), and the index is another by now.
        StoreError: it cannot be written.
    """

    def unchanged() -> None:
        if state is not ... and index_state(path) != state:
            raise IndexChangedError

    # As JSON has it: what is handed on must not depend on whether it was read or written here.
    plain = json.loads(json.dumps({"format_version": FILE_VERSION, **record, "digest": _UNSET}))
    status = write_atomic(path, _pieces(path, num_samples, maps, plain), unchanged)
    return Index(path, num_samples, maps, plain), _version(status)


def refuse_large_index(path: Path, files: Sequence[str], shown_path: str, teachers: Collection[str]) -> None:
    """Raises StoreError: an index that lists these files' rows would be larger than `read_index` reads."""
    quoted = json.encoder.encode_basestring_ascii
    names = sum(len(quoted(file)) + len("\n  : ,") + len("0" * 32 + ".npy") for file in files)
    size = sum(names + len(files) * len(quoted(f"{shown_path}/{teacher}/")) for teacher in teachers)
    if size > _MOST:
        _refuse_size(path, size)


def _refuse_size(path: Path, size: int) -> NoReturn:
    raise StoreError(f"the index {shown(path)} would have {size} bytes, expected at most {_MOST}", hint=_TOO_LARGE)


def _pieces(
    path: Path, num_samples: int, maps: Mapping[str, Mapping[str, str]], kd_cache: dict[str, Any]
) -> Iterator[bytes]:
    """The text of ``json.dumps(…, indent=1)``, a block of lines at a time: a million paths would take a gigabyte.

    The digest is known at the end: it is put into the last piece, and into ``kd_cache``.
    """
    digest = xxhash.xxh3_128()
    quoted = json.encoder.encode_basestring_ascii
    text, size = "{", 0
    for teacher, paths in maps.items():
        text += f"\n {quoted(teacher)}: {{"
        lines = (f"\n  {quoted(file)}: {quoted(row_file)}" for file, row_file in paths.items())
        first = True
        while block := list(islice(lines, _LINES)):
            text += ("" if first else ",") + ",".join(block)
            digest.update(piece := text.encode("ascii"))
            size += len(piece)
            yield piece
            text, first = "", False
        text += "}," if first else "\n },"
    tail = json.dumps({"num_samples": num_samples, "kd_cache": kd_cache}, indent=1)
    text += tail.removeprefix("{") + "\n"
    unset = _UNSET_TAIL.decode("ascii")
    if not text.endswith(unset):
        raise AssertionError("the digest must be the last entry of the index")
    if (size := size + len(text)) > _MOST:
        _refuse_size(path, size)
    digest.update(text.encode("ascii"))
    kd_cache["digest"] = digest.hexdigest()
    yield (text.removesuffix(unset) + _TAIL.format(kd_cache["digest"])).encode("ascii")


def read_index(path: Path, *, maps: bool = True) -> Index:
    """Read and check an index, with its maps or, quickly, without them.

    Raises:
        FileNotFoundError: there is none.
        StaleError: the cache of an older script: an index without ``kd_cache``.
        StoreError: unreadable, or of a newer format.
        CorruptError: not byte for byte as it was written.
    """
    raw, digest = _read(path, maps)
    return _index_of(path, raw, digest, maps)


def index_of_bytes(path: Path, raw: bytes) -> Index:
    """`read_index` of a file's content that is not on this disk; ``path`` is what errors call it."""
    return _index_of(path, raw, _digest(raw), False)


def _index_of(path: Path, raw: bytes, digest: str, maps: bool) -> Index:
    content = _parse(path, raw)
    if "kd_cache" not in content:
        _refuse_renamed(path, content)
        raise StaleError(f"{shown(path)} was written by an older script: it has no kd_cache entry and no packs")
    _check_version_and_digest(path, raw, digest, content["kd_cache"])
    return _checked(path, content, maps)


def _read(path: Path, maps: bool) -> tuple[bytes, str]:
    """The text, without the maps if they are not asked for, and the digest that the file's bytes have."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MOST:
                raise StoreError(f"the index {shown(path)} has {size} bytes, expected at most {_MOST}", hint=_TOO_LARGE)
            end, digest = _end(file, size)
            at = end.rfind(_END)
            if at >= 0 and not maps:
                return b"{" + end[at:], digest
            if size > _MOST_UNSEALED and not end.endswith(_TAIL.format(digest).encode("ascii")):
                raise _damaged(path, "its bytes do not match their digest")
            file.seek(0)
            raw = file.read(size) or b""
            return raw, _digest(raw)
    except (FileNotFoundError, StoreError):
        raise
    except OSError as error:
        raise StoreError(f"cannot read the index {shown(path)}: {error.strerror or error}") from error


def _digest(raw: bytes) -> str:
    digest = xxhash.xxh3_128(memoryview(raw)[: -len(_UNSET_TAIL)])
    digest.update(_UNSET_TAIL)
    return digest.hexdigest()


def _end(file: io.FileIO, size: int) -> tuple[bytes, str]:
    """The last bytes, which hold all but the maps, and the digest that the file's bytes have."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(size, _BLOCK)))
    left = size - len(_UNSET_TAIL)
    while left > 0 and (count := file.readinto(buffer[: min(left, _BLOCK)])):
        digest.update(buffer[:count])
        left -= count
    digest.update(_UNSET_TAIL)
    return os.pread(file.fileno(), _BLOCK, max(0, size - _BLOCK)), digest.hexdigest()


def _refuse_renamed(path: Path, content: Mapping[str, Any]) -> None:
    """A flipped bit in the name ``kd_cache`` must not turn a cache into an unchecked one."""
    if any(isinstance(value, dict) and "format_version" in value for value in content.values()):
        raise _damaged(path, "the name of its kd_cache entry is not as it was written")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        content = strict_json(raw, lambda name: _damaged(path, f"an entry is missing or malformed ({shown(name)})"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON ({shown(error)[:200]})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "it is not an object")
    return content


def _check_version_and_digest(path: Path, raw: bytes, digest: str, record: Any) -> None:
    version = record.get("format_version") if isinstance(record, dict) else None
    if type(version) is int and version > FILE_VERSION:
        raise StoreError(
            f"{shown(path)} has format version {version}, this kd-cache reads up to {FILE_VERSION}",
            hint="Update kd-cache.",
        )
    if not raw.endswith(_TAIL.format(digest).encode("ascii")):
        raise _damaged(path, "its bytes do not match their digest")
    if type(version) is not int or version < 1:
        raise _damaged(path, f"its format version is {shown(version)}, and no kd-cache wrote that")


def _checked(path: Path, content: dict[str, Any], maps: bool) -> Index:
    """The digest finds accidents only, so the shape of what is used is checked as well."""
    record, count = content.pop("kd_cache"), content.pop("num_samples", None)
    place = misfit(record, _RECORD, "kd_cache") or misfit(content, {...: _TEXTS}) or misfit(count, int, "num_samples")
    if place is not None:
        raise _damaged(path, f"an entry is missing or malformed ({place})")
    if record["format_version"] == 1:
        for entry in record["teachers"].values():  # it named one pack, or none
            entry["packs"] = [] if (named := entry["pack"]) is None else [[named, entry["rows"]]]
            del entry["pack"]
        record["format_version"] = FILE_VERSION
    try:
        index = Index(path, count, content, record)
        for name, origin in index.origins.items():
            own = origin.fingerprint.digest == record["teachers"][name]["fingerprint"]
            named = origin.class_names is None or len(origin.class_names) == origin.num_classes
            there = "packs" in record["teachers"][name]
            if not (is_teacher_name(name) and own and named and there) or (maps and name not in content):
                raise ValueError(name)
        index.missing  # noqa: B018 (reading it checks it)
    except CorruptError:
        raise
    except ValueError as error:
        raise _damaged(path, f"an entry is missing or malformed ({shown(error)})") from error
    return index


def _damaged(path: Path, why: str) -> CorruptError:
    return CorruptError(
        f"the index {shown(path)} is damaged: {why}", hint="kd-cache dump writes it anew from the packs."
    )


def keep_older_index(path: Path) -> str:
    """Keep a copy of an older script's index beside it, before it is replaced; returns a note that says so.

    Raises:
        StoreError: it cannot be read, or the copy not be written.
    """
    kept = path.with_name(f"{path.stem}.older{path.suffix}")
    with store_errors(path, "read"):
        content = path.read_bytes()
    if not kept.exists():
        write_atomic(kept, content)
    return f"the older script's index is kept as {shown(kept)}, and rows that only it names stay where they are"


def read_older_maps(path: Path) -> dict[str, dict[str, str]]:
    """The maps of an index written by an older script: ``{teacher: {file: path}}``.

    Raises:
        CorruptError: it is not such an index.
    """
    content = _parse(path, _read(path, maps=True)[0])
    maps = {name: value for name, value in content.items() if isinstance(value, dict) and is_teacher_name(name)}
    if not maps or not all(isinstance(p, str) for paths in maps.values() for p in paths.values()):
        raise _damaged(path, "it maps no teacher's files to paths")
    for file in set().union(*maps.values()):
        if not file.isascii() and file != file.encode("utf-8", "replace").decode("utf-8"):
            raise _damaged(path, f"the name {shown(file)} is not valid Unicode (a lone surrogate)")
    return maps
