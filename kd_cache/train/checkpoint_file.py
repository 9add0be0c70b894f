"""The bytes of a checkpoint file: what is in it, read without trust, decided by content and never by suffix."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import struct
from collections import OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from typing import IO, Any, Final

import torch
import xxhash
from safetensors.torch import load as tensors_of_safetensors

from kd_cache.errors import CheckpointError, listed, shown
from kd_cache.files.pickle_scan import PickleScan, unlisted
from kd_cache.files.torch_zip import (
    NotFromTorchError,
    UnreadablePickleError,
    brief,
    global_name,
    pickle_in,
    read_without_code,
)
from kd_cache.store.origin import canonical_json

RECORD_ENTRY: Final = "kd_cache"
CHECKSUM_ENTRY: Final = "kd_cache.xxh3_128"
MOST_BYTES: Final = 4 << 30
"""Larger files are refused unread: CNN14 has 0.32 GB of weights, 1 GB with its optimizer. See `checkpoint_limit`."""
MOST_HEADER: Final = 16 << 20
"""A safetensors header takes some 100 bytes per tensor, and 22 for every sample that trained the teacher. (The format
allows 100 MB, which may parse into gigabytes.)"""
MOST_PICKLE: Final = 4 << 20
"""A state dict takes some 250 bytes of pickle per tensor; a longer one only keeps the reader busy."""
MOST_RECORD: Final = {".safetensors": 15 << 20, ".pth": 3 << 20}
"""What is written of a record, so that with the tensors' names it stays below those two."""
LEGACY_PICKLES: Final = 5  # magic number, protocol, machine, the object, the keys of its storages
_MAGIC: Final = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
WEIGHTS_GLOBAL: Final = re.compile(
    r"collections\.(OrderedDict|Counter)|torch\.\w+Storage|torch\.(Size|device)|torch\.serialization\._get_layout"
    r"|torch\.(b?float|u?int|complex|bool)\w*|builtins\.(set|complex)|_codecs\.encode"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state|sparse_tensor|meta_tensor_no_storage)"
)
"""What weights need, and what training scripts keep beside them. torch allows more, ``bytearray`` for example."""

THIS_FILE: Final = "<file>"
_TYPE: Final = re.compile(
    r"(?!subprocess\.|os\.)[a-z_][a-z0-9_.]{0,60}\.[A-Z][A-Za-z0-9]{0,40}|collections\.(defaultdict|deque)|numpy\.ndarray"
    r"|numpy\._?core\.multiarray\._reconstruct|builtins\.(list|dict|tuple|int|float|str|frozenset|slice|range)"
    r"|datetime\.\w+"
)
"""Names in pickles that look like a type that holds values."""

AGAIN: Final = "Copy the file again from where it was made, or write it again with teachers.save_checkpoint."

_FORMATS: Final = {
    "f8": "d",
    "f4": "f",
    "f2": "e",
    "c16": "2d",
    "c8": "2f",
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
}


class _NumberKind:
    """Stands for ``numpy.dtype`` in a pickle: a plain kind of number, a text, or an error."""

    def __init__(self, code: str, *_: object) -> None:
        self.order = "<"
        self.code = code
        if code not in _FORMATS and not re.fullmatch(r"[US]\d{1,6}", code):
            raise CheckpointError(
                f"a numpy {shown(code)} lies beside the weights; numbers and texts of numpy are read",
                hint="Save the weights alone: torch.save(model.state_dict(), path).",
            )

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    """Stands for ``numpy.ndarray``: nothing is done with its bytes."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass


def _array(*_: object) -> _Array:
    return _Array()


def _plain_dict(*_: object) -> OrderedDict[Any, Any]:
    return OrderedDict()


def _number(kind: _NumberKind, content: bytes) -> object:
    """Stands for ``numpy``'s ``scalar``, which would allocate and zero whatever size a dtype asks for."""
    if kind.code.startswith("U"):
        return content.decode("utf-32-be" if kind.order == ">" else "utf-32-le")
    if kind.code.startswith("S"):
        return content
    found = struct.unpack(kind.order + _FORMATS[kind.code], content)
    return complex(*found) if kind.code.startswith("c") else found[0]


