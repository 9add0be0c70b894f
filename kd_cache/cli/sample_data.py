"""``kd-cache sample-data``: write the embedded sample's manifest and features, or a large one's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kd_cache.commands import Report
from kd_cache.dataset.sample_data import VERSION, write_sample
from kd_cache.errors import UsageError, shown
from kd_cache.options import Target


def sample_data(out: Path, size: Literal["small", "large"], target: Target | None) -> Report:
    """Generate the synthetic sample."""
    if (size == "large") != (target is not None):
        raise UsageError(
            f"--size {size} {'needs' if target is None else 'takes no'} --target",
            hint="kd-cache sample-data DIR is the small sample; kd-cache sample-data DIR --size large --target b has "
            "more clips of b.",
        )
    count = write_sample(out, target)
    lines = [f"{count:,} features and dataset.json written to {shown(out)} (generator version {VERSION})"]
    return Report({"path": str(out), "features": count, "version": VERSION}, lines)
