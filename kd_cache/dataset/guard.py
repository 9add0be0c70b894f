"""Who may be scored, cached and distilled: train samples of the source A and of one target, and nobody else.

The guard looks at the whole manifest before any teacher is loaded. It covers what a manifest can show: splits that
contradict their list, unseen devices in train, one file in train and in a held-out split under any spelling (folders
that are links included), one recording location in train and test. It cannot see two files with equal sound and
unrelated names, nor a link to a single file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_cache.dataset.manifest import Manifest, Sample, maybe_equal, place_name, spelling
from kd_cache.dataset.provenance import Provenance
from kd_cache.dataset.task import DCASE, Task
from kd_cache.errors import DataLeakageError, UsageError, listed, shown
from kd_cache.keys import NO_LABEL, KeyFinder, are_ascending, keys_of, sorted_order
from kd_cache.watch import Watcher

_PATH_MAX = 4096


@dataclass(frozen=True)
class Selection:
    """The permitted samples for a target (or several: ``b,c``) in manifest order, and what the guard could check.

    ``located`` counts the train and test rows whose location is known, ``locatable`` all of them; ``shared_locations``
    lists what ``allow_shared_locations`` let pass.
    """

    target: str
    samples: Sequence[Sample]
    located: int
    locatable: int
    shared_locations: tuple[str, ...] = ()
    task: Task = DCASE

    @cached_property
    def listed(self) -> list[str]:
        """The permitted files in the manifest's order."""
        return [sample.file for sample in self.samples]

    @property
    def files(self) -> list[str]:
        """A copy of ``listed``."""
        return list(self.listed)

    @cached_property
    def listed_keys(self) -> np.ndarray:
        """``[N, 16]`` u1: the keys of ``listed``."""
        return keys_of(self.listed)

    @cached_property
    def order(self) -> np.ndarray:
        """``[N]``: ``keys[i]`` is that of ``samples[order[i]]``."""
        return sorted_order(self.listed_keys)

    @cached_property
    def keys(self) -> np.ndarray:
        """``[N, 16]`` u1: the keys of the permitted files, ascending. What works on samples numbers them so."""
        keys: np.ndarray = self.listed_keys[self.order]
        return keys

    @cached_property
    def by_key(self) -> Sequence[str]:
        """The permitted files in the order of their keys."""
        return [self.listed[number] for number in self.order.tolist()]

    @cached_property
    def labels(self) -> np.ndarray:
        """``[N]`` int32 in the order of ``keys``: scenes of source samples; -1 for none, and for the target's."""
        labels = [
            sample.scene_label if sample.device_id == self.task.source and sample.scene_label is not None else NO_LABEL
            for sample in self.samples
        ]
        found: np.ndarray = np.array(labels, np.int32)[self.order]
        return found

    @cached_property
    def finder(self) -> KeyFinder:
        """Finds keys among ``keys``."""
        return KeyFinder(self.keys)

    @cached_property
    def per_device(self) -> dict[str, int]:
        """Permitted samples by device, the source first."""
        counts = Counter(sample.device_id for sample in self.samples)
        return {device: counts[device] for device in (self.task.source, *self.target.split(","))}


def chosen_samples(manifest: Manifest, target: str) -> tuple[Sample, ...]:
    """The train samples of the source and of the target's devices, unguarded."""
    devices = (manifest.task.source, *target.split(","))
    return tuple(sample for sample in manifest if sample.split == "train" and sample.device_id in devices)


def select(
    manifest: Manifest, target: str, *, allow_shared_locations: bool = False, data_root: Path | None = None
) -> Selection:
    """The train samples of A and ``target``.

    Args:
        manifest: all samples; the checks look at every row, whatever the target.
        target: one of b, c, s1, s2, s3, or several with commas between.
        allow_shared_locations: let a location stand in both train and test; nothing else is relaxed.
        data_root: the features' folder, so that an absolute path and a relative one can be seen to be one file.

    Raises:
        DataLeakageError: naming the first 20 offending samples and how many there are.
        UsageError: an unknown target, or a selection without samples of A or of the target.
    """
    return _guarded(manifest, ",".join(manifest.task.several(target)), allow_shared_locations, data_root)


def select_source(
    manifest: Manifest, *, allow_shared_locations: bool = False, data_root: Path | None = None
) -> Selection:
    """The train samples of A alone: what a scene teacher learns from, and all where a task has no domains.

    Arguments and errors as for `select`.
    """
    return _guarded(manifest, manifest.task.source, allow_shared_locations, data_root)


def selected(manifest: Manifest, target: str | None, **allowed: Any) -> Selection:
    """`select`, or `select_source` where the source is meant, or the task has no domains."""
    task = manifest.task
    target = target if target == task.source else ",".join(task.several(target))
    return select_source(manifest, **allowed) if target == task.source else select(manifest, target, **allowed)


def _guarded(manifest: Manifest, target: str, allow_shared_locations: bool, data_root: Path | None) -> Selection:
    task = manifest.task
    look = look_through(manifest, allow_shared_locations=allow_shared_locations, data_root=data_root)
    if look.violations:
        raise look.violations[0]
    chosen = chosen_samples(manifest, target)
    _refuse_empty(chosen, manifest, target)
    selection = Selection(target, chosen, look.located, look.locatable, look.shared_locations, task)
    _refuse_collisions(selection)
    return selection


