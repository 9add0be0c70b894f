"""JSON that is read strictly: no key twice, no NaN; and what is in it has the shape that is expected of it."""

from __future__ import annotations

import json
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


def strict_json(raw: bytes, missing: Callable[[str], Exception]) -> Any:
    """The value in ``raw``, its objects as `Entries`. Raises ``ValueError`` or ``RecursionError``."""

    class Asked(Entries):
        pass

    Asked.missing = staticmethod(missing)

    def entries(pairs: list[tuple[str, Any]]) -> Entries:
        made = Asked(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key occurs twice in one object")
        return made

    return json.loads(raw.decode("utf-8"), object_pairs_hook=entries, parse_constant=_refuse)


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
