"""One teacher's rows out of several caches, as those of one: A's rows are in each of them, a target's in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from kd_cache.errors import MissingLogitsError, StaleError, UsageError, shown
from kd_cache.keys import KeyFinder, sorted_order
from kd_cache.serve.rows import TeacherRows
from kd_cache.store.origin import Origin
from kd_cache.store.shelf import RowNumbers, Shelf


class JoinedRows(TeacherRows):
    """Rows of one teacher in several caches, the permitted ones of each. Of one sample the first cache's counts."""

    def __init__(self, parts: Sequence[TeacherRows]) -> None:
        self._of_caches = parts
        packs = [pack for part in parts for pack in part.packs]
        self._shelf = Shelf(packs)
        self._describe(packs)
        self.signature = "+".join(part.signature for part in parts)
        begins = self._shelf.numbers.bases[list(accumulate([0, *(len(part.packs) for part in parts[:-1])]))]
        keys = np.concatenate([part.keys for part in parts])
        numbers = [begin + part.own(part.numbers.all()) for begin, part in zip(begins, parts, strict=True)]
        order = sorted_order(keys)  # stable: of one key those of the first cache come first
        keys, self._all = keys[order], np.concatenate(numbers)[order]
        self._is_first = np.ones(len(keys), bool)
        self._is_first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        self._kept, self._parts = self._all[self._is_first], [keys[self._is_first]]
        self.numbers, self.finder = RowNumbers([len(self._kept)]), KeyFinder(*self._parts)

    def is_promised(self, key: np.ndarray) -> bool:
        return any(part.is_promised(key) for part in self._of_caches)

    def refuse_disagreement(self, paths: Sequence[Path]) -> None:
        """Raise `StaleError` where caches have other rows for one sample, though the teacher is the same."""
        again = ~self._is_first
        here = self._all[again]
        first = self._all[self._is_first][np.cumsum(self._is_first)[again] - 1]
        other = self._shelf.column("checksums", here) != self._shelf.column("checksums", first)
        if not other.any():
            return
        count = len(np.unique(first[other]))
        here, first = here[other][:1], first[other][:1]
        changed = (self._shelf.column("inputs", here) != self._shelf.column("inputs", first)).any()
        one, another = (self._shelf.take(at) for at in (here, first))
        by = np.inf if self.topk else np.abs(one.astype(np.float64) - another).max()
        why = "its feature changed between their dumps" if changed else f"they differ by up to {by:.2g}"
        raise StaleError(
            f"{self.name}: {count:,} samples have other rows in one of {', '.join(map(shown, paths))} than in another; "
            f"the first is {shown(self._shelf.files(first)[0])}: {why}",
            hint="Score them together: kd-cache dump --target with all of these targets, and --no-skip-existing.",
        )


def teachers_of_all(origins: Sequence[Mapping[str, Origin]], paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """The teachers that all caches hold, in the first one's order, and those that only some hold."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError(f"each cache can be opened once, found {', '.join(map(shown, paths))}")
    held = [name for name in origins[0] if all(name in each for each in origins)]
    if not held:
        raise MissingLogitsError(f"no teacher has rows in all of {', '.join(map(shown, paths))}")
    return held, sorted({name for each in origins for name in each} - set(held))


def joined(
    parts: Sequence[Sequence[TeacherRows]], origins: Sequence[Mapping[str, Origin]], paths: Sequence[Path]
) -> tuple[list[TeacherRows], list[str]]:
    """The rows of each teacher in all caches together, and of teachers that are not the same in all what differs.

    Raises `StaleError` as `JoinedRows.refuse_disagreement`.
    """
    found: list[TeacherRows] = []
    differing = []
    for mine in zip(*parts, strict=True):
        rows = JoinedRows(mine)
        made = [each[rows.name].fingerprint for each in origins]
        other = next((number for number, each in enumerate(made) if each.digest != made[0].digest), None)
        if other is None:
            rows.refuse_disagreement(paths)
        else:
            differing.append(
                f"{rows.name} is not the same teacher in {shown(paths[other])} as in {shown(paths[0])} "
                f"({', '.join(made[0].differing_parts(made[other]))}): each target has the rows of its own, what is in "
                f"both has those of {shown(paths[0])}"
            )
        found.append(rows)
    return found, differing