class Look(NamedTuple):
    """What the guard saw in a whole manifest; ``violations`` are of one kind each. The rest as in `Selection`."""

    violations: list[DataLeakageError]
    located: int
    locatable: int
    shared_locations: tuple[str, ...]
    task: Task


def look_through(manifest: Manifest, *, allow_shared_locations: bool = False, data_root: Path | None = None) -> Look:
    """Everything that is wrong with a manifest, whatever the target. Arguments as for `select`."""
    task = manifest.task
    train = [sample for sample in manifest if sample.split == "train"]
    test = [sample for sample in manifest if sample.split != "train" and task.held_out.search(sample.split)]
    located, shared = _shared_locations(train, test, task)
    wrong = [
        _violation("samples contradict the list they stand in", _contradictions(manifest)),
        _violation(
            f"train samples come from the unseen devices {', '.join(task.unseen)}, which only the final evaluation "
            "may use",
            _unseen_devices(train, task),
        ),
        _violation("train files stand in another split too", _files_in_two_splits(manifest, data_root)),
        _violation(
            "train samples were recorded at a location that also occurs in test"
            if task.group == "location"
            else f"train samples are of a {task.group} that also occurs in test",
            [] if allow_shared_locations else shared,
            "Move them out of train, or pass --allow-shared-locations if that is intended.",
        ),
    ]
    locatable = 0 if task.group is None else len(train) + len(test)
    return Look([each for each in wrong if each is not None], located, locatable, tuple(shared), task)


def _violation(what: str, wrong: list[str], hint: str | None = None) -> DataLeakageError | None:
    return DataLeakageError(f"{len(wrong)} {what}\n{listed(wrong)}", hint=hint) if wrong else None


def refuse_outside(selection: Selection, files: Iterable[str]) -> None:
    """Raise `DataLeakageError` if any of ``files`` is not a permitted sample."""
    permitted = set(selection.files)
    outside = [file for file in files if file not in permitted]
    if outside:
        raise DataLeakageError(
            f"{len(outside)} files are not permitted {selection.task.permits(selection.target)}\n{listed(outside)}"
        )


def location_in_name(file: str, task: Task = DCASE) -> str | None:
    """``city-location`` of a file named as the task's clips are, else ``None``."""
    found = task.group_in(file)
    return None if found is None else place_name(found)


def device_in_name(file: str, task: Task = DCASE) -> str | None:
    """The device of a file named as the task's clips are, else ``None``."""
    found = task.recording_in(file)
    return None if found is None else task.device(found[2].lower())


def _contradictions(manifest: Manifest) -> list[str]:
    as_listed = " (write it as the list is called, or leave it out)"
    return [
        f"{sample.file}: in the list {sample.listed_in}, but its split says {sample.split}"
        f"{as_listed if sample.split.strip().casefold() == sample.listed_in else ''}"
        for sample in manifest
        if sample.listed_in is not None and sample.split != sample.listed_in
    ]


def _unseen_devices(train: list[Sample], task: Task) -> list[str]:
    wrong = [f"{sample.file}: device {sample.device_id}" for sample in train if sample.device_id in task.unseen]
    return wrong + [
        f"{sample.file}: its name says {named}, its row {sample.device_id}"
        for sample in train
        if sample.device_id not in task.unseen and (named := device_in_name(sample.file, task)) in task.unseen
    ]


def _files_in_two_splits(manifest: Manifest, data_root: Path | None) -> list[str]:
    plain = spelling if data_root is None else Places(data_root).plain
    rows = maybe_equal((plain(sample.file) for sample in manifest), len(manifest))
    several = [manifest.samples[number] for number in rows]
    train = {plain(sample.file): sample.file for sample in several if sample.split == "train"}
    return [
        f"{file}: also in {other.split}{'' if other.file == file else f' as {other.file}'}"
        for other in several
        if other.split != "train" and (file := train.get(plain(other.file))) is not None
    ]


class Places:
    """Where files lie below a data root: relative, absolute, and through folders that are links."""

    def __init__(self, data_root: Path) -> None:
        self.root = os.path.realpath(data_root)
        self._real: dict[str, str] = {"/": ""}

    def plain(self, file: str) -> str:
        """One text for one file, however it is written. Files need not exist."""
        path = f"{self.root}/{file}" if not file.startswith("/") else file
        if len(path) >= _PATH_MAX:
            return path  # no system opens it
        if ".." in path:  # through a link, "a/../b" is not "b"
            path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))  # noqa: PTH118, PTH119, PTH120
        folder, _, name = spelling(path).rpartition("/")
        return f"{self._folder(folder or '/')}/{name}"

    def _folder(self, path: str) -> str:
        """``realpath``, but one look per folder, whatever the number of files: links are looked for top down."""
        names = []
        while path not in self._real and not os.path.islink(path):  # noqa: PTH114
            above, _, name = path.rpartition("/")
            path = above or "/"
            names.append(name)
        if path not in self._real:
            self._real[path] = os.path.realpath(path).rstrip("/")
        real = self._real[path]
        for name in reversed(names):
            path, real = f"{path.rstrip('/')}/{name}", f"{real}/{name}"
            self._real[path] = real
        return real


