"""The guard's table: what is in a manifest, and what each device may be used for."""

from __future__ import annotations

from collections import Counter

from kd_cache.commands import Table
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
