"""What a teacher is worth on real audio: spoken digits, speakers nobody has heard, a microphone without labels.

``--audio`` is a folder of ``<digit>_<speaker>_<number>.wav``, as the Free Spoken Digit Dataset (CC BY-SA 4.0) has them,
or of log-mel features ``.npy`` ``[T, F]`` under such names. Nothing of it is kept. Digits are classes and speakers are
groups: the last two in the alphabet are test, whole. Each recording is heard by one microphone, which is made here
on its log-mel: ``close`` (as it is; the only one with labels), ``far`` (the target: a response of its own, and a
floor of noise) or, in test alone, ``phone`` (unseen: a narrow band).
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.bench_student_worth import NET, processor_seconds, run_kd_cache
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.packed import PackedFeatures
from kd_cache.dataset.task_file import load_task
from kd_cache.train.job import TrainJob
from kd_cache.train.settings import SCENE, Settings
from teachers.recipes import train_teacher

NAME = re.compile(r"(\d)_([A-Za-z]+)_(\d+)")
TASK = """
name: spoken digits
classes: [zero, one, two, three, four, five, six, seven, eight, nine]
domains: [close, far, phone]
source: close
targets: [far]
unseen: [phone]
group: speaker
inputs: features
"""
UNHEARD = 2


class Recording(NamedTuple):
    digit: int
    speaker: str
    number: int
    clip: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audio", type=Path, required=True, metavar="DIR", help="folder of recordings, or of features")
    parser.add_argument("--epochs", type=int, default=15, help="of a student (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of the comparison (default: %(default)s)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kd-cache-digits-") as folder:
        made = Path(folder)
        (made / "task.yaml").write_text(TASK)
        write(made, list(recordings(chosen.audio, made)))
        teacher = train(made)
        _compare(made, teacher, ["--epochs", str(chosen.epochs), "--seeds", str(chosen.seeds)])


def recordings(audio: Path, made: Path) -> Iterator[Recording]:
    """All that have such a name; of audio the log-mel of the front end ``logmel64``."""
    kind = "wav" if any(audio.glob("*.wav")) else "npy"
    named = {path.name: found for path in sorted(audio.glob(f"*.{kind}")) if (found := NAME.fullmatch(path.stem))}
    if not named:
        raise SystemExit(f"{audio} has no files such as 7_jackson_32.wav (or .npy, of log-mel features)")
    source: FeatureSource = FeatureSource(audio)
    if kind == "wav":
        with (made / "all.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [["filename", "scene_label"], *([name, found[1]] for name, found in named.items())]
            )
        classes = made / "plain.yaml"
        classes.write_text(json.dumps({"name": "digits", "classes": [str(digit) for digit in range(10)]}))
        run_kd_cache(
            "prepare", "csv", audio, "--table", f"train={made / 'all.csv'}", "--task", classes, "--out",
            made / "logmel", "--features", "logmel64",
        )  # fmt: skip
        (packed,) = (made / "logmel").glob("*.h5")
        source = PackedFeatures(packed)
    for name, found in named.items():
        yield Recording(int(found[1]), found[2], int(found[3]), source.read(name).array.astype(np.float32))


def write(made: Path, found: Sequence[Recording]) -> None:
    """The manifest, and each recording as its microphone hears it."""
    speakers = sorted({each.speaker for each in found})
    rows = []
    (made / "clips").mkdir()
    for each in found:
        split = "test" if each.speaker in speakers[-UNHEARD:] else "train"
        devices = ("close", "far", "phone") if split == "test" else ("close", "far")
        device = devices[each.number % len(devices)]
        file = f"clips/{each.digit}_{each.speaker}_{each.number}.npy"
        np.save(made / file, heard(each.clip, device))
        rows.append({"file": file, "label": each.digit, "device_id": device, "split": split, "speaker": each.speaker})
    (made / "dataset.json").write_text(json.dumps(rows))
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "test")}
    print(f"{len(found):,} recordings of {', '.join(speakers)}; {counts}; test: {', '.join(speakers[-UNHEARD:])}")


def heard(clip: np.ndarray, device: str) -> np.ndarray:
    """``[T, F]`` float32 as a microphone hears it, with mean 0 and standard deviation 1 again."""
    at = np.linspace(0, 1, clip.shape[1], dtype=np.float32)
    if device == "far":
        clip = clip + 0.75 * np.cos(9 * at) - at  # colour of the room, and what the distance takes of the treble
        clip = np.logaddexp(clip, np.quantile(clip, 0.3))
    elif device == "phone":
        clip = np.where((at > 0.15) & (at < 0.75), clip, clip.min())
    made: np.ndarray = ((clip - clip.mean()) / clip.std()).astype(np.float32)
    return made


def train(made: Path) -> Path:
    """A scene teacher of the digits that the close microphone heard."""
    task = load_task(made / "task.yaml")
    data = Dataset.load("close", made / "dataset.json", task=task)
    settings = Settings(SCENE, num_scenes=task.num_classes, val_ratio=0.25)
    began = time.monotonic()
    report = train_teacher(TrainJob(settings, data, made / "outputs", torch.device("cpu"), workers=0))
    groups = report.results["test"]["by"]["device_group"]
    told = ", ".join(f"{name} {100 * each['accuracy']:.1f} %" for name, each in groups.items())
    print(
        f"teacher ({settings.arch}), on speakers it never heard: {told}; {time.monotonic() - began:.0f} s", flush=True
    )
    return report.checkpoint


def _compare(made: Path, teacher: Path, how: Sequence[str]) -> None:
    of = [
        "--target", "far", "--task", made / "task.yaml", "--json-path", made / "dataset.json", "--cache-root",
        made / "cache", "--teacher", f"scene=scene,ckpt={teacher}",
    ]  # fmt: skip
    run_kd_cache("dump", *of, "--only", "scene")
    began, used = time.monotonic(), processor_seconds()
    told = run_kd_cache(
        "student", "compare", *of, "--modes", "scene", "--val-ratio", 0.25, *NET, *how, "--output-dir",
        made / "outputs", "--json",
    )  # fmt: skip
    print((Path(told["folder"]) / "comparison.md").read_text())
    print(f"{time.monotonic() - began:.0f} s, {processor_seconds() - used:.0f} s of processor time")


if __name__ == "__main__":
    main()
