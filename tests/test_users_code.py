"""Whatever a teacher's code raises is the teacher's error: no command ends with 0 because of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run, World

ATTRIBUTES = ("class_names", "num_bins", "provenance")
PLACES = ("forward", "fingerprint_parts", "to", "eval", "state_dict", *ATTRIBUTES)
RAISES = (
    "raise SystemExit(0)", "import sys; sys.exit()", "raise GeneratedError", "raise MemoryError('no')",
    "raise GeneratorExit", "raise NamelessError",
)  # fmt: skip

TEACHER = """
import torch

class GeneratedError(BaseException):
    pass

class NamelessError(Exception):
    def __str__(self):
        raise ValueError("it has no text")

class Teacher:
    num_classes, value_kind = 10, "logits"

    def maybe(self, place):
        if place == {place!r}:
            {error}

    def __call__(self, batch):
        self.maybe("forward")
        return torch.randn(len(batch), 10)

    def fingerprint_parts(self):
        self.maybe("fingerprint_parts")
        return {{"architecture": "mine/1"}}

    def state_dict(self):
        self.maybe("state_dict")
        return {{"w": torch.ones(3)}}

    def to(self, device):
        self.maybe("to")
        return self

    def __getattr__(self, name):
        self.maybe(name)
        raise AttributeError(name)

    def eval(self):
        self.maybe("eval")
        return self

def make(ckpt):
    return Teacher()
"""


@pytest.mark.parametrize("error", RAISES)
@pytest.mark.parametrize("place", PLACES)
def test_what_a_teacher_raises_is_said_and_never_success(run: Run, world: World, place: str, error: str) -> None:
    Path("mine.py").write_text(TEACHER.format(place=place, error=error))
    own = ("--teacher", "mine=mine.py:make", "--only", "mine", "--on-bad-sample", "skip")
    result = run("dump", "--target", "b", "--json-path", world.json_path, *own)
    assert result.exit_code == 1, result.output
    said = result.stderr.partition("error: ")[2]
    assert "mine" in said or "Teacher" in said
    assert "unexpected" not in said


def test_what_a_teacher_prints_is_no_part_of_the_json(run: Run, world: World) -> None:
    Path("mine.py").write_text(TEACHER.format(place="eval", error="print('who reads this?')"))
    result = run(
        "dump", "--target", "b", "--json-path", world.json_path, "--teacher", "mine=mine.py:make", "--only", "mine",
        "--json", "--dry-run",
    )  # fmt: skip
    assert json.loads(result.stdout)["permitted"] > 0
