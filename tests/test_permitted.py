"""The permitted keys that travel with a cache: what they are on disk, and that nothing else is ever served."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from conftest import TINY, Run, World
from store_fixtures import byte_rows, md5, name_in_index, names
from torch.utils.data import TensorDataset

import kd_cache.store.permitted as permitted_module
from kd_cache import CorruptError, LogitCache, MissingLogitsError
from kd_cache.errors import StaleError
from kd_cache.store.index import write_index
from kd_cache.store.pack import Pack, open_pack, write_pack
from kd_cache.store.permitted import Permitted, read_permitted


def listed(cache: Path) -> Path:
    """The file that the index names."""
    record = json.loads((cache / "cache_index.json").read_bytes())["kd_cache"]
    return Path(cache / record["permitted"]["file"])


def some(count: int = 5) -> Permitted:
    keys = byte_rows(sorted(md5(file) for file in names(count)))
    return Permitted.of(keys, np.arange(count) - 1)


# -- on disk ----------------------------------------------------------------------------------------------------------


def test_the_documented_layout_is_all_a_reader_needs(cached: World, world: World) -> None:
    """Key and label of each permitted sample, by plain Python; the target's labels are nobody's business."""
    path = listed(world.cache)
    content = path.read_bytes()
    assert path.name == f"permitted-{xxhash.xxh3_128_hexdigest(content)}.npy"
    array = np.load(path)
    assert (array.dtype, array.shape) == (np.dtype("u1"), (20, 20))
    assert content == content[:128] + array.tobytes()
    labels = {row["file"]: row["scene_label"] if row["device_id"] == "A" else -1 for row in world.rows}
    expected = sorted((md5(file), labels[file]) for file in world.permitted())
    assert [row.tobytes() for row in array] == [key + struct.pack("<i", label) for key, label in expected]
    record = json.loads((world.cache / "cache_index.json").read_bytes())["kd_cache"]
    assert record["permitted"] == {"file": path.name, "count": 20}


def test_equal_keys_and_labels_have_one_name_and_others_another(tmp_path: Path) -> None:
    names = [some().write(tmp_path), some().write(tmp_path), some(6).write(tmp_path)]
    assert names[0] == names[1] != names[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(names))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 700])
def test_it_is_read_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, mapped: bool
) -> None:
    if mapped:
        monkeypatch.setattr(permitted_module, "_MAPPED", 1)
    written = some(count)
    found = read_permitted(tmp_path / written.write(tmp_path))
    np.testing.assert_array_equal(found.rows, written.rows)
    assert found.labels.tolist() == list(range(-1, count - 1))
    assert [key.tobytes() for key in found.keys] == sorted(md5(file) for file in names(count))
    assert len(found) == count
    assert found.has_keys(written.keys)
    assert not found.has_keys(some(count + 1).keys)
    if count:
        other = written.keys.copy()
        other[-1, -1] ^= 1
        assert not found.has_keys(other)


def _header(descr: str = "|u1", shape: str = "(5, 20)", order: str = "False") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


ROWS = some().rows.tobytes()
STRANGE: dict[str, bytes] = {
    "nothing": b"",
    "only a header": _header(),
    "another count": _header(shape="(6, 20)") + ROWS,
    "fewer than there are": _header(shape="(4, 20)") + ROWS,
    "one axis": _header(shape="(100,)") + ROWS,
    "wider rows": _header(shape="(4, 25)") + ROWS,
    "signed bytes": _header("|i1") + ROWS,
    "objects": _header("|O") + ROWS,
    "columns first": _header(order="True") + ROWS,
    "a row cut short": _header() + ROWS[:-1],
    "a part of a row more": _header() + ROWS + ROWS[:7],
    "unsorted": _header(shape="(5, 20)") + ROWS[20:] + ROWS[:20],
    "twice the same key": _header(shape="(5, 20)") + ROWS[:20] + ROWS[:80],
    "another magic": b"\x93NUMPX" + (_header() + ROWS)[6:],
    "another version": b"\x93NUMPY\x02" + (_header() + ROWS)[7:],
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_content_is_refused_even_under_its_correct_digest(tmp_path: Path, case: str) -> None:
    content = STRANGE[case]
    path = tmp_path / f"permitted-{xxhash.xxh3_128_hexdigest(content)}.npy"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="damaged"):
        read_permitted(path)


def test_the_header_of_this_test_is_the_one_that_is_written(tmp_path: Path) -> None:
    content = _header() + ROWS
    assert (tmp_path / some().write(tmp_path)).read_bytes() == content


@pytest.mark.parametrize("name", ["permitted-.npy", "permitted-0.npy", "other.npy", "permitted-{}.npy.npy", "x{}.npy"])
def test_a_name_without_its_digest_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / some().write(tmp_path)
    other = path.with_name(name.format(path.name[10:42]))
    path.rename(other)
    with pytest.raises(CorruptError, match="do not match its name"):
        read_permitted(other)


# -- what is served ---------------------------------------------------------------------------------------------------


def foreign_rows(pack: Pack, files: list[str]) -> Path:
    """A pack of the same origin with rows of samples that nobody permitted, as a careless copy would bring."""
    files = sorted(files, key=md5)
    keys = byte_rows([md5(file) for file in files])
    rows = np.full((len(files), pack.origin.num_classes), 7, pack.origin.stored)
    return write_pack(pack.path.parent, pack.origin, keys, keys, [f.encode() for f in files], rows.__getitem__)


@pytest.mark.parametrize("verify", ["full", "lazy", "off"])
def test_rows_of_samples_that_are_not_permitted_are_never_served(
    cached: World, run: Run, world: World, verify: str
) -> None:
    """Rows of the test split and of another device, in packs of their own and merged into the teacher's."""
    files = world.permitted()
    expected = LogitCache.open(world.cache).tensor(files=files)
    forbidden = [row["file"] for row in world.rows if row["file"] not in files]
    for path in list((world.cache / "packs").iterdir()):
        foreign_rows(open_pack(path), forbidden)

    cache = LogitCache.open(world.cache, verify=verify)

    assert sorted(cache.files) == sorted(files)
    assert len(cache) == 20
    assert torch.equal(cache.tensor(files=files), expected)
    with pytest.raises(MissingLogitsError, match="not in the manifest of the dump, or not a permitted train sample"):
        cache.rows(forbidden[:1])
    with pytest.raises(MissingLogitsError):
        cache.attach(TensorDataset(torch.arange(1)), forbidden[-1:])
    assert run("verify", "--target", "b", *TINY).exit_code == 6


