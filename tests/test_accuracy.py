"""The semantic alarm: rows under wrong keys though every checksum is right; labels that changed since the dump."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, World
from store_fixtures import Rows, make_cache, md5, origin, rewrite, snapshot

from kd_cache import LogitCache, Provenance
from kd_cache.dataset.guard import select
from kd_cache.dataset.manifest import load_manifest
from kd_cache.store.accuracy import Accuracy, changed_labels, measure, stored_accuracy
from kd_cache.store.accuracy import alarm as alarm_of
from kd_cache.store.cache import CacheFolder
from kd_cache.store.pack import Pack
from kd_cache.store.permitted import Permitted
from kd_cache.store.union import Union

CLEAR = ("--teacher", "clear=test_accuracy:clear", "--only", "clear")
DULL = ("--teacher", "dull=test_accuracy:dull", "--only", "dull")
BOTH = (*CLEAR, *DULL)
LABELLED = 12  # rows of A in the world


class Bins(torch.nn.Module):
    """Names the scene that a feature carries: the mean over time of its first ten bins, times its only weight."""

    num_classes = 10
    value_kind = "logits"

    def __init__(self, scale: float = 1.0, classes: int = 10, kind: str = "logits") -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)
        self.num_classes = classes
        self.value_kind = kind

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits = features.mean(dim=1)[:, :10] * self.scale
        if self.num_classes > 10:
            logits = torch.nn.functional.pad(logits, (0, self.num_classes - 10), value=-3.0)
        if self.value_kind == "probs":
            return logits.softmax(dim=1)
        return logits.sigmoid() if self.value_kind == "sigmoid" else logits

    def fingerprint_parts(self) -> dict[str, str]:
        return {"architecture": "bins/1"}


def clear(ckpt: Path | None) -> Bins:
    return Bins(1.0 if ckpt is None else float(ckpt.read_text()))


def dull(ckpt: Path | None) -> Bins:
    """Wrong where the other one is right: it names the scene that speaks the least."""
    return Bins(-1.0)


def learnt(ckpt: Path | None) -> Bins:
    """As ``clear``; the files in its checkpoint trained it."""
    made = Bins()
    assert ckpt is not None
    made.provenance = Provenance.of(ckpt.read_text().splitlines())
    return made


def many(ckpt: Path | None) -> Bins:
    return Bins(classes=527)


def probs(ckpt: Path | None) -> Bins:
    return Bins(kind="probs")


def sigmoid(ckpt: Path | None) -> Bins:
    return Bins(kind="sigmoid")


@pytest.fixture
def world(world: World) -> World:
    """Features that carry their row's scene, but for every fourth, which carries the next one: 9 of 12 are right."""
    for number, row in enumerate(world.rows):
        say(world, row["file"], (row["scene_label"] + (number % 4 == 3)) % 10)
    return world


def say(world: World, file: str, scene: int) -> None:
    """Write a feature that carries this scene."""
    feature = np.load(world.feature(file)) * 0.1
    feature[:, scene] += 2
    world.write_feature(file, feature.astype(np.float32))


@pytest.fixture
def dump(run: Run, world: World) -> Run:
    """Dump the world with ``clear``; further arguments are passed on."""

    def call(*args: object, teachers: tuple[object, ...] = CLEAR) -> Any:
        return run("dump", "--target", "b", "--json-path", world.json_path, *teachers, *args)

    return call


@pytest.fixture
def verify(run: Run) -> Run:
    """Verify with ``clear`` at hand."""

    def call(*args: object, teachers: tuple[object, ...] = CLEAR) -> Any:
        own = [part for part in teachers if part not in ("--only", "clear", "dull")]
        return run("verify", "--target", "b", *own, *args)

    return call


def entry(world: World, teacher: str = "clear") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world.cache / "cache_index.json").read_text())["kd_cache"]["teachers"][teacher]
    return found


def by_the_book(world: World, teacher: str = "clear") -> tuple[int, int]:
    """Right and labelled rows, by ``np.load`` of the view and the manifest as it is written."""
    manifest = json.loads(world.json_path.read_text())
    rows = [row for row in manifest["train"] if row["device_id"] == "A" and row.get("scene_label") is not None]
    held = [row for row in rows if world.view(teacher, row["file"]).exists()]
    right = sum(int(np.load(world.view(teacher, row["file"])).argmax()) == row["scene_label"] for row in held)
    return right, len(held)


