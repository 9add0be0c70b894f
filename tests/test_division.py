"""Training and validation by recording location: no location, and no simultaneous twin, is ever on both sides."""

from __future__ import annotations

import functools
import itertools
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_cache.dataset.manifest import Sample
from kd_cache.dataset.task import DCASE
from kd_cache.errors import DataLeakageError, UsageError
from kd_cache.train import division
from kd_cache.train.division import Division

divide, subsample, locations_of = (
    functools.partial(call, task=DCASE) for call in (division.divide, division.subsample, division.locations_of)
)


def sample(
    file: str, *, location: str | None = None, scene: int | None = 0, city: int | None = 11, device: str = "A"
) -> Sample:
    return Sample(file, scene, city, DCASE.domain_of[device], device, "train", "train", location)


def tau(
    cities: int = 4, scenes: int = 4, places: int = 3, segments: int = 1, devices: Sequence[str] = ("A",)
) -> list[Sample]:
    """Rows named as TAU names its clips: every city has ``places`` locations of each scene, numbered as TAU does."""
    rows = []
    for scene, city, place in itertools.product(range(scenes), range(cities), range(places)):
        name = f"features/{DCASE.scenes[scene]}-{DCASE.cities[city]}-{(scene * cities + city) * places + place}"
        rows += [
            sample(f"{name}-{segment}-{device.lower()}.npy", scene=scene, city=city, device=device)
            for segment in range(segments)
            for device in devices
        ]
    return rows


def place_in_name(file: str) -> str | None:
    """``city-number`` of a TAU name, found by cutting it at its hyphens."""
    words = file.rpartition("/")[2].removesuffix(".npy").split("-")
    return f"{words[1]}-{int(words[2])}" if len(words) >= 5 and words[0] in DCASE.scenes else None


def places(side: Iterable[Sample]) -> set[str]:
    """The locations of rows with a field or a TAU name each."""
    return {each.location or place_in_name(each.file) or "" for each in side}


def held_out(
    samples: Sequence[Sample],
    ratio: float = 0.25,
    fold: int = 0,
    seed: int = 0,
    heard: Callable[[Sample], bool] = lambda _: True,
) -> set[str]:
    return places(divide(samples, ratio=ratio, fold=fold, seed=seed, heard=heard).validation)


def components(samples: Sequence[Sample], root: Path | None = None) -> list[int]:
    """Which group of tied rows each row is in."""
    above = list(range(len(samples)))

    def top(number: int) -> int:
        return number if above[number] == number else top(above[number])

    first: dict[tuple[str, str], int] = {}
    for number, each in enumerate(samples):
        marks = {("place", name) for name in (each.location, place_in_name(each.file)) if name is not None}
        if root is not None:
            marks.add(("file", os.path.normpath(root / each.file)))
        for mark in marks:
            above[top(number)] = top(first.setdefault(mark, number))
    return [top(number) for number in range(len(samples))]


def check(samples: Sequence[Sample], made: Division, root: Path | None = None) -> None:
    """What must hold of every division, said again without the product's own code."""
    assert Counter(made.train) + Counter(made.validation) == Counter(samples)
    order = {each: number for number, each in reversed(list(enumerate(samples)))}
    for side in (made.train, made.validation):
        assert [order[each] for each in side] == sorted(order[each] for each in side)
    validation = set(made.validation)
    assert not validation & set(made.train)
    sides: dict[int, set[bool]] = defaultdict(set)
    labels: dict[int, set[int]] = defaultdict(set)
    names: dict[int, set[str]] = defaultdict(set)
    for each, group in zip(samples, components(samples, root), strict=True):
        sides[group].add(each in validation)
        if each.city_label is not None:
            labels[group].add(each.city_label)
        names[group] |= {name for name in (each.location, place_in_name(each.file)) if name is not None}
    assert all(len(found) == 1 for found in sides.values())
    assert all(len(found) <= 1 for found in labels.values())
    assert made.validation_locations == sum(found == {True} for found in sides.values())
    assert made.train_locations == sum(found == {False} for found in sides.values())
    by_city: dict[str, set[bool]] = defaultdict(set)
    for group, found in sides.items():
        city = DCASE.cities[min(labels[group])] if labels[group] else min(names[group]).rpartition("-")[0]
        by_city[city] |= found
    assert all(found == {True, False} for found in by_city.values())


