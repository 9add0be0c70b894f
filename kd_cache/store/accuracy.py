"""The semantic alarm: how often a teacher's cached row names the sample's own scene.

Checksums say that a row is what was written under its key; they cannot say that it belongs there. The share of labelled
source rows whose largest value is their scene label can: it was measured when the rows became current, over labels that
travel with the cache, and logits joined to wrong rows move it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from kd_cache.errors import TeacherError
from kd_cache.keys import KeyFinder
from kd_cache.store.origin import Origin
from kd_cache.store.permitted import Permitted
from kd_cache.store.union import Union

_BLOCK = 65_536
_ENOUGH = 20
ON_ALL = "labelled source rows"
ON_APART = "labelled source rows that it did not train on"
LIKELY_CAUSES = (
    "Likely causes: another class order, another front end or normalisation than it was trained with, swapped axes "
    "([F, T] for [T, F]), or random weights"
)


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``rows`` labelled source rows have their scene as largest class.

    ``measured`` tells these rows from others: the digest of their keys and of the features that were scored. ``of``
    are their numbers among the permitted samples, and ``right`` which of them are correct, where they were counted.
    """

    correct: int
    rows: int
    measured: str = field(default="", compare=False)
    of: np.ndarray | None = field(default=None, compare=False, repr=False)
    right: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def share(self) -> str:
        return f"{100 * self.correct / self.rows:.2f} %" if self.rows else "unknown"

    @property
    def interval(self) -> tuple[float, float]:
        """Between these shares it lies at 95 % (Wilson 1927): ten rows say little."""
        n, z = self.rows, 1.96
        centre, half = self.correct + z * z / 2, z * math.sqrt(self.correct * (n - self.correct) / n + z * z / 4)
        return (centre - half) / (n + z * z), (centre + half) / (n + z * z)

    def __str__(self) -> str:
        return f"{self.share} ({self.correct:,} of {self.rows:,})"

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Accuracy:
        return cls(int(kept["correct"]), int(kept["rows"]))

    def as_json(self) -> dict[str, int]:
        return {"correct": self.correct, "rows": self.rows}


def in_words(name: str, accuracy: Accuracy | None, apart: Accuracy | None) -> list[str]:
    """What a teacher is worth: first on rows that it did not train on, where that is known (``apart``), then on all."""
    told = {ON_APART: apart, ON_ALL: accuracy}
    return [f"{name}: accuracy on {on}: {found}" for on, found in told.items() if found is not None and found.rows]


def near_chance(
    origin: Origin, accuracy: Accuracy | None, cities: Collection[str], apart: Accuracy | None = None
) -> str | None:
    """The warning of a teacher that is hardly better than guessing; ``None`` where it may well be better.

    What it trained on it may know by heart: ``apart``, its accuracy on the other rows, counts too if they are enough.

    It is where even the upper end of the interval is at most two and a half times chance, and at most 15 % of the way
    from chance to one: 23.5 % of ten classes. 17.7 % of 300 rows, which features with swapped axes gave, reach up to
    22.4 %; the weakest teachers in use are above 40 %. Teachers of ``cities`` have no accuracy on scenes.
    """
    if origin.num_classes < 2 or (origin.class_names and set(origin.class_names) <= set(cities)):
        return None
    if apart is not None and apart.rows >= _ENOUGH and (told := _near_chance(origin, apart, ON_APART)) is not None:
        return told
    return None if accuracy is None or not accuracy.rows else _near_chance(origin, accuracy, ON_ALL)


def _near_chance(origin: Origin, accuracy: Accuracy, on: str) -> str | None:
    chance = 1 / origin.num_classes
    low, high = accuracy.interval
    if high > min(2.5 * chance, chance + 0.15 * (1 - chance)):
        return None
    return (
        f"{origin.teacher} is hardly better than guessing: its accuracy on {on} is {accuracy}, at 95 % "
        f"between {100 * low:.1f} and {100 * high:.1f} %; chance is {100 * chance:.1f} %. {LIKELY_CAUSES}"
    )


