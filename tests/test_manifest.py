"""The dataset JSON: what is read, what is refused, and how each refusal names the row."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd_cache.dataset.manifest import Sample, load_manifest, parse_manifest, spelling
from kd_cache.dataset.manifest_file import manifest_digest
from kd_cache.dataset.task import DCASE
from kd_cache.errors import ManifestError
from kd_cache.keys import sample_key

Row = dict[str, Any]


def row(file: str = "x/y.npy", **changes: Any) -> Row:
    """A whole row; a change to ``...`` leaves the field out."""
    whole = {"file": file, "scene_label": 3, "city_label": 7, "domain": 1, "device_id": "b", "split": "train"} | changes
    return {field: value for field, value in whole.items() if value is not ...}


def parse(content: Any, **sizes: int) -> tuple[Sample, ...]:
    return parse_manifest(json.dumps(content).encode(), "m.json", **sizes)


def refusal(content: Any, **sizes: int) -> str:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(ManifestError) as caught:
        parse_manifest(raw, "m.json", **sizes)
    assert caught.value.exit_code == 2
    assert "m.json" in caught.value.message
    return caught.value.message


# -- what is read ------------------------------------------------------------------------------------------------------


def test_three_lists_give_their_name_to_rows_without_a_split() -> None:
    samples = parse(
        {"train": [row("a", split=...)], "val": [row("b", split=...)], "test": [row("c", split=...), row("d")]}
    )
    assert [(s.file, s.split, s.listed_in) for s in samples] == [
        ("a", "train", "train"),
        ("b", "val", "val"),
        ("c", "test", "test"),
        ("d", "train", "test"),  # the contradiction is kept: the guard calls it leakage
    ]


def test_every_field_of_a_row_arrives() -> None:
    assert parse([row("x/y.npy", identifier="vienna-12")]) == (
        Sample("x/y.npy", 3, 7, 1, "b", "train", None, "vienna-12", ("vienna-12",)),
    )


@pytest.mark.parametrize(("new", "old"), [(..., 4), (4, 4), (4, None), (None, 4)])
def test_label_is_the_older_name_of_scene_label_and_a_null_erases_neither(new: Any, old: Any) -> None:
    assert parse([row(scene_label=new, label=old)])[0].scene_label == 4


@pytest.mark.parametrize("device", DCASE.devices)
def test_device_and_domain_follow_from_one_another(device: str) -> None:
    domain = DCASE.domain_of[device]
    for given_fields in ({"device_id": ...}, {"domain": ...}, {"device_id": None}, {"domain": None}, {}):
        sample = parse([row(**({"domain": domain, "device_id": device} | given_fields))])[0]
        assert (sample.domain, sample.device_id) == (domain, device)


def test_both_spellings_of_the_source_device_mean_it() -> None:
    assert parse([row(device_id="a", domain=...)])[0] == parse([row(device_id="A", domain=...)])[0]


def test_class_names_are_in_alphabetical_order_which_is_the_class_order() -> None:
    assert list(DCASE.scenes) == sorted(DCASE.scenes)
    assert list(DCASE.cities) == sorted(DCASE.cities)
    assert (len(DCASE.scenes), len(DCASE.cities)) == (10, 12)


def test_city_label_and_a_targets_scene_label_may_be_absent() -> None:
    sample = parse([row(scene_label=..., city_label=...)])[0]
    assert (sample.scene_label, sample.city_label) == (None, None)


def test_fields_of_others_are_left_alone() -> None:
    assert parse([row(duration=10.0, tags=["x", {"y": None}])])[0].file == "x/y.npy"


# -- locations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"identifier": "vienna-12"}, "vienna-12"),
        ({"identifier": "Vienna-012 "}, "vienna-12"),
        ({"location": "vienna-12"}, "vienna-12"),
        ({"location": 12}, "milan-12"),
        ({"location": "12"}, "milan-12"),
        ({"location": 12, "city_label": ...}, "-12"),
        ({"location": 12, "city_label": None}, "-12"),
        ({"identifier": "vienna-12", "location": "outdoors"}, "vienna-12"),
        ({"identifier": "clip9", "location": "vienna-12"}, "vienna-12"),
        ({"identifier": "Hofburg"}, "hofburg"),
        ({"identifier": None, "location": None}, None),
        ({}, None),
    ],
)
def test_a_location_has_one_name_however_the_row_writes_it(fields: Row, place: str | None) -> None:
    assert parse([row(**fields)])[0].location == place


# -- types, ranges, contradictions -------------------------------------------------------------------------------------

NO_INTEGERS = [True, False, "3", "", 3.0, 3.5, [3], {"a": 3}]


@given(st.sampled_from(["scene_label", "city_label"]), st.integers(-3, 30), st.integers(2, 20))
def test_labels_are_read_up_to_the_number_of_classes_and_refused_beyond(field: str, value: int, classes: int) -> None:
    content, sizes = [row(**({"scene_label": 0, "city_label": 0} | {field: value}))], {f"num_{field[:-6]}s": classes}
    sizes = {name.replace("citys", "cities"): size for name, size in sizes.items()}
    if value == -1 or 0 <= value < classes:
        assert getattr(parse(content, **sizes)[0], field) == (None if value == -1 else value)
    else:
        assert f"{field} is {value}, expected 0 to {classes - 1}" in refusal(content, **sizes)


SOURCE = {"device_id": "A", "domain": 0}
REFUSED: dict[str, tuple[Any, str]] = {
    "contradicting labels": ([row(label=4)], "scene_label is 3 but label is 4"),
    "an older label out of range": ([row(scene_label=..., label=10)], "label is 10, expected 0 to 9"),
    "a domain of none": ([row(domain=9, device_id=...)], "domain must be an integer from 0 to 8"),
    "a domain of 30 digits": ([row(domain=10**30, device_id=...)], "domain must be an integer from 0 to 8"),
    "another device's domain": ([row(device_id="s4")], "device_id s4 has domain 6, but domain is 1"),
    "neither": ([row(device_id=..., domain=...)], "neither device_id nor domain"),
    "a source row without scene": ([row(scene_label=..., **SOURCE)], "scene_label is missing"),
    "a source row that says so": ([row(scene_label=-100, **SOURCE)], "scene_label is -100, which is no label; samples"),
    "scenes by another name": (
        [row(scene_label=..., scene="bus", **SOURCE)],
        'if that is meant, call it "scene_label"',
    ),
    "files by another name": ([row(file=None, filename="x.npy")], 'file is missing (there is "filename": if that is'),
    "devices by another name": ([row(device_id=..., domain=..., source_label="b")], 'there is "source_label"'),
    "splits by another name": ([row(split=..., subset="train")], 'there is "subset"'),
    **{f"a file that is {file!r}": ([row(file=file)], "file must be a string") for file in (3, ["x"], True)},
    **{f"no file ({file!r})": ([row(file=file)], "file is missing") for file in (..., None)},
    **{f"a row that is {item!r}": ([item], "expected an object, found") for item in (3, "x", None, [row()])},
    **{f"all of it {item!r}": (item, "expected a list of samples or an object of lists") for item in (3, "x", None)},
    **{f"a list that is {rows!r}": ({"train": rows}, "train must be a list of samples") for rows in ({}, "x", None)},
    "an unknown list": ({"train": [row()], "dev": []}, "dev"),
    "keyed by file": ({f"x/{number}.npy": row() for number in range(5000)}, "4980 more (5000 in all)"),
    "no split": ([row("a"), row("b", split=...)], "sample[1] (b)"),
    "no split, never train": ([row("b", split=...)], "never guessed"),
    "empty": ([], "empty"),
    "empty lists": ({"train": [], "val": []}, "empty"),
    "a row by list, position and file": (
        {"train": [row("ok")], "test": [row("fine"), row("bad/one.npy", city_label="x")]},
        "test[1] (bad/one.npy)",
    ),
    "a file twice": ([row(), row("other"), row()], "x/y.npy"),
    **{
        f"{field} {value!r}": ([row(**{field: value})], f"{field} must be an integer")  # nothing is coerced to one
        for field in ("scene_label", "city_label", "label", "domain")
        for value in NO_INTEGERS
    },
    **{
        f"{field} {value!r}": ([row(**{field: value})], f"{field} must be a name or a number")
        for field in ("identifier", "location")
        for value in (True, 1.5, [], {}, "", "  ")
    },
    **{
        f"device {device!r}": ([row(device_id=device, domain=...)], "A, b, c, s1, s2, s3, s4, s5, s6")
        for device in ("B", "s7", "S1", "", " b", 1, True, ["b"], {})
    },
    **{
        f"split {split!r} {type(rows)}": (rows, "split must be a word")
        for split in (None, "", 0, True, ["train"], {})
        for rows in ([row(split=split)], {"train": [row(split=split)]})
    },
    **{
        f"also {other}": ([row("x/y.npy"), row(other)], f"{other} (also written x/y.npy)")
        for other in ("./x/y.npy", "x//y.npy", "x/./y.npy", "x/z/../y.npy", "z/../x/y.npy", "x/y.npy/", ".//x///y.npy")
    },
}


@pytest.mark.parametrize(("content", "says"), REFUSED.values(), ids=REFUSED)
def test_each_way_to_be_no_manifest_is_refused_and_named_on_one_screen(content: Any, says: str) -> None:
    message = refusal(content)
    assert says in message
    assert message.count("\n") < 25


@pytest.mark.parametrize(
    ("text", "reason"),
    [('""', "empty"), (r'"a\u0000b"', "NUL"), (r'"a\ud800b"', "lone surrogate"), (r'"\udfff"', "lone surrogate")],
)
def test_a_file_that_no_path_can_be_is_refused(text: str, reason: str) -> None:
    message = refusal(f'[{{"file": {text}, "device_id": "b", "scene_label": 1, "split": "train"}}]'.encode())
    assert reason in message
    assert message.isprintable()


# -- duplicates --------------------------------------------------------------------------------------------------------


def test_leading_slashes_do_not_make_another_file() -> None:
    assert spelling("//data/x.npy") == spelling("/data/x.npy") == spelling("///data//x.npy") == "/data/x.npy"
    assert "listed more than once" in refusal([row("/data/x.npy"), row("//data/x.npy")])


def test_many_duplicates_are_listed_up_to_twenty_with_the_total() -> None:
    message = refusal([row(f"f{number:03}") for number in range(33)] * 2)
    assert "f019" in message
    assert "f020" not in message
    assert "13 more (33 in all)" in message


def test_one_file_in_two_splits_is_left_to_the_guard() -> None:
    assert [s.split for s in parse([row(split="train"), row(split="test")])] == ["train", "test"]


def test_nfc_and_nfd_names_are_two_samples() -> None:
    composed, decomposed = "caf\u00e9.npy", "cafe\u0301.npy"
    assert [s.file for s in parse([row(composed), row(decomposed)])] == [composed, decomposed]
    assert sample_key(composed) != sample_key(decomposed)


# -- bytes that are not a manifest -------------------------------------------------------------------------------------

GOOD = json.dumps([row()]).encode()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(GOOD.replace(b"x/y", b"x/\xff"), "not valid UTF-8 JSON", id="not UTF-8"),
        pytest.param(GOOD.replace(b": 3,", b": Infinity,"), "Infinity is not JSON", id="Infinity"),
        pytest.param(b'[{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}]", "nested too deeply", id="closed nesting"),
        pytest.param(GOOD.replace(b": 3,", b": " + b"9" * 10_000 + b","), "4300 digits", id="10k-digit integer"),
        pytest.param(GOOD + b"[]", "Extra data", id="trailing bytes"),
        pytest.param(b"\x1f\x8b\x08\x00" + bytes(20), "not valid UTF-8 JSON", id="gzip"),
    ],
)
def test_bytes_that_are_no_manifest_are_refused_with_the_reason(raw: bytes, reason: str) -> None:
    """Beside those of `hostile_data.MANIFESTS`, which meet the commands."""
    message = refusal(raw)
    assert reason in message
    assert len(message) < 500
    assert all(c.isprintable() or c == "\n" for c in message)


def test_a_manifest_cut_anywhere_is_refused() -> None:
    raw = json.dumps({"train": [row("a", split=...)], "test": [row("b", split=...)]}).encode()
    for length in range(len(raw)):
        refusal(raw[:length])


def test_a_large_integer_does_not_fill_the_screen() -> None:
    for field in ("scene_label", "city_label", "domain", "location"):
        message = refusal([row(**{field: 10**4000 if field != "location" else 1.5})])
        assert len(message) < 300


def test_a_hundred_thousand_keys_with_one_twice_are_refused_at_once() -> None:
    keys = ", ".join(f'"k{number}": 0' for number in range(100_000))
    assert "key k99999 occurs twice" in refusal(f'[{{{keys}, "k99999": 1}}]'.encode())


def test_terminal_escapes_in_names_are_escaped_in_messages() -> None:
    message = refusal([row("a\x1b[2J\x07\u202eb", scene_label=99)])
    assert r"a\x1b[2J\x07\u202eb" in message
    assert message.isprintable()


# -- files that are not one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "device", "unreadable name", "too long"])
def test_what_is_no_plain_file_is_refused_and_never_hangs(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "unreadable name":
        path = Path("a\0b")
    elif kind == "too long":
        path = tmp_path / ("m" * 300)
    with pytest.raises(ManifestError, match="cannot read the manifest") as caught:
        load_manifest(path)
    assert caught.value.exit_code == 2
    assert "--json-path" in str(caught.value)


# -- a row on every line -----------------------------------------------------------------------------------------------


def lines(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in rows))
    return path


@pytest.mark.parametrize("head", [(), ({"front_end": {"n_mels": 20}},)])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_lines_are_read_as_a_flat_list_is(tmp_path: Path, head: tuple[Row, ...], end: bytes) -> None:
    """Whatever the size that other manifests may have; the digest is that of the bytes."""
    rows = [row("a", identifier="vienna-12"), row("b", split="test", identifier="Vienna 12"), row("é", domain=...)]
    path = lines(tmp_path / "m.jsonl", *head, *rows[:2], json.dumps(rows[2]).encode() + end)
    made = load_manifest(path, max_bytes=10)
    assert made.samples == parse(rows)
    assert (made.front_end, made.bins) == (({"n_mels": 20}, 20) if head else (None, None))
    assert made.digest == manifest_digest(path, 10) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (b'{"file": "a", "file": "b"}\n', "line 2, is not valid UTF-8 JSON: key file occurs twice"),
        (b'{"file": NaN}\n', "line 2, is not valid UTF-8 JSON: NaN"),
        (b"\n", "line 2, is not valid"),
        (b"\xff\n", "line 2, is not valid"),
        (b"[" * 90_000 + b"\n", "line 2, is not a manifest: it is nested too deeply"),
        (b'{"file": "' + b"x" * (1 << 20) + b'"}\n', "line 2, has more than 1,048,576 bytes"),
        (row("x/y.npy", scene_label="3"), r"line 2 \(x/y.npy\): scene_label must be an integer"),
        (row(split=...), r'line 2 \(x/y.npy\): it has no "split"'),
        ({"front_end": {}}, "line 2: file is missing"),
        ([row()], "line 2: expected an object"),
        (row("a"), "the same file is listed more than once"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(tmp_path: Path, wrong: Any, said: str) -> None:
    path = lines(tmp_path / "m.jsonl", row("a"), wrong, row("c"))
    with pytest.raises(ManifestError, match=said) as caught:
        load_manifest(path)
    assert len(str(caught.value)) < 1000
    faults: list[str] = []
    if isinstance(wrong, dict):
        assert [sample.file for sample in load_manifest(path, faults=faults)][::2][0] == "a"
        assert len(faults) == 1


@pytest.mark.parametrize("rows", [(), ({"front_end": {"n_mels": 20}},)])
def test_lines_without_a_sample_are_refused(tmp_path: Path, rows: tuple[Row, ...]) -> None:
    with pytest.raises(ManifestError, match="lists no samples"):
        load_manifest(lines(tmp_path / "m.jsonl", *rows))


def test_a_manifest_that_is_too_large_may_be_written_as_lines(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="expected at most 10") as caught:
        load_manifest(lines(tmp_path / "m.json", [row()]), max_bytes=10)
    assert ".jsonl" in str(caught.value.hint)


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "key"),
    [
        # MD5 of the UTF-8 bytes, from `printf %s … | md5sum`. Every stored row and every .npy of every cache is named
        # by this: a changed value here means that no cache in the world finds its rows any more.
        ("", "d41d8cd98f00b204e9800998ecf8427e"),
        ("x/y.npy", "3b43e1bfadcd868c5ec6e675763f6fad"),
        ("./x/y.npy", "43e40ca37c2ead3bdc266991b7d8175f"),
        ("audio/airport-barcelona-0-0-a.wav", "77af8c58fe8e7b052f3d0f429af85179"),
        ("caf\u00e9.npy", "24f86775b0fbef0d57545e785029e8f3"),
        ("cafe\u0301.npy", "6d6cb27359c548bd3261a89309f6b538"),
        ("\U0001f600/ü ö.npy", "2b168c9ea1cf2ca0cb13d7494e113d6f"),
    ],
)
def test_keys_are_the_md5_of_the_path_exactly_as_written(file: str, key: str) -> None:
    assert sample_key(file) == key


# -- properties --------------------------------------------------------------------------------------------------------

small = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines may be busy


@small
@given(st.lists(st.sampled_from(["a", "b", "é"]), min_size=1, max_size=4), st.data())
def test_spellings_of_one_path_are_one(parts: list[str], data: st.DataObject) -> None:
    plain = "/".join(parts)
    noise = data.draw(st.lists(st.sampled_from(["", ".", "z/..", "z/./.."]), min_size=len(parts), max_size=len(parts)))
    written = "/".join(f"{extra}/{part}" if extra else part for extra, part in zip(noise, parts, strict=True))
    assert spelling(written) == spelling(plain) == plain


@small
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    with contextlib.suppress(ManifestError):
        parse_manifest(raw, "m.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["file", "split", "scene_label", "label", "domain", "device_id", "train", "test", "location"]
            ),
            inner,
            max_size=9,
        )
    ),
    max_leaves=20,
)


@small
@given(JSON)
def test_any_json_is_read_or_refused(content: Any) -> None:
    try:
        samples = parse(content)
    except ManifestError as error:
        assert all(c.isprintable() or c == "\n" for c in error.message)  # noqa: PT017
    else:
        assert all(s.split and s.file and s.device_id in DCASE.devices for s in samples)
