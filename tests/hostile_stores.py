"""Indexes, plans, packs, row files and older caches that somebody made to do harm."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import xxhash
from conftest import World
from hostile_checkpoints import Touch
from hostile_data import array, described, objects
from store_fixtures import Rows, forge, plain_pack, seal_bytes

from kd_cache.store.origin import Fingerprint, Origin
from kd_cache.store.pack import Pack, open_pack


class Store(NamedTuple):
    """``make(world)`` spoils the cache.

    ``read`` is the exit status of opening, verifying and describing it, ``dump`` that of dumping into it; where that is
    0 the cache is whole again afterwards. ``says`` are words in what they say about it.
    """

    make: Callable[[World], object]
    says: str
    read: tuple[int, int, int] = (4, 4, 4)
    dump: int = 0


# -- the index ---------------------------------------------------------------------------------------------------------


def sealed(text: str) -> bytes:
    """The text with the digest that belongs to it."""
    head, _, _ = text.rpartition('"digest": "')
    unset = f'{head}"digest": "{"0" * 32}"\n }}\n}}\n'.encode("utf-8", "surrogatepass")
    return unset.replace(b"0" * 32, xxhash.xxh3_128_hexdigest(unset).encode())


def index(world: World) -> Path:
    return world.cache / "cache_index.json"


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[World], object]:
    """The index says something else, under the digest that belongs to it."""

    def make(world: World) -> None:
        content = json.loads(index(world).read_text())
        change(content)
        index(world).write_bytes(sealed(json.dumps(content, indent=1) + "\n"))

    return make


def replaced(old: str, new: str) -> Callable[[World], object]:
    """The same, for what ``json.dumps`` would not write."""

    def make(world: World) -> None:
        text = index(world).read_text()
        assert old in text
        index(world).write_bytes(sealed(text.replace(old, new, 1)))

    return make


def record(**changes: Any) -> Callable[[World], object]:
    return edited(lambda content: content["kd_cache"].update(changes))


def without(name: str) -> Callable[[World], object]:
    return edited(lambda content: content["kd_cache"].pop(name))


def teacher(**changes: Any) -> Callable[[World], object]:
    return edited(lambda content: content["kd_cache"]["teachers"]["tiny"].update(changes))


def settings(section: str, **changes: Any) -> Callable[[World], object]:
    return edited(lambda content: content["kd_cache"]["settings"][section].update(changes))


def text_of_index(content: bytes) -> Callable[[World], object]:
    return lambda world: index(world).write_bytes(content)


def in_place_of_index(make: Callable[[Path], object]) -> Callable[[World], object]:
    def remake(world: World) -> None:
        index(world).unlink()
        make(index(world))

    return remake


def sparse_index(size: int) -> Callable[[World], object]:
    """Zeros in front of a good end: the digest must be of them all."""

    def make(world: World) -> None:
        end = index(world).read_bytes()[-2000:]
        with index(world).open("wb") as file:
            file.seek(size)
            file.write(end)

    return make


def as_a_teacher(name: str) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        content["kd_cache"]["teachers"][name] = content["kd_cache"]["teachers"]["tiny"]
        content[name] = content["tiny"]

    return change


JSON = "it is not JSON"
ENTRY = "an entry is missing or malformed"
OTHER = "its bytes do not match their digest"
NEWER = (1, 1, 1)

INDEXES: dict[str, Store] = {
    "empty": Store(text_of_index(b""), JSON),
    "truncated": Store(lambda world: os.truncate(index(world), 1000), JSON),
    "its last byte is gone": Store(lambda world: os.truncate(index(world), index(world).stat().st_size - 1), OTHER),
    "BOM": Store(lambda world: index(world).write_bytes(b"\xef\xbb\xbf" + index(world).read_bytes()), "index"),
    "100k nesting": Store(text_of_index(b'{"kd_cache":' + b"[" * 100_000), JSON),
    "100k nesting under its digest": Store(replaced('"missing": {}', f'"missing": {"[" * 100_000}'), JSON),
    "a key twice": Store(replaced('"files": true', '"files": true,\n "files": false'), "occurs twice"),
    "NaN": Store(replaced('"begun": ', '"x": NaN, "begun": '), "NaN is not JSON"),
    "an integer of 10k digits": Store(replaced('"num_samples": 6', f'"num_samples": {"6" * 10_000}'), JSON),
    "a number beyond all numbers": Store(replaced('"num_samples": 6', '"num_samples": 1e999'), "num_samples"),
    "a pickle": Store(text_of_index(pickle.dumps(Touch())), JSON),
    "a list": Store(text_of_index(b"[]"), "it is not an object"),
    "counts less than nothing": Store(edited(lambda content: content.update(num_samples=-1)), "num_samples"),
    "counts in text": Store(edited(lambda content: content.update(num_samples="6")), "num_samples"),
    "no settings": Store(without("settings"), ENTRY, (0, 0, 4)),
    "no policy": Store(without("split_policy"), ENTRY, (0, 0, 4)),
    "no environment": Store(without("environment"), ENTRY, (0, 0, 4)),
    "no manifest": Store(without("manifest"), ENTRY, (0, 4, 4)),
    "no teachers": Store(without("teachers"), ENTRY),
    "teachers in a list": Store(record(teachers=["tiny"]), "kd_cache.teachers"),
    "settings in a list": Store(record(settings=[]), "kd_cache.settings"),
    "settings whose scenes are text": Store(
        settings("values", num_scenes="ten"), "kd_cache.settings.values.num_scenes"
    ),
    "settings whose paths are numbers": Store(settings("paths", json_path=3), "kd_cache.settings.paths.json_path"),
    "settings that allow a text": Store(settings("paths", allow_outside="/"), "kd_cache.settings.paths.allow_outside"),
    "sources that are lists": Store(settings("sources", target=[]), "kd_cache.settings.sources.target"),
    "files that are text": Store(record(files="yes"), "kd_cache.files"),
    "missing in a list": Store(record(missing=["x"]), "kd_cache.missing"),
    "missing for no reason": Store(record(missing={"x": 3}), "kd_cache.missing.x"),
    "devices that count in text": Store(record(per_device={"A": "4"}), "kd_cache.per_device.A"),
    "a checkpoint that is a list": Store(
        teacher(source={"checkpoint": ["x"], "built_in": True}), "kd_cache.teachers.tiny.source.checkpoint"
    ),
    "earlier parts that are a number": Store(teacher(earlier=3), "kd_cache.teachers.tiny.earlier"),
    "earlier parts that are lists": Store(teacher(earlier=[["weights"]]), "kd_cache.teachers.tiny.earlier"),
    "an accuracy in text": Store(teacher(accuracy={"correct": "many", "rows": 3}), "kd_cache.teachers.tiny.accuracy"),
    "a pack outside": Store(teacher(packs=[["../../outside/x.h5", 6]]), "kd_cache.teachers.tiny.packs"),
    "a pack without rows": Store(teacher(packs=[[f"tiny-{'1' * 32}.h5", 0]]), "kd_cache.teachers.tiny.packs"),
    "a pack and nothing else": Store(teacher(packs=f"tiny-{'1' * 32}.h5"), "kd_cache.teachers.tiny.packs"),
    "no classes": Store(teacher(num_classes=0), "kd_cache.teachers.tiny.num_classes"),
    "class names that are a text": Store(teacher(class_names="0123456789"), "kd_cache.teachers.tiny.class_names"),
    "too few class names": Store(teacher(class_names=["bus"]), ENTRY),
    "parts of another fingerprint": Store(teacher(parts={"weights": "others"}), ENTRY),
    "parts that are no Unicode": Store(teacher(parts={"weights": "\ud800"}), ENTRY),
    "a teacher named ../x": Store(edited(as_a_teacher("../x")), ENTRY),
    "a teacher named packs": Store(edited(as_a_teacher("packs")), ENTRY),
    "a teacher named after an escape": Store(edited(as_a_teacher("\x1b[2J")), r"\x1b[2J"),
    "a map of numbers": Store(edited(lambda content: content["tiny"].update(x=3)), "(tiny.x)", (0, 4, 4)),
    "no map": Store(edited(lambda content: content.pop("tiny")), ENTRY, (0, 4, 4)),
    "permitted samples outside": Store(
        record(permitted={"file": "../../outside/secret.npy", "count": 6}), "(kd_cache.permitted)"
    ),
    "permitted samples that are nowhere": Store(
        record(permitted={"file": f"permitted-{'a' * 32}.npy", "count": 6}), "permitted-aaaa", (4, 4, 0)
    ),
    "another cache's": Store(record(adaptation="A2c"), "holds the cache of A2c", (0, 5, 0), 5),
    "format 3": Store(record(format_version=3), "has format version 3", NEWER, 1),
    "format 10^9": Store(record(format_version=10**9), "has format version 1000000000", NEWER, 1),
    "format 0": Store(record(format_version=0), "no kd-cache wrote that"),
    "format true": Store(record(format_version=True), "no kd-cache wrote that"),
    "format in text": Store(record(format_version="1"), "no kd-cache wrote that"),
    "a FIFO": Store(in_place_of_index(os.mkfifo), "not a regular file", (1, 3, 1), 1),
    "a folder": Store(in_place_of_index(Path.mkdir), "cache_index.json", (1, 3, 1), 1),
    "a loop of links": Store(
        in_place_of_index(lambda path: path.symlink_to(path.name)), "symbolic links", (1, 3, 1), 1
    ),
    "a link to a password file": Store(in_place_of_index(lambda path: path.symlink_to("/etc/passwd")), JSON),
    "1 TB that takes no room": Store(sparse_index(1 << 40), "expected at most", NEWER, 1),
    "200 MB that take no room": Store(sparse_index(200 << 20), OTHER),
}

# -- the plan ----------------------------------------------------------------------------------------------------------

PLANS: dict[str, bytes] = {
    "empty": b"",
    "truncated": b'{"batch_size": 32, "bins": 20, "batches": {"12x20',
    "BOM": b'\xef\xbb\xbf{"batch_size": 32, "bins": 20, "batches": {}}',
    "100k nesting": b"[" * 100_000,
    "100k nesting in batches": b'{"batch_size": 1, "bins": 20, "batches": ' + b'{"a":' * 100_000,
    "a key twice": b'{"batch_size": 32, "bins": 20, "batches": {"12x20": 4, "12x20": 2}}',
    "NaN": b'{"batch_size": NaN, "bins": 20, "batches": {}}',
    "an integer of 10k digits": b'{"batch_size": ' + b"9" * 10_000 + b', "bins": 20, "batches": {}}',
    "a shape of 10k digits": b'{"batch_size": 32, "bins": 20, "batches": {"' + b"9" * 10_000 + b'x20": 4}}',
    "batches of 10^9": b'{"batch_size": 1000000000, "bins": 20, "batches": {"12x20": 1000000000}}',
    "batches of less than nothing": b'{"batch_size": 32, "bins": 20, "batches": {"12x20": -4}}',
    "batches in a list": b'{"batch_size": 32, "bins": 20, "batches": ["12x20"]}',
    "a truth value": b'{"batch_size": true, "bins": 20, "batches": {}}',
    "a name that is no Unicode": b'{"batch_size": 32, "bins": 20, "batches": {"\\ud800": 4}, "digest": "0"}',
    "another's digest": b'{"batch_size": 16, "bins": 20, "batches": {"12x20": 2}, "digest": "0"}',
    "a number": b"3",
    "a pickle": pickle.dumps(Touch()),
    "2 MB of brackets": b"[" + b"[]," * 690_000 + b"[]]",
}

# -- packs -------------------------------------------------------------------------------------------------------------


def pack_path(world: World, name: str = "tiny") -> Path:
    (path,) = (world.cache / "packs").glob(f"{name}-*.h5")
    return path


def rows_of(pack: Pack) -> Rows:
    return Rows(pack.files, pack.keys.copy(), pack.inputs.copy(), pack.logits.copy())


Build = Callable[[h5py.File, Rows, Origin], object]


def forged(build: Build, version: int = 1) -> Callable[[World], object]:
    """In place of ``tiny``'s pack one whose user block and name are right, whatever ``build`` puts into it."""

    def make(world: World) -> None:
        path = pack_path(world)
        pack = open_pack(path)
        rows, made_by = rows_of(pack), pack.origin
        path.unlink()
        forged_path = forge(path.parent, lambda file: build(file, rows, made_by), "tiny", version)
        teacher(packs=[[forged_path.name, 6]])(world)

    return make


