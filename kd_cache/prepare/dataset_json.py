"""``dataset.json`` of prepared rows: guarded before it is written, and never in the place of another one unasked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from kd_cache.dataset.guard import look_through
from kd_cache.dataset.manifest import FRONT_END, LISTS, Manifest, parse_manifest
from kd_cache.dataset.task import Task
from kd_cache.errors import UsageError, shown
from kd_cache.files.atomic import make_directory, open_file, write_atomic
from kd_cache.prepare.rows import Row

NAME = "dataset.json"


def manifest_bytes(rows: Mapping[str, Iterable[Row]], task: Task, front_end: Mapping[str, Any] | None) -> bytes:
    """The dataset JSON of rows by split, one row a line; the same rows give the same bytes."""
    head = "" if front_end is None else f'"{FRONT_END}": {json.dumps(front_end, ensure_ascii=False)},\n'
    lists = [
        f"{json.dumps(name)}: [" + ",".join("\n" + _as_json(row, task, name) for row in rows.get(name, ())) + "]"
        for name in LISTS
    ]
    return ("{" + head + ",\n".join(lists) + "}\n").encode()


def _as_json(row: Row, task: Task, split: str) -> str:
    assert row.device is not None  # noqa: S101 (rows without are left out)
    told = {
        "file": row.file,
        "scene_label": row.scene,
        "city_label": row.city,
        "domain": task.domain_of[row.device],
        "device_id": row.device,
        "split": split,
        "identifier": row.location,
    }
    return json.dumps({name: value for name, value in told.items() if value is not None}, ensure_ascii=False)


def guarded(content: bytes, path: Path, task: Task, *, allow_shared_locations: bool, data_root: Path) -> Manifest:
    """The manifest as every later command will read it. Raises `ManifestError`, and `DataLeakageError` as a dump."""
    scenes, cities = len(task.scenes), len(task.cities)
    samples = parse_manifest(content, shown(path), task=task, num_scenes=scenes, num_cities=cities)
    manifest = Manifest(samples, hashlib.sha256(content).hexdigest(), path, task)
    look = look_through(manifest, allow_shared_locations=allow_shared_locations, data_root=data_root)
    if look.violations:
        raise look.violations[0]
    return manifest


def refuse_other(path: Path, contents: Collection[bytes], *, overwrite: bool) -> None:
    """Raise `UsageError` where something else than one of ``contents`` is at ``path``, and may not be replaced.

    What is no regular file, such as a device, never may.
    """
    try:
        with open_file(path) as file:
            there = file.read(max(map(len, contents)) + 1)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"cannot write {shown(path)}: {error.strerror}") from error
    if there not in contents and not overwrite:
        raise UsageError(
            f"{shown(path)} is there, and is not what would be written",
            hint="Pass --overwrite to replace it, or name another place.",
        )


def write_manifest(path: Path, content: bytes) -> None:
    """Write it, whole or not at all. Raises `StoreError`."""
    make_directory(path.parent)
    write_atomic(path, content)
