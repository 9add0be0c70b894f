"""``kd-cache dump --ray``: the parts of a dump on a Ray cluster, and their seal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from kd_cache.care.seal import SealJob, seal_cache
from kd_cache.cli.console import Screen
from kd_cache.cli.dump_job import DumpOptions, job_of, loaded_with, specs_of
from kd_cache.cli.inputs import data_of
from kd_cache.cli.saved import run_record
from kd_cache.cluster.driver import PartsRun, parts_of
from kd_cache.cluster.ray_tasks import connected, require_ray
from kd_cache.cluster.worker import PartReport, kept
from kd_cache.commands import Run
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.views import Policy
from kd_cache.errors import MissingLogitsError, UsageError, shown
from kd_cache.exchange.push import open_for_parts, push_parts
from kd_cache.files.atomic import make_directory, temporary_beside
from kd_cache.options import home_path
from kd_cache.remote.url import checked_url
from kd_cache.score.dump import DumpJob, DumpReport, dump_logits, part_range
from kd_cache.score.factory import absolute_factory
from kd_cache.score.job import TeacherReport
from kd_cache.score.teacher import TeacherSpec
from kd_cache.serve.pull import pull_cache
from kd_cache.store.snapshot import Snapshot
from kd_cache.watch import Watcher

_PARTS = "~/.cache/kd-cache/parts"
"""Where a machine that shares no disk keeps what its parts have scored, by the URL that it is pushed to."""


@dataclass(frozen=True)
class DumpOrder:
    """What each worker is told of a dump: everything that a person said, its paths absolute.

    ``storage`` is an URL that parts are pushed to; then the cache is in a folder of the worker's machine.
    """

    proof: Path | None
    options: DumpOptions
    values: Mapping[str, Any]
    specs: Sequence[TeacherSpec]
    record: Mapping[str, Any]
    samples: Path
    storage: str | None

    def dump(self, part: tuple[int, int], watcher: Watcher) -> DumpReport:
        """Dump this part. What an earlier part of this process has loaded is taken from it."""
        screen = Screen(quiet=True, as_json=False)
        read = partial(data_of, self.options.target, self.values, tables=self.samples)
        data = kept("data", self.values["json_path"], read)
        teachers = {}
        for spec in self.specs:
            load = partial(loaded_with, self.options, [spec], screen)
            teachers[spec] = kept((spec, self.options.device), spec.checkpoint, load)[spec.name]
        options = self.options
        if self.storage is not None:
            here = home_path(_PARTS) / xxhash.xxh3_128_hexdigest(self.storage.encode())
            options = replace(options, cache_root=here)
        job = job_of(options, data, teachers, self.record, part)
        if self.storage is not None:
            kept("pulled", None, partial(_pull_what_is_there, self.storage, job.folder.path))
        report = dump_logits(job, watcher)
        if self.storage is not None:
            push_parts(job.folder.path, self.storage)
        return report


def _pull_what_is_there(url: str, folder: Path) -> None:
    """What other machines and earlier runs have scored need not be scored again."""
    with suppress(MissingLogitsError):
        pull_cache(url, folder)


def refuse_odd(options: DumpOptions) -> None:
    """Raise `UsageError` for options that contradict each other or ``--ray``; where Ray is not installed, too."""
    if (options.policy is None) != (options.views == 0):
        raise UsageError("--views and --policy belong together: how many views, and how they are augmented")
    if options.policy is not None:
        Policy.load(options.policy)  # what is wrong with it is said before teachers are loaded
    if options.ray is None:
        for name in ("parts", "ray_gpus", "ray_storage"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is for --ray, which is not given")
        return
    if options.shard is not None:
        raise UsageError("--shard names a part, and --ray hands out all of them", hint="Leave out one of the two.")
    if options.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device is {shown(options.device)}, expected auto, cpu or cuda: Ray chooses which GPU a part has"
        )
    if (options.device == "cpu" and options.ray_gpus) or (options.device == "cuda" and options.ray_gpus == 0):
        raise UsageError(f"--device {options.device} and --ray-gpus {options.ray_gpus:g} contradict each other")
    require_ray(options.ray)
    if options.ray_storage is not None:
        open_for_parts(options.ray_storage)


def dump_on_ray(run: Run, options: DumpOptions, data: Dataset, screen: Screen) -> tuple[DumpJob, DumpReport]:
    """Score all parts, and seal them. The job is what was done, but for the teachers, which only workers have.

    Raises `KDCacheError` as `connected`, the worst error of a part, and as `seal_cache`.
    """
    record, began = run_record(run, data), time.monotonic()
    job = job_of(replace(options, device="cpu"), data, {}, record)
    size = len(data.selection.listed)
    part_range(replace(job, part=(0, 1)), size)  # refuses what parts cannot do
    make_directory(options.cache_root)
    with temporary_beside(options.cache_root / "proof") as proof, connected(str(options.ray)) as cluster:
        proof.touch()
        gpus = options.ray_gpus
        if gpus is None:
            gpus = float(options.device == "cuda" or (options.device == "auto" and cluster.has_gpus))
        device = "cuda" if gpus else "cpu"
        specs = [replace(spec, factory=absolute_factory(spec.factory)) for spec in specs_of(run, options, data)]
        specs = [replace(spec, checkpoint=spec.checkpoint and spec.checkpoint.absolute()) for spec in specs]
        policy = options.policy and options.policy.absolute()
        told = replace(options, device=device, cache_root=options.cache_root.absolute(), policy=policy)
        samples = job.folder.pending_path.absolute()
        data.samples_table(samples, options.workers, screen)
        storage = options.ray_storage and checked_url(options.ray_storage)
        seen = None if storage else proof.absolute()
        order = DumpOrder(seen, told, _absolute(run, data), specs, record, samples, storage)
        cluster.prepare(order, gpus)
        count = min(options.parts or parts_of(size, cluster.slots()), max(size, 1))
        screen.remark(f"{count:,} parts on Ray, {cluster.slots():,} at once, on {device}")
        if not cluster.slots():
            screen.note("no machine of the cluster can run a part now: one is waited for")
        screen.stage("scoring", size)
        parts = PartsRun(cluster, count, partial(_samples_in_words, job), screen)
        parts.run()
    if storage:
        pull_cache(storage, job.folder.path, screen)
    sealing = SealJob(
        Snapshot(job.folder), data, files=options.files, workers=options.workers,
        inputs="read" if options.reread else "unchanged",
        record=record, shown_path=f"{options.cache_root}/{job.folder.path.name}",
    )  # fmt: skip
    sealed = seal_cache(sealing, screen)
    report = DumpReport(
        sealed.cache, size, size, data.selection.per_device,
        {spec.name: _total(spec.name, parts.reports) for spec in specs},
        missing=sealed.missing, samples_scored=sum(each.scored for each in parts.reports),
        seconds=time.monotonic() - began, published=sealed.published, snapshot=Snapshot(job.folder, maps=True),
    )  # fmt: skip
    return replace(job, device=torch.device(device)), report


def _absolute(run: Run, data: Dataset) -> dict[str, Any]:
    """The values of all options, where every path is absolute: workers run in folders of their own."""
    paths: dict[str, Any] = {name: Path(path) for name, path in data.paths.items() if isinstance(path, str)}
    for option in run.command.options:
        value = run.values[option.name]
        if option.is_path and value is not None:
            paths.setdefault(option.name, [p.absolute() for p in value] if option.is_list else value.absolute())
    dataset = run.values["dataset"]
    paths |= {"dataset": dataset and absolute_factory(dataset)}
    paths |= {"rename_map": data.paths["rename_map"]} if "rename_map" in data.paths else {}
    return {**run.values, **paths}


def _samples_in_words(job: DumpJob, part: tuple[int, int]) -> str:
    """Which samples a part has: ``samples 40 to 79 of 340 in the order of their keys, a.npy … b.npy``."""
    files = job.data.selection.by_key
    numbers = part_range(replace(job, part=part), len(files))
    if not numbers:
        return "no samples"
    ends = f"{shown(files[numbers[0]])} … {shown(files[numbers[-1]])}"
    return f"samples {numbers[0] + 1:,} to {numbers[-1] + 1:,} of {len(files):,} in the order of their keys, {ends}"


def _total(name: str, reports: Sequence[PartReport]) -> TeacherReport:
    """The sums of the parts; what is dropped each of them has counted, for all the cache."""
    found = [each.teachers[name] for each in reports if name in each.teachers]
    rescored: Counter[str] = Counter()
    for each in found:
        rescored.update(each[2])
    return TeacherReport(
        sum(each[0] for each in found),
        sum(each[1] for each in found),
        rescored,
        max((each[3] for each in found), default=0),
    )
