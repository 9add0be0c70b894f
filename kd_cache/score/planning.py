"""Which batch plan a dump follows: the saved one wherever rows made by it are kept, else a new one, saved first."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from kd_cache.dataset.features import FeatureSource, shape_of
from kd_cache.dataset.samples_table import SamplesTable
from kd_cache.errors import FeatureError
from kd_cache.files.atomic import make_directory
from kd_cache.score.engine import Engine, is_out_of_memory
from kd_cache.score.existing import Found
from kd_cache.score.given import Given, each, filled, scored_dtype
from kd_cache.score.job import DEFAULT_BATCH, DumpJob
from kd_cache.store.cache import teacher_in_name
from kd_cache.store.plan import BatchPlan, Place, Shape, ShapeCodes
from kd_cache.watch import Watcher


class Places:
    """Gives each sample its rank. Show it the shape of every permitted sample with a readable feature, in key order."""

    def __init__(self) -> None:
        self._ranks: Counter[Shape] = Counter()

    def next_rank(self, shape: Shape) -> int:
        """The rank of one more sample of this shape."""
        rank = self._ranks[shape]
        self._ranks[shape] += 1
        return rank

    def pass_over(self, shape: Shape, count: int) -> None:
        """So many more samples of this shape, whose ranks nobody asks for."""
        self._ranks[shape] += count


class Others:
    """What the samples table says of the shapes of all; nothing where the work is not split."""

    def __init__(self, job: DumpJob | None = None) -> None:
        self._job = job
        self._table: SamplesTable | None = None

    def table(self, *, make: bool = True) -> SamplesTable | None:
        """It is made when it is first asked for: that reads the header of every sample's feature."""
        job = self._job
        if self._table is None and job is not None and job.part is not None:
            self._table = job.data.samples_table(job.folder.pending_path, job.workers, make=make)
        return self._table

    def forget(self) -> None:
        """Features have other shapes than the table says: the next part looks at headers again."""
        if self._table is not None:
            self._table.remove()


NO_OTHERS = Others()


def count_shapes(
    source: FeatureSource,
    files: Sequence[str],
    *,
    skip_bad: bool,
    table: SamplesTable | None = None,
    until: int | None = None,
) -> dict[Shape, int]:
    """How many inputs (``until`` a number) have each shape, from their headers alone; a ``table`` of them knows most.

    With ``skip_bad`` an unreadable feature does not count (the dump reports it); otherwise `FeatureError` is raised.
    """
    counts: Counter[Shape] = Counter({} if table is None else table.counts(until))
    for file in files[:until] if table is None else [files[number] for number in table.unreadable(until)]:
        try:
            counts[source.shape(file)] += 1
        except FeatureError as error:
            if not skip_bad:
                raise source.refusal(file, error, files) from None
    return dict(counts)


def places_of(source: FeatureSource, files: Iterable[str], plan: BatchPlan) -> dict[str, Place]:
    """The place of every readable sample among ``files``, which are all permitted ones in key order."""
    places = Places()
    found = {}
    for file in files:
        try:
            shape = source.shape(file)
        except FeatureError:
            continue
        found[file] = plan.place(shape, places.next_rank(shape))
    return found


SMALLEST = 8
LARGEST = 1024
GAIN = 1.05
"""A batch of twice the size must score so many times more samples per second to be worth its memory and its padding."""
_SECONDS = 0.3


def best_batch_size(engine: Engine, shape: Shape, count: int, dtype: Any = np.float32) -> int:
    """The batch size for ``count`` samples of ``shape``: 8, 16, 32, … up to 1024, measured with random inputs.

    Starts at 8 and doubles as long as memory suffices, there are samples to fill the batch, and each doubling scores at
    least 5 % more samples per second with all teachers. Use inside `device.numerics`. Errors of the teachers count as
    the end of the search: the dump meets them again, with a sample to name.
    """
    best, rate = SMALLEST, 0.0
    size = SMALLEST
    while size <= LARGEST and (size == SMALLEST or size < 2 * count):
        found = _rate(engine, shape, size, np.dtype(dtype))
        if found == 0 or found < GAIN * rate:
            break
        best, rate = size, found
        size *= 2
    return best


def _rate(engine: Engine, shape: Shape, size: int, dtype: np.dtype[Any]) -> float:
    """Samples per second; 0 where memory is too small, or a teacher refuses."""
    try:
        chance = np.random.default_rng(0)

        def draw(into: np.ndarray, _: str | None) -> None:  # of integers only 0 is sure to mean something
            into[...] = chance.standard_normal(into.shape) if into.dtype.kind == "f" else 0

        features = each(filled(shape, dtype, size, draw), lambda tensor: tensor.to(engine.device))
        _score(engine, features)  # the first call prepares what later ones use again
        rounds, began = 0, time.perf_counter()
        while rounds == 0 or time.perf_counter() - began < _SECONDS:
            _score(engine, features)
            rounds += 1
        return rounds * size / (time.perf_counter() - began)
    except Exception as error:  # noqa: BLE001 (whatever a teacher raises: see above)
        if is_out_of_memory(error) and engine.device.type == "cuda":
            torch.cuda.empty_cache()
        return 0.0


def _score(engine: Engine, features: Given) -> None:
    for teacher in engine.teachers.values():  # not compiled, which would take minutes for each size
        teacher(features)  # type: ignore[arg-type]  # see Engine.forward
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


