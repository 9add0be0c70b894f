"""What made a number: the fingerprint of a teacher, and the digest of the features it saw.

A row is only as good as the answer to "which weights, which network, which input made it?". The *fingerprint* is a
SHA-256 over named parts, kept with the rows, so that a difference can be reported by name. The *input digest* is an
xxh3-128 over the feature array; it finds accidents (a regenerated file), not an attacker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_cache.errors import TeacherError, UsageError, shown
from kd_cache.store.topk import TopKCodec, k_of

if TYPE_CHECKING:
    import torch

STORED = {"fp32": "<f4", "fp16": "<f2"}
VALUE_KINDS = ("logits", "log_probs", "probs", "sigmoid", "embedding")
FRAMES = "frames_per_row"
"""The part of a fingerprint that says how many vectors a row holds, where it is more than a single one."""
VIEWS = "view_policy"
"""The part that says how the inputs of views were augmented (`kd_cache.dataset.views`); absent where there are none."""
FORMAT_VERSION = 1
"""Version of what a number means. It is a part of every fingerprint: with another, every row is scored again."""
FILE_VERSION = 2
"""Version of the packs and records that are written. All up to it are read; a row's fingerprint is the same in each."""


@dataclass(frozen=True)
class Fingerprint:
    """Named parts, and one digest over all of them.

    ``parts`` maps a part's name (``weights``, ``architecture``, ``precision``, …) to its value as text.
    """

    parts: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """SHA-256, 64 hex digits, over the canonical JSON of ``parts`` (sorted keys, no spaces, UTF-8)."""
        return hashlib.sha256(canonical_json(dict(self.parts))).hexdigest()

    def differing_parts(self, other: Fingerprint) -> list[str]:
        """Names of the parts in which the two differ, sorted; ``[]`` when they are equal."""
        names = set(self.parts) | set(other.parts)
        return sorted(name for name in names if self.parts.get(name) != other.parts.get(name))

    def difference(self, other: Fingerprint) -> str:
        """Each differing part as ``name: mine → theirs`` for a message; long values are shortened."""
        return "; ".join(
            f"{name}: {_short(self.parts.get(name))} → {_short(other.parts.get(name))}"
            for name in self.differing_parts(other)
        )


def _short(value: str | None, most: int = 40) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= most else f"{value[: most // 2]}…"


def canonical_json(value: Any) -> bytes:
    """The one JSON text of ``value``: sorted keys, no spaces, no NaN, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, in name order.

    Counters of seen batches (``num_batches_tracked``) are left out: inference does not use them. The file format,
    the order of the entries and the device do not matter.

    Raises:
        TeacherError: an entry is not a tensor (a module's ``get_extra_state``), so it has no bytes to digest.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        if name.rsplit(".", 1)[-1] == "num_batches_tracked" and _is_counter(state[name]):
            continue
        if not isinstance(state[name], torch.Tensor):
            raise TeacherError(
                f"the state dict's {shown(name)} is not a tensor but {type(state[name]).__name__}",
                hint='Name the digest of all that inference uses in fingerprint_parts() as "weights".',
            )
        tensor = state[name].detach().cpu().contiguous()
        record = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(canonical_json(record))
        # bfloat16 has no numpy dtype: hash the bytes themselves. A 0-d tensor must be flattened before viewing.
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_counter(value: Any) -> bool:
    """Whether it is what a batch norm counts with, and no parameter that happens to be called so."""
    return getattr(value, "ndim", 0) == 0 and not getattr(value, "is_floating_point", bool)()


def class_order(names: Iterable[str] | None, num_classes: int) -> str:
    """The class order as a fingerprint part: the names joined, a digest when that is long, or the bare indices."""
    if names is None:
        return f"0..{num_classes - 1}"
    listed = list(names)
    if len(listed) != num_classes:
        raise UsageError(f"expected {num_classes} class names, one per class, found {len(listed)}")
    joined = json.dumps(listed, ensure_ascii=False)
    return joined if len(joined) <= 1000 else "sha256:" + hashlib.sha256(joined.encode()).hexdigest()


@dataclass(frozen=True)
class Origin:
    """What made the rows of a pack; ``dtype`` is ``fp32``, ``fp16`` or ``topk:K``.

    Rows of a teacher that scores each frame are L vectors ``[L, C]``, stored as one of L · C values. Top-k rows are W
    bytes, which `topk` reads. ``views`` are the views that a row holds one after the other, neighbours in ascending
    order; none where the fingerprint has no policy.
    """

    teacher: str
    fingerprint: Fingerprint
    value_kind: str
    num_classes: int
    dtype: str
    class_names: tuple[str, ...] | None = None
    views: tuple[int, ...] = ()

    @cached_property
    def topk(self) -> TopKCodec | None:
        """How top-k rows are read; ``None`` where a row is the vector itself."""
        k = k_of(self.dtype)
        return None if k is None else TopKCodec(k, self.num_classes)

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of a row's values."""
        return np.dtype(np.uint8 if self.topk else STORED[self.dtype])

    @cached_property
    def frames(self) -> int | None:
        """L of rows ``[L, C]``; ``None`` where a row is one vector ``[C]``."""
        text = self.fingerprint.parts.get(FRAMES, "")
        return int(text) if text.isascii() and text.isdecimal() and 0 < int(text[:9]) == int(text) else None

    @property
    def width(self) -> int:
        """How many values a row has."""
        return self.topk.width if self.topk else self.num_classes * (self.frames or 1) * (len(self.views) or 1)

    @property
    def policy(self) -> str | None:
        """The policy of its views, as `Policy.from_text` takes it."""
        return self.fingerprint.parts.get(VIEWS)

    def of_views(self, views: tuple[int, ...]) -> Origin:
        """The same with these views in a row."""
        return replace(self, views=views)

    def encoded(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows as they are stored of ``[n, L · C]`` float32, and ``[n]`` bool which of them can be."""
        if self.topk is None:
            with np.errstate(over="ignore"):  # what overflows to inf is told apart here
                stored = logits.astype(self.stored)
            return stored, np.isfinite(stored).all(axis=1)
        good = np.isfinite(logits).all(axis=1)
        rows = self.topk.encode(np.where(good[:, None], logits, 0))
        return rows, good & np.isfinite(self.topk.split(rows)["log_probs"]).all(axis=1)

    def as_vectors(self, rows: np.ndarray) -> np.ndarray:
        """``[n, V · L · C]`` rows as ``[n · V · L, C]``."""
        return rows if self.frames is None and not self.views else rows.reshape(-1, self.num_classes)

    def as_clips(self, rows: np.ndarray) -> np.ndarray:
        """``[n, C]``: a row's mean over its frames, of its first view. Not of top-k rows."""
        rows = rows[:, : self.num_classes * (self.frames or 1)]
        return rows if self.frames is None else rows.reshape(len(rows), self.frames, -1).mean(axis=1)

    def decisions(self, rows: np.ndarray) -> np.ndarray:
        """``[n]``: the largest class of each row."""
        return self.topk.split(rows)["ids"][:, 0] if self.topk else self.as_clips(rows).argmax(axis=1)


def is_dtype(text: str) -> bool:
    """Whether rows can be stored so."""
    return text in STORED or k_of(text) is not None
