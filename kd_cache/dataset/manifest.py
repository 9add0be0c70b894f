"""The dataset JSON: which samples there are, whose they are, and which split each belongs to.

Two shapes are read (DCASE pipelines write both): ``{"train": [...], "val": [...], "test": [...]}``, where a sample
without ``split`` takes its list's name, and a flat list in which every sample carries ``split``; a ``.jsonl`` is such a
list, a row on every line. A sample without any split is refused: guessing one is how leakage starts. Nothing is
coerced: ``"3"`` and ``true`` are not labels. ``null``, -1 and -100 say that there is none. Beside the lists, or alone
on the first line, ``front_end`` may say what made the features.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from kd_cache.dataset.front_end import as_text, checked
from kd_cache.dataset.manifest_file import MAX_BYTES as MAX_BYTES
from kd_cache.dataset.manifest_file import (
    has_lines,
    json_lines,
    manifest_errors,
    parse_json,
    read_plain,
    without_collection,
)
from kd_cache.dataset.task import DCASE, MOST_CLASSES, Task
from kd_cache.errors import ManifestError, listed, shown
from kd_cache.keys import NO_LABEL

LISTS = ("train", "val", "test")
FRONT_END = "front_end"
IGNORED = -100
"""The label of a sample that has none, as torch's losses have it."""


class Sample(NamedTuple):
    """One manifest row. ``file`` is its identity; labels are class indices or ``None`` where the manifest has none.

    ``location`` is where it was recorded; ``places`` are all names that the row's fields give to that.
    """

    file: str
    scene_label: int | None
    city_label: int | None
    domain: int
    device_id: str
    split: str
    listed_in: str | None
    location: str | None
    places: tuple[str, ...] = ()


class LaterSamples(Sequence[Sample]):
    """So many samples, which are looked up when one of them is asked for."""

    def __init__(self, count: int, look_up: Callable[[], Sequence[Sample]]) -> None:
        self._count, self._look_up = count, look_up

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _samples(self) -> Sequence[Sample]:
        return self._look_up()

    @overload
    def __getitem__(self, number: int, /) -> Sample: ...
    @overload
    def __getitem__(self, number: slice, /) -> Sequence[Sample]: ...
    def __getitem__(self, number: int | slice, /) -> Sample | Sequence[Sample]:
        return self._samples[number]


@dataclass(frozen=True)
class Manifest:
    """All samples in the order of the file.

    ``digest`` is the SHA-256 of the file's bytes, ``path`` where it was read from (``None`` when built in memory),
    ``front_end`` what it says of how the features were made (`kd_cache.dataset.front_end`).
    """

    samples: Sequence[Sample]
    digest: str
    path: Path | None = None
    task: Task = DCASE
    front_end: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def front_end_text(self) -> str | None:
        """The front end as a fingerprint names it."""
        return None if self.front_end is None else as_text(self.front_end)

    @property
    def bins(self) -> int | None:
        """F of every feature ``[T, F]``, where the manifest says it."""
        return None if self.front_end is None else self.front_end.get("n_mels")


def spelling(file: str) -> str:
    """The path that ``file`` means: ``./x``, ``a//x`` and ``a/../x`` are other spellings of ``x``."""
    if "//" not in file and "/." not in file and not file.startswith(".") and not file.endswith("/"):
        return file  # nearly every one, in a tenth of the time
    path = posixpath.normpath(file)
    return path[1:] if path.startswith("//") else path  # POSIX lets "//x" mean something else; no system here does


def load_manifest(
    path: str | Path,
    *,
    task: Task = DCASE,
    num_scenes: int | None = None,
    num_cities: int | None = None,
    max_bytes: int = MAX_BYTES,
    faults: list[str] | None = None,
) -> Manifest:
    """Read and check a dataset JSON.

    Args:
        path: the file.
        task: which classes, domains and groups there are.
        num_scenes, num_cities: labels must lie in ``[0, num_scenes)`` and ``[0, num_cities)``; as the task says.
        max_bytes: a larger file is refused unread.
        faults: where given, takes what is wrong with rows, which are left out then; by default the first is raised.

    Raises:
        ManifestError: unreadable, too large, not UTF-8 JSON, duplicate keys, a wrong type, a label out of range, no
            split, a device that contradicts its domain, or two rows for one file.
    """
    path = Path(path).expanduser()
    read = _RowReader(shown(path), task, num_scenes, num_cities)
    if has_lines(path):
        digest = hashlib.sha256()
        samples, front_end = _of_lines(json_lines(path, digest), read, faults)
        return Manifest(samples, digest.hexdigest(), path, task, front_end)
    with manifest_errors(path):
        raw = read_plain(path, max_bytes)
    samples, front_end = _parsed(raw, read, faults)
    return Manifest(samples, hashlib.sha256(raw).hexdigest(), path, task, front_end)


