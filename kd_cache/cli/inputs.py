"""From options to the data set they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_cache.cli.teachers import SAMPLE
from kd_cache.dataset.dataset import Dataset

_NAMED = (
    "data_root",
    "features",
    "num_scenes",
    "num_cities",
    "allow_shared_locations",
    "allow_outside",
    "max_manifest_bytes",
    "max_feature_bytes",
)


def data_of(target: str, options: Mapping[str, Any]) -> Dataset:
    """Read the manifest, the sample's where none is named, and pass it through the guard. Raises as `Dataset.load`."""
    json_path: Path | None = options["json_path"]
    return Dataset.load(target, json_path or SAMPLE / "dataset.json", **{name: options[name] for name in _NAMED})
