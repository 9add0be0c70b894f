"""The net that a training begins with: built from settings, then given weights whose every name is accounted for.

Also heads over embeddings, whose inputs are standardised while they train and not when kept, and the code of a net of
a user's own, which a key or a fingerprint must change with.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import CheckpointError, TeacherError, UsageError, listed, shown
from kd_cache.score.factory import PRIVATE, is_file, load_file, resolve_factory, users_code
from kd_cache.store.origin import weights_digest
from kd_cache.train.architectures import architectures, is_counter
from kd_cache.train.checkpoint import read_weights
from kd_cache.train.freezing import BACKBONE, HEAD, UNUSED, necks_of, parts_of
from kd_cache.train.layers import Backbone, flags, mlp
from kd_cache.train.settings import BACKBONE as FROM_BACKBONE
from kd_cache.train.settings import FULL_MODEL, Settings, label_of
from kd_cache.train.state_dicts import few


def make_net(settings: Settings, num_classes: int) -> nn.Module:
    """An untrained net, on the CPU: features ``[B, T, F]`` → logits ``[B, num_classes]``. One seed, one net.

    Raises:
        UsageError: an architecture that is not known, or settings that it does not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if (kind := architectures().get(settings.arch)) is not None:
            return _built_in(kind, settings, num_classes)
        return _own_net(settings, num_classes)


def _built_in(kind: type[Backbone], settings: Settings, num_classes: int) -> Backbone:
    _refuse_sizes(settings, kind.sizes)
    width, hidden, dropout = settings.feature_dim, settings.mlp_hidden_dims, settings.dropout
    try:
        return kind.sized(num_classes, width, hidden, dropout, **settings.sizes)
    except ValueError as error:
        raise UsageError(f"these sizes make no {settings.arch}: {shown(error)}") from error


def _refuse_sizes(settings: Settings, known: Sequence[str]) -> None:
    if unknown := [name for name in settings.sizes if name not in known]:
        raise UsageError(
            f"{shown(settings.arch)} has no {flags(unknown)}; of sizes it has {flags(known) or 'none to give'}",
            hint="Leave it out, or name another --arch.",
        )


def _own_net(settings: Settings, num_classes: int) -> nn.Module:
    arch = settings.arch
    if ":" not in arch:
        raise UsageError(
            f"no architecture is called {shown(arch)}; known: {', '.join(architectures())}, module:factory",
            hint="Name a factory of your own as module:factory, or as path/to/file.py:factory.",
        )
    _refuse_sizes(settings, ())
    factory = resolve_factory(arch)
    with users_code(lambda why: TeacherError(f"the factory {shown(arch)} failed: {why}")):
        net = factory(num_classes)
    if not isinstance(net, nn.Module):
        raise TeacherError(f"the factory {shown(arch)} must return a torch.nn.Module, found {type(net).__name__}")
    return net


def embedding_dim(net: nn.Module) -> int:
    """Width of what ``net.embed`` gives. Raises `TeacherError` for a net that has none."""
    width = getattr(net, "embedding_dim", None)
    if not isinstance(width, int) or not callable(getattr(net, "embed", None)):
        raise TeacherError(
            f"{type(net).__name__} has no embed(features) and embedding_dim, so no head can be put on it"
        )
    return width


@dataclass(frozen=True)
class WarmStart:
    """What was loaded into a net: its ``kind`` (a whole model, or a backbone), how much, and from where.

    ``front_end`` is what its checkpoint states of the front end it was trained with.
    """

    kind: str
    told: str
    sha256: str
    provenance: Provenance | None
    front_end: str = ""