def test_a_merged_pack_with_surplus_rows_serves_the_permitted_ones(cached: World, run: Run, world: World) -> None:
    """One pack that holds more than the index permits: positions are not rows then."""
    files = world.permitted()
    expected = LogitCache.open(world.cache).tensor(files=files)
    for path in list((world.cache / "packs").iterdir()):
        pack = open_pack(path)
        more = open_pack(foreign_rows(pack, [f"x/surplus-{number}-a.npy" for number in range(9)]))
        order = np.lexsort(np.concatenate([pack.keys, more.keys])[:, ::-1].T)
        keys, inputs, logits = (
            np.concatenate([getattr(part, name) for part in (pack, more)])[order]
            for name in ("keys", "inputs", "logits")
        )
        both = [file.encode() for file in (*pack.files, *more.files)]
        both = [both[at] for at in order]
        name_in_index(write_pack(path.parent, pack.origin, keys, inputs, both, logits.__getitem__))
        path.unlink()
        more.path.unlink()
    assert len(world.packs()) == 2
    for verify in ("full", "lazy", "off"):
        cache = LogitCache.open(world.cache, verify=verify)
        assert len(cache) == 20
        assert torch.equal(cache.tensor(files=files), expected)
        assert sorted(cache.files) == sorted(files)
    assert run("verify", "--target", "b", *TINY).exit_code == 6


