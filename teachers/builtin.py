"""The built-in teachers: which architectures there are, and how a checkpoint's tensors become one of them.

Nothing here reads files: `teachers.checkpoint` does, and hands over plain names and tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from kd_cache.errors import CheckpointError, listed, shown
from kd_cache.fingerprint import weights_digest
from kd_cache.provenance import Provenance
from kd_cache.train.cp_resnet import CPResNet
from teachers.cnn14 import CNN14

Backbone = CNN14 | CPResNet

ARCHITECTURES: Final[dict[str, type[CNN14] | type[CPResNet]]] = {"cnn14": CNN14, "cp_resnet": CPResNet}
ARCHITECTURE_VERSION: Final = "1"
"""Version of every architecture above; it changes when the same tensors would give other numbers."""

SCENES: Final = (
    "airport",
    "bus",
    "metro",
    "metro_station",
    "park",
    "public_square",
    "shopping_mall",
    "street_pedestrian",
    "street_traffic",
    "tram",
)
CITIES: Final = (
    "amsterdam",
    "barcelona",
    "helsinki",
    "lisbon",
    "london",
    "lyon",
    "madrid",
    "milan",
    "paris",
    "prague",
    "stockholm",
    "vienna",
)
WRAPPERS: Final = ("module.", "_orig_mod.")  # DistributedDataParallel and averaged models; torch.compile
LIGHTNING: Final = ("model.", "net.")  # the attribute a LightningModule keeps its network in
FLOATS: Final = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
INTEGERS: Final = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool})
UNSTATED_FRONT_END: Final = "log-mel [T, F], front end unstated"


SceneHead = nn.Linear | nn.Sequential


class SideBySide(nn.Module):
    """Several backbones as one: [B, T, F] → their embeddings, one after the other, [B, ΣD]. It classifies nothing."""

    num_classes: None = None

    def __init__(self, backbones: Iterable[Backbone]) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(backbones)
        widths = [int(backbone.embedding_dim) for backbone in self._each()]
        self.embedding_dim = sum(widths)

    def _each(self) -> list[Any]:
        return list(self.backbones)

    @property
    def unused_prefixes(self) -> tuple[str, ...]:
        """Names of the tensors that ``embed`` does not use."""
        return tuple(f"backbones.{number}.{each.classifier_prefix}" for number, each in enumerate(self._each()))

    def embed(self, x: Tensor) -> Tensor:
        return torch.cat([each.embed(x) for each in self._each()], dim=1)


class City2Scene(nn.Module):
    """A city teacher's backbone, frozen, and a scene head: [B, T, F] → scene logits [B, C].

    Only the embedding path of ``city_model`` is used; its own classifier is kept so that the file is whole.
    ``scene_head``, a linear layer or a `teachers.cnn14.mlp`, has ``city_model.embedding_dim`` inputs and one output per
    scene.
    """

    city_model: Any  # a `Backbone`, or a user's own net with embed() and embedding_dim
    scene_head: Any  # a `SceneHead`; while it trains, one whose inputs are standardised

    def __init__(self, city_model: nn.Module, scene_head: nn.Module) -> None:
        super().__init__()
        self.city_model = city_model.requires_grad_(False)
        self.scene_head = scene_head
        last: Any = scene_head[-1] if isinstance(scene_head, nn.Sequential) else scene_head
        self.num_classes: int = last.out_features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scene_head(self.city_model.embed(x))
        return logits


def architecture_of(net: nn.Module) -> str | None:
    """``cnn14`` or ``cp_resnet``, of a City2Scene teacher its backbone's (``cnn14+cp_resnet``: two side by side).

    ``None`` for a net of a user's own.
    """
    inner = net.city_model if isinstance(net, City2Scene) else net
    if isinstance(inner, SideBySide):
        return "+".join(str(architecture_of(each)) for each in inner.backbones)
    return next((name for name, kind in ARCHITECTURES.items() if isinstance(inner, kind)), None)


class LoadedTeacher(nn.Module):
    """A teacher from a checkpoint, ready to score: [B, T, F] float → logits [B, num_classes].

    ``value_kind`` is ``logits`` even for a checkpoint of the older variant that ended in LogSoftmax: that
    layer has no tensors and is not built, so what comes out is what went into it. The weights are frozen
    and the module is in evaluation mode; otherwise it is an ordinary nn.Module (``.to(device)``,
    ``.half()``, …).

    ``source`` says which entry of the file was used and which prefixes were removed, ``checkpoint_sha256`` is of the
    bytes that were read (``None`` for a teacher that is from no file). ``num_cities`` is the
    number of outputs of the city classifier, None where there is none. ``provenance`` is what the record says of the
    samples that made the teacher, None where it says nothing.
    """

    value_kind: Literal["logits"] = "logits"
    checkpoint_sha256: str | None = None

    def __init__(
        self,
        net: Backbone | City2Scene,
        *,
        source: str,
        record: Mapping[str, Any] | None = None,
        role: str | None = None,
    ) -> None:
        super().__init__()
        # Same numbers, but for the last bits: convolutions run up to twice as fast in this layout.
        self.net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.source = source
        self.record = dict(record or {})
        made_with = self.record.get("provenance")
        self.provenance = None if made_with is None else Provenance.from_json(made_with)
        self.role = "city2scene" if isinstance(net, City2Scene) else role or self.record.get("role")
        self.num_classes = net.num_classes
        self.class_names = self._class_names()
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    @property
    def backbone(self) -> Any:
        """What embeds: a `Backbone`, or several `SideBySide`."""
        net: Backbone | City2Scene = self.net
        return net.city_model if isinstance(net, City2Scene) else net

    @property
    def architecture(self) -> str:
        """``cnn14`` or ``cp_resnet``."""
        return str(architecture_of(self.net))

    @property
    def num_cities(self) -> int | None:
        return self.backbone.num_classes if self.role in {"city", "city2scene"} else None

    def fingerprint_parts(self) -> dict[str, str]:
        """What made this teacher's numbers, as far as the teacher knows: architecture, weights and front end.

        The weights' digest covers the tensors that inference uses, under canonical names: file format,
        prefixes and record do not matter, and neither does the city classifier of a City2Scene file.
        """
        composition = "+city2scene" if isinstance(self.net, City2Scene) else ""
        return {
            "architecture": f"{self.architecture}/{ARCHITECTURE_VERSION}{composition}",
            "feature_spec": str(self.record.get("feature_spec") or UNSTATED_FRONT_END),
            "weights": weights_digest(self._inference_tensors()),
        }

    def _inference_tensors(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.net.state_dict()
        if not isinstance(self.net, City2Scene):
            return state
        city = self.net.city_model
        own = city.unused_prefixes if isinstance(city, SideBySide) else (city.classifier_prefix,)
        unused = tuple(f"city_model.{prefix}" for prefix in own)
        return {name: tensor for name, tensor in state.items() if not name.startswith(unused)}

    def _class_names(self) -> tuple[str, ...] | None:
        names = self.record.get("class_names")
        if names is None:
            return next((known for known in (SCENES, CITIES) if len(known) == self.num_classes), None)
        if len(names) != self.num_classes:
            raise CheckpointError(
                f"the record names {len(names)} classes, the weights have {self.num_classes} outputs",
                hint="Write the checkpoint again with one class name per output, in class order.",
            )
        return tuple(names)


@cache
def known_names() -> Mapping[str, frozenset[str]]:
    """Architecture → every tensor name it may have. On the meta device this costs no memory."""
    with torch.device("meta"):
        nets = {"cnn14": CNN14(10, projection=(1, 1)), "cp_resnet": CPResNet(10)}
    return {name: frozenset(net.state_dict()) for name, net in nets.items()}


def recognised(names: Iterable[str]) -> str | None:
    """The architecture that shares most names with ``names``, or None when none shares any."""
    found = set(names)
    best = max(known_names(), key=lambda architecture: len(known_names()[architecture] & found))
    return best if known_names()[best] & found else None


def backbone_from(tensors: Mapping[str, Tensor], stated: str | None, entry: str) -> Backbone:
    """The net that ``tensors`` are the weights of, all of them; sizes are read from the tensors.

    ``stated`` is the architecture the record gives, if any; ``entry`` leads the names in messages. Raises
    CheckpointError listing every name that is missing, unexpected or of another shape.
    """
    architecture = stated or recognised(tensors)
    if architecture is None or not known_names()[architecture] & tensors.keys():
        raise CheckpointError(
            f"expected the weights of {stated or ' or '.join(ARCHITECTURES)}, found {len(tensors)} tensors"
            f" and none of its names, for example:\n{listed(sorted(tensors), most=5)}",
            hint="Another network comes in as --teacher name=module:factory; see the README.",
        )
    with torch.device("meta"):
        try:
            net = ARCHITECTURES[architecture].for_tensors(tensors)
        except (ValueError, RuntimeError, OverflowError) as error:  # e.g. odd channels in groups
            raise CheckpointError(
                f"these shapes make no {architecture}: {shown(error)}",
                hint="A network of another layout comes in as --teacher name=module:factory.",
            ) from error
    fill(net, tensors, f"{architecture} ({entry})")
    return net


def fill(net: nn.Module, tensors: Mapping[str, Tensor], title: str) -> None:
    """Give the meta-device ``net`` its tensors, without a copy, after comparing every name and shape."""
    expected = net.state_dict()
    counters = {name for name in expected if name.rsplit(".", 1)[-1] == "num_batches_tracked"}
    problems = {
        "missing": [name for name in expected if name not in tensors and name not in counters],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{shown(name)}: expected {list(expected[name].shape)}, found {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in expected and name not in counters and tensor.shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        raise _misfit(problems, title)
    # Inference uses no counters, so theirs are zero whether the file has them or not.
    zeros = {name: torch.zeros((), dtype=torch.int64) for name in counters}
    net.load_state_dict({**tensors, **zeros}, assign=True)


def _misfit(problems: Mapping[str, list[str]], title: str) -> CheckpointError:
    counts = ", ".join(f"{len(names)} {what}" for what, names in problems.items() if names)
    lists = "\n".join(f"{what}:\n{listed(names)}" for what, names in problems.items() if names)
    return CheckpointError(
        f"the weights do not fit {title}: {counts}\n{lists}",
        hint="Check that this is the whole checkpoint of this architecture; a partial load is never used.",
    )


def clean_tensors(
    entries: Mapping[Any, Any], known: frozenset[str], size: int, *, integers: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Finite float32 tensors under bare names, and what was done to the names, in words.

    ``integers``: whole numbers and truth values too, as they are; no built-in net has them.
    """
    tensors, notes = dict(entries), []
    if "n_averaged" in tensors:  # the counter of torch.optim.swa_utils.AveragedModel
        del tensors["n_averaged"]
        notes.append("counter n_averaged dropped")
    _check_tensors(tensors, size, FLOATS | INTEGERS if integers else FLOATS)
    tensors, removed = _unprefixed(tensors, known)
    notes += removed
    unused = [name for name in tensors if name.startswith("adapt_layer.")]
    if unused:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in set(unused)}
        notes.append("adapt_layer.* dropped (unused at inference)")
    return _finite(tensors), notes


