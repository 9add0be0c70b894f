"""``kd-cache repair``: what an audit reports is mended, nothing else is touched, and what cannot be mended is said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, World
from store_fixtures import Rows, flip, forge, name_in_index, plain_pack, rewrite, snapshot, write_older

from kd_cache import LogitCache
from kd_cache.errors import KDCacheError, MissingLogitsError
from kd_cache.store.cache import CacheFolder
from kd_cache.store.index import read_index
from kd_cache.store.pack import Pack

SEEN: dict[int, set[bytes]] = {}
"""The features that each teacher (by its seed) was shown, as bytes."""


class Whole(torch.nn.Module):
    """Whole numbers in, whole numbers out: every sum is exact, whatever the batch."""

    num_classes = 10
    value_kind = "logits"

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        random = torch.Generator().manual_seed(seed)
        weight = torch.randint(-9, 10, (20, self.num_classes), generator=random).float()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        SEEN.setdefault(self.seed, set()).update(one.numpy().tobytes() for one in features.cpu())
        return features.sum(dim=1) @ self.weight

    def fingerprint_parts(self) -> dict[str, str]:
        return {"architecture": "whole/1"}


def one(ckpt: Path | None) -> Whole:
    return Whole(1 if ckpt is None else int(ckpt.read_text()))


def two(ckpt: Path | None) -> Whole:
    return Whole(2)


ONE, TWO = ("--teacher", "one=test_repair:one"), ("--teacher", "two=test_repair:two")
OWN = (*ONE, *TWO)
DUMPED = (*OWN, "--only", "one", "--only", "two")
EVERY = 20  # permitted samples in the world


@pytest.fixture
def world(world: World) -> World:
    """The usual world with features of whole numbers."""
    for number, row in enumerate(world.rows):
        frames = len(np.load(world.feature(row["file"])))
        whole_feature(world, row["file"], number, frames)
    return world


def whole_feature(world: World, file: str, seed: int, frames: int = 12) -> None:
    feature = np.random.default_rng(seed).integers(-4, 5, (frames, 20))
    world.write_feature(file, feature.astype(np.float32))


@pytest.fixture
def dump(run: Run, world: World) -> Run:
    def call(*args: object, teachers: tuple[object, ...] = DUMPED) -> Any:
        return run("dump", "--target", "b", "--json-path", world.json_path, *teachers, *args)

    return call


@pytest.fixture
def verify(run: Run, world: World) -> Run:
    def call(*args: object, teachers: tuple[object, ...] = OWN) -> Any:
        return run("verify", "--target", "b", "--all", "--json-path", world.json_path, *teachers, *args)

    return call


@dataclass
class Repaired:
    """What ``kd-cache repair --json`` said, and which features which teacher was shown meanwhile."""

    code: int
    told: dict[str, Any]
    errors: str
    seen: dict[str, set[str]] = field(default_factory=dict)


Repair = Callable[..., Repaired]
Damage = Callable[[World], None]


@pytest.fixture
def repair(run: Run, world: World) -> Callable[..., Repaired]:
    def call(*args: object, teachers: tuple[object, ...] = OWN, seeds: Mapping[int, str] | None = None) -> Repaired:
        SEEN.clear()
        data = ("--json-path", world.json_path)  # where the index is lost, nothing else says which data it is of
        result = run("repair", "--target", "b", *data, *teachers, *args, "--json")
        told = json.loads(result.stdout).get("caches", [{}])[0]  # an error's document has none
        assert result.stderr.count("nothing is known of what made one") <= 1
        names = seeds or {1: "one", 2: "two", 7: "one"}
        seen: dict[str, set[str]] = {}
        for seed, features in SEEN.items():
            seen.setdefault(names[seed], set()).update(files_of(world, features))
        return Repaired(result.exit_code, told, result.stderr, seen)

    return call


def files_of(world: World, features: set[bytes]) -> set[str]:
    """The files that hold these features."""
    return {row["file"] for row in world.rows if content_of(world.feature(row["file"])) in features}


def content_of(path: Path) -> bytes:
    try:
        return np.load(path).tobytes()
    except ValueError:
        return b"no feature"


def right(world: World, file: str, seed: int) -> np.ndarray:
    """The row as numpy has it."""
    return np.load(world.feature(file)).astype(np.float64).sum(axis=0) @ Whole(seed).weight.numpy().astype(np.float64)


def entry(world: World, teacher: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world.cache / "cache_index.json").read_text())["kd_cache"]["teachers"][teacher]
    return found


def pack_of(world: World, teacher: str) -> Pack:
    name = entry(world, teacher)["packs"][0][0]
    return next(pack for pack in CacheFolder(world.cache).packs().good if pack.path.name == name)


def fresh(
    dump: Run, world: World, *args: object, teachers: tuple[object, ...] = DUMPED
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Packs and views of a dump into an empty folder."""
    assert dump("--cache-root", "fresh", *args, teachers=teachers).exit_code == 0
    made = snapshot(world.root / "fresh" / "A2b")
    shutil.rmtree(world.root / "fresh")
    return chosen(made, "packs/"), chosen(made, "one/") | chosen(made, "two/")


