"""From the options of a dump to its job: what one process makes for itself, and each worker of a cluster as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kd_cache.cli.console import Screen
from kd_cache.cli.teachers import described, load_teachers, teacher_specs
from kd_cache.commands import Run
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.views import Policy
from kd_cache.options import BadSample, Precision
from kd_cache.score.device import resolve_device
from kd_cache.score.job import DumpJob
from kd_cache.score.teacher import Teacher, TeacherSpec

Part = tuple[int, int] | None


@dataclass(frozen=True)
class DumpOptions:
    """What a dump is told, by the names of its options; data options go to `data_of`."""

    target: str | None
    on_bad_sample: BadSample
    num_scenes: int
    num_cities: int
    city2scene_teacher_ckpt: Path | None
    scene_teacher_ckpt: Path | None
    teacher: list[str]
    only: list[str]
    max_checkpoint_bytes: int
    cache_root: Path
    dtype: str
    skip_existing: bool
    files: bool | None
    num_verify: int
    views: int
    policy: Path | None
    min_accuracy: float | None
    reread: bool
    device: str
    precision: Precision
    compile: bool
    batch_size: int | Literal["auto"] | None
    workers: int
    seed: int
    shard_size: int
    shard_seconds: float
    shard: str | None
    push: str | None
    ray: str | None
    ray_gpus: float | None
    ray_storage: str | None
    parts: int | None


def specs_of(run: Run, options: DumpOptions, data: Dataset) -> list[TeacherSpec]:
    """The teachers of a dump. Raises as `teacher_specs`."""
    return teacher_specs(
        data,
        {"city2scene": options.city2scene_teacher_ckpt, "scene": options.scene_teacher_ckpt},
        options.teacher,
        options.only,
        own_data=run.given("json_path") or run.given("data_root"),
    )


def loaded_with(options: DumpOptions, specs: Sequence[TeacherSpec], screen: Screen) -> dict[str, Teacher]:
    """These teachers, by name. Raises as `load_teachers`."""
    sizes = options.num_scenes, options.num_cities, options.max_checkpoint_bytes
    return load_teachers(specs, *sizes, screen)


def job_of(
    options: DumpOptions,
    data: Dataset,
    teachers: Mapping[TeacherSpec, Teacher],
    record: Mapping[str, Any],
    part: Part = None,
) -> DumpJob:
    """The dump of these options. Raises as `resolve_device`."""
    return DumpJob(
        cache_root=options.cache_root,
        data=data,
        teachers={spec.name: teacher for spec, teacher in teachers.items()},
        device=resolve_device(options.device),
        dtype=options.dtype,
        precision=options.precision,
        batch_size=options.batch_size,
        compiled=options.compile,
        reread=options.reread,
        skip_existing=options.skip_existing,
        files=options.files,
        on_bad_sample=options.on_bad_sample,
        workers=options.workers,
        seed=options.seed,
        shard_size=options.shard_size,
        shard_seconds=options.shard_seconds,
        policy=None if options.policy is None else Policy.load(options.policy),
        views=options.views,
        part=part,
        min_accuracy=options.min_accuracy,
        notes={spec.name: {"source": described(spec, teacher)} for spec, teacher in teachers.items()},
        record=record,
    )
