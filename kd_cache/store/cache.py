"""One cache on disk: ``cache/A2b/`` with its index, its packs and its view."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from kd_cache.errors import CorruptError, MissingLogitsError, StoreError, shown
from kd_cache.files.atomic import TEMPORARY, store_errors
from kd_cache.options import TARGETS
from kd_cache.store.index import INDEX_NAME, Index, State, index_state, read_index
from kd_cache.store.names import PACK_NAME
from kd_cache.store.origin import Origin
from kd_cache.store.pack import Pack, open_pack
from kd_cache.store.permitted import Permitted, read_permitted
from kd_cache.store.preamble import Span, is_apart


@dataclass
class PackSet:
    """The packs found in one look at a cache: the good ones, and the path and error of each damaged one.

    ``apart`` are those left alone, because they say that they hold no key that is needed.
    """

    good: list[Pack] = field(default_factory=list)
    damaged: dict[Path, CorruptError] = field(default_factory=dict)
    apart: list[Path] = field(default_factory=list)

    def of(self, origin: Origin) -> list[Pack]:
        """The packs with this teacher and fingerprint."""
        wanted = (origin.teacher, origin.fingerprint.digest)
        return [pack for pack in self.good if (pack.origin.teacher, pack.origin.fingerprint.digest) == wanted]

    def sole_origins(self, known: Collection[str] = ()) -> dict[str, Origin]:
        """The origins of teachers that nobody names, but for the ``known``: as their packs say.

        Raises:
            CorruptError: a teacher has packs of several fingerprints.
        """
        found: dict[str, dict[str, Origin]] = {}
        for pack in self.good:
            if pack.origin.teacher not in known:
                found.setdefault(pack.origin.teacher, {})[pack.origin.fingerprint.digest] = pack.origin
        for name, origins in found.items():
            if len(origins) > 1:
                raise CorruptError(
                    f"the index is damaged or gone; {name} has rows of {len(origins)} fingerprints: which is current?",
                    hint=f"Dump with {name} among the teachers (without --only, or with --teacher {name}=…).",
                )
        return {name: next(iter(origins.values())) for name, origins in sorted(found.items())}


@dataclass(frozen=True)
class CacheFolder:
    """Paths of one cache, and looking into it. Nothing is created by constructing it."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> CacheFolder:
        """The cache that a person means: its folder, or the index in it."""
        return cls(path.parent if path.is_file() else path)

    @property
    def index_path(self) -> Path:
        return self.path / INDEX_NAME

    @property
    def is_anything(self) -> bool:
        """Whether a dump, or an older script, has been here."""
        return self.packs_path.is_dir() or self.index_path.is_file()

    @property
    def packs_path(self) -> Path:
        return self.path / "packs"

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    @property
    def seen_path(self) -> Path:
        """Notes of the features, which save the next dump reading them; a cache is complete without."""
        return self.path / "seen.bin"

    @property
    def pending_path(self) -> Path:
        """Where dumps that no index tells of yet say what they are making."""
        return self.path / "pending"

    def view_path(self, teacher: str) -> Path:
        return self.path / teacher

    def view_folders(self) -> list[Path]:
        """Every folder that may hold row files, whatever the index says: all but our own, and those still written."""
        ours = (self.packs_path.name, self.pending_path.name)
        with store_errors(self.path, "list"):
            entries = [entry for entry in os.scandir(self.path) if entry.is_dir() and entry.name not in ours]
        return sorted(self.path / entry.name for entry in entries if not entry.name.startswith(TEMPORARY))

    def permitted(self, index: Index) -> Permitted | None:
        """The permitted samples that the index names; ``None`` where it names none (kd-cache 0.1 wrote none).

        Raises:
            FileNotFoundError: it is gone: another index may have been written meanwhile.
            CorruptError, StoreError: as `read_permitted`.
        """
        entry = index.record.get("permitted")
        return None if entry is None else read_permitted(self.path / entry["file"])

    def index(self, *, maps: bool = True) -> Index | None:
        """The checked index, ``None`` if the cache has none (its dump did not finish). Raises as `read_index`."""
        try:
            return read_index(self.index_path, maps=maps)
        except FileNotFoundError:
            return None

    def packs(
        self,
        teachers: Collection[str] | None = None,
        check: str = "full",
        known: Mapping[Path, Pack] = MappingProxyType({}),
        needed: Span | None = None,
    ) -> PackSet:
        """Every pack (of these teachers); ``check`` is that of `open_pack`. Those ``known`` are not opened again.

        Where only some keys are ``needed``, packs that say that they hold none of them are left alone.

        Packs may be added and sealed away meanwhile. The look is only over when the folder lists, at its end, what was
        opened: a row that a seal carries from one pack to another is seen in one of them.
        """
        seen: dict[Path, Pack | CorruptError] = {}
        apart: dict[Path, bool] = {}
        for _ in range(100):
            paths = [path for path in self.pack_paths() if teachers is None or teacher_in_name(path) in teachers]
            if needed is not None:
                apart = {path: apart[path] if path in apart else is_apart(path, needed) for path in paths}
                paths = [path for path in paths if not apart[path]]
            if seen.keys() == set(paths):
                good = [pack for path in paths if isinstance(pack := seen[path], Pack)]
                damaged = {path: error for path in paths if isinstance(error := seen[path], CorruptError)}
                return PackSet(good, damaged, [path for path in apart if apart[path]])
            found = {path: seen.get(path) or known.get(path) or opened(path, check) for path in paths}
            seen = {path: pack for path, pack in found.items() if pack is not None}
        raise StoreError(f"the packs in {shown(self.packs_path)} keep changing; try again when the dumps are done")

    def index_state(self) -> State:
        """What tells this version of the index from others; for `write_index`."""
        with store_errors(self.index_path, "look at"):
            return index_state(self.index_path)

    def pack_paths(self) -> list[Path]:
        with store_errors(self.packs_path, "list"):
            refuse_link(self.packs_path)
            try:
                entries = list(os.scandir(self.packs_path))
            except FileNotFoundError:
                return []
        names = sorted(entry.name for entry in entries if PACK_NAME.match(entry.name))
        return [self.packs_path / name for name in names]


