"""A user's own map-style data set: what it must have, and how its inputs are read, digested and known to be unchanged.

Nothing is copied to another format: an input is asked for when it is scored. Whether it is still the one that was
scored is seen by its digest; so each run reads every input, unless the data set's ``spec`` says what version they are.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import xxhash

from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.features import (
    MAX_BYTES,
    NAMES_ALONE,
    UNKNOWN,
    Feature,
    FeatureSource,
    check_array,
    input_digest,
    shape_of,
)
from kd_cache.dataset.guard import selected
from kd_cache.dataset.manifest import Manifest, Sample, place_name
from kd_cache.dataset.task import Task
from kd_cache.errors import DataLeakageError, FeatureError, KDCacheError, UsageError, listed, shown
from kd_cache.files.npy import NUMBERS
from kd_cache.watch import Stopped

_DRAWN = 16
"""So many inputs are read twice before anything is scored."""
_ALIKE = 64
"""Where so many inputs have one shape, all are believed to, until one has not."""
_DEVICE = (1 << 63) - 1
"""No file system has this number: it stands for a spec."""


class Inputs(Protocol):
    """A map-style data set. Beside what is listed here it may have

    - ``spec``: a text, the version of all that makes the inputs (their files, how they are read, what is done to them).
      While it stays, a rerun reads only some of them, drawn at random;
    - ``labels``: a class index for each row, -1 for none, for the teachers' accuracy;
    - ``groups``: what each row is of (a speaker, a series), where the task has groups;
    - ``held_out``: ``{key: group}`` of all samples that test uses, so that the guard can look for them.
    """

    keys: Sequence[str]
    """The identity of each row, unique: a file's name, never its position."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any:
        """The input (a tensor, an array, what numpy makes one of, or a dictionary of these by name, which teachers are
        then given a dictionary of), or a tuple ``(input, label)``.
        """


class InputSource(FeatureSource):
    """Reads the inputs of a data set by key, one at a time whoever asks: its code need not be made for threads."""

    witness, excuse = "the data set's spec and keys", ""

    def __init__(
        self,
        dataset: Any,
        keys: Sequence[str],
        *,
        spec: str | None = None,
        max_bytes: int = MAX_BYTES,
        anything: bool = True,
    ) -> None:
        self._dataset, self._number = dataset, {key: number for number, key in enumerate(keys)}
        self.spec, self.max_bytes, self.bins, self.anything = spec, max_bytes, None, anything
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._distinct: set[tuple[int, ...]] = set()
        self._turn = threading.RLock()

    @property
    def place(self) -> str:
        return self.told

    def read(self, file: str) -> Feature:
        """The input, checked and digested. Raises `FeatureError`."""
        with self._turn:
            item = self._item(file)
            try:
                array = as_array(item, self._dtypes)
                if array.nbytes > self.max_bytes:
                    raise ValueError(
                        f"it has {array.nbytes} bytes, expected at most {self.max_bytes}; --max-feature-bytes permits "
                        "more"
                    )
                check_array(array, anything=self.anything)
            except (ValueError, TypeError, RuntimeError) as error:
                raise FeatureError(f"input {shown(file)}: {shown(error)}") from None
            self._shapes[file] = shape_of(array)
            self._distinct.add(shape_of(array))
        return Feature(array, input_digest(array))

    def _item(self, file: str) -> Any:
        if file not in self._number:
            raise FeatureError(f"input {shown(file)}: the data set has no such key")
        try:
            return self._dataset[self._number[file]]
        except (KeyboardInterrupt, Stopped, KDCacheError):
            raise
        except BaseException as error:
            kind = type(error).__name__
            raise FeatureError(f"input {shown(file)}: the data set cannot give it: {kind}: {shown(error)}") from error

    def stat_many(self, files: Sequence[str]) -> np.ndarray:
        """``[N, 5]`` int64: one row for all that the data set's spec stands for; -1 where it says nothing."""
        digest = xxhash.xxh3_64_intdigest((self.spec or "").encode()) >> 1
        known = UNKNOWN if self.spec is None else (_DEVICE, digest, 0, 0, 0)
        return np.array([known if file in self._number else UNKNOWN for file in files], np.int64).reshape(-1, 5)

    def missing(self, files: Sequence[str]) -> dict[str, str]:
        return {
            file: f"input {shown(file)}: the data set has no such key" for file in files if file not in self._number
        }

    def shape(self, file: str) -> tuple[int, ...]:
        """As that of the others, where all that were read have one; else it is read."""
        known = self._shapes.get(file)
        if known is None and len(self._distinct) == 1 and len(self._shapes) >= min(_ALIKE, len(self._number)):
            return next(iter(self._distinct))
        return shape_of(self.read(file).array) if known is None else known

    def refusal(self, file: str, error: FeatureError, files: Sequence[str]) -> FeatureError:
        return error

    def refuse_random(self, keys: Sequence[str]) -> None:
        """Raise `FeatureError` where two readings of an input differ: no row would be of what a student is given."""
        drawn = np.random.default_rng().choice(len(keys), min(_DRAWN, len(keys)), replace=False)
        for key in (keys[number] for number in drawn.tolist()):
            first = self.try_read(key)
            if isinstance(first, Feature) and first.digest != self.read(key).digest:  # bad ones are told of later
                raise FeatureError(
                    f"input {shown(key)} is another each time it is read: teachers score what does not change",
                    hint="Take random augmentation out of what the teachers are given; students may have it.",
                )


