"""Rows with views: a commit holds one view of its samples; sealed, a row holds all of them, one after the other.

Readers gather one view of each sample at a time: from ten packs that was measured to take 17 times as long.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.keys import KeyFinder
from kd_cache.store.change import Wanted
from kd_cache.store.origin import Origin
from kd_cache.store.pack import write_pack, write_part
from kd_cache.store.snapshot import Snapshot
from kd_cache.store.unfinished import Unfinished
from kd_cache.store.union import Union, carried_over


class Views:
    """The views of one teacher's wanted rows, wherever they are: in commits of one view, or in rows of several.

    Of an origin without views there is nothing to do.
    """

    def __init__(
        self, snapshot: Snapshot, origin: Origin, wanted: Wanted, unfinished: Unfinished, replaced: Collection[Path]
    ) -> None:
        self._snapshot, self._origin, self._wanted, self._unfinished = snapshot, origin, wanted, unfinished
        self._held = snapshot.union(origin, replaced)
        found = [snapshot.union(origin.of_views((view,)), replaced) for view in origin.views]
        self._unions = [union for union in found if union is not None]
        self._at = np.full((len(found), len(wanted.keys)), -1)
        if not self._unions:
            return
        self._inputs, unread = unfinished.inputs(self._unions[0])
        if unread.any():  # nobody knows these now: they stay what they were when they were scored
            first = self._unions[0].find(wanted.keys)
            self._inputs = np.where((unread & (first >= 0))[:, None], self._unions[0].inputs[first], self._inputs)
        for number, union in enumerate(found):
            if union is not None:
                self._at[number] = union.match(wanted.keys, self._inputs)

    def interleave(self) -> Snapshot:
        """Write samples that have every view, and are in no pack so, as rows of all of them; gives the cache then."""
        chosen = (self._at >= 0).all(axis=0)
        if len(self._unions) < len(self._at) or not len(self._at):
            return self._snapshot
        if self._held is not None:
            chosen &= self._held.match(self._wanted.keys, self._inputs) < 0
        numbers = np.flatnonzero(chosen)
        if not len(numbers):
            return self._snapshot
        at, first = self._at[:, numbers], self._unions[0]
        write_pack(
            self._snapshot.folder.packs_path,
            self._origin,
            self._wanted.keys[numbers],
            self._inputs[numbers],
            first.names(at[0]),
            lambda part: self._side_by_side(carried_over, at[:, part]),
            block=max(1, 65_536 // len(at)),
            draws=lambda part: self._side_by_side(Union.take_draws, at[:, part]),
        )
        return self._snapshot.again()

    def _side_by_side(self, take: Any, at: np.ndarray) -> np.ndarray:
        """``[n, V · …]``: what each view's union gives of these positions ``[V, n]``."""
        return np.concatenate([take(union, mine) for union, mine in zip(self._unions, at, strict=True)], axis=1)

    def lacking(self, number: int) -> str:
        """Which views a wanted sample lacks, in words; nothing where it lacks all, or there are none."""
        lacking = [str(view) for view, at in zip(self._origin.views, self._at[:, number], strict=True) if at < 0]
        return f" (view {', '.join(lacking)})" if 0 < len(lacking) < len(self._at) else ""

    def superfluous(self, merged: Union | None) -> list[Path]:
        """Packs of other views than a row is to have that ``merged`` stands for.

        Those of further views stay, of features elsewhere too, and those with a wanted row that is not merged; of one
        with samples that are not permitted the others are written anew.
        """
        gone, packs = [], self._snapshot.packs.of(self._origin)
        for pack in (pack for pack in packs if pack.origin.views != self._origin.views):
            at = KeyFinder(self._wanted.keys).find(pack.keys)
            fresh = (at >= 0) & ((self._wanted.inputs[at] == pack.inputs).all(axis=1) | ~self._wanted.known[at])
            if merged is not None:
                fresh &= merged.match(pack.keys, pack.inputs) < 0
            further = not set(pack.origin.views) <= set(self._origin.views)
            if further or fresh.any() or self._unfinished.makes(self._origin):
                if (at >= 0).all():
                    continue
                if (at >= 0).any():
                    write_part(self._snapshot.folder.packs_path, pack, np.flatnonzero(at >= 0))
            gone.append(pack.path)
        return gone
