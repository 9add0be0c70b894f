"""Where a data set has its tables, and which rows are in which split.

TAU Urban Acoustic Scenes 2019, 2020 (Mobile) and 2022 (Mobile): ``meta.csv`` of all files, and in ``evaluation_setup``
``fold1_train.csv``, ``fold1_evaluate.csv`` and ``fold1_test.csv``, whose rows have no labels. DCASE 2024 task 1 has
``split5.csv`` to ``split100.csv`` and ``test.csv`` instead, DCASE 2025 ``split25.csv``: beside ``meta.csv``, or in
``split_setup``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_cache.dataset.manifest import LISTS
from kd_cache.dataset.manifest_file import MAX_BYTES, without_collection
from kd_cache.dataset.task import DCASE, Task
from kd_cache.errors import ManifestError, UsageError, listed, shown
from kd_cache.options import home_path
from kd_cache.prepare.rows import Faults, Row, RowReader
from kd_cache.prepare.tables import parse_columns, read_table

_FOLDERS = ("evaluation_setup", "split_setup", ".")
_TEST = ("fold1_evaluate.csv", "test.csv", "fold1_test.csv")
UNUSED = "unused"
"""The word of a ``split`` column for rows that are in no list."""


@dataclass(frozen=True)
class Prepared:
    """Rows by split, and what a person should know of them."""

    rows: dict[str, list[Row]]
    notes: list[str]
    tables: dict[str, Path]
    task: Task


def tau_tables(folder: Path, subset: str | None = None) -> dict[str, Path]:
    """The tables of a TAU or DCASE folder, by split; the one of all files is called ``meta``.

    Args:
        folder: the data set's.
        subset: ``25`` trains on ``split25.csv``; needed where several such lists are there and no fold.

    Raises:
        UsageError: there is no list of train samples, or several.
    """
    if not folder.is_dir():
        raise UsageError(f"{shown(folder)} is not a folder; expected a data set with meta.csv or lists of its splits")
    splits = {path.stem[5:]: path for path in _found(folder, "split*.csv") if path.stem[5:].isdigit()}
    fold = _found(folder, "fold1_train.csv")[:1]
    train = (fold or [*splits.values()]) if subset is None else [splits[subset]] if subset in splits else []
    if len(train) != 1:
        names = ", ".join(sorted(splits, key=int)) or "none"
        what = "several lists of train samples" if train else "no list of train samples"
        wanted = "fold1_train.csv, or one split*.csv" if subset is None else f"split{subset}.csv"
        raise UsageError(
            f"{shown(folder)} has {what}: expected {wanted} in {', '.join(_FOLDERS)}; subsets there: {names}",
            hint=_nearby(folder) or "Choose one with --subset, or name your tables: --table train=PATH.",
        )
    tables = {"train": train[0]}
    test = [path for name in _TEST for path in _found(folder, name)]
    meta = _found(folder, "meta.csv")
    return tables | ({"test": test[0]} if test else {}) | ({"meta": meta[0]} if meta else {})


def _found(folder: Path, pattern: str) -> list[Path]:
    return [path for name in _FOLDERS for path in sorted((folder / name).glob(pattern)) if path.is_file()]


def _nearby(folder: Path) -> str | None:
    below = next((path.parent for path in sorted(folder.glob("*/meta.csv"))), None)
    return None if below is None else f"Is it {shown(below)}?"


def parse_tables(texts: Sequence[str]) -> dict[str, Path]:
    """``train=a.csv`` by split; ``all.csv`` has a column ``split``. Raises `UsageError`."""
    tables: dict[str, Path] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        name, path = (name, path) if separator else ("", text)
        if name not in ("", "meta", *LISTS) or name in tables or not path:
            raise UsageError(
                f"--table {shown(text)}: expected PATH, or each of {', '.join(LISTS)} and meta once, as train=PATH"
            )
        tables[name] = home_path(path)
    if not set(tables) - {"meta"}:
        raise UsageError("no table of samples is named", hint="Name one: --table train=PATH, or --table PATH.")
    return tables


def prepare_rows(
    tables: Mapping[str, Path], columns: str | None = None, task: Task = DCASE, max_bytes: int = MAX_BYTES
) -> Prepared:
    """Read tables, join them by file name, and say what they leave open.

    Args:
        tables: as `tau_tables` and `parse_tables` give them.
        columns: what columns are called, as `parse_columns` reads it.
        task: names scenes, cities and devices.
        max_bytes: a larger table is refused unread.

    Raises:
        ManifestError: a table cannot be read, or rows are wrong or contradict each other; all of them are named.
    """
    called = parse_columns(columns)
    read = {name: read_table(path, called, max_bytes) for name, path in tables.items()}
    absent = [f"{name}={called[name]}" for name in called if all(name not in table.columns for table in read.values())]
    if absent:
        raise ManifestError(f"no table has the columns that --columns names\n{listed(absent)}")
    faults = Faults()
    reader = RowReader(task, faults)
    with without_collection():
        found = {name: reader.read(table) for name, table in read.items()}
        meta = found.pop("meta", {})
        splits = _splits(found, faults)
        rows = {name: [reader.joined(row, meta.get(at)) for at, row in each.items()] for name, each in splits.items()}
    _refuse_unlabelled_source(rows.get("train", []), task, faults)
    faults.refuse()
    unlisted = len(meta) - sum(at in meta for each in splits.values() for at in each)
    unknown = sum(at not in meta for each in splits.values() for at in each) if meta else 0
    notes = _notes(rows, task) + [
        f"{count:,} {what}"
        for count, what in (
            (unlisted, "files of meta.csv are in no list: left out"),
            (unknown, "listed files are not in meta.csv: only their name says more of them"),
        )
        if count
    ]
    kept = {name: [row for row in each if row.device] for name, each in rows.items()}
    return Prepared(kept, notes, dict(tables), task)


def _splits(found: Mapping[str, Mapping[str, Row]], faults: Faults) -> dict[str, dict[str, Row]]:
    """By split, files in order. A table without a name of a split has a column that says it."""
    splits: dict[str, dict[str, Row]] = {name: {} for name in LISTS}
    for name, rows in found.items():
        for at, row in rows.items():
            split = name or row.split
            if split in splits:
                splits[split][at] = row
            elif split != UNUSED:
                faults.add(
                    f"have no split: expected {', '.join((*LISTS, UNUSED))}", f"{row.file}: {split or 'nothing'}"
                )
    return splits


def _refuse_unlabelled_source(train: Sequence[Row], task: Task, faults: Faults) -> None:
    for row in train:
        if row.scene is None and row.device == task.source:
            faults.add(f"of train and device {task.source} have no scene label", row.file)


def _notes(rows: Mapping[str, Sequence[Row]], task: Task) -> list[str]:
    """What cannot be known, counted."""
    notes = []
    for split, each in rows.items():
        lacks = Counter(name for row in each for name, value in zip(Row._fields, row, strict=True) if value is None)
        for name, what in (
            ("device", "name no device, and neither does their file's name: a manifest cannot hold them, left out"),
            ("scene", "have no scene label, and stay without"),
            ("city", "name no city"),
            ("location", "name no recording location: whether train and test share one cannot be checked"),
        ):
            if lacks[name]:
                notes.append(f"{lacks[name]:,} of {len(each):,} {split} rows {what}")
    if not rows["test"]:
        notes.append("no list of test samples: nothing can be compared with train")
    return notes
