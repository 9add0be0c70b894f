"""A small gallery to rank in: series of images whose worth is known, and nets that measure a part of it."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from conftest import World

SERIES, IMAGES = 16, 5
NETS = """
import torch

class Statistics:
    value_kind = "embedding"

    def __init__(self, name):
        self.name, self.num_classes = name, 2

    def fingerprint_parts(self):
        return {"architecture": f"{self.name}/1", "weights": "none"}

    def __call__(self, x):  # [B, T, F]
        if self.name == "light":
            return torch.stack([x.mean(dim=(1, 2)), x.amax(dim=(1, 2))], dim=1)
        if self.name == "edges":
            return torch.stack([x.diff(dim=2).abs().mean(dim=(1, 2)), x.diff(dim=1).abs().mean(dim=(1, 2))], dim=1)
        if self.name == "spread":
            return torch.stack([x.std(dim=(1, 2)), x.flatten(1).amin(dim=1)], dim=1)
        return x[:, 0, :2]

def light(ckpt): return Statistics("light")
def edges(ckpt): return Statistics("edges")
def spread(ckpt): return Statistics("spread")
def corner(ckpt): return Statistics("corner")

class Logits(Statistics):
    value_kind = "logits"

def logits(ckpt): return Logits("light")

class Trunk(torch.nn.Module):
    classifier_prefix, neck_prefixes, embedding_dim = "head.", ("neck.",), 8

    def __init__(self, classes):
        super().__init__()
        self.body = torch.nn.Linear(80, 16)
        self.neck = torch.nn.Linear(16, 8)
        self.head = torch.nn.Linear(8, classes)

    def embed(self, x):
        return self.neck(self.body(x.flatten(1)).relu()).relu()

    def forward(self, x):
        return self.head(self.embed(x))

def trunk(classes): return Trunk(classes)
"""


def gallery(root: Path, series: int = SERIES) -> tuple[World, list[dict[str, Any]]]:
    """Images [8, 10] of two cameras, ``series`` series of 5, and the 10 pairs of each: the brighter one is better."""
    (root / "nets.py").write_text(NETS)
    world, rows = World(root), []
    random = np.random.default_rng(7)
    for number in range(series):
        light = random.permutation(IMAGES) + random.normal(scale=0.1, size=IMAGES)
        files = []
        for image in range(IMAGES):
            file, device = f"s{number}/{image}.npy", "Ab"[image % 2]
            picture = random.normal(scale=0.5, size=(8, 10)) + light[image]
            world.write_feature(file, picture.astype(np.float32))
            world.rows.append({"file": file, "scene_label": 0, "device_id": device, "split": "train"})
            files.append(file)
        for a, b in itertools.combinations(range(IMAGES), 2):
            winner = "a" if light[a] > light[b] else "b"
            told = {"a": files[a], "b": files[b], "winner": winner}
            rows.append({**told, "agreement": 0.8, "reviewers": 5, "series": f"series {number}"})
    return world.write(), rows


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, rows[0])
        out.writeheader()
        out.writerows(rows)
    return path
