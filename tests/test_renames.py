"""Samples under other names: known again by what their features hold, else by a user's rules; leaks stay leaks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, World
from test_provenance import GOOD, Told, as_bytes, job, md5, row, saved
from train_fixtures import scene, town

import teachers
from kd_cache import Provenance
from kd_cache.dataset.dataset import provenances
from kd_cache.dataset.renames import old_names, read_rules
from kd_cache.errors import DataLeakageError, StoreError, UsageError
from kd_cache.score.dump import dump_logits
from kd_cache.watch import Watcher

__all__ = ["scene", "town"]
COUNTS = ("--num-scenes", 3, "--num-cities", 3)


def digests(world: World, files: Sequence[str]) -> np.ndarray:
    source = world.data().features
    return np.frombuffer(b"".join(source.read(file).digest for file in files), np.uint8).reshape(-1, 16)


def learnt(world: World, files: Sequence[str], validated: Sequence[str] = ()) -> Provenance:
    return Provenance.of(files, validated, digests(world, [*files, *validated]))


def rename(world: World, new: Callable[[str], str]) -> None:
    """Every file under another name, in the manifest and on the disk."""
    for each in world.rows:
        before, each["file"] = world.feature(each["file"]), new(each["file"])
        world.feature(each["file"]).parent.mkdir(parents=True, exist_ok=True)
        before.rename(world.feature(each["file"]))
    world.write()


def test_features_digests_stand_beside_the_keys_and_are_read_again() -> None:
    one, other = (np.full((1, 16), value, np.uint8) for value in (1, 2))
    made = Provenance.of(["b", "a"], ["v"], np.concatenate([other, one, np.zeros((1, 16), np.uint8)]))
    content = json.loads(json.dumps(made.as_json()))
    assert {name: content[name] for name in ("trained", "sha256")} == {
        name: Provenance.of(["a", "b"], ["v"]).as_json()[name] for name in ("trained", "sha256")
    }
    found = Provenance.from_json(content)
    assert found.inputs is not None
    by_key = dict(zip(as_bytes(found.keys), as_bytes(found.inputs), strict=True))
    assert by_key == {md5("a"): one.tobytes(), md5("b"): other.tobytes(), md5("v"): bytes(16)}
    for both in (made.together(Provenance.of(["z"])), Provenance.of(["z"]).together(made)):
        assert both.inputs is not None
        assert as_bytes(both.inputs[[key in by_key for key in as_bytes(both.keys)]]) == as_bytes(found.inputs)
    for wrong in ({"inputs": GOOD["trained"]}, {"inputs": 3}, {"inputs_sha256": "0" * 64}):
        with pytest.raises(ValueError, match=r"inputs|bytes"):
            Provenance.from_json({**content, **wrong})


@pytest.mark.parametrize(("suffix", "holds"), [(".safetensors", True), (".pth", False)])
def test_where_a_checkpoint_has_no_room_for_digests_it_keeps_the_keys(tmp_path: Path, suffix: str, holds: bool) -> None:
    keys = np.random.default_rng(0).integers(0, 256, (100_000, 16), np.uint8)
    made = Provenance(np.unique(keys.view("V16")).view(np.uint8).reshape(-1, 16), keys[:0])
    found = teachers.load_teacher(saved(tmp_path / f"t{suffix}", made.with_inputs(keys, keys[::-1]).as_json()))
    assert found.provenance is not None
    assert len(found.provenance.trained) == 100_000
    assert (found.provenance.inputs is not None) is holds


@pytest.mark.parametrize("how", ["input", "rule", "both", "neither"])
def test_renamed_samples_are_known_by_their_features_or_by_a_rule(world: World, how: str) -> None:
    files = world.permitted()
    made = learnt(world, files[:-3], files[-3:]) if how in ("input", "both") else Provenance.of(files[:-3], files[-3:])
    rename(world, lambda file: f"features/{file.removeprefix('x/')}")
    planned = job(world, told=Told(1, made))
    if how in ("rule", "both"):
        object.__setattr__(planned.data, "rules", read_rules(["x=features"]))
    if how == "neither":
        with pytest.raises(DataLeakageError, match=r"not list: 20 of 20 \(renamed since.*features/") as caught:
            dump_logits(planned)
        assert "--rename-map" in str(caught.value.hint)
        return
    assert dump_logits(planned).teachers["told"].scored == 20
    now = provenances(planned.teachers, planned.data, Watcher())["told"]
    assert now is not None
    assert as_bytes(now.trained) == sorted(md5(file) for file in world.permitted()[:-3])
    assert as_bytes(now.validated) == sorted(md5(file) for file in world.permitted()[-3:])


LEAKS: dict[str, Callable[[World], str]] = {
    "a test file": lambda world: row(world, "A", "test"),
    "a file of another target": lambda world: row(world, "c"),
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
@pytest.mark.parametrize("rules", [[], ["x=y"], ["LEAK=y/lie.npy"]], ids=str)
def test_what_leaked_is_refused_under_its_new_name_whatever_a_rule_says(
    world: World, leak: Callable[[World], str], rules: list[str]
) -> None:
    held_out = leak(world)
    made = learnt(world, [*world.permitted(), held_out])
    teacher = Told(1, made)
    rename(world, lambda file: file.replace("x/", "y/"))
    lie = world.permitted()[0]
    planned = job(world, told=teacher)
    rules = [rule.replace("LEAK", held_out).replace("y/lie.npy", lie) for rule in rules]
    object.__setattr__(planned.data, "rules", read_rules(rules))
    with pytest.raises(DataLeakageError, match=r"on 1 samples[^:]*\n") as caught:
        dump_logits(planned)
    assert held_out.replace("x/", "y/") in caught.value.message
    assert teacher.batches == 0
    assert not planned.folder.path.exists()


def test_a_copy_of_a_held_out_feature_among_the_permitted_does_not_hide_it(world: World) -> None:
    held_out = row(world, "A", "test")
    made = learnt(world, [held_out])
    world.write_feature(world.permitted()[0], np.load(world.feature(held_out)))
    rename(world, lambda file: f"y/{file}")
    with pytest.raises(DataLeakageError, match=f"y/{held_out}"):
        dump_logits(job(world, told=Told(1, made)))


@pytest.mark.parametrize("is_held_out", [True, False])
def test_names_that_changed_places_with_a_held_out_file_make_nothing_current(world: World, is_held_out: bool) -> None:
    first, other = world.permitted()[0], row(world, "A", "test") if is_held_out else world.permitted()[1]
    made = learnt(world, world.permitted())
    content = np.load(world.feature(first)), np.load(world.feature(other))
    world.write_feature(first, content[1])
    world.write_feature(other, content[0])
    planned = job(world, told=Told(1, made))
    if is_held_out:
        with pytest.raises(DataLeakageError, match=other):
            dump_logits(planned)
    else:
        dump_logits(planned)
    assert planned.folder.index_path.exists() is not is_held_out


def test_rules_are_of_whole_paths_or_folders(tmp_path: Path) -> None:
    listed = tmp_path / "rules.txt"
    listed.write_text("# renamed in May\nold.npy=a/new.npy\n\nwith=sign.npy\ta/b.npy\n", encoding="utf-8-sig")
    rules = read_rules(["features/=", "=raw", "wav/=audio/", str(listed)])
    expected = {
        "x.npy": ["features/x.npy"],
        "raw/x.npy": ["features/raw/x.npy", "x.npy"],
        "audio/1.npy": ["features/audio/1.npy", "wav/1.npy"],
        "audio2/1.npy": ["features/audio2/1.npy"],
        "a/new.npy": ["features/a/new.npy", "old.npy"],
        "a/b.npy": ["features/a/b.npy", "with=sign.npy"],
    }
    assert {file: list(old_names(file, rules)) for file in expected} == expected
    listed.write_bytes(b"caf\xe9=x")
    for text in ("=", "same=same/", str(tmp_path / "none"), str(tmp_path), str(listed)):
        with pytest.raises((UsageError, StoreError), match=r"rename-map|rules"):
            read_rules([text])


@pytest.mark.parametrize("by_rule", [False, True])
def test_the_product_s_own_teachers_serve_renamed_features(run: Run, town: World, scene: Path, by_rule: bool) -> None:
    """Trained by the product, then a folder less in every path: dump, verify, evaluate and student go on."""
    if by_rule:  # a checkpoint of before
        weights = teachers.load_teacher(scene)
        told = {name: value for name, value in weights.record["provenance"].items() if not name.startswith("inputs")}
        scene = town.root / "before.safetensors"
        teachers.save_checkpoint(scene, weights.state_dict(), {**weights.record, "provenance": told})
    rename(town, lambda file: file.removeprefix("x/"))
    data = ("--json-path", town.json_path, *COUNTS)
    dump = ("dump", "--target", "b", *data, "--scene-teacher-ckpt", scene, "--only", "scene")
    rule = ("--rename-map", "x/=") if by_rule else ()
    if by_rule:
        refused = run(*dump)
        assert refused.exit_code == 6, refused.output
        assert "--rename-map" in refused.stderr
        assert hashlib.md5(b"x", usedforsecurity=False).hexdigest() not in refused.stderr
    assert run(*dump, *rule).exit_code == 0
    record: Any = json.loads((town.cache / "cache_index.json").read_text())["kd_cache"]
    assert record["settings"]["paths"].get("rename_map", []) == list(rule[1:])
    for command in (
        ("verify", "--all"),  # the rule is recalled from the cache
        (
            "student",
            "--target",
            "b",
            "--arch",
            "cp_resnet",
            "--epochs",
            1,
            "--feature-dim",
            8,
            "--batch-size",
            8,
            "--lr",
            0.03,
        ),
        ("evaluate", scene, "--target", "b", *data, *rule, "--split", "val", "--val-ratio", 0.3),
    ):
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert "--rename-map, under other names" in result.stderr
