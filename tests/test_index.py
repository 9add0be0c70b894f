"""The index: written last, digested to its last byte, refused whenever it is not what was written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hostile_stores import sealed
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import no_file_over, origin, snapshot

from kd_cache.errors import CorruptError, StaleError, StoreError
from kd_cache.store import index as index_module
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import is_teacher_name, origin_entry, read_index, read_older_maps, write_index
from kd_cache.store.origin import Fingerprint, Origin

SCENE = origin("scene", 3)
CITY = Origin("city2scene", Fingerprint({"weights": "c"}), "probs", 2, "fp16", ("büs", "tram"))
MAPS = {"city2scene": {"x/ü 1.npy": "c/1.npy"}, "scene": {"x/ü 1.npy": "s/1.npy", "x/2.npy": "s/2.npy"}}


def record(**changes: Any) -> dict[str, Any]:
    entries = {
        "city2scene": {**origin_entry(CITY), "packs": [], "earlier": []},
        "scene": {**origin_entry(SCENE), "packs": [], "earlier": []},
    }
    return {"files": True, "missing": {"x/3.npy": "its feature is gone"}, "teachers": entries} | changes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "cache_index.json"
    write_index(written, 1, MAPS, record())
    return written


def rewrite(path: Path, change: Any) -> None:
    """Change what the index says, and make the digest fit."""
    content = json.loads(path.read_text())
    change(content)
    path.write_bytes(sealed(json.dumps(content, indent=1) + "\n"))


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maps", [True, False])
def test_what_was_written_is_read(path: Path, maps: bool) -> None:
    index = read_index(path, maps=maps)
    assert (index.num_samples, index.maps) == (1, MAPS if maps else {})
    assert list(index.origins.items()) == [("city2scene", CITY), ("scene", SCENE)]
    assert index.missing == {"x/3.npy": "its feature is gone"}
    assert index.record["format_version"] == 2


def test_plain_json_reads_what_existing_code_needs(path: Path) -> None:
    content = json.loads(path.read_text(encoding="ascii"))
    kd_cache = content.pop("kd_cache")
    assert list(content.items()) == [*MAPS.items(), ("num_samples", 1)]
    assert next(iter(kd_cache)) == "format_version"
    assert list(kd_cache)[-1] == "digest"


PATHS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    max_size=9,
)


@given(st.dictionaries(st.sampled_from(["a", "b-2", "C_.x"]), PATHS, max_size=3), st.integers(1, 4))
def test_the_text_is_that_of_json_dumps_whatever_the_block(maps: dict[str, dict[str, str]], lines: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_LINES", lines)
        kd_cache = {"format_version": 1, "teachers": {}, "digest": "0" * 32}
        written = b"".join(index_module._pieces(Path("i"), 7, maps, kd_cache))
    plain = json.dumps({**maps, "num_samples": 7, "kd_cache": kd_cache}, indent=1) + "\n"
    assert written == plain.encode().replace(b"0" * 32, xxhash.xxh3_128_hexdigest(plain.encode()).encode())


@pytest.mark.parametrize("block", [1, 100, 2000])
def test_reading_without_maps_is_the_same_whatever_the_block(
    path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(index_module, "_BLOCK", block)
    assert read_index(path, maps=False).record == read_index(path).record


def test_equal_content_gives_equal_bytes(path: Path) -> None:
    before = path.read_bytes()
    assert sealed(before.decode()) == before
    write_index(path, 1, MAPS, record())
    assert path.read_bytes() == before


@pytest.mark.parametrize("fault", ["fsync", "replace", "disk full"])
def test_a_write_that_fails_leaves_the_earlier_index_and_no_temporary(
    path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    before = snapshot(path.parent)

    def fails(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if fault != "disk full":
            patch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[fault], fails)
        with no_file_over(300 if fault == "disk full" else 1 << 30), pytest.raises(StoreError) as caught:
            write_index(path, 2, MAPS, record())
    assert str(path) in caught.value.message
    assert ("File too large" if fault == "disk full" else "No space left on device") in caught.value.message
    assert snapshot(path.parent) == before


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "null", '"kd_cache"', "\ufeff{}", "\x93NUMPY", '{"\udcff": 1}'),
        *('{"kd_cache": 3}', '{"kd_cache": {}}', '{"kd_cache": {"format_version": true}}'),
        *('{"kd_cache": ' + "[" * 100_000, '{"num_samples": ' + "1" * 10_000 + "}"),
        '\n "num_samples": ',
        '{\n "num_samples": 3,\n "kd_cache": {"digest": 1}}',
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_no_index_is_refused(path: Path, text: str, maps: bool) -> None:
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(CorruptError, match=r"cache_index\.json is damaged"):
        read_index(path, maps=maps)


def entry(**changes: Any) -> Any:
    return lambda content: content["kd_cache"]["teachers"]["scene"].update(changes)


MALFORMED = {
    "no counts": lambda content: content.pop("num_samples"),
    "no missing": lambda content: content["kd_cache"].pop("missing"),
    "missing as a number": lambda content: content["kd_cache"].update(missing=3),
    "an unknown dtype": entry(dtype="bf16"),
    "an unknown value kind": entry(value_kind="softmax"),
    "classes as text": entry(num_classes="3"),
    "parts as a list": entry(parts=["weights"]),
    "no parts": lambda content: content["kd_cache"]["teachers"]["scene"].pop("parts"),
    "class names as a number": entry(class_names=3),
}
"""Beside those of `hostile_stores.INDEXES`, which meet the commands as well."""


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_entry_is_refused_even_under_a_correct_digest(path: Path, case: str) -> None:
    rewrite(path, MALFORMED[case])
    with pytest.raises(CorruptError, match=r"cache_index\.json is damaged: an entry is missing or malformed"):
        read_index(path)


def test_a_correct_digest_makes_a_changed_index_readable(path: Path) -> None:
    """So that what the malformed ones are refused for is what is malformed in them."""
    rewrite(path, lambda content: content["kd_cache"].update(missing={"x/9.npy": "why"}))
    assert read_index(path).missing == {"x/9.npy": "why"}


@pytest.mark.parametrize("maps", [True, False])
def test_a_newer_format_is_refused_and_says_to_update(path: Path, maps: bool) -> None:
    rewrite(path, lambda content: content["kd_cache"].update(format_version=3))
    with pytest.raises(StoreError, match="version 3") as caught:
        read_index(path, maps=maps)
    assert "Update" in str(caught.value.hint)


def test_a_cache_without_an_index_has_none(tmp_path: Path) -> None:
    assert CacheFolder(tmp_path).index() is None


# -- older scripts ----------------------------------------------------------------------------------------------------

OLDER = {"city2scene": {"a": "x/a.npy"}, "scene": {"a": "y/a.npy"}, "num_samples": 1}


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("indent", [None, 1, 2])
def test_the_index_of_an_older_script_is_stale_and_its_maps_can_be_read(
    path: Path, indent: int | None, maps: bool
) -> None:
    path.write_text(json.dumps(OLDER, indent=indent))
    with pytest.raises(StaleError, match="older script"):
        read_index(path, maps=maps)
    assert read_older_maps(path) == {"city2scene": {"a": "x/a.npy"}, "scene": {"a": "y/a.npy"}}


@pytest.mark.parametrize("text", ["{}", '{"num_samples": 3}', '{"scene": {"a": 3}}', '{"../x": {"a": "b"}}', "[", ""])
def test_what_maps_no_files_is_no_older_index(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(CorruptError, match=r"cache_index\.json"):
        read_older_maps(path)


# -- names and fingerprints -------------------------------------------------------------------------------------------


def test_a_fingerprint_is_known_if_the_teacher_has_it_or_once_had_it(path: Path) -> None:
    earlier = {"weights": "first", "architecture": "tiny/1"}
    rewrite(path, entry(earlier=[{"weights": "second"}, earlier]))
    index = read_index(path)
    assert index.known_fingerprint("scene", SCENE.fingerprint.digest) == SCENE.fingerprint
    assert index.known_fingerprint("scene", Fingerprint(earlier).digest) == Fingerprint(earlier)
    assert index.known_fingerprint("city2scene", Fingerprint(earlier).digest) is None
    assert index.known_fingerprint("scene", "0" * 64) is None


@pytest.mark.parametrize("name", ["scene", "city2scene", "A", "7", "my-teacher_2.1", "x" * 64, "a..b"])
def test_plain_words_are_teacher_names(name: str) -> None:
    assert is_teacher_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *["", ".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "-x", "_x", "a b", "a\n", "a\0", "é", "x" * 65],
        "\x1b[31m",
        *["packs", "Packs", "PACKS", "num_samples", "kd_cache", "KD_Cache", "cache_index.json", "plan.json"],
    ],
    ids=repr,
)
def test_what_would_leave_its_folder_or_take_anothers_place_is_no_teacher_name(name: str) -> None:
    assert not is_teacher_name(name)