# -- what is held out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [("A",), ("A", "b"), ("A", "s1", "s2")])
def test_whole_locations_of_every_city_are_held_out_with_all_their_twins(devices: Sequence[str]) -> None:
    samples = tau(segments=2, devices=devices)
    for ratio in (0.01, 0.1, 0.25, 0.5):
        made = divide(samples, ratio=ratio)
        check(samples, made)
        assert not places(made.train) & places(made.validation)
        for side in (made.train, made.validation):
            assert {each.city_label for each in side} == set(range(4))
            moments = Counter(each.file.rpartition("-")[0] for each in side)
            assert set(moments.values()) == {len(devices)}


@given(st.floats(0.001, 0.5), st.integers(2, 12))
def test_every_city_holds_out_the_share_that_is_asked_for(ratio: float, count: int) -> None:
    samples = [sample(f"{city}/{n}.npy", city=city, location=f"{city}-{n}") for city in (0, 5) for n in range(count)]
    made = divide(samples, ratio=ratio)
    for city in (0, 5):
        out = sum(each.city_label == city for each in made.validation)
        assert 1 <= out <= count - 1
        assert out == 1 or abs(out - ratio * count) <= 0.5


def test_scenes_take_turns_among_the_held_out() -> None:
    samples = tau(cities=5, scenes=10, places=4)
    for seed in range(5):
        made = divide(samples, ratio=0.25, seed=seed)
        assert Counter(each.scene_label for each in made.validation) == dict.fromkeys(range(10), 5)


def test_few_held_out_locations_of_many_cities_still_have_all_scenes_among_them() -> None:
    made = divide(tau(cities=10, scenes=10, places=2), ratio=0.05)
    assert made.validation_locations == 10
    assert {each.scene_label for each in made.validation} == set(range(10))


