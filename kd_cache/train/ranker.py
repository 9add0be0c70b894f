"""The net that says which of two samples is the better one, and what comes of swapping them: exactly the other one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import CheckpointError, UsageError, shown
from kd_cache.train.architectures import fill
from kd_cache.train.checkpoint import naming, read_record, read_weights
from kd_cache.train.freezing import necks_of
from kd_cache.train.layers import mlp
from kd_cache.train.nets import Standardised, embedding_dim, make_net
from kd_cache.train.settings import RANK, SIZES, Settings

EMBEDDINGS: Final = "embeddings"
"""In place of an architecture: the net stands on embeddings that are at hand."""
_WIDTH, _HIDDEN = 64, (64,)


class Embedding(nn.Module):
    """A net's ``embed`` as its forward: features ``[B, …]`` → ``[B, D]``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net.embed(x)  # type: ignore[operator]
        return found


class Ranker(nn.Module):
    """A trunk that both samples go through, and a scorer g over both of its embeddings: pairs → logits ``[B, 2]``.

    The logits of a pair (a, b) are g(a, b) and g(b, a), so their softmax is P(a ≻ b) and P(b ≻ a). Each pair is
    computed in an order of its own, by its values, and put back at the end: (a, b) and (b, a) take the same steps with
    the same numbers, and their logits are the same bits, swapped. Two equal samples have equal logits.

    Attributes:
        sources: names of the embeddings that it stands on, in their order; none if it takes features.
        provenance: the samples that made it, where it is from a checkpoint.
    """

    def __init__(self, trunk: nn.Module, width: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.trunk, self.scorer = trunk, mlp(2 * width, hidden, 1, dropout)
        self.sources: tuple[str, ...] = ()
        self.provenance: Provenance | None = None
        inner = getattr(trunk, "net", None)
        self.classifier_prefix = "" if inner is None else "scorer."
        self.neck_prefixes = () if inner is None else tuple(f"trunk.net.{prefix}" for prefix in necks_of(inner))
        head = getattr(inner, "classifier_prefix", None)  # of what it tells apart otherwise
        self.unused_prefixes = (f"trunk.net.{head}",) if head else ()

    def forward(self, pairs: Tensor) -> Tensor:
        """Features ``[B, 2, …]`` → logits ``[B, 2]``."""
        turned, same = _order(pairs)
        ordered = torch.where(turned.view(-1, *[1] * (pairs.ndim - 1)), pairs.flip(1), pairs)
        embedded = self.trunk(ordered.flatten(0, 1)).unflatten(0, (-1, 2))  # [B, 2, D]
        scores = self.scorer(torch.cat([embedded.flatten(1), embedded.flip(1).flatten(1)]))  # [2B, 1]
        logits = scores.view(2, -1).T
        logits = torch.where(same[:, None], logits[:, :1], logits)
        return torch.where(turned[:, None], logits.flip(1), logits)

    def prefer(self, a: Tensor, b: Tensor) -> Tensor:
        """P(a ≻ b) ``[B]`` of features or embeddings ``[B, …]`` each.

        Where some or all of the B pairs are given as (b, a), theirs is exactly 1 − that. (A batch of another size may
        round otherwise.)
        """
        return probability(self(torch.stack([a, b], dim=1)))


def _order(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """``[B]`` bool each: whether b comes before a (by their first different value), and whether they are the same."""
    a, b = pairs.flatten(2).unbind(1)
    differ = a != b
    at = differ.to(torch.uint8).argmax(dim=1, keepdim=True)
    return a.gather(1, at)[:, 0] > b.gather(1, at)[:, 0], ~differ.any(dim=1)


def probability(logits: Tensor) -> Tensor:
    """P(a ≻ b) ``[B]``: the first of the softmax of ``[B, 2]``.

    What is likelier is rounded first, to a p ≥ ½; what is less likely is 1 − p, which is exact for such a p (Sterbenz
    1974). So the probabilities of (a, b) and (b, a) add up to 1 exactly. The smaller one has the steps of the larger
    (6e-8 in float32): a loss is computed from logits.
    """
    first, second = logits.unbind(1)
    margin = torch.where(first == second, 0.0, first - second)
    likelier = 1 - torch.sigmoid(-margin.abs())
    return torch.where(margin < 0, 1 - likelier, likelier)


@dataclass(frozen=True)
class Plan:
    """What a ranker is built of, as a checkpoint keeps it.

    Attributes:
        arch: an architecture, a factory of one's own, or `EMBEDDINGS`.
        width: of the trunk's embedding over embeddings; of an architecture its ``feature_dim``.
        hidden: widths of the scorer's hidden layers.
        sources: of embeddings, in their order: name, fingerprint of what made them, width.
        sizes: of an architecture, those of `SIZES` that are given.
    """

    arch: str
    width: int | None = None
    hidden: tuple[int, ...] = _HIDDEN
    dropout: float = 0.0
    sources: list[list[Any]] = field(default_factory=list)
    sizes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings, sources: list[list[Any]]) -> Plan:
        hidden = _HIDDEN if settings.mlp_hidden_dims is None else settings.mlp_hidden_dims
        return cls(settings.arch, settings.feature_dim, hidden, settings.dropout, sources, settings.sizes)

    def trunk(self, seed: int = 0, embeddings: Tensor | None = None) -> nn.Module:
        """The untrained trunk. ``embeddings`` ``[N, ΣD]`` give the mean and the scale that its inputs are taken by.

        Raises `UsageError` or `TeacherError` for an architecture that there is not, or that has no embedding.
        """
        if self.arch != EMBEDDINGS:
            return make_net(Settings(RANK, arch=self.arch, feature_dim=self.width, seed=seed, **self.sizes), 2)
        inputs = sum(width for _, _, width in self.sources)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Sequential(nn.Linear(inputs, self.width or _WIDTH), nn.ReLU())
        return Standardised(head, torch.zeros(1, inputs) if embeddings is None else embeddings)

    def ranker(self, trunk: nn.Module, seed: int = 0) -> Ranker:
        """The ranker on a trunk of `trunk`."""
        width = (self.width or _WIDTH) if self.arch == EMBEDDINGS else embedding_dim(trunk)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = Ranker(trunk if self.arch == EMBEDDINGS else Embedding(trunk), width, self.hidden, self.dropout)
        made.sources = tuple(name for name, _, _ in self.sources)
        return made

    @classmethod
    def from_json(cls, content: Any) -> Plan:
        """As a record has it. Raises ``ValueError``, ``TypeError`` or ``KeyError`` for what is none."""
        sources: list[list[Any]] = [[str(name), str(made_by), int(each)] for name, made_by, each in content["sources"]]
        width, hidden, dropout = content["width"], tuple(map(int, content["hidden"])), float(content["dropout"])
        widths = (*hidden, *(each for _, _, each in sources), *([] if width is None else [int(width)]))
        sizes = {name: tuple(size) if isinstance(size, list) else size for name, size in content["sizes"].items()}
        if not all(0 < each <= 1 << 16 for each in widths) or not 0 <= dropout < 1 or not sizes.keys() <= set(SIZES):
            raise ValueError("its sizes are none")
        return cls(str(content["arch"]), width, hidden, dropout, sources, sizes)


def load_ranker(path: str | os.PathLike[str], arch: str | None = None) -> Ranker:
    """The ranker in a checkpoint that ``kd-cache train rank`` wrote: whole, checked, frozen, in evaluation mode.

    Args:
        arch: the factory of a trunk of one's own, as it was given to ``--arch``: what a file names is never run.

    Raises:
        CheckpointError: it is no ranker's, or not whole.
        UsageError: its trunk is one's own, and ``arch`` is not given.
    """
    record = read_record(path)
    with naming(path):
        try:
            plan = Plan.from_json(record["ranker"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "this is no ranker's checkpoint", hint="kd-cache train rank leaves one in outputs/rank/…."
            ) from error
    if ":" in plan.arch:
        if arch is None:
            raise UsageError(
                f"{shown(os.fspath(path))} has a trunk of its maker's own ({shown(plan.arch)})",
                hint='Pass its factory: load_ranker(path, "my_nets:small").',
            )
        plan = replace(plan, arch=arch)
    made = plan.ranker(plan.trunk())
    weights = read_weights(path, [made.state_dict().keys()])
    with naming(path):
        fill(made, weights.tensors, "the ranker that its record describes")
    made.provenance = weights.provenance
    return made.eval().requires_grad_(False)
