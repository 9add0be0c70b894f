"""The page of a training's run folder, a teacher's or a student's: curves, results, confusion, calibration."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from kd_cache.commands import Table
from kd_cache.files.atomic import open_file, store_errors
from kd_cache.files.strict_json import strict_json
from kd_cache.report.figures import Bar, Line, bars, lines, matrix
from kd_cache.report.page import Figure, Page, Section, as_written_by
from kd_cache.train.evaluation import GROUPS
from kd_cache.train.run_folder import CONFIG, HISTORY, RESULTS, STEPS
from kd_cache.train.settings import RANK

_MOST: Final = 1 << 28
_KINDS: Final = {
    "device": "Device",
    "device_group": "Device group",
    "city": "City",
    "scene": "Scene",
    "series": "Series",
}
_MOST_BARS: Final = 40
"""More groups have a table alone."""
_STEPS_DRAWN: Final = 2000
"""Of more steps only every so many is drawn."""


def run_folder(path: Path) -> Path | None:
    """The run that a person means: that folder, or the newest finished run in its ``runs``; ``None`` without one."""
    if (path / CONFIG).is_file() and (path / HISTORY).is_file():
        return path
    runs = sorted((each.parent for each in path.glob(f"runs/*/{HISTORY}")), reverse=True)
    done = [run for run in runs if (run / RESULTS).is_file()]
    return next(iter([*done, *runs]), None)


def run_page(folder: Path) -> Page:
    """What a run came to. Raises `CorruptError` for files that are not as a training writes them."""
    with as_written_by("train", folder):
        return _page(folder)


def _page(folder: Path) -> Page:
    config = yaml.safe_load(_read(folder / CONFIG))
    history, steps = _rows(folder / HISTORY), _rows(folder / STEPS)
    results = strict_json(_read(folder / RESULTS)) if (folder / RESULTS).is_file() else None
    distilled = (results or config).get("distillation")
    what = f"Student ({distilled['mode']})" if distilled else _net(config["settings"]["role"])
    sections = []
    if results is None:
        lead = ["This run is not finished: there are no results yet."]
    else:
        measured = {split: each for split in ("test", "validation") if (each := results[split] or {}).get("samples")}
        sections = [_measured(split, each, drawn=split in list(measured)[:1]) for split, each in measured.items()]
        lead = _lead(results, *next(iter(measured.items()), ("", None)))
    sections.append(Section("Training", _curves(history, steps)))
    sections.append(Section("What made it", [_settings(config, distilled)]))
    content = {"subject": "run", "path": str(folder), "results": results, "history": history}
    return Page(f"{what[0].upper()}{what[1:]} {config['place']}", lead, sections, content)


def _net(role: str) -> str:
    return "ranker" if role == RANK else f"{role} teacher"


def _lead(results: Mapping[str, Any], split: str, measured: Mapping[str, Any] | None) -> list[str]:
    if measured is None:
        return ["No row with a label was measured."]
    rows, places = results.get("units", ("rows", "locations"))
    lead = [
        f"{_percent(measured['accuracy'])} of {measured['samples']:,} {split} {rows} are right"
        f"{_span(measured)}; chance is {_percent(results['chance'])}.",
        f"The epoch that is kept is {results['best_epoch']} of {results['epochs']}, chosen by the validation {rows}"
        f" ({results['locations']['validation']:,} {places} that were not trained on).",
    ]
    lead += [
        f"That is {100 * one['better_by']:+.1f} points against guessing {name} ({_percent(one['accuracy'])})."
        for name, one in measured.get("baselines", {}).items()
    ]
    if results["shuffled_labels"]:
        lead.append("Its labels were shuffled: this is a control, and it should be no better than chance.")
    return lead


def _measured(split: str, measured: Mapping[str, Any], *, drawn: bool) -> Section:
    columns = ["Rows", "Accuracy", "95 %", "Macro", "Log loss", "ECE", "Brier"]
    parts: list[str | Table | Figure] = [Table("", ["", *columns], [_cells("all", measured)])]
    groups = {name: measured["by"][kind] for kind, name in _KINDS.items() if measured["by"].get(kind)}
    groups = {name: dict(sorted(each.items(), key=lambda item: _order(item[0]))) for name, each in groups.items()}
    if drawn:
        parts += [_by(name, each) for name, each in groups.items() if 1 < len(each) <= _MOST_BARS]
        shares = [[100 * count / (sum(row) or 1) for count in row] for row in measured["confusion"]]
        told = "Of the rows of each class (down) the share that is named so (across)."
        confusion = matrix(shares, measured["class_names"], "named", "class", "% of the class's rows", 100)
        parts.append(Figure(confusion, "Confusion", told))
        if bins := measured.get("reliability"):
            parts += calibration({split: bins}, {split: measured["ece"]})
    parts += [Table("", [name, *columns], [_cells(*item) for item in each.items()]) for name, each in groups.items()]
    if (crossed := measured.get("device_by_class")) and len(crossed["classes"]) <= _MOST_BARS:
        rows = zip(crossed["devices"], crossed["accuracy"], strict=True)
        cells = [[device, *("–" if each is None else _percent(each) for each in shares)] for device, shares in rows]
        parts.append(Table("Accuracy by device and class", ["Device", *crossed["classes"]], cells))
    heading = {"test": "Test, measured once, at the end", "validation": "Validation, which chose the epoch"}[split]
    return Section(heading, parts)


def calibration(bins: Mapping[str, Sequence[Mapping[str, float]]], errors: Mapping[str, float]) -> list[Figure]:
    """A reliability diagram, and how sure the rows are, by name. ``bins`` as `Metrics.reliability`."""
    curves = {
        name: Line([100 * each["confidence"] for each in mine], [100 * each["accuracy"] for each in mine])
        for name, mine in bins.items()
    }
    sure = {}
    for name, mine in bins.items():
        count = round(1 / (mine[0]["high"] - mine[0]["low"]))
        total, shares = sum(each["count"] for each in mine), [0.0] * count
        for each in mine:
            shares[round(each["low"] * count)] = 100 * each["count"] / total
        sure[name] = Line([100 * edge / count for edge in range(count + 1)], shares, steps=True)
    told = "; ".join(f"{name}: ECE {error:.3f}" for name, error in errors.items())
    return [
        Figure(
            lines(curves, "confidence (%)", "accuracy (%)", unit=True), "Calibration",
            f"Below the diagonal it is surer than it is right. {told}.",
        ),
        Figure(lines(sure, "confidence (%)", "rows (%)"), "Confidence", "How sure it is, as a share of the rows."),
    ]  # fmt: skip


def _by(name: str, groups: Mapping[str, Mapping[str, Any]]) -> Figure:
    accuracies = {group: Bar(100 * each["accuracy"], _interval(each)) for group, each in groups.items()}
    told = "With intervals of 95 %, by drawing whole locations." if any(map(_interval, groups.values())) else ""
    return Figure(
        bars({"accuracy": accuracies}, name.lower(), "accuracy (%)", 100), f"Accuracy by {name.lower()}", told
    )


def _order(name: str) -> tuple[int, str]:
    return (GROUPS.index(name) if name in GROUPS else 0, name)


def _interval(measured: Mapping[str, Any]) -> tuple[float, float] | None:
    low, high = (measured.get("intervals") or {}).get("accuracy", (None, None))
    return None if low is None else (100 * low, 100 * high)


def _span(measured: Mapping[str, Any]) -> str:
    interval = _interval(measured)
    return "" if interval is None else f" (95 %: {interval[0]:.1f} to {interval[1]:.1f} %)"


def _cells(name: str, measured: Mapping[str, Any]) -> list[str]:
    interval = _interval(measured)
    return [
        name,
        f"{measured['samples']:,}",
        _percent(measured["accuracy"]),
        "–" if interval is None else f"{interval[0]:.1f} – {interval[1]:.1f}",
        _percent(measured["macro_accuracy"]),
        *(f"{measured[figure]:.3f}" for figure in ("log_loss", "ece", "brier")),
    ]


def _curves(history: Sequence[Mapping[str, float]], steps: Sequence[Mapping[str, float]]) -> list[str | Table | Figure]:
    if not history:
        return ["No epoch is finished."]
    epochs = [float(number) for number in range(1, len(history) + 1)]
    begins = [
        number + 0.5 for number in range(1, len(history)) if history[number]["stage"] != history[number - 1]["stage"]
    ]
    told = "A dotted upright is where a stage begins." if begins else ""

    def curve(names: Mapping[str, str], y: str, scale: float = 1) -> str:
        drawn = {name: Line(epochs, [scale * row[column] for row in history]) for name, column in names.items()}
        return lines(drawn, "epoch", y, marks=begins)

    losses = {"training": "train_loss", "validation": "val_log_loss"}
    shares = {"accuracy": "val_accuracy", "macro accuracy": "val_macro_accuracy"}
    parts: list[str | Table | Figure] = [
        Figure(curve(losses, "loss (nats)"), "Loss by epoch", told),
        Figure(curve(shares, "validation rows (%)", 100), "Validation accuracy by epoch", told),
    ]
    if kept := steps[:: -(-len(steps) // _STEPS_DRAWN) or 1]:
        rates = {"learning rate": Line([float(at) for at in _places(kept, steps)], [row["lr"] for row in kept])}
        parts.append(Figure(lines(rates, "step", "learning rate", plain=True), "Learning rate by step"))
    return parts


def _places(kept: Sequence[Mapping[str, float]], steps: Sequence[Mapping[str, float]]) -> range:
    """Steps count anew in each stage; here they are numbered through."""
    return range(0, len(steps), -(-len(steps) // max(len(kept), 1)))[: len(kept)]


def _settings(config: Mapping[str, Any], distilled: Mapping[str, Any] | None) -> Table:
    told = {**config["settings"], **{f"stage {n}": stage for n, stage in enumerate(config["stages"], start=1)}}
    if distilled:
        told |= {"mode": distilled["mode"], **distilled["recipe"], "teachers": distilled["teachers"]}
        told |= {name: distilled[name] for name in ("weights", "fitted_on") if name in distilled}
    told |= {name: config[name] for name in ("key", "manifest_sha256") if name in config}
    return Table("", ["Setting", "Value"], [[name, said(value)] for name, value in told.items()])


def said(value: Any) -> str:
    """A value of a setting, for a person."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {said(each)}" for name, each in value.items()) or "–"
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value in (None, "", []) else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _read(path: Path) -> bytes:
    with store_errors(path, "read"), open_file(path) as file:
        return file.read(_MOST)


def _rows(path: Path) -> list[dict[str, float]]:
    """A table of numbers, row by row; none where it is not there."""
    rows = csv.DictReader(_read(path).decode().splitlines()) if path.is_file() else ()
    found = [{name: float(value) for name, value in row.items()} for row in rows]
    if not all(math.isfinite(value) for row in found for value in row.values()):
        raise ValueError(f"{path.name} holds numbers that are not finite")
    return found
