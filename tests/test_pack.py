"""Packs: the bytes on disk, who else can read them, and every way in which one can be wrong."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import stat
import struct
import tempfile
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash
from hostile_stores import STRUCTURES, Build, attribute, changed
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import Rows, byte_rows, checksums, forge, md5, names, origin, plain_pack, seal_bytes

from kd_cache.errors import CorruptError, KDCacheError, StoreError
from kd_cache.files import atomic, mapped
from kd_cache.files import hdf5 as hdf5_file
from kd_cache.store import pack as pack_module
from kd_cache.store.cache import CacheFolder
from kd_cache.store.origin import Fingerprint, Origin
from kd_cache.store.pack import open_pack, row_checksums, write_pack
from kd_cache.store.union import Union

SCENE = origin()
FIVE = Rows.of(names(5))


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    (tmp_path / "packs").mkdir()
    return tmp_path / "packs"


# -- the bytes --------------------------------------------------------------------------------------------------------


def read_by_the_book(path: Path) -> dict[str, object]:
    """A reader written from the layout in the documentation, with struct, h5py and xxhash alone."""
    content = path.read_bytes()
    magic, version, length, digest = struct.unpack("<8sIQ16s", content[:36])
    assert (magic, version, content[84:512]) == (b"KDCPACK\n", 2, bytes(428))
    assert length == len(content) - 512
    assert digest == xxhash.xxh3_128_digest(content[512:])
    with h5py.File(path, "r") as file:
        attributes = {name: value.decode() for name, value in file.attrs.items()}
        datasets = {name: file[name][:] for name in file}
        places = {name: file[name].id.get_offset() % (4096 if name == "logits" else 64) for name in file}
    assert not any(places.values())
    keys = datasets["keys"]
    first, last, rows, check = struct.unpack("<16s16sQQ", content[36:84])
    assert (first, last, rows) == (keys[0].tobytes(), keys[-1].tobytes(), len(keys))
    assert check == xxhash.xxh3_64_intdigest(content[36:76])
    assert path.name == f"{attributes['teacher']}-{digest.hex()}.h5"
    blob, offsets = datasets["files"].tobytes(), datasets["file_offsets"].tolist()
    files = [blob[start:end].decode() for start, end in pairwise(offsets)]
    return {"attributes": attributes, "datasets": datasets, "files": files}


def test_the_documented_layout_is_all_a_reader_needs(packs: Path) -> None:
    made_by = Origin("scene", SCENE.fingerprint, "log_probs", 3, "fp32", ("bus", "métro", "tram"))
    read = read_by_the_book(FIVE.write(packs, made_by))
    assert read["files"] == FIVE.files
    datasets = read["datasets"]
    assert {name: (array.dtype.str, array.shape) for name, array in datasets.items()} == {
        "keys": ("|u1", (5, 16)),
        "inputs": ("|u1", (5, 16)),
        "checksums": ("<u8", (5,)),
        "logits": ("<f4", (5, 3)),
        "file_offsets": ("<u8", (6,)),
        "files": ("|u1", (sum(map(len, FIVE.files)),)),
    }
    for name, expected in (("keys", FIVE.keys), ("inputs", FIVE.inputs), ("logits", FIVE.logits)):
        np.testing.assert_array_equal(datasets[name], expected)
    np.testing.assert_array_equal(datasets["checksums"], checksums(FIVE, made_by))
    assert [key.tobytes() for key in datasets["keys"]] == sorted(map(md5, FIVE.files))
    attributes = read["attributes"]
    assert json.loads(attributes.pop("parts")) == made_by.fingerprint.parts
    assert json.loads(attributes.pop("class_names")) == ["bus", "métro", "tram"]
    assert attributes == {
        "format_version": "2",
        "teacher": "scene",
        "fingerprint": made_by.fingerprint.digest,
        "value_kind": "log_probs",
        "dtype": "fp32",
    }


@pytest.mark.parametrize(
    ("dtype", "digest", "fingerprint"),
    [
        (
            "fp32",
            "1a36dc320585cbb148e2657c0cf5c916",
            "6e76089dc85fba9f73f02f45abcde2455f4247b9a47d2f6761bff0b51a72b817",
        ),
        (
            "fp16",
            "5f498e0af92416397974ec8c055c5331",
            "a2732ef0907c59e4d4de1d1ee7570a30169d58bca5ace9738fa683200f728381",
        ),
    ],
)
def test_the_bytes_of_a_pack_stay_the_same(packs: Path, dtype: str, digest: str, fingerprint: str) -> None:
    """Known answers.

    If one changes, every sealed pack of every user gets another name and other bytes although its rows are equal: two
    machines no longer agree, and a fingerprint that changes means a cache that is scored again.
    """
    files = sorted(["a/x.npy", "a/y.npy", "b/ü.npy"], key=md5)
    logits = np.arange(12, dtype={"fp32": "<f4", "fp16": "<f2"}[dtype]).reshape(3, 4) / 8
    keys = byte_rows([md5(file) for file in files])
    inputs = byte_rows([bytes(range(number, number + 16)) for number in range(3)])
    parts = {"weights": "00ff", "architecture": "tiny/1", "dtype": dtype, "format_version": "1"}
    made_by = Origin("scene", Fingerprint(parts), "logits", 4, dtype, ("bus", "metro", "park", "tram"))
    assert made_by.fingerprint.digest == fingerprint
    path = write_pack(packs, made_by, keys, inputs, [file.encode() for file in files], logits.__getitem__)
    if (h5py.__version__, h5py.version.hdf5_version) != ("3.16.0", "2.0.0"):
        pytest.skip(f"pinned with h5py 3.16.0 and HDF5 2.0.0; this is {h5py.__version__}, {h5py.version.hdf5_version}")
    assert path.name == f"scene-{digest}.h5"


@given(
    files=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=30, unique=True
    ),
    classes=st.integers(1, 9),
    dtype=st.sampled_from(["fp32", "fp16"]),
    block=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_any_rows_come_back_and_equal_rows_give_equal_bytes(
    files: list[str], classes: int, dtype: str, block: int, seed: int
) -> None:
    rows = Rows.of(files, classes, dtype, seed)
    made_by = origin("city2scene", classes, dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = rows.write(Path(folder), made_by)
        content = path.read_bytes()
        pack = open_pack(path)
        assert (pack.origin, pack.files, len(pack)) == (made_by, rows.files, len(rows))
        for mine, theirs in ((pack.keys, rows.keys), (pack.inputs, rows.inputs), (pack.logits, rows.logits)):
            assert mine.tobytes() == theirs.tobytes()
        assert pack.wrong_rows(np.arange(len(pack))) == []
        assert read_by_the_book(path)["files"] == rows.files
        path.unlink()
        again = rows.write(Path(folder), made_by, block)
        assert (again, again.read_bytes()) == (path, content)
        assert os.listdir(folder) == [path.name]


def test_every_bit_pattern_of_a_float_survives(packs: Path) -> None:
    for dtype, patterns in (
        ("fp16", np.arange(0x10000, dtype="<u2")),
        ("fp32", np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x7F7FFFFF, 1], "<u4")),
    ):
        rows = Rows.of(["one.npy"], len(patterns), dtype)
        rows.logits = patterns.view({"fp16": "<f2", "fp32": "<f4"}[dtype]).reshape(1, -1)
        pack = open_pack(rows.write(packs, origin("scene", len(patterns), dtype)))
        assert pack.logits.tobytes() == patterns.tobytes()


def test_an_opened_pack_is_read_only_and_outlives_its_file(packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 1 << 30):
        monkeypatch.setattr(pack_module, "MAPPED", size)
        path = FIVE.write(packs, SCENE)
        pack = open_pack(path)
        for array in (pack.keys, pack.inputs, pack.checksums, pack.logits, pack.file_offsets, pack.files_blob):
            assert not array.flags.writeable
            assert array.ctypes.data % array.itemsize == 0
        path.unlink()
        np.testing.assert_array_equal(pack.logits, FIVE.logits)


def test_checksums_cover_key_input_fingerprint_and_row() -> None:
    before = row_checksums(SCENE.fingerprint, FIVE.keys, FIVE.inputs, FIVE.logits)
    np.testing.assert_array_equal(before, checksums(FIVE, SCENE))
    for part in ("keys", "inputs", "logits"):
        arrays = {name: getattr(FIVE, name).copy() for name in ("keys", "inputs", "logits")}
        arrays[part].view(np.uint8)[2, 5] ^= 1
        changed = row_checksums(SCENE.fingerprint, arrays["keys"], arrays["inputs"], arrays["logits"])
        assert (changed != before).tolist() == [False, False, True, False, False]
    other = row_checksums(origin(weights="other").fingerprint, FIVE.keys, FIVE.inputs, FIVE.logits)
    assert (other != before).all()


# -- damage -----------------------------------------------------------------------------------------------------------


def refuse_opening(path: Path, *kinds: type[KDCacheError]) -> KDCacheError:
    """The pack must be refused, and the error must name it."""
    with pytest.raises(kinds or (CorruptError,)) as caught:
        open_pack(path)
    assert str(path) in str(caught.value)
    return caught.value


def test_a_wrong_name_is_refused(packs: Path) -> None:
    path = FIVE.write(packs, SCENE)
    digest = path.stem.partition("-")[2]
    for name in (f"city-{digest}.h5", f"scene-{'0' * 32}.h5", "scene.h5", f"scene-{digest.upper()}.h5", f"{digest}.h5"):
        refuse_opening(path.rename(packs / name))
        (packs / name).rename(path)
    open_pack(path)


SWAPPED = FIVE.part([0, 1, 2, 3, 4])
SWAPPED.keys = FIVE.keys[[1, 0, 2, 3, 4]]


@pytest.mark.parametrize(("build", "says"), STRUCTURES.values(), ids=STRUCTURES)
def test_every_wrong_structure_is_refused_even_under_a_correct_digest(packs: Path, build: Build, says: str) -> None:
    error = refuse_opening(forge(packs, lambda file: build(file, FIVE, SCENE)))
    assert says in error.message


NEW = attribute("format_version", np.bytes_(b"2"))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (FIVE.keys, "logits does not lie in the file"),  # at a multiple of 64 alone
        (FIVE.keys[:4], "other keys than it holds"),
        (FIVE.keys[1:], "other keys than it holds"),
        (np.vstack([FIVE.keys[:1], FIVE.keys]), "other keys than it holds"),
    ],
)
def test_format_2_is_checked_for_what_it_adds(packs: Path, keys: np.ndarray, says: str) -> None:
    content = FIVE.write(packs, SCENE).read_bytes()
    if "lie" in says:
        path = forge(packs, lambda file: NEW(file, FIVE, SCENE), version=2, keys=keys)
    else:
        path = seal_bytes(packs, content[512:], version=2, keys=keys)
    assert says in refuse_opening(path).message


def test_a_pack_made_with_plain_h5py_is_read(packs: Path) -> None:
    """So that what the forged packs are refused for is what is forged in them."""
    pack = open_pack(forge(packs, lambda file: plain_pack(file, FIVE, SCENE)))
    assert (pack.files, pack.origin) == (FIVE.files, SCENE)
    np.testing.assert_array_equal(pack.logits, FIVE.logits)


def test_libhdf5_opens_no_file(packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads and writes through memory, so what was checked is what it sees, and its errors cannot crash anything."""
    opened = []
    genuine = h5py.File

    def watched(file: object, *args: object, **options: object) -> h5py.File:
        opened.append(file)
        return genuine(file, *args, **options)

    monkeypatch.setattr(h5py, "File", watched)
    open_pack(FIVE.write(packs, SCENE))
    assert len(opened) == 4  # written, the rows from a page on, checked, opened
    assert not any(isinstance(file, str | bytes | os.PathLike) for file in opened)


