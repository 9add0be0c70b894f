"""Pairs of samples, and which of the two is the better one: read, sieved, and divided by series.

A pairs file is a table (CSV, TSV) or a JSON list of objects. ``a`` and ``b`` are files of the manifest, ``winner`` is
``a``, ``b`` or ``tie``, ``agreement`` the share of the ``reviewers`` who said so, ``series`` what the two belong to. A
column ``split`` (train, val, test) may say what each series is for.

Pairs of one series are about the same scene, and their samples meet again and again: divided by pair, a net would be
tested on what it learnt. So whole series are held out, and series that share a sample are one group.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from kd_cache.dataset.manifest_file import parse_json, read_plain
from kd_cache.errors import DataLeakageError, ManifestError, UsageError, listed, shown
from kd_cache.prepare.tables import read_cells
from kd_cache.train.division import Ties, chance_of

WINNERS: Final = ("a", "b")
"""By the class that a net gives them."""
TIE: Final = "tie"
COLUMNS: Final = ("a", "b", "winner", "agreement", "reviewers", "series")
SPLITS: Final = ("train", "val", "test")
_LEAST_GROUPS: Final = 3


class Pair(NamedTuple):
    """One row. ``winner`` is 0 for a, 1 for b, ``None`` for a tie in votes."""

    a: str
    b: str
    winner: int | None
    agreement: float
    reviewers: int
    series: str
    split: str | None = None


class PairsFile(NamedTuple):
    """All pairs in the order of the file, and the SHA-256 of its bytes."""

    pairs: tuple[Pair, ...]
    digest: str


def read_pairs(path: Path, max_bytes: int) -> PairsFile:
    """Read and check a pairs file; everything that is wrong with it is said at once.

    Raises:
        ManifestError: it cannot be read, lacks a column, has rows that make no sense, or names two samples twice.
    """
    found, wrong = [], []
    for where, row in _rows(path, max_bytes):
        try:
            found.append(_pair(row))
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    both = Counter(frozenset(pair[:2]) for pair in found)
    wrong += [f"{' and '.join(sorted(names))}: {count} rows" for names, count in both.items() if count > 1]
    if wrong or not found:
        raise ManifestError(
            f"{shown(path)}: {len(wrong)} rows make no sense\n{listed(wrong)}" if wrong else f"{shown(path)} is empty",
            hint=f"Columns are {', '.join(COLUMNS)}; two samples have one row, with the votes of all reviewers.",
        )
    return PairsFile(tuple(found), hashlib.sha256(read_plain(path, max_bytes)).hexdigest())


def _rows(path: Path, max_bytes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row by its columns' names, and where it stands."""
    if path.suffix.lower() == ".json":
        try:
            content = parse_json(read_plain(path, max_bytes), shown(path))
        except (OSError, ValueError) as error:
            if isinstance(error, ManifestError):
                raise
            raise ManifestError(f"cannot read {shown(path)}: {shown(error)}") from error
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise ManifestError(f"{shown(path)}: expected a list of objects with {', '.join(COLUMNS)}")
        yield from ((f"[{number}]", row) for number, row in enumerate(content))
        return
    header, rows = read_cells(path, max_bytes)
    if wrong := [name for name in COLUMNS if header.count(name) != 1] + (["split"] * (header.count("split") > 1)):
        raise ManifestError(
            f"{shown(path)} needs each of the columns {', '.join(wrong)} once; its header is {shown(', '.join(header))}"
        )
    yield from ((f"line {line}", dict(zip(header, cells, strict=True))) for line, cells in rows)


def _pair(row: Mapping[str, Any]) -> Pair:
    """Raises ``ValueError`` for what is no pair."""
    texts = {name: row.get(name) for name in ("a", "b", "winner", "series")}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} is {shown(text)}, expected a text")
    a, b, winner, series = (str(text) for text in texts.values())
    if a == b:
        raise ValueError(f"a and b are both {shown(a)}")
    if winner not in (*WINNERS, TIE):
        raise ValueError(f"winner is {shown(winner)}, expected a, b or {TIE}")
    agreement, reviewers = _number(row, "agreement"), _number(row, "reviewers")
    if not 0 <= agreement <= 1:
        raise ValueError(f"agreement is {agreement:g}, expected a share from 0 to 1")
    if reviewers < 0 or reviewers != int(reviewers):
        raise ValueError(f"reviewers is {reviewers:g}, expected how many there were")
    split = row.get("split") or None
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {shown(split)}, expected {', '.join(SPLITS)}")
    tied = winner == TIE or agreement == 0.5  # half of them said so, half of them did not
    return Pair(a, b, None if tied else WINNERS.index(winner), agreement, int(reviewers), series, split)


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    try:
        if not isinstance(value, bool) and (number := float(value)) < float("inf"):  # type: ignore[arg-type]
            return number
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} is {shown(value)}, expected a number")


class Sieved(NamedTuple):
    """Pairs that count, the ties among them that do not, and how many were left out for what reason."""

    pairs: tuple[Pair, ...]
    ties: tuple[Pair, ...]
    left_out: dict[str, int]


