"""``kd-cache gc``: what is superfluous goes, and nothing else does, whatever happens meanwhile."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, World
from fault_tools import ended_at_last, host
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fixtures import MadeCache, Rows, flip, make_cache, md5, names, origin, snapshot, two_teachers

from kd_cache.care.gc import OLDER_THAN, GcReport, find_garbage, remove_garbage
from kd_cache.cli import gc as command
from kd_cache.errors import StoreError
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.store.index import origin_entry, write_index
from kd_cache.store.origin import Origin
from kd_cache.store.permitted import Permitted

HOUR = 3600
EXTRA = Rows.of(names(3, start=40), seed=9)
STRAY, *MORE = (f"{md5(file).hex()}.npy" for file in EXTRA.files)
"""Row files that no index names."""


def age(path: Path, hours: float = 2) -> Path:
    """Make a file or a folder, and all in it, so much older."""
    then = time.time() - hours * HOUR
    for each in [*(path.rglob("*") if path.is_dir() and not path.is_symlink() else ()), path]:
        os.utime(each, (then, then), follow_symlinks=False)
    return path


def collect(path: Path, older_than: float = OLDER_THAN) -> GcReport:
    """Find and remove, as the command does."""
    report = find_garbage(path, older_than)
    remove_garbage(report)
    return report


def removed(report: GcReport) -> set[str]:
    return {str(item.path.relative_to(report.cache)) for item in report.garbage}


def put(path: Path, content: bytes = b"left over", hours: float = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return age(path, hours)


def stray(cache: MadeCache, teacher: str = "scene", hours: float = 2) -> str:
    """A row that only a superseded pack holds, and its file in the view; returns the pack's name in the cache."""
    pack = EXTRA.write(cache.path / "packs", origin(teacher, weights="earlier"))
    (cache.path / teacher).mkdir(exist_ok=True)
    np.save(cache.path / teacher / STRAY, EXTRA.logits[0])
    for path in (pack, cache.path / teacher / STRAY, cache.path / teacher):
        age(path, hours)
    return f"packs/{pack.name}"


def pending(cache: MadeCache, *made_by: Origin) -> Path:
    """A dump's record, in the format of the index, as it is documented."""
    path = cache.path / "pending" / "0123456789abcdef.json"
    path.parent.mkdir(exist_ok=True)
    teachers = {made.teacher: {**origin_entry(made), "rows": 0, "packs": [], "earlier": []} for made in made_by}
    write_index(path, 0, {}, {"missing": {}, "teachers": teachers})
    return age(path)


@pytest.fixture
def cache(tmp_path: Path) -> MadeCache:
    """A finished cache of two teachers, two hours old."""
    made = two_teachers(tmp_path / "A2b", count=12)
    age(made.path)
    return made


def serves(cache: MadeCache) -> None:
    """Every row is served as it was made."""
    for name, rows in cache.rows.items():
        opened = LogitCache.open(cache.path, [name])
        assert sorted(opened.files) == sorted(rows.files)
        np.testing.assert_array_equal(opened.batch(rows.files)[:, 0].numpy(), rows.logits)
        for file in rows.files:
            np.testing.assert_array_equal(cache.oracle(name, file), rows.by_file()[file])


# -- what goes --------------------------------------------------------------------------------------------------------


def test_a_clean_cache_holds_no_garbage(cache: MadeCache) -> None:
    before = snapshot(cache.path)
    assert vars(collect(cache.path)) == vars(GcReport(str(cache.path)))
    assert snapshot(cache.path) == before


def test_temporaries_of_killed_processes_go_from_every_folder_but_young_ones_stay(cache: MadeCache) -> None:
    ghost = EXTRA.write(cache.path / "packs", origin("ghost"))  # young
    folders = (".", "packs", "pending", "scene", "ghost")
    for folder in folders:
        put(cache.path / folder / ".tmp-17-00ff00ff00ff00ff", hours=1.01)
        put(cache.path / folder / ".tmp-18-00ff00ff00ff00ff", hours=0.99)
    report = collect(cache.path)
    assert removed(report) == {str(Path(folder) / ".tmp-17-00ff00ff00ff00ff") for folder in folders}
    assert report.size == 5 * len(b"left over")
    assert report.notes == ["6 more stay for now: not older than 3,600 s"]
    assert ghost.exists()
    assert all((cache.path / folder / ".tmp-18-00ff00ff00ff00ff").exists() for folder in folders)
    serves(cache)


