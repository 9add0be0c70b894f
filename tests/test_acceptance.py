"""The product on its embedded sample, as a person would use it: real teachers, the real command, a student."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO, SAMPLE, Run, as_if_dumped_in, kaiming
from typer.testing import CliRunner, Result

from kd_cache import DataLeakageError, LogitCache, StaleError, load_manifest, student_loader, teacher_fingerprint
from kd_cache.cli import app
from kd_cache.dataset.manifest import LISTS
from teachers import load_teacher, save_checkpoint


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="kd-cache")


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root, with the sample's data and its finished cache for target b."""
    root = tmp_path_factory.mktemp("root")
    (root / "data").mkdir()
    shutil.copytree(SAMPLE, root / "data" / "sample")
    before = Path.cwd()
    os.chdir(root)
    try:
        result = invoke("dump", "--target", "b")
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def root(dumped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to damage; the working folder."""
    copy = tmp_path / "root"
    shutil.copytree(dumped, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("COLUMNS", "200")
    as_if_dumped_in(copy, copy / "cache" / "A2b", dumped)
    return copy


def manifest(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "data/sample/dataset.json").read_text())
    return content


def write_manifest(root: Path, content: object) -> None:
    (root / "data/sample/dataset.json").write_text(json.dumps(content))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_index_alone_gives_the_logits_that_logit_cache_gives(root: Path) -> None:
    script = """
import json, numpy as np
index = json.load(open("cache/A2b/cache_index.json"))
for teacher in ("city2scene", "scene"):
    np.save(teacher, [np.load(json.load(open("cache/A2b/cache_index.json"))[teacher][file]) if not i else
                      np.load(index[teacher][file]) for i, file in enumerate(index[teacher])])
json.dump([list(index["city2scene"]), list(index["scene"])], open("files.json", "w"))
"""
    isolated = [sys.executable, "-c", script]
    subprocess.run(isolated, cwd=root, check=True)
    cache = LogitCache.open("cache/A2b")
    for teacher, files in zip(("city2scene", "scene"), json.loads((root / "files.json").read_text()), strict=True):
        assert sorted(files) == sorted(cache.files)
        expected = cache.batch(files)[:, cache.teachers.index(teacher)].numpy()
        np.testing.assert_array_equal(np.load(f"{teacher}.npy"), expected)


def test_cached_logits_are_the_teachers_own_and_know_the_scene(root: Path) -> None:
    cache = LogitCache.open("cache/A2b")
    rows = [row for row in manifest(root)["train"] if row["device_id"] == "A"]
    features = torch.stack([torch.from_numpy(np.load(f"data/sample/{row['file']}")).float() for row in rows])
    scene = load_teacher(SAMPLE / "teachers/teacher_scene/global/best.safetensors")
    with torch.inference_mode():
        expected = scene(features)
    logits = cache.batch([row["file"] for row in rows])[:, cache.teachers.index("scene")]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    labels = torch.tensor([row["scene_label"] for row in rows])
    assert (logits.argmax(1) == labels).float().mean() > 0.5


def test_another_checkpoint_under_the_same_path_is_refused_everywhere_until_it_is_rescored(root: Path) -> None:
    path = root / "data/sample/teachers/teacher_scene/global/best.safetensors"
    made = load_manifest(root / "data/sample/dataset.json").front_end_text
    old = teacher_fingerprint(load_teacher(path), front_end=made)
    teacher = load_teacher(path)
    state = {name: tensor.clone() for name, tensor in teacher.net.state_dict().items()}
    next(iter(state.values())).mul_(1.5)
    save_checkpoint(path, state, teacher.record)
    result = invoke("verify", "--n", 20)
    assert result.exit_code == 5
    assert "weights" in result.stdout
    new = teacher_fingerprint(load_teacher(path), front_end=made)
    with pytest.raises(StaleError, match="weights"):
        LogitCache.open("cache/A2b", expect={"scene": new})
    with pytest.raises(StaleError):
        LogitCache.open("cache/A2b", expect={"scene": new.digest})
    content = json.loads(invoke("dump", "--target", "b", "--json").stdout)
    assert content["teachers"]["scene"]["rescored"] == {"weights changed": content["permitted"]}
    assert content["teachers"]["city2scene"]["skipped"] == content["permitted"]
    assert LogitCache.open("cache/A2b", expect={"scene": new.digest}).teachers == ("city2scene", "scene")
    with pytest.raises(StaleError, match="weights"):  # the cache remembers what the old one was
        LogitCache.open("cache/A2b", expect={"scene": old.digest})
    assert invoke("verify", "--all").exit_code == 0


def held_out_row_into_train(content: dict[str, Any]) -> str:
    row = content["test"][0]
    content["train"].append(row)  # its split still says test
    return str(row["file"])


def unseen_device_into_train(content: dict[str, Any]) -> str:
    row = next(row for row in content["test"] if row["device_id"] == "s4")
    content["test"].remove(row)
    content["train"].append(row | {"split": "train"})
    return str(row["file"])


def one_file_under_two_spellings(content: dict[str, Any]) -> str:
    row = content["train"][0]
    content["test"].append(row | {"file": "./" + row["file"].replace("/", "//"), "split": "test"})
    return str(row["file"])


def one_location_in_both(content: dict[str, Any]) -> str:
    row = next(row for row in content["train"] if row["device_id"] == "A")
    other = row | {"file": row["file"].replace("-a.npy", "-s1.npy") + ".npy", "device_id": "s1", "domain": 3}
    content["test"].append(other | {"split": "test"})
    return str(row["file"])


@pytest.mark.parametrize(
    "leak",
    [held_out_row_into_train, unseen_device_into_train, one_file_under_two_spellings, one_location_in_both],
    ids=lambda leak: leak.__name__,
)
def test_leakage_exits_6_with_the_samples_name_and_the_cache_root_unchanged(
    root: Path, leak: Callable[[dict[str, Any]], str]
) -> None:
    content = manifest(root)
    name = leak(content)
    write_manifest(root, content)
    before = snapshot(root / "cache")
    result = invoke("dump", "--target", "b")
    assert result.exit_code == 6
    assert name in result.stderr
    assert snapshot(root / "cache") == before
    with pytest.raises(DataLeakageError, match=name):
        student_loader("data/sample/dataset.json", "data/sample", "cache/A2b", 8)
    shutil.rmtree(root / "cache")
    assert invoke("dump", "--target", "b").exit_code == 6
    assert not (root / "cache").exists()


def test_cnn14_checkpoints_of_existing_pipelines_dump_features_of_mixed_length(run: Run, tmp_path: Path) -> None:
    from teachers.cnn14 import CNN14

    rows = []
    for number, frames in enumerate((101, 64, 101, 33)):
        device = "Ab"[number % 2]
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).normal(size=(frames, 64)).astype(np.float32))
        rows.append({"file": f"{number}.npy", "label": number, "device_id": device, "split": "train"})
    (tmp_path / "m.json").write_text(json.dumps(rows))
    channels = (4, 4, 8, 8, 16, 16)
    city, scene = CNN14(12, channels, 16, (8, 8)), CNN14(10, channels, 16, (8, 8))
    for seed, net in enumerate((city, scene)):
        kaiming(net, seed)
    head = torch.nn.Linear(16, 10)
    for folder, content in (
        ("teacher_scene/global", {"epoch": 1, "model_state_dict": scene.state_dict(), "val_acc": np.float64(0.5)}),
        (
            "teacher_city2scene/A2b",
            {"epoch": 1, "city_model_state_dict": city.state_dict(), "scene_head_state_dict": head.state_dict()},
        ),
    ):
        (tmp_path / "outputs" / folder).mkdir(parents=True)
        torch.save(content, tmp_path / "outputs" / folder / "best.pth")
    result = run("dump", "--target", "b", "--json-path", "m.json")
    assert result.exit_code == 0, result.output
    cache = LogitCache.open("cache/A2b")
    for row in rows:
        features = torch.from_numpy(np.load(tmp_path / str(row["file"])))[None]
        with torch.inference_mode():
            expected = torch.stack([head(city.eval().embed(features)), scene.eval()(features)], dim=1)
        torch.testing.assert_close(cache.batch([str(row["file"])]), expected, rtol=1e-5, atol=1e-5)


def without_a_feature(root: Path) -> None:
    (root / "data/sample" / manifest(root)["train"][3]["file"]).unlink()


def without_a_split(root: Path) -> None:
    rows = [row for split in LISTS for row in manifest(root)[split]]
    del rows[5]["split"]
    write_manifest(root, rows)


BAD_INPUT: dict[str, tuple[int, str, Callable[[Path], object], tuple[object, ...]]] = {
    "no checkpoint": (1, "nowhere.pth", lambda root: None, ("--scene-teacher-ckpt", "nowhere.pth")),
    "another number of classes": (1, "10 scenes, expected 15", lambda root: None, ("--num-scenes", 15)),
    "a missing feature": (1, "does not exist", without_a_feature, ()),
    "a row without split": (2, "never guessed", without_a_split, ()),
    "an empty manifest": (2, "empty", lambda root: write_manifest(root, {"train": [], "test": []}), ()),
    "a cache root that is a file": (1, "is a file", lambda root: (root / "taken").touch(), ("--cache-root", "taken")),
    "an unknown target": (2, "x9", lambda root: None, ("--target", "x9")),
    "an unknown setting": (2, "carg", lambda root: (root / "kd-cache.yaml").write_text("carget: b\n"), ()),
    "no such device": (2, "cuda", lambda root: None, ("--device", "cuda:99")),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_screen_without_traceback(root: Path, case: str) -> None:
    code, says, arrange, options = BAD_INPUT[case]
    arrange(root)
    before = snapshot(root / "cache")
    result = invoke("dump", "--target", "b", *options)
    assert result.exit_code == code, result.output
    said = result.stderr
    assert says in said.replace("\n", "")
    assert "Traceback" not in said
    assert len(said.splitlines()) < 25
    assert snapshot(root / "cache") == before


def test_import_and_help_do_not_import_torch() -> None:
    script = (
        "import sys, kd_cache, kd_cache.cli; assert not {'torch', 'soundfile', 'ray', 'obstore'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True)
    shown = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-c",
            "from kd_cache.cli import main; main()",
            "--help",
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "dump" in shown.stdout
    assert " torch" not in shown.stderr
    assert " ray" not in shown.stderr
