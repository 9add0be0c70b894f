"""A small cache to break, and what must hold after a fault.

Nothing acknowledged is lost, nothing wrong is served, and the command that is run again comes to the bytes of one that
nothing disturbed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_teachers
import torch
from conftest import TINY, World
from fault_disk import ROW_FILE, Tree, is_temporary, put_tree, tree
from fault_tools import FULL, Fault, Outcome, Rows, compare, host

from kd_cache.errors import MissingLogitsError
from kd_cache.score.unchanged import SEEN_NAME
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.store.cache import CacheFolder

Arguments = tuple[object, ...]

_SAVED = re.compile(r"^saved: ([\d,]+)/[\d,]+ samples", re.MULTILINE)
_MOMENT = ("created", "begun", "generation", "settings", "digest")
"""What the index says of the run, not of its result."""


@dataclass
class Place:
    """A small data set, and beside it the folder ``disk`` that gets broken; the cache is ``disk/cache/A2b``.

    ``right`` has every row that a dump may store, of both teachers, before and after their weights change.
    """

    world: World
    right: Rows

    @property
    def root(self) -> Path:
        return self.world.root

    @property
    def disk(self) -> Path:
        return self.root / "disk"

    @property
    def cache(self) -> Path:
        return self.disk / "cache" / "A2b"

    @property
    def samples(self) -> int:
        return len(self.world.permitted())

    def run(self, *arguments: object, **options: Any) -> Outcome:
        return host().run(*arguments, cwd=self.root, **options)

    def finish(self, *commands: Arguments) -> Tree:
        """Run commands to their end, undisturbed; returns what the disk holds then."""
        for arguments in commands:
            outcome = self.run(*arguments)
            assert outcome.code == 0, outcome
        return tree(self.disk)


def dumping(*further: object, weights: str = "", root: str = "disk/cache") -> Arguments:
    """A dump with two tiny teachers, many small commits, into ``disk/cache``; ``weights`` (a file) changes both."""
    where = ("--target", "b", "--json-path", "dataset.json", "--cache-root", root)
    sizes = ("--batch-size", "2", "--num-verify", "2", *(() if "--shard-size" in further else ("--shard-size", "4")))
    return ("dump", *where, *_teachers(weights), "--only", "tiny", "--only", "other", *sizes, *further)


def _teachers(weights: str = "") -> Arguments:
    if not weights:
        return TINY
    return (
        "--teacher",
        f"tiny=tiny_teachers:linear,ckpt={weights}",
        "--teacher",
        f"other=tiny_teachers:linear,ckpt=other-{weights}",
    )


SEALING: Arguments = ("seal", "--target", "b", "--cache-root", "disk/cache")
RESCORING = dumping(weights="weights.txt")
"""A dump with other weights for both teachers: its rows must not be mixed with those of before."""
_SEEDS = {"tiny": (1, 7), "other": (2, 9)}


def exporting(kind: str, output: bool = True) -> Arguments:
    where = ("--output", f"disk/{kind}") if output else ()
    return ("export", "disk/cache/A2b", "--to", kind, "--overwrite", *where)


def make_place(root: Path, source: int, target: int) -> Place:
    """So many samples of the source device and of the target, of two lengths, and the right rows."""
    world = World(root)
    for number in range(source + target):
        world.add(number, "A" if number < source else "b", "train", frames=(12, 16)[number % 2])
    place = Place(world.write(), {})
    for name, file in (("tiny", "weights.txt"), ("other", "other-weights.txt")):
        (root / file).write_text(str(_SEEDS[name][1]))
    for generation, arguments in enumerate((dumping("--no-files"), RESCORING)):
        place.finish(arguments)
        rows = stored_rows(place.cache)
        _check_against_teachers(place, {key: row for key, row in rows.items() if key not in place.right}, generation)
        place.right |= rows
    put_tree(place.disk, {})
    return place


def _check_against_teachers(place: Place, rows: Rows, generation: int) -> None:
    """Rows are only taken for the right ones if the teachers' own code, called by hand, gives these numbers."""
    assert {(name, file) for name, _, file in rows} == {(n, f) for n in _SEEDS for f in place.world.permitted()}
    for (teacher, _, file), row in rows.items():
        feature = torch.from_numpy(np.load(place.world.feature(file)))
        expected = tiny_teachers.Linear(_SEEDS[teacher][generation])(feature[None])[0].numpy()
        np.testing.assert_allclose(np.frombuffer(row, "<f4"), expected, rtol=1e-4, atol=1e-5)


