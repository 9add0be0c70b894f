"""Images: uint8 [3, 32, 32], 100 classes, no domains. Nothing is copied to another format."""

import torch
from torch.utils.data import DataLoader

import kd_cache
from kd_cache.distill import kl


class Images:
    spec = "made/1"  # the version of all that makes an input; reruns need not read what it stands for

    def __init__(self, count: int = 300) -> None:
        self.keys = [f"train/{number}.png" for number in range(count)]  # identities, never positions
        self.labels = [number % 100 for number in range(count)]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        noise = torch.Generator().manual_seed(number)
        return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=noise), self.labels[number]


class Net(torch.nn.Linear):
    architecture = "linear/1"  # change its version when the numbers change

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.float().flatten(1) / 255)


images, teacher, student = Images(), Net(3072, 100), Net(3072, 100)
cache = kd_cache.score(images, teachers={"big": teacher}, cache="cache/cifar")
assert kd_cache.verify(images, {"big": teacher}, cache="cache/cifar").exit_code == 0
data, optimizer = cache.attach(images, images.keys), torch.optim.SGD(student.parameters(), lr=0.1)
for (inputs, _labels), logits in DataLoader(data, batch_size=64, shuffle=True, collate_fn=data.collate):
    loss = kl(student(inputs), logits[:, 0]).mean()  # logits [B, teachers, C]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
