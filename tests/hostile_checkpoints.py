"""Checkpoints that somebody made to do harm. Each maker writes ``evil.pth`` (or what stands in its place)."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import kaiming
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_cache.train.checkpoint_file import MOST_BYTES
from teachers import CPResNet

EVIL = "evil.pth"
CANARY = "canary"


class Checkpoint(NamedTuple):
    """``make(folder)`` puts it there; ``says`` are words of the message that no other error has."""

    make: Callable[[Path], object]
    says: tuple[str, ...]


def good() -> dict[str, Tensor]:
    net = CPResNet(10, (4, 4, 8, 12))
    kaiming(net, 0)
    return net.state_dict()


class Touch:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {CANARY}",)


class Evaluated:
    def __reduce__(self) -> tuple[object, ...]:
        return eval, (f"open({CANARY!r}, 'w')",)


# -- a pickle by hand --------------------------------------------------------------------------------------------------

BEGIN, STOP = b"\x80\x02", b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    if abs(value) < 1 << 31:
        return b"J" + struct.pack("<i", value)
    content = pickle.encode_long(value)
    return b"\x8a" + bytes([len(content)]) + content


def named(name: str) -> bytes:
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def called(name: str, *arguments: bytes) -> bytes:
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def sizes(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(count: int, kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + named(f"torch.{kind}") + text("0") + text("cpu") + number(count) + b"tQ"


def tensor(stored: bytes, shape: Iterable[int], strides: Iterable[int]) -> bytes:
    rest = b"\x89" + called("collections.OrderedDict")
    return called("torch._utils._rebuild_tensor_v2", stored, number(0), sizes(shape), sizes(strides), rest)


def entry(value: bytes, key: bytes | None = None) -> bytes:
    """A dict of one entry."""
    return BEGIN + b"}" + (text("weight") if key is None else key) + value + b"s" + STOP


def torch_zip(pickled: bytes, data: bytes = bytes(4), name: str = "t/data.pkl") -> bytes:
    """The zip file that torch.save would put this pickle into."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, content in {name: pickled, "t/byteorder": b"little", "t/version": b"3\n", "t/data/0": data}.items():
            archive.writestr(member, content)
    return buffer.getvalue()


def zipped(pickled: bytes, data: bytes = bytes(4)) -> Callable[[Path], object]:
    return raw(torch_zip(pickled, data))


def nested_key() -> bytes:
    """A tuple, two million tuples deep, as a key: to hash it is to recurse."""
    return entry(b"N", b")" + b"\x85" * 2_000_000)


def doubling_key() -> bytes:
    """A tuple that holds the one before twice, 60 times: to hash it takes 2^60 steps."""
    twice = b"".join(b"h%ch%c\x86q%c" % (step, step, step + 1) for step in range(60))
    return BEGIN + b")q\0" + twice + b"}h\x3cNs" + STOP


# -- files -------------------------------------------------------------------------------------------------------------


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / EVIL).write_bytes(content)


def saved(content: Any, *, legacy: bool = False, protocol: int = 2) -> Callable[[Path], object]:
    return lambda folder: torch.save(
        content, folder / EVIL, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy
    )


def cut(make: Callable[[Path], object], share: float) -> Callable[[Path], object]:
    def truncated(folder: Path) -> None:
        make(folder)
        os.truncate(folder / EVIL, int((folder / EVIL).stat().st_size * share))

    return truncated


def safe(tensors: Mapping[str, Tensor]) -> Callable[[Path], object]:
    return lambda folder: save_file(dict(tensors), folder / EVIL)


def header(described: object, body: bytes = b"", length: int | None = None) -> Callable[[Path], object]:
    """A safetensors file with this header."""
    written = described if isinstance(described, bytes) else json.dumps(described).encode()
    return raw(struct.pack("<Q", len(written) if length is None else length) + written + body)


