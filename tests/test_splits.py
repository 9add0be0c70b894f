"""The train-only guard: who may be scored, cached and distilled, and that nobody else ever is."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd_cache.dataset.guard import Selection, location_in_name, refuse_outside, select
from kd_cache.dataset.manifest import Manifest
from kd_cache.dataset.manifest import parse_manifest as parse_bytes
from kd_cache.dataset.task import DCASE
from kd_cache.errors import DataLeakageError, ManifestError, UsageError

Row = dict[str, Any]


def row(file: str, device: str = "A", split: str = "train", **changes: Any) -> Row:
    labels = {"scene_label": 1, "city_label": 2, "device_id": device, "domain": DCASE.domain_of[device]}
    whole = {"file": file, **labels, "split": split} | changes
    return {field: value for field, value in whole.items() if value is not ...}


def manifest(*rows: Row, **lists: list[Row]) -> Manifest:
    return Manifest(parse_bytes(json.dumps(lists or list(rows)).encode(), "m.json"), "")


PAIR = (row("good/a.npy"), row("good/b.npy", "b"))
"""The least that can be selected for target b."""


def leak(*rows: Row, data_root: Path | None = None, allow: bool = False, **lists: list[Row]) -> str:
    """The message of the refusal of these rows beside `PAIR`."""
    made = manifest(*PAIR, *rows, **lists)
    with pytest.raises(DataLeakageError) as caught:
        select(made, "b", allow_shared_locations=allow, data_root=data_root)
    assert caught.value.exit_code == 6
    assert isinstance(caught.value, ValueError)
    return caught.value.message


# -- what is selected --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", DCASE.targets)
def test_train_rows_of_the_source_and_the_target_are_selected_in_order(target: str) -> None:
    rows = [row(f"{device}/{n}.npy", device) for n in range(2) for device in ("A", "b", "c", "s1", "s2", "s3")]
    selection = select(manifest(*rows), target)
    assert selection.files == [r["file"] for r in rows if r["device_id"] in ("A", target)]
    assert selection.per_device == {"A": 2, target: 2}
    assert list(selection.per_device) == ["A", target]


@pytest.mark.parametrize(
    "split", ["test", "val", "unused", "Train", "TRAIN", "train ", " train", "trained", "training"]
)
def test_only_the_word_train_is_train(split: str) -> None:
    others = [row(f"{device}.npy", device, split) for device in ("A", "b", *DCASE.unseen)]
    assert select(manifest(*PAIR, *others), "b").files == ["good/a.npy", "good/b.npy"]
    if split in ("test", "val"):
        listed = [{name: value for name, value in other.items() if name != "split"} for other in others]
        assert select(manifest(train=list(PAIR), **{split: listed}), "b").files == ["good/a.npy", "good/b.npy"]


@pytest.mark.parametrize("target", ["A", "a", "s4", "s5", "s6", "", "d", "b,d", "\x1b[31m"])
def test_an_unknown_target_is_a_usage_error_with_the_known_ones(target: str) -> None:
    with pytest.raises(UsageError, match="expected one of b, c, s1, s2, s3") as caught:
        select(manifest(*PAIR), target)
    assert caught.value.exit_code == 2
    assert caught.value.message.isprintable()


def test_a_target_is_known_in_capitals() -> None:
    assert select(manifest(*PAIR), "B").target == "b"


@pytest.mark.parametrize(
    ("rows", "device"),
    [
        ([row("a.npy")], "b"),
        ([row("b.npy", "b")], "A"),
        ([row("a.npy"), row("b.npy", "b", "test")], "b"),
        ([row("a.npy", split="unused"), row("b.npy", "b")], "A"),
        ([row("c.npy", "c")], "A"),
    ],
)
def test_a_selection_without_source_or_target_rows_is_a_usage_error(rows: list[Row], device: str) -> None:
    with pytest.raises(UsageError, match=f"no train samples of device {device}") as caught:
        select(manifest(*rows), "b")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("split", ["TRAIN", "Train", "dev", "training"])
def test_where_nothing_is_called_train_the_splits_are_named(split: str) -> None:
    with pytest.raises(UsageError, match=f"there is nothing to adapt from; it has 2 in {split}") as caught:
        select(manifest(row("a.npy", split=split), row("b.npy", "b", split)), "b")
    assert "the split train, written exactly so" in str(caught.value.hint)


def test_files_outside_the_selection_are_refused_by_name() -> None:
    selection = select(manifest(*PAIR, row("t.npy", split="test"), row("c.npy", "c")), "b")
    refuse_outside(selection, selection.files)
    with pytest.raises(DataLeakageError, match="2 files are not permitted") as caught:
        refuse_outside(selection, ["good/a.npy", "t.npy", "c.npy"])
    assert "t.npy" in caught.value.message
    assert "c.npy" in caught.value.message
    assert "good/a.npy" not in caught.value.message


# -- splits that contradict their list ---------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", ["train", "val", "test"])
@pytest.mark.parametrize("says", ["train", "val", "test", "unused", "Train", "Test"])
@pytest.mark.parametrize("repeated", [False, True])
def test_a_sample_whose_split_contradicts_its_list_is_leakage(listed: str, says: str, repeated: bool) -> None:
    """Also where it repeats a row, and where shared locations are allowed."""
    lists: dict[str, list[Row]] = {"train": list(PAIR), "val": [], "test": []}
    if repeated:
        lists["train"].append(row("odd/one.npy"))
    lists[listed] = [*lists[listed], row("odd/one.npy", split=says)]
    if listed != says:
        for allow in (False, True):
            message = leak(allow=allow, **lists)
            assert f"odd/one.npy: in the list {listed}, but its split says {says}" in message
            assert ("write it as the list is called" in message) == (says.lower() == listed)
    elif not repeated:
        assert len(select(manifest(**lists), "b").files) == 2 + (says == "train")


# -- unseen devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DCASE.unseen)
def test_an_unseen_device_in_train_is_leakage_whatever_the_target(device: str) -> None:
    message = leak(row("hidden/one.npy", device))
    assert f"hidden/one.npy: device {device}" in message
    assert "1 train samples" in message


# -- one file in two splits --------------------------------------------------------------------------------------------

SPELLINGS = ["good/a.npy", "./good/a.npy", "good//a.npy", "x/../good/a.npy", "good/./a.npy", ".//good/x/../a.npy"]


@pytest.mark.parametrize("other", SPELLINGS)
@pytest.mark.parametrize("split", ["test", "val", "unused", "Test"])
def test_one_file_in_train_and_elsewhere_is_leakage_in_any_spelling(split: str, other: str) -> None:
    message = leak(row(other, split=split))
    assert f"good/a.npy: also in {split}" in message
    assert other == "good/a.npy" or f"as {other}" in message


@pytest.mark.parametrize("rows_first", ["train", "test"])
def test_one_file_in_both_lists_is_leakage(rows_first: str) -> None:
    lists = {"train": [*PAIR, row("one.npy", split=...)], "test": [row("./one.npy", split=...)]}
    assert "one.npy: also in test as ./one.npy" in leak(**dict(sorted(lists.items(), reverse=rows_first == "train")))


@pytest.mark.parametrize("prefix", ["", "/", "//", "/./", "/x/../"])
def test_an_absolute_name_is_seen_through_its_spelling(tmp_path: Path, prefix: str) -> None:
    other = f"{prefix}{tmp_path}/good/a.npy"
    assert f"good/a.npy: also in test as {other}" in leak(row(other, split="test"), data_root=tmp_path)


@pytest.mark.parametrize("train", ["relative", "absolute"])
def test_a_relative_data_root_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["one.npy", f"{tmp_path}/data/one.npy"]
    first, second = names if train == "relative" else reversed(names)
    assert first in leak(row(first), row(second, split="test"), data_root=Path("data"))


def test_neither_a_link_nor_another_way_to_the_root_hides_a_file(tmp_path: Path) -> None:
    for folder in ("data/good", "data/deep"):
        (tmp_path / folder).mkdir(parents=True)
    for name, target in (("data/held_out", "good"), ("data/deep/link", tmp_path / "data"), ("link", "data")):
        (tmp_path / name).symlink_to(target)
    others = ("held_out", "deep/link/deep/link/good", "../data/good", f"{tmp_path}/data/good", f"{tmp_path}/link/good")
    for root in (tmp_path / "data", tmp_path / "link"):
        for other in others:
            assert "good/a.npy" in leak(row(f"{other}/a.npy", split="test"), data_root=root)
    assert "good/a.npy" in leak(row("/good/a.npy", split="test"), data_root=Path("/"))


def test_through_a_link_dot_dot_is_what_the_system_makes_of_it(tmp_path: Path) -> None:
    (tmp_path / "away" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to("away/below")
    # link/../a.npy is away/a.npy: the same file as that, and not the same as a.npy.
    rows = [row("away/a.npy"), row("link/../a.npy", split="test")]
    assert "away/a.npy" in leak(*rows, data_root=tmp_path)
    select(manifest(*PAIR, row("a.npy"), rows[1]), "b", data_root=tmp_path)


def test_different_files_are_not_taken_for_one(tmp_path: Path) -> None:
    rows = [row("a.npy", split="test"), row("good/A.npy", split="test"), row("/good/a.npy", split="test")]
    rows += [row("../good/a.npy", split="test"), row("good/a.npy.npy", split="test"), row("b/good/a.npy", split="val")]
    assert len(select(manifest(*PAIR, *rows), "b", data_root=tmp_path).files) == 2


def test_a_path_that_no_system_opens_neither_hangs_nor_fails_the_guard(tmp_path: Path) -> None:
    long = "a/" * 200_000
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    rows = [row(long + "x.npy", split="test"), row("loop/x.npy", split="test"), row("n" * 300 + "/x", split="test")]
    assert len(select(manifest(*PAIR, *rows), "b", data_root=tmp_path).files) == 2


# -- shared locations --------------------------------------------------------------------------------------------------

TAU_NAMES = {
    "2019 and 2020": "audio/park-vienna-12-345-a.wav",
    "2022 and later": "audio/park-vienna-12-345-7-a.wav",
    "as a feature": "audio/park-vienna-12-345-a.npy",
    "as a feature of a wav": "features/park-vienna-12-345-7-s1.wav.npy",
    "longest scene": "metro_station-vienna-12-0-b.npy",
    "upper case": "audio/Park-Vienna-12-345-A.WAV",
    "leading zero": "park-vienna-012-345-c.npy",
    "a word behind": "park-vienna-12-345-s3_logmel.npy",
    "a word before": "logmel_park-vienna-12-345-a.npy",
    "no suffix": "park-vienna-12-345-a",
    "a folder per clip": "park-vienna-12-345-a/logmel.npy",
    "the last of two": "park-paris-1-2-a/park-vienna-12-345-a.npy",
}


@pytest.mark.parametrize("file", TAU_NAMES.values(), ids=TAU_NAMES)
def test_a_tau_name_tells_the_location(file: str) -> None:
    assert location_in_name(file) == "vienna-12"


@pytest.mark.parametrize(
    "file",
    [
        "x/y.npy",
        "park-vienna-12.npy",
        "park-rome-12-345-a.npy",
        "forest-vienna-12-345-a.npy",
        "carpark-vienna-12-345-a.npy",
        "park-vienna-x-345-a.npy",
        "park-vienna-12-345-s7.npy",
        "park-vienna-12-345-ab.npy",
        "park-vienna-12-345-",
    ],
)
def test_other_names_tell_none(file: str) -> None:
    assert location_in_name(file) is None


FIELDS: list[Row] = [
    {"identifier": "vienna-12"},
    {"identifier": "Vienna-012"},
    {"location": "vienna_12"},
    {"location": "vienna 12"},
    {"location": "Vienna - 012"},
    {"identifier": "clip", "location": "vienna-12"},
]
PLACES = [("x.npy", fields) for fields in FIELDS] + [
    (file, {}) for file in (TAU_NAMES["2022 and later"], TAU_NAMES["a folder per clip"], "bus-vienna-12-9-b.npy")
]


@pytest.mark.parametrize("test", PLACES, ids=str)
@pytest.mark.parametrize("train", PLACES, ids=str)
@pytest.mark.parametrize("devices", ["AA", ("s3", "s6")], ids=str)
def test_a_location_in_train_and_test_is_leakage_by_fields_names_or_both(
    train: tuple[str, Row], test: tuple[str, Row], devices: Sequence[str]
) -> None:
    held_out = row(f"te/{test[0]}", devices[1], "test", **test[1])
    message = leak(row(f"tr/{train[0]}", devices[0], **train[1]), held_out)
    assert f"tr/{train[0]}: location vienna-12" in message


def test_a_numbered_location_counts_with_its_city() -> None:
    train = row("tr.npy", location=5)
    assert "tr.npy: location helsinki-5" in leak(train, row("te.npy", split="test", location=5))
    assert "tr.npy: location helsinki-5" in leak(train, row("te.npy", split="test", location="05"))
    assert select(manifest(*PAIR, train, row("te.npy", split="test", location=5, city_label=3)), "b")


def test_a_wrong_field_does_not_hide_a_telling_name() -> None:
    train = row("park-vienna-12-1-a.npy", identifier="paris-1")
    test = row("park-vienna-12-2-a.npy", split="test", identifier="paris-2")
    assert "location vienna-12" in leak(train, test)


@pytest.mark.parametrize("split", ["Test", "TEST", " test", "evaluate", "eval", "Evaluation"])
def test_other_words_for_test_do_not_hide_a_location(split: str) -> None:
    assert "tr.npy" in leak(row("tr.npy", location="k-1"), row("te.npy", split=split, location="k-1"))


@pytest.mark.parametrize("split", ["val", "unused"])
def test_a_location_may_be_shared_with_splits_that_are_not_held_out(split: str) -> None:
    rows = [row("tr.npy", location="k-1"), row("te.npy", split=split, location="k-1")]
    assert len(select(manifest(*PAIR, *rows), "b").files) == 3


def test_the_guard_says_how_many_locations_it_could_compare() -> None:
    rows = [row("x.npy", location="k-1"), row("park-vienna-1-2-a.npy", split="test"), row("v.npy", split="val")]
    selection = select(manifest(*PAIR, *rows), "b")
    assert (selection.located, selection.locatable) == (2, 4)


def test_allowing_shared_locations_lets_them_pass_and_keeps_them_on_record() -> None:
    rows = [row("tr.npy", location="k-1"), row("te.npy", split="test", location="k-1")]
    selection = select(manifest(*PAIR, *rows), "b", allow_shared_locations=True)
    assert "tr.npy" in selection.files
    assert "te.npy" not in selection.files
    assert selection.shared_locations == ("tr.npy: location k-1",)


@pytest.mark.parametrize(
    "rows",
    [
        [row("bad.npy", "s4")],
        [row("bad.npy"), row("./bad.npy", split="test")],
    ],
    ids=["unseen device", "file in two splits"],
)
def test_allowing_shared_locations_allows_nothing_else(rows: list[Row]) -> None:
    assert "bad.npy" in leak(*rows, allow=True)


# -- messages ----------------------------------------------------------------------------------------------------------

MANY: dict[str, list[Row]] = {
    "unseen devices": [row(f"bad/{n:02}.npy", "s4") for n in range(33)],
    "files in two splits": [row(f"bad/{n:02}.npy", split=split) for n in range(33) for split in ("train", "test")],
    "contradictions": [],
    "shared locations": [row(f"bad/{n:02}.npy", location=n) for n in range(33)]
    + [row(f"te/{n:02}.npy", location=n, split="test") for n in range(33)],
}


@pytest.mark.parametrize("rows", MANY.values(), ids=MANY)
def test_the_first_twenty_offenders_and_the_total_are_named(rows: list[Row]) -> None:
    contradicting = {"train": [*PAIR, *[row(f"bad/{n:02}.npy", split="test") for n in range(33)]]}
    message = leak(*rows) if rows else leak(**contradicting)
    assert message.startswith("33 ")
    assert all(f"bad/{n:02}.npy" in message for n in range(20))
    assert "bad/20.npy" not in message
    assert "13 more (33 in all)" in message


def test_terminal_escapes_in_offenders_are_escaped() -> None:
    message = leak(row("bad\x1b[2J.npy", "s4"))
    assert r"bad\x1b[2J.npy" in message
    assert "\x1b" not in message


# -- whatever the manifest ---------------------------------------------------------------------------------------------

FILES = st.one_of(
    st.sampled_from(["a", "b", "./a", "x//a", "x/a", "y/../a", "/r/a", "//r/a", "/r/x/a"]),
    st.builds(
        "{}/{}-{}-{}-{}-{}.npy".format,
        st.sampled_from(["p", "q"]),
        st.sampled_from(DCASE.scenes[:2]),
        st.sampled_from(DCASE.cities[:2]),
        st.integers(0, 2),
        st.integers(0, 9),
        st.sampled_from(["a", "b", "s1"]),
    ),
)
SPLITS = st.sampled_from(["train", "train", "train", "test", "val", "unused", "Train", "Test"])
RANDOM_ROWS = st.lists(
    st.builds(
        lambda file, device, split, place: row(file, device, split, **({} if place is None else {"location": place})),
        FILES,
        st.sampled_from(DCASE.devices),
        SPLITS,
        st.none() | st.sampled_from(["k-1", "K-01", 7]),
    ),
    max_size=10,
)


def random_manifest(flat: bool, rows: list[Row]) -> Manifest | None:
    content: Any = rows
    if not flat:
        content = {}
        for number, item in enumerate(rows):
            content.setdefault(("train", "val", "test")[number % 3], []).append(item)
    try:
        return Manifest(parse_bytes(json.dumps(content).encode(), "m.json"), "")
    except ManifestError:
        return None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.booleans(), RANDOM_ROWS, st.sampled_from(DCASE.targets), st.booleans(), st.booleans())
def test_no_manifest_gets_a_forbidden_row_selected(
    flat: bool, rows: list[Row], target: str, allow: bool, rooted: bool
) -> None:
    made = random_manifest(flat, [row("only/a"), row("only/t", target), *rows] if flat else rows)
    if made is None:
        return
    try:
        selection = select(made, target, allow_shared_locations=allow, data_root=Path("/r") if rooted else None)
    except (DataLeakageError, UsageError):
        return
    check_selection(made, selection, allow)


def check_selection(made: Manifest, selection: Selection, allow: bool) -> None:
    """What must hold of every selection, said again without the guard's own code."""
    wanted = {"A", selection.target}
    for sample in selection.samples:
        assert sample.split == "train"
        assert sample.listed_in in (None, "train")
        assert sample.device_id in wanted
        assert sample.device_id not in DCASE.unseen
    everything = [s for s in made if s.split == "train" and s.device_id in wanted]
    assert list(selection.samples) == everything
    held_out = [s for s in made if s.split != "train"]
    assert not {os.path.normpath(s.file) for s in selection.samples} & {os.path.normpath(s.file) for s in held_out}
    if not allow:
        places = {s.location for s in held_out if s.split.lower() == "test"} - {None}
        assert not places & {s.location for s in selection.samples}
