"""One pack or sixteen, a million rows or ten: opening, resolving, sealing, gathering; and what more rows would take."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Report, Row, in_turns
from benchmarks.made_cache import TEACHERS, make_cache, named, names
from kd_cache import LogitCache

PACKS = (1, 16)
CLASSES = 10
_BATCH = 256
_RESOLVED = 1_000_000
_SEALED_BYTES = 8 << 30
_IN_TURN = 200


def paths_of(folder: Path) -> list[Path]:
    return sorted((folder / "packs").glob(f"{TEACHERS[0]}-*.h5"))


# -- steps, each in a process of its own ------------------------------------------------------------------------------


def resolve(root: Path, layout: str) -> Callable[[], Any]:
    """A million random files, or as many as there are, to their rows."""
    cache = LogitCache.open(root / layout / "A2b", preload=False)
    numbers = np.random.default_rng(0).integers(0, len(cache), min(_RESOLVED, len(cache)))
    files = [named(number) for number in numbers.tolist()]
    return lambda: {"rows": len(cache.rows(files))}


def merge(root: Path, layout: str) -> Callable[[], Any]:
    """The packs of this layout become the one of the other."""
    from kd_cache.store.pack import open_pack
    from kd_cache.store.union import Union, merge_packs

    (sealed,) = paths_of(root / "1-packs" / "A2b")
    whole = open_pack(sealed, "off")
    parts = paths_of(root / layout / "A2b")
    (root / "sealed").mkdir()

    def call() -> Any:
        merge_packs(root / "sealed", Union([open_pack(path) for path in parts]), whole.keys, whole.inputs)
        if [path.name for path in (root / "sealed").iterdir()] != [sealed.name]:
            raise AssertionError("a sealed pack has other bytes than the one that was written whole")
        return {"rows": len(whole)}

    return call


# -- all of it --------------------------------------------------------------------------------------------------------


def growth_of_packs(report: Report, root: Path, counts: Sequence[int], step: Callable[[str, Path, str], Any]) -> None:
    """Figures of each size, one pack against sixteen; then, on paper, of a hundred times as many rows."""
    took: dict[str, dict[str, Any]] = {}
    for count in counts:
        data = root / f"packs-{count}"
        for packs in PACKS:
            make_cache(data / f"{packs}-packs", names(count), CLASSES, packs=packs)
        case = f"{count:,} × {CLASSES}"
        for name in ("open", "resolve"):
            one, many = (step(name, data, f"{packs}-packs") for packs in PACKS)
            report.add(Row(case, f"{name}, 1 pack", one["seconds"], "s", note=_spent(one)))
            ratio = one["cpu"] / many["cpu"]
            report.add(Row(case, f"{name}, 16 packs", many["seconds"], "s", "1 pack", ratio, note=_spent(many)))
            took[name] = one | {"a_pack": (many["cpu"] - one["cpu"]) / (PACKS[1] - PACKS[0])}
        took["merge"] = done = step("merge", data, f"{PACKS[1]}-packs")
        report.add(Row(case, "seal, 16 packs into 1", done["seconds"], "s", note=_spent(done)))
        gathering(report, data, case)
        sizes = {"packs of a teacher": sum(path.stat().st_size for path in paths_of(data / "1-packs" / "A2b")) / count}
        sizes["permitted list"] = sum(path.stat().st_size for path in data.glob("1-packs/A2b/permitted-*")) / count
        shutil.rmtree(data)
    for further in (10**8, 10**9):
        on_paper(report, further, counts[-1], sizes, took)


def _spent(done: dict[str, Any]) -> str:
    return f"{done['cpu']:.2g} s of CPU, {done['memory'] / 1e6:,.0f} MB"


def gathering(report: Report, data: Path, case: str) -> None:
    """Batches of random rows, from maps, of one teacher and of two; the same samples from one pack and from many."""
    for teachers in (TEACHERS[:1], TEACHERS):
        caches = [LogitCache.open(data / f"{packs}-packs" / "A2b", teachers, preload=False) for packs in PACKS]
        every = [cache.all_rows() for cache in caches]
        for start in range(0, len(every[0]), _BATCH * 16):
            part = slice(start, start + _BATCH * 16)
            if not torch.equal(*(cache.batch(rows[part]) for cache, rows in zip(caches, every, strict=True))):
                raise AssertionError("rows of many packs are not those of one")
        ways = {
            f"from {packs} packs": _batches(cache, rows)
            for packs, cache, rows in zip(PACKS, caches, every, strict=True)
        }
        one, many = (seconds / _IN_TURN for seconds in in_turns(ways, 2, 20).values())
        what = f"{_BATCH} rows, {len(teachers)} teacher{'s'[: len(teachers) - 1]}"
        report.add(Row(case, f"{what}, 1 pack", one * 1e6, "µs"))
        target: dict[str, Any] = {"target": "≤ 1.2 × the time", "met": many <= 1.2 * one}
        report.add(Row(case, f"{what}, 16 packs", many * 1e6, "µs", "1 pack", one / many, **target))


def _batches(cache: LogitCache, rows: torch.Tensor) -> Callable[[], None]:
    random = torch.Generator().manual_seed(1)
    turns: Iterator[torch.Tensor] = itertools.cycle(
        [rows[torch.randint(len(rows), (_BATCH,), generator=random)] for _ in range(500)]
    )

    def call() -> None:
        for _ in range(_IN_TURN):
            cache.batch(next(turns))

    return call


def on_paper(
    report: Report, count: int, measured: int, sizes: dict[str, float], took: dict[str, dict[str, Any]]
) -> None:
    """What grows with the rows, by the largest size that was measured."""
    case, times = f"on paper: {count:,} × {CLASSES}", count / measured
    for what, each in sizes.items():
        report.add(Row(case, what, each * count / 1e9, "GB"))
    packs = 1 << (int(np.ceil(sizes["packs of a teacher"] * count / _SEALED_BYTES)) - 1).bit_length()
    report.add(Row(case, "packs of a teacher, of 8 GiB at most", packs, "packs"))
    report.add(Row(case, "kept to find keys", packs / 2, "MB at most", note="65,536 halves of keys a pack"))
    seal, opened = took["merge"], took["open"]
    seconds = opened["cpu"] * times + max(0, opened["a_pack"]) * (packs - 1)
    report.add(Row(case, "open", seconds, "s", note="every key is looked at"))
    whole = f"{seal['memory'] * times / 1e9:,.0f} GB where one process seals all; of each of {packs} tasks a part of it"
    report.add(Row(case, "seal", seal["seconds"] * times / 60, "min", note=whole))
