"""Caches at an URL: pushed, pulled, opened; and whatever goes wrong there, never a wrong row."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from conftest import TINY, Run, World
from remote_fixtures import FakeHub, served
from store_fixtures import MadeCache, Rows, forks, names, two_teachers
from torch.utils.data import DataLoader

import kd_cache.exchange.push
import kd_cache.remote.hub
import kd_cache.remote.objects
from kd_cache import LogitCache
from kd_cache.errors import (
    ChangedError,
    CorruptError,
    KDCacheError,
    MissingLogitsError,
    StaleError,
    StoreError,
    UsageError,
)
from kd_cache.exchange.push import push_cache
from kd_cache.remote.objects import Patience
from kd_cache.remote.store import RemoteStore
from kd_cache.remote.url import checked_url, open_store
from kd_cache.serve.pull import pull_cache
from kd_cache.store.index import read_index
from kd_cache.watch import Watcher


@pytest.fixture(autouse=True)
def _mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE_MIRROR", str(tmp_path / "mirror"))


@pytest.fixture
def made(tmp_path: Path) -> MadeCache:
    return two_teachers(tmp_path / "cache" / "A2b")


@pytest.fixture
def pushed(made: MadeCache, tmp_path: Path) -> tuple[MadeCache, str, Path]:
    """A cache, the URL it was pushed to, and the folder behind that."""
    url = f"file://{tmp_path}/store/A2b"
    push_cache(made.path, url)
    return made, url, tmp_path / "store/A2b"


def rescored(made: MadeCache, generation: int = 1) -> None:
    """The cache after another dump: other rows, in other packs."""
    for name in made.rows:
        made.rows[name] = Rows.of(names(41), seed=generation + 7)
        for path in (made.path / "packs").glob(f"{name}-*"):
            path.unlink()
        made.rows[name].write(made.path / "packs", made.origins[name])
    made.write_index(generation=generation)


def right(cache: LogitCache, made: MadeCache) -> bool:
    files = cache.files
    expected = np.stack([[made.rows[name].by_file()[file] for name in cache.teachers] for file in files])
    return len(files) == len(made.rows["scene"]) and np.array_equal(cache.batch(files).numpy(), expected)


# -- stores -----------------------------------------------------------------------------------------------------------


def in_folder(tmp_path: Path) -> RemoteStore:
    return open_store(checked_url(f"file://{tmp_path}/store"), writing=True)


def in_memory(tmp_path: Path) -> RemoteStore:
    return open_store(checked_url(f"memory://{tmp_path}"), writing=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(kd_cache.remote.hub.HubStore, "_ranged", lambda *asked: made.ranged(*asked))
    monkeypatch.setattr(kd_cache.remote.hub, "PATIENCE", Patience(1, 1, 5, 0.001))
    return made


def in_hub(_: Path) -> RemoteStore:
    return open_store("hf://datasets/me/rows/kd/A2b", writing=True)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("opened", [in_folder, in_memory, in_hub])
def test_what_every_store_does(opened: Callable[[Path], RemoteStore], tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.head("a") is None
    assert store.get("a", 10) is None
    assert store.list() == []
    (tmp_path / "large").write_bytes(bytes(range(256)) * 100)
    advanced: list[int] = []
    watcher = Watcher()
    watcher.advance = advanced.append  # type: ignore[method-assign]
    store.put_file("packs/a.h5", tmp_path / "large", watcher)
    assert sum(advanced) == 25_600
    first = store.put_if("index", b"1", None)
    with pytest.raises(ChangedError):
        store.put_if("index", b"2", None)
    second = store.put_if("index", b"2", first)
    assert second != first
    with pytest.raises(ChangedError, match="index is another by now"):
        store.put_if("index", b"3", first)
    found = store.get("index", 10)
    assert (found and found.content) == b"2"
    unchanged = store.get("index", 10, second)
    assert unchanged is not None
    assert unchanged.content is None
    entry = store.head("packs/a.h5")
    assert entry is not None
    assert store.get_range("packs/a.h5", 3, 7, entry.etag) == bytes([3, 4, 5, 6])
    with pytest.raises(ChangedError):
        store.get_range("packs/a.h5", 0, 9, '"another"')
    assert {each.name: each.size for each in store.list()} == {"packs/a.h5": 25_600, "index": 1}
    with pytest.raises(StoreError, match="has 25600 bytes, expected at most 99"):
        store.get("packs/a.h5", 99)
    for _ in range(2):
        store.delete("packs/a.h5")
    with pytest.raises(ChangedError, match=r"packs/a\.h5 .*gone"):
        store.get_range("packs/a.h5", 0, 9, entry.etag)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://host/x", "expected an URL that starts with s3://"),
        ("s3:/bucket/x", "expected an URL"),
        ("https://me:secret@host/x", "has a user, a password"),
        ("s3://key@bucket/x", "has a user"),
        ("az://box/x?sig=secret", "a query"),
        ("https://host/x#secret", "fragment"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/../x", "is not a plain path"),
        ("https://[::1/x", "is no URL"),
        ("http://example.com/x", "is not encrypted"),
    ],
)
def test_an_url_that_is_refused_is_not_repeated_where_it_may_hold_a_secret(url: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        checked_url(url)
    assert "secret" not in str(caught.value)


def test_one_place_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checked_url("file://store/A2b/") == checked_url(f"file://{tmp_path}/x/../store/A2b")
    assert checked_url("s3://bucket/kd/A2b/") == "s3://bucket/kd/A2b"


def test_a_cache_in_a_repository_of_the_hub(hub: FakeHub, made: MadeCache) -> None:
    url = "hf://datasets/me/rows/kd/A2b"
    hub.busy = 4
    assert push_cache(made.path, url).index == "sent"
    assert right(LogitCache.open(url), made)
    assert push_cache(made.path, url).index == "same"
    with pytest.raises(StoreError, match=r"cannot look at hf://datasets/me/other/kd/A2b/cache_index\.json: 404"):
        push_cache(made.path, "hf://datasets/me/other/kd/A2b")
    hub.busy = 5
    with pytest.raises(StoreError, match="503"):
        LogitCache.open(url)
    hub.busy = 0
    with pytest.raises(UsageError, match="names no folder of a repository"):
        open_store("hf://me/rows")
    # A commit of something else in between is no lost race; one of the same file is.
    store, commit = in_hub(Path()), hub.create_commit
    other = huggingface_hub.CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=b"x")

    def between(**asked: Any) -> Any:
        hub.create_commit = commit  # type: ignore[method-assign]
        commit([other], "", None, repo_id="me/rows", repo_type="dataset")
        return commit(**asked)

    hub.create_commit = between  # type: ignore[method-assign]
    assert store.put_if("new", b"1", None) is not None
    other.path_in_repo = "kd/A2b/newer"
    hub.create_commit = between  # type: ignore[method-assign]
    with pytest.raises(ChangedError, match="newer is another by now"):
        store.put_if("newer", b"1", None)


# -- push and pull ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak", [False, True])
def test_what_was_pushed_is_pulled_to_equal_rows_and_again_is_nothing(
    pushed: tuple[MadeCache, str, Path], tmp_path: Path, weak: bool
) -> None:
    made, url, store = pushed
    again = push_cache(made.path, url)
    assert (again.index, again.sent, again.there_already) == ("same", [], 2)
    with served(store) as web:
        web.weak = weak
        first = pull_cache(web.url, tmp_path / "other/A2b")
        assert (first.files, first.changed, first.finished) == (2, True, True)
        web.asked.clear()
        second = pull_cache(web.url, tmp_path / "other/A2b")
        assert (second.files, second.there_already, second.changed) == (0, 2, False)
        assert web.asked == ["GET cache_index.json"]
    assert right(LogitCache.open(tmp_path / "other/A2b"), made)
    index = read_index(tmp_path / "other/A2b/cache_index.json")
    assert (index.record["files"], index.maps) == (False, {"city2scene": {}, "scene": {}})
    assert push_cache(tmp_path / "other/A2b", url, replace=True).index == "same"
    assert not list(tmp_path.rglob(".tmp-*"))


def test_only_an_index_that_was_seen_is_replaced(pushed: tuple[MadeCache, str, Path], tmp_path: Path) -> None:
    made, url, store = pushed
    pull_cache(url, tmp_path / "other")
    rescored(made)
    done = push_cache(made.path, url)
    assert (done.index, len(done.sent)) == ("sent", 2)
    # The other one was pulled from an earlier index; it knows the present one only when it is pulled again.
    stranger = two_teachers(tmp_path / "stranger", count=9)
    for path in (tmp_path / "other", stranger.path):
        with pytest.raises(StaleError, match="has another index than the one that"):
            push_cache(path, url)
    assert pull_cache(url, tmp_path / "other").changed
    assert push_cache(tmp_path / "other", url).index == "same"
    assert right(LogitCache.open(tmp_path / "other"), made)
    assert push_cache(stranger.path, url, replace=True).index == "sent"
    assert len(list((store / "packs").iterdir())) == 6
    assert len(push_cache(stranger.path, url, prune_days=1).pruned) == 0
    assert len(push_cache(stranger.path, url, prune_days=0).pruned) == 4
    assert right(LogitCache.open(url), stranger)


def test_a_folder_with_rows_of_its_own_is_not_pulled_over(pushed: tuple[MadeCache, str, Path], tmp_path: Path) -> None:
    made, url, _ = pushed
    own = two_teachers(tmp_path / "own", count=9)
    with pytest.raises(StaleError, match="a pull would lose what it holds"):
        pull_cache(url, own.path)
    assert right(LogitCache.open(own.path), own)
    pull_cache(url, tmp_path / "other")
    rescored(made)
    push_cache(made.path, url)
    copy = tmp_path / "copy"
    shutil.copytree(made.path, copy)
    rescored(made, 2)
    push_cache(made.path, url)
    with pytest.raises(StaleError, match="has a view, which a pull would leave behind"):
        pull_cache(url, copy)


class Meanwhile(Watcher):
    """Does something while files are on their way."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def stage(self, name: str, total: int, unit: str = "samples") -> None:
        assert name in ("sending", "fetching")
        assert unit == "MB"
        self.act()


