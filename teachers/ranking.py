"""What ``kd-cache train rank`` does, once its options are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kd_cache.cli.console import Screen, percent
from kd_cache.cli.inputs import data_of
from kd_cache.cli.pages import pages_of
from kd_cache.commands import Report, Run, Table
from kd_cache.errors import UsageError, shown
from kd_cache.score.device import resolve_device
from kd_cache.store.index import is_teacher_name
from kd_cache.train.checkpoint_file import checkpoint_limit
from kd_cache.train.job import TrainReport
from kd_cache.train.ranker import EMBEDDINGS
from kd_cache.train.ranking import RankJob, train_ranker
from kd_cache.train.settings import AUGMENTATION, GENTLE, RANK, Settings, Stage

_LEVEL = {"none": 0, "partial": 1, "full": 2}
_LR = 3e-3
_TAKEN = ("output_dir", "resume", "workers", "init", "pairs", "min_agreement", "min_reviewers", "ties", "test_ratio")
_COLUMNS = ("Pairs", "Series", "Accuracy", "95 %", "AUC", "Log loss", "ECE", "Brier")


def rank(run: Run, screen: Screen, target: str) -> Report:
    """Guard, read the pairs, train, measure."""
    values = run.values
    with checkpoint_limit(values["max_checkpoint_bytes"]):
        settings = _settings(run)
        name = values["name"] or (EMBEDDINGS if values["embeddings"] else "end_to_end")
        if not is_teacher_name(name):
            raise UsageError(f"--name {shown(name)} cannot be a folder's name (letters, digits, _ . -)")
        data = data_of(target, values)
        job = RankJob(
            settings=settings,
            data=data,
            device=resolve_device(values["device"]),
            embeddings=tuple(values["embeddings"]),
            record={"options": run.record(), "paths": dict(data.paths)},
            name=name,
            max_pairs_bytes=values["max_manifest_bytes"],
            **{each: values[each] for each in _TAKEN},
        )
        report = train_ranker(job, screen)
    pages = pages_of([report.run], screen, wanted=values["report"])
    return Report({"ranker": report.as_json(), **pages.content}, [*_lines(report), *pages.lines])


def _settings(run: Run) -> Settings:
    """The training's settings, of one stage. Raises `UsageError` for those that contradict each other."""
    values = run.values
    sources, freeze = values["embeddings"], values["freeze"]
    if len(set(sources)) < len(sources):
        raise UsageError(f"the same embeddings are named twice: {', '.join(map(shown, sources))}")
    trunk = [f"--{name}" for name in ("arch", "init") if run.said(name)]
    trunk += [f"--freeze {freeze}"] if freeze in ("none", "partial") else []
    if sources and trunk:
        raise UsageError(
            f"--embeddings and {' and '.join(trunk)} both say what to stand on",
            hint="Embeddings are of frozen nets; leave them out to train the trunk too.",
        )
    if not sources and values["init"] is None and freeze in ("partial", "full"):
        raise UsageError(f"--freeze {freeze} keeps a trunk as it is, and this one is untrained", hint="Pass --init.")
    level, changes = _augmentation(run)
    warm = values["init"] is not None and freeze != "full"
    lr = values["lr"] if values["lr"] is not None else GENTLE if warm else _LR
    taken = {each.name: values[each.name] for each in fields(Settings) if each.name in values}
    taken |= {"arch": EMBEDDINGS if sources else values["arch"], "epochs": None, "lr": None, **changes}
    stage = Stage(0 if sources else _LEVEL[freeze or "none"], values["epochs"], lr, level)
    return Settings(RANK, stages=(stage,), drop_last=values["compile"], **taken)


def _augmentation(run: Run) -> tuple[str, dict[str, float | None]]:
    """The level of a stage, and the changes by name. Without a level those that are given are all there are."""
    values = run.values
    level, given = values["augment"], {option.name: values[option.name] for option in AUGMENTATION}
    if level == "off" and any(value is not None for value in given.values()):
        level, given = "full", {name: value or 0.0 for name, value in given.items()}
    if level != "off" and values["embeddings"]:
        raise UsageError(
            "--embeddings are computed already, so nothing of the clips can be augmented",
            hint="Leave --augment and its options out, or the embeddings, to train the trunk too.",
        )
    return level, given


def _lines(report: TrainReport) -> list[str | Table]:
    results = report.results
    rows, baselines = [], []
    for split in ("validation", "test"):
        figures = results[split]
        if figures is None:
            continue
        rows.append([split, *_cells(figures)])
        baselines += [
            [f"{split}, {name}", percent(one["accuracy"]), _points(one["better_by"]), _range(one["better_by_interval"])]
            for name, one in figures["baselines"].items()
        ]
    return [
        Table(f"Ranker for {report.place} ({report.how}), on series that were not trained on", ["", *_COLUMNS], rows),
        "",
        Table("Baselines", ["", "Accuracy", "The ranker is better by", "95 %"], baselines),
        shown(report.checkpoint),
    ]


def _cells(figures: Mapping[str, Any]) -> list[str]:
    auc = figures["auc"]
    return [
        f"{figures['samples']:,}",
        f"{len(figures['by']['series']):,}",
        percent(figures["accuracy"]),
        _range((figures["intervals"] or {}).get("accuracy")),
        "–" if auc is None else f"{auc:.3f}",
        *(f"{figures[name]:.3f}" for name in ("log_loss", "ece", "brier")),
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _range(interval: tuple[float, float] | None) -> str:
    """Points, of an interval over groups of series."""
    return "–" if interval is None else f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"
