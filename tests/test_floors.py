"""The house: imports point down, and nothing goes round in circles."""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

import mutations
import pytest
from conftest import REPO

from kd_cache.dataset.task import DCASE
from kd_cache.options import Target

FLOORS: Mapping[str, int] = {
    "errors": 1, "keys": 1, "options": 1, "commands": 1, "watch": 1,
    "files": 2,
    "dataset": 3, "remote": 3, "store": 3,
    "prepare": 4, "score": 4, "serve": 4,
    "care": 5, "cluster": 5, "exchange": 5, "train": 5,
    "distill": 6, "own_data": 6, "report": 6,
    "cli": 7,
    "__init__": 7,
    "__main__": 8,
}  # fmt: skip
"""The floor of each package and module in ``kd_cache``. A room imports
none of its own floor, but for the ground's."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for top in ("kd_cache", "teachers") for path in (REPO / top).rglob("*.py")}


def imports(path: Path) -> Iterator[str]:
    """Every module of ours that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


ARROWS = {
    name: {target for target in imports(path) if target in MODULES and target != name} for name, path in MODULES.items()
}


def room(module: str) -> str:
    """The package or module directly in ``kd_cache``."""
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_a_floor_and_every_floor_its_rooms() -> None:
    rooms = {room(name) for name in MODULES if name.startswith("kd_cache")}
    assert rooms == FLOORS.keys()


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("kd_cache.")))
def test_imports_point_down(name: str) -> None:
    here = FLOORS[room(name)]
    for target in ARROWS[name]:
        assert target.startswith("kd_cache"), f"{name} imports {target}: kd_cache stands without its plug-ins"
        if target == "kd_cache":
            continue  # its version; the package itself imports nothing before it is asked
        same_room = room(target) == room(name)
        ground = here == FLOORS[room(target)] == 1
        assert same_room or ground or FLOORS[room(target)] < here, f"{name} imports {target}, which is not below it"


def test_nothing_goes_round_in_circles() -> None:
    """Also within packages, and for imports that only types need."""
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join([*above[above.index(name) :], name])
        if name in done:
            return
        for target in sorted(ARROWS[name]):
            if target != "kd_cache":
                visit(target, (*above, name))
        done.add(name)

    for name in sorted(MODULES):
        if name != "kd_cache":
            visit(name, ())


def test_no_file_is_longer_than_five_hundred_lines() -> None:
    long = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in long.items() if count > 500} == {}


def test_only_the_data_set_s_own_package_its_layouts_and_the_training_of_teachers_name_the_task() -> None:
    """A second task needs no edit elsewhere."""
    named = {name for name, path in MODULES.items() if "DCASE" in path.read_text() and room(name) != "dataset"}
    free = ("kd_cache.train", "kd_cache.prepare.layouts", "teachers")
    assert named <= {name for name in MODULES if name.startswith(free)}


def test_the_targets_to_choose_from_are_the_task_s() -> None:
    assert tuple(typing.get_args(Target)) == DCASE.targets


def test_each_mutation_finds_its_place_and_its_tests() -> None:
    """They are run by hand: a place that moved would be noticed late."""
    for mutant in mutations.parsed():
        assert (REPO / mutant.file).read_text().count(mutant.old) == 1, mutant.name
        assert all((REPO / "tests" / test).exists() for test in mutant.tests), mutant.name
