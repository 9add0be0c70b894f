"""What dumps acknowledged that have not finished, of features elsewhere: whoever publishes here does not take it.

Of the same weights, and of features that lie here, rows that do not fit the features as they are now are stale, and no
dump can go on from them. One with another data root can.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.files.atomic import store_errors
from kd_cache.keys import KeyFinder
from kd_cache.store.change import Change, Wanted
from kd_cache.store.index import Index
from kd_cache.store.origin import Origin
from kd_cache.store.pack import Pack, write_part
from kd_cache.store.pending import protected
from kd_cache.store.union import Union


class Unfinished:
    """As one publication finds it.

    Args:
        pending: the pending records; those that do not say where their features are count as of here.
        change: what is published.
        index: the index until now.
    """

    def __init__(self, pending: Sequence[Index], change: Change, index: Index | None) -> None:
        here = change.record.get("features_at")
        self.records = [record for record in pending if record.record.get("features_at", here) != here]
        self._wanted: Wanted = change.wanted
        self._superseded = {} if index is None else index.record.get("superseded", {})
        self._made = protected(self.records)
        self._kept: set[tuple[str, str]] = set()

    def makes(self, origin: Origin) -> bool:
        """Whether one of them makes rows of this origin."""
        return (origin.teacher, origin.fingerprint.digest) in self._made

    def inputs(self, union: Union | None) -> tuple[np.ndarray, np.ndarray]:
        """The inputs ``[N, 16]`` of the wanted rows, and ``[N]`` of which the first row of their key is to be kept.

        Where that may be one of other features, elsewhere, it is the one that stood, whatever its input.
        """
        inputs, unread = self._wanted.inputs, ~self._wanted.known
        if union is None or _made(union) not in self._made:
            return inputs, unread
        for stood in union.stood:
            at = KeyFinder(stood.keys).find(self._wanted.keys)
            inputs = np.where((unread & (at >= 0))[:, None], stood.inputs[at], inputs)
        return inputs, np.zeros_like(unread)

    def packs(self, union: Union | None, merged: Union | None, directory: Path) -> list[Path]:
        """Those of a union's packs that stay beside what was ``merged``: it lacks rows of theirs.

        Not the packs that stood, nor what the index names as superseded: these were finished. Of one with samples that
        are not permitted the others are written anew.
        """
        if union is None or _made(union) not in self._made:
            return []
        permitted, found = KeyFinder(self._wanted.keys), list[Path]()
        stood = {pack.path for pack in union.stood}
        for pack in union.packs:
            kept = permitted.find(pack.keys) >= 0
            lacking = kept if merged is None else kept & (merged.match(pack.keys, pack.inputs) < 0)
            if lacking.any() and pack.path not in stood and not self._is_superseded(pack):
                whole = bool(kept.all())
                found.append(pack.path if whole else write_part(directory, pack, np.flatnonzero(kept)))
                self._kept.add(_made(union))
        return found

    def _is_superseded(self, pack: Pack) -> bool:
        changed = self._superseded.get(pack.path.name)
        return changed is not None and changed == _changed(pack.path)

    def overtaken(self, pending: Sequence[Index]) -> list[Index]:
        """Without the records of whom packs stayed."""
        return [record for record in pending if record not in self.records or not protected([record]) & self._kept]

    def described(self, superfluous: Collection[Path]) -> dict[str, Any]:
        """What the index is to say: killed before they are gone, these must not pass for a dump's that can go on."""
        if not self.records:
            return {}
        return {"superseded": {path.name: at for path in sorted(superfluous) if (at := _changed(path)) is not None}}


def _made(union: Union) -> tuple[str, str]:
    return union.origin.teacher, union.origin.fingerprint.digest


def _changed(path: Path) -> int | None:
    """A file's mtime in nanoseconds, which tells a pack from one of equal rows that came later; ``None`` if gone."""
    with store_errors(path, "look at"):
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:
            return None
