"""Fine-tuning in stages: which parts of a net train, and the proof that the others did not.

Level 2 trains the head alone, level 1 neck and head, level 0 everything. What backbone, neck and head are is said by
each net (``neck_prefixes`` and ``classifier_prefix``); a City2Scene teacher's head is its scene head, and its city
classifier is used by nothing (``unused_prefixes``) and trained at no level.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from kd_cache.errors import TrainingError, UsageError, listed
from kd_cache.store.origin import weights_digest

HEAD, NECK, BACKBONE, UNUSED = "head", "neck", "backbone", "unused"
TRAINED: Final[Mapping[int, frozenset[str]]] = {
    2: frozenset({HEAD}),
    1: frozenset({HEAD, NECK}),
    0: frozenset({HEAD, NECK, BACKBONE}),
}


def parts_of(net: nn.Module) -> dict[str, str]:
    """The part that each tensor of the net's state dict belongs to; of a net that says nothing, all are backbone.

    A net says it by the starts of names: ``unused_prefixes``, ``classifier_prefix`` (its head) and ``neck_prefixes``.
    """
    head = getattr(net, "classifier_prefix", None)
    starts = (
        (UNUSED, tuple(getattr(net, "unused_prefixes", ()))),
        (HEAD, (head,) if isinstance(head, str) else ()),
        (NECK, necks_of(net)),
    )
    return {
        name: next((part for part, prefixes in starts if name.startswith(prefixes)), BACKBONE)
        for name in net.state_dict()
    }


def necks_of(net: nn.Module) -> tuple[str, ...]:
    """The prefixes of the names, in the net's state dict, of what lies between backbone and head."""
    return tuple(getattr(net, "neck_prefixes", ()))


@dataclass
class Frozen:
    """The tensors that a stage must not change, and what they were when it began."""

    net: nn.Module
    level: int
    names: frozenset[str]
    digest: str
    trainable: int

    @classmethod
    def at(cls, net: nn.Module, level: int) -> Frozen:
        """Freeze ``net`` for a stage of this level.

        Raises:
            UsageError: nothing is left to train, or the architecture has no such level.
        """
        parts = parts_of(net)
        trained = TRAINED[level]
        frozen = frozenset(name for name, part in parts.items() if part not in trained)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name not in frozen)
        trainable = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
        if not trainable:
            raise UsageError(
                f"{type(net).__name__} has no part to train at freeze level {level}",
                hint="An architecture of your own says what its parts are: classifier_prefix and neck_prefixes.",
            )
        return cls(net, level, frozen, digest_of(net, frozen), trainable)

    def train(self) -> None:
        """Training mode, but for modules that are frozen as a whole: batch norm must not move its statistics."""
        self.net.train()
        for name, module in self.net.named_modules():
            inside = [f"{name}.{below}" if name else below for below in module.state_dict()]
            if inside and self.names.issuperset(inside):
                module.eval()

    def copy_to(self, averaged: nn.Module) -> None:
        """Give the averaged net the frozen tensors: what holds still has no average."""
        state, own = averaged.state_dict(), self.net.state_dict()
        for name in self.names:
            state[name].copy_(own[name])

    def check(self, averaged: nn.Module | None = None) -> None:
        """Raise `TrainingError` if any frozen tensor is trainable, or is not bit for bit what it was, in either net."""
        loose = [name for name, tensor in self.net.named_parameters() if name in self.names and tensor.requires_grad]
        if averaged is not None:
            state, own = averaged.state_dict(), self.net.state_dict()
            loose += [name for name in self.names if not torch.equal(state[name], own[name])]
        if loose or digest_of(self.net, self.names) != self.digest:
            raise TrainingError(
                f"what is frozen at level {self.level} changed while it was frozen\n{listed(loose)}".rstrip(),
                hint="The architecture's own code may write into its tensors; the run is not to be used.",
            )

    def __str__(self) -> str:
        if getattr(self.net, "classifier_prefix", None) == "":  # all of it is a head
            return f"a head alone, {self.trainable:,} parameters, on embeddings of a frozen backbone that are at hand"
        if not self.names:
            return f"level {self.level}: nothing is frozen, {self.trainable:,} parameters train"
        return (
            f"level {self.level}: {len(self.names)} tensors are frozen (sha256 {self.digest[:16]}…), 0 of their "
            f"parameters train, {self.trainable:,} others do"
        )


def digest_of(net: nn.Module, names: Collection[str]) -> str:
    """SHA-256 of these tensors of a net."""
    state: dict[str, Any] = net.state_dict()
    return weights_digest({name: tensor for name, tensor in state.items() if name in names})


def trainable_parameters(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that a stage trains, by name."""
    return ((name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad)