def test_flips_under_a_correct_digest_never_crash_or_hang_the_reader(packs: Path) -> None:
    """What an attacker could do, and a bug in libhdf5 would turn into a crash: a typed error, or an opened pack."""
    content = FIVE.write(packs, SCENE).read_bytes()
    refused = 0
    bits = range(0, 8 * (len(content) - 512), 61)
    for bit in bits:
        body = bytearray(content[512:])
        body[bit // 8] ^= 1 << bit % 8
        path = seal_bytes(packs, bytes(body), keys=FIVE.keys)
        try:
            pack = open_pack(path)
            assert len(pack.files) == len(pack)
        except KDCacheError:
            refused += 1
        path.unlink()
    assert 0 < refused < len(bits)


def test_a_row_that_does_not_fit_its_checksum_or_its_key_is_named(packs: Path) -> None:
    good = checksums(FIVE, SCENE)

    def build(file: h5py.File) -> None:
        plain_pack(file, FIVE, SCENE)
        file["logits"][1, 2] += 1
        file["inputs"][3, 0] ^= 1
        swapped = list(FIVE.files)
        swapped[4] = swapped[4][::-1]
        file["files"][:] = np.frombuffer("".join(swapped).encode(), np.uint8)
        file["checksums"][:] = good

    pack = open_pack(forge(packs, build))
    assert pack.wrong_rows(np.arange(5)) == [1, 3, 4]
    assert pack.wrong_rows(np.array([4, 0])) == [4]


def test_a_name_that_is_not_utf8_is_an_error_and_not_another_name(packs: Path) -> None:
    blob = np.frombuffer("".join(FIVE.files).encode(), np.uint8).copy()
    blob[3] = 0xFF
    pack = open_pack(forge(packs, lambda file: changed("files", lambda _: blob)(file, FIVE, SCENE)))
    with pytest.raises(CorruptError, match="UTF-8"):
        assert pack.files


def test_no_file_and_no_permission_are_told_apart(packs: Path) -> None:
    path = packs / f"scene-{'0' * 32}.h5"
    with pytest.raises(FileNotFoundError, match=path.name):
        open_pack(path)
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    path.touch(mode=0)
    refuse_opening(path, StoreError)


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_pack_without_rows_or_with_unsorted_keys_is_never_begun(packs: Path) -> None:
    for rows in (FIVE.part([]), SWAPPED):
        with pytest.raises(ValueError, match="ascending"):
            rows.write(packs, SCENE)
    assert os.listdir(packs) == []


def test_rows_of_another_shape_or_dtype_are_never_converted(packs: Path) -> None:
    for take in (
        lambda part: FIVE.logits[part, :2],
        lambda part: FIVE.logits[part].astype("f8"),
        lambda part: FIVE.logits,
    ):
        with pytest.raises(ValueError, match="classes"):
            write_pack(packs, SCENE, FIVE.keys, FIVE.inputs, [b"x"] * 5, take, block=2)
    assert os.listdir(packs) == []


def test_parts_too_long_for_an_attribute_are_refused(packs: Path) -> None:
    with pytest.raises(StoreError, match="parts of teacher scene"):
        FIVE.write(packs, origin(weights="0" * 70_000))
    assert os.listdir(packs) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EIO, errno.ENOSPC])
