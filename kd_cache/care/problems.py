"""What an audit finds: problems, counts by teacher, and the status that the command ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kd_cache.errors import worst_exit_code

MISS, CORRUPT, STALE, LEAK, UNCHECKED = "miss", "corrupt", "stale", "leak", "unchecked"
# What a problem is about; `kd-cache repair` scores rows, features and teachers again and rebuilds the rest from packs.
ROW, TEACHER, PACK, VIEW, INDEX, FEATURE, LABEL = "row", "teacher", "pack", "view", "index", "feature", "label"
ALL_ROWS = "(all rows)"
_SEVERITY = (LEAK, CORRUPT, STALE, MISS, UNCHECKED)
EXIT_CODES = {MISS: 3, CORRUPT: 4, STALE: 5, LEAK: 6, UNCHECKED: 1}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    ``file`` is a manifest path or a path in the cache; ``teacher`` is empty where the whole cache is meant. ``about``
    is ``row``, ``teacher`` (all its rows), ``pack``, ``view``, ``index``, ``feature`` or ``label``.
    """

    kind: str
    teacher: str
    file: str
    reason: str
    about: str


@dataclass
class TeacherResult:
    """Counts over the checked samples of one teacher; ``None`` where a check was not made.

    ``accuracy`` is of all labelled source rows, ``held_out`` of those that did not train it.
    """

    checked: int = 0
    hits: int = 0
    intact: int = 0
    fresh: int | None = 0
    rows: int = 0
    forbidden: int = 0
    view: int | None = None
    fingerprint: str = ""
    recomputed: int | None = None
    bit_exact: int = 0
    deviation: float = 0.0
    accuracy: dict[str, int] | None = None
    held_out: dict[str, int] | None = None


@dataclass
class VerifyReport:
    """Everything that an audit found.

    ``wrong_rows`` are the files by teacher whose stored row is not what it should be, under their own names.
    """

    cache: str
    seed: int
    checked: int = 0
    promised: int = 0
    everything: bool = False
    teachers: dict[str, TeacherResult] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong_rows: dict[str, set[str]] = field(default_factory=dict)

    @property
    def worst_first(self) -> list[Problem]:
        """The problems by severity: leaks, damage, stale rows, misses, what could not be checked."""
        return sorted(self.problems, key=lambda problem: _SEVERITY.index(problem.kind))

    @property
    def exit_code(self) -> int:
        return worst_exit_code(EXIT_CODES[problem.kind] for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        return {
            "cache": self.cache,
            "seed": self.seed,
            "checked": self.checked,
            "promised": self.promised,
            "all": self.everything,
            "exit_code": self.exit_code,
            "teachers": {name: vars(result) for name, result in self.teachers.items()},
            "problems": [vars(problem) for problem in self.worst_first],
            "notes": self.notes,
        }
