"""Code that a person names by its file: found wherever it lies, with its neighbours, and with errors for a person."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run, World

from kd_cache import UsageError
from kd_cache.score.factory import load_file, resolve_factory, without_folder
from kd_cache.score.teacher import parse_teacher, teacher_fingerprint

TEACHER = """
import torch
from .numbers import SCALE  # lies beside it, and is not the standard library's

class Mine(torch.nn.Module):
    num_classes, value_kind = 3, "logits"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(SCALE))

    def forward(self, x):
        return x.mean(dim=(1, 2))[:, None] * self.scale * torch.arange(3.0)

    def fingerprint_parts(self):
        return {"architecture": "mine/1"}

def mine(ckpt):
    return Mine()
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A file ``mine.py`` in a folder, and ``numbers.py`` beside it; gives the first one's path."""

    def written(folder: str = "teachers", text: str = TEACHER, scale: float = 2.0) -> Path:
        path = tmp_path / folder / "mine.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "numbers.py").write_text(f"SCALE = {scale}")
        return path

    return written


def test_a_teacher_in_a_folder_called_teachers_is_found_and_dumped(write: Write, world: World, run: Run) -> None:
    write()
    data = ("--target", "b", "--json-path", world.json_path, "--only", "mine")
    assert run("dump", *data, "--teacher", "mine=teachers/mine.py:mine").exit_code == 0
    again = ("--teacher", f"mine={world.root / 'teachers/mine.py'}:mine", "--recompute")
    assert run("verify", "--cache-root", "cache", *again).exit_code == 0


def test_the_fingerprint_does_not_depend_on_the_path(write: Write) -> None:
    made = [parse_teacher(f"mine={write(folder)}:mine").load() for folder in ("one", "two/three")]
    assert teacher_fingerprint(made[0]) == teacher_fingerprint(made[1])
    assert without_folder("a/b/mine.py:small") == without_folder("~/mine.py:small") == "mine.py:small"
    assert without_folder("a.b:small") == "a.b:small"


def test_files_of_one_name_in_two_folders_each_have_their_own_neighbours(write: Write) -> None:
    one, two = (load_file(write(folder, scale=scale)) for folder, scale in (("one", 1.0), ("two", 2.0)))
    assert (one.SCALE, two.SCALE) == (1.0, 2.0)
    assert load_file(Path(one.__file__ or "")) is one
    assert "mine" not in sys.modules


def test_a_file_leaves_the_search_path_as_it_was(write: Write) -> None:
    before = [*sys.path]
    load_file(write())
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ("", "gone.py:mine", "gone.py: it is no Python file"),
        ("", "mine.py:other", "mine.py has no other"),
        ("", "mine.py:", "mine.py has no factory after the colon"),
        ("mine = 3", "mine.py:mine", "is not callable"),
        ("1 / 0", "mine.py:mine", "ZeroDivisionError: division by zero"),
        ("def mine(:", "mine.py:mine", "SyntaxError"),
        ("import numbers_of_nobody", "mine.py:mine", "No module named 'numbers_of_nobody'"),
        ("from .nobody import x", "mine.py:mine", "ModuleNotFoundError"),
        ("raise SystemExit(0)", "mine.py:mine", "SystemExit"),
    ],
)
def test_each_way_not_to_find_a_factory_in_a_file_is_a_usage_error(
    write: Write, text: str, name: str, reason: str
) -> None:
    folder = write(text=text).parent
    for _ in range(2):  # a file that failed is not taken for one that was loaded
        with pytest.raises(UsageError) as caught:
            resolve_factory(f"{folder}/{name}")
        assert reason in caught.value.message
