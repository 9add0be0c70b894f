"""From options to the data they name: manifest, guard, features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_cache.cli import options as opt
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


def load_inputs(
    target: str,
    json_path: Path | None,
    data_root: Path | None,
    features: Path | None = None,
    *,
    num_scenes: int,
    num_cities: int,
    allow_shared_locations: bool,
    allow_outside: Sequence[Path],
    max_manifest_bytes: int = opt.MAX_MANIFEST,
    max_feature_bytes: int = opt.MAX_FEATURE,
) -> Inputs:
    """Read the manifest and pass it through the guard, before anything else is touched.

    Target ``A`` selects the source alone. ``features`` is one HDF5 file that holds them all; the data root then only
    tells how the manifest's paths are meant.

    Raises what `load_manifest`, `select`, `FeatureSource` and `PackedFeatures` raise.
    """
    json_path, data_root = data_paths(json_path, data_root)
    manifest = load_manifest(json_path, num_scenes=num_scenes, num_cities=num_cities, max_bytes=max_manifest_bytes)
    allowed: dict[str, Any] = {"allow_shared_locations": allow_shared_locations, "data_root": data_root}
    selection = select_source(manifest, **allowed) if target == SOURCE else select(manifest, target, **allowed)
    paths: dict[str, Any] = {
        "json_path": str(json_path.absolute()),
        "data_root": str(data_root.absolute()),
        "allow_outside": [str(path.absolute()) for path in allow_outside],
    }
    if features is None:
        return Inputs(manifest, selection, FeatureSource(data_root, allow_outside, max_feature_bytes), paths)
    paths["features"] = str(features.absolute())
    return Inputs(manifest, selection, PackedFeatures(features, max_feature_bytes), paths)


def inputs_of(target: str, options: Mapping[str, Any]) -> Inputs:
    """`load_inputs` with a command's options, by their names."""
    return load_inputs(
        target,
        options["json_path"],
        options["data_root"],
        options["features"],
        **{
            name: options[name]
            for name in (
                "num_scenes",
                "num_cities",
                "allow_shared_locations",
                "allow_outside",
                "max_manifest_bytes",
                "max_feature_bytes",
            )
        },
    )


def data_paths(json_path: Path | None, data_root: Path | None) -> tuple[Path, Path]:
    """Manifest and data root: the sample's where nothing is given, the manifest's folder where only that is."""
    if json_path is None:
        json_path = SAMPLE / "dataset.json"
    return json_path, json_path.parent if data_root is None else data_root
