"""DataLoader workers however they are started: thousands of reads by each, and every row is its own item's.

A worker that was forked shares what its parent opened; one that was spawned, or came from a fork server, opens the
packs itself. Half of the reads are from a table in memory, half are gathered from the mapped packs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fault_tools import LIMIT, often
from store_fixtures import MadeCache, Rows, byte_rows, forks, md5, names, origin
from torch.utils.data import DataLoader, Dataset, get_worker_info

from kd_cache.serve.logit_cache import CachedDataset, LogitCache
from kd_cache.store import pack as pack_module

pytestmark = [
    pytest.mark.faults,
    LIMIT,
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
    forks,
]

WORKERS = often(2, 4, 4)
ROWS = 20_000
TEACHERS = ("city2scene", "scene")
CLASSES = 10
READS = often(20_000, 100_000, 1_000_000)
"""How many rows each worker reads."""
EPOCHS = WORKERS * READS // (2 * ROWS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeCache:
    """Two teachers' packs, large enough to be mapped."""
    path = tmp_path_factory.mktemp("workers") / "A2b"
    (path / "packs").mkdir(parents=True)
    files = sorted(names(ROWS), key=md5)
    keys = byte_rows([md5(file) for file in files])
    made = MadeCache(path, {}, {})
    for seed, name in enumerate(TEACHERS):
        logits = np.random.default_rng(seed).normal(0, 3, (ROWS, CLASSES)).astype("<f4")
        made.rows[name] = Rows(files, keys, keys, logits)
        made.origins[name] = origin(name, CLASSES)
        pack = made.rows[name].write(path / "packs", made.origins[name])
        assert pack.stat().st_size > pack_module.MAPPED
    made.write_index()
    return made


def expected(made: MadeCache) -> np.ndarray:
    """``[ROWS, teachers, classes]``: what item i must come with, by its file's name alone."""
    by_file = [made.rows[name].by_file() for name in TEACHERS]
    return np.stack([[rows[file] for rows in by_file] for file in names(ROWS)])


class Numbers(Dataset[int]):
    """Item i is i."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, at: int) -> int:
        return at


class Both(Dataset[Any]):
    """The same items twice: from the table, then gathered and checked as they are read."""

    def __init__(self, table: CachedDataset, gathering: CachedDataset) -> None:
        self.parts = (table, gathering)

    def __len__(self) -> int:
        return 2 * ROWS

    def __getitems__(self, at: Sequence[int]) -> list[Any]:
        """Number, logits and reader's mode of each half of a batch."""
        halves = [[number for number in at if number < ROWS], [number - ROWS for number in at if number >= ROWS]]
        return [
            (*part.collate(part.__getitems__(half)), part.cache._table is not None)
            for part, half in zip(self.parts, halves, strict=True)
        ]


def by_worker(halves: list[Any]) -> tuple[int, list[Any]]:
    """Collate: which worker this is, and its halves as they are."""
    worker = get_worker_info()
    assert worker is not None
    return worker.id, halves


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_thousands_of_reads_by_each_worker_are_all_right(
    made: MadeCache, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = [LogitCache.open(made.path, verify=verify) for verify in ("full", "lazy")]
    data = Both(*[cache.attach(Numbers(), names(ROWS)) for cache in caches])
    loader = DataLoader(
        data, 1_000, shuffle=True, collate_fn=by_worker, num_workers=WORKERS, multiprocessing_context=start,
        persistent_workers=True,
    )  # fmt: skip
    right = expected(made)
    reads: Counter[int] = Counter()
    seen = np.zeros((2, ROWS), np.int64)
    wrong = 0
    for _ in range(EPOCHS):
        for worker, halves in loader:
            assert [is_table for *_, is_table in halves] == [True, False]
            for mode, (numbers, logits, _) in enumerate(halves):
                assert logits.dtype == torch.float32
                wrong += int((logits.numpy() != right[numbers.numpy()]).any(axis=(1, 2)).sum())
                np.add.at(seen[mode], numbers.numpy(), 1)
                reads[worker] += len(numbers)
    with capsys.disabled():
        print(f"\n{start}: {reads.total():,} reads by {len(reads)} workers, {wrong} wrong")
    assert wrong == 0
    assert reads == dict.fromkeys(range(WORKERS), READS)
    assert (seen == EPOCHS).all()