def chosen(files: Mapping[str, bytes], prefix: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith(prefix)}


def served_right(world: World, seeds: Mapping[str, int]) -> None:
    """Every permitted sample is served, by each teacher, as numpy has it."""
    cache = LogitCache.open(world.cache)
    assert cache.teachers == tuple(seeds)
    assert sorted(cache.files) == sorted(world.permitted())
    logits = cache.batch(world.permitted()).numpy()
    for number, seed in enumerate(seeds.values()):
        expected = np.stack([right(world, file, seed) for file in world.permitted()])
        assert (logits[:, number].astype(np.float64) == expected).all()


# -- every kind of damage ---------------------------------------------------------------------------------------------


def some_file(world: World) -> str:
    return world.permitted()[2]


def index_of(world: World) -> Path:
    return world.cache / "cache_index.json"


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def linked_view(world: World) -> None:
    path = world.view("one", some_file(world))
    path.unlink()
    path.symlink_to(world.view("one", world.permitted()[0]))


def least_exchanged(row: np.ndarray) -> np.ndarray:
    """Another row that names the same class."""
    first, second = np.argsort(row, kind="stable")[[0, 2]]
    assert row[first] != row[second]
    changed = row.copy()
    changed[[first, second]] = row[[second, first]]
    return changed


def forged_row(world: World) -> None:
    """Right digest of the pack, wrong checksum of one row."""
    pack = pack_of(world, "one")
    rows = Rows(pack.files, pack.keys.copy(), pack.inputs.copy(), pack.logits.copy())
    made, directory = pack.origin, pack.path.parent
    pack.path.unlink()

    def build(file: Any) -> None:
        plain_pack(file, rows, made)
        at = rows.files.index(some_file(world))
        file["logits"][at] = least_exchanged(rows.logits[at])

    name_in_index(forge(directory, build, teacher="one"))


def new_sample(world: World) -> None:
    whole_feature(world, world.add(40, "b", "train"), 40)
    world.write()


def sample_less(world: World) -> None:
    gone = some_file(world)
    world.rows = [row for row in world.rows if row["file"] != gone]
    world.write()


def changed_label(world: World) -> None:
    world.rows[4]["scene_label"] = 9
    world.write()


def wrong_joins(world: World, teacher: str = "one") -> None:
    """The rows of one teacher, each under another key, the index untouched; and the view like the pack."""
    pack = pack_of(world, teacher)
    label = {row["file"]: row["scene_label"] for row in world.rows if row["device_id"] == "A"}

    def correct(rows: np.ndarray) -> int:
        return sum(row.argmax() == label.get(file, -1) for file, row in zip(pack.files, rows, strict=True))

    shifted = (np.roll(pack.logits, shift, axis=0) for shift in range(1, len(pack)))
    rows = next(rows for rows in shifted if correct(rows) != correct(pack.logits))
    for file, row in zip(pack.files, rows, strict=True):
        np.save(world.view(teacher, file), row)
    rewrite(pack, rows)


def damaged_pending(world: World) -> None:
    (world.cache / "pending").mkdir(exist_ok=True)
    (world.cache / "pending" / "0011223344556677.json").write_bytes(b'{"kd_cache": {"begun": 3')


def leftovers(world: World) -> None:
    for folder in ("", "packs", "one", "pending"):
        (world.cache / folder).mkdir(exist_ok=True)
        (world.cache / folder / ".tmp-123-00ff00ff00ff00ff").write_bytes(b"half of someth")


def all_of(world: World) -> set[str]:
    return set(world.permitted())


def only_it(world: World) -> set[str]:
    return {some_file(world)}


def nobody(world: World) -> set[str]:
    return set()


def newcomer(world: World) -> set[str]:
    return {world.rows[-1]["file"]}


def permitted_list(world: World) -> Path:
    return next(world.cache.glob("permitted-*"))


