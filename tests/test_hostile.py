"""Hostile files meet the real command in a fenced child: a typed error, nothing run, nothing written outside."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World
from hostile_checkpoints import CANARY, CHECKPOINTS, EVIL, good, not_finite, saved
from hostile_data import FEATURES, GOOD, MANIFESTS, PATHS
from hostile_fence import MEMORY, Outcome, Work, all_fenced, command, each_fenced, fenced, picture, python
from hostile_stores import INDEXES, OLDER, OTHERS, PACKS, PLANS, ROW_FILES, Store, settings
from store_fixtures import forks
from typer.testing import CliRunner

from kd_cache import options
from kd_cache.cli import app
from kd_cache.dataset import features, manifest
from kd_cache.errors import CheckpointError
from kd_cache.keys import sample_key
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.train.checkpoint_file import MOST_BYTES
from teachers import checkpoint_limit, load_teacher, scene

pytestmark = forks

DATA = ("--json-path", "dataset.json", "--data-root", ".")
TEACHER = ("--teacher", "tiny=tiny_teachers:linear")
OWN = (*TEACHER, "--only", "tiny")
DUMP = ("dump", "--target", "b", *DATA)
VERIFY = ("verify", "--all", *DATA, *TEACHER)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Four samples of A and two of b, dumped with a tiny teacher."""
    made = World(tmp_path_factory.mktemp("template"))
    for number in range(4):
        made.add(number, "A", "train")
    for number in range(4, 6):
        made.add(number, "b", "train", frames=16)
    made.add(6, "A", "test")
    made.write()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.root)
        for arguments in ([*DUMP, *OWN], VERIFY, ["info"]):  # so that all modules are imported before the forks
            result = CliRunner().invoke(app, list(arguments))
            assert result.exit_code == 0, result.output
    return made


Copies = Callable[[], World]
MEMORY_DISK = Path("/dev/shm")  # noqa: S108 (a folder of its own is made there)


