"""``.npy`` files read strictly: no pickle, no surprises in the header, exactly the size that it promises."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from kd_cache.errors import shown

MAGIC = b"\x93NUMPY"
MAX_HEADER = 10_000
MAX_LENGTH = 1 << 28
MAX_DIMENSIONS = 8
FLOATS = ("<f4", "<f2")
NUMBERS = ("<f4", "<f2", "<f8", "|b1", "|u1", "|i1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8")
"""Every dtype that torch has, too."""
_REMARKABLE = re.compile(rb"\\|[0-9](?:and|else|for|if|in|is|not|or)")
"""What makes Python print remarks on the text that it parses: escapes that are none, a number run into a keyword."""


@dataclass(frozen=True)
class NpyHeader:
    """What the header of a ``.npy`` promises; ``size`` is the whole file's length in bytes."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    fortran_order: bool
    offset: int

    @cached_property
    def size(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return self.offset + count * self.dtype.itemsize


def read_array(content: bytes, dtypes: tuple[str, ...] = FLOATS) -> np.ndarray:
    """The array in the bytes of a ``.npy`` file, C order, read-only. Raises ``ValueError`` saying what is wrong."""
    header = parse_header(content, dtypes)
    check_size(header, len(content))
    if not header.fortran_order:
        return np.ndarray(header.shape, header.dtype, content, header.offset)
    flat = np.frombuffer(content, header.dtype, offset=header.offset)
    array = np.array(flat.reshape(header.shape[::-1]).T, order="C")
    array.flags.writeable = False
    return array


def parse_header(content: bytes, dtypes: tuple[str, ...] = FLOATS) -> NpyHeader:
    """Parse a ``.npy`` header (format versions 1 to 3) without trusting it. Raises ``ValueError``."""
    if content[:6] != MAGIC:
        raise ValueError(
            "it is not a .npy file (its first bytes are not the magic of one)" if content else "it is empty"
        )
    version = content[6:8]
    if version not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise ValueError(f"unknown .npy version {version.hex('.')}")
    prefix = 10 if version[0] == 1 else 12
    length = int.from_bytes(content[8:prefix], "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header claims {length} bytes, expected at most {MAX_HEADER}")
    if len(content) < prefix + length:
        raise ValueError("it is truncated within its header")
    return _parsed(content[prefix : prefix + length], prefix + length, dtypes)


@lru_cache(maxsize=1024)  # most files of a data set share their header
def _parsed(text: bytes, offset: int, dtypes: tuple[str, ...]) -> NpyHeader:
    try:
        if _REMARKABLE.search(text):
            raise ValueError
        fields = ast.literal_eval(text.strip(b" \t\n").decode("latin1"))
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise ValueError("its header is not a plain description of an array") from None
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header must hold descr, fortran_order and shape, and nothing else")
    descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if not isinstance(descr, str) or descr not in dtypes:
        expected = "float32 (<f4) or float16 (<f2)" if dtypes == FLOATS else f"one of {', '.join(dtypes)}"
        raise ValueError(f"its dtype is not {expected}; convert it when saving ({_said(text)})")
    if type(fortran) is not bool:
        raise ValueError("fortran_order in its header must be True or False")
    sizes = isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS
    if not sizes or not all(type(n) is int and 0 <= n <= MAX_LENGTH for n in shape):
        raise ValueError(f"its shape is not a tuple of at most {MAX_DIMENSIONS} possible sizes ({_said(text)})")
    return NpyHeader(np.dtype(descr), shape, fortran, offset)


def _said(text: bytes) -> str:
    """What a header says, for a message: its text, because the values in it may be too large to print."""
    return f"header: {shown(text.decode('latin1').strip())[:200]}"


def check_size(header: NpyHeader, size: int) -> None:
    if header.size != size:
        raise ValueError(f"its header promises {header.size} bytes (shape {header.shape}), the file has {size}")
