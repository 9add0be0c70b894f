"""The end of a dump, a seal, a repair: describe the cache, publish its rows, and forget what that overtook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kd_cache.accuracy import labels_of
from kd_cache.errors import CorruptError, FeatureError, StaleError, StoreError, shown
from kd_cache.manifest import SOURCE, Manifest
from kd_cache.pending import begun, begun_with, forget, read_pending
from kd_cache.plan import load_plan, plan_of
from kd_cache.publish import Promise, Published, drop_forbidden, publish
from kd_cache.splits import Selection
from kd_cache.store.atomic import make_directory, store_errors
from kd_cache.store.folder import CacheFolder, PackSet, teacher_in_name
from kd_cache.store.index import Index, IndexChangedError, State
from kd_cache.store.pack import Origin
from kd_cache.store.permitted import Permitted
from kd_cache.watch import Watcher

_KEPT = ("source", "storage_cost", "precision_cost", "compiled", "batches_halved_to", "adopted")


@dataclass(frozen=True)
class Ending:
    """What is to become current.

    Attributes:
        shown_path: the cache's path as the user wrote it; the index's paths start with it.
        inputs, known: by sample of the selection: ``[N, 16]`` digests of the features, and whether it could be read.
        origins: the teachers whose every row must be there, but for the ``missing`` files.
        others: further teachers that the cache held so far.
        entries: further content of the teachers' entries; ``begun`` where the record's is not a teacher's own.
        record: what the index keeps of the run.
        packs: what the run found; damaged ones among them go when the index stands.
        replaced: packs whose rows must not be used although they look fresh.
        hint: what to do where rows are missing.
    """

    folder: CacheFolder
    shown_path: str
    manifest: Manifest
    selection: Selection
    inputs: np.ndarray
    known: np.ndarray
    origins: Mapping[str, Origin]
    record: Mapping[str, Any]
    files: bool
    packs: PackSet
    others: Mapping[str, Origin] = field(default_factory=dict)
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    earlier: Index | None = None
    replaced: Sequence[Path] = ()
    hint: str = "Did another dump run here with another manifest? Run the same command again."


def finish(end: Ending, watcher: Watcher) -> Published:
    """Publish, again where another process wrote the index meanwhile: its teachers stay in it.

    Raises:
        MissingLogitsError, StoreError: as `publish`.
    """
    make_directory(end.folder.path)
    for _ in range(100):
        state = end.folder.index_state()
        earlier = _index_now(end)
        found = {} if earlier is None else earlier.origins
        others = {name: origin for name, origin in {**end.others, **found}.items() if name not in end.origins}
        pending = read_pending(end.folder, watcher)
        _keep_plan(end.folder, earlier)
        try:
            published = _publish(end, earlier, others, state, watcher)
        except IndexChangedError:
            continue
        if not _stands(end):
            continue
        forget(end.folder, pending, {name: _begun(end, name, earlier) for name in {**end.origins, **others}})
        _clean_up(end, others, published, watcher)
        return published
    raise StoreError(
        f"the index {shown(end.folder.index_path)} keeps changing; try again when the other dumps are done"
    )


def _keep_plan(folder: CacheFolder, earlier: Index | None) -> None:
    """Restore a lost or damaged batch plan from the index's copy: another one would make other last bits."""
    if earlier is not None and load_plan(folder.plan_path) is None:
        plan = plan_of(folder.plan_path, earlier.record)
        if plan is not None:
            plan.save(folder.plan_path)


def nothing_readable(count: int) -> FeatureError:
    """Every feature bad at once: they are somewhere else, and the rows that the cache holds must not go for that."""
    return FeatureError(
        f"none of the {count} features can be read; the cache stays as it is", hint="Check --data-root."
    )


def _stands(end: Ending) -> bool:
    """Whether the index tells of our teachers: another process's, put in place a moment after ours, may not."""
    now = _index_now(end)
    return now is not None and end.origins.keys() <= now.record["teachers"].keys()


