"""Caches of any size without a teacher: packs written by kd-cache's own code, with values that a formula repeats."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from kd_cache.keys import key_columns, keys_of, sorted_order
from kd_cache.store.index import origin_entry, write_index
from kd_cache.store.origin import Fingerprint, Origin
from kd_cache.store.pack import write_pack
from kd_cache.store.permitted import NO_LABEL, Permitted

TEACHERS = ("city2scene", "scene")
_BLOCK = 65_536


def names(count: int) -> list[str]:
    """Manifest paths as long as real ones."""
    return [named(number) for number in range(count)]


def named(number: int) -> str:
    return f"features/train/device-a/clip-{number:07d}-scene.npy"


def origin(teacher: str, classes: int) -> Origin:
    parts = {"weights": teacher, "architecture": "made/1", "feature_spec": "none", "precision": "fp32", "dtype": "fp16"}
    return Origin(teacher, Fingerprint(parts), "logits", classes, "fp16")


def block_of_rows(teacher: int, block: int, count: int, classes: int) -> np.ndarray:
    """``[count, classes]`` float16 between -1 and 1, finite: rows ``block * 65,536 …`` in the order of the keys."""
    bits = np.frombuffer(np.random.default_rng([teacher, block]).bytes(2 * count * classes), np.uint16)
    return (bits & 0xBBFF).view(np.float16).reshape(count, classes)


def rows_between(teacher: int, start: int, stop: int, count: int, classes: int) -> np.ndarray:
    """``[stop - start, classes]`` float16: rows of ``count`` in the order of the keys."""
    blocks = range(start // _BLOCK, -(-stop // _BLOCK))
    made = [block_of_rows(teacher, block, min(_BLOCK, count - block * _BLOCK), classes) for block in blocks]
    return np.concatenate(made)[start - blocks[0] * _BLOCK :][: stop - start]


def make_cache(
    path: Path, files: Sequence[str], classes: int, inputs: np.ndarray | None = None, packs: int = 1
) -> Path:
    """A finished cache ``A2b`` below ``path``: two teachers, fp16, no view; 1, 2, 4, 8 … packs of each.

    ``inputs`` ``[N, 16]`` u1 are the digests of the files' features; without it they are made up.
    """
    folder = path / "A2b"
    (folder / "packs").mkdir(parents=True)
    keys = keys_of(files)
    order = sorted_order(keys)
    keys = keys[order]
    encoded = [files[number].encode() for number in order.tolist()]
    scored = keys if inputs is None else inputs[order]
    borders = [(number << 64) // packs for number in range(1, packs)]
    cuts = [0, *np.searchsorted(key_columns(keys)[0], np.array(borders, np.uint64)).tolist(), len(keys)]
    entries = {}
    for number, teacher in enumerate(TEACHERS):
        made_by, packed = origin(teacher, classes), []
        for start, stop in pairwise(cuts):

            def take(part: slice, number: int = number, start: int = start) -> np.ndarray:
                return rows_between(number, start + part.start, start + part.stop, len(keys), classes)

            mine = slice(start, stop)
            pack = write_pack(folder / "packs", made_by, keys[mine], scored[mine], encoded[mine], take, _BLOCK)
            packed.append([pack.name, stop - start])
        entries[teacher] = {**origin_entry(made_by), "rows": len(files), "packs": packed, "earlier": []}
    permitted = Permitted.of(keys, np.full(len(files), NO_LABEL)).write(folder)
    record = {"adaptation": "A2b", "files": False, "missing": {}, "manifest": {"sha256": ""}, "teachers": entries}
    record |= {"permitted": {"file": permitted, "count": len(files)}}
    write_index(folder / "cache_index.json", len(files), {teacher: {} for teacher in TEACHERS}, record)
    return folder


def expected_rows(count: int, classes: int) -> np.ndarray:
    """``[N, T, C]`` of all rows, in the order of the keys."""
    table = np.empty((count, len(TEACHERS), classes), np.float16)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        for number in range(len(TEACHERS)):
            table[start:stop, number] = block_of_rows(number, start // _BLOCK, stop - start, classes)
    return table