def test_the_grace_period_is_a_setting(cache: MadeCache) -> None:
    put(cache.path / ".tmp-1-aaaaaaaaaaaaaaaa", hours=3)
    assert removed(collect(cache.path, older_than=4 * HOUR)) == set()
    put(cache.path / ".tmp-2-aaaaaaaaaaaaaaaa", hours=0)
    assert removed(collect(cache.path, older_than=0)) == {".tmp-1-aaaaaaaaaaaaaaaa", ".tmp-2-aaaaaaaaaaaaaaaa"}


def test_superseded_packs_go_and_say_which_part_changed(cache: MadeCache) -> None:
    old = Rows.of(names(5), seed=9).write(cache.path / "packs", origin(weights="earlier"))
    gone = Rows.of(names(5), seed=9).write(cache.path / "packs", origin("teacher-of-old"))
    age(cache.path)
    report = collect(cache.path)
    assert {item.path: item.reason for item in report.garbage} == {
        old: "superseded: weights changed",
        gone: "teacher-of-old is not in the index",
    }
    serves(cache)


def test_packs_that_another_current_one_contains_are_left_to_the_seal(cache: MadeCache) -> None:
    cache.rows["scene"].part(range(4)).write(cache.path / "packs", cache.origins["scene"])
    age(cache.path)
    assert removed(collect(cache.path)) == set()
    serves(cache)


def test_permitted_lists_that_the_index_does_not_name_go_if_they_are_whole(cache: MadeCache) -> None:
    current, other, young = (
        Permitted.of(cache.rows["scene"].keys[:count], np.zeros(count)).write(cache.path) for count in (3, 4, 5)
    )
    forged = put(cache.path / f"permitted-{'a' * 32}.npy")
    put(cache.path / "permitted-list.npy")
    cache.write_index(permitted={"file": current, "count": 3})
    age(cache.path)
    age(cache.path / young, hours=0)
    assert removed(collect(cache.path)) == {other}
    assert (cache.path / "permitted-list.npy").exists()
    assert forged.exists()


def test_rows_that_the_index_does_not_name_go_and_other_files_never(cache: MadeCache) -> None:
    packs = {stray(cache), stray(cache, "ghost"), stray(cache, "spoken")}
    put(cache.path / "scene" / "mine.npy")
    put(cache.path / "scene" / STRAY.upper())
    put(cache.path / "scene" / MORE[0])  # the name of a row, and not its bytes
    np.save(cache.path / "scene" / MORE[1], EXTRA.logits[2])  # young
    put(cache.path / "spoken" / "readme.txt")
    report = collect(cache.path)
    assert removed(report) == packs | {f"scene/{STRAY}", f"ghost/{STRAY}", "ghost", f"spoken/{STRAY}"}
    assert not (cache.path / "ghost").exists()
    assert (cache.path / "spoken" / "readme.txt").exists()
    assert (cache.path / "scene" / MORE[0]).exists()
    told = "\n".join(report.notes)
    assert all(name in told for name in ("mine.npy", MORE[0], "readme.txt"))
    serves(cache)


def test_what_others_put_into_a_cache_is_told_of_and_stays(cache: MadeCache) -> None:
    """A user's own files in the naming of row files, and what other systems and people leave everywhere."""
    shutil.copytree(cache.path / "scene", cache.path / "my_embeddings")
    shutil.copytree(cache.path / "packs", cache.path / "packs.bak")
    (cache.path / "empty").mkdir()
    pack, row = next((cache.path / "packs").iterdir()), next((cache.path / "scene").iterdir())
    copies = [pack.with_name(f"._{pack.name}"), pack.with_name(f"{pack.stem} (1).h5"), pack.with_name(".nfs0001")]
    copies += [row.with_name(f"._{row.name}"), row.with_name(f"{row.stem} (1).npy"), row.with_name("Thumbs.db")]
    copies += [
        cache.path / ".DS_Store",
        cache.path / "cache_index (1).json",
        cache.path / "my_embeddings" / ".tmp-mine",
    ]
    copies += [cache.path / folder / "@eaDir" / "x" for folder in (".", "packs", "scene")]
    copies += [cache.path / "pending" / "._0123456789abcdef.json"]
    for path in copies:
        put(path, row.read_bytes())
    age(cache.path)
    before = snapshot(cache.path)
    report = collect(cache.path, older_than=0)
    assert removed(report) == set()
    assert snapshot(cache.path) == before
    assert (report.damaged, (cache.path / "empty").is_dir()) == ([], True)
    told = "\n".join(report.notes)
    assert all(word in told for word in ("my_embeddings", "packs.bak", ".DS_Store", "(1).h5", "Thumbs.db", "@eaDir"))
    serves(cache)


