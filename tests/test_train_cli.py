"""``kd-cache train …`` as a person uses it: the chain, settings files, extracted embeddings, sweeps and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPO, Run, World
from safetensors.torch import load_file
from train_fixtures import OWN, add_clip, own_net, town

from kd_cache import LogitCache
from kd_cache.dataset.provenance import Provenance
from kd_cache.dataset.task import DCASE
from kd_cache.keys import keys_of
from kd_cache.train.checkpoint import read_weights
from kd_cache.train.cp_resnet import CPResNet
from teachers.loading import load_teacher

__all__ = ["own_net", "town"]

Settings = dict[str, Any]

CITY = Path("outputs/teacher_city/A2b/best.safetensors")
HEAD = Path("outputs/teacher_city2scene/A2b/best.safetensors")
SCENE = Path("outputs/teacher_scene/global/best.safetensors")
SIZES = ("--num-scenes", 3, "--num-cities", 3)
QUICK: Settings = {
    "json_path": "dataset.json",
    "num_scenes": 3,
    "num_cities": 3,
    "workers": 0,
    "train": {
        "feature_dim": 8,
        "batch_size": 16,
        "val_ratio": 0.3,
        "time_roll": 0,
        "freq_mixstyle": 0,
        "device_response": 0,
        "ema": 0,
        "warmup_epochs": 0.5,
    },
    "city": {"epochs": 8, "lr": 0.02},
    "scene": {"epochs": 8, "lr": 0.02},
    "city2scene": {"epochs": 5, "lr": 0.1},
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def quick(town: World) -> World:
    """The town, and a ``kd-cache.yaml`` with quick settings."""
    write_settings(town, QUICK)
    return town


@pytest.fixture
def trained(quick: World, run: Run, shelf: Path) -> World:
    """The town with the outputs of a chain for b, trained once for all tests."""
    kept = shelf / "outputs"
    if not kept.exists():
        assert run("train", "all", "--target", "b", "--cache-root", shelf / "cache").exit_code == 0
        shutil.copytree(quick.root / "outputs", kept)
        shutil.rmtree(quick.root / "outputs")
    shutil.copytree(kept, quick.root / "outputs")
    return quick


@pytest.fixture
def extracted(trained: World, run: Run) -> World:
    assert extract(run, f"city={CITY}", f"scene={SCENE}").exit_code == 0
    return trained


def write_settings(world: World, settings: Settings, name: str = "kd-cache.yaml") -> Path:
    path = world.root / name
    path.write_text(yaml.safe_dump(settings))
    return path


def changed(**sections: Any) -> Settings:
    """The quick settings with these; a section's settings go into what it has."""
    found = {name: dict(value) if isinstance(value, dict) else value for name, value in QUICK.items()}
    for name, value in sections.items():
        found[name] = {**found[name], **value} if isinstance(found.get(name), dict) else value
    return found


def extract(run: Run, *checkpoints: str, more: tuple[object, ...] = ()) -> Any:
    return run("train", "extract", "--target", "b", *(x for text in checkpoints for x in ("--checkpoint", text)), *more)


def reports(result: Any) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)["trained"]
    return found


def head(run: Run, *args: object) -> dict[str, Any]:
    """Train a City2Scene teacher; what it says of it."""
    return reports(run("train", "city2scene", "--target", "b", "--json", *args))[-1]


def config(report: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((Path(report["run"]) / "config.yaml").read_text())
    return found


def runs(home: Path) -> list[Path]:
    return sorted((home.parent / "runs").glob("*/"))


def tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in load_file(path).items()}


