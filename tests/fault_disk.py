"""What a command did to a folder, call by call, and what a power cut could have left of it.

A file system owes nobody anything that was not fsynced: not the bytes of a file, and not its name (that is the folder's
content, and needs an fsync of its own). `Disk` follows the recorded calls and keeps, beside what is visible, what is
owed; `Disk.after_a_cut` gives the worst states that are still legal.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_cache.files.atomic import TEMPORARY

Tree = dict[str, bytes | None]
"""A folder: paths relative to it, folders as ``None``."""

CUTS = ("nothing unsynced", "names without bytes", "names with zeros", "names with half", "removals only")
UNNAMED = "/.tmp-(unnamed)"
"""How the shim calls a file that never gets a name (``O_TMPFILE``)."""
ROW_FILE = re.compile(r".*/[0-9a-f]{32}\.npy\Z")
"""Files of a view. They need not be durable when they are visible, as all others must: a view can be rebuilt."""


@dataclass(frozen=True)
class Call:
    """One recorded call. ``extra`` is an offset (write), a size (truncate) or flags (open)."""

    number: int
    what: str
    file: int
    result: int
    code: int
    extra: int
    path: str
    second: str
    content: bytes

    def __str__(self) -> str:
        failed = f" = {errno.errorcode[self.code]}" if self.code else ""
        return f"{self.number} {self.what} {self.path} {self.second}".rstrip() + failed


def calls(record: Path) -> list[Call]:
    """The calls in a record, in their order."""
    raw, found, start = record.read_bytes(), [], 0
    while start < len(raw):
        end = raw.index(b"\n", start)
        number, what, file, result, code, extra, size, path, second = raw[start:end].decode().split("\t")
        content = raw[end + 1 : end + 1 + int(size)]
        found.append(Call(int(number), what, int(file), int(result), int(code), int(extra), path, second, content))
        start = end + 1 + int(size) + 1
    return found


# -- folders as they are ----------------------------------------------------------------------------------------------


def is_temporary(path: str) -> bool:
    """Whether a path, in a cache or not, is of a temporary file, or in a temporary folder."""
    return any(part.startswith(TEMPORARY) for part in Path(path).parts)


def tree(folder: Path) -> Tree:
    """Everything in a folder."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = None if path.is_dir() else path.read_bytes()
    return found


def put_tree(folder: Path, content: Mapping[str, bytes | None]) -> None:
    """Make a folder hold exactly this. The folder itself stays: it may be where a disk is mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for name, data in content.items():
        path = folder / name
        if data is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


# -- a folder as a file system may keep it ----------------------------------------------------------------------------


@dataclass(eq=False)
class _File:
    content: bytearray = field(default_factory=bytearray)
    owed: bytes = b""


@dataclass(eq=False)
class _Folder:
    entries: dict[str, _File | _Folder] = field(default_factory=dict)
    owed: dict[str, _File | _Folder] = field(default_factory=dict)


class Disk:
    """A folder under recorded calls."""

    def __init__(self, root: Path, content: Tree | None = None) -> None:
        self._root_path = str(root)
        self._root = _Folder()
        self._open: dict[int, _File | _Folder] = {}
        for name, data in (content or {}).items():
            folder, last = self._parent(f"{root}/{name}")
            folder.entries[last] = _Folder() if data is None else _File(bytearray(data), data)
            folder.owed = dict(folder.entries)

    def _find(self, path: str) -> _File | _Folder | None:
        if path == self._root_path:
            return self._root
        if not path.startswith(self._root_path + "/"):
            return None
        folder, name = self._parent(path)
        return folder.entries.get(name)

    def _parent(self, path: str) -> tuple[_Folder, str]:
        *folders, name = path.removeprefix(self._root_path + "/").split("/")
        found = self._root
        for part in folders:
            inner = found.entries[part]
            assert isinstance(inner, _Folder)
            found = inner
        return found, name

    def apply(self, call: Call) -> bool:
        """Do what the call did; whether anything changed, visibly or not."""
        if call.result < 0 or call.what in ("say", "read", "list"):
            return False
        if call.what in ("open", "create"):
            return self._opened(call)
        if call.what == "close":
            self._open.pop(call.file, None)
            return False
        if call.what in ("write", "truncate", "fsync"):
            return self._on_file(call, self._open[call.file])
        return self._on_name(call)

    def _opened(self, call: Call) -> bool:
        if call.path.endswith(UNNAMED):
            self._open[call.file] = _File()
            return False
        before = found = self._find(call.path)
        if found is None:
            found = _File()
            folder, name = self._parent(call.path)
            folder.entries[name] = found
        if call.extra & os.O_TRUNC and isinstance(found, _File):
            found.content.clear()
        self._open[call.file] = found
        return before is None or bool(call.extra & os.O_TRUNC)

    def _on_file(self, call: Call, file: _File | _Folder) -> bool:
        if isinstance(file, _Folder):
            assert call.what == "fsync"
            file.owed = dict(file.entries)
        elif call.what == "fsync":
            file.owed = bytes(file.content)
        elif call.what == "truncate":
            del file.content[call.extra :]
            file.content.extend(bytes(call.extra - len(file.content)))
        else:
            file.content.extend(bytes(max(0, call.extra - len(file.content))))
            file.content[call.extra : call.extra + len(call.content)] = call.content
        return True

    def _on_name(self, call: Call) -> bool:
        folder, name = self._parent(call.path)
        if call.what == "mkdir":
            folder.entries[name] = _Folder()
        elif call.what == "unlink":
            del folder.entries[name]
        else:
            assert call.what == "rename"
            target, new = self._parent(call.second)
            target.entries[new] = folder.entries.pop(name)
        return True

    def visible(self) -> Tree:
        """What readers see while the power is on."""
        return dict(_listing(self._root, lambda f: f.entries, lambda f: bytes(f.content)))

    def after_a_cut(self, cut: str) -> Tree:
        """What may be left, by one of `CUTS`."""
        kept = {
            "nothing unsynced": lambda folder: folder.owed,
            "removals only": lambda folder: {n: e for n, e in folder.owed.items() if n in folder.entries},
        }.get(cut, lambda folder: folder.entries)
        left = {
            "names with zeros": lambda file: file.owed.ljust(len(file.content), b"\0"),
            "names with half": lambda file: bytes(file.content[: max(len(file.owed), len(file.content) // 2)]),
        }.get(cut, lambda file: file.owed)
        return dict(_listing(self._root, kept, left))


def _listing(folder: _Folder, kept: Any, left: Any, prefix: str = "") -> Iterator[tuple[str, bytes | None]]:
    for name, entry in kept(folder).items():
        if isinstance(entry, _Folder):
            yield prefix + name, None
            yield from _listing(entry, kept, left, f"{prefix}{name}/")
        else:
            yield prefix + name, left(entry)
