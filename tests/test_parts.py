"""Splitting a dump: `--shard`, what launchers and job arrays say, and what a part does and leaves."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, Run, World
from store_fixtures import snapshot
from tiny_teachers import Linear

from kd_cache import LogitCache, UsageError
from kd_cache.cli.parts import part_of
from kd_cache.score.dump import DumpJob, dump_logits, plan_dump
from kd_cache.store.cache import CacheFolder
from kd_cache.store.pack import open_pack
from kd_cache.store.pending import read_pending

ENVIRONMENT = ("RANK", "WORLD_SIZE", *[f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX", "STEP")])
SLOTTED = ("--teacher", "slotted=test_parts:slotted", "--only", "slotted")


class Slotted(Linear):
    """Its logits say in which batch size and at which position they were computed: what the last bits do, but loud."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        place = len(features) + torch.arange(len(features)) / 64
        return super().forward(features) + place[:, None]


def slotted(ckpt: Path | None) -> Slotted:
    return Slotted(3, architecture="slotted/1")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENVIRONMENT, "KD_CACHE_SHARD"):
        monkeypatch.delenv(name, raising=False)


def permanent(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but its index: packs, view, plan, permitted keys, and what should not be there."""
    return {name: content for name, content in snapshot(cache).items() if name != "cache_index.json"}


def told(cache: Path) -> dict[str, Any]:
    """The index without what differs from run to run."""
    index = json.loads((cache / "cache_index.json").read_bytes())
    for name in ("created", "begun", "generation", "settings", "digest"):
        del index["kd_cache"][name]
    return dict(index)


def taken(cache: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """A finished cache's files and index; the cache itself goes, so that another is made in its place."""
    found = permanent(cache), told(cache)
    shutil.rmtree(cache)
    return found


def several_lengths(world: World) -> World:
    """31 permitted samples of four lengths: batches that a part's end cuts, and ones that no part fills."""
    for number in range(30, 41):
        world.add(number, "A", "train", frames=(12, 16, 24, 20)[number % 4])
    return world.write()


def shuffled(count: int, *more: str) -> list[str]:
    parts = [f"{number}/{count}" for number in range(count)] + list(more)
    random.Random(count).shuffle(parts)  # noqa: S311 (an order, not a secret)
    return parts


# -- parts together are one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "more"), [(1, ()), (3, ("0/2", "2/3", "4/5")), (21, ())])
def test_all_parts_in_any_order_are_sealed_to_the_bytes_of_one_process(
    dump: Run, run: Run, world: World, count: int, more: tuple[str, ...]
) -> None:
    """Some run twice, and some samples are in several of them."""
    several_lengths(world)
    arguments = (*SLOTTED, "--batch-size", 4)
    assert dump(*arguments).exit_code == 0
    files, index = taken(world.cache)
    assert len([name for name in files if name.startswith("packs/")]) == 3

    for number, part in enumerate(shuffled(count, *more)):  # how a part reads and commits leaves no trace
        how = ("--workers", number % 3, "--shard-size", 1 + number)
        assert dump(*arguments, "--shard", part, *how).exit_code == 0
    result = run("seal", "--target", "b")

    assert result.exit_code == 0, result.output
    assert permanent(world.cache) == files
    assert json.dumps(told(world.cache)) == json.dumps(index)


def test_samples_that_no_part_can_score_are_sealed_as_one_process_lists_them(dump: Run, run: Run, world: World) -> None:
    """Bad headers, bad values under a good header (their neighbours keep their places), and a teacher's refusals."""
    several_lengths(world)
    files = world.permitted()
    world.feature(files[3]).write_bytes(b"no array")
    world.feature(files[8]).unlink()
    world.write_feature(files[11], np.full((12, 20), np.inf, np.float32))
    world.write_feature(files[14], np.zeros((12, 21), np.float32))
    picky = ("--teacher", "picky=tiny_teachers:picky", "--only", "picky", *SLOTTED)
    arguments = (*picky, "--batch-size", 4, "--on-bad-sample", "skip")
    assert dump(*arguments, "--num-verify", 0).exit_code == 3
    expected, index = taken(world.cache)
    assert set(index["kd_cache"]["missing"]) > {files[3], files[8], files[11], files[14]}

    for part in ("2/3", "0/3", "1/3"):
        dump(*arguments, "--shard", part)
    result = run("seal", "--target", "b", "--json")

    assert result.exit_code == 3, result.stderr
    assert permanent(world.cache) == expected
    assert told(world.cache) == index
    assert json.loads(result.stdout)["missing"] == index["kd_cache"]["missing"]


@pytest.mark.parametrize("parts", [["0/3", "1/3", "2/3"], ["2/5", "2/5", "4/5", "1/5", "0/5", "3/5"]])
def test_the_cost_of_half_precision_is_that_of_one_process(dump: Run, run: Run, world: World, parts: list[str]) -> None:
    dump("--dtype", "fp16")
    files, index = taken(world.cache)

    for part in parts:
        assert dump("--dtype", "fp16", "--shard", part).exit_code == 0
    assert run("seal", "--target", "b").exit_code == 0

    assert permanent(world.cache) == files
    found = told(world.cache)
    for name in ("tiny", "other"):
        costs = [entry["kd_cache"]["teachers"][name].pop("storage_cost") for entry in (index, found)]
        assert costs[0].keys() == costs[1].keys() == {"rows", "kl_mean", "kl_max", "argmax_flips"}
        assert costs[0]["rows"] == costs[1]["rows"] == 20
        assert costs[0]["argmax_flips"] == costs[1]["argmax_flips"]
        assert costs[0]["kl_max"] == pytest.approx(costs[1]["kl_max"], rel=1e-12)
        assert 0 < costs[0]["kl_mean"] == pytest.approx(costs[1]["kl_mean"], rel=1e-12)
    assert found == index


def test_a_dump_of_everything_takes_up_what_parts_committed(cached: World, dump: Run, world: World) -> None:
    files, index = taken(world.cache)

    dump("--shard", "1/3")
    result = dump("--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["samples_scored"] == 13
    assert permanent(world.cache) == files
    assert told(world.cache) == index


# -- what a part does and leaves --------------------------------------------------------------------------------------


def test_a_part_writes_packs_a_plan_its_record_the_samples_and_nothing_else(dump: Run, world: World) -> None:
    result = dump("--shard", "1/4")
    assert result.exit_code == 0
    names = sorted(snapshot(world.cache))
    assert [name.split("/")[0] for name in names] == ["packs", "packs", "pending", "pending", "plan.json"]
    assert not list(world.cache.rglob("*.npy"))
    assert "kd-cache seal --target b" in result.stdout


def test_a_part_scores_its_samples_and_no_other(dump: Run, world: World) -> None:
    """Together every one once; each of 20 / 3 samples, rounded either way."""
    seen: list[str] = []
    for part in ("0/3", "1/3", "2/3"):
        result = dump("--shard", part, "--json")
        content = json.loads(result.stdout)
        assert content["permitted"] == 20
        assert content["part_size"] == content["samples_scored"] in (6, 7)
        mine = [file for path in _packs(world, "tiny") for file in open_pack(path).files if file not in seen]
        assert len(mine) == content["part_size"]
        seen += mine
    assert sorted(seen) == sorted(world.permitted())


def _packs(world: World, teacher: str) -> list[Path]:
    return sorted((world.cache / "packs").glob(f"{teacher}-*.h5"))


def test_a_part_that_is_empty_succeeds_and_says_that_it_ran(dump: Run, world: World) -> None:
    result = dump("--shard", "0/40")
    assert result.exit_code == 0
    assert sorted(path.parent.name for path in world.cache.rglob("*") if path.is_file()) == ["pending"]
    (record,) = read_pending(CacheFolder(world.cache))[0]
    assert record.record["part"] == [0, 40]


def test_a_part_that_is_done_leaves_one_pack_per_teacher_and_those_of_others_alone(dump: Run, world: World) -> None:
    """Also of what it committed before it was stopped; a row of another feature stays beside it."""
    first = world.permitted()[0]
    feature = world.feature(first).read_bytes()
    world.write_feature(first, np.ones((12, 20), np.float32))
    dump("--shard", "0/2", "--shard-size", 1, "--batch-size", 1)
    before = world.packs()
    assert len(before) == 2
    world.feature(first).write_bytes(feature)
    dump("--shard", "1/2", "--shard-size", 1, "--batch-size", 1)
    dump("--shard", "0/1", "--dry-run")
    assert before.items() < world.packs().items()
    assert len(world.packs()) == 4
    dump("--shard", "0/2")
    assert before.items() < world.packs().items()
    assert len(world.packs()) in (4, 6)  # whichever part that sample is of


def test_a_part_leaves_the_index_and_its_readers_alone(cached: World, run: Run, world: World) -> None:
    """New samples, one that is no longer permitted, and other weights: nothing of it shows before a seal."""
    before = snapshot(world.cache)
    files = world.permitted()
    opened = LogitCache.open(world.cache)
    expected = opened.tensor(files=files).clone()
    new = [world.add(number, "A", "train") for number in range(50, 55)]
    gone = world.rows.pop(0)["file"]
    world.write()
    weights = world.root / "weights.txt"
    weights.write_text("7")
    teachers = ("--teacher", f"tiny=tiny_teachers:linear,ckpt={weights}", "--teacher", "other=tiny_teachers:other")
    command = ("dump", "--target", "b", "--json-path", world.json_path, *teachers, "--only", "tiny", "--only", "other")

    for part in ("0/2", "1/2"):
        assert run(*command, "--shard", part).exit_code == 0

    now = snapshot(world.cache)
    assert before.items() < now.items()
    assert {name.split("/")[0] for name in now.keys() - before.keys()} == {"packs", "pending"}
    for cache in (opened, LogitCache.open(world.cache)):
        assert torch.equal(cache.tensor(files=files), expected)
        assert sorted(cache.files) == sorted(files)
    assert run("seal", "--target", "b").exit_code == 0
    sealed = LogitCache.open(world.cache)
    assert sorted(sealed.files) == sorted([*world.permitted()])
    assert set(new) < set(sealed.files)
    assert gone not in sealed.files
    kept = [file for file in files if file != gone]
    assert torch.equal(sealed.tensor(["other"], kept), expected[[files.index(file) for file in kept], 1:])
    assert not torch.equal(sealed.tensor(["tiny"], kept), expected[[files.index(file) for file in kept], :1])


def test_a_part_that_can_read_nothing_lists_it_all_as_missing_and_is_sealed(dump: Run, run: Run, world: World) -> None:
    """Of many small parts one may have but bad samples; that is no reason to be unable to finish."""
    bad = world.permitted()[7]
    world.feature(bad).write_bytes(b"no array")
    codes = [dump("--shard", f"{number}/20", "--on-bad-sample", "skip").exit_code for number in range(20)]
    assert sorted(codes) == [0] * 19 + [3]
    result = run("seal", "--target", "b", "--json")
    assert result.exit_code == 3, result.stderr
    assert list(json.loads(result.stdout)["missing"]) == [bad]
    assert sorted(LogitCache.open(world.cache).files) == sorted(set(world.permitted()) - {bad})


def test_a_wrong_data_root_is_noticed_by_every_part_and_by_the_seal(
    cached: World, dump: Run, run: Run, world: World
) -> None:
    """Everything missing at once means that the features are elsewhere; the cache must not lose its rows for that."""
    before = snapshot(world.cache)
    nowhere = ("--data-root", world.root / "nowhere", "--on-bad-sample", "skip")
    (world.root / "nowhere").mkdir()
    codes = [dump(*nowhere, "--shard", part).exit_code for part in ("0/2", "1/2")]
    assert set(codes) <= {1, 3}
    result = run("seal", "--target", "b", "--data-root", world.root / "nowhere")
    assert result.exit_code == 1
    assert "--data-root" in result.stderr
    assert before.items() <= snapshot(world.cache).items()


def test_a_bad_sample_stops_its_own_part_alone(dump: Run, run: Run, world: World) -> None:
    """The header is good, or the plan could not be made."""
    bad = world.permitted()[5]
    world.write_feature(bad, np.full((12, 20), np.nan, np.float32))
    results = [dump("--shard", part) for part in ("0/2", "1/2")]
    assert sorted(result.exit_code for result in results) == [0, 1]
    assert bad in "".join(result.stderr for result in results)
    result = run("seal", "--target", "b")
    assert result.exit_code == 1
    assert bad in result.stderr
    assert not (world.cache / "cache_index.json").exists()


def test_all_parts_score_by_the_first_ones_plan(dump: Run, run: Run, world: World) -> None:
    dump(*SLOTTED, "--batch-size", 4)
    files, index = taken(world.cache)
    assert dump(*SLOTTED, "--batch-size", 4, "--shard", "0/2").exit_code == 0
    result = dump(*SLOTTED, "--batch-size", 8, "--shard", "1/2")
    assert "batch size stays 4" in result.stderr
    assert run("seal", "--target", "b").exit_code == 0
    assert permanent(world.cache) == files
    assert told(world.cache)["kd_cache"]["plan"] == index["kd_cache"]["plan"]


def test_a_dry_run_of_a_part_counts_its_samples_and_writes_nothing(dump: Run, world: World) -> None:
    result = dump("--shard", "2/3", "--dry-run", "--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert (content["part_size"], content["samples_scored"], content["permitted"]) == (7, 7, 20)
    assert content["bytes"] == 7 * 2 * 10 * 4
    assert not world.cache.exists()


def test_a_part_cannot_score_again_what_is_fresh(dump: Run, world: World) -> None:
    dump("--shard", "0/2")
    before = snapshot(world.cache)
    result = dump("--shard", "1/2", "--no-skip-existing")
    assert result.exit_code == 2
    assert "--no-skip-existing" in result.stderr
    assert snapshot(world.cache) == before


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0), (5, 3)])
def test_a_part_that_does_not_exist_is_refused_before_anything_is_written(
    world: World, monkeypatch: pytest.MonkeyPatch, part: tuple[int, int]
) -> None:
    monkeypatch.chdir(world.root)
    job = DumpJob(Path("cache"), world.data(), {"tiny": Linear(1)}, torch.device("cpu"), part=part)
    for start in (dump_logits, plan_dump):
        with pytest.raises(UsageError, match=f"part {part[0]} of {part[1]} does not exist"):
            start(job)
    assert not world.cache.exists()


