"""How many samples of which split and device a manifest has, and what the guard could see of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from kd_cache.dataset.manifest import Manifest


def census(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """By device, in the task's order: rows by split, how many have a scene label, and for what the device may be used.

    ``use`` is ``source``, the name of the adaptation that its train rows are permitted in, or ``unseen``.
    """
    task = manifest.task
    splits = Counter((sample.device_id, sample.split) for sample in manifest)
    labelled = Counter(sample.device_id for sample in manifest if sample.scene_label is not None)
    located = Counter(sample.device_id for sample in manifest if sample.location is not None)
    uses = {task.source: "source", **{target: task.adaptation(target) for target in task.targets}}
    return {
        device: {
            "splits": {split: count for (each, split), count in sorted(splits.items()) if each == device},
            "labelled": labelled[device],
            "located": located[device],
            "use": uses.get(device, "unseen"),
        }
        for device in task.devices
        if any(each == device for each, _ in splits)
    }