# -- what can be disturbed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A command on a disk.

    Attributes:
        before: what the disk holds when it starts.
        acknowledged: the rows that ``before`` holds, and that are not the command's to remove.
        whole: whether ``before`` is a cache that opens, or one that is unfinished.
        again: the commands that bring an interrupted one to its end.
        after: what the disk holds then.
    """

    place: Place
    name: str
    before: Tree
    acknowledged: Rows
    whole: bool
    arguments: Arguments
    again: Sequence[Arguments]
    after: Tree

    def set_up(self) -> None:
        put_tree(self.place.disk, self.before)

    @property
    def exported(self) -> list[str]:
        """Names that only the command itself makes beside the cache."""
        return [name for name in self.after if not name.startswith("cache") and self.after[name] is not None]


_PARTS = (dumping("--shard", "0/2"), dumping("--shard", "1/2"))
_APART = (dumping("--shard", "0/2", root="disk/one"), dumping("--shard", "1/2", root="disk/two"))


def _lose_a_pack(place: Place) -> None:
    for path in (place.cache / "packs").glob("tiny-*.h5"):
        path.unlink()


_SCENARIOS: dict[str, tuple[Sequence[Arguments | Callable[[Place], None]], Sequence[Arguments]]] = {
    # What comes before, and the command with what completes it.
    "dump": ((), (dumping(),)),
    "part": ((_PARTS[1],), (_PARTS[0], SEALING)),
    "seal": (_PARTS, (SEALING,)),
    "seal of several packs": (_PARTS, ((*SEALING, "--pack-bytes", "500"),)),
    "rescoring": ((dumping(),), (RESCORING,)),
    "export pt": ((dumping(),), (exporting("pt"),)),
    "export tsv": ((dumping(),), (exporting("tsv"),)),
    "export npy": ((dumping(),), (exporting("npy"),)),
    "gc": ((dumping(), RESCORING), (("gc", "disk/cache/A2b", "--older-than", "0"),)),
    "merge": (_APART, (("merge", "disk/one/A2b", "disk/two/A2b", "--target", "b", "--cache-root", "disk/cache"),)),
    "repair": ((dumping(), _lose_a_pack), (("repair", "--cache-root", "disk/cache", *TINY), SEALING)),
}
SCENARIOS = tuple(_SCENARIOS) if FULL else ("dump", "seal", "export pt")


def make_scenario(place: Place, name: str) -> Scenario:
    """Prepare a disk, and see how the command ends that nothing disturbs."""
    earlier, commands = _SCENARIOS[name]
    put_tree(place.disk, {})
    for step in earlier:
        if callable(step):
            step(place)
        else:
            place.finish(step)
    before = tree(place.disk)
    rows = stored_rows(place.cache) if earlier else {}
    after = place.finish(*commands)
    kept = stored_rows(place.cache)
    acknowledged = {key: row for key, row in rows.items() if key in kept}
    return Scenario(place, name, before, acknowledged, _lose_a_pack not in earlier, commands[0], commands, after)


# -- checks -----------------------------------------------------------------------------------------------------------


def stored_rows(cache: Path) -> Rows:
    """Every row in the packs of a cache, checked to the last byte. Fails at a damaged pack, or at rows that differ."""
    packs = CacheFolder(cache).packs()
    assert not packs.damaged, f"a damaged pack: {packs.damaged}"
    rows: Rows = {}
    for pack in packs.good:
        assert not pack.wrong_rows(np.arange(len(pack)))
        made_by = (pack.origin.teacher, pack.origin.fingerprint.digest)
        for file, row in zip(pack.files, pack.logits, strict=True):
            known = rows.setdefault((*made_by, file), row.tobytes())
            assert known == row.tobytes(), f"two different rows of {pack.origin.teacher} for {file}"
    return rows


def check_rows(cache: Path, right: Rows, acknowledged: Rows) -> Rows:
    """The rows there are, after checking that they are right and that no acknowledged one is missing."""
    rows = stored_rows(cache)
    wrong = [key for key, row in rows.items() if row != right[key]]
    assert not wrong, f"wrong rows: {wrong}"
    lost = [key for key in acknowledged if key not in rows]
    assert not lost, f"lost {len(lost)} acknowledged rows: {lost[:5]}"
    return rows


def check_served(cache: Path, right: Rows, *, whole: bool = True) -> int:
    """Read everything as a student does; returns how many rows were served.

    A ``whole`` cache must open if its index is there; without an index the reader must say that it is unfinished.
    """
    try:
        opened = LogitCache.open(cache)
    except MissingLogitsError as error:
        if whole and (cache / "cache_index.json").exists():
            raise AssertionError(f"a finished cache does not open: {error}") from error
        return 0
    count, wrong = compare(opened, right)
    assert not wrong, f"wrong rows were served: {wrong}"
    return count


def check_exported(scenario: Scenario, *, durable: bool = False) -> None:
    """Beside the cache there is nothing but whole files; with ``durable`` files of single rows do not count."""
    found = tree(scenario.place.disk)
    for name in scenario.exported:
        if durable and ROW_FILE.match(f"/{name}"):
            continue
        assert found.get(name, scenario.after[name]) == scenario.after[name], f"not whole: {name}"


def check_after(
    scenario: Scenario, outcome: Outcome, fault: object, *, left: bool = False, durable: bool = False
) -> tuple[int, int]:
    """What must hold after any fault of a command; then the command is run again, and comes to the same bytes.

    Args:
        scenario: the command, and what it found.
        outcome: how it ended.
        fault: what was done to it, for the message.
        left: temporary files may be left behind.
        durable: files of single rows need not be whole either; see `check_exported`.

    Returns the samples that the command said were saved, and those that are complete.
    """
    place = scenario.place
    try:
        assert left or not temporaries(place.disk), "a temporary file was left behind"
        rows = check_rows(place.cache, place.right, scenario.acknowledged)
        said, complete = acknowledged_samples(outcome.stderr), complete_samples(rows)
        assert said <= complete, f"{said} samples were said to be saved, {complete} are there"
        check_served(place.cache, place.right, whole=scenario.whole)
        check_exported(scenario, durable=durable)
        if outcome.code == 0 and not durable and len(scenario.again) == 1:
            check_same(tree(place.disk), scenario.after)
        check_same(place.finish(*scenario.again), scenario.after)
    except AssertionError as error:
        raise AssertionError(f"{scenario.name}, {fault}: {error}\n{outcome}") from error
    return said, complete


def acknowledged_samples(stderr: str) -> int:
    """The largest number of samples that a dump has said are saved."""
    return max((int(count.replace(",", "")) for count in _SAVED.findall(stderr)), default=0)


def complete_samples(rows: Rows) -> int:
    """Samples of which some row of each teacher is there."""
    held = [{file for name, _, file in rows if name == teacher} for teacher in _SEEDS]
    return len(set.intersection(*held))


def temporaries(folder: Path) -> list[str]:
    """Temporary files left behind, anywhere in a folder."""
    return [name for name in tree(folder) if is_temporary(name)]


def check_same(found: Tree, expected: Tree) -> None:
    """Two folders are equal to the byte, but for temporaries, notes of features, and what tells of the run."""
    ours, theirs = (
        {n: b for n, b in t.items() if not is_temporary(n) and Path(n).name != SEEN_NAME} for t in (found, expected)
    )
    assert ours.keys() == theirs.keys(), f"only one of two has {sorted(ours.keys() ^ theirs.keys())}"
    for name in ours:
        one, other = _comparable(name, ours[name]), _comparable(name, theirs[name])
        assert one == other, f"not the bytes of an undisturbed run: {name}\n{_differing(one, other)}"


def _differing(one: Any, other: Any, at: str = "") -> str:
    """Where two parsed indexes differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        parts = [_differing(one.get(k), other.get(k), f"{at}/{k}") for k in one.keys() | other.keys()]
        return "\n".join(filter(None, parts))
    return "" if one == other else f"{at}: {one!r:.200} | {other!r:.200}"


