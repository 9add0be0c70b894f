"""Features in one HDF5 file: the same arrays and digests as from single files, or refused with the reason."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import REPO, TINY, Run, World

from kd_cache.dataset import packed as packed_features
from kd_cache.dataset import packed_samples
from kd_cache.dataset.features import Feature, FeatureSource
from kd_cache.dataset.packed import PackedFeatures
from kd_cache.errors import FeatureError, UsageError

FILES = ["x/a.npy", "x/deep/b.npy", "ü.npy", "x/c", "d.npy"]


def arrays(dtype: str = "<f4", frames: int = 9, bins: int = 5) -> np.ndarray:
    """[5, T, F]"""
    return np.random.default_rng(7).normal(size=(len(FILES), frames, bins)).astype(dtype)


def as_datasets(path: Path, values: np.ndarray, files: list[str] = FILES, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in zip(files, values, strict=True):
            file.create_dataset(name, data=value, **options)
    return path


def as_rows(path: Path, values: np.ndarray, files: Any = FILES, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=values, **options)
        file["files"] = files
    return path


def refusal(source: PackedFeatures, file: str) -> str:
    """The message that a sample is refused with, alone and among others, and by `shape` unless values are at fault."""
    with pytest.raises(FeatureError) as caught:
        source.read(file)
    (among,) = source.read_many([file])
    assert isinstance(among, FeatureError)
    assert among.message == caught.value.message
    assert source.path.name in among.message
    return among.message


def file_refusal(path: Path) -> str:
    with pytest.raises((FeatureError, UsageError)) as caught:
        PackedFeatures(path)
    assert path.name in caught.value.message
    return caught.value.message


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(1, 9, 5), (2, 9, 5), (3, 4, 2), (5, 1, 5), (5, 9, 5), (4, 8, 4), (1, 1, 1)])
def test_chunks_of_any_shape_are_put_together(tmp_path: Path, chunks: tuple[int, int, int]) -> None:
    values = arrays()
    rows = PackedFeatures(as_rows(tmp_path / "r.h5", values, chunks=chunks, compression="gzip"))
    datasets = PackedFeatures(as_datasets(tmp_path / "d.h5", values, chunks=chunks[1:], compression="gzip"))
    for order in (FILES, FILES[::-1]):
        for source in (rows, datasets):
            for name, found in zip(order, source.read_many(order), strict=True):
                assert isinstance(found, Feature)
                np.testing.assert_array_equal(found.array, values[FILES.index(name)])


def test_samples_may_have_frames_of_their_own(tmp_path: Path) -> None:
    values = [np.full((number + 1, 4), number, "<f4") for number in range(5)]
    source = PackedFeatures(as_datasets(tmp_path / "f.h5", values))  # type: ignore[arg-type]
    assert [source.shape(name) for name in FILES] == [(number + 1, 4) for number in range(5)]
    for name, value in zip(FILES, values, strict=True):
        np.testing.assert_array_equal(source.read(name).array, value)


def test_a_chunk_that_gzip_could_not_shrink_is_read_as_it_is(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 2**16, (5, 64, 64), np.uint16)
    values = (noise & 0xBFFF).view("<f2")  # no exponent of all ones: all finite
    path = as_rows(tmp_path / "f.h5", values, chunks=(1, 64, 64), compression="gzip", compression_opts=1)
    with h5py.File(path) as file:
        left_out = {file["features"].id.get_chunk_info(number).filter_mask for number in range(5)}
    assert left_out <= {0, 1}
    for name, found in zip(FILES, PackedFeatures(path).read_many(FILES), strict=True):
        assert isinstance(found, Feature)
        np.testing.assert_array_equal(found.array, values[FILES.index(name)])


def test_a_filter_that_was_left_out_is_not_undone(tmp_path: Path) -> None:
    value = arrays()[0]
    with h5py.File(tmp_path / "f.h5", "w") as file:
        made = file.create_dataset("plain", (9, 5), "<f4", chunks=(9, 5), compression="gzip", shuffle=True)
        made.id.write_direct_chunk((0, 0), value.tobytes(), filter_mask=0b11)
        made = file.create_dataset("gzip", (9, 5), "<f4", chunks=(9, 5), compression="gzip", shuffle=True)
        made.id.write_direct_chunk((0, 0), zlib.compress(value.tobytes()), filter_mask=0b01)
    for name in ("plain", "gzip"):
        np.testing.assert_array_equal(PackedFeatures(tmp_path / "f.h5").read(name).array, value)


def test_a_user_block_moves_nothing(tmp_path: Path) -> None:
    values = arrays()
    with h5py.File(tmp_path / "f.h5", "w", userblock_size=1024) as file:
        file["features"], file["files"] = values, FILES
    np.testing.assert_array_equal(PackedFeatures(tmp_path / "f.h5").read(FILES[3]).array, values[3])
    with h5py.File(tmp_path / "c.h5", "w", userblock_size=1024) as file:
        file.create_dataset("features", data=values, chunks=True)
        file["files"] = FILES
    assert "user block" in file_refusal(tmp_path / "c.h5")


def test_a_sample_that_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    source = PackedFeatures(as_rows(tmp_path / "f.h5", arrays()))
    assert "feature x/none.npy" in refusal(source, "x/none.npy")
    assert "does not exist" in refusal(source, "x/none.npy")
    with pytest.raises(FeatureError, match=r"holds 5 samples, such as x/a\.npy"):
        source.shape("x/none.npy")


def test_paths_to_datasets_are_meant_as_hdf5_means_them_and_names_in_a_list_exactly(tmp_path: Path) -> None:
    odd = ["x//a.npy", "/x/./deep/b.npy", "./d.npy"]
    datasets, rows = (way(tmp_path / f"{name}.h5", arrays()) for name, way in (("d", as_datasets), ("r", as_rows)))
    for name in odd:
        with h5py.File(datasets) as file:
            np.testing.assert_array_equal(PackedFeatures(datasets).read(name).array, file[name][()])
        assert "does not exist" in refusal(PackedFeatures(rows), name)
    both = as_rows(tmp_path / "u.h5", arrays()[:2], ["\u00fc.npy", "u\u0308.npy"])
    for name, value in zip(["\u00fc.npy", "u\u0308.npy"], arrays(), strict=False):
        np.testing.assert_array_equal(PackedFeatures(both).read(name).array, value)


def test_names_are_told_apart_even_if_their_hashes_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_samples.xxhash, "xxh3_64_intdigest", lambda name: 5)
    source = PackedFeatures(as_rows(tmp_path / "f.h5", arrays()))
    for name, value in zip(FILES, arrays(), strict=True):
        np.testing.assert_array_equal(source.read(name).array, value)
    assert "does not exist" in refusal(source, "e.npy")
    assert "x/a.npy more than once" in file_refusal(
        as_rows(tmp_path / "t.h5", arrays(), ["x/a.npy", "b", "c", "x/a.npy", "d"])
    )


# -- what is refused ---------------------------------------------------------------------------------------------------


def _external(file: Any) -> None:
    here = Path(file.filename).parent
    (here / "raw").write_bytes(bytes(180))
    file.create_dataset("bad", (9, 5), "<f4", external=[(str(here / "raw"), 0, 180)])


def _virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((9, 5), "<f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (9, 5))
    file.create_virtual_dataset("bad", layout)


def _compact(file: Any) -> None:
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((9, 5))
    h5py.h5d.create(file.id, b"bad", h5py.h5t.IEEE_F32LE, space, settings).write(
        h5py.h5s.ALL, h5py.h5s.ALL, arrays()[0]
    )


def _half_written(file: Any) -> None:
    file.create_dataset("bad", (9, 5), "<f4", chunks=(3, 5))[:6] = 1


def _chunk(content: bytes) -> Callable[[Any], None]:
    def make(file: Any) -> None:
        made = file.create_dataset("bad", (9, 5), "<f4", chunks=(9, 5), compression="gzip")
        made.id.write_direct_chunk((0, 0), content)

    return make


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "float64": (lambda file: file.create_dataset("bad", data=np.zeros((9, 5))), "not float32 or float16"),
    "big-endian": (lambda file: file.create_dataset("bad", data=np.zeros((9, 5), ">f4")), "not float32 or float16"),
    "integers": (lambda file: file.create_dataset("bad", data=np.zeros((9, 5), "<i4")), "not float32 or float16"),
    "compound": (lambda file: file.create_dataset("bad", (9, 5), [("a", "<f4")]), "not float32 or float16"),
    "references": (lambda file: file.create_dataset("bad", (9, 5), h5py.ref_dtype), "not float32 or float16"),
    "strings": (lambda file: file.create_dataset("bad", (9, 5), h5py.string_dtype()), "not float32 or float16"),
    "vector": (lambda file: file.create_dataset("bad", data=np.zeros(5, "<f4")), "its shape is [5]"),
    "scalar": (lambda file: file.create_dataset("bad", data=np.float32(1)), "its shape is []"),
    "nothing": (lambda file: file.create_dataset("bad", data=h5py.Empty("<f4")), "its shape is []"),
    "three axes": (lambda file: file.create_dataset("bad", data=np.zeros((1, 9, 5), "<f4")), "its shape is [1, 9, 5]"),
    "no frames": (lambda file: file.create_dataset("bad", data=np.zeros((0, 5), "<f4")), "its shape is [0, 5]"),
    "2**40 values": (lambda file: file.create_dataset("bad", (1 << 20, 1 << 20), "<f4"), "never written"),
    "2**40 frames": (lambda file: file.create_dataset("bad", (1 << 40, 1), "<f4", chunks=(1, 1)), "its shape is"),
    "never written": (lambda file: file.create_dataset("bad", (9, 5), "<f4"), "never written"),
    "half written": (_half_written, "never written, or not whole"),
    "chunks never written": (lambda file: file.create_dataset("bad", (9, 5), "<f4", chunks=True), "never written"),
    "external storage": (_external, "lies in another file"),
    "virtual": (_virtual, "lies in another file"),
    "compact": (_compact, "compact"),
    "soft link": (lambda file: file.__setitem__("bad", h5py.SoftLink("/good")), "link to elsewhere"),
    "external link": (lambda file: file.__setitem__("bad", h5py.ExternalLink("x.h5", "/good")), "link to elsewhere"),
    "a type": (lambda file: file.__setitem__("bad", np.dtype("<f4")), "not a dataset"),
    "lzf": (lambda file: file.create_dataset("bad", data=arrays()[0], compression="lzf"), "otherwise than by gzip"),
    "scale": (lambda file: file.create_dataset("bad", data=arrays()[0], scaleoffset=3), "otherwise than by gzip"),
    "fletcher": (lambda file: file.create_dataset("bad", data=arrays()[0], fletcher32=True), "otherwise than by gzip"),
    "not gzip": (_chunk(b"x" * 50), "incorrect header check"),
    "cut gzip": (_chunk(zlib.compress(arrays()[0].tobytes())[:-9]), "not whole"),
    "gzip of less": (_chunk(zlib.compress(bytes(10))), "has 10 bytes, expected 180"),
    "gzip bomb": (_chunk(zlib.compress(bytes(1 << 24))), "not whole"),
    "gzip and more": (_chunk(zlib.compress(arrays()[0].tobytes()) + b"more"), "not whole"),
    "not finite": (lambda file: file.create_dataset("bad", data=np.full((9, 5), np.inf, "<f4")), "is inf"),
    "too large": (lambda file: file.create_dataset("bad", data=np.zeros((90, 50), "<f4")), "--max-feature-bytes"),
    "large chunks": (
        lambda file: file.create_dataset("bad", (9, 5), "<f4", chunks=(1 << 13, 1 << 12), maxshape=(None, None)),
        "",
    ),
}


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD)
def test_each_way_to_be_no_feature_is_refused_and_leaves_the_others_readable(
    tmp_path: Path, make: Callable[[Any], Any], reason: str
) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["good"] = arrays()[0]
        make(file)
    source = PackedFeatures(tmp_path / "f.h5", max_bytes=200)
    message = refusal(source, "bad")
    assert message.startswith("feature bad (in ")
    assert reason in message
    np.testing.assert_array_equal(source.read("good").array, arrays()[0])


def _as(features: Any, files: Any) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file["features"], file["files"] = features, files

    return make


def _group_in_itself(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["a/b"] = arrays()[0]
        file["a/again"] = file["a"]


def _cut(path: Path) -> None:
    content = as_rows(path, arrays()).read_bytes()
    path.write_bytes(content[: len(content) // 2])


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "not a regular file"),
    "fifo": (os.mkfifo, "not a regular file"),
    "empty": (lambda path: path.write_bytes(b""), "HDF5 cannot read it"),
    "text": (lambda path: path.write_text("features"), "HDF5 cannot read it"),
    "an array": (lambda path: np.save(path.open("wb"), arrays()), "HDF5 cannot read it"),
    "cut": (_cut, "HDF5 cannot read it"),
    "groups in themselves": (_group_in_itself, "nested in themselves"),
    "a name twice": (_as(arrays(), ["a", "b", "c", "b", "d"]), "b more than once"),
    "fewer names": (_as(arrays(), FILES[:4]), "expected [5], one for each row"),
    "names are numbers": (_as(arrays(), np.arange(5)), "its files are not strings"),
    "names of 5000 bytes": (_as(arrays(), np.array(["a" * 5000] * 5, "S")), "more than 4096 bytes"),
    "one long name": (_as(arrays(), [*FILES[:4], "a" * 5000]), "more than 4096 bytes"),
    "rows of vectors": (_as(arrays()[:, 0], FILES), "expected [samples, frames, bins]"),
    "rows of float64": (_as(arrays().astype("f8"), FILES), "not float32 or float16"),
    "features are a link": (_as(h5py.SoftLink("/x"), FILES), "features is a link to elsewhere"),
    "files are a link": (_as(arrays(), h5py.ExternalLink("x.h5", "/x")), "files is a link to elsewhere"),
}


@pytest.mark.parametrize(("make", "reason"), BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_each_way_to_be_no_file_of_features_is_refused(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path / "f.h5")
    assert reason in file_refusal(tmp_path / "f.h5")


@pytest.mark.parametrize("script", ["kill -SEGV $$", "exit 1", "echo nonsense", "printf ''", "printf 'PK\\003\\004'"])
def test_a_crash_of_libhdf5_is_an_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = as_rows(tmp_path / "f.h5", arrays())
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    assert "the file is damaged" in file_refusal(path)


def test_flipped_bits_are_an_error_or_some_values_and_never_a_crash(tmp_path: Path) -> None:
    # Names of any length are what libhdf5 crashed and hung on: 21 of some 3,000 flips.
    good = as_rows(tmp_path / "f.h5", arrays()).read_bytes()
    random = np.random.default_rng(4)
    used = np.flatnonzero(np.frombuffer(good, np.uint8))
    for _ in range(10):
        flipped = bytearray(good)
        flipped[random.choice(used)] ^= 1 << random.integers(8)
        (tmp_path / "f.h5").write_bytes(flipped)
        try:
            found = PackedFeatures(tmp_path / "f.h5").read_many(FILES)
        except FeatureError:
            continue
        assert all(isinstance(one, FeatureError | Feature) for one in found)


# -- a file that changes -----------------------------------------------------------------------------------------------


def test_a_file_that_was_changed_or_replaced_is_read_no_more(tmp_path: Path) -> None:
    path = as_rows(tmp_path / "f.h5", arrays(), chunks=True, compression="gzip")
    source, other = PackedFeatures(path), PackedFeatures(path)
    kept = pickle.dumps(source)
    assert (source.stat_many(FILES) > 0).all()
    with h5py.File(path, "r+") as file:
        file["features"][0] = 1
    for one in (source, pickle.loads(kept)):  # noqa: S301 (what DataLoader does)
        assert "was changed while it was in use" in refusal(one, FILES[1])
        assert (one.stat_many(FILES) == -1).all()
    os.truncate(path, 3000)
    assert "was changed while it was in use" in refusal(other, FILES[4])
    as_rows(path, arrays())
    before = PackedFeatures(path)
    as_rows(tmp_path / "new.h5", arrays() + 1).replace(path)
    assert "was changed while it was in use" in refusal(before, FILES[1])
    np.testing.assert_array_equal(PackedFeatures(path).read(FILES[1]).array, arrays()[1] + 1)


def test_a_few_unpacked_chunks_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [f"{number}.npy" for number in range(60)]
    values = np.random.default_rng(1).normal(size=(60, 9, 5)).astype("<f4")
    source = PackedFeatures(as_rows(tmp_path / "f.h5", values, files, chunks=(4, 9, 5), compression="gzip"))
    monkeypatch.setattr(packed_features, "_MOST_CHUNK", 3 * 4 * 180)  # room for three
    for number in np.random.default_rng(0).permutation(60).tolist():
        np.testing.assert_array_equal(source.read(files[number]).array, values[number])
        assert len(source._unpacked) <= 4


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["datasets", "rows"])
def packed(world: World, request: pytest.FixtureRequest) -> Path:
    """The world's features in one file, and the single ones gone elsewhere."""
    path = world.root / "packed.h5"
    if request.param == "rows":
        for row in world.rows:
            world.write_feature(row["file"], np.load(world.feature(row["file"]))[:12])
    values = {row["file"]: np.load(world.feature(row["file"])) for row in world.rows}
    if request.param == "rows":
        as_rows(path, np.stack(list(values.values())), list(values))
    else:
        as_datasets(path, list(values.values()), list(values))  # type: ignore[arg-type]
    return path


