"""Every command dies at calls that change names: nothing wrong is served then, and run again it leaves equal bytes.

In this process, so that it takes seconds; `test_faults_calls.py` breaks every system call of a few commands for real.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from conftest import TINY, Run, World
from fault_tools import often
from store_fixtures import DeadError, dying, md5, rewrite, snapshot

from kd_cache import KDCacheError, LogitCache
from kd_cache.store.index import read_index
from kd_cache.store.pack import open_pack

MOMENTS = often(6, 30, 1000)
"""How many of a command's moments are tried."""
DATA = ("--target", "b", "--json-path", "dataset.json")
OWN = (*TINY, "--only", "tiny", "--only", "other")
OTHER_RUN = (
    "begun",
    "generation",
    "created",
    "digest",
    "settings",
    "shown_path",
    "environment",
    "manifest",
    "measured",
    "superseded",
)


# -- commands, and what they are to do ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A command, what is there before it, and how it is run again."""

    set_up: Callable[[World, Run], object]
    command: tuple[object, ...]
    further: tuple[object, ...] = ()
    """Said in addition when it is run again."""
    ends: tuple[int, ...] = (0,)
    """How it may end then."""
    rescores: bool = False
    """Whether rows of before may be out of use before it ends; else it is the cache of before or of afterwards."""


def dump_of(world: World, run: Run, *args: object) -> None:
    assert run("dump", *DATA, *OWN, *args).exit_code == 0


def sample_more(world: World, run: Run) -> None:
    """A finished cache; a sample came, one went, one feature changed."""
    dump_of(world, run)
    world.add(40, "A", "train")
    del world.rows[0]
    world.write()
    world.write_feature(world.rows[0]["file"], np.ones((12, 20), np.float32))


def another_unfinished(world: World, run: Run) -> None:
    """As `sample_more`; and a dump of the same weights, of features elsewhere, was stopped after it saved some."""
    sample_more(world, run)
    for number, file in enumerate(ordered := sorted(world.permitted(), key=md5)):
        path = world.root / "elsewhere" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.full((12, 20), number, np.float32))
    (world.root / "elsewhere" / ordered[-1]).write_bytes(b"no array")
    small = ("--shard-size", 1, "--batch-size", 2)
    assert run("dump", *DATA, *OWN, "--data-root", "elsewhere", *small).exit_code == 1


def one_part(world: World, run: Run) -> None:
    dump_of(world, run, "--shard", "0/2")


def two_parts(world: World, run: Run) -> None:
    """Of a cache that was finished before, with other samples."""
    sample_more(world, run)
    for part in ("0/2", "1/2"):
        dump_of(world, run, "--shard", part, "--shard-size", 1, "--dtype", "fp16")


def parts_apart(world: World, run: Run) -> None:
    for number in (0, 1):
        dump_of(world, run, "--shard", f"{number}/2", "--cache-root", f"part{number}")


def rows_to_adopt(world: World, run: Run) -> None:
    dump_of(world, run)
    (world.root / "rows.tsv").write_text("file\ta\tb\n" + "".join(f"{file}\t0.5\t-1\n" for file in world.permitted()))


def damage(world: World, run: Run) -> None:
    """A pack, a row file and the permitted list."""
    dump_of(world, run)
    pack = next((world.cache / "packs").glob("tiny-*"))
    pack.write_bytes(pack.read_bytes()[:-9])
    world.view("other", world.permitted()[0]).unlink()
    next(world.cache.glob("permitted-*")).unlink()


def wrong_rows(world: World, run: Run) -> None:
    """Rows under each other's keys, every checksum right."""
    dump_of(world, run, "--no-files")
    pack = open_pack(next((world.cache / "packs").glob("tiny-*")))
    rewrite(pack, np.roll(pack.logits, 1, axis=0))


def garbage(world: World, run: Run) -> None:
    dump_of(world, run, "--dtype", "fp16", "--no-files")
    dump_of(world, run)
    (world.cache / "ghost").mkdir()
    np.save(world.cache / "ghost" / f"{'0' * 32}.npy", np.zeros(3))


