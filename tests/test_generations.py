"""What readers are served is one generation, whole, until the next one stands; what writers do meanwhile is theirs."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, Run, World
from store_fixtures import DeadError, Rows, md5, name_in_index, named_packs

from kd_cache import LogitCache, MissingLogitsError, load_cached_logits_batch
from kd_cache.files import turns
from kd_cache.score.scoring import Scoring
from kd_cache.store.index import read_index, write_index
from kd_cache.store.pack import open_pack
from kd_cache.store.pending import Age
from kd_cache.store.publish import _Publication

SMALL = ("--shard-size", 1, "--batch-size", 2)
ONE = (*TINY[:2], "--only", "tiny")


@pytest.fixture
def one(run: Run, world: World) -> Run:
    """Dump ``world`` with the teacher ``tiny`` alone."""
    return lambda *args: run("dump", "--target", "b", "--json-path", world.json_path, *ONE, *args)


def served(world: World) -> dict[tuple[str, str], bytes]:
    """What readers are given, by teacher and file; each teacher has all rows that the index promises."""
    found = {}
    for name in read_index(world.cache / "cache_index.json").origins:
        cache = LogitCache.open(world.cache, [name], strict=True)
        found |= {(name, file): row.numpy().tobytes() for file, row in zip(cache.files, cache.tensor(), strict=True)}
    return found


def by_key(world: World) -> list[str]:
    """The permitted files in the order in which they are scored."""
    return sorted(world.permitted(), key=md5)


def away(world: World, files: list[str]) -> Callable[[], None]:
    """Move features out of reach; gives the way back."""
    for file in files:
        world.feature(file).rename(world.feature(file).with_suffix(".away"))
    return lambda: [world.feature(file).with_suffix(".away").rename(world.feature(file)) for file in files] and None


def another_root(world: World) -> list[object]:
    """A data root with features of the same names and other content; the last that is scored cannot be read."""
    root = world.root / "another"
    for number, file in enumerate(by_key(world)):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / file, np.full((12, 20), number, np.float32))
    (root / by_key(world)[-1]).write_bytes(b"no array")
    return ["--data-root", root]


# -- an unfinished dump takes nothing ----------------------------------------------------------------------------------


def test_what_an_unfinished_dump_committed_takes_no_row_from_readers(cached: World, dump: Run, world: World) -> None:
    """The wrong data root, stopped after its first commits."""
    before = served(world)
    assert dump(*another_root(world), *SMALL).exit_code == 1
    assert len(world.packs("tiny")) > 1
    assert served(world) == before
    counts = json.loads(dump("--json").stdout)["teachers"]
    assert {name: count["skipped"] for name, count in counts.items()} == {"tiny": 20, "other": 20}
    assert served(world) == before


DATA = ("--target", "b", "--json-path", "dataset.json")


@pytest.mark.parametrize("publishing", ["dump", "seal", "repair of a view", "repair of a row", "dump of less", "drop"])
def test_what_an_unfinished_dump_acknowledged_of_features_elsewhere_stays(
    cached: World, run: Run, dump: Run, world: World, publishing: str
) -> None:
    """Whatever is published meanwhile of the features here; then that dump goes on, and nothing is left over."""
    before = world.packs()
    elsewhere = another_root(world)
    assert dump(*elsewhere, *SMALL).exit_code == 1
    unfinished = world.packs().keys() - before.keys()
    acknowledged = {file for name in unfinished for file in open_pack(world.cache / "packs" / name).files}
    assert len(acknowledged) > 2
    if publishing == "dump of less":
        world.rows = [row for row in world.rows if row["file"] != min(acknowledged)]
        acknowledged.remove(min(acknowledged))
        world.write()
    if publishing == "repair of a view":
        world.view("tiny", by_key(world)[0]).unlink()
    if publishing == "repair of a row":
        name_in_index(forge_row(world.cache / "packs" / named(world, "other")))
    command, drop = publishing.split()[0], publishing == "drop"
    arguments = {"seal": ("--data-root", world.root), "repair": TINY}
    for _ in range(2):
        result = run(command, *DATA, *arguments[command]) if command in arguments else dump()
        assert result.exit_code == 0, result.output
    assert run("gc", world.cache, "--older-than", 0, *["--drop-unfinished"] * drop).exit_code == 0
    assert (unfinished <= world.packs().keys()) == (publishing not in ("dump of less", "drop"))
    np.save(elsewhere[1] / by_key(world)[-1], np.full((12, 20), 19, np.float32))  # type: ignore[operator]
    counts = json.loads(dump(*elsewhere, "--json").stdout)["teachers"]
    assert {count["skipped"] for count in counts.values()} == {0 if drop else len(acknowledged)}
    assert (len(world.packs()), pending(world)) == (2, [])


def test_rows_scored_twice_with_other_bits_are_told_of_and_the_named_packs_stay(
    cached: World, run: Run, dump: Run, world: World
) -> None:
    """A backup of another cache restored into the folder: the same teacher and features, other bits."""
    before = served(world)
    named = named_packs(world.cache / "cache_index.json")["tiny"]
    pack = open_pack(world.cache / "packs" / named)
    for seed in range(8):  # some of them come before the named pack by name
        rows = Rows(pack.files, pack.keys, pack.inputs, pack.logits + np.float32(1 + seed)).part(range(seed + 1))
        rows.write(pack.path.parent, pack.origin)
    assert min(world.packs("tiny")) < named
    told = run("verify", "--target", "b", *TINY, "--json")
    assert told.exit_code == 1
    assert "8 samples were scored twice with different bits" in told.stdout
    assert served(world) == before
    assert dump("--num-verify", 0).exit_code == 0
    assert served(world) == before
    assert run("verify", "--target", "b", *TINY).exit_code == 0


def test_a_wrong_row_in_a_pack_that_no_index_names_is_found_and_repaired(
    cached: World, run: Run, dump: Run, world: World
) -> None:
    assert dump(*another_root(world), *SMALL).exit_code == 1
    before = served(world)
    path = next(Path(world.cache, "packs", name) for name in world.packs("tiny") if name != named(world, "tiny"))
    forge_row(path)
    assert run("verify", "--target", "b", *TINY).exit_code == 4
    repaired = run("repair", "--target", "b", *TINY)
    assert repaired.exit_code == 0, repaired.output
    assert served(world) == before


def named(world: World, teacher: str) -> str:
    return named_packs(world.cache / "cache_index.json")[teacher]


def forge_row(path: Path) -> Path:
    """The right digest of a pack, and logits that no checksum is of. Returns the pack in place of that one."""
    from store_fixtures import forge, plain_pack

    pack = open_pack(path)
    rows = Rows(pack.files, pack.keys, pack.inputs, pack.logits)
    path.unlink()

    def build(file: object) -> None:
        plain_pack(file, rows, pack.origin)  # type: ignore[arg-type]
        file["logits"][0] = 7  # type: ignore[index]

    return forge(path.parent, build, teacher=pack.origin.teacher)


def test_the_rows_that_a_repair_leaves_are_those_that_stood(cached: World, run: Run, dump: Run, world: World) -> None:
    """Not those that an unfinished dump made of other features, whatever its packs are called."""
    before = served(world)
    assert dump(*another_root(world), *SMALL).exit_code == 1
    name_in_index(forge_row(world.cache / "packs" / named(world, "other")))
    assert run("repair", *DATA, *ONE[:2]).exit_code == 3
    left = LogitCache.open(world.cache, ["other"])
    rows = dict(zip(left.files, left.tensor(), strict=True))
    assert len(rows) == 19
    assert all(before["other", file] == row.numpy().tobytes() for file, row in rows.items())


# -- features that cannot be read just now -----------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [False, True])
def test_a_row_stays_whose_feature_cannot_be_read_just_now(
    cached: World, one: Run, world: World, changed: bool
) -> None:
    """Also the rows of a teacher that was not asked. One whose feature is another goes: that is known."""
    before = served(world)
    back = away(world, world.permitted()[::2])
    another = world.permitted()[1]
    if changed:
        world.write_feature(another, np.ones((12, 20), np.float32))
    result = one("--on-bad-sample", "skip", "--num-verify", 0)
    assert result.exit_code == 3
    for name in ("tiny", "other"):
        assert f"{name}: 10 rows were kept although their features cannot be read now" in result.stderr
    index = read_index(world.cache / "cache_index.json")
    assert index.missing == {}
    after = served(world)
    differing = {key for key in before if before[key] != after.get(key)}
    assert differing == ({("tiny", another), ("other", another)} if changed else set())
    back()
    assert json.loads(one("--json").stdout)["teachers"]["tiny"]["skipped"] == 20


# -- which generation is current, and what stays of the others ---------------------------------------------------------


def weighing(world: World, seed: int) -> tuple[object, ...]:
    """A dump with these weights."""
    (world.root / f"w{seed}.txt").write_text(str(seed))
    teacher = ("--teacher", f"tiny=tiny_teachers:linear,ckpt={world.root}/w{seed}.txt", "--only", "tiny")
    return ("dump", "--target", "b", "--json-path", world.json_path, *teacher)


def fingerprint(world: World) -> str:
    return read_index(world.cache / "cache_index.json").origins["tiny"].fingerprint.digest


def pending(world: World) -> list[Path]:
    return sorted((world.cache / "pending").glob("*.json"))


@pytest.mark.parametrize("meanwhile", ["nothing", "old weights", "a sample less", "drop"])
def test_what_a_dump_of_new_weights_acknowledged_stays_until_it_is_dropped(
    run: Run, world: World, meanwhile: str
) -> None:
    assert run(*weighing(world, 1)).exit_code == 0
    last = by_key(world)[-1]
    content = world.feature(last).read_bytes()
    world.feature(last).write_bytes(b"no array")
    assert run(*weighing(world, 2), "--shard-size", 1).exit_code == 1
    world.feature(last).write_bytes(content)
    current = fingerprint(world)
    packs = [open_pack(world.cache / "packs" / name) for name in world.packs("tiny")]
    committed = {file for pack in packs if pack.origin.fingerprint.digest != current for file in pack.files}
    assert len(committed) > 2
    if meanwhile == "a sample less":
        gone = next(row for row in world.rows if row["file"] in committed)
        world.rows.remove(gone)
        committed.remove(gone["file"])
        world.write()
    if meanwhile != "nothing":
        again = run(*weighing(world, 1), "--json")
        assert json.loads(again.stdout)["samples_scored"] == 0
    drop = ("--drop-unfinished",) if meanwhile == "drop" else ()
    assert run("gc", world.cache, "--older-than", 0, *drop).exit_code == 0
    assert (fingerprint(world), pending(world) == []) == (current, meanwhile == "drop")
    counts = json.loads(run(*weighing(world, 2), "--json").stdout)["teachers"]["tiny"]
    assert counts["skipped"] == (0 if meanwhile == "drop" else len(committed))
    assert pending(world) == []


def test_a_clock_that_was_ahead_does_not_make_old_weights_current(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        now = time.time_ns()
        patch.setattr(time, "time_ns", lambda: now + 86_400 * 10**9)
        for part in ("0/2", "1/2"):
            assert run(*weighing(world, 1), "--shard", part).exit_code == 0
    assert run(*weighing(world, 2)).exit_code == 0
    current = fingerprint(world)
    assert run("seal", "--target", "b").exit_code == 0
    assert fingerprint(world) == current


def test_a_dump_that_another_overtakes_takes_its_rows_for_kd_cache_s_own(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both begin with an empty cache; other weights are published when this one is about to write its view."""
    withdraw = _Publication._withdraw
    others: list[int] = []

    def overtaken(publication: _Publication, packs: Any) -> Any:
        if not others:
            others.append(-1)
            others.append(run(*weighing(world, 2)).exit_code)
        return withdraw(publication, packs)

    monkeypatch.setattr(_Publication, "_withdraw", overtaken)
    result = run(*weighing(world, 1))
    assert (result.exit_code, others) == (0, [-1, 0]), result.stderr
    assert run("verify", "--target", "b", *weighing(world, 1)[5:7], "--all").exit_code == 0


