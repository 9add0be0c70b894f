"""What a data set is: its classes, its domains, which of them may be learnt from, what must not straddle its splits.

`DCASE` is the value for acoustic scene classification under device shift. Nothing outside this package knows a scene, a
city or a device by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Task:
    """One kind of data set.

    Attributes:
        name: what people call it.
        scenes: the classes that students learn, in the order of their labels.
        cities: the classes of the auxiliary label, in the order of theirs.
        devices: the domains; a device's position is its integer ``domain``.
        source: the device whose labels may be used.
        targets: devices that can be adapted to; ``unseen`` ones are never trained on, cached or distilled.
        spellings: other ways to write a device.
        held_out: finds what people call the split that is held out in a split's name.
        place_in_name: finds ``(city, number, device)`` of a recording in a file's name.
    """

    name: str
    scenes: tuple[str, ...]
    cities: tuple[str, ...]
    devices: tuple[str, ...]
    source: str
    targets: tuple[str, ...]
    unseen: tuple[str, ...]
    held_out: re.Pattern[str]
    place_in_name: re.Pattern[str]
    spellings: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def domain_of(self) -> dict[str, int]:
        return {device: domain for domain, device in enumerate(self.devices)}

    def device(self, spelling: str) -> str | None:
        """The device that is meant; ``None`` if there is no such."""
        return spelling if spelling in self.domain_of else self.spellings.get(spelling)

    def city(self, label: int) -> str:
        """What a city's label is called; a data set may have more cities than the task names."""
        return self.cities[label] if label < len(self.cities) else f"city {label}"

    def adaptation(self, target: str) -> str:
        """What an adaptation is called, and the folder of its cache: ``A2b``."""
        return f"{self.source}2{target}"

    def is_adaptation(self, name: str) -> bool:
        """Whether a folder is named as the cache of an adaptation is, whatever its target."""
        return name.startswith(f"{self.source}2")

    def target_in(self, name: str) -> str | None:
        """The target of an adaptation, by its name; ``None`` where that names none."""
        target = name.removeprefix(f"{self.source}2")
        return target if self.is_adaptation(name) and target in self.targets else None


_SCENES = (
    "airport", "bus", "metro", "metro_station", "park", "public_square", "shopping_mall", "street_pedestrian",
    "street_traffic", "tram",
)  # fmt: skip
_CITIES = (
    "amsterdam", "barcelona", "helsinki", "lisbon", "london", "lyon", "madrid", "milan", "paris", "prague",
    "stockholm", "vienna",
)  # fmt: skip

DCASE = Task(
    name="DCASE task 1",
    scenes=_SCENES,
    cities=_CITIES,
    devices=("A", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6"),
    source="A",
    targets=("b", "c", "s1", "s2", "s3"),
    unseen=("s4", "s5", "s6"),
    held_out=re.compile(r"test|eval|hold[\W_]*out|held[\W_]*out", re.IGNORECASE),
    # TAU names: scene-city-location-segment-device.wav (2019, 2020), …-segment-part-device.wav (2022 and later). People
    # put words and folders around them, and other suffixes behind.
    place_in_name=re.compile(
        rf"(?<![a-z])(?:{'|'.join(_SCENES)})-({'|'.join(_CITIES)})-([0-9]+)-[0-9]+(?:-[0-9]+)?-(a|b|c|s[1-6])"
        r"(?![a-z0-9])",
        re.IGNORECASE | re.ASCII,
    ),
    spellings={"a": "A"},
)

TASKS = (DCASE,)
"""All that there are. Their adaptations have names of their own."""


def task_of(name: str) -> Task:
    """The task whose adaptation a folder is named after; the first where it is named after none."""
    return next((task for task in TASKS if task.is_adaptation(name)), TASKS[0])


def adaptation(target: str) -> str:
    """What the adaptation to a target is called, and its cache's folder."""
    return next((task for task in TASKS if target in task.targets), TASKS[0]).adaptation(target)


def is_adaptation(name: str) -> bool:
    """Whether a folder is named as the cache of an adaptation is, whatever its target."""
    return any(task.is_adaptation(name) for task in TASKS)


def target_in(name: str) -> str | None:
    """The target of an adaptation, by its name; ``None`` where that names none."""
    return next((target for task in TASKS if (target := task.target_in(name)) is not None), None)
