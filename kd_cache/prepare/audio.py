"""Audio files to waveforms: one channel, one rate. Needs the extra ``audio``: soundfile, and soxr to resample."""

from __future__ import annotations

import os
from types import ModuleType
from typing import NamedTuple

import numpy as np

from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.front_end import FrontEnd
from kd_cache.errors import UsageError


class Codecs(NamedTuple):
    """The two modules, and their versions: what they make may change with those."""

    soundfile: ModuleType
    soxr: ModuleType

    @classmethod
    def load(cls) -> Codecs:
        """Import them. Raises `UsageError` where they are not installed."""
        try:
            import soundfile
            import soxr
        except (ImportError, OSError) as error:  # an OSError where libsndfile itself is missing
            raise UsageError(
                f"reading audio needs soundfile and soxr: {error}", hint="Install them: pip install 'kd-cache[audio]'."
            ) from error
        return cls(soundfile, soxr)

    @property
    def versions(self) -> dict[str, str]:
        return {
            "soundfile": self.soundfile.__version__,
            "libsndfile": self.soundfile.__libsndfile_version__,
            "soxr": self.soxr.__version__,
        }


class AudioReader:
    """Reads the audio of manifest files as one channel of one rate.

    Args:
        source: opens files, and none outside the data set's folder; its ``max_bytes`` bounds a clip's features.
        front_end: says rate, channel and resampler.
    """

    def __init__(self, source: FeatureSource, front_end: FrontEnd) -> None:
        self.source, self.front_end = source, front_end
        self.codecs = Codecs.load()
        self._quality = front_end.resampler.removeprefix("soxr_").upper()

    def read(self, file: str) -> np.ndarray:
        """The whole file, ``[n]`` float64. Raises ``ValueError`` and ``OSError`` for what cannot be read whole."""
        descriptor, _ = self.source.open(file)
        try:
            samples, rate = self._decoded(descriptor)
        finally:
            os.close(descriptor)
        wave = samples[:, 0] if self.front_end.mono == "first" or samples.shape[1] == 1 else samples.mean(axis=1)
        if not np.isfinite(wave).all():
            raise ValueError("it has values that are not finite")
        return self._resampled(np.ascontiguousarray(wave), rate)

    def _decoded(self, descriptor: int) -> tuple[np.ndarray, int]:
        """``[n, channels]`` float64, and the rate."""
        try:
            with self.codecs.soundfile.SoundFile(descriptor, closefd=False) as sound:
                self._refuse_long(sound.frames, sound.samplerate)
                samples = sound.read(dtype="float64", always_2d=True)
                if len(samples) != sound.frames or not len(samples):
                    raise ValueError(f"it has {len(samples)} of {sound.frames} samples: it is cut short, or empty")
                return samples, int(sound.samplerate)
        except self.codecs.soundfile.SoundFileError as error:
            raise ValueError(f"it is no audio file that can be read: {error}") from error

    def _refuse_long(self, frames: int, rate: int) -> None:
        """Before anything is decoded: the features may not be larger than a dump would read."""
        steps = 1 + frames * self.front_end.sample_rate // max(rate, 1) // self.front_end.hop_length
        size = 4 * steps * self.front_end.n_mels
        if size > self.source.max_bytes:
            raise ValueError(
                f"its features would have {size} bytes, expected at most {self.source.max_bytes}; --max-feature-bytes "
                "permits more"
            )

    def _resampled(self, wave: np.ndarray, rate: int) -> np.ndarray:
        """At the front end's rate: ``ceil(n · to / from)`` samples, whatever the resampler's last one is."""
        to = self.front_end.sample_rate
        if rate == to:
            return wave
        length = -(-len(wave) * to // rate)
        made = self.codecs.soxr.resample(wave, rate, to, quality=self._quality)[:length]
        return np.pad(made, (0, length - len(made)))
