"""Feature files, paths and manifests that somebody made to do harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from conftest import World
from hostile_checkpoints import CANARY, Touch

GOOD = np.random.default_rng(0).normal(size=(12, 20)).astype(np.float32)
CODE = f"__import__('os').system('touch {CANARY}')"


# -- features ----------------------------------------------------------------------------------------------------------


class Feature(NamedTuple):
    """``make(path)`` puts it in a feature's place; ``says`` are words that no other error has."""

    make: Callable[[Path], object]
    says: str


def npy(header: str | bytes, payload: bytes = b"", version: int = 1) -> bytes:
    """A file with any header at all."""
    written = header.encode("latin1") if isinstance(header, str) else header
    length = struct.pack("<H" if version == 1 else "<I", len(written))
    return b"\x93NUMPY" + bytes([version, 0]) + length + written + payload


def described(
    shape: object, descr: object = "<f4", fortran: object = False, extra: str = "", payload: bytes = bytes(24)
) -> bytes:
    return npy(f"{{'descr': {descr!r}, 'fortran_order': {fortran!r}, 'shape': {shape!r}{extra}}}\n", payload)


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def array(values: np.ndarray) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, values, allow_pickle=True)
        path.write_bytes(buffer.getvalue())

    return make


def objects() -> np.ndarray:
    made = np.empty((1, 1), object)
    made[0, 0] = Touch()
    return made


def not_finite(value: float, dtype: str = "<f4") -> np.ndarray:
    made = np.zeros((12, 20), dtype)
    made[3, 4] = value
    return made


def npz(path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=GOOD)
    path.write_bytes(buffer.getvalue())


def sparse(length: int, start: bytes) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, length)

    return make


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something that is made, not written, in a file's place."""

    def remake(path: Path) -> None:
        path.unlink()
        make(path)

    return remake


SHAPE = "not a tuple of at most 8 possible sizes"
PLAIN = "not a plain description of an array"
DTYPE = "its dtype is not float32"

FEATURES: dict[str, Feature] = {
    "objects": Feature(array(objects()), DTYPE),
    "a pickle": Feature(raw(pickle.dumps(Touch())), "not a .npy file"),
    "an npz": Feature(npz, "not a .npy file"),
    "empty": Feature(raw(b""), "it is empty"),
    "truncated": Feature(lambda path: os.truncate(path, 500), "promises 1088 bytes"),
    "truncated in its header": Feature(lambda path: os.truncate(path, 50), "truncated within its header"),
    "an array and more": Feature(lambda path: path.write_bytes(path.read_bytes() + b"0"), "the file has 1089"),
    "a version of its own": Feature(raw(npy("{}", version=4)), "unknown .npy version 04.00"),
    "a header of 4 GB": Feature(raw(b"\x93NUMPY\x02\0\xff\xff\xff\xff{}"), "claims 4294967295 bytes"),
    "a header over 10 kB": Feature(raw(npy(" " * 10_001, version=2)), "claims 10001 bytes, expected at most 10000"),
    "__import__ in the header": Feature(raw(npy(CODE)), PLAIN),
    "__import__ as the shape": Feature(
        raw(npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {CODE}}}", bytes(24))), PLAIN
    ),
    "a header that Python remarks on": Feature(
        raw(npy("{'descr': '\\d', 'fortran_order': 1is 1, 'shape': (1,)('a')}")), PLAIN
    ),
    "a header of brackets": Feature(raw(npy("(" * 9_999)), PLAIN),
    "a header of signs": Feature(raw(npy("-" * 9_998 + "1")), "header"),
    "shape 10^12": Feature(raw(described((10**12, 3))), SHAPE),
    "shape as a power": Feature(raw(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9**9**9,)}")), PLAIN),
    "a negative shape": Feature(raw(described((-1, -24))), SHAPE),
    "a shape that overflows to 24 bytes": Feature(raw(described((1 << 32, 1 << 32, 6))), SHAPE),
    "a shape that multiplies": Feature(raw(described((1 << 27, 1 << 27))), "the file has"),
    "3000 dimensions": Feature(raw(described((1,) * 3000, payload=bytes(4))), SHAPE),
    "a dimension of 9000 digits": Feature(raw(npy("{'descr': '<f4', 'shape': (" + "9" * 9000 + ",)}")), PLAIN),
    "a structured dtype": Feature(array(np.zeros((2, 3), [("a", "<f4"), ("b", "<f4")])), DTYPE),
    "a dtype of 4 GB": Feature(raw(described((2, 3), "V4294967295")), DTYPE),
    "big-endian": Feature(array(GOOD.astype(">f4")), DTYPE),
    "float64": Feature(array(GOOD.astype("f8")), DTYPE),
    "NaN": Feature(array(not_finite(np.nan)), "frame 3, bin 4 is nan"),
    "infinity": Feature(array(not_finite(-np.inf, "<f2")), "frame 3, bin 4 is -inf"),
    "a million NaN": Feature(array(np.full((50_000, 20), np.nan, np.float32)), "frame 0, bin 0 is nan"),
    "rank 1": Feature(array(np.zeros(240, np.float32)), "its shape is [240]"),
    "rank 3": Feature(array(np.zeros((1, 12, 20), np.float32)), "its shape is [1, 12, 20]"),
    "another F": Feature(array(np.zeros((12, 21), np.float32)), "has 21 bins, expected 20"),
    "zero frames": Feature(array(np.zeros((0, 20), np.float32)), "its shape is [0, 20]"),
    "zero bins": Feature(array(np.zeros((12, 0), np.float32)), "its shape is [12, 0]"),
    "16 GB that take no room": Feature(sparse(1 << 34, described((1 << 27, 32), payload=b"")), "--max-feature-bytes"),
    "escapes in the header": Feature(
        raw(npy("{'descr': '\x1b[2J\x1b]0;owned\x07', 'fortran_order': False, 'shape': (2, 3)}", bytes(24))), r"\x1b[2J"
    ),
    "a FIFO": Feature(replaced(os.mkfifo), "not a regular file"),
    "a folder": Feature(replaced(Path.mkdir), "not a regular file"),
    "nothing": Feature(Path.unlink, "does not exist"),
}


