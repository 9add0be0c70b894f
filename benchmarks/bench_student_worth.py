"""What teachers are worth to a student, on generated clips: the sample's teachers measured, and students compared.

A part is run with ``--only``: ``teachers`` (each on 1,000 test clips of its target), ``b`` and ``s1`` (``student
compare`` on the large sample of that target), ``small`` (on the committed sample), ``harm`` (a City2Scene teacher of
shuffled labels, and the older recipe).
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kd_cache.dataset.sample_data import Clip, features, further_clips
from kd_cache.dataset.task import DCASE
from teachers import load_teacher

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
TEACHERS = SAMPLE / "teachers"
ROUNDS = range(8, 18)
"""Ten locations of each city and scene that neither size of the sample has: 1,000 clips of a device."""
MODES = "scene,city2scene,mean,fit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; repeatable (default: all)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of a student (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of a comparison (default: %(default)s)")
    chosen = parser.parse_args()
    for part in chosen.only or PARTS:
        with tempfile.TemporaryDirectory(prefix="kd-cache-worth-") as made:
            PARTS[part](part, Path(made), ["--epochs", str(chosen.epochs), "--seeds", str(chosen.seeds)])


def teachers(_: str, __: Path, ___: Sequence[str]) -> None:
    """Accuracy of the committed teachers, in per cent, on the target and on A."""
    print("| target | City2Scene on it | on A | scene on it | on A |\n|---|---|---|---|---|")
    scene, source = load_teacher(TEACHERS / "teacher_scene/global/best.safetensors"), _clips(DCASE.source)
    found = []
    for target in DCASE.targets:
        city2scene = load_teacher(TEACHERS / f"teacher_city2scene/A2{target}/best.safetensors")
        there = _clips(target)
        found.append([_accuracy(net, clips) for net in (city2scene, scene) for clips in (there, source)])
        print(f"| {target} | {' | '.join(f'{value:.1f}' for value in found[-1])} |", flush=True)
    print(f"| mean | {' | '.join(f'{value:.1f}' for value in np.mean(found, axis=0))} |", flush=True)


def _clips(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    clips = list(further_clips(device, ROUNDS, "test"))
    return _stacked(clips), torch.tensor([DCASE.scenes.index(clip.scene) for clip in clips])


def _stacked(clips: Iterable[Clip]) -> torch.Tensor:
    return torch.from_numpy(np.stack([features(clip).astype(np.float32) for clip in clips]))


@torch.no_grad()
def _accuracy(net: nn.Module, clips: tuple[torch.Tensor, torch.Tensor]) -> float:
    x, labels = clips
    named = torch.cat([net(part).argmax(dim=1) for part in torch.split(x, 100)])
    return 100 * float((named == labels).double().mean())


def large(target: str, made: Path, how: Sequence[str]) -> None:
    """The sample's teachers, the large sample of a target."""
    run_kd_cache("sample-data", made / "data", "--size", "large", "--target", target)
    _compare(target, made, made / "data", how)


def small(_: str, made: Path, how: Sequence[str]) -> None:
    """The committed sample alone."""
    _compare("b", made, SAMPLE, how)


def harm(_: str, made: Path, how: Sequence[str]) -> None:
    """A City2Scene teacher that learnt shuffled labels, under the older script's recipe."""
    shuffled = made / "shuffled"
    run_kd_cache("train", "city2scene", "--target", "b", "--shuffle-labels", "--output-dir", shuffled)
    teacher = max(shuffled.glob("teacher_city2scene/A2b/runs/*/best.safetensors"))
    run_kd_cache("sample-data", made / "data", "--size", "large", "--target", "b")
    _compare("b", made, made / "data", [*how, "--recipe", "city2scene"], city2scene=teacher, modes="city2scene")


def _compare(
    target: str, made: Path, data: Path, how: Sequence[str], *, city2scene: Path | None = None, modes: str = MODES
) -> None:
    """Dump, compare, and print the table with the seconds it took: of the clock, and of the processor."""
    taught = [
        "--city2scene-teacher-ckpt", city2scene or TEACHERS / f"teacher_city2scene/A2{target}/best.safetensors",
        "--scene-teacher-ckpt", TEACHERS / "teacher_scene/global/best.safetensors",
    ]  # fmt: skip
    of = ["--target", target, "--json-path", data / "dataset.json", "--data-root", data, "--cache-root", made / "cache"]
    run_kd_cache("dump", *of, *taught)
    began, used = time.monotonic(), processor_seconds()
    told = run_kd_cache(
        "student", "compare", *of, *taught, "--modes", modes, *NET, *how, "--output-dir", made / "outputs", "--json"
    )
    print((Path(told["folder"]) / "comparison.md").read_text())
    print(f"{time.monotonic() - began:.0f} s, {processor_seconds() - used:.0f} s of processor time\n", flush=True)


def run_kd_cache(*arguments: Any) -> Any:
    command = [sys.executable, "-m", "kd_cache", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.load(io.StringIO(done.stdout)) if "--json" in arguments else done.stdout


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


EPOCHS = 15
NET = ("--arch", "cp_resnet", "--channels", "8,8,16,24")
PARTS = {"teachers": teachers, "b": large, "s1": large, "small": small, "harm": harm}

if __name__ == "__main__":
    main()
