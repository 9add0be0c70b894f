"""What a command is: its options, the function that runs, and what that hands back. Plug-ins bring further commands.

A command is a `Command` in a table. `kd-cache --help` and `kd-cache COMMAND --help` read the table alone; the module
that does the work is imported when the command runs, so that it may import what it likes at its top. That function is
called with the values that it names, and gives a `Report`, which the command line shows:

    def count(run: Run, screen: Watcher, cache_root: Path, most: int) -> Report:
        found = sorted(cache_root.glob("A2*"))[:most]
        return Report({"caches": len(found)}, [f"{len(found)} caches"])

``run`` (optional) is everything that was set, and where; ``screen`` (optional) hears of progress. An error is a
`kd_cache.errors.KDCacheError`; its exit code becomes the command's. Nothing else prints, exits or reads ``sys.argv``.

A package brings commands through the entry-point group ``kd_cache.commands``. The entry point is a `Plugin`, in a
module that imports neither torch nor anything else that takes long, since help imports it:

    # pyproject.toml:  [project.entry-points."kd_cache.commands"]
    #                  counting = "my_package.commands:PLUGIN"
    MOST = Option("most", int, "Count no further.", "Cache", 100, low=1)
    COUNT = Command("count", "my_package.counting:count", "Count the caches.", ("cache_root", MOST, *SHOWING),
                    examples=("kd-cache count --most 3",))
    PLUGIN = Plugin((COUNT,))

A name of two words is a command of a group, ``train city``; the plug-in says what the group is (``Group``). Commands of
a group read the settings file's section called like the group, and the one called like themselves, before the rest of
it; `Run.section` reads one of the group's further ``sections``. Where the first word is a command itself, the second
one stands beside it (``student compare`` beside ``student``), and needs no group.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from kd_cache.errors import UsageError, shown
from kd_cache.options import FIRST, OPTIONS, SETTINGS_FILE, Option, resolved

GROUP = "kd_cache.commands"
EXIT_CODES = {
    0: "ok",
    1: "error",
    2: "usage",
    3: "misses",
    4: "corrupt",
    5: "stale",
    6: "data leakage",
    130: "Ctrl-C",
    143: "SIGTERM",
}
Values = TypeVar("Values")


@dataclass(frozen=True)
class Command:
    """A line of a command table. ``target`` is ``module:function``; ``options`` are names of the table, or `Option`s.

    ``first`` are the options that this command's help shows first, before those everybody needs first.
    """

    name: str
    target: str
    help: str
    has: Sequence[str | Option]
    details: str = ""
    examples: Sequence[str] = ()
    first: Sequence[str] = ()
    exit_codes: Collection[int] = (0, 1, 2)
    notes: str = ""
    """What docs/commands.md says beyond all this, in Markdown."""

    @property
    def options(self) -> tuple[Option, ...]:
        return resolved(self.has)

    @property
    def panels(self) -> dict[str, list[Option]]:
        """Its options as help shows them: arguments, at most ten that are needed first, then the others by panel."""
        first = [option for option in self.options if option.name in self.first or option.default is ...]
        first += [option for option in self.options if option.name in FIRST and option not in first]
        found = {
            "Arguments": [option for option in self.options if option.positional],
            "Needed first": [option for option in first if not option.positional][:10],
        }
        taken = [option for options in found.values() for option in options]
        for option in self.options:
            if option not in taken:
                found.setdefault(option.panel, []).append(option)
        return {panel: options for panel, options in found.items() if options}


@dataclass(frozen=True)
class Group:
    """The first word of commands like ``train city``. ``sections`` are further sections of the settings file."""

    name: str
    help: str
    sections: Sequence[str] = ()


@dataclass(frozen=True)
class Plugin:
    """What an entry point of `GROUP` is."""

    commands: Sequence[Command]
    groups: Sequence[Group] = ()


def points(difference: float | None) -> str:
    """A difference of shares in points, for a table: ``+1.2``, ``−0.5``."""
    return "–" if difference is None else f"{100 * difference:+.1f}".replace("-", "−")


@dataclass(frozen=True)
class Table:
    """A title, and cells below their columns; the first column is of names, the others are of figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Failure(str):
    """A line of a report that says why it does not exit with 0. ``--quiet`` prints it, on standard error."""

    __slots__ = ()