def only_pack(world: World, teacher: str = "clear") -> Pack:
    packs = [pack for pack in CacheFolder(world.cache).packs().good if pack.origin.teacher == teacher]
    assert len(packs) == 1
    return packs[0]


def exchange(world: World, first: int, second: int, teacher: str = "clear") -> tuple[str, str]:
    """Swap the logits of two samples in pack and view, every checksum right, the index as it was."""
    files = (world.rows[first]["file"], world.rows[second]["file"])
    pack = only_pack(world, teacher)
    rows = pack.logits.copy()
    at = [pack.files.index(file) for file in files]
    rows[at] = rows[at[::-1]]
    rewrite(pack, rows)
    views = [world.view(teacher, file) for file in files]
    if all(view.exists() for view in views):
        content = [view.read_bytes() for view in views]
        for view, other in zip(views, reversed(content), strict=True):
            view.write_bytes(other)
    return files


def problems(result: Any) -> list[dict[str, str]]:
    assert result.stdout, result.output
    found: list[dict[str, str]] = json.loads(result.stdout)["caches"][0]["problems"]
    return found


def relabel(world: World, number: int, label: int | None) -> str:
    """Another label for one row; its feature stays."""
    world.rows[number]["scene_label"] = label
    world.write()
    file: str = world.rows[number]["file"]
    return file


# -- what the dump stores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--dtype", "fp16"), ("--no-files",)])
def test_a_dump_stores_the_accuracy_on_labelled_source_rows(dump: Run, world: World, options: tuple[str, ...]) -> None:
    assert dump(teachers=BOTH).exit_code == 0
    assert by_the_book(world) == (9, LABELLED)
    expected = {name: by_the_book(world, name) for name in ("clear", "dull")}
    assert expected["dull"][0] < 3
    assert dump(*options, teachers=BOTH).exit_code == 0
    for name, (correct, rows) in expected.items():
        assert entry(world, name)["accuracy"] == {"correct": correct, "rows": rows}


def test_what_a_teacher_is_worth_on_rows_that_did_not_train_it_comes_first_everywhere(
    dump: Run, verify: Run, run: Run, world: World
) -> None:
    labelled = [row["file"] for row in world.rows if row["device_id"] == "A" and row["split"] == "train"]
    wrong = [file for number, file in enumerate(labelled) if number % 4 == 3]
    right = [file for file in labelled if file not in wrong]
    (world.root / "made.txt").write_text("\n".join(right[:7]))
    own = ("--teacher", f"clear=test_accuracy:learnt,ckpt={world.root / 'made.txt'}", "--only", "clear")
    on = "clear: accuracy on labelled source rows"
    says = [f"{on} that it did not train on: 40.00 % (2 of 5)", f"{on}: 75.00 % (9 of 12)"]
    told = dump(teachers=own)
    assert "\n".join(says) in told.stdout, told.output
    assert entry(world)["held_out"] == {"correct": 2, "rows": 5}
    assert LogitCache.open(world.cache).accuracies == says
    assert "40.00 % of 5 held out from its training; 75.00 % of 12" in " ".join(run("info").stdout.split())
    assert "\n".join(says) in verify(teachers=own).stdout
    (one,) = json.loads(verify("--json", teachers=own).stdout)["caches"]
    result = one["teachers"]["clear"]
    assert (result["held_out"], result["accuracy"]) == ({"correct": 2, "rows": 5}, {"correct": 9, "rows": 12})
    dump(teachers=DULL)  # another teacher's dump, and a seal, keep what they cannot know
    assert run("seal", "--target", "b").exit_code == 0
    assert entry(world)["held_out"] == {"correct": 2, "rows": 5}
    assert "held_out" not in entry(world, "dull")
    say(world, wrong[0], 0)  # scored by one that says nothing of itself: no row is known to be held out
    assert dump().exit_code == 0
    assert "held_out" not in entry(world)


