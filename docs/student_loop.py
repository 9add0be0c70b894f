"""A student in twenty lines: distil the cached teachers into a small network. Run it after `kd-cache dump --target b`."""

import torch
import torch.nn.functional as F

from kd_cache import LogitCache, student_loader

cache = LogitCache.open("cache/A2b")
loader = student_loader("data/sample/dataset.json", "data/sample", cache, batch_size=64)
torch.manual_seed(0)
student = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, cache.num_classes))
optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
T, alpha = 4.0, 0.7
for epoch in range(5):
    total = 0.0
    for batch in loader:
        logits = student(batch["features"].mean(dim=1))
        teacher = batch["teacher_logits"].mean(dim=1)  # [B, teachers, C] -> [B, C]
        soft = F.kl_div(F.log_softmax(logits / T, 1), F.log_softmax(teacher / T, 1), log_target=True, reduction="batchmean")
        hard = F.cross_entropy(logits, batch["scene_label"], ignore_index=-100)  # target rows carry -100
        loss = alpha * T * T * soft + (1 - alpha) * hard
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch}: loss {total / len(loader):.3f} over {len(cache)} cached samples, teachers {cache.teachers}")