def test_without_a_view_every_row_file_goes_and_the_folders_of_its_teachers_stay(cache: MadeCache) -> None:
    entries = {
        name: {**origin_entry(made), "rows": 12, "packs": [[pack.name, 12]], "earlier": []}
        for name, made in cache.origins.items()
        for pack in cache.path.glob(f"packs/{name}-*")
    }
    record = {"adaptation": "A2b", "files": False, "missing": {}, "teachers": entries}
    write_index(cache.path / "cache_index.json", 12, {name: {} for name in entries}, record)
    age(cache.path)
    report = collect(cache.path)
    assert len(report.garbage) == 24
    assert {item.kind for item in report.garbage} == {"row file"}
    assert (cache.path / "scene").is_dir()
    assert sorted(LogitCache.open(cache.path).files) == sorted(names(12))


def test_an_empty_folder_goes_when_it_is_old_and_its_teacher_has_superseded_packs(cache: MadeCache) -> None:
    pack = EXTRA.write(cache.path / "packs", origin("ghost"))
    for name in ("ghost", "somebody's", "notes"):
        (cache.path / name).mkdir()
        age(cache.path / name, hours=0 if name == "ghost" else 2)
    assert removed(collect(cache.path)) == set()
    age(cache.path / "ghost")
    age(pack)
    assert removed(collect(cache.path)) == {"ghost", f"packs/{pack.name}"}


# -- what stays -------------------------------------------------------------------------------------------------------


def test_a_damaged_pack_is_told_of_and_stays_and_so_do_the_row_files_it_can_be_mended_from(cache: MadeCache) -> None:
    pack = next((cache.path / "packs").glob("scene-*"))
    flip(pack, 600)
    age(pack)
    before = snapshot(cache.path)
    report = collect(cache.path)
    assert removed(report) == set()
    assert len(report.damaged) == 1
    assert pack.name in report.damaged[0]
    assert snapshot(cache.path) == before


def test_while_a_pending_record_is_damaged_no_pack_goes(cache: MadeCache) -> None:
    Rows.of(names(5)).write(cache.path / "packs", origin(weights="next"))
    record = pending(cache, origin(weights="next"))
    put(record, record.read_bytes()[:-3])
    put(cache.path / "packs" / ".tmp-1-aaaaaaaaaaaaaaaa")
    age(cache.path)
    assert removed(find_garbage(cache.path)) == {"packs/.tmp-1-aaaaaaaaaaaaaaaa"}
    report = collect(cache.path)
    assert removed(report) == {"packs/.tmp-1-aaaaaaaaaaaaaaaa"}
    assert "no packs are removed while it is there" in report.notes[0]


def no_index(path: Path) -> None:
    path.unlink()


def damaged_index(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def older_index(path: Path) -> None:
    content = json.loads(path.read_text())
    del content["kd_cache"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "told"),
    [(no_index, "it has no cache_index.json"), (damaged_index, "damaged"), (older_index, "older script")],
)
def test_without_a_sound_index_only_temporaries_go(cache: MadeCache, change: Callable[[Path], None], told: str) -> None:
    Rows.of(names(5)).write(cache.path / "packs", origin(weights="earlier"))
    stray(cache)
    put(cache.path / f"permitted-{'a' * 32}.npy")
    put(cache.path / "scene" / ".tmp-1-aaaaaaaaaaaaaaaa")
    change(cache.path / "cache_index.json")
    age(cache.path)
    report = collect(cache.path)
    assert removed(report) == {"scene/.tmp-1-aaaaaaaaaaaaaaaa"}
    assert told in report.notes[0]
    assert report.notes[0].endswith("only temporaries are removed")