def test_rows_of_the_target_do_not_count_with_a_label_or_without(dump: Run, verify: Run, world: World) -> None:
    for number in (12, 13, 14):
        relabel(world, number, None)
    dump()
    assert entry(world)["accuracy"] == {"correct": 9, "rows": LABELLED}
    exchange(world, 12, 15)
    assert verify("--all").exit_code == 0  # nobody may know what they are
    assert verify("--all", "--recompute").exit_code == 4


def test_every_split_of_the_rows_into_blocks_gives_the_same_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows.of([f"x/{number}.npy" for number in range(40)], classes=5)
    labels = np.random.default_rng(0).integers(-1, 5, 40)
    cache = make_cache(tmp_path / "A2b", {"scene": rows}, {"scene": origin(classes=5)}, packs=3)
    permitted = Permitted.of(rows.keys, labels)
    right = int((rows.logits.argmax(axis=1) == labels).sum())
    union = Union(CacheFolder(cache.path).packs().of(cache.origins["scene"]))
    for block in (1, 3, 1000):
        monkeypatch.setattr("kd_cache.store.accuracy._BLOCK", block)
        assert measure(union, permitted) == Accuracy(right, int((labels >= 0).sum()))


def test_accuracy_reads_as_a_share_and_survives_json() -> None:
    assert str(Accuracy(1234, 5000)) == "24.68 % (1,234 of 5,000)"
    assert str(Accuracy(0, 0)) == "unknown (0 of 0)"
    assert stored_accuracy({"accuracy": json.loads(json.dumps(Accuracy(3, 4).as_json()))}) == Accuracy(3, 4)
    assert stored_accuracy({}) is None


# -- labels unchanged, accuracy moved ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--dtype", "fp16"), ("--no-files",)])
@pytest.mark.parametrize("swapped", [(0, 1), (0, 12)], ids=["two of A", "one of A, one of b"])
def test_rows_under_each_others_keys_are_an_alarm_though_every_checksum_is_right(
    dump: Run, verify: Run, world: World, swapped: tuple[int, int], options: tuple[str, ...]
) -> None:
    dump(*options)
    files = exchange(world, *swapped)
    lost = 2 if swapped == (0, 1) else 1
    result = verify("--all", "--json")
    assert result.exit_code == 4
    (found,) = problems(result)
    assert (found["kind"], found["teacher"], found["about"]) == ("corrupt", "clear", "teacher")
    assert "logits are joined to wrong rows" in found["reason"]
    assert "75.00 % (9 of 12)" in found["reason"]
    assert f"{100 * (9 - lost) / 12:.2f} % ({9 - lost} of 12)" in found["reason"]
    assert "with the same labels" in found["reason"]
    said = verify("--all")
    assert said.exit_code == 4
    assert "joined to wrong rows" in said.stdout
    # Scoring again says which ones.
    again = {problem["file"] for problem in problems(verify("--all", "--recompute", "--json"))}
    assert again == {*files, "(all rows)"}


def test_a_small_draw_raises_the_alarm_as_well_since_an_accuracy_needs_every_row(
    cached: World, verify: Run, world: World
) -> None:
    exchange(world, 0, 1)
    assert {verify("--n", 1, "--seed", seed).exit_code for seed in range(4)} == {4}


def test_rows_exchanged_within_a_scene_are_beyond_the_alarm_but_not_beyond_recompute(
    cached: World, verify: Run, world: World
) -> None:
    exchange(world, 0, 10)  # both of scene 0, both right
    assert verify("--all").exit_code == 0
    assert verify("--all", "--recompute").exit_code == 4


@pytest.mark.parametrize("command", ["dump", "part", "seal", "another teacher's dump"])
def test_nothing_blesses_wrong_joins(
    run: Run, cached: World, dump: Run, verify: Run, world: World, command: str
) -> None:
    """What would keep the rows and measure them anew stops with exit 4, and changes nothing."""
    exchange(world, 0, 1)
    before = snapshot(world.cache)
    result = {
        "dump": lambda: dump(),
        "part": lambda: dump("--shard", "0/2"),
        "seal": lambda: run("seal", "--target", "b"),
        "another teacher's dump": lambda: dump(teachers=DULL),
    }[command]()
    assert result.exit_code == 4
    assert "joined to wrong rows" in result.stderr
    assert "kd-cache repair" in result.stderr
    assert snapshot(world.cache) == before
    assert verify("--all").exit_code == 4