_HOMES: Final = ("numpy._core.multiarray", "numpy.core.multiarray")  # the second: numpy before 2
NUMBERS: Final[list[Any]] = [(_NumberKind, "numpy.dtype"), *((_number, f"{home}.scalar") for home in _HOMES)]
"""Training scripts save ``val_acc`` as they got it from numpy: plain numbers are let through, as Python's."""
STAND_INS: Final[list[Any]] = [
    (_Array, "numpy.ndarray"),
    *((_array, f"{home}._reconstruct") for home in _HOMES),
    (_plain_dict, "collections.defaultdict"),  # torch fills no other kind of dict
]
"""What stands for some things that a user trusts."""

_most_bytes: ContextVar[int] = ContextVar("_most_bytes", default=MOST_BYTES)


@contextlib.contextmanager
def checkpoint_limit(most_bytes: int) -> Iterator[None]:
    """Within it, checkpoints of up to so many bytes are read.

    For whoever loads teachers through their factories: ``factory(ckpt)`` has no room for a limit.
    """
    token = _most_bytes.set(most_bytes)
    try:
        yield
    finally:
        _most_bytes.reset(token)


def read_content(path: str | os.PathLike[str]) -> tuple[dict[Any, Any], int, str]:
    """The file's entries, its size in bytes and its SHA-256. The record, if any, is the entry ``kd_cache``.

    Of one open file, so that all three are of the same bytes whatever takes its place meanwhile.
    """
    with _regular_file(path) as file:
        before = os.fstat(file.fileno())
        try:
            content = _parsed(file, before.st_size)
        except CheckpointError:
            raise
        except NotFromTorchError as error:
            raise CheckpointError(str(error), hint=getattr(error, "hint", AGAIN)) from error
        except Exception as error:  # hostile bytes lead the parsers to any error at all; none may escape
            raise CheckpointError(f"the file is damaged or not a checkpoint: {brief(error)}", hint=AGAIN) from error
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError("the file changed while it was read", hint="Wait until it is written, then retry.")
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a dict of tensors, found {kind_of(content)}", hint=AGAIN)
    return dict(content), before.st_size, digest


@contextlib.contextmanager
def _regular_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    try:
        # O_NONBLOCK: a FIFO would otherwise wait for a writer, forever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot open the checkpoint: {reason}", hint="Check the path.") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError("expected a file, found a directory, pipe or device", hint="Check the path.")
    with os.fdopen(handle, "rb") as file:
        yield file


def _parsed(file: IO[bytes], size: int) -> object:
    """Whatever the file's first bytes say it is; the caller turns any other error into a CheckpointError."""
    head = file.read(512)
    file.seek(0)
    if not head:
        raise CheckpointError("the file is empty", hint=AGAIN)
    if size > _most_bytes.get():
        raise CheckpointError(
            f"the file has {size} bytes; teachers of up to {_most_bytes.get()} are read",
            hint="Save the weights alone, without optimizer state, with teachers.save_checkpoint; "
            "--max-checkpoint-bytes permits more.",
        )
    # A safetensors file starts with the length of its header as 8 bytes, little-endian, then the JSON itself.
    if head[8:9] == b"{" and head[6:8] == b"\0\0":
        return _from_safetensors(file, size)
    if head.startswith(b"PK\x03\x04"):
        return _weights_only(file, pickle_in(file, size, MOST_PICKLE), 1)
    if head[0] == 0x80:  # torch.save before 1.6: several pickles in a row, then the numbers; or any plain pickle
        return _weights_only(file, file.read(MOST_PICKLE), LEGACY_PICKLES)
    raise CheckpointError(
        f"expected safetensors or a file of torch.save, found {_look(head)}",
        hint="If it was downloaded, a page or a pointer came in its place: fetch the file itself.",
    )


def _look(head: bytes) -> str:
    start = shown(head[:40].decode("ascii", "backslashreplace"))
    if b"<html" in head.lower() or b"<!doctype" in head.lower():
        return f"an HTML page ({start} …)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if head[257:262] == b"ustar":
        return "a tar archive (torch before 0.4 wrote those; they cannot be read safely)"
    return f"a file that starts with {start}"


