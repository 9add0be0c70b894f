"""What a teacher is to kd-cache: a callable that turns features into one vector per sample, and says what it is.

Built-in teachers and a user's own come through the same door: a factory ``factory(ckpt: Path | None) -> Teacher``,
named ``module:factory`` or ``path/to/file.py:factory``, or registered in the entry-point group ``kd_cache.teachers``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.features import Feature, FeatureSource
from kd_cache.dataset.front_end import differences
from kd_cache.dataset.manifest import FRONT_END, Manifest
from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import TeacherError, UsageError, listed, shown
from kd_cache.options import home_path
from kd_cache.score.factory import resolve_factory, users_code
from kd_cache.store.index import is_teacher_name
from kd_cache.store.origin import (
    FORMAT_VERSION,
    FRAMES,
    VALUE_KINDS,
    VIEWS,
    Fingerprint,
    Origin,
    class_order,
    is_dtype,
    weights_digest,
)
from kd_cache.store.topk import k_of, refuse
from kd_cache.watch import Watcher

if TYPE_CHECKING:
    import torch

    from kd_cache.score.unregistered import Unregistered

OWN_FEATURES = "own_features"
"""What the record of a student with features of its own has, and the teacher made of it: a ``file`` that it was trained
on, and the ``digest`` of that one's feature.
"""
UNREGISTERED = "unregistered"
"""The part of a fingerprint that covers what a module computes with besides its state dict."""
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_OURS = ("value_kind", "num_classes", "class_order", "precision", "dtype", "format_version")


class Teacher(Protocol):
    """The contract.

    Optional on top of it: ``class_names`` (one per class), ``num_bins`` (the F that it was made for), ``num_frames``
    (the one L of a teacher that scores each frame and returns ``[B, L, C]``), ``to(device)``,
    ``eval()``, ``state_dict()``, and ``provenance``, a `kd_cache.Provenance` of the samples that it was made with:
    where one of them is not permitted, the teacher is refused.

    Attributes:
        num_classes: C.
        value_kind: ``logits`` (raw, before softmax), ``log_probs``, ``probs`` or ``sigmoid``.
    """

    num_classes: int
    value_kind: str

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Score features ``[B, T, F]`` float32 as ``[B, C]``; row i depends on sample i alone."""

    def fingerprint_parts(self) -> Mapping[str, str]:
        """What the numbers depend on besides the input: at least ``architecture`` (with a version), and ``weights``.

        ``weights`` may be left out by a teacher with a ``state_dict()``: it is digested here. ``feature_spec`` names
        the front end. Any further part is kept as it is. Buffers that are not saved, and tensors and numbers in
        attributes, are digested with ``weights``, where these are left out.
        """


Factory = Callable[[Path | None], Teacher]


@dataclass(frozen=True)
class TeacherSpec:
    """One teacher to load: its name in the cache, where its factory is, and its checkpoint if it has one."""

    name: str
    factory: str
    checkpoint: Path | None = None

    def load(self) -> Teacher:
        """Import the factory and call it. Raises `UsageError`, `TeacherError` or what the factory raises of ours."""
        factory: Factory = resolve_factory(self.factory)
        what = f"the factory {shown(self.factory)} of teacher {self.name} failed"
        with users_code(lambda why: TeacherError(f"{what}: {why}")):
            teacher = factory(self.checkpoint)
        with users_code(lambda why: TeacherError(f"teacher {self.name} cannot be asked what it is: {why}")):
            check_teacher(self.name, teacher)
        return teacher


def parse_teacher(text: str) -> TeacherSpec:
    """``NAME=module:factory[,ckpt=PATH]``, or a file: ``NAME=path/to/file.py:factory``.

    With ``NAME[,ckpt=PATH]`` the factory is the entry point of that name.
    """
    head, separator, checkpoint = text.partition(",ckpt=")
    name, named, factory = head.partition("=")
    tail = head.rpartition(":")[2].partition(",")[1:]  # a path before it may have commas, and a factory has none
    if (separator and not checkpoint) or tail[0]:
        found = f"{tail[0]}{tail[1]}{separator}{checkpoint}"
        raise UsageError(f"--teacher {shown(text)}: expected ,ckpt=PATH after the factory, found {shown(found)}")
    if not is_teacher_name(name):
        raise UsageError(
            f'--teacher {shown(text)}: "{shown(name)}" cannot be a teacher\'s name (letters, digits, _ . -)'
        )
    if name == "ckpt":  # a list in a settings file splits at its commas
        raise UsageError(f"--teacher {shown(text)}: a teacher cannot be called ckpt; put NAME=…,ckpt=PATH in quotes")
    if named and not factory:
        raise UsageError(f"--teacher {shown(text)}: expected module:factory after {name}=, or path/to/file.py:factory")
    return TeacherSpec(name, factory or name, home_path(checkpoint) if separator else None)


