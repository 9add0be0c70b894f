"""Shards of a webdataset-like stream turned map-style: an index of members once, and each is read where it lies."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import kd_cache
from kd_cache.distill import kl


class Shards:
    def __init__(self, paths: list[Path]) -> None:
        self.places = {}
        for path in paths:
            with tarfile.open(path) as shard:
                self.places |= {each.name: (path, each.offset_data, each.size) for each in shard if each.isfile()}
        self.keys, self.spec = list(self.places), repr([(path.name, path.stat().st_size) for path in paths])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> torch.Tensor:
        path, start, size = self.places[self.keys[number]]
        return torch.from_numpy(np.load(io.BytesIO(path.read_bytes()[start : start + size])))


with tarfile.open("shard-0.tar", "w") as made:
    for number in range(40):
        np.save(f"{number:05d}.npy", np.full((4, 5), number, np.float32))
        made.add(f"{number:05d}.npy")
shards, net = Shards([Path("shard-0.tar")]), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(20, 3))
cache = kd_cache.score(shards, teachers={"flat": net}, cache="cache/shards")
assert kd_cache.verify(shards, {"flat": net}, cache="cache/shards").exit_code == 0
data = cache.attach(shards, shards.keys)
for items, logits in DataLoader(data, batch_size=20, collate_fn=data.collate):
    kl(net(items), logits[:, 0]).mean().backward()
