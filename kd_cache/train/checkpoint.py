"""Checkpoints: written whole, read without trust.

A ``.safetensors`` file holds plain names and, in its metadata under ``kd_cache``, a JSON record. A ``.pth`` file is a
dict written by ``torch.save``; it is only ever read with ``weights_only=True``, and there is no fallback. What is in a
file is decided by its content, never by its suffix. A net of two parts, a backbone ``city_model`` and a ``scene_head``
on it, is kept as two state dicts. What is read are plain finite tensors under bare names.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from kd_cache.dataset.provenance import Provenance, without_inputs
from kd_cache.errors import CheckpointError, StoreError, listed, shown
from kd_cache.files.atomic import write_atomic
from kd_cache.score.teacher import OWN_FEATURES
from kd_cache.train.architectures import ARCHITECTURE_VERSION, architectures, is_counter
from kd_cache.train.checkpoint_file import (
    AGAIN,
    MOST_RECORD,
    RECORD_ENTRY,
    THIS_FILE,
    kind_of,
    read_content,
    with_checksum,
)
from kd_cache.train.settings import RANK, ROLES
from kd_cache.train.state_dicts import CITY_ENTRY, CITY_PREFIX, HEAD_ENTRY, HEAD_PREFIX, choose

STATE_PREFIX: Final = "training_state."
"""What a run needs to go on (optimiser, averages) lies beside the weights of its last epoch, under this prefix."""


# --------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that `read_weights` reads, atomically; the suffix chooses the format.

    ``tensors``: bare names for a plain model, ``city_model_state_dict.<name>`` and
    ``scene_head_state_dict.{weight,bias}`` for City2Scene. ``record``: JSON values; known keys are
    ``architecture``, ``architecture_version``, ``role``, ``class_names``, ``value_kind``, ``feature_spec``,
    ``own_features``, ``training`` and ``provenance`` (`Provenance.as_json`; features' digests that are too many are
    left out). ``.safetensors`` carries the record as metadata ``kd_cache``, and a checksum beside it; ``.pth`` as an
    entry of that name, beside the nested state dicts and the plain entries of ``beside`` (``epoch``, ``val_acc``, …).
    Raises CheckpointError when the file cannot be written; a file that was there before then stays.
    """
    path = Path(path)
    if path.suffix not in {".safetensors", ".pth"}:
        raise CheckpointError(f"{shown(path)}: a checkpoint is written as .safetensors or .pth")
    note = _note(path, record)
    if len(note) > MOST_RECORD[path.suffix] and isinstance(record.get("provenance"), Mapping):
        note = _note(path, {**record, "provenance": without_inputs(record["provenance"])})
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