Files = Callable[[World], set[str]]
HURT: dict[str, Damage] = {
    "no": lambda world: None,
    "missing view": lambda world: world.view("one", some_file(world)).unlink(),
    "corrupt view": lambda world: flip(world.view("one", some_file(world)), -3),
    "truncated view": lambda world: truncate(world.view("one", some_file(world)), 1),
    "another's view": lambda world: put(world.view("one", some_file(world)), world.view("one", world.permitted()[0])),
    "linked view": linked_view,
    "no view folder": lambda world: shutil.rmtree(world.cache / "one"),
    "flipped pack": lambda world: flip(pack_of(world, "one").path),
    "flipped preamble": lambda world: flip(pack_of(world, "one").path, 3),
    "truncated pack": lambda world: truncate(pack_of(world, "one").path, 100),
    "empty pack": lambda world: truncate(path := pack_of(world, "one").path, path.stat().st_size),
    "flipped second pack": lambda world: flip(pack_of(world, "two").path),
    "lost pack": lambda world: pack_of(world, "one").path.unlink(),
    "lost packs": lambda world: shutil.rmtree(world.cache / "packs"),
    "damaged pack of nobody": lambda world: boo(world, "ghost"),
    "damaged pack beside": lambda world: boo(world, "one"),  # not the one that the index names
    "forged row": forged_row,
    "flipped index": lambda world: flip(index_of(world)),
    "truncated index": lambda world: truncate(index_of(world), 7),
    "lost index": lambda world: index_of(world).unlink(),
    "lost permitted": lambda world: permitted_list(world).unlink(),
    "flipped permitted": lambda world: flip(permitted_list(world)),
    "damaged plan": lambda world: flip(world.cache / "plan.json"),
    "lost plan": lambda world: (world.cache / "plan.json").unlink(),
    "changed feature": lambda world: whole_feature(world, some_file(world), 999),
    "new sample": new_sample,
    "sample less": sample_less,
    "changed label": changed_label,
    "wrong joins": wrong_joins,
    "damaged pending": damaged_pending,
    "leftovers": leftovers,
}
"""Ways to hurt a cache, or to change what it is of. Several at once: their names, joined by `` + ``."""


def put(path: Path, content: Path) -> None:
    shutil.copytree(content, path) if content.is_dir() else shutil.copy(content, path)


def boo(world: World, teacher: str) -> None:
    (world.cache / "packs" / f"{teacher}-{'1' * 32}.h5").write_bytes(b"boo")


def hurt(world: World, damage: str) -> None:
    for name in damage.split(" + "):
        HURT[name](world)


# By damage: exit status of verify, and which samples each teacher has to score again.
DAMAGE: dict[str, tuple[int, Files, Files]] = {
    **dict.fromkeys(["missing view", "no view folder", "lost index", "lost plan"], (3, nobody, nobody)),
    **dict.fromkeys(["corrupt view", "truncated view", "another's view", "linked view"], (4, nobody, nobody)),
    **dict.fromkeys(["flipped index", "truncated index", "lost permitted", "damaged plan"], (4, nobody, nobody)),
    **dict.fromkeys(["flipped permitted", "damaged pack of nobody", "damaged pack beside"], (4, nobody, nobody)),
    "changed label": (5, nobody, nobody),
    "sample less": (6, nobody, nobody),
    **dict.fromkeys(["flipped pack", "flipped preamble", "truncated pack", "empty pack"], (4, all_of, nobody)),
    "lost pack": (3, all_of, nobody),
    "lost packs": (3, all_of, all_of),
    "forged row": (4, only_it, nobody),
    "changed feature": (5, only_it, only_it),
    "new sample": (3, newcomer, newcomer),
    "wrong joins": (4, all_of, nobody),
    "flipped index + lost permitted": (4, nobody, nobody),
    "flipped index + new sample": (4, newcomer, newcomer),
    "forged row + lost index + new sample": (3, lambda world: only_it(world) | newcomer(world), newcomer),
    "lost index + sample less": (3, nobody, nobody),
    "lost permitted + new sample": (4, newcomer, newcomer),
    "wrong joins + sample less": (6, all_of, nobody),
    "wrong joins + changed label": (4, all_of, nobody),
    "changed feature + lost permitted": (4, only_it, only_it),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_repair_mends_what_verify_reports_scores_no_more_and_leaves_the_bytes_of_a_fresh_dump(
    dump: Run, verify: Run, repair: Repair, world: World, damage: str
) -> None:
    code, *again = DAMAGE[damage]
    assert dump().exit_code == 0
    hurt(world, damage)
    assert verify().exit_code == code
    inodes = {path: path.stat().st_ino for path in world.cache.rglob("*") if path.is_file()}
    was_link = {path: path.is_symlink() for path in inodes}
    content = snapshot(world.cache)
    done = repair()
    assert done.code == 0, done.errors
    assert done.told["before"]["exit_code"] == code
    assert done.told["after"]["problems"] == []
    expected = {name: files(world) for name, files in zip(("one", "two"), again, strict=True) if files(world)}
    assert done.seen == expected
    assert {name: count for name, count in done.told["scored"].items() if count} == {
        name: len(files) for name, files in expected.items()
    }
    assert verify("--recompute").exit_code == 0
    packs, views = fresh(dump, world)
    now = snapshot(world.cache)
    assert chosen(now, "packs/") == packs
    assert chosen(now, "one/") | chosen(now, "two/") == views
    served_right(world, {"one": 1, "two": 2})
    # What was right before was not written again; but a wrong row was served to nobody meanwhile.
    for path, inode in inodes.items():
        name = str(path.relative_to(world.cache))
        if damage == "forged row" and name == f"one/{world.view('one', some_file(world)).name}":
            continue
        if name.partition("/")[0] in ("packs", "one", "two") and now.get(name) == content[name] and not was_link[path]:
            assert path.stat().st_ino == inode, name


KINDS = {3: "miss", 4: "corrupt", 5: "stale", 6: "leak"}


@pytest.mark.parametrize(
    "damage",
    [
        *("missing view", "corrupt view", "flipped pack", "lost pack"),
        *("flipped index", "lost index", "changed feature", "new sample", "sample less"),
    ],
)
def test_every_damage_is_named_by_verify_and_healed_by_the_next_dump(
    cached: World, dump: Run, verify: Run, world: World, damage: str
) -> None:
    code = DAMAGE[damage][0]
    hurt(world, damage)
    result = verify("--json")
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout)["caches"][0]["problems"]
    assert KINDS[code] in {problem["kind"] for problem in found}
    said = verify()
    assert said.exit_code == code
    assert found[0]["file"].rpartition("/")[2] in said.stdout.replace("\n", "")
    assert dump().exit_code == 0
    assert verify().exit_code == 0


