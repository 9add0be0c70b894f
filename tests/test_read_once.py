"""How often a command reads what it needs: each pack, index, plan, record and list once, whatever asks for it."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, Run
from store_fixtures import origin
from typer.testing import CliRunner

from kd_cache.cli import app
from kd_cache.store.cache import CacheFolder
from kd_cache.store.pending import PendingRecord

COUNTED = ("open_pack", "read_index", "read_permitted", "load_plan", "measure", "keys_of")
MODULES = ("kd_cache.store.", "kd_cache.care.", "kd_cache.score.", "kd_cache.dataset.", "kd_cache.cli.")
PERMITTED = 340


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the sample was dumped with its own teachers."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "data").symlink_to(REPO / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, ["dump", "--target", "b", "--num-verify", "0"])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each is called, and for what: files by their name, keys only if they are those of a manifest."""
    counts: Counter[str] = Counter()

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            found = real(*args, **options)
            if name == "keys_of":
                if len(found) >= PERMITTED:
                    counts["keys_of the manifest"] += 1
            elif name == "measure":
                counts[f"measure {args[0].packs[0].origin.teacher}"] += 1
            else:
                counts[f"{name} {args[0].relative_to(Path.cwd()) if args[0].is_absolute() else args[0]}"] += 1
            return found

        return call

    modules = [module for at, module in sys.modules.items() if at.startswith(MODULES)]
    for name in COUNTED:
        for module in modules:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return counts


READ = {
    "cache_index.json": "read_index",
    "pending/*.json": "read_index",
    "permitted-*.npy": "read_permitted",
    "plan.json": "load_plan",
    "packs/*.h5": "open_pack",
}


def once_each(cache: Path) -> dict[str, int]:
    """What reads each file of a cache, and that it does so once."""
    found = [f"{how} {path.relative_to(Path.cwd())}" for pattern, how in READ.items() for path in cache.glob(pattern)]
    return dict.fromkeys(found, 1)


ONCE_PER_TEACHER = {"measure city2scene": 1, "measure scene": 1}


@pytest.mark.parametrize("command", [("dump", "--target", "b"), ("verify", "--all")], ids=lambda command: command[0])
def test_a_command_with_nothing_to_do_reads_and_measures_everything_once(
    sample: Path, run: Run, counted: Counter[str], tmp_path: Path, command: tuple[str, ...]
) -> None:
    """A dump verifies some samples at its end: that is no second look."""
    (tmp_path / "data").symlink_to(REPO / "data")
    shutil.copytree(sample / "cache", tmp_path / "cache")
    begun = PendingRecord(CacheFolder(tmp_path / "cache" / "A2b"), {"third": origin("third")}, {})
    begun.write({}, {})
    expected = once_each(tmp_path / "cache" / "A2b")
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert counted == {**expected, **ONCE_PER_TEACHER, "keys_of the manifest": 1}


def test_a_merge_reads_source_and_destination_once_each(
    sample: Path, run: Run, counted: Counter[str], tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(REPO / "data")
    for root in ("cache", "source"):
        shutil.copytree(sample / "cache", tmp_path / root)
    files = once_each(tmp_path / "cache" / "A2b") | once_each(tmp_path / "source" / "A2b")
    measured = dict.fromkeys(ONCE_PER_TEACHER, 2)  # by the labels that each has
    result = run("merge", "source/A2b", "--target", "b")
    assert result.exit_code == 0, result.output
    assert counted == {**files, **measured, "keys_of the manifest": 1}