def floats(*offsets: tuple[int, int], shape: list[int] | None = None) -> dict[str, Any]:
    return {
        f"t{at}": {"dtype": "F32", "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}
        for at, (start, end) in enumerate(offsets)
    }


def sparse(length: int, start: bytes) -> Callable[[Path], object]:
    """A file of this length that takes no room."""

    def make(folder: Path) -> None:
        (folder / EVIL).write_bytes(start)
        os.truncate(folder / EVIL, length)

    return make


def legacy_tar(folder: Path) -> None:
    with tarfile.open(folder / EVIL, "w:") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Touch())
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def zip_bomb(folder: Path) -> None:
    """200 MB of zeros in 200 kB."""
    with zipfile.ZipFile(folder / EVIL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("t/data.pkl", entry(tensor(storage(50 << 20), [50 << 20], [1])))
        archive.writestr("t/data/0", bytes(200 << 20))


def overlapping_zip(folder: Path) -> None:
    """A thousand members that are one and the same megabyte."""
    buffer = io.BytesIO(torch_zip(entry(b"N"), bytes(1 << 20)))
    with zipfile.ZipFile(buffer, "a") as archive:
        same = archive.getinfo("t/data/0")
        for count in range(1, 1001):
            again = zipfile.ZipInfo(f"t/data/{count}")
            for field in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(again, field, getattr(same, field))
            archive.filelist.append(again)
        archive._didModify = True  # type: ignore[attr-defined]
    (folder / EVIL).write_bytes(buffer.getvalue())


def crowded_zip(folder: Path) -> None:
    """A directory of 200,000 members, all of them one member."""
    buffer = io.BytesIO(torch_zip(entry(b"N")))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.filelist += [archive.getinfo("t/version")] * 200_000
        archive._didModify = True  # type: ignore[attr-defined]
    (folder / EVIL).write_bytes(buffer.getvalue())


def two_pickles(folder: Path) -> None:
    """Python's zipfile finds the harmless one, torch's reader the other."""
    buffer = io.BytesIO(torch_zip(entry(b"N")))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("T/DATA.PKL", nested_key())
    (folder / EVIL).write_bytes(buffer.getvalue())


def torchscript(folder: Path) -> None:
    with zipfile.ZipFile(folder / EVIL, "w") as archive:
        archive.writestr("t/data.pkl", pickle.dumps(Touch(), 2))
        archive.writestr("t/constants.pkl", pickle.dumps((), 2))
        archive.writestr("t/code/__torch__.py", f"open({CANARY!r}, 'w')")


def misfit() -> dict[str, Tensor]:
    tensors = good()
    del tensors["block1.conv1.weight"]
    tensors["\x1b[2Jsurplus"] = torch.zeros(3)
    tensors["block2.conv1.weight"] = torch.zeros(2, 2)
    return tensors


def not_finite(value: float) -> dict[str, Tensor]:
    tensors = good()
    tensors["block3.conv2.weight"].view(-1)[5] = value
    return tensors


RUNS = ("calls more than weights need", "nothing ran")
LARGE = ("structure is larger",)
DAMAGED = ("damaged or not a checkpoint",)
GIANT = torch.zeros(1).expand(10**6, 10**6)

CHECKPOINTS: dict[str, Checkpoint] = {
    "os.system in a zip": Checkpoint(saved({"model": good(), "x": Touch()}), ("posix.system", *RUNS)),
    "os.system in a zip, protocol 4": Checkpoint(saved({"x": Touch()}, protocol=4), ("posix.system", *RUNS)),
    "os.system in a legacy file": Checkpoint(saved({"x": Touch()}, legacy=True), ("posix.system", *RUNS)),
    "os.system in a plain pickle": Checkpoint(raw(pickle.dumps(Touch(), 2)), ("posix.system", *RUNS)),
    "os.system in a plain pickle, protocol 5": Checkpoint(raw(pickle.dumps(Touch(), 5)), ("posix.system", *RUNS)),
    "os.system in a pickle of text": Checkpoint(raw(pickle.dumps(Touch(), 0)), ("starts with cposix",)),
    "eval in a zip": Checkpoint(saved({"x": Evaluated()}), ("builtin", "eval", *RUNS)),
    "a pickled module": Checkpoint(saved(nn.Linear(2, 2)), ("torch.nn.modules.linear.Linear", *RUNS)),
    "TorchScript": Checkpoint(torchscript, ("a TorchScript archive",)),
    "legacy tar": Checkpoint(legacy_tar, ("a tar archive",)),
    "empty": Checkpoint(raw(b""), ("the file is empty",)),
    "a web page": Checkpoint(raw(b"<!DOCTYPE html><html>404</html>"), ("an HTML page",)),
    "truncated zip": Checkpoint(cut(saved(good()), 0.5), DAMAGED),
    "truncated legacy file": Checkpoint(cut(saved(good(), legacy=True), 0.5), DAMAGED),
    "truncated within its pickle": Checkpoint(cut(saved(good(), legacy=True), 0.02), ("its pickle breaks off",)),
    "truncated safetensors": Checkpoint(cut(safe(good()), 0.5), DAMAGED),
    "zip bomb": Checkpoint(zip_bomb, ("compressed or overlap", "t/data/0")),
    "overlapping zip members": Checkpoint(overlapping_zip, ("compressed or overlap",)),
    "a crowded zip directory": Checkpoint(crowded_zip, LARGE),
    "two pickles in one zip": Checkpoint(two_pickles, ("expected one pickle, found 2",)),
    "10^12 elements of stride 0": Checkpoint(saved({**good(), "conv_in.weight": GIANT}), ("claim 40000",)),
    "10^12 elements of stride 0, legacy": Checkpoint(saved({"x": GIANT}, legacy=True), ("claim 40000",)),
    "10^12 elements by hand": Checkpoint(zipped(entry(tensor(storage(1), [10**6, 10**6], [0, 0]))), ("claim 40000",)),
    "a storage larger than its bytes": Checkpoint(
        zipped(entry(tensor(storage(10**9), [10**9], [1]))), ("record size (4 bytes) does not match",)
    ),
    "a storage of less than nothing": Checkpoint(zipped(entry(tensor(storage(-1), [1], [1]))), DAMAGED),
    "a tensor beyond its storage": Checkpoint(zipped(entry(tensor(storage(1), [10**9], [1]))), ("not resizable",)),
    "a view at a negative stride": Checkpoint(zipped(entry(tensor(storage(1), [9], [-1]))), DAMAGED),
    "a bytearray of 100 GB": Checkpoint(
        zipped(entry(called("__builtin__.bytearray", number(10**11)))), ("bytearray", *RUNS)
    ),
    "a tensor turned into a full one": Checkpoint(
        zipped(
            entry(
                called(
                    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
                    tensor(storage(1), [10**9], [0]),
                    named("torch.float64"),
                    text("cpu"),
                    b"\x89",
                )
            )
        ),
        ("_rebuild_device_tensor_from_cpu_tensor", *RUNS),
    ),
    "a numpy scalar of 2 GB": Checkpoint(
        zipped(entry(called("numpy.core.multiarray.scalar", called("numpy.dtype", text("V2000000000"))))),
        ("a numpy V2000000000",),
    ),
    "a text encoded for hours": Checkpoint(
        zipped(entry(called("_codecs.encode", text("".join(map(chr, range(0x400, 0xD000))) * 20), text("punycode")))),
        ("_codecs.encode with another codec", *RUNS),
    ),
    "the same, the codec hidden": Checkpoint(
        zipped(entry(called("_codecs.encode", text("é" * 10**6), text("punycode"), text("latin1")))),
        ("_codecs.encode with another codec", *RUNS),
    ),
    "a key nested two million deep": Checkpoint(zipped(nested_key()), ("nested more than 100 levels deep",)),
    "the same in a plain pickle": Checkpoint(raw(nested_key()), ("nested more than 100 levels deep",)),
    "a key that doubles 60 times": Checkpoint(zipped(doubling_key()), ("more than 500000 steps",)),
    "a pickle that keeps the reader busy": Checkpoint(
        zipped(BEGIN + b"]" * ((4 << 20) - 9) + STOP), ("more than 500000 steps",)
    ),
    "a pickle of 5 MB": Checkpoint(zipped(BEGIN + b"0" * (5 << 20)), LARGE),
    "not a dict": Checkpoint(saved([1, 2]), ("expected a dict of tensors, found a list",)),
    "names that are no text": Checkpoint(saved({("a", 1): torch.zeros(1)}), ("a name that is not text",)),
    "missing, extra and mis-shaped names": Checkpoint(
        saved(misfit()),
        (
            "1 missing, 1 unexpected, 1 of another shape",
            "block1.conv1.weight",
            r"\x1b[2Jsurplus",
            "block2.conv1.weight: expected",
        ),
    ),
    "NaN weights": Checkpoint(saved(not_finite(float("nan"))), ("NaN or Inf in 1 tensors", "block3.conv2.weight")),
    "infinite weights, safetensors": Checkpoint(safe(not_finite(float("inf"))), ("NaN or Inf in 1 tensors",)),
    "a record nested 100,000 deep": Checkpoint(
        saved({"model": good(), "kd_cache": "[" * 100_000}), ("record kd_cache is not JSON",)
    ),
    "a sparse file over the cap": Checkpoint(sparse(MOST_BYTES + 1, b"PK\x03\x04"), ("--max-checkpoint-bytes",)),
    "safetensors header over 100 MB": Checkpoint(
        sparse(200_000_008, struct.pack("<Q", 200_000_000) + b"{"), ("header claims 200000000 bytes",)
    ),
    "safetensors header of 90 MB": Checkpoint(
        sparse(90_000_008, struct.pack("<Q", 90_000_000) + b'{"a":[' + b"[]," * 1000),
        ("safetensors header claims 90000000 bytes",),
    ),
    "safetensors header beyond the file": Checkpoint(header({}, length=1000), ("header claims 1000 bytes",)),
    "safetensors header of lists": Checkpoint(header(b'{"a":' + b"[" * 100_000), DAMAGED),
    "overlapping safetensors": Checkpoint(header(floats((0, 8), (0, 8)), bytes(8)), DAMAGED),
    "safetensors with a hole": Checkpoint(header(floats((0, 8), (12, 20)), bytes(20)), DAMAGED),
    "safetensors of 2^80 elements": Checkpoint(header(floats((0, 8), shape=[1 << 40, 1 << 40]), bytes(8)), DAMAGED),
    "safetensors with bytes behind": Checkpoint(header(floats((0, 8)), bytes(16)), DAMAGED),
    "a FIFO": Checkpoint(lambda folder: os.mkfifo(folder / EVIL), ("pipe or device",)),
    "a directory": Checkpoint(lambda folder: (folder / EVIL).mkdir(), ("found a directory",)),
    "a device": Checkpoint(lambda folder: (folder / EVIL).symlink_to("/dev/zero"), ("pipe or device",)),
    "a loop of links": Checkpoint(lambda folder: (folder / EVIL).symlink_to(EVIL), ("symbolic links",)),
}
