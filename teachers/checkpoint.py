"""Teacher checkpoints: written whole, read without trust.

A ``.safetensors`` file holds plain names and, in its metadata under ``kd_cache``, a JSON record. A ``.pth``
file is a dict written by ``torch.save``; it is only ever read with ``weights_only=True``, and there is no
fallback. What is in a file is decided by its content, never by its suffix.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from kd_cache.errors import CheckpointError, StoreError, shown
from kd_cache.provenance import Provenance
from kd_cache.store.atomic import write_atomic
from kd_cache.train.checkpoint_file import AGAIN, MOST_RECORD, RECORD_ENTRY, kind_of, read_content, with_checksum
from kd_cache.train.layers import mlp, mlp_widths, rows
from teachers.builtin import (
    ARCHITECTURE_VERSION,
    ARCHITECTURES,
    Backbone,
    City2Scene,
    LoadedTeacher,
    SceneHead,
    SideBySide,
    backbone_from,
    clean_tensors,
    fill,
    known_names,
    under,
)

CITY_ENTRY: Final = "city_model_state_dict"
HEAD_ENTRY: Final = "scene_head_state_dict"
STATE_PREFIX: Final = "training_state."
"""What a run needs to go on (optimiser, averages) lies beside the weights of its last epoch, under this prefix."""
PLAIN_ENTRIES: Final = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
"""Where a plain model's weights are, in order of preference (as in timm); none of them: the file itself."""

_SEVERAL: Final = "backbones."
_MOST_BACKBONES: Final = 9
ROLES: Final = ("scene", "city2scene", "city")


# --------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that `load_teacher` reads, atomically; the suffix chooses the format.

    ``tensors``: bare names for a plain model, ``city_model_state_dict.<name>`` and
    ``scene_head_state_dict.{weight,bias}`` for City2Scene. ``record``: JSON values; known keys are
    ``architecture``, ``architecture_version``, ``role``, ``class_names``, ``value_kind``, ``feature_spec``,
    ``training`` and ``provenance`` (`Provenance.as_json`). ``.safetensors`` carries the record as metadata
    ``kd_cache``, and a checksum beside it; ``.pth`` as an entry of that name, beside the nested state dicts and the
    plain entries of ``beside`` (``epoch``, ``val_acc``, …). Raises CheckpointError when the file cannot be written; a
    file that was there before then stays.
    """
    path = Path(path)
    if path.suffix not in {".safetensors", ".pth"}:
        raise CheckpointError(f"{shown(path)}: a checkpoint is written as .safetensors or .pth")
    try:
        note = json.dumps(dict(record), sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{shown(path)}: the record must be plain JSON: {error}") from error
    if len(note) > MOST_RECORD[path.suffix]:
        raise CheckpointError(
            f"{shown(path)}: the record has {len(note)} characters, a {path.suffix} holds {MOST_RECORD[path.suffix]}",
            hint="Its provenance takes 22 for each sample that made the teacher.",
        )
    # Clones, because safetensors refuses tensors that share memory.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        write_atomic(path, _serialised(state, note, path.suffix, beside or {}))
    except StoreError as error:
        raise CheckpointError(error.message) from error


def _serialised(state: dict[str, Tensor], note: str, suffix: str, beside: Mapping[str, Any]) -> list[bytes]:
    if suffix == ".safetensors":
        return with_checksum(safetensors_bytes(state), note)
    entries: dict[str, Any] = {"model_state_dict": state}
    if any(name.startswith(f"{CITY_ENTRY}.") for name in state):
        entries = {entry: under(state, f"{entry}.") for entry in (CITY_ENTRY, HEAD_ENTRY)}
    file = io.BytesIO()  # a file object: the bytes then hold no file name
    torch.save({**beside, **entries, RECORD_ENTRY: note}, file)
    return [file.getvalue()]


# --------------------------------------------------------------------------------------------- loading


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
    with _naming(path):
        if role is not None and role not in ROLES:
            raise CheckpointError(f"no role is called {role!r}", hint=f"Roles are {', '.join(ROLES)}.")
        content, size, digest = read_content(path)
        record = _record(content.pop(RECORD_ENTRY, None))
        content = _without_state(content)
        teacher = _assembled(content, record, role, size)
        teacher.checkpoint_sha256 = digest
        _check_counts(teacher, num_classes, num_cities)
    return teacher


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors, float32 under bare names, and what is known of them.

    Those of a City2Scene file are called ``city_model.…`` and ``scene_head.…``. ``source`` says which entries they are
    from and which prefixes were removed.
    """

    tensors: dict[str, Tensor]
    source: str
    record: dict[str, Any]
    sha256: str


