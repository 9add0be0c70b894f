"""Features of every file, by several threads, in one HDF5 file or an ``.npy`` each.

Clips are made in *parts* of a few dozen, each a file of its own that is whole or absent, so that an interruption costs
seconds: what is there is not made again. When all are there, they are put together and removed. A part is called by all
that its bytes depend on, the audio files' sizes and times among them. No clip's bytes depend on others, nor on the
number of threads.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from kd_cache.dataset.features import FeatureSource, stat_row
from kd_cache.dataset.front_end import FrontEnd, as_text
from kd_cache.errors import FeatureError, UsageError, listed, shown
from kd_cache.files.atomic import make_directory, open_file, remove_files, write_atomic
from kd_cache.prepare.audio import AudioReader
from kd_cache.prepare.containers import write_npy, write_packed
from kd_cache.prepare.log_mel import LogMel
from kd_cache.watch import Watcher

PART = 64
"""Clips of a part."""
PACKED, PARTS, MADE = "features.h5", "features.parts", "features.json"
_DIGEST = 16


@dataclass(frozen=True)
class ExtractJob:
    """What is to be made.

    Attributes:
        source: opens the audio; ``max_bytes`` is the largest feature.
        files: of the audio, in the order of the manifest; ``names`` what the features are called.
        front_end: the parameters, ``words`` what the manifest says of them.
        out: the folder of the features.
        npy: a file for each, instead of one for all.
        workers: threads; 0 works in place.
        overwrite: replace features that were made otherwise.
    """

    source: FeatureSource
    files: Sequence[str]
    names: Sequence[str]
    front_end: FrontEnd
    words: dict[str, Any]
    out: Path
    npy: bool = False
    workers: int = 2
    overwrite: bool = False


class Extracted(NamedTuple):
    """The file, or the folder that the names are relative to; and how many clips were made now."""

    path: Path
    made: int


class _Part(NamedTuple):
    path: Path
    clips: slice


def extract(job: ExtractJob, watcher: Watcher) -> Extracted:
    """Make the features, or what is missing of them.

    Raises:
        FeatureError: audio is missing or cannot be read; all of it is named, and the rest is kept for the next run.
        UsageError: soundfile or soxr is missing, or other features are there.
        StoreError: a file cannot be written.
    """
    reader = AudioReader(job.source, job.front_end)
    _refuse(job.source.missing(job.files), len(job.files))
    about = {"front_end": as_text(job.words), "torch": torch.__version__, **reader.codecs.versions}
    stats = _stats(job.source, job.files)
    key = _key(about, job.names, job.files, stats, job.npy)
    path, record = (job.out if job.npy else job.out / PACKED), job.out / MADE
    if not job.npy and _is_made(path, record, key):
        watcher.note(f"{shown(path)} is there, and nothing that it is made of has changed")
        return Extracted(path, 0)
    if path.is_file() and not job.overwrite and _recorded(record).get("key") != key:
        raise UsageError(
            f"{shown(path)} is there, and was made otherwise", hint="Pass --overwrite to replace it, or another --out."
        )
    folder = job.out / PARTS
    make_directory(folder)
    parts = []
    for start in range(0, len(job.files), PART):
        clips = slice(start, start + PART)
        name = _key(about, job.names[clips], job.files[clips], stats[clips], job.npy)
        parts.append(_Part(folder / f"{start:08d}-{name[:32]}.part", clips))
    made = _make_parts(job, reader, parts, watcher)
    _put_together(job, path, parts)
    write_atomic(record, json.dumps({"key": key, "stat": _stat(path, job.npy), **about}, indent=1).encode())
    remove_files(folder, [each for each in folder.iterdir() if each.suffix == ".part"])
    with suppress(OSError):  # somebody else's files stay
        folder.rmdir()
    return Extracted(path, made)


def _refuse(faults: dict[str, str], total: int) -> None:
    if faults:
        raise FeatureError(
            f"{len(faults):,} of {total:,} audio files cannot be read\n{listed(faults.values())}",
            hint="Mend them, or take them out of the tables. What was made of the others is kept.",
        )


def _stats(source: FeatureSource, files: Sequence[str]) -> np.ndarray:
    """As `FeatureSource.stat_many`, of what links lead to."""
    stats = source.stat_many(files)
    for number in np.flatnonzero(stats[:, 0] < 0).tolist():
        descriptor, status = source.open(files[number])
        os.close(descriptor)
        stats[number] = stat_row(status)
    return stats


def _key(about: dict[str, str], names: Sequence[str], files: Sequence[str], stats: np.ndarray, npy: bool) -> str:
    """A digest of all that features depend on: size and mtime of the audio files too, but not where they lie."""
    told = [about, list(names), list(files), stats[:, 2:4].tolist(), npy]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _recorded(record: Path) -> dict[str, Any]:
    """What was written beside features; nothing where that is not there or not ours."""
    try:
        told = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _is_made(path: Path, record: Path, key: str) -> bool:
    told = _recorded(record)
    return path.is_file() and told.get("key") == key and told.get("stat") == _stat(path, npy=False)


def _stat(path: Path, npy: bool) -> list[int]:
    return [] if npy else list(stat_row(path.stat())[2:4])


# -- parts -------------------------------------------------------------------------------------------------------------


def _make_parts(job: ExtractJob, reader: AudioReader, parts: Sequence[_Part], watcher: Watcher) -> int:
    """Make those that are not there; gives the number of clips made."""
    log_mel = LogMel(job.front_end)
    faults: dict[str, str] = {}
    made = 0

    def make(part: _Part) -> tuple[int, dict[str, str]]:
        if _frames(part.path) is not None:
            return 0, {}
        return _make(job.files[part.clips], reader, log_mel, part.path)

    watcher.stage("features", len(job.files))
    for part, (count, wrong) in zip(parts, _in_threads(make, parts, job.workers), strict=True):
        faults |= wrong
        made += count
        watcher.advance(len(job.files[part.clips]))
    _refuse(faults, len(job.files))
    return made


def _in_threads(make: Callable[[_Part], Any], parts: Sequence[_Part], workers: int) -> Iterator[Any]:
    """The results in their order. Each thread has torch to itself: sums in several would differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if workers == 0:
            yield from map(make, parts)
            return
        with ThreadPoolExecutor(workers, "extract", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield from pool.map(make, parts)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    finally:
        torch.set_num_threads(before)


def _make(files: Sequence[str], reader: AudioReader, log_mel: LogMel, path: Path) -> tuple[int, dict[str, str]]:
    """Write a part, or say which of its files cannot be read: then there is none."""
    arrays, faults = [], {}
    for file in files:
        try:
            arrays.append(log_mel(reader.read(file)))
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            faults[file] = f"{shown(file)}: {shown(reason)}"
    if not faults:
        content = io.BytesIO()
        np.save(content, np.array([len(array) for array in arrays], "<i4"))
        np.save(content, np.concatenate(arrays))
        body = content.getvalue()
        write_atomic(path, [xxhash.xxh3_128_digest(body), body])
    return len(arrays), faults


def _frames(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """A part's numbers of frames ``[n]`` and its values ``[sum, F]``; ``None`` where it is not there or damaged."""
    try:
        with open_file(path) as file:
            content = file.readall() or b""
    except OSError:
        return None
    body = content[_DIGEST:]
    if xxhash.xxh3_128_digest(body) != content[:_DIGEST]:
        return None
    stream = io.BytesIO(body)
    return np.load(stream, allow_pickle=False), np.load(stream, allow_pickle=False)


def _put_together(job: ExtractJob, path: Path, parts: Sequence[_Part]) -> None:
    def arrays() -> Iterator[np.ndarray]:
        for part in parts:
            read = _frames(part.path)
            if read is None:
                raise FeatureError(f"{shown(part.path)} was changed meanwhile", hint="Run the command again.")
            frames, values = read
            for start, stop in pairwise([0, *np.cumsum(frames).tolist()]):
                yield values[start:stop]

    if job.npy:
        write_npy(job.out, job.names, arrays())
        return
    counted = [frames for part in parts if (read := _frames(part.path)) is not None for frames in read[0].tolist()]
    write_packed(path, job.names, counted, job.front_end.n_mels, arrays())
