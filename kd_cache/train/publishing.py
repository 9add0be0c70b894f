"""The best weights of a run, put beside the runs of its kind, where others look for them."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_cache.errors import shown
from kd_cache.files.atomic import make_directory, store_errors, write_atomic
from kd_cache.train.checkpoint import checkpoint_names, read_weights, save_checkpoint
from kd_cache.train.job import TrainJob
from kd_cache.train.run_folder import BEST
from kd_cache.watch import Watcher


def publish(job: TrainJob, weights: Path, results: Mapping[str, Any], watcher: Watcher) -> Path:
    """Put ``weights`` beside the runs as ``best.safetensors`` (and ``best.pth``), each whole. Raises `StoreError`."""
    home = job.home
    make_directory(home)
    checkpoint = home / BEST
    with store_errors(weights, "read"):
        content = weights.read_bytes()
    if checkpoint.is_file() and not same_bytes(checkpoint, weights):
        watcher.note(f"{shown(checkpoint)} was of another training, and is replaced")
    write_atomic(checkpoint, content)
    if not job.pth:  # one of other weights must not stand beside it
        with store_errors(home / "best.pth", "remove"):
            (home / "best.pth").unlink(missing_ok=True)
    else:
        held = read_weights(checkpoint)
        beside = {
            "epoch": results.get("best_epoch", 0),
            "optimizer_state_dict": {},
            "val_acc": results["validation"].get("accuracy"),
            "val_loss": results["validation"].get("log_loss"),
        }
        save_checkpoint(home / "best.pth", checkpoint_names(held.tensors), held.record, beside)
    return checkpoint


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are equal. Raises `StoreError`."""
    with store_errors(one, "read"):
        return filecmp.cmp(one, other, shallow=False)
