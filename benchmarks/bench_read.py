"""Reading: batches of random rows by kd-cache, by what people do instead, and by the ceiling, a gather in memory."""

from __future__ import annotations

import gc
import importlib
import itertools
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness import Report, Row, figure, in_turns, options
from benchmarks.made_cache import TEACHERS, expected_rows, make_cache, names
from kd_cache import LogitCache

CEILING = "torch.index_select in memory"
OURS = "kd-cache"
_TURN = 0.005
"""Seconds that each way has before it is the next one's turn."""
Batches = Callable[[], torch.Tensor]
Way = Callable[[torch.Tensor], Any]


def batches(count: int, size: int, seed: int = 0, number: int = 500) -> Batches:
    """The next of ``number`` random batches of row numbers, each time."""
    random = torch.Generator().manual_seed(seed)
    turns = itertools.cycle([torch.randint(count, (size,), generator=random) for _ in range(number)])
    return lambda: next(turns)


def timed(ways: Mapping[str, Way], count: int, size: int, seconds: float) -> dict[str, float]:
    """Seconds a batch of each way, over random batches of its own: what one has read is not at hand for the next.

    They take turns of several milliseconds, as long as an epoch's batches would follow each other.
    """
    calls: dict[str, Callable[[], None]] = {}
    in_turn: dict[str, int] = {}
    for seed, (name, way) in enumerate(ways.items()):
        rows = batches(count, size, seed)
        way(rows())
        began = time.perf_counter()
        way(rows())
        in_turn[name] = max(1, min(500, int(_TURN / (time.perf_counter() - began))))

        def turn(way: Way = way, rows: Batches = rows, number: int = in_turn[name]) -> None:
            for _ in range(number):
                way(rows())

        calls[name] = turn
    return {name: each / in_turn[name] for name, each in in_turns(calls, seconds, at_least=3).items()}


def check(ways: Mapping[str, Way], expected: torch.Tensor) -> None:
    """Every way must give the very values."""
    rows = batches(len(expected), 256)()
    for name, way in ways.items():
        found = torch.as_tensor(way(rows)).reshape(256, *expected.shape[1:])
        if not torch.equal(found.to(torch.float64), expected[rows].to(torch.float64)):
            raise AssertionError(f"{name} gives other values")


# -- against the ceiling ----------------------------------------------------------------------------------------------


def against_ceiling(report: Report, cache: LogitCache, table: torch.Tensor, case: str, seconds: float) -> None:
    """Fresh tensors, a given tensor, float32; 64 to 4,096 rows."""
    threads = torch.get_num_threads()
    for size in (64, 256, 1024, 4096):
        out = torch.empty(size, *table.shape[1:], dtype=table.dtype)
        fresh: dict[str, Way] = {CEILING: lambda rows: table.index_select(0, rows), OURS: cache.batch}
        given: dict[str, Way] = {
            f"{CEILING}, out=": lambda rows, out=out: torch.index_select(table, 0, rows, out=out),  # type: ignore[misc]
            f"{OURS}, out=": lambda rows, out=out: cache.batch(rows, out=out),  # type: ignore[misc]
        }
        wider: dict[str, Way] = {
            f"{CEILING}, to float32": lambda rows: table.index_select(0, rows).float(),
            f"{OURS}, to float32": lambda rows: cache.batch(rows, torch.float32),
        }
        for ways in (fresh, given, wider):
            if size == 256:
                check(ways, table)
            for number in (1, threads) if ways is fresh and threads > 1 else (1,):
                torch.set_num_threads(number)
                (ceiling, most), (ours, mine) = timed(ways, len(table), size, seconds).items()
                shown = f"{size} rows" if number == 1 else f"{size} rows, {number} threads"
                aimed = ways is fresh and size == 256 and table.shape[1] == 2
                target: tuple[str, bool | None] = ("≥ 0.9 ×", most / mine >= 0.9) if aimed else ("", None)
                over = f"{(mine - most) * 1e6:+.1f} µs a batch"
                report.add(Row(case, f"{ceiling}, {shown}", size / most / 1e6, "M samples/s"))
                speed = size / mine / 1e6
                report.add(
                    Row(case, f"{ours}, {shown}", speed, "M samples/s", ceiling, most / mine, *target, note=over)
                )
    torch.set_num_threads(threads)