def _check_tensors(tensors: Mapping[Any, Any], size: int, kinds: frozenset[torch.dtype]) -> None:
    """Every value a plain dense tensor of one of these kinds, and together no larger than the file they came from."""
    wrong = [f"{shown(name)}: {what}" for name, value in tensors.items() if (what := _flaw(name, value, kinds))]
    if wrong or not tensors:
        raise CheckpointError(
            f"expected a state dict of dense float tensors, found\n{listed(wrong or ['nothing'])}",
            hint="Save model.state_dict() as {'model_state_dict': …}, or with teachers.save_checkpoint.",
        )
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > size:
        raise CheckpointError(
            f"the tensors claim {claimed} bytes, the file has {size}: some are expanded from fewer numbers",
            hint="Save the state dict of the model itself, without expand() or tied views.",
        )


def _flaw(name: object, value: object, kinds: frozenset[torch.dtype]) -> str | None:
    if not isinstance(name, str):
        return "a name that is not text"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if type(value) not in {Tensor, nn.Parameter} or value.layout != torch.strided or value.is_quantized:
        return f"a {type(value).__name__}, {value.layout}"
    if value.device.type != "cpu":
        return f"no data ({value.device.type})"
    if not value.numel():
        return f"an empty tensor {list(value.shape)}"
    if not _is_counter(name) and value.dtype not in kinds:
        return str(value.dtype).removeprefix("torch.")
    return None


