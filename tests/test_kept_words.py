"""What an index says of a teacher's rows stays said, whoever seals, merges, repairs or adds to the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Run, World

from kd_cache.store.entry import WORDS
from kd_cache.store.index import read_index, write_index

COST = {"rows": 10, "kl_mean": 0.25, "kl_max": 0.5, "argmax_flips": 1}
SAID: dict[str, Any] = {
    "source": {"checkpoint": "/mine/best.pth", "checkpoint_sha256": "0" * 64, "read_from": "command line"},
    "adopted": {"source": "rows.tsv", "kind": "tsv", "rows": 20},
    "storage_cost": COST,
    "precision_cost": COST,
    "compiled": True,
    "batches_halved_to": 4,
}
"""Of every word that is kept, something to keep."""


def say(path: Path, teacher: str = "tiny") -> None:
    """Let an index or a pending record say every word of a teacher."""
    index = read_index(path, maps=path.parent.name != "pending")
    record = {name: value for name, value in index.record.items() if name != "digest"}
    record["teachers"][teacher] |= SAID
    write_index(path, index.num_samples, index.maps, record)


def kept(world: World) -> dict[str, Any]:
    """Of the words, those that the cache's index says of the teacher."""
    entry = read_index(world.cache / "cache_index.json").record["teachers"]["tiny"]
    return {word: entry[word] for word in WORDS if word in entry}


def test_every_word_is_tried() -> None:
    assert SAID.keys() == WORDS.keys()


def seal(world: World, run: Run) -> None:
    run("seal", "--target", "b")


def merge(world: World, run: Run) -> None:
    (world.root / "cache").rename(world.root / "whole")
    run("merge", "whole/A2b", "--target", "b")


def merge_into(world: World, run: Run) -> None:
    run("dump", "--target", "b", "--json-path", "dataset.json", *TINY, "--only", "other", "--cache-root", "one")
    run("merge", "one/A2b", "--target", "b")


def repair(world: World, run: Run) -> None:
    world.view("other", world.permitted()[0]).unlink()
    run("repair", "--target", "b", *TINY)


def repair_of_a_lost_index(world: World, run: Run) -> None:
    """A dump's record is still there."""
    (world.cache / "pending").mkdir(exist_ok=True)
    (world.cache / "cache_index.json").rename(world.cache / "pending" / "0123456789abcdef.json")
    run("repair", "--target", "b", "--json-path", "dataset.json", *TINY)


def dump_of_another(world: World, run: Run) -> None:
    run("dump", "--target", "b", "--json-path", "dataset.json", *TINY, "--only", "other", "--no-skip-existing")


def export_of_the_view(world: World, run: Run) -> None:
    shutil.rmtree(world.cache / "tiny")
    run("export", "cache/A2b", "--to", "npy")


def adopt(world: World, run: Run) -> None:
    rows = "".join(f"{file}\t0.5\t-1\n" for file in world.permitted())
    (world.root / "rows.tsv").write_text("file\ta\tb\n" + rows)
    run("adopt", "rows.tsv", "--target", "b", "--json-path", "dataset.json")


@pytest.mark.parametrize(
    "by", [seal, merge, merge_into, repair, repair_of_a_lost_index, dump_of_another, export_of_the_view, adopt]
)
def test_what_is_said_of_a_finished_teacher_is_kept(
    cached: World, run: Run, world: World, by: Callable[[World, Run], None]
) -> None:
    index = world.cache / "cache_index.json"
    say(index)
    before = index.read_bytes()
    by(world, run)
    assert index.read_bytes() != before, "it was written anew"
    assert kept(world) == SAID


def seal_parts(world: World, run: Run) -> None:
    assert run("seal", "--target", "b").exit_code == 0


def merge_parts(world: World, run: Run) -> None:
    """Each part in a root of its own."""
    for number, record in enumerate(sorted((world.cache / "pending").glob("*.json"))):
        shutil.copytree(world.cache, world.root / f"part{number}" / "A2b")
        for other in (world.root / f"part{number}" / "A2b" / "pending").iterdir():
            if other.name != record.name:
                other.unlink()
    shutil.rmtree(world.cache)
    assert run("merge", "part0/A2b", "part1/A2b", "--target", "b").exit_code == 0


@pytest.mark.parametrize("by", [seal_parts, merge_parts])
def test_what_two_processes_say_of_one_teacher_is_brought_together(
    dump: Run, run: Run, world: World, by: Callable[[World, Run], None]
) -> None:
    for part in ("0/2", "1/2"):
        dump("--shard", part)
    for record in (world.cache / "pending").glob("*.json"):
        say(record)
    by(world, run)
    together = {"rows": 20, "kl_mean": 0.25, "kl_max": 0.5, "argmax_flips": 2}
    assert kept(world) == SAID | {"storage_cost": together, "precision_cost": together}


@pytest.mark.parametrize("by", [seal_parts, merge_parts])
def test_the_cost_of_low_precision_is_kept_by_whoever_ends_a_dump_in_parts(
    dump: Run, run: Run, world: World, by: Callable[[World, Run], None]
) -> None:
    """Once a bf16 dump in two parts, and a merge of a finished one, lost what a dump in one process kept."""
    for part in ("0/2", "1/2"):
        dump("--precision", "bf16", "--dtype", "fp16", "--shard", part)
    by(world, run)
    words = kept(world)
    assert words["storage_cost"]["rows"] == 20
    assert words["precision_cost"]["rows"] > 0
    merge(world, run)
    assert kept(world) == words
