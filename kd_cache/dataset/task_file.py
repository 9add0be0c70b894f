"""Tasks as YAML files say them, and as an index keeps them.

name: speech digits
classes: [zero, one, two]     # or how many: 3
domains: [close, far, phone]  # a position is the manifest's ``domain``; none where a task has none
source: close                 # whose labels may be used
targets: [far]
unseen: [phone]               # never scored, nor trained on
group: speaker                # the manifest's field of what must not be in train and test both
group_in_name: "^([a-z]+)_"   # finds it in a file's name, where there is no field
inputs: features              # floats [T, F] of one F; by default tensors of any shape and dtype
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kd_cache.dataset.task import DCASE, MOST_CLASSES, Task
from kd_cache.errors import CorruptError, UsageError, listed, shown
from kd_cache.files.atomic import open_file

DEFAULT = DCASE
"""The task where nobody names one."""
ENTRIES = ("name", "classes", "domains", "source", "targets", "unseen", "group", "group_in_name", "inputs")
_MOST = 1 << 25
_FEATURES, _ANYTHING = "features", "any"
_FIELDS = {"file", "label", "scene_label", "city_label", "domain", "device_id", "split"}


def load_task(path: Path) -> Task:
    """The task in a YAML file. Raises `UsageError` for a file that says none."""
    try:
        with open_file(path) as file:
            text = file.read(_MOST).decode("utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(
            f"cannot read the task {shown(path)}: {error.strerror or error}", hint="Check --task."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"the task {shown(path)} is not YAML: {shown(error)}") from error
    try:
        return task_from(content)
    except ValueError as error:
        raise UsageError(f"the task {shown(path)}: {error}", hint=f"A task says {', '.join(ENTRIES)}.") from None


def as_record(task: Task) -> dict[str, Any]:
    """What `task_from` makes it of again. Of a task that is built in there is nothing to say."""
    if task == DEFAULT:
        return {}
    domains = {"domains": [*task.devices], "source": task.source, "targets": [*task.targets], "unseen": [*task.unseen]}
    in_name = None if task.place_in_name is None else task.place_in_name.pattern
    said = {
        "name": task.name,
        "classes": [*task.scenes] or task.count or None,
        **(domains if task.has_domains else {}),
        "group": task.group,
        "group_in_name": in_name,
        "inputs": _ANYTHING if task.anything else _FEATURES,
    }
    return {"task": {name: value for name, value in said.items() if value is not None}}


def recorded_task(record: Mapping[str, Any]) -> Task:
    """The task of a cache, by what its index says. Raises `CorruptError`."""
    try:
        return task_from(record["task"]) if "task" in record else DEFAULT
    except ValueError as error:
        raise CorruptError(f"the index names a task that is none: {error}") from None


def task_from(content: object) -> Task:
    """Raises ``ValueError`` for what says no task."""
    if not isinstance(content, Mapping):
        raise ValueError("expected entries such as 'name: cifar'")
    if unknown := [name for name in content if name not in ENTRIES]:
        raise ValueError(f"it says what no task has\n{listed(map(str, unknown))}")
    name = content.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError("name must be a text")
    classes, group, inputs = content.get("classes"), content.get("group"), content.get("inputs", _ANYTHING)
    if type(classes) is int and not 1 <= classes <= MOST_CLASSES:
        raise ValueError(f"classes is {classes}, expected names, or a number from 1 to {MOST_CLASSES:,}")
    if group is not None and (not isinstance(group, str) or not group or group in _FIELDS):
        raise ValueError("group must be a field of the manifest, such as speaker")
    if inputs not in (_FEATURES, _ANYTHING):
        raise ValueError(f"inputs is {shown(inputs)}, expected {_FEATURES} or {_ANYTHING}")
    return Task(
        name,
        scenes=() if type(classes) is int or classes is None else _names("classes", classes, MOST_CLASSES),
        count=classes if type(classes) is int else 0,
        group=group,
        place_in_name=_pattern(content.get("group_in_name"), group),
        anything=inputs == _ANYTHING,
        **_domains(content),
    )


def _domains(content: Mapping[str, Any]) -> dict[str, Any]:
    if "domains" not in content:
        if said := [name for name in ("source", "targets", "unseen") if name in content]:
            raise ValueError(f"{said[0]} is said, and no domains")
        return {}
    domains = _names("domains", content["domains"], 1000)
    targets, unseen = (_names(each, content.get(each, []), 1000) for each in ("targets", "unseen"))
    source = content.get("source")
    used = [source, *targets, *unseen]
    if not targets or set(used) != set(domains) or len(used) != len(domains):
        raise ValueError("each of the domains must be the source, one of the targets, or unseen; one target at least")
    return {"devices": domains, "source": source, "targets": targets, "unseen": unseen}


def _names(entry: str, value: object, most: int) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise ValueError(f"{entry} must be a list of names")
    if len(set(value)) != len(value) or len(value) > most:
        raise ValueError(f"{entry} must be at most {most:,} names, each once")
    return tuple(value)


def _pattern(text: object, group: str | None) -> re.Pattern[str] | None:
    if text is None:
        return None
    try:
        found = re.compile(text) if isinstance(text, str) else None
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"group_in_name is no regular expression: {shown(error)}") from None
    if group is None or found is None or found.groups != 1:
        raise ValueError("group_in_name must be a regular expression with one (…), of a task that has a group")
    return found
