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
import pickle
import pickletools
import re
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import torch
from safetensors.torch import load as tensors_of_safetensors
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from kd_cache.errors import CheckpointError, listed, shown
from teachers.builtin import (
    ARCHITECTURE_VERSION,
    ARCHITECTURES,
    Backbone,
    City2Scene,
    LoadedTeacher,
    backbone_from,
    clean_tensors,
    fill,
    known_names,
    under,
)

CITY_ENTRY: Final = "city_model_state_dict"
HEAD_ENTRY: Final = "scene_head_state_dict"
RECORD_ENTRY: Final = "kd_cache"
PLAIN_ENTRIES: Final = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
"""Where a plain model's weights are, in order of preference (as in timm); none of them: the file itself."""

ROLES: Final = ("scene", "city2scene", "city")
MOST_BYTES: Final = 4 << 30
"""Larger files are refused unread: CNN14 has 0.32 GB of weights, 1 GB with its optimizer."""
MOST_HEADER: Final = 100_000_000
LEGACY_PICKLES: Final = 5  # magic number, protocol, machine, the object, the keys of its storages
MOST_PICKLE: Final = 4 << 20
"""A state dict takes some 250 bytes of pickle per tensor; a longer one only keeps the reader busy."""
WEIGHTS_GLOBAL: Final = re.compile(r"collections\.OrderedDict|torch\.\w+Storage|torch\._utils\._rebuild_\w+")

AGAIN: Final = "Copy the file again from where it was made, or write it again with teachers.save_checkpoint."


# --------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write a checkpoint that `load_teacher` reads, atomically; the suffix chooses the format.

    ``tensors``: bare names for a plain model, ``city_model_state_dict.<name>`` and
    ``scene_head_state_dict.{weight,bias}`` for City2Scene. ``record``: JSON values; known keys are
    ``architecture``, ``architecture_version``, ``role``, ``class_names``, ``value_kind``, ``feature_spec``
    and ``training``. ``.safetensors`` carries the record as metadata ``kd_cache``; ``.pth`` as an entry of
    that name, beside the nested state dicts. Raises CheckpointError when the file cannot be written; a file
    that was there before then stays.
    """
    path = Path(path)
    if path.suffix not in {".safetensors", ".pth"}:
        raise CheckpointError(f"{shown(path)}: a checkpoint is written as .safetensors or .pth")
    try:
        note = json.dumps(dict(record), sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{shown(path)}: the record must be plain JSON: {error}") from error
    # Clones, because safetensors refuses tensors that share memory.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        _write_whole(path, state, note)
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: cannot write the checkpoint: {error.strerror}") from error


def _write_whole(path: Path, state: dict[str, Tensor], note: str) -> None:
    """Unique temporary name, fsync, replace, fsync of the directory; no temporary file survives a failure."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.stem[:100]}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would lock colleagues out
            _serialise(file, state, note, path.suffix)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _serialise(file: IO[bytes], state: dict[str, Tensor], note: str, suffix: str) -> None:
    if suffix == ".safetensors":
        file.write(safetensors_bytes(state, metadata={RECORD_ENTRY: note}))
        return
    entries: dict[str, Any] = {"model_state_dict": state}
    if any(name.startswith(f"{CITY_ENTRY}.") for name in state):
        entries = {entry: under(state, f"{entry}.") for entry in (CITY_ENTRY, HEAD_ENTRY)}
    torch.save({**entries, RECORD_ENTRY: note}, file)  # to a file object: the bytes then hold no file name


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
        content, size = _content(path)
        record = _record(content.pop(RECORD_ENTRY, None))
        teacher = _assembled(content, record, role, size)
        _check_counts(teacher, num_classes, num_cities)
    return teacher


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name before the message of every CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{shown(os.fspath(path))}: {error.message}", hint=error.hint
        ) from error.__cause__


