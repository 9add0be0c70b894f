"""A pack with views: its bytes, and every bit of one flipped."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from fault_tools import often
from store_fixtures import byte_rows, md5

from kd_cache.errors import CorruptError, StoreError
from kd_cache.store.origin import Fingerprint, Origin
from kd_cache.store.pack import Pack, open_pack, write_pack


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    """Three samples of two views, of four classes; five integers are drawn for each."""
    files = sorted(["a/x.npy", "a/y.npy", "b/ü.npy"], key=md5)
    parts = {"weights": "00ff", "architecture": "tiny/1", "dtype": "fp32", "view_policy": "{}"}
    made_by = Origin("scene", Fingerprint(parts), "logits", 4, "fp32", None, (0, 1))
    logits = np.arange(24, dtype="<f4").reshape(3, 8) / 8
    draws = np.arange(30, dtype="<u4").reshape(3, 2, 5)
    draws[:, :, 0] = (0, 1)
    inputs = byte_rows([bytes(range(number, number + 16)) for number in range(3)])
    names = [file.encode() for file in files]
    keys = byte_rows([md5(file) for file in files])
    drawn = draws.reshape(3, 10)
    return open_pack(write_pack(tmp_path, made_by, keys, inputs, names, logits.__getitem__, draws=drawn.__getitem__))


def test_the_bytes_of_a_pack_with_views_stay_the_same(pack: Pack) -> None:
    with h5py.File(pack.path) as file:
        assert {name: (file[name].shape, file[name].dtype.str) for name in ("logits", "draws", "views")} == {
            "logits": ((3, 2, 4), "<f4"),
            "draws": ((3, 2, 5), "<u4"),
            "views": ((2,), "<u4"),
        }
    assert pack.wrong_rows() == []
    if (h5py.__version__, h5py.version.hdf5_version) != ("3.16.0", "2.0.0"):
        pytest.skip(f"pinned with h5py 3.16.0 and HDF5 2.0.0; this is {h5py.__version__}, {h5py.version.hdf5_version}")
    assert pack.path.name == "scene-471c484e89157bdc42f50377ff66b15a.h5"


@pytest.mark.parametrize("views", [(0,), (1,)])
def test_a_view_is_cut_out_without_a_copy_and_checked_as_a_whole(pack: Pack, views: tuple[int, ...]) -> None:
    cut = pack.of_views(views)
    assert cut is pack.of_views(views)
    assert (cut.logits == pack.logits.reshape(3, 2, 4)[:, views[0]]).all()
    assert np.shares_memory(cut.logits, pack.logits)
    assert (cut.draws == pack.draws.reshape(3, 2, 5)[:, views[0]]).all()
    assert cut.wrong_rows() == []
    assert pack.of_views((2,)) is None


def test_no_flipped_bit_gives_another_value(pack: Pack) -> None:
    """Every bit where it can matter, and some of all others; all of them with ``KD_CACHE_FAULTS=full``."""
    content, values = pack.path.read_bytes(), (pack.logits.tobytes(), pack.draws.tobytes(), pack.origin)
    begin = content.index(pack.draws.tobytes()) * 8
    bits = {
        *range(0, len(content) * 8, often(1999, 31, 1)),
        *range(begin, begin + len(pack.draws.tobytes()) * 8, often(13, 1, 1)),
    }
    path, served = pack.path, 0
    for bit in sorted(bits):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises((CorruptError, StoreError)):
            open_pack(path)
        try:
            lazy = open_pack(path, "lazy")
            lazy.touch(np.arange(len(lazy)))
        except (CorruptError, StoreError):
            continue
        served += 1  # what nobody reads, such as what lies between two datasets
        assert (lazy.logits.tobytes(), lazy.draws.tobytes(), lazy.origin) == values, bit
    assert served < len(bits)
