"""The City2Scene teacher: a frozen city teacher's backbone, or several side by side, with a scene head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from kd_cache.errors import CheckpointError, shown
from kd_cache.train.architectures import architecture_of, backbone_from, fill
from kd_cache.train.checkpoint import under
from kd_cache.train.checkpoint_file import AGAIN
from kd_cache.train.layers import Backbone, mlp, mlp_widths, rows
from kd_cache.train.state_dicts import CITY_PREFIX, HEAD_ENTRY, HEAD_PREFIX

_SEVERAL: Final = "backbones."
_MOST_BACKBONES: Final = 9

SceneHead = nn.Linear | nn.Sequential


class SideBySide(nn.Module):
    """Several backbones as one: [B, T, F] → their embeddings, one after the other, [B, ΣD]. It classifies nothing."""

    num_classes: None = None

    def __init__(self, backbones: Iterable[Backbone]) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(backbones)
        self.embedding_dim = sum(int(backbone.embedding_dim) for backbone in self._each())

    def _each(self) -> list[Any]:
        return list(self.backbones)

    @property
    def unused_prefixes(self) -> tuple[str, ...]:
        """Names of the tensors that ``embed`` does not use."""
        return tuple(f"{_SEVERAL}{number}.{each.classifier_prefix}" for number, each in enumerate(self._each()))

    @property
    def neck_prefixes(self) -> tuple[str, ...]:
        """Names of the tensors between the convolutions and the embeddings."""
        return tuple(
            f"{_SEVERAL}{number}.{prefix}" for number, each in enumerate(self._each()) for prefix in each.neck_prefixes
        )

    def embed(self, x: Tensor) -> Tensor:
        return torch.cat([each.embed(x) for each in self._each()], dim=1)


class City2Scene(nn.Module):
    """A city teacher's backbone, frozen, and a scene head: [B, T, F] → scene logits [B, C].

    Only the embedding path of ``city_model`` is used; its own classifier is kept so that the file is whole.
    ``scene_head``, a linear layer or a `kd_cache.train.layers.mlp`, has ``city_model.embedding_dim`` inputs and one
    output per scene.
    """

    classifier_prefix = HEAD_PREFIX
    city_model: Any  # a `Backbone`, or a user's own net with embed() and embedding_dim
    scene_head: Any  # a `SceneHead`; while it trains, one whose inputs are standardised

    def __init__(self, city_model: nn.Module, scene_head: nn.Module) -> None:
        super().__init__()
        self.city_model = city_model.requires_grad_(False)
        self.scene_head = scene_head
        last: Any = scene_head[-1] if isinstance(scene_head, nn.Sequential) else scene_head
        self.num_classes: int = last.out_features

    @property
    def neck_prefixes(self) -> tuple[str, ...]:
        """Names of the tensors between the backbone and the scene head."""
        return tuple(f"{CITY_PREFIX}{prefix}" for prefix in getattr(self.city_model, "neck_prefixes", ()))

    @property
    def bare_prefixes(self) -> tuple[str, ...]:
        """What the names of a city teacher, or of weights that one can start from, lack."""
        return tuple(f"{CITY_PREFIX}{prefix}" for prefix in ("", *getattr(self.city_model, "bare_prefixes", ())))

    @property
    def unused_prefixes(self) -> tuple[str, ...]:
        """Names of the tensors that nothing uses: the city classifier's."""
        return tuple(f"{CITY_PREFIX}{prefix}" for prefix in unused_by_embed(self.city_model))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scene_head(self.city_model.embed(x))
        return logits


def unused_by_embed(backbone: nn.Module) -> tuple[str, ...]:
    """Names of the tensors that ``backbone.embed`` does not use, as far as it says so."""
    if isinstance(backbone, SideBySide):
        return backbone.unused_prefixes
    classifier = getattr(backbone, "classifier_prefix", None)
    return (classifier,) if isinstance(classifier, str) else ()


def used_by_embed(backbone: nn.Module) -> dict[str, Tensor]:
    """The tensors that ``backbone.embed`` uses."""
    unused = unused_by_embed(backbone)
    return {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith(unused)}


def backbone_name(net: nn.Module) -> str | None:
    """``cnn14`` or ``cp_resnet``, of a City2Scene teacher its backbone's (``cnn14+cp_resnet``: two side by side).

    ``None`` for a net of a user's own.
    """
    inner = net.city_model if isinstance(net, City2Scene) else net
    if isinstance(inner, SideBySide):
        return "+".join(str(architecture_of(each)) for each in inner.backbones)
    return architecture_of(inner)


def city2scene_from(tensors: Mapping[str, Tensor], stated: str | None, entry: str) -> City2Scene:
    """The whole net that ``tensors`` are the weights of. Raises as `backbone_from`."""
    city, head = under(tensors, CITY_PREFIX), under(tensors, HEAD_PREFIX)
    several = any(name.startswith(_SEVERAL) for name in city)
    backbone = _side_by_side(city, entry) if several else backbone_from(city, stated, entry)
    with torch.device("meta"):
        scene_head = _untrained_head(backbone.embedding_dim, head)
    fill(scene_head, head, f"the scene head ({HEAD_ENTRY}) on this city model")
    return City2Scene(backbone, scene_head)


def _side_by_side(tensors: Mapping[str, Tensor], entry: str) -> SideBySide:
    """The backbones whose tensors are called ``backbones.0.…``, ``backbones.1.…``, …, each whole."""
    numbers = sorted({name.removeprefix(_SEVERAL).partition(".")[0] for name in tensors})
    if numbers != [str(number) for number in range(len(numbers))] or len(numbers) > _MOST_BACKBONES:
        raise CheckpointError(
            f"expected backbones 0, 1, … (at most {_MOST_BACKBONES}) under {entry}, found {shown(', '.join(numbers))}",
            hint=AGAIN,
        )
    parts = [under(tensors, f"{_SEVERAL}{number}.") for number in numbers]
    return SideBySide(backbone_from(part, None, f"{entry}, backbone {n}") for n, part in enumerate(parts))


def _untrained_head(inputs: int, weights: Mapping[str, Tensor]) -> SceneHead:
    """A head of the sizes that ``weights`` say."""
    if any(name[:1].isdecimal() for name in weights):
        *hidden, scenes = mlp_widths(weights, "", (inputs, 10))
        return mlp(inputs, hidden, scenes, 0.0)
    return nn.Linear(inputs, rows(weights, "weight", 10))