def _assembled(content: dict[Any, Any], record: dict[str, Any], role: str | None, size: int) -> LoadedTeacher:
    city, head, label = _selected(content)
    _check_role(role, record.get("role"), is_city2scene=head is not None)
    stated = record.get("architecture")
    names = known_names()[stated] if stated else frozenset[str]().union(*known_names().values())
    tensors, notes = clean_tensors(city, names, size)
    backbone = backbone_from(tensors, stated, label)
    source = ", ".join([label, *notes])
    net: Backbone | City2Scene = backbone
    if head is not None:
        weights, head_notes = clean_tensors(head, frozenset({"weight", "bias"}), size)
        net = _with_head(backbone, weights)
        source = " + ".join([source, ", ".join([HEAD_ENTRY, *head_notes])])
    return LoadedTeacher(net, source=source, record=record, role=role)


def _with_head(city_model: Backbone, weights: Mapping[str, Tensor]) -> City2Scene:
    weight = weights.get("weight")
    scenes = weight.shape[0] if weight is not None and weight.ndim else 10
    with torch.device("meta"):
        head = nn.Linear(city_model.embedding_dim, scenes)
    fill(head, weights, f"the scene head ({HEAD_ENTRY}) on this city model")
    return City2Scene(city_model, head)


def _check_role(wanted: str | None, recorded: str | None, *, is_city2scene: bool) -> None:
    found = "city2scene" if is_city2scene else recorded or "a plain scene or city model"
    if recorded is not None and (recorded == "city2scene") != is_city2scene:
        held = "a City2Scene model" if is_city2scene else "a plain model"
        raise CheckpointError(
            f"the record says the role is {recorded}, the tensors are those of {held}", hint=AGAIN
        )
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
            f"expected a state dict in the entry {entry}, found {_kind(value)}",
            hint="Save model.state_dict(), not the model: teachers.save_checkpoint does.",
        )
    return value


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    empty = isinstance(value, dict | list | str) and not value
    return f"an empty {type(value).__name__}" if empty else f"a {type(value).__name__}"


# --------------------------------------------------------------------------------- the bytes of a file


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


def _content(path: str | os.PathLike[str]) -> tuple[dict[Any, Any], int]:
    """The file's entries and its size in bytes. The record, if any, is the entry ``kd_cache``."""
    with _regular_file(path) as file:
        before = os.fstat(file.fileno())
        try:
            content = _parsed(file, before.st_size)
        except CheckpointError:
            raise
        except Exception as error:  # hostile bytes lead the parsers to any error at all; none may escape
            raise CheckpointError(
                f"the file is damaged or not a checkpoint: {_brief(error)}", hint=AGAIN
            ) from error
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError(
            "the file changed while it was read", hint="Wait until it is written, then retry."
        )
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a dict of tensors, found {_kind(content)}", hint=AGAIN)
    return dict(content), before.st_size


@contextlib.contextmanager
def _regular_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    try:
        # O_NONBLOCK: a FIFO would otherwise wait for a writer, forever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot open the checkpoint: {reason}", hint="Check the path.") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError("expected a file, found a directory, pipe or device", hint="Check the path.")
    with os.fdopen(handle, "rb") as file:
        yield file


def _parsed(file: IO[bytes], size: int) -> object:
    """Whatever the file's first bytes say it is; the caller turns any other error into a CheckpointError."""
    head = file.read(512)
    file.seek(0)
    if not head:
        raise CheckpointError("the file is empty", hint=AGAIN)
    if size > MOST_BYTES:
        raise CheckpointError(
            f"the file has {size} bytes; teachers of up to {MOST_BYTES} are read",
            hint="Save the weights alone, without optimizer state, with teachers.save_checkpoint.",
        )
    # A safetensors file starts with the length of its header as 8 bytes, little-endian, then the JSON itself.
    if head[8:9] == b"{" and head[6:8] == b"\0\0":
        return _from_safetensors(file, size)
    if head.startswith(b"PK\x03\x04"):
        return _from_zip(file, size)
    if head[0] == 0x80:
        return _from_legacy_pickle(file)
    raise CheckpointError(
        f"expected safetensors or a file of torch.save, found {_look(head)}",
        hint="If it was downloaded, a page or a pointer came in its place: fetch the file itself.",
    )