def parse_manifest(
    raw: bytes,
    name: str,
    *,
    task: Task = DCASE,
    num_scenes: int | None = None,
    num_cities: int | None = None,
) -> tuple[Sample, ...]:
    """The samples in a manifest's bytes; ``name`` is used in messages. Raises as `load_manifest`."""
    return _parsed(raw, _RowReader(name, task, num_scenes, num_cities), None)[0]


def _parsed(raw: bytes, read: _RowReader, faults: list[str] | None) -> tuple[tuple[Sample, ...], dict[str, Any] | None]:
    """The samples, and the manifest's front end."""
    with without_collection():
        content = parse_json(raw, read.name)
        front_end = _front_end(content, read.name)
        rows = list(_rows(content, read.name))
        del content
        rows.reverse()
        # Each row goes when its sample is made: a million of both would take twice the memory.
        return _samples(iter(lambda: rows.pop() if rows else None, None), read, faults), front_end


def _of_lines(
    lines: Iterator[tuple[int, Any]], read: _RowReader, faults: list[str] | None
) -> tuple[tuple[Sample, ...], dict[str, Any] | None]:
    """As `_parsed`, of a row on every line; the first line may hold what else a manifest says, its front end."""
    read.place = "line {1}"
    with without_collection():
        first = next(lines, None)
        is_head = first is not None and isinstance(first[1], dict) and first[1].keys() == {FRONT_END}
        front_end = _front_end(first[1], read.name) if first is not None and is_head else None
        rows = lines if first is None or is_head else chain([first], lines)
        return _samples(((row, None, number) for number, row in rows), read, faults), front_end


def _samples(
    rows: Iterator[tuple[Any, str | None, int]], read: _RowReader, faults: list[str] | None
) -> tuple[Sample, ...]:
    samples = []
    for row in rows:
        try:
            samples.append(read(*row))
        except ManifestError as error:
            if faults is None:
                raise
            faults.append(error.message.removeprefix(f"{read.name}, "))
    if not samples and not faults:
        raise ManifestError(f"{read.name} is empty: it lists no samples")
    twice = _duplicates(samples)
    if twice and faults is None:
        raise ManifestError(f"{read.name}: the same file is listed more than once\n{listed(twice)}")
    if faults is not None:
        faults += [f"{file} is listed more than once" for file in twice]
    return tuple(samples)


def _front_end(content: Any, name: str) -> dict[str, Any] | None:
    """What is beside the lists; it is taken out of ``content``."""
    if not isinstance(content, dict) or FRONT_END not in content:
        return None
    try:
        return checked(content.pop(FRONT_END))
    except ValueError as error:
        raise ManifestError(f"{name}: {error}") from None


def _rows(content: Any, name: str) -> Iterator[tuple[Any, str | None, int]]:
    """Each row with the list it stands in (``None`` in a flat manifest) and its position there."""
    if isinstance(content, list):
        yield from ((row, None, number) for number, row in enumerate(content))
        return
    if not isinstance(content, Mapping):
        raise ManifestError(f"{name}: expected a list of samples or an object of lists, found {_kind(content)}")
    unknown = sorted(set(content) - set(LISTS))
    if unknown:
        raise ManifestError(f"{name}: expected the lists {', '.join(LISTS)}, found also\n{listed(unknown)}")
    for in_list, rows in content.items():
        if not isinstance(rows, list):
            raise ManifestError(f"{name}: {in_list} must be a list of samples, found {_kind(rows)}")
        yield from ((row, in_list, number) for number, row in enumerate(rows))