# -- which part -------------------------------------------------------------------------------------------------------

BAD_TEXTS = [
    "2/2",
    "3/2",
    "-1/2",
    "1",
    "a/b",
    "0/0",
    "1/0",
    "0/2/4",
    " 0/2",
    "0/2 ",
    "0/2\n",
    "0 / 2",
    "",
    "/",
    "1/",
    "/2",
]
BAD_TEXTS += ["0x0/2", "1e0/2", "0.0/2", "+0/2", "٠/٢", "²/³", "1_0/20", "9999999999/99999999999", "0/2\x1b[31m"]


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_a_text_that_names_no_part_is_refused_before_anything_is_read(run: Run, tmp_path: Path, text: str) -> None:
    result = run("dump", "--target", "b", "--json-path", tmp_path / "absent.json", "--shard", text)
    assert result.exit_code == 2
    assert "--shard" in result.stderr
    assert "\x1b" not in result.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [("0/2", (0, 2)), ("1/2", (1, 2)), ("007/010", (7, 10)), ("999999998/999999999", (999999998, 999999999))],
)
def test_a_text_names_a_part(text: str, part: tuple[int, int]) -> None:
    assert part_of(text) == (part, "--shard")


ARRAY = "SLURM_ARRAY_TASK_"

NAMED: dict[str, tuple[dict[str, str], tuple[int, int] | None]] = {
    "nothing": ({}, None),
    "torchrun": ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
    "torchrun, one process": ({"RANK": "0", "WORLD_SIZE": "1"}, None),
    "a rank of nothing": ({"RANK": "3"}, None),
    "slurm": ({ARRAY + "ID": "2", ARRAY + "COUNT": "4"}, (2, 4)),
    "slurm, --array=1-4": ({ARRAY + "ID": "4", ARRAY + "COUNT": "4", ARRAY + "MIN": "1", ARRAY + "STEP": "1"}, (3, 4)),
    "slurm, --array=0-15:5": (
        {ARRAY + "ID": "10", ARRAY + "COUNT": "4", ARRAY + "MIN": "0", ARRAY + "STEP": "5", ARRAY + "MAX": "15"},
        (2, 4),
    ),
    "slurm, --array=7": ({ARRAY + "ID": "7", ARRAY + "COUNT": "1", ARRAY + "MIN": "7", ARRAY + "STEP": "1"}, None),
    "slurm, --array=3-9:3": (
        {ARRAY + "ID": "9", ARRAY + "COUNT": "3", ARRAY + "MIN": "3", ARRAY + "STEP": "3"},
        (2, 3),
    ),
    "torchrun, one process in each job of an array": (
        {"RANK": "0", "WORLD_SIZE": "1", ARRAY + "ID": "2", ARRAY + "COUNT": "3"},
        (2, 3),
    ),
    "torchrun in an array of one": ({"RANK": "1", "WORLD_SIZE": "2", ARRAY + "ID": "0", ARRAY + "COUNT": "1"}, (1, 2)),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_environment_names_the_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, part = NAMED[name]
    _set(monkeypatch, variables)
    assert part_of("env")[0] == part
    assert part_of("0/1") == (None, "--shard")
    assert part_of("3/7") == ((3, 7), "--shard")


CONTRADICTORY: dict[str, dict[str, str]] = {
    "both": {"RANK": "0", "WORLD_SIZE": "2", ARRAY + "ID": "0", ARRAY + "COUNT": "2"},
    "a rank that is none": {"RANK": "4", "WORLD_SIZE": "4"},
    "no number": {"RANK": "one", "WORLD_SIZE": "4"},
    "an empty rank": {"RANK": "", "WORLD_SIZE": "4"},
    "a negative rank": {"RANK": "-1", "WORLD_SIZE": "4"},
    "no processes": {"RANK": "0", "WORLD_SIZE": "0"},
    "no tasks": {ARRAY + "ID": "0", ARRAY + "COUNT": "0"},
    "no number of a task": {ARRAY + "ID": "x", ARRAY + "COUNT": "2"},
    "an endless number": {"RANK": "0", "WORLD_SIZE": "9" * 5000},
    "below the first": {ARRAY + "ID": "0", ARRAY + "COUNT": "2", ARRAY + "MIN": "1"},
    "between the steps": {ARRAY + "ID": "4", ARRAY + "COUNT": "3", ARRAY + "MIN": "0", ARRAY + "STEP": "3"},
    "--array=1,3,7": {ARRAY + "ID": "7", ARRAY + "COUNT": "3", ARRAY + "MIN": "1", ARRAY + "STEP": "1"},
    "--array=1,3,7, the second": {ARRAY + "ID": "3", ARRAY + "COUNT": "3", ARRAY + "MIN": "1", ARRAY + "MAX": "7"},
    "--array=1,3,7, the first": {ARRAY + "ID": "1", ARRAY + "COUNT": "3", ARRAY + "MIN": "1", ARRAY + "MAX": "7"},
}


@pytest.mark.parametrize("name", CONTRADICTORY)
def test_an_environment_that_contradicts_itself_is_refused_unless_the_part_is_said(
    name: str, run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, CONTRADICTORY[name])
    result = run("dump", "--target", "b", "--json-path", world.root / "absent.json", "--shard", "env")
    assert result.exit_code == 2
    assert "RANK" in result.stderr or "WORLD_SIZE" in result.stderr or "array" in result.stderr.lower()
    assert part_of("0/1") == (None, "--shard")
    assert part_of("1/2") == ((1, 2), "--shard")


@pytest.mark.parametrize("name", ["RANK", "SLURM_ARRAY_TASK_ID"])
@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_a_launcher_alone_makes_no_part(
    name: str, quiet: tuple[str, ...], run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array over targets would dump a fifth of each."""
    _set(monkeypatch, {name: "0", "WORLD_SIZE": "5", ARRAY + "COUNT": "5"})
    result = run("dump", "--target", "b", "--json-path", world.json_path, *quiet)
    assert result.exit_code == 2
    assert "--shard env" in result.stderr
    assert "--shard 0/1" in result.stderr
    assert not world.cache.exists()


def _set(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("by", [{"RANK": "1", "WORLD_SIZE": "3", "KD_CACHE_SHARD": "env"}, {"KD_CACHE_SHARD": "1/3"}])
def test_a_part_named_by_the_environment_is_the_one_that_is_scored(
    dump: Run, world: World, monkeypatch: pytest.MonkeyPatch, by: dict[str, str]
) -> None:
    dump("--shard", "1/3")
    packs = world.packs()
    shutil.rmtree(world.cache)
    _set(monkeypatch, by)
    result = dump()
    assert result.exit_code == 0
    assert "part 1 of 3" in result.stderr
    assert world.packs() == packs
    assert not (world.cache / "cache_index.json").exists()


def test_which_part_it_was_is_no_setting_of_the_cache(dump: Run, run: Run, world: World) -> None:
    for part in ("0/2", "1/2"):
        dump("--shard", part)
    run("seal", "--target", "b")
    record = json.loads((world.cache / "cache_index.json").read_bytes())["kd_cache"]
    assert "part" not in record
    assert "shard" not in record["settings"]["values"]


def test_seal_and_verify_do_not_care_which_part_the_environment_names(
    dump: Run, run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("0/2", "1/2"):
        dump("--shard", part)
    _set(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "KD_CACHE_SHARD": "1/2"})
    assert run("seal", "--target", "b").exit_code == 0
    assert run("verify", "--target", "b", "--all", *TINY).exit_code == 0
