"""Views: augmented inputs that teachers score and students see again, to the bit.

A policy says how inputs may be changed. View 0 is the clean input, always. What is done for another view is drawn from
(policy with its seed, key, view) and kept beside the row as integers; `Policy.apply` is a function of the clean input,
these integers and the policy alone. It computes in float32 with operations that are rounded alike everywhere: copies,
minima, one addition.

A policy file (YAML) names the changes it wants, which are applied in this order::

    seed: 0
    decibel: 0.2302585                             # one decibel in units of the features (natural logarithm of power)
    device_response: {points: 6, decibels: [-4, 4]}  # a smooth gain over the bins through so many random points
    gain: {decibels: [-6, 6]}
    roll: {frames: [-10, 10]}
    crop: {frames: [32, 48]}                       # so many frames are kept, and repeated up to the former length
    time_masks: {count: 2, frames: [0, 8]}         # what is masked has the smallest value of the input
    frequency_masks: {count: 1, bins: [0, 8]}

The integers of a view, D in all: its number (of 0, the clean one, the next are 0), those of each change in this order,
and the xxh3-64 of the augmented array's bytes, low half first. Decibels are in hundredths above the lower end of their
range, a roll in frames above its lower end, everything else in frames or bins: of a crop its length and start, of a
mask its width and start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import yaml

from kd_cache.dataset.features import Feature, FeatureSource
from kd_cache.errors import CorruptError, FeatureError, StaleError, UsageError, listed, shown
from kd_cache.files.atomic import open_file
from kd_cache.keys import sample_key

_MOST_BYTES = 1 << 16
_CHANGES: dict[str, dict[str, tuple[float, float]]] = {
    "device_response": {"points": (2, 64), "decibels": (-100, 100)},
    "gain": {"decibels": (-100, 100)},
    "roll": {"frames": (-(1 << 20), 1 << 20)},
    "crop": {"frames": (1, 1 << 20)},
    "time_masks": {"count": (1, 16), "frames": (0, 1 << 20)},
    "frequency_masks": {"count": (1, 16), "bins": (0, 1 << 20)},
}
"""Of each change, in the order of their application, what a policy says of it, and from where to where that may go."""
_SINGLE = ("points", "count")
_OF_TIME = ("roll", "crop", "time_masks")
"""What fits inputs of one axis, ``[T]``; inputs ``[T, F]`` take every change, others none."""
_WORDS = 8


@dataclass(frozen=True)
class Policy:
    """How inputs may be changed. ``said`` is what a policy file says, checked: numbers, and ranges ``[from, to]``."""

    said: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> Policy:
        """The policy in a YAML file. Raises `UsageError` for a file that says none."""
        try:
            with open_file(path) as file:
                content = yaml.safe_load(file.read(_MOST_BYTES).decode("utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read the policy {shown(path)}: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise UsageError(f"the policy {shown(path)} is not YAML: {shown(error)}") from error
        try:
            return cls.of(content)
        except ValueError as error:
            hint = f"A policy says seed, decibel, {', '.join(_CHANGES)}."
            raise UsageError(f"the policy {shown(path)}: {error}", hint=hint) from None

    @classmethod
    def of(cls, content: object) -> Policy:
        """Raises ``ValueError`` for what is no policy."""
        if not isinstance(content, Mapping):
            raise ValueError("expected entries such as 'roll: {frames: [-10, 10]}'")
        if unknown := [name for name in content if name not in ("seed", "decibel", *_CHANGES)]:
            raise ValueError(f"it says what no policy has\n{listed(map(str, unknown))}")
        changes = {name: _change(name, content[name]) for name in _CHANGES if name in content}
        if not changes:
            raise ValueError("it changes nothing")
        seed = content.get("seed", 0)
        if type(seed) is not int or not 0 <= seed < 1 << 63:
            raise ValueError(f"seed is {shown(repr(seed))}, expected a number from 0 to {(1 << 63) - 1}")
        said: dict[str, Any] = {"seed": seed, **changes}
        if any("decibels" in change for change in changes.values()):
            said["decibel"] = _decibel(content.get("decibel"))
        elif "decibel" in content:
            raise ValueError("decibel is said, and no change is in decibels")
        return cls(said)

    @classmethod
    def from_text(cls, text: str) -> Policy:
        """As a fingerprint keeps it. Raises `CorruptError`."""
        try:
            return cls.of(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"the cache names a policy of views that is none: {shown(error)}") from None

    @cached_property
    def text(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.said, sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `text`, 64 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def changes(self) -> dict[str, dict[str, Any]]:
        """What is done, in this order."""
        return {name: self.said[name] for name in _CHANGES if name in self.said}

    @cached_property
    def size(self) -> int:
        """D, how many integers a view has."""
        return 3 + len(self._drawn((1, 1)))

    def refuse_unfit(self, file: str, array: np.ndarray) -> None:
        """Raise `FeatureError` where a change does not fit this input."""
        fit = {1: _OF_TIME, 2: tuple(_CHANGES)}.get(array.ndim, ())
        if array.dtype.kind != "f":
            raise FeatureError(f"{shown(file)} is of {array.dtype}: views are made of floating-point inputs alone")
        if unfit := [name for name in self.changes if name not in fit]:
            raise FeatureError(
                f"{shown(file)} has the shape {list(array.shape)}, which {', '.join(unfit)} of the policy cannot "
                "change",
                hint=f"Inputs [T, F] take every change, inputs [T] {', '.join(_OF_TIME)}, others none.",
            )

    def draw(self, key: bytes, view: int, shape: Sequence[int]) -> np.ndarray:
        """``[D]`` u4 for an input of this shape, the digest still 0.

        Word i of the stream is the i-th little-endian u4 of SHA-256(b"kd-cache view" + digest of the policy (32 bytes)
        + key (16) + view (u4) + block (u4)) for block 0, 1, …; a number from a to b is a + (word · (b − a + 1) >> 32).
        """
        found = np.zeros(self.size, np.uint32)
        found[0] = view
        if not view:
            return found
        ranges = list(self._drawn(shape))
        stem = b"kd-cache view" + bytes.fromhex(self.digest) + key + view.to_bytes(4, "little")
        blocks = range(-(-len(ranges) // _WORDS))
        stream = b"".join(hashlib.sha256(stem + block.to_bytes(4, "little")).digest() for block in blocks)
        words = np.frombuffer(stream, "<u4").tolist()
        last = 0
        for at, (kind, low, high) in enumerate(ranges):
            if kind == "start":
                high = max(high - last, 0)
            last = low + (words[at] * (high - low + 1) >> 32)
            found[1 + at] = last
        return found

    def _drawn(self, shape: Sequence[int]) -> list[tuple[str, int, int]]:
        """Of each integer what it is, and its range; a start's range is to be shortened by the length before it."""
        ranges = []
        for name, change in self.changes.items():
            if "decibels" in change:
                low, high = _hundredths(change["decibels"])
                ranges += [("steps", 0, high - low)] * change.get("points", 1)
            elif name == "roll":
                low, high = change["frames"]
                ranges.append(("steps", 0, high - low))
            else:
                size = shape[1] if name == "frequency_masks" else shape[0]
                low, high = (min(each, size) for each in change.get("frames") or change["bins"])
                ranges += [("length", low, high), ("start", 0, size)] * change.get("count", 1)
        return ranges

    def apply(self, clean: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """The augmented input, float32, in a new array of the same shape; ``draws`` ``[D]`` as `draw` gives them."""
        x: np.ndarray = np.array(clean, np.float32, order="C")
        view, *values = (int(value) for value in draws[: self.size - 2])
        if not view:
            return x
        fill = x.min()
        given = iter(values)
        offset = np.zeros(x.shape[-1] if x.ndim == 2 else 1)
        for name, change in self.changes.items():
            if name == "device_response":
                low = _hundredths(change["decibels"])[0]
                offset += _curve([low + next(given) for _ in range(change["points"])], len(offset))
            elif name == "gain":
                offset += _hundredths(change["decibels"])[0] + next(given)
            elif name == "roll":
                x = np.roll(x, change["frames"][0] + next(given), axis=0)
            elif name == "crop":
                length, start = max(next(given), 1), next(given)
                x = x[start + np.arange(len(x)) % length]
            else:
                for _ in range(change["count"]):
                    length, start = next(given), next(given)
                    hidden = slice(start, start + length)
                    x[hidden if name == "time_masks" else (slice(None), hidden)] = np.nan
        if "decibel" in self.said:
            x += (offset / 100 * self.said["decibel"]).astype(np.float32)
        x[np.isnan(x)] = fill
        return x

    def augmented(self, file: str, view: int, clean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A sample's input as it is scored for a view, and its integers ``[D]`` u4. Raises as `refuse_unfit`."""
        self.refuse_unfit(file, clean)
        draws = self.draw(bytes.fromhex(sample_key(file)), view, clean.shape)
        array = self.apply(clean, draws)
        draws[-2:] = digest_of(array)
        return array, draws


def digest_of(array: np.ndarray) -> np.ndarray:
    """``[2]`` u4: xxh3-64 of an augmented array's bytes, low half first."""
    return np.array([xxhash.xxh3_64_intdigest(array.data)], "<u8").view("<u4")


def replay_views(policy: Policy, inputs: Any, draws: Any, check: Any = True) -> Any:
    """The inputs ``[B, T, F]`` as the teachers scored them, float32: a tensor of a tensor, else an array.

    Args:
        policy: the cache's, `LogitCache.view_policy`.
        inputs: clean ones, of the samples whose rows are asked for.
        draws: ``[B, D]`` integers of these samples and views, from `LogitCache.draws`.
        check: which are compared by digest with what was scored, one for all or ``[B]`` bool; by default all.

    Raises:
        StaleError: one is not what was scored: another input, other draws, or another version of this code.
        UsageError: not as many draws as inputs, or of another policy.
    """
    arrays, integers = (np.asarray(each) for each in (inputs, draws))
    if integers.shape != (len(arrays), policy.size):
        raise UsageError(f"expected draws [{len(arrays)}, {policy.size}], found {list(integers.shape)}")
    made, compared = np.empty(arrays.shape, np.float32), np.broadcast_to(np.asarray(check, bool), len(arrays))
    for number, (clean, mine) in enumerate(zip(arrays, integers, strict=True)):
        made[number] = policy.apply(clean, mine)
        if compared[number] and (digest_of(made[number]) != mine[-2:]).any():
            raise StaleError(
                f"input {number} of the batch, view {int(mine[0])}, comes out otherwise than the teachers scored it",
                hint="Is it the clean input of that very sample? If it is, dump the views again.",
            )
    if hasattr(inputs, "new_tensor"):
        import torch

        return torch.from_numpy(made)
    return made


class Augmented:
    """A source of inputs as one view has them, to those who score them. A digest is the clean input's."""

    def __init__(self, source: FeatureSource, policy: Policy, view: int) -> None:
        self._source, self._policy, self._view = source, policy, view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, file: str) -> Feature:
        """Raises `FeatureError`."""
        return self._changed(file, self._source.read(file))

    def try_read(self, file: str) -> Feature | FeatureError:
        return self.read_many([file])[0]

    def read_many(self, files: Sequence[str]) -> list[Feature | FeatureError]:
        found = self._source.read_many(files)
        for number, (file, feature) in enumerate(zip(files, found, strict=True)):
            if isinstance(feature, Feature):
                try:
                    found[number] = self._changed(file, feature)
                except FeatureError as error:
                    found[number] = error
        return found

    def _changed(self, file: str, feature: Feature) -> Feature:
        array, draws = self._policy.augmented(file, self._view, feature.array)
        return Feature(array, feature.digest, draws)


def _curve(points: Sequence[int], bins: int) -> np.ndarray:
    """``[bins]`` float64 through evenly spaced points, between two of them by 3u² − 2u³."""
    place = np.arange(bins) * (len(points) - 1) / max(bins - 1, 1)
    left = np.minimum(place.astype(np.int64), len(points) - 2)
    u = place - left
    values = np.array(points, np.float64)
    curve: np.ndarray = values[left] + (values[left + 1] - values[left]) * (u * u * (3 - 2 * u))
    return curve


def _hundredths(decibels: Sequence[float]) -> tuple[int, int]:
    low, high = (round(each * 100) for each in decibels)
    return low, high


def _change(name: str, content: object) -> dict[str, Any]:
    wanted = _CHANGES[name]
    if not isinstance(content, Mapping) or content.keys() != wanted.keys():
        raise ValueError(f"{name} must say {' and '.join(wanted)}, found {shown(repr(content))}")
    return {entry: _value(f"{name}: {entry}", entry, content[entry], *wanted[entry]) for entry in wanted}


def _value(what: str, entry: str, value: Any, low: float, high: float) -> Any:
    """A number, or a range ``[from, to]``."""
    each = [value] if entry in _SINGLE else value
    kinds = (int, float) if entry == "decibels" else (int,)
    whole = 1 if entry in _SINGLE else 2
    good = isinstance(each, list) and len(each) == whole and all(type(one) in kinds for one in each)
    if not good or not low <= each[0] <= each[-1] <= high:
        form = "a number" if entry in _SINGLE else "[from, to], numbers"
        raise ValueError(f"{what} is {shown(repr(value))}, expected {form} between {low} and {high}")
    if entry == "decibels" and any(round(one * 100) / 100 != one for one in each):
        raise ValueError(f"{what} is {shown(repr(value))}, expected steps of 0.01")
    return value if entry in _SINGLE else [float(one) if entry == "decibels" else one for one in each]


def _decibel(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1000:
        raise ValueError(
            "decibel must say what one decibel is in units of the features: 1 where they are in decibels, 0.2302585 "
            "for a natural logarithm of power, 0.1 for one of base 10, times what scales them afterwards"
        )
    return float(value)
