"""A manifest, files and a task of one's own, from the command line: float waveforms [N], 1000 classes."""

import json
from pathlib import Path

import numpy as np
import torch

from kd_cache import student_loader
from kd_cache.cli import app
from kd_cache.distill import kl


class Wave(torch.nn.Linear):
    num_classes, value_kind = 1000, "logits"

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        return super().forward(waves.reshape(len(waves), -1, 160).mean(dim=1))

    def fingerprint_parts(self) -> dict[str, str]:
        return {"architecture": "wave/1"}


def teacher(checkpoint: Path | None) -> Wave:
    torch.manual_seed(0)
    return Wave(160, 1000)


if __name__ == "__main__":
    rows = [{"file": f"{number}.npy", "label": number * 7 % 1000} for number in range(120)]
    for number, row in enumerate(rows):
        np.save(row["file"], np.random.default_rng(number).random(1600, np.float32))
    Path("dataset.json").write_text(json.dumps({"train": rows[:100], "test": rows[100:]}))
    Path("task.yaml").write_text("name: words\nclasses: 1000\n")
    own = ["--task", "task.yaml", "--json-path", "dataset.json", "--teacher", f"wave={__file__}:teacher"]
    app(["dump", *own], standalone_mode=False)  # verifies ten rows
    app(["verify", "cache/words", "--all", *own[4:]], standalone_mode=False)  # its task is in the cache
    for batch in student_loader("dataset.json", ".", "cache/words", batch_size=32):
        kl(Wave(160, 1000)(batch["features"]), batch["teacher_logits"][:, 0]).mean().backward()