@dataclass(frozen=True)
class Report:
    """What a command has to say: ``content`` for a program (``--json``), ``lines`` for a person, and how it exits.

    Lines that say why it does not exit with 0 are `Failure`s.
    """

    content: Any
    lines: Sequence[str | Table] = ()
    exit_code: int = 0


@dataclass(frozen=True)
class Run:
    """Everything that a command was given, by the names of its options, and where each value is from.

    ``sources`` are ``commandline``, ``environment``, ``default_map`` (the settings file) or ``default``.
    """

    command: Command
    values: Mapping[str, Any]
    sources: Mapping[str, str]
    file: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The settings file's texts by section; what stands outside of sections is in ``""``."""
    read: Callable[[str, Any], Any] = lambda _, value: value
    """Turns a text of the file into the value of an option."""

    def given(self, name: str) -> bool:
        """Whether a person set this option: on the command line, in the environment or in the file."""
        return self.sources.get(name, "default") != "default"

    def said(self, name: str) -> bool:
        """Whether it was set for this run, on the command line or in the environment, and not in a file for all."""
        return self.sources.get(name) in ("commandline", "environment")

    def to(self, kind: type[Values]) -> Values:
        """A dataclass of the values that its fields name; what the command has no option for keeps its default."""
        names = [each.name for each in fields(kind) if each.name in self.values]  # type: ignore[arg-type]
        return kind(**{name: self.values[name] for name in names})

    def section(self, name: str, spoken_of: Collection[str] | None = None) -> Run:
        """The same run by another section of the file, for a command that does several things, one after the other.

        Of what the command line and the environment say, only options in ``spoken_of`` count, if it is given: the
        others are about something else then.
        """
        group = self.command.name.rpartition(" ")[0]
        file = {**self.file.get("", {}), **self.file.get(group, {}), **self.file.get(name, {})}
        values, sources = dict(self.values), dict(self.sources)
        for option in self.command.options:
            is_said = self.said(option.name) and (spoken_of is None or option.name in spoken_of)
            if is_said or option.name == "config" or option.default is ...:
                continue
            values[option.name], sources[option.name] = option.default, "default"
            if option.name in file:
                try:
                    values[option.name], sources[option.name] = self.read(option.name, file[option.name]), "default_map"
                except UsageError as error:
                    where = f"{shown(self.values['config'] or SETTINGS_FILE)}: {name}: {option.name}"
                    raise UsageError(f"{where}: {error.message}") from error
        return replace(self, values=values, sources=sources)

    def record(self) -> dict[str, Any]:
        """What is written down with what was made: values, where they are from, and a SHA-256 over the values.

        Raises `UsageError` for a value that is not Unicode (a path whose bytes are not UTF-8): no JSON can keep it.
        """
        kept = sorted(option.name for option in self.command.options if option.kept)
        values = {name: _plain(self.values[name]) for name in kept}
        for name, value in values.items():
            try:
                _canonical(value)
            except UnicodeEncodeError as error:
                raise UsageError(f"{name} is {shown(value)}, which is not UTF-8") from error
        sources = {name: self.sources[name] for name in kept}
        return {"values": values, "sources": sources, "sha256": hashlib.sha256(_canonical(values)).hexdigest()}

    def recall(self, values: Mapping[str, Any], paths: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a cache remembers: as given now, else as saved with it (``paths`` are absolute), else the
        default.
        """
        found = {}
        for name, option in OPTIONS.items():
            if option.recalled and name in self.values:
                saved = paths if option.is_path else values
                found[name] = saved[name] if name in saved and not self.given(name) else self.values[name]
        return found


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value