def _comparable(name: str, content: bytes | None) -> Any:
    if content is None or not name.endswith("cache_index.json"):
        return content
    index = json.loads(content)
    record = {key: value for key, value in index["kd_cache"].items() if key not in _MOMENT}
    manifest = {**record["manifest"], "path": Path(record["manifest"]["path"]).name}  # a seal knows the whole path
    teachers = {
        name: {key: value for key, value in entry.items() if key not in _MOMENT}
        for name, entry in record["teachers"].items()
    }
    return index | {"kd_cache": record | {"manifest": manifest, "teachers": teachers}}


def check_outcome(outcome: Outcome, fault: Fault) -> None:
    """A command that failed says where and why, in words; one that a signal ended has that signal's status."""
    said = outcome.stdout + outcome.stderr
    assert "Traceback" not in said, outcome
    if outcome.code == 0:
        return
    if fault.how == "signal":
        assert outcome.code == 128 + fault.code, outcome
        return
    assert outcome.code > 0, f"it died\n{outcome}"
    assert "unexpected" not in said, outcome
    assert "disk/" in said, f"the message names no path\n{outcome}"
    cause = os.strerror(fault.code) if fault.how == "error" else "No space left on device"
    assert cause in said, f"the message does not say {cause!r}\n{outcome}"
