"""Rows for other programs: a bare tensor with its list of files, a table of text, or plain ``.npy`` files.

What is exported is what `LogitCache` serves: checked rows of the current fingerprint and of permitted samples, in the
order of their keys. The packs stay the truth, and no teacher, manifest or feature is needed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.errors import KDCacheError, MissingLogitsError, StoreError, UsageError, listed, shown
from kd_cache.exchange.imported import FILE_COLUMN, LOGIT_COLUMN, files_list_of
from kd_cache.files.atomic import (
    make_directory,
    remove_files,
    store_errors,
    sync_directory,
    temporary_beside,
    write_atomic,
)
from kd_cache.files.hdf5 import Outlet
from kd_cache.keys import keys_of
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import INDEX_NAME, Index, read_older_maps
from kd_cache.store.origin import Origin
from kd_cache.store.publish import publish_view
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.view import (
    ROW_FILE_NAME,
    is_row,
    row_file_bytes,
    stored_names,
    view_name,
    view_names,
    without_files,
    write_view,
)
from kd_cache.watch import Watcher

KINDS = ("npy", "pt", "tsv")
ROWS_INDEX = "index.json"
FORMATS = {"fp32": "%.9g", "fp16": "%.5g"}
"""As many digits as it takes to read the same number again, whatever it is."""
_BLOCK_BYTES = 1 << 22
_NAMES = 16_384


@dataclass(frozen=True)
class ExportJob:
    """What to export of which cache.

    Attributes:
        to: ``pt``, ``tsv`` or ``npy``.
        output: the folder to write into; ``None`` (only for ``npy``) makes the view in the cache itself.
        only: just these teachers; all by default.
        overwrite: replace what an earlier export left.
    """

    folder: CacheFolder
    to: str
    output: Path | None
    only: Sequence[str] = ()
    overwrite: bool = False


@dataclass(frozen=True)
class Exported:
    """One teacher's export: ``path`` is a file, or the folder of its row files."""

    teacher: str
    rows: int
    bytes: int
    path: Path


@dataclass
class ExportReport:
    """What was written; ``num_samples`` counts the samples that every exported teacher holds."""

    cache: Path
    to: str
    teachers: list[Exported] = field(default_factory=list)
    num_samples: int = 0

    def as_json(self) -> dict[str, Any]:
        teachers = {one.teacher: {"rows": one.rows, "bytes": one.bytes, "path": str(one.path)} for one in self.teachers}
        return {"cache": str(self.cache), "to": self.to, "num_samples": self.num_samples, "teachers": teachers}


