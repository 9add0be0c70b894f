"""One contract for every file of a cache: no flipped bit, no truncation and no surplus goes unnoticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from store_fixtures import Rows, flipping, names, origin
from test_index import MAPS, record

from kd_cache.errors import CorruptError, StoreError
from kd_cache.score.unchanged import SEEN_NAME, Seen
from kd_cache.store.index import read_index, write_index
from kd_cache.store.pack import open_pack
from kd_cache.store.permitted import Permitted, read_permitted
from kd_cache.store.view import differing, view_names, write_rows

FIVE = Rows.of(names(5), dtype="fp16")


@dataclass(frozen=True)
class Stored:
    """How a file is made, and whether a reader believes it: damage must be its own kind of error, or no notes at all.

    ``later`` is the text before a digit that another bit makes a later format version's.
    """

    make: Callable[[Path], Path]
    believed: Callable[[Path], bool]
    later: bytes = b""


def refused(read: Callable[[Path], object]) -> Callable[[Path], bool]:
    def believed(path: Path) -> bool:
        try:
            read(path)
        except CorruptError as error:
            if path.name not in error.message:
                raise
            return False
        return True

    return believed


def pack(folder: Path) -> Path:
    return Rows.of(["a"], 1, "fp16").write(folder, origin("t", 1, "fp16"))


def index(folder: Path) -> Path:
    write_index(folder / "cache_index.json", 1, MAPS, record())
    return folder / "cache_index.json"


def permitted(folder: Path) -> Path:
    return folder / Permitted.of(FIVE.keys, np.arange(-1, 4, dtype=np.int32)).write(folder)


def row_file(folder: Path) -> Path:
    write_rows(folder, FIVE.keys, FIVE.logits)
    return folder / view_names(FIVE.keys)[3]


def notes(folder: Path) -> Path:
    stats, shapes = np.zeros((5, 5), np.int64), np.ones((5, 2), np.int32)
    Seen.nothing().record(FIVE.keys, stats, shapes, FIVE.inputs, 1 << 62).save(folder / SEEN_NAME)
    return folder / SEEN_NAME


STORED = {
    "pack": Stored(pack, refused(open_pack)),
    "index": Stored(index, refused(read_index), b'"format_version": '),
    "index without its maps": Stored(index, refused(lambda path: read_index(path, maps=False)), b'"format_version": '),
    "permitted samples": Stored(permitted, refused(read_permitted)),
    "row of the view": Stored(
        row_file, lambda path: not list(differing(path.parent, FIVE.keys[3:4], FIVE.logits[3:4]))
    ),
    "notes of features": Stored(notes, lambda path: len(Seen.load(path)) > 0),
}


@pytest.fixture(params=STORED)
def stored(request: pytest.FixtureRequest) -> Stored:
    return STORED[request.param]


def test_every_flipped_bit_is_found(tmp_path: Path, stored: Stored) -> None:
    """Also one in the name ``kd_cache`` of an index: it must not make an older script's of it, which is unprotected."""
    path = stored.make(tmp_path)
    assert stored.believed(path)
    newer = path.read_bytes().index(stored.later) + len(stored.later)
    with flipping(path) as flip:
        for bit in range(8 * path.stat().st_size):
            flip(bit)
            try:
                assert not stored.believed(path), f"bit {bit} is flipped and nobody noticed"
            except StoreError:
                assert stored.later, bit
                assert bit // 8 == newer
    assert stored.believed(path)


def test_every_truncation_and_any_surplus_is_found(tmp_path: Path, stored: Stored) -> None:
    path = stored.make(tmp_path)
    content = path.read_bytes()
    cuts = [content[:size] for size in range(len(content))]
    surplus = [content + more for more in (b"\0", b"\n", b" ", content[-20:], bytes(80))]
    for damaged in [*cuts, *surplus, content[:-1] + b"\0\0", content[1:], content[:20] + content[21:] + b"\0"]:
        path.write_bytes(damaged)
        assert not stored.believed(path), f"{len(damaged)} bytes of {len(content)}"
    path.write_bytes(content)
    assert stored.believed(path)


@pytest.mark.parametrize("what", ["FIFO", "folder"])
def test_what_is_no_file_is_no_such_file_at_once(tmp_path: Path, stored: Stored, what: str) -> None:
    path = stored.make(tmp_path)
    path.unlink()
    (os.mkfifo if what == "FIFO" else Path.mkdir)(path)
    with suppress(StoreError):
        assert not stored.believed(path)
