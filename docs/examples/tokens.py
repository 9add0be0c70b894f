"""Text: token ids, int64 [T] of different lengths, as they are; batches are made by length."""

import torch
from torch.utils.data import DataLoader

import kd_cache
from kd_cache.distill import kl


class Texts:
    def __init__(self, count: int = 200) -> None:
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(4, 12, (count,), generator=draw).tolist()
        self.ids = [torch.randint(0, 1000, (length,), generator=draw) for length in lengths]
        self.keys = [f"doc-{number:05d}" for number in range(count)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.ids[number]


class Bag(torch.nn.Module):
    architecture = "bag/1"

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = torch.nn.Embedding(1000, 8), torch.nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids).mean(dim=1))


texts, teacher, student = Texts(), Bag(), Bag()
cache = kd_cache.score(texts, teachers={"bag": teacher}, cache="cache/texts")
assert kd_cache.verify(texts, {"bag": teacher}, cache="cache/texts").exit_code == 0
data = cache.attach(texts, texts.keys, collate=lambda ids: torch.nn.utils.rnn.pad_sequence(ids, batch_first=True))
for ids, logits in DataLoader(data, batch_size=50, shuffle=True, collate_fn=data.collate):
    kl(student(ids), logits[:, 0]).mean().backward()
