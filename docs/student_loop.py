"""A student in a dozen lines: distil the cached teachers. Run it after `kd-cache dump --target b`."""

import torch

from kd_cache import LogitCache, student_loader
from kd_cache.distill import DistillLoss, fuse

cache = LogitCache.open("cache/A2b")
loader = student_loader("data/sample/dataset.json", "data/sample", cache, batch_size=64)
torch.manual_seed(0)
student = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, cache.num_classes))
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
objective = DistillLoss("mean", apply_to="all")  # KL at temperature 4 on all rows, hard labels on those of A
for epoch in range(10):
    agreed = 0
    for batch in loader:
        logits = student(batch["features"].mean(dim=1))  # [B, T, F] -> [B, C]
        loss = objective(logits, batch["teacher_logits"], batch["scene_label"], batch["source_mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        agreed += (logits.argmax(dim=1) == fuse(batch["teacher_logits"]).argmax(dim=1)).sum().item()
    print(f"epoch {epoch}: last loss {loss.item():.3f}, agrees with the teachers on {agreed / len(cache):.0%}")
