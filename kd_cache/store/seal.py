"""Sealing: many packs of one teacher and fingerprint become one; exactly those merged may be removed afterwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd_cache.errors import CorruptError, shown
from kd_cache.store.atomic import store_errors, sync_directory
from kd_cache.store.pack import Pack, row_checksums, write_pack
from kd_cache.store.union import Union


@dataclass(frozen=True)
class Sealed:
    """What a seal did: wanted rows that no pack holds, how many stored rows it left out, and repeats that differ.

    ``merged`` are the packs that the result stands for. They are to be removed once the index says so.
    """

    path: Path | None
    absent: np.ndarray  # [Q] bool, of the wanted keys
    left_out: int
    disagreements: list[str]
    merged: list[Path]


def seal(
    directory: Path, packs: Sequence[Pack], keys: np.ndarray, inputs: np.ndarray, required: np.ndarray | None = None
) -> Sealed:
    """Merge ``packs`` into one that holds exactly the wanted rows. Nothing is removed.

    Args:
        directory: where packs live.
        packs: of one origin.
        keys, inputs: ``[Q, 16]`` u1, the rows to keep, keys ascending. A row with another input digest is stale.
        required: ``[Q]`` bool; if one of these rows is absent, nothing is written.

    Equal rows give equal bytes, whatever packs they came in; when one pack already holds just them, it stays as it is.
    """
    if not packs:
        return Sealed(None, np.ones(len(keys), bool), 0, [], [])
    union = Union(packs)
    positions = union.match(keys, inputs)
    absent = positions < 0
    if required is not None and (absent & required).any():
        return Sealed(None, absent, 0, [], [])
    positions = positions[~absent]
    left_out = int((~union.repeats).sum()) - len(positions)
    disagreements = union.disagreements()
    path = _single_pack(union, positions)
    if path is None and len(positions):
        path = write_pack(
            directory,
            union.origin,
            union.keys[positions],
            union.inputs[positions],
            union.file_bytes(positions),
            lambda part: _carried_over(union, positions[part]),
        )
    merged = [pack.path for pack in union.packs if pack.path != path]
    return Sealed(path, absent, left_out, disagreements, merged)


def _carried_over(union: Union, positions: np.ndarray) -> np.ndarray:
    """Rows as they are stored. Raises `CorruptError` for one that its checksum is not of: it must not get a new one."""
    rows = union.take(positions)
    made = row_checksums(union.origin.fingerprint, union.keys[positions], union.inputs[positions], rows)
    wrong = positions[made != union.checksums[positions]]
    if len(wrong):
        path, file = union.packs[int(union.pack_no[wrong[0]])].path, union.files(wrong[:1])[0]
        raise CorruptError(
            f"the pack {shown(path)} is damaged: the row of {shown(file)} does not match its checksum",
            hint="kd-cache repair scores it again.",
        )
    return rows


def _single_pack(union: Union, positions: np.ndarray) -> Path | None:
    """The pack that already is the result."""
    numbers = set(union.pack_no[positions].tolist())
    packs = [union.packs[number] for number in numbers]
    return packs[0].path if len(packs) == 1 and len(packs[0]) == len(positions) else None


def remove_files(directory: Path, paths: Collection[Path]) -> None:
    """Remove files of one folder, durably; some may be gone already."""
    for path in paths:
        with store_errors(path, "remove"):
            path.unlink(missing_ok=True)
    if paths:
        with store_errors(directory, "sync"):
            sync_directory(directory)