class _RowReader:
    """Turns one JSON object into a `Sample`, or says which row is wrong and how."""

    def __init__(self, name: str, task: Task, num_scenes: int | None, num_cities: int | None) -> None:
        self.name, self.place = name, "{}[{}]"
        self._same: dict[Any, Any] = {}
        self.task = task
        self.num_scenes = task.num_classes if num_scenes is None else num_scenes
        self.num_cities = (len(task.cities) or MOST_CLASSES) if num_cities is None else num_cities

    def __call__(self, row: Any, in_list: str | None, number: int) -> Sample:
        try:
            return self._read(row, in_list)
        except ValueError as error:
            where = self.place.format(in_list or "sample", number)
            file = row.get("file") if isinstance(row, dict) else None
            of = f" ({shown(file)})" if isinstance(file, str) else ""
            raise ManifestError(f"{self.name}, {where}{of}: {error}") from None

    def _read(self, row: Any, in_list: str | None) -> Sample:
        if not isinstance(row, dict):
            raise ValueError(f"expected an object, found {_kind(row)}")
        if row.get("file") is None:
            raise ValueError(f"file is missing{_meant(row, 'file')}")
        domain, device = _domain_and_device(self.task, row)
        scene = _scene_label(row, self.num_scenes)
        split = _split(row, in_list)
        needed = self.task.has_domains and device == self.task.source and not self.task.held_out.search(split)
        if scene is None and needed:
            found = next((f"is {row[name]}, which is no label" for name in _SCENE if row.get(name) is not None), "")
            why = found or f"is missing{_meant(row, 'scene_label')}"
            raise ValueError(f"scene_label {why}; samples of the source device {device} need one")
        location, places = _location(row, self.task)
        return Sample(
            _file(row["file"]),
            scene,
            _label("city_label", row.get("city_label"), self.num_cities),
            domain,
            device,
            self._shared(split),
            in_list,
            location,
            self._shared(places),
        )

    def _shared(self, value: Any) -> Any:
        """The same object for all rows that say the same."""
        if len(self._same) > _MOST_SHARED:
            self._same.clear()
        return self._same.setdefault(value, value)


_MOST_SHARED = 65_536
_SCENE = ("scene_label", "label")
_ALSO_CALLED = {
    "file": ("filename", "file_name", "path", "filepath", "file_path", "audio", "wav", "feature"),
    "device_id": ("device", "source_label", "domain_id"),
    "split": ("subset", "fold", "set"),
    "scene_label": ("scene", "scene_id", "class", "target"),
}
"""What other data sets call the fields: none of it is read, for it may mean something else."""


def _meant(row: dict[str, Any], field: str) -> str:
    """What a row without a field may have called it."""
    name = next((name for name in _ALSO_CALLED[field] if row.get(name) is not None), None)
    return "" if name is None else f' (there is "{name}": if that is meant, call it "{field}")'


def _file(file: Any) -> str:
    if not isinstance(file, str):
        raise ValueError(f"file must be a string, found {_kind(file)}")
    if not file or "\0" in file:
        raise ValueError("file is empty" if not file else "file contains a NUL character")
    if file.isascii():
        return file
    try:
        file.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"file {shown(file)} is not valid Unicode (a lone surrogate)") from None
    return file


def _scene_label(row: dict[str, Any], num_scenes: int) -> int | None:
    scene = _label("scene_label", row.get("scene_label"), num_scenes)
    older = _label("label", row.get("label"), num_scenes)
    if scene is None or older is None:
        return older if scene is None else scene
    if older != scene:
        raise ValueError(f"scene_label is {scene} but label is {older}")
    return scene


def _label(field: str, value: Any, classes: int) -> int | None:
    if value is None or (type(value) is int and value in (NO_LABEL, IGNORED)):
        return None
    if type(value) is not int:
        raise ValueError(f"{field} must be an integer, found {_kind(value)}")
    if not 0 <= value < classes:
        raise ValueError(f"{field} is {_number(value)}, expected 0 to {classes - 1}, or null where there is none")
    return value


def _domain_and_device(task: Task, row: dict[str, Any]) -> tuple[int, str]:
    if not task.has_domains:
        return 0, task.source
    domain, device = row.get("domain"), row.get("device_id")
    most = len(task.devices) - 1
    if domain is not None and (type(domain) is not int or not 0 <= domain <= most):
        raise ValueError(f"domain must be an integer from 0 to {most}, found {_kind(domain)}")
    if device is None:
        if domain is None:
            raise ValueError(f"it has neither device_id nor domain{_meant(row, 'device_id')}")
        return int(domain), task.devices[domain]
    name = task.device(device) if isinstance(device, str) else None
    if name is None:
        found = f'"{shown(device)}"' if isinstance(device, str) else _kind(device)
        raise ValueError(f"device_id is {found}, expected one of {', '.join(task.devices)}")
    if domain is not None and domain != task.domain_of[name]:
        raise ValueError(f"device_id {name} has domain {task.domain_of[name]}, but domain is {domain}")
    return task.domain_of[name], name