def test_links_are_neither_followed_nor_removed(cache: MadeCache, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for name in (STRAY, ".tmp-1-aaaaaaaaaaaaaaaa"):
        put(outside / name)
    for link in ("ghost", "ghost-2"):
        (cache.path / link).symlink_to(outside)
    (cache.path / ".tmp-2-aaaaaaaaaaaaaaaa").symlink_to(outside / STRAY)
    (cache.path / "scene" / STRAY).symlink_to(outside / STRAY)
    age(cache.path)
    report = collect(cache.path)
    assert removed(report) == set()
    assert len([note for note in report.notes if "is a link" in note]) == 2
    assert (cache.path / ".tmp-2-aaaaaaaaaaaaaaaa").is_symlink()
    assert sorted(os.listdir(outside)) == [".tmp-1-aaaaaaaaaaaaaaaa", STRAY]


def test_packs_behind_a_link_stay(cache: MadeCache, tmp_path: Path) -> None:
    Rows.of(names(5)).write(cache.path / "packs", origin(weights="earlier"))
    age(cache.path)
    (cache.path / "packs").rename(tmp_path / "elsewhere")
    (cache.path / "packs").symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path / "elsewhere")
    assert removed(collect(cache.path)) == set()
    assert snapshot(tmp_path / "elsewhere") == before


def test_a_view_that_was_not_finished_goes_with_its_folder(cache: MadeCache) -> None:
    put(cache.path / ".tmp-1-0123456789abcdef" / STRAY)
    (cache.path / ".tmp-2-0123456789abcdef").mkdir()
    age(cache.path)
    put(cache.path / ".tmp-3-0123456789abcdef" / STRAY, hours=0)
    report = collect(cache.path)
    assert removed(report) == {f".tmp-1-0123456789abcdef/{STRAY}", ".tmp-1-0123456789abcdef", ".tmp-2-0123456789abcdef"}
    assert sorted(path.name for path in cache.path.glob(".tmp*")) == [".tmp-3-0123456789abcdef"]


def test_other_folders_and_devices_with_a_temporarys_name_stay(cache: MadeCache) -> None:
    put(cache.path / ".tmp-1-f01de20123456789" / "notes.txt")
    put(cache.path / ".tmp-1-f01de20123456789" / STRAY)
    os.mkfifo(cache.path / ".tmp-2-f01de20f01de2000")
    (cache.path / ".tmp-3-f01de20123456789" / STRAY).mkdir(parents=True)
    os.mkfifo(cache.path / "scene" / STRAY)
    age(cache.path)
    assert removed(collect(cache.path)) == set()
    assert (cache.path / ".tmp-1-f01de20123456789" / STRAY).exists()


def test_a_cache_reached_through_a_link_is_cleaned(cache: MadeCache, tmp_path: Path) -> None:
    put(cache.path / ".tmp-1-aaaaaaaaaaaaaaaa")
    (tmp_path / "here").symlink_to(cache.path)
    assert removed(collect(tmp_path / "here")) == {".tmp-1-aaaaaaaaaaaaaaaa"}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    packs=st.lists(
        st.tuples(st.sampled_from(["now", "next", "then", "before"]), st.booleans(), st.integers(0, 3)), max_size=6
    ),
    planned=st.booleans(),
    index_is_old=st.booleans(),
)
def test_packs_go_only_if_nothing_can_need_them(
    tmp_path_factory: pytest.TempPathFactory, packs: list[tuple[str, bool, int]], planned: bool, index_is_old: bool
) -> None:
    made = make_cache(
        tmp_path_factory.mktemp("gc") / "A2b", {"scene": Rows.of(names(4))}, {"scene": origin(weights="now")}
    )
    if planned:
        pending(made, origin(weights="next"))
    written: dict[str, dict[str, bool]] = {}
    for number, (weights, is_old, first) in enumerate(packs):
        path = Rows.of(names(3, start=10 * first), seed=number).write(made.path / "packs", origin(weights=weights))
        age(path, hours=2 if is_old else 0)
        written.setdefault(weights, {})[f"packs/{path.name}"] = is_old
    age(made.path / "cache_index.json", hours=2 if index_is_old else 0)
    going = {
        name
        for weights, ages in written.items()
        if index_is_old and all(ages.values()) and weights not in ("now", *["next"] * planned)
        for name in ages
    }
    assert removed(collect(made.path)) == going
    held = {f"packs/{path.name}" for path in (made.path / "packs").iterdir()}
    assert held >= {name for ages in written.values() for name in ages} - going
    assert not held & going