def read_weights(path: str | os.PathLike[str], own: frozenset[str] = frozenset()) -> Weights:
    """The tensors of any checkpoint, of a known architecture or not, for a training to begin with.

    ``own`` are the names of a net that they may be of: a prefix that these have is not one that a wrapper added.
    Integers are let through, as they are.

    Raises CheckpointError as `load_teacher` does, but for what does not fit an architecture.
    """
    with _naming(path):
        content, size, digest = read_content(path)
        record = _record(content.pop(RECORD_ENTRY, None))
        content = _without_state(content)
        city, head, label = _selected(content)
        known = own.union(*known_names().values())
        tensors, scene_head, source = _cleaned(city, head, label, known, size, integers=True)
        if scene_head is not None:
            tensors = {f"city_model.{name}": tensor for name, tensor in tensors.items()}
            tensors |= {f"scene_head.{name}": tensor for name, tensor in scene_head.items()}
    return Weights(tensors, source, record, digest)


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing where it has no record. Raises CheckpointError as `read_weights`."""
    with _naming(path):
        return _record(read_content(path)[0].pop(RECORD_ENTRY, None))


def _cleaned(
    city: Mapping[Any, Any],
    head: Mapping[Any, Any] | None,
    label: str,
    known: frozenset[str],
    size: int,
    *,
    integers: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, str]:
    """Both state dicts of a file through `clean_tensors`, and where they are from, in words."""
    tensors, notes = clean_tensors(city, known, size, integers=integers)
    source = ", ".join([label, *notes])
    if head is None:
        return tensors, None, source
    weights, head_notes = clean_tensors(head, frozenset({"weight", "bias"}), size)
    return tensors, weights, " + ".join([source, ", ".join([HEAD_ENTRY, *head_notes])])


def _without_state(content: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in content.items() if not str(name).startswith(STATE_PREFIX)}


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name before the message of every CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{shown(os.fspath(path))}: {error.message}", hint=error.hint) from error.__cause__


def _assembled(content: dict[Any, Any], record: dict[str, Any], role: str | None, size: int) -> LoadedTeacher:
    city, head, label = _selected(content)
    _check_role(role, record.get("role"), is_city2scene=head is not None)
    stated = record.get("architecture")
    names = known_names()[stated] if stated else frozenset[str]().union(*known_names().values())
    tensors, weights, source = _cleaned(city, head, label, names, size)
    if weights is not None and any(name.startswith(_SEVERAL) for name in tensors):
        backbone: Backbone | SideBySide = _several(tensors, label)
    else:
        backbone = backbone_from(tensors, stated, label)
    net: Any = backbone if weights is None else _with_head(backbone, weights)
    return LoadedTeacher(net, source=source, record=record, role=role)


def _several(tensors: Mapping[str, Tensor], label: str) -> SideBySide:
    """The backbones whose tensors are called ``backbones.0.…``, ``backbones.1.…``, …, each whole."""
    numbers = sorted({name.removeprefix(_SEVERAL).partition(".")[0] for name in tensors})
    if numbers != [str(number) for number in range(len(numbers))] or len(numbers) > _MOST_BACKBONES:
        raise CheckpointError(
            f"expected backbones 0, 1, … (at most {_MOST_BACKBONES}) under {label}, found {shown(', '.join(numbers))}",
            hint=AGAIN,
        )
    parts = [under(tensors, f"{_SEVERAL}{number}.") for number in numbers]
    return SideBySide(backbone_from(part, None, f"{label}, backbone {n}") for n, part in enumerate(parts))


def _with_head(city_model: Backbone | SideBySide, weights: Mapping[str, Tensor]) -> City2Scene:
    with torch.device("meta"):
        if any(name[:1].isdecimal() for name in weights):
            *hidden, scenes = mlp_widths(weights, "", (city_model.embedding_dim, 10))
            head: SceneHead = mlp(city_model.embedding_dim, hidden, scenes, 0.0)
        else:
            head = nn.Linear(city_model.embedding_dim, rows(weights, "weight", 10))
    fill(head, weights, f"the scene head ({HEAD_ENTRY}) on this city model")
    return City2Scene(city_model, head)


def _check_role(wanted: str | None, recorded: str | None, *, is_city2scene: bool) -> None:
    found = "city2scene" if is_city2scene else recorded or "a plain scene or city model"
    if recorded is not None and (recorded == "city2scene") != is_city2scene:
        held = "a City2Scene model" if is_city2scene else "a plain model"
        raise CheckpointError(f"the record says the role is {recorded}, the tensors are those of {held}", hint=AGAIN)
    plain = wanted in {"scene", "city"} and not is_city2scene and recorded is None
    if wanted is not None and wanted != found and not plain:
        raise CheckpointError(
            f"expected a {wanted} teacher, found {found}",
            hint=f"Give the {wanted} checkpoint here, or use this file for the teacher it is.",
        )


def _check_counts(teacher: LoadedTeacher, num_classes: int | None, num_cities: int | None) -> None:
    own_option = "--num-cities" if teacher.role == "city" else "--num-scenes"
    checks = [(own_option, num_classes, teacher.num_classes)]
    if teacher.num_cities is not None:
        checks.append(("--num-cities", num_cities, teacher.num_cities))
    for option, wanted, found in checks:
        if wanted is not None and wanted != found:
            raise CheckpointError(
                f"expected {wanted} outputs ({option} {wanted}), found {found} in the weights",
                hint=f"Use {option} {found}, or give the checkpoint that was trained for {wanted}.",
            )


# -------------------------------------------------------------------------- which tensors, which names


def _selected(content: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], Mapping[Any, Any] | None, str]:
    """(weights of the model, scene head or None, which entry): nested entries or flattened names."""
    if CITY_ENTRY in content or HEAD_ENTRY in content:
        return _entry(content, CITY_ENTRY), _entry(content, HEAD_ENTRY), CITY_ENTRY
    label = next((entry for entry in PLAIN_ENTRIES if content.get(entry) is not None), None)
    chosen = _entry(content, label) if label else content
    city, head = _flattened(chosen, CITY_ENTRY), _flattened(chosen, HEAD_ENTRY)
    if not city and not head:
        return chosen, None, label or "bare state dict"
    others = len(chosen) - len(city) - len(head)
    if not city or not head or others:
        raise CheckpointError(
            f"expected names under {CITY_ENTRY} and {HEAD_ENTRY}, both and nothing else;"
            f" found {len(city)}, {len(head)} and {others} others",
            hint=AGAIN,
        )
    return city, head, CITY_ENTRY


def _flattened(chosen: Mapping[Any, Any], entry: str) -> dict[str, Any]:
    return under({name: value for name, value in chosen.items() if isinstance(name, str)}, f"{entry}.")


def _entry(content: Mapping[Any, Any], entry: str) -> Mapping[Any, Any]:
    value = content.get(entry)
    if not isinstance(value, Mapping) or not value:
        raise CheckpointError(
            f"expected a state dict in the entry {entry}, found {kind_of(value)}",
            hint="Save model.state_dict(), not the model: teachers.save_checkpoint does.",
        )
    return value


def _record(note: object) -> dict[str, Any]:
    """The record beside the weights, checked; ``{}`` where there is none."""
    if note is None:
        return {}
    try:
        record = json.loads(note) if isinstance(note, str) else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the record {RECORD_ENTRY} is not JSON: {shown(error)}", hint=AGAIN) from error
    if not isinstance(record, dict):
        raise CheckpointError(f"the record {RECORD_ENTRY} must be a JSON object in a string", hint=AGAIN)
    names = record.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError("class_names of the record must be a list of names", hint=AGAIN)
    if not isinstance(record.get("feature_spec") or "", str):
        raise CheckpointError("feature_spec of the record must be text", hint=AGAIN)
    if record.get("provenance") is not None:
        try:
            Provenance.from_json(record["provenance"])
        except ValueError as error:
            raise CheckpointError(f"provenance of the record: {error}", hint=AGAIN) from error
    for key, allowed in (
        ("architecture", tuple(ARCHITECTURES)),
        ("architecture_version", (ARCHITECTURE_VERSION,)),
        ("role", ROLES),
        ("value_kind", ("logits", "log_probs")),  # of log_probs the LogSoftmax is not built: logits again
    ):
        if record.get(key) is not None and record[key] not in allowed:
            raise CheckpointError(
                f"the record's {key} must be {' or '.join(allowed)}, found {shown(record[key])}",
                hint="A newer kd-cache may have written this file: update kd-cache.",
            )
    return record