@pytest.mark.parametrize("scheme", ["file", "memory"])
@pytest.mark.parametrize("is_first", [True, False])
def test_of_two_pushes_at_once_one_wins(made: MadeCache, tmp_path: Path, scheme: str, is_first: bool) -> None:
    url = f"{scheme}://{tmp_path}/store"
    rival = tmp_path / "rival"
    if not is_first:
        push_cache(made.path, url)
        pull_cache(url, rival)
        shutil.copytree(made.path / "packs", tmp_path / "before")
        rescored(made)
    other = two_teachers(tmp_path / "other", count=9)
    if not is_first:
        shutil.copy(rival / "remote.json", other.path)
    with pytest.raises(StaleError, match=r"another push .* was quicker") as caught:
        push_cache(made.path, url, Meanwhile(lambda: push_cache(other.path, url)))
    assert caught.value.exit_code == 5
    assert right(LogitCache.open(url), other)


def test_two_pulls_at_once_are_one_and_a_dump_meanwhile_is_not_lost(
    pushed: tuple[MadeCache, str, Path], tmp_path: Path
) -> None:
    made, url, _ = pushed
    folder = tmp_path / "other"
    assert pull_cache(url, folder, Meanwhile(lambda: pull_cache(url, folder))).finished
    assert right(LogitCache.open(folder), made)
    index = made.path / "cache_index.json"
    with pytest.raises(StaleError, match="changed while it was pulled"):
        pull_cache(url, tmp_path / "third", Meanwhile(lambda: shutil.copy(index, tmp_path / "third")))
    assert (tmp_path / "third/cache_index.json").read_bytes() == index.read_bytes()