def below(name: str, accuracy: Accuracy, least: float | None) -> str | None:
    """How a teacher's accuracy falls short of what was asked for; also where there is none to measure."""
    if least is None or (accuracy.rows and accuracy.correct >= least * accuracy.rows):
        return None
    found = str(accuracy) if accuracy.rows else "not known: there are no labelled source rows"
    return f"the accuracy of {name} on labelled source rows is {found}, expected at least {100 * least:g} %"


def refuse_below(name: str, accuracy: Accuracy, least: float | None) -> None:
    """Raise `TeacherError` where a teacher's accuracy is `below` what was asked for."""
    if (why := below(name, accuracy, least)) is not None:
        raise TeacherError(f"{why}; the index stays as it was", hint=f"{LIKELY_CAUSES}.")


def changed_labels(then: Permitted, now: Permitted) -> list[tuple[bytes, int, int]]:
    """Key, label then and label now of each sample permitted both times whose label is another."""
    at = KeyFinder(now.keys).find(then.keys)
    both = np.flatnonzero(at >= 0)
    old, new = then.labels[both], now.labels[at[both]]
    return [
        (then.keys[both[number]].tobytes(), int(old[number]), int(new[number]))
        for number in np.flatnonzero(old != new).tolist()
    ]


def stored_accuracy(entry: Mapping[str, Any]) -> Accuracy | None:
    """What a teacher's index entry says; ``None`` where it says nothing."""
    kept = entry.get("accuracy")
    return None if kept is None else replace(Accuracy.from_json(kept), measured=str(entry.get("measured", "")))


def stored_apart(entry: Mapping[str, Any]) -> Accuracy | None:
    """As `stored_accuracy`, on the rows that the teacher did not train on; ``None`` where that was not known."""
    kept = entry.get("held_out")
    return None if kept is None else Accuracy.from_json(kept)


def measured_apart(
    permitted: Permitted, trained: np.ndarray | None, now: Accuracy, before: Mapping[str, Any]
) -> dict[str, dict[str, int]]:
    """The word ``held_out`` of an entry. Where nobody says what trained the teacher (``trained`` are keys), it is
    what the earlier entry of this fingerprint says of the very same rows.
    """
    if trained is None or now.of is None or now.right is None:
        kept = before.get("held_out") if before.get("measured") == now.measured else None
        return {} if kept is None else {"held_out": kept}
    apart = now.right[KeyFinder(trained).find(permitted.keys[now.of]) < 0]
    return {"held_out": Accuracy(int(apart.sum()), len(apart)).as_json()} if len(apart) else {}


def measure(union: Union | None, permitted: Permitted) -> Accuracy:
    """Accuracy of the rows of a union over the permitted samples that have a label and a row."""
    labelled = np.flatnonzero(permitted.labels >= 0)
    if union is None or not len(labelled) or union.origin.value_kind == "embedding":
        return Accuracy(0, 0)
    labels = permitted.labels[labelled]
    positions = union.find(permitted.keys[labelled])
    there = positions >= 0
    labelled, labels, positions = labelled[there], labels[there], positions[there]
    right, digest = np.zeros(len(labels), bool), xxhash.xxh3_128()
    for at in range(0, len(labels), _BLOCK):
        block = positions[at : at + _BLOCK]
        right[at : at + _BLOCK] = union.origin.decisions(union.take(block)) == labels[at : at + _BLOCK]
        digest.update(np.concatenate([union.keys[block], union.inputs[block]], axis=1).tobytes())
    return Accuracy(int(right.sum()), len(right), digest.hexdigest(), labelled, right)


def alarm(now: Accuracy, entry: Mapping[str, Any]) -> str | None:
    """Why a teacher's rows cannot be those that were dumped; ``None`` where nothing speaks against them.

    Compares only while the same rows are there: lost rows, and rows scored again from another feature, are reported
    elsewhere.
    """
    before = stored_accuracy(entry)
    if before is None or now.measured != before.measured or now.correct == before.correct:
        return None
    return (
        f"its accuracy on labelled source rows was {before} when it was dumped and is {now} now, with the same labels: "
        "logits are joined to wrong rows"
    )