def warm_start(net: nn.Module, path: Path, settings: Settings, *, whole: bool = False) -> WarmStart:
    """Give ``net`` the weights of a checkpoint: all of them, or at least its whole backbone.

    The head of a teacher of another label (cities, where this one learns scenes) is not taken. ``whole``: nothing may
    be in the file that the net has not. A part of the net by itself is taken too, where the net's ``bare_prefixes``
    say what its names then lack.

    Raises:
        CheckpointError: no name fits, or not the whole backbone; the message lists what does not.
    """
    state, starts = net.state_dict(), ("", *getattr(net, "bare_prefixes", ()))
    weights = read_weights(path, [[name.removeprefix(start) for name in state] for start in starts])
    tensors = weights.tensors
    if label_of(weights.record.get("role") or settings.role) != settings.label:
        # What it tells apart is something else, of however many classes.
        parts = parts_of(net)
        tensors = {name: tensor for name, tensor in tensors.items() if parts.get(name) != HEAD}
    start = max(starts, key=lambda start: sum(f"{start}{name}" in state for name in tensors))
    known = (*state, *necks_of(net))
    tensors = {f"{start}{name}" if f"{start}{name}".startswith(known) else name: tensors[name] for name in tensors}
    kind, told = fill_matching(net, tensors, shown(path), whole=whole)
    front_end = weights.record.get("feature_spec") or ""
    told = f"{told}, from {shown(path)} ({weights.source})"
    return WarmStart(kind, told, weights.sha256, weights.provenance, front_end)


def fill_matching(net: nn.Module, tensors: dict[str, Tensor], title: str, *, whole: bool = False) -> tuple[str, str]:
    """Copy the tensors whose name and shape the net has; says how many. Raises as `warm_start`."""
    state, parts = net.state_dict(), parts_of(net)
    wanted = [name for name in state if not is_counter(name) and parts[name] != UNUSED]
    fits = {name for name in wanted if name in tensors and _is_like(tensors[name], state[name])}
    matched = [name for name in wanted if name in fits]
    told = f"{len(matched)} of {len(wanted)} tensors loaded"
    new = [name for name in wanted if name not in fits]
    lost = [name for name in new if parts[name] == BACKBONE]
    unknown = [name for name in tensors if name not in state]
    # A part of what an embedding is made by, as CNN14's projection head is: without it the head stands on another one.
    dropped = [name for name in unknown if whole or name.startswith(necks_of(net))]
    if not matched or lost or dropped:
        what = f"{len(dropped)} tensors are of a part that this net has not; they are"
        if not matched or lost:
            what = "no tensor of the net is" if not matched else f"{len(lost)} tensors of its backbone are not"
        missing = {name: state[name] for name in new}
        raise _unfit(f"{title}: {told}; {what}", tensors, missing, dropped or unknown)
    with torch.no_grad():
        for name in [*matched, *(name for name in tensors if parts.get(name) == UNUSED)]:
            if _is_like(tensors[name], state[name]):
                state[name].copy_(tensors[name])
    kind = FULL_MODEL if len(matched) == len(wanted) else FROM_BACKBONE
    if new:
        told += f" (new: {few(new)})"
    if unknown:
        told += f" ({len(unknown)} of the file are not the net's and are left out: {few(unknown)})"
    return kind, told


def _unfit(
    said: str, tensors: Mapping[str, Tensor], missing: Mapping[str, Tensor], others: Sequence[str]
) -> CheckpointError:
    """``missing`` are the net's tensors that the file's ``tensors`` do not fit, ``others`` what it has besides."""
    shapes = [
        f"{shown(name)}: expected {list(tensor.shape)}"
        + (f", found {_described(tensors[name])}" if name in tensors else ", missing")
        for name, tensor in missing.items()
    ]
    return CheckpointError(
        f"{said} in the checkpoint, which has {len(tensors)} tensors\n{listed(shapes)}\n"
        f"{listed(f'{shown(name)}: unexpected' for name in others)}".rstrip(),
        hint="Give a checkpoint of this architecture (--arch, --feature-dim), or train from scratch.",
    )