def check_teacher(name: str, teacher: Any) -> None:
    """Raise `TeacherError` if an object does not satisfy the `Teacher` contract."""
    classes, kind = getattr(teacher, "num_classes", None), getattr(teacher, "value_kind", None)
    if not callable(teacher) or type(classes) is not int or classes < 1:
        raise TeacherError(
            f"teacher {name} must be callable and have num_classes, an integer ≥ 1; found {shown(classes)}"
        )
    if kind not in VALUE_KINDS:
        raise TeacherError(f"teacher {name}: value_kind is {shown(kind)!r}, expected one of {', '.join(VALUE_KINDS)}")
    if not callable(getattr(teacher, "fingerprint_parts", None)):
        raise TeacherError(
            f"teacher {name} has no fingerprint_parts(): without it, nobody could tell when its logits are stale",
            hint='Return at least {"architecture": "mine/1"}; weights are added from state_dict().',
        )
    class_names = getattr(teacher, "class_names", None)
    if class_names is not None and not (isinstance(class_names, list | tuple) and all(map(_is_text, class_names))):
        raise TeacherError(f"teacher {name}: class_names must be a list of texts, one per class")
    for size in ("num_bins", "num_frames"):
        found = getattr(teacher, size, None)
        if found is not None and not (isinstance(found, Integral) and int(found) >= 1):
            raise TeacherError(f"teacher {name}: {size} must be an integer ≥ 1, or None; found {shown(repr(found))}")
    if not isinstance(getattr(teacher, "provenance", None), Provenance | None):
        raise TeacherError(f"teacher {name}: provenance must be a kd_cache.Provenance, or None")
    teacher_fingerprint(teacher)
    _remember_as_loaded(teacher)


def teacher_fingerprint(
    teacher: Teacher,
    *,
    precision: str = "fp32",
    dtype: str = "fp32",
    front_end: str | None = None,
    policy: str | None = None,
) -> Fingerprint:
    """The fingerprint of the rows this teacher makes when computing in ``precision`` and stored as ``dtype``.

    ``front_end`` is the manifest's `Manifest.front_end_text`; where a manifest says nothing there is no such part,
    nor one of the ``policy`` of views (`kd_cache.dataset.views.Policy.text`) where there are none.
    """
    parts = _own_parts(teacher)
    if front_end is not None:
        parts = {f"own_{part}" if part == FRONT_END else part: text for part, text in parts.items()}
        parts[FRONT_END] = front_end
    if (frames := getattr(teacher, "num_frames", None)) is not None:
        parts[FRAMES] = str(int(frames))
    if policy is not None:
        parts[VIEWS] = policy
    names = getattr(teacher, "class_names", None)
    ours = (
        teacher.value_kind,
        str(teacher.num_classes),
        class_order(names, teacher.num_classes),
        precision,
        dtype,
        str(FORMAT_VERSION),
    )
    return Fingerprint(parts | dict(zip(_OURS, ours, strict=True)))


def _own_parts(teacher: Teacher) -> dict[str, str]:
    """What a teacher says of itself, and its weights."""
    who = f"fingerprint_parts() of {type(teacher).__name__}"
    state_dict = getattr(teacher, "state_dict", None)
    with users_code(lambda why: TeacherError(f"{who} failed: {why}")):
        parts = dict(teacher.fingerprint_parts())
        if "weights" not in parts and callable(state_dict):
            parts["weights"] = weights_digest(state := state_dict())
            further = _as_loaded(teacher, state).digest
            if further is not None:
                parts[UNREGISTERED] = further
    for part in ("weights", "architecture"):
        if not parts.get(part):
            raise TeacherError(f"{who} must name {part!r}")
    parts.setdefault("feature_spec", "unstated")
    if not all(_is_text(text) for item in parts.items() for text in item):
        raise TeacherError(f"{who} must map names to texts")
    # A name that kd-cache fills in itself is kept beside its own: whatever a teacher names must count.
    return {f"own_{part}" if part in (*_OURS, FRAMES, VIEWS) else part: text for part, text in parts.items()}


def _is_text(value: Any) -> bool:
    """Whether it is a text that UTF-8 can hold: no lone surrogates."""
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode("utf-8")


_LOADED: weakref.WeakKeyDictionary[Any, Unregistered] = weakref.WeakKeyDictionary()


