"""Folders as TAU Urban Acoustic Scenes and DCASE task 1 bring them: genuine names and tables, made-up clips."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from kd_cache.dataset.task import DCASE

CITIES = tuple(city for city in DCASE.cities if city not in ("amsterdam", "madrid"))
GENUINE_2020 = {
    "train": {"a": 10215, "b": 749, "c": 748, "s1": 750, "s2": 750, "s3": 750},
    "test": {"a": 330, "b": 329, "c": 329, **dict.fromkeys(("s1", "s2", "s3", "s4", "s5", "s6"), 330)},
    "unused": {"a": 3855, "s4": 750, "s5": 750, "s6": 750},
}
SMALL = {"train": {"a": 24, "b": 12, "s1": 10}, "test": {"a": 6, "b": 5, "s4": 3}, "unused": {"s5": 4}}
LAYOUTS = ("2019", "2020", "2022", "2024", "2025")


class Made(NamedTuple):
    """A clip's name and row in ``meta.csv``."""

    file: str
    scene: str
    identifier: str
    device: str
    split: str


def clips(counts: Mapping[str, Mapping[str, int]], parts: int = 0) -> Iterator[Made]:
    """So many clips of each split and device; no location is in two splits. With ``parts`` each is cut into so many."""
    for nth, (split, devices) in enumerate(counts.items()):
        for device, count in devices.items():
            for number in range(count):
                scene, city = DCASE.scenes[number % 10], CITIES[number // 10 % 10]
                place = 3 * (number // 100) + nth  # a location is of one split
                stem = f"audio/{scene}-{city}-{place}-{number}"
                for name in [f"{stem}-{part}" for part in range(parts)] or [stem]:
                    yield Made(f"{name}-{device}.wav", scene, f"{city}-{place}", device, split)


def write_table(path: Path, header: str, rows: list[tuple[str, ...]], newline: str = "\n", bom: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(row) for row in [tuple(header.split()), *rows]]
    path.write_bytes((newline.join([*lines, ""])).encode("utf-8-sig" if bom else "utf-8"))


def make_tau(
    root: Path, layout: str, counts: Mapping[str, Mapping[str, int]] = SMALL, newline: str = "\n", bom: bool = False
) -> list[Made]:
    """Tables of a layout without audio. Lists of subsets are in another order than ``meta.csv``, as they really are."""
    if layout == "2019":
        counts = {split: {"a": devices["a"]} for split, devices in counts.items() if "a" in devices}
    made = list(clips(counts, parts=0 if layout in ("2019", "2020") else 2))

    def write(name: str, header: str, rows: list[tuple[str, ...]]) -> None:
        write_table(root / name, header, rows, newline, bom)

    write("meta.csv", "filename scene_label identifier source_label", [clip[:4] for clip in made])
    train, test = ([clip for clip in made if clip.split == split] for split in ("train", "test"))
    if layout in ("2019", "2020", "2022"):
        for name, rows in (("train", train), ("evaluate", test)):
            write(f"evaluation_setup/fold1_{name}.csv", "filename scene_label", [clip[:2] for clip in rows])
        write("evaluation_setup/fold1_test.csv", "filename", [clip[:1] for clip in test])
        return made
    for percent in (5, 10, 25, 50, 100) if layout == "2024" else (25,):
        subset = sorted(train, key=lambda clip: hashlib.md5(clip.file.encode(), usedforsecurity=False).digest())[
            : max(12, len(train) * percent // 100)
        ]
        write(f"split_setup/split{percent}.csv", "filename scene_label", [clip[:2] for clip in subset])
    write("split_setup/test.csv", "filename", [clip[:1] for clip in test])
    return made