def test_for_several_targets_the_scene_teacher_scores_each_sample_once(
    quick: World, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for row in quick.rows[1::2]:
        if (row["device_id"], row["split"]) == ("b", "train"):
            row |= {"device_id": "c", "domain": DCASE.domain_of["c"]}
    quick.write()
    monkeypatch.setattr("teachers.training_runs._each", lambda target: ["b", "c"])
    result = run("train", "all", "--target", "all", "--json")
    assert result.exit_code == 0, result.output
    of_b, of_c = (dump["teachers"] for dump in json.loads(result.stdout)["dumps"])
    of_a = len([row for row in quick.rows if (row["device_id"], row["split"]) == ("A", "train")])
    assert of_b["scene"]["scored"] == len(quick.permitted())
    assert of_c["scene"]["scored"] == len(quick.permitted("c")) - of_a > 0
    assert of_c["city2scene"]["scored"] == len(quick.permitted("c"))
    assert run("verify", "--target", "c", "--all", "--recompute").exit_code == 0


def load_teacher_keys(path: Path) -> set[bytes]:
    """The keys of all samples that a checkpoint says that it was made with."""
    return {key.tobytes() for key in Provenance.from_json(read_weights(path).record["provenance"]).keys}


# -- the chain ---------------------------------------------------------------------------------------------------------


def test_the_chain_from_features_to_a_verified_cache(town: World, run: Run) -> None:
    write_settings(town, {"train": QUICK["train"]})
    plan = ("--epochs", 8, "--lr", 0.02, "--workers", 0)
    place = ("--output-dir", "made", "--cache-root", "trained/cache")
    result = run("train", "all", "--target", "b", "--json-path", town.json_path, *SIZES, *plan, *place)
    assert result.exit_code == 0, result.output
    for name in ("city A2b", "city2scene A2b", "scene global", "trained/cache/A2b"):
        assert name in result.stdout
    homes = ("teacher_city/A2b", "teacher_city2scene/A2b", "teacher_scene/global")
    for home in homes:
        published = town.root / "made" / home / "best.safetensors"
        (kept,) = runs(published)
        assert published.read_bytes() == (kept / "best.safetensors").read_bytes()
        assert {path.name for path in kept.iterdir()} == {
            "best.safetensors",
            "last.safetensors",
            "config.yaml",
            "history.csv",
            "steps.csv",
            "results.json",
        }
    assert len(list((town.root / "made/pretrained").iterdir())) == 1
    assert not (town.root / "outputs").exists()
    checked = run("verify", "--cache-root", "trained/cache", "--target", "b", "--all", "--recompute", "--json")
    assert checked.exit_code == 0, checked.output
    (audit,) = json.loads(checked.stdout)["caches"]
    assert {name: one["bit_exact"] for name, one in audit["teachers"].items()} == {"city2scene": 54, "scene": 54}
    cache = LogitCache.open(town.root / "trained/cache/A2b", ["city2scene", "scene"])
    logits = cache.batch(cache.rows(town.permitted()), torch.float32)
    nets = [load_teacher(town.root / "made" / home / "best.safetensors") for home in homes[1:]]
    for file, stored in zip(town.permitted(), logits, strict=True):
        clip = torch.from_numpy(np.load(town.feature(file)))[None]
        with torch.no_grad():
            torch.testing.assert_close(stored, torch.cat([net(clip) for net in nets]), rtol=1e-4, atol=1e-4)


def test_a_second_chain_skips_pretraining_and_its_json_says_so_and_nothing_else(trained: World, run: Run) -> None:
    before = tensors(trained.root / HEAD)
    result = run("train", "all", "--target", "b", "--json")
    assert "pre-training skipped" in result.stderr
    found = reports(result)
    hows = [("scene", "trained"), ("city", "cached"), ("city2scene", "trained")]
    assert [(one["role"], one["how"]) for one in found] == hows
    assert tensors(trained.root / HEAD) == before
    content = json.loads(result.stdout)
    assert content.keys() == {"trained", "dumps", "reports"}
    assert [dump["samples_scored"] for dump in content["dumps"]] == [len(trained.permitted())]
    assert all(Path(report["checkpoint"]).is_file() for report in found)
    assert all(0 <= report["results"]["validation"]["accuracy"] <= 1 for report in found)


def test_quiet_says_nothing(trained: World, run: Run) -> None:
    for result in (
        run("train", "all", "--target", "b", "--quiet"),
        run("train", "city2scene", "--target", "b", "--sweep", "epochs=3/4", "--quiet"),
        extract(run, f"city={CITY}", more=("--quiet",)),
    ):
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_each_stage_of_each_teacher_is_told_of(trained: World, run: Run) -> None:
    result = run("train", "all", "--target", "b", "--shuffle-labels", "--epochs", 1)
    notes = result.stderr.splitlines()
    begins = [number for number, note in enumerate(notes) if "training samples of" in note]
    assert len(begins) == 3
    for first, end in zip(begins, [*begins[1:], len(notes)], strict=True):
        assert any("stage 1 of 1" in note for note in notes[first:end]), notes[first]


@pytest.mark.parametrize("how", [("--shuffle-labels", "--epochs", 2), ("--quick-experiment", 0.9)], ids=str)
def test_a_control_and_a_quick_chain_publish_and_dump_nothing(quick: World, run: Run, how: tuple[object, ...]) -> None:
    for time in ("first", "again"):
        result = run("train", "all", "--target", "b", "--json", *how)
        assert ("publishes nothing" in result.stderr) == ("--quick-experiment" in how)
        city = next(one for one in reports(result) if one["role"] == "city")
        assert (city["how"] == "cached") == (time == "again" and "--quick-experiment" in how)
        assert json.loads(result.stdout)["dumps"] == []
        assert not [path for path in (CITY, HEAD, SCENE, Path("cache")) if (quick.root / path).exists()]
    assert (quick.root / "outputs/pretrained").exists() == ("--shuffle-labels" not in how)


# -- one teacher -------------------------------------------------------------------------------------------------------


def test_a_city_teacher_of_the_command_line(quick: World, run: Run) -> None:
    (report,) = reports(run("train", "city", "--target", "b", "--epochs", 9, "--lr", 0.03, "--pth", "--half", "--json"))
    assert (report["role"], report["place"], report["checkpoint"]) == ("city", "A2b", str(CITY))
    assert [(stage["epochs"], stage["lr"]) for stage in config(report)["stages"]] == [(9, 0.03)]
    floats = {tensor.dtype for tensor in load_file(quick.root / CITY).values() if tensor.is_floating_point()}
    assert floats == {torch.float16}
    assert read_weights(quick.root / CITY.with_suffix(".pth")).tensors.keys() == load_file(quick.root / CITY).keys()


def test_a_scene_teacher_is_everybody_s(quick: World, run: Run, own_net: Callable[[str], str]) -> None:
    arch = own_net(OWN)
    for target in ((), ("--target", "b")):
        (report,) = reports(run("train", "scene", "--arch", arch, "--json", *target))
        assert (report["place"], report["checkpoint"]) == ("global", str(SCENE))
    provenance = load_teacher_keys(quick.root / SCENE)
    assert provenance == {key.tobytes() for key in keys_of(f for f in quick.permitted() if f.endswith("-a.npy"))}


def test_city2scene_leaves_a_city_teacher_of_other_settings_where_it_is(trained: World, run: Run) -> None:
    assert run("train", "city", "--target", "b", "--seed", 5, "--pth").exit_code == 0
    published = [trained.root / CITY, trained.root / CITY.with_suffix(".pth")]
    before = [path.read_bytes() for path in published]
    for seed in (42, 5):  # of other settings, and of the very same, which is used where it is
        result = run("train", "city2scene", "--target", "b", "--seed", seed, "--json")
        assert [path.read_bytes() for path in published] == before
        assert ("is of another training and stays" in result.stderr) == (seed == 42)
        city, head = reports(result)
        assert (city["published"], head["published"]) == (seed == 5, True)


def test_what_any_teacher_s_settings_are_wrong_in_is_said_before_one_is_trained(trained: World, run: Run) -> None:
    for section, setting, told in (
        ("city", {"lr": "fast"}, "kd-cache.yaml: city: lr"),
        ("city2scene", {"stage": ["foo"]}, "--stage foo"),
        ("city2scene", {"preset": "backbone", "epochs": 3}, "needs more than 12 epochs"),
        ("city", {"mlp_hidden_dims": "64"}, "CP-ResNet ends in a convolution"),
        ("city", {"base_channels": 16}, "cp_resnet has no --base-channels"),
        ("city", {"arch": "nonsense"}, "no architecture is called nonsense"),
    ):
        settings = changed()
        settings[section] = {**settings.get(section, {}), **setting}
        write_settings(trained, settings)
        result = run("train", "all", "--target", "b", "--seed", 9)
        assert result.exit_code == 2
        assert told in result.stderr
        assert "training samples" not in result.stderr


def test_a_net_that_no_head_can_be_put_on_is_refused_before_one_is_trained(
    trained: World, run: Run, own_net: Callable[[str], str]
) -> None:
    result = run("train", "all", "--target", "b", "--arch", own_net(OWN))
    assert result.exit_code == 1
    assert "no embed(features) and embedding_dim" in result.stderr
    assert "training samples" not in result.stderr


OWN_NETS = """
import torch
from teachers import own_teacher

class Small(torch.nn.Module):
    classifier_prefix = "head."
    embedding_dim = 6

    def __init__(self, classes):
        super().__init__()
        self.body = torch.nn.Linear(240, 6)
        self.head = torch.nn.Linear(6, classes)

    def embed(self, x):
        return self.body(x.flatten(1)).relu()

    def forward(self, x):
        return self.head(self.embed(x))

def small(classes):
    return Small(classes)

def trained(ckpt):
    return own_teacher(ARCH, ckpt, num_cities=3)
"""


@pytest.mark.parametrize(("hidden", "where"), [("none", "own_nets"), ("5,4", "teachers/own_nets.py")])
def test_nets_of_one_s_own_go_from_features_to_a_cache_that_can_be_scored_again(
    quick: World, run: Run, monkeypatch: pytest.MonkeyPatch, hidden: str, where: str
) -> None:
    path = quick.root / where.removesuffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".py").write_text(OWN_NETS.replace("ARCH", repr(f"{where}:small")))
    monkeypatch.syspath_prepend(quick.root)
    write_settings(quick, changed(city2scene={"epochs": 30, "mlp_hidden_dims": hidden}))
    result = run("train", "all", "--target", "b", "--arch", f"{where}:small", "--json")
    assert result.exit_code == 0, result.output
    checkpoints = {report["role"]: report["checkpoint"] for report in reports(result)}
    told = run("verify", "--recompute", "--all")
    assert told.exit_code == 1
    assert "pass it with --teacher" in " ".join(told.stdout.split())
    own = [f"{role}={where}:trained,ckpt={checkpoints[role]}" for role in ("city2scene", "scene")]
    again = run("verify", "--recompute", "--all", "--teacher", own[0], "--teacher", own[1])
    sys.modules.pop("own_nets", None)
    assert again.exit_code == 0, again.output