class NoInputs(FeatureSource):
    """Of rows that came with names alone: nobody knows what was scored, and their input digests are zeros."""

    told = NAMES_ALONE

    def __init__(self) -> None:
        self.max_bytes, self.bins, self.anything = MAX_BYTES, None, True

    @property
    def place(self) -> str:
        return self.told

    def read(self, file: str) -> Feature:
        """Nothing, and a digest of zeros."""
        return Feature(np.zeros(0, np.float32), bytes(16))

    def missing(self, files: Sequence[str]) -> dict[str, str]:
        return {}


def named_data(task: Task, keys: Sequence[str]) -> Dataset:
    """Rows of which only the names are known, of a task that has no guard to check. Raises `UsageError`."""
    if task.is_guarded:
        raise UsageError(
            f"the task {task.name} has domains or groups: names alone do not say what may be used",
            hint="Pass --json-path or --dataset.",
        )
    samples = tuple(Sample(key, None, None, 0, task.source, "train", None, None) for key in keys)
    manifest = Manifest(samples, hashlib.sha256("\0".join(keys).encode("utf-8")).hexdigest(), None, task)
    return Dataset(manifest, selected(manifest, None), NoInputs())


def as_array(item: Any, dtypes: Sequence[str] = NUMBERS) -> np.ndarray:
    """What a data set gave as an array of numbers; a dictionary of tensors as one record, ``[1]``, names in order.

    Raises ``ValueError`` and what numpy raises.
    """
    if isinstance(item, tuple) and len(item) == 2:
        item = item[0]
    if isinstance(item, Mapping):
        return _record(item, dtypes)
    if callable(getattr(item, "detach", None)):
        item = item.detach().cpu().numpy()
    array = np.asarray(item)
    if array.dtype.newbyteorder("<").str not in dtypes:
        raise ValueError(f"it is a {type(item).__name__} of {array.dtype}, expected numbers ({', '.join(dtypes)})")
    found = np.array(array, array.dtype.newbyteorder("<"), order="C")  # a copy: a data set may use its buffer again
    found.flags.writeable = False
    return found


def _record(item: Mapping[Any, Any], dtypes: Sequence[str]) -> np.ndarray:
    if not item or not all(isinstance(name, str) and name for name in item):
        raise ValueError(f"it is a dictionary of {shown(repr(list(item)))}, expected tensors by their names")
    fields = {}
    for name in sorted(item):
        if isinstance(item[name], Mapping):
            raise ValueError(f"{shown(name)} is a dictionary in a dictionary, expected a tensor")
        try:
            fields[name] = as_array(item[name], dtypes)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{shown(name)}: {error}") from None
    found = np.zeros(1, np.dtype([(name, field.dtype, field.shape) for name, field in fields.items()]))
    for name, field in fields.items():
        found[name][0] = field
    found.flags.writeable = False
    return found


