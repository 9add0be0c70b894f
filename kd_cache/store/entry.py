"""What the index says of a teacher besides its origin and its rows, and which of these words outlive their run.

A dump measures them; a seal, a merge, a repair or a later dump of another teacher carries them over. Where processes
made rows of one fingerprint together, their words are brought together too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Entry = Mapping[str, Any]


def _latest(kept: Any, further: Any) -> Any:
    return further


def _added(kept: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """Costs that two processes measured, each over rows of its own."""
    rows = kept["rows"] + further["rows"]
    added: dict[str, Any] = {}
    for key in kept:
        if key.endswith("_mean"):
            added[key] = (kept[key] * kept["rows"] + further[key] * further["rows"]) / max(rows, 1)
        else:
            added[key] = max(kept[key], further[key]) if key.endswith("_max") else kept[key] + further[key]
    return added


WORDS: Mapping[str, Callable[[Any, Any], Any]] = {
    "source": _latest,
    "adopted": _latest,
    "storage_cost": _added,
    "precision_cost": _added,
    "compiled": lambda kept, further: kept or further,
    "batches_halved_to": min,
}
"""Every word that is carried over, and how two processes' words become one."""


def carried(entry: Entry) -> dict[str, Any]:
    """What of a teacher's entry stays true of its rows, whoever seals, merges or copies them."""
    return {word: entry[word] for word in WORDS if word in entry}


def joined(kept: Entry, further: Entry) -> dict[str, Any]:
    """The words of two entries of one fingerprint, the newer one second."""
    both = carried(kept) | carried(further)
    return both | {word: WORDS[word](kept[word], further[word]) for word in both if word in kept and word in further}
