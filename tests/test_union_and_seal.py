"""The union of packs, and sealing them into one: the same rows whatever packs they came in."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import Rows, byte_rows, flipping, names, origin, snapshot

from kd_cache import keys as keys_module
from kd_cache.dataset.task import DCASE
from kd_cache.errors import StoreError
from kd_cache.files.atomic import remove_files
from kd_cache.keys import KeyFinder, are_ascending, keys_of, sorted_order
from kd_cache.store import cache as folder_module
from kd_cache.store.cache import CacheFolder, find_caches
from kd_cache.store.origin import Origin
from kd_cache.store.pack import Pack, open_pack
from kd_cache.store.union import Merged, Union, merge_packs

SCENE = origin()
NO_ROWS = Rows.of([])


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    (tmp_path / "packs").mkdir()
    return tmp_path / "packs"


def seal_all(directory: Path, rows: Rows, paths: list[Path]) -> Merged:
    """Seal, and remove what the result stands for."""
    return seal_and_remove(directory, [open_pack(path) for path in paths], rows)


def seal_and_remove(directory: Path, opened: list[Pack], rows: Rows) -> Merged:
    sealed = merge_packs(directory, Union(opened), rows.keys, rows.inputs)
    remove_files(directory, sealed.merged)
    return sealed


# -- keys -------------------------------------------------------------------------------------------------------------


# Keys out of few halves, so that many share their first eight bytes, which the search looks at first.
HALVES = [bytes(8), b"\0" * 7 + b"\1", b"\x80" + bytes(7), b"\xff" * 8]
ONE_KEY = st.builds(
    lambda high, low: high + low, st.sampled_from(HALVES), st.sampled_from(HALVES) | st.binary(min_size=8, max_size=8)
)


@pytest.mark.parametrize(("top", "chunk"), [(65_536, 65_536), (5, 7), (1, 1)])
@given(st.lists(ONE_KEY, max_size=40), st.lists(ONE_KEY, max_size=20), st.integers(0, 40))
def test_finding_keys_agrees_with_a_dictionary(
    top: int, chunk: int, stored: list[bytes], asked: list[bytes], cut: int
) -> None:
    ordered, distinct = sorted(stored), sorted(set(stored))
    first = {key: position for position, key in reversed(list(enumerate(ordered)))}
    parts = [byte_rows(part) for part in (distinct[:cut], [], distinct[cut:])]
    asked = asked + stored[:5]
    with patch.multiple(keys_module, _TOP=top, _CHUNK=chunk):
        found = KeyFinder(byte_rows(ordered)).find(byte_rows(asked))
        in_parts, apart = (KeyFinder(*parts, bases=bases) for bases in (None, [0, 0, 4096]))
        assert found.tolist() == [first.get(key, -1) for key in asked]
        places = {key: place for place, key in enumerate(distinct)}
        assert in_parts.find(byte_rows(asked)).tolist() == [places.get(key, -1) for key in asked]
        places = {key: place + (4096 - cut if place >= cut else 0) for key, place in places.items()}
        assert apart.find(byte_rows(asked)).tolist() == [places.get(key, -1) for key in asked]
    assert len(apart) == len(distinct)
    assert apart.is_same(KeyFinder(*parts, bases=[0, 0, 4096]))
    assert apart.is_same(in_parts) == (len(distinct) <= cut)
    assert [stored[at] for at in sorted_order(byte_rows(stored))] == ordered
    assert are_ascending(byte_rows(ordered)) == (len(set(stored)) == len(stored))
    if stored != ordered:
        assert not are_ascending(byte_rows(stored))


# -- union ------------------------------------------------------------------------------------------------------------


def rows_with_keys(keys: list[bytes], inputs: list[bytes], seed: int) -> Rows:
    """Rows under any keys; the format does not ask them to be the MD5 of their names until they are verified."""
    rows = Rows.of(names(len(keys)), seed=seed)
    return Rows(rows.files, byte_rows(keys), byte_rows(inputs), rows.logits)


@given(
    st.lists(
        st.dictionaries(ONE_KEY, st.sampled_from([b"1" * 16, b"2" * 16]), min_size=1, max_size=8),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.tuples(ONE_KEY, st.sampled_from([b"1" * 16, b"2" * 16, b"3" * 16])), max_size=10),
)
@settings(max_examples=40)
def test_find_and_match_agree_with_a_dictionary(
    contents: list[dict[bytes, bytes]], asked: list[tuple[bytes, bytes]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for seed, content in enumerate(contents):
            keys = sorted(content)
            made.append(rows_with_keys(keys, [content[key] for key in keys], seed).write(Path(folder), SCENE))
        opened = [open_pack(path) for path in set(made)]
        union = Union(opened)
        expected: list[tuple[bytes, bytes, str, bytes]] = sorted(
            (pack.keys[row].tobytes(), pack.inputs[row].tobytes(), pack.path.name, pack.logits[row].tobytes())
            for pack in opened
            for row in range(len(pack))
        )
        expected.sort(key=lambda row: (row[0], row[2]))  # by key, then by pack name
        assert [key.tobytes() for key in union.keys] == [row[0] for row in expected]
        assert [one.tobytes() for one in union.inputs] == [row[1] for row in expected]
        assert union.take(np.arange(len(union))).tobytes() == b"".join(row[3] for row in expected)
        first: dict[bytes, int] = {}
        fresh: dict[tuple[bytes, bytes], int] = {}
        for position, (key, digest, _, _) in enumerate(expected):
            first.setdefault(key, position)
            fresh.setdefault((key, digest), position)
        asked = asked + [(row[0], row[1]) for row in expected[:3]]
        keys, inputs = (byte_rows([pair[part] for pair in asked]) for part in (0, 1))
        assert union.find(keys).tolist() == [first.get(key, -1) for key, _ in asked]
        assert union.match(keys, inputs).tolist() == [fresh.get(pair, -1) for pair in asked]
        assert union.repeats.tolist() == [first[row[0]] != position for position, row in enumerate(expected)]


def test_a_union_of_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Union([])


def test_of_a_sample_scored_from_two_inputs_each_finds_its_own(packs: Path) -> None:
    old, new = Rows.of(names(6)), Rows.of(names(2, 2), seed=1, inputs=1)
    union = Union([open_pack(rows.write(packs, SCENE)) for rows in (old, new)])
    assert len(union) == 8
    for rows in (old, new):
        assert union.take(union.match(rows.keys, rows.inputs)).tobytes() == rows.logits.tobytes()
    assert union.disagreements() == []


@pytest.mark.parametrize("named", [False, True])
def test_of_the_same_input_with_other_bytes_the_named_packs_row_or_the_first_counts(packs: Path, named: bool) -> None:
    mine, theirs = Rows.of(names(5)), Rows.of(names(3, 3), seed=1)
    by_name = {rows.write(packs, SCENE).name: rows for rows in (mine, theirs)}
    both = sorted(set(names(5)) & set(names(3, 3)))
    counts = max(by_name) if named else min(by_name)
    union = Union([open_pack(packs / name) for name in sorted(by_name, reverse=True)], [counts] if named else ())
    assert sorted(union.disagreements()) == both
    first = by_name[counts].by_file()
    for file in both:
        position = union.find(keys_of([file]))
        np.testing.assert_array_equal(union.take(position)[0], first[file])


def test_negative_zero_and_other_nans_are_other_bytes(packs: Path) -> None:
    mine, theirs = Rows.of(["a", "b"]), Rows.of(["a", "b"])
    mine.logits[:] = [[0.0, np.nan, 1], [1, 2, np.nan]]
    theirs.logits[:] = [[-0.0, np.nan, 1], [1, 2, np.nan]]
    union = Union([open_pack(rows.write(packs, SCENE)) for rows in (mine, theirs)])
    assert union.disagreements() == [mine.files[0]]


def test_a_disagreement_is_reported_once_and_also_beside_another_input(packs: Path) -> None:
    versions = [Rows.of(["a"], seed=seed, inputs=seed == 3) for seed in range(4)]
    union = Union([open_pack(rows.write(packs, SCENE)) for rows in versions])
    assert union.disagreements() == ["a"]


# -- seal -------------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=25)
def test_any_partition_in_any_order_seals_to_the_bytes_of_one_pack(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30))
    dtype = data.draw(st.sampled_from(["fp32", "fp16"]))
    rows, made_by = Rows.of(names(count), 4, dtype), origin("city2scene", 4, dtype)
    owners = data.draw(st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=count, max_size=count))
    parts = [[row for row in range(count) if part in owners[row]] for part in range(5)]
    parts = data.draw(st.permutations([part for part in parts if part]))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        whole = rows.write(Path(other), made_by)
        paths = [rows.part(part).write(Path(folder), made_by) for part in parts]
        paths = data.draw(st.permutations(sorted(set(paths))))
        sealed = seal_all(Path(folder), rows, paths)
        (path,) = sealed.paths
        assert (sealed.absent.any(), sealed.left_out, sealed.disagreements) == (False, 0, [])
        assert snapshot(Path(folder)) == snapshot(Path(other)) == {path.name: whole.read_bytes()}


def test_a_seal_keeps_the_wanted_rows_alone(packs: Path) -> None:
    rows = Rows.of(names(10))
    changed = Rows.of([rows.files[4]], inputs=1)  # its feature is another now
    wanted = Rows.of([*rows.files[:4], rows.files[4], "never/scored.npy"])
    wanted.inputs = wanted.inputs.copy()
    wanted.inputs[wanted.files.index(rows.files[4])] = changed.inputs[0]
    paths = [rows.part(range(6)).write(packs, SCENE), rows.part(range(3, 10)).write(packs, SCENE)]
    sealed = seal_all(packs, wanted, paths)
    assert {wanted.files[n] for n in np.flatnonzero(sealed.absent)} == {rows.files[4], "never/scored.npy"}
    assert sealed.left_out == 6
    (path,) = sealed.paths
    assert open_pack(path).files == rows.files[:4]
    assert os.listdir(packs) == [path.name]


def test_a_seal_that_keeps_nothing_leaves_nothing(packs: Path) -> None:
    path = Rows.of(names(3)).write(packs, SCENE)
    sealed = seal_all(packs, Rows.of(["other.npy"]), [path])
    assert (sealed.paths, sealed.left_out, sealed.absent.tolist()) == ([], 3, [True])
    assert os.listdir(packs) == []
    sealed = merge_packs(packs, None, NO_ROWS.keys, NO_ROWS.inputs)
    assert (sealed.paths, len(sealed.absent), sealed.left_out) == ([], 0, 0)


@pytest.mark.parametrize("further", [[], [[0, 5], [3]]])
def test_a_seal_whose_result_is_one_of_its_packs_keeps_that(
    packs: Path, monkeypatch: pytest.MonkeyPatch, further: list[list[int]]
) -> None:
    rows = Rows.of(names(9))
    paths = [rows.write(packs, SCENE), *(rows.part(part).write(packs, SCENE) for part in further)]
    if not further:
        monkeypatch.setattr("kd_cache.store.union.write_pack", lambda *_: pytest.fail("nothing was to be written"))
    content = paths[0].read_bytes()
    assert seal_all(packs, rows, paths).paths == paths[:1]
    assert snapshot(packs) == {paths[0].name: content}


def test_a_seal_removes_exactly_what_it_merged(packs: Path) -> None:
    rows = Rows.of(names(8))
    merged = [rows.part(range(4)).write(packs, SCENE), rows.part(range(4, 8)).write(packs, SCENE)]
    opened = [open_pack(path) for path in merged]
    others = [
        rows.write(packs, origin("city2scene")),  # another teacher
        rows.write(packs, origin(weights="trained again")),  # another fingerprint
        Rows.of(names(2, 20)).write(packs, SCENE),  # a dump at work committed this after the seal looked
    ]
    (packs / ".tmp-1-someone-else.h5").write_bytes(b"half a pack")
    kept = snapshot(packs)
    sealed = seal_and_remove(packs, opened, rows)
    (path,) = sealed.paths
    gone = {path.name for path in merged}
    assert set(snapshot(packs)) == kept.keys() - gone | {path.name}
    assert all(path.read_bytes() == kept[path.name] for path in others)


# -- looking while others work ----------------------------------------------------------------------------------------


def test_a_pack_that_is_sealed_away_while_looking_is_looked_for_anew(
    packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows.of(names(9))
    paths = [rows.part(range(start, 9, 3)).write(packs, SCENE) for start in range(3)]
    genuine = open_pack
    opened: list[Path] = []

    def sealed_meanwhile(path: Path, check: str) -> Pack:
        if len(opened) == 1:
            seal_all(packs, rows, paths)
        opened.append(path)
        return genuine(path)

    monkeypatch.setattr(folder_module, "open_pack", sealed_meanwhile)
    found = CacheFolder(packs.parent).packs()
    assert (len(found.good), found.damaged) == (1, {})
    assert found.good[0].files == rows.files


def test_a_listing_that_a_seal_tore_misses_no_row(packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may list neither what was removed nor what was added while it was read."""
    rows = Rows.of(names(9))
    whole = rows.write(packs, SCENE)
    other = Rows.of(names(2, 30)).write(packs, SCENE)
    genuine = CacheFolder.pack_paths
    looks: list[list[Path]] = [[other]]
    monkeypatch.setattr(CacheFolder, "pack_paths", lambda folder: looks.pop() if looks else genuine(folder))
    assert {pack.path for pack in CacheFolder(packs.parent).packs().good} == {whole, other}