def sieve(pairs: Sequence[Pair], min_agreement: float, min_reviewers: int) -> Sieved:
    """Leave out pairs of too few reviewers, then ties, then those that reviewers do not agree enough about."""
    seen = [pair for pair in pairs if pair.reviewers >= min_reviewers]
    decided = [pair for pair in seen if pair.winner is not None]
    kept = tuple(pair for pair in decided if pair.agreement >= min_agreement)
    left_out = {
        f"fewer than {min_reviewers} reviewers": len(pairs) - len(seen),
        "tied": len(seen) - len(decided),
        f"agreement below {min_agreement:g}": len(decided) - len(kept),
    }
    return Sieved(kept, tuple(pair for pair in seen if pair.winner is None), left_out)


def groups_of_series(pairs: Iterable[Pair]) -> dict[str, str]:
    """The group of each series: the first of all series that it is tied to, by samples that are in both."""
    ties = Ties()
    for pair in pairs:
        ties.join([f"s{pair.series}", f"~{pair.a}", f"~{pair.b}"])  # "~" comes after "s": a series names the group
    return {pair.series: ties.first(f"s{pair.series}")[1:] for pair in pairs}


@dataclass(frozen=True)
class PairDivision:
    """Pairs to learn from, to choose the epoch by, and to measure with at the end."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]
    group_of: Mapping[str, str]

    @property
    def train_locations(self) -> int:
        return len({pair.series for pair in self.train})

    @property
    def validation_locations(self) -> int:
        return len({pair.series for pair in self.validation})

    def groups(self, pairs: Iterable[Pair]) -> list[str]:
        """The group of each pair's series."""
        return [self.group_of[pair.series] for pair in pairs]


def divide_pairs(
    pairs: Sequence[Pair], *, val_ratio: float, test_ratio: float, fold: int = 0, share: float = 1.0
) -> PairDivision:
    """Hold out about these shares of the groups of series, or what the column ``split`` says.

    The choice depends on the names of the series, and on nothing else. Folds 0, 1, … validate by other groups; test
    stays. A group with more than half of all pairs always trains.

    Args:
        pairs: all of the file: what is left out of training ties series together all the same.
        share: of the groups, for a quick experiment; one at least on each side.

    Raises:
        DataLeakageError: a series, or series that share samples, in two splits.
        UsageError: fewer groups than sides, or a side of which nothing is left.
    """
    group_of = groups_of_series(pairs)
    members: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        members[group_of[pair.series]].append(pair)
    ordered = sorted(members, key=lambda name: chance_of(name, 0))
    if any(pair.split is not None for pair in pairs):
        sides = _as_written(pairs, members)
    else:
        sides = _drawn(ordered, members, val_ratio, test_ratio, fold)
    found: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for split, chosen in found.items():
        mine = [name for name in ordered if sides[name] == split]
        kept = set(mine[: max(round(share * len(mine)), 1)])
        chosen += [pair for pair in pairs if group_of[pair.series] in kept]
    train, validation, test = map(tuple, found.values())
    return PairDivision(train, validation, test, group_of)


def _as_written(pairs: Sequence[Pair], members: Mapping[str, Sequence[Pair]]) -> dict[str, str]:
    if bare := [f"{pair.series}: {pair.a}, {pair.b}" for pair in pairs if pair.split is None]:
        raise UsageError(f"{len(bare)} pairs have no split, and others have one\n{listed(bare)}")
    torn = []
    for group, mine in members.items():
        if len({pair.split for pair in mine}) > 1:
            of_series = sorted({(pair.series, str(pair.split)) for pair in mine})
            torn.append(f"{group}: {', '.join(f'{series} in {split}' for series, split in of_series)}")
    if torn:
        raise DataLeakageError(
            f"{len(torn)} groups of series are in two splits (series that share a sample are one group)\n"
            f"{listed(torn)}",
            hint="Put each group into one split, or leave the column split out: then whole groups are held out.",
        )
    return {group: str(mine[0].split) for group, mine in members.items()}


def _drawn(
    ordered: Sequence[str], members: Mapping[str, Sequence[Pair]], val_ratio: float, test_ratio: float, fold: int
) -> dict[str, str]:
    total = sum(map(len, members.values()))
    small = [name for name in ordered if 2 * len(members[name]) <= total]
    if len(ordered) < _LEAST_GROUPS or len(small) < _LEAST_GROUPS - 1:
        shared = " (series that share a sample are one group)"
        raise UsageError(
            f"there are {len(ordered)} groups of series{shared}, expected {_LEAST_GROUPS} or more to train, validate "
            "and test with",
            hint="Review pairs of further series, of samples that are in no other one.",
        )
    tests = min(max(round(test_ratio * len(ordered)), 1), len(small) - 1) if test_ratio else 0
    rest = small[tests:]
    count = min(max(round(val_ratio * len(ordered)), 1), max(len(ordered) - tests - 1, 1), len(rest))
    chosen = {rest[(fold * count + number) % len(rest)] for number in range(count)}
    sides = {name: "val" if name in chosen else "train" for name in ordered}
    return sides | dict.fromkeys(small[:tests], "test")
