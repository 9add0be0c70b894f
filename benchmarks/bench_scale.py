"""How cost grows with the number of samples: dump, rerun, seal, open, verify and an epoch, each in its own process."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import growth
from benchmarks.harness import Report, Row, in_turns, options, peak_memory
from benchmarks.made_cache import TEACHERS, block_of_rows, make_cache, names, origin
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.features import Feature, FeatureSource, input_digest
from kd_cache.dataset.guard import Selection, select
from kd_cache.dataset.manifest import Manifest, load_manifest
from kd_cache.keys import keys_of, sorted_order
from kd_cache.score.commits import Shard
from kd_cache.store.cache import CacheFolder
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.view import row_file_bytes, view_names, write_view

FRAMES, BINS, CLASSES = 2, 4, 10
_BLOCK = 65_536
_BATCH = 256


# -- data -------------------------------------------------------------------------------------------------------------


def features(start: int, stop: int) -> np.ndarray:
    """``[n, FRAMES, BINS]`` float32: a different feature for every sample."""
    numbers = np.arange(start * FRAMES * BINS, stop * FRAMES * BINS, dtype=np.float64)
    return np.sin(numbers).astype(np.float32).reshape(-1, FRAMES, BINS)


def make_data(root: Path, count: int) -> None:
    """A manifest of ``count`` train samples, half of them of device A, and their tiny features."""
    files = names(count)
    sides = (("A", 0), ("b", 1))
    rows = [
        {"file": file, "scene_label": number % CLASSES, "device_id": sides[number % 2][0], "domain": number % 2}
        for number, file in enumerate(files)
    ]
    (root / files[0]).parent.mkdir(parents=True)
    (root / "dataset.json").write_text(json.dumps({"train": rows, "val": [], "test": []}))
    buffer = io.BytesIO()
    np.save(buffer, features(0, 1)[0])
    head = buffer.getvalue()[: -4 * FRAMES * BINS]
    for start in range(0, count, _BLOCK):
        for file, feature in zip(
            files[start : start + _BLOCK], features(start, min(start + _BLOCK, count)), strict=True
        ):
            (root / file).write_bytes(head + feature.tobytes())


def read_data(root: Path) -> tuple[Manifest, Selection]:
    manifest = load_manifest(root / "dataset.json")
    return manifest, select(manifest, "b", data_root=root)


class _Digests(FeatureSource):
    """Features whose digests are known: an audit of the rows alone."""

    def __init__(self, root: Path, digests: dict[str, bytes]) -> None:
        super().__init__(root)
        self._digests = digests

    def read(self, file: str) -> Feature:
        return Feature(np.empty((0, 0), np.float32), self._digests[file])


# -- steps, each in a process of its own ------------------------------------------------------------------------------


def _dump(root: Path, layout: str) -> Callable[[], Any]:
    """A dump with two teachers that cost nothing, or its rerun."""
    import torch

    from kd_cache.score.dump import DumpJob, dump_logits

    class Weights(torch.nn.Module):
        num_classes, value_kind = CLASSES, "logits"

        def __init__(self, seed: int) -> None:
            super().__init__()
            made = torch.randn(BINS, CLASSES, generator=torch.Generator().manual_seed(seed))
            self.weight = torch.nn.Parameter(made, requires_grad=False)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch.mean(dim=1) @ self.weight

        def fingerprint_parts(self) -> dict[str, str]:
            return {"architecture": "weights/1"}

    def call() -> Any:
        teachers = {name: Weights(seed) for seed, name in enumerate(TEACHERS)}
        job = DumpJob(
            root / layout,
            Dataset.load("b", root / "dataset.json"),
            teachers,
            torch.device("cpu"),
            dtype="fp16",
            batch_size=1024,
            shard_size=_BLOCK,
            files=layout == "npy",
            part=(0, 8) if layout == "part" else None,
        )
        report = dump_logits(job)
        return {
            "scored": report.samples_scored,
            "rows": sum(report.published.rows.values() if report.published else ()),
        }

    return call


def _verify(root: Path, layout: str) -> Callable[[], Any]:
    """Every row, file, checksum and feature."""
    from kd_cache.care.verify import VerifyJob, verify_cache

    def call() -> Any:
        snapshot = Snapshot(CacheFolder(root / layout / "A2b"), maps=True)
        report = verify_cache(VerifyJob(snapshot, Dataset.load("b", root / "dataset.json"), n=None))
        return {"problems": len(report.problems), "rows": sum(result.intact for result in report.teachers.values())}

    return call


def _verify_rows(root: Path, layout: str) -> Callable[[], Any]:
    """As `_verify`, but for the reading of manifest and features."""
    from kd_cache.care.verify import VerifyJob, verify_cache

    manifest, selection = read_data(root)
    pack = CacheFolder(root / layout / "A2b").packs().good[0]
    source = _Digests(root, dict(zip(pack.files, map(bytes, pack.inputs), strict=True)))

    def call() -> Any:
        snapshot = Snapshot(CacheFolder(root / layout / "A2b"), maps=True)
        report = verify_cache(VerifyJob(snapshot, Dataset(manifest, selection, source), n=None))
        return {"problems": len(report.problems), "rows": sum(result.intact for result in report.teachers.values())}

    return call


def _seal(root: Path, layout: str) -> Callable[[], Any]:
    """Sixteen packs of one teacher become one."""
    from kd_cache.store.pack import open_pack
    from kd_cache.store.union import Union, merge_packs

    whole = CacheFolder(root / layout / "A2b").packs().good[0]
    size = -(-len(whole) // 16)
    paths = []
    for start in range(0, len(whole), size):
        shard = Shard(root / "parts", {"scene": whole.origin}, _BLOCK, 1e9)
        part = slice(start, start + size)
        encoded = [file.encode() for file in whole.files[part]]
        shard.add_rows("scene", whole.keys[part], whole.inputs[part], encoded, whole.logits[part])
        shard.commit()
        paths += shard.written
    keys, inputs, expected = whole.keys, whole.inputs, whole.path.name

    def call() -> Any:
        union = Union([open_pack(path) for path in paths])
        made = merge_packs(root / "parts", union, keys, inputs)
        if [path.name.rpartition("-")[2] for path in made.paths] != [expected.rpartition("-")[2]]:
            raise AssertionError("a sealed pack has other bytes than the one it was cut from")
        return {"rows": len(keys)}

    return call


def _open(root: Path, layout: str) -> Callable[[], Any]:
    from kd_cache import LogitCache

    return lambda: {"rows": len(LogitCache.open(root / layout / "A2b")) * len(TEACHERS)}


def _epoch(root: Path, layout: str) -> Callable[[], Any]:
    """All rows once, in random batches; each batch is compared with what the formula gives, outside the clock."""
    from kd_cache import LogitCache

    cache = LogitCache.open(root / layout / "A2b")
    order = np.random.default_rng(0).permutation(len(cache))

    def call() -> Any:
        for start in range(0, len(order), _BATCH):
            cache.batch(order[start : start + _BATCH])
        return {"rows": len(order) * len(TEACHERS)}

    _check(root / layout / "A2b", cache)
    return call


def _check(folder: Path, cache: Any) -> None:
    """A thousand samples of a made cache have the values of the formula; those of a dump, the bytes of its packs."""
    numbers = np.sort(np.random.default_rng(1).choice(len(cache), min(1000, len(cache)), replace=False))
    found = cache.batch(numbers).numpy()
    for number, teacher in enumerate(TEACHERS):
        pack = next(pack for pack in CacheFolder(folder).packs([teacher]).good)
        if not np.array_equal(found[:, number], pack.logits[numbers].astype(found.dtype)):
            raise AssertionError(f"{teacher}: gathered values are not those of the pack")
        if "made/1" in pack.origin.fingerprint.parts.values():
            classes = pack.origin.num_classes
            for block in np.unique(numbers // _BLOCK).tolist():
                mine = numbers[numbers // _BLOCK == block]
                count = min(_BLOCK, len(pack) - block * _BLOCK)
                made = block_of_rows(number, block, count, classes)[mine - block * _BLOCK]
                if not np.array_equal(pack.logits[mine], made):
                    raise AssertionError(f"{teacher}: the pack holds other values than were written")


STEPS: dict[str, Callable[[Path, str], Callable[[], Any]]] = {
    "dump": _dump,
    "rerun": _dump,
    "verify": _verify,
    "verify rows": _verify_rows,
    "seal": _seal,
    "open": _open,
    "epoch": _epoch,
    "resolve": growth.resolve,
    "merge": growth.merge,
}


def _step(name: str, root: str, layout: str) -> None:
    call = STEPS[name](Path(root), layout)
    before = peak_memory()
    began, spent = time.perf_counter(), time.process_time()
    done = call()
    seconds, cpu = time.perf_counter() - began, time.process_time() - spent
    print(json.dumps({"seconds": seconds, "cpu": cpu, "memory": peak_memory() - before, **done}))


def step(name: str, root: Path, layout: str) -> dict[str, Any]:
    """Run one step in a process of its own: ``seconds``, those of ``cpu``, and ``memory`` above what it began with."""
    command = [sys.executable, "-m", "benchmarks.bench_scale", "step", name, str(root), layout]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


# -- commits ----------------------------------------------------------------------------------------------------------


class Commits:
    """The same rows of two teachers, written in several ways into a folder that is new each time."""

    def __init__(self, root: Path, count: int) -> None:
        self.root, self.count, self._number = root, count, 0
        files = names(count)
        keys = keys_of(files)
        order = sorted_order(keys)
        self.keys, self.files = keys[order], [files[number] for number in order.tolist()]
        self.names = [file.encode() for file in self.files]
        self.logits = [np.resize(block_of_rows(number, 0, count, CLASSES), (count, CLASSES)) for number in (0, 1)]
        self.origins = {teacher: origin(teacher, CLASSES) for teacher in TEACHERS}

    def folder(self) -> Path:
        shutil.rmtree(self.root / str(self._number), ignore_errors=True)
        self._number += 1
        return self.root / str(self._number)

    def packs(self, size: int) -> None:
        """Batches of 1024 into shards of ``size``, durable one by one."""
        folder = self.folder()
        for start in range(0, self.count, size):
            shard = Shard(folder / "packs", self.origins, size, 1e9)
            for at in range(start, min(start + size, self.count), 1024):
                part = slice(at, min(at + 1024, start + size, self.count))
                for teacher, logits in zip(TEACHERS, self.logits, strict=True):
                    shard.add_rows(teacher, self.keys[part], self.keys[part], self.names[part], logits[part])
            shard.commit()

    def view(self) -> None:
        """Packs, and the ``.npy`` files from them."""
        self.packs(_BLOCK)
        for teacher, logits in zip(TEACHERS, self.logits, strict=True):
            write_view(self.root / str(self._number) / teacher, partial(self._block, logits))

    def _block(self, logits: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self.keys, logits)]

    def np_save(self) -> None:
        """What people do: a whole file per sample and teacher, renamed into place; nothing durable."""
        folder = self.folder()
        for teacher, logits in zip(TEACHERS, self.logits, strict=True):
            (folder / teacher).mkdir(parents=True)
            for name, row in zip(view_names(self.keys), logits, strict=True):
                np.save(folder / teacher / f"tmp-{name}", row)
                (folder / teacher / f"tmp-{name}").replace(folder / teacher / name)

    def bare(self) -> None:
        """The floor: the same files, made as plainly as can be."""
        folder = self.folder()
        for teacher, logits in zip(TEACHERS, self.logits, strict=True):
            (folder / teacher).mkdir(parents=True)
            content = row_file_bytes(logits[0])
            for name in view_names(self.keys):
                file = os.open(f"{folder}/{teacher}/{name}", os.O_WRONLY | os.O_CREAT, 0o666)
                os.write(file, content)
                os.close(file)


def commits(report: Report, root: Path, quick: bool) -> None:
    many, few = Commits(root / "many", _BLOCK), Commits(root / "few", 2_000 if quick else 10_000)
    took = in_turns({"65,536": lambda: many.packs(_BLOCK), "4096": lambda: many.packs(4096)}, 2 if quick else 10, 3)
    for size, seconds in took.items():
        rate = many.count / seconds
        goal: dict[str, Any] = {"target": "≥ 500,000 samples/s", "met": rate >= 500_000}
        target = goal if size == "65,536" else {}
        report.add(Row("commit, 2 teachers, packed, durable", f"shards of {size}", rate, "samples/s", **target))
    ways = {
        "np.save, rename": few.np_save,
        "bare files, what the disk can do": few.bare,
        "kd-cache, packs and .npy": few.view,
    }
    rates = {way: few.count / seconds for way, seconds in in_turns(ways, 6 if quick else 30, 3).items()}
    for way, rate in rates.items():
        ours: dict[str, Any] = {}
        if way == "kd-cache, packs and .npy":
            ratio = rate / rates["np.save, rename"]
            ours = {"target": "≥ 20,000 samples/s", "met": rate >= 20_000, "against": "np.save, rename", "ratio": ratio}
        report.add(Row("commit, 2 teachers, .npy", way, rate, "samples/s", **ours))


# -- growth -----------------------------------------------------------------------------------------------------------


def growth_of_dumps(report: Report, root: Path, counts: list[int]) -> None:
    dumped: dict[str, dict[int, float]] = {"npy": {}, "packed": {}}
    for count in counts:
        data = root / f"data-{count}"
        make_data(data, count)
        for layout in dumped:
            for name in ("dump", "rerun", "verify", *(("verify rows",) if layout == "packed" else ())):
                done = step(name, data, layout)
                scored, rows = done.get("scored"), done["rows"]
                if rows != 2 * count or done.get("problems") or scored not in (None, count if name == "dump" else 0):
                    raise AssertionError(f"{name} of {count}, {layout}: {done}")
                report.add(
                    _line(f"{name}, {layout}", count, CLASSES, done, _target(name, layout, count, done["seconds"]))
                )
                if name == "dump":
                    dumped[layout][count] = done["memory"]
        report.add(_line("dump of part 0/8", count, CLASSES, step("dump", data, "part"), {}))
        shutil.rmtree(data)
    for layout, memory in dumped.items():
        each = (memory[counts[-1]] - memory[counts[0]]) / (counts[-1] - counts[0])
        note = f"manifest included; from {counts[0]:,} to {counts[-1]:,}"
        target: dict[str, Any] = {"target": "≤ 300 bytes, and its name", "met": each <= 300 + len(names(1)[0])}
        report.add(Row("memory of a dump", f"per sample, {layout}", each, "bytes", note=note, **target))


def _target(name: str, layout: str, count: int, seconds: float) -> dict[str, Any]:
    most = {("rerun", "packed"): 3, ("rerun", "npy"): 3, ("verify", "npy"): 10, ("verify rows", "packed"): 1}
    if count != 100_000 or (name, layout) not in most:
        return {}
    return {"target": f"≤ {most[name, layout]} s", "met": seconds <= most[name, layout]}


def growth_of_caches(report: Report, root: Path, sizes: list[tuple[int, int]]) -> None:
    """Caches written without a teacher: what a student and a seal meet."""
    for count, classes in sizes:
        data = root / f"made-{count}-{classes}"
        files = names(count)
        inputs = np.frombuffer(input_digest(features(0, 1)[0]) * count, np.uint8).reshape(-1, 16)
        make_cache(data / "packed", files, classes, inputs)
        for name in ("seal", "open", "epoch"):
            done = step(name, data, "packed")
            if done["rows"] not in (count, 2 * count):
                raise AssertionError(f"{name} of {count} x {classes}: {done}")
            report.add(_line(f"{name}, made", count, classes, done, {}))
        shutil.rmtree(data)


def _line(what: str, count: int, classes: int, done: dict[str, Any], target: dict[str, Any]) -> Row:
    note = f"{done['cpu']:.2g} s of CPU, {done['memory'] / 1e6:,.0f} MB"
    return Row(f"{count:,} × {classes}", what, done["seconds"], "s", note=note, **target)


def main() -> None:
    if sys.argv[1:2] == ["step"]:
        _step(*sys.argv[2:])
        return
    chosen = options(__doc__ or "")
    report = Report("scale", chosen.quick)
    with tempfile.TemporaryDirectory(prefix="kd-cache-scale-") as folder:
        root = Path(folder)
        commits(report, root, chosen.quick)
        growth_of_dumps(report, root, [1000, 5000] if chosen.quick else [10_000, 100_000])
        larger = [] if chosen.quick else [(100_000, 10), (1_000_000, 10), (1_000_000, 527)]
        growth_of_caches(report, root, [(10_000, 10), *larger])
        growth.growth_of_packs(report, root, [200_000] if chosen.quick else [1_000_000, 10_000_000], step)
    report.save(chosen.out)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