def opened(path: Path, check: str = "full") -> Pack | CorruptError | None:
    """The pack, what is wrong with it, or ``None`` if it is gone."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return CorruptError(f"the pack {shown(path)} is damaged: it is not a regular file", hint="Remove it.")
        return open_pack(path, check)
    except CorruptError as error:
        # Another in its place: its traceback would keep the whole pack mapped for as long as anybody keeps the error.
        return CorruptError(error.message, hint=error.hint)
    except FileNotFoundError:
        return None


def refuse_link(directory: Path) -> None:
    """Raise `StoreError` if a link stands where a folder of ours is to be: what we remove there is another's."""
    if directory.is_symlink():
        raise StoreError(
            f"{shown(directory)} is a link, expected a folder of its own",
            hint="Move the whole cache where there is room, and name it with --cache-root.",
        )


def teacher_in_name(path: Path) -> str:
    """Whose pack this is, by its file name alone (all that a damaged one can tell)."""
    return path.name.rpartition("-")[0]


def refuse_file_as_root(root: Path) -> None:
    """Raise `StoreError` if a file stands where the folder of caches is to be, or one above it."""
    if (file := file_in_the_way(root)) is not None:
        raise StoreError(
            f"the cache root {shown(root)} is no folder: {shown(file)} is a file", hint="Pass --cache-root."
        )


def file_in_the_way(path: Path) -> Path | None:
    """What is no folder and stands where this one is to be, or one above it."""
    there = next((each for each in (path, *path.absolute().parents) if os.path.lexists(each)), path)
    return None if there.is_dir() else there


def no_cache(path: Path, where: str = "at") -> MissingLogitsError:
    """There is none ``at`` a folder, or ``under`` one: which there are in it, or which command would make it."""
    if held := find_caches(path, lambda _: True) if path.is_dir() else []:
        names = ", ".join(shown(folder.path.name) for folder in held)
        return MissingLogitsError(
            f"there is no cache {where} {shown(path)}; it holds the caches {names}",
            hint=f"Name one of them: {shown(held[0].path)}",
        )
    named = path.name.rpartition("2")[2]
    root, target = (path.parent, named) if named in TARGETS else (path, TARGETS[0])
    if (file := file_in_the_way(root)) is not None:
        return MissingLogitsError(f"there is no cache {where} {shown(path)}: {shown(file)} is no folder")
    elsewhere = "" if str(root) == "cache" else f" --cache-root {shlex.quote(shown(root))}"
    return MissingLogitsError(
        f"there is no cache {where} {shown(path)}", hint=f"Make one: kd-cache dump --target {target}{elsewhere}"
    )


Named = Callable[[str], bool]
"""Whether a folder is called as a cache is."""


def no_finished_cache(root: Path, is_named: Named) -> MissingLogitsError:
    """There is none under this root; whether one was begun makes the difference."""
    with store_errors(root, "list"):
        names = sorted(entry.name for entry in os.scandir(root)) if root.is_dir() else []
    begun = [name for name in names if is_named(name) and CacheFolder(root / name).packs_path.is_dir()]
    if begun:
        return MissingLogitsError(
            f"no cache under {shown(root)} is finished; begun: {', '.join(map(shown, begun))}",
            hint="Run the same kd-cache dump again; it continues where it stopped.",
        )
    return no_cache(root, "under")


def find_caches(root: Path, is_named: Named) -> list[CacheFolder]:
    """The caches under a root, by name: its folders that are called as one, or have packs, and hold an index."""
    with store_errors(root, "list"):
        try:
            names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        except FileNotFoundError:
            return []
    folders = [CacheFolder(root / name) for name in names]
    caches = [folder for folder in folders if is_named(folder.path.name) or folder.packs_path.is_dir()]
    return [folder for folder in caches if folder.index_path.is_file()]