def test_of_dumps_that_had_not_read_each_other_the_index_counts_or_the_user_says_which(run: Run, world: World) -> None:
    def unread(*command: object) -> Path:
        """Run a dump that no later one reads, until its record is put back."""
        assert run(*command).exit_code == 0
        (record,) = pending(world)
        return record.rename(world.root / record.name)

    first = unread(*weighing(world, 1), "--shard", "0/2")
    assert run(*weighing(world, 2), "--shard", "1/2").exit_code == 0
    first.rename(world.cache / "pending" / first.name)
    refused = run("seal", "--target", "b")
    assert refused.exit_code == 5
    assert "two dumps at the same time made rows of tiny with different fingerprints" in refused.stderr
    assert run(*weighing(world, 2), "--shard", "1/2").exit_code == 0  # as it says
    assert run("seal", "--target", "b").exit_code == 3, "one part of the weights that count is lacking"
    assert run(*weighing(world, 2), "--shard", "0/2").exit_code == 0
    assert run("seal", "--target", "b").exit_code == 0
    shutil.rmtree(world.cache)
    first = unread(*weighing(world, 1), "--shard", "0/2")
    assert run(*weighing(world, 2)).exit_code == 0
    current = fingerprint(world)
    first.rename(world.cache / "pending" / first.name)
    assert run("seal", "--target", "b").exit_code == 0
    assert (fingerprint(world), len(pending(world))) == (current, 1)