def _split(row: dict[str, Any], in_list: str | None) -> str:
    split = row.get("split", in_list)
    if split is None and "split" not in row:
        raise ValueError(
            f'it has no "split"{_meant(row, "split")}, and the manifest has no train/val/test lists; a split is never '
            "guessed"
        )
    if not isinstance(split, str) or not split:
        raise ValueError(f"split must be a word such as train or test, found {_kind(split)}")
    return split


def _location(row: dict[str, Any], task: Task) -> tuple[str | None, tuple[str, ...]]:
    """The recording location where the row names one, and every place that the row names.

    TAU calls the location ``identifier``. That word may also mean something else, such as a recording: with a number
    in it, it is a location where it begins with a city of the task. Otherwise it is a place all the same: two rows that
    have it in common were recorded together. Other tasks have one field for their group.
    """
    if task.group is None:
        return None, ()
    if task.group != "location":
        group = row.get(task.group)
        if group is None:
            return None, ()
        if type(group) is not int and not (isinstance(group, str) and group.strip()):
            raise ValueError(f"{task.group} must be a name or a number, found {_kind(group)}")
        return (place := place_name(str(group))), (place,)
    if row.get("identifier") is None and row.get("location") is None:
        return None, ()
    named = {field: _place(field, row, task) for field in ("identifier", "location") if row.get(field) is not None}
    identifier, location = named.get("identifier"), named.get("location")
    bare = str(row.get("identifier")).strip()
    if location is not None and (bare.isdecimal() or not any(map(str.isdigit, bare))):
        identifier = None  # a word or a counter, where the place is named beside it
    is_known = identifier is not None and (
        identifier.rpartition("-")[0] in task.cities or not any(map(str.isdigit, identifier))
    )
    places = tuple(dict.fromkeys(place for place in (identifier, location) if place is not None))
    return (identifier if is_known else location), places


def _place(field: str, row: dict[str, Any], task: Task) -> str | None:
    """The place that a field names; ``None`` for an identifier that is a bare number and could be anything's."""
    value = row[field]
    if type(value) is int or (isinstance(value, str) and value.strip().isdecimal()):
        # A bare number identifies a place only together with its city.
        city = row.get("city_label")
        if city is None and field == "identifier":
            return None
        return place_name(f"{'' if city is None else task.city(city)}-{value}")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} must be a name or a number, found {_kind(value)}")
    return place_name(value)


_NAME_AND_NUMBER = re.compile(r"(.*?)[\W_]*([0-9]+)\Z", re.DOTALL)


@lru_cache(maxsize=16_384)  # many samples are of one place
def place_name(text: str) -> str:
    """One spelling for a location's name: ``Vienna-07``, ``vienna_7``, ``vienna.7``, ``Vienna7`` are ``vienna-7``."""
    name = unicodedata.normalize("NFKC", text).strip().casefold()
    name = "".join(str(unicodedata.digit(letter, letter)) for letter in name)
    found = _NAME_AND_NUMBER.match(name)
    return f"{found[1]}-{found[2].lstrip('0') or '0'}" if found else name


def _duplicates(samples: Sequence[Sample]) -> list[str]:
    """Second rows for one file within one split. (One file in two splits is leakage: the guard reports that.)"""
    seen: dict[tuple[str, str, str | None], str] = {}
    twice = []
    places = ((spelling(sample.file), sample.split, sample.listed_in) for sample in samples)
    for sample in (samples[number] for number in maybe_equal(places, len(samples))):
        place = (spelling(sample.file), sample.split, sample.listed_in)
        if place in seen:
            first = seen[place]
            twice.append(sample.file if first == sample.file else f"{sample.file} (also written {first})")
        else:
            seen[place] = sample.file
    return twice


def maybe_equal(values: Iterable[Hashable], count: int) -> list[int]:
    """The positions, ascending, of values that have a hash in common: 8 bytes for each value, and not a dictionary."""
    hashes = np.fromiter(map(hash, values), np.int64, count)
    order = np.argsort(hashes)
    same = hashes[order[1:]] == hashes[order[:-1]]
    found: list[int] = np.union1d(order[1:][same], order[:-1][same]).tolist()
    return found


def _kind(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {_number(value)}"
    names = {dict: "an object", list: "a list", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a string" if value else "an empty string")


def _number(value: float | str) -> str:
    """JSON has no largest integer; a message has."""
    digits = str(value)
    return digits if len(digits) <= 40 else f"{digits[:20]}… ({len(digits)} digits)"