# -- what may happen meanwhile ----------------------------------------------------------------------------------------


def some_garbage(cache: MadeCache) -> set[str]:
    """One thing of every kind, in five folders."""
    packs = {stray(cache), stray(cache, "ghost")}
    put(cache.path / ".tmp-1-aaaaaaaaaaaaaaaa")
    put(cache.path / "packs" / ".tmp-1-bbbbbbbbbbbbbbbb")
    superseded = Permitted.of(EXTRA.keys, np.zeros(3)).write(cache.path)
    age(cache.path)
    return packs | {
        ".tmp-1-aaaaaaaaaaaaaaaa",
        "packs/.tmp-1-bbbbbbbbbbbbbbbb",
        superseded,
        f"scene/{STRAY}",
        f"ghost/{STRAY}",
        "ghost",
    }


def test_what_is_gone_meanwhile_is_no_error_and_not_counted(cache: MadeCache) -> None:
    expected = some_garbage(cache)
    report = find_garbage(cache.path)
    (cache.path / "scene" / STRAY).unlink()
    shutil.rmtree(cache.path / "ghost")
    remove_garbage(report)
    assert removed(report) == expected - {f"scene/{STRAY}", f"ghost/{STRAY}", "ghost"}


def test_what_was_written_anew_meanwhile_stays(cache: MadeCache) -> None:
    expected = some_garbage(cache)
    report = find_garbage(cache.path)
    again = cache.path / "scene" / STRAY
    again.rename(again.with_suffix(".old"))
    again.write_bytes(b"new")
    (cache.path / "ghost" / "kept.npy").write_bytes(b"new")
    remove_garbage(report)
    assert removed(report) == expected - {f"scene/{STRAY}", "ghost"}
    assert again.read_bytes() == b"new"
    assert (cache.path / "ghost" / "kept.npy").exists()


def became_current(cache: MadeCache) -> None:
    cache.origins["scene"] = origin(weights="earlier")
    cache.write_index()


def became_pending(cache: MadeCache) -> None:
    pending(cache, origin(weights="earlier"))


def index_gone(cache: MadeCache) -> None:
    (cache.path / "cache_index.json").unlink()


def index_torn(cache: MadeCache) -> None:
    damaged_index(cache.path / "cache_index.json")


@pytest.mark.parametrize(
    ("change", "stay"),
    [(became_current, "scene-"), (became_pending, "scene-"), (index_gone, ""), (index_torn, "")],
)
def test_packs_that_became_needed_between_looking_and_removing_stay(
    cache: MadeCache, change: Callable[[MadeCache], None], stay: str
) -> None:
    expected = some_garbage(cache)
    report = find_garbage(cache.path)
    change(cache)
    remove_garbage(report)
    assert removed(report) == {
        name for name in expected if not (name.endswith(".h5") and name.startswith(f"packs/{stay}"))
    }


def test_a_folder_that_became_a_link_meanwhile_is_not_entered(cache: MadeCache, tmp_path: Path) -> None:
    some_garbage(cache)
    report = find_garbage(cache.path)
    (cache.path / "ghost").rename(tmp_path / "moved")
    (cache.path / "ghost").symlink_to(tmp_path / "moved")
    with pytest.raises(StoreError, match="ghost"):
        remove_garbage(report)
    assert (tmp_path / "moved" / STRAY).exists()


@pytest.mark.parametrize("call", ["unlink", "rmdir", "fsync", "scandir", "listdir"])
def test_what_cannot_be_read_or_removed_is_a_store_error_that_names_it(
    cache: MadeCache, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    some_garbage(cache)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StoreError, match="Input/output error") as caught:
        collect(cache.path)
    assert str(cache.path) in caught.value.message


