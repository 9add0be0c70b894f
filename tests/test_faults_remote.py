"""A local S3 that commands push to and pull from: killed at any moment, every bit of what is there flipped."""

from __future__ import annotations

import http.client
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO  # noqa: F401 (the settings of a test run)
from fault_tools import MARKS, TIER, Command, ended_at_last, host, often
from store_fixtures import MadeCache, Rows, make_cache, names, origin, two_teachers

import kd_cache.remote.objects
from kd_cache import LogitCache
from kd_cache.errors import CorruptError, KDCacheError, StaleError
from kd_cache.exchange.push import push_cache
from kd_cache.remote.objects import Patience
from kd_cache.remote.store import RemoteStore
from kd_cache.remote.url import open_store
from kd_cache.serve.pull import pull_cache
from kd_cache.store.index import index_of_bytes
from kd_cache.watch import Watcher

moto = pytest.importorskip("moto.server", reason="a local S3 needs moto[server], of the extra dev")
pytest.importorskip("obstore", reason="caches at an URL need the extra remote")
pytestmark = MARKS
KILLS, FLIPS = often(1, 3, 20), often(3, 20, 200)
COSTLY = pytest.mark.skipif(TIER == "one", reason="commands over a local S3 take seconds: make faults")
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A bucket ``bkt``; the environment says where it is."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    name, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(name, port)
    connection.request("PUT", "/bkt")
    assert connection.getresponse().status == 200
    connection.close()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{name}:{port}")
        patch.setenv("AWS_ALLOW_HTTP", "true")
        yield f"http://{name}:{port}"
    server.stop()


@pytest.fixture
def url(endpoint: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KD_CACHE_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr(kd_cache.remote.objects, "PATIENCE", Patience(5, 10, 3, 0.01))
    return f"s3://bkt/{request.node.name}/A2b"


def right(cache: LogitCache, made: MadeCache) -> bool:
    files = cache.files
    expected = [[made.rows[name].by_file()[file] for name in cache.teachers] for file in files]
    return len(files) == len(made.rows["scene"]) and np.array_equal(cache.batch(files).numpy(), np.array(expected))


def large(path: Path, seed: int) -> MadeCache:
    """40 MB in two packs: three pieces each."""
    rows = {name: Rows.of(names(20), 250_000, seed=seed + at) for at, name in enumerate(("city2scene", "scene"))}
    made = make_cache(path, rows, {name: origin(name, 250_000) for name in rows})
    for name in rows:
        shutil.rmtree(path / name)
    made.write_index(files=False, generation=seed)
    return made


def started(*arguments: object, cwd: Path) -> Command:
    names_of = (*ENVIRONMENT, "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP")
    return host().start(*arguments, cwd=cwd, env={name: os.environ[name] for name in names_of})


def is_whole(store: RemoteStore) -> bool:
    """Whether the index there finds its packs, whole; ``False`` where there is no index yet."""
    found = store.get("cache_index.json", 1 << 20)
    if found is None or found.content is None:
        return False
    for name in index_of_bytes(Path("cache_index.json"), found.content).packs:
        entry = store.head(f"packs/{name}")
        assert entry is not None, "the index names a pack that is not there"
    return True


def lasted(*arguments: object, cwd: Path) -> float:
    began = time.monotonic()
    command = started(*arguments, cwd=cwd)
    with ended_at_last([command]):
        outcome = command.wait()
    assert outcome.code == 0, outcome
    return time.monotonic() - began


@COSTLY
def test_a_push_that_is_killed_leaves_an_index_that_finds_its_packs(url: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(11)
    made = large(tmp_path / "cache/A2b", 1)
    whole = lasted("push", made.path, url, cwd=tmp_path)
    store = open_store(url)
    for number in range(KILLS):
        made = large(tmp_path / f"cache-{number}/A2b", number + 2)
        shutil.copy(tmp_path / "cache/A2b/remote.json", made.path)
        command = started("push", made.path, url, cwd=tmp_path)
        with ended_at_last([command]):
            command.ended(draw.uniform(0, whole))
            command.send(9)
            command.wait()
        assert is_whole(store)
        pull_cache(url, tmp_path / "reader")  # whatever index stands, it is served whole
        done = push_cache(made.path, url)
        assert done.index in ("sent", "same")
        assert right(LogitCache.open(url), made)
        shutil.copy(made.path / "remote.json", tmp_path / "cache/A2b")
        shutil.rmtree(made.path)


@COSTLY
def test_a_pull_that_is_killed_leaves_nothing_that_is_not_whole(url: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(12)
    made = large(tmp_path / "cache/A2b", 1)
    push_cache(made.path, url)
    whole = lasted("pull", url, "first", cwd=tmp_path)
    for number in range(KILLS):
        folder = tmp_path / f"pulled-{number}"
        command = started("pull", url, folder, cwd=tmp_path)
        with ended_at_last([command]):
            command.ended(draw.uniform(0, whole))
            command.send(9)
            command.wait()
        for path in folder.rglob("*.h5"):
            assert path.name.startswith(".tmp-") or path.read_bytes() == (made.path / "packs" / path.name).read_bytes()
        if (folder / "cache_index.json").exists():
            assert right(LogitCache.open(folder), made)
        pull_cache(url, folder)
        held = {path.name: path.read_bytes() for path in (folder / "packs").glob("[!.]*")}
        assert held == {path.name: path.read_bytes() for path in (made.path / "packs").iterdir()}
        assert right(LogitCache.open(folder), made)
        shutil.rmtree(folder)


def test_a_bit_that_flips_there_is_never_a_wrong_row(url: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(13)
    made = two_teachers(tmp_path / "cache/A2b", packs=0)
    push_cache(made.path, url)
    store = open_store(url, writing=True)
    entries = store.list()
    for _ in range(FLIPS):
        entry = entries[draw.integers(len(entries))]
        found = store.get(entry.name, 1 << 20)
        assert found is not None
        assert found.content is not None
        content = bytearray(found.content)
        content[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
        (tmp_path / "flipped").write_bytes(content)
        store.put_file(entry.name, tmp_path / "flipped", Watcher())
        shutil.rmtree(tmp_path / "mirror", ignore_errors=True)
        with pytest.raises((CorruptError, StaleError)) as caught:
            LogitCache.open(url)
        assert caught.value.exit_code in (4, 5)
        push_cache(made.path, url, check=True, replace=True)
        assert right(LogitCache.open(url), made)


@COSTLY
def test_of_two_pushes_at_once_one_wins_and_the_rows_are_the_winner_s(url: str, tmp_path: Path) -> None:
    one, two = large(tmp_path / "one/A2b", 1), large(tmp_path / "two/A2b", 2)
    commands = [started("push", made.path, url, cwd=tmp_path) for made in (one, two)]
    with ended_at_last(commands):
        codes = [command.wait().code for command in commands]
    assert sorted(codes) == [0, 5]
    assert right(LogitCache.open(url), (one, two)[codes.index(0)])
    again = [push_cache(path, url).index for path, code in ((one.path, codes[0]), (two.path, codes[1])) if code == 0]
    assert again == ["same"]
    with pytest.raises(KDCacheError, match="has another index"):
        push_cache((two, one)[codes.index(0)].path, url)