@pytest.fixture
def copies(template: World) -> Iterator[Copies]:
    """Makes copies of the template for tests to spoil, each beside a folder that is none of its business."""
    # A disk takes more time to make and remove these than everything else here.
    fast = MEMORY_DISK if os.access(MEMORY_DISK, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:

        def copy() -> World:
            root = Path(tempfile.mkdtemp(dir=folder)) / "w"
            shutil.copytree(template.root, root, symlinks=True)
            (root.parent / "outside").mkdir()
            np.save(root.parent / "outside" / "secret.npy", GOOD)
            return World(root, [dict(row) for row in template.rows])

        yield copy


@pytest.fixture
def world(copies: Copies) -> World:
    return copies()


def refused(outcome: Outcome, code: int, kind: str | None, *words: str) -> None:
    """The child came back by itself, with this exit status, type and words, and nothing that a terminal would obey."""
    assert outcome.killed is None, outcome
    assert (outcome.code, outcome.kind) == (code, kind), outcome.said
    for word in words:
        assert word in outcome.said
    for alarm in ("Traceback", "error: unexpected", "MemoryError", "\x1b", "\x07", "Warning"):
        assert alarm not in outcome.said
    assert outcome.grown < MEMORY


def at_the_fence(world: World, *arguments: object) -> Outcome:
    """Run the command; whatever it does, it changes nothing but the cache."""
    (outcome,) = all_at_the_fence(world, arguments)
    return outcome


def all_at_the_fence(world: World, *commands: Sequence[object]) -> list[Outcome]:
    """Run these commands one after the other; all that they may change is the cache."""
    around = world.root.parent
    before = picture(around, "w/cache/A2b")
    outcomes = all_fenced([command(*arguments) for arguments in commands], world.root)
    assert picture(around, "w/cache/A2b") == before
    assert len(outcomes) == len(commands), outcomes
    return outcomes


@dataclass(frozen=True)
class Met:
    """A case that was at the fence: its outcomes, and everything around its cache and in it, before and after."""

    case: str
    world: World
    outcomes: list[Outcome]
    before: dict[str, tuple[Any, ...]]
    after: dict[str, tuple[Any, ...]]


def by_twenty(cases: Iterable[str]) -> list[list[str]]:
    """So many share a child: a fork of this large process takes longer than most cases do."""
    names = list(cases)
    return [names[at : at + 20] for at in range(0, len(names), 20)]


def first_of(cases: list[str]) -> str:
    return f"{cases[0]} …"


def each_at_the_fence(
    copies: Copies, cases: Sequence[str], arrange: Callable[[str, World], Sequence[Work]]
) -> list[Met]:
    """Spoil a copy for each case, then do what ``arrange`` gives in each, all in one child."""
    worlds = [copies() for _ in cases]
    works = [arrange(case, world) for case, world in zip(cases, worlds, strict=True)]
    before = [picture(world.root.parent) for world in worlds]
    outcomes = each_fenced([(work, world.root) for work, world in zip(works, worlds, strict=True)])
    after = [picture(world.root.parent) for world in worlds]
    return [Met(*one) for one in zip(cases, worlds, outcomes, before, after, strict=True)]


def without_cache(found: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    return {name: what for name, what in found.items() if name != "w/cache/A2b" and not name.startswith("w/cache/A2b/")}


# -- the fence itself --------------------------------------------------------------------------------------------------


def test_the_fence_lets_good_work_through(world: World) -> None:
    outcome = at_the_fence(world, *DUMP, *OWN)
    assert (outcome.killed, outcome.code, outcome.kind) == (None, 0, None), outcome.said
    assert "every permitted sample is cached and fresh" in outcome.stdout


def test_the_fence_stops_a_child_that_hangs(tmp_path: Path) -> None:
    def hang() -> dict[str, object]:
        while True:
            pass

    assert fenced(hang, tmp_path, seconds=0.2).killed == "SIGPROF"
    assert fenced(lambda: time.sleep(100) or {}, tmp_path, waiting=0.2).killed == "SIGALRM"


def test_the_fence_goes_on_behind_a_case_that_ends_the_child(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("one", "two", "three")]
    for place in places:
        place.mkdir()

    def die() -> dict[str, Any]:
        os.write(2, b"no more")
        os._exit(0)

    where = python(lambda: str(Path.cwd()))
    one, two, three = each_fenced([([where, where], places[0]), ([where, die], places[1]), ([where], places[2])])
    assert [outcome.value for outcome in (*one, *two, *three)] == [
        *map(str, (places[0],) * 2 + (places[1],)),
        None,
        str(places[2]),
    ]
    assert two[1].killed == "ended by itself"


def too_much() -> None:
    """A mapping of its own: what Python allocates may lie where something was freed before the fence went up."""
    try:
        mmap.mmap(-1, MEMORY + (8 << 20))
    except OSError as error:
        raise MemoryError from error


def test_the_fence_refuses_memory(tmp_path: Path) -> None:
    assert fenced(python(too_much), tmp_path).kind == "MemoryError"
    modest = fenced(python(lambda: len(b"x" * (MEMORY // 2))), tmp_path)
    assert modest.killed is None
    assert modest.grown > MEMORY // 3


def test_the_fence_sees_a_crash_and_what_was_printed_on_the_way(tmp_path: Path) -> None:
    def crash() -> dict[str, object]:
        faulthandler.disable()
        os.write(2, b"terminate called")
        os.abort()

    outcome = fenced(crash, tmp_path)
    assert (outcome.killed, outcome.stderr) == ("SIGABRT", "terminate called")


def test_the_fence_sees_what_a_payload_does(world: World) -> None:
    """Loaded as nobody should, the pickles used here do run, and leave a file that the picture shows."""
    CHECKPOINTS["os.system in a zip"].make(world.root)
    before = picture(world.root, "cache")
    fenced(python(lambda: str(torch.load(EVIL, weights_only=False))), world.root)
    assert picture(world.root, "cache").keys() - before.keys() == {CANARY}


# -- checkpoints -------------------------------------------------------------------------------------------------------

WITH_EVIL = (*DUMP, "--scene-teacher-ckpt", EVIL, "--only", "scene")


def test_a_good_checkpoint_in_the_same_place_is_loaded(world: World) -> None:
    saved(good())(world.root)
    assert at_the_fence(world, *WITH_EVIL, "--dry-run").code == 0


@pytest.mark.parametrize("cases", by_twenty(CHECKPOINTS), ids=first_of)
def test_hostile_checkpoints_are_refused(copies: Copies, cases: list[str], subtests: pytest.Subtests) -> None:
    def arrange(case: str, world: World) -> list[Work]:
        CHECKPOINTS[case].make(world.root)
        return [command(*WITH_EVIL)]

    for met in each_at_the_fence(copies, cases, arrange):
        with subtests.test(case=met.case):
            (outcome,) = met.outcomes
            refused(outcome, 1, "CheckpointError", EVIL, *CHECKPOINTS[met.case].says)
            assert met.after == met.before, "a refused dump changes nothing"


@pytest.mark.parametrize("how", ["written over", "replaced by another", "replaced by a pickle"])
def test_a_checkpoint_that_is_replaced_while_it_is_read(world: World, how: str) -> None:
    """What was opened is what counts, and what the index says was read. Written into, it is refused."""
    saved(good())(world.root)
    read = (world.root / EVIL).read_bytes()
    aside = world.root / "aside"
    aside.mkdir()
    (CHECKPOINTS["os.system in a zip"].make if "pickle" in how else saved(not_finite(0.5)))(aside)
    load = torch.load

    def meanwhile(*args: Any, **options: Any) -> Any:
        if how == "written over":
            (world.root / EVIL).write_bytes(read + b"more")
        else:
            (aside / EVIL).replace(world.root / EVIL)
        return load(*args, **options)

    def work() -> dict[str, Any]:
        torch.load = meanwhile
        return command(*DUMP, "--scene-teacher-ckpt", EVIL, "--only", "scene")()

    outcome = fenced(work, world.root)
    if how == "written over":
        refused(outcome, 1, "CheckpointError", EVIL, "changed while it was read")
        return
    refused(outcome, 0, None)
    source = json.loads((world.cache / "cache_index.json").read_text())["kd_cache"]["teachers"]["scene"]["source"]
    assert source["checkpoint_sha256"] == hashlib.sha256(read).hexdigest()
    assert not (world.root / CANARY).exists()


# What is not read as a checkpoint at all (safetensors, legacy files) is another format to adopt, and says so.
ADOPTED = [
    *(
        name
        for name in CHECKPOINTS
        if name.startswith(("os.system", "eval", "10^12", "a storage larger", "a key that"))
    ),
    *(
        "TorchScript",
        "a pickled module",
        "truncated zip",
        "zip bomb",
        "overlapping zip members",
        "a bytearray of 100 GB",
    ),
    *("two pickles in one zip", "a numpy scalar of 2 GB", "a key nested two million deep", "a FIFO", "a device"),
    "a pickle that keeps the reader busy",
]


@pytest.mark.parametrize("cases", by_twenty(ADOPTED), ids=first_of)
def test_hostile_tensors_are_not_adopted(copies: Copies, cases: list[str], subtests: pytest.Subtests) -> None:
    def arrange(case: str, world: World) -> list[Work]:
        CHECKPOINTS[case].make(world.root)
        return [command("adopt", EVIL, "--target", "b", *DATA)]

    for met in each_at_the_fence(copies, cases, arrange):
        with subtests.test(case=met.case):
            (outcome,) = met.outcomes
            code, kind = (1, "StoreError") if met.case in ("a FIFO", "a device") else (2, "UsageError")
            refused(outcome, code, kind, EVIL)
            assert met.after == met.before


# -- features ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cases", by_twenty(FEATURES), ids=first_of)
def test_hostile_features_are_refused(copies: Copies, cases: list[str], subtests: pytest.Subtests) -> None:
    def arrange(case: str, world: World) -> list[Work]:
        FEATURES[case].make(world.feature(world.permitted()[0]))
        return [command(*DUMP, *OWN), command(*VERIFY)]

    for met in each_at_the_fence(copies, cases, arrange):
        with subtests.test(case=met.case):
            scored, audit = met.outcomes
            victim, says = met.world.permitted()[0], FEATURES[met.case].says
            refused(scored, 1, "FeatureError", victim, says)
            if met.case == "another F":  # a feature like any other, but not the one that was scored
                refused(audit, 5, None, f"{victim}: its feature file is not the one that was scored")
            else:
                refused(audit, 1, None, f"{victim}: its freshness cannot be checked", says)
            assert met.after == met.before


def test_a_hostile_feature_can_be_skipped_and_its_row_stays(world: World) -> None:
    """What cannot be read says nothing about the row that was scored before."""
    victim = world.permitted()[0]
    FEATURES["objects"].make(world.feature(victim))
    refused(at_the_fence(world, *DUMP, *OWN, "--on-bad-sample", "skip"), 3, None, f"missing: {victim}", "its dtype")
    assert world.view("tiny", victim).exists()


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cases", by_twenty(PATHS), ids=first_of)
def test_hostile_paths_are_refused(copies: Copies, cases: list[str], subtests: pytest.Subtests) -> None:
    def arrange(case: str, world: World) -> list[Work]:
        world.rows[0]["file"] = PATHS[case].make(world)
        world.write()
        return [command(*DUMP, *OWN), command(*VERIFY), command(*VERIFY, "--json")]

    for met in each_at_the_fence(copies, cases, arrange):
        with subtests.test(case=met.case):
            scored, *audits = met.outcomes
            case = PATHS[met.case]
            refused(scored, case.code, case.kind, case.says)
            assert len(audits) == 2
            for audit in audits:
                assert audit.code in (1, 2, 3, 6)
                refused(audit, audit.code, audit.kind)
            assert met.after == met.before


def test_escapes_in_the_name_of_a_sample_are_printed_as_text_and_kept_in_json(world: World) -> None:
    name = "x/\x1b[2J\x1b]0;owned\x07.npy"
    world.rows[0]["file"] = name
    world.write_feature(name, GOOD)
    world.write()
    refused(at_the_fence(world, *DUMP, *OWN), 0, None)
    world.feature(name).unlink()
    dumped, audit, as_json = all_at_the_fence(world, [*DUMP, *OWN], VERIFY, [*VERIFY, "--json"])
    escaped = r"x/\x1b[2J\x1b]0;owned\x07.npy"
    refused(dumped, 1, "FeatureError", escaped)
    refused(audit, 1, None, escaped)
    refused(as_json, 1, None)
    (report,) = json.loads(as_json.stdout)["caches"]
    assert [problem["file"] for problem in report["problems"]] == [escaped]


# -- manifests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cases", by_twenty(MANIFESTS), ids=first_of)
def test_hostile_manifests_are_refused(copies: Copies, cases: list[str], subtests: pytest.Subtests) -> None:
    def arrange(case: str, world: World) -> list[Work]:
        world.json_path.write_bytes(MANIFESTS[case].change(world.json_path.read_bytes()))
        return [command(*DUMP, *OWN), command(*VERIFY)]

    for met in each_at_the_fence(copies, cases, arrange):
        with subtests.test(case=met.case):
            assert len(met.outcomes) == 2
            for outcome in met.outcomes:
                refused(outcome, 2, "ManifestError", "dataset.json", MANIFESTS[met.case].says)
            assert met.after == met.before


NO_MANIFESTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "not a regular file"),
    "folder": (Path.mkdir, "a directory"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "loop": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "4 GB that take no room": (lambda path: (path.touch(), os.truncate(path, 4 << 30)), "--max-manifest-bytes"),
}


def test_what_is_no_manifest_is_refused_unread(copies: Copies, subtests: pytest.Subtests) -> None:
    def arrange(what: str, world: World) -> list[Work]:
        world.json_path.unlink()
        NO_MANIFESTS[what][0](world.json_path)
        return [command(*DUMP, *OWN), command(*VERIFY)]

    for met in each_at_the_fence(copies, list(NO_MANIFESTS), arrange):
        with subtests.test(case=met.case):
            assert len(met.outcomes) == 2
            for outcome in met.outcomes:
                refused(outcome, 2, "ManifestError", NO_MANIFESTS[met.case][1])
            assert met.after == met.before


# -- settings ----------------------------------------------------------------------------------------------------------

DOUBLING = "x0: &x0 {a: 1}\n" + "".join(f"x{n + 1}: &x{n + 1} {{<<: [*x{n}, *x{n}]}}\n" for n in range(40))
SETTINGS = {
    "code": (f"target: !!python/object/apply:os.system ['touch {CANARY}']\n", "could not determine a constructor"),
    "merges that double 40 times": (DOUBLING, "merge keys (<<) are not settings"),
    "100k nesting": ("target: " + "[" * 100_000, "more than 16384 characters"),
    "16k nesting": ("target: " + "[" * 16_000, "maximum recursion depth"),
    "an integer of 10k digits": ("batch-size: " + "9" * 10_000, "4300 digits"),
    "escapes": ('"\\e[2J\\a": 3\n', r"unknown setting \x1b[2J\x07"),
    "64 GB that take no room": (None, "more than 16384 characters"),
}


def test_hostile_settings_files_in_the_current_folder_are_refused(copies: Copies, subtests: pytest.Subtests) -> None:
    def arrange(case: str, world: World) -> list[Work]:
        content, path = SETTINGS[case][0], world.root / "kd-cache.yaml"
        path.write_text(content or "")
        if content is None:
            os.truncate(path, 1 << 36)
        return [command(*DUMP, *OWN)]

    for met in each_at_the_fence(copies, list(SETTINGS), arrange):
        with subtests.test(case=met.case):
            (outcome,) = met.outcomes
            refused(outcome, 2, None, "kd-cache.yaml", SETTINGS[met.case][1])
            assert met.after == met.before


# -- what a cache is made of -------------------------------------------------------------------------------------------


Look = Callable[[], dict[str, int]]


def opened(world: World) -> Look:
    """Open the cache, count its rows, and those that are not as the template's view has them."""
    rows = {path.stem: path.read_bytes() for path in (world.cache / "tiny").iterdir()}

    def look() -> dict[str, int]:
        cache = LogitCache.open("cache/A2b")
        pairs = zip(cache.files, cache.tensor()[:, 0].numpy(), strict=True)
        wrong = sum(not rows[sample_key(file)].endswith(row.tobytes()) for file, row in pairs)
        return {"rows": len(cache), "wrong": wrong}

    return look


@pytest.fixture(scope="module")
def look(template: World) -> Look:
    return opened(template)


WHOLE = {"rows": 6, "wrong": 0}


def read_and_heal(look: Look, make: Callable[[World], object], world: World) -> list[Work]:
    """Read it in three ways, which changes nothing; dump into it; where that succeeded, it is whole."""
    make(world)
    around = world.root.parent
    before = picture(around)
    unchanged = python(lambda: picture(around) == before)
    reading = [python(look), command(*VERIFY), command("info", "cache/A2b"), unchanged]
    return [*reading, command(*DUMP, *OWN), python(look), command(*VERIFY)]


def check_read_and_healed(met: Met, case: Store) -> None:
    assert len(met.outcomes) == 7, met.outcomes[-1]
    *read, same, healed, again, audit = met.outcomes
    assert without_cache(met.after) == without_cache(met.before)
    for outcome, code in zip(read, case.read, strict=True):
        refused(outcome, code, outcome.kind, *(["A2b"] if code else []))
    assert case.read[0] or read[0].value == WHOLE
    assert same.value is True, "reading changes nothing"
    refused(healed, case.dump, healed.kind)
    assert case.says in "".join(outcome.said for outcome in (*read, healed))
    if case.dump == 0:
        refused(again, 0, None)
        assert again.value == WHOLE
        refused(audit, 0, None)
    else:
        assert met.after["w/cache/A2b/cache_index.json"] == met.before["w/cache/A2b/cache_index.json"]


STORES = {
    "index": INDEXES,
    "pack": PACKS,
    "other": OTHERS,
    "row file": {name: Store(make, "differs from the pack", (0, 4, 0)) for name, make in ROW_FILES.items()},
}


@pytest.mark.parametrize(
    ("what", "cases"),
    [(what, cases) for what, stores in STORES.items() for cases in by_twenty(stores)],
    ids=lambda value: value if isinstance(value, str) else first_of(value),
)
def test_what_is_hostile_in_a_cache_is_refused_and_made_anew(
    copies: Copies, look: Look, what: str, cases: list[str], subtests: pytest.Subtests
) -> None:
    stores = STORES[what]
    for met in each_at_the_fence(copies, cases, lambda case, world: read_and_heal(look, stores[case].make, world)):
        with subtests.test(case=met.case):
            check_read_and_healed(met, stores[met.case])


@pytest.mark.parametrize("cases", by_twenty(PLANS), ids=first_of)
def test_hostile_plans_are_made_anew(copies: Copies, cases: list[str], subtests: pytest.Subtests) -> None:
    """Also where one is needed: a sample is new."""

    def arrange(case: str, world: World) -> list[Work]:
        (world.cache / "plan.json").write_bytes(PLANS[case])
        world.add(7, "b", "train")
        world.write()
        return [command(*DUMP, *OWN), command(*VERIFY, "--recompute")]

    for met in each_at_the_fence(copies, cases, arrange):
        with subtests.test(case=met.case):
            scored, audit = met.outcomes
            refused(scored, 0, None)
            refused(audit, 0, None)
            assert without_cache(met.after) == without_cache(met.before)


@pytest.mark.parametrize("cases", by_twenty(OLDER), ids=first_of)
def test_hostile_caches_of_an_older_script_are_refused(
    copies: Copies, cases: list[str], subtests: pytest.Subtests
) -> None:
    def arrange(case: str, world: World) -> list[Work]:
        OLDER[case][0](world)
        opening = python(lambda: len(LogitCache.open("cache/A2b")))
        return [opening, command(*VERIFY), command("info"), command(*DUMP, *OWN)]

    for met in each_at_the_fence(copies, cases, arrange):
        with subtests.test(case=met.case):
            opening, *others = met.outcomes
            assert opening.killed is None
            assert (opening.code, opening.kind) == (4, "CorruptError"), opening.said
            assert OLDER[met.case][1] in opening.stderr
            assert len(others) == 3
            for outcome in others:
                refused(outcome, 5, outcome.kind, "older script")
            assert met.after == met.before


# -- caps --------------------------------------------------------------------------------------------------------------


def test_each_cap_is_an_option_that_its_message_names(world: World) -> None:
    saved(good())(world.root)
    scene = ("--scene-teacher-ckpt", EVIL, "--only", "scene", "--dry-run")
    largest = max((world.feature(file) for file in world.permitted()), key=lambda path: path.stat().st_size)
    caps = {
        "--max-manifest-bytes": (world.json_path, 2, "ManifestError", OWN),
        "--max-feature-bytes": (largest, 1, "FeatureError", OWN),
        "--max-checkpoint-bytes": (world.root / EVIL, 1, "CheckpointError", scene),
    }
    for option, (path, code, kind, rest) in caps.items():
        size = path.stat().st_size
        less, enough = all_at_the_fence(world, [*DUMP, *rest, option, size - 1], [*DUMP, *rest, option, size])
        refused(less, code, kind, f"{size} bytes", option, str(size - 1))
        refused(enough, 0, None)


@pytest.mark.parametrize("what", ["manifest", "feature"])
def test_a_cache_from_elsewhere_cannot_raise_a_cap(world: World, what: str) -> None:
    """`kd-cache verify` takes paths and settings from the cache, but not how much may be read."""
    values = {f"max_{name}_bytes": 1 << 62 for name in ("manifest", "feature", "checkpoint")}
    settings("values", **values)(world)
    settings("paths", json_path=str(world.json_path), data_root=str(world.root))(world)
    victim = world.json_path if what == "manifest" else world.feature(world.permitted()[0])
    os.truncate(victim, 1 << 36)
    outcome = at_the_fence(world, "verify", "--all", *TEACHER)
    code, kind = (2, "ManifestError") if what == "manifest" else (1, None)
    refused(outcome, code, kind, victim.name, f"--max-{what}-bytes")


def test_the_command_has_the_caps_of_the_library() -> None:
    library = (manifest.MAX_BYTES, features.MAX_BYTES, MOST_BYTES)
    assert library == (options.MAX_MANIFEST, options.MAX_FEATURE, options.MAX_CHECKPOINT)


def test_the_limit_of_checkpoints_holds_within_its_block_and_for_factories_too(world: World) -> None:
    saved(good())(world.root)
    path = world.root / EVIL
    size = path.stat().st_size
    with checkpoint_limit(size - 1):
        for load in (load_teacher, scene):
            with pytest.raises(CheckpointError, match=f"{size} bytes; teachers of up to {size - 1} are read") as caught:
                load(path)
            assert "--max-checkpoint-bytes" in str(caught.value.hint)
        with checkpoint_limit(size):
            assert scene(path).num_classes == 10
    assert load_teacher(path).num_classes == 10
