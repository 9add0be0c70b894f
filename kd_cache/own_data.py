"""From Python: your own data set and nets into a cache, and out of it, in a few lines.

cache = kd_cache.score(dataset, teachers={"big": model}, keys=names, cache="cache/cifar")
for (inputs, labels), logits in DataLoader(cache.attach(dataset, names), 256, collate_fn=…): …
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from secrets import randbits
from typing import Any

import torch

import kd_cache
from kd_cache.care.problems import VerifyReport
from kd_cache.care.verify import VerifyJob, verify_cache
from kd_cache.dataset.dataset import Dataset, nothing_readable
from kd_cache.dataset.features import Feature
from kd_cache.dataset.inputs import own_data
from kd_cache.dataset.task import NAME, Task
from kd_cache.errors import CorruptError, UsageError, listed, shown
from kd_cache.options import home_path
from kd_cache.score.device import resolve_device
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.score.module_teacher import as_teacher, kept_modes
from kd_cache.score.teacher import Teacher
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.store.cache import CacheFolder
from kd_cache.store.snapshot import Snapshot
from kd_cache.watch import Watcher

_VERIFIED = 10


class _Warnings(Watcher):
    """What a person should know is a warning."""

    def note(self, text: str) -> None:
        warnings.warn(text, stacklevel=2)


@dataclass(frozen=True)
class _Scored:
    """What `score` and `verify` are told, made ready."""

    folder: Path
    data: Dataset
    teachers: dict[str, Teacher]
    watcher: Watcher


def score(
    dataset: Any,
    teachers: Mapping[str, Any],
    keys: Sequence[str] | None = None,
    cache: str | Path = "cache/mine",
    *,
    task: Task | None = None,
    target: str | None = None,
    value_kind: str = "logits",
    device: str = "auto",
    dtype: str = "fp32",
    precision: str = "fp32",
    batch_size: int | None = None,
    on_bad_sample: str = "stop",
    unguarded: bool = False,
    watcher: Watcher | None = None,
) -> LogitCache:
    """Score a map-style data set with teachers, once; what a cache holds already and is fresh is not scored again.

    Args:
        dataset: as `kd_cache.dataset.inputs.Inputs`: an input, or ``(input, label)``, by number. All of it may be
            learnt from: leave test samples out.
        teachers: by name, each a `Teacher` or a plain ``nn.Module`` that takes ``[B, …]`` and returns ``[B, C]``.
        keys: what each row is called; by default the data set's own ``keys``.
        cache: the cache's folder; the last part is its name, whatever the task.
        task: by default one without domains and groups, called as the cache is.
        value_kind: of plain modules: ``logits``, ``log_probs``, ``probs`` or ``sigmoid``.
        device, dtype, precision, batch_size, on_bad_sample: as the options of ``kd-cache dump``.
        unguarded: go on where the task has groups and the data set does not say which are held out.
        watcher: hears of progress and notes; by default notes are warnings.

    Raises what `own_data`, `as_teacher` and `dump_logits` raise; CorruptError: what was written does not verify.
    """
    told: dict[str, Any] = {"task": task, "target": target, "unguarded": unguarded}
    ready = _ready(dataset, teachers, keys, cache, value_kind, watcher or _Warnings(), **told)
    job = DumpJob(
        cache_root=ready.folder.parent,
        data=ready.data,
        teachers=ready.teachers,
        device=resolve_device(device),
        dtype=dtype,
        precision=precision,
        batch_size=batch_size,
        on_bad_sample=on_bad_sample,
        files=False,
        workers=1,
        record={
            "tool": f"kd-cache {kd_cache.__version__}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": {"values": {}, "sources": {}, "paths": {}},
        },
    )
    with kept_modes(each for each in ready.teachers.values() if isinstance(each, torch.nn.Module)):
        report = dump_logits(job, ready.watcher)  # which puts all into evaluation mode
    snapshot = report.snapshot or Snapshot(job.folder)
    found = verify_cache(_audit(ready, snapshot, _VERIFIED), ready.watcher)
    if wrong := [problem for problem in found.problems if problem.file not in report.missing]:
        raise CorruptError(f"what was written does not verify: {wrong[0]}")
    if report.missing:
        ready.watcher.note(f"{len(report.missing):,} inputs could not be scored\n{listed(report.missing.values())}")
    kind = next(iter(job.origins.values())).value_kind
    return LogitCache.open(job.folder.path, teachers=list(teachers), value_kind=kind)


def verify(
    dataset: Any,
    teachers: Mapping[str, Any],
    keys: Sequence[str] | None = None,
    cache: str | Path = "cache/mine",
    *,
    task: Task | None = None,
    target: str | None = None,
    value_kind: str = "logits",
    n: int | None = None,
    unguarded: bool = False,
    watcher: Watcher | None = None,
) -> VerifyReport:
    """Audit a cache against a data set and teachers, told as to `score`; ``n`` samples, all by default."""
    told: dict[str, Any] = {"task": task, "target": target, "unguarded": unguarded}
    ready = _ready(dataset, teachers, keys, cache, value_kind, watcher or _Warnings(), **told)
    return verify_cache(_audit(ready, Snapshot(CacheFolder(ready.folder), maps=True), n), ready.watcher)


def _audit(ready: _Scored, snapshot: Snapshot, n: int | None) -> VerifyJob:
    return VerifyJob(snapshot, ready.data, teachers=ready.teachers, only=list(ready.teachers), n=n, seed=randbits(32))


def _ready(
    dataset: Any,
    teachers: Mapping[str, Any],
    keys: Sequence[str] | None,
    cache: str | Path,
    value_kind: str,
    watcher: Watcher,
    *,
    task: Task | None,
    **told: Any,
) -> _Scored:
    folder = home_path(cache)
    if not NAME.match(folder.name):
        raise UsageError(f"the cache is called {shown(folder.name)}, expected letters, digits, _ . -")
    if not teachers:
        raise UsageError("there is no teacher to score with", hint='Pass teachers={"big": model}.')
    task = Task(folder.name) if task is None else task if task.has_domains else replace(task, name=folder.name)
    data = own_data(dataset, task, keys, note=watcher.note, **told)
    if data.adaptation != folder.name:
        raise UsageError(f"the cache is called {shown(folder.name)}, expected {data.adaptation}, as its task says")
    read = (data.features.try_read(key) for key in data.selection.by_key)
    example = next((feature.array for feature in read if isinstance(feature, Feature)), None)
    if example is None:
        raise nothing_readable(len(data.selection.samples))
    ready = {name: as_teacher(name, each, example, value_kind, watcher.note) for name, each in teachers.items()}
    return _Scored(folder, data, ready, watcher)
