"""One-second clips at 44.1 kHz to stored log-mel: `kd-cache prepare`, and a plain loop of soundfile and librosa."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Report, Row, options
from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.front_end import FRONT_ENDS, FrontEnd, chosen
from kd_cache.prepare.extract import ExtractJob, extract
from kd_cache.watch import Watcher

RATE = 44100
OURS, LOOP = "kd-cache prepare", "soundfile and librosa in a loop"


def make_clips(folder: Path, count: int) -> list[str]:
    """One-second clips of noise, 16 bits, one channel."""
    import soundfile

    random = np.random.default_rng(0)
    files = [f"{number}.wav" for number in range(count)]
    for file in files:
        soundfile.write(folder / file, random.normal(0, 0.1, RATE), RATE, "PCM_16")
    return files


def ours(folder: Path, files: list[str], name: str, workers: int) -> np.ndarray:
    """The last clip's features, read back."""
    from kd_cache.dataset.packed import PackedFeatures

    with tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as made:
        front_end, words = chosen(name, {})
        job = ExtractJob(FeatureSource(folder), files, files, front_end, words, Path(made), workers=workers)
        return PackedFeatures(extract(job, Watcher()).path).read(files[-1]).array


def loop(folder: Path, files: list[str], one: FrontEnd) -> np.ndarray:
    """What people write: one clip after the other, in float32, into a list."""
    import librosa
    import soundfile

    kept = []
    for file in files:
        wave, rate = soundfile.read(folder / file, dtype="float32")
        wave = librosa.resample(wave, orig_sr=rate, target_sr=one.sample_rate, res_type=one.resampler)
        mel = librosa.feature.melspectrogram(
            y=wave, sr=one.sample_rate, n_fft=one.n_fft, hop_length=one.hop_length, win_length=one.win_length,
            n_mels=one.n_mels, fmin=one.fmin, fmax=one.fmax, htk=one.mel_scale == "htk", pad_mode="reflect",
            norm=None if one.mel_norm == "none" else one.mel_norm,
        ).T  # fmt: skip
        values = np.log(np.maximum(mel, one.log_floor) if one.log_floor_by == "max" else mel + one.log_floor)
        values = (values + one.shift) * one.scale
        kept.append((values - values.mean()) / values.std() if one.zscore == "clip" else values)
    return np.asarray(kept[-1])


def measure(report: Report, folder: Path, files: list[str], name: str) -> None:
    """The loop over an eighth of the clips, ours over all of them."""
    one, few = FRONT_ENDS[name], files[: len(files) // 8]
    case = f"1 s at 44.1 kHz to {name}"
    loop(folder, few[:4], one)  # librosa compiles when it is first called
    began = time.perf_counter()
    loop(folder, few, one)
    plain = len(few) / (time.perf_counter() - began)
    report.add(Row(case, LOOP, plain, "clips/s"))
    for workers in (1, 2):
        began = time.perf_counter()
        mine = ours(folder, files, name, workers)
        rate = len(files) / (time.perf_counter() - began)
        apart = np.abs(mine - loop(folder, files[-1:], one)).max()
        if apart > 1e-2:
            raise AssertionError(f"{name}: the two ways differ by {apart}")
        is_aim = (name, workers) == ("logmel64", 2)
        target: tuple[str, bool | None] = ("≥ 1,000", rate >= 1000) if is_aim else ("", None)
        report.add(Row(case, f"{OURS}, {workers} threads", rate, "clips/s", LOOP, rate / plain, *target))


def main() -> None:
    chosen_options = options(__doc__)
    report = Report("prepare", chosen_options.quick)
    lacks = [name for name in ("librosa", "soundfile", "soxr") if importlib.util.find_spec(name) is None]
    if lacks:
        report.skip(f"everything: {', '.join(lacks)} not installed")
        report.save(chosen_options.out)
        return
    with tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as made:
        files = make_clips(Path(made), 500 if chosen_options.quick else 4000)
        for name in FRONT_ENDS:
            measure(report, Path(made), files, name)
    report.save(chosen_options.out)


if __name__ == "__main__":
    main()