def test_not_even_with_a_new_sample_or_one_sample_less(cached: World, dump: Run, verify: Run, world: World) -> None:
    exchange(world, 0, 1)
    say(world, world.add(30, "A", "train"), 0)
    world.write()
    assert dump().exit_code == 4
    del world.rows[5]
    world.write()
    assert dump().exit_code == 4
    assert verify("--all").exit_code == 6  # and the sample that is no longer permitted is worse


@pytest.mark.parametrize("healer", ["--no-skip-existing", "repair"])
def test_scoring_everything_again_heals_it(
    run: Run, cached: World, dump: Run, verify: Run, world: World, tmp_path: Path, healer: str
) -> None:
    right, view = world.packs(), snapshot(world.cache / "clear")
    exchange(world, 0, 1)
    healed = dump(healer) if healer != "repair" else run("repair", "--target", "b", *CLEAR[:2])
    assert healed.exit_code == 0
    assert verify("--all", "--recompute").exit_code == 0
    assert world.packs() == right
    assert snapshot(world.cache / "clear") == view
    assert entry(world)["accuracy"] == {"correct": 9, "rows": LABELLED}


# -- labels changed ---------------------------------------------------------------------------------------------------


def test_changed_labels_are_stale_with_the_files_and_both_accuracies(dump: Run, verify: Run, world: World) -> None:
    dump(teachers=BOTH)
    files = [relabel(world, number, 9) for number in (0, 1, 2)]
    result = verify("--all", "--json", teachers=BOTH)
    assert result.exit_code == 5
    found = problems(result)
    assert [problem["file"] for problem in found] == sorted(files, key=md5)
    assert {(problem["kind"], problem["about"], problem["teacher"]) for problem in found} == {("stale", "label", "")}
    by_file = {problem["file"]: problem["reason"] for problem in found}
    assert "was 1 at the dump and is 9 now" in by_file[files[1]]
    for name in ("clear", "dull"):
        then, now = entry(world, name)["accuracy"], by_the_book(world, name)
        moved = f"{name} {100 * then['correct'] / 12:.2f} % → {100 * now[0] / 12:.2f} %"
        assert all(moved in reason for reason in by_file.values())
    said = verify("--all", teachers=BOTH)
    assert said.exit_code == 5
    assert all(file in said.stdout for file in files)


@pytest.mark.parametrize("healer", ["dump", "repair", "seal"])
def test_the_next_publication_measures_with_the_new_labels_and_scores_nothing(
    run: Run, cached: World, dump: Run, verify: Run, world: World, healer: str
) -> None:
    packs = {path: path.stat().st_ino for path in (world.cache / "packs").iterdir()}
    relabel(world, 0, 9)
    if healer == "dump":
        scored = json.loads(dump("--json").stdout)["samples_scored"]
    elif healer == "repair":
        scored = sum(json.loads(run("repair", *CLEAR[:2], "--json").stdout)["caches"][0]["scored"].values())
    else:
        assert run("seal", "--target", "b").exit_code == 0
        scored = 0
    assert scored == 0
    assert verify("--all").exit_code == 0
    assert {path: path.stat().st_ino for path in (world.cache / "packs").iterdir()} == packs
    assert by_the_book(world) == (8, LABELLED)
    assert entry(world)["accuracy"] == {"correct": 8, "rows": LABELLED}


def test_labels_of_the_target_and_of_cities_are_nobodys_business(cached: World, verify: Run, world: World) -> None:
    for row in world.rows:
        row["city_label"] = (row["city_label"] + 1) % 12
    for number in range(12, 20):
        relabel(world, number, 7)
    assert verify("--all").exit_code == 0
    for number in range(12, 20):
        relabel(world, number, None)
    assert verify("--all").exit_code == 0


# -- both, and what is worse ------------------------------------------------------------------------------------------


