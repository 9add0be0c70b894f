"""What a trained teacher is worth, by group: on the validation locations, and on ``test``, which chose nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.manifest import Manifest, Sample
from kd_cache.dataset.task import DCASE
from kd_cache.train.clips import Clips, class_names
from kd_cache.train.inference import score
from kd_cache.train.metrics import measure, measure_groups
from kd_cache.train.settings import Settings
from kd_cache.watch import Watcher

GROUPS: Final = ("source", "target", "other", "unseen")
"""Devices by what they are to the teacher: A, the target, the other devices of the training sets, s4 to s6."""


def evaluated(net: nn.Module, clips: Clips, settings: Settings, target: str, device: torch.device) -> dict[str, Any]:
    """Metrics over the clips that have a label, as JSON values: of all, and by device, device group and city."""
    labels = clips.labels(settings.label).numpy()
    labelled = clips.part(np.flatnonzero(labels >= 0).tolist())
    if not len(labelled):
        return {"samples": 0}
    logits = score(net, labelled, device, settings.batch_size)
    labels = labelled.labels(settings.label).numpy()
    groups = {
        "device": [sample.device_id for sample in labelled.samples],
        "device_group": [group_of(sample, target) for sample in labelled.samples],
        "city": [_city(sample) for sample in labelled.samples],
    }
    return {
        **measure(logits, labels).as_json(),
        "class_names": class_names(settings.label, settings.num_classes),
        "by": measure_groups(logits, labels, groups),
    }


def group_of(sample: Sample, target: str) -> str:
    """One of `GROUPS`."""
    if sample.device_id == DCASE.source:
        return "source"
    if sample.device_id == target:
        return "target"
    return "unseen" if sample.device_id in DCASE.unseen else "other"


def _city(sample: Sample) -> str:
    label = sample.city_label
    return "not known" if label is None else DCASE.city(label)


def test_clips(manifest: Manifest, source: FeatureSource, workers: int, watcher: Watcher) -> Clips:
    """The manifest's test samples, for the report after everything is chosen. Raises `FeatureError`."""
    return Clips.read(source, [sample for sample in manifest if sample.split == "test"], workers, watcher)


def headline(results: Mapping[str, Any], what: str = "accuracy") -> dict[str, float | None]:
    """Accuracy on the validation locations and on the test clips of source and target."""
    found: dict[str, float | None] = {"validation": results["validation"].get(what)}
    groups = (results.get("test") or {}).get("by", {}).get("device_group", {})
    for group in ("source", "target"):
        found[f"test, {group}"] = groups.get(group, {}).get(what)
    return found