def _put_away(world: World) -> None:
    shutil.move(world.root / "x", world.root / "away")


def test_rows_scored_from_files_are_fresh_for_packed_features_and_equal(
    dump: Run, run: Run, world: World, packed: Path
) -> None:
    dump("--batch-size", 4)
    reference = world.packs()
    _put_away(world)
    again = dump("--batch-size", 4, "--features", packed)
    assert again.exit_code == 0, again.output
    assert "Nothing to score" in again.stdout
    assert world.packs() == reference
    shutil.rmtree(world.cache)
    assert dump("--batch-size", 4, "--features", packed, "--workers", 0).exit_code == 0
    assert world.packs() == reference
    paths = json.loads((world.cache / "cache_index.json").read_text())["kd_cache"]["settings"]["paths"]
    assert paths["features"] == str(packed)


def test_later_commands_read_the_features_that_the_dump_read(dump: Run, run: Run, world: World, packed: Path) -> None:
    (world.root / "away").mkdir()
    _put_away(world)
    assert dump("--features", packed).exit_code == 0
    for command in (("verify", "--all"), ("verify", "--all", "--recompute", *TINY), ("repair", *TINY)):
        result = run(*command)
        assert result.exit_code == 0, result.output
    moved = packed.rename(world.root / "moved.h5")
    lost = run("verify", "--all")
    assert lost.exit_code == 2
    assert "packed.h5" in lost.stderr
    assert run("verify", "--all", "--features", moved).exit_code == 0
    with_files = run("verify", "--all", "--data-root", world.root)
    assert with_files.exit_code == 1
    assert "does not exist" in with_files.output
    shutil.rmtree(world.root / "x", ignore_errors=True)
    shutil.move(world.root / "away" / "x", world.root / "x")
    assert run("verify", "--all", "--data-root", world.root).exit_code == 0