CASES = {
    "dump": Case(sample_more, ("dump", *DATA, *OWN, "--shard-size", 1), rescores=True),
    "dump beside another": Case(another_unfinished, ("dump", *DATA, *OWN, "--shard-size", 1), rescores=True),
    "part": Case(one_part, ("dump", *DATA, *OWN, "--shard", "1/2", "--shard-size", 1)),
    "seal": Case(two_parts, ("seal", *DATA)),
    "merge": Case(parts_apart, ("merge", "part0/A2b", "part1/A2b", *DATA)),
    "adopt": Case(rows_to_adopt, ("adopt", "rows.tsv", *DATA), ends=(0, 2)),  # the name may be taken: by these rows
    "repair": Case(damage, ("repair", *DATA, *TINY), rescores=True),
    "repair of wrong rows": Case(wrong_rows, ("repair", *DATA, *TINY, "--recompute"), rescores=True),
    "gc": Case(garbage, ("gc", "--older-than", "0")),
    "export": Case(dump_of, ("export", "--to", "pt", "--output", "out"), ("--overwrite",)),
    "export of the view": Case(lambda w, r: dump_of(w, r, "--no-files"), ("export", "cache/A2b", "--to", "npy")),
}


# -- what must hold ----------------------------------------------------------------------------------------------------


def kept(world: World) -> dict[str, Any]:
    """All that a command made, without what differs from run to run, temporaries and records of what did not finish."""
    found: dict[str, Any] = {}
    for name, content in snapshot(world.root).items():
        if ".tmp-" in name or "/pending/" in name or not name.startswith(("cache/", "out/")):
            continue
        if name.endswith("cache_index.json"):
            index = json.loads(content)
            record = {key: value for key, value in index.pop("kd_cache").items() if key not in OTHER_RUN}
            for entry in record["teachers"].values():
                entry.pop("begun", None)
                entry.pop("generation", None)
            found[name] = index, record
        else:
            found[name] = content
    return found


def served(world: World) -> set[tuple[str, str, bytes]]:
    """What a student is given: fingerprint, file and row. Nothing where a cache says that it cannot be opened."""
    found: set[tuple[str, str, bytes]] = set()
    with suppress(KDCacheError, FileNotFoundError):
        for teacher in read_index(world.cache / "cache_index.json").origins:
            cache = LogitCache.open(world.cache, [teacher])
            rows = cache.batch(cache.files)[:, 0].numpy()
            made_by = cache.fingerprints[teacher]
            found |= {(made_by, file, row.tobytes()) for file, row in zip(cache.files, rows, strict=True)}
    return found


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:.*adopted")
@pytest.mark.parametrize("name", CASES)
def test_a_command_that_died_served_nothing_wrong_and_run_again_leaves_the_same_bytes(
    run: Run, world: World, name: str
) -> None:
    case = CASES[name]
    world.rows = world.rows[:4] + world.rows[12:14] + world.rows[-3:]
    world.write()
    case.set_up(world, run)
    begun, before = world.root.with_name(f"{world.root.name}-begun"), served(world)
    shutil.copytree(world.root, begun)

    def again() -> None:
        for path in world.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(begun, world.root, dirs_exist_ok=True)

    with dying(10_000) as did:
        assert run(*case.command).exit_code == 0
    finished, last = kept(world), len(did)
    after = served(world)
    assert last > 1
    for moment in sorted({round(number * (last - 1) / (MOMENTS - 1)) for number in range(min(MOMENTS, last))}):
        again()
        with dying(moment) as did, pytest.raises(DeadError):
            run(*case.command)
        assert served(world) <= before | after if case.rescores else served(world) in (before, after), did
        result = run(*case.command, *case.further)
        assert result.exit_code in case.ends, (did, result.output)
        assert kept(world) == finished, did
    shutil.rmtree(begun)
