"""A scene head on a frozen backbone: on embeddings computed once, and with the trunk run in every epoch."""

from __future__ import annotations

import csv
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.harness import Report, Row, options
from kd_cache.dataset.dataset import Dataset
from kd_cache.score.device import resolve_device
from kd_cache.train.checkpoint import save_checkpoint
from kd_cache.train.job import TrainJob, TrainReport
from kd_cache.train.nets import make_net
from kd_cache.train.settings import Settings
from teachers.recipes import train_teacher

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
CACHED, TRUNK = "head on cached embeddings", "trunk and head"


def job(folder: Path, arch: str, epochs: int, *, cached: bool) -> TrainJob:
    """City2Scene over a random backbone, on the sample: what an epoch costs does not depend on the weights."""
    # All locations; but a quick experiment only remarks that it learnt nothing, as a random backbone may have it.
    settings = Settings("city2scene", arch=arch, epochs=epochs, patience=0, quick_experiment=0.999)
    checkpoint = folder / f"{arch}.safetensors"
    if not checkpoint.exists():
        city = make_net(settings, settings.num_cities)
        save_checkpoint(checkpoint, city.state_dict(), {"architecture": arch, "role": "city"})
    return TrainJob(
        settings,
        Dataset.load("b", SAMPLE / "dataset.json"),
        folder / f"{arch}-{cached}",
        resolve_device("auto"),
        backbone=checkpoint,
        cached_features=cached,
    )


def seconds(report: TrainReport) -> float:
    """Median over the epochs, validation included."""
    assert report.run is not None  # noqa: S101 (it was trained here)
    rows = csv.DictReader((report.run / "history.csv").read_text().splitlines())
    return statistics.median(float(row["seconds"]) for row in rows)


def main() -> None:
    chosen = options(__doc__)
    report = Report("train", chosen.quick)
    for arch in ("cp_resnet",) if chosen.quick else ("cp_resnet", "cnn14"):
        with tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as made:
            took, losses = {}, {}
            for name, cached in ((CACHED, True), (TRUNK, False)):
                trained = train_teacher(job(Path(made), arch, epochs=3, cached=cached))
                took[name], losses[name] = seconds(trained), trained.results["validation"]["log_loss"]
            if abs(losses[CACHED] - losses[TRUNK]) > 1e-3:
                raise AssertionError(f"{arch}: validation losses differ: {losses}")
        case = f"{arch}, 270 clips [48, 64], one epoch with validation"
        report.add(Row(case, TRUNK, took[TRUNK], "s"))
        ratio = took[TRUNK] / took[CACHED]
        target: tuple[str, bool | None] = ("≥ 10 ×", ratio >= 10) if arch == "cnn14" else ("", None)
        note = f"validation loss {losses[CACHED]:.4f} and {losses[TRUNK]:.4f}"
        report.add(Row(case, CACHED, took[CACHED], "s", TRUNK, ratio, *target, note))
    if not torch.cuda.is_available():
        report.skip("the same on a GPU: this machine has no CUDA device")
    report.save(chosen.out)


if __name__ == "__main__":
    main()