def test_runs_of_the_first_version_come_before_all_that_have_a_number() -> None:
    now = time.time_ns()
    ages = [Age(2, 3), Age.of({"generation": 1, "begun": 5}), Age.of({"begun": now + 1}), Age.of({"begun": now})]
    assert sorted(ages) == ages[::-1]


@pytest.mark.parametrize("seed", [2, 1])
def test_a_rescoring_that_was_killed_never_mixes_with_what_was_there(run: Run, world: World, seed: int) -> None:
    """The same fingerprint, other code: what it committed is seen by nobody, and a plain rerun keeps the old rows."""
    assert run(*weighing(world, 1), "--no-files").exit_code == 0
    before = served(world)
    pack = open_pack(world.cache / "packs" / named(world, "tiny"))
    half = Rows(pack.files, pack.keys, pack.inputs, pack.logits + np.float32(seed)).part(range(0, 20, 2))
    half.write(pack.path.parent, pack.origin)  # as `--no-skip-existing` does until it is killed
    assert served(world) == before
    assert json.loads(run(*weighing(world, 1), "--no-files", "--json").stdout)["samples_scored"] == 0
    assert served(world) == before
    assert list(world.packs("tiny")) == [named(world, "tiny")]


# -- the view ----------------------------------------------------------------------------------------------------------


