"""`kd-cache prepare`: genuine tables of every layout to a manifest, joined by name, with all that is unknown said."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from tau_fixtures import GENUINE_2020, LAYOUTS, SMALL, make_tau, write_table

from kd_cache.dataset.guard import select
from kd_cache.dataset.manifest import Manifest, load_manifest
from kd_cache.dataset.task import DCASE
from kd_cache.errors import DataLeakageError


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    return tmp_path / "tau"


def prepared(run: Run, *args: str) -> tuple[dict[str, Any], Manifest]:
    result = run("prepare", *(args or ("tau", "tau")), "--out", "out", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), load_manifest("out/dataset.json")


@pytest.mark.parametrize(("newline", "bom"), [("\n", False), ("\r\n", False), ("\r\n", True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_joined_by_name(run: Run, folder: Path, layout: str, newline: str, bom: bool) -> None:
    made = {clip.file: clip for clip in make_tau(folder, layout, newline=newline, bom=bom)}
    subset = ["--subset", "50"] if layout == "2024" else []
    said, manifest = prepared(run, "tau", "tau", *subset)
    for sample in manifest:
        clip = made[sample.file]
        assert sample.scene_label == DCASE.scenes.index(clip.scene)
        assert (sample.device_id.lower(), sample.split, sample.location) == (clip.device, clip.split, clip.identifier)
        assert DCASE.city(sample.city_label or 0) == clip.identifier.partition("-")[0]
    counts = Counter(clip.split for clip in made.values())
    train = {"2024": counts["train"] // 2, "2025": max(12, counts["train"] // 4)}.get(layout, counts["train"])
    assert Counter(sample.split for sample in manifest) == {"train": train, "test": counts["test"]}
    assert said["missing_audio"] == said["samples"] == len(manifest)
    if layout != "2019":
        assert len(select(manifest, "b").samples) > 0


def test_the_genuine_fold_of_2020_has_its_counts(run: Run, folder: Path) -> None:
    make_tau(folder, "2020", GENUINE_2020)
    began = time.monotonic()
    said, manifest = prepared(run)
    assert time.monotonic() - began < 60, "a hundred thousand rows take seconds"
    assert Counter(sample.split for sample in manifest) == {"train": 13962, "test": 2968}
    for split in ("train", "test"):
        found = {name.lower(): each["splits"].get(split, 0) for name, each in said["devices"].items()}
        assert {name: count for name, count in found.items() if count} == GENUINE_2020[split]
    assert "6,105 files of meta.csv are in no list: left out" in said["notes"]


def test_what_no_table_says_stays_unknown_and_is_counted(run: Run, folder: Path) -> None:
    """A test list without labels, whose names tell a scene; and files of which nothing is known."""
    make_tau(folder, "2025")
    (folder / "meta.csv").unlink()
    with (folder / "split_setup/test.csv").open("a") as table:
        table.write("audio/17.wav\n")
    said, manifest = prepared(run)
    test = [sample for sample in manifest if sample.split == "test"]
    assert [sample.scene_label for sample in test] == [None] * 28
    assert {sample.device_id for sample in test} == {"A", "b", "s4"}
    assert all(sample.location for sample in manifest), "the names say it"
    assert any("1 of 29 test rows name no device" in note for note in said["notes"])
    assert any("29 of 29 test rows have no scene label" in note for note in said["notes"])


OWN = "path;class;town;mic;where;part\n"


def test_tables_of_ones_own_name_their_columns(run: Run, folder: Path) -> None:
    folder.mkdir()
    (folder / "all.csv").write_text(
        OWN + "x/1.flac;park;paris;a;paris-1;train\nx/2.flac;;paris;b;paris-2;train\nx/3.flac;9;;s4;lyon-7;test\n"
        "x/4.flac;bus;;A;lyon-8;unused\n"
    )
    columns = "file=path,scene=class,city=town,device=mic,location=where,split=part"
    _, manifest = prepared(run, "csv", "tau", "--table", "tau/all.csv", "--columns", columns)
    told = [(s.file, s.scene_label, s.city_label, s.device_id, s.split) for s in manifest]
    lyon, paris = (DCASE.cities.index(city) for city in ("lyon", "paris"))
    assert told == [
        ("x/1.flac", 4, paris, "A", "train"),
        ("x/2.flac", None, paris, "b", "train"),
        ("x/3.flac", 9, lyon, "s4", "test"),
    ]


WRONG: dict[str, tuple[str, str]] = {
    "a scene": ("x.wav\tbeach\tlyon-1\tb", "name a scene other than airport, bus, metro,"),
    "a device": ("x.wav\tbus\tlyon-1\tphone", "name a device other than A, b"),
    "a file twice": ("./audio/airport-barcelona-0-0-a.wav\tairport\tbarcelona-0\ta", "for the second time"),
    "no file": ("\tbus\tlyon-1\tb", "name no file"),
    "too few cells": ("x.wav\tbus", "have not the 4 cells of the header"),
    "another device than its name": ("audio/bus-lyon-1-1-b.wav\tbus\tlyon-1\tc", "otherwise than their file's name"),
    "a source without label": ("x.wav\t\tlyon-1\ta", "of train and device A have no scene label"),
    "not UTF-8": ("\udcff.wav\tbus\tlyon-1\tb", "invalid start byte"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_rows_that_are_wrong_are_all_named_at_once_and_nothing_is_written(run: Run, folder: Path, kind: str) -> None:
    line, says = WRONG[kind]
    make_tau(folder, "2020")
    with (folder / "meta.csv").open("a", errors="surrogateescape") as table:
        table.write(f"{line}\n{line.replace('x.wav', 'y.wav').replace('1-1', '1-2')}\n")
    shutil.rmtree(folder / "evaluation_setup")
    (folder / "meta.csv").rename(folder / "fold1_train.csv")
    result = run("prepare", "tau", "tau", "--out", "out")
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "2 rows" in result.stderr or kind == "not UTF-8"
    assert not Path("out").exists()


def test_labels_that_contradict_the_table_of_all_files_are_refused(run: Run, folder: Path) -> None:
    """As when somebody joined by position before us."""
    made = make_tau(folder, "2020")
    train = [clip for clip in made if clip.split == "train"]
    rows = [(clip.file, other.scene) for clip, other in zip(train, train[1:] + train[:1], strict=True)]
    write_table(folder / "evaluation_setup/fold1_train.csv", "filename scene_label", rows)
    result = run("prepare", "tau", "tau", "--out", "out")
    assert result.exit_code == 2
    assert "rows say otherwise than the table of all files" in result.stderr


def test_what_leaks_is_refused_as_a_dump_would(run: Run, folder: Path) -> None:
    made = make_tau(folder, "2020")
    with (folder / "evaluation_setup/fold1_train.csv").open("a") as table:
        table.write("".join(f"{clip.file}\t{clip.scene}\n" for clip in made if clip.split == "test"))
    result = run("prepare", "tau", "tau", "--out", "out")
    assert result.exit_code == DataLeakageError.exit_code
    assert "3 train samples come from the unseen devices" in result.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("tau", "nowhere"), "nowhere is not a folder"),
        (("tau", "tau"), "several lists of train samples"),
        (("tau", "tau", "--subset", "7"), "expected split7.csv"),
        (("tau", "."), "Is it tau?"),
        (("wav", "tau"), "no layout is called wav"),
        (("csv", "tau"), "the layout csv needs a table of samples"),
        (("tau", "tau", "--table", "train=x.csv"), "--table names the tables of the layout csv"),
        (("csv", "tau", "--table", "train=x.csv", "--subset", "25"), "--subset is for the layout tau"),
        (("csv", "tau", "--table", "dev=x.csv"), "expected PATH, or each of train, val, test and meta"),
        (("csv", "tau", "--table", "meta=x.csv"), "no table of samples"),
        (("csv", "tau", "--table", "train=x.csv"), "x.csv: No such file"),
        (("csv", "tau", "--table", "tau/meta.csv"), "have no split: expected train, val, test, unused"),
        (("csv", "tau", "--table", "train=tau/meta.csv", "--columns", "where=x"), "expected each of file, scene"),
        (("csv", "tau", "--table", "train=tau/meta.csv", "--columns", "city=town"), "city=town"),
        (("csv", "tau", "--table", "train=tau/meta.csv", "--columns", "file=town"), "no column town"),
    ],
)
def test_what_cannot_be_found_is_said(run: Run, folder: Path, args: tuple[str, ...], says: str) -> None:
    make_tau(folder, "2024")
    result = run("prepare", *args, "--out", "out")
    assert (result.exit_code, says in result.stderr) == (2, True), result.output


def test_another_manifest_is_replaced_only_when_asked(run: Run, folder: Path) -> None:
    make_tau(folder, "2024")
    assert prepared(run, "tau", "tau", "--subset", "50")[0] == prepared(run, "tau", "tau", "--subset", "50")[0]
    before = Path("out/dataset.json").read_bytes()
    result = run("prepare", "tau", "tau", "--out", "out", "--subset", "100")
    assert (result.exit_code, "--overwrite" in result.stderr) == (2, True)
    assert Path("out/dataset.json").read_bytes() == before
    assert prepared(run, "tau", "tau", "--subset", "100", "--overwrite")[0]["samples"] == 2 * sum(
        sum(SMALL[split].values()) for split in ("train", "test")
    )
