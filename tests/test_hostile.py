"""Hostile files meet the real command in a fenced child: a typed error, nothing run, nothing written outside."""

from __future__ import annotations

import faulthandler
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World
from hostile_checkpoints import CANARY, CHECKPOINTS, EVIL, good, not_finite, saved
from hostile_data import FEATURES, GOOD, MANIFESTS, NFC, NFD, PATHS
from hostile_fence import MEMORY, Outcome, all_fenced, command, fenced, picture, python
from hostile_stores import INDEXES, OLDER, OTHERS, PACKS, PLANS, ROW_FILES, Store, settings
from store_fixtures import forks
from typer.testing import CliRunner

from kd_cache import features, manifest, options
from kd_cache.cli import app
from kd_cache.errors import CheckpointError, FeatureError, ManifestError
from kd_cache.features import FeatureSource
from kd_cache.loader import LogitCache
from kd_cache.manifest import load_manifest, sample_key
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


MEMORY_DISK = Path("/dev/shm")  # noqa: S108 (a folder of its own is made there)


@pytest.fixture
def world(template: World) -> Iterator[World]:
    """A copy of the template, for one test to spoil, and beside it a folder that is none of its business."""
    # A disk takes more time to make and remove these than everything else here.
    fast = MEMORY_DISK if os.access(MEMORY_DISK, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        root = Path(folder) / "w"
        shutil.copytree(template.root, root, symlinks=True)
        (root.parent / "outside").mkdir()
        np.save(root.parent / "outside" / "secret.npy", GOOD)
        yield World(root, [dict(row) for row in template.rows])


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


# -- the fence itself --------------------------------------------------------------------------------------------------


def test_the_fence_lets_good_work_through(world: World) -> None:
    outcome = at_the_fence(world, *DUMP, *OWN)
    assert (outcome.killed, outcome.code, outcome.kind) == (None, 0, None), outcome.said
    assert "every permitted sample is cached and fresh" in outcome.stdout


def test_the_fence_stops_a_child_that_hangs(tmp_path: Path) -> None:
    def hang() -> dict[str, object]:
        while True:
            pass

    assert fenced(hang, tmp_path, seconds=0.2).killed == "SIGALRM"


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


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused(world: World, case: str) -> None:
    CHECKPOINTS[case].make(world.root)
    before = picture(world.root)
    refused(at_the_fence(world, *WITH_EVIL), 1, "CheckpointError", EVIL, *CHECKPOINTS[case].says)
    assert picture(world.root) == before, "a refused dump changes nothing"


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
        "os.system in a zip",
        "os.system in a plain pickle",
        "os.system in a legacy file",
        "eval in a zip",
        "TorchScript",
    ),
    *("a pickled module", "truncated zip", "zip bomb", "overlapping zip members", "two pickles in one zip", "a FIFO"),
    *("10^12 elements by hand", "a storage larger than its bytes", "a bytearray of 100 GB", "a numpy scalar of 2 GB"),
    *(
        "a key nested two million deep",
        "a key that doubles 60 times",
        "a pickle that keeps the reader busy",
        "a device",
    ),
]


@pytest.mark.parametrize("case", ADOPTED)
def test_a_hostile_tensor_is_not_adopted(world: World, case: str) -> None:
    CHECKPOINTS[case].make(world.root)
    before = picture(world.root)
    outcome = at_the_fence(world, "adopt", EVIL, "--target", "b", *DATA)
    code, kind = (1, "StoreError") if case in ("a FIFO", "a device") else (2, "UsageError")
    refused(outcome, code, kind, EVIL)
    assert picture(world.root) == before


# -- features ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEATURES)
def test_a_hostile_feature_is_refused(world: World, case: str) -> None:
    victim = world.permitted()[0]
    FEATURES[case].make(world.feature(victim))
    before = picture(world.root)
    scored, audit = all_at_the_fence(world, [*DUMP, *OWN], VERIFY)
    refused(scored, 1, "FeatureError", victim, FEATURES[case].says)
    if case == "another F":  # a feature like any other, but not the one that was scored
        refused(audit, 5, None, f"{victim}: its feature file is not the one that was scored")
    else:
        refused(audit, 1, None, f"{victim}: its freshness cannot be checked", FEATURES[case].says)
    assert picture(world.root) == before


