"""A trained net of a user's own, as a teacher."""

from __future__ import annotations

import os
from dataclasses import replace

from torch import Tensor, nn

from kd_cache.errors import CheckpointError, shown
from kd_cache.score.factory import without_folder
from kd_cache.train.checkpoint import HEAD_PREFIX, Weights, read_record, read_weights
from kd_cache.train.head import make_head
from kd_cache.train.layers import mlp_widths
from kd_cache.train.nets import embedding_dim, fill_matching, make_net
from kd_cache.train.own_net import source_digest
from kd_cache.train.settings import CITY2SCENE, FULL_MODEL, ROLES, Settings
from kd_cache.train.state_dict import under
from teachers.two_parts import City2Scene


class OwnTeacher(nn.Module):
    """A trained net of a user's own, as something that a dump can score with: [B, T, F] → logits [B, C]."""

    value_kind = "logits"

    def __init__(self, net: nn.Module, weights: Weights, settings: Settings) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.num_classes = settings.num_classes
        self.class_names = tuple(weights.record.get("class_names") or ()) or None
        self.provenance, self.source, self.checkpoint_sha256 = weights.provenance, weights.source, weights.sha256
        code = source_digest(settings.arch, net)[:16]
        self._parts = {"architecture": f"{without_folder(settings.arch)}/{code}"}
        if isinstance(weights.record.get("feature_spec"), str):
            self._parts["feature_spec"] = weights.record["feature_spec"]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def fingerprint_parts(self) -> dict[str, str]:
        return dict(self._parts)


def own_teacher(arch: str, path: str | os.PathLike[str], *, num_cities: int = 12) -> OwnTeacher:
    """The teacher of a net of one's own in a checkpoint that ``kd-cache train --arch module:factory`` wrote.

    For ``--teacher``: ``def scene(ckpt): return own_teacher("my_nets:small", ckpt)``.

    Args:
        arch: the factory, as it was given to ``--arch``.
        num_cities: what a City2Scene teacher's city teacher was made for.

    Raises:
        CheckpointError: the file does not say which teacher it is, or its names and shapes are not this net's.
    """
    title, record = shown(os.fspath(path)), read_record(path)
    role, names = record.get("role"), record.get("class_names")
    if role not in ROLES or not names:
        raise CheckpointError(
            f"{title} does not say which teacher of which classes it is",
            hint="kd-cache train writes that into its checkpoints.",
        )
    cities = num_cities if role == CITY2SCENE else len(names)
    settings = Settings(role, arch=arch, num_scenes=len(names), num_cities=cities)
    net = make_net(settings, cities, settings.seed)
    weights = read_weights(path, frozenset(net.state_dict()))
    if role == CITY2SCENE:
        head = under(weights.tensors, HEAD_PREFIX)
        hidden = mlp_widths(head, "", (embedding_dim(net), len(names)))[:-1] if "weight" not in head else []
        settings = replace(settings, mlp_hidden_dims=tuple(hidden))
        net = City2Scene(net, make_head(embedding_dim(net), settings, settings.seed))
    kind, told = fill_matching(net, dict(weights.tensors), title, whole=True)
    if kind != FULL_MODEL:
        raise CheckpointError(f"{title} is no whole {arch}: {told}")
    return OwnTeacher(net, weights, settings)
