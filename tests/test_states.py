"""The contract of every command with every state that a cache can be in: how it ends, what it says, what it leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import TINY, Run, World
from store_fixtures import flip, seal_bytes, snapshot

from kd_cache import KDCacheError, LogitCache
from kd_cache.store.index import read_index, write_index
from kd_cache.store.pack import open_pack

# -- states ------------------------------------------------------------------------------------------------------------


def rewritten(index: Path, **changed: object) -> None:
    """An index or a pending record that says something else, under a right digest."""
    found = read_index(index, maps=index.parent.name != "pending")
    record = {name: value for name, value in found.record.items() if name != "digest"}
    write_index(index, found.num_samples, found.maps, record | changed)


def finished(world: World, dump: Run) -> None:
    pass


def none(world: World, dump: Run) -> None:
    shutil.rmtree(world.cache)


def unfinished(world: World, dump: Run) -> None:
    """One part of two."""
    shutil.rmtree(world.cache)
    dump("--shard", "0/2")


def older(world: World, dump: Run) -> None:
    """As the script before kd-cache left it: plain files, and an index of paths alone."""
    index = world.cache / "cache_index.json"
    content = json.loads(index.read_bytes())
    del content["kd_cache"]
    index.write_text(json.dumps(content))
    shutil.rmtree(world.cache / "packs")


def newer(world: World, dump: Run) -> None:
    rewritten(world.cache / "cache_index.json", format_version=99)


def newer_record(world: World, dump: Run) -> None:
    dump("--dtype", "fp16", "--shard", "0/2")
    rewritten(next((world.cache / "pending").glob("*.json")), format_version=99)


def newer_pack(world: World, dump: Run) -> None:
    seal_bytes(world.cache / "packs", b"nobody knows yet", "tiny", version=99)


def renamed(world: World, dump: Run) -> None:
    rewritten(world.cache / "cache_index.json", adaptation="A2c")


def renamed_parts(world: World, dump: Run) -> None:
    """No index yet, but the record says which adaptation it is of."""
    unfinished(world, dump)
    rewritten(next((world.cache / "pending").glob("*.json")), adaptation="A2c")


def damaged_index(world: World, dump: Run) -> None:
    index = world.cache / "cache_index.json"
    index.write_bytes(index.read_bytes()[:-9])


def damaged_pack(world: World, dump: Run) -> None:
    flip(next((world.cache / "packs").glob("tiny-*")), -5)


def linked_packs(world: World, dump: Run) -> None:
    (world.cache / "packs").rename(world.root / "packs-elsewhere")
    (world.cache / "packs").symlink_to(world.root / "packs-elsewhere")


# -- commands ----------------------------------------------------------------------------------------------------------

DATA = ("--target", "b", "--json-path", "dataset.json")
OWN = (*TINY, "--only", "tiny", "--only", "other")
READERS: dict[str, tuple[str, ...]] = {
    "open": (),
    "verify": ("verify", *DATA, *TINY, "--all"),
    "info": ("info", "cache/A2b"),
    "export": ("export", "cache/A2b", "--to", "pt", "--output", "out"),
    "diff": ("diff", "whole/A2b", "cache/A2b"),
    "gc": ("gc", "cache/A2b", "--older-than", "0"),
    "merge from": ("merge", "cache/A2b", *DATA, "--cache-root", "merged"),
}
"""Those that change nothing of this cache; what they make is elsewhere, and garbage there is none."""
WRITERS: dict[str, tuple[str, ...]] = {
    "dump": ("dump", *DATA, *OWN),
    "part": ("dump", *DATA, *OWN, "--shard", "1/2"),
    "merge into": ("merge", "whole/A2b", *DATA),
    "adopt": ("adopt", "rows.tsv", *DATA, "--name", "outside"),
    "seal": ("seal", *DATA),
    "repair": ("repair", *DATA, *TINY),
}

# -- the contract ------------------------------------------------------------------------------------------------------

Cell = tuple[int, str]
FINE: Cell = (0, "")
ELSE = ""
NO_ROW: Cell = (3, "10 permitted samples have no row")
BROKEN = "its bytes do not match their digest"
CONTRACT: dict[Callable[[World, Run], None], dict[str, Cell]] = {
    finished: {ELSE: FINE},
    none: {
        ELSE: (3, "there is no cache"),
        "dump, part, merge into, adopt": FINE,
        "seal, repair": (3, "holds nothing to seal"),
    },
    unfinished: {
        ELSE: (3, "is unfinished: its dump did not finish"),
        "gc": (0, "is unfinished: its dump did not finish, it has no cache_index.json; only temporaries are removed"),
        "merge from, seal": NO_ROW,
        "dump, part, merge into, adopt, repair": FINE,
    },
    older: {
        ELSE: (5, "was written by an older script"),
        "export, merge from, merge into, seal, repair": (5, "Bring its rows in with kd-cache adopt."),
        "dump, part": (5, "adopt them, or pass --no-skip-existing to score everything again"),
        "adopt": (5, "Adopt that cache first (kd-cache adopt cache/A2b"),
        "diff": (0, "its rows are compared as they are, nothing about them can be checked"),
        "gc": (0, "was written by an older script: it has no kd_cache entry and no packs; only temporaries"),
        "open": (0, ""),
    },
    newer: {ELSE: (1, "has format version 99, this kd-cache reads up to 2")},
    newer_record: {
        ELSE: (1, "has format version 99, this kd-cache reads up to 2"),
        "open, export, diff": FINE,  # those go by the index
    },
    newer_pack: {ELSE: (1, "has format version 99, this kd-cache reads up to 2"), "open, info, export, diff": FINE},
    renamed: {
        ELSE: (5, "holds the cache of A2c"),
        "merge from": (5, "tells of a cache of A2c, expected A2b"),
        "open, info, export, diff, gc": FINE,  # these are told which cache is meant
    },
    renamed_parts: {
        ELSE: (5, "holds the cache of A2c"),
        "merge from": (5, "tells of a cache of A2c, expected A2b"),
        "open, info, export, diff, verify": (3, "is unfinished: its dump did not finish"),
        "gc": (0, "only temporaries are removed"),
    },
    damaged_index: {
        ELSE: (4, "cache_index.json is damaged: it is not JSON"),
        "gc": (0, "only temporaries are removed"),
        "dump, part, merge into, seal, repair": (0, "sealing writes it anew from the packs"),
    },
    damaged_pack: {
        ELSE: (4, BROKEN),
        "gc": (0, f"{BROKEN}; it is left as it is"),
        "info, merge into": FINE,
        "dump, part, repair": (0, BROKEN),
        "seal": (3, BROKEN),
    },
    linked_packs: {
        ELSE: (1, "packs is a link, expected a folder of its own"),
        "gc": (0, "packs is a link; what is behind it is left alone"),
    },
}


def promised(state: Callable[[World, Run], None], command: str) -> Cell:
    cells = CONTRACT[state]
    return next((cell for names, cell in cells.items() if command in names.split(", ")), cells[ELSE])


@pytest.fixture
def in_state(cached: World, dump: Run, world: World) -> Callable[[Callable[[World, Run], None]], World]:
    """Bring the cache into a state; a whole copy and rows to adopt lie beside it."""

    def bring(state: Callable[[World, Run], None]) -> World:
        shutil.copytree(world.cache.parent, world.root / "whole")
        rows = ["\t".join([file, "0.5", "-1"]) for file in world.permitted()]
        (world.root / "rows.tsv").write_text("\n".join(["file\ta\tb", *rows]))
        state(world, dump)
        return world

    return bring


def good_rows(world: World) -> set[tuple[str, str, bytes]]:
    """The rows in packs that can be read: fingerprint, file and bytes."""
    found: set[tuple[str, str, bytes]] = set()
    for path in (world.cache / "packs").glob("*.h5"):
        with suppress(KDCacheError):
            pack = open_pack(path)
            made_by = pack.origin.fingerprint.digest
            found |= {(made_by, file, row.tobytes()) for file, row in zip(pack.files, pack.logits, strict=True)}
    return found


def outcome(run: Run, world: World, command: str) -> Cell:
    """Exit code, and all that is said."""
    if command == "open":
        try:
            LogitCache.open(world.cache)
        except KDCacheError as error:
            return error.exit_code, str(error)
        return FINE
    result = run(*(READERS | WRITERS)[command])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.filterwarnings("ignore:.*older script")
@pytest.mark.parametrize("state", CONTRACT)
def test_a_command_that_reads_says_what_it_found_and_changes_nothing(
    in_state: Callable[..., World], run: Run, state: Callable[[World, Run], None]
) -> None:
    world = in_state(state)
    before = snapshot(world.root)
    for command in READERS:
        code, said = outcome(run, world, command)
        assert (code, promised(state, command)[1] in said) == (promised(state, command)[0], True), (command, said)
        made = ("out/", "merged/")
        now = {name: content for name, content in snapshot(world.root).items() if not name.startswith(made)}
        assert now == before, command
        assert (world.root / "out").exists() <= (promised(state, "export")[0] == 0)


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("state", CONTRACT)
def test_a_command_that_writes_goes_on_or_refuses_and_changes_nothing_then(
    in_state: Callable[..., World], run: Run, state: Callable[[World, Run], None], command: str
) -> None:
    world = in_state(state)
    before, rows = snapshot(world.root), good_rows(world)
    code, said = outcome(run, world, command)
    expected, wording = promised(state, command)
    assert (code, wording in said) == (expected, True), said
    if code:
        assert snapshot(world.root) == before
    else:
        assert rows <= good_rows(world)