def _is_counter(name: str) -> bool:
    """Of batch norm; some exports have it as a float."""
    return name.rsplit(".", 1)[-1] == "num_batches_tracked"


def _unprefixed(
    tensors: dict[str, Tensor], known: frozenset[str], depth: int = 6
) -> tuple[dict[str, Tensor], list[str]]:
    """``tensors`` without the prefixes that training frameworks add, also stacked, and which were removed.

    A wrapper's prefix must lead every name. Lightning keeps losses and metrics beside the network, so of
    its prefixes it is enough that the names after them are ``known``. ``depth`` bounds what a hostile file
    can stack.
    """
    if known & tensors.keys():
        return tensors, []
    for prefix in WRAPPERS if depth else ():
        if all(name.startswith(prefix) for name in tensors):
            inner, notes = _unprefixed(under(tensors, prefix), known, depth - 1)
            return inner, [f"prefix '{prefix}' removed", *notes]
    if not depth:
        return tensors, []
    found = []
    for prefix in LIGHTNING:
        part = under(tensors, prefix)
        inner, notes = _unprefixed(part, known, depth - 1) if part else ({}, [])
        if known & inner.keys():
            beside = len(tensors) - len(part)
            left = [f"{beside} tensors beside it left out"] if beside else []
            found.append((inner, [f"prefix '{prefix}' removed", *left, *notes]))
    if len(found) > 1:
        raise CheckpointError(
            "two networks, under 'model.' and under 'net.', and nothing says which is the teacher",
            hint="Save the teacher's own state_dict() with teachers.save_checkpoint.",
        )
    return found[0] if found else (tensors, [])


def _finite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    whole = {name for name, tensor in tensors.items() if tensor.dtype in INTEGERS and not _is_counter(name)}
    full = {
        name: tensor.detach().to(tensor.dtype if name in whole else torch.float32).contiguous()
        for name, tensor in tensors.items()
    }
    bad = [name for name, tensor in full.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(
            f"expected finite weights, found NaN or Inf in {len(bad)} tensors:\n{listed(bad)}",
            hint="The training diverged or the file is damaged: use an earlier checkpoint.",
        )
    return full


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