def test_wrong_joins_and_changed_labels_are_told_apart_and_the_worse_one_counts(
    run: Run, cached: World, dump: Run, verify: Run, world: World
) -> None:
    relabel(world, 4, 9)
    assert verify("--all").exit_code == 5
    exchange(world, 0, 1)
    result = verify("--all", "--json")
    assert result.exit_code == 4
    assert [(problem["kind"], problem["about"]) for problem in problems(result)] == [
        ("corrupt", "teacher"),
        ("stale", "label"),
    ]
    # The alarm is measured with the labels of the dump: 9 of 12 were right by them, and 7 are now.
    assert "75.00 % (9 of 12)" in problems(result)[0]["reason"]
    assert "58.33 % (7 of 12)" in problems(result)[0]["reason"]
    assert dump().exit_code == 4
    assert run("seal", "--target", "b").exit_code == 4
    assert run("repair", *CLEAR[:2]).exit_code == 0
    assert verify("--all", "--recompute").exit_code == 0
    assert entry(world)["accuracy"] == {"correct": by_the_book(world)[0], "rows": LABELLED}


def test_six_is_worse_than_four_than_five_than_three(cached: World, verify: Run, world: World) -> None:
    say(world, world.add(31, "A", "train"), 1)
    world.write()
    assert verify("--all").exit_code == 3
    relabel(world, 4, 9)
    assert verify("--all").exit_code == 5
    exchange(world, 0, 1)
    assert verify("--all").exit_code == 4
    del world.rows[5]
    world.write()
    assert verify("--all").exit_code == 6
    kinds = [problem["kind"] for problem in problems(verify("--all", "--json"))]
    assert kinds == sorted(kinds, key=["leak", "corrupt", "stale", "miss"].index)
    assert set(kinds) == {"leak", "corrupt", "stale", "miss"}


# -- no false alarm ---------------------------------------------------------------------------------------------------


def reasons(result: Any) -> str:
    return " ".join(problem["reason"] for problem in problems(result))


def add_rows(world: World, dump: Run) -> None:
    for number in range(40, 45):
        say(world, world.add(number, "A", "train"), 0)
    world.write()


def exchange_rows(world: World, dump: Run) -> None:
    """As many go as come."""
    del world.rows[0:3]
    for number in range(40, 43):
        say(world, world.add(number, "A", "train"), (number + 1) % 10)
    world.write()


def move_rows_to_the_target(world: World, dump: Run) -> None:
    for row in world.rows[:3]:
        row |= {"device_id": "b", "domain": 1}
    world.write()


def part_of_new_rows(world: World, dump: Run) -> None:
    add_rows(world, dump)
    assert dump("--shard", "0/2").exit_code == 0


def part_of_changed_features(world: World, dump: Run) -> None:
    for row in world.rows[:12]:
        say(world, row["file"], 9)
    assert dump("--shard", "1/2").exit_code == 0


def all_of_changed_features(world: World, dump: Run) -> None:
    for row in world.rows[:12]:
        say(world, row["file"], 9)
    assert dump("--shard", "0/2").exit_code == 0
    assert dump("--shard", "1/2").exit_code == 0


def changed_features_and_a_lost_pack(world: World, dump: Run) -> None:
    """As many rows as before, each of another feature."""
    old = only_pack(world).path
    all_of_changed_features(world, dump)
    old.unlink()


def a_changed_feature_after_a_lost_pack(world: World, dump: Run) -> None:
    """Every row scored again, one of them from another feature, and the index not written yet."""
    only_pack(world).path.unlink()
    say(world, world.rows[0]["file"], 9)
    stop_after(dump, 1)


def interrupted_rescoring(world: World, dump: Run) -> None:
    for row in world.rows[:12]:
        say(world, row["file"], 9)
    stop_after(dump, 1, "--batch-size", 2, "--shard-size", 2)


def interrupted_rescoring_of_everything(world: World, dump: Run) -> None:
    stop_after(dump, 1, "--no-skip-existing", "--shard-size", 2)


def other_weights_begun(world: World, dump: Run) -> None:
    number = world.root / "weights"
    number.write_text("-1.0")
    stop_after(
        dump, 1, "--shard-size", 2, teachers=("--teacher", f"clear=test_accuracy:clear,ckpt={number}", *CLEAR[2:])
    )


