"""What the guard saw: a table of what is in a manifest and may be used for what, and what could not be checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from kd_cache.commands import Table
from kd_cache.dataset.guard import Look, Selection
from kd_cache.dataset.manifest import LISTS, Manifest
from kd_cache.errors import shown
from kd_cache.prepare.census import census


def guard_table(manifest: Manifest) -> Table:
    """Rows by device and split, how many are labelled and located, and the use of each device's train rows."""
    counted = census(manifest)
    splits = [*LISTS, *sorted({split for each in counted.values() for split in each["splits"]} - {*LISTS})]
    splits = [split for split in splits if any(split in each["splits"] for each in counted.values())]
    total: Counter[str] = Counter()
    rows = []
    for device, each in counted.items():
        cells = {**each["splits"], "labelled": each["labelled"], "located": each["located"]}
        total.update(cells)
        rows.append([device, *(f"{cells.get(name, 0):,}" for name in (*splits, "labelled", "located")), each["use"]])
    rows.append(["all", *(f"{total[name]:,}" for name in (*splits, "labelled", "located")), ""])
    columns = ["Device", *(split.capitalize() for split in splits), "Labelled", "Location known", "Train rows are for"]
    return Table(f"{shown(manifest.path)}: {len(manifest):,} samples", columns, rows)


def guard_notes(seen: Selection | Look) -> Iterator[str]:
    """What the guard could not check, or was told to let pass."""
    group = seen.task.group
    word = "recording location" if group == "location" else group
    if seen.located < seen.locatable:
        unknown = seen.locatable - seen.located
        yield (
            f"{unknown:,} of {seen.locatable:,} train and test rows name no {word}: whether they share one "
            "cannot be checked"
        )
    if seen.shared_locations:
        yield f"{len(seen.shared_locations):,} train samples share a {group} with test, as you allowed"