def test_removals_are_durable_when_it_returns(cache: MadeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    some_garbage(cache)
    calls: list[tuple[str, str]] = []

    def watched(name: str, where: Callable[..., int]) -> None:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append((name, str(Path(f"/proc/self/fd/{where(*args, **options)}").readlink())))
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)

    watched("unlink", lambda path, *, dir_fd: dir_fd)
    watched("rmdir", lambda path, *, dir_fd: dir_fd)
    watched("fsync", lambda descriptor: descriptor)
    collect(cache.path)
    folders = {folder for _, folder in calls}
    assert folders == {str(cache.path / part) for part in ("packs", "scene", "ghost")} | {str(cache.path)}
    for folder in folders:
        mine = [name for name, where in calls if where == folder]
        assert (mine.count("fsync"), mine[-1]) == (1, "fsync")
    assert calls.index(("rmdir", str(cache.path))) > calls.index(("unlink", str(cache.path / "ghost")))


# -- with real dumps --------------------------------------------------------------------------------------------------


def tiny(run: Run, world: World, teacher: str, *args: object, code: int = 0) -> None:
    result = run("dump", "--target", "b", "--json-path", world.json_path, "--teacher", f"tiny={teacher}",
                 "--only", "tiny", *args)  # fmt: skip
    assert result.exit_code == code, result.output


def weights(world: World, seed: int) -> str:
    (world.root / "weights.txt").write_text(str(seed))
    return f"tiny_teachers:linear,ckpt={world.root / 'weights.txt'}"


def test_rows_of_earlier_weights_go_and_the_cache_verifies(run: Run, world: World) -> None:
    tiny(run, world, weights(world, 7))
    before = world.packs()
    tiny(run, world, weights(world, 8))
    current = {name: content for name, content in world.packs().items() if name not in before}
    assert before.keys() < world.packs().keys()
    age(world.cache)
    content = json.loads(run("gc", "--json").stdout)
    assert content["caches"][0]["garbage"][0]["reason"] == "superseded: weights changed"
    assert content["bytes"] == sum(map(len, before.values()))
    assert world.packs() == current
    assert run("verify", "--all", "--teacher", f"tiny={weights(world, 8)}").exit_code == 0
    tiny(run, world, weights(world, 7))  # going back costs scoring, and gives the same bytes
    assert world.packs().items() >= before.items()


def test_what_an_interrupted_dump_committed_stays_and_its_resumption_gives_the_same_bytes(
    run: Run, world: World
) -> None:
    tiny(run, world, "tiny_teachers:nan", "--on-bad-sample", "skip", "--cache-root", "apart", "--batch-size", 1, code=3)
    world_apart = {p.name: p.read_bytes() for p in (world.root / "apart" / "A2b" / "packs").iterdir()}
    tiny(run, world, weights(world, 7), "--batch-size", 1)
    sealed = set(world.packs())
    tiny(run, world, "tiny_teachers:nan", "--shard-size", 1, code=1)  # stops at a bad sample
    committed = set(world.packs()) - sealed
    assert committed
    put(world.cache / "packs" / ".tmp-9-deaddeaddeaddead")
    age(world.cache)
    assert run("gc", "--older-than", 0).exit_code == 0
    assert set(world.packs()) == committed | sealed
    assert not (world.cache / "packs" / ".tmp-9-deaddeaddeaddead").exists()
    tiny(run, world, "tiny_teachers:nan", "--on-bad-sample", "skip", code=3)
    assert world.packs().items() >= world_apart.items()