def stop_after(dump: Run, commits: int, *args: object, teachers: tuple[object, ...] = CLEAR) -> None:
    """Interrupt a dump after so many commits."""
    from kd_cache.score.commits import Shard

    whole, done = Shard.commit, []

    def commit(self: Shard) -> None:
        whole(self)
        done.append(self)
        if len(done) >= commits:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shard, "commit", commit)
        assert dump(*args, teachers=teachers).exit_code == 130
    assert done


def lose_a_pack(world: World, dump: Run) -> None:
    only_pack(world).path.unlink()


def another_teacher_after_labels_changed(world: World, dump: Run) -> None:
    relabel(world, 0, 5)
    assert dump(teachers=DULL).exit_code == 0


def features_gone(world: World, dump: Run) -> None:
    for row in world.rows[:2]:
        world.feature(row["file"]).unlink()


def skipped_samples_came_back_in_a_part(world: World, dump: Run) -> None:
    whole = {row["file"]: world.feature(row["file"]).read_bytes() for row in world.rows[:4]}
    for file in whole:
        world.feature(file).write_bytes(b"no")
    assert dump("--on-bad-sample", "skip").exit_code == 3
    for file, content in whole.items():
        world.feature(file).write_bytes(content)
    assert dump("--shard", "0/2").exit_code == 0


EVENTS = [
    add_rows,
    exchange_rows,
    part_of_new_rows,
    part_of_changed_features,
    changed_features_and_a_lost_pack,
    a_changed_feature_after_a_lost_pack,
    interrupted_rescoring,
    interrupted_rescoring_of_everything,
    other_weights_begun,
    lose_a_pack,
    another_teacher_after_labels_changed,
    features_gone,
    skipped_samples_came_back_in_a_part,
]