def _as_loaded(teacher: Any, state: Mapping[str, Any]) -> Unregistered:
    """What it held besides its state dict when it was loaded: what a forward keeps for the next one is no setting."""
    from kd_cache.score.unregistered import unregistered

    with suppress(TypeError):  # it cannot be a key
        if teacher in _LOADED:
            return _LOADED[teacher]
    return unregistered(teacher, state)


def _remember_as_loaded(teacher: Any) -> None:
    if callable(getattr(teacher, "state_dict", None)):
        with suppress(TypeError):
            _LOADED[teacher] = _as_loaded(teacher, teacher.state_dict())


def unknown_state(teacher: Any) -> list[str]:
    """Attributes that may hold what no fingerprint covers; none where the teacher names its ``weights`` itself."""
    state_dict = getattr(teacher, "state_dict", None)
    if not callable(state_dict) or "weights" in teacher.fingerprint_parts():
        return []
    return _as_loaded(teacher, state_dict()).unknown


def teacher_origin(
    name: str,
    teacher: Teacher,
    *,
    precision: str = "fp32",
    dtype: str = "fp32",
    front_end: str | None = None,
    policy: str | None = None,
    views: int = 0,
) -> Origin:
    """What the store keeps with this teacher's rows of so many views. Arguments as for `teacher_fingerprint`."""
    if not is_dtype(dtype):
        raise UsageError(f"dtype is {shown(dtype)!r}, expected one of fp32, fp16, topk:K")
    if (k := k_of(dtype)) is not None:
        refuse(k, teacher.num_classes, teacher.value_kind, getattr(teacher, "num_frames", None), name)
    if k is not None and views:
        raise UsageError("top-k rows have no views yet", hint="Store views as --dtype fp32 or fp16.")
    if precision not in PRECISIONS:
        raise UsageError(f"precision is {shown(precision)!r}, expected one of {', '.join(PRECISIONS)}")
    names = getattr(teacher, "class_names", None)
    return Origin(
        name,
        teacher_fingerprint(teacher, precision=precision, dtype=dtype, front_end=front_end, policy=policy),
        teacher.value_kind,
        teacher.num_classes,
        dtype,
        None if names is None else tuple(names),
        tuple(range(views)),
    )


def compare_front_ends(
    teachers: Mapping[str, Teacher], data: Dataset, watcher: Watcher, given: FeatureSource | None = None
) -> None:
    """`compare_front_end` of each, and of a student with features of its own whether they are these.

    ``given``: features that are named for the teacher, in place of the manifest's: nothing says what made them.
    """
    for name, teacher in teachers.items():
        if (own := getattr(teacher, OWN_FEATURES, None)) is not None:
            _refuse_other_features(
                name, own, data.features if given is None else given, watcher, named=given is not None
            )
        if given is None:
            compare_front_end(name, _own_parts(teacher)["feature_spec"], data.manifest, watcher)


def _refuse_other_features(
    name: str, own: Mapping[str, str], source: FeatureSource, watcher: Watcher, *, named: bool
) -> None:
    """By one feature that it was trained on. Where that is not at hand, features must have been ``named`` for it."""
    found = source.try_read(own["file"])
    if isinstance(found, Feature) and found.digest.hex() == own["digest"]:
        return
    if isinstance(found, Feature) or not named:
        raise TeacherError(
            f"{shown(name)} is a student with features of its own, and these are not they (by {shown(own['file'])}, "
            "which it was trained on)",
            hint="Give it those: to evaluate with --student-features; to a dump as its manifest's features "
            "(--data-root, or --features for one HDF5 file).",
        )
    watcher.note(
        f"{shown(name)} is a student with features of its own; {shown(own['file'])}, which it was trained on, is not "
        "among those named, so whether they are made alike is not known"
    )


def compare_front_end(name: str, stated: str, manifest: Manifest, watcher: Watcher) -> None:
    """Refuse features made by another front end than a teacher says it was trained with; note what nobody knows.

    Raises:
        TeacherError: the teacher and the manifest differ in parameters that both state.
    """
    if manifest.front_end is None:
        return
    found = differences(stated, manifest.front_end)
    if found is None:
        watcher.note(
            f"{shown(name)} does not state the front end it was trained with, as parameters: whether it is the "
            "manifest's is not known"
        )
    elif found:
        raise TeacherError(
            f"{shown(name)} was trained with another front end than made the manifest's features\n{listed(found)}",
            hint="Prepare the features anew with the teacher's front end (kd-cache prepare --features).",
        )