def good_but(change: Callable[[h5py.File, Rows], object]) -> Build:
    def build(file: h5py.File, rows: Rows, made_by: Origin) -> None:
        plain_pack(file, rows, made_by)
        change(file, rows)

    return build


def anew(file: h5py.File, name: str, **options: Any) -> None:
    del file[name]
    file.create_dataset(name, **options)


def dataset(name: str, shape: tuple[int, ...], dtype: str, **options: Any) -> Build:
    """A dataset created anew with these settings and never written."""
    return good_but(lambda file, _: anew(file, name, shape=shape, dtype=dtype, **options))


def filtered(**options: Any) -> Build:
    return good_but(lambda file, rows: anew(file, "logits", data=rows.logits, **options))


def changed(name: str, value: Callable[[np.ndarray], Any]) -> Build:
    return good_but(lambda file, _: anew(file, name, data=value(file[name][:])))


def attribute(name: str, value: Any) -> Build:
    """Another value, or ``None`` for none at all."""
    return good_but(lambda file, _: file.attrs.__delitem__(name) if value is None else set_attribute(file, name, value))


def set_attribute(file: h5py.File, name: str, value: Any) -> None:
    del file.attrs[name]
    file.attrs[name] = value


def linked(name: str, link: Any) -> Build:
    def change(file: h5py.File, _: Rows) -> None:
        del file[name]
        file[name] = link

    return good_but(change)


