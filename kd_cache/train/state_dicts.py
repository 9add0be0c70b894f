"""Which tensors of a checkpoint are a net's, and what they are called in it.

A checkpoint is one table of dotted names, whatever was nested in what: ``{"state_dict": {"model.fc.bias": …}}`` has
``state_dict.model.fc.bias``. Words that wrappers put into names are left out. Where the rest ends in a name of the net,
a net may begin: at ``state_dict.model.`` here. Whole nets go before parts of one, averaged weights before others, then
the entries in the order of `ENTRIES`. Two different nets that are equally good are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor

from kd_cache.errors import CheckpointError, shown
from kd_cache.train.architectures import is_counter, is_whole, known_names

CITY_ENTRY: Final = "city_model_state_dict"
HEAD_ENTRY: Final = "scene_head_state_dict"
CITY_PREFIX: Final = "city_model."
HEAD_PREFIX: Final = "scene_head."
ENTRIES: Final = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
"""Where the weights of a plain model are, in order of preference (as in timm)."""
WRAPPERS: Final = frozenset(
    {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
"""DistributedDataParallel and averaged models; torch.compile; Fabric; sharding; activation checkpoints."""
AVERAGED: Final = frozenset({"ema", "swa", "average", "averaged", "averaging", "avg", "polyak", "shadow"})
"""Words by which the name of an entry or attribute says that its weights are averages."""
BESIDE: Final = re.compile(r"(.*_)?(loss|losses|criterion|metrics?|n_averaged|adapt_layer)(_.*)?")
"""What gives no logits, even where it lies among the net's own parts."""

_PART: Final = re.compile(r"(?:city_model\.)?(?:backbones\.[0-9]+\.)?")
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_MOST_LEVELS, _MOST_KEY, _MOST_PLACES = 6, 100, 32
"""How deep dicts in dicts are followed, the longest key of one (in characters), and how many places are looked at."""


def choose(
    content: Mapping[Any, Any], size: int, nets: Sequence[Collection[str]] = ()
) -> tuple[dict[str, Any], str, list[str]]:
    """The net in a checkpoint of ``size`` bytes: one of ``nets`` (each the names of one), or of a known architecture.

    Gives its values by name, the entry that they are from, and what was done to get them, in words. The names of a
    City2Scene net start with ``city_model.`` and ``scene_head.``. Where there is no whole net it is what has most of
    its names, and where nothing has one, everything.

    Raises:
        CheckpointError: nothing says which of two nets is meant; half of a City2Scene net; tensors that are larger
            than the file.
    """
    own = frozenset(name for net in nets for name in net)
    names = own or frozenset().union(*known_names().values())
    table = _Table(content, WRAPPERS - {word for name in own for word in name.split(".")})
    _check_size(table.values.values(), size)
    places = sorted(_places(table, nets, names), key=lambda place: (place.rank, place.start.count(".")))
    entry = next((f"{entry}." for entry in ENTRIES if f"{entry}." in table.nested), "")
    best = places[0] if places else _Place(entry, table.under(entry), False, 0, len(ENTRIES))
    others = [place for place in places[1:] if place.whole == best.whole and not place.is_within(best, size)]
    if others and others[0].rank == best.rank:
        raise CheckpointError(
            f"two networks, under {best} and under {others[0]}, and nothing says which is the teacher",
            hint="Save the teacher's own state_dict() with teachers.save_checkpoint.",
        )
    kept = _kept(table, best, own, names)
    return kept, *_described(table, best, kept, [place for place in others if place.whole])