def test_a_signal_is_heard_while_a_server_is_waited_for(pushed: tuple[MadeCache, str, Path], tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    made, _, store = pushed
    with served(store) as web:
        web.faults.append("hang")
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            pull_cache(web.url, tmp_path / "other")
        assert time.monotonic() - began < 4
    with pytest.raises(KeyboardInterrupt):
        push_cache(made.path, f"memory://{tmp_path}", Meanwhile(interrupt))
    with pytest.raises(StoreError, match="cannot read"):
        in_memory(tmp_path).put_file("a", tmp_path, Watcher())


def test_an_answer_that_was_lost_is_no_lost_race(made: MadeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    put_if = kd_cache.remote.objects.ObjectStore.put_if

    def came_through(self: Any, name: str, content: bytes, etag: str | None) -> str | None:
        put_if(self, name, content, etag)
        return put_if(self, name, content, etag)

    monkeypatch.setattr(kd_cache.remote.objects.ObjectStore, "put_if", came_through)
    assert push_cache(made.path, f"memory://{made.path}").index == "sent"


def test_packs_that_another_s_pruning_takes_away_are_sent_again(
    pushed: tuple[MadeCache, str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, url, store = pushed
    (store / "cache_index.json").unlink()
    put_index = kd_cache.exchange.push._put_index

    def pruned_before(*arguments: Any) -> str | None:
        shutil.rmtree(store / "packs")
        return put_index(*arguments)

    monkeypatch.setattr(kd_cache.exchange.push, "_put_index", pruned_before)
    assert len(push_cache(made.path, url).sent) == 2
    assert right(LogitCache.open(url), made)


# -- what is damaged there --------------------------------------------------------------------------------------------


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << at % 8
    path.write_bytes(content)


def swapped(store: Path) -> None:
    one, two = sorted((store / "packs").iterdir())
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a pack's preamble": lambda store: flipped(sorted((store / "packs").iterdir())[0], 30),
    "a row": lambda store: flipped(sorted((store / "packs").iterdir())[1], 4321),
    "a shorter pack": lambda store: _shortened(sorted((store / "packs").iterdir())[1]),
    "an empty pack": lambda store: sorted((store / "packs").iterdir())[0].write_bytes(b""),
    "no pack": lambda store: sorted((store / "packs").iterdir())[0].unlink(),
    "swapped packs": swapped,
    "a bit of the index": lambda store: flipped(store / "cache_index.json", 1234),
    "half an index": lambda store: _shortened(store / "cache_index.json"),
}


def _shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_at_the_url_is_found_and_healed(what: str, pushed: tuple[MadeCache, str, Path], tmp_path: Path) -> None:
    made, url, store = pushed
    DAMAGE[what](store)
    with pytest.raises(CorruptError, match=r"store/A2b"):
        pull_cache(url, tmp_path / "other")
    with pytest.raises(CorruptError):
        LogitCache.open(url)
    names_there = {path.name for path in (tmp_path / "other").rglob("*.*")}
    assert not names_there - {path.name for path in store.rglob("*")}
    assert "cache_index.json" not in names_there
    if "index" in what:
        with pytest.raises(CorruptError):
            push_cache(made.path, url)
    push_cache(made.path, url, check=True, replace="index" in what)
    assert pull_cache(url, tmp_path / "other").finished
    assert right(LogitCache.open(tmp_path / "other"), made)


def test_an_older_index_is_refused(pushed: tuple[MadeCache, str, Path], tmp_path: Path) -> None:
    made, url, store = pushed
    before = (store / "cache_index.json").read_bytes()
    rescored(made)
    push_cache(made.path, url)
    pull_cache(url, tmp_path / "other")
    LogitCache.open(url)
    (store / "cache_index.json").write_bytes(before)
    with pytest.raises(StaleError, match="has an older index than the one"):
        pull_cache(url, tmp_path / "other")
    with pytest.raises(StaleError):
        LogitCache.open(url)
    assert right(LogitCache.open(url, offline=True), made)


def test_what_is_damaged_here_is_not_pushed_and_is_pulled_again(
    pushed: tuple[MadeCache, str, Path], tmp_path: Path
) -> None:
    made, url, store = pushed
    pull_cache(url, tmp_path / "other")
    flipped(sorted((tmp_path / "other/packs").iterdir())[0], 5000)
    flipped(tmp_path / "other/cache_index.json", 999)
    assert pull_cache(url, tmp_path / "other").files == 1
    assert right(LogitCache.open(tmp_path / "other"), made)
    flipped(sorted(LogitCache.open(url).path.glob("packs/*"))[1], 5000)  # in the mirror
    with pytest.raises(CorruptError):
        LogitCache.open(url, offline=True)
    assert right(LogitCache.open(url), made)
    pack = sorted((made.path / "packs").iterdir())[0]
    flipped(pack, 5000)
    (store / "packs" / pack.name).unlink()
    with pytest.raises(CorruptError, match=pack.name):
        push_cache(made.path, url)
    pack.unlink()
    with pytest.raises(MissingLogitsError, match="which its index names"):
        push_cache(made.path, url)
    (tmp_path / "other/remote.json").write_text('{"seen": 3}')
    with pytest.raises(CorruptError, match="says what was last pushed or pulled, is damaged") as caught:
        push_cache(tmp_path / "other", url)
    assert "Remove it" in str(caught.value)


def test_a_pull_says_what_it_lacks(tmp_path: Path, pushed: tuple[MadeCache, str, Path], monkeypatch: Any) -> None:
    _, url, store = pushed
    with pytest.raises(MissingLogitsError, match="there is no cache at memory://nothing"):
        pull_cache("memory://nothing", tmp_path / "other")
    with pytest.raises(StoreError, match=f"cannot open file://{tmp_path}/nowhere"):
        pull_cache(f"file://{tmp_path}/nowhere", tmp_path / "other")
    with served(tmp_path) as web, pytest.raises(MissingLogitsError, match="a web server does not list parts"):
        pull_cache(web.url, tmp_path / "other")
    with pytest.raises(UsageError, match="can only be read"):
        push_cache(store, "https://example.com/A2b")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1))  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"needs [\d,]+ bytes, its disk has 1 left"):
        pull_cache(url, tmp_path / "other")


