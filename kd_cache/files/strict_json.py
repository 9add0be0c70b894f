"""JSON that is read strictly: no key twice, no NaN; and what is in it has the shape that is expected of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from kd_cache.errors import shown

Shape = Any
"""What a value must be. A type; ``None``; a list with the shape of every item; a tuple of alternatives; a callable that
says yes or no; a dict with the shape of each entry that is there, or under ``...`` that of every entry. An ``int`` is a
count: at least 0, and never a truth value."""


class Entries(dict[str, Any]):
    """A JSON object. To ask for an entry that it lacks raises what ``missing`` makes of the name."""

    missing: Callable[[str], Exception]

    def __missing__(self, name: str) -> NoReturn:
        raise self.missing(name)


def strict_json(raw: bytes | str, missing: Callable[[str], Exception] | None = None) -> Any:
    """The value in ``raw``: UTF-8, no key twice in one object, no NaN or Infinity.

    With ``missing`` its objects are `Entries`. Raises ``ValueError`` or ``RecursionError``.
    """
    kind: type[dict[str, Any]] = (
        dict if missing is None else type("Asked", (Entries,), {"missing": staticmethod(missing)})
    )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = kind(pairs)
        if len(made) != len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"key {shown(twice)} occurs twice in one object")
        return made

    text = raw if isinstance(raw, str) else raw.decode("utf-8")
    return json.loads(text, object_pairs_hook=unique, parse_constant=_refuse)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def misfit(value: Any, shape: Shape, name: str = "") -> str | None:
    """The name of the first entry in ``value`` that does not have the expected shape, ``None`` if all do."""
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return name
        every = shape.get(...)
        named = value if every is not None else [key for key in shape if key in value]
        found = (misfit(value[key], shape.get(key, every), f"{name}.{key}".lstrip(".")) for key in named)
        return next((place for place in found if place is not None), None)
    if isinstance(shape, list):
        fits = isinstance(value, list) and all(misfit(item, shape[0], name) is None for item in value)
    elif isinstance(shape, tuple):
        fits = any(misfit(value, each, name) is None for each in shape)
    elif shape is int:
        fits = type(value) is int and value >= 0
    elif shape is None or isinstance(shape, type):
        fits = value is None if shape is None else type(value) is shape
    else:
        fits = shape(value)
    return None if fits else shown(name)
