"""``kd-cache sample-data``: write the embedded sample's manifest and features."""

from __future__ import annotations

from pathlib import Path

from kd_cache.commands import Report
from kd_cache.dataset.sample_data import write_sample
from kd_cache.errors import shown


def sample_data(out: Path) -> Report:
    """Generate the synthetic sample."""
    write_sample(out)
    count = sum(1 for _ in (out / "features").glob("*.npy"))
    lines = [f"{count:,} features and dataset.json written to {shown(out)}"]
    return Report({"path": str(out), "features": count}, lines)