@pytest.mark.faults
def test_a_dump_that_runs_meanwhile_loses_nothing(run: Run, world: World) -> None:
    tiny(run, world, weights(world, 7), "--batch-size", 1)
    tiny(run, world, "tiny_teachers:linear", "--batch-size", 1, "--cache-root", "apart")
    age(world.cache)
    options = ["--target", "b", "--json-path", "dataset.json", "--only", "tiny", "--shard-size", "1"]
    dump = host().start("dump", *options, "--teacher", "tiny=tiny_teachers:slow", cwd=world.root)
    rounds = 0
    with ended_at_last([dump]):
        while not dump.ended(0.1):
            assert run("gc").exit_code == 0
            rounds += 1
        assert dump.wait().code == 0
    assert rounds > 0
    expected = {path.name: path.read_bytes() for path in (world.root / "apart" / "A2b" / "packs").iterdir()}
    assert world.packs().items() >= expected.items()
    assert run("verify", "--all", "--teacher", "tiny=tiny_teachers:slow").exit_code == 0


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a finished cache, an unfinished one, a link to one, and a folder that is none."""
    for name in ("A2b", "A2c"):
        made = two_teachers(tmp_path / "cache" / name, count=4)
        some_garbage(made)
    (tmp_path / "cache" / "A2c" / "cache_index.json").unlink()
    elsewhere = two_teachers(tmp_path / "elsewhere" / "A2s1", count=4)
    some_garbage(elsewhere)
    (tmp_path / "cache" / "A2s1").symlink_to(elsewhere.path)
    put(tmp_path / "cache" / "A2notes" / ".tmp-1-aaaaaaaaaaaaaaaa")
    return tmp_path


def paths(content: Any) -> list[str]:
    return [item["path"] for cache in content["caches"] for item in cache["garbage"]]


def test_dry_run_removes_nothing_and_lists_what_the_real_run_removes(run: Run, root: Path) -> None:
    before = snapshot(root)
    planned = json.loads(run("gc", "--dry-run", "--json").stdout)
    shown = run("gc", "--dry-run").stdout
    assert snapshot(root) == before
    done = json.loads(run("gc", "--json").stdout)
    assert sorted(paths(done)) == sorted(paths(planned))
    assert (planned["bytes"], planned["dry_run"], done["dry_run"]) == (done["bytes"], True, False)
    after = snapshot(root)
    lost = before.keys() - after.keys()
    assert {str((root / path).relative_to(root)) for path in paths(done)} >= lost
    assert sum(len(before[name]) for name in lost) == done["bytes"]
    assert {name: before[name] for name in after} == after
    for path in paths(planned):
        assert path in shown
    assert "in 8 files would be freed" in shown


def test_every_cache_under_the_root_is_cleaned_and_links_and_other_folders_are_not(run: Run, root: Path) -> None:
    result = run("gc", "--json")
    assert [cache["cache"] for cache in json.loads(result.stdout)["caches"]] == ["cache/A2b", "cache/A2c"]
    assert "it has no cache_index.json; only temporaries are removed" in result.stderr
    assert (root / "cache" / "A2notes" / ".tmp-1-aaaaaaaaaaaaaaaa").exists()
    assert (root / "elsewhere" / "A2s1" / ".tmp-1-aaaaaaaaaaaaaaaa").exists()
    assert json.loads(run("gc", "cache/A2s1", "--json").stdout)["bytes"] > 0  # named, it is meant


def test_if_one_cache_is_refused_no_cache_is_touched(run: Run, root: Path) -> None:
    path = root / "cache" / "A2c" / "pending" / "0123456789abcdef.json"
    path.parent.mkdir()
    path.write_text(
        (root / "elsewhere/A2s1/cache_index.json").read_text().replace('"format_version": 2', '"format_version": 3')
    )
    before = snapshot(root)
    result = run("gc")
    assert (result.exit_code, "format version 3" in result.stderr) == (1, True)
    assert snapshot(root) == before


def test_of_many_row_files_the_first_are_shown(run: Run, root: Path) -> None:
    many = Rows.of(names(30, start=60))
    many.write(root / "cache" / "A2b" / "packs", origin(weights="earlier"))
    for file, row in many.by_file().items():
        np.save(root / "cache" / "A2b" / "scene" / f"{md5(file).hex()}.npy", row)
    age(root / "cache" / "A2b")
    result = run("gc", "cache/A2b", "--dry-run")
    assert result.stdout.count("row file: ") == command.MOST_SHOWN
    assert "… and 12 more row files; --json lists them all" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nowhere"], 3, "there is no cache at nowhere"),
        (["--cache-root", "nowhere"], 3, "there is no cache under nowhere"),
        (["--cache-root", "/dev/zero/x"], 3, "there is no cache under /dev/zero/x: /dev/zero is no folder\n"),
        (["elsewhere"], 3, "there is no cache at elsewhere"),
        (["--older-than", "-1"], 2, "older-than"),
        (["--older-than", "inf"], 2, "older-than"),
    ],
)
def test_errors_have_exit_codes(run: Run, root: Path, args: Sequence[str], code: int, message: str) -> None:
    before = snapshot(root)
    result = run("gc", *args)
    assert (result.exit_code, message in result.stderr) == (code, True)
    assert snapshot(root) == before