def touch(way: Way, count: int) -> None:
    """An epoch: what follows measures no first access to a page."""
    for start in range(0, count, 4096):
        way(torch.arange(start, min(start + 4096, count)))


def places(report: Report, path: Path, table: torch.Tensor, case: str, seconds: float) -> None:
    """The table against the maps."""
    ways: dict[str, Way] = {
        f"{OURS}, {place}": LogitCache.open(path, preload=preload).batch
        for place, preload in (("one table", True), ("mapped packs", False))
    }
    for way in ways.values():
        touch(way, len(table))
    check(ways, table)
    took = timed(ways, len(table), 256, seconds)
    (mapped, slower), quicker = list(took.items())[1], next(iter(took.values()))
    for name, each in took.items():
        ratio = (mapped, slower / quicker) if name != mapped else ("", None)
        report.add(Row(f"{case}, 256 rows", name, 256 / each / 1e6, "M samples/s", *ratio))


def cold(report: Report, path: Path, case: str, size: int) -> None:
    """The first batches from a disk that has to be read."""

    def evict() -> None:
        gc.collect()
        for pack in (path / "packs").iterdir():
            descriptor = os.open(pack, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def first(preload: bool | str) -> float:
        evict()
        began = time.perf_counter()
        cache = LogitCache.open(path, verify="off", preload=preload)
        rows = batches(len(cache), 256)
        for _ in range(size):
            cache.batch(rows())
        return time.perf_counter() - began

    took: dict[str, list[float]] = {"auto": [], "False": [], "True": []}
    for _ in range(3):
        for name, preload in (("auto", "auto"), ("False", False), ("True", True)):
            took[name].append(first(preload))
    place = LogitCache.open(path, verify="off").preloaded
    for name, each in took.items():
        shown = f"{OURS}, preload={name}" + (f" ({place})" if name == "auto" else "")
        report.add(
            Row(f"{case}, cold disk: open and {size} batches of 256", shown, statistics.median(each), "s",
                note="verify=off")
        )  # fmt: skip


# -- against others ---------------------------------------------------------------------------------------------------


def per_sample_files(folder: Path, table: np.ndarray) -> Way:
    """One ``.npy`` per sample and teacher, ``np.load`` and stack: what people do."""
    for teacher in TEACHERS:
        (folder / teacher).mkdir(parents=True)
    paths = [[folder / teacher / f"clip-{number:07d}.npy" for teacher in TEACHERS] for number in range(len(table))]
    for row, each in zip(table, paths, strict=True):
        for logits, path in zip(row, each, strict=True):
            np.save(path, logits)
    return lambda rows: torch.from_numpy(
        np.stack([np.stack([np.load(path) for path in paths[row]]) for row in rows.tolist()])
    )


def h5py_indexing(folder: Path, table: np.ndarray) -> Way:
    with h5py.File(folder / "logits.h5", "w") as file:
        file["logits"] = table
    dataset = h5py.File(folder / "logits.h5")["logits"]

    def gather(rows: torch.Tensor) -> torch.Tensor:
        ascending, back = np.unique(rows.numpy(), return_inverse=True)  # h5py wants them ascending and each once
        return torch.from_numpy(dataset[ascending][back])

    return gather


def safetensors_file(folder: Path, table: np.ndarray) -> Way:
    save_file({"logits": torch.from_numpy(table)}, folder / "logits.safetensors")
    loaded = load_file(folder / "logits.safetensors")["logits"]
    return lambda rows: loaded.index_select(0, rows)


def torch_mmap(folder: Path, table: np.ndarray) -> Way:
    torch.save(torch.from_numpy(table), folder / "logits.pt")
    loaded = torch.load(folder / "logits.pt", mmap=True, weights_only=True)
    return lambda rows: loaded.index_select(0, rows)


def lmdb_get(folder: Path, table: np.ndarray) -> Way:
    lmdb = importlib.import_module("lmdb")
    environment = lmdb.open(str(folder / "lmdb"), map_size=1 << 36, sync=False)
    with environment.begin(write=True) as transaction:
        cursor = transaction.cursor()
        cursor.putmulti(((b"%08d" % number, row.tobytes()) for number, row in enumerate(table)), append=True)
    reading = environment.begin(buffers=True)
    shape = table.shape[1:]

    def gather(rows: torch.Tensor) -> torch.Tensor:
        joined = b"".join([reading.get(b"%08d" % row) for row in rows.tolist()])
        return torch.frombuffer(bytearray(joined), dtype=torch.float16).reshape(-1, *shape)

    return gather


def hugging_face(folder: Path, table: np.ndarray) -> Way:
    os.environ["HF_HUB_OFFLINE"] = "1"
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    width = table[0].size
    features = datasets.Features({"logits": datasets.Sequence(datasets.Value("float16"), length=width)})
    made = datasets.Dataset.from_dict({"logits": table.reshape(len(table), width)}, features=features)
    made.save_to_disk(str(folder / "hf"))
    loaded = datasets.load_from_disk(str(folder / "hf")).with_format("torch", dtype=torch.float16)
    shape = table.shape[1:]
    return lambda rows: loaded[rows.tolist()]["logits"].reshape(-1, *shape)


WIDE_ROWS = {
    "h5py, fancy indexing": h5py_indexing,
    "safetensors + index_select": safetensors_file,
    "torch.load(mmap) + index_select": torch_mmap,
    "LMDB": lmdb_get,
}
SMALL_ROWS = WIDE_ROWS | {"HF datasets, torch format": hugging_face}


def others(
    report: Report, cache: LogitCache, table: np.ndarray, folder: Path, case: str, seconds: float, peers: dict[str, Any]
) -> None:
    """kd-cache and those of its peers that are installed, over the same 256 random rows."""
    ways: dict[str, Way] = {OURS: cache.batch}
    for name, make in peers.items():
        try:
            ways[name] = make(folder, table)
        except ModuleNotFoundError as error:
            report.skip(f"{name} ({case}): {error.name} is not installed (pip install 'kd-cache[bench]')")
    check(ways, torch.from_numpy(table))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's idle threads spin, at the expense of whoever comes next
    took = timed(ways, len(table), 256, seconds)
    torch.set_num_threads(threads)
    report.add(Row(case, OURS, 256 / took[OURS] / 1e6, "M samples/s"))
    for name, each in took.items():
        if name == OURS:
            continue
        ratio = each / took[OURS]
        aimed = "np.load" in name
        report.add(Row(case, name, 256 / each / 1e6, "M samples/s"))
        report.add(
            Row(case, OURS, 256 / took[OURS] / 1e6, "M samples/s", name, ratio, "≥ 3,000 ×" if aimed else "",
                ratio >= 3000 if aimed else None)
        )  # fmt: skip


# -- opening, resolving, workers --------------------------------------------------------------------------------------


def memory_of(name: str) -> int:
    """A line of ``/proc/self/smaps_rollup``, in bytes: ``Private_Dirty``, ``Anonymous``."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def opening(path: Path, answer: Any) -> None:
    """In a fresh process: what it takes to open a cache, the first time and later, and the memory."""
    took = []
    for _ in range(9):
        before, began = memory_of("Anonymous"), (time.perf_counter(), time.process_time())
        cache = LogitCache.open(path)
        took.append((time.perf_counter() - began[0], time.process_time() - began[1], memory_of("Anonymous") - before))
        del cache
        gc.collect()
    wall, own, _ = (statistics.median(each) for each in zip(*took[1:], strict=True))
    answer.put((took[0][0], wall, own, took[0][2]))


def epoch_in_worker(cache: LogitCache, rows: torch.Tensor, answer: Any) -> None:
    """In a worker: by how much its private memory grows while it reads every row."""
    cache.batch(rows[:256])
    before = memory_of("Private_Dirty")
    for start in range(0, len(rows), 256):
        cache.batch(rows[start : start + 256])
    answer.put((cache.preloaded, memory_of("Private_Dirty") - before))


def in_process(start: str, target: Callable[..., None], *args: Any) -> Any:
    context: Any = multiprocessing.get_context(start)
    answer = context.Queue()
    process = context.Process(target=target, args=(*args, answer))
    process.start()
    found = answer.get(timeout=300)
    process.join()
    return found


def open_and_resolve(report: Report, path: Path, files: list[str], case: str, *, full_size: bool) -> None:
    first, wall, own, memory = in_process("spawn", opening, path)
    limit: tuple[str, bool | None] = ("≤ 50 ms", own <= 0.05) if full_size else ("", None)
    waited = f"of the processor's time; {wall * 1e3:.0f} by the clock, the first time {first * 1e3:.0f}"
    report.add(Row(case, "LogitCache.open", own * 1e3, "ms", "", None, *limit, waited))
    limit = ("≤ 40 MB", memory <= 40e6) if full_size else ("", None)
    report.add(Row(case, "memory of LogitCache.open", memory / 1e6, "MB", "", None, *limit))
    cache = LogitCache.open(path)
    shuffled = [files[number] for number in np.random.default_rng(0).permutation(len(files)).tolist()]
    took = []
    for _ in range(5):
        began = (time.perf_counter(), time.process_time())
        rows = cache.rows(shuffled)
        took.append((time.process_time() - began[1], time.perf_counter() - began[0]))
    if [cache.files[row] for row in rows[:100].tolist()] != shuffled[:100]:
        raise AssertionError("rows are not those of their files")
    own, wall = (statistics.median(each) for each in zip(*took, strict=True))
    limit = ("≤ 1 s", own <= 1) if full_size else ("", None)
    waited = f"of the processor's time; {wall:.2f} by the clock"
    report.add(Row(case, f"resolve {len(files):,} paths", own, "s", "", None, *limit, waited))
    cache.prepare()
    for start in ("fork", "spawn"):
        place, grown = in_process(start, epoch_in_worker, cache, rows)
        report.add(Row(case, f"memory that an epoch adds to a worker ({start})", grown / 1e6, "MB", note=f"{place}"))


# -- all --------------------------------------------------------------------------------------------------------------


def sizes(*, quick: bool) -> Iterator[tuple[int, int]]:
    yield from ((100_000, 10), (40_000, 527)) if quick else ((1_000_000, 10), (1_000_000, 527), (100_000, 1000))


def label(count: int, classes: int) -> str:
    return f"{figure(count / 1e6)}M × {classes}" if count >= 10**6 else f"{figure(count / 1e3)}k × {classes}"


def measure(report: Report, folder: Path, disk: Path, *, quick: bool) -> None:
    """``folder`` keeps what is in memory anyway, ``disk`` what has to be read from one."""
    seconds = 0.2 if quick else 1.0
    for count, classes in sizes(quick=quick):
        files = names(count)
        path = make_cache(folder / "packs", files, classes)
        expected = expected_rows(count, classes)
        case = label(count, classes)
        for chosen in (list(TEACHERS), [TEACHERS[0]]):
            cache = LogitCache.open(path, chosen, preload=False if classes == 527 else "auto")
            shown = f"{case}, {len(chosen)} teacher{'s'[: len(chosen) - 1]} ({cache.preloaded})"
            rows = torch.from_numpy(expected[:, : len(chosen)])
            table = torch.empty(rows.shape, dtype=torch.float16).copy_(rows)  # in torch's own memory
            touch(cache.batch, count)
            against_ceiling(report, cache, table, shown, seconds)
            del cache, table
        if classes == 10:
            places(report, path, torch.from_numpy(expected), case, 2 * seconds)
            open_and_resolve(report, path, files, case, full_size=not quick)
            others(report, LogitCache.open(path), expected, disk, f"{case}, 256 rows", 10 * seconds, SMALL_ROWS)
        shutil.rmtree(path.parent)
    others_at(report, disk, 10_000 if quick else 100_000, 527, 6 * seconds, WIDE_ROWS)
    others_at(report, disk, 2_000 if quick else 10_000, 10, 6 * seconds, {"np.load per sample": per_sample_files})
    path = make_cache(disk / "cold", names(20_000 if quick else 400_000), 527)
    cold(report, path, label(20_000 if quick else 400_000, 527), 20 if quick else 200)


def others_at(report: Report, disk: Path, count: int, classes: int, seconds: float, peers: dict[str, Any]) -> None:
    place = disk / f"{count}-{classes}"
    cache = LogitCache.open(make_cache(place, names(count), classes))
    others(report, cache, expected_rows(count, classes), place, f"{label(count, classes)}, 256 rows", seconds, peers)
    shutil.rmtree(place)


def main() -> None:
    chosen = options(__doc__)
    report = Report("read", chosen.quick)
    memory = Path("/dev/shm")  # noqa: S108 (a folder of our own in it)
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 8e9
    with (
        tempfile.TemporaryDirectory(prefix="kd-cache-bench-", dir=memory if roomy else None) as folder,
        tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as disk,
    ):
        measure(report, Path(folder), Path(disk), quick=chosen.quick)
    report.save(chosen.out)


if __name__ == "__main__":
    main()
