"""What is written down with a training: its key's parts, its settings, and what its checkpoints say of themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import UsageError
from kd_cache.score.device import environment
from kd_cache.store.origin import canonical_json
from kd_cache.train.architectures import ARCHITECTURE_VERSION
from kd_cache.train.checkpoint_file import MOST_RECORD
from kd_cache.train.clips import Clips, class_names
from kd_cache.train.job import TrainJob
from kd_cache.train.nets import WarmStart
from kd_cache.train.settings import Stage


def key_parts(
    job: TrainJob,
    train: Clips,
    validation: Clips,
    stages: Sequence[Stage],
    start: WarmStart | None,
    own_code: list[str] | None,
    code: str,
) -> dict[str, Any]:
    """Everything that the weights depend on, in words, by what it is about. ``code`` is the version of what trains."""
    label, where = job.settings.label, environment(job.device)
    parts = {
        **job.settings.key_parts(),
        "data": {"train": train.digest(label), "validation": validation.digest(label)},
        "selection": {"target": job.data.target},
        "stages": [asdict(stage) for stage in stages],
        "net": own_code,
        "cached_features": job.cached_features,
        "start": None if start is None else {"kind": start.kind, "sha256": start.sha256},
        "code": code,
        "environment": {name: where[name] for name in ("device", "instruction_set", "torch", "cuda")}
        | _threads_or_cudnn(job.device),
        "storage": "float16" if job.half else "float32",
    }
    found: dict[str, Any] = json.loads(canonical_json(parts))  # as an entry's file gives them back
    return found


def _threads_or_cudnn(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"threads": torch.get_num_threads()}
    return {"cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]


def run_config(job: TrainJob, stages: Sequence[Stage]) -> dict[str, Any]:
    """Every setting as resolved, for the run's folder."""
    settings = asdict(job.settings)
    settings["mlp_hidden_dims"] = list(job.settings.mlp_hidden_dims or ())
    del settings["stages"]
    return {
        "settings": settings,
        "stages": [asdict(stage) for stage in stages],
        "place": job.place,
        "manifest_sha256": job.data.manifest.digest,
    }


def checkpoint_record(
    job: TrainJob, architecture: str | None, made: Provenance, stages: Sequence[Stage], key: str, code: str
) -> dict[str, Any]:
    """What each checkpoint of a run says of itself. Raises `UsageError` where too many samples made it to name them."""
    settings, samples = job.settings, len(made.trained) + len(made.validated)
    most = MOST_RECORD[".pth" if job.pth else ".safetensors"] // 22 - 1000
    if samples > most:  # now, not after the last epoch
        raise UsageError(
            f"{samples:,} samples would make this teacher, and a checkpoint can name {most:,}",
            hint="Leave out --pth, whose files hold less, or use --quick-experiment.",
        )
    return {
        "architecture": architecture,
        "architecture_version": ARCHITECTURE_VERSION,
        "role": settings.role,
        "class_names": class_names(settings.label, settings.num_classes),
        "value_kind": "logits",
        "feature_spec": settings.feature_spec or None,
        "provenance": made.as_json(),
        "training": {
            "key": key,
            "place": job.place,
            "manifest_sha256": job.data.manifest.digest,
            "seed": settings.seed,
            "stages": [asdict(stage) for stage in stages],
            "code": code,
        },
    }
