"""A folder of classes, as torchvision's ImageFolder has it: `samples` [(path, class)]; keys are paths in it."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import kd_cache
from kd_cache.distill import kl


class Folder:
    """Stands in for ``torchvision.datasets.ImageFolder(root, transform)``: any object with ``samples`` will do."""

    def __init__(self, root: Path) -> None:
        classes = sorted(path.name for path in root.iterdir())
        self.samples = [(path, classes.index(path.parent.name)) for path in sorted(root.rglob("*.npy"))]
        self.keys = [path.relative_to(root).as_posix() for path, _ in self.samples]
        self.labels = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[number]
        return torch.from_numpy(np.load(path)), label


for number in range(60):
    path = Path("pictures", ("cat", "dog")[number % 2], f"{number}.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(number).integers(0, 256, (3, 8, 8)).astype(np.float32))
folder, net = Folder(Path("pictures")), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
cache = kd_cache.score(folder, teachers={"flat": net}, cache="cache/pictures")
assert kd_cache.verify(folder, {"flat": net}, cache="cache/pictures").exit_code == 0
data = cache.attach(folder, folder.keys)
for (images, _labels), logits in DataLoader(data, batch_size=20, shuffle=True, collate_fn=data.collate):
    kl(net(images), logits[:, 0]).mean().backward()
