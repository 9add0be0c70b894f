"""From options to the data set they name."""

from __future__ import annotations

from collections.abc import Mapping
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


def named(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the options say of a data set, as `Dataset.load` takes it; the sample's manifest where none is named."""
    found = {"json_path": options["json_path"] or SAMPLE / "dataset.json", **{name: options[name] for name in _NAMED}}
    return found | ({"rename_map": options["rename_map"]} if "rename_map" in options else {})


def data_of(target: str, options: Mapping[str, Any]) -> Dataset:
    """Read the manifest and pass it through the guard. Raises as `Dataset.load`."""
    return Dataset.load(target, **named(options))
