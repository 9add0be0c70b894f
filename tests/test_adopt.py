"""``kd-cache adopt``: rows that something else made come in checked, joined by name, and marked; nothing else does."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Run, World
from store_fixtures import md5, snapshot, write_older
from typer.testing import Result

from kd_cache import CorruptError, FeatureError, LogitCache, UsageError
from kd_cache.dataset.features import FeatureSource
from kd_cache.exchange.adopt import NOT_ADOPTED
from kd_cache.store.index import read_index
from kd_cache.store.pack import open_pack

Adopt = Callable[..., Result]
Table = dict[str, np.ndarray]


@pytest.fixture
def adopt(run: Run, world: World) -> Adopt:
    """Adopt into ``mine/A2b`` under the name ``outside`` (``name=None``: no --name)."""

    def call(source: object, *args: object, name: str | None = "outside", root: object = "mine") -> Result:
        named = () if name is None else ("--name", name)
        where = ("--json-path", world.json_path, "--cache-root", root)
        return run("adopt", source, "--target", "b", *where, *named, *args)

    return call


def table(world: World, classes: int = 4, dtype: str = "<f4", target: str = "b") -> Table:
    """Random rows of the permitted samples."""
    random = np.random.default_rng(3)
    return {file: random.normal(0, 3, classes).astype(dtype) for file in world.permitted(target)}


def write_tsv(path: Path, rows: Table, columns: list[str] | None = None) -> Path:
    classes = len(next(iter(rows.values())))
    head = "\t".join(["file", *(columns or [f"c{number}" for number in range(classes)])])
    lines = ["\t".join([file, *map(repr, map(float, row))]) for file, row in rows.items()]
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def write_pt(path: Path, rows: Table, listed: bool = True) -> Path:
    torch.save(torch.from_numpy(np.stack(list(rows.values()))), path)
    if listed:
        path.with_suffix(".files.json").write_text(json.dumps(list(rows)))
    return path


def record(path: Path) -> Any:
    return read_index(path / "cache_index.json").record


def opened(path: Path, *teachers: str, **more: Any) -> LogitCache:
    """Open a cache that must say that its rows were adopted."""
    with pytest.warns(UserWarning, match="adopted"):
        return LogitCache.open(path, list(teachers) or None, **more)


def assert_rows(path: Path, teacher: str, rows: Table) -> None:
    cache = opened(path, teacher)
    assert set(cache.files) == set(rows)
    files = list(rows)
    assert cache.batch(cache.rows(files))[:, 0].numpy().tobytes() == np.stack([rows[file] for file in files]).tobytes()


# -- what comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_tsv, write_pt])
def test_adopted_rows_are_served_by_name_with_a_warning(
    adopt: Adopt, world: World, tmp_path: Path, write: Callable[[Path, Table], Path]
) -> None:
    rows = table(world)
    source = write(tmp_path / ("rows.tsv" if write is write_tsv else "rows.pt"), rows)
    result = adopt(source)
    assert result.exit_code == 0
    for fact in ("outside", "20", "4 logits, fp32", "unverified"):
        assert fact in result.stdout
    assert_rows(tmp_path / "mine/A2b", "outside", rows)
    for file, row in rows.items():
        assert np.load(tmp_path / f"mine/A2b/outside/{md5(file).hex()}.npy").tobytes() == row.tobytes()


def test_adopted_rows_are_marked_and_equal_no_teachers(adopt: Adopt, world: World, tmp_path: Path) -> None:
    rows = table(world)
    columns = ["a", "b", "c", "d"]
    source = write_tsv(tmp_path / "rows.tsv", rows, columns)
    content = json.loads(adopt(source, "--json").stdout)
    told = record(tmp_path / "mine/A2b")
    entry = told["teachers"]["outside"]
    assert (content["cache"], content["permitted"], content["source"]) == ("mine/A2b", 20, str(source))
    one = content["teachers"]["outside"]
    assert (one["kind"], one["rows"], one["left_out"], one["missing"]) == ("tsv", 20, 0, 0)
    assert one["fingerprint"] == entry["fingerprint"]
    backwards = write_tsv(tmp_path / "third.tsv", dict(reversed(rows.items())), columns)
    assert adopt(backwards, name=None, root="other").exit_code == 0  # the order of the rows does not matter
    assert record(tmp_path / "other/A2b")["teachers"]["third"]["parts"] == entry["parts"]
    assert entry["adopted"] == {"source": "rows.tsv", "kind": "tsv", "rows": 20}
    digest = hashlib.sha256()
    ordered = sorted(rows, key=md5)
    digest.update("\0".join(ordered).encode() + b"".join(rows[file].tobytes() for file in ordered))
    assert entry["parts"] == {
        "adopted": digest.hexdigest(),
        "weights": "unverified",
        "architecture": "unverified",
        "feature_spec": "unverified",
        "precision": "unverified",
        "value_kind": "logits",
        "num_classes": "4",
        "class_order": '["a", "b", "c", "d"]',
        "dtype": "fp32",
        "format_version": "1",
    }
    assert entry["class_names"] == ["a", "b", "c", "d"]
    assert told["adaptation"] == "A2b"
    assert told["manifest"]["sha256"] == hashlib.sha256(world.json_path.read_bytes()).hexdigest()
    assert told["missing"] == {}
    labels = {row["file"]: row["scene_label"] for row in world.rows if row["device_id"] == "A"}
    correct = sum(int(rows[file].argmax()) == label for file, label in labels.items() if file in rows)
    assert entry["accuracy"] == {"correct": correct, "rows": 12}


def test_each_row_remembers_the_feature_as_it_is_now(adopt: Adopt, run: Run, world: World, tmp_path: Path) -> None:
    rows = table(world)
    adopt(write_tsv(tmp_path / "rows.tsv", rows))
    (path,) = (tmp_path / "mine/A2b/packs").glob("outside-*.h5")
    pack = open_pack(path)

    source = FeatureSource(world.root)
    assert [pack.inputs[row].tobytes() for row in range(20)] == [source.read(file).digest for file in pack.files]
    assert run("verify", "--cache-root", "mine", "--all").exit_code == 1  # unverified
    world.write_feature(world.permitted()[0], np.ones((12, 20), np.float32))
    assert run("verify", "--cache-root", "mine", "--all").exit_code == 5


def test_rows_of_samples_that_are_not_permitted_stay_out(adopt: Adopt, world: World, tmp_path: Path) -> None:
    rows = table(world)
    forbidden = {row["file"]: np.ones(4, np.float32) for row in world.rows if row["file"] not in rows}
    assert len(forbidden) == 9
    for number, write in enumerate((write_tsv, write_pt)):
        source = write(tmp_path / f"rows{number}{'.pt' if write is write_pt else '.tsv'}", forbidden | rows)
        result = adopt(source, "--json", root=f"mine{number}")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["teachers"]["outside"]["left_out"] == 9
        assert_rows(tmp_path / f"mine{number}/A2b", "outside", rows)
        assert not any((tmp_path / f"mine{number}/A2b/outside/{md5(file).hex()}.npy").exists() for file in forbidden)


def test_permitted_samples_without_a_row_are_missing_and_said_to_be(adopt: Adopt, world: World, tmp_path: Path) -> None:
    rows = table(world)
    absent = list(rows)[::7]
    result = adopt(write_tsv(tmp_path / "rows.tsv", {f: row for f, row in rows.items() if f not in absent}), "--json")
    assert result.exit_code == 3
    content = json.loads(result.stdout)
    assert content["missing"] == dict.fromkeys(absent, NOT_ADOPTED)
    assert content["teachers"]["outside"]["rows"] == 17
    assert content["teachers"]["outside"]["missing"] == 3
    assert record(tmp_path / "mine/A2b")["missing"] == dict.fromkeys(absent, NOT_ADOPTED)
    from kd_cache import MissingLogitsError

    with pytest.raises(MissingLogitsError, match=NOT_ADOPTED):
        opened(tmp_path / "mine/A2b").rows(absent)


# -- a cache of the older script --------------------------------------------------------------------------------------


def older_tables(world: World) -> dict[str, Table]:
    rows = table(world)
    forbidden = {row["file"]: np.ones(4, np.float32) for row in world.rows if row["file"] not in rows}
    return {"city2scene": forbidden | rows, "scene": {file: row * 2 for file, row in rows.items()}}


def test_a_cache_of_the_older_script_is_adopted_where_it_is(
    adopt: Adopt, run: Run, world: World, tmp_path: Path
) -> None:
    maps = older_tables(world)
    path = write_older(tmp_path / "cache/A2b", maps, where=f"{tmp_path}/cache/A2b")
    before = snapshot(path)
    result = adopt("cache/A2b", "--json", name=None, root="cache")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert {name: (one["rows"], one["left_out"]) for name, one in content["teachers"].items()} == {
        "city2scene": (20, 9),
        "scene": (20, 0),
    }
    for name in maps:
        expected = {file: row for file, row in maps[name].items() if file in world.permitted()}
        assert_rows(path, name, expected)
        assert record(path)["teachers"][name]["adopted"]["source"] == "A2b"
    # Every row file is the very same. Those of samples not permitted are not ours to remove: they are told of.
    after = snapshot(path)
    rows = {name for name in before if name.endswith(".npy")}
    assert {name: after[name] for name in rows} == {name: before[name] for name in rows}
    assert "9 files in cache/A2b/city2scene stay, which kd-cache did not write" in result.stderr
    index = json.loads((path / "cache_index.json").read_text())
    assert set(index["city2scene"]) == set(world.permitted())
    assert run("verify", "--all").exit_code == 6
    for name in rows - {f"{name}/{md5(file).hex()}.npy" for name in maps for file in world.permitted()}:
        (path / name).unlink()
    assert run("verify", "--all").exit_code == 1  # unverified


def test_a_cache_of_the_older_script_is_adopted_from_elsewhere_and_stays_as_it_was(
    adopt: Adopt, world: World, tmp_path: Path
) -> None:
    path = write_older(tmp_path / "older/A2b", older_tables(world))
    before = snapshot(path)
    assert adopt("older/A2b", name=None).exit_code == 0
    assert snapshot(path) == before
    assert opened(tmp_path / "mine/A2b").teachers == ("city2scene", "scene")


def test_an_older_row_that_is_gone_or_damaged_stops_or_is_missing(adopt: Adopt, world: World, tmp_path: Path) -> None:
    maps = older_tables(world)
    gone, short = world.permitted()[:2]
    for number, (file, code) in enumerate(((gone, 3), (short, 4))):
        path = write_older(tmp_path / f"older{number}/A2b", maps)
        row = path / "scene" / f"{md5(file).hex()}.npy"
        row.unlink()
        if code == 4:
            row.write_bytes(b"\x93NUMPY")
        result = adopt(path, name=None, root=f"mine{number}")
        assert result.exit_code == code
        assert "--on-bad-sample skip" in result.stderr
        assert not (tmp_path / f"mine{number}").exists()
        result = adopt(path, "--on-bad-sample", "skip", "--json", name=None, root=f"mine{number}")
        assert result.exit_code == 3
        assert list(json.loads(result.stdout)["missing"]) == [file]
        assert file not in opened(tmp_path / f"mine{number}/A2b", "scene").files


OLDER_WRONG = {"a row of another length": 2, "another sample's row": 4, "another target's cache": 2}


@pytest.mark.parametrize("what", OLDER_WRONG)
def test_an_older_cache_of_wrong_rows_is_refused(adopt: Adopt, world: World, tmp_path: Path, what: str) -> None:
    rows = table(world)
    first, second = world.permitted()[:2]
    if "length" in what:
        rows[first] = np.ones(5, np.float32)
    path = write_older(tmp_path / "older" / ("A2c" if "target" in what else "A2b"), {"scene": rows})
    if "sample" in what:
        index = json.loads((path / "cache_index.json").read_text())
        index["scene"][first] = index["scene"][second]
        (path / "cache_index.json").write_text(json.dumps(index))
    result = adopt(path, name=None)
    assert result.exit_code == OLDER_WRONG[what]
    assert ("--target c" if "target" in what else first) in result.stderr


# -- beside what is there ---------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_is_refused(adopt: Adopt, cached: World, world: World, tmp_path: Path) -> None:
    before = snapshot(world.cache)
    source = write_tsv(tmp_path / "tiny.tsv", table(world))
    for name in ("tiny", None):
        result = adopt(source, name=name, root="cache")
        assert result.exit_code == 2
        assert "--name" in result.stderr
    for name in ("fit", "attn_fusion"):
        assert f"no teacher may be called {name}" in adopt(source, name=name, root="cache").stderr
    assert snapshot(world.cache) == before
    assert adopt(source, root="cache").exit_code == 0
    assert adopt(source, root="cache").exit_code == 2


def test_a_name_that_a_running_dump_will_take_is_refused(adopt: Adopt, run: Run, world: World, tmp_path: Path) -> None:
    part = ("--shard", "0/2", "--json-path", world.json_path, *TINY, "--only", "tiny")
    assert run("dump", "--target", "b", "--cache-root", "mine", *part).exit_code == 0
    source = write_tsv(tmp_path / "rows.tsv", table(world))
    before = snapshot(tmp_path / "mine")
    assert adopt(source, name="tiny").exit_code == 2
    assert snapshot(tmp_path / "mine") == before


def test_a_dump_that_is_not_finished_goes_on_after_an_adoption(
    adopt: Adopt, run: Run, world: World, tmp_path: Path
) -> None:
    parts = [("--shard", f"{n}/2", "--json-path", world.json_path, *TINY, "--only", "tiny") for n in (0, 1)]
    assert run("dump", "--target", "b", "--cache-root", "mine", *parts[0]).exit_code == 0
    rows = table(world)
    assert adopt(write_tsv(tmp_path / "rows.tsv", rows)).exit_code == 0
    assert run("dump", "--target", "b", "--cache-root", "mine", *parts[1]).exit_code == 0
    assert run("seal", "--target", "b", "--cache-root", "mine").exit_code == 0
    assert record(tmp_path / "mine/A2b")["teachers"]["tiny"]["rows"] == 20
    assert_rows(tmp_path / "mine/A2b", "outside", rows)


def test_the_dumps_teachers_stay_as_they_were(adopt: Adopt, dump: Run, world: World, tmp_path: Path) -> None:
    dump("--no-files")
    before = snapshot(world.cache / "packs")
    entries = record(world.cache)["teachers"]
    rows = table(world, classes=10)
    assert adopt(write_tsv(tmp_path / "rows.tsv", rows), root="cache").exit_code == 0
    after = snapshot(world.cache / "packs")
    assert {name: after[name] for name in before} == before
    told = record(world.cache)
    assert list(told["teachers"]) == ["tiny", "other", "outside"]
    assert {name: told["teachers"][name] for name in entries} == entries
    assert told["files"] is False
    assert not list((world.cache / "outside").glob("*.npy"))
    assert_rows(world.cache, "outside", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(LogitCache.open(world.cache, ["tiny", "other"])) == 20


# -- the guard and the features ---------------------------------------------------------------------------------------


def test_the_guard_comes_before_the_source(adopt: Adopt, world: World) -> None:
    world.add(60, "s4", "train")
    world.write()
    result = adopt("no-such-file.pt")
    assert result.exit_code == 6
    assert "no-such-file" not in result.stderr
    assert not (world.root / "mine").exists()


def test_a_feature_that_cannot_be_read_stops_or_is_missing(adopt: Adopt, world: World, tmp_path: Path) -> None:
    rows = table(world)
    bad = world.permitted()[3]
    world.feature(bad).write_bytes(b"broken")
    source = write_tsv(tmp_path / "rows.tsv", rows)
    result = adopt(source)
    assert result.exit_code == 1
    assert bad in result.stderr
    assert "--on-bad-sample skip" in result.stderr
    assert not (tmp_path / "mine").exists()
    result = adopt(source, "--on-bad-sample", "skip", "--json")
    assert result.exit_code == 3
    missing = json.loads(result.stdout)["missing"]
    assert list(missing) == [bad]
    assert "not a .npy file" in missing[bad]
    assert_rows(tmp_path / "mine/A2b", "outside", {file: row for file, row in rows.items() if file != bad})


def test_without_any_feature_nothing_is_adopted(adopt: Adopt, world: World, tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "rows.tsv", table(world))
    shutil.rmtree(world.root / "x")
    for more in ((), ("--on-bad-sample", "skip")):
        assert adopt(source, *more).exit_code == FeatureError.exit_code
    assert not (tmp_path / "mine").exists()


# -- rows that cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000])  # the last does not fit half precision
def test_a_row_that_is_not_finite_stops_or_is_missing(adopt: Adopt, world: World, tmp_path: Path, value: float) -> None:
    rows = table(world)
    bad = world.permitted()[4]
    rows[bad][1] = value
    if value == 70_000:
        result = adopt(write_tsv(tmp_path / "half.tsv", rows), "--dtype", "fp16")
        assert result.exit_code == 1
        assert bad in result.stderr
        return
    for source in (write_tsv(tmp_path / "rows.tsv", rows), write_pt(tmp_path / "rows.pt", rows)):
        result = adopt(source, root=source.suffix)
        assert result.exit_code == 1
        assert bad in result.stderr
        result = adopt(source, "--on-bad-sample", "skip", "--json", root=source.suffix)
        assert result.exit_code == 3
        assert "not finite" in json.loads(result.stdout)["missing"][bad]


def test_probabilities_are_not_adopted_as_logits(adopt: Adopt, world: World, tmp_path: Path) -> None:
    rows = {file: np.exp(row) / np.exp(row).sum() for file, row in table(world).items()}
    source = write_tsv(tmp_path / "rows.tsv", rows)
    result = adopt(source)
    assert result.exit_code == 1
    assert "probabilities" in result.stderr
    assert "--value-kind" in result.stderr
    assert adopt(source, "--value-kind", "probs").exit_code == 0
    with pytest.raises(UsageError, match="probs"):
        LogitCache.open(tmp_path / "mine/A2b")
    assert adopt(write_tsv(tmp_path / "raw.tsv", table(world)), "--value-kind", "probs", name="raw").exit_code == 1


def test_what_an_export_says_its_rows_are_is_kept_and_not_overruled(adopt: Adopt, world: World, tmp_path: Path) -> None:
    rows = table(world)
    source = write_pt(tmp_path / "rows.pt", rows)
    list_path = tmp_path / "rows.files.json"
    list_path.write_text(json.dumps({"files": list(rows), "value_kind": "sigmoid", "class_names": list("wxyz")}))
    assert adopt(source, "--value-kind", "logits").exit_code == 2
    for row in rows.values():
        row[:] = 0.25
    write_pt(tmp_path / "rows.pt", rows, listed=False)
    assert adopt(source, name=None).exit_code == 0
    entry = record(tmp_path / "mine/A2b")["teachers"]["rows"]
    assert (entry["value_kind"], entry["class_names"]) == ("sigmoid", list("wxyz"))


@pytest.mark.parametrize("suffix", ["tsv", "pt"])
def test_two_rows_of_one_file_are_refused_and_both_named(
    adopt: Adopt, world: World, tmp_path: Path, suffix: str
) -> None:
    rows = table(world)
    twice = world.permitted()[2]
    if suffix == "tsv":
        source = write_tsv(tmp_path / "rows.tsv", rows)
        with source.open("a") as text:
            text.write(f"{twice}\t1\t2\t3\t4\n")
    else:
        source = tmp_path / "rows.pt"
        torch.save(torch.ones(21, 4), source)
        (tmp_path / "rows.files.json").write_text(json.dumps([*rows, twice]))
    result = adopt(source)
    assert result.exit_code == 2
    assert f"{twice} (row 2 and row 20)" in result.stderr


def test_rows_of_other_names_altogether_are_refused_with_an_example(adopt: Adopt, world: World, tmp_path: Path) -> None:
    rows = {f"./{file}": row for file, row in table(world).items()}
    result = adopt(write_tsv(tmp_path / "rows.tsv", rows))
    assert result.exit_code == 2
    assert world.permitted()[0] in result.stderr
    assert not (tmp_path / "mine").exists()


# -- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_the_list_may_be_one_file_a_line(adopt: Adopt, world: World, tmp_path: Path, ending: str) -> None:
    rows = table(world)
    source = write_pt(tmp_path / "rows.pt", rows, listed=False)
    (tmp_path / "train.txt").write_bytes((ending or "\n").join(rows).encode() + ending.encode())
    assert adopt(source, "--files-list", "train.txt").exit_code == 0
    assert_rows(tmp_path / "mine/A2b", "outside", rows)


def test_a_dict_may_bring_its_list(adopt: Adopt, world: World, tmp_path: Path) -> None:
    rows = table(world, dtype="<f2")
    content = {"logits": torch.from_numpy(np.stack(list(rows.values()))), "files": list(rows)}
    torch.save(content, tmp_path / "rows.pt")
    assert adopt("rows.pt").exit_code == 0
    assert_rows(tmp_path / "mine/A2b", "outside", rows)
    (tmp_path / "list.txt").write_text("\n".join(rows))
    assert adopt("rows.pt", "--files-list", "list.txt", name="again").exit_code == 2
    torch.save(content | {"temperature": 2.0}, tmp_path / "more.pt")
    result = adopt("more.pt", name="again")
    assert result.exit_code == 2
    assert "temperature" in result.stderr


def test_a_transposed_view_of_a_tensor_is_read_as_it_means(adopt: Adopt, world: World, tmp_path: Path) -> None:
    rows = table(world)
    torch.save(torch.from_numpy(np.stack(list(rows.values())).T.copy()).T, tmp_path / "rows.pt")
    (tmp_path / "rows.files.json").write_text(json.dumps(list(rows)))
    assert adopt("rows.pt").exit_code == 0
    assert_rows(tmp_path / "mine/A2b", "outside", rows)


def test_a_list_beside_another_tensor_is_corrupt(adopt: Adopt, run: Run, cached: World, world: World) -> None:
    run("export", "--to", "pt", "--output", "out")
    shutil.copy("out/other.files.json", "out/tiny.files.json")
    result = adopt("out/tiny.pt")
    assert result.exit_code == CorruptError.exit_code
    assert "tiny.files.json" in result.stderr


LISTS: dict[str, tuple[str, str]] = {
    "too short": (json.dumps(["a", "b"]), "names 2 files"),
    "not texts": (json.dumps(["a", 3, "c"]), "item 1"),
    "empty names": (json.dumps(["a", "", "c"]), "item 1"),
    "an object of something": (json.dumps({"a": 1}), "expected a list"),
    "a number": ("3", "expected a list"),
    "not JSON": ("[", "not JSON"),
    "nested": ("[" * 100_000, "not JSON"),
    "twice a key": ('{"files": ["a"], "files": ["b"]}', "twice"),
    "a wrong kind": ('{"files": ["a", "b", "c"], "value_kind": "scores"}', "value_kind"),
    "wrong class names": ('{"files": ["a", "b", "c"], "class_names": ["one"]}', "class_names"),
    "not UTF-8": ("\udcff", "UTF-8"),
}


def test_a_tensor_without_a_list_means_nothing(adopt: Adopt, world: World, tmp_path: Path) -> None:
    write_pt(tmp_path / "rows.pt", table(world), listed=False)
    result = adopt("rows.pt")
    assert result.exit_code == 2
    assert "--files-list" in result.stderr
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    result = adopt("rows.pt", "--files-list", "gap.txt")
    assert result.exit_code == 2
    assert "line 2" in result.stderr


def saved(value: Any, **more: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **more)
    return buffer.getvalue()


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello.txt", "hello")
    return buffer.getvalue()


# What is to run or to fill the memory is refused in `test_hostile.py`.
TENSORS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a numpy array": (lambda: saved(np.ones((3, 4))), "numpy"),
    "before torch 1.6": (lambda: saved(torch.ones(3, 4), _use_new_zipfile_serialization=False), "newer torch"),
    "another zip": (other_zip, "another zip"),
    "bfloat16": (lambda: saved(torch.ones(3, 4, dtype=torch.bfloat16)), "float()"),
    "float64": (lambda: saved(torch.ones(3, 4, dtype=torch.float64)), "float64"),
    "integers": (lambda: saved(torch.ones(3, 4, dtype=torch.int64)), "int64"),
    "three axes": (lambda: saved(torch.ones(3, 4, 1)), "[3, 4, 1]"),
    "one axis": (lambda: saved(torch.ones(3)), "[3]"),
    "no classes": (lambda: saved(torch.ones(3, 0)), "[3, 0]"),
    "no rows": (lambda: saved(torch.ones(0, 3)), "[0, 3]"),
    "sparse": (lambda: saved(torch.eye(4).to_sparse()), "rows.pt"),
    "meta": (lambda: saved(torch.ones(3, 4, device="meta")), "rows.pt"),
    "a list": (lambda: saved([torch.ones(3, 4)]), "a list"),
    "a state dict": (lambda: saved({"fc.weight": torch.ones(3, 4)}), "fc.weight"),
    "nothing": (lambda: saved(None), "NoneType"),
    "an empty file": (lambda: b"", "empty"),
    "a page": (lambda: b"<html>not found</html>", "<html>"),
    "comma-separated": (lambda: b"file,a,b\nx,1,2\n", "file,a,b"),
}


def test_what_is_no_file_is_never_waited_for(adopt: Adopt, world: World, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").mkdir()
    for source, code in (("fifo", 1), ("empty", 2), ("none.pt", 1), ("/dev/null", 1)):
        assert adopt(source).exit_code == code, source
    write_pt(tmp_path / "rows.pt", table(world), listed=False)
    assert adopt("rows.pt", "--files-list", "fifo").exit_code == 1


def test_a_source_above_the_limit_is_refused_unread(adopt: Adopt, world: World, tmp_path: Path) -> None:
    for source in (write_pt(tmp_path / "rows.pt", table(world)), write_tsv(tmp_path / "rows.tsv", table(world))):
        size = source.stat().st_size
        result = adopt(source, "--max-source-bytes", size - 1)
        assert result.exit_code == 2
        assert "--max-source-bytes" in result.stderr
        assert adopt(source, "--max-source-bytes", size, root=source.suffix).exit_code == 0


def test_a_tensor_is_not_converted(adopt: Adopt, world: World, tmp_path: Path) -> None:
    result = adopt(write_pt(tmp_path / "rows.pt", table(world)), "--dtype", "fp16")
    assert result.exit_code == 2
    assert "fp32, not fp16" in result.stderr
    assert adopt(write_older(tmp_path / "A2b", {"s": table(world)}), "--dtype", "fp16", name=None).exit_code == 2


# -- tables -----------------------------------------------------------------------------------------------------------

TABLES: dict[str, tuple[str, str]] = {
    "a short row": ("file\ta\tb\nx\t1\n", "line 2 has 2 cells"),
    "a long row": ("file\ta\tb\nx\t1\t2\t3\n", "line 2 has 4 cells"),
    "an empty row": ("file\ta\tb\n\nx\t1\t2\n", "line 2 has 0 cells"),
    "no name": ("file\ta\tb\n\t1\t2\n", "line 2"),
    "a word": ("file\ta\tb\nFILE\t1\ttwo\n", "line 2 holds something else"),
    "an empty cell": ("file\ta\tb\nFILE\t1\t\n", "line 2 holds something else"),
    "digits apart": ("file\ta\tb\nFILE\t1\t1_000\n", "line 2 holds something else"),
    "other digits": ("file\ta\tb\nFILE\t1\t\u0661\n", "line 2 holds something else"),
    "one name twice": ("file\ta\ta\nx\t1\t2\n", "each once"),
    "only a header": ("file\ta\tb\n", "no rows"),
    "an open quote": ('file\ta\tb\n"x\t1\t2\n', "not a table"),
    "text after a quote": ('file\ta\tb\n"x"y\t1\t2\n', "not a table"),
    "not UTF-8": ("file\ta\tb\n\udcff\t1\t2\n", "not a table"),
    "an endless line": ("file\ta\n" + "x" * (1 << 24) + "\t1\n", "characters"),
}


SOURCES: dict[str, dict[str, Any]] = {"rows.files.json": LISTS, "rows.pt": TENSORS, "rows.tsv": TABLES}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, cases in SOURCES.items() for name in cases])
def test_what_is_no_list_tensor_or_table_is_refused_with_the_reason(
    adopt: Adopt, world: World, tmp_path: Path, file: str, name: str
) -> None:
    made, reason = SOURCES[file][name]
    victim = world.permitted()[0]
    content = made() if callable(made) else made.replace("FILE", victim).encode(errors="surrogateescape")
    torch.save(torch.ones(3, 4), tmp_path / "rows.pt")
    (tmp_path / "rows.files.json").write_text(json.dumps(["a", "b", "c"]))
    (tmp_path / file).write_bytes(content)
    before = set(tmp_path.iterdir())
    result = adopt("rows.tsv" if file == "rows.tsv" else "rows.pt")
    assert result.exit_code == 2, result.stderr
    assert reason in result.stderr
    assert file in result.stderr
    assert "error: unexpected" not in result.stderr
    assert set(tmp_path.iterdir()) == before


def test_a_table_with_a_byte_order_mark_and_carriage_returns_is_read(
    adopt: Adopt, world: World, tmp_path: Path
) -> None:
    rows = table(world)
    source = write_tsv(tmp_path / "rows.tsv", rows)
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes().replace(b"\n", b"\r\n"))
    assert adopt(source).exit_code == 0
    assert_rows(tmp_path / "mine/A2b", "outside", rows)


# -- what is said and asked -------------------------------------------------------------------------------------------


def test_what_belongs_together_is_checked(adopt: Adopt, cached: World, world: World, tmp_path: Path) -> None:
    rows = table(world)
    source = write_tsv(tmp_path / "rows.tsv", rows)
    (tmp_path / "list.txt").write_text("\n".join(rows))
    older = write_older(tmp_path / "older/A2b", older_tables(world))
    cases: tuple[tuple[tuple[object, ...], str | None, str], ...] = (
        ((source, "--files-list", "list.txt"), "outside", "--files-list"),
        ((older, "--files-list", "list.txt"), None, "--files-list"),
        ((older,), "outside", "--name"),
        ((source,), "../x", "--name"),
        ((source,), "packs", "--name"),
        (("cache/A2b",), None, "already"),
        ((source, "--value-kind", "scores"), "outside", "--value-kind"),
    )
    for arguments, name, reason in cases:
        result = adopt(*arguments, name=name)
        assert result.exit_code == 2, arguments
        assert reason in result.stderr
    assert not (tmp_path / "mine").exists()


def test_an_older_cache_of_one_teacher_may_be_renamed(adopt: Adopt, world: World, tmp_path: Path) -> None:
    rows = table(world)
    assert adopt(write_older(tmp_path / "older/A2b", {"scene": rows}), name="scene_of_before").exit_code == 0
    assert_rows(tmp_path / "mine/A2b", "scene_of_before", rows)


def test_whether_there_is_a_view_can_be_said(adopt: Adopt, world: World, tmp_path: Path) -> None:
    assert adopt(write_tsv(tmp_path / "rows.tsv", table(world)), "--no-files").exit_code == 0
    assert record(tmp_path / "mine/A2b")["files"] is False
    assert not list((tmp_path / "mine/A2b").glob("outside/*.npy"))
    assert adopt(write_tsv(tmp_path / "more.tsv", table(world)), "--files", name="more").exit_code == 0
    assert len(list((tmp_path / "mine/A2b").glob("*/*.npy"))) == 40


def test_names_are_never_printed_raw(adopt: Adopt, world: World, tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("file\ta\n\x1b[31mred\t1\n\x1b[31mred\t2\n")
    result = adopt("rows.tsv")
    assert result.exit_code == 2
    assert "\x1b" not in result.stderr
    assert "\\x1b[31mred" in result.stderr
