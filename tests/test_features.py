"""Feature files: read exactly as numpy reads them, or refused with the reason, and never outside the data root."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hostile_data import described, npy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kd_cache.dataset import features
from kd_cache.dataset.features import FeatureSource, input_digest, stat_row
from kd_cache.errors import FeatureError, UsageError
from kd_cache.files.npy import read_array

small = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines may be busy


def saved(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    """What numpy writes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version, allow_pickle=True)
    return buffer.getvalue()


GOOD = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "x").mkdir(parents=True)
    np.save(folder / "x" / "good.npy", GOOD)
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    np.save(folder / "secret.npy", GOOD)
    return folder


def refusal(source: FeatureSource, file: str) -> str:
    """The message that `read` refuses with, and `shape` too unless the values alone are at fault."""
    with pytest.raises(FeatureError) as caught:
        source.read(file)
    message = caught.value.message
    assert caught.value.exit_code == 1
    assert isinstance(caught.value, ValueError)
    assert len(message) < 1000 + min(len(file), 4096)
    assert all(c.isprintable() or c == "\n" for c in message)
    if "value at frame" not in message:
        with pytest.raises(FeatureError):
            source.shape(file)
    return message


def refused(root: Path, content: bytes) -> str:
    (root / "bad.npy").write_bytes(content)
    message = refusal(FeatureSource(root), "bad.npy")
    assert message.startswith("feature bad.npy (under ")
    return message


# -- what is read ------------------------------------------------------------------------------------------------------