def test_settings_of_a_city_teacher_that_is_not_trained_do_not_matter(trained: World, run: Run) -> None:
    write_settings(trained, changed(city={"arch": "nonsense"}))
    assert run("train", "city2scene", "--target", "b", "--city-teacher-ckpt", CITY).exit_code == 0


@pytest.mark.parametrize("how", [("--quick-experiment", 0.9), ("--shuffle-labels",)], ids=str)
def test_a_quick_sweep_or_one_on_shuffled_labels_publishes_nothing(
    trained: World, run: Run, how: tuple[object, ...]
) -> None:
    before = (trained.root / HEAD).read_bytes()
    result = run("train", "city2scene", "--target", "b", "--epochs", 2, "--sweep", "lr=0.1/0.2", *how)
    assert result.exit_code == 0, result.output
    assert ("publishes nothing" in result.stderr) == ("--quick-experiment" in how)
    assert (trained.root / HEAD).read_bytes() == before


def test_city2scene_takes_a_city_teacher_that_is_given(trained: World, run: Run) -> None:
    given = trained.root / "elsewhere.safetensors"
    (trained.root / CITY).rename(given)
    shutil.rmtree(trained.root / "outputs/pretrained")
    found = reports(run("train", "city2scene", "--target", "b", "--city-teacher-ckpt", given, "--json"))
    assert [one["role"] for one in found] == ["city2scene"]
    assert not (trained.root / CITY).exists()