class Planner:
    """Gives the plan, made or extended where it does not cover a shape yet. Use inside `device.numerics`.

    Args:
        files: of all permitted samples, of further caches also: the sizes are planned for all of them, whichever part
            is scored.
        others: knows their shapes, where the work is split.
    """

    def __init__(
        self, job: DumpJob, found: Found, files: Sequence[str], engine: Engine, watcher: Watcher, others: Others
    ) -> None:
        self._job, self._found, self._files, self._engine, self._watcher = job, found, files, engine, watcher
        self._others = others
        self._plan: BatchPlan | None = None

    def plan_for(self, array: np.ndarray) -> BatchPlan:
        """The plan to score this input with; it covers its shape unless its number of bins is another."""
        self._dtype, shape = scored_dtype(array), shape_of(array)
        if self._plan is None:
            self._plan = self._saved(shape)
        # A shape with other bins is of a bad sample, for which the plan must not grow.
        if self._plan is None or (self._plan.takes(shape) and shape not in self._plan.batches):
            self._plan = self._make(earlier=self._plan)
        return self._plan

    def _saved(self, shape: Shape) -> BatchPlan | None:
        """The plan of the rows that are kept, or that other processes are making; none where there are no such rows."""
        job, found = self._job, self._found
        packs = found.snapshot.packs
        begun = packs.good or packs.apart or job.folder.pending_path.exists()
        saved = found.snapshot.again().plan if begun and job.skip_existing else None
        asked = any(known.union is not None for known in found.known.values())
        asked = asked or any(teacher_in_name(path) in job.origins for path in packs.apart)  # of other parts
        if saved is None or (not saved.takes(shape) and not asked):
            return None
        if job.batch_size in (None, "auto", saved.batch_size):
            return saved
        if asked or any(found.snapshot.packs.of(origin) for origin in found.others.values()):
            self._watcher.note(f"the batch size stays {saved.batch_size}, with which this cache was begun")
            return saved
        return None

    def _make(self, earlier: BatchPlan | None) -> BatchPlan:
        skip_bad = self._job.on_bad_sample == "skip" or bool(self._job.planned)  # others' samples stop no dump of ours
        source, table = self._job.data.features, self._others.table()
        counts = count_shapes(source, self._files, skip_bad=skip_bad, table=table)
        size = self._job.batch_size or DEFAULT_BATCH[self._job.device.type]
        if size == "auto":
            size = earlier.batch_size if earlier else self._measured(counts)
        plan = BatchPlan.from_counts(counts, size, earlier, anything=self._job.data.features.anything)
        make_directory(self._job.folder.path)
        plan.save(self._job.folder.plan_path)
        return plan

    def _measured(self, counts: dict[Shape, int]) -> int:
        if not counts:
            return DEFAULT_BATCH[self._job.device.type]
        shape, count = max(counts.items(), key=lambda item: item[1])
        size = best_batch_size(self._engine, shape, count, self._dtype)
        self._watcher.note(f"batch size {size}, measured with features of {' × '.join(map(str, shape))}")
        return size


class Ranks:
    """Gives samples their ranks among those of their shape, in key order.

    The shapes of samples that this run does not read count as well, but only where a later sample is scored: of those
    before the ``first`` of a part the samples table knows them, others are looked up in headers. A file with a good
    header has its rank even if the rest of it cannot be read: its neighbours keep theirs.
    """

    def __init__(self, source: FeatureSource, files: Sequence[str], first: int = 0, others: Others = NO_OTHERS) -> None:
        self._source, self._files, self._first, self._others = source, files, first, others
        self._places = Places()
        self._at = 0
        self.codes = ShapeCodes()
        self.shapes = np.zeros((len(files), 2), np.int32)
        """``[N, 2]``: what is known of the samples' shapes, as `ShapeCodes` has them; 0 where nothing is."""

    @property
    def distinct(self) -> list[Shape]:
        """Every shape that is known."""
        found = (self.codes.shape(*code) for code in np.unique(self.shapes, axis=0).tolist())
        return [shape for shape in found if shape is not None]

    def rank(self, number: int, shape: Shape) -> int:
        """The rank of this sample. Ask in ascending order."""
        if self._at < self._first and (table := self._others.table()) is not None:
            for passed, count in count_shapes(
                self._source, self._files, skip_bad=True, table=table, until=self._first
            ).items():
                self._places.pass_over(passed, count)
            self._at = self._first
        if number > self._at:
            self._pass_over(number)
        self._at = number + 1
        return self._places.next_rank(shape)

    def have_moved(self, part: slice) -> bool:
        """Whether features of this part, which were read, have other shapes than the samples table says."""
        if (table := self._others.table(make=False)) is None:
            return False
        told = np.array([(0, 0), *map(self.codes.code, table.shapes)], np.int32)[table.numbers[part]]
        read = self.shapes[part]
        return bool(((read[:, 1] != 0) & (told != read).any(axis=1)).any())

    def _pass_over(self, number: int) -> None:
        between = self.shapes[self._at : number]
        known, inverse, counts = np.unique(between, axis=0, return_inverse=True, return_counts=True)
        for group, (code, count) in enumerate(zip(known.tolist(), counts.tolist(), strict=True)):
            if (shape := self.codes.shape(*code)) is not None:
                self._places.pass_over(shape, count)
                continue
            for offset in np.flatnonzero(inverse.reshape(-1) == group).tolist():
                with suppress(FeatureError):
                    shape = self._source.shape(self._files[self._at + offset])
                    self._places.pass_over(shape, 1)
                    between[offset] = self.codes.code(shape)