def test_a_cache_with_missing_samples_serves_the_others(dump: Run, world: World) -> None:
    """There are fewer rows than permitted keys, and nothing between them is shifted."""
    bad = world.permitted()[4:7]
    assert dump().exit_code == 0
    opened = LogitCache.open(world.cache)
    expected = dict(zip(opened.files, opened.tensor(), strict=True))
    shutil.rmtree(world.cache)
    for file in bad:
        world.feature(file).write_bytes(b"no array")
    assert dump("--on-bad-sample", "skip").exit_code == 3
    assert len(read_permitted(listed(world.cache))) == 20
    for verify in ("full", "lazy"):
        cache = LogitCache.open(world.cache, verify=verify)
        assert set(cache.files) == set(world.permitted()) - set(bad)
        for file in cache.files:
            assert torch.allclose(cache.batch([file])[0], expected[file], atol=1e-5)  # other batches, other last bits
        with pytest.raises(MissingLogitsError, match=f"{bad[0]}: could not be scored"):
            cache.rows(bad)


def test_rows_that_were_permitted_and_are_gone_are_not_taken_for_forbidden_ones(cached: World, world: World) -> None:
    files = world.permitted()
    for path in list((world.cache / "packs").iterdir()):
        pack = open_pack(path)
        keep = np.arange(1, len(pack))
        lost = pack.file(0)
        parts = (pack.keys[keep], pack.inputs[keep], [pack.file_bytes(row) for row in keep.tolist()])
        name_in_index(write_pack(path.parent, pack.origin, *parts, pack.logits[keep].__getitem__))
        path.unlink()
    said = "cache_index.json promises 20 rows of (tiny|other), found 19"
    with pytest.raises(MissingLogitsError, match=said):
        LogitCache.open(world.cache, strict=True)
    with pytest.warns(UserWarning, match=said):
        cache = LogitCache.open(world.cache)
    assert len(cache) == 19
    with pytest.raises(MissingLogitsError, match=f"{lost}: its row is gone or damaged; run kd-cache repair"):
        cache.rows(files)


# -- without it -------------------------------------------------------------------------------------------------------


def test_a_lost_or_damaged_list_is_an_error_that_names_seal_and_seal_writes_it_again(
    cached: World, run: Run, world: World
) -> None:
    path = listed(world.cache)
    content = path.read_bytes()
    for damaged in (None, content[:-1], content[:-1] + b"\7", b"", content + b"\0"):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"(?s)permitted.*kd-cache seal"):
            LogitCache.open(world.cache)
        result = run("verify", "--target", "b", *TINY)
        assert (result.exit_code, path.name in result.stdout) == (4, True)
        assert run("seal", "--target", "b").exit_code == 0
        assert path.read_bytes() == content


def test_the_next_dump_or_seal_gives_such_a_cache_its_list(cached: World, dump: Run, run: Run, world: World) -> None:
    path = listed(world.cache)
    for command in (lambda: run("seal", "--target", "b"), dump):
        _as_first_version(world)
        assert not path.exists()
        assert len(LogitCache.open(world.cache)) == 20
        assert run("verify", "--target", "b", "--all", *TINY).exit_code == 0
        assert command().exit_code == 0
        assert listed(world.cache) == path
        assert path.exists()


def _as_first_version(world: World) -> None:
    index = json.loads((world.cache / "cache_index.json").read_bytes())
    record = {key: value for key, value in index["kd_cache"].items() if key not in ("digest", "permitted", "begun")}
    for entry in record["teachers"].values():
        del entry["accuracy"]
    maps = {name: index[name] for name in record["teachers"]}
    listed(world.cache).unlink()
    write_index(world.cache / "cache_index.json", index["num_samples"], maps, record)


def test_an_opened_cache_outlives_its_list(cached: World, world: World) -> None:
    cache = LogitCache.open(world.cache)
    listed(world.cache).unlink()
    assert cache.batch(world.permitted()).shape == (20, 2, 10)


def test_workers_refuse_a_cache_whose_list_of_permitted_samples_is_another(dump: Run, world: World) -> None:
    """The packs may be the same: row numbers are those of the permitted samples."""
    dump()
    pickled = pickle.dumps(LogitCache.open(world.cache))
    packs = world.packs()
    world.rows[0]["scene_label"] = (world.rows[0]["scene_label"] + 1) % 10
    world.write()
    dump()
    assert world.packs() == packs
    with pytest.raises(StaleError, match="changed while it was being read"):
        pickle.loads(pickled)  # noqa: S301 (made here)
