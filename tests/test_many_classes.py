"""More classes than the task's ten, from the dump to the student."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import Run, World

from kd_cache import student_loader

WIDE = """
import torch

class Wide(torch.nn.Module):
    num_classes, value_kind = 100, "logits"

    def forward(self, features):
        return features.mean(dim=1)[:, :1] * torch.arange(100.0)

    def fingerprint_parts(self):
        return {"architecture": "wide/1", "weights": "none"}

def wide(ckpt):
    return Wide()
"""


def test_a_student_of_more_classes_than_ten_needs_no_further_word(run: Run, world: World) -> None:
    for number, row in enumerate(world.rows):
        row["scene_label"] = 80 + number % 7
    world.write()
    Path("wide.py").write_text(WIDE)
    own = ("--teacher", "wide=wide.py:wide", "--only", "wide", "--num-scenes", 100)
    assert run("dump", "--target", "b", "--json-path", world.json_path, *own).exit_code == 0
    (batch,) = student_loader(world.json_path, world.root, world.cache, 32)
    assert batch["teacher_logits"].shape == (20, 1, 100)
    assert torch.equal(batch["scene_label"] >= 80, batch["source_mask"])