# -- paths -------------------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    """``make(world)`` arranges the files and returns the name that the manifest then gives a sample."""

    make: Callable[[World], str]
    code: int
    kind: str
    says: str


def linked(target: str, folder: str = "") -> Callable[[World], str]:
    """A link in the data root; the sample is at its end, or in the folder at its end."""

    def make(world: World) -> str:
        (world.root / "link").symlink_to(target)
        return f"link/{folder}" if folder else "link"

    return make


def unix_socket(world: World) -> str:
    here = Path.cwd()
    os.chdir(world.root)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
    os.chdir(here)
    return "s"


def fifo(world: World) -> str:
    os.mkfifo(world.root / "fifo")
    return "fifo"


def links_in_a_ring(world: World) -> str:
    (world.root / "a").symlink_to("b")
    (world.root / "b").symlink_to("a")
    return "a/x.npy"


OUTSIDE = "outside the data root"
PATHS: dict[str, Named] = {
    "dot dot": Named(lambda world: "../outside/secret.npy", 1, "FeatureError", OUTSIDE),
    "dot dot in the middle": Named(lambda world: "x/../../outside/secret.npy", 1, "FeatureError", OUTSIDE),
    "absolute": Named(lambda world: str(world.root.parent / "outside/secret.npy"), 1, "FeatureError", OUTSIDE),
    "absolute, through the root": Named(
        lambda world: f"{world.root}/../outside/secret.npy", 1, "FeatureError", OUTSIDE
    ),
    "a link out": Named(linked("../outside/secret.npy"), 1, "FeatureError", OUTSIDE),
    "a linked folder": Named(linked("../outside", "secret.npy"), 1, "FeatureError", OUTSIDE),
    "a password file": Named(lambda world: "/etc/passwd", 1, "FeatureError", OUTSIDE),
    "a link to a device": Named(linked("/dev/zero"), 1, "FeatureError", OUTSIDE),
    "a link to this process": Named(linked("/proc/self/fd/0"), 1, "FeatureError", "link"),
    "a loop": Named(linked("link"), 1, "FeatureError", "Too many levels of symbolic links"),
    "a loop of folders": Named(links_in_a_ring, 1, "FeatureError", "Too many levels of symbolic links"),
    "a FIFO": Named(fifo, 1, "FeatureError", "not a regular file"),
    "a socket": Named(unix_socket, 1, "FeatureError", "No such device"),
    "a folder": Named(lambda world: "x", 1, "FeatureError", "not a regular file"),
    "the data root": Named(lambda world: ".", 1, "FeatureError", "not a regular file"),
    "a file as a folder": Named(lambda world: f"{world.permitted()[1]}/x.npy", 1, "FeatureError", "Not a directory"),
    "a name of 256 bytes": Named(lambda world: "n" * 256, 1, "FeatureError", "File name too long"),
    "a path of 5000 bytes": Named(lambda world: "n/" * 2500, 1, "FeatureError", "File name too long"),
    "a path of a megabyte": Named(lambda world: "n/" * 500_000, 1, "FeatureError", "(1000000 characters)"),
    "terminal escapes": Named(
        lambda world: "\x1b[2J\x1b]0;owned\x07\r.npy", 1, "FeatureError", r"\x1b[2J\x1b]0;owned\x07\r"
    ),
    "text that runs backwards": Named(lambda world: "x\u202egpj.npy", 1, "FeatureError", r"x\u202egpj.npy"),
    "markup": Named(lambda world: "[bold red]x[/bold red].npy", 1, "FeatureError", "[bold red]x[/bold red].npy"),
    "NUL": Named(lambda world: "x\0.npy", 2, "ManifestError", "NUL"),
    "a lone surrogate": Named(lambda world: "x\ud800.npy", 2, "ManifestError", r"x\ud800.npy"),
    "no name": Named(lambda world: "", 2, "ManifestError", "file is empty"),
    "another sample, a//b": Named(
        lambda world: world.permitted()[1].replace("/", "//"), 2, "ManifestError", "also written"
    ),
    "another sample, ./a": Named(lambda world: f"./{world.permitted()[1]}", 2, "ManifestError", "also written"),
    "a test sample, spelled otherwise": Named(
        lambda world: f"y/../{world.rows[-1]['file']}", 6, "DataLeakageError", "another split"
    ),
    "a test sample through a linked folder": Named(
        linked("x", "shopping_mall-madrid-6-0-a.npy"), 6, "DataLeakageError", "another split"
    ),
}

