"""``kd-cache info`` and what the command line shows."""

from __future__ import annotations

import json

import numpy as np
from conftest import Run, World

from kd_cache.cli.console import size


def test_info_tells_what_a_cache_holds_made_from_what_and_by_which_settings(run: Run, dump: Run, world: World) -> None:
    dump("--dtype", "fp16", "--seed", 7)
    shown = run("info").stdout
    for fact in ("tiny", "other", "linear/1", "10 logits, fp16", str(world.json_path), "12 of A, 8 of b", "seed=7"):
        assert fact in shown
    content = json.loads(run("info", "cache/A2b", "--json").stdout)["caches"][0]
    assert json.loads(run("info", "--target", "b", "--json").stdout)["caches"] == [content]
    missing = run("info", "--target", "b,c")
    assert (missing.exit_code, "A2c" in missing.stderr) == (3, True)
    assert "is a cache itself" in run("info", "cache/A2b", "--target", "b").stderr
    assert content["num_samples"] == 20
    assert content["settings"]["values"]["seed"] == 7
    assert content["settings"]["sources"]["seed"] == "commandline"
    assert len(content["settings"]["sha256"]) == 64
    assert content["environment"]["torch"]
    assert content["teachers"]["tiny"]["parts"]["precision"] == "fp32"
    assert content["teachers"]["tiny"]["storage_cost"]["rows"] == 20


def test_what_a_user_runs_is_never_written_into_a_cache(run: Run, cached: World, world: World) -> None:
    assert "tiny_teachers" not in (world.cache / "cache_index.json").read_text()
    for pack in world.packs().values():
        assert b"tiny_teachers" not in pack


def test_debug_shows_the_traceback_that_is_hidden_otherwise(run: Run, world: World) -> None:
    import pytest

    from kd_cache import ManifestError

    assert run("dump", "--target", "b", "--json-path", "nowhere.json").exit_code == 2
    with pytest.raises(ManifestError):
        run("dump", "--target", "b", "--json-path", "nowhere.json", "--debug")


def test_an_unexpected_error_is_one_line_and_exit_1(run: Run, dump: Run, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import kd_cache.cli.dump

    def surprise(*_: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(kd_cache.cli.dump, "dump_logits", surprise)
    result = dump()
    assert result.exit_code == 1
    assert "unexpected ZeroDivisionError: surprise" in result.stderr
    assert "--debug" in result.stderr


def test_a_path_that_the_system_refuses_is_named(run: Run, world: World) -> None:
    result = run("info", "x" * 300)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"error: cannot use {'x' * 300}: File name too long" in result.stderr
    assert "unexpected" not in result.stderr


def test_bytes_are_shown_for_a_person() -> None:
    assert [size(count) for count in (0, 999, 1000, 2_500_000, 7_000_000_000)] == [
        "0 B",
        "999 B",
        "1.0 KB",
        "2.5 MB",
        "7.0 GB",
    ]


def test_info_tells_how_good_the_rows_are_and_what_is_not_sealed(
    cached: World, dump: Run, run: Run, world: World
) -> None:
    record = json.loads(run("info", world.cache, "--json").stdout)["caches"][0]
    kept = record["teachers"]["tiny"]["accuracy"]
    labels = {
        row["file"]: row["scene_label"] for row in world.rows if row["device_id"] == "A" and row["split"] == "train"
    }
    right = sum(int(np.load(world.view("tiny", file)).argmax() == label) for file, label in labels.items())
    assert kept == {"correct": right, "rows": len(labels)}
    shown = run("info", world.cache).stdout
    assert f"{100 * right / len(labels):.2f} % of {len(labels)} labelled source rows" in shown
    assert "not sealed" not in shown
    world.add(60, "A", "train")
    world.write()
    assert dump("--shard", "0/1").exit_code == 0
    assert dump("--shard", "1/2").exit_code == 0
    assert "dumps begun and not sealed: 1" in run("info", world.cache).stdout
