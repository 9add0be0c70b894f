"""Views in a student's training: each epoch takes one of every clip, with what the teachers said of just that input."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_cache.dataset.views import replay_views
from kd_cache.errors import UsageError, shown
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.train.clips import Clips


class EpochViews:
    """Draws the views of an epoch, gives the teachers' rows of them, and makes the clips what these scored.

    Args:
        clips: clean ones; their rows are in ``cache``.
        checked: so many clips of each epoch, drawn anew, are compared by digest with what was scored.

    Raises:
        UsageError: the cache has no views.
    """

    def __init__(self, cache: LogitCache, clips: Clips, seed: int, checked: int) -> None:
        policy = cache.view_policy
        if policy is None:
            raise UsageError(f"{shown(cache.path)} has no views", hint="Make some: kd-cache dump --views.")
        self._cache, self._policy, self._seed, self._checked = cache, policy, seed, checked
        self._rows = cache.rows([sample.file for sample in clips.samples])

    @property
    def described(self) -> dict[str, Any]:
        """What a training's key and its record say of them."""
        digest = hashlib.sha256()
        for view in range(self._cache.views):
            digest.update(self._cache.batch(self._rows, view=view).numpy().tobytes())
        return {"count": self._cache.views, "policy": self._policy.digest, "rows": digest.hexdigest()}

    def begin(self, epoch: int) -> Tensor:
        """Take a view of each clip for this epoch; gives the teachers' rows of these, ``[N, K, C]`` float32."""
        stem = hashlib.sha256(f"views {self._seed} {epoch}".encode()).digest()
        chance = torch.Generator().manual_seed(int.from_bytes(stem[:8], "little") >> 1)
        views = torch.randint(self._cache.views, (len(self._rows),), generator=chance)
        self._compared = torch.randperm(len(self._rows), generator=chance).argsort().numpy() < self._checked
        self._draws = self._cache.draws(self._rows, views).numpy()
        rows: Tensor = self._cache.batch(self._rows, torch.float32, view=views)
        return rows

    def replay(self, rows: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Features ``[B, T, F]`` of these rows of the clips as the teachers scored them. Raises `StaleError`."""
        made: np.ndarray = replay_views(self._policy, features, self._draws[rows], self._compared[rows])
        return made