# -- servers that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [["503", "503"], ["close", "", "close"], ["stall", "close", "503", "stall"]])
def test_a_server_that_fails_a_few_times_is_asked_again(
    faults: list[str], pushed: tuple[MadeCache, str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, store = pushed
    monkeypatch.setattr(kd_cache.remote.objects, "PATIENCE", Patience(1, 0.2, 5, 0.01))
    with served(store) as web:
        web.faults += faults
        assert right(LogitCache.open(web.url), made)
        assert not web.faults


@pytest.mark.parametrize("fault", ["503", "stall", "close"])
def test_a_server_that_only_fails_is_given_up_in_time(
    fault: str, pushed: tuple[MadeCache, str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, store = pushed
    monkeypatch.setattr(kd_cache.remote.objects, "PATIENCE", Patience(1, 0.1, 5, 0.01))
    with served(store) as web:
        LogitCache.open(web.url)
        rescored(made)
        push_cache(made.path, f"file://{store}")
        web.faults += [fault] * 20
        web.asked.clear()
        with pytest.raises(StoreError, match=f"cannot read {web.url}/cache_index.json: ") as caught:
            LogitCache.open(web.url)
        assert len(web.asked) == 5
        assert "offline=True" in str(caught.value)
        assert len(LogitCache.open(web.url, offline=True)) == 40


@forks
def test_a_loader_with_workers_reads_with_the_server_gone(
    pushed: tuple[MadeCache, str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, store = pushed
    monkeypatch.setattr(kd_cache.remote.objects, "PATIENCE", Patience(1, 0.2, 5, 0.01))
    with served(store) as web:
        cache = LogitCache.open(web.url)
    data = cache.attach(list(range(40)), cache.files)
    loader = DataLoader(data, batch_size=7, num_workers=2, collate_fn=data.collate, multiprocessing_context="fork")
    read = np.concatenate([logits.numpy() for _, logits in loader])
    assert np.array_equal(read, made.stacked(cache.files))
    with pytest.raises(StoreError, match="offline=True"):
        LogitCache.open(web.url)
    monkeypatch.setenv("KD_CACHE_OFFLINE", "1")
    assert right(LogitCache.open([web.url]), made)
    with pytest.raises(MissingLogitsError, match="there is no copy of"):
        LogitCache.open("s3://bucket/kd/A2b")
    monkeypatch.setenv("KD_CACHE_OFFLINE", "perhaps")
    with pytest.raises(UsageError, match="KD_CACHE_OFFLINE is perhaps"):
        LogitCache.open(web.url)
    with pytest.raises(UsageError, match="an URL is a text, not a Path"):
        LogitCache.open(Path("s3://bucket/kd/A2b"))


# -- commands ---------------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_pushed_all_the_same(
    made: MadeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> None:
        raise StoreError("cannot write remote.json: Read-only file system")

    monkeypatch.setattr(kd_cache.exchange.push, "write_upstream", read_only)
    watcher, notes = Watcher(), list[str]()
    watcher.note = notes.append  # type: ignore[method-assign]
    assert push_cache(made.path, f"memory://{tmp_path}", watcher).index == "sent"
    assert "needs --replace" in notes[0]


def test_a_cache_goes_over_an_url_whole(cached: World, run: Run) -> None:
    result = run("push", cached.cache, "file://store/A2b", "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert sorted(Path(name).suffix for name in done["sent"]) == [".h5", ".h5", ".json", ".npy"]
    assert run("pull", "file://store/A2b", "cache/pulled/A2b").stdout.startswith(f"file://{cached.root}/store/A2b → ")
    assert (cached.root / "cache/pulled/A2b/plan.json").read_bytes() == (cached.cache / "plan.json").read_bytes()
    verified = run("verify", "cache/pulled/A2b", "--all", "--recompute", *TINY)
    assert verified.exit_code == 0, verified.output
    assert "the index there is this one" in run("push", "cache/pulled/A2b", "file://store/A2b", "--check").stdout


def test_nodes_without_a_shared_disk_push_parts_and_another_seals_them(
    dump: Run, run: Run, world: World, cached: World
) -> None:
    for node in range(2):
        result = dump("--shard", f"{node}/2", "--cache-root", f"node{node}", "--push", "file://run/A2b", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["push"]["index"] == "none"
    with pytest.raises(MissingLogitsError, match="parts that nobody sealed"):
        LogitCache.open("file://run/A2b")
    for count in (0, 1):
        pulled = run("pull", "file://run/A2b", "third/A2b", "--json")
        assert pulled.exit_code == 0, pulled.output
        assert json.loads(pulled.stdout)["changed"] == (count == 0)
    assert run("seal", "--target", "b", "--cache-root", "third").exit_code == 0
    held = {path.name: path.read_bytes() for path in (world.root / "third/A2b/packs").iterdir()}
    assert held == cached.packs()
    # Other batches make other last bits, and a finished cache at the URL hides parts.
    assert dump("--shard", "0/2", "--cache-root", "odd", "--batch-size", 2, "--push", "file://run/A2b").exit_code == 5
    assert run("push", "third/A2b", "file://run/A2b").exit_code == 0
    refused = dump("--shard", "0/2", "--cache-root", "late", "--push", "file://run/A2b")
    assert refused.exit_code == 5
    assert "has a finished cache" in refused.stderr
    assert not (world.root / "late").exists()


def test_a_dump_pushes_what_it_finished(dump: Run, run: Run, world: World) -> None:
    assert "4 files sent" in dump("--push", "file://store/A2b").stdout
    assert "0 files sent" in dump("--push", "file://store/A2b").stdout
    assert "Not a directory" in dump("--push", f"file://{world.json_path}/x", "--cache-root", "late").stderr
    assert not (world.root / "late").exists()
    result = run("dump", "--target", "b,c", "--json-path", world.json_path, *TINY, "--push", "file://store/A2b")
    assert result.exit_code == 2
    assert "an URL holds one target's cache" in result.stderr


def test_an_url_in_the_place_of_a_path_names_the_commands(run: Run) -> None:
    for command in (["dump", "--target", "b", "--cache-root", "s3://bkt/kd"], ["info", "s3://bkt/kd"]):
        result = run(*command)
        assert result.exit_code == 2
        assert "s3://bkt/kd is an URL, expected a path" in result.stderr
        assert "kd-cache pull s3://bkt/kd CACHE" in result.stderr
    assert run("pull", "cache/A2b", "s3://bkt/kd").exit_code == 2


def test_without_obstore_one_line_says_so(made: MadeCache, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    result = run("push", made.path, "s3://bkt/kd/A2b")
    assert result.exit_code == 2
    assert "pip install kd-cache[remote]" in result.stderr


def test_what_obstore_says_is_told_without_signatures(pushed: tuple[MadeCache, str, Path], tmp_path: Path) -> None:
    error = ValueError("Error performing GET https://h/x?sv=1&sig=secret in 3s\n\nDebug source:\n secret")
    assert kd_cache.remote.objects._cause(error) == "Error performing GET https://h/x?… in 3s"
    assert issubclass(ChangedError, KDCacheError)
