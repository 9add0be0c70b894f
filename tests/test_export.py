"""``kd-cache export``: what other programs get is what a student is served, whole, named and exact."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Run, World
from store_fixtures import (
    MadeCache,
    Rows,
    flipping,
    make_cache,
    md5,
    names,
    no_file_over,
    origin,
    snapshot,
    two_teachers,
)

from kd_cache import CorruptError, LogitCache, MissingLogitsError, StoreError, UsageError, load_cached_logits_batch
from kd_cache.exchange.export import FORMATS, ExportJob, ExportReport, export_logits
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import read_index
from kd_cache.watch import Watcher

NOTHING_ODD = ["plain.npy", "x/y.npy"]
ODD = [
    "with\ttab.npy",
    "with\nline.npy",
    'with "quotes".npy',
    "métro/ünï.npy",
    " led by a space",
    "cr\r.npy",
    "'",
    "\\t",
]


class Notes(Watcher):
    def __init__(self) -> None:
        self.all: list[str] = []

    def note(self, text: str) -> None:
        self.all.append(text)


def export(cache: MadeCache, to: str, output: Path | None, **more: object) -> ExportReport:
    return export_logits(ExportJob(CacheFolder(cache.path), to, output, **more))  # type: ignore[arg-type]


def read_table(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    with path.open(newline="", encoding="utf-8") as text:
        header, *rows = csv.reader(text, delimiter="\t")
    return header, {row[0]: row[1:] for row in rows}


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


# -- a tensor and its list --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("packs", [1, 3])
def test_a_tensor_is_bare_and_its_list_says_whose_row_is_whose(tmp_path: Path, dtype: str, packs: int) -> None:
    cache = two_teachers(tmp_path / "A2b", count=50, dtype=dtype, packs=packs)
    report = export(cache, "pt", tmp_path / "out")
    for name in ("city2scene", "scene"):
        table = torch.load(tmp_path / "out" / f"{name}.pt", weights_only=True)
        told = json.loads((tmp_path / "out" / f"{name}.files.json").read_text())
        assert type(table) is torch.Tensor
        assert table.dtype == (torch.float32 if dtype == "fp32" else torch.float16)
        assert table.shape == (50, 3)
        assert told["files"] == sorted(cache.rows[name].files, key=md5)
        assert bits(table.numpy()) == bits(np.stack([cache.oracle(name, file) for file in told["files"]]))
        assert told["sha256"] == hashlib.sha256(bits(table.numpy())).hexdigest()
        made_by = cache.origins[name]
        assert (told["teacher"], told["fingerprint"]) == (name, made_by.fingerprint.digest)
        assert told["parts"] == dict(made_by.fingerprint.parts)
        assert (told["value_kind"], told["class_names"]) == ("logits", None)
        assert (told["dtype"], told["rows"]) == (dtype, 50)
    assert report.num_samples == 50
    assert [(one.teacher, one.rows) for one in report.teachers] == [("city2scene", 50), ("scene", 50)]
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert len(written) == 4
    assert report.teachers[0].bytes == written["city2scene.pt"] + written["city2scene.files.json"]


def test_equal_rows_are_equal_files_whatever_packs_they_lie_in(tmp_path: Path) -> None:
    for number, packs in enumerate((1, 4)):
        cache = two_teachers(tmp_path / str(number) / "A2b", packs=packs)
        for to in ("pt", "tsv"):
            export(cache, to, tmp_path / f"out{number}")
    assert snapshot(tmp_path / "out0") == snapshot(tmp_path / "out1")


def test_a_table_of_many_rows_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    count, classes = 20_000, 500
    files = sorted(names(count), key=md5)
    keys = np.frombuffer(b"".join(map(md5, files)), np.uint8).reshape(-1, 16)
    logits = np.random.default_rng(0).normal(size=(count, classes)).astype("<f4")
    made_by = origin("scene", classes)
    (tmp_path / "A2b" / "packs").mkdir(parents=True)
    rows = Rows(files, keys, keys, logits)
    rows.write(tmp_path / "A2b" / "packs", made_by)
    cache = MadeCache(tmp_path / "A2b", {"scene": rows}, {"scene": made_by})
    cache.write_index()
    tracemalloc.start()
    try:
        export(cache, "pt", tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < logits.nbytes / 2
    assert torch.equal(torch.load(tmp_path / "out" / "scene.pt", weights_only=True), torch.from_numpy(logits))


# -- a table of text --------------------------------------------------------------------------------------------------


def test_a_table_names_files_and_classes_and_survives_odd_names(tmp_path: Path) -> None:
    rows = Rows.of([*NOTHING_ODD, *ODD], classes=3)
    made_by = origin("scene", 3)
    named = type(made_by)("scene", made_by.fingerprint, "logits", 3, "fp32", ("bus", "tram, or\ttrain", "métro"))
    export(make_cache(tmp_path / "A2b", {"scene": rows}, {"scene": named}), "tsv", tmp_path / "out")
    header, found = read_table(tmp_path / "out" / "scene.tsv")
    assert header == ["file", "bus", "tram, or\ttrain", "métro"]
    assert list(found) == rows.files
    for file, row in rows.by_file().items():
        assert bits(np.array(found[file], np.float64).astype("<f4")) == bits(row)


def test_class_names_that_cannot_be_columns_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    class_names = ("bus", "file", "tram")
    made_by = origin("scene", 3)
    named = type(made_by)("scene", made_by.fingerprint, "logits", 3, "fp32", class_names)
    cache = make_cache(tmp_path / "A2b", {"scene": Rows.of(names(4))}, {"scene": named})
    with pytest.raises(UsageError, match="columns") as caught:
        export(cache, "tsv", tmp_path / "out")
    assert "--to pt" in str(caught.value)
    assert not (tmp_path / "out").exists()
    export(cache, "pt", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "scene.files.json").read_text())["class_names"] == list(class_names)


def test_every_half_precision_number_is_read_again_as_it_was() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    again = np.array([float(FORMATS["fp16"] % value) for value in every.tolist()]).astype(np.float16)
    assert bits(again) == bits(every)


# -- plain files ------------------------------------------------------------------------------------------------------


def test_files_elsewhere_are_those_of_the_view_and_work_by_their_index(
    run: Run, cached: World, world: World, tmp_path: Path
) -> None:
    assert run("export", "--to", "npy", "--output", "out").exit_code == 0
    for name in ("tiny", "other"):
        assert snapshot(tmp_path / "out" / name) == snapshot(world.cache / name)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert set(index) == {"tiny", "other", "num_samples"}
    assert index["num_samples"] == 20
    assert set(index["tiny"]) == set(world.permitted())
    files = world.permitted()
    expected = np.stack([np.load(world.view("tiny", file)) for file in files])
    assert bits(load_cached_logits_batch(index, files, teacher="tiny")) == bits(expected)


def test_an_export_over_an_earlier_one_leaves_no_row_that_is_not_served(tmp_path: Path) -> None:
    export(two_teachers(tmp_path / "before" / "A2b", count=40), "npy", tmp_path / "out")
    mine = {"notes.txt": b"mine", f"{'1' * 32}.npy": b"mine", f"{md5(names(40)[-1]).hex()}.npy": b"mine now"}
    for name, content in mine.items():
        (tmp_path / "out" / "scene" / name).write_bytes(content)
    cache = two_teachers(tmp_path / "after" / "A2b", count=30)
    heard = Notes()
    job = ExportJob(CacheFolder(cache.path), "npy", tmp_path / "out", overwrite=True)
    export_logits(job, heard)
    held = {path.name: path.read_bytes() for path in (tmp_path / "out" / "scene").iterdir()}
    assert held.keys() == {f"{md5(file).hex()}.npy" for file in names(30)} | mine.keys()
    assert held.items() >= mine.items()
    assert [note for note in heard.all if "2 files in" in note]


def test_a_folder_of_somebody_s_own_row_files_loses_none_to_an_export(tmp_path: Path) -> None:
    cache = two_teachers(tmp_path / "A2b", count=3)
    mine = tmp_path / "out" / "scene"
    mine.mkdir(parents=True)
    for file in names(3, start=20):
        np.save(mine / f"{md5(file).hex()}.npy", np.zeros(3, np.float32))
    before = snapshot(mine)
    export(cache, "npy", tmp_path / "out", overwrite=True)
    assert snapshot(mine).items() >= before.items()


def test_the_view_of_a_cache_without_files_is_made_from_its_packs(
    run: Run, cached: World, dump: Run, world: World
) -> None:
    with_files = {name: snapshot(world.cache / name) for name in ("tiny", "other")}
    expected = json.loads((world.cache / "cache_index.json").read_text())
    dump("--no-files")
    before = read_index(world.cache / "cache_index.json").record
    assert not list((world.cache / "tiny").glob("*.npy"))
    result = run("export", "cache/A2b", "--to", "npy", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["teachers"]["tiny"] == {
        "rows": 20,
        "bytes": sum(map(len, with_files["tiny"].values())),
        "path": "cache/A2b/tiny",
    }
    assert {name: snapshot(world.cache / name) for name in ("tiny", "other")} == with_files
    found = json.loads((world.cache / "cache_index.json").read_text())
    assert {name: found[name] for name in ("tiny", "other")} == {name: expected[name] for name in ("tiny", "other")}
    after = read_index(world.cache / "cache_index.json").record
    assert {**after, "files": False, "digest": ""} == {**before, "digest": ""}
    assert after["files"] is True
    assert run("verify", *TINY, "--all").exit_code == 0
    assert json.loads(dump("--json").stdout)["samples_scored"] == 0


def test_an_index_that_changes_while_the_view_is_made_is_never_overwritten(dump: Run, world: World) -> None:
    dump("--no-files")
    index = world.cache / "cache_index.json"
    content = index.read_bytes()

    class Meanwhile(Watcher):
        def stage(self, name: str, total: int) -> None:
            index.unlink()
            index.write_bytes(content)

    with pytest.raises(StoreError, match="changed while"):
        export_logits(ExportJob(CacheFolder(world.cache), "npy", None), Meanwhile())
    assert index.read_bytes() == content


def test_a_view_is_of_all_teachers_and_only_npy_goes_into_the_cache(run: Run, cached: World, world: World) -> None:
    before = snapshot(world.cache)
    for arguments, reason in (
        (("--to", "pt"), "--output"),
        (("--to", "tsv"), "--output"),
        (("--to", "npy", "--only", "tiny"), "all its teachers"),
        (("--to", "pt", "--output", "cache/A2b"), "cache"),
        (("--to", "npy", "--output", "cache/A2b/mine"), "cache"),
        (("--to", "h5", "--output", "out"), "--to"),
        (("--output", "out"), "--to"),
    ):
        result = run("export", *arguments)
        assert result.exit_code == 2, arguments
        assert reason in result.stderr
    assert snapshot(world.cache) == before
    assert not Path("out").exists()


# -- which rows -------------------------------------------------------------------------------------------------------


def test_only_rows_that_a_student_would_be_served_are_exported(cached: World, run: Run, world: World) -> None:
    made_by = read_index(world.cache / "cache_index.json").origins["tiny"]
    packs = world.cache / "packs"
    files = world.permitted()
    Rows.of(["x/never-permitted.npy"], classes=10).write(packs, made_by)
    Rows.of(files[:1], classes=10, inputs=7).write(packs, made_by)  # from another feature, by a dump under way
    Rows.of(files, classes=10).write(packs, origin("tiny", 10, weights="of before"))
    served = set(LogitCache.open(world.cache, ["tiny"]).files)
    assert served == set(files)
    for to in ("pt", "tsv", "npy"):
        assert run("export", "--to", to, "--output", f"out-{to}", "--only", "tiny").exit_code == 0
    assert set(json.loads(Path("out-pt/tiny.files.json").read_text())["files"]) == served
    assert set(read_table(Path("out-tsv/tiny.tsv"))[1]) == served
    assert set(json.loads(Path("out-npy/index.json").read_text())["tiny"]) == served


def test_samples_are_complete_where_every_exported_teacher_holds_them(tmp_path: Path) -> None:
    rows = {"a": Rows.of(names(10)), "b": Rows.of(names(10, 4))}
    cache = make_cache(tmp_path / "A2b", rows, {name: origin(name) for name in rows})
    assert export(cache, "tsv", tmp_path / "out").num_samples == 6
    assert export(cache, "npy", tmp_path / "files").num_samples == 6
    assert json.loads((tmp_path / "files" / "index.json").read_text())["num_samples"] == 6
    assert export(cache, "pt", tmp_path / "one", only=["b"]).num_samples == 10


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["pt", "tsv", "npy"])
def test_a_damaged_pack_is_corrupt_and_nothing_is_written(dump: Run, run: Run, world: World, to: str) -> None:
    dump("--no-files")
    (pack,) = (world.cache / "packs").glob("other-*.h5")
    before = snapshot(world.root)
    with flipping(pack) as flip:
        flip(8 * (pack.stat().st_size - 30))
        for arguments in (("--output", "out"), ()) if to == "npy" else (("--output", "out"),):
            result = run("export", "--to", to, *arguments)
            assert result.exit_code == 4
            assert pack.name in result.stderr
            assert not Path("out").exists()
        if to != "npy":
            assert run("export", "--to", to, "--output", "out", "--only", "tiny").exit_code == 0
            assert {path.stem.split(".")[0] for path in Path("out").iterdir()} == {"tiny"}
    after = {name: content for name, content in snapshot(world.root).items() if not name.startswith("out/")}
    assert after == before


def test_a_pack_that_the_index_names_and_that_is_gone_is_a_miss(dump: Run, run: Run, world: World) -> None:
    dump("--no-files")
    for pack in (world.cache / "packs").glob("tiny-*.h5"):
        pack.unlink()
    for arguments in ((), ("--output", "out")):
        result = run("export", "--to", "npy", *arguments)
        assert result.exit_code == 3
        assert "tiny" in result.stderr
    assert not (world.cache / "tiny").exists() or not list((world.cache / "tiny").glob("*.npy"))


@pytest.mark.parametrize("to", ["pt", "tsv", "npy"])
def test_what_exists_is_replaced_only_when_asked(tmp_path: Path, to: str) -> None:
    cache = two_teachers(tmp_path / "A2b")
    export(cache, to, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    with pytest.raises(UsageError, match="exist already") as caught:
        export(cache, to, tmp_path / "out")
    assert "--overwrite" in str(caught.value)
    assert "scene" in str(caught.value)
    assert snapshot(tmp_path / "out") == before
    export(cache, to, tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path / "out") == before


def test_a_link_in_the_place_of_an_export_is_neither_followed_nor_replaced_unasked(tmp_path: Path) -> None:
    cache = two_teachers(tmp_path / "A2b")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scene.tsv").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"scene\.tsv"):
        export(cache, "tsv", tmp_path / "out")
    export(cache, "tsv", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "scene").symlink_to(tmp_path / "A2b" / "scene")
    before = snapshot(tmp_path / "A2b")
    with pytest.raises(StoreError, match="link"):
        export(cache, "npy", tmp_path / "files", overwrite=True)
    assert snapshot(tmp_path / "A2b") == before


@pytest.mark.parametrize("to", ["pt", "tsv", "npy"])
def test_a_full_disk_is_said_and_leaves_no_half_file_and_no_wrong_pair(tmp_path: Path, to: str) -> None:
    cache = two_teachers(tmp_path / "A2b", count=400)
    (tmp_path / "out").mkdir()
    with no_file_over(100 if to == "npy" else 4000), pytest.raises(StoreError, match="scene") as caught:
        export(cache, to, tmp_path / "out")
    assert "File too large" in str(caught.value)
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left == []


def test_an_export_that_fails_half_way_leaves_no_tensor_beside_the_list_of_another(tmp_path: Path) -> None:
    export(two_teachers(tmp_path / "before" / "A2b", count=400), "pt", tmp_path / "out")
    after = two_teachers(tmp_path / "after" / "A2b", count=300)
    export(after, "pt", tmp_path / "whole", only=["city2scene"])
    sizes = [path.stat().st_size for path in (tmp_path / "whole").iterdir()]
    for most in (0, *[size - 1 for size in sizes], max(sizes) // 2):
        with no_file_over(most), pytest.raises(StoreError):
            export(after, "pt", tmp_path / "out", overwrite=True)
        for tensor in (tmp_path / "out").glob("*.pt"):
            told = tensor.with_suffix(".files.json")
            rows = torch.load(tensor, weights_only=True)
            if told.exists():
                assert json.loads(told.read_text())["sha256"] == hashlib.sha256(bits(rows.numpy())).hexdigest()
        assert not list((tmp_path / "out").glob(".tmp-*"))


def test_which_cache_is_meant_must_be_said_where_there_are_several(run: Run, cached: World, world: World) -> None:
    assert run("export", "--to", "tsv", "--output", "one").exit_code == 0
    run("dump", "--target", "c", "--json-path", world.json_path, *TINY, "--only", "tiny")
    result = run("export", "--to", "tsv", "--output", "two")
    assert result.exit_code == 2
    assert "cache/A2b" in result.stderr
    assert "cache/A2c" in result.stderr
    assert run("export", "cache/A2c/cache_index.json", "--to", "tsv", "--output", "two").exit_code == 0
    assert os.listdir("two") == ["tiny.tsv"]


def test_a_cache_of_no_teacher_has_nothing_to_export(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "A2b", {"scene": Rows.of(names(3))}, {"scene": origin()})
    cache.rows, cache.origins = {"scene": cache.rows["scene"]}, {}
    cache.write_index()
    with pytest.raises(MissingLogitsError, match="any teacher"):
        export(cache, "pt", tmp_path / "out")


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreError, match="out"):
        export(two_teachers(tmp_path / "A2b"), "pt", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_rows_that_rot_between_two_looks_are_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = two_teachers(tmp_path / "A2b")
    (pack,) = (cache.path / "packs").glob("scene-*.h5")
    mkdir = os.mkdir

    def rotting(*args: Any, **options: Any) -> None:
        """The folder is made when everything was found to be whole."""
        flip(8 * (pack.stat().st_size // 2))
        mkdir(*args, **options)

    with flipping(pack) as flip:
        monkeypatch.setattr(os, "mkdir", rotting)
        with pytest.raises(CorruptError):
            export(cache, "tsv", tmp_path / "out", only=["scene"])
    assert os.listdir(tmp_path / "out") == []


# -- what is said -----------------------------------------------------------------------------------------------------


def test_what_opening_warns_of_is_noted(tmp_path: Path) -> None:
    cache = two_teachers(tmp_path / "A2b")
    cache.write_index(entries={"scene": {"adopted": {"source": "scene.tsv", "rows": 40}}})
    notes = Notes()
    export_logits(ExportJob(CacheFolder(cache.path), "tsv", tmp_path / "out"), notes)
    assert len(notes.all) == 1
    assert "scene" in notes.all[0]
    assert "adopted" in notes.all[0]


def test_the_outcome_is_a_table_or_pure_json(run: Run, cached: World, world: World) -> None:
    shown = run("export", "--to", "tsv", "--output", "out").stdout
    for fact in ("tiny", "other", "20", "out/tiny.tsv", "KB"):
        assert fact in shown
    content = json.loads(run("export", "--to", "pt", "--output", "out", "--json").stdout)
    assert content["cache"] == "cache/A2b"
    assert content["to"] == "pt"
    assert content["num_samples"] == 20
    size = sum(Path(name).stat().st_size for name in ("out/tiny.pt", "out/tiny.files.json"))
    assert content["teachers"]["tiny"] == {"rows": 20, "bytes": size, "path": "out/tiny.pt"}


def test_an_export_reads_neither_manifest_nor_features(run: Run, cached: World, world: World) -> None:
    for path in (world.root / "x").iterdir():
        path.unlink()
    world.json_path.unlink()
    assert run("export", "--to", "tsv", "--output", "out").exit_code == 0
    assert len(read_table(Path("out/tiny.tsv"))[1]) == 20


def test_the_bytes_of_a_table_stay_the_same(tmp_path: Path) -> None:
    """Other programs parse them."""
    rows = Rows.of(["a.npy", 'b "x"\t.npy', "c\r.npy"], classes=2)
    rows.logits[:] = [[1.5, -0.1], [-0.0, 3e-12], [1e38, 7]]
    assert rows.files == ["c\r.npy", 'b "x"\t.npy', "a.npy"]
    export(make_cache(tmp_path / "A2b", {"scene": rows}, {"scene": origin(classes=2)}), "tsv", tmp_path / "out")
    assert (tmp_path / "out" / "scene.tsv").read_bytes() == (
        b"file\tlogit_0\tlogit_1\n"
        b'"c\r.npy"\t1.5\t-0.100000001\n'
        b'"b ""x""\t.npy"\t-0\t2.99999999e-12\n'
        b"a.npy\t9.99999968e+37\t7\n"
    )