@pytest.mark.parametrize(
    ("event", "dtype"),
    [*((event, "fp32") for event in EVENTS), *((event, "fp16") for event in (exchange_rows, interrupted_rescoring))],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_what_is_not_a_wrong_join_is_never_called_one(
    dump: Run, verify: Run, world: World, event: Callable[[World, Run], None], dtype: str
) -> None:
    def with_dtype(*args: object, **more: Any) -> Any:
        return dump("--dtype", dtype, *args, **more)

    with_dtype()
    event(world, with_dtype)
    for which in (("--all",), ("--n", 3)):
        result = verify(*which, "--json")
        assert "joined" not in reasons(result)
    # Nor does the dump that puts it right stop.
    after = with_dtype("--on-bad-sample", "skip")
    assert after.exit_code == (3 if event is features_gone else 0), after.output
    clean = verify("--all", "--json")
    assert clean.exit_code == (1 if event is features_gone else 0)  # their rows stay; nobody can say if they are fresh
    assert entry(world)["accuracy"] == dict(zip(("correct", "rows"), by_the_book(world), strict=True))


def test_samples_that_become_the_targets_change_their_stored_label_not_the_alarm(
    cached: World, dump: Run, verify: Run, world: World
) -> None:
    move_rows_to_the_target(world, dump)
    result = verify("--all", "--json")
    assert result.exit_code == 5
    assert "joined" not in reasons(result)
    assert "is none now" in reasons(result)
    assert "-1" not in reasons(result)
    assert dump().exit_code == 0
    assert verify("--all").exit_code == 0
    assert entry(world)["accuracy"] == {"correct": 6, "rows": LABELLED - 3}


@pytest.mark.parametrize("kind", ["many", "probs", "sigmoid"])
def test_every_kind_of_value_and_any_number_of_classes_is_measured_alike(
    dump: Run, verify: Run, world: World, kind: str
) -> None:
    chosen = ("--teacher", f"clear=test_accuracy:{kind}", "--only", "clear")
    assert dump(teachers=chosen).exit_code == 0
    assert by_the_book(world) == (9, LABELLED)
    assert entry(world)["accuracy"] == {"correct": 9, "rows": LABELLED}
    assert verify("--all", teachers=chosen).exit_code == 0
    exchange(world, 0, 1)
    assert verify("--all", teachers=chosen).exit_code == 4


def test_the_alarm_of_one_teacher_says_nothing_of_the_other(run: Run, dump: Run, verify: Run, world: World) -> None:
    dump(teachers=BOTH)
    exchange(world, 0, 1)
    found = problems(verify("--all", "--json", teachers=BOTH))
    assert [(problem["teacher"], problem["about"]) for problem in found] == [("clear", "teacher")]
    # Scoring the other one would keep this one's rows.
    assert dump("--no-skip-existing", teachers=DULL).exit_code == 4
    before = world.packs("dull")
    assert dump("--no-skip-existing").exit_code == 0
    assert world.packs("dull") == before
    assert verify("--all", teachers=BOTH).exit_code == 0


def alarm(union: Union | None, permitted: Permitted, entry: Mapping[str, Any]) -> str | None:
    return alarm_of(measure(union, permitted), entry)


# -- the parts --------------------------------------------------------------------------------------------------------


def test_a_source_row_without_a_label_has_none(world: World) -> None:
    """A manifest file must label the source; a `Selection` made by hand need not."""
    selection = select(load_manifest(world.json_path), "b")
    samples = [sample._replace(scene_label=None) if sample.scene_label == 2 else sample for sample in selection.samples]
    labels = replace(selection, samples=tuple(samples)).labels
    assert sorted(labels.tolist()) == [-1] * 9 + sorted(
        row["scene_label"] for row in world.rows[:12] if row["scene_label"] != 2
    )


def test_only_samples_permitted_both_times_have_a_changed_label() -> None:
    def permitted(labels: Mapping[int, int]) -> Permitted:
        keys = np.zeros((len(labels), 16), np.uint8)
        keys[:, 0] = sorted(labels)
        return Permitted.of(keys, np.array([labels[key] for key in sorted(labels)], np.int32))

    then, now = permitted({1: 5, 2: 6, 3: -1, 4: 0}), permitted({2: 6, 3: 1, 4: 2, 9: 9})
    assert [(key[0], old, new) for key, old, new in changed_labels(then, now)] == [(3, -1, 1), (4, 0, 2)]
    assert changed_labels(then, then) == []
    assert changed_labels(permitted({}), now) == []
    assert changed_labels(then, permitted({})) == []


def kept(union: Union | None, permitted: Permitted) -> dict[str, Any]:
    """What an index that was written over these rows says."""
    accuracy = measure(union, permitted)
    return {"accuracy": accuracy.as_json(), "measured": accuracy.measured}


def test_an_accuracy_is_compared_over_the_same_rows_of_the_same_features_and_no_others(tmp_path: Path) -> None:
    made, files = origin(), [f"x/{number}.npy" for number in range(20)]
    then = Rows.of(files)
    permitted = Permitted.of(then.keys, then.logits.argmax(axis=1))

    def union(*rows: Rows) -> Union | None:
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "packs"
        folder.mkdir(parents=True)
        for part in rows:
            part.write(folder, made)
        packs = CacheFolder(folder.parent).packs().of(made)
        return Union(packs) if packs else None

    told = kept(union(then), permitted)
    assert told["accuracy"] == {"correct": 20, "rows": 20}
    other = Rows.of(files, seed=1)  # other logits of the same features
    assert alarm(union(other), permitted, told) is not None
    assert alarm(union(then.part(range(10)), other.part(range(10, 20))), permitted, told) is not None
    assert alarm(union(then.part(range(10)), then.part(range(5, 20))), permitted, told) is None
    changed = Rows.of(files, seed=1, inputs=1)
    assert alarm(union(changed), permitted, told) is None
    assert alarm(union(then.part(range(19)), changed.part([19])), permitted, told) is None
    assert alarm(union(other.part(range(19))), permitted, told) is None
    assert alarm(None, permitted, told) is None
    assert alarm(union(other), permitted, {}) is None
    # While a dump that scores changed features again has not finished, either row may come first.
    assert alarm(union(then, changed), permitted, told) is None


def test_a_lost_list_of_labels_leaves_nothing_to_refuse_by(cached: World, dump: Run, verify: Run, world: World) -> None:
    next(world.cache.glob("permitted-*.npy")).unlink()
    result = verify("--all", "--json")
    assert result.exit_code == 4
    assert [problem["about"] for problem in problems(result)] == ["index"]
    assert dump().exit_code == 0
    assert verify("--all").exit_code == 0
