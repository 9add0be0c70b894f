"""One teacher's rows out of several caches, as those of one: A's rows are in each of them, a target's in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kd_cache.errors import MissingLogitsError, StaleError, UsageError, shown
from kd_cache.keys import KeyFinder
from kd_cache.serve.rows import TeacherRows
from kd_cache.store.origin import Origin
from kd_cache.store.union import Union


class JoinedRows(TeacherRows):
    """Rows of one teacher in several caches, the permitted ones of each. Of one sample the first cache's counts."""

    def __init__(self, parts: Sequence[TeacherRows]) -> None:
        packs = [part._union.packs[0] for part in parts]
        super().__init__(packs[0])
        self._parts = parts
        self._union = Union(packs, packs[0].path.name)
        of_pack = {id(pack): part for pack, part in zip(packs, parts, strict=True)}
        served = np.zeros(len(self._union), bool)
        for number, pack in enumerate(self._union.packs):
            mine = np.flatnonzero(self._union.pack_no == number)
            served[mine] = of_pack[id(pack)].finder.find(self._union.keys[mine]) >= 0
        self._served = np.flatnonzero(served)
        _, first = np.unique(np.cumsum(~self._union.repeats)[self._served], return_index=True)
        self._kept = self._first = self._served[first]
        self.keys = self._union.keys[self._first]
        self.finder = KeyFinder(self.keys)
        self.signature = "+".join(part.signature for part in parts)
        self.is_lazy = any(part.is_lazy for part in parts)
        self._pack = None

    def expect_random(self) -> None:
        for part in self._parts:
            part.expect_random()

    def is_promised(self, key: np.ndarray) -> bool:
        return any(part.is_promised(key) for part in self._parts)

    def refuse_disagreement(self, paths: Sequence[Path]) -> None:
        """Raise `StaleError` where caches have other rows for one sample, though the teacher is the same."""
        at = self.finder.find(self._union.keys[self._served])
        other = self._union.checksums[self._served] != self._union.checksums[self._first[at]]
        if not other.any():
            return
        here, first = self._served[other][:1], self._first[at[other]][:1]
        changed = (self._union.inputs[here] != self._union.inputs[first]).any()
        one, other_row = (self._union.take(at) for at in (here, first))
        by = np.inf if self.topk else np.abs(one.astype(np.float64) - other_row).max()
        why = "its feature changed between their dumps" if changed else f"they differ by up to {by:.2g}"
        raise StaleError(
            f"{self.name}: {len(np.unique(at[other])):,} samples have other rows in one of "
            f"{', '.join(map(shown, paths))} than in another; the first is {shown(self._union.files(first)[0])}: {why}",
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
