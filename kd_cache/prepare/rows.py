"""From tables to manifest rows: labels by name, everything else joined by file name, never by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kd_cache.dataset.manifest import place_name, spelling
from kd_cache.dataset.task import Task
from kd_cache.errors import ManifestError, listed
from kd_cache.prepare.tables import Table


class Row(NamedTuple):
    """What tables and its name say of a file; ``None`` where they do not. Labels are class indices."""

    file: str
    scene: int | None = None
    city: int | None = None
    device: str | None = None
    location: str | None = None
    split: str | None = None


@dataclass
class Faults:
    """What is wrong with rows, by kind: all of it is told at once."""

    kinds: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        self.kinds.setdefault(kind, []).append(where)

    def refuse(self) -> None:
        """Raise `ManifestError` where there is anything."""
        if self.kinds:
            told = [f"{len(wrong)} rows {kind}\n{listed(wrong)}" for kind, wrong in self.kinds.items()]
            raise ManifestError("\n".join(told), hint="Nothing was written. Mend the tables, or see --columns.")


class RowReader:
    """Turns a table's rows into `Row`s."""

    def __init__(self, task: Task, faults: Faults) -> None:
        self.task = task
        self.faults = faults
        self._numbers = {names: _numbered(names) for names in (task.scenes, task.cities)}
        self._cities = self._numbers[task.cities]

    def read(self, table: Table) -> dict[str, Row]:
        """The rows by the path that their file's name means, in the table's order."""
        found: dict[str, Row] = {}
        for line, cells in table.rows:
            row = self._row(f"{table.name}, line {line}", {name: cells[at] for name, at in table.columns.items()})
            if row is not None and found.setdefault(spelling(row.file), row) is not row:
                self.faults.add("name a file for the second time", f"{table.name}, line {line}: {row.file}")
        return found

    def _row(self, where: str, cells: Mapping[str, str]) -> Row | None:
        file = cells["file"]
        if not file or "\0" in file:
            self.faults.add("name no file", where)
            return None
        location = cells.get("location") or None
        city = self._label("city", self.task.cities, cells.get("city"), where)
        if city is None and location is not None:
            city = self._cities.get(place_name(location).rpartition("-")[0])
        device = cells.get("device") or None
        if device is not None and self.task.device(device) is None:
            self.faults.add(f"name a device other than {', '.join(self.task.devices)}", f"{where}: {device}")
        split = cells.get("split") or None
        return Row(
            file,
            self._label("scene", self.task.scenes, cells.get("scene"), where),
            city,
            None if device is None else self.task.device(device),
            location,
            split,
        )

    def _label(self, what: str, names: tuple[str, ...], text: str | None, where: str) -> int | None:
        if not text:
            return None
        label = self._numbers[names].get(text)
        if label is None:
            self.faults.add(f"name a {what} other than {', '.join(names)}, or its index", f"{where}: {text}")
        return label

    def joined(self, row: Row, meta: Row | None) -> Row:
        """A list's row, with what the table of all files and the file's name add to it."""
        if meta is not None:
            row = self._filled(row, meta, "say otherwise than the table of all files")
        found = self.task.recording_in(row.file)
        if found is None:
            return row
        city, number, device = found
        name = Row(row.file, None, self._cities[city.lower()], self.task.device(device.lower()))
        row = self._filled(row, name, "say otherwise than their file's name")
        return row if row.location else row._replace(location=f"{city.lower()}-{number}")

    def _filled(self, row: Row, other: Row, wrong: str) -> Row:
        for name, mine, theirs in zip(Row._fields[1:4], row[1:4], other[1:4], strict=True):
            if mine is not None and theirs is not None and mine != theirs:
                self.faults.add(wrong, f"{row.file}: {name}")
        return row._replace(**{name: getattr(other, name) for name in Row._fields if getattr(row, name) is None})


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """Class indices by name, and by the index written as a text."""
    numbers = {name: number for number, name in enumerate(names)}
    return numbers | {str(number): number for number in numbers.values()}