def _is_like(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.is_floating_point() == other.is_floating_point()


def _described(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f"{str(tensor.dtype).removeprefix('torch.')} "
    return f"{kind}{list(tensor.shape)}"


def make_head(inputs: int, settings: Settings) -> nn.Linear | nn.Sequential:
    """An untrained scene head over embeddings ``[B, inputs]``: linear, or with hidden layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.mlp_hidden_dims:
            return mlp(inputs, settings.mlp_hidden_dims, settings.num_classes, settings.dropout)
        linear = nn.Linear(inputs, settings.num_classes)
    # A convex problem: where it begins does not matter, and at zero every class is as likely as any other.
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Standardised(nn.Module):
    """``head((x − mean) / scale)``: embeddings ``[B, D]`` → logits ``[B, C]``.

    The embedding of a frozen backbone has directions of very different size, in which a linear layer learns at very
    different speed. ``mean`` and ``scale`` ``[D]`` are constants of the training embeddings; `folded` is the same
    function as a plain head.
    """

    classifier_prefix = ""  # all of it is a head
    mean: Tensor
    scale: Tensor

    def __init__(self, head: nn.Linear | nn.Sequential, embeddings: Tensor) -> None:
        super().__init__()
        self.head = head
        exact = embeddings.double()
        mean, deviation = exact.mean(dim=0), exact.std(dim=0, correction=0)
        # What is constant in training says nothing: scaled up, its first other value would drown everything else.
        scale = torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1.0)
        self.register_buffer("mean", mean.to(embeddings.dtype))
        self.register_buffer("scale", scale.to(embeddings.dtype))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((x - self.mean) / self.scale)
        return logits

    @property
    def out_features(self) -> int:
        return _layers(self.head)[-1].out_features

    @torch.no_grad()
    def folded(self) -> nn.Linear | nn.Sequential:
        """A plain head that takes embeddings as they are; equal up to rounding."""
        plain = copy.deepcopy(self.head)
        first = _layers(plain)[0]
        weight = first.weight.double() / self.scale.double()
        first.bias.copy_(first.bias.double() - weight @ self.mean.double())
        first.weight.copy_(weight)
        return plain


def _layers(head: nn.Linear | nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in head.modules() if isinstance(layer, nn.Linear)]


_VERSIONED = {"torch", "kd_cache", "teachers"}
"""A training's key has their versions."""
_INSTALLED = {"site-packages", "dist-packages"}


def own_code(arch: str, net: nn.Module) -> list[str] | None:
    """What a net of a user's own is, as far as that can be told: its code's SHA-256, and its tensors' before training.

    ``None`` for a built-in architecture, which the code version covers.
    """
    if ":" not in arch:
        return None
    return [source_digest(arch, net), weights_digest(net.state_dict())]


def source_digest(arch: str, net: nn.Module) -> str:
    """SHA-256 over the files of the net's own code: of its factory, its modules, and what those import beside them.

    By what the files say, not by what happens to be imported: one net has one digest in every process, in any folder.
    """
    factory: Any = resolve_factory(arch)
    while isinstance(factory, functools.partial):
        factory = factory.func
    where = arch.rpartition(":")[0]
    first = load_file(Path(where)).__name__ if is_file(where) else where
    names = {first, str(factory.__module__), *(type(part).__module__ for part in net.modules())}
    starts = []
    for name in sorted(names):
        path = Path(getattr(sys.modules.get(name), "__file__", None) or "").resolve()
        if path.suffix == ".py" and path.is_file() and name.partition(".")[0] not in _VERSIONED:
            depth = 0 if name.startswith(PRIVATE) else name.count(".") + (path.name == "__init__.py")
            starts.append((path.parents[depth], path.relative_to(path.parents[depth])))
    digest = hashlib.sha256()
    for name, source in sorted(imported_sources(starts).items()):
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def imported_sources(starts: Iterable[tuple[Path, Path]]) -> dict[str, bytes]:
    """The files at ``starts``, each a root and a path below it, and all that they import from below their roots."""
    sources: dict[str, bytes] = {}
    waiting = list(starts)
    while waiting:
        root, place = waiting.pop()
        if place.as_posix() in sources or not (root / place).is_file():
            continue
        sources[place.as_posix()] = (root / place).read_bytes()
        try:
            tree = ast.parse(sources[place.as_posix()])
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            named = []
            if isinstance(node, ast.Import):
                named = [Path(*alias.name.split(".")) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = place.parents[node.level - 1] if 0 < node.level <= len(place.parents) else Path()
                module = package.joinpath(*(node.module or "").split("."))
                named = [module, *(module / alias.name for alias in node.names)]
            for imported in named:
                top = imported.parts[0] if imported.parts else ""
                # Of what is installed just the package itself: its neighbours are others' packages.
                others = _INSTALLED & set(root.parts) and top != place.parts[0]
                if top and top not in _VERSIONED and not others:
                    waiting += [(root, imported.with_suffix(".py")), (root, imported / "__init__.py")]
    return sources