@dataclass(frozen=True)
class _Served:
    """One teacher's rows as `LogitCache` serves them, in key order."""

    origin: Origin
    files: list[str]
    cache: LogitCache

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """``(start, rows [n, C])``, a few megabytes at a time."""
        size = max(1, _BLOCK_BYTES // (self.origin.width * self.origin.stored.itemsize))
        rows = self.cache.all_rows()
        for start in range(0, len(self.files), size):
            numbers = rows[start : start + size]
            yield start, self.cache.batch(numbers).numpy().reshape(len(numbers), -1)  # of one teacher


def export_logits(job: ExportJob, watcher: Watcher | None = None) -> ExportReport:
    """Write every served row of the job's teachers. Each file appears whole, under its name, when it is durable.

    Raises:
        UsageError: an output that cannot be meant, class names that cannot be columns, files that exist already.
        MissingLogitsError: no finished cache, or a teacher that it does not hold.
        CorruptError: a damaged index or pack; nothing is written then.
        StaleError: the cache of an older script, or one that changed meanwhile.
        StoreError: what is to be written cannot be.
    """
    watcher = watcher or Watcher()
    if job.to not in KINDS:
        raise UsageError(f"cannot export to {shown(job.to)}, expected one of {', '.join(KINDS)}")
    snapshot = Snapshot(job.folder)
    origins = _chosen(job, snapshot.finished())
    if job.output is None:
        return _make_view(job, snapshot, watcher)
    _check_output(job, job.output, origins)
    _refuse_damage(snapshot, origins)
    make_directory(job.output)
    report = ExportReport(job.folder.path, job.to)
    if job.to == "npy":
        for name, earlier in _exported_before(job.output).items():
            if name in origins:
                _remove_surplus(job.output / name, earlier, _served(job.folder, origins[name], watcher).files)
        with store_errors(job.output / ROWS_INDEX, "replace"):
            (job.output / ROWS_INDEX).unlink(missing_ok=True)  # it must not name rows that are being replaced
    named = {origin.teacher: _export_one(job, job.output, origin, report, watcher) for origin in origins.values()}
    report.num_samples = len(set.intersection(*map(set, named.values())))
    if job.to == "npy":
        write_atomic(job.output / ROWS_INDEX, _index_pieces(job.output, named, report.num_samples))
    return report


def _make_view(job: ExportJob, snapshot: Snapshot, watcher: Watcher) -> ExportReport:
    """The view in the cache itself, as its dump would have written it."""
    if job.to != "npy":
        raise UsageError(f"--to {job.to} needs --output, the folder to write into")
    if job.only:
        raise UsageError("a cache has a view of all its teachers or of none", hint="Pass --output, or no --only.")
    done = publish_view(snapshot, str(job.folder.path), watcher)
    index = snapshot.finished()
    report = ExportReport(job.folder.path, job.to, num_samples=done.num_samples)
    for name, origin in index.origins.items():
        size = len(row_file_bytes(np.zeros(origin.width, origin.stored)))
        report.teachers.append(Exported(name, done.rows[name], done.rows[name] * size, job.folder.view_path(name)))
    return report


def _export_one(job: ExportJob, output: Path, origin: Origin, report: ExportReport, watcher: Watcher) -> list[str]:
    """Write one teacher's rows; returns their files. Nothing of its table outlives this call."""
    served = _served(job.folder, origin, watcher)
    watcher.stage(f"exporting {origin.teacher}", len(served.files))
    path = _targets(job.to, output, origin.teacher)[0]
    size = {"pt": _write_tensor, "tsv": _write_table, "npy": _write_row_files}[job.to](path, served, watcher)
    report.teachers.append(Exported(origin.teacher, len(served.files), size, path))
    return served.files


# -- before anything is written ---------------------------------------------------------------------------------------


def _chosen(job: ExportJob, index: Index) -> dict[str, Origin]:
    unknown = [name for name in job.only if name not in index.origins]
    if unknown or not index.origins:
        raise MissingLogitsError(
            f"{shown(job.folder.path)} holds no logits of {', '.join(map(shown, unknown)) or 'any teacher'} "
            f"(it holds {', '.join(index.origins) or 'none'})"
        )
    chosen = {name: origin for name, origin in index.origins.items() if not job.only or name in job.only}
    if job.output is not None:
        chosen = {name: origin.of_views(()) for name, origin in chosen.items()}  # of views the clean one
    without_files(chosen, asked=True)
    if job.to == "tsv":
        for name, origin in chosen.items():
            _columns(name, origin)
    return chosen


def _check_output(job: ExportJob, output: Path, origins: Iterable[str]) -> None:
    """Refuse an output inside a cache, and one where something is that is not to be overwritten."""
    real = Path(os.path.realpath(output))
    for place in (real, *real.parents):
        if (place / INDEX_NAME).exists():
            raise UsageError(
                f"{shown(output)} is, or lies in, the cache {shown(place)}; an export needs a folder of its own",
                hint="Choose another --output; --to npy without --output makes the view in the cache itself.",
            )
    if job.overwrite:
        return
    paths = dict.fromkeys(path for name in origins for path in _targets(job.to, output, name))
    there = [path for path in paths if os.path.lexists(path)]
    if there:
        raise UsageError(
            f"{len(there)} of the files to write exist already\n{listed(there)}",
            hint="Choose another --output, or pass --overwrite to replace them.",
        )


def _targets(to: str, output: Path, name: str) -> list[Path]:
    if to == "pt":
        return [output / f"{name}.pt", files_list_of(output / f"{name}.pt")]
    return [output / f"{name}.tsv"] if to == "tsv" else [output / name, output / ROWS_INDEX]


def _refuse_damage(snapshot: Snapshot, origins: dict[str, Origin]) -> None:
    """Damage anywhere in what is asked for is found before the first file is written."""
    for name in origins:
        snapshot.served_packs(name)


def _served(folder: CacheFolder, origin: Origin, watcher: Watcher) -> _Served:
    """Open one teacher as a student would; what that warns of is noted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Every byte was checked a moment ago; lazily means here: again, block by block, and no table of everything.
        cache = LogitCache.open(
            folder.path,
            [origin.teacher],
            {origin.teacher: origin.fingerprint},
            value_kind=origin.value_kind,
            verify="lazy",
        )
    for warning in caught:
        watcher.note(str(warning.message))
    return _Served(origin, cache.files, cache)


# -- a tensor with its list of files ----------------------------------------------------------------------------------


def _write_tensor(path: Path, served: _Served, watcher: Watcher) -> int:
    """``<teacher>.pt``, a bare tensor ``[N, C]``, and ``<teacher>.files.json``; returns their size.

    The old list goes before the new tensor comes, and the new list comes last and carries the digest of the rows: no
    tensor is ever beside the list of another.
    """
    files_list = files_list_of(path)
    with store_errors(files_list, "replace"):
        files_list.unlink(missing_ok=True)
        sync_directory(files_list.parent)
    digest = _save_tensor(path, served, watcher)
    write_atomic(files_list, _list_pieces(served, digest))
    return path.stat().st_size + files_list.stat().st_size


def _save_tensor(path: Path, served: _Served, watcher: Watcher) -> str:
    """Write the tensor durably; returns the SHA-256 of its rows.

    torch writes a whole tensor or none: the rows go through an unnamed file first, which it then maps, so that no table
    is ever in memory as a whole.
    """
    import torch

    shape = (len(served.files), served.origin.width)
    digest = hashlib.sha256()
    with store_errors(path, "write"), temporary_beside(path) as temporary:
        with tempfile.TemporaryFile(dir=path.parent) as raw, temporary.open("xb", buffering=0) as file:
            for _, rows in served.blocks():
                raw.write(rows.tobytes())
                digest.update(rows.tobytes())
                watcher.advance(len(rows))
            raw.flush()
            table = np.memmap(raw, served.origin.stored, "c", shape=shape)
            outlet = Outlet(file)
            torch.save(torch.from_numpy(table), outlet)  # type: ignore[arg-type]
            outlet.raise_failure()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    return digest.hexdigest()


def _list_pieces(served: _Served, digest: str) -> Iterator[bytes]:
    origin = served.origin
    head = {
        "teacher": origin.teacher,
        "fingerprint": origin.fingerprint.digest,
        "parts": dict(origin.fingerprint.parts),
        "value_kind": origin.value_kind,
        "class_names": origin.class_names,
        "dtype": origin.dtype,
        "rows": len(served.files),
        "sha256": digest,
    }
    yield json.dumps(head, indent=1).removesuffix("\n}").encode() + b',\n "files": ['
    for start in range(0, len(served.files), _NAMES):
        block = map(json.dumps, served.files[start : start + _NAMES])
        yield ((",\n  " if start else "\n  ") + ",\n  ".join(block)).encode()
    yield b"\n ]\n}\n"


# -- a table of text --------------------------------------------------------------------------------------------------


def _columns(teacher: str, origin: Origin) -> list[str]:
    """The header of the numbers. Raises `UsageError` for names that would be ambiguous."""
    if origin.class_names is None:
        return [LOGIT_COLUMN.format(number) for number in range(origin.width)]
    names = list(origin.class_names)
    if FILE_COLUMN in names:
        raise UsageError(
            f"{teacher}: its class names cannot be columns of a table: one is {FILE_COLUMN!r}",
            hint="Export it --to pt, which keeps the names beside the tensor.",
        )
    return names


def _write_table(path: Path, served: _Served, watcher: Watcher) -> int:
    """``<teacher>.tsv``; returns its size."""
    write_atomic(path, _table_pieces(served, watcher))
    return path.stat().st_size


def _table_pieces(served: _Served, watcher: Watcher) -> Iterator[bytes]:
    columns = _columns(served.origin.teacher, served.origin)
    yield ("\t".join(map(_cell, [FILE_COLUMN, *columns])) + "\n").encode()
    line = "\t".join(["%s", *[FORMATS[served.origin.dtype]] * served.origin.width]) + "\n"
    for start, rows in served.blocks():
        names = map(_cell, served.files[start : start + len(rows)])
        yield "".join([line % (name, *row) for name, row in zip(names, rows.tolist(), strict=True)]).encode()
        watcher.advance(len(rows))


def _cell(text: str) -> str:
    """A name as the csv module writes it into a table: quoted where it must be."""
    cell = io.StringIO()
    # Python before 3.13 leaves a carriage return unquoted, and then reads it as the end of the row.
    writer = csv.writer(
        cell,
        delimiter="\t",
        lineterminator="\n",
        quoting=csv.QUOTE_ALL if "\r" in text else csv.QUOTE_MINIMAL,
    )
    writer.writerow([text])
    return cell.getvalue().removesuffix("\n")


# -- plain files ------------------------------------------------------------------------------------------------------


def _refuse_link(directory: Path) -> None:
    if directory.is_symlink():
        raise StoreError(f"{shown(directory)} is a link; row files need a folder of their own", hint="Remove it.")


def _write_row_files(directory: Path, served: _Served, watcher: Watcher) -> int:
    """Write the row files that differ; returns the size of all. Files of other names stay, and are told of."""
    _refuse_link(directory)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, rows in served.blocks():
            yield keys_of(served.files[start : start + len(rows)]), rows

    write_view(directory, blocks, watcher.advance)
    others = {name for name in stored_names(directory) if ROW_FILE_NAME.match(name)}
    if others := others - set(view_names(keys_of(served.files))):
        watcher.note(
            f"{len(others)} files in {shown(directory)} stay, which no earlier export is known to have written"
        )
    return len(served.files) * len(row_file_bytes(np.zeros(served.origin.width, served.origin.stored)))


def _exported_before(output: Path) -> dict[str, set[str]]:
    """The row files by teacher that an earlier export's index names; none where there is no such index."""
    try:
        maps = read_older_maps(output / ROWS_INDEX)
    except (KDCacheError, FileNotFoundError):
        return {}
    return {name: {Path(path).name for path in paths.values()} for name, paths in maps.items()}


def _remove_surplus(directory: Path, earlier: set[str], files: Sequence[str]) -> None:
    """Remove the rows of an earlier export that this one has not: plain rows that its index still names."""
    _refuse_link(directory)
    surplus = (stored_names(directory) & earlier) - set(view_names(keys_of(files)))
    gone = [directory / name for name in sorted(surplus) if ROW_FILE_NAME.match(name) and is_row(directory / name)]
    remove_files(directory, gone)


def _index_pieces(output: Path, named: dict[str, list[str]], num_samples: int) -> Iterator[bytes]:
    """The documented index without ``kd_cache``: nothing in it says what made the rows."""
    quoted: Callable[[str], str] = json.dumps
    yield b"{"
    for name, files in named.items():
        yield f"\n {quoted(name)}: {{".encode()
        for number, (file, key) in enumerate(zip(files, keys_of(files), strict=True)):
            path = f"{output}/{name}/{view_name(key.tobytes())}"
            yield f"{',' if number else ''}\n  {quoted(file)}: {quoted(path)}".encode()
        yield b"\n },"
    yield f'\n "num_samples": {num_samples}\n}}\n'.encode()