def own_data(
    dataset: Any,
    task: Task,
    keys: Sequence[str] | None = None,
    *,
    target: str | None = None,
    unguarded: bool = False,
    max_feature_bytes: int = MAX_BYTES,
    note: Callable[[str], None] = lambda text: None,
) -> Dataset:
    """A user's data set as what every job is given.

    Args:
        dataset: as `Inputs`; ``keys`` stand for its own. Where the task has domains it must have ``domains``, one for
            each row.
        unguarded: go on where the task has groups and the data set does not say which are held out.
        note: hears what a person should know.

    Raises:
        UsageError: keys that are none, or are not one for each row.
        DataLeakageError: a held-out sample or group among the rows; a group that nobody can look for.
        FeatureError: an input that cannot be read, or is random.
    """
    names = checked_keys(dataset, getattr(dataset, "keys", None) if keys is None else keys)
    samples, found_guard = _samples(dataset, task, names)
    if task.group is not None and not found_guard and not unguarded:
        raise DataLeakageError(
            f"the task {task.name} has groups ({task.group}), and the data set does not say which are held out",
            hint="Give it held_out, {key: group} of what test uses, and groups; or pass --unguarded (unguarded=True).",
        )
    content = repr([tuple(sample) for sample in samples]).encode("utf-8", "surrogatepass")
    manifest = Manifest(tuple(samples), hashlib.sha256(content).hexdigest(), None, task)
    spec = getattr(dataset, "spec", None)
    if spec is None:
        note("the data set has no spec, the version of what makes its inputs: every run reads each of them")
    elif not isinstance(spec, str) or not spec:
        raise UsageError(f"the data set's spec must be a text, found {type(spec).__name__}")
    source = InputSource(dataset, names, spec=spec, max_bytes=max_feature_bytes, anything=task.anything)
    source.refuse_random(names)
    unknown = task.group is not None and not found_guard
    return Dataset(manifest, selected(manifest, target), source, unguarded=unknown)


def checked_keys(dataset: Any, keys: Any) -> list[str]:
    """The keys as texts, one for each row. Raises `UsageError`."""
    if keys is None or callable(keys):
        raise UsageError(
            f"{type(dataset).__name__} has no keys: what its rows are called must be known",
            hint="Pass keys=[…], a name for each row that stays the same, such as its file's; never its position.",
        )
    names = list(keys)
    if len(names) != len(dataset):
        raise UsageError(f"expected one key per row: the data set has {len(dataset)} rows, found {len(names)} keys")
    wrong = next((key for key in names if not isinstance(key, str) or not key or "\0" in key), None)
    if wrong is not None:
        raise UsageError(
            f"a key must be a text, found {shown(repr(wrong))} ({type(wrong).__name__})",
            hint="A row's position is no identity: it would be another's after the next shuffle. Name files, or ids.",
        )
    if wrong := [key for key in names if key != key.encode("utf-8", "replace").decode("utf-8")]:
        raise UsageError(f"the key {shown(wrong[0])} is not valid Unicode (a lone surrogate)")
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = [key for key in names if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        raise UsageError(f"{len(twice)} keys occur twice\n{listed(twice)}")
    return names


def _samples(dataset: Any, task: Task, keys: Sequence[str]) -> tuple[list[Sample], bool]:
    """Rows of train, then held-out ones; and whether the guard can look at groups."""
    labels = _column(dataset, "labels", len(keys), lambda value: _label(value, task.num_classes))
    groups = _column(dataset, "groups", len(keys), lambda value: place_name(str(value)))
    domains = _column(dataset, "domains", len(keys), lambda value: _domain(value, task))
    if task.has_domains and domains is None:
        raise UsageError(f"the task {task.name} has domains, and the data set has none", hint="Give it domains.")
    where = domains or [task.source] * len(keys)
    made = [
        Sample(key, label, None, task.domain_of[device], device, "train", None, group, (group,) if group else ())
        for key, label, device, group in zip(
            keys, labels or [None] * len(keys), where, groups or [None] * len(keys), strict=True
        )
    ]
    held_out = getattr(dataset, "held_out", None)
    if held_out is None:
        return made, False
    if not isinstance(held_out, Mapping):
        raise UsageError(f"held_out must be {{key: group}}, found {type(held_out).__name__}")
    for key, group in held_out.items():
        place = None if group is None else place_name(str(group))
        made.append(Sample(str(key), None, None, 0, task.source, "test", None, place, (place,) if place else ()))
    named = task.group is None or groups is not None or task.place_in_name is not None
    return made, named


def _column(dataset: Any, name: str, count: int, read: Callable[[Any], Any]) -> list[Any] | None:
    found = getattr(dataset, name, None)
    if found is None:
        return None
    if len(found) != count:
        raise UsageError(f"the data set's {name} are {len(found)}, expected one for each of its {count} rows")
    try:
        return [read(value) for value in (found.tolist() if hasattr(found, "tolist") else found)]
    except (ValueError, TypeError) as error:
        raise UsageError(f"the data set's {name}: {shown(error)}") from None


def _label(value: Any, classes: int) -> int | None:
    if value is None or int(value) < 0:
        return None
    if int(value) != value or value >= classes:
        raise ValueError(f"found {shown(repr(value))}, expected an index from 0 to {classes - 1}, or -1 for none")
    return int(value)


def _domain(value: Any, task: Task) -> str:
    device = task.device(str(value))
    if device is None:
        raise ValueError(f"found {shown(repr(value))}, expected one of {', '.join(task.devices)}")
    return device
