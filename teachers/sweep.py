"""``--sweep``: a scene head for every combination of settings, of which the best by validation is kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

from kd_cache.cli.console import Screen, percent
from kd_cache.commands import Table
from kd_cache.errors import TrainingError, UsageError, shown
from kd_cache.train.job import TrainJob, TrainReport
from kd_cache.train.publishing import publish
from teachers.recipes import train_teacher
from teachers.training_report import number

SWEPT = {"lr": float, "weight_decay": float, "dropout": float, "label_smoothing": float, "batch_size": int,
         "epochs": int, "seed": int}  # fmt: skip


def swept(text: str, job: TrainJob, screen: Screen) -> TrainReport:
    """Train them all and show a table; the best is published.

    Of validation alone: a person must not choose by ``test`` either.
    """
    choices = parse_sweep(text)
    if job.settings.stages and (useless := {"lr", "epochs"} & set(choices)):
        raise UsageError(
            f"--sweep {shown(text)}: {' and '.join(sorted(useless))} of stages that are given one by one are theirs",
            hint="Leave out --stage, or what it says from the sweep.",
        )
    if "dropout" in choices and not job.settings.mlp_hidden_dims:
        screen.note("a linear scene head has no dropout: give --mlp-hidden-dims for it to matter")
    base = replace(job, publish=False, shared={})
    made: list[tuple[TrainJob, TrainReport]] = []
    rows = []
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        one = replace(base, settings=replace(base.settings, **chosen))
        try:
            report = train_teacher(one, screen)
        except TrainingError as error:
            rows.append([*(f"{value:g}" for value in values), "failed", "–"])
            screen.note(f"{', '.join(f'{name}={value:g}' for name, value in chosen.items())}: {error.message}")
            continue
        made.append((one, report))
        validation = report.results["validation"]
        scores = [percent(validation["accuracy"]), number(validation["log_loss"])]
        rows.append([*(f"{value:g}" for value in values), *scores])
    if not made:
        raise TrainingError("no combination of the sweep learnt anything", hint="See the notes above.")
    screen.result(Table("Sweep", [*choices, "Validation", "Log loss"], rows), "")
    return _published(*max(made, key=lambda pair: _rank(pair[1])), screen)


def _published(job: TrainJob, best: TrainReport, screen: Screen) -> TrainReport:
    if job.settings.quick_experiment < 1:
        screen.note(f"a quick experiment publishes nothing: its weights are {shown(best.checkpoint)}")
    elif not job.settings.shuffle_labels:
        return replace(best, checkpoint=publish(job, best.checkpoint, best.results, screen), published=True)
    return best


def _rank(report: TrainReport) -> tuple[float, float]:
    validation = report.results["validation"]
    return validation["accuracy"], -validation["log_loss"]


def parse_sweep(text: str) -> dict[str, list[Any]]:
    """``lr=1e-3/1e-2,dropout=0/0.3``: values by setting. Raises `UsageError`."""
    found: dict[str, list[Any]] = {}
    for item in text.split(","):
        name, separator, values = item.strip().partition("=")
        name = name.replace("-", "_")
        if not separator or name not in SWEPT or name in found:
            raise UsageError(
                f"--sweep {shown(text)}: found {shown(item)}, expected NAME=VALUE/VALUE/…, each name once, of "
                f"{', '.join(SWEPT)}"
            )
        try:
            found[name] = [SWEPT[name](value) for value in values.split("/")]
        except ValueError as error:
            raise UsageError(f"--sweep {shown(text)}: {shown(error)}") from error
    return found
