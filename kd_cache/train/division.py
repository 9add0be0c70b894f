"""Training and validation samples, divided by recording location.

Clips of one location sound alike, and every clip of a target device has a simultaneous twin on A: a division at random
by file puts nearly every validation clip's location, or its very moment, into training. So whole locations are held
out, of every city some, and never a file of the manifest's ``test``.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_cache.dataset.guard import Places, places_of_sample
from kd_cache.dataset.manifest import Sample
from kd_cache.dataset.task import Task
from kd_cache.errors import DataLeakageError, UsageError, listed


@dataclass(frozen=True)
class Location:
    """Samples that must stay together: of one place, under whatever names it has, in manifest order."""

    name: str
    city: str
    scene: int | None
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Division:
    """Training and validation samples, each in manifest order, and the name of each one's location."""

    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    place_of: Mapping[Sample, str]

    @property
    def train_locations(self) -> int:
        return len({self.place_of[sample] for sample in self.train})

    @property
    def validation_locations(self) -> int:
        return len({self.place_of[sample] for sample in self.validation})

    def only(self, devices: Iterable[str]) -> Division:
        """The samples of these devices; every location stays on its side."""
        kept = set(devices)
        train, validation = (
            tuple(sample for sample in side if sample.device_id in kept) for side in (self.train, self.validation)
        )
        return Division(train, validation, self.place_of)


def divide(
    samples: Sequence[Sample],
    *,
    task: Task,
    ratio: float,
    fold: int = 0,
    seed: int = 0,
    data_root: Path | None = None,
    heard: Callable[[Sample], bool] = lambda _: True,
) -> Division:
    """Hold out about ``ratio`` of each city's locations, spread over the scenes.

    The choice depends on the names of the locations, ``ratio``, ``fold`` and ``seed``, and on nothing else: not on the
    order of the samples, nor on how many each location has. Folds 0, 1, … hold out other locations, until a city has
    no more of them (or a scene would have none left in training).

    Args:
        samples: permitted train samples.
        ratio: of locations, more than 0 and at most 0.5; every city keeps one at least on either side.
        data_root: the features' folder, so that one file under two names stays on one side.
        heard: locations without any such sample all train, and change nothing in what is held out of the others.

    Raises:
        UsageError: a sample whose location is not known, or a city or scene with too few locations.
        DataLeakageError: one location with samples of two cities.
    """
    if not 0 < ratio <= 0.5:
        raise UsageError(f"the validation ratio is {ratio}, expected more than 0 and at most 0.5")
    chosen: set[str] = set()
    locations = locations_of(samples, task, data_root)
    by_city = _in_turn([one for one in locations if any(heard(samples[number]) for number in one.samples)], seed)
    for city, mine in by_city.items():
        if len(mine) < 2:
            raise UsageError(
                f"{city} has one recording location ({mine[0].name}), so it cannot be on both sides of a validation "
                "by location",
                hint="Leave the city out of the manifest, or record another location there.",
            )
        count = min(max(round(ratio * len(mine)), 1), len(mine) - 1)
        chosen.update(mine[(fold * count + number) % len(mine)].name for number in range(count))
    _keep_every_scene_in_training(by_city, chosen)
    place_of = {samples[number]: place.name for place in locations for number in place.samples}
    train = tuple(sample for sample in samples if place_of[sample] not in chosen)
    return Division(train, tuple(sample for sample in samples if place_of[sample] in chosen), place_of)


def subsample(
    samples: Sequence[Sample], share: float, *, task: Task, seed: int = 0, data_root: Path | None = None
) -> tuple[Sample, ...]:
    """The samples of about ``share`` of each city's locations (two at least), for a quick experiment.

    Raises as `divide` does.
    """
    if not 0 < share <= 1:
        raise UsageError(f"the share of locations is {share}, expected more than 0 and at most 1")
    kept: set[int] = set()
    for mine in _in_turn(locations_of(samples, task, data_root), seed).values():
        for place in mine[: max(round(share * len(mine)), 2)]:
            kept.update(place.samples)
    return tuple(sample for number, sample in enumerate(samples) if number in kept)


