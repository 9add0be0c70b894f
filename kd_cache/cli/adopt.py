"""``kd-cache adopt``: bring rows that something else made into a cache, marked unverified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kd_cache.cli.console import Screen
from kd_cache.cli.inputs import data_of, task_of
from kd_cache.cli.report import missing_lines
from kd_cache.cli.saved import run_record
from kd_cache.commands import Report, Run, Table
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.inputs import named_data
from kd_cache.dataset.task_file import DEFAULT
from kd_cache.errors import shown
from kd_cache.exchange.adopt import AdoptJob, AdoptReport, adopt_rows
from kd_cache.exchange.imported import named_files
from kd_cache.options import BadSample, DType, ValueKind


@dataclass(frozen=True)
class AdoptOptions:
    """What an adoption is told, by the names of its options; data options go to `data_of`."""

    source: Path
    target: str | None
    cache_root: Path
    name: str | None
    files_list: Path | None
    value_kind: ValueKind | None
    text_dtype: DType | None
    files: bool | None
    on_bad_sample: BadSample
    workers: int
    max_source_bytes: int
    min_accuracy: float | None


def adopt(run: Run, screen: Screen) -> Report:
    """Guard, read, join by file name, keep."""
    options = run.to(AdoptOptions)
    # The guard comes first: nothing is read of the source for a manifest that leaks.
    data = _data(run, options, screen)
    job = AdoptJob(
        options.source,
        options.cache_root,
        data,
        name=options.name,
        files_list=options.files_list,
        value_kind=options.value_kind,
        dtype=options.text_dtype,
        files=options.files,
        on_bad_sample=options.on_bad_sample,
        workers=options.workers,
        max_bytes=options.max_source_bytes,
        min_accuracy=options.min_accuracy,
        record=run_record(run, data),
    )
    report = adopt_rows(job, screen)
    return Report(report.as_json(), _lines(report), 3 if report.missing else 0)


def _data(run: Run, options: AdoptOptions, screen: Screen) -> Dataset:
    """What the cache may hold; where nothing is named but a task without a guard, whatever the source names."""
    task = task_of(run.values)
    if task == DEFAULT or run.values["json_path"] is not None or run.values["dataset"] is not None:
        return data_of(options.target, run.values, note=screen.note)
    task.chosen(options.target)
    return named_data(task, named_files(options.source, options.files_list, options.max_source_bytes))


def _lines(report: AdoptReport) -> list[str | Table]:
    rows = [
        [
            name,
            f"{one.rows:,}",
            f"{one.origin.num_classes} {one.origin.value_kind}, {one.origin.dtype}",
            f"{one.left_out:,}",
            f"{one.missing:,}",
            "unknown" if one.accuracy is None else str(one.accuracy),
        ]
        for name, one in report.teachers.items()
    ]
    title = f"{shown(report.cache)}: {report.permitted:,} permitted samples"
    columns = ["Teacher (unverified)", "Rows", "Values", "Not permitted", "Missing", "Accuracy on A"]
    said = "Adopted rows are unverified: kd-cache repair --recompute scores them again with their teacher."
    return [Table(title, columns, rows), said, *missing_lines(report.missing)]