def test_a_feature_in_fortran_order_is_the_same_feature(world: World) -> None:
    path = world.feature(world.permitted()[0])
    np.save(path, np.asfortranarray(np.load(path)))
    assert b"'fortran_order': True" in path.read_bytes()
    outcome = at_the_fence(world, *DUMP, *OWN)
    refused(outcome, 0, None, "every permitted sample is cached and fresh")


def test_a_hostile_feature_can_be_skipped_and_its_row_goes(world: World) -> None:
    """The row is of a feature that no longer exists: it is not served."""
    victim = world.permitted()[0]
    FEATURES["objects"].make(world.feature(victim))
    refused(at_the_fence(world, *DUMP, *OWN, "--on-bad-sample", "skip"), 3, None, f"missing: {victim}", "its dtype")
    assert not world.view("tiny", victim).exists()


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PATHS)
def test_a_hostile_path_is_refused(world: World, case: str) -> None:
    name = PATHS[case].make(world)
    world.rows[0]["file"] = name
    world.write()
    before = picture(world.root)
    scored, *audits = all_at_the_fence(world, [*DUMP, *OWN], VERIFY, [*VERIFY, "--json"])
    refused(scored, PATHS[case].code, PATHS[case].kind, PATHS[case].says)
    for audit in audits:
        assert audit.code in (1, 2, 3, 6)
        refused(audit, audit.code, audit.kind)
    assert picture(world.root) == before


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


def test_devices_are_refused_even_where_permitted(world: World) -> None:
    world.rows[0]["file"] = "/dev/zero"
    world.write()
    outcome = at_the_fence(world, *DUMP, *OWN, "--allow-outside", "/dev")
    refused(outcome, 1, "FeatureError", "feature /dev/zero", "not a regular file")


def test_names_that_only_unicode_tells_apart_are_two_samples(world: World) -> None:
    for number, name in enumerate((NFC, NFD)):
        world.rows[number]["file"] = name
        world.write_feature(name, GOOD + number)
    world.write()
    assert at_the_fence(world, *DUMP, *OWN).code == 0
    rows = [np.load(world.view("tiny", name)) for name in (NFC, NFD)]
    assert (rows[0] != rows[1]).any()
    assert at_the_fence(world, *VERIFY).code == 0


def test_a_path_is_a_sample_exactly_as_it_is_written(world: World) -> None:
    name = world.permitted()[0].replace("/", "//")
    world.rows[0]["file"] = name
    world.write()
    assert at_the_fence(world, *DUMP, *OWN).code == 0
    assert world.view("tiny", name).exists()


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "packs", "\x1b[2J", "x\0", "é", "n" * 65, ""])
def test_a_teacher_cannot_be_named_after_a_place(world: World, name: str) -> None:
    before = picture(world.root)
    outcome = at_the_fence(world, *DUMP, "--teacher", f"{name}=tiny_teachers:linear")
    refused(outcome, 2, "UsageError", "cannot be a teacher's name")
    assert picture(world.root) == before


# -- manifests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(world: World, case: str) -> None:
    world.json_path.write_bytes(MANIFESTS[case].change(world.json_path.read_bytes()))
    before = picture(world.root)
    for outcome in all_at_the_fence(world, [*DUMP, *OWN], VERIFY):
        refused(outcome, 2, "ManifestError", "dataset.json", MANIFESTS[case].says)
    assert picture(world.root) == before


@pytest.mark.parametrize("what", ["FIFO", "folder", "device", "loop", "4 GB that take no room"])
def test_what_is_no_manifest_is_refused_unread(world: World, what: str) -> None:
    path = world.json_path
    path.unlink()
    if what == "FIFO":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what in ("device", "loop"):
        path.symlink_to("/dev/zero" if what == "device" else path.name)
    else:
        path.touch()
        os.truncate(path, 4 << 30)
    says = {"loop": "symbolic links", "folder": "a directory", "4 GB that take no room": "--max-manifest-bytes"}
    for outcome in all_at_the_fence(world, [*DUMP, *OWN], VERIFY):
        refused(outcome, 2, "ManifestError", says.get(what, "not a regular file"))


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


