"""Teachers of a user's own that run in a millisecond: what ``--teacher name=tiny_teachers:linear`` loads."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from kd_cache import TeacherError


class Linear(torch.nn.Module):
    """Mean over time, then a linear layer; weights from a seed or from a checkpoint file with a number in it."""

    num_classes = 10
    value_kind = "logits"

    def __init__(self, seed: int, bins: int = 20, architecture: str = "linear/1") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(bins, self.num_classes, generator=generator), requires_grad=False)
        self.architecture = architecture

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.mean(dim=1) @ self.weight

    def fingerprint_parts(self) -> dict[str, str]:
        return {"architecture": self.architecture}


def linear(ckpt: Path | None) -> Linear:
    return Linear(1 if ckpt is None else int(ckpt.read_text()))


def other(ckpt: Path | None) -> Linear:
    return Linear(2)


class Slow(Linear):
    """Sleeps in every batch, so that a test can kill the dump in the middle."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2)
        return super().forward(features)


def slow(ckpt: Path | None) -> Linear:
    return Slow(1)


class Counting(Linear):
    """Appends the size of every batch to the file named by ``TINY_BATCHES``."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with Path(os.environ["TINY_BATCHES"]).open("a") as log:
            log.write(f"{len(features)}x{features.shape[1]}\n")
        return super().forward(features)


def counting(ckpt: Path | None) -> Linear:
    return Counting(1)


class Broken(Linear):
    """NaN for samples whose first value is above 2; the wrong shape with ``shape``."""

    def __init__(self, how: str) -> None:
        super().__init__(1)
        self.how = how

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits = super().forward(features)
        if self.how == "shape":
            return logits[:, :3]
        if self.how == "raises":
            raise RuntimeError("no such kernel")
        if self.how == "overflow":
            return logits * 1e6
        bad = features[:, 0, 0] > 0.5
        return torch.where(bad[:, None], torch.nan, logits)


def nan(ckpt: Path | None) -> Linear:
    return Broken("nan")


def wrong_shape(ckpt: Path | None) -> Linear:
    return Broken("shape")


def raises(ckpt: Path | None) -> Linear:
    return Broken("raises")


def overflow(ckpt: Path | None) -> Linear:
    return Broken("overflow")


def unloadable(ckpt: Path | None) -> Linear:
    raise OSError("my disk is gone")


def no_fingerprint(ckpt: Path | None) -> object:
    class Bare:
        num_classes = 10
        value_kind = "logits"

        def __call__(self, features: torch.Tensor) -> torch.Tensor:
            return features[:, 0, :10]

    return Bare()


class Picky(Linear):
    """Refuses short features, as an architecture that pools does."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if features.shape[1] < 16:
            raise TeacherError("needs at least 16 frames")
        return super().forward(features)


def picky(ckpt: Path | None) -> Linear:
    return Picky(1)


def wide(ckpt: Path | None) -> Linear:
    return Linear(1, bins=40)


class Soft(Linear):
    """Ends in a softmax, and calls that logits."""

    def __init__(self, log: bool) -> None:
        super().__init__(1)
        self.log = log

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits = super().forward(features)
        return logits.log_softmax(1) if self.log else logits.softmax(1)


def softmax(ckpt: Path | None) -> Linear:
    return Soft(log=False)


def log_softmax(ckpt: Path | None) -> Linear:
    return Soft(log=True)


class Noisy(Linear):
    """Other numbers each time."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) + torch.randn(len(features), self.num_classes)


def noisy(ckpt: Path | None) -> Linear:
    return Noisy(1)
