"""A teacher out of a checkpoint: whole, checked, frozen, and ready to score."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from kd_cache.dataset.provenance import Provenance
from kd_cache.dataset.task import DCASE
from kd_cache.errors import CheckpointError, shown
from kd_cache.score.factory import without_folder
from kd_cache.score.teacher import OWN_FEATURES
from kd_cache.store.origin import weights_digest
from kd_cache.train.architectures import ARCHITECTURE_VERSION, backbone_from
from kd_cache.train.checkpoint import Weights, naming, read_record, read_weights, under
from kd_cache.train.checkpoint_file import AGAIN
from kd_cache.train.layers import Backbone, mlp_widths
from kd_cache.train.nets import embedding_dim, fill_matching, make_head, make_net, source_digest
from kd_cache.train.settings import CITY, CITY2SCENE, FULL_MODEL, ROLES, SCENE, Settings
from kd_cache.train.state_dicts import HEAD_PREFIX
from teachers.two_parts import City2Scene, backbone_name, city2scene_from

UNSTATED_FRONT_END: Final = "log-mel [T, F], front end unstated"


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
        self.own_features = self.record.get(OWN_FEATURES)
        self.role = CITY2SCENE if isinstance(net, City2Scene) else role or self.record.get("role")
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
        return str(backbone_name(self.net))

    @property
    def num_cities(self) -> int | None:
        return self.backbone.num_classes if self.role in {CITY, CITY2SCENE} else None

    def fingerprint_parts(self) -> dict[str, str]:
        """What made this teacher's numbers, as far as the teacher knows: architecture, weights and front end.

        The weights' digest covers the tensors that inference uses, under canonical names: file format,
        prefixes and record do not matter, and neither does the city classifier of a City2Scene file.
        """
        unused = getattr(self.net, "unused_prefixes", ())
        used = {name: tensor for name, tensor in self.net.state_dict().items() if not name.startswith(unused)}
        composition = "+city2scene" if isinstance(self.net, City2Scene) else ""
        return {
            "architecture": f"{self.architecture}/{ARCHITECTURE_VERSION}{composition}",
            "feature_spec": str(self.record.get("feature_spec") or UNSTATED_FRONT_END),
            "weights": weights_digest(used),
        }

    def _class_names(self) -> tuple[str, ...] | None:
        names = self.record.get("class_names")
        if names is None:
            return next((known for known in (DCASE.scenes, DCASE.cities) if len(known) == self.num_classes), None)
        if len(names) != self.num_classes:
            raise CheckpointError(
                f"the record names {len(names)} classes, the weights have {self.num_classes} outputs",
                hint="Write the checkpoint again with one class name per output, in class order.",
            )
        return tuple(names)


def load_teacher(
    path: str | os.PathLike[str],
    *,
    role: str | None = None,
    num_classes: int | None = None,
    num_cities: int | None = None,
) -> LoadedTeacher:
    """The teacher in the checkpoint ``path``: whole, checked, frozen, on the CPU, in evaluation mode.

    ``role`` (scene, city2scene or city), when given, must be what the file is. ``num_classes`` must equal
    the number of outputs; ``num_cities`` that of the city classifier, where there is one. Raises
    CheckpointError, which names the file, what was expected and what was found, for anything that is not a
    complete and finite checkpoint of a known architecture. To let a ``.pth`` you trust call more than
    weights need, load it inside ``torch.serialization.safe_globals([...])``.
    """
    if role is not None and role not in ROLES:
        with naming(path):
            raise CheckpointError(f"no role is called {role!r}", hint=f"Roles are {', '.join(ROLES)}.")
    weights = read_weights(path, integers=False)
    with naming(path):
        _check_role(role, weights.record.get("role"), is_city2scene=weights.has_two_parts)
        build = city2scene_from if weights.has_two_parts else backbone_from
        net: Any = build(weights.tensors, weights.record.get("architecture"), weights.entry)
        teacher = LoadedTeacher(net, source=weights.source, record=weights.record, role=role)
        teacher.checkpoint_sha256 = weights.sha256
        _check_counts(teacher, num_classes, num_cities)
    return teacher


def _check_role(wanted: str | None, recorded: str | None, *, is_city2scene: bool) -> None:
    found = CITY2SCENE if is_city2scene else recorded or "a plain scene or city model"
    if recorded is not None and (recorded == CITY2SCENE) != is_city2scene:
        held = "a City2Scene model" if is_city2scene else "a plain model"
        raise CheckpointError(f"the record says the role is {recorded}, the tensors are those of {held}", hint=AGAIN)
    plain = wanted in {SCENE, CITY} and not is_city2scene and recorded is None
    if wanted is not None and wanted != found and not plain:
        raise CheckpointError(
            f"expected a {wanted} teacher, found {found}",
            hint=f"Give the {wanted} checkpoint here, or use this file for the teacher it is.",
        )


def _check_counts(teacher: LoadedTeacher, num_classes: int | None, num_cities: int | None) -> None:
    own_option = "--num-cities" if teacher.role == CITY else "--num-scenes"
    checks = [(own_option, num_classes, teacher.num_classes)]
    if teacher.num_cities is not None:
        checks.append(("--num-cities", num_cities, teacher.num_cities))
    for option, wanted, found in checks:
        if wanted is not None and wanted != found:
            raise CheckpointError(
                f"expected {wanted} outputs ({option} {wanted}), found {found} in the weights",
                hint=f"Use {option} {found}, or give the checkpoint that was trained for {wanted}.",
            )


class OwnTeacher(nn.Module):
    """A trained net of a user's own, as something that a dump can score with: [B, T, F] → logits [B, C]."""

    value_kind = "logits"

    def __init__(self, net: nn.Module, weights: Weights, settings: Settings) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.num_classes = settings.num_classes
        self.class_names = tuple(weights.record.get("class_names") or ()) or None
        self.provenance, self.source, self.checkpoint_sha256 = weights.provenance, weights.source, weights.sha256
        self.own_features = weights.record.get(OWN_FEATURES)
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
    net = make_net(settings, cities)
    weights = read_weights(path, [net.state_dict().keys()])
    if role == CITY2SCENE:
        head = under(weights.tensors, HEAD_PREFIX)
        hidden = mlp_widths(head, "", (embedding_dim(net), len(names)))[:-1] if "weight" not in head else []
        settings = replace(settings, mlp_hidden_dims=tuple(hidden))
        net = City2Scene(net, make_head(embedding_dim(net), settings))
    kind, told = fill_matching(net, dict(weights.tensors), title, whole=True)
    if kind != FULL_MODEL:
        raise CheckpointError(f"{title} is no whole {arch}: {told}")
    return OwnTeacher(net, weights, settings)


def scene(ckpt: Path | None) -> LoadedTeacher:
    """A scene classifier, trained on the source device."""
    return _loaded("scene", ckpt)


def city2scene(ckpt: Path | None) -> LoadedTeacher:
    """A city teacher's frozen backbone with a linear scene head."""
    return _loaded("city2scene", ckpt)


def city(ckpt: Path | None) -> LoadedTeacher:
    """A city classifier, trained on source and target device."""
    return _loaded("city", ckpt)


def _loaded(role: str, ckpt: Path | None) -> LoadedTeacher:
    if ckpt is None:
        raise CheckpointError(
            f"the {role} teacher has no checkpoint",
            hint="Give its path; outputs/teacher_…/best.safetensors is where training leaves it.",
        )
    return load_teacher(ckpt, role=role)
