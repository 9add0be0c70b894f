"""Serving logits: open a cache, resolve files to rows once, gather a batch per step.

cache = LogitCache.open("cache/A2b")
data = cache.attach(train_set, keys=train_set.files)
loader = DataLoader(data, batch_size=256, shuffle=True, collate_fn=data.collate)
for batch, logits in loader:  # logits [B, T, C], teachers in the order of cache.teachers
    ...
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from kd_cache.errors import (
    CorruptError,
    KDCacheError,
    MissingLogitsError,
    StaleError,
    StoreError,
    UsageError,
    listed,
    shown,
)
from kd_cache.fingerprint import Fingerprint
from kd_cache.manifest import SOURCE
from kd_cache.rows import Names, OlderRows, PackRows, TeacherRows
from kd_cache.store.atomic import store_errors
from kd_cache.store.folder import CacheFolder, teacher_in_name
from kd_cache.store.index import Index, read_older_maps
from kd_cache.store.keys import KeyFinder, keys_of_bytes
from kd_cache.store.pack import CHECKS, Origin

FULLY_CHECKED = 10**9
"""Packs of up to so many bytes together are checked when they are opened, larger ones as they are read."""
TABLE_BYTES = 1 << 30
"""Up to this size all rows are gathered into one ``[N, T, C]`` table when a cache is opened."""


class LogitCache:
    """An opened cache: rows that exist for every opened teacher, checked, read-only, safe to send to workers.

    Attributes:
        teachers: their names; the second axis of every batch.
        files: the files that all opened teachers hold.
        num_classes: C.
        target: the target device of the adaptation, or ``None`` where the folder's name does not say.
        misses: how many files without logits were resolved, to be served as NaN (only with ``on_miss="nan"``).
    """

    def __init__(
        self, path: Path, tables: Sequence[TeacherRows], index: Index | None, on_miss: str, verify: str
    ) -> None:
        self.path = path
        self._verify = verify
        self.misses = 0
        self._rows_of = tables
        self._index = index
        self._on_miss = on_miss
        self.teachers = tuple(rows.name for rows in tables)
        self.num_classes = tables[0].num_classes
        self.dtype = tables[0].dtype
        self._keys = _common_keys([rows.keys for rows in tables])
        # Where a teacher's own rows are the common ones, positions are rows.
        self._positions = [
            None if len(rows.keys) == len(self._keys) else rows.finder.find(self._keys) for rows in tables
        ]
        self._finder = tables[0].finder if self._positions[0] is None else KeyFinder(self._keys)
        size = len(self._keys) * len(tables) * self.num_classes * self.dtype.itemsize
        # A table of everything would touch, and so check, everything now: that is not what lazy asks for.
        is_lazy = any(rows.is_lazy for rows in tables)
        self._table = self._gather(None) if size <= TABLE_BYTES and not is_lazy else None
        adaptation = str(path.name if index is None else index.record.get("adaptation", path.name))
        head, separator, target = adaptation.partition("2")
        self.target = target if separator and head == SOURCE else None

    @classmethod
    def open(
        cls,
        path: str | Path,
        teachers: Sequence[str] | None = None,
        expect: Mapping[str, str | Fingerprint] | None = None,
        *,
        value_kind: str = "logits",
        on_miss: str = "raise",
        verify: str = "auto",
    ) -> LogitCache:
        """Open ``cache/A2b``. Every byte is checked against its digest before a value is believed.

        Args:
            path: the cache's folder, or the ``cache_index.json`` in it.
            teachers: which to open, in this order; all by default.
            expect: the fingerprint each teacher must have, as `Fingerprint` or 64 hex digits.
            value_kind: what the student's loss works on. Rows of another kind are refused, never converted.
            on_miss: ``raise``, or ``nan`` to get NaN rows for files without logits, counted in ``misses``.
            verify: ``full`` checks every byte now; ``lazy`` checks each block of rows when it is first read; ``off``
                believes the disk; ``auto`` is full up to 1 GB of packs and lazy above.

        Raises:
            MissingLogitsError: no cache there, an unfinished one, or a teacher it does not hold.
            CorruptError: a damaged index or pack.
            StaleError: a fingerprint other than expected, naming the parts that differ.
            UsageError: teachers of different size or dtype together, or another value kind.
        """
        if on_miss not in ("raise", "nan"):
            raise UsageError(f"on_miss is {on_miss!r}, expected raise or nan")
        if verify not in ("auto", *CHECKS):
            raise UsageError(f"verify is {verify!r}, expected auto, {', '.join(CHECKS)}")
        path = Path(path).expanduser()
        folder = CacheFolder(path.parent if path.is_file() else path)
        try:
            generation = _look(folder, teachers, verify)
        except StaleError as error:
            warnings.warn(
                f"{error.message}. Nothing can be checked: not the teachers' weights, the features, the split or "
                f"the bytes.",
                stacklevel=2,
            )
            return cls(folder.path, _older_rows(folder, teachers, expect), None, on_miss, verify)
        origins = generation.origins
        _refuse_unexpected(generation.index, origins, expect or {})
        _refuse_mixture(origins, value_kind)
        for name in origins:
            if "adopted" in generation.index.record["teachers"][name]:
                warnings.warn(
                    f"the rows of {name} were adopted from elsewhere and never verified; kd-cache repair --recompute "
                    "does that",
                    stacklevel=2,
                )
        return cls(folder.path, generation.rows, generation.index, on_miss, verify)

    @property
    def files(self) -> list[str]:
        """Files that every opened teacher holds, ordered by key. (Built when asked for.)"""
        return self._rows_of[0].files(self._position(0, np.arange(len(self))))

    @property
    def fingerprints(self) -> dict[str, str]:
        """``{teacher: sha256}``, as ``expect`` takes them; empty for a cache of an older script."""
        origins = {} if self._index is None else self._index.origins
        return {name: origins[name].fingerprint.digest for name in self.teachers if name in origins}

    def __len__(self) -> int:
        return len(self._keys)

    def rows(self, files: Iterable[str]) -> torch.Tensor:
        """Rows of ``files``: int64 ``[B]``, valid for all opened teachers. Resolve once, then call `batch` with them.

        Raises:
            MissingLogitsError: listing every missing file and why. With ``on_miss="nan"`` a missing file has row -1.
        """
        if isinstance(files, str):
            raise UsageError(f"expected a list of files, found the one text {shown(files)}; put it in a list")
        asked = list(files)
        names = [file.encode("utf-8", "surrogatepass") for file in asked]
        found = self._finder.find(keys_of_bytes(names))
        self._refuse_collisions(names, found)
        missing = np.flatnonzero(found < 0)
        if len(missing) and self._on_miss == "raise":
            reasons = [f"{asked[number]}: {self._why_missing(asked[number])}" for number in missing[:20].tolist()]
            raise MissingLogitsError(
                f"{len(missing)} of {len(asked)} files have no logits in {shown(self.path)}\n"
                + listed(reasons, total=len(missing)),
                hint="Run kd-cache dump with the manifest you train on.",
            )
        if len(missing):
            self.misses += len(missing)
            warnings.warn(
                f"{len(missing)} of {len(asked)} files have no logits in {shown(self.path)}; they are served as NaN",
                stacklevel=2,
            )
        return torch.from_numpy(found)

    def batch(self, rows: torch.Tensor | np.ndarray | Sequence[str], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Logits ``[B, T, C]`` of rows (from `rows`) or of files, in the stored dtype or in ``dtype``.

        Raises:
            MissingLogitsError, IndexError: a file without logits, a row that is none.
        """
        if isinstance(rows, np.ndarray):
            rows = torch.from_numpy(rows)
        numbers = rows if isinstance(rows, torch.Tensor) else self.rows(rows)
        if self._on_miss == "nan" and bool((numbers < 0).any()):
            return self._with_nan(numbers, dtype)
        logits = self._select(numbers)
        return logits if dtype is None else logits.to(dtype)

    def tensor(
        self,
        teachers: Sequence[str] | None = None,
        files: Sequence[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> torch.Tensor:
        """The whole table ``[N, T, C]`` on a device: of ``files`` in their order (all by default) and ``teachers``."""
        wanted = self.teachers if teachers is None else tuple(teachers)
        unknown = [name for name in wanted if name not in self.teachers]
        if unknown:
            raise MissingLogitsError(f"not opened: {', '.join(map(shown, unknown))}; open: {', '.join(self.teachers)}")
        logits = self.batch(torch.arange(len(self)) if files is None else self.rows(files))
        if wanted != self.teachers:
            logits = logits[:, [self.teachers.index(name) for name in wanted]]
        return logits.to(device)

    def input_digests(self, rows: torch.Tensor) -> np.ndarray | None:
        """``[B, teachers, 16]`` u1: the digest of the features that each teacher scored, by rows from `rows`.

        `kd_cache.FeatureSource.read` gives the digest of a feature as it is now. ``None`` for a cache of an older
        script, which kept none.
        """
        numbers = rows.numpy()
        parts = [part.inputs(self._position(number, numbers)) for number, part in enumerate(self._rows_of)]
        known = [part for part in parts if part is not None]
        return np.stack(known, axis=1) if len(known) == len(parts) else None

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
        state = (self.path, self.teachers, self._on_miss, self._verify, self._signature())
        return _reopen, state

    def _signature(self) -> tuple[str, ...]:
        permitted = None if self._index is None else self._index.record.get("permitted")
        chosen = () if permitted is None else (str(permitted["file"]),)
        return (*(name for rows in self._rows_of for name in rows.signature), *chosen)

    def _select(self, rows: torch.Tensor) -> torch.Tensor:
        if self._table is not None:
            return self._table.index_select(0, rows)
        numbers = rows.numpy()
        if numbers.ndim != 1 or numbers.dtype.kind != "i":
            raise IndexError(f"rows must be integers [B], found {numbers.dtype} {list(numbers.shape)}")
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows must lie in [0, {len(self)}), found {numbers.min()} to {numbers.max()}")
        return self._gather(numbers)

    def _gather(self, rows: np.ndarray | None) -> torch.Tensor:
        """Logits ``[B, T, C]`` of rows, or of all of them."""
        count = len(self) if rows is None else len(rows)
        out = np.empty((count, len(self._rows_of), self.num_classes), self.dtype)
        for number, table in enumerate(self._rows_of):
            if rows is None and self._positions[number] is None:
                out[:, number] = table.all()
            else:
                out[:, number] = table.take(self._position(number, slice(None) if rows is None else rows))
        return torch.from_numpy(out)

    def _position(self, number: int, rows: Any) -> Any:
        """Where these rows are in a teacher's own order."""
        positions = self._positions[number]
        return rows if positions is None else positions[rows]

    def _with_nan(self, rows: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        missing = rows == -1
        logits = torch.full((len(rows), len(self.teachers), self.num_classes), float("nan"), dtype=self._torch_dtype)
        logits[~missing] = self._select(rows[~missing])
        return logits if dtype is None else logits.to(dtype)

    @property
    def _torch_dtype(self) -> torch.dtype:
        return torch.float16 if self.dtype.itemsize == 2 else torch.float32

    def _refuse_collisions(self, names: list[bytes], found: np.ndarray) -> None:
        """Refuse a file whose key is that of another file's row."""
        present = np.flatnonzero(found >= 0)
        asked = Names.of(names if len(present) == len(names) else [names[number] for number in present.tolist()])
        for number, rows in enumerate(self._rows_of):
            positions = self._position(number, found[present])
            for at in np.flatnonzero(asked.differ_from(rows.names(positions)))[:1].tolist():
                name, other = names[present[at]].decode("utf-8", "replace"), rows.files(positions[at : at + 1])[0]
                raise CorruptError(
                    f"{shown(name)} and {shown(other)} have the same MD5 key; one of them must be renamed"
                )

    def _why_missing(self, file: str) -> str:
        reason = self._index.missing.get(file) if self._index is not None else None
        if reason is not None:
            return f"could not be scored ({reason})"
        key = keys_of_bytes([file.encode("utf-8", "surrogatepass")])
        if any(rows.is_ambiguous(key) for rows in self._rows_of):
            return "its feature changed and a dump has not finished since"
        holders = [rows.name for rows in self._rows_of if rows.finder.find(key)[0] >= 0]
        if holders:
            return f"only {', '.join(holders)} scored it"
        if any(rows.is_promised(key) for rows in self._rows_of):
            return "its row is gone or damaged; run kd-cache repair"
        return "not in the cache: not in the manifest of the dump, or not a permitted train sample"


def _reopen(path: Path, teachers: tuple[str, ...], on_miss: str, verify: str, signature: tuple[str, ...]) -> LogitCache:
    folder = CacheFolder(path)
    index: Index | None
    try:
        generation = _look(folder, teachers, verify)
        index, tables = generation.index, generation.rows
    except StaleError:
        index, tables = None, _older_rows(folder, teachers, None)
    cache = LogitCache(path, tables, index, on_miss, verify)
    if cache._signature() != signature:
        raise StaleError(
            f"{shown(path)} changed while it was being read: row numbers resolved before no longer hold",
            hint="Open it anew; do not dump into a cache that a running training reads with worker processes.",
        )
    return cache


@dataclass(frozen=True)
class _Generation:
    """An index and the rows that it finds."""

    index: Index
    origins: dict[str, Origin]
    rows: list[TeacherRows]


def _look(folder: CacheFolder, teachers: Sequence[str] | None, verify: str) -> _Generation:
    """One generation of the cache: looks again if the index was written anew before all its rows were opened."""
    for _ in range(100):
        state = folder.index_state()
        index = folder.index(maps=False)
        if index is None:
            raise _unfinished(folder)
        origins = _chosen(index.origins, teachers, folder)
        rows: list[TeacherRows] = []
        problem: KDCacheError | None = None
        try:
            rows = _pack_rows(folder, index, origins, verify)
        except (CorruptError, MissingLogitsError) as error:
            problem = error
        told = index.record["teachers"]
        whole = problem is None and all(len(part.keys) >= told[part.name]["rows"] for part in rows)
        if whole or folder.index_state() == state:
            if problem is not None:
                raise problem
            return _Generation(index, origins, rows)
    raise StoreError(f"{shown(folder.path)} keeps changing; try again when the dumps are done")


def _unfinished(folder: CacheFolder) -> MissingLogitsError:
    if folder.packs_path.is_dir():
        return MissingLogitsError(
            f"{shown(folder.path)} has no {folder.index_path.name}: its dump did not finish",
            hint="Run the same kd-cache dump again; it continues where it stopped.",
        )
    return MissingLogitsError(f"there is no cache at {shown(folder.path)}", hint="Make one with kd-cache dump.")


def _chosen(origins: Mapping[str, Origin], teachers: Sequence[str] | None, folder: CacheFolder) -> dict[str, Origin]:
    wanted = list(origins) if teachers is None else _each_once(teachers)
    unknown = [name for name in wanted if name not in origins]
    if unknown or not wanted:
        raise MissingLogitsError(
            f"{shown(folder.path)} holds no logits of {', '.join(map(shown, unknown)) or 'any teacher'} "
            f"(it holds {', '.join(origins) or 'none'})"
        )
    return {name: origins[name] for name in wanted}


def _each_once(teachers: Sequence[str]) -> list[str]:
    names = list(teachers)
    if len(set(names)) != len(names):
        raise UsageError(f"each teacher can be opened once, found {', '.join(map(shown, names))}")
    return names


def _refuse_unexpected(index: Index, origins: Mapping[str, Origin], expect: Mapping[str, str | Fingerprint]) -> None:
    for name, wanted in expect.items():
        if name not in origins:
            raise UsageError(f"expect names {shown(name)}, which is not among the opened teachers {', '.join(origins)}")
        found = origins[name].fingerprint
        digest = wanted.digest if isinstance(wanted, Fingerprint) else wanted.lower()
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise UsageError(
                f"{name}: expected a fingerprint of 64 hex digits, found {shown(wanted)}",
                hint="kd-cache info --json prints it whole.",
            )
        if digest == found.digest:
            continue
        parts = wanted if isinstance(wanted, Fingerprint) else index.known_fingerprint(name, digest)
        if parts is None:
            held = "; ".join(f"{part}: {value[:60]}" for part, value in sorted(found.parts.items()))
            what = f"no teacher with that fingerprint was ever cached here; this one has {held}"
        else:
            what = f"they differ in {parts.difference(found)}"
        raise StaleError(
            f"{name}: expected fingerprint {shown(digest)[:16]}…, the cache has {found.digest[:16]}…: {what}",
            hint="Dump again with the teacher you expect, or expect the one that is cached.",
        )


def _refuse_mixture(origins: Mapping[str, Origin], value_kind: str) -> None:
    for name, origin in origins.items():
        if origin.value_kind != value_kind:
            raise UsageError(
                f"{name} stores {origin.value_kind}, not {value_kind}",
                hint=f'Pass value_kind="{origin.value_kind}" if your loss works on that, or choose other teachers.',
            )
    shapes = {name: (origin.num_classes, origin.dtype) for name, origin in origins.items()}
    if len(set(shapes.values())) > 1:
        each = ", ".join(f"{name}: {classes} classes, {dtype}" for name, (classes, dtype) in shapes.items())
        raise UsageError(
            f"these teachers do not fit into one tensor ({each})", hint="Open them separately: teachers=[…]."
        )


def _pack_rows(folder: CacheFolder, index: Index, origins: Mapping[str, Origin], verify: str) -> list[TeacherRows]:
    try:
        permitted = folder.permitted(index)
    except FileNotFoundError as error:
        raise CorruptError(
            f"{shown(folder.path)}: the list of permitted samples that its index names is not there",
            hint="kd-cache seal writes it again.",
        ) from error
    packs = folder.packs(origins, _check(folder, origins, verify))
    for path, damage in packs.damaged.items():
        if teacher_in_name(path) in origins:
            raise damage
    tables: list[TeacherRows] = []
    for name, origin in origins.items():
        mine = packs.of(origin)
        if not mine:
            raise MissingLogitsError(
                f"{shown(folder.path)} holds no rows of {name} as its index describes them",
                hint="Restore its packs, or run kd-cache dump again.",
            )
        tables.append(PackRows(mine, permitted))
    return tables


def _check(folder: CacheFolder, origins: Mapping[str, Origin], verify: str) -> str:
    """How packs are checked: what ``auto`` means depends on how much there is to read."""
    if verify != "auto":
        return verify
    size = sum(_size(path) for path in folder.pack_paths() if teacher_in_name(path) in origins)
    return "full" if size <= FULLY_CHECKED else "lazy"


def _size(path: Path) -> int:
    with store_errors(path, "look at"):
        try:
            return path.stat().st_size
        except FileNotFoundError:  # sealed away since it was listed
            return 0


def _older_rows(
    folder: CacheFolder, teachers: Sequence[str] | None, expect: Mapping[str, str | Fingerprint] | None
) -> list[TeacherRows]:
    if expect:
        raise StaleError(f"{shown(folder.path)} was written by an older script: its fingerprints are unknown")
    maps = read_older_maps(folder.index_path)
    names = list(maps) if teachers is None else _each_once(teachers)
    unknown = [name for name in names if name not in maps]
    if unknown or not names:
        raise MissingLogitsError(
            f"{shown(folder.path)} holds no logits of {', '.join(map(shown, unknown)) or 'any teacher'}"
        )
    # Its paths hold only where that script ran; the files are found beside the index, wherever it was moved.
    tables: list[TeacherRows] = [
        OlderRows(name, {file: folder.view_path(name) / Path(path).name for file, path in maps[name].items()})
        for name in names
    ]
    if len({(table.num_classes, table.dtype) for table in tables}) > 1:
        raise UsageError("these teachers do not fit into one tensor", hint="Open them separately: teachers=[…].")
    return tables


def _common_keys(keys: list[np.ndarray]) -> np.ndarray:
    """Keys that all teachers hold, sorted."""
    common = keys[0]
    for other in keys[1:]:
        if not np.array_equal(common.view(np.uint64), other.view(np.uint64)):
            common = common[KeyFinder(other).find(common) >= 0]
    return common


class Gathered:
    """One batch on its way from ``__getitems__`` to ``collate``: base items, and their logits ``[B, T, C]``.

    To any other collate function it is a list of ``(item, logits [T, C])``.
    """

    def __init__(self, items: list[Any], logits: torch.Tensor) -> None:
        self.items = items
        self.logits = logits

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[Any, torch.Tensor]:
        return self.items[number], self.logits[number]


class CachedDataset(Dataset[Any]):
    """A map-style dataset with logits beside each item. Made by `LogitCache.attach`."""

    def __init__(
        self,
        cache: LogitCache,
        dataset: Dataset[Any],
        keys: Sequence[str],
        dtype: torch.dtype | None,
        collate: Callable[[list[Any]], Any],
    ) -> None:
        size = len(dataset)  # type: ignore[arg-type]
        if len(keys) != size:
            raise UsageError(f"expected one key per item: the dataset has {size} items, found {len(keys)} keys")
        self.cache = cache
        self.dataset = dataset
        self._rows = cache.rows(keys)
        self._dtype = dtype
        self._collate = collate

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> tuple[Any, torch.Tensor]:
        """``(item, logits [T, C])``; for a list of numbers (a batch sampler's) what `collate` makes of them."""
        if isinstance(number, list | tuple) or (isinstance(number, torch.Tensor | np.ndarray) and number.ndim):
            return self.collate(self.__getitems__([int(one) for one in number]))
        return self.dataset[number], self.cache.batch(self._rows[number].reshape(1), self._dtype)[0]

    def __getitems__(self, numbers: Sequence[int]) -> Gathered:
        """A whole batch, its logits gathered at once. torch's DataLoader calls this; ``collate`` takes it."""
        fetch = getattr(self.dataset, "__getitems__", None)
        items = list(fetch(numbers)) if callable(fetch) else [self.dataset[number] for number in numbers]
        if len(items) != len(numbers):
            raise UsageError(f"the dataset gave {len(items)} items for {len(numbers)} numbers: whose logits are whose?")
        return Gathered(items, self.cache.batch(self._rows[torch.as_tensor(numbers)], self._dtype))

    def collate(
        self, batch: Gathered | list[tuple[Any, torch.Tensor]] | tuple[Any, torch.Tensor]
    ) -> tuple[Any, torch.Tensor]:
        """``(base batch, logits [B, T, C])``, be the batch gathered at once, item by item, or ready already."""
        if isinstance(batch, tuple):
            return batch
        if isinstance(batch, Gathered):
            return self._collate(batch.items), batch.logits
        return self._collate([item for item, _ in batch]), torch.stack([logits for _, logits in batch])