# -- manifests ---------------------------------------------------------------------------------------------------------


class Manifest(NamedTuple):
    """``change(text)`` is the hostile one, made of a good one."""

    change: Callable[[bytes], bytes]
    says: str


def first_row(**fields: Any) -> Callable[[bytes], bytes]:
    def change(text: bytes) -> bytes:
        content = json.loads(text)
        content["train"][0].update(fields)
        return json.dumps(content).encode()

    return change


def swapped(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(text: bytes) -> bytes:
        assert old in text
        return text.replace(old, new, 1)

    return change


JSON = "not valid UTF-8 JSON"
MANIFESTS: dict[str, Manifest] = {
    "a key twice": Manifest(swapped(b'"domain": 0', b'"domain": 0, "domain": 1'), "key domain occurs twice"),
    "a list twice": Manifest(swapped(b'"val": []', b'"train": []'), "key train occurs twice"),
    "a key with escapes twice": Manifest(
        swapped(b'"domain": 0', rb'"domain": 0, "\u001b[2J": 1, "\u001b[2J": 1'), r"key \x1b[2J occurs twice"
    ),
    "NaN": Manifest(swapped(b'"scene_label": 0', b'"scene_label": NaN'), "NaN is not JSON"),
    "-Infinity": Manifest(swapped(b'"scene_label": 0', b'"scene_label": -Infinity'), "-Infinity is not JSON"),
    "100k nesting": Manifest(lambda text: b"[" * 100_000, "nested too deeply"),
    "100k nesting of objects": Manifest(lambda text: b'{"train":' * 100_000, "nested too deeply"),
    "100k nesting in a row": Manifest(
        swapped(b'"domain": 0', b'"domain": 0, "x": ' + b"[" * 100_000 + b"]" * 100_000), "nested too deeply"
    ),
    "an integer of 10k digits": Manifest(swapped(b'"scene_label": 0', b'"scene_label": ' + b"9" * 10_000), JSON),
    "a number beyond all numbers": Manifest(
        swapped(b'"scene_label": 0', b'"scene_label": 1e999'), "scene_label must be an integer, found the number inf"
    ),
    "BOM": Manifest(lambda text: b"\xef\xbb\xbf" + text, "BOM"),
    "UTF-16": Manifest(lambda text: text.decode().encode("utf-16"), JSON),
    "truncated": Manifest(lambda text: text[: len(text) // 2], JSON),
    "empty": Manifest(lambda text: b"", JSON),
    "a pickle": Manifest(lambda text: pickle.dumps(Touch()), JSON),
    "a number": Manifest(lambda text: b"3", "expected a list of samples or an object of lists"),
    "lists of numbers": Manifest(lambda text: b'{"train": [1, 2]}', "train[0]: expected an object"),
    "a train that is an object": Manifest(lambda text: b'{"train": {}}', "train must be a list of samples"),
    "a file that is a list": Manifest(first_row(file=["x"]), "file must be a string, found a list"),
    "a label that is a truth value": Manifest(first_row(scene_label=True), "must be an integer, found a truth value"),
    "a label that is a text": Manifest(first_row(scene_label="0"), "must be an integer, found a string"),
    "a label out of range": Manifest(first_row(scene_label=-2), "scene_label is -2, expected 0 to 9"),
    "a split that is a number": Manifest(first_row(split=0), "split must be a word"),
    "a device with escapes": Manifest(first_row(device_id="\x1b[2J"), r"device_id is \"\x1b[2J\"".replace('\\"', '"')),
    "a format of tomorrow": Manifest(
        lambda text: b'{"format_version": 2, ' + text[1:], "expected the lists train, val, test, found also"
    ),
}
