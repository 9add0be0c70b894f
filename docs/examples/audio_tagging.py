"""Per-frame audio tagging: a sigmoid teacher gives [B, L, C] with one L; batches are [B, teachers, L, C]."""

import torch
from torch.utils.data import DataLoader

import kd_cache


class Clips:
    spec = "log-mel/1"

    def __init__(self, count: int = 80) -> None:
        self.keys = [f"clip-{number}.wav" for number in range(count)]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.randn(10, 16, generator=torch.Generator().manual_seed(number))  # [frames, bins]


class Tagger(torch.nn.Linear):
    architecture, value_kind = "tagger/1", "sigmoid"

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return super().forward(clips).sigmoid()  # [B, L, 527]


clips, teacher, student = Clips(), Tagger(16, 527), torch.nn.Linear(16, 527)
cache = kd_cache.score(clips, teachers={"tags": teacher}, cache="cache/tags")
assert kd_cache.verify(clips, {"tags": teacher}, cache="cache/tags").exit_code == 0
assert (cache.frames, cache.num_classes) == (10, 527)
data, optimizer = cache.attach(clips, clips.keys), torch.optim.SGD(student.parameters(), lr=1.0)
for inputs, tags in DataLoader(data, batch_size=20, shuffle=True, collate_fn=data.collate):
    loss = torch.nn.functional.binary_cross_entropy_with_logits(student(inputs), tags[:, 0])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