def locations_of(samples: Sequence[Sample], task: Task, data_root: Path | None = None) -> list[Location]:
    """The samples by location. One that has a field and a telling name ties the two together. Raises as `divide`."""
    ties = Ties()
    plain = Places(data_root).plain if data_root is not None else None
    files: dict[str, str] = {}
    unknown = []
    place_of = []
    for sample in samples:
        found = sorted(places_of_sample(sample))
        if not found:
            unknown.append(sample.file)
            continue
        place_of.append(found[0])
        ties.join(found)
        if plain is not None:
            ties.join([found[0], files.setdefault(plain(sample.file), found[0])])
    if unknown:
        raise UsageError(
            f"{len(unknown)} samples name no recording location, so validation cannot be kept apart from training\n"
            f"{listed(unknown)}",
            hint='Give every sample a "location" (city-number), or name the files as TAU does.',
        )
    together: dict[str, list[int]] = defaultdict(list)
    for number, place in enumerate(place_of):
        together[ties.first(place)].append(number)
    return [_location(name, numbers, samples, task) for name, numbers in together.items()]


class Ties:
    """Names that belong together, of one location for example (disjoint sets)."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def first(self, name: str) -> str:
        """The name that stands for all that are tied to ``name``."""
        path = []
        while (above := self._above.setdefault(name, name)) != name:
            path.append(name)
            name = above
        for each in path:
            self._above[each] = name
        return name

    def join(self, names: Sequence[str]) -> None:
        first = self.first(names[0])
        for name in names[1:]:
            other = self.first(name)
            low, high = min(first, other), max(first, other)
            self._above[high] = first = low


def _location(name: str, numbers: list[int], samples: Sequence[Sample], task: Task) -> Location:
    labels = {samples[number].city_label for number in numbers} - {None}
    if len(labels) > 1:
        found = listed(f"{samples[n].file}: city {samples[n].city_label}" for n in numbers)
        raise DataLeakageError(
            f"location {name} has samples of {len(labels)} cities, so nothing can be held out by it\n{found}",
            hint="One of location and city_label is wrong; mend the manifest.",
        )
    label = next(iter(labels), None)
    city = name.rpartition("-")[0] if label is None else task.city(label)
    # The least of its scenes on A: order and number of samples do not matter, and a target's labels are not looked at.
    scenes = {samples[number].scene_label for number in numbers if samples[number].device_id == task.source}
    scene = min((each for each in scenes if each is not None), default=None)
    return Location(name, city, scene, tuple(numbers))


def _in_turn(locations: Iterable[Location], seed: int) -> dict[str, list[Location]]:
    """Each city's locations in the order in which they are chosen: by chance, the scenes in turn.

    Each city begins with another scene, so that few locations of many cities still have all scenes among them.
    """
    of_city: dict[str, list[Location]] = defaultdict(list)
    for place in sorted(locations, key=lambda place: chance_of(place.name, seed)):
        of_city[place.city].append(place)
    found = {}
    for first, city in enumerate(sorted(of_city)):
        scenes = sorted({place.scene for place in of_city[city]}, key=lambda scene: -1 if scene is None else scene)
        turn = {scene: (number - first) % len(scenes) for number, scene in enumerate(scenes)}
        rounds: Counter[int | None] = Counter()
        keyed = []
        for place in of_city[city]:
            keyed.append(((rounds[place.scene], turn[place.scene]), place))
            rounds[place.scene] += 1
        found[city] = [place for _, place in sorted(keyed, key=lambda item: item[0])]
    return found


def chance_of(name: str, seed: int) -> bytes:
    """What names are put into an order of chance by."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _keep_every_scene_in_training(by_city: dict[str, list[Location]], chosen: set[str]) -> None:
    """Where all locations of a scene are held out, hold out another of the same city. Raises as `divide`."""
    left = Counter(place.scene for mine in by_city.values() for place in mine if place.name not in chosen)
    lost = sorted({place.scene for mine in by_city.values() for place in mine if place.scene is not None} - set(left))
    for scene in lost:
        if not _give_back(scene, by_city, chosen, left):
            raise UsageError(
                f"scene {scene} has too few recording locations to be in training while each city has some held out",
                hint="Choose another --fold or a smaller --val-ratio.",
            )


def _give_back(
    scene: int,
    by_city: dict[str, list[Location]],
    chosen: set[str],
    left: Counter[int | None],
    seen: frozenset[int] = frozenset(),
) -> bool:
    """Bring a location of ``scene`` back into training; another of its city takes its place.

    That one's scene may need one of its own back first, and so on (``seen`` are the scenes this began with).
    """
    seen |= {scene}
    for mine in by_city.values():
        for place in mine:
            if place.scene != scene or place.name not in chosen:
                continue
            for other in mine:
                if other.name in chosen or other.scene in seen:
                    continue
                if other.scene is None or left[other.scene] > 1 or _give_back(other.scene, by_city, chosen, left, seen):
                    chosen.remove(place.name)
                    chosen.add(other.name)
                    left[other.scene] -= 1
                    left[scene] += 1
                    return True
    return False
