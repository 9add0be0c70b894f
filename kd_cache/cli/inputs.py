"""From options to the data they name: manifest, guard, features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd_cache.cli.teachers import SAMPLE
from kd_cache.features import FeatureSource
from kd_cache.manifest import SOURCE, Manifest, load_manifest
from kd_cache.packed_features import PackedFeatures
from kd_cache.splits import Selection, select, select_source


@dataclass(frozen=True)
class Inputs:
    """A guarded selection and where its features are; ``paths`` are absolute, as later commands can take them."""

    manifest: Manifest
    selection: Selection
    source: FeatureSource
    paths: dict[str, Any]


def inputs_of(target: str, options: Mapping[str, Any]) -> Inputs:
    """Read the manifest and pass it through the guard, before anything else is touched.

    Target ``A`` selects the source alone. ``features`` is one HDF5 file that holds them all; the data root then only
    tells how the manifest's paths are meant.

    Raises what `load_manifest`, `select`, `FeatureSource` and `PackedFeatures` raise.
    """
    json_path = options["json_path"] or SAMPLE / "dataset.json"
    data_root = options["data_root"] or json_path.parent
    features, outside, most = options["features"], options["allow_outside"], options["max_feature_bytes"]
    classes = {name: options[name] for name in ("num_scenes", "num_cities")}
    manifest = load_manifest(json_path, **classes, max_bytes=options["max_manifest_bytes"])
    allowed = {"allow_shared_locations": options["allow_shared_locations"], "data_root": data_root}
    selection = select_source(manifest, **allowed) if target == SOURCE else select(manifest, target, **allowed)
    paths: dict[str, Any] = {
        "json_path": str(json_path.absolute()),
        "data_root": str(data_root.absolute()),
        "allow_outside": [str(path.absolute()) for path in outside],
    }
    if features is None:
        return Inputs(manifest, selection, FeatureSource(data_root, outside, most), paths)
    paths["features"] = str(features.absolute())
    return Inputs(manifest, selection, PackedFeatures(features, most), paths)