def test_a_file_system_without_fsync_of_folders_is_told_of_once(
    packs: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    genuine = os.fsync

    def refuses(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        genuine(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    monkeypatch.setattr(atomic, "_told", set())
    if code in (errno.EIO, errno.ENOSPC):
        with pytest.raises(StoreError, match=os.strerror(code)):
            FIVE.write(packs, SCENE)
        return
    with pytest.warns(UserWarning, match="cannot fsync a folder") as said:
        FIVE.write(packs, SCENE)
    assert len(said) == 1
    atomic.make_directory(packs / "a" / "b")  # a second warning would be an error here


def test_what_the_disk_did_not_keep_is_never_put_in_place(packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = os.fsync

    def rots(descriptor: int) -> None:
        os.pwrite(descriptor, b"?", 1000)
        genuine(descriptor)

    monkeypatch.setattr(os, "fsync", rots)
    with pytest.raises(StoreError, match="did not keep"):
        FIVE.write(packs, SCENE)
    assert os.listdir(packs) == []


@pytest.mark.parametrize("method", ["seek", "write", "truncate", "flush"])
def test_an_interrupt_at_any_moment_of_writing_leaves_nothing(packs: Path, method: str) -> None:
    genuine = getattr(hdf5_file.Outlet, method)
    ended = set()
    for moment in range(1, 60):
        calls = 0

        def interrupted(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == moment:  # noqa: B023 (called in this turn of the loop only)
                raise KeyboardInterrupt
            return genuine(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hdf5_file.Outlet, method, interrupted)
            try:
                FIVE.write(packs, SCENE).unlink()
                ended.add("whole")
            except (KeyboardInterrupt, StoreError) as error:
                ended.add(type(error).__name__)
        assert os.listdir(packs) == [], moment
    assert "whole" in ended
    assert len(ended) > 1


def test_an_interrupt_while_a_pack_is_read_is_no_damage(packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump rescores and removes what is damaged."""
    path = FIVE.write(packs, SCENE)
    genuine = hdf5_file._Image.read
    for moment in range(8):
        calls = iter(range(100))

        def interrupted(image: object, size: int) -> bytes:
            if next(calls) == moment:  # noqa: B023 (called in this turn of the loop only)
                raise KeyboardInterrupt
            return genuine(image, size)  # type: ignore[arg-type]

        monkeypatch.setattr(hdf5_file._Image, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_pack(path)


@pytest.mark.parametrize("mapped_from", [1, pack_module.MAPPED])
def test_a_thousand_packs_need_no_thousand_descriptors(
    packs: Path, mapped_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "MAPPED", mapped_from)
    rows = Rows.of(names(150))
    for number in range(150):
        rows.part([number]).write(packs, SCENE)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, hard))
    try:
        found = CacheFolder(packs.parent).packs()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    union = Union(found.of(SCENE))
    assert (len(found.good), union.take(np.arange(150)).tobytes()) == (150, rows.logits.tobytes())
    with pytest.raises(ValueError, match="WRITEABLE"):
        found.good[0].logits.flags.writeable = True


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EINVAL, errno.ENOMEM])
def test_where_a_file_system_has_no_maps_packs_are_read(
    packs: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = FIVE.write(packs, SCENE)

    def refuses(*_: object) -> int | None:
        ctypes.set_errno(code)
        return mapped._FAILED

    monkeypatch.setattr(pack_module, "MAPPED", 1)
    monkeypatch.setattr(mapped._LIBC, "mmap", refuses)
    if code == errno.ENOMEM:
        with pytest.raises(StoreError, match=os.strerror(code)):
            open_pack(path)
    else:
        assert open_pack(path).logits.tobytes() == FIVE.logits.tobytes()


def test_too_many_open_files_is_an_error_that_says_so(packs: Path) -> None:
    path = FIVE.write(packs, SCENE)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(StoreError, match="Too many open files"):
            open_pack(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_a_signal_within_the_reading_of_a_pack_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    path = Rows.of(names(3)).write(tmp_path, origin())

    def reading(*_: object) -> object:
        try:
            raise interrupt
        except BaseException as error:
            raise SystemError("returned a result with an exception set") from error  # what h5py makes of it

    monkeypatch.setattr(pack_module, "_read_attributes", reading)
    with pytest.raises(interrupt):
        open_pack(path)
