"""What a data set is: its classes, its domains, which of them may be learnt from, what must not straddle its splits.

`DCASE` is the value for acoustic scene classification under device shift. Nothing outside this package knows a scene, a
city or a device by name. Another task is a YAML file, or a value made in Python (`kd_cache.dataset.task_file`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from kd_cache.errors import UsageError, shown

ONLY = "all"
"""The one domain of a task that has none."""
HELD_OUT = re.compile(r"test|eval|hold[\W_]*out|held[\W_]*out", re.IGNORECASE)
MOST_CLASSES = 1_000_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")


@dataclass(frozen=True)
class Task:
    """One kind of data set.

    Attributes:
        name: what people call it; where there are no domains, the folder of its cache.
        scenes: the classes that students learn, in the order of their labels; none where only their number is known.
        count: how many classes there are, where they have no names; 0 where that is not known either.
        cities: the classes of the auxiliary label, in the order of theirs.
        devices: the domains; a device's position is its integer ``domain``. Where there are none, all samples are of
            the one domain `ONLY`, which is the source.
        source: the device whose labels may be used.
        targets: devices that can be adapted to; ``unseen`` ones are never trained on, cached or distilled.
        spellings: other ways to write a device.
        held_out: finds what people call the split that is held out in a split's name.
        group: the manifest's field of what must not be in train and test both; ``None`` where nothing is.
        place_in_name: finds the group in a file's name; or ``(city, number, device)`` of a recording.
        anything: inputs are tensors of any shape and dtype, and not features ``[T, F]`` of one F.
    """

    name: str
    scenes: tuple[str, ...] = ()
    cities: tuple[str, ...] = ()
    devices: tuple[str, ...] = (ONLY,)
    source: str = ONLY
    targets: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    held_out: re.Pattern[str] = HELD_OUT
    place_in_name: re.Pattern[str] | None = None
    spellings: Mapping[str, str] = field(default_factory=dict)
    count: int = 0
    group: str | None = None
    anything: bool = True

    def __post_init__(self) -> None:
        """Raise `UsageError` where caches could not be called after it."""
        if wrong := [name for name in (self.devices if self.has_domains else [self.name]) if not NAME.match(name)]:
            what = "a domain's name" if self.has_domains else "the name of a task without domains"
            raise UsageError(f"{shown(wrong[0])} cannot be {what} (letters, digits, _ . -): caches are called so")

    @property
    def num_classes(self) -> int:
        """One more than the largest label there may be."""
        return len(self.scenes) or self.count or MOST_CLASSES

    @property
    def has_domains(self) -> bool:
        return bool(self.targets)

    @property
    def is_guarded(self) -> bool:
        """Whether it says of any sample that it must not be used."""
        return self.has_domains or self.group is not None

    @cached_property
    def domain_of(self) -> dict[str, int]:
        return {device: domain for domain, device in enumerate(self.devices)}

    def device(self, spelling: str) -> str | None:
        """The device that is meant; ``None`` if there is no such."""
        return spelling if spelling in self.domain_of else self.spellings.get(spelling)

    def city(self, label: int) -> str:
        """What a city's label is called; a data set may have more cities than the task names."""
        return self.cities[label] if label < len(self.cities) else f"city {label}"

    def chosen(self, target: str | None) -> str:
        """The target that is meant. Raises `UsageError` for none, one too many, or one that is unknown."""
        if not self.has_domains and target is not None:
            raise UsageError(f"the task {shown(self.name)} has no domains, so there is no target; leave out --target")
        if target is None and self.has_domains:
            raise UsageError(f"no target is named: pass --target, one of {', '.join(self.targets)}")
        if target is not None and (target := self._spelled(target)) not in self.targets:
            raise UsageError(f"target is {shown(target)!r}, expected one of {', '.join(self.targets)}")
        return target or self.source

    def _spelled(self, target: str) -> str:
        """The target that is meant, whatever the case of its letters; what is none stays as it is."""
        alike = [each for each in self.targets if each.casefold() == target.casefold()]
        return target if target in self.targets or not alike else alike[0]

    def several(self, text: str | None) -> list[str]:
        """``b``, ``b,c`` or ``all``: targets in the task's order. Raises `UsageError`."""
        if text is None or not self.has_domains:
            return [self.chosen(text)]
        if text.casefold() == "all":
            return list(self.targets)
        named = [self._spelled(each.strip()) for each in text.split(",")]
        for each in named:
            if each not in self.targets:
                raise UsageError(f"target is {shown(each)!r}, expected one of {', '.join(self.targets)}, or all")
            if named.count(each) > 1:
                raise UsageError(f"{shown(text)} names {each} twice")
        return [each for each in self.targets if each in named]

    def permits(self, target: str) -> str:
        """What may be cached, in words: ``train samples of A or b``."""
        return f"train samples of {self.source} or {target}" if self.has_domains else "train samples"

    def group_in(self, file: str) -> str | None:
        """What a file's name says of its group: ``city-location`` for recordings named as the task's clips are."""
        if self.place_in_name is None:
            return None
        found = self.place_in_name.findall(file)
        return ("-".join(found[-1][:2]) if isinstance(found[-1], tuple) else found[-1]) if found else None

    def recording_in(self, file: str) -> tuple[str, str, str] | None:
        """City, number and device of a file named as the task's clips are, as they are written there."""
        found = self.place_in_name.findall(file) if self.place_in_name is not None else []
        return found[-1] if found and isinstance(found[-1], tuple) else None

    def adaptation(self, target: str) -> str:
        """What an adaptation is called, and the folder of its cache: ``A2b``; without domains the task's name."""
        return f"{self.source}2{target}" if self.has_domains else self.name

    def is_adaptation(self, name: str) -> bool:
        """Whether a folder is named as the cache of an adaptation is, whatever its target."""
        return name.startswith(f"{self.source}2") if self.has_domains else name == self.name

    def target_in(self, name: str) -> str | None:
        """The target of an adaptation, by its name; ``None`` where that names none."""
        if not self.has_domains:
            return self.source if name == self.name else None
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
    # TAU names: scene-city-location-segment-device.wav (2019, 2020), …-segment-part-device.wav (2022 and later). People
    # put words and folders around them, and other suffixes behind.
    place_in_name=re.compile(
        rf"(?<![a-z])(?:{'|'.join(_SCENES)})-({'|'.join(_CITIES)})-([0-9]+)-[0-9]+(?:-[0-9]+)?-(a|b|c|s[1-6])"
        r"(?![a-z0-9])",
        re.IGNORECASE | re.ASCII,
    ),
    spellings={"a": "A"},
    group="location",
    anything=False,
)
