"""What a net costs, counted by hand; and what it makes of unlabelled clips, by the rules of a challenge's validator."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, World
from test_packed_features import as_datasets
from torch import nn
from train_fixtures import scene, town

import teachers
from kd_cache.distill.complexity import complexity
from kd_cache.errors import TeacherError
from kd_cache.train.cp_resnet import CPResNet

__all__ = ["scene", "town"]
HERE = ("--num-scenes", 3, "--num-cities", 3)


class Twice(nn.Module):
    """3×3 convolution with bias over [1, 1, T, F] without padding, batch norm, a linear layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.linear, self.unused = nn.Linear(4, 4), nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.linear(self.norm(self.conv(x[:, None])).mean(dim=(2, 3))))


def test_a_net_is_counted_as_by_hand_and_left_as_it_was() -> None:
    net = Twice()
    found = complexity(net, (10, 6))
    assert found.macs == (9 * 4 + 4) * 8 * 4 + 8 + 2 * 20
    assert found.parameters == 40 + 8 + 20 + 110
    assert found.memory == {"fp32": 712, "fp16": 356, "int8": 178}
    assert net.training
    assert all(not layer._forward_hooks for layer in net.modules())
    assert int(net.norm.num_batches_tracked) == 0
    published = complexity(CPResNet(10), (43, 256))
    assert (published.parameters, published.macs) == (127_684, 28_840_396)
    with pytest.raises(TeacherError, match=r"features \[1, 2, 6\]"):
        complexity(net, (2, 6))


def test_limits_decide_how_it_exits(run: Run, town: World, scene: Path) -> None:
    shape = ("--arch", "cp_resnet", "--shape", "1,43,256")
    beyond = run("student", "complexity", *shape, "--limits", "dcase")
    assert beyond.exit_code == 1
    assert "255,368 bytes of parameters as fp16, above 128,000" in beyond.stdout
    longer = run(
        "student", "complexity", *shape[:2], "--shape", "86,256", "--limits", "dcase", "--stored-as", "int8", "--json"
    )
    assert longer.exit_code == 1
    assert [said.split()[1] for said in json.loads(longer.stdout)["beyond"]] == ["MACs,"]
    within = run("student", "complexity", *shape, "--limits", "dcase", "--stored-as", "int8")
    assert within.exit_code == 0
    assert "within the limits of dcase" in within.stdout
    baseline = run("student", "complexity", "--shape", "1,65,256", "--limits", "dcase", "--json")
    assert baseline.exit_code == 0
    assert json.loads(baseline.stdout)["parameters"] == 61_148
    made = run("student", "complexity", scene, "--json-path", town.json_path, *HERE, "--json")
    assert json.loads(made.stdout)["shape"] == [12, 20]
    for args, says in (
        (("--shape", "43"), "expected frames and bins"),
        ((scene, "--arch", "cp_resnet"), "not both"),
        ((scene, "--channels", "8,8,8,8"), "not both"),
        (("--arch", "cp_resnet", "--shape", "2,2"), "found T=2, F=2"),
        (("--channels", "8,8,16,24"), "cp_mobile has no --channels"),
        (("--arch", "cp_resnet", "--channels", "8,8,16"), "expected four widths"),
        (("nowhere.safetensors",), "neither a checkpoint nor"),
    ):
        refused = run("student", "complexity", *args)
        assert refused.exit_code in (1, 2)
        assert says in " ".join(refused.stderr.split())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_predictions_are_the_nets_probabilities_of_every_clip(run: Run, town: World, scene: Path) -> None:
    told = run("student", "predict", scene, "--features", town.root / "x", *HERE, "--output", "made/all.tsv")
    assert told.exit_code == 0, told.output
    rows, teacher = rows_of(Path("made/all.tsv")), teachers.scene(scene)
    assert list(rows[0]) == ["filename", "scene_label", *teacher.class_names]
    assert {row["filename"] for row in rows} == {f"{Path(row['file']).stem}.wav" for row in town.rows}
    assert len(rows) == len(town.rows)
    for row in rows:
        probabilities = [float(row[name]) for name in teacher.class_names]
        assert abs(sum(probabilities) - 1) < 1e-12
        assert row["scene_label"] == teacher.class_names[int(np.argmax(probabilities))]
        clip = torch.from_numpy(np.load(town.root / "x" / f"{Path(row['filename']).stem}.npy"))[None]
        assert probabilities == pytest.approx(teacher(clip)[0].softmax(0).tolist(), abs=1e-5)

    names = [f"audio/{row['filename']}" for row in rows[:5]][::-1]
    table = Path("evaluation.csv")
    table.write_text("\n".join(["filename", *names]) + "\n")
    args = ("student", "predict", scene, *HERE, "--table", table, "--features")
    assert run(*args, town.root / "x").exit_code == 0
    some = rows_of(Path("submission.tsv"))
    assert [row["filename"] for row in some] == [row["filename"] for row in rows[:5]][::-1]
    for row, other in zip(some, rows[:5][::-1], strict=True):  # in other batches last bits differ
        assert [float(row[name]) for name in teacher.class_names] == pytest.approx(
            [float(other[name]) for name in teacher.class_names], abs=1e-6
        )
    assert run(*args, town.root / "x").exit_code == 0  # the same again
    (town.root / "moved/audio").mkdir(parents=True)
    for name in names:
        shutil.copy(town.root / "x" / f"{Path(name).stem}.npy", town.root / "moved/audio")
    assert run(*args, town.root / "moved", "--output", "again.tsv").exit_code == 0
    assert Path("again.tsv").read_bytes() == Path("submission.tsv").read_bytes()
    arrays = np.stack([np.load(town.root / "x" / f"{Path(name).stem}.npy") for name in names])
    packed = as_datasets(Path("packed.h5"), arrays, names)
    assert run(*args, packed, "--output", "packed.tsv").exit_code == 0
    assert Path("packed.tsv").read_bytes() == Path("submission.tsv").read_bytes()


