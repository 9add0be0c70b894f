"""A Hugging Face `datasets` set: its rows are dictionaries, the teacher is given one column."""

import datasets
import torch
from torch.utils.data import DataLoader

import kd_cache
from kd_cache.distill import kl


class Column:
    """One column of a set as inputs; another names the rows."""

    def __init__(self, rows: datasets.Dataset, column: str, key: str) -> None:
        self.rows, self.column, self.keys = rows.with_format("torch"), column, rows[key]
        self.labels, self.spec = rows["label"], rows._fingerprint  # what `datasets` itself tells versions by

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.rows[number][self.column]


made = {
    "id": [f"row-{n}" for n in range(90)], "input_ids": [[n % 50, n % 7, 3] for n in range(90)],
    "label": [n % 2 for n in range(90)],
}  # fmt: skip
texts = Column(datasets.Dataset.from_dict(made), "input_ids", "id")


def bag() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Flatten(), torch.nn.Linear(24, 2))


cache = kd_cache.score(texts, teachers={"bag": (teacher := bag())}, cache="cache/reviews")
assert kd_cache.verify(texts, {"bag": teacher}, cache="cache/reviews").exit_code == 0
data, student = cache.attach(texts, texts.keys), bag()
for ids, logits in DataLoader(data, batch_size=30, shuffle=True, collate_fn=data.collate):
    kl(student(ids), logits[:, 0]).mean().backward()