def test_another_checkpoint_is_scored_anew_with_only_that_teacher(
    dump: Run, verify: Run, repair: Repair, world: World
) -> None:
    seed = world.root / "seed"
    seed.write_text("1")
    teachers = ("--teacher", f"one=test_repair:one,ckpt={seed}", *TWO)
    dump(teachers=(*teachers, "--only", "one", "--only", "two"))
    kept = pack_of(world, "two").path.stat().st_ino
    seed.write_text("7")
    assert verify(teachers=teachers).exit_code == 5
    done = repair(teachers=teachers)
    assert done.code == 0, done.errors
    assert done.seen == {"one": all_of(world)}
    assert done.told["scored"] == {"one": EVERY}
    assert verify("--recompute", teachers=teachers).exit_code == 0
    served_right(world, {"one": 7, "two": 2})
    assert pack_of(world, "two").path.stat().st_ino == kept


def views_of(world: World) -> dict[str, bytes]:
    now = snapshot(world.cache)
    return chosen(now, "one/") | chosen(now, "two/")


@pytest.mark.parametrize("harmless", ["no", "damaged pending", "leftovers"])
def test_on_a_cache_that_verifies_it_changes_no_byte(
    run: Run, cached: World, verify: Run, repair: Repair, world: World, harmless: str
) -> None:
    hurt(world, harmless)
    assert verify().exit_code == 0
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in world.cache.rglob("*")}
    content = snapshot(world.cache)
    done = repair()
    assert done.code == 0
    assert (done.told["scored"], done.told["confirmed"], done.told["rebuilt"]) == ({}, {}, False)
    assert done.seen == {}
    said = run("repair", *OWN)
    assert said.exit_code == 0
    assert "Nothing to repair." in said.stdout
    assert snapshot(world.cache) == content
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in world.cache.rglob("*")} == before


# -- what nobody can mend without a word from the user -----------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        "flipped pack + flipped index",
        "lost pack + lost index",
        "flipped pack + flipped second pack + flipped index",
        "lost packs + lost index",
    ],
)
def test_a_teacher_that_only_the_user_still_knows_of_is_not_left_out_silently(
    cached: World, dump: Run, verify: Run, repair: Repair, world: World, damage: str
) -> None:
    """Index and pack gone: that a second teacher was there is in the user's head, and in traces."""
    hurt(world, damage)
    content = snapshot(world.cache)
    done = repair()
    assert done.code in (3, 4)
    assert "kd-cache dump" in done.errors.lower()
    assert damage != "flipped pack + flipped index" or "no pack of one that can be read" in done.errors
    assert snapshot(world.cache) == content
    assert done.seen == {}
    with pytest.raises(KDCacheError):
        LogitCache.open(world.cache)
    assert dump().exit_code == 0
    assert verify("--recompute").exit_code == 0
    served_right(world, {"one": 1, "two": 2})


