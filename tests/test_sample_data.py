"""The embedded sample: the generator's bytes, the structure of TAU, and teachers that know its scenes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file
from torch import nn

from kd_cache.dataset import sample_data
from kd_cache.dataset.manifest import Sample, load_manifest
from kd_cache.dataset.sample_data import (
    FRAMES,
    MELS,
    VERSION,
    Clip,
    features,
    further_clips,
    sample_clips,
    write_sample,
)
from kd_cache.dataset.task import DCASE
from kd_cache.errors import StoreError, UsageError
from teachers import CNN14, load_teacher

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
CHECKPOINTS = [f"teacher_city2scene/A2{target}" for target in DCASE.targets] + ["teacher_scene/global"]


@pytest.fixture(scope="module")
def samples() -> tuple[Sample, ...]:
    return load_manifest(SAMPLE / "dataset.json").samples


def _files(root: Path) -> dict[str, bytes]:
    paths = [root / "dataset.json", *sorted((root / "features").iterdir())]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def test_regenerating_gives_byte_equal_files_to_those_committed_in_data_sample(tmp_path: Path) -> None:
    write_sample(tmp_path / "again")
    made, committed = _files(tmp_path / "again"), _files(SAMPLE)
    assert sorted(made) == sorted(committed)
    assert [name for name in made if made[name] != committed[name]] == []


def test_the_random_stream_of_a_name_stays_the_same() -> None:
    # A changed stream changes every feature, and with them every committed checkpoint and figure.
    clip = Clip("park", "vienna", 7, 1, "s2", "train")
    digest = hashlib.sha256(features(clip).tobytes()).hexdigest()
    assert digest == "b9104dd222a36417609e86d041962bc562cc7fadd67265039b10f741fdc8216b"


def test_features_are_z_scored_float16_each_listed_once_and_long_enough_for_cnn14(samples: tuple[Sample, ...]) -> None:
    assert sorted(sample.file for sample in samples) == sorted(
        f"features/{p.name}" for p in (SAMPLE / "features").iterdir()
    )
    for sample in samples[::17]:
        array = np.load(SAMPLE / sample.file)
        assert (array.dtype, array.shape) == (np.float16, (FRAMES, MELS))
        assert abs(float(array.mean(dtype=np.float64))) < 0.01
        assert float(array.std(dtype=np.float64)) == pytest.approx(1, abs=0.01)
    net = CNN14(10, channels=(2,) * 6, embedding=4, hidden=(4, 4)).eval()
    with torch.no_grad():
        logits = net(torch.from_numpy(array.astype(np.float32))[None])
    assert logits.shape == (1, 10)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("target", [None, "b"])
def test_a_location_number_names_one_place(target: str | None) -> None:
    cities: dict[int, set[tuple[str, str]]] = {}
    for clip in sample_clips(target):
        cities.setdefault(clip.location, set()).add((clip.city, clip.scene))
    assert all(len(found) == 1 for found in cities.values())


def test_every_other_device_has_its_twin_on_device_a_in_the_same_split() -> None:
    source = {(clip.moment, clip.split) for clip in sample_clips() if clip.device == DCASE.source}
    others = [clip for clip in sample_clips() if clip.device != DCASE.source]
    assert others
    assert all((clip.moment, clip.split) in source for clip in others)


def test_twins_sound_alike_but_not_the_same() -> None:
    # The same moment through another device: closer to its twin than to anything else of the scene.
    source, twin = (features(Clip("bus", "lyon", 0, 0, device, "train")).ravel() for device in ("A", "b"))
    stranger = features(Clip("bus", "lyon", 1, 0, "A", "train")).ravel()
    alike, unlike = (float(np.corrcoef(twin, other.astype(np.float64))[0, 1]) for other in (source, stranger))
    assert unlike + 0.2 < alike < 0.98


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_device_covers_all_scenes_and_the_ten_development_cities(samples: tuple[Sample, ...], split: str) -> None:
    development = set(range(len(DCASE.cities))) - {DCASE.cities.index("amsterdam"), DCASE.cities.index("madrid")}
    for device in (DCASE.source, *DCASE.targets):
        held = [s for s in samples if s.split == split and s.device_id == device]
        assert {s.scene_label for s in held} == set(range(len(DCASE.scenes)))
        assert {s.city_label for s in held} == development


def test_counts_are_those_of_the_readme(samples: tuple[Sample, ...]) -> None:
    counts = Counter((s.device_id, s.split) for s in samples)
    readme = (SAMPLE / "README.md").read_text(encoding="utf-8")
    for device in (DCASE.source, *DCASE.targets, *DCASE.unseen):
        assert f"| {device} | {counts[device, 'train']} | {counts[device, 'test']} |" in readme


def test_labels_are_those_of_the_file_name(samples: tuple[Sample, ...]) -> None:
    for sample in samples:
        scene, city, number, _, device = Path(sample.file).stem.split("-")
        assert (DCASE.scenes.index(scene), DCASE.cities.index(city)) == (sample.scene_label, sample.city_label)
        assert sample.location == f"{city}-{number}"
        assert device == sample.device_id.lower()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_committed_teacher_knows_more_than_half_the_scenes_of_unseen_locations(
    samples: tuple[Sample, ...], checkpoint: str
) -> None:
    role = "scene" if "scene/global" in checkpoint else "city2scene"
    teacher = load_teacher(SAMPLE / "teachers" / checkpoint / "best.safetensors", role=role)
    test = [s for s in samples if s.split == "test" and s.device_id == DCASE.source]
    assert _accuracy(teacher, test, [s.scene_label for s in test]) > 0.5


@pytest.mark.parametrize("target", DCASE.targets)
def test_the_city_model_in_it_knows_more_than_half_the_cities(samples: tuple[Sample, ...], target: str) -> None:
    teacher = load_teacher(SAMPLE / "teachers" / "teacher_city2scene" / f"A2{target}" / "best.safetensors")
    test = [s for s in samples if s.split == "test" and s.device_id == DCASE.source]
    assert _accuracy(teacher.backbone, test, [s.city_label for s in test]) >= 0.6


def _accuracy(model: nn.Module, test: list[Sample], labels: list[int | None]) -> float:
    x = torch.from_numpy(np.stack([np.load(SAMPLE / s.file).astype(np.float32) for s in test]))
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == torch.tensor(labels)).float().mean())


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_committed_teacher_was_trained_on_the_committed_manifest(checkpoint: str) -> None:
    raw = (SAMPLE / "teachers" / checkpoint / "best.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    record = json.loads(header["__metadata__"]["kd_cache"])
    digest = hashlib.sha256((SAMPLE / "dataset.json").read_bytes()).hexdigest()
    assert record["training"]["manifest_sha256"] == digest
    assert record["class_names"] == list(DCASE.scenes)


def _on_disk(path: Path) -> int:
    """The bytes that ``path`` takes on 4-KiB blocks; from its length, so that other file systems give the same."""
    return -(-path.stat().st_size // 4096) * 4096


def test_the_whole_sample_takes_at_most_8_megabytes_as_du_counts() -> None:
    assert sum(_on_disk(path) for path in (SAMPLE, *SAMPLE.rglob("*"))) <= 8_000_000


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_weights_are_committed_as_float16_and_loaded_as_float32(checkpoint: str) -> None:
    path = SAMPLE / "teachers" / checkpoint / "best.safetensors"
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16, torch.int64}  # int64: batch counts
    assert {weight.dtype for weight in load_teacher(path).parameters()} == {torch.float32}


def test_the_large_sample_has_more_of_its_target_and_of_test_all_at_new_locations() -> None:
    small, large = sample_clips(), sample_clips("s1")
    assert set(small) < set(large)
    more = set(large) - set(small)
    old, new = ({(clip.city, clip.location) for clip in clips} for clips in (small, more))
    assert not old & new
    train, test = ([clip for clip in more if clip.split == split] for split in ("train", "test"))
    assert (len(train), {clip.device for clip in train}, {clip.is_labelled for clip in train}) == (300, {"s1"}, {False})
    assert Counter(clip.device for clip in test) == dict.fromkeys(DCASE.devices, 200)
    assert not {clip.location for clip in train} & {clip.location for clip in test}
    with pytest.raises(ValueError, match="round 2"):
        next(further_clips("b", range(2, 4), "test"))


def test_the_manifest_names_the_generator_and_no_label_of_an_unlabelled_clip(tmp_path: Path) -> None:
    clips = [sample_clips()[0], next(further_clips("b", range(3, 4), "train"))._replace(is_labelled=False)]
    (tmp_path / "dataset.json").write_bytes(sample_data.manifest_bytes(clips))
    made = load_manifest(tmp_path / "dataset.json")
    assert [sample.scene_label for sample in made] == [0, None]
    assert [sample.city_label for sample in made] == [DCASE.cities.index("barcelona")] * 2
    committed = load_manifest(SAMPLE / "dataset.json")
    assert committed.front_end == made.front_end == {"name": "kd-cache sample", "version": VERSION, "n_mels": MELS}


@pytest.mark.parametrize("options", [("--size", "large"), ("--target", "b")])
def test_a_large_sample_is_one_of_a_target(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    result = run("sample-data", tmp_path / "out", *options)
    assert (result.exit_code, "--target" in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_data, "sample_clips", lambda target: sample_clips(target)[:2])


@pytest.mark.usefixtures("two_clips")
def test_writing_over_itself_leaves_the_same_files_and_no_others(tmp_path: Path) -> None:
    write_sample(tmp_path)
    before = _files(tmp_path)
    write_sample(tmp_path)
    assert _files(tmp_path) == before
    assert len(before) == 3


@pytest.mark.usefixtures("two_clips")
@pytest.mark.parametrize("name", ["notes.txt", "dataset.json", "features/mine.npy"])
def test_a_directory_with_other_files_is_refused_untouched(tmp_path: Path, name: str) -> None:
    foreign = tmp_path / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("mine")
    with pytest.raises(UsageError, match=foreign.name):
        write_sample(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [foreign]
    assert foreign.read_text() == "mine"


def test_a_file_is_refused_as_the_directory(tmp_path: Path) -> None:
    (tmp_path / "sample").write_text("")
    with pytest.raises(UsageError, match="not a directory"):
        write_sample(tmp_path / "sample")


@pytest.mark.usefixtures("two_clips")
def test_a_failed_write_is_reported_and_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match="No space left"):
        write_sample(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
