"""Serving logits: open a cache, resolve files to rows once, gather a batch per step.

cache = LogitCache.open("cache/A2b")
data = cache.attach(train_set, keys=train_set.files)
loader = DataLoader(data, batch_size=256, shuffle=True, collate_fn=data.collate)
for batch, logits in loader:  # logits [B, T, C], teachers in the order of cache.teachers
    ...
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from kd_cache.dataset.task_file import DEFAULT, recorded_task
from kd_cache.errors import MissingLogitsError, StaleError, UsageError, shown
from kd_cache.serve.attach import CachedDataset as CachedDataset
from kd_cache.serve.attach import Gathered as Gathered
from kd_cache.serve.gather import Gatherer
from kd_cache.serve.generation import look, older_rows, refuse_mixture, refuse_unexpected
from kd_cache.serve.joined import joined, teachers_of_all
from kd_cache.serve.mirror import local_copy
from kd_cache.serve.placement import checked, choose
from kd_cache.serve.resolve import Resolver
from kd_cache.serve.rows import TeacherRows
from kd_cache.serve.views import InputsRead, View, checked_view
from kd_cache.store.accuracy import in_words, near_chance, stored_accuracy, stored_apart
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import Index
from kd_cache.store.origin import Fingerprint, Origin
from kd_cache.store.pack import CHECKS
from kd_cache.store.snapshot import Snapshot

_INT64 = np.dtype(np.int64)


class LogitCache(InputsRead):
    """An opened cache: rows that exist for every opened teacher, checked, read-only, safe to send to workers.

    Attributes:
        teachers: their names; the second axis of every batch.
        files: the files that all opened teachers hold.
        num_classes: C.
        views: how many views a row has, 1 where no inputs were augmented; view 0 is of the clean input.
        frames: L where the teachers score each frame and a row is ``[L, C]``, else ``None``.
        topk: how top-k rows are stored, else ``None``. Where they are, a batch is a `TopK` in place of a tensor.
        task: what the data set is that was scored.
        target: the target device of the adaptation, or ``None`` where the folder's name does not say; where there are
            no domains, the one that there is.
        misses: how many files without logits were resolved, to be served as NaN (only with ``on_miss="nan"``).
        preloaded: where batches come from: ``table`` (one table in memory) or ``mapped`` (mapped packs, read as rows
            are asked for).
    """

    def __init__(
        self,
        path: Path,
        tables: Sequence[TeacherRows],
        index: Index | None,
        on_miss: str,
        verify: str,
        preload: bool | str = "auto",
        *,
        in_worker: bool = False,
    ) -> None:
        self.path = path
        self._opened_with = (on_miss, verify, preload)
        self.misses = 0
        self._rows_of = tables
        self._index = index
        self._on_miss, self._first = on_miss, -1 if on_miss == "nan" else 0
        self.teachers = tuple(rows.name for rows in tables)
        self.num_classes, self.frames, self.views = tables[0].num_classes, tables[0].frames, tables[0].views
        self.width, self.dtype, self.topk = tables[0].width // self.views, tables[0].dtype, tables[0].topk
        self._resolver = Resolver(path, tables, index)
        self._row_numbers = self._resolver.numbers
        self.preloaded = choose(
            preload,
            len(self) * self.views * len(tables) * self.width * self.dtype.itemsize,
            is_lazy=any(rows.is_lazy for rows in tables),
            in_worker=in_worker,
        )
        self._gatherer = Gatherer(tables, self._resolver.positions, self._row_numbers, self.preloaded)
        if preload is True and not in_worker:
            self.prepare()
        self.task = DEFAULT if index is None else recorded_task(index.record)
        adaptation = str(path.name if index is None else index.record.get("adaptation", path.name))
        self.target = self.task.target_in(adaptation)

    @classmethod
    def open(
        cls,
        path: str | Path | Sequence[str | Path],
        teachers: Sequence[str] | None = None,
        expect: Mapping[str, str | Fingerprint] | None = None,
        *,
        value_kind: str = "logits",
        on_miss: str = "raise",
        verify: str = "auto",
        preload: bool | str = "auto",
        strict: bool = False,
        offline: bool | None = None,
    ) -> LogitCache:
        """Open ``cache/A2b``: what its index names, nothing else. Every byte is checked before it is believed.

        Args:
            path: the cache's folder, or the ``cache_index.json`` in it; of several targets a list of caches, which are
                served as one. Rows of A must agree in them, or it says which teacher differs. An URL such as
                ``s3://bucket/A2b`` is pulled into a mirror on this disk (``KD_CACHE_MIRROR``) and opened there; nothing
                is asked of the store afterwards.
            teachers: which to open, in this order; all by default.
            expect: the fingerprint each teacher must have, as `Fingerprint` or 64 hex digits.
            value_kind: what the student's loss works on. Rows of another kind are refused, never converted.
            on_miss: ``raise``, or ``nan`` to get NaN rows for files without logits, counted in ``misses``.
            verify: ``full`` checks every byte now; ``lazy`` checks each block of rows when it is first read; ``off``
                believes the disk; ``auto`` is full up to 1 GB of packs (or with ``preload=True``) and lazy above.
            preload: ``True`` reads all rows into one table in memory now; ``False`` gathers from the mapped packs;
                ``auto`` makes a table of up to 1 GiB when files are first resolved (unless rows are checked lazily).
                ``preloaded`` says what it came to.
                For a table on an accelerator see `tensor`.
            strict: refuse a cache that holds fewer rows than its index promises, instead of a warning.
            offline: of an URL, use the mirror as it is; by default what ``KD_CACHE_OFFLINE`` says.

        Raises:
            StoreError: the store at an URL cannot be reached in time.
            MissingLogitsError: no cache there, an unfinished one, a teacher it does not hold, or a pack that is gone.
            CorruptError: a damaged index or pack.
            StaleError: a fingerprint other than expected, naming the parts that differ; several caches that have other
                rows of one teacher for a sample.
            UsageError: teachers of different size, dtype or class order together, or another value kind.
        """
        if on_miss not in ("raise", "nan"):
            raise UsageError(f"on_miss is {on_miss!r}, expected raise or nan")
        if verify not in ("auto", *CHECKS):
            raise UsageError(f"verify is {verify!r}, expected auto, {', '.join(CHECKS)}")
        checked(preload)
        if not isinstance(path, str | Path):
            further = {"value_kind": value_kind, "verify": verify, "strict": strict, "expect": expect}
            paths = [local_copy(each, offline=offline) for each in path]
            return _opened_together(paths, teachers, on_miss, preload, further)
        path = local_copy(path, offline=offline)
        folder = CacheFolder.at(path)
        snapshot = Snapshot(folder)
        if snapshot.is_older:
            warnings.warn(
                f"{snapshot.trouble}. Nothing can be checked: not the teachers' weights, the features, the split or "
                f"the bytes.",
                stacklevel=2,
            )
            return cls(folder.path, older_rows(folder, teachers, expect), None, on_miss, verify, preload)
        generation = look(snapshot, teachers, verify, preload)
        origins = generation.origins
        refuse_unexpected(generation.index, origins, expect or {})
        refuse_mixture(origins, value_kind)
        for lacking in generation.lacking():
            if strict:
                raise MissingLogitsError(lacking, hint="Restore its packs, or run kd-cache dump again.")
            warnings.warn(lacking, stacklevel=2)
        for doubt in generation.doubts():
            warnings.warn(doubt, stacklevel=2)
        return cls(folder.path, generation.rows, generation.index, on_miss, verify, preload)

    def __repr__(self) -> str:
        return (
            f"LogitCache({shown(self.path)!r}, teachers={list(self.teachers)}, files={len(self):,}, "
            f"classes={self.num_classes}, {f'frames={self.frames}, ' if self.frames else ''}"
            f"dtype={self.topk or self.dtype})"
        )

    @property
    def files(self) -> list[str]:
        """Files that every opened teacher holds, ordered by key. (Built when asked for.)"""
        return self._resolver.files(self._row_numbers.all())

    @property
    def fingerprints(self) -> dict[str, str]:
        """``{teacher: sha256}``, as ``expect`` takes them; empty for a cache of an older script."""
        origins = {} if self._index is None else self._index.origins
        return {name: origins[name].fingerprint.digest for name in self.teachers if name in origins}

    @property
    def _origins(self) -> dict[str, Origin]:
        return {} if self._index is None else {name: self._index.origins[name] for name in self.teachers}

    @property
    def class_names(self) -> dict[str, tuple[str, ...] | None]:
        """What each opened teacher calls its columns; ``None`` where it says nothing."""
        origins = {} if self._index is None else self._index.origins
        return {name: origins[name].class_names if name in origins else None for name in self.teachers}

    def doubts(self, cities: Collection[str] = ()) -> list[str]:
        """Warnings of opened teachers that are hardly better than guessing; those of ``cities`` name no scenes."""
        index = self._index
        if index is None:
            return []
        entries = index.record["teachers"]
        told = [(index.origins[name], entries[name]) for name in self.teachers]
        found = (near_chance(made, stored_accuracy(entry), cities, stored_apart(entry)) for made, entry in told)
        return [warning for warning in found if warning is not None]

    @property
    def accuracies(self) -> list[str]:
        """How often each opened teacher names the scene of labelled source rows, a line each: first of those that it
        did not train on, where the dump knew that.
        """
        entries = {} if self._index is None else self._index.record["teachers"]
        told = [(name, entries[name]) for name in self.teachers if name in entries]
        return [line for name, one in told for line in in_words(name, stored_accuracy(one), stored_apart(one))]

    @property
    def label_counts(self) -> dict[str, int]:
        """``num_scenes`` and ``num_cities`` as task or dump say them, for `kd_cache.load_manifest`."""
        if self.task != DEFAULT:
            return {"num_scenes": self.task.num_classes}
        values = {} if self._index is None else self._index.record.get("settings", {}).get("values", {})
        return {
            "num_scenes": int(values.get("num_scenes", max(10, self.num_classes))),
            "num_cities": int(values.get("num_cities", 12)),
        }

    def __len__(self) -> int:
        return len(self._row_numbers)

    def all_rows(self) -> torch.Tensor:
        """Rows of all `files`, in their order: int64 ``[N]``.

        They are ``torch.arange(len(cache))`` where a teacher's rows lie in one pack. Else each pack's rows count from a
        multiple of 4,096, and the numbers left between packs are no rows.
        """
        return torch.from_numpy(self._row_numbers.all())

    def rows(self, files: Iterable[str]) -> torch.Tensor:
        """Rows of ``files``: int64 ``[B]``, valid for all opened teachers. Resolve once, then call `batch` with them.

        Raises:
            MissingLogitsError: listing every missing file and why. With ``on_miss="nan"`` a missing file has row -1.
        """
        if isinstance(files, str):
            raise UsageError(f"expected a list of files, found the one text {shown(files)}; put it in a list")
        asked = list(files)
        found = self._resolver.find(asked)
        missing = np.flatnonzero(found < 0)
        if len(missing) and self._on_miss == "raise":
            raise self._resolver.missing([asked[number] for number in missing.tolist()], len(asked))
        if len(missing):
            self.misses += len(missing)
            warnings.warn(
                f"{len(missing)} of {len(asked)} files have no logits in {shown(self.path)}; they are served as NaN",
                stacklevel=2,
            )
        if self.preloaded == "table" and get_worker_info() is None:
            self.prepare()  # whoever resolves files gathers next, and may fork workers before
        return torch.from_numpy(found)

    def batch(
        self,
        rows: torch.Tensor | np.ndarray | Sequence[str],
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
        view: View = None,
    ) -> Any:
        """Logits ``[B, T, C]`` of rows (from `rows`) or of files, in the stored dtype or in ``dtype``.

        Of teachers that score each frame they are ``[B, T, L, C]``. Of top-k rows it is a `TopK` ``[B, T]``, its
        log-probabilities in ``dtype`` or float32.

        Args:
            out: a tensor ``[B, T, C]`` to fill (pinned, for example, or on another device) and return; its own dtype
                counts.
            view: of which view, one for all or ``[B]`` integers; by default the clean one, 0. `all_views` gives all.

        Raises:
            MissingLogitsError, IndexError: a file without logits, a row or a view that is none.
            UsageError: ``out`` has another shape or dtype, or rows are top-k.
        """
        if not isinstance(rows, (torch.Tensor, np.ndarray)):
            rows = self.rows(rows)
        if self.topk is not None:
            if out is not None:
                raise UsageError("a batch of top-k rows is a TopK, and fills no tensor", hint="Leave out=… away.")
            return self._gatherer.most_probable(self._numbers(rows, self._first), self.topk, dtype)
        if out is not None:
            self._refuse_misfit(out, rows, dtype)
        at = 0 if view is None else checked_view(view, self.views, math.prod(rows.shape))
        if self.frames is None:
            return self._gathered(rows, dtype, out, at)
        whole = (math.prod(rows.shape), len(self.teachers), self.width)
        logits = self._gathered(rows, dtype, None, at).view(*whole[:2], self.frames, self.num_classes)
        return logits if out is None else out.copy_(logits)

    def _gathered(
        self, rows: torch.Tensor | np.ndarray, dtype: torch.dtype | None, out: torch.Tensor | None, view: Any
    ) -> torch.Tensor:
        """`batch` of rows that are vectors of `width` values."""
        if isinstance(rows, torch.Tensor):
            try:
                logits = self._gatherer.few(rows if self.views == 1 else rows * self.views + torch.as_tensor(view), out)
            except (IndexError, RuntimeError):
                logits = None  # what is wrong with these rows is said below
            if logits is not None:
                return logits if dtype is None else logits.to(dtype)
        numbers = self._numbers(rows, self._first)
        if self.views > 1:
            numbers = np.where(numbers < 0, -1, numbers * self.views + view)  # those of their vectors
        if self._on_miss == "nan" and (numbers < 0).any():
            return self._gatherer.with_nan(numbers, dtype, out)
        return self._gatherer.fresh(numbers, dtype) if out is None else self._gatherer.into(numbers, out)

    def prepare(self) -> None:
        """Make the table in memory now, if there is to be one. Else it is made when files are first resolved."""
        self._gatherer.prepare()

    def tensor(
        self,
        teachers: Sequence[str] | None = None,
        files: Sequence[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> Any:
        """The whole table ``[N, T, C]`` on a device: of ``files`` in their order (all by default) and ``teachers``."""
        wanted = self.teachers if teachers is None else tuple(teachers)
        unknown = [name for name in wanted if name not in self.teachers]
        if unknown:
            raise MissingLogitsError(f"not opened: {', '.join(map(shown, unknown))}; open: {', '.join(self.teachers)}")
        logits = self.batch(self.all_rows() if files is None else self.rows(files))
        if wanted != self.teachers:
            logits = logits[:, [self.teachers.index(name) for name in wanted]]
        return logits.to(device)

    def attach(
        self,
        dataset: Dataset[Any],
        keys: Sequence[str],
        *,
        dtype: torch.dtype | None = torch.float32,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> CachedDataset:
        """``dataset`` with logits beside each item; ``keys[i]`` is the manifest's ``file`` of item i.

        Raises:
            UsageError: not as many keys as items.
            MissingLogitsError: as `rows`, at once rather than in the middle of an epoch.
        """
        return CachedDataset(self, dataset, keys, dtype, collate)

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers open the packs themselves; the signature makes sure that row numbers mean the same there.
        return _reopen, (self.path, self.teachers, *self._opened_with, self._signature())

    def _signature(self) -> tuple[str, ...]:
        permitted = None if self._index is None else self._index.record.get("permitted")
        chosen = () if permitted is None else (str(permitted["file"]),)
        return (*(rows.signature for rows in self._rows_of), *chosen)

    @property
    def _table(self) -> np.ndarray | None:
        return self._gatherer._table if self._gatherer.has_table else None

    def _numbers(self, rows: torch.Tensor | np.ndarray, first: int = 0) -> np.ndarray:
        """Row numbers int64 ``[B]``, each of a row (with ``first`` -1 also of a miss). Raises `IndexError`."""
        numbers = rows.cpu().numpy() if isinstance(rows, torch.Tensor) else rows
        if numbers.ndim != 1 or numbers.dtype.kind != "i":
            raise IndexError(f"rows must be integers [B], found {numbers.dtype} {list(numbers.shape)}")
        if numbers.dtype is not _INT64:
            numbers = numbers.astype(_INT64)
        self._row_numbers.refuse_others(numbers, first)
        return numbers

    def _refuse_misfit(self, out: torch.Tensor, rows: torch.Tensor | np.ndarray, dtype: torch.dtype | None) -> None:
        row = (self.num_classes,) if self.frames is None else (self.frames, self.num_classes)
        expected = (math.prod(rows.shape), len(self.teachers), *row)
        if out.shape != expected or not out.is_floating_point() or dtype not in (None, out.dtype):
            raise UsageError(
                f"expected out as {dtype or 'floating-point'} {list(expected)}, found {out.dtype} {list(out.shape)}"
            )


class JoinedCache(LogitCache):
    """The caches of several targets as one. ``paths`` are theirs; ``target`` names all targets, with commas."""

    def __init__(
        self, caches: Sequence[LogitCache], on_miss: str, verify: str, preload: bool | str, *, in_worker: bool = False
    ) -> None:
        self.caches, self.paths = tuple(caches), tuple(cache.path for cache in caches)
        indexes = [cache._index for cache in caches if cache._index is not None]
        tables, differing = joined(
            [cache._rows_of for cache in caches], [index.origins for index in indexes], self.paths
        )
        if not in_worker:
            for told in differing:
                warnings.warn(told, stacklevel=4)
        missing = {file: reason for index in indexes for file, reason in index.missing.items()}
        whole = replace(indexes[0], record={**indexes[0].record, "missing": missing})
        super().__init__(
            Path(" + ".join(map(str, self.paths))), tables, whole, on_miss, verify, preload, in_worker=in_worker
        )
        targets = [cache.target for cache in caches]
        self.target = None if None in targets else ",".join(map(str, targets))

    @property
    def fingerprints(self) -> dict[str, str]:
        """``{teacher: sha256}``; of one that is not the same in all caches theirs in that order, ``+`` between."""
        each = [cache.fingerprints for cache in self.caches]
        return {name: "+".join(dict.fromkeys(found[name] for found in each)) for name in self.teachers}

    def doubts(self, cities: Collection[str] = ()) -> list[str]:
        return list(dict.fromkeys(doubt for cache in self.caches for doubt in cache.doubts(cities)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen_together, (self.caches, *self._opened_with)


def _opened_together(
    paths: Sequence[Path],
    teachers: Sequence[str] | None,
    on_miss: str,
    preload: bool | str,
    further: Mapping[str, Any],
) -> LogitCache:
    if not paths:
        raise UsageError("no cache is named")
    if len(paths) == 1:
        return LogitCache.open(paths[0], teachers, on_miss=on_miss, preload=preload, **further)
    folders = [CacheFolder.at(path) for path in paths]
    origins = [Snapshot(folder).finished().origins for folder in folders]
    held, only_some = teachers_of_all(origins, [folder.path for folder in folders])
    if teachers is None and only_some:
        warnings.warn(f"{', '.join(only_some)} left out: not all of the caches hold rows of them", stacklevel=3)
    # Their own tables are never made: the joined one is.
    caches = [
        LogitCache.open(f.path, held if teachers is None else teachers, preload=False, **further) for f in folders
    ]
    each = {f"{name} in {cache.path}": origin for cache in caches for name, origin in cache._origins.items()}
    refuse_mixture(each, further["value_kind"])
    return JoinedCache(caches, on_miss, further["verify"], preload)


def _reopen_together(caches: Sequence[LogitCache], on_miss: str, verify: str, preload: bool | str) -> LogitCache:
    return JoinedCache(caches, on_miss, verify, preload, in_worker=True)


def _reopen(
    path: Path,
    teachers: tuple[str, ...],
    on_miss: str,
    verify: str,
    preload: bool | str,
    signature: tuple[str, ...],
) -> LogitCache:
    """The same cache in another process: the packs' maps are shared with it, a large table is not made again."""
    snapshot = Snapshot(CacheFolder(path))
    index: Index | None
    if snapshot.is_older:
        index, tables = None, older_rows(snapshot.folder, teachers, None)
    else:
        generation = look(snapshot, teachers, verify, preload)
        index, tables = generation.index, generation.rows
    cache = LogitCache(path, tables, index, on_miss, verify, preload, in_worker=True)
    if cache._signature() != signature:
        raise StaleError(
            f"{shown(path)} changed while it was being read: row numbers resolved before no longer hold",
            hint="Open it anew; do not dump into a cache that a running training reads with worker processes.",
        )
    return cache