@given(st.integers(0, 99), st.integers(0, 4))
def test_every_scene_keeps_a_location_to_train_on(seed: int, fold: int) -> None:
    rare = [
        sample("rare.npy", location="vienna-100", scene=7),
        sample("rare2.npy", location="lyon-100", scene=7, city=5),
    ]
    others = [
        sample(f"{city}-{n}.npy", location=f"{DCASE.cities[city]}-{n}", scene=n % 2, city=city)
        for city in (5, 11)
        for n in range(4)
    ]
    made = divide([*rare, *others], ratio=0.4, fold=fold, seed=seed)
    assert {each.scene_label for each in made.train} == {0, 1, 7}
    check([*rare, *others], made)
    assert made.validation_locations == 4


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.25, 1 / 3, 0.5])
def test_folds_hold_out_other_locations_until_a_city_has_no_more(ratio: float) -> None:
    samples = tau(cities=3, scenes=3, places=4)
    count = round(ratio * 12)
    folds = [held_out(samples, ratio, fold) for fold in range(-(-12 // count))]
    apart = folds[: 12 // count]
    assert all(len(fold) == 3 * count for fold in folds)
    assert len(set().union(*apart)) == sum(map(len, apart))
    assert set().union(*folds) == places(samples)


def test_what_is_held_out_is_the_same_for_ever() -> None:
    samples = [sample(f"{n}.npy", location=f"vienna-{n}", scene=n % 2) for n in range(8)]
    expected = [{"vienna-1", "vienna-2"}, {"vienna-5", "vienna-6"}]
    assert [held_out(samples, fold=fold) for fold in range(2)] == expected
    assert len({frozenset(held_out(tau(), seed=seed)) for seed in range(10)}) > 5  # other seeds, other locations


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 3), st.sampled_from([0.1, 0.25, 0.5]), st.randoms(use_true_random=False))
def test_neither_order_nor_number_of_samples_changes_what_is_held_out(
    seed: int, fold: int, ratio: float, chance: random.Random
) -> None:
    samples = tau(cities=3, scenes=3)
    more = [each._replace(file=f"more/{n}/{each.file}") for each in samples for n in range(chance.randrange(4))]
    mixed = [*samples, *more]
    chance.shuffle(mixed)
    made = divide(mixed, ratio=ratio, fold=fold, seed=seed)
    check(mixed, made)
    assert places(made.validation) == held_out(samples, ratio, fold, seed)


@pytest.mark.parametrize("target", ["b", "s3"])
def test_source_alone_and_source_with_target_hold_out_the_same_locations(target: str) -> None:
    both = tau(segments=2, devices=("A", target))
    chance = np.random.default_rng(0)
    fewer = [each for each in both if each.device_id == "A" or chance.random() < 0.3]
    source = [each for each in both if each.device_id == "A"]
    for fold in range(3):
        assert held_out(both, fold=fold) == held_out(fewer, fold=fold) == held_out(source, fold=fold)


def test_only_some_devices_leaves_every_location_on_its_side() -> None:
    made = divide(tau(segments=2, devices=("A", "b", "c")), ratio=0.25)
    chosen = made.only(["A", "c"])
    assert {each.device_id for each in (*chosen.train, *chosen.validation)} == {"A", "c"}
    assert chosen.train == tuple(each for each in made.train if each.device_id != "b")
    assert chosen.validation == tuple(each for each in made.validation if each.device_id != "b")
    assert (chosen.train_locations, chosen.validation_locations) == (made.train_locations, made.validation_locations)


# -- ties --------------------------------------------------------------------------------------------------------------


def test_a_field_and_a_name_tie_two_locations_into_one() -> None:
    chain = [
        sample("airport-vienna-1-0-a.npy"),
        sample("airport-vienna-1-1-a.npy", location="hall-5"),
        sample("x.npy", location="hall-5"),
        sample("airport-vienna-9-0-a.npy", location="hall-5"),
        sample("airport-vienna-9-1-a.npy"),
    ]
    (place,) = locations_of(chain)
    assert place.samples == (0, 1, 2, 3, 4)
    assert (place.name, place.city, place.scene) == ("hall-5", "vienna", 0)
    other = [sample(f"bus-vienna-{n}-0-a.npy") for n in range(20, 23)]
    for fold in range(4):
        check([*chain, *other], divide([*chain, *other], ratio=0.25, fold=fold))


@pytest.mark.parametrize("spelled", ["./x/1.npy", "x//1.npy", "x/../x/1.npy", "{root}/x/1.npy", "link/1.npy"])
def test_one_file_under_two_spellings_is_one_location(tmp_path: Path, spelled: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("x")
    samples = [sample("x/1.npy", location="k-1"), sample(spelled.format(root=tmp_path), location="k-2")]
    samples += [sample(f"x/{n}.npy", location=f"k-{n}") for n in range(3, 6)]
    assert len(locations_of(samples)) == 5
    assert len(locations_of(samples, data_root=tmp_path)) == 4
    for fold in range(4):
        made = divide(samples, ratio=0.25, fold=fold, data_root=tmp_path)
        assert len({each in made.validation for each in samples[:2]}) == 1
        assert made.validation_locations == 1


NAMES = st.sampled_from(
    [f"{scene}-vienna-{n}-{s}-a.npy" for scene in ("bus", "park") for n in range(6) for s in (0, 1)]
)
FILES = st.one_of(
    NAMES,
    NAMES.map(lambda name: f"./{name}"),
    NAMES.map(lambda name: f"x/../{name}"),
    NAMES.map(lambda name: f"/r//{name}"),
    st.sampled_from([f"{dots}{n}.npy" for n in range(5) for dots in ("", "./")]),
)
ADVERSARIAL = st.lists(
    st.builds(
        lambda file, place, scene, city, device: sample(file, location=place, scene=scene, city=city, device=device),
        FILES,
        st.none() | st.sampled_from([f"{city}-{n}" for city in ("vienna", "lyon") for n in range(6)]),
        st.none() | st.integers(0, 2),
        st.none() | st.none() | st.none() | st.sampled_from([11, 5]),
        st.sampled_from(DCASE.devices),
    ),
    max_size=14,
    unique=True,
)
STEADY = [sample(f"s/{n}.npy", location=f"vienna-{n}", scene=n % 3) for n in range(40, 50)]
STEADY += [sample(f"s/{n}.npy", location=f"lyon-{n}", scene=n % 3, city=5) for n in range(40, 50)]


@settings(max_examples=150)
@given(
    ADVERSARIAL,
    st.sampled_from([0.1, 0.3, 0.5]),
    st.integers(-2, 6),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from([0.2, 1.0]),
)
def test_no_tie_of_any_manifest_crosses_the_sides(
    rows: list[Sample], ratio: float, fold: int, seed: int, rooted: bool, share: float
) -> None:
    samples, root = [*STEADY, *rows], Path("/r") if rooted else None
    try:
        kept = subsample(samples, share, seed=seed, data_root=root)
        made = divide(kept, ratio=ratio, fold=fold, seed=seed, data_root=root)
    except (DataLeakageError, UsageError):
        return
    check(kept, made, root)
    group = dict(zip(samples, components(samples, root), strict=True))
    assert not {group[each] for each in kept} & {group[each] for each in samples if each not in set(kept)}


# -- a share of the locations ------------------------------------------------------------------------------------------


@given(st.floats(0.001, 1))
def test_a_quick_experiment_keeps_whole_locations_and_two_of_every_city(share: float) -> None:
    samples = tau(cities=3, scenes=4, places=3, segments=2, devices=("A", "b"))
    kept = subsample(samples, share)
    assert list(kept) == [each for each in samples if each in set(kept)]
    assert not places(kept) & places(each for each in samples if each not in set(kept))
    for city in range(3):
        mine = places(each for each in kept if each.city_label == city)
        assert len(mine) == max(round(share * 12), 2)


@settings(max_examples=20)
@given(st.sampled_from([10, 12]), st.floats(0.01, 0.5), st.integers(0, 2))
def test_a_quick_experiment_can_be_divided(cities: int, share: float, fold: int) -> None:
    kept = subsample(tau(cities=cities, scenes=10, places=3, devices=("A", "b")), share)
    made = divide(kept, ratio=0.1, fold=fold)
    check(kept, made)
    assert {each.scene_label for each in made.train} == set(range(10))


def test_a_quick_experiment_does_not_depend_on_order_or_number_of_samples() -> None:
    samples = tau(segments=3, devices=("A", "b"))
    fewer = [each for each in samples if each.device_id == "A"][::-1]
    assert places(subsample(samples, 0.4)) == places(subsample(fewer, 0.4))
    assert places(subsample(samples, 0.4, seed=1)) != places(subsample(samples, 0.4, seed=2))


# -- refusals ----------------------------------------------------------------------------------------------------------

CALLS = [lambda rows: divide(rows, ratio=0.2), lambda rows: subsample(rows, 0.5), locations_of]


@pytest.mark.parametrize("call", CALLS, ids=["divide", "subsample", "locations_of"])
def test_samples_of_unknown_location_are_refused_by_name(call: Callable[[list[Sample]], object]) -> None:
    rows = [*tau(), *(sample(f"odd/{n}.npy") for n in range(25)), sample("odd/\x1b[31m.npy")]
    with pytest.raises(UsageError, match="26 samples name no recording location") as caught:
        call(rows)
    message = str(caught.value)
    assert all(f"odd/{n}.npy" in message for n in range(20))
    assert "and 6 more" in message
    assert '"location"' in message
    assert "\x1b" not in message
    assert "features/" not in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("call", CALLS, ids=["divide", "subsample", "locations_of"])
@pytest.mark.parametrize(
    "rows",
    [
        [sample("a.npy", location="k-1", city=3), sample("b.npy", location="k-1", city=4)],
        [sample("bus-vienna-1-0-a.npy", city=3), sample("b.npy", location="vienna-1", city=4)],
        [
            sample("bus-vienna-1-0-a.npy", city=3),
            sample("bus-vienna-1-0-b.npy", location="k-1", city=None),
            sample("b.npy", location="k-1", city=4),
        ],
    ],
)
def test_one_location_of_two_cities_is_leakage(rows: list[Sample], call: Callable[[list[Sample]], object]) -> None:
    with pytest.raises(DataLeakageError, match="samples of 2 cities") as caught:
        call([*tau(), *rows])
    assert caught.value.exit_code == 6
    assert f"{rows[0].file}: city 3" in caught.value.message
    assert f"{rows[-1].file}: city 4" in caught.value.message


def test_a_city_with_one_location_is_refused_by_name() -> None:
    lonely = [sample(f"{n}.npy", location="vienna-77") for n in range(5)]
    with pytest.raises(UsageError, match=r"vienna has one recording location \(vienna-77\)") as caught:
        divide([*tau(), *lonely], ratio=0.2)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_what_is_no_share_of_locations_is_refused() -> None:
    for share in (0, -0.1, 1.000001, math.nan, math.inf, -math.inf):
        with pytest.raises(UsageError, match=r"at most 0\.5"):
            divide(tau(), ratio=share)
        with pytest.raises(UsageError, match="expected more than 0 and at most 1"):
            subsample(tau(), share)
    with pytest.raises(UsageError, match=r"at most 0\.5"):
        divide(tau(), ratio=0.500001)


def test_a_scene_with_too_few_locations_is_refused_by_number() -> None:
    samples = [sample(f"{n}.npy", location=f"vienna-{n}", scene=n + 3) for n in range(2)]
    with pytest.raises(UsageError, match=r"scene [34] has too few recording locations") as caught:
        divide(samples, ratio=0.5)
    assert "--val-ratio" in str(caught.value)


def test_a_scene_is_refused_only_where_no_choice_would_keep_it_in_training() -> None:
    layout = {"paris": (8, [3, 0, 3]), "vienna": (11, [2, 0])}
    samples = [
        sample(f"{city}-{n}.npy", location=f"{city}-{n}", scene=scene, city=label)
        for city, (label, scenes) in layout.items()
        for n, scene in enumerate(scenes)
    ]  # paris can always hold out one of its two locations of scene 3, and vienna its one of scene 0
    for seed in range(20):
        for fold in range(3):
            made = divide(samples, ratio=0.2, fold=fold, seed=seed)
            assert {each.scene_label for each in made.train} == {0, 2, 3}


# -- rows without a scene, and locations with several ------------------------------------------------------------------


@pytest.mark.parametrize("clips", [1, 2, 5])
def test_target_rows_without_a_scene_do_not_change_what_is_held_out(clips: int) -> None:
    source = tau(cities=3, scenes=4)
    unlabelled = [
        each._replace(file=each.file.replace("-a.npy", f"-{n}-b.npy"), scene_label=None, device_id="b", domain=1)
        for each in source
        for n in range(clips)
    ]
    for fold in range(4):
        expected = held_out(source, fold=fold)
        assert held_out([*source, *unlabelled], fold=fold) == expected
        assert held_out([*unlabelled, *source], fold=fold) == expected


def test_places_that_only_a_target_knows_train_and_change_nothing_in_what_is_held_out() -> None:
    source = tau(cities=3, scenes=4)
    new = [
        sample(f"new-{n}-b.npy", location=f"{city}-{900 + n}", scene=None)._replace(device_id="b", domain=1)
        for n, city in enumerate(["aachen", "barcelona", "zagreb"] * 40)
    ]
    expected = held_out(source)
    assert held_out([*new, *source]) != expected, "they would move it"
    assert held_out([*new, *source], heard=lambda each: each.device_id == "A") == expected


def two_scenes(first: int, second: int) -> list[Sample]:
    """Locations of which every second has two scenes: that many clips of the one, then of the other."""
    return [
        sample(f"{n}-{clip}.npy", location=f"vienna-{n}", scene=n % 3 if clip < first or n % 2 else (n + 1) % 3)
        for n in range(12)
        for clip in range(first + second)
    ]


def test_neither_order_nor_number_of_a_location_s_scenes_changes_what_is_held_out() -> None:
    for seed in range(10):
        expected = held_out(two_scenes(1, 1), seed=seed)
        assert held_out(two_scenes(1, 1)[::-1], seed=seed) == expected
        assert held_out(two_scenes(1, 3), seed=seed) == held_out(two_scenes(3, 1), seed=seed) == expected