def _index_now(end: Ending) -> Index | None:
    with suppress(CorruptError, StaleError):
        return end.folder.index(maps=False) or end.earlier
    return end.earlier


def _begun(end: Ending, name: str, earlier: Index | None) -> int:
    """When what the index is to say of a teacher was begun: by this run, or, for a seal, by the dump that it goes by.

    What is said of a teacher that is carried over is as old as it was.
    """
    if name in end.origins:
        return int(end.entries.get(name, {}).get("begun", begun(end.record)))
    return 0 if earlier is None or name not in earlier.record["teachers"] else begun_with(earlier, name)


def _publish(
    end: Ending, earlier: Index | None, others: Mapping[str, Origin], state: State, watcher: Watcher
) -> Published:
    origins = _ordered(end.origins, others, earlier)
    published = publish(
        end.folder,
        end.shown_path,
        origins,
        Promise(end.selection.files, end.inputs, end.known, Permitted.of(*labels_of(end.selection))),
        describe(end.folder, end.manifest, end.selection, end.record) | {"missing": dict(end.missing)},
        {name: _entry(end, origin, earlier) for name, origin in origins.items()},
        earlier=earlier,
        files=end.files,
        asked=end.origins,
        missing=end.missing,
        replaced=end.replaced,
        state=state,
        hint=end.hint,
        watcher=watcher,
    )
    for name in others:
        if left_out := published.left_out[name]:
            watcher.note(f"{name}: {left_out} rows went, no longer permitted or no longer fresh; it was not asked")
    return published


def describe(
    folder: CacheFolder, manifest: Manifest, selection: Selection, record: Mapping[str, Any]
) -> dict[str, Any]:
    """``record`` with what the index says of the data: adaptation, manifest, split policy, batch plan."""
    plan = load_plan(folder.plan_path)
    return {
        **record,
        "adaptation": folder.path.name,
        "num_permitted": len(selection.samples),
        "per_device": selection.per_device,
        "manifest": {"path": str(manifest.path), "sha256": manifest.digest},
        "split_policy": {
            "selected": [SOURCE, selection.target],
            "split": "train",
            "locations_known": [selection.located, selection.locatable],
            "shared_locations": len(selection.shared_locations),
        },
        "plan": None if plan is None else plan.as_json(),
    }


def _ordered(asked: Mapping[str, Origin], others: Mapping[str, Origin], earlier: Index | None) -> dict[str, Origin]:
    """All teachers in the order asked for where that names all, else in the order readers are used to."""
    merged = {**asked, **others}
    before = list(earlier.origins) if earlier and others else []
    return {name: merged[name] for name in dict.fromkeys([*before, *merged]) if name in merged}


def _entry(end: Ending, origin: Origin, earlier: Index | None) -> dict[str, Any]:
    """What the index says of a teacher besides its origin; from the earlier index where this run adds nothing."""
    name = origin.teacher
    before = earlier.record["teachers"].get(name, {}) if earlier else {}
    same = before.get("fingerprint") == origin.fingerprint.digest
    kept = {key: before[key] for key in _KEPT if same and key in before}
    when = _begun(end, name, earlier)
    own = {} if when == begun(end.record) else {"begun": when}
    return kept | (dict(end.entries.get(name, {})) if name in end.origins else {}) | own


def _clean_up(end: Ending, others: Mapping[str, Origin], published: Published, watcher: Watcher) -> None:
    """Remove what became useless: damaged packs (but those of teachers not asked), forbidden old rows."""
    current = published.packs.values()
    for path in end.packs.damaged:
        # Scoring the same rows again gives the same name: then the damaged file has been replaced already.
        if teacher_in_name(path) not in others and path.name not in current and not path.is_dir():
            with store_errors(path, "remove"):
                path.unlink(missing_ok=True)
    gone = drop_forbidden(end.folder, end.packs, {**end.origins, **others}, end.selection.files)
    if gone:
        watcher.note(f"{gone} superseded rows went, because their pack held samples no longer permitted")
