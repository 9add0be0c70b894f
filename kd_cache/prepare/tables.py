"""Tables of names and labels as data sets bring them: a header, and tabs, commas or semicolons between the cells.

UTF-8, with or without a byte-order mark, lines ending in LF or CRLF. Nothing is guessed: a row that has more or fewer
cells than the header is refused.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

from kd_cache.dataset.manifest_file import MAX_BYTES, read_plain
from kd_cache.errors import ManifestError, listed, shown

FIELDS = ("file", "scene", "city", "device", "location", "split")
"""What a column may be about."""
_KNOWN_AS = {
    "file": ("filename", "file", "file_name", "path"),
    "scene": ("scene_label", "scene", "label"),
    "city": ("city_label", "city"),
    "device": ("source_label", "device_id", "device"),
    "location": ("identifier", "location"),
    "split": ("split",),
}
"""What columns of the field's data sets are called, where nobody says otherwise."""


class Table(NamedTuple):
    """A table's name for messages, which column each of `FIELDS` is in, and its rows with their line in the file."""

    name: str
    columns: dict[str, int]
    rows: list[tuple[int, list[str]]]


def parse_columns(text: str | None) -> dict[str, str]:
    """``file=filename,scene=scene_label`` as a mapping from `FIELDS` to columns. Raises `ManifestError`."""
    found = {}
    for part in (text or "").split(","):
        field, separator, column = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if not separator or not column or field not in FIELDS or field in found:
            raise ManifestError(
                f"--columns {shown(text)}: expected each of {', '.join(FIELDS)} once at most, as file=filename, found "
                f"{shown(part)}"
            )
        found[field] = column
    return found


def read_table(path: Path, columns: dict[str, str], max_bytes: int = MAX_BYTES) -> Table:
    """Read a whole table.

    Args:
        path: the file.
        columns: what its columns are called, by `FIELDS`; those not named are looked for under the field's names.
        max_bytes: a larger file is refused unread.

    Raises:
        ManifestError: it cannot be read, is not such a table, or has no column of file names.
    """
    header, rows = read_cells(path, max_bytes)
    return Table(path.name, _places(path, header, columns), rows)


def read_cells(path: Path, max_bytes: int = MAX_BYTES) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of any such table, and its rows with their line in the file. Raises as `read_table`."""
    try:
        text = read_plain(path, max_bytes).decode("utf-8-sig")
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
        cells = [(lines.line_num, [cell.strip() for cell in row]) for row in lines if row]
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ManifestError(f"cannot read the table {shown(path)}: {shown(reason)}") from error
    if not cells:
        raise ManifestError(f"the table {shown(path)} is empty; expected a header of its columns' names")
    (_, header), *rows = cells
    wrong = [f"line {line}: {len(row)} cells" for line, row in rows if len(row) != len(header)]
    if wrong:
        raise ManifestError(
            f"{shown(path)}: {len(wrong)} rows have not the {len(header)} cells of the header\n{listed(wrong)}"
        )
    return header, rows


def _delimiter(text: str) -> str:
    header = text.partition("\n")[0]
    return next((each for each in "\t;" if each in header), ",")


def _places(path: Path, header: list[str], columns: dict[str, str]) -> dict[str, int]:
    found = {}
    for field, names in _KNOWN_AS.items():
        there = [name for name in ((columns[field],) if field in columns else names) if name in header]
        if there:
            found[field] = header.index(there[0])
    twice = [header[place] for place in found.values() if header.count(header[place]) > 1]
    if twice or "file" not in found:
        what = f"two columns {twice[0]}" if twice else f"no column {columns.get('file', 'filename')}"
        raise ManifestError(
            f"{shown(path)} has {shown(what)}; its header is {shown(', '.join(header))}",
            hint="Say what the columns are called: --columns file=filename,scene=scene_label,device=source_label.",
        )
    return found
