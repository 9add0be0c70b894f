"""The page of a cache: what it holds, how good its teachers are where they did not learn, and what made it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kd_cache.commands import Table
from kd_cache.dataset.manifest import Sample
from kd_cache.dataset.provenance import Provenance
from kd_cache.dataset.task_file import recorded_task
from kd_cache.keys import KeyFinder, keys_of
from kd_cache.report.figures import Bar, Line, bars, lines, matrix
from kd_cache.report.of_run import calibration, said
from kd_cache.report.page import Figure, Page, Section
from kd_cache.score.storage_cost import log_softmax
from kd_cache.store.accuracy import Accuracy
from kd_cache.store.origin import Origin
from kd_cache.store.permitted import NO_LABEL, Permitted
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.union import Union
from kd_cache.train.evaluation import reliability

_BLOCK: Final = 65_536
HELD_OUT, TRAINED, UNKNOWN = "held out", "trained", "not known"
_BARS: Final = 20
"""Of a histogram of confidences."""


@dataclass(frozen=True)
class Judged:
    """A teacher's rows of the N permitted samples.

    Attributes:
        there: ``[N]`` bool, whether it has a row.
        decision: ``[N]`` its largest class.
        confidence: ``[N]`` its highest probability; ``None`` of values that no probability follows from.
        classifies: whether its classes are those that the labels name.
        kind: ``[N]``, of labelled source rows: `HELD_OUT`, `TRAINED`, or `UNKNOWN`; of all others "".
        chose_epoch: ``[N]`` bool, whether it validated the teacher.
    """

    there: np.ndarray
    decision: np.ndarray
    confidence: np.ndarray | None
    classifies: bool
    kind: np.ndarray
    chose_epoch: np.ndarray

    def rows(self, kind: str) -> np.ndarray:
        return np.flatnonzero(self.there & (self.kind == kind))

    def told(self, kind: str) -> str:
        """What the rows of a kind are to it."""
        words = {HELD_OUT: "held out from training", TRAINED: "trained on", UNKNOWN: "perhaps trained on: not known"}
        chose = int(self.chose_epoch[self.rows(kind)].sum()) if kind == HELD_OUT else 0
        return words[kind] + (f", {chose:,} used to choose the epoch" if chose else "")

    def accuracy(self, labels: np.ndarray, kind: str) -> Accuracy:
        mine = self.rows(kind)
        return Accuracy(int((self.decision[mine] == labels[mine]).sum()), len(mine))

    @property
    def best_kind(self) -> str:
        """The rows that tell most of it: those that it did not train on."""
        return next((kind for kind in (HELD_OUT, UNKNOWN, TRAINED) if len(self.rows(kind))), HELD_OUT)


def cache_page(
    snapshot: Snapshot, provenances: Mapping[str, Provenance | None], samples: Sequence[Sample] | None = None
) -> Page:
    """What a finished cache holds.

    Args:
        provenances: by teacher what it says of its training; of one that is not there nothing is known.
        samples: the permitted samples, for their devices; ``None`` where the manifest is gone.

    Raises:
        MissingLogitsError, CorruptError, StaleError, StoreError: as reading it.
    """
    index = snapshot.finished()
    unions = {name: snapshot.union_of(*snapshot.served_packs(name)) for name in index.origins}
    permitted = snapshot.permitted or _without_labels(unions)
    record, labels = index.record, permitted.labels
    name = str(record.get("adaptation", snapshot.folder.path.name))
    cities = recorded_task(record).cities
    judged = {each: _judged(union, permitted, provenances.get(each), cities) for each, union in unions.items()}
    complete = np.logical_and.reduce([each.there for each in judged.values()]) if judged else np.zeros(len(permitted))
    held = _held(record, permitted, complete, samples)
    accuracy = {
        teacher: {kind: found for kind in (HELD_OUT, TRAINED, UNKNOWN) if (found := each.accuracy(labels, kind)).rows}
        for teacher, each in judged.items()
        if each.classifies
    }
    bins = {teacher: _reliability(each, labels) for teacher, each in judged.items() if teacher in accuracy}
    bins = {teacher: each for teacher, each in bins.items() if each}
    lead = [
        f"{int(complete.sum()):,} of {len(permitted):,} permitted samples have a row of every teacher: "
        f"{', '.join(judged)}.",
        f"Made {record['created']} by {record['tool']}.",
    ]
    sections = [
        Section("What it holds", _holding(held)),
        Section("How good its teachers are", [*_accuracies(judged, accuracy), *_calibrations(judged, bins)]),
        Section("How sure they are, and whether they agree", [*_confidences(judged, labels), *_agreement(judged)]),
        Section("What storing and computing in fewer bits cost", [_costs(record["teachers"], index.origins)]),
        Section("What made it", _made(record)),
    ]
    content = {
        "subject": "cache",
        "path": str(snapshot.folder.path),
        "devices": held,
        "accuracy": {
            teacher: {kind: {**each.as_json(), "interval": each.interval} for kind, each in found.items()}
            for teacher, found in accuracy.items()
        },
        "reliability": bins,
        "agreement": {a: {b: agreement(judged[a], judged[b]) for b in judged} for a in judged},
        "made": {name: value for name, value in record.items() if name != "plan"},
    }
    return Page(f"Cache {name}", lead, [section for section in sections if section.parts], content)


def _without_labels(unions: Mapping[str, Union]) -> Permitted:
    """Of a cache of kd-cache 0.1, which wrote no list of them: every sample that has a row, and no labels."""
    keys = np.unique(np.concatenate([union.keys for union in unions.values()]), axis=0)
    return Permitted.of(keys, np.full(len(keys), NO_LABEL))


def _judged(union: Union, permitted: Permitted, made: Provenance | None, cities: Collection[str]) -> Judged:
    origin, count = union.origin, len(permitted)
    at = union.find(permitted.keys)
    has_probabilities = origin.value_kind in ("logits", "log_probs", "probs")
    decision, confidence = np.full(count, -1), np.zeros(count)
    there = np.flatnonzero(at >= 0)
    if origin.value_kind != "embedding":
        for start in range(0, len(there), _BLOCK):
            block = there[start : start + _BLOCK]
            if origin.topk is not None:
                rows = origin.topk.split(union.take(at[block]))
                decision[block], confidence[block] = rows["ids"][:, 0], np.exp(rows["log_probs"][:, 0], dtype="f8")
                continue
            values = origin.as_clips(union.take(at[block])).astype(np.float64)
            decision[block] = values.argmax(axis=1)
            if has_probabilities:
                probs = values if origin.value_kind == "probs" else np.exp(log_softmax(values))
                confidence[block] = np.clip(probs.max(axis=1), 0, 1)
    kind = np.where(permitted.labels >= 0, UNKNOWN, "")
    chose_epoch = np.zeros(count, bool)
    if made is not None:
        chose_epoch = KeyFinder(made.validated).find(permitted.keys) >= 0
        trained = KeyFinder(made.trained).find(permitted.keys) >= 0
        kind[(kind != "") & trained] = TRAINED
        if made.complete:
            kind[kind == UNKNOWN] = HELD_OUT
    classifies = origin.value_kind != "embedding" and not (
        origin.class_names and set(origin.class_names) <= set(cities)
    )
    return Judged(at >= 0, decision, confidence if has_probabilities else None, classifies, kind, chose_epoch)


def agreement(one: Judged, other: Judged) -> float | None:
    """The share of rows that both have and name the same class of; ``None`` without any, or of other classes."""
    both = one.there & other.there & (one.decision >= 0) & (other.decision >= 0)
    if not both.any() or one.classifies != other.classifies:
        return None
    return float((one.decision[both] == other.decision[both]).mean())


def _reliability(judged: Judged, labels: np.ndarray) -> list[dict[str, float]]:
    mine = judged.rows(judged.best_kind)
    if judged.confidence is None or not len(mine):
        return []
    return reliability(judged.confidence[mine], judged.decision[mine] == labels[mine])


def _held(
    record: Mapping[str, Any], permitted: Permitted, complete: np.ndarray, samples: Sequence[Sample] | None
) -> dict[str, dict[str, int | None]]:
    """By device how many samples are permitted, and how many of them have a row of every teacher."""
    held: dict[str, dict[str, int | None]] = {}
    for device, count in record["per_device"].items():
        rows = None
        if samples is not None:
            keys = keys_of(sample.file for sample in samples if sample.device_id == device)
            at = KeyFinder(permitted.keys).find(keys)
            rows = int(complete[at[at >= 0]].sum())
        held[device] = {"permitted": count, "rows": rows}
    return held


def _holding(held: Mapping[str, Mapping[str, int | None]]) -> list[str | Table | Figure]:
    series: dict[str, dict[str, Bar]] = {"permitted": {}, "with a row of every teacher": {}}
    rows = []
    for device, each in held.items():
        for name, count in zip(series, each.values(), strict=True):
            if count is not None:
                series[name][device] = Bar(count)
        rows.append([device, *("not known" if count is None else f"{count:,}" for count in each.values())])
    if not rows:
        return ["Nobody says which devices its samples are of."]
    drawn = bars({name: each for name, each in series.items() if each}, "device", "samples")
    return [
        Figure(drawn, "Coverage by device"),
        Table("", ["Device", "Permitted", "With a row of every teacher"], rows),
    ]


def _accuracies(
    judged: Mapping[str, Judged], accuracy: Mapping[str, Mapping[str, Accuracy]]
) -> list[str | Table | Figure]:
    if not any(accuracy.values()):
        return ["No source row has a label, so no accuracy is known."]
    series: dict[str, dict[str, Bar]] = {}
    rows = []
    for kind in (HELD_OUT, TRAINED, UNKNOWN):  # held out first
        for name, of in accuracy.items():
            if kind in of:
                low, high = of[kind].interval
                share = 100 * of[kind].correct / of[kind].rows
                series.setdefault(f"{kind} rows", {})[name] = Bar(share, (100 * low, 100 * high))
                told = judged[name].told(kind)
                rows.append([name, told, f"{of[kind].rows:,}", of[kind].share, f"{100 * low:.1f} – {100 * high:.1f}"])
    told = (
        "On labelled source rows, with intervals of 95 % (Wilson). On rows that it trained on a teacher looks better "
        "than it is."
    )
    drawn = bars(series, "teacher", "accuracy (%)", 100)
    table = Table("", ["Teacher", "Its rows", "Rows", "Accuracy", "95 %"], rows)
    return [Figure(drawn, "Accuracy of the teachers", told), table]


def _calibrations(
    judged: Mapping[str, Judged], bins: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[str | Table | Figure]:
    if not bins:
        return []
    errors = {
        name: sum(each["count"] * abs(each["accuracy"] - each["confidence"]) for each in mine)
        / sum(each["count"] for each in mine)
        for name, mine in bins.items()
    }
    rows = "; ".join(f"{name}: rows {judged[name].told(judged[name].best_kind)}" for name in bins)
    diagram = calibration(bins, errors)[0]
    return [Figure(diagram.svg, diagram.title, f"{diagram.told} Measured on, of {rows}.")]


def _confidences(judged: Mapping[str, Judged], labels: np.ndarray) -> list[str | Table | Figure]:
    edges, found = np.linspace(0, 1, _BARS + 1), []
    for name, each in judged.items():
        if each.confidence is None:
            continue
        sides = {f"source, {kind}": each.rows(kind) for kind in (HELD_OUT, TRAINED, UNKNOWN)}
        sides["without a label"] = np.flatnonzero(each.there & (labels < 0))
        series = {
            side: Line(
                (100 * edges).tolist(),
                (100 * np.histogram(each.confidence[rows], edges)[0] / len(rows)).tolist(),
                steps=True,
            )
            for side, rows in sides.items()
            if len(rows)
        }
        if series:
            drawn = lines(series, "confidence (%)", "rows (%)")
            found.append(Figure(drawn, f"Confidence of {name}", "Its highest probability at temperature 1."))
    return [*found]


def _agreement(judged: Mapping[str, Judged]) -> list[str | Table | Figure]:
    names = [name for name, each in judged.items() if (each.decision >= 0).any() and each.classifies]
    if len(names) < 2:
        return []
    shares = [[100 * (agreement(judged[a], judged[b]) or 0) for b in names] for a in names]
    told = "The share of samples, source and target, of which both name the same class."
    drawn = matrix(shares, names, "teacher", "teacher", "% of the samples", 100)
    rows = [[name, *(f"{share:.1f} %" for share in of)] for name, of in zip(names, shares, strict=True)]
    return [Figure(drawn, "Agreement of the teachers", told), Table("Agreement", ["", *names], rows)]


def _costs(entries: Mapping[str, Mapping[str, Any]], origins: Mapping[str, Origin]) -> Table:
    rows = []
    for name, entry in entries.items():
        costs = [said(entry.get(cost) or {}) for cost in ("storage_cost", "precision_cost")]
        size = origins[name].width * origins[name].stored.itemsize
        rows.append([name, entry["dtype"], f"{size:,}", costs[0], entry["parts"]["precision"], costs[1]])
    columns = ["Teacher", "Stored as", "Bytes a row", "Its cost", "Computed in", "Its cost against fp32"]
    return Table("", columns, rows)


def _made(record: Mapping[str, Any]) -> list[str | Table | Figure]:
    entries, settings = record["teachers"], record["settings"]
    parts = list(dict.fromkeys(part for entry in entries.values() for part in entry["parts"]))
    prints = [["fingerprint", *(entry["fingerprint"] for entry in entries.values())]]
    prints += [[part, *(_part(entry["parts"].get(part, "–")) for entry in entries.values())] for part in parts]
    given = [
        [name, said(settings["values"][name])]
        for name, source in settings.get("sources", {}).items()
        if source != "default" and name in settings["values"]
    ]
    tables = [
        Table("Everything that made a teacher's numbers", ["Part", *entries], prints),
        Table("Versions", ["Of", "Version"], [[name, said(value)] for name, value in record["environment"].items()]),
        Table("Manifest", ["Of", "Value"], [[name, said(value)] for name, value in record["manifest"].items()]),
    ]
    return [*tables, Table("Options that were given", ["Option", "Value"], given)] if given else [*tables]


def _part(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return ", ".join(map(str, value)) if isinstance(value, list) else text