class _Table:
    """All values of a checkpoint but an optimiser's, by their dotted names without wrappers' words.

    ``original`` has the keys as they are, ``entry`` the name of the dict that each is in (a full stop behind),
    ``nested`` all of those, ``two_parts`` where City2Scene nets begin.
    """

    def __init__(self, content: Mapping[Any, Any], wrappers: Collection[str]) -> None:
        self.wrappers = wrappers
        self.values: dict[str, Any] = {}
        self.original: dict[str, str] = {}
        self.entry: dict[str, str] = {}
        self.nested, self.two_parts, seen = set[str](), dict[str, int](), set[int]()
        waiting: list[tuple[str, int, Mapping[Any, Any]]] = [("", 0, content)]
        for path, level, entries in waiting:
            if id(entries) in seen or level > _MOST_LEVELS:
                continue
            seen.add(id(entries))
            self.nested.add(path)
            leaves = {}
            for key, value in entries.items():
                if isinstance(value, Mapping) and value:
                    if isinstance(key, str) and len(key) <= _MOST_KEY and not key.startswith("optim"):
                        waiting.append((f"{path}{key}.", level + 1, value))
                elif isinstance(key, str):
                    leaves[key] = value
            self._add(path, leaves)

    def _add(self, path: str, leaves: Mapping[str, Any]) -> None:
        """A wrapper's word leads all names of a dict or none; within names it may lead some."""
        split = {key: key.split(".") for key in leaves}
        dotted = [words for words in split.values() if len(words) > 1]
        lead = 0
        while dotted and all(len(words) > lead + 1 and words[lead] in self.wrappers for words in dotted):
            lead += 1
        for key, words in split.items():
            first, *rest = words[lead:] or words
            name = self._bare([*path.split(".")[:-1], first, *(word for word in rest if word not in self.wrappers)])
            if name in self.values:
                name = f"{path}{key}"
            self.values[name], self.original[name], self.entry[name] = leaves[key], key, path

    def _bare(self, words: list[str]) -> str:
        for at, word in enumerate(words):
            if word in {CITY_ENTRY, HEAD_ENTRY, "scene_head"}:
                self.two_parts[_joined(words[:at])] = 1
                words[at] = word.removesuffix("_state_dict")
        return ".".join(words)

    def under(self, start: str) -> dict[str, Any]:
        return {name[len(start) :]: value for name, value in self.values.items() if name.startswith(start)}


@dataclass(frozen=True)
class _Place:
    """Where a net may begin: all names after ``start``, and how many of them are a net's."""

    start: str
    values: dict[str, Any]
    whole: bool
    matched: int
    order: int

    @property
    def rank(self) -> tuple[bool, int, bool, int]:
        """The lower, the better."""
        return not self.whole, 0 if self.whole else -self.matched, not _is_average(self.start), self.order

    def is_within(self, other: _Place, most: int) -> bool:
        """Whether this is a part of the other, or a second name for it. Compares up to ``most`` bytes."""
        if self.start.startswith(other.start):
            return True
        pairs = [(self.values[name], value) for name, value in other.values.items() if name in self.values]
        both = [pair for pair in pairs if all(map(_is_plain, pair)) and pair[0].dtype == pair[1].dtype]
        if not both or self.matched != other.matched or sum(one.nbytes for one, _ in both) > most:
            return False
        return all(torch.equal(*pair) for pair in both)

    def __str__(self) -> str:
        return repr(shown(self.start)) if self.start else "no prefix"


def _places(table: _Table, nets: Sequence[Collection[str]], names: Collection[str]) -> Iterator[_Place]:
    """Where a net of these names may begin."""
    deepest = max(name.count(".") for name in names) + 1
    found = Counter(table.two_parts)
    for name in table.values:
        words = name.split(".")
        cuts = range(max(0, len(words) - deepest), len(words))
        found.update({_start(words[:cut], table.two_parts) for cut in cuts if ".".join(words[cut:]) in names})
    for start, matched in found.most_common(_MOST_PLACES):
        values, entry = table.under(start), start.partition(".")[0]
        order = ENTRIES.index(entry) if entry in ENTRIES and f"{entry}." in table.nested else len(ENTRIES)
        yield _Place(start, values, _is_whole(values, nets), matched, order)


def _start(before: Sequence[str], two_parts: Collection[str]) -> str:
    """Where the net begins that has these words before one of its names: a City2Scene net has it in its city model."""
    if before[-2:-1] == ["backbones"] and before[-1].isdecimal():
        before = before[:-2]
    outside = _joined(before[:-1])
    return outside if before[-1:] == ["city_model"] and outside in two_parts else _joined(before)


def _joined(words: Sequence[str]) -> str:
    return "".join(f"{word}." for word in words)


def _part_of(name: str) -> str:
    """What stands before the name of a backbone's tensor in a City2Scene net."""
    found = _PART.match(name)
    return found[0] if found else ""


