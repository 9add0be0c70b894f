"""`kd-cache prepare --features`: log-mel as librosa has it, whatever the threads; resumed, packed, ready to dump."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY, Run
from tau_fixtures import Made, make_tau

import kd_cache.prepare.extract as extract_module
from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.front_end import FRONT_ENDS, FrontEnd, chosen
from kd_cache.dataset.packed import PackedFeatures
from kd_cache.errors import FeatureError
from kd_cache.prepare.audio import AudioReader
from kd_cache.prepare.log_mel import LogMel

RATE = 44100
Folder = tuple[Path, list[Made]]


def sound(number: int, seconds: float = 0.3, channels: int = 1) -> np.ndarray:
    """``[n, channels]``: noise, a loud tone, and silence, so that quiet bins stand beside loud ones."""
    random = np.random.default_rng(number)
    length = int(seconds * RATE)
    tone = 0.5 * np.sin(np.arange(length)[:, None] * (0.02 + number % 7 / 30))
    wave = tone + random.normal(0, 10.0 ** -(number % 4 + 1), (length, channels))
    wave[: length // 5] = 0
    return wave.clip(-1, 1)


def make_audio(root: Path, seconds: Callable[[int], float] = lambda _: 0.3) -> Folder:
    made = [clip for clip in make_tau(root, "2020") if clip.split != "unused"]
    (root / "audio").mkdir()
    for number, clip in enumerate(made):
        soundfile.write(root / clip.file, sound(number, seconds(number), 1 + number % 2), RATE)
    return root, made


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Folder:
    return make_audio(tmp_path / "tau")


def prepared(run: Run, *args: object, out: str = "out") -> dict[str, Any]:
    result = run("prepare", "tau", "tau", "--out", out, "--features", "logmel64", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def oracle(path: Path, one: FrontEnd) -> tuple[np.ndarray, np.ndarray]:
    """Mel power and stored values ``[T, F]`` by soundfile and librosa in float64."""
    wave, rate = soundfile.read(path, dtype="float64", always_2d=True)
    wave = librosa.resample(wave.mean(axis=1), orig_sr=rate, target_sr=one.sample_rate, res_type=one.resampler)
    power = librosa.feature.melspectrogram(
        y=wave, sr=one.sample_rate, n_fft=one.n_fft, hop_length=one.hop_length, win_length=one.win_length,
        window=one.window, center=one.center, pad_mode=one.pad_mode, power=one.power, n_mels=one.n_mels, fmin=one.fmin,
        fmax=one.fmax, htk=one.mel_scale == "htk", norm=None if one.mel_norm == "none" else one.mel_norm,
        dtype=np.float64,
    ).T  # fmt: skip
    values = np.maximum(power, one.log_floor) if one.log_floor_by == "max" else power + one.log_floor
    values = {"e": np.log, "10": np.log10, "db": lambda x: 10 * np.log10(x), "none": np.array}[one.log](values)
    values = (values + one.shift) * one.scale
    if one.zscore != "none":
        axis = None if one.zscore == "clip" else 0
        values = (values - values.mean(axis)) / np.maximum(values.std(axis), one.std_floor)
    return power, values


OTHER: dict[str, Any] = {
    "bins, htk": {"zscore": "bin", "mel_scale": "htk", "mel_norm": "none", "log": "db"},
    "uncentred": {"center": False, "window": "hamming", "power": 1.0, "log": "10", "log_floor_by": "add"},
    "constant": {"pad_mode": "constant", "resampler": "soxr_vhq", "log": "none", "sample_rate": 22050},
}


@pytest.mark.parametrize("name", [*FRONT_ENDS, *OTHER])
def test_log_mel_is_librosa_s_in_float64(tmp_path: Path, name: str) -> None:
    one = FRONT_ENDS[name] if name in FRONT_ENDS else chosen("logmel64", OTHER[name])[0]
    reader, log_mel = AudioReader(FeatureSource(tmp_path), one), LogMel(one)
    for number, suffix in enumerate(("wav", "flac", "ogg", "wav")):
        path = tmp_path / f"{number}.{suffix}"
        soundfile.write(path, sound(number, 0.4, 1 + number % 2), RATE if number else one.sample_rate)
        power, values = oracle(path, one)
        wave = reader.read(path.name)
        mine = log_mel.mel_power(wave).numpy().T
        assert mine.shape == power.shape
        heard = power > 1e-8
        assert heard.any()
        assert (np.abs(mine - power)[heard] / power[heard]).max() <= 1e-5
        stored = log_mel(wave)
        assert stored.dtype == np.float32
        assert np.abs(stored - values).max() <= 1e-4


def test_two_commands_lead_from_audio_to_a_verified_cache(run: Run, folder: Folder) -> None:
    said = prepared(run, "--n-mels", 20)  # as many as the tiny teacher takes
    assert said["made"] == len(folder[1]) == said["samples"]
    read = PackedFeatures("out/features.h5")
    values = oracle(folder[0] / folder[1][3].file, chosen("logmel64", {"n_mels": 20})[0])[1]
    assert np.abs(read.read(folder[1][3].file).array - values).max() <= 1e-4
    data = ("--json-path", "out/dataset.json", "--features", "out/features.h5", "--target", "b")
    dumped = run("dump", *data, *TINY, "--only", "tiny")
    assert dumped.exit_code == 0, dumped.output
    assert "tiny does not state the front end it was trained with" in dumped.stderr
    assert run("verify", *data, "--all", *TINY).exit_code == 0
    assert run("check", *data).exit_code == 0


@pytest.mark.parametrize("lengths", ["equal", "mixed"])
def test_threads_parts_and_resuming_do_not_change_a_byte(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: str
) -> None:
    make_audio(tmp_path / "tau", lambda number: 0.2 + (lengths == "mixed") * (number % 3) / 20)
    prepared(run, "--workers", 0)
    whole = Path("out/features.h5").read_bytes()
    monkeypatch.setattr(extract_module, "PART", 7)
    make, calls = extract_module._make, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make(*args)

    monkeypatch.setattr(extract_module, "_make", interrupted)
    again = ("prepare", "tau", "tau", "--out", "again", "--features", "logmel64")
    assert run(*again, "--workers", 0).exit_code == 130
    parts = sorted(Path("again/features.parts").iterdir())
    assert (len(parts), Path("again/dataset.json").exists()) == (3, False)
    parts[0].write_bytes(parts[0].read_bytes()[:-1])  # damaged: made again
    calls.clear()
    monkeypatch.setattr(extract_module, "_make", lambda *args: (calls.append(args), make(*args))[1])
    prepared(run, "--workers", 3, out="again")
    assert len(calls) == 9 - 2
    assert Path("again/features.h5").read_bytes() == whole
    assert not Path("again/features.parts").exists()
    calls.clear()
    assert prepared(run, out="again")["made"] == len(calls) == 0
    assert torch.get_num_threads() >= 1


def test_a_file_each_holds_the_same_arrays(run: Run, folder: Folder) -> None:
    prepared(run)
    prepared(run, "--npy", out="files")
    packed, plain = PackedFeatures("out/features.h5"), FeatureSource("files")
    for clip in folder[1]:
        assert plain.read(clip.file.replace(".wav", ".npy")).digest == packed.read(clip.file).digest
    assert run("check", "--json-path", "files/dataset.json").exit_code == 0


def test_audio_that_changed_is_made_again_and_replaced_only_when_asked(run: Run, folder: Folder) -> None:
    root, made = folder
    prepared(run)
    soundfile.write(root / made[0].file, sound(99, 0.31), RATE)
    result = run("prepare", "tau", "tau", "--out", "out", "--features", "logmel64")
    assert (result.exit_code, "--overwrite" in result.stderr) == (2, True)
    assert prepared(run, "--overwrite")["made"] == len(made)
    result = run("prepare", "tau", "tau", "--out", "out", "--features", "cpjku256")
    assert (result.exit_code, "dataset.json" in result.stderr) == (2, True)


def test_features_may_be_added_to_a_manifest(run: Run, folder: Folder) -> None:
    assert run("prepare", "tau", "tau", "--out", "out").exit_code == 0
    said = prepared(run, "--hop-length", 320, "--no-center", "--zscore", "bin")
    assert (said["front_end"]["name"], said["front_end"]["hop_length"]) == ("logmel64, changed", 320)
    front_end = json.loads(Path("out/dataset.json").read_text())["front_end"]
    assert front_end == said["front_end"]
    assert front_end["center"] is False
    assert "center" not in front_end["assumed"]


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no audio": (lambda path: path.write_bytes(b"RIFF"), "no audio file that can be read"),
    "cut short": (lambda path: path.write_bytes(b""), "no audio file that can be read"),
    "too short": (lambda path: soundfile.write(path, np.zeros(60), RATE), "has 22 samples at 16000 Hz, expected at"),
    "empty": (lambda path: soundfile.write(path, np.zeros(0), RATE), "it has 0 of 0 samples"),
    "not finite": (
        lambda path: soundfile.write(path, np.full(9000, np.nan), RATE, "FLOAT"), "values that are not finite"),
    "too long": (lambda path: soundfile.write(path, np.zeros(RATE * 3), RATE), "--max-feature-bytes permits more"),
    "missing": (Path.unlink, "does not exist"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    "elsewhere": (lambda path: (path.unlink(), path.symlink_to("/dev/null")), "outside the data root"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_audio_that_cannot_be_read_is_all_named_and_the_rest_is_kept(run: Run, folder: Folder, kind: str) -> None:
    spoil, says = BAD[kind]
    for clip in folder[1][:2]:
        spoil(folder[0] / clip.file)
    args = ("prepare", "tau", "tau", "--out", "out", "--features", "logmel64", "--max-feature-bytes", 70_000)
    result = run(*args)
    assert result.exit_code == FeatureError.exit_code, result.output
    assert f"2 of {len(folder[1])} audio files cannot be read" in result.stderr
    assert len(re.findall(re.escape(says), result.stderr)) == 2
    assert not Path("out/dataset.json").exists()


@pytest.mark.parametrize("module", ["soundfile", "soxr"])
def test_without_the_extra_its_name_is_said(
    run: Run, folder: Folder, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run("prepare", "tau", "tau", "--out", "out", "--features", "logmel64")
    assert (result.exit_code, "pip install 'kd-cache[audio]'" in result.stderr) == (2, True), result.output
    assert run("prepare", "tau", "tau", "--out", "out").exit_code == 0, "a manifest needs no audio"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--features", "mfcc"), "no front end is called mfcc"),
        (("--n-mels", "12"), "n_mels: no features are asked for"),
        (("--npy",), "no features are asked for"),
        (("--features", "logmel64", "--win-length", "600"), "win_length is 600"),
    ],
)
def test_options_that_make_no_sense_are_refused(run: Run, folder: Folder, args: tuple[str, ...], says: str) -> None:
    result = run("prepare", "tau", "tau", "--out", "out", *args)
    assert (result.exit_code, says in result.stderr) == (2, True), result.output