def validated(path: Path, clips: set[str], classes: list[str]) -> list[dict[str, str]]:
    """The rules of the 2024 challenge's validator."""
    rows = rows_of(path)
    names = [row["filename"] for row in rows]
    assert list(rows[0]) == ["filename", "scene_label", *classes]
    assert all(name.endswith(".wav") and "/" not in name for name in names)
    assert len(names) == len(set(names))
    assert set(names) == clips
    assert all(row["scene_label"] in classes for row in rows)
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in classes)
    return rows


def test_predictions_pass_the_validator_and_say_what_the_net_costs_and_is_worth(
    run: Run, town: World, scene: Path
) -> None:
    test = [row for row in town.rows if row["split"] == "test"]
    classes, table = list(teachers.scene(scene).class_names), Path("labelled.csv")
    of_file = {f"{Path(row['file']).stem}.wav": row for row in test}
    cells = [f"audio/{name}\t{classes[row['scene_label']]}\t{row['device_id']}" for name, row in of_file.items()]
    table.write_text("\n".join(["filename\tscene_label\tsource_label", *cells, "audio/" + "x.wav\t\tb"]) + "\n")
    np.save(town.root / "x/x.npy", np.load(town.feature(test[0]["file"])))
    args = ("student", "predict", scene, *HERE, "--features", town.root / "x", "--table", table)
    told = run(*args)
    assert told.exit_code == 0, told.output
    rows = validated(Path("submission.tsv"), {*of_file, "x.wav"}, classes)
    right = {row["filename"]: row["scene_label"] == classes[of_file[row["filename"]]["scene_label"]]
             for row in rows if row["filename"] in of_file}  # fmt: skip
    info = json.loads(Path("submission.info.json").read_text())
    counted = complexity(teachers.scene(scene), (12, 20))
    assert (info["MACs"], info["Params"]) == (counted.macs, counted.parameters)
    found = info["test"]
    assert (found["samples"], found["accuracy"]) == (len(test), pytest.approx(sum(right.values()) / len(test)))
    of_b = [right[name] for name, row in of_file.items() if row["device_id"] == "b"]
    assert found["device_wise"]["b"]["accuracy"] == pytest.approx(sum(of_b) / len(of_b))
    assert found["class_wise"].keys() == set(classes)
    losses = [-np.log(float(row[classes[of_file[row["filename"]]["scene_label"]]])) for row in rows
              if row["filename"] in of_file]  # fmt: skip
    assert found["log_loss"] == pytest.approx(np.mean(losses))
    table.write_text(f"filename,scene_label\n{next(iter(of_file))},elsewhere\n")
    refused = run(*args)
    assert (refused.exit_code, "of a scene that the net does not know" in " ".join(refused.stderr.split())) == (2, True)


def test_what_cannot_be_predicted_is_refused(run: Run, town: World, scene: Path) -> None:
    x = town.root / "x"
    Path("mine.tsv").write_text("mine")
    Path("empty").mkdir()
    twice, lost = Path("twice.csv"), Path("lost.csv")
    file = Path(town.rows[0]["file"]).stem
    twice.write_text(f"filename\n{file}.wav\naudio/{file}.wav\n")
    lost.write_text(f"filename\n{file}.wav\naudio/other.wav\n")
    for args, code, says in (
        ((x, "--output", "mine.tsv"), 2, "is there, and is not what would be written"),
        (("empty",), 2, "there are no clips"),
        (("nowhere",), 2, "is no folder, so --table must say"),
        ((x, "--table", twice), 2, "1 clips are there more than once"),
        ((x, "--table", lost), 1, "1 of 2 clips of lost.csv have no feature"),
        ((x, "--num-scenes", 10), 1, "has 3 scenes, expected 10"),
    ):
        given = HERE if "--num-scenes" not in args else ()
        result = run("student", "predict", scene, *given, "--features", *args)
        assert result.exit_code == code, result.output
        assert says in " ".join(result.stderr.split())
    assert Path("mine.tsv").read_text() == "mine"