def test_options_and_environment_of_city2scene_are_the_head_s(
    trained: World, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--lr", 0.2, "--mlp-hidden-dims", "7,5", "--batch-size", 8, "--patience", 3, "--ema", 0.5)
    monkeypatch.setenv("KD_CACHE_EPOCHS", "6")
    city, own = reports(run("train", "city2scene", "--target", "b", "--json", *options, "--weight-decay", 0.1))
    assert (city["role"], city["how"]) == ("city", "cached")
    kept = config(own)
    for name, value in {"mlp_hidden_dims": [7, 5], "batch_size": 8, "patience": 3, "ema": 0.5}.items():
        assert kept["settings"][name] == value
    assert [(stage["epochs"], stage["lr"]) for stage in kept["stages"]] == [(6, 0.2)]
    shapes = {tuple(p.shape) for n, p in load_teacher(HEAD).named_parameters() if "scene_head" in n and p.dim() == 2}
    assert shapes == {(7, 8), (5, 7), (3, 5)}


def test_what_both_teachers_have_in_common_counts_for_both(trained: World, run: Run) -> None:
    city, own = reports(
        run("train", "city2scene", "--target", "b", "--fold", 1, "--seed", 7, "--shuffle-labels", "--json")
    )
    assert city["how"] == "trained"
    for report in (city, own):
        kept = config(report)["settings"]
        assert (kept["fold"], kept["seed"]) == (1, 7)
    assert (config(city)["stages"][0]["epochs"], config(own)["stages"][0]["epochs"]) == (8, 5)


# -- settings files ----------------------------------------------------------------------------------------------------

OWN_PATIENCE = {"city": 21, "scene": 22, "city2scene": 23}


def test_each_teacher_of_a_chain_has_its_section_and_the_command_line_is_every_teacher_s(
    quick: World, run: Run
) -> None:
    write_settings(quick, changed(**{role: {"patience": at} for role, at in OWN_PATIENCE.items()}, batch_size=17))
    control = ("train", "all", "--target", "b", "--json", "--epochs", 1, "--shuffle-labels")
    found = {one["role"]: config(one)["settings"] for one in reports(run(*control))}
    assert {role: kept["patience"] for role, kept in found.items()} == OWN_PATIENCE
    assert {kept["batch_size"] for kept in found.values()} == {16}
    assert [config(one)["settings"]["patience"] for one in reports(run(*control, "--patience", 30))] == [30] * 3


@pytest.mark.parametrize("command", ["all", "extract"])
def test_an_unknown_setting_in_a_section_is_an_error_with_a_suggestion(quick: World, run: Run, command: str) -> None:
    more = ("--checkpoint", "a") if command == "extract" else ()
    for section in ("train", "city", "city2scene", "scene"):
        write_settings(quick, changed(**{section: {"epohcs": 3}}))
        result = run("train", command, "--target", "b", *more)
        assert result.exit_code == 2
        assert "unknown setting epohcs; is it epochs?" in " ".join(result.stderr.split())


def test_what_is_no_section_or_no_stage_in_a_file_is_refused(trained: World, run: Run) -> None:
    sections: list[object] = ["epochs", 3, ["epochs"], True]
    stages: list[object] = [{"level": 2, "epochs": 6}, {"level": 2, "epochs": 6, "lr": [1]}, [[1]], 3]
    for settings in ({"city2scene": one} for one in sections):
        write_settings(trained, {**changed(), **settings})
        assert run("train", "city2scene", "--target", "b", "--city-teacher-ckpt", CITY).exit_code == 2
    for stage in stages:
        write_settings(trained, changed(city2scene={"stage": stage}))
        assert run("train", "city2scene", "--target", "b", "--city-teacher-ckpt", CITY).exit_code == 2


def test_sections_do_not_disturb_other_commands(trained: World, run: Run) -> None:
    write_settings(trained, changed(train={"seed": 5, "precision": "bf16", "cache_root": "other"}))
    result = run("dump", "--target", "b", "--json")
    assert result.exit_code == 0, result.output
    assert (trained.cache / "cache_index.json").is_file()
    assert run("verify", "--all").exit_code == 0
    entries = json.loads(run("info", "--json").stdout)["caches"][0]["teachers"]
    assert {entry["parts"]["precision"] for entry in entries.values()} == {"fp32"}


def test_hidden_widths_in_a_file(trained: World, run: Run) -> None:
    written: list[tuple[object, list[int]]] = [([7, 5], [7, 5]), (6, [6]), ("none", []), ([], [])]
    for text, widths in written:
        write_settings(trained, changed(city2scene={"mlp_hidden_dims": text, "epochs": 6}))
        report = head(run, "--city-teacher-ckpt", CITY)
        assert config(report)["settings"]["mlp_hidden_dims"] == widths
        layers = [n for n, p in load_teacher(HEAD).named_parameters() if "scene_head" in n and p.dim() == 2]
        assert len(layers) == len(widths) + 1


ONE, TWO = "level=2,epochs=6,lr=0.1", "level=2,epochs=1,lr=0.01,schedule=constant"


def test_stages_are_texts_or_settings_one_or_several(trained: World, run: Run) -> None:
    one: dict[str, Any] = {"level": 2, "epochs": 6, "lr": 0.1}
    two = {"level": 2, "epochs": 1, "lr": 0.01, "schedule": "constant"}
    expected = [(6, 0.1, "cosine"), (1, 0.01, "constant")]
    written: list[object] = [[ONE, TWO], [one, two], [ONE, two], ONE, one]
    for text in [*written, None]:
        write_settings(trained, changed(city2scene={} if text is None else {"stage": text}))
        options = ("--stage", ONE, "--stage", TWO) if text is None else ()
        stages = config(head(run, "--city-teacher-ckpt", CITY, *options))["stages"]
        found = [(stage["epochs"], stage["lr"], stage["schedule"]) for stage in stages]
        assert found == (expected if text is None or isinstance(text, list) else expected[:1])


@pytest.mark.parametrize("command", ["all", "city2scene"])
@pytest.mark.parametrize("file", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: str(path.stem))
def test_the_configurations_that_come_with_it_are_accepted(run: Run, command: str, file: Path) -> None:
    result = run("train", command, "--target", "b", "--config", file, "--json-path", "missing.json")
    assert result.exit_code == 2
    assert "missing.json" in result.stderr
    assert str(file) not in result.stderr


# -- embeddings --------------------------------------------------------------------------------------------------------


def test_extract_keeps_every_permitted_sample_and_a_rerun_scores_nothing(trained: World, run: Run) -> None:
    first = json.loads(extract(run, f"city={CITY}", more=("--json",)).stdout)
    assert (first["samples_scored"], first["embeddings"]) == (len(trained.permitted()), ["city"])
    assert first["published"]["accuracy"] == {"city": {"correct": 0, "rows": 0}}  # embeddings have none
    again = json.loads(extract(run, f"city={CITY}", more=("--json",)).stdout)
    assert again["samples_scored"] == 0
    cache = LogitCache.open(trained.root / "outputs/embeddings/A2b", ["city"], value_kind="embedding")
    rows = cache.batch(cache.rows(trained.permitted()), torch.float32)[:, 0]
    net = load_teacher(trained.root / CITY).backbone
    with torch.no_grad():
        clips = torch.stack([torch.from_numpy(np.load(trained.feature(file))) for file in trained.permitted()])
        torch.testing.assert_close(rows, net.embed(clips), rtol=1e-4, atol=1e-4)


def test_a_source_without_a_name_is_called_after_its_weights_and_others_stay(trained: World, run: Run) -> None:
    result = extract(run, str(CITY), str(SCENE), more=("--json",))
    names = json.loads(result.stdout)["embeddings"]
    assert len(set(names)) == 2
    assert all(name.startswith("cp_resnet-") for name in names)
    assert extract(run, f"two={SCENE}").exit_code == 0
    report = head(run, "--embeddings", names[0], "--embeddings", "two", "--sweep", "epochs=4/6", "--pth")
    assert (trained.root / HEAD).read_bytes() == (Path(report["run"]) / "best.safetensors").read_bytes()
    assert (trained.root / HEAD.with_suffix(".pth")).is_file()


def test_a_head_on_extracted_embeddings_is_the_head_on_the_backbone(extracted: World, run: Run) -> None:
    plain = head(run, "--city-teacher-ckpt", CITY)["results"]["validation"]
    stored = head(run, "--embeddings", "city")["results"]["validation"]
    for name in ("accuracy", "macro_accuracy", "log_loss", "ece"):
        assert stored[name] == pytest.approx(plain[name], abs=1e-4)
    assert stored["confusion"] == plain["confusion"]


def test_a_head_on_several_sources_is_a_teacher_that_dumps(extracted: World, run: Run) -> None:
    report = head(run, "--embeddings", "city", "--embeddings", "scene")
    assert report["results"]["validation"]["samples"] == 12
    result = run("dump", "--target", "b", "--city2scene-teacher-ckpt", HEAD, "--only", "city2scene", "--json")
    assert result.exit_code == 0, result.output
    assert run("verify", "--all", "--recompute").exit_code == 0
    teacher = load_teacher(extracted.root / HEAD)
    parts = [load_teacher(extracted.root / path).backbone for path in (CITY, SCENE)]
    weight, bias = (load_file(extracted.root / HEAD)[n] for n in sorted(load_file(extracted.root / HEAD))[-2:][::-1])
    clip = torch.from_numpy(np.load(extracted.feature(extracted.permitted()[0])))[None]
    with torch.no_grad():
        expected = torch.cat([net.embed(clip) for net in parts], dim=1) @ weight.T + bias
        torch.testing.assert_close(teacher(clip), expected, rtol=1e-4, atol=1e-4)


def test_the_order_of_sources_is_another_key(extracted: World, run: Run) -> None:
    chosen = (("city", "scene"), ("scene", "city"), ("city",))
    keys = {
        head(run, "--epochs", 1, "--shuffle-labels", *(text for name in names for text in ("--embeddings", name)))[
            "results"
        ]["key"]
        for names in chosen
    }
    assert len(keys) == len(chosen)


def test_sources_that_are_not_there_or_named_twice_are_refused(extracted: World, run: Run) -> None:
    for names, told in ((("city", "city"), "named twice"), (("town",), "there: city, scene")):
        result = run("train", "city2scene", "--target", "b", *(x for name in names for x in ("--embeddings", name)))
        assert result.exit_code == 2
        assert told in result.stderr
    shutil.rmtree(extracted.root / "outputs/embeddings")
    assert "there: none" in run("train", "city2scene", "--target", "b", "--embeddings", "city").stderr


def test_what_changed_or_came_after_the_extraction_is_an_error_until_it_is_extracted(
    extracted: World, run: Run
) -> None:
    def refused(code: int, file: str) -> None:
        result = run("train", "city2scene", "--target", "b", "--embeddings", "city")
        assert result.exit_code == code
        assert file in result.stderr

    file = extracted.permitted()[0]
    extracted.write_feature(file, np.load(extracted.feature(file)) + 1)
    refused(5, file)
    new = add_clip(extracted, 0, 0, 5, "A", "train")
    extracted.write()
    refused(3, new)
    again = extract(run, f"city={CITY}", f"scene={SCENE}", more=("--json",))
    assert json.loads(again.stdout)["samples_scored"] == 2
    assert run("train", "city2scene", "--target", "b", "--embeddings", "city").exit_code == 0


def test_a_checkpoint_that_changed_after_the_extraction_is_an_error(extracted: World, run: Run) -> None:
    shutil.copy(extracted.root / SCENE, extracted.root / CITY)
    result = run("train", "city2scene", "--target", "b", "--embeddings", "city")
    assert result.exit_code == 5
    assert str(CITY) in result.stderr
    (extracted.root / CITY).unlink()
    result = run("train", "city2scene", "--target", "b", "--embeddings", "city")
    assert result.exit_code == 1
    assert "extract again" in result.stderr


def test_names_that_cannot_be_or_are_taken_are_refused(trained: World, run: Run) -> None:
    for name in ("", "a/b", "..", "packs", "a b", "-a"):
        assert extract(run, f"{name}={CITY}").exit_code == 2
    result = extract(run, f"city={CITY}", f"city={SCENE}")
    assert result.exit_code == 2
    assert "two sources are called city" in result.stderr
    assert extract(run, str(CITY), str(CITY)).exit_code == 2


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_a_sweep_shows_each_combination_and_publishes_the_best_by_validation(trained: World, run: Run) -> None:
    (trained.root / HEAD).unlink()
    shutil.rmtree(trained.root / HEAD.parent / "runs")
    result = run("train", "city2scene", "--target", "b", "--sweep", "lr=0.003/0.1,weight-decay=0.01/0.5")
    assert result.exit_code == 0, result.output
    table = result.stdout.partition("Sweep")[2].partition("Accuracy on")[0]
    rows = [line.split("│")[:2] for line in table.splitlines() if "│" in line]
    assert [tuple(float(cell) for cell in row) for row in rows] == [
        (lr, decay) for lr in (0.003, 0.1) for decay in (0.01, 0.5)
    ]
    made = runs(trained.root / HEAD)
    assert len(made) == 4
    found = [json.loads((path / "results.json").read_text())["validation"] for path in made]
    best = max(range(4), key=lambda n: (found[n]["accuracy"], -found[n]["log_loss"]))
    assert (trained.root / HEAD).read_bytes() == (made[best] / "best.safetensors").read_bytes()


def test_a_sweep_runs_the_backbone_once(trained: World, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []

    def counted(self: CPResNet, x: torch.Tensor) -> torch.Tensor:
        scored.append(len(x))
        return embed(self, x)

    embed = CPResNet.embed
    monkeypatch.setattr(CPResNet, "embed", counted)
    assert run("train", "city2scene", "--target", "b", "--epochs", 2, "--sweep", "lr=0.1/0.2/0.3").exit_code == 0
    of_a = [row for row in trained.rows if row["device_id"] == "A" and row["split"] == "train"]
    validation = sum(scored) - len(of_a) - sum(row["split"] == "test" for row in trained.rows)
    assert 0 < validation < len(of_a) / 2  # once to choose by, once to tell of the weights as they are stored


def test_dropout_of_a_linear_head_is_told_to_be_none(trained: World, run: Run) -> None:
    sweep = ("train", "city2scene", "--target", "b", "--epochs", 2, "--sweep", "dropout=0/0.3")
    assert "no dropout" in run(*sweep).stderr
    assert "no dropout" not in run(*sweep, "--mlp-hidden-dims", 5).stderr


def test_a_combination_that_fails_does_not_stop_the_others(trained: World, run: Run) -> None:
    wild = ("--epochs", 12, "--optimizer", "sgd", "--momentum", 0.99, "--warmup-epochs", 0)
    result = run("train", "city2scene", "--target", "b", "--sweep", "lr=10/0.01", *wild)
    assert result.exit_code == 0, result.output
    rows = [line.split("│") for line in result.stdout.partition("Sweep")[2].splitlines() if "│" in line][:2]
    assert [(float(row[0]), "failed" in row[1]) for row in rows] == [(10, True), (0.01, False)]
    assert "diverged" in result.stderr


def test_a_sweep_of_which_nothing_learns_is_an_error_and_publishes_nothing(
    trained: World, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_cache.train.training.random_loss", lambda *_: 0.01)
    before = (trained.root / HEAD).read_bytes()
    result = run("train", "city2scene", "--target", "b", "--epochs", 1, "--sweep", "lr=0.1/0.2")
    assert result.exit_code == 1
    assert "no combination" in result.stderr
    assert "nothing was learnt" in result.stderr
    assert (trained.root / HEAD).read_bytes() == before


NO_SWEEP = ["", "lr", "lr=", "lr=0.1/", "lr=0.1,lr=0.2", "nonsense=1", "lr=0", "lr=nan", "epochs=0", "batch-size=0",
            "dropout=2", "dropout=nan", "weight-decay=-1", "weight-decay=nan", "label-smoothing=5",
            "label-smoothing=-1", "seed=-1"]  # fmt: skip


def test_a_sweep_that_makes_no_sense_is_refused(trained: World, run: Run) -> None:
    before = (trained.root / HEAD).read_bytes()
    widths = ("--mlp-hidden-dims", "4", "--patience", 1)
    for text in NO_SWEEP:
        result = run("train", "city2scene", "--target", "b", "--city-teacher-ckpt", CITY, "--sweep", text, *widths)
        assert result.exit_code == 2, result.output
    result = run("train", "city2scene", "--target", "b", "--stage", ONE, "--sweep", "lr=0.1/0.2,weight-decay=0/1")
    assert result.exit_code == 2
    assert "lr of stages that are given one by one" in result.stderr
    assert (trained.root / HEAD).read_bytes() == before


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[int, tuple[object, ...], str]] = {
    "unknown target": (2, ("city", "--target", "z"), "z"),
    "no target": (2, ("city",), "--target"),
    "nothing held out": (2, ("city", "--target", "b", "--val-ratio", 0), "validation ratio"),
    "no share": (2, ("scene", "--quick-experiment", 0), "share"),
    "unknown architecture": (2, ("scene", "--arch", "nonsense"), "nonsense"),
    "architecture that is not there": (2, ("scene", "--arch", "no_module_of_this_name:net"), "no_module_of_this_name"),
    "hidden widths of a net that has none": (2, ("city", "--target", "b", "--mlp-hidden-dims", "8"), "hidden"),
    "hidden widths that are none": (2, ("city2scene", "--target", "b", "--mlp-hidden-dims", "8,x"), "widths"),
    "tf32 without a GPU": (2, ("city", "--target", "b", "--precision", "tf32", "--device", "cpu"), "tf32"),
    "weights that are not there": (1, ("scene", "--init", "missing.safetensors"), "missing.safetensors"),
    "no such city teacher": (
        1,
        ("city2scene", "--target", "b", "--city-teacher-ckpt", "missing.safetensors"),
        "missing.safetensors",
    ),
    "two things to stand on": (
        2,
        ("city2scene", "--target", "b", "--embeddings", "city", "--city-teacher-ckpt", CITY),
        "give one of them",
    ),
    "stage that is none": (2, ("scene", "--stage", "level=3,epochs=1,lr=1"), "level"),
    "dropout that is no number": (2, ("scene", "--dropout", "nan"), "dropout"),
    "output folder that is a file": (1, ("scene", "--output-dir", "dataset.json"), "dataset.json"),
    "manifest that is not there": (2, ("scene", "--json-path", "missing.json"), "missing.json"),
    "nothing to embed with": (2, ("extract", "--target", "b"), "--checkpoint"),
    "embedding with what is not there": (1, ("extract", "--target", "b", "--checkpoint", "a=missing.pth"), "missing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_has_its_exit_code_and_its_cause(
    quick: World, run: Run, own_net: Callable[[str], str], mistake: str
) -> None:
    code, args, cause = MISTAKES[mistake]
    if args[0] == "scene" and "--arch" not in args:
        args = (*args, "--arch", own_net(OWN))
    result = run("train", *args)
    assert result.exit_code == code, result.output
    assert cause in " ".join(result.stderr.split())
    assert "unexpected" not in result.stderr
    assert not (quick.root / SCENE).exists()
    assert not (quick.root / CITY).exists()


@pytest.mark.parametrize("command", ["city", "city2scene", "all"])
def test_a_location_that_nobody_knows_is_refused(quick: World, run: Run, command: str) -> None:
    row = quick.rows[0]
    quick.feature(row["file"]).rename(quick.feature("x/plain.npy"))
    row["file"] = "x/plain.npy"
    quick.write()
    result = run("train", command, "--target", "b")
    assert result.exit_code == 2
    assert "x/plain.npy" in result.stderr
    assert not (quick.root / "outputs").exists()


@pytest.mark.parametrize("command", ["city", "city2scene", "scene", "all", "extract"])
def test_a_manifest_that_leaks_is_refused(trained: World, run: Run, command: str) -> None:
    shutil.rmtree(trained.root / "outputs/pretrained")
    before = (trained.root / CITY).read_bytes()
    file = add_clip(trained, 0, 0, 9, "A", "train")
    trained.write()
    more = {"scene": (), "extract": ("--target", "b", "--checkpoint", f"a={CITY}")}.get(command, ("--target", "b"))
    result = run("train", command, *more)
    assert result.exit_code == 6
    assert file in result.stderr
    assert (trained.root / CITY).read_bytes() == before
    assert not (trained.root / "cache").exists()


def test_tensorboard_that_is_not_installed_is_said(
    quick: World, run: Run, monkeypatch: pytest.MonkeyPatch, own_net: Callable[[str], str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = run("train", "scene", "--arch", own_net(OWN), "--tensorboard")
    assert result.exit_code == 2
    assert "needs the package tensorboard" in result.stderr


def test_a_feature_that_is_not_there_is_named(quick: World, run: Run) -> None:
    file = quick.permitted()[0]
    quick.feature(file).unlink()
    result = run("train", "city", "--target", "b")
    assert result.exit_code == 1
    assert file in result.stderr
    assert not (quick.root / "outputs/teacher_city").exists()


# -- info --------------------------------------------------------------------------------------------------------------


def test_info_lists_cached_pretraining_by_what_it_depends_on(trained: World, run: Run) -> None:
    (entry,) = (trained.root / "outputs/pretrained").iterdir()
    for place in ("outputs", "outputs/pretrained"):
        shown = run("info", place)
        assert shown.exit_code == 0
        for fact in (entry.name, "arch=cp_resnet", "feature_dim=8", "target=b", "seed=42", "fold=0", "val_ratio=0.3"):
            assert fact in shown.stdout
        (told,) = json.loads(run("info", place, "--json").stdout)["pretrained"]
        assert Path(told["path"]).name == entry.name
        assert told["damage"] is None
        assert told["parts"]["stages"][0]["lr"] == 0.02
        assert told["parts"]["selection"]["target"] == "b"
        assert 0 <= told["validation_accuracy"] <= 1


@pytest.mark.parametrize("what", ["weights.safetensors", "entry.json"])
def test_info_says_that_cached_pretraining_is_damaged(trained: World, run: Run, what: str) -> None:
    (entry,) = (trained.root / "outputs/pretrained").iterdir()
    content = bytearray((entry / what).read_bytes())
    content[len(content) // 2 if what.startswith("w") else 0] ^= 1
    (entry / what).write_bytes(content)
    result = run("info", "outputs")
    assert result.exit_code == 0
    assert "damaged" in result.stdout
    assert "trained again" in result.stdout
    assert json.loads(run("info", "outputs", "--json").stdout)["pretrained"][0]["damage"]


def test_info_lists_trained_teachers_and_how_good_they_are(trained: World, run: Run) -> None:
    found = json.loads(run("info", "outputs", "--json").stdout)["trained"]
    assert [(one["role"], one["place"]) for one in found] == [
        ("city", "A2b"),
        ("city2scene", "A2b"),
        ("scene", "global"),
    ]
    for one in found:
        results = json.loads((Path(one["run"]) / "results.json").read_text())
        assert one["accuracy"]["validation"] == results["validation"]["accuracy"]
        assert one["trained_on"] + one["validated_on"] <= len(trained.permitted())
    (trained.root / HEAD).write_bytes(b"no checkpoint")
    told = run("info", "outputs/teacher_city2scene/A2b")
    assert told.exit_code == 0
    assert "damaged" in told.stdout
    assert run("info", HEAD).exit_code == 2
    assert "nosuchuser" in run("info", "~nosuchuser/x").stderr


@pytest.mark.parametrize("content", ["[" * 100_000, '{"key": 1}', "no JSON", "pipe"])
def test_info_goes_on_where_a_run_s_results_make_no_sense(trained: World, run: Run, content: str) -> None:
    for path in (trained.root / "outputs").glob("teacher_*/*/runs/*/results.json"):
        path.unlink()
        os.mkfifo(path) if content == "pipe" else path.write_text(content)
    found = json.loads(run("info", "outputs", "--json").stdout)["trained"]
    assert [one["accuracy"] for one in found] == [None] * 3


def test_info_tells_of_caches_and_pretraining_together(trained: World, run: Run) -> None:
    assert run("dump", "--target", "b", "--quiet").exit_code == 0
    content = json.loads(run("info", "--json").stdout)
    assert [cache["path"] for cache in content["caches"]] == ["cache/A2b"]
    assert len(content["pretrained"]) == 1
    shown = run("info").stdout
    assert "54 samples complete" in shown
    assert "cached pre-training of a city teacher" in shown


def test_info_finds_a_cache_that_was_trained_and_embeddings(extracted: World, run: Run) -> None:
    shown = run("info", "outputs/embeddings/A2b").stdout
    assert "8 embedding" in shown
    assert "no classes" in shown


# -- what a teacher saw ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["trained", "validated"])
def test_a_teacher_that_saw_what_is_now_test_dumps_nothing(trained: World, run: Run, side: str) -> None:
    provenance = load_teacher(trained.root / HEAD).provenance
    assert provenance is not None
    keys = {key.tobytes() for key in getattr(provenance, side)}
    seen = [row for row in trained.rows if keys_of([row["file"]])[0].tobytes() in keys and row["device_id"] == "A"]
    place = seen[0]["file"].rsplit("-", 2)[0]
    moved = [row for row in trained.rows if row["file"].rsplit("-", 2)[0] == place]
    for row in moved:
        row["split"] = "test"
    trained.write()
    result = run("dump", "--target", "b", "--only", "city2scene")
    assert result.exit_code == 6
    assert any(row["file"] in result.stderr for row in moved)
    assert not list((trained.root / "cache").rglob("*.h5"))
