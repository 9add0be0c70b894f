"""The dump: what is scored, skipped, rescored, dropped and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Run, World
from tiny_teachers import Linear

import kd_cache.score.dump as dump_module
import kd_cache.store.index as index_module
from kd_cache import LogitCache
from kd_cache.keys import sample_key
from kd_cache.store.pack import open_pack
from kd_cache.store.union import Union


def report(result: object) -> dict:  # type: ignore[type-arg]
    return json.loads(result.stdout)  # type: ignore[attr-defined]


def expected(world: World, file: str, seed: int = 1) -> np.ndarray:
    """The reference: the teacher applied to one sample, straight from its file."""
    array = torch.from_numpy(np.load(world.feature(file)).astype(np.float32))
    return Linear(seed)(array[None])[0].numpy()


def test_every_permitted_sample_gets_its_own_logits(dump: Run, world: World) -> None:
    result = dump("--json")
    assert result.exit_code == 0, result.output
    index = json.loads((world.cache / "cache_index.json").read_text())
    assert list(index["tiny"]) == world.permitted()
    assert index["num_samples"] == 20
    for file, path in index["tiny"].items():
        assert path == f"cache/A2b/tiny/{sample_key(file)}.npy"
        np.testing.assert_allclose(np.load(path), expected(world, file), rtol=1e-6, atol=1e-6)
    for file, path in index["other"].items():
        np.testing.assert_allclose(np.load(path), expected(world, file, seed=2), rtol=1e-6, atol=1e-6)


def test_a_second_dump_scores_nothing_and_says_so(cached: World, dump: Run, world: World) -> None:
    before = world.packs()
    again = dump()
    assert "Nothing to score" in again.stdout
    assert world.packs() == before
    counts = report(dump("--json"))["teachers"]["tiny"]
    assert (counts["scored"], counts["skipped"], counts["rescored"]) == (0, 20, {})


@pytest.mark.parametrize("name", ["mean", "Fit", "ce_only"])
def test_no_new_teacher_is_called_like_a_way_to_join_them_and_an_earlier_one_stays(
    dump: Run, world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    named = ("--teacher", f"{name}=tiny_teachers:linear", "--only", name)
    refused = dump(*named)
    assert (refused.exit_code, world.cache.exists()) == (2, False)
    assert f"no teacher may be called {name}" in refused.stderr
    with monkeypatch.context() as before:
        before.setattr("kd_cache.score.existing.refuse_mode", lambda *_: None)
        assert dump(*named).exit_code == 0
    assert "Nothing to score" in dump(*named).stdout


def test_every_feature_is_read_once_whatever_the_number_of_teachers(
    dump: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd_cache.dataset.features import FeatureSource

    reads: list[str] = []
    read = FeatureSource.read
    monkeypatch.setattr(FeatureSource, "read", lambda self, file: (reads.append(file), read(self, file))[1])
    assert dump("--num-verify", 0).exit_code == 0
    assert sorted(reads) == sorted(world.permitted())


@pytest.mark.parametrize("workers", [0, 1, 5])
@pytest.mark.parametrize("batch", [4, 32])
def test_bytes_do_not_depend_on_workers_or_shards(dump: Run, world: World, workers: int, batch: int) -> None:
    dump("--batch-size", batch)
    reference = world.packs()
    shutil.rmtree(world.cache)
    dump("--batch-size", batch, "--workers", workers, "--shard-size", 3)
    assert world.packs() == reference


def test_bytes_do_not_depend_on_which_rows_were_already_there(dump: Run, world: World) -> None:
    dump("--batch-size", 4)
    reference = world.packs()
    shutil.rmtree(world.cache)
    rows = world.rows
    world.rows = rows[::-1]  # another order, …
    world.write()
    dump("--batch-size", 4, "--only", "tiny")  # … and one teacher before the other
    dump("--batch-size", 4)
    assert world.packs() == reference


def test_the_last_batch_is_padded_to_the_planned_size(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_BATCHES", str(tmp_path / "batches"))
    args = ("--teacher", "count=tiny_teachers:counting", "--only", "count", "--batch-size", 8)
    run("dump", "--target", "b", "--json-path", world.json_path, *args)
    # 8 + 4 samples of 12 frames, 4 of 16, 4 of 24: full batches of 8, 4 and 4. The first is scored again in the same
    # company, in another and alone, to see whether a row depends on that.
    tested = ["1x12", "8x12", "8x12"]
    assert sorted((tmp_path / "batches").read_text().split()) == sorted([*tested, "4x16", "4x24", "8x12", "8x12"])


def test_a_changed_feature_alone_is_rescored(cached: World, dump: Run, world: World) -> None:
    changed = world.permitted()[3]
    world.write_feature(changed, np.ones((12, 20), np.float32))
    counts = report(dump("--json"))["teachers"]["tiny"]
    assert counts["rescored"] == {"its feature changed": 1}
    assert counts["skipped"] == 19
    np.testing.assert_allclose(np.load(world.view("tiny", changed)), expected(world, changed), rtol=1e-5, atol=1e-6)


def test_another_checkpoint_makes_only_that_teacher_stale_and_the_reason_is_named(
    run: Run, world: World, tmp_path: Path
) -> None:
    weights = tmp_path / "seed.txt"
    weights.write_text("1")
    teachers = (
        "--teacher",
        f"tiny=tiny_teachers:linear,ckpt={weights}",
        *TINY[2:],
        "--only",
        "tiny",
        "--only",
        "other",
    )
    args = ("dump", "--target", "b", "--json-path", world.json_path, *teachers, "--json")
    run(*args)
    weights.write_text("5")
    counts = report(run(*args))["teachers"]
    assert counts["tiny"]["rescored"] == {"weights changed": 20}
    assert counts["other"]["skipped"] == 20
    weights.write_text("1")  # back to the first: its pack is still there and fresh
    assert report(run(*args))["teachers"]["tiny"]["skipped"] == 20


@pytest.mark.parametrize("option", [("--dtype", "fp16"), ("--precision", "bf16")])
def test_another_dtype_or_precision_makes_rows_stale(
    cached: World, dump: Run, world: World, option: tuple[str, str]
) -> None:
    counts = report(dump("--json", *option))["teachers"]["tiny"]
    assert counts["rescored"] == {f"{option[0].removeprefix('--')} changed": 20}


def test_no_skip_existing_rescores_everything(cached: World, dump: Run, world: World) -> None:
    before = world.packs()
    counts = report(dump("--no-skip-existing", "--json"))["teachers"]["tiny"]
    assert counts["rescored"] == {"asked for": 20}
    assert world.packs() == before  # the same numbers, so the same bytes under the same name


def test_no_skip_existing_replaces_what_another_batch_shape_computed(dump: Run, world: World) -> None:
    dump("--batch-size", 4)
    dump("--no-skip-existing", "--batch-size", 2)
    again = world.packs()
    shutil.rmtree(world.cache)
    dump("--batch-size", 2)
    assert world.packs() == again


def test_the_batch_size_of_a_begun_cache_stays(dump: Run, world: World) -> None:
    dump("--batch-size", 4)
    reference = world.packs()
    file = world.permitted()[0]
    original = world.feature(file).read_bytes()
    world.write_feature(file, np.zeros((12, 20), np.float32))
    assert "the batch size stays 4" in dump("--batch-size", 16).stderr
    world.feature(file).write_bytes(original)
    dump("--batch-size", 16)
    assert world.packs() == reference


def test_a_sample_that_is_no_longer_permitted_leaves_packs_view_and_index(
    cached: World, dump: Run, world: World
) -> None:
    """Superseded packs too: those of another precision."""
    dump("--dtype", "fp16")
    gone = world.permitted()[0]
    world.rows = [row for row in world.rows if row["file"] != gone]
    world.write()
    result = report(dump("--dtype", "fp16", "--json"))
    assert result["teachers"]["tiny"]["dropped"] == 1
    assert not world.view("tiny", gone).exists()
    assert gone not in (world.cache / "cache_index.json").read_text()
    for path in (world.cache / "packs").iterdir():
        assert gone not in open_pack(path).files


def test_no_files_leaves_the_view_out_and_files_brings_it_back(dump: Run, world: World) -> None:
    dump("--no-files")
    index = json.loads((world.cache / "cache_index.json").read_text())
    assert index["tiny"] == {}
    assert not (world.cache / "tiny").exists()
    dump()
    assert len(list((world.cache / "tiny").glob("*.npy"))) == 20
    dump("--no-files")
    assert not list((world.cache / "tiny").glob("*.npy"))


def test_an_index_that_no_reader_would_take_is_refused_before_anything_is_scored(
    dump: Run, run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as smaller:
        smaller.setattr(index_module, "_MOST", 3000)
        result = dump("--files")
    assert (result.exit_code, list(world.cache.rglob("*.h5"))) == (1, [])
    assert "expected at most 3000" in result.stderr
    assert "--no-files" in result.stderr
    assert [dump("--shard", part).exit_code for part in ("0/2", "1/2")] == [0, 0]
    seal = ("seal", "--target", "b", "--json-path", world.json_path)
    for most, rows in ((3000, 0), (5300, 20)):  # too long for its rows' paths alone; with all else that it says
        with monkeypatch.context() as smaller:
            smaller.setattr(index_module, "_MOST", most)
            assert run(*seal).exit_code == 1
        assert len(list(world.cache.glob("tiny/*.npy"))) == rows
    assert not (world.cache / "cache_index.json").exists()
    assert run(*seal, "--no-files").exit_code == 0
    assert len(LogitCache.open(world.cache)) == 20


def test_from_a_million_samples_on_a_view_is_written_only_where_it_is_asked_for(
    dump: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump_module, "VIEW_BELOW", 20)
    result = dump()
    assert result.exit_code == 0, result.stderr
    assert "no .npy files are written: from 20 samples on only with --files" in result.stderr
    assert not (world.cache / "tiny").exists()
    assert dump("--files").exit_code == 0
    assert dump().exit_code == 0, "there is a view: it stays"
    assert len(list((world.cache / "tiny").glob("*.npy"))) == 20


def test_a_cache_of_the_older_script_stops_the_dump_and_stays_as_it_was(dump: Run, world: World) -> None:
    (world.cache / "tiny").mkdir(parents=True)
    file = world.permitted()[0]
    np.save(world.view("tiny", file), np.zeros(10, np.float32))
    index = world.cache / "cache_index.json"
    index.write_text(json.dumps({"tiny": {file: str(world.view("tiny", file))}, "num_samples": 1}))
    result = dump()
    assert result.exit_code == 5
    assert "adopt" in result.stderr
    assert "--no-skip-existing" in result.stderr
    assert len(list(world.cache.rglob("*"))) == 3
    assert dump("--no-skip-existing").exit_code == 0
    np.testing.assert_allclose(np.load(world.view("tiny", file)), expected(world, file), rtol=1e-6, atol=1e-6)


def test_a_changed_feature_drops_the_row_of_a_teacher_that_was_not_asked(run: Run, cached: World, world: World) -> None:
    changed = world.permitted()[0]
    world.write_feature(changed, np.ones((12, 20), np.float32))
    run("dump", "--target", "b", "--json-path", world.json_path, *TINY[:2], "--only", "tiny")
    index = json.loads((world.cache / "cache_index.json").read_text())
    assert changed in index["tiny"]
    assert changed not in index["other"]
    assert not world.view("other", changed).exists()


def test_dry_run_counts_and_changes_nothing(dump: Run, world: World) -> None:
    planned = report(dump("--dry-run", "--json"))
    assert planned["samples_scored"] == 20
    assert planned["bytes"] == 20 * 2 * 10 * 4
    assert not (world.root / "cache").exists()
    dump()
    world.write_feature(world.permitted()[0], np.ones((12, 20), np.float32))
    before = {path: path.stat().st_mtime_ns for path in world.cache.rglob("*")}
    planned = report(dump("--dry-run", "--json"))
    assert planned["teachers"]["tiny"]["rescored"] == {"its feature changed": 1}
    assert planned["teachers"]["tiny"]["skipped"] == 19
    assert {path: path.stat().st_mtime_ns for path in world.cache.rglob("*")} == before
    assert report(dump("--dry-run", "--no-skip-existing", "--json"))["samples_scored"] == 20


def test_fp16_reports_its_cost_as_torch_measures_it(dump: Run, world: World) -> None:
    cost = report(dump("--use-fp16", "--json"))["teachers"]["tiny"]["storage_cost"]
    exact = torch.from_numpy(np.stack([expected(world, file) for file in world.permitted()])).double()
    stored = torch.from_numpy(np.stack([np.load(world.view("tiny", file)) for file in world.permitted()]))
    assert stored.dtype == torch.float16
    kl = torch.nn.functional.kl_div(
        stored.double().log_softmax(1), exact.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    assert cost["rows"] == 20
    assert cost["kl_mean"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert cost["kl_max"] == pytest.approx(kl.max().item(), rel=1e-3)
    assert cost["argmax_flips"] == int((stored.argmax(1) != exact.argmax(1)).sum())


BAD_TEACHERS = {
    "nan": "not finite",
    "wrong_shape": r"must return floating-point \[8, 10\]",
    "raises": "no such kernel",
    "unloadable": "my disk is gone",
    "no_fingerprint": "fingerprint_parts",
    "overflow": "do not fit fp16",
    "softmax": "not logits",
    "log_softmax": "not logits",
}


@pytest.mark.parametrize("factory", BAD_TEACHERS)
def test_a_teacher_that_breaks_its_contract_stops_with_the_reason(run: Run, world: World, factory: str) -> None:
    args = ("--teacher", f"bad=tiny_teachers:{factory}", "--only", "bad", "--batch-size", 8)
    dtype = ("--dtype", "fp16") if factory == "overflow" else ()
    result = run("dump", "--target", "b", "--json-path", world.json_path, *args, *dtype)
    assert result.exit_code == 1
    assert re.search(BAD_TEACHERS[factory], result.stderr), result.stderr
    if factory in ("nan", "wrong_shape", "overflow"):
        assert any(file in result.stderr for file in world.permitted())
    assert not (world.cache / "cache_index.json").exists()


def test_a_bad_feature_stops_with_its_name_and_keeps_what_was_scored(dump: Run, world: World) -> None:
    bad = world.permitted()[-1]
    array = np.load(world.feature(bad))
    array[3, 5] = np.nan
    world.write_feature(bad, array)
    result = dump("--shard-size", 1, "--batch-size", 2)
    assert result.exit_code == 1
    assert bad in result.stderr
    assert "frame 3, bin 5" in result.stderr
    assert world.packs("tiny")
    world.write_feature(bad, np.nan_to_num(array))
    counts = report(dump("--json"))["teachers"]["tiny"]
    assert counts["skipped"] > 0


def test_skip_lists_bad_samples_as_missing_and_exits_3(dump: Run, world: World) -> None:
    broken, absent, narrow = world.permitted()[:3]
    world.feature(broken).write_bytes(b"not a feature")
    world.feature(absent).unlink()
    world.write_feature(narrow, np.ones((12, 7), np.float32))
    result = dump("--on-bad-sample", "skip", "--json")
    assert result.exit_code == 3
    assert set(report(result)["missing"]) == {broken, absent, narrow}
    index = json.loads((world.cache / "cache_index.json").read_text())
    assert set(index["kd_cache"]["missing"]) == {broken, absent, narrow}
    assert index["num_samples"] == 17


def test_skip_lists_non_finite_logits_for_their_teacher_only(run: Run, world: World) -> None:
    args = ("--teacher", "bad=tiny_teachers:nan", *TINY[:2], "--only", "bad", "--only", "tiny")
    result = run("dump", "--target", "b", "--json-path", world.json_path, *args, "--on-bad-sample", "skip", "--json")
    assert result.exit_code == 3
    index = json.loads((world.cache / "cache_index.json").read_text())
    bad = {file for file in world.permitted() if np.load(world.feature(file))[0, 0] > 0.5}
    assert set(index["kd_cache"]["missing"]) == bad
    assert bad
    assert len(index["tiny"]) == 20
    assert set(index["bad"]) == set(world.permitted()) - bad


# What attacks found; each of these once lost rows, served wrong ones or blocked a cache.


def test_a_data_root_without_any_feature_leaves_the_cache_alone(
    cached: World, dump: Run, world: World, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in world.cache.rglob("*") if path.is_file()}
    (tmp_path / "unmounted").mkdir()
    result = dump("--data-root", tmp_path / "unmounted", "--on-bad-sample", "skip")
    assert result.exit_code == 1
    assert "none of the 20 features can be read" in result.stderr
    assert {path: path.read_bytes() for path in world.cache.rglob("*") if path.is_file()} == before


def test_rows_that_vanish_while_a_dump_publishes_are_an_error_and_the_index_stays(
    dump: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kd_cache.store.publish

    dump()
    index = (world.cache / "cache_index.json").read_bytes()
    world.add(70, "b", "train")
    world.write()
    merge = kd_cache.store.publish.merge_packs

    def damaged(directory: Path, union: Union, *wanted: np.ndarray, **unread: np.ndarray) -> object:
        return merge(directory, Union([pack for pack in union.packs if len(pack) > 1]), *wanted, **unread)

    monkeypatch.setattr(kd_cache.store.publish, "merge_packs", damaged)
    result = dump("--num-verify", 0)
    assert result.exit_code == 3
    assert "park" in result.stderr or "1 permitted samples have no row" in result.stderr
    assert (world.cache / "cache_index.json").read_bytes() == index
    monkeypatch.undo()


def only(world: World, name: str, *args: object) -> tuple[object, ...]:
    return ("dump", "--target", "b", "--json-path", world.json_path, *TINY, "--only", name, *args)


def test_a_damaged_index_does_not_forget_the_teachers_that_are_not_asked(run: Run, cached: World, world: World) -> None:
    index = world.cache / "cache_index.json"
    index.write_bytes(index.read_bytes()[:-40] + b"x" * 40)
    assert run(*only(world, "tiny")).exit_code == 0
    content = json.loads(index.read_text())
    assert set(content["kd_cache"]["teachers"]) == {"tiny", "other"}
    assert len(content["other"]) == 20


def test_rows_of_teachers_not_asked_for_stay_where_the_index_is_gone(run: Run, cached: World, world: World) -> None:
    """All but those of samples no longer permitted, whose files go too."""
    (world.cache / "cache_index.json").unlink()
    gone = world.permitted()[-1]
    next(row for row in world.rows if row["file"] == gone)["split"] = "test"
    world.write()
    assert run(*only(world, "tiny")).exit_code == 0
    assert set(LogitCache.open(world.cache, teachers=["other"]).files) == set(world.permitted())
    assert not world.view("other", gone).exists()
    np.save(world.view("other", gone), np.zeros(10, np.float32))
    assert run("verify", *TINY, "--all").exit_code == 6


def test_teachers_that_swap_their_weights_leave_no_forbidden_row_behind(run: Run, cached: World, world: World) -> None:
    gone = world.permitted()[-1]
    next(row for row in world.rows if row["file"] == gone)["split"] = "test"
    world.write()
    swapped = ("--teacher", "tiny=tiny_teachers:other", "--teacher", "other=tiny_teachers:linear")
    args = ("--json-path", world.json_path, *swapped)
    assert run("dump", "--target", "b", *args, "--only", "tiny", "--only", "other").exit_code == 0
    assert run("verify", *args, "--all").exit_code == 0


def test_another_number_of_bins_is_a_new_plan_for_a_new_teacher(run: Run, cached: World, world: World) -> None:
    for file in world.permitted():
        world.write_feature(file, np.ones((12, 40), np.float32))
    wide = ("--teacher", "tiny=tiny_teachers:wide", "--only", "tiny")
    assert run("dump", "--target", "b", "--json-path", world.json_path, *wide).exit_code == 0


def test_a_plan_that_is_a_fifo_is_made_anew(cached: World, dump: Run, world: World) -> None:
    world.add(81, "b", "train")
    world.write()
    (world.cache / "plan.json").unlink()
    os.mkfifo(world.cache / "plan.json")
    assert dump().exit_code == 0


def test_waiting_features_do_not_grow_with_the_data_set() -> None:
    from kd_cache.score.batcher import Batcher
    from kd_cache.score.device import numerics
    from kd_cache.score.engine import Engine
    from kd_cache.store.plan import Place

    cpu = torch.device("cpu")
    with numerics(cpu, "fp32", 1):
        batcher = Batcher(Engine({"tiny": Linear(1)}, cpu), most_samples=16)
        waiting, scored = 0, []
        for number in range(200):  # five samples of each of 40 lengths: no batch of eight ever fills
            array = np.zeros((number % 40 + 1, 20), np.float32)
            scored += batcher.add(number, array, frozenset({"tiny"}), Place(8, number // 40))
            waiting = max(waiting, number + 1 - sum(len(batch.numbers) for batch in scored))
        scored += batcher.finish()
    assert waiting <= 17
    assert sorted(number for batch in scored for number in batch.numbers) == list(range(200))


def test_ones_own_teacher_may_take_a_built_in_name(run: Run, world: World) -> None:
    args = ("--json-path", world.json_path, "--teacher", "scene=tiny_teachers:linear")
    assert run("dump", "--target", "b", *args, "--only", "scene").exit_code == 0
    assert run("verify", *args, "--recompute").exit_code == 0
    result = run("verify")
    assert (result.exit_code, "not checked" in result.stdout) == (0, True)


def test_a_home_folder_is_found_by_every_command(
    dump: Run, run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(world.root / "home"))
    (world.root / "kd-cache.yaml").write_text("cache_root: ~/caches\n")
    assert dump().exit_code == 0
    cache = world.root / "home" / "caches" / "A2b"
    assert (cache / "cache_index.json").is_file()
    assert run("verify", *TINY).exit_code == run("seal", "--target", "b").exit_code == run("gc").exit_code == 0
    assert run("info", "~/caches/A2b").exit_code == run("diff", "~/caches/A2b", "~/caches/A2b").exit_code == 0
    exported = run("export", "~/caches/A2b", "--to", "pt", "--output", "~/rows.pt")
    assert exported.exit_code == 0, exported.output
    assert (world.root / "home" / "rows.pt").exists()
    assert not (world.root / "~").exists()


def test_rescoring_a_finished_cache_in_several_shards_leaves_it_whole(run: Run, dump: Run, world: World) -> None:
    """Equal rows give packs of equal names: what is replaced must not go with what has just been written."""
    dump("--shard-size", 4)
    before = LogitCache.open(world.cache)
    rows = before.batch(before.files)
    for size in (4, 7, 4096):
        assert dump("--no-skip-existing", "--shard-size", size).exit_code == 0
        after = LogitCache.open(world.cache)
        assert after.files == before.files
        assert torch.equal(after.batch(after.files), rows)


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--workers", 0)])
def test_a_dump_names_all_missing_features_at_once(dump: Run, world: World, more: tuple[object, ...]) -> None:
    gone = world.permitted()[3:7]
    for file in gone:
        world.feature(file).unlink()
    result = dump(*more)
    assert result.exit_code == 1
    assert "4 of 20 features are missing under" in result.stderr
    assert all(file in result.stderr for file in gone)


def test_samples_that_were_left_out_are_not_said_to_be_saved(dump: Run, world: World) -> None:
    for file in world.permitted()[3:7]:
        world.feature(file).unlink()
    result = dump("--on-bad-sample", "skip")
    assert result.exit_code == 3
    assert "saved: 16/20 samples" in result.stderr
    assert "20/20" not in result.stderr


def test_rows_that_become_current_again_are_named(dump: Run, world: World) -> None:
    for args in ((), ("--dtype", "fp16"), ("--precision", "bf16")):
        dump(*args)
    back = ("precision: bf16 → fp32", "dtype: fp16 → fp32", "")
    for args, how in zip(((), ("--dtype", "fp16"), ("--dtype", "fp16")), back, strict=True):
        plan, done = dump(*args, "--dry-run"), dump(*args)
        assert ("would become current" in plan.stdout) == ("are current now" in done.stdout) == bool(how)
        assert ("Nothing to score" in done.stdout) == (not how)
        assert how.partition(" ")[0] in done.stderr
