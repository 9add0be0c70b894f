"""What turned audio into features, parameter by parameter: kept in the manifest, and from there in every fingerprint.

`FRONT_ENDS` are those that people name. Nothing here computes: `kd_cache.prepare.log_mel` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from kd_cache.errors import UsageError, shown

Resampler = Literal["soxr_vhq", "soxr_hq", "soxr_mq", "soxr_lq", "soxr_qq"]
Window = Literal["hann", "hamming", "ones"]
PadMode = Literal["reflect", "constant", "replicate"]
Logarithm = Literal["e", "10", "db", "none"]
ZScore = Literal["none", "clip", "bin"]
NAME, ASSUMED = "name", "assumed"


def _said(text: str, kind: Any) -> Any:
    return field(metadata={"help": text, "kind": kind})


@dataclass(frozen=True)
class FrontEnd:
    """A log-mel front end: frames ``[T, n_mels]`` of a waveform. Frequencies are in Hz, lengths in samples."""

    sample_rate: int = _said("Rate that audio is resampled to, in Hz.", int)
    mono: str = _said("What becomes of several channels.", Literal["mean", "first"])
    resampler: str = _said("How audio of another rate is resampled.", Resampler)
    n_fft: int = _said("Length of the Fourier transform.", int)
    win_length: int = _said("Length of the window, in the middle of the transform.", int)
    hop_length: int = _said("Samples from one frame to the next.", int)
    window: str = _said("The window (periodic).", Window)
    center: bool = _said("Frames are centred: half a transform is added at both ends.", bool)
    pad_mode: str = _said("What is added there.", PadMode)
    power: float = _said("Exponent of the magnitude: 2 is power.", float)
    n_mels: int = _said("Mel bins.", int)
    fmin: float = _said("Where the lowest bin begins, in Hz.", float)
    fmax: float = _said("Where the highest bin ends, in Hz.", float)
    mel_scale: str = _said("The mel scale.", Literal["slaney", "htk"])
    mel_norm: str = _said("Bins of equal area (slaney), or of equal height.", Literal["slaney", "none"])
    log: str = _said("The logarithm; db is 10 times that of base 10.", Logarithm)
    log_floor: float = _said("Keeps the logarithm finite.", float)
    log_floor_by: str = _said("The floor is a maximum, or is added.", Literal["max", "add"])
    shift: float = _said("Added to the logarithm.", float)
    scale: float = _said("What that is multiplied by.", float)
    zscore: str = _said("Mean 0 and standard deviation 1 of each clip, or of each of its bins.", ZScore)
    std_floor: float = _said("Least standard deviation to divide by.", float)

    def __post_init__(self) -> None:
        wrong = [
            f"{each.name} is {shown(value)}, expected {' or '.join(map(str, choices))}"
            for each in fields(self)
            if (choices := get_args(each.metadata["kind"])) and (value := getattr(self, each.name)) not in choices
        ]
        for name, value, low, high in (
            ("sample_rate", self.sample_rate, 1, 1 << 20),
            ("n_fft", self.n_fft, 2, 1 << 20),
            ("win_length", self.win_length, 1, self.n_fft),
            ("hop_length", self.hop_length, 1, 1 << 20),
            ("n_mels", self.n_mels, 1, 1 << 12),
            ("fmax", self.fmax, self.fmin, self.sample_rate / 2),
            ("fmin", self.fmin, 0, self.fmax),
            ("power", self.power, 0.1, 10),
            ("log_floor", self.log_floor, 0 if self.log == "none" else 1e-30, 1e30),
            ("std_floor", self.std_floor, 1e-30, 1e30),
        ):
            if not low <= value <= high:
                wrong.append(f"{name} is {value}, expected {low} to {high}")
        if wrong:
            raise UsageError("this front end cannot be: " + "; ".join(wrong))


FRONT_ENDS = {
    # What the CNN14 checkpoints expect; what is not known of it is as in the code that CNN14 comes from (PANNs).
    "logmel64": FrontEnd(
        sample_rate=16000, mono="mean", resampler="soxr_hq", n_fft=512, win_length=400, hop_length=160, window="hann",
        center=True, pad_mode="reflect", power=2.0, n_mels=64, fmin=50.0, fmax=8000.0, mel_scale="slaney",
        mel_norm="slaney", log="e", log_floor=1e-10, log_floor_by="max", shift=0.0, scale=1.0, zscore="clip",
        std_floor=1e-8,
    ),
    # The challenge's baselines of 2023 to 2025 (CP-ResNet, CP-Mobile): log(x + 1e-5), (x + 4.5) / 5.
    "cpjku256": FrontEnd(
        sample_rate=32000, mono="mean", resampler="soxr_hq", n_fft=4096, win_length=3072, hop_length=500, window="hann",
        center=True, pad_mode="reflect", power=2.0, n_mels=256, fmin=0.0, fmax=16000.0, mel_scale="htk",
        mel_norm="none", log="e", log_floor=1e-5, log_floor_by="add", shift=4.5, scale=0.2, zscore="none",
        std_floor=1e-8,
    ),
}  # fmt: skip
_KNOWN = {
    "logmel64": ("sample_rate", "n_fft", "win_length", "hop_length", "n_mels", "fmin", "fmax", "zscore"),
    "cpjku256": ("sample_rate", "n_fft", "win_length", "hop_length", "n_mels", "log", "log_floor", "log_floor_by",
                 "shift", "scale", "zscore"),
}  # fmt: skip
"""What is known of those that teachers were trained with; everything else is assumed."""


def chosen(name: str, given: Mapping[str, Any]) -> tuple[FrontEnd, dict[str, Any]]:
    """A front end by its name, but for the parameters ``given``; and what the manifest says of it.

    Raises:
        UsageError: nothing is called so, or the parameters make no sense.
    """
    if name not in FRONT_ENDS:
        raise UsageError(f"no front end is called {shown(name)}", hint=f"Known: {', '.join(FRONT_ENDS)}.")
    made = replace(FRONT_ENDS[name], **given)
    known = {*_KNOWN[name], *given}
    assumed = [each.name for each in fields(FrontEnd) if each.name not in known]
    return made, {NAME: name if made == FRONT_ENDS[name] else f"{name}, changed", **asdict(made), ASSUMED: assumed}


def checked(value: Any) -> dict[str, Any]:
    """A manifest's ``front_end``: names and plain values, ours or another program's. Raises ``ValueError``."""
    if not isinstance(value, dict) or not 0 < len(value) <= 100 or not all(map(_is_plain, value, value.values())):
        raise ValueError("front_end must be an object of names and plain values")
    bins = value.get("n_mels")
    if bins is not None and (type(bins) is not int or bins < 1):
        raise ValueError(f"front_end: n_mels must be an integer above 0, found {shown(bins)}")
    return dict(value)


def _is_plain(name: str, value: Any) -> bool:
    return isinstance(value, list if name == ASSUMED else str | int | float)


def as_text(front_end: Mapping[str, Any]) -> str:
    """The one text of a front end, for a fingerprint or a checkpoint: canonical JSON, without what is assumed."""
    told = {name: value for name, value in front_end.items() if name != ASSUMED}
    return json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def differences(stated: str, front_end: Mapping[str, Any]) -> list[str] | None:
    """In which parameters a checkpoint's words differ from a manifest's front end: ``sample_rate: 32000, not 16000``.

    ``None`` where the words are neither a front end's name nor what `as_text` writes: nothing can be compared.
    """
    if stated in FRONT_ENDS:
        told: Any = asdict(FRONT_ENDS[stated])
    else:
        try:
            told = json.loads(stated)
        except ValueError:
            return None
        if not isinstance(told, dict):
            return None
    return [
        f"{name}: {shown(told[name])}, not {shown(front_end[name])}"
        for name in sorted(told.keys() & front_end.keys() - {NAME, ASSUMED})
        if told[name] != front_end[name]
    ]
