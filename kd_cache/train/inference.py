"""What a net makes of clips: logits, or embeddings for a head to learn from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kd_cache.train.clips import Clips
from kd_cache.watch import Watcher


@torch.inference_mode()
def score(net: nn.Module, clips: Clips, device: torch.device, batch_size: int) -> np.ndarray:
    """Logits ``[N, C]`` float32 in evaluation mode, in the order of the clips."""
    net.eval()
    found: np.ndarray | None = None
    for rows, features in clips.load(clips.in_order(batch_size), device):
        logits = net(features.to(device)).float().cpu().numpy()
        if found is None:
            found = np.empty((len(clips), logits.shape[1]), np.float32)
        found[rows] = logits
    return np.empty((0, 0), np.float32) if found is None else found


def embedded(net: nn.Module, clips: Clips, device: torch.device, batch_size: int, watcher: Watcher) -> Clips:
    """The same samples with their embeddings ``[D]`` for features: what a head over a frozen backbone sees."""
    watcher.stage("embedding", len(clips))
    rows = score(_Embedding(net), clips, device, batch_size)
    watcher.advance(len(clips))
    return Clips.of_rows(clips.samples, rows)


class _Embedding(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.net.embed(features)  # type: ignore[operator]
        return found