def _shared_locations(train: list[Sample], test: list[Sample], task: Task) -> tuple[int, list[str]]:
    """How many rows have a known location, and the train rows whose location occurs in test.

    A row that has a field *and* a telling name counts at both places, so that a wrong field cannot hide a right name.
    """
    held_out: set[str] = set()
    located = 0
    for sample in test:
        places, is_located = _recorded(sample, task)
        held_out |= places
        located += is_located
    shared = []
    for sample in train:
        places, is_located = _recorded(sample, task)
        located += is_located
        common = places & held_out
        if common:
            shared.append(f"{sample.file}: {task.group} {min(common)}")
    return located, shared


def _recorded(sample: Sample, task: Task) -> tuple[set[str], bool]:
    """`places_of_sample`, and whether one of them is known to be a location. Names are looked through once."""
    named = location_in_name(sample.file, task)
    places = {place for place in (sample.location, named, *sample.places) if place is not None}
    return places, sample.location is not None or named is not None


def places_of_sample(sample: Sample, task: Task = DCASE) -> set[str]:
    """All that its fields and its name say of where it was recorded: none, one, or several."""
    return _recorded(sample, task)[0]


def _refuse_empty(chosen: tuple[Sample, ...], manifest: Manifest, target: str) -> None:
    source = manifest.task.source
    for device in (source, *target.split(",")):
        if not any(sample.device_id == device for sample in chosen):
            splits = Counter(sample.split for sample in manifest)
            found = ", ".join(f"{count:,} in {shown(split)}" for split, count in splits.most_common(10))
            is_spelled = any(sample.split == "train" for sample in manifest)
            way = "from" if device == source else "to"
            what = f" of device {device}, so there is nothing to adapt {way}" if manifest.task.has_domains else ""
            raise UsageError(
                f"the manifest has no train samples{what}; it has {found}",
                hint="Check --json-path and --target."
                if is_spelled
                else "What may be learnt from is in the split train, written exactly so.",
            )


def _refuse_collisions(selection: Selection) -> None:
    if not are_ascending(selection.keys):
        raise UsageError("two different paths have the same MD5 key; rename one of them")


def leaked(provenance: Provenance, manifest: Manifest, selection: Selection) -> list[str]:
    """The samples that made a teacher and that ``selection`` does not permit, each with what is known of it.

    Of those that the manifest does not list, only how many there are: a teacher keeps keys, and no names.
    """
    keys, outside = provenance.keys, _outside(provenance, selection)
    if not len(outside):
        return []
    rows = list(manifest)
    known = keys_of(row.file for row in rows)
    order = sorted_order(known)
    at = KeyFinder(known[order]).find(outside)
    found = [rows[order[position]] for position in at.tolist() if position >= 0]
    lines = [f"{shown(row.file)}: device {row.device_id}, split {shown(row.split)}" for row in found]
    if unknown := len(outside) - len(found):
        of_all = f"samples that this manifest does not list: {unknown:,} of {len(keys):,}"
        lines.insert(0, f"{of_all} (renamed since, or of another data set; it has {shown(rows[0].file)}, …)")
    return lines


def _outside(provenance: Provenance, selection: Selection) -> np.ndarray:
    """``[n, 16]`` u1: the keys that ``selection`` does not permit."""
    keys = provenance.keys
    outside: np.ndarray = keys[selection.finder.find(keys) < 0]
    return outside


def tell_of_untold(teachers: Mapping[str, Any], watcher: Watcher) -> None:
    """A note of each teacher that says nothing of what it was made with, or not all of it."""
    for name, teacher in teachers.items():  # one by one, as those who look at them again do: nothing is said twice
        provenance: Provenance | None = getattr(teacher, "provenance", None)
        if provenance is None:
            watcher.note(
                f"nothing is known of what made {shown(name)}: whether a sample that is not permitted trained it "
                "cannot be checked"
            )
        elif not provenance.complete:
            watcher.note(
                f"{shown(name)} stands on weights that say nothing of what they were trained on: whether those saw a "
                "sample that is not permitted cannot be checked"
            )


def refuse_leaking(made: Mapping[str, Provenance | None], manifest: Manifest, selection: Selection) -> None:
    """Raise `DataLeakageError` where a teacher was made with a sample that is not permitted (`dataset.provenances`)."""
    for name, provenance in made.items():
        if provenance is not None and (found := leaked(provenance, manifest, selection)):
            raise DataLeakageError(
                f"teacher {shown(name)} was trained or validated on {len(_outside(provenance, selection)):,} samples "
                f"that are not permitted {selection.task.permits(selection.target)}\n"
                f"{listed(found)}",
                hint="Train it on this manifest's permitted samples (kd-cache train), or give the manifest it was made "
                "with. Where paths were only renamed since: --rename-map OLD=NEW.",
            )