def test_packs_that_never_stop_changing_are_an_error_and_no_endless_loop(
    packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = (packs / f"scene-{number:032x}.h5" for number in range(1000))
    monkeypatch.setattr(CacheFolder, "pack_paths", lambda folder: [next(looks)])
    with pytest.raises(StoreError, match="keep changing"):
        CacheFolder(packs.parent).packs()


def test_a_damaged_pack_is_listed_with_its_error_beside_the_good_ones(packs: Path) -> None:
    good = Rows.of(names(4)).write(packs, SCENE)
    bad = Rows.of(names(4, 9)).write(packs, SCENE)
    with flipping(bad) as flip:
        flip(8 * 2000)
        found = CacheFolder(packs.parent).packs()
    assert [pack.path for pack in found.good] == [good]
    assert list(found.damaged) == [bad]
    assert str(bad) in found.damaged[bad].message


def test_only_packs_are_looked_at_and_only_those_of_the_teachers_asked_for(packs: Path) -> None:
    rows = Rows.of(names(4))
    scene, city = rows.write(packs, SCENE), rows.write(packs, origin("city-2-scene"))
    for name in (".tmp-1-2.h5", "notes.txt", "scene-abc.h5.bak", f"._{scene.name}", f"{scene.stem} (1).h5", "mine.h5"):
        (packs / name).write_bytes(b"?")
    folder = CacheFolder(packs.parent)
    assert {pack.path for pack in folder.packs().good} == {scene, city}
    assert [pack.path for pack in folder.packs(["city-2-scene"]).good] == [city]
    assert folder.packs([]).good == []
    assert folder.packs().of(origin(weights="other")) == []
    assert folder.packs().of(Origin("city", SCENE.fingerprint, "logits", 3, "fp32")) == []


def test_a_folder_without_packs_has_none_and_an_unreadable_one_is_an_error(tmp_path: Path) -> None:
    assert CacheFolder(tmp_path / "nothing").packs().good == []
    (tmp_path / "packs").write_text("a file")
    with pytest.raises(StoreError, match="packs"):
        CacheFolder(tmp_path).packs()


def test_caches_are_the_a2_folders_with_an_index(tmp_path: Path) -> None:
    for name in ("A2b", "A2c", "A2s1", "other"):
        (tmp_path / name).mkdir()
    for name in ("A2b", "A2s1", "other"):
        (tmp_path / name / "cache_index.json").touch()
    (tmp_path / "A2file").touch()
    assert [folder.path.name for folder in find_caches(tmp_path, DCASE.is_adaptation)] == ["A2b", "A2s1"]
    assert find_caches(tmp_path / "nothing", DCASE.is_adaptation) == []
    with pytest.raises(StoreError):
        find_caches(tmp_path / "A2file", DCASE.is_adaptation)
