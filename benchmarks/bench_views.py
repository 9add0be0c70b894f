"""Ten views against clean targets: students of generated clips, some of which see what their teachers scored.

All learn from the mean of the sample's two teachers on the large sample of b. Some augment their own input or none, and
are told what the teachers say of the clean one; others take a view each epoch, with what the teachers say of just that.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.bench_student_worth import EPOCHS, NET, TEACHERS, run_kd_cache

POLICY = """
decibel: 0.2  # features have a standard deviation of 1: the curve is as high as the student's own augmentation's
device_response: {points: 5, decibels: [-5, 5]}
roll: {frames: [0, 47]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kd-cache-views-") as folder:
        made = Path(folder)
        (made / "policy.yaml").write_text(POLICY)
        run_kd_cache("sample-data", made / "data", "--size", "large", "--target", "b")
        taught = [
            "--city2scene-teacher-ckpt", TEACHERS / "teacher_city2scene/A2b/best.safetensors",
            "--scene-teacher-ckpt", TEACHERS / "teacher_scene/global/best.safetensors",
        ]  # fmt: skip
        of = ["--target", "b", "--json-path", made / "data/dataset.json", "--data-root", made / "data",
              "--cache-root", made / "cache"]  # fmt: skip
        began = time.monotonic()
        run_kd_cache("dump", *of, *taught, "--views", chosen.views, "--policy", made / "policy.yaml")
        print(f"dump of {chosen.views} views: {time.monotonic() - began:.0f} s\n")
        print("| student | test | unseen devices | by seed |\n|---|---|---|---|", flush=True)
        off = ["--time-roll", "0", "--freq-mixstyle", "0", "--device-response", "0"]
        arms = {
            "clean targets, its own augmentation": [],
            "clean targets, no augmentation": off,
            f"{chosen.views} views": ["--views"],
        }
        for name, more in arms.items():
            figures = []
            for seed in range(42, 42 + chosen.seeds):
                told = run_kd_cache(
                    "student", *of, *taught, "--teacher-mode", "mean", *NET, "--epochs", chosen.epochs, "--seed", seed,
                    "--output-dir", made / f"{name} {seed}", *more, "--json",
                )["student"]  # fmt: skip
                test = told["results"]["test"]
                figures.append((100 * test["accuracy"], 100 * test["by"]["device_group"]["unseen"]["accuracy"]))
            columns = [[each[column] for each in figures] for column in (0, 1)]
            spread = [f"{statistics.mean(each):.1f} ± {statistics.stdev(each):.1f}" for each in columns]
            print(f"| {name} | {' | '.join(spread)} | {' '.join(f'{each[0]:.1f}' for each in figures)} |", flush=True)


if __name__ == "__main__":
    main()