def external_storage(file: h5py.File, rows: Rows) -> None:
    del file["logits"]
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_external(b"/etc/passwd", 0, rows.logits.nbytes)
    space = h5py.h5s.create_simple(rows.logits.shape)
    h5py.h5d.create(file.id, b"logits", h5py.h5t.IEEE_F32LE, space, settings)


def virtual(file: h5py.File, rows: Rows) -> None:
    del file["logits"]
    layout = h5py.VirtualLayout(rows.logits.shape, "<f4")
    layout[:] = h5py.VirtualSource("/elsewhere.h5", "logits", rows.logits.shape)
    file.create_virtual_dataset("logits", layout)


def parts_of(value: Any) -> Build:
    """Parts that are not names and texts, under the fingerprint that they have."""

    def build(file: h5py.File, rows: Rows, made_by: Origin) -> None:
        plain_pack(file, rows, replace(made_by, fingerprint=Fingerprint(value)))

    return build


def torn(share: float) -> Callable[[World], object]:
    return lambda world: os.truncate(pack_path(world), int(pack_path(world).stat().st_size * share))


def zeroed(world: World) -> None:
    """What a disk does that lost the second half of a file."""
    size = pack_path(world).stat().st_size
    with pack_path(world).open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))


def torn_under_a_digest(world: World) -> None:
    """Half of the HDF5 file behind a user block that is right for it."""
    path = pack_path(world)
    body = path.read_bytes()[512:]
    path.unlink()
    teacher(packs=[[seal_bytes(path.parent, body[: len(body) // 2], "tiny").name, 6]])(world)


def no_hdf5(world: World) -> None:
    path = pack_path(world)
    path.unlink()
    teacher(packs=[[seal_bytes(path.parent, pickle.dumps(Touch()) * 100, "tiny").name, 6]])(world)


def in_place_of_pack(make: Callable[[Path], object]) -> Callable[[World], object]:
    def remake(world: World) -> None:
        path = pack_path(world)
        path.rename(world.root / "aside.h5")
        make(path)

    return remake


def named_pack(name: str) -> Callable[[World], object]:
    """One more pack, good in everything, of a teacher called so; and an index that cannot contradict it."""

    def make(world: World) -> None:
        pack = open_pack(pack_path(world))
        made_by = Origin(name, Fingerprint({"weights": "w", "architecture": "a"}), "logits", 10, "fp32")
        rows = rows_of(pack)
        forge(world.cache / "packs", lambda file: plain_pack(file, rows, made_by), name)
        index(world).write_bytes(b"{")

    return make


def sparse_pack(world: World) -> None:
    os.truncate(pack_path(world), 300 << 20)


ABSENT = (4, 4, 0)
"""`info` describes what the index says."""
PLAIN = "is not a plain contiguous dataset"
LIES = "does not lie in the file"
COUNTS = "its datasets disagree about the number of rows"


def refused_pack(build: Build, says: str, read: tuple[int, int, int] = ABSENT, dump: int = 0) -> Store:
    return Store(forged(build), says, read, dump)


STRING = "not a fixed-length string"
STRUCTURES: dict[str, tuple[Build, str]] = {
    "doubles": (changed("logits", lambda logits: logits.astype("<f8")), PLAIN),
    "big-endian": (changed("logits", lambda logits: logits.astype(">f4")), PLAIN),
    "halves where floats are promised": (changed("logits", lambda logits: logits.astype("<f2")), PLAIN),
    "integers": (changed("logits", lambda logits: logits.astype("<i4")), PLAIN),
    "flat logits": (changed("logits", lambda logits: logits.reshape(-1)), PLAIN),
    "one logit": (changed("logits", lambda logits: np.float32(1)), PLAIN),
    "strings": (changed("logits", lambda logits: np.array([b"abc"] * len(logits))), PLAIN),
    "a group": (good_but(lambda file, _: (file.__delitem__("logits"), file.create_group("logits"))), PLAIN),
    "one dataset too many": (good_but(lambda file, _: file.create_dataset("more", data=np.zeros(3))), "more"),
    "a dataset missing": (good_but(lambda file, _: file.__delitem__("inputs")), "expected the datasets"),
    "no rows": (lambda file, rows, made_by: plain_pack(file, rows.part([]), made_by), ""),
    "keys of 15 bytes": (changed("keys", lambda keys: keys[:, :15]), COUNTS),
    "checksums of one row less": (changed("checksums", lambda sums: sums[1:]), COUNTS),
    "checksums of 32 bits": (changed("checksums", lambda sums: sums.astype("<u4")), PLAIN),
    "offsets one too few": (changed("file_offsets", lambda offsets: offsets[:-1]), COUNTS),
    "offsets that do not begin at 0": (changed("file_offsets", lambda offsets: offsets + np.uint64(1)), "not laid out"),
    "signed offsets": (changed("file_offsets", lambda offsets: offsets.astype("<i8")), PLAIN),
    "a forged fingerprint": (attribute("fingerprint", np.bytes_(b"0" * 64)), "fingerprint is not that of its parts"),
    "parts that are no JSON": (attribute("parts", np.bytes_(b"{")), "HDF5 cannot read it"),
    "parts that are numbers": (parts_of({"weights": 3}), "parts are not texts"),
    "a teacher that is not UTF-8": (attribute("teacher", np.bytes_(b"\xff\xfe")), "HDF5 cannot read it"),
    "an unknown dtype": (attribute("dtype", np.bytes_(b"bf16")), "unknown"),
    "another dtype": (attribute("dtype", np.bytes_(b"fp16")), PLAIN),
    "an unknown value kind": (attribute("value_kind", np.bytes_(b"softmax")), "unknown"),
    "too few class names": (attribute("class_names", np.bytes_(b'["bus"]')), "class names do not fit"),
    "class names that are no list": (attribute("class_names", np.bytes_(b'{"a":0,"b":1,"c":2}')), "class names"),
    "an attribute missing": (attribute("value_kind", None), STRING),
    "an array of strings": (attribute("value_kind", np.array([b"logits"])), STRING),
    "a number": (attribute("value_kind", 3), STRING),
}
"""Structures that a reader of packs refuses (test_pack), beside those of `PACKS`, which meet the commands as well."""

PACKS: dict[str, Store] = {
    "external storage": refused_pack(good_but(external_storage), PLAIN),
    "an external link": refused_pack(
        linked("logits", h5py.ExternalLink("/etc/passwd", "/logits")), "a link to elsewhere"
    ),
    "a soft link": refused_pack(linked("inputs", h5py.SoftLink("/keys")), "inputs is a link to elsewhere"),
    "a virtual dataset": refused_pack(good_but(virtual), PLAIN),
    "never written": refused_pack(dataset("logits", (6, 10), "<f4"), LIES),
    "2^40 rows": refused_pack(dataset("keys", (1 << 40, 16), "u1"), LIES),
    "2^62 rows": refused_pack(dataset("keys", (1 << 62, 16), "u1"), LIES),
    "gzip": refused_pack(filtered(compression="gzip"), PLAIN),
    "a bomb": refused_pack(
        dataset("logits", (1 << 22, 10), "<f4", chunks=(1 << 16, 10), compression="gzip", fillvalue=1), PLAIN
    ),
    "shuffled": refused_pack(filtered(shuffle=True), PLAIN),
    "a checksum filter": refused_pack(filtered(fletcher32=True), PLAIN),
    "chunks": refused_pack(filtered(chunks=(1, 10)), PLAIN),
    "resizable": refused_pack(filtered(maxshape=(None, 10)), PLAIN),
    "compact": refused_pack(changed("logits", lambda logits: logits[:, :, None]), PLAIN),
    "more keys than rows": refused_pack(changed("keys", lambda keys: np.vstack([keys, keys[:1] * 0 + 255])), COUNTS),
    "fewer rows than keys": refused_pack(changed("logits", lambda logits: logits[:5]), COUNTS),
    "fewer inputs than keys": refused_pack(changed("inputs", lambda inputs: inputs[:5]), COUNTS),
    "unsorted keys": refused_pack(changed("keys", lambda keys: keys[::-1].copy()), "its keys are not sorted"),
    "a key twice": refused_pack(changed("keys", lambda keys: keys[[0, 0, 2, 3, 4, 5]]), "its keys are not sorted"),
    "names beyond the names": refused_pack(
        changed("file_offsets", lambda offsets: offsets * np.uint64(1 << 40)), "not laid out one after the other"
    ),
    "names that go back": refused_pack(
        changed("file_offsets", lambda offsets: offsets[[0, 2, 1, 3, 4, 5, 6]]), "not laid out"
    ),
    "parts nested 50,000 deep": refused_pack(attribute("parts", np.bytes_(b"[" * 50_000)), "HDF5 cannot read it"),
    "parts of an integer of 10k digits": refused_pack(
        attribute("parts", np.bytes_(b'{"a":' + b"9" * 10_000 + b"}")), "HDF5 cannot read it"
    ),
    "parts of another fingerprint": refused_pack(
        attribute("parts", np.bytes_(b'{"weights":"others"}')), "fingerprint is not that of its parts"
    ),
    "another teacher's": refused_pack(attribute("teacher", np.bytes_(b"other")), "name does not carry its teacher"),
    "a teacher with escapes": refused_pack(attribute("teacher", np.bytes_(b"\x1b[2J")), r"\x1b[2J"),
    "a variable-length string": refused_pack(attribute("value_kind", "logits"), STRING),
    "an object reference": refused_pack(attribute("value_kind", h5py.h5r.Reference()), STRING),
    "format 3": Store(forged(attribute("format_version", np.bytes_(b"3")), 3), "has format version 3", (1, 1, 0), 1),
    "format 3 in its first bytes alone": Store(forged(plain_pack, 3), "name a newer one", ABSENT),
    "empty": Store(torn(0), "truncated within its first 512 bytes", ABSENT),
    "torn in its first bytes": Store(torn(0.02), "truncated within its first 512 bytes", ABSENT),
    "torn": Store(torn(0.5), "found", ABSENT),
    "half of it zeros": Store(zeroed, "do not match their digest", ABSENT),
    "torn under a right digest": Store(torn_under_a_digest, "is damaged", ABSENT),
    "no HDF5 under a right digest": Store(no_hdf5, "HDF5 cannot read it", ABSENT),
    "300 MB that take no room": Store(sparse_pack, "found 314572800", ABSENT),
    "a FIFO": Store(in_place_of_pack(os.mkfifo), "not a regular file", ABSENT),
    "a link to itself": Store(in_place_of_pack(lambda path: path.symlink_to(path.name)), "symbolic links", (1, 4, 0)),
    "a link out": Store(
        in_place_of_pack(lambda path: path.symlink_to(path.parents[3] / "aside.h5")), "not a regular file", ABSENT
    ),
    "a folder": Store(in_place_of_pack(Path.mkdir), "not a regular file", ABSENT, 1),
    "a pack of the teacher ..": Store(named_pack(".."), JSON),
    "a pack of the teacher packs": Store(named_pack("packs"), JSON),
}

# -- what else is in a cache -------------------------------------------------------------------------------------------


def permitted(make: Callable[[Path], object]) -> Callable[[World], object]:
    def spoil(world: World) -> None:
        (path,) = world.cache.glob("permitted-*.npy")
        make(path)

    return spoil


def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def remake(path: Path) -> None:
        path.unlink()
        make(path)

    return remake


def pending(make: Callable[[World, Path], object]) -> Callable[[World], object]:
    """One more record of a dump that is not finished."""

    def spoil(world: World) -> None:
        (world.cache / "pending").mkdir(exist_ok=True)
        make(world, world.cache / "pending" / "0123456789abcdef.json")

    return spoil


def pending_index(change: Callable[[dict[str, Any]], object]) -> Callable[[World], object]:
    def make(world: World, path: Path) -> None:
        content = json.loads(index(world).read_text())
        change(content)
        path.write_bytes(sealed(json.dumps(content, indent=1) + "\n"))

    return pending(make)


def moved_out(name: str) -> Callable[[World], object]:
    """A folder of the cache is a link to one outside, in which somebody keeps files of his own."""

    def make(world: World) -> None:
        outside = world.root.parent / "outside" / name
        outside.mkdir()
        for path in (world.cache / name).glob("*"):
            path.rename(outside / path.name)
        for own in (f"tiny-{'0' * 32}.h5", f"{'0' * 32}.npy", "own.json", ".tmp-1-0123456789abcdef"):
            (outside / own).write_text("mine")
        if (world.cache / name).exists():
            (world.cache / name).rmdir()
        (world.cache / name).symlink_to(outside)

    return make


FREE = (0, 0, 0)
LINK = "is a link"
OTHERS: dict[str, Store] = {
    "truncated permitted samples": Store(permitted(lambda path: os.truncate(path, 100)), "match its name", (4, 4, 0)),
    "no permitted samples": Store(permitted(Path.unlink), "is not there", (4, 4, 0)),
    "permitted samples in a pickle": Store(
        permitted(lambda path: path.write_bytes(pickle.dumps(Touch()))), "do not match its name", (4, 4, 0)
    ),
    "permitted samples in a FIFO": Store(permitted(instead(os.mkfifo)), "not a regular file", (1, 1, 0), 1),
    "permitted samples in a folder": Store(permitted(instead(Path.mkdir)), "Is a directory", (1, 1, 0), 1),
    "permitted samples elsewhere": Store(
        permitted(instead(lambda path: path.symlink_to("/etc/passwd"))), "do not match its name", (4, 4, 0)
    ),
    "1 TB of permitted samples": Store(
        permitted(lambda path: os.truncate(path, 1 << 40)), "expected at most", (4, 4, 0)
    ),
    "a truncated pending record": Store(pending(lambda _, path: path.write_bytes(b"{")), "it is passed over", FREE),
    "a pending pickle": Store(
        pending(lambda _, path: path.write_bytes(pickle.dumps(Touch()))), "it is passed over", FREE
    ),
    "a pending record of an older script": Store(
        pending(lambda _, path: path.write_bytes(b'{"tiny": {}}')), "it is passed over", FREE
    ),
    "a pending teacher named ../x": Store(pending_index(as_a_teacher("../x")), "(../x)", FREE),
    "a pending record of format 3": Store(
        pending_index(lambda content: content["kd_cache"].update(format_version=3)), "version 3", (0, 1, 1), 1
    ),
    "a pending FIFO": Store(pending(lambda _, path: os.mkfifo(path)), "not a regular file", (0, 1, 1), 1),
    "a pending folder": Store(pending(lambda _, path: path.mkdir()), "Is a directory", (0, 1, 1), 1),
    "1 TB of pending record": Store(
        pending(lambda _, path: (path.touch(), os.truncate(path, 1 << 40))), "expected at most", (0, 1, 1), 1
    ),
    "packs that are elsewhere": Store(moved_out("packs"), LINK, (1, 1, 1), 1),
    "pending records that are elsewhere": Store(moved_out("pending"), LINK, (0, 1, 1), 1),
    "a view that is elsewhere": Store(moved_out("tiny"), LINK, (0, 0, 0), 1),
    "a folder of nobody's that is elsewhere": Store(moved_out("foo"), "", (0, 0, 0)),
}

# -- row files, older caches -------------------------------------------------------------------------------------------


def in_place_of_row(make: Callable[[Path], object]) -> Callable[[World], object]:
    def remake(world: World) -> None:
        path = world.view("tiny", world.permitted()[0])
        path.unlink()
        make(path)

    return remake


ROW_FILES: dict[str, Callable[[World], object]] = {
    "objects": in_place_of_row(array(objects())),
    "a pickle": in_place_of_row(lambda path: path.write_bytes(pickle.dumps(Touch()))),
    "16 GB that take no room": in_place_of_row(lambda path: (path.touch(), os.truncate(path, 1 << 34))),
    "a FIFO": in_place_of_row(os.mkfifo),
    "a link out": in_place_of_row(lambda path: path.symlink_to("/etc/passwd")),
    "a link to a device": in_place_of_row(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": in_place_of_row(lambda path: path.symlink_to(path.name)),
    "another row": in_place_of_row(array(np.zeros(10, np.float32))),
}


def older(change: Callable[[World, dict[str, Any]], object]) -> Callable[[World], object]:
    """The cache becomes one of the older script: maps and row files, and nothing else."""

    def make(world: World) -> None:
        content = json.loads(index(world).read_text())
        del content["kd_cache"]
        for path in (world.cache / "packs").iterdir():
            path.unlink()
        (world.cache / "packs").rmdir()
        change(world, content)
        index(world).write_text(json.dumps(content))

    return make


def spoiled_row(content: bytes) -> Callable[[World, dict[str, Any]], object]:
    return lambda world, _: world.view("tiny", world.permitted()[0]).write_bytes(content)


def other_row(make: Callable[[Path], object]) -> Callable[[World, dict[str, Any]], object]:
    return lambda world, _: in_place_of_row(make)(world)


def mapped(file: str, path: str) -> Callable[[World, dict[str, Any]], object]:
    return lambda world, content: content["tiny"].update({file: path})


def npy_of(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


OLDER: dict[str, tuple[Callable[[World], object], str]] = {
    "objects": (older(other_row(array(objects()))), "its dtype is not float32"),
    "a pickle": (older(spoiled_row(pickle.dumps(Touch()))), "not a .npy file"),
    "a shape of 10^12": (older(spoiled_row(described((10**12,)))), "possible sizes"),
    "truncated": (older(spoiled_row(npy_of(np.zeros(10, np.float32))[:-4])), "expected [classes]"),
    "no classes": (older(spoiled_row(npy_of(np.zeros(0, np.float32)))), "its shape is [0]"),
    "other classes": (older(spoiled_row(npy_of(np.zeros(11, np.float32)))), "differ in length"),
    "a FIFO": (older(other_row(os.mkfifo)), "expected a plain file"),
    "a link out": (older(other_row(lambda path: path.symlink_to("/etc/passwd"))), "expected a plain file"),
    "another sample's path": (older(mapped("x/other.npy", "../../../etc/passwd")), "which is another sample's row"),
    "a path of NUL": (older(mapped("x/other.npy", "\0")), "which is another sample's row"),
    "a name that is no Unicode": (older(mapped("x/\ud800.npy", "x.npy")), "Unicode"),
    "paths that are numbers": (
        older(lambda _, content: content["tiny"].update(x=3)),
        "it maps no teacher's files to paths",
    ),
    "a teacher named ../x alone": (
        older(lambda _, content: content.update({"../x": content.pop("tiny")})),
        "it maps no teacher's files to paths",
    ),
}
