"""Opening a cache: the one generation of it whose index and rows belong together, and what is refused of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_cache.errors import CorruptError, KDCacheError, MissingLogitsError, StaleError, StoreError, UsageError, shown
from kd_cache.files.atomic import store_errors
from kd_cache.serve.placement import check_of
from kd_cache.serve.rows import TeacherRows
from kd_cache.store.cache import CacheFolder
from kd_cache.store.classes import differing_columns, repeated
from kd_cache.store.index import Index, read_older_maps
from kd_cache.store.older import older_pack
from kd_cache.store.origin import Fingerprint, Origin
from kd_cache.store.snapshot import Snapshot


@dataclass(frozen=True)
class Generation:
    """An index and the rows that it finds."""

    index: Index
    origins: dict[str, Origin]
    rows: list[TeacherRows]

    def lacking(self) -> list[str]:
        """Which teachers have fewer rows than the index promises, in words."""
        promised = {name: entry["rows"] for name, entry in self.index.record["teachers"].items()}
        return [
            f"{shown(self.index.path)} promises {promised[part.name]:,} rows of {part.name}, found {len(part):,}"
            for part in self.rows
            if len(part) < promised[part.name]
        ]

    def doubts(self) -> list[str]:
        """What nobody has verified of these teachers, in words."""
        adopted = [name for name in self.origins if "adopted" in self.index.record["teachers"][name]]
        found = [
            f"the rows of {name} were adopted from elsewhere and never verified; kd-cache repair --recompute does that"
            for name in adopted
        ]
        nameless = [name for name, origin in self.origins.items() if origin.class_names is None]
        if 0 < len(nameless) < len(self.origins):
            what = f"{', '.join(nameless)} name no classes"
            found.append(f"{what}: whether their columns are those of the other teachers is not known")
        return found


def look(snapshot: Snapshot, teachers: Sequence[str] | None, verify: str, preload: bool | str) -> Generation:
    """One generation of the cache: looks again if the index was written anew before all its rows were opened."""
    for _ in range(100):
        index = snapshot.finished()
        origins = _chosen(index.origins, teachers, snapshot.folder)
        rows: list[TeacherRows] = []
        problem: KDCacheError | None = None
        try:
            rows = _pack_rows(snapshot, origins, verify, preload)
        except (CorruptError, MissingLogitsError) as error:
            problem = error
        found = Generation(index, origins, rows)
        if problem is None and not found.lacking():
            return found
        now = snapshot.again()
        if now.state == snapshot.state:
            if problem is not None:
                raise problem
            return found
        snapshot = now
    raise StoreError(f"{shown(snapshot.folder.path)} keeps changing; try again when the dumps are done")


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


def refuse_unexpected(index: Index, origins: Mapping[str, Origin], expect: Mapping[str, str | Fingerprint]) -> None:
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


def refuse_mixture(origins: Mapping[str, Origin], value_kind: str) -> None:
    for name, origin in origins.items():
        if origin.value_kind != value_kind:
            raise UsageError(
                f"{name} stores {origin.value_kind}, not {value_kind}",
                hint=f'Pass value_kind="{origin.value_kind}" if your loss works on that, or choose other teachers.',
            )
    augmented = {origin.policy and (origin.policy, origin.views) for origin in origins.values()}
    if len(augmented) > 1:
        told = ", ".join(f"{name}: {len(origin.views) or 'no'} views" for name, origin in origins.items())
        raise UsageError(
            f"these teachers did not score the same views ({told})", hint="Open them separately: teachers=[…]."
        )
    shapes = {name: (origin.num_classes, origin.frames, origin.dtype) for name, origin in origins.items()}
    if len(set(shapes.values())) > 1:
        framed = {name: "" if frames is None else f"{frames} frames of " for name, (_, frames, _) in shapes.items()}
        each = ", ".join(
            f"{name}: {framed[name]}{count} classes, {dtype}" for name, (count, _, dtype) in shapes.items()
        )
        raise UsageError(
            f"these teachers do not fit into one tensor ({each})", hint="Open them separately: teachers=[…]."
        )
    for name, origin in origins.items():
        if (why := repeated(origin.class_names)) is not None:
            raise UsageError(f"{name}: {why}", hint="Dump it again with a name of its own for each column.")
    named = [origin for origin in origins.values() if origin.class_names is not None]
    for origin in named[1:]:
        why = differing_columns(named[0].teacher, named[0].class_names, origin.teacher, origin.class_names)
        if why is not None:
            raise UsageError(why, hint="Open them separately: teachers=[…]; a mean of both would mix their columns.")


def _pack_rows(
    snapshot: Snapshot, origins: Mapping[str, Origin], verify: str, preload: bool | str
) -> list[TeacherRows]:
    folder = snapshot.folder
    try:
        permitted = snapshot.permitted
    except FileNotFoundError as error:
        raise CorruptError(
            f"{shown(folder.path)}: the list of permitted samples that its index names is not there",
            hint="kd-cache seal writes it again.",
        ) from error
    check = check_of(verify, preload, sum(_size(path) for path in snapshot.served_paths(origins)))
    tables: list[TeacherRows] = []
    for name in origins:
        tables.append(TeacherRows(snapshot.served_packs(name, check), permitted, tables[0] if tables else None))
    return tables


def _size(path: Path) -> int:
    with store_errors(path, "look at"):
        try:
            return path.stat().st_size
        except FileNotFoundError:  # refused when it is opened
            return 0


def older_rows(
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
    packs = [
        older_pack(name, {file: folder.view_path(name) / Path(path).name for file, path in maps[name].items()})
        for name in names
    ]
    tables = [TeacherRows([pack]) for pack in packs]
    if len({(table.num_classes, table.dtype) for table in tables}) > 1:
        raise UsageError("these teachers do not fit into one tensor", hint="Open them separately: teachers=[…].")
    return tables
