"""A waveform to log-mel features, in float64 and rounded once: each clip by itself, so that no batch changes a bit."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kd_cache.dataset.front_end import FrontEnd

_F64 = torch.float64
_BREAK_HZ, _LINEAR_HZ, _STEP = 1000.0, 200 / 3, math.log(6.4) / 27


def to_mel(hertz: np.ndarray, scale: str) -> np.ndarray:
    """Frequencies in mel: HTK's formula, or Slaney's (linear up to 1 kHz, logarithmic above)."""
    if scale == "htk":
        return 2595 * np.log10(1 + hertz / 700)
    above = _BREAK_HZ / _LINEAR_HZ + np.log(np.maximum(hertz, _BREAK_HZ) / _BREAK_HZ) / _STEP
    return np.where(hertz < _BREAK_HZ, hertz / _LINEAR_HZ, above)


def to_hertz(mel: np.ndarray, scale: str) -> np.ndarray:
    """The inverse of `to_mel`."""
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    knee = _BREAK_HZ / _LINEAR_HZ
    return np.where(mel < knee, mel * _LINEAR_HZ, _BREAK_HZ * np.exp(_STEP * (np.maximum(mel, knee) - knee)))


def filter_bank(front_end: FrontEnd) -> np.ndarray:
    """``[n_mels, n_fft // 2 + 1]`` float64: triangles between neighbours; ``slaney`` divides by their width."""
    scale = front_end.mel_scale
    low, high = to_mel(np.array([front_end.fmin, front_end.fmax]), scale)
    edges = to_hertz(np.linspace(low, high, front_end.n_mels + 2), scale)
    hertz = np.arange(front_end.n_fft // 2 + 1) * front_end.sample_rate / front_end.n_fft
    slopes = (hertz[None, :] - edges[:, None]) / np.maximum(np.diff(edges, append=edges[-1] + 1), 1e-12)[:, None]
    falling = 1 - slopes[1:-1]
    bank = np.maximum(0, np.minimum(slopes[:-2], falling))
    if front_end.mel_norm == "slaney":
        bank *= (2 / (edges[2:] - edges[:-2]))[:, None]
    return np.asarray(bank)


class LogMel:
    """A front end that computes; safe to share between threads that each have set torch to one thread."""

    def __init__(self, front_end: FrontEnd) -> None:
        self.front_end = front_end
        windows = {"hann": torch.hann_window, "hamming": torch.hamming_window}
        length = front_end.win_length
        made = windows[front_end.window](length, dtype=_F64) if front_end.window in windows else None
        self._window = torch.ones(length, dtype=_F64) if made is None else made
        self._bank = torch.from_numpy(filter_bank(front_end))
        reach = front_end.n_fft // 2
        self._shortest = front_end.n_fft
        if front_end.center:
            self._shortest = reach + 1 if front_end.pad_mode == "reflect" else 1

    def mel_power(self, wave: np.ndarray) -> Tensor:
        """``[n_mels, T]`` float64 of a waveform ``[n]`` float64. Raises ``ValueError`` for one that is too short."""
        one = self.front_end
        if len(wave) < self._shortest:
            raise ValueError(f"it has {len(wave)} samples at {one.sample_rate} Hz, expected at least {self._shortest}")
        spectrum = torch.stft(
            torch.from_numpy(wave), one.n_fft, one.hop_length, one.win_length, self._window, center=one.center,
            pad_mode=one.pad_mode, return_complex=True,
        )  # fmt: skip
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        return self._bank @ (power if one.power == 2 else power.pow_(one.power / 2))

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """``[T, n_mels]`` float32. Raises as `mel_power`."""
        one = self.front_end
        values = self.mel_power(wave)
        values = values.clamp_(min=one.log_floor) if one.log_floor_by == "max" else values.add_(one.log_floor)
        if one.log != "none":
            values = values.log_() if one.log == "e" else values.log10_().mul_(10 if one.log == "db" else 1)
        values = values.add_(one.shift).mul_(one.scale).T
        if one.zscore != "none":
            over = (0, 1) if one.zscore == "clip" else (0,)
            values = values - values.mean(over, keepdim=True)
            values = values / values.square().mean(over, keepdim=True).sqrt_().clamp_(min=one.std_floor)
        return values.float().contiguous().numpy()