@pytest.mark.parametrize("damage", ["flipped index", "lost index"])
def test_where_the_index_is_lost_the_data_must_be_named_and_is_never_guessed(
    run: Run, cached: World, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The sample is the default of commands that begin something; here it would overwrite the user's rows."""
    hurt(world, damage)
    sample = tmp_path / "data" / "sample"
    shutil.copytree(world.root / "x", sample / "x")
    shutil.copy(world.json_path, sample / "dataset.json")
    content = snapshot(world.cache)
    result = run("repair", "--target", "b", *OWN)
    assert result.exit_code == 2
    assert "--json-path" in result.stderr
    assert snapshot(world.cache) == content
    assert run("repair", "--target", "b", *OWN, "--json-path", world.json_path).exit_code == 0


@pytest.mark.parametrize("said", [(), ("--on-bad-sample", "skip")])
@pytest.mark.parametrize("also", ["no", "lost pack", "missing view", "flipped index"])
def test_a_feature_that_cannot_be_read_stops_the_repair_unless_it_may_be_left_out(
    cached: World, verify: Run, repair: Repair, world: World, also: str, said: tuple[str, ...]
) -> None:
    bad = some_file(world)
    whole = world.feature(bad).read_bytes()
    world.feature(bad).write_bytes(b"no feature")
    if also != "missing view":
        hurt(world, also)
    else:
        world.view("two", world.permitted()[0]).unlink()
    done = repair(*said)
    assert done.code in (1, 3), done.errors
    assert bad in done.errors + json.dumps(done.told)
    world.feature(bad).write_bytes(whole)
    for file, row in read_of(world, "one").items():
        assert (row == right(world, file, 1)).all()
    mended = repair()
    assert mended.code == 0, mended.errors
    assert verify("--recompute").exit_code == 0
    served_right(world, {"one": 1, "two": 2})


def read_of(world: World, *teachers: str) -> dict[str, np.ndarray]:
    """What a reader is given of these teachers, by file; nothing where the cache does not open."""
    try:
        cache = LogitCache.open(world.cache, teachers)
    except KDCacheError:
        return {}
    return dict(zip(cache.files, cache.batch(cache.files)[:, 0].numpy(), strict=True))


# -- teachers that are not at hand -------------------------------------------------------------------------------------


def test_rows_of_the_others_are_repaired_and_the_option_for_the_rest_is_named(
    run: Run, cached: World, verify: Run, repair: Repair, world: World
) -> None:
    new_sample(world)
    done = repair(teachers=TWO)
    assert done.code == 3
    assert done.seen == {"two": newcomer(world)}
    assert done.told["scored"] == {"two": 1}
    assert {problem["teacher"] for problem in done.told["after"]["problems"]} == {"one"}
    assert "one: its fingerprint was not checked: it is your own; pass it with --teacher" in done.errors
    assert repair().told["scored"] == {"one": 1}
    assert verify("--recompute").exit_code == 0


@pytest.mark.parametrize("lost", ["lost pack", "flipped pack"])
def test_view_and_index_are_rebuilt_though_another_teachers_rows_stay_missing(
    cached: World, verify: Run, repair: Repair, world: World, lost: str
) -> None:
    hurt(world, lost)
    view = world.view("two", some_file(world))
    content = view.read_bytes()
    view.unlink()
    world.rows[4]["scene_label"] = 9
    world.write()
    done = repair(teachers=TWO)
    assert done.code == (3 if lost == "lost pack" else 4)
    assert done.seen == {}
    assert view.read_bytes() == content
    assert {problem["teacher"] for problem in done.told["after"]["problems"]} == {"one"}
    assert repair().code == 0
    assert verify("--recompute").exit_code == 0


def test_with_no_teacher_at_hand_the_error_says_which_one_to_pass(
    cached: World, verify: Run, repair: Repair, world: World
) -> None:
    hurt(world, "lost pack")
    world.view("two", some_file(world)).unlink()
    content = snapshot(world.cache)
    done = repair(teachers=())
    assert done.code == 3
    assert "one is needed to score its rows again: it is your own; pass it with --teacher" in done.errors
    assert snapshot(world.cache) == content
    assert repair().code == 0
    assert verify("--recompute").exit_code == 0


def test_a_wrong_row_is_not_served_on_because_its_teacher_is_not_at_hand(
    cached: World, verify: Run, repair: Repair, world: World
) -> None:
    hurt(world, "forged row")
    done = repair(teachers=TWO)
    assert done.code == 3
    served = read_of(world, "one")
    assert sorted(served) == sorted(all_of(world) - only_it(world))
    assert all((row == right(world, file, 1)).all() for file, row in served.items())
    with pytest.raises(MissingLogitsError):
        LogitCache.open(world.cache).rows([some_file(world)])
    done = repair()
    assert (done.code, done.told["scored"]) == (0, {"one": 1})
    assert verify("--recompute").exit_code == 0


@pytest.mark.parametrize("also", ["new sample", "missing view", "sample less"])
def test_wrong_joins_of_a_teacher_that_is_not_at_hand_are_never_blessed(
    cached: World, verify: Run, repair: Repair, world: World, also: str
) -> None:
    """Any publication would measure the accuracy anew, and nobody would ever hear of it again."""
    hurt(world, "wrong joins")
    content = snapshot(world.cache)
    done = repair(teachers=TWO)
    assert done.code == 4
    assert "joined to wrong rows" in json.dumps(done.told)
    assert "pass it with --teacher" in done.errors
    assert snapshot(world.cache) == content
    hurt(world, also)
    content = snapshot(world.cache)
    done = repair(teachers=TWO)
    assert done.code == 4
    assert "joined to wrong rows" in done.errors
    assert "one is needed to score its rows again: it is your own; pass it with --teacher" in done.errors
    assert snapshot(world.cache) == content
    done = repair()
    assert done.code == 0, done.errors
    assert done.told["scored"]["one"] == len(all_of(world))
    assert verify("--recompute").exit_code == 0
    served_right(world, {"one": 1, "two": 2})


# -- rows of teachers that store differently ---------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["one", "two"])
@pytest.mark.parametrize("damage", ["both joined wrongly", "one joined wrongly, one missing"])
def test_wrong_joins_are_mended_whatever_the_other_teachers_store(
    dump: Run, verify: Run, repair: Repair, world: World, first: str, damage: str
) -> None:
    half, full = (ONE, TWO) if first == "one" else (TWO, ONE)
    names = ("one", "two") if first == "one" else ("two", "one")
    dump("--dtype", "fp16", teachers=(*half, "--only", names[0]))
    dump(teachers=(*full, "--only", names[1]))
    wrong_joins(world, names[1])
    if damage.startswith("both"):
        wrong_joins(world, names[0])
    else:
        pack_of(world, names[0]).path.unlink()
    assert verify().exit_code == 4
    done = repair()
    assert done.code == 0, done.errors
    assert done.told["scored"] == {"one": EVERY, "two": EVERY}
    assert verify("--recompute").exit_code == 0
    for name, seed in (("one", 1), ("two", 2)):
        served = read_of(world, name)
        assert all((row == right(world, file, seed)).all() for file, row in served.items())
        assert len(served) == EVERY
    assert list(LogitCache.open(world.cache, ["one"]).fingerprints) == ["one"]
    assert entry(world, names[0])["dtype"] == "fp16"
    assert list(read_index(world.cache / "cache_index.json").origins) == list(names)


# -- wrong when scored, and rows from elsewhere ------------------------------------------------------------------------


def test_recompute_finds_rows_that_were_wrong_when_they_were_scored(
    cached: World, verify: Run, repair: Repair, world: World
) -> None:
    expected = world.packs()
    pack = pack_of(world, "two")
    rows = pack.logits.copy()
    wrong = [pack.files[3], pack.files[8]]
    for at in (3, 8):
        rows[at] = least_exchanged(rows[at])
    rewrite(pack, rows)
    for at in (3, 8):
        np.save(world.view("two", pack.files[at]), rows[at])
    assert verify().exit_code == 0
    assert repair().told["scored"] == {}  # every checksum is right
    assert verify("--recompute").exit_code == 4
    done = repair("--recompute")
    assert done.code == 0, done.errors
    assert done.told["scored"] == {"two": 2}
    told = {problem["file"] for problem in done.told["before"]["problems"] if problem["about"] == "row"}
    assert told == set(wrong)
    assert verify("--recompute").exit_code == 0
    assert world.packs() == expected
    served_right(world, {"one": 1, "two": 2})


def older_cache(world: World, rows: Mapping[str, Callable[[str], np.ndarray]]) -> None:
    tables = {name: {file: row(file).astype(np.float32) for file in world.permitted()} for name, row in rows.items()}
    write_older(world.cache, tables, where=world.cache)


def test_an_older_scripts_cache_becomes_a_verified_one_by_adopt_and_repair_recompute(
    run: Run, dump: Run, verify: Run, repair: Repair, world: World
) -> None:
    expected = fresh(dump, world)
    older_cache(world, {"one": lambda file: right(world, file, 1), "two": lambda file: right(world, file, 2)})
    with pytest.warns(UserWarning, match="older script"):
        cache = LogitCache.open(world.cache)
    assert (cache.batch([some_file(world)])[0, 0].numpy() == right(world, some_file(world), 1)).all()
    assert dump().exit_code == 5
    refused = repair()
    assert refused.code == 5
    assert "kd-cache adopt" in refused.errors
    assert run("adopt", "cache/A2b", "--target", "b", "--json-path", world.json_path).exit_code == 0
    with pytest.warns(UserWarning, match="never verified"):
        LogitCache.open(world.cache)
    assert verify().exit_code == 1
    # Without --recompute nobody knows more than before.
    assert repair().code == 1
    assert repair().told["scored"] == {}
    done = repair("--recompute")
    assert done.code == 0, done.errors
    assert done.told["confirmed"] == {"one": EVERY, "two": EVERY}
    assert done.told["scored"] == {"one": EVERY, "two": EVERY}
    assert verify("--recompute").exit_code == 0
    assert "adopted" not in entry(world, "one")
    served_right(world, {"one": 1, "two": 2})  # and no warning, which would be an error here
    # The adopted rows are superseded; gc removes them.
    assert run("gc", "--older-than", "0").exit_code == 0
    assert (chosen(snapshot(world.cache), "packs/"), views_of(world)) == expected


def test_adopted_rows_that_disagree_are_replaced_and_counted(
    run: Run, dump: Run, verify: Run, repair: Repair, world: World
) -> None:
    wrong = set(world.permitted()[4:7])

    def row(file: str) -> np.ndarray:
        return right(world, file, 1)[::-1] if file in wrong else right(world, file, 1)

    older_cache(world, {"one": row, "two": lambda file: right(world, file, 2)})
    assert run("adopt", "cache/A2b", "--target", "b", "--json-path", world.json_path).exit_code == 0
    done = repair("--recompute")
    assert done.code == 0, done.errors
    assert done.told["confirmed"] == {"one": EVERY - len(wrong), "two": EVERY}
    rows = [problem for problem in done.told["before"]["problems"] if problem["about"] == "row"]
    assert {problem["file"] for problem in rows} == wrong
    assert {problem["teacher"] for problem in rows} == {"one"}
    assert verify("--recompute").exit_code == 0
    served_right(world, {"one": 1, "two": 2})


def test_adopted_rows_whose_teacher_is_not_at_hand_stay_as_they_are(
    run: Run, verify: Run, repair: Repair, world: World
) -> None:
    older_cache(world, {"one": lambda file: right(world, file, 1), "two": lambda file: right(world, file, 2)})
    run("adopt", "cache/A2b", "--target", "b", "--json-path", world.json_path)
    kept = world.packs("one")
    done = repair("--recompute", teachers=TWO)
    assert done.code == 1
    assert done.told["confirmed"] == {"two": EVERY}
    assert "pass it with --teacher" in done.errors
    assert world.packs("one") == kept
    assert "adopted" in entry(world, "one")
    assert "adopted" not in entry(world, "two")
    assert repair("--recompute").code == 0
    served_right(world, {"one": 1, "two": 2})


def test_the_mark_of_adopted_rows_survives_a_lost_index(run: Run, verify: Run, repair: Repair, world: World) -> None:
    older_cache(world, {"one": lambda file: right(world, file, 1)})
    run("adopt", "cache/A2b", "--target", "b", "--json-path", world.json_path)
    hurt(world, "lost index")
    done = repair(teachers=())
    assert done.code == 1
    assert "never verified" in json.dumps(done.told["after"]["problems"])
    assert verify(teachers=()).exit_code == 1
    assert repair("--recompute").code == 0
    served_right(world, {"one": 1})


# -- a wrong row never gets a right checksum ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["dump", "seal", "another's dump"])
def test_rewriting_a_pack_does_not_give_a_wrong_row_a_right_checksum(
    run: Run, cached: World, dump: Run, verify: Run, repair: Repair, world: World, command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # A dump scores some rows again before it begins, drawn by chance: the wrong one among them is refused there (5).
    monkeypatch.setattr("kd_cache.score.cached_rows._SAMPLES", 0)
    wrong = some_file(world)
    forged_row(world)
    del world.rows[0]  # so that the pack has to be written anew
    world.write()
    done = {
        "dump": lambda: dump(),
        "seal": lambda: run("seal", "--target", "b"),
        "another's dump": lambda: dump("--no-skip-existing", teachers=(*TWO, "--only", "two")),
    }[command]()
    assert done.exit_code == 4, done.output
    assert wrong in done.stderr
    assert "kd-cache repair" in done.stderr
    healed = repair()
    assert healed.code == 0, healed.errors
    assert healed.told["scored"] == {"one": 1}
    assert healed.seen == {"one": {wrong}}
    assert verify("--recompute").exit_code == 0
    served_right(world, {"one": 1, "two": 2})


# -- killed, and on a disk that takes nothing --------------------------------------------------------------------------


class Stopped(BaseException):
    """The process is gone from here on."""


@pytest.mark.parametrize("damage", ["forged row", "wrong joins"])
def test_from_the_moment_wrong_rows_left_they_are_missed_not_served(
    cached: World, repair: Repair, world: World, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurt(world, damage)

    def stopped(*_: Any) -> Any:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("kd_cache.care.repair.dump_logits", stopped)
        with pytest.raises(Stopped):
            repair()
    served = read_of(world, "one")
    assert all((row == right(world, file, 1)).all() for file, row in served.items())
    assert len(served) == (EVERY - 1 if damage == "forged row" else 0)
    assert (repair().code, len(read_of(world, "one"))) == (0, EVERY)


@pytest.mark.parametrize("damage", ["missing view", "forged row", "flipped index"])
def test_a_read_only_cache_is_an_error_that_names_path_and_cause(
    cached: World, repair: Repair, world: World, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurt(world, damage)
    content = snapshot(world.cache)
    opening, opening_below = Path.open, os.open

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(30, os.strerror(30))

    def only_for_reading(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return refuse() if set(mode) & set("wxa+") else opening(path, mode, *args, **kwargs)

    def only_what_is_there(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
        return refuse() if flags & os.O_CREAT else opening_below(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", only_for_reading)
        patch.setattr(os, "open", only_what_is_there)
        for name in ("replace", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, name, refuse)
        done = repair()
    assert done.code == 1
    assert "Read-only file system" in done.errors
    assert "cache/A2b" in done.errors
    assert snapshot(world.cache) == content
    assert repair().code == 0


# -- what it says ------------------------------------------------------------------------------------------------------


def test_json_tells_what_was_found_done_and_left(run: Run, cached: World, repair: Repair, world: World) -> None:
    hurt(world, "changed feature")
    result = run("repair", *OWN, "--json")
    content = json.loads(result.stdout)
    assert set(content) == {"exit_code", "caches"}
    (cache,) = content["caches"]
    assert set(cache) == {"exit_code", "before", "scored", "confirmed", "replaced", "rebuilt", "after"}
    assert (content["exit_code"], cache["exit_code"], cache["before"]["exit_code"]) == (0, 0, 5)
    assert cache["scored"] == {"one": 1, "two": 1}
    assert cache["before"]["all"] is True
    assert {problem["file"] for problem in cache["before"]["problems"]} == only_it(world)
    for field_of_verify in ("teachers", "problems", "notes", "checked", "promised", "seed"):
        assert field_of_verify in cache["after"]


def test_words_tell_the_same(run: Run, cached: World, world: World) -> None:
    hurt(world, "changed feature")
    result = run("repair", *OWN)
    assert result.exit_code == 0
    assert some_file(world) in result.stdout
    assert "one: 1 rows scored" in result.stdout
    assert "20/20" in result.stdout
    hurt(world, "missing view")
    assert "view and index rebuilt from the packs" in run("repair", *OWN).stdout


def test_a_leaking_manifest_stops_it_before_anything_is_touched(repair: Repair, cached: World, world: World) -> None:
    hurt(world, "missing view")
    world.add(60, "s5", "train")
    world.write()
    content = snapshot(world.cache)
    assert repair().code == 6
    assert snapshot(world.cache) == content


def test_files_of_the_users_own_are_told_of_and_left_alone(
    cached: World, dump: Run, repair: Repair, verify: Run, world: World
) -> None:
    """Names of rows, of other systems' leftovers, of copies: in the view, beside the packs, in folders of their own."""
    mine = [world.cache / "one" / name for name in ("notes.txt", f"{'0' * 32}.npy", "._x.npy", "x (1).npy")]
    mine += [world.cache / "packs" / name for name in (".DS_Store", "features.h5", f"one-{'1' * 32} (1).h5", ".nfs01")]
    for path in mine:
        path.write_bytes(world.view("one", world.permitted()[0]).read_bytes())
    put(world.cache / "my_embeddings", world.cache / "one")
    before = snapshot(world.cache)
    said = json.loads(verify("--all", "--json").stdout)["caches"][0]
    assert (said["exit_code"], said["problems"]) == (0, [])
    assert any("1 files in cache/A2b/one stay" in note for note in said["notes"])
    hurt(world, "missing view")
    assert repair().code == 0
    assert "which kd-cache did not write" in dump("--no-skip-existing").stderr
    after = snapshot(world.cache)
    assert {name: after.get(name) for name in chosen(before, "my_embeddings/")} == chosen(before, "my_embeddings/")
    assert all(path.read_bytes() == before[str(path.relative_to(world.cache))] for path in mine)


def test_a_row_in_the_view_of_a_sample_that_is_not_permitted_is_a_leak_that_only_its_owner_removes(
    cached: World, dump: Run, verify: Run, world: World
) -> None:
    path = world.view("two", next(row["file"] for row in world.rows if row["split"] == "test"))
    np.save(path, np.zeros(10, np.float32))
    assert verify().exit_code == 6
    assert dump().exit_code == 0
    assert (verify().exit_code, path.exists()) == (6, True)


def test_a_cache_without_view_stays_without_one(dump: Run, repair: Repair, world: World) -> None:
    dump("--no-files")
    hurt(world, "flipped pack")
    assert repair().code == 0
    assert not (world.cache / "one").exists()
    assert entry(world, "one")["rows"] == EVERY