def _look(head: bytes) -> str:
    start = shown(head[:40].decode("ascii", "backslashreplace"))
    if b"<html" in head.lower() or b"<!doctype" in head.lower():
        return f"an HTML page ({start} …)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if head[257:262] == b"ustar":
        return "a tar archive (torch before 0.4 wrote those; they cannot be read safely)"
    return f"a file that starts with {start}"


def _from_safetensors(file: IO[bytes], size: int) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER or length + 8 > size:
        raise CheckpointError(
            f"the safetensors header claims {length} bytes; the file has {size}, allowed are {MOST_HEADER}",
            hint=AGAIN,
        )
    header = file.read(length)
    metadata = json.loads(header).get("__metadata__") or {}
    file.seek(0)
    tensors: dict[str, Any] = tensors_of_safetensors(file.read())
    return {**tensors, RECORD_ENTRY: metadata[RECORD_ENTRY]} if RECORD_ENTRY in metadata else tensors


def _from_zip(file: IO[bytes], size: int) -> object:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    names = {member.filename.rpartition("/")[2] for member in members}
    if "data.pkl" not in names or "constants.pkl" in names:
        kind = "a TorchScript archive" if "constants.pkl" in names else "another zip file"
        raise CheckpointError(f"expected a file of torch.save, found {kind}", hint=AGAIN)
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed or sum(member.file_size for member in members) > size:
        raise CheckpointError(
            "the zip members are compressed or overlap; torch.save writes neither, and they could"
            f" unpack to any size\n{listed(packed)}".rstrip(),
            hint=AGAIN,
        )
    pickles = [member for member in members if member.filename.endswith("data.pkl")]
    if sum(member.file_size for member in pickles) > MOST_PICKLE:
        raise CheckpointError(f"the file's structure is larger than {MOST_PICKLE} bytes", hint=AGAIN)
    with zipfile.ZipFile(file) as archive:
        called, _ = _globals_in(archive.read(pickles[0]))
    file.seek(0)
    return _weights_only(file, called)


def _from_legacy_pickle(file: IO[bytes]) -> object:
    """Files of torch.save before 1.6, several pickles in a row, then the numbers; and any plain pickle."""
    start = file.read(MOST_PICKLE)
    called, pickles = _globals_in(start)
    if len(start) == MOST_PICKLE and pickles < LEGACY_PICKLES:
        raise CheckpointError(f"the file's structure is larger than {MOST_PICKLE} bytes", hint=AGAIN)
    file.seek(0)
    return _weights_only(file, called)


def _weights_only(file: IO[bytes], called: set[str]) -> object:
    try:
        with warnings.catch_warnings():
            # What torch warns of here, a newer protocol, it then refuses with an error where it matters.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        foreign = sorted(name for name in called if not WEIGHTS_GLOBAL.fullmatch(name))
        if not foreign:
            raise
        raise CheckpointError(
            f"this pickle calls more than weights need; it was refused and nothing ran:\n{listed(foreign)}",
            hint="Ask for a .safetensors file. If you trust this one, load it inside"
            " torch.serialization.safe_globals([...]) and save it again with teachers.save_checkpoint.",
        ) from error


def _globals_in(pickled: bytes) -> tuple[set[str], int]:
    """What the pickles at the start of ``pickled`` refer to, without running them; how many there are."""
    names: set[str] = set()
    pickles = 0
    words: list[str] = []
    stream = io.BytesIO(pickled)
    with contextlib.suppress(Exception):  # the end of the pickles, or damage, which torch.load reports
        while pickles < LEGACY_PICKLES:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in {"GLOBAL", "INST"}:
                    names.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(".".join(words[-2:]))
                elif isinstance(argument, str):
                    words = [*words[-1:], argument]
            pickles += 1
    return names, pickles


def _brief(error: BaseException) -> str:
    """The first line of ``error``; without torch's own advice, which is to let the file run code."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    line = (
        "" if not text or "weights_only" in text.splitlines()[0] else f": {shown(text.splitlines()[0])[:200]}"
    )
    return f"{type(error).__name__}{line}"