def _is_whole(values: Mapping[str, Any], nets: Sequence[Collection[str]]) -> bool:
    """Whether every name of a net is there."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and not name.startswith(HEAD_PREFIX):
            part = _part_of(name)
            parts.setdefault(part, {})[name[len(part) :]] = value
    if nets:
        present = [values.keys(), *(part.keys() for part in parts.values())]
        return any(all(is_counter(name) or name in there for name in net) for net in nets for there in present)
    inner = [tensors for part, tensors in parts.items() if part] or list(parts.values())
    return bool(inner) and all(is_whole(tensors) for tensors in inner)


def _kept(table: _Table, best: _Place, own: Collection[str], names: Collection[str]) -> dict[str, Any]:
    """The values that are the net's, or that nothing shows not to be.

    What `BESIDE` names is not, nor a module that has nothing but counters and empty tensors: a LightningModule that is
    the net itself has its metrics there. (A net of a user's own may look numbers up: its integers are kept.)
    """

    def top(name: str) -> str:
        part = _part_of(name)
        return part + name[len(part) :].partition(".")[0]

    tensors = {name: value for name, value in best.values.items() if isinstance(value, Tensor) and value.numel()}
    learned = {top(name) for name, value in tensors.items() if own or value.is_floating_point() or value.is_complex()}
    kept = {
        name: value
        for name, value in best.values.items()
        if name in names or name[len(_part_of(name)) :] in names or name.startswith(HEAD_PREFIX)
    }
    others = {
        name: value
        for name, value in best.values.items()
        if name not in kept and top(name) in learned and not BESIDE.fullmatch(top(name).rpartition(".")[2])
    }
    city, head = (sum(name.startswith(prefix) for name in kept) for prefix in (CITY_PREFIX, HEAD_PREFIX))
    if own or not (city or head):
        return kept | others
    entries = {table.entry[f"{best.start}{name}"] for name in kept}
    close = [name for name in others if table.entry[f"{best.start}{name}"] in entries]
    if not city or not head or close:
        raise CheckpointError(
            f"expected names under {CITY_ENTRY} and {HEAD_ENTRY}, both and nothing else;"
            f" found {city}, {head} and {len(close)} others",
            hint="Copy the file again from where it was made, or write it again with teachers.save_checkpoint.",
        )
    return kept


def _described(
    table: _Table, best: _Place, kept: Collection[str], passed_over: Sequence[_Place]
) -> tuple[str, list[str]]:
    """The entry that was chosen, and in words what was done to names, and what was left out."""
    used = dict.fromkeys(f"{best.start}{name}" for name in kept)
    entries = list(dict.fromkeys(table.entry[name] for name in used))
    outside = entries[0] if entries and best.start.startswith(entries[0]) else ""
    removed = dict.fromkeys(best.start.removeprefix(outside).split(".")[:-1])
    removed |= dict.fromkeys(
        word for name in used for word in table.original[name].split(".") if word in table.wrappers
    )
    notes = [f"prefix '{shown(word)}.' removed" for word in removed]
    left = [name for name, value in table.values.items() if name not in used and _has_tensors(value)]
    left = [name for name in left if not name.startswith(tuple(place.start or "\0" for place in passed_over))]
    if left:
        notes.append(f"{len(left)} tensors beside it left out ({few([name.removeprefix(outside) for name in left])})")
    notes += [f"chosen before {place}, which fits too" for place in passed_over]
    averages = [name for name in left if _is_average(name if isinstance(table.values[name], list) else _outside(name))]
    if averages and not _is_average(best.start):
        notes.append(f"averages in {shown(_outside(averages[0]) or averages[0])} are no whole net")
    return " + ".join(entry[:-1] for entry in entries[:3] if entry) or "bare state dict", notes


def few(names: Sequence[str]) -> str:
    """The first six of these names."""
    return f"{', '.join(map(shown, names[:6]))}{', …' if len(names) > 6 else ''}"


def _outside(name: str) -> str:
    return name.rpartition(".")[0]


def _is_average(name: str) -> bool:
    return any(word.lower() in AVERAGED for word in _WORD.findall(name))


def _has_tensors(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and any(isinstance(item, Tensor) for item in value))


def _is_plain(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _check_size(values: Collection[Any], size: int) -> None:
    """Tensors, together, no larger than the file they came from; what is in one place of memory counts once."""
    distinct = {
        (value.data_ptr(), value.shape, value.stride()): value.numel() * value.element_size()
        for value in values
        if _is_plain(value)
    }
    if (claimed := sum(distinct.values())) > size:
        raise CheckpointError(
            f"the tensors claim {claimed} bytes, the file has {size}: some are expanded from fewer numbers",
            hint="Save the state dict of the model itself, without expand() or tied views.",
        )