def by_files(world: World, teacher: str) -> dict[str, bytes]:
    """What existing code reads: the index's paths, nothing checked."""
    index = json.loads((world.cache / "cache_index.json").read_text())
    rows = load_cached_logits_batch(index, world.permitted(), teacher)
    return {file: row.tobytes() for file, row in zip(world.permitted(), rows, strict=True)}


@pytest.mark.parametrize("died", [0, 1])
def test_the_view_never_holds_rows_that_its_index_does_not_tell_of(
    cached: World, run: Run, world: World, monkeypatch: pytest.MonkeyPatch, died: int
) -> None:
    """A dump of new weights dies before its first index, or before its last, when the view is written."""
    before, files = served(world), {name: by_files(world, name) for name in ("tiny", "other")}
    inodes = {path: path.stat().st_ino for path in (world.cache / "other").iterdir()}
    written = []

    def dying(*args: Any, **options: Any) -> Any:
        if args[0].name == "cache_index.json":
            written.append(args)
            if len(written) > died:
                raise DeadError
        return write_index(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("kd_cache.store.publish.write_index", dying)
        with pytest.raises(DeadError):
            run(*weighing(world, 2))
    assert served(world) == before
    assert by_files(world, "other") == files["other"]
    assert {path: path.stat().st_ino for path in (world.cache / "other").iterdir()} == inodes
    verified = run("verify", "--target", "b", *TINY, "--json")
    if died:
        with pytest.raises(MissingLogitsError, match="holds no tiny logits"):
            by_files(world, "tiny")
        assert verified.exit_code == 4  # the new rows are not those of the pack either
        assert "the index does not name its .npy file" in verified.stdout
    else:
        assert by_files(world, "tiny") == files["tiny"]
        assert verified.exit_code == 0
    assert run(*weighing(world, 2)).exit_code == 0
    assert by_files(world, "tiny") == {file: row for (name, file), row in served(world).items() if name == "tiny"}
    assert by_files(world, "tiny") != files["tiny"]


@pytest.mark.parametrize("change", ["nothing", "first", "more", "less"])
def test_one_index_is_written_where_no_row_of_the_view_changes(
    dump: Run, world: World, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change != "first":
        assert dump().exit_code == 0
    if change == "more":
        world.add(70, "b", "train")
    if change == "less":
        del world.rows[0]
    world.write()
    written = []

    def counting(*args: Any, **options: Any) -> Any:
        written.append(args)
        return write_index(*args, **options)

    monkeypatch.setattr("kd_cache.store.publish.write_index", counting)
    assert dump().exit_code == 0
    assert len(written) == 1


# -- neighbours --------------------------------------------------------------------------------------------------------


def test_a_row_under_the_key_of_a_renamed_file_is_found_and_repaired(
    cached: World, run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two names of one MD5: the manifest names the other one now, and the row says whose it is."""
    genuine, old = hashlib.md5, world.permitted()[0]
    twin = f"y/{old.partition('/')[2]}"
    world.feature(twin).parent.mkdir()
    world.feature(old).rename(world.feature(twin))
    world.rows[0]["file"] = twin
    world.write()

    def colliding(name: bytes, usedforsecurity: bool = True) -> Any:
        return genuine(old.encode() if name == twin.encode() else name, usedforsecurity=usedforsecurity)

    monkeypatch.setattr("kd_cache.keys._md5", colliding)
    told = run("verify", "--target", "b", *TINY, "--json")
    assert told.exit_code == 6  # the index names the file of before
    assert told.stdout.count("its row is of another file with the same MD5 key") == 2
    repaired = run("repair", "--target", "b", *TINY)
    assert repaired.exit_code == 0, repaired.output
    assert ("tiny", twin) in served(world)
    LogitCache.open(world.cache).rows([twin])


def test_rows_of_before_that_a_sleeping_dump_counts_on_are_nobodys_garbage(
    run: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were superseded; from when a dump of their weights begins, gc leaves them, however long it takes."""
    for seed in (1, 2):
        assert run(*weighing(world, seed)).exit_code == 0
    world.add(70, "b", "train")
    world.write()
    scored = Scoring.run

    def sleeping(self: Scoring) -> None:
        assert run("gc", world.cache, "--older-than", 0).exit_code == 0
        scored(self)

    monkeypatch.setattr(Scoring, "run", sleeping)
    again = run(*weighing(world, 1), "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["teachers"]["tiny"]["skipped"] == 20


# -- one after the other ---------------------------------------------------------------------------------------------


def test_who_publishes_waits_for_who_is_at_it(one: Run, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 60.0)
    index, tried = world.cache / "cache_index.json", threading.Event()
    is_held = turns._is_held
    monkeypatch.setattr(turns, "_is_held", lambda folder: is_held(folder) and (tried.set() or True))
    world.cache.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with turns.in_turn(world.cache):
            dumping = pool.submit(one, "--num-verify", 0)
            assert tried.wait(60)
            assert not index.exists()
        assert dumping.result().exit_code == 0
    assert index.exists()


@pytest.mark.parametrize("error", [BlockingIOError, OSError])
def test_nobody_waits_for_ever_and_no_promise_needs_a_lock(
    one: Run, world: World, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    """Its holder may have been stopped; the file system may know none."""

    def refused(descriptor: int, operation: int) -> None:
        raise error

    monkeypatch.setattr(turns.fcntl, "flock", refused)
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    assert one().exit_code == 0
    assert len(served(world)) == 20
