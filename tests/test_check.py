"""`kd-cache check`: everything that is wrong with a manifest, at once, without reading a feature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import TINY, Run, World

from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.packed import PackedFeatures


def checked(run: Run, *args: object) -> tuple[int, dict[str, Any]]:
    result = run("check", "--json-path", "dataset.json", *args, "--json")
    return result.exit_code, json.loads(result.stdout)


def test_what_is_right_is_counted(run: Run, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (FeatureSource, PackedFeatures):
        monkeypatch.delattr(source, "read_many")
    monkeypatch.setattr(FeatureSource, "read", None)
    code, said = checked(run)
    assert (code, said["problems"], said["missing"], said["samples"]) == (0, [], {}, 29)
    assert said["devices"]["A"] == {"splits": {"test": 1, "train": 12}, "labelled": 13, "located": 0, "use": "source"}
    assert said["devices"]["s4"]["use"] == "unseen"
    assert said["locations_known"] == [29, 29], "the names say it"
    shown = run("check", "--json-path", "dataset.json").stdout
    assert "Nothing is wrong." in shown
    assert "A2b" in shown


def test_everything_that_is_wrong_is_said_at_once(run: Run, world: World) -> None:
    world.rows[0]["scene_label"] = 10
    world.rows[1]["city_label"] = "lyon"
    world.rows.append(dict(world.rows[2]))
    world.rows.append({**world.rows[12], "split": "test"})
    world.rows[3]["device_id"], world.rows[3]["domain"] = "s5", 7
    world.rows[4]["identifier"] = world.rows[-5]["identifier"] = "lyon-900"
    gone = [world.rows[number]["file"] for number in (5, 13, 25)]
    for file in gone:
        world.feature(file).unlink()
    world.feature(world.rows[6]["file"]).unlink()
    world.feature(world.rows[6]["file"]).mkdir()
    world.write()
    code, said = checked(run)
    assert code == 6, "a leak is the worst of them"
    text = "\n".join(problem["message"] for problem in said["problems"])
    for part in ("3 rows cannot be read", "scene_label is 10", "city_label must be an integer", "listed more than once",
                 "1 train samples come from the unseen devices", "1 train files stand in another split",
                 "2 train samples were recorded at a location", "4 of 29 files are missing"):  # fmt: skip
        assert part in text, part
    assert said["missing"].keys() == {*gone, world.rows[6]["file"]}
    assert "not a regular file" in said["missing"][world.rows[6]["file"]]
    shown = run("check", "--json-path", "dataset.json").stdout
    assert all(line in shown for problem in said["problems"] for line in problem["message"].splitlines())


def test_with_a_target_only_its_cache_s_files_are_looked_for(run: Run, world: World) -> None:
    world.feature(world.rows[20]["file"]).unlink()  # of c
    assert checked(run)[0] == 3
    assert checked(run, "--target", "b")[0] == 0
    code, said = checked(run, "--target", "s3")
    assert (code, said["problems"][0]["message"]) == (2, "A or s3 has no train samples")


def test_files_are_looked_for_where_the_features_are(run: Run, world: World) -> None:
    files = [row["file"] for row in world.rows]
    with h5py.File("some.h5", "w") as packed:
        packed["features"] = np.zeros((3, 4, 5), "f4")
        packed["files"] = files[:3]
    code, said = checked(run, "--features", "some.h5")
    assert (code, sorted(said["missing"])) == (3, sorted(files[3:]))
    Path("elsewhere").mkdir()
    assert checked(run, "--data-root", "elsewhere")[1]["missing"].keys() == set(files)
    large = world.feature(files[0]).stat().st_size
    assert checked(run, "--max-feature-bytes", large - 1)[1]["missing"][files[0]].endswith("permits more")


def test_classes_and_locations_that_nothing_tells_are_noted(run: Run, world: World) -> None:
    for row in world.rows:
        row["file"] = f"x/{world.rows.index(row)}.npy"
        world.write_feature(row["file"], np.zeros((4, 5), np.float32))
    world.rows = world.rows[1:10] + world.rows[12:]
    world.write()
    result = run("check", "--json-path", "dataset.json")
    assert result.exit_code == 0, result.output
    assert "no train sample of A is labelled airport" in result.stderr
    assert "26 of 26 train and test rows name no recording location" in result.stderr


def test_a_dry_run_of_a_dump_shows_the_same_table(run: Run, world: World) -> None:
    dry = ("dump", "--target", "b", "--json-path", "dataset.json", *TINY, "--only", "tiny", "--dry-run")
    table = run("check", "--json-path", "dataset.json").stdout.rpartition("Nothing")[0]
    assert table in run(*dry).stdout
    assert json.loads(run(*dry, "--json").stdout)["devices"] == checked(run)[1]["devices"]


def test_a_manifest_that_is_none_is_refused(run: Run, world: World) -> None:
    world.json_path.write_text("[")
    result = run("check", "--json-path", "dataset.json")
    assert (result.exit_code, "not valid UTF-8 JSON" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"\xef\xbb\xbf[]", "without a byte-order mark"),
        ("[]".encode("utf-16"), "without a byte-order mark"),
        (b"filename\tscene_label\na.wav\tpark\n", "kd-cache prepare csv"),
        (b"file,device_id\na.npy,A\n", "kd-cache prepare csv"),
        (b'{"file": "a.npy"}\n{"file": "b.npy"}\n', "into one list"),
    ],
)
def test_rows_that_are_no_json_hear_what_to_do(run: Run, world: World, content: bytes, hint: str) -> None:
    world.json_path.write_bytes(content)
    result = run("check", "--json-path", "dataset.json")
    assert (result.exit_code, hint in result.stderr) == (2, True)


def test_a_manifest_without_train_rows_of_the_source_hears_it(run: Run, world: World) -> None:
    world.rows = [row | {"split": "test"} for row in world.rows if row["split"] == "test"]
    world.write()
    assert "there is no train sample of A" in run("check", "--json-path", "dataset.json").stderr