def test_parts_are_sealed_and_merged_with_packed_features(dump: Run, run: Run, world: World, packed: Path) -> None:
    _put_away(world)
    dump("--features", packed, "--cache-root", "whole")
    for part in ("0/2", "1/2"):
        assert dump("--features", packed, "--shard", part).exit_code == 0
    assert run("seal", "--target", "b").exit_code == 0
    whole = {path.name for path in (world.root / "whole/A2b/packs").iterdir()}
    assert set(world.packs()) == whole
    merged = run("merge", world.cache, "--target", "b", "--cache-root", "merged")
    assert merged.exit_code == 0, merged.output
    assert run("verify", "--cache-root", "merged", "--all").exit_code == 0


def test_a_sample_that_the_file_lacks_is_named_with_the_file(dump: Run, world: World) -> None:
    lacking = world.permitted()[3]
    values = {file: np.load(world.feature(file)) for file in world.permitted() if file != lacking}
    path = as_datasets(world.root / "packed.h5", list(values.values()), list(values))  # type: ignore[arg-type]
    result = dump("--features", path)
    assert result.exit_code == 1
    assert lacking in result.stderr
    assert "packed.h5" in result.stderr
    skipping = dump("--features", path, "--on-bad-sample", "skip")
    assert skipping.exit_code == 3
    assert lacking in skipping.output


def test_a_student_reads_the_packed_features(dump: Run, world: World, packed: Path) -> None:
    import torch

    from kd_cache import student_loader

    dump("--features", packed)
    options: dict[str, Any] = {"batch_size": 4, "shuffle": False}
    single = list(student_loader(world.json_path, world.root, world.cache, **options))
    _put_away(world)
    for workers in (0, 2):
        loader = student_loader(
            world.json_path, world.root, world.cache, features=packed, num_workers=workers, **options
        )
        for one, other in zip(single, loader, strict=True):
            assert one["path"] == other["path"]
            assert torch.equal(one["features"], other["features"])
            assert torch.equal(one["teacher_logits"], other["teacher_logits"])


def test_the_documented_snippet_makes_such_a_file(tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (REPO / "docs/features.md").read_text(), re.DOTALL)
    (snippet,) = [text for text in snippets if "h5py" in text]
    (tmp_path / "data").symlink_to(REPO / "data")
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    source, single = PackedFeatures(tmp_path / "features.h5"), FeatureSource(REPO / "data/sample")
    train = json.loads((REPO / "data/sample/dataset.json").read_text())["train"]
    for sample in train[::50]:
        assert source.read(sample["file"]).digest == single.read(sample["file"]).digest