@small
@given(
    hnp.arrays(
        st.sampled_from(["<f4", "<f2"]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(width=16, allow_nan=False, allow_infinity=False),
    ),
    st.sampled_from("CF"),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_any_feature_is_read_as_numpy_reads_it(array: np.ndarray, order: Any, version: tuple[int, int]) -> None:
    content = saved(np.asarray(array, order=order), version)
    read = read_array(content)
    expected = np.load(io.BytesIO(content))
    assert read.dtype == expected.dtype
    assert read.tobytes() == expected.tobytes()
    assert read.flags.c_contiguous


@small
@given(
    st.binary(max_size=80),
    st.sampled_from([b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x50\x00", b"\x93NUMPY\x01\x00\x48\x00{'descr': '<f4', "]),
)
def test_any_bytes_are_read_or_refused(tail: bytes, head: bytes) -> None:
    with contextlib.suppress(ValueError):
        read_array(head + tail)


def test_each_flipped_bit_is_refused_or_read_as_numpy_reads_it() -> None:
    good = saved(GOOD)
    for bit in range(len(good) * 8):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        try:
            read = read_array(bytes(content))
        except ValueError:
            assert bit < len(good) * 8 - GOOD.nbytes * 8, "a flip in the values is for the digest to find"
            continue
        assert read.tobytes() == np.load(io.BytesIO(bytes(content))).tobytes()


def test_an_array_that_starts_at_an_odd_byte_or_behind_a_bare_header_is_read() -> None:
    padded = [described((4, 3), extra=" " * padding, payload=GOOD.tobytes()) for padding in range(4)]
    bare = npy("{'descr':'<f4','fortran_order':False,'shape':(4,3)}", GOOD.tobytes())
    for content in (*padded, bare):
        np.testing.assert_array_equal(read_array(content), GOOD)
        assert input_digest(read_array(content)) == input_digest(GOOD)


# -- hostile and broken content ----------------------------------------------------------------------------------------


HOSTILE: dict[str, tuple[bytes, str]] = {
    "zeros": (bytes(200), "not a .npy file"),
    "version 1.1": (saved(GOOD).replace(b"NUMPY\x01\x00", b"NUMPY\x01\x01"), "unknown .npy version"),
    "header is empty": (npy(""), "not a plain description"),
    **{
        f"header is {code}": (npy(code, bytes(24)), "header")
        for code in ("(lambda: 0)()", "[open('x', 'w')]", "f'{1}'", "a", "1+1j+x")
    },
    "header is no dict": (npy("[1, 2]"), "must hold descr, fortran_order and shape"),
    "header lacks a field": (npy("{'descr': '<f4', 'shape': (2, 3)}", bytes(24)), "must hold"),
    "header has more": (described((2, 3), extra=", 'more': 1"), "and nothing else"),
    "header with NUL": (npy("{'descr': '<f4'\0}"), "not a plain description"),
    "header nested in lists": (npy("[" * 90 + "]" * 90), "header"),
    "header with unhashable key": (npy("{[]: 1}"), "not a plain description"),
    "shape that overflows": (described((1 << 27, 1 << 27, 1 << 27, 1 << 27)), "promises"),
    **{
        f"shape is {shape!r:.40}": (described(shape, payload=bytes(4)), "not a tuple of at most")
        for shape in ((-2, -3), ("2", "3"), (2.0, 3.0), (True, True), [2, 3], 6, (1 << 28,) * 900)
    },
    "dimension of 10k hex digits": (
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0x" + "f" * 9000 + ",)}"),
        "not a tuple of at most",
    ),
    "fortran_order is 1": (described((2, 3), fortran=1), "must be True or False"),
    "fortran_order is a text": (described((2, 3), fortran="False"), "must be True or False"),
    "int16": (saved(np.zeros((2, 3), "<i2")), "dtype is not"),
    "many fields": (described((2, 3), descr=[(f"f{n}", "<f4") for n in range(300)]), "dtype is not"),
    "texts": (saved(np.array([["a", "b"]])), "dtype is not"),
    **{f"dtype is {descr!r}": (described((2, 3), descr=descr), "dtype is not") for descr in ("float32", 4, ["<f4"])},
    "scalar": (saved(np.zeros((), np.float32)), "its shape is [], expected [frames, bins]"),
    "two arrays in one": (saved(GOOD) * 2, "promises 176 bytes (shape (4, 3)), the file has 352"),
}
"""Beside those of `hostile_data.FEATURES`, which meet the commands."""


@pytest.mark.filterwarnings("default")  # Python may remark on the texts of hostile headers; that is not an answer
@pytest.mark.parametrize(("content", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_each_way_to_be_no_feature_is_refused_with_its_reason(root: Path, content: bytes, reason: str) -> None:
    assert reason in refused(root, content)


def test_a_file_cut_anywhere_is_refused(root: Path) -> None:
    content = saved(GOOD)
    for length in range(len(content)):
        message = refused(root, content[:length])
        assert any(word in message for word in ("empty", "not a .npy", "unknown", "truncated", "promises"))


def test_a_file_that_grows_while_it_is_read_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, grown = os.read, []

    def growing(descriptor: int, count: int) -> bytes:
        if not grown:
            grown.append(True)
            with (root / "x" / "good.npy").open("ab") as file:
                file.write(bytes(8))
        return real(descriptor, count)

    monkeypatch.setattr(features.os, "read", growing)
    assert "promises" in refusal(FeatureSource(root), "x/good.npy")


def test_a_file_without_end_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features.os, "read", lambda _, count: bytes(count))
    assert "grows while it is read" in refusal(FeatureSource(root, max_bytes=5000), "x/good.npy")


def test_short_reads_are_completed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.read
    monkeypatch.setattr(features.os, "read", lambda descriptor, count: real(descriptor, min(count, 7)))
    np.testing.assert_array_equal(FeatureSource(root).read("x/good.npy").array, GOOD)


# -- paths -------------------------------------------------------------------------------------------------------------


def test_a_file_below_the_root_is_read_in_any_spelling(root: Path) -> None:
    for folder in ("x", "./x", "x/", "x/../x", "../data/x", f"{root}/x"):
        np.testing.assert_array_equal(FeatureSource(root).read(f"{folder}/good.npy").array, GOOD)


def test_a_relative_root_and_a_root_that_is_a_link_work(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    Path("link").symlink_to("data")
    for name in ("data", "./data/", "link", "link/"):
        source = FeatureSource(name)
        assert source.shape("x/good.npy") == (4, 3)
        assert source.shape(f"{root}/x/good.npy") == (4, 3)
    assert FeatureSource("/").shape(f"{root}/x/good.npy".lstrip("/")) == (4, 3)


ESCAPES: dict[str, Callable[[Path, Path], str]] = {
    "dot dot": lambda root, outside: "../outside/secret.npy",
    "absolute": lambda root, outside: str(outside / "secret.npy"),
    "absolute with slashes": lambda root, outside: f"//{outside}/secret.npy",
    "neighbour with the root's name in front": lambda root, outside: _neighbour(root),
    "link to a file": lambda root, outside: _link(root / "l.npy", outside / "secret.npy"),
    "link to a link": lambda root, outside: (
        _link(root / _link(root / "m.npy", Path("l.npy")), root / "l.npy")
        and _link(root / "l.npy", outside / "secret.npy")
    ),
    "link to a folder": lambda root, outside: _link(root / "folder", outside) + "/secret.npy",
    "link to the folder above": lambda root, outside: _link(root / "up", Path("..")) + "/outside/secret.npy",
    "missing outside": lambda root, outside: "../outside/missing.npy",
}
"""Beside those of `hostile_data.PATHS`, which meet the commands as well."""


def _link(path: Path, target: Path) -> str:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path.name


def _neighbour(root: Path) -> str:
    other = root.with_name(root.name + "2")
    other.mkdir()
    np.save(other / "secret.npy", GOOD)
    return str(other / "secret.npy")


@pytest.mark.parametrize("escape", ESCAPES.values(), ids=ESCAPES)
def test_what_lies_outside_the_root_is_refused(root: Path, outside: Path, escape: Callable[[Path, Path], str]) -> None:
    file = escape(root, outside)
    source = FeatureSource(root)
    for _ in range(2):  # the second look is answered from memory
        message = refusal(source, file)
        assert "outside the data root" in message
        assert "--allow-outside" in message


@pytest.mark.parametrize("how", ["absolute", "dot dot", "link to a file", "link to a folder"])
@pytest.mark.parametrize("permit", ["folder", "folder above", "link to it", "file"])
def test_allowing_a_place_outside_permits_it_and_nothing_else(
    root: Path, outside: Path, tmp_path: Path, how: str, permit: str
) -> None:
    file = ESCAPES[how](root, outside)
    alias = tmp_path / "alias"
    alias.symlink_to(outside)
    allowed = {"folder": outside, "folder above": tmp_path, "link to it": alias, "file": outside / "secret.npy"}[permit]
    np.testing.assert_array_equal(FeatureSource(root, [allowed]).read(file).array, GOOD)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "outside the data root" in refusal(FeatureSource(root, [elsewhere]), file)
    if permit == "file":
        np.save(outside / "other.npy", GOOD)
        assert "outside the data root" in refusal(FeatureSource(root, [allowed]), str(outside / "other.npy"))


def test_links_inside_the_root_are_followed(root: Path) -> None:
    (root / "y").symlink_to("x")
    (root / "z.npy").symlink_to("y/good.npy")
    for file in ("y/good.npy", "z.npy"):
        np.testing.assert_array_equal(FeatureSource(root).read(file).array, GOOD)


STRANGE: dict[str, tuple[str, str]] = {
    "link to a fifo": ("link to a fifo.npy", "not a regular file"),
    "folder with a slash": ("x/", "not a regular file"),
    "nothing": ("", "not a regular file"),
    "file with a slash": ("x/good.npy/", "Not a directory"),
    "missing": ("x/none.npy", "does not exist"),
    "missing folder": ("none/none.npy", "does not exist"),
    "dangling link": ("dangling.npy", "does not exist"),
    "folder over 255 bytes": ("n" * 256 + "/x.npy", "File name too long"),
    "NUL": ("x/\0.npy", "null"),
    "NUL in a folder": ("\0/x.npy", "null"),
    "lone surrogate": ("x/\ud800.npy", "surrogates not allowed"),
}


@pytest.mark.parametrize(("file", "reason"), STRANGE.values(), ids=STRANGE)
def test_each_way_to_be_no_file_is_refused_and_never_hangs(root: Path, file: str, reason: str) -> None:
    os.mkfifo(root / "fifo.npy")
    (root / "link to a fifo.npy").symlink_to("fifo.npy")
    (root / "dangling.npy").symlink_to("none.npy")
    assert reason in refusal(FeatureSource(root), file)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/urandom", "/dev/stdin", "/proc/self/mem"])
def test_devices_are_refused_even_where_permitted(root: Path, device: str) -> None:
    (root / "d.npy").symlink_to(device)
    assert "outside" in refusal(FeatureSource(root), "d.npy")
    with contextlib.suppress(FileNotFoundError):
        refusal(FeatureSource(root, ["/dev", "/proc"]), device)


def test_a_fifo_with_a_writer_is_refused_too(root: Path) -> None:
    os.mkfifo(root / "pipe.npy")
    writer = os.open(root / "pipe.npy", os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(writer, saved(GOOD))
        assert "not a regular file" in refusal(FeatureSource(root), "pipe.npy")
    finally:
        os.close(writer)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("x"), os.mkfifo])
def test_a_root_that_is_no_folder_is_a_usage_error(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "root")
    with pytest.raises(UsageError, match="is not a folder") as caught:
        FeatureSource(tmp_path / "root")
    assert caught.value.exit_code == 2
    assert "--data-root" in str(caught.value)


# -- many at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (101, 64), (128, 64), (129, 64)])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(root: Path, dtype: str, shape: tuple[int, int]) -> None:
    array = np.random.default_rng(3).normal(size=shape).astype(dtype)
    for place in {0, 1, 7, 16, 31, array.size // 2, array.size - 2, array.size - 1} & set(range(array.size)):
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            wrong = array.copy()
            wrong.flat[place] = value
            frame, band = divmod(place, shape[1])
            for order in "CF":
                message = refused(root, saved(np.asarray(wrong, order=order)))  # type: ignore[call-overload]
                assert f"value at frame {frame}, bin {band} is {wrong.flat[place]}" in message


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_values_are_finite_though_their_squares_are_not(root: Path, dtype: str, sign: int) -> None:
    array = np.full((101, 64), sign * np.finfo(dtype).max, dtype)
    np.save(root / "large.npy", array)
    np.testing.assert_array_equal(FeatureSource(root).read("large.npy").array, array)


def test_stat_many_does_not_answer_for_what_only_read_can_judge(root: Path, outside: Path, tmp_path: Path) -> None:
    os.mkfifo(root / "pipe.npy")
    (root / "loop.npy").symlink_to("loop.npy")
    (root / "inside.npy").symlink_to("x/good.npy")
    escapes = [escape(root, outside) for escape in ESCAPES.values()]
    files = ["x/good.npy", "pipe.npy", "x", "", "none.npy", "none/x.npy", "loop.npy", "inside.npy", "\0", "\ud800.npy"]
    files += ["n" * 5000, *escapes]
    rows = FeatureSource(root).stat_many(files)
    assert (rows[0] > 0).all()
    assert (rows[1:] == -1).all()
    assert (FeatureSource(root, [outside]).stat_many([str(outside / "secret.npy")]) > 0).all()


def test_numbers_of_a_file_system_that_uses_all_64_bits_are_kept(root: Path) -> None:
    numbers = list((root / "x" / "good.npy").stat())
    numbers[1] = (1 << 64) - 5
    assert stat_row(os.stat_result(numbers))[1] == -5


# -- digests -----------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_array_and_not_of_its_container() -> None:
    array = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    wide = np.zeros((12, 10), np.float32)
    wide[::2, ::2] = array
    same = [array.copy("F"), wide[::2, ::2], array[::-1][::-1], read_array(saved(array.copy("F"), (2, 0)))]
    assert {input_digest(other) for other in same} == {input_digest(array)}


def test_digests_are_xxh3_128_of_dtype_shape_and_bytes_and_stay_the_same() -> None:
    # Every cache keeps these beside its rows. Another value here means that every row of every user is taken for stale
    # and scored again: change them with a new FORMAT_VERSION only.
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert input_digest(array).hex() == "314101ebb343fa44d2843fa37267cde2"
    assert input_digest(array.astype(np.float16)).hex() == "6eb526c45057d1f112b2a44ee2df9f08"
    assert input_digest(array) == xxhash.xxh3_128_digest(b"<f4(2, 3)" + array.tobytes())
