"""``kd-cache student`` and ``student compare``: students out of a cache."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from kd_cache.cli.console import Screen, percent
from kd_cache.cli.inputs import own_features, task_of
from kd_cache.cli.pages import pages_of
from kd_cache.cli.saved import saved_data, saved_in, saved_provenances
from kd_cache.commands import Report, Run, Table
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.provenance import Provenance
from kd_cache.dataset.task_file import DEFAULT
from kd_cache.distill.comparison import compare as compared
from kd_cache.distill.objective import CE
from kd_cache.distill.recipe import DKD_RAMP, RECIPES, Recipe, parse_options
from kd_cache.distill.student import StudentJob, train_student
from kd_cache.distill.subset import listed_samples
from kd_cache.errors import UsageError, shown
from kd_cache.score.device import resolve_device
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import Index
from kd_cache.store.names import MODES_BEFORE
from kd_cache.store.snapshot import Snapshot
from kd_cache.train.checkpoint_file import checkpoint_limit
from kd_cache.train.job import TrainReport
from kd_cache.train.progress import LAST_EPOCH, MACRO
from kd_cache.train.settings import SCENE, Settings

_GIVEN = {
    "loss": "loss", "kd_alpha": "alpha", "apply_kd_to": "apply_to", "normalise": "normalise",
    "kd_weighting": "weighting", "confidence_threshold": "confidence_threshold",
    "kd_warmup_epochs": "warmup_epochs", "kd_ramp_epochs": "ramp_epochs",
}  # fmt: skip
"""Options, and the fields of a recipe that they are."""
_TAKEN = ("output_dir", "init", "resume", "workers", "pth", "half", "tensorboard", "balance", "on_views", "check_views")


def student(run: Run, screen: Screen, target: str | None, teacher_mode: str) -> Report:
    """Train one student from one cache."""
    mode = MODES_BEFORE.get(teacher_mode, teacher_mode)
    with checkpoint_limit(run.values["max_checkpoint_bytes"]):
        job, _ = _job(run, screen, target, with_teachers=mode != CE)
        report = train_student(replace(job, mode=mode), screen)
    pages = pages_of([report.run], screen, wanted=run.values["report"])
    return Report({"student": report.as_json(), **pages.content}, [*_lines(report, mode), *pages.lines])


def compare(run: Run, screen: Screen, target: str | None, modes: Any, seeds: int, seed: int) -> Report:
    """Train students of several modes and seeds, and say what teachers are worth."""
    with checkpoint_limit(run.values["max_checkpoint_bytes"]):
        job, teachers = _job(run, screen, target, with_teachers=True)
        found = compared(job, modes or ["mean", "fit", *teachers], range(seed, seed + seeds), screen)
    files = [str(path) for path in found.files]
    pages = pages_of([found.folder], screen, wanted=run.values["report"])
    content = {**found.as_json(), "files": files, **pages.content}
    return Report(content, [found.table, "", *found.sentences, *map(shown, files), *pages.lines])


def _job(run: Run, screen: Screen, target: str | None, *, with_teachers: bool) -> tuple[StudentJob, list[str]]:
    """The training that the options name, but for its mode, and the teachers in the caches of all targets."""
    values, task = run.values, task_of(run.values)
    _refuse_ambiguous(run)
    targets = task.several(target)
    folders = {each: CacheFolder(values["cache_root"] / task.adaptation(each)) for each in targets}
    indexes = {each: Snapshot(folder).finished() for each, folder in folders.items()}
    index = next(iter(indexes.values()))
    saved = saved_in(index)
    data = saved_data(run, saved, ",".join(targets) if task.has_domains else None)
    if data.task.anything:
        raise UsageError(
            f"kd-cache student trains nets on features [T, F]; those of {shown(data.task.name)} may be anything",
            hint="Say inputs: features in its task, or train on LogitCache.attach.",
        )
    recalled = run.recall(saved.values, {})
    if data.task != DEFAULT:
        recalled["num_scenes"] = next(iter(index.origins.values())).num_classes
    table = values["subset_table"]
    job = StudentJob(
        settings=_settings(values, recalled),
        data=data,
        device=resolve_device(values["device"]),
        record={"options": run.record(), "paths": dict(data.paths)},
        cache=tuple(folder.path for folder in folders.values()),
        recipe=_recipe(values),
        select=LAST_EPOCH if values["select"] == "last" else MACRO,
        own_features=own_features(values, data.task),
        subset=None if table is None else listed_samples(table, data.manifest),
        provenances=_provenances(run, indexes, data, screen) if with_teachers else {},
        **{name: values[name] for name in _TAKEN if name in values},
    )
    if values["recipe"] != "default":
        told = ", ".join(f"{name} {value}" for name, value in asdict(job.recipe).items())
        screen.note(f"recipe {values['recipe']}: {told}")
    return job, [name for name in index.origins if all(name in each.origins for each in indexes.values())]


def _provenances(run: Run, indexes: Mapping[str, Index], data: Dataset, screen: Screen) -> dict[str, Provenance | None]:
    """Of each teacher what it says in every cache, together: it may be another one for each target."""
    made = [saved_provenances(run, index, target, screen, data) for target, index in indexes.items()]
    return {name: _together([each.get(name) for each in made]) for name in made[0]}


def _together(made: Sequence[Provenance | None]) -> Provenance | None:
    told = [each for each in made if each is not None]
    return functools.reduce(Provenance.together, told) if len(told) == len(made) else None


def _refuse_ambiguous(run: Run) -> None:
    """What the older pipeline calls --warmup-epochs is the distillation's; here it is the learning rate's."""
    is_older = run.values["recipe"] == "city2scene" or run.values["kd_ramp_epochs"] is not None
    if is_older and run.said("warmup_epochs") and run.values["kd_warmup_epochs"] is None:
        raise UsageError(
            "--warmup-epochs may be meant in two ways: it is the learning rate's; epochs without distillation, which "
            "older pipelines call so, are --kd-warmup-epochs",
            hint="Give --kd-warmup-epochs too (0 where there are to be none).",
        )


def _recipe(values: Mapping[str, Any]) -> Recipe:
    given = {field: values[name] for name, field in _GIVEN.items() if values[name] is not None}
    if values["temperature"] is not None:
        given["temperature"], given["temperature_end"] = values["temperature"]
    if values["loss_option"]:
        given["options"] = parse_options(values["loss_option"])
    given |= {name: True for name in ("keep_ce", "raw_weights") if values[name]}
    recipe = replace(RECIPES[values["recipe"]], **given)
    if recipe.loss == "dkd" and not {"warmup_epochs", "ramp_epochs"} & given.keys():
        return replace(recipe, ramp_epochs=DKD_RAMP)
    return recipe


def _settings(values: Mapping[str, Any], recalled: Mapping[str, Any]) -> Settings:
    taken = {each.name: values[each.name] for each in fields(Settings) if each.name in values}
    taken |= {name: recalled[name] for name in ("num_scenes", "num_cities")}
    return Settings(SCENE, **{**taken, "drop_last": values["drop_last"] or values["compile"]})


def _lines(report: TrainReport, mode: str) -> Sequence[str | Table]:
    results = report.results
    validation, test = results["validation"], results["test"] or {}
    groups = test.get("by", {}).get("device_group", {})
    row = [
        f"{mode} {report.place}",
        report.how,
        percent(validation["accuracy"]),
        *(percent(test.get(figure)) for figure in ("accuracy", "macro_accuracy")),
        *(percent(groups.get(group, {}).get("accuracy")) for group in ("source", "target", "other", "unseen")),
        percent(results["chance"]),
    ]
    columns = ["Student", "", "Validation", "Test", "Macro", "Source", "Target", "Other", "Unseen", "Chance"]
    lines: list[str | Table] = [Table("Accuracy on locations that were not trained on", columns, [row])]
    lines.append(f"{shown(report.checkpoint)}")
    for name, count in results["distillation"].get("validation_that_trained", {}).items():
        lines.append(
            f"{'not known how many' if count is None else count} of {validation['samples']} validation rows "
            f"trained {shown(name)}"
        )
    if (agreement := results["agreement"]) is not None:
        lines.append(
            f"it decides as its teachers do on {percent(agreement['share'])} of {agreement['rows']:,} rows of "
            "the target at held-out locations"
        )
    if mode != CE:
        lines.append("What the teachers are worth: kd-cache student compare")
    return lines