@pytest.mark.parametrize("case", SETTINGS)
def test_a_hostile_settings_file_in_the_current_folder_is_refused(world: World, case: str) -> None:
    content, says = SETTINGS[case]
    path = world.root / "kd-cache.yaml"
    path.write_text(content or "")
    if content is None:
        os.truncate(path, 1 << 36)
    before = picture(world.root)
    refused(at_the_fence(world, *DUMP, *OWN), 2, None, "kd-cache.yaml", says)
    assert picture(world.root) == before


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


def read_and_heal(world: World, look: Look, case: Store) -> None:
    """Read it in three ways, which changes nothing; dump into it; where that succeeded, it is whole."""
    case.make(world)
    around = world.root.parent
    before, outside = picture(around), picture(around, "w/cache/A2b")
    unchanged = python(lambda: picture(around) == before)
    reading = [python(look), command(*VERIFY), command("info", "cache/A2b"), unchanged]
    healing = [command(*DUMP, *OWN), python(look), command(*VERIFY)]
    outcomes = all_fenced([*reading, *healing], world.root)
    assert len(outcomes) == 7, outcomes[-1]
    *read, same, healed, again, audit = outcomes
    assert picture(around, "w/cache/A2b") == outside
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
        assert picture(around)["w/cache/A2b/cache_index.json"] == before["w/cache/A2b/cache_index.json"]


@pytest.mark.parametrize("case", INDEXES)
def test_a_hostile_index_is_refused_and_written_anew(world: World, look: Look, case: str) -> None:
    read_and_heal(world, look, INDEXES[case])


@pytest.mark.parametrize("case", PACKS)
def test_a_hostile_pack_is_refused_and_its_rows_are_scored_again(world: World, look: Look, case: str) -> None:
    read_and_heal(world, look, PACKS[case])


@pytest.mark.parametrize("case", OTHERS)
def test_what_else_is_in_a_cache_does_no_harm(world: World, look: Look, case: str) -> None:
    read_and_heal(world, look, OTHERS[case])


@pytest.mark.parametrize("case", ROW_FILES)
def test_a_hostile_row_file_is_noticed_and_written_anew(world: World, look: Look, case: str) -> None:
    read_and_heal(world, look, Store(ROW_FILES[case], "differs from the pack", (0, 4, 0)))


@pytest.mark.parametrize("case", PLANS)
def test_a_hostile_plan_is_made_anew(world: World, look: Look, case: str) -> None:
    """Also where it is needed: the packs are gone, or one sample is new."""
    (world.cache / "plan.json").write_bytes(PLANS[case])
    world.add(7, "b", "train")
    world.write()
    scored, audit = all_at_the_fence(world, [*DUMP, *OWN], [*VERIFY, "--recompute"])
    refused(scored, 0, None)
    refused(audit, 0, None)
    assert "Traceback" not in audit.said


@pytest.mark.parametrize("case", OLDER)
def test_a_hostile_cache_of_an_older_script_is_refused(world: World, case: str) -> None:
    make, says = OLDER[case]
    make(world)
    around = world.root.parent
    before = picture(around)
    opening, audit, told, scored = all_fenced(
        [python(lambda: len(LogitCache.open("cache/A2b"))), command(*VERIFY), command("info"), command(*DUMP, *OWN)],
        world.root,
    )
    assert opening.killed is None
    assert (opening.code, opening.kind) == (4, "CorruptError"), opening.said
    assert says in opening.stderr
    for outcome in (audit, told, scored):
        refused(outcome, 5, outcome.kind, "older script")
    assert picture(around) == before


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


def test_a_source_of_features_has_a_cap_of_its_own(world: World) -> None:
    file = world.permitted()[0]
    size = world.feature(file).stat().st_size
    assert FeatureSource(world.root, max_bytes=size).read(file).array.shape == (12, 20)
    with pytest.raises(FeatureError, match=f"it has {size} bytes, expected at most {size - 1}; --max-feature-bytes"):
        FeatureSource(world.root, max_bytes=size - 1).read(file)


def test_a_manifest_is_read_up_to_its_cap(world: World) -> None:
    size = world.json_path.stat().st_size
    assert len(load_manifest(world.json_path, max_bytes=size)) == 7
    with pytest.raises(ManifestError, match=f"{size} bytes, expected at most {size - 1}; --max-manifest-bytes"):
        load_manifest(world.json_path, max_bytes=size - 1)


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