def _from_safetensors(file: IO[bytes], size: int) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER or length + 8 > size:
        raise CheckpointError(
            f"the safetensors header claims {length} bytes; the file has {size}, allowed are {MOST_HEADER}",
            hint=AGAIN,
        )
    header = file.read(length)
    described = json.loads(header)
    metadata = described.get("__metadata__") or {}
    file.seek(0)
    content = file.read()
    written = metadata.get(CHECKSUM_ENTRY)
    if written and written != _checksum(described, memoryview(content)[8 + length :], metadata.get(RECORD_ENTRY, "")):
        raise CheckpointError("the file is damaged: its weights are not those that were written", hint=AGAIN)
    tensors: dict[str, Any] = tensors_of_safetensors(content)
    return {**tensors, RECORD_ENTRY: metadata[RECORD_ENTRY]} if RECORD_ENTRY in metadata else tensors


def with_checksum(content: bytes, note: str) -> list[bytes]:
    """A safetensors file in pieces, with a record and a checksum as metadata: the format itself has none.

    The header is written here, because the library writes metadata in another order every time.
    """
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    checksum = _checksum(header, body, note)
    header["__metadata__"] = {RECORD_ENTRY: note, CHECKSUM_ENTRY: checksum}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, body]


def _checksum(header: dict[str, Any], body: bytes | memoryview, note: str) -> str:
    """xxh3-128 of the header without its metadata (canonical JSON), of the record and of the numbers: 32 hex digits."""
    digest = xxhash.xxh3_128(canonical_json({name: value for name, value in header.items() if name != "__metadata__"}))
    digest.update(note.encode())
    digest.update(body)
    return digest.hexdigest()


def _weights_only(file: IO[bytes], content: bytes, pickles: int) -> object:
    """Refuse pickles that call more than weights need, or would take all the memory or all the time there is."""
    scan = PickleScan(content, pickles)
    allowed = [*(name for _, name in NUMBERS), *map(global_name, torch.serialization.get_safe_globals())]
    foreign = unlisted(scan.calls, WEIGHTS_GLOBAL, allowed)
    if foreign:
        raise CheckpointError(
            f"this pickle calls more than weights need; it was refused and nothing ran:\n{listed(foreign)}",
            hint=_way_to_trust(foreign),
        )
    if scan.excess:
        raise CheckpointError(f"the file's structure is larger than weights need: {scan.excess}", hint=AGAIN)
    if scan.whole < pickles and len(content) >= MOST_PICKLE:
        raise CheckpointError(f"the file's structure is larger than {MOST_PICKLE} bytes", hint=AGAIN)
    if scan.whole and pickles > 1 and _MAGIC not in content[:32]:
        raise UnreadablePickleError("expected a file of torch.save, found a plain pickle")
    if scan.whole < pickles:
        raise CheckpointError("the file is damaged or not a checkpoint: its pickle breaks off", hint=AGAIN)
    file.seek(0)
    return read_without_code(file, scan.protocol, [*NUMBERS, *STAND_INS])


def _way_to_trust(names: list[str]) -> str:
    """Lines of Python that read such a file, where all names look like types; `naming` puts the file's name in."""
    ask = "Ask for a .safetensors file"
    if not all(_TYPE.fullmatch(name) for name in names):
        return f"{ask}, or save the weights alone where it was made: torch.save(model.state_dict(), path)."
    modules = ", ".join(dict.fromkeys(["teachers", "torch", *(name.rpartition(".")[0] for name in names)]))
    return (
        f"{ask}. Only if you trust this one, write it again in Python:\n"
        f"import {modules}\n"
        f"with torch.serialization.safe_globals([{', '.join(names)}]):\n"
        f"    teacher = teachers.load_teacher({THIS_FILE})\n"
        "teachers.save_checkpoint('trusted.safetensors', teacher.state_dict(), teacher.record)"
    )


def kind_of(value: object) -> str:
    if value is None:
        return "nothing"
    empty = isinstance(value, dict | list | str) and not value
    return f"an empty {type(value).__name__}" if empty else f"a {type(value).__name__}"
