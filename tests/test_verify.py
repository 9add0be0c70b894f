"""The audit: every kind of damage is found, named and mapped to its exit status; nothing is changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, Run, World

from kd_cache.score.tolerance import agrees, deviation


@pytest.fixture
def verify(run: Run, dump: Run, world: World) -> Run:
    """Verify the dumped ``world``, with the user's own teachers at hand."""
    dump()

    def call(*args: object) -> Any:
        return run("verify", *TINY, *args)

    return call


def snapshot(world: World) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in world.root.rglob("*") if p.is_file()}


def test_a_good_cache_passes_in_words_and_in_json(verify: Run) -> None:
    result = verify("--n", 10)
    assert result.exit_code == 0
    assert "10/10 · 100.0 %" in result.stdout
    whole = json.loads(verify("--all", "--json").stdout)
    assert whole["exit_code"] == 0
    teacher = whole["caches"][0]["teachers"]["tiny"]
    assert (teacher["hits"], teacher["intact"], teacher["fresh"], teacher["view"]) == (20, 20, 20, 20)


def test_each_run_draws_other_samples_and_prints_the_seed_that_repeats_it(verify: Run, world: World) -> None:
    drawn = [json.loads(verify("--n", 5, "--json").stdout)["seed"] for _ in range(3)]
    assert len(set(drawn)) == 3
    assert str(drawn[0]) in verify("--n", 5, "--seed", drawn[0]).stdout
    # The same seed looks at the same samples: a gap is found each time or never.
    world.view("tiny", world.permitted()[0]).unlink()
    codes = {verify("--n", 10, "--seed", 7, "--json").exit_code for _ in range(3)}
    assert len(codes) == 1


def test_verify_changes_nothing(verify: Run, world: World) -> None:
    before = snapshot(world)
    verify("--all", "--recompute")
    world.view("tiny", world.permitted()[0]).unlink()
    verify("--all")
    after = snapshot(world)
    assert all(before[path] == content for path, content in after.items())


def test_a_feature_that_is_gone_is_unchecked_and_no_dump_can_heal_that(verify: Run, world: World) -> None:
    gone = world.permitted()[2]
    world.feature(gone).unlink()
    result = verify("--all", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)["caches"][0]["problems"]
    assert {(problem["kind"], problem["file"]) for problem in found} == {("unchecked", gone)}


def test_a_row_that_was_never_scored_is_missing_with_the_reason(run: Run, dump: Run, world: World) -> None:
    bad = world.permitted()[0]
    world.write_feature(bad, np.full((12, 20), np.nan, np.float32))
    assert dump("--on-bad-sample", "skip").exit_code == 3
    result = run("verify", *TINY, "--all")
    assert result.exit_code == 3
    assert "finite" in result.stdout


def test_another_teacher_behind_the_name_is_stale_and_the_part_is_named(run: Run, cached: World, world: World) -> None:
    result = run("verify", "--teacher", "tiny=tiny_teachers:other", *TINY[2:])
    assert result.exit_code == 5
    assert "weights" in result.stdout
    assert "architecture" not in result.stdout


def test_an_own_teacher_that_is_not_given_is_said_to_be_unchecked(run: Run, cached: World, world: World) -> None:
    result = run("verify")
    assert result.exit_code == 0
    assert "tiny: its fingerprint was not checked" in result.stderr
    result = run("verify", "--recompute", *TINY[:2])
    assert result.exit_code == 1
    assert "other: (all rows): it cannot be recomputed: it is your own; pass it with --teacher" in " ".join(
        result.stdout.split()
    )


def test_a_precision_or_dtype_other_than_dumped_is_stale(verify: Run) -> None:
    result = verify("--precision", "bf16", "--dtype", "fp16", "--json")
    assert result.exit_code == 5
    reasons = json.loads(result.stdout)["caches"][0]["problems"][0]["reason"]
    assert "precision: fp32 → bf16" in reasons
    assert "dtype: fp32 → fp16" in reasons


@pytest.mark.parametrize("options", [(), ("--dtype", "fp16"), ("--precision", "bf16"), ("--batch-size", 3)])
def test_recompute_is_bit_exact_on_the_same_machine(
    run: Run, dump: Run, world: World, options: tuple[str, ...]
) -> None:
    dump(*options)
    for which in ("--all",), ("--n", 7):
        report = json.loads(run("verify", *TINY, *which, "--recompute", "--json").stdout)
        assert report["exit_code"] == 0
        teacher = report["caches"][0]["teachers"]["tiny"]
        assert teacher["recomputed"] == teacher["bit_exact"] == teacher["checked"]


def test_a_moved_cache_and_moved_data_verify_with_their_new_paths(
    run: Run, cached: World, world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.root / "cache", tmp_path / "elsewhere" / "cache")
    shutil.copytree(world.root / "x", tmp_path / "data" / "x")
    shutil.copy(world.json_path, tmp_path / "data" / "manifest.json")
    shutil.rmtree(world.root / "x")
    world.json_path.unlink()
    assert run("verify", "--cache-root", tmp_path / "elsewhere" / "cache").exit_code == 2
    moved = ("--cache-root", tmp_path / "elsewhere" / "cache", "--json-path", tmp_path / "data" / "manifest.json")
    assert run("verify", *TINY, *moved, "--data-root", tmp_path / "data", "--all").exit_code == 0


def test_tolerance_is_relative_to_the_centred_row() -> None:
    row = np.array([100.0, 101.0, 102.0])
    assert agrees(row + 5e-6, row, "logits", 1e-5)  # a shift of all logits changes nothing
    assert not agrees(row + np.array([0, 0, 1e-4]), row, "logits", 1e-5)
    assert not agrees(row * np.nan, row, "logits", 1e-5)
    assert deviation(row + 7.0, row, "logits") < 1e-12
    assert deviation(np.array([0.5, 0.5]), np.array([0.4, 0.6]), "probs") == pytest.approx(1 / 6)


def test_half_precision_rows_may_differ_by_one_step_more() -> None:
    row = np.array([1.0, -1.0, 3.0], np.float16)
    assert agrees(np.nextafter(row, np.float16(9)), row, "logits", 1e-5)
    assert not agrees(row + np.float16(0.02), row * np.float16(1.02), "logits", 1e-5)


def test_the_dumps_seed_in_a_settings_file_does_not_fix_what_verify_draws(verify: Run, world: World) -> None:
    (world.root / "kd-cache.yaml").write_text("seed: 42\n")
    assert len({json.loads(verify("--n", 5, "--json").stdout)["seed"] for _ in range(3)}) == 3


def test_a_leaking_manifest_is_reported_even_where_there_is_no_cache(run: Run, world: World) -> None:
    world.add(60, "s5", "train")
    world.write()
    assert run("verify", "--target", "b", "--json-path", world.json_path).exit_code == 6
