"""A student in twenty lines: distil the cached teachers. Run it after `kd-cache dump --target b`."""

import torch
import torch.nn.functional as F

from kd_cache import LogitCache, student_loader

cache = LogitCache.open("cache/A2b")
loader = student_loader("data/sample/dataset.json", "data/sample", cache, batch_size=64)
torch.manual_seed(0)
student = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, cache.num_classes))
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
for epoch in range(10):
    correct = 0
    for batch in loader:
        logits = student(batch["features"].mean(dim=1))  # [B, T, F] -> [B, C]
        soft_targets = (batch["teacher_logits"].mean(dim=1) / 4).softmax(dim=1)  # mean of the teachers, temperature 4
        kd = F.kl_div((logits / 4).log_softmax(dim=1), soft_targets, reduction="batchmean") * 4**2
        ce = F.cross_entropy(logits, batch["scene_label"], reduction="sum")  # target rows carry -100: ignored
        loss = 0.7 * kd + 0.3 * ce / batch["source_mask"].sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        correct += (logits.argmax(dim=1) == batch["teacher_logits"].mean(dim=1).argmax(dim=1)).sum().item()
    print(f"epoch {epoch}: last loss {loss.item():.3f}, agrees with the teachers on {correct / len(cache):.0%}")
