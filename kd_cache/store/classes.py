"""What teachers call their columns, and whether two of them, or one and the task's labels, mean the same by them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kd_cache.errors import UsageError, shown
from kd_cache.store.origin import Origin

Names = Sequence[str] | None
"""One name per column; ``None`` where a teacher says nothing."""
_SHOWN = 3


def differing_columns(a: str, mine: Names, b: str, theirs: Names) -> str | None:
    """How the classes of ``a`` and ``b`` differ, with the first columns that do; ``None`` where they are the same.

    Case, and whether ``_``, ``-`` or a space stands between words, make no other name. Where one side names none,
    nothing is known to differ.
    """
    if mine is None or theirs is None or _plain(mine) == _plain(theirs):
        return None
    count = max(len(mine), len(theirs))
    columns = [n for n in range(count) if _plain(mine[n : n + 1]) != _plain(theirs[n : n + 1])][:_SHOWN]
    what = "the same classes in another order" if _are_reordered(mine, theirs) else "other classes"
    told = "; ".join(f"column {n} is {_at(mine, n)} of {a}, {_at(theirs, n)} of {b}" for n in columns)
    return f"{a} and {b} have {what}: {told}"


def refuse_other_order(origins: Mapping[str, Origin]) -> None:
    """Raise `UsageError` where two of these teachers name the same classes in another order.

    Teachers with other classes may stand side by side in a cache; they cannot be opened together.
    """
    first: dict[frozenset[str], Origin] = {}
    for name, origin in origins.items():
        if origin.class_names is not None:
            other = first.setdefault(frozenset(_plain(origin.class_names)), origin)
            why = differing_columns(other.teacher, other.class_names, name, origin.class_names)
            if why is not None:
                hint = "Bring the columns of one of them, outputs and names, into the other's order."
                raise UsageError(why, hint=hint)


def repeated(names: Names) -> str | None:
    """Which columns have one name, as `differing_columns` compares them; ``None`` where each has its own."""
    first: dict[str, int] = {}
    for number, name in enumerate(_plain(names or ())):
        if first.setdefault(name, number) != number:
            return f"its columns {first[name]} and {number} are both called {_at(names or (), number)}"
    return None


def misplaced(names: Names, *label_sets: Sequence[str]) -> str | None:
    """What is wrong with the names of columns: one is there twice, or those that are named after all labels of a task
    stand elsewhere than these labels say. ``None`` where nothing is.
    """
    if (why := repeated(names)) is not None:
        return why
    for labels in label_sets:
        if names is not None and set(_plain(labels)) <= set(_plain(names)):
            why = differing_columns("the teacher", names[: len(labels)], "the task", labels)
            if why is not None:
                return why
    return None


def _are_reordered(mine: Sequence[str], theirs: Sequence[str]) -> bool:
    return sorted(_plain(mine)) == sorted(_plain(theirs))


def _plain(names: Sequence[str]) -> list[str]:
    return [re.sub(r"[\s_-]+", "_", name.strip().casefold()) for name in names]


def _at(names: Sequence[str], number: int) -> str:
    return shown(names[number]) if number < len(names) else "nothing"