def _note(path: Path, record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(record), sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{shown(path)}: the record must be plain JSON: {error}") from error


def _serialised(state: dict[str, Tensor], note: str, suffix: str, beside: Mapping[str, Any]) -> list[bytes]:
    if suffix == ".safetensors":
        return with_checksum(safetensors_bytes(state), note)
    entries: dict[str, Any] = {"model_state_dict": state}
    if any(name.startswith(f"{CITY_ENTRY}.") for name in state):
        entries = {entry: under(state, f"{entry}.") for entry in (CITY_ENTRY, HEAD_ENTRY)}
    file = io.BytesIO()  # a file object: the bytes then hold no file name
    torch.save({**beside, **entries, RECORD_ENTRY: note}, file)
    return [file.getvalue()]


def checkpoint_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A net's tensors under the names of its checkpoint: those of a net of two parts are two state dicts."""
    return _renamed(tensors, {CITY_PREFIX: f"{CITY_ENTRY}.", HEAD_PREFIX: f"{HEAD_ENTRY}."})


def net_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round: a checkpoint's tensors under the names of the net."""
    return _renamed(tensors, {f"{CITY_ENTRY}.": CITY_PREFIX, f"{HEAD_ENTRY}.": HEAD_PREFIX})


def _renamed(tensors: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        found[prefixes.get(old, "") + name.removeprefix(old)] = tensor
    return found


# --------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors, float32 under bare names, and what is known of them.

    Attributes:
        tensors: those of a net of two parts are called ``city_model.…`` and ``scene_head.…``.
        has_two_parts: whether they are.
        entry: where the tensors are from; ``source`` adds which prefixes were removed, and what was left out.
        record: what the checkpoint says of itself.
        sha256: of the bytes that were read.
    """

    tensors: dict[str, Tensor]
    has_two_parts: bool
    entry: str
    source: str
    record: dict[str, Any]
    sha256: str

    @property
    def provenance(self) -> Provenance | None:
        """The samples that made the net; ``None`` where the record says nothing of them."""
        made_with = self.record.get("provenance")
        return None if made_with is None else Provenance.from_json(made_with)


def read_weights(
    path: str | os.PathLike[str], nets: Sequence[Collection[str]] = (), *, integers: bool = True
) -> Weights:
    """The tensors of any checkpoint, of a known architecture or not.

    Args:
        nets: names of the nets that they may be of (see `choose`).
        integers: let whole numbers and truth values through, as they are; no built-in net has them.

    Raises:
        CheckpointError: names the file, and says what was expected and what was found, for anything that is not a
            complete file of finite tensors.
    """
    with naming(path):
        content, size, digest = read_content(path)
        record = _record(content.pop(RECORD_ENTRY, None))
        content = {name: value for name, value in content.items() if not str(name).startswith(STATE_PREFIX)}
        values, entry, notes = choose(content, size, nets)
        if not values:
            raise _no_state_dict([f"{shown(name)}: {_kind(name, value)}" for name, value in content.items()])
        tensors = _clean(values, FLOATS | INTEGERS if integers else FLOATS)
    two_parts = all(any(name.startswith(prefix) for name in tensors) for prefix in (CITY_PREFIX, HEAD_PREFIX))
    return Weights(tensors, two_parts, entry, ", ".join([entry, *notes]), record, digest)


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing where it has no record. Raises CheckpointError as `read_weights`."""
    with naming(path):
        return _record(read_content(path)[0].pop(RECORD_ENTRY, None))


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name before the message of every CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        hint = error.hint and error.hint.replace(THIS_FILE, repr(os.fspath(path)))
        raise CheckpointError(f"{shown(os.fspath(path))}: {error.message}", hint=hint) from error.__cause__


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
    own = record.get(OWN_FEATURES)
    if own is not None and not (isinstance(own, dict) and all(isinstance(own.get(x), str) for x in ("file", "digest"))):
        raise CheckpointError(f"{OWN_FEATURES} of the record must be a file and its digest", hint=AGAIN)
    if record.get("provenance") is not None:
        try:
            Provenance.from_json(record["provenance"])
        except ValueError as error:
            raise CheckpointError(f"provenance of the record: {error}", hint=AGAIN) from error
    for key, allowed in (
        ("architecture", tuple(architectures())),
        ("architecture_version", (ARCHITECTURE_VERSION,)),
        ("role", (*ROLES, RANK)),
        ("value_kind", ("logits", "log_probs")),  # of log_probs the LogSoftmax is not built: logits again
    ):
        if record.get(key) is not None and record[key] not in allowed:
            raise CheckpointError(
                f"the record's {key} must be {' or '.join(allowed)}, found {shown(record[key])}",
                hint="A newer kd-cache may have written this file: update kd-cache.",
            )
    return record


FLOATS: Final = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
INTEGERS: Final = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool})


def _clean(tensors: Mapping[str, Any], kinds: frozenset[torch.dtype]) -> dict[str, Tensor]:
    """Finite tensors, those with fractions as float32. Raises CheckpointError for values that are none of ``kinds``."""
    if wrong := [f"{shown(name)}: {what}" for name, value in tensors.items() if (what := _flaw(name, value, kinds))]:
        raise _no_state_dict(wrong)
    whole = {name for name, tensor in tensors.items() if tensor.dtype in INTEGERS and not is_counter(name)}
    full = {
        name: tensor.detach().to(tensor.dtype if name in whole else torch.float32).contiguous()
        for name, tensor in tensors.items()
    }
    if bad := [name for name, tensor in full.items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(
            f"expected finite weights, found NaN or Inf in {len(bad)} tensors:\n{listed(bad)}",
            hint="The training diverged or the file is damaged: use an earlier checkpoint.",
        )
    return full


def _no_state_dict(found: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"expected a state dict of dense float tensors, found\n{listed(found or ['nothing'])}",
        hint="Save model.state_dict() as {'model_state_dict': …}, or with teachers.save_checkpoint.",
    )


def _kind(name: object, value: object) -> str:
    return kind_of(value) if isinstance(name, str) else "a name that is not text"


def _flaw(name: str, value: object, kinds: frozenset[torch.dtype]) -> str | None:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if type(value) not in {Tensor, nn.Parameter} or value.layout != torch.strided or value.is_quantized:
        return f"a {type(value).__name__}, {value.layout}"
    if value.device.type != "cpu":
        return f"no data ({value.device.type})"
    if not value.numel():
        return f"an empty tensor {list(value.shape)}"
    if not is_counter(name) and value.dtype not in kinds:
        return str(value.dtype).removeprefix("torch.")
    return None


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
