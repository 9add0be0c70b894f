"""A student's loader: permitted samples alone, the labels it may see, and each sample's own logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World
from store_fixtures import forks
from tiny_teachers import Linear
from torch.utils.data import DataLoader, SequentialSampler

from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.manifest import load_manifest
from kd_cache.errors import (
    DataLeakageError,
    FeatureError,
    MissingLogitsError,
    StaleError,
    UsageError,
)
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.serve.student_loader import IGNORED, FeatureDataset, student_loader

KEYS = {
    "features", "num_frames", "scene_label", "city_label", "domain", "device_id", "path", "teacher_logits",
    "source_mask", "target_mask",
}  # fmt: skip


def dumped(root: Path, dtype: str = "fp32") -> World:
    """The world of `conftest` with two teachers dumped for target b: 12 samples of A, 8 of b, three lengths."""
    made = World(root)
    for number in range(12):
        made.add(number, "A", "train", frames=(12, 12, 16)[number % 3])
    for number in range(12, 20):
        made.add(number, "b", "train", frames=(12, 24)[number % 2])
    for number, device, split in (
        (20, "c", "train"),
        (21, "A", "val"),
        (22, "A", "test"),
        (23, "b", "test"),
        (24, "s4", "test"),
    ):
        made.add(number, device, split)
    made.write()
    job = DumpJob(
        root / "cache",
        made.data(),
        {"tiny": Linear(1), "other": Linear(2)},
        torch.device("cpu"),
        dtype=dtype,
        workers=0,
    )
    dump_logits(job)
    return made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Dumped once; tests that change something take `own`."""
    return dumped(tmp_path_factory.mktemp("student"))


@pytest.fixture
def own(shared: World, tmp_path: Path) -> World:
    shutil.copytree(shared.root, tmp_path / "own")
    return World(tmp_path / "own", json.loads(json.dumps(shared.rows)))


def loader_of(world: World, batch_size: int = 6, **options: Any) -> DataLoader[dict[str, Any]]:
    return student_loader(world.json_path, world.root, world.cache, batch_size, **options)


def row_of(world: World, file: str) -> dict[str, Any]:
    return next(row for row in world.rows if row["file"] == file)


def check(world: World, batch: dict[str, Any], teachers: Sequence[str] = ("tiny", "other")) -> list[str]:
    """Compare a batch with the manifest, the feature files and the view, sample by sample; gives its files."""
    files: list[str] = batch["path"]
    size, longest = len(files), max(len(np.load(world.feature(file))) for file in files)
    assert batch.keys() == KEYS
    assert batch["features"].shape == (size, longest, 20)
    assert batch["teacher_logits"].shape == (size, len(teachers), 10)
    for name in ("scene_label", "city_label", "domain", "num_frames"):
        assert (batch[name].dtype, batch[name].shape) == (torch.int64, (size,)), name
    for name in ("source_mask", "target_mask"):
        assert (batch[name].dtype, batch[name].shape) == (torch.bool, (size,)), name
    for at, file in enumerate(files):
        row, feature = row_of(world, file), np.load(world.feature(file))
        assert (row["split"], batch["device_id"][at]) == ("train", row["device_id"])
        is_source = row["device_id"] == "A"
        seen = {name: batch[name][at].item() for name in ("scene_label", "city_label", "domain", "num_frames")}
        assert seen == {
            "scene_label": row["scene_label"] if is_source else -100,
            "city_label": row["city_label"],
            "domain": row["domain"],
            "num_frames": len(feature),
        }
        assert (batch["source_mask"][at].item(), batch["target_mask"][at].item()) == (is_source, not is_source)
        np.testing.assert_array_equal(batch["features"][at, : len(feature)].numpy(), feature)
        assert not batch["features"][at, len(feature) :].any()
        for column, teacher in enumerate(teachers):
            np.testing.assert_array_equal(
                batch["teacher_logits"][at, column].numpy(), np.load(world.view(teacher, file))
            )
    return files


# -- what it yields ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 6, 64])
def test_a_batch_is_what_manifest_features_and_view_say(shared: World, batch_size: int) -> None:
    seen = [file for batch in loader_of(shared, batch_size) for file in check(shared, batch)]
    assert sorted(seen) == sorted(shared.permitted())


@forks
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_two_epochs_with_two_workers_give_every_path_its_logits(shared: World, start: str) -> None:
    loader = loader_of(shared, num_workers=2, multiprocessing_context=start, persistent_workers=True)
    orders = []
    for _ in range(2):
        seen = [file for batch in loader for file in check(shared, batch)]
        assert sorted(seen) == sorted(shared.permitted())
        orders.append(seen)
    assert orders[0] != orders[1]  # shuffled anew


def test_order_options_and_generators_of_the_loader_are_torchs(shared: World) -> None:
    in_order = [file for batch in loader_of(shared, shuffle=False) for file in batch["path"]]
    assert in_order == shared.permitted()
    seeded = [
        [file for batch in loader_of(shared, generator=torch.Generator().manual_seed(5)) for file in batch["path"]]
        for _ in range(2)
    ]
    assert seeded[0] == seeded[1] != in_order
    assert [len(batch["path"]) for batch in loader_of(shared, drop_last=True)] == [6, 6, 6]
    sampled = loader_of(shared, shuffle=False, sampler=SequentialSampler(range(4)))
    assert [file for batch in sampled for file in batch["path"]] == shared.permitted()[:4]


def test_an_opened_cache_decides_which_teachers_and_in_which_order(shared: World) -> None:
    for teachers in (["other"], ["other", "tiny"]):
        cache = LogitCache.open(shared.cache, teachers)
        for batch in student_loader(load_manifest(shared.json_path), str(shared.root), cache, 8):
            check(shared, batch, teachers)


def test_logits_come_in_the_dtype_asked_for(tmp_path: Path) -> None:
    world = dumped(tmp_path, dtype="fp16")
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32)):
        for batch in loader_of(world, dtype=dtype):
            assert batch["teacher_logits"].dtype == expected
            check(world, batch)


def crop(features: torch.Tensor) -> torch.Tensor:
    return features[2:10] * 2


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_changes_the_features_and_nothing_else(shared: World, workers: int) -> None:
    options = {"multiprocessing_context": "fork"} if workers else {}
    plain = list(loader_of(shared, shuffle=False))
    cropped = list(loader_of(shared, shuffle=False, transform=crop, num_workers=workers, **options))
    for before, after in zip(plain, cropped, strict=True):
        torch.testing.assert_close(after["features"], before["features"][:, 2:10] * 2)
        assert after["num_frames"].tolist() == [8] * len(after["path"])
        assert after["path"] == before["path"]
        for name in ("teacher_logits", "scene_label", "city_label"):
            assert torch.equal(after[name], before[name])


def test_half_precision_features_are_trained_on_as_float32(own: World) -> None:
    file = own.permitted()[0]
    own.write_feature(file, np.load(own.feature(file)).astype(np.float16))
    (batch,) = loader_of(own, files=[file], check_features=False)
    assert batch["features"].dtype == torch.float32
    np.testing.assert_array_equal(batch["features"][0].numpy(), np.load(own.feature(file)).astype(np.float32))


def test_chosen_files_come_alone_and_as_often_as_they_are_named(shared: World) -> None:
    chosen = [shared.permitted()[number] for number in (15, 3, 3, 0)]
    batches = list(loader_of(shared, 3, files=chosen, shuffle=False))
    assert [file for batch in batches for file in check(shared, batch)] == chosen


def test_a_missing_city_label_is_ignored_and_a_missing_scene_label_of_the_target_too(own: World) -> None:
    for row in own.rows:
        row.pop("city_label")
        if row["device_id"] == "b":
            row.pop("scene_label")
    own.write()
    for batch in loader_of(own):
        assert (batch["city_label"] == IGNORED).all()
        assert (batch["scene_label"][batch["target_mask"]] == IGNORED).all()


# -- what it refuses, before the first batch --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [20, 21, 22, 23, 24])
def test_files_outside_the_permitted_selection_are_refused_at_construction(shared: World, number: int) -> None:
    """Another target's train sample, one of val, test rows of both devices, an unseen device."""
    outside = shared.rows[number]["file"]
    with pytest.raises(DataLeakageError, match=outside):
        loader_of(shared, files=[*shared.permitted()[:3], outside])


def test_a_shared_location_is_refused_unless_it_is_allowed(own: World) -> None:
    for row in (own.rows[0], own.rows[22]):
        row["location"] = "lisbon-1"
    own.write()
    with pytest.raises(DataLeakageError, match="lisbon-1"):
        loader_of(own)
    seen = [file for batch in loader_of(own, allow_shared_locations=True) for file in batch["path"]]
    assert sorted(seen) == sorted(own.permitted())


def test_the_cache_of_another_target_is_refused(shared: World) -> None:
    with pytest.raises(UsageError, match=r"for A → b, not for target c"):
        loader_of(shared, target="c")
    for batch in loader_of(shared, target="b"):
        check(shared, batch)


def test_a_renamed_cache_still_knows_its_target(own: World) -> None:
    renamed = own.cache.rename(own.root / "A2c")
    (batch,) = student_loader(own.json_path, own.root, renamed, 64)
    assert sorted(batch["path"]) == sorted(own.permitted())
    with pytest.raises(UsageError, match="for A → b, not for target c"):
        student_loader(own.json_path, own.root, renamed, 6, target="c")


def test_a_cache_of_the_older_script_must_be_told_its_target_where_its_folder_does_not_say(own: World) -> None:
    index = json.loads((own.cache / "cache_index.json").read_text())
    del index["kd_cache"]
    (own.cache / "cache_index.json").write_text(json.dumps(index))
    shutil.rmtree(own.cache / "packs")
    renamed = own.cache.rename(own.root / "mine")
    with pytest.warns(UserWarning, match="older script"):
        cache = LogitCache.open(renamed)
    with pytest.raises(UsageError, match=r"does not say its target; pass target="):
        student_loader(own.json_path, own.root, cache, 6)
    with pytest.raises(UsageError, match="target is 's4'"):
        student_loader(own.json_path, own.root, cache, 6, target="s4")
    with pytest.raises(MissingLogitsError, match="1 of 13 files"):
        student_loader(own.json_path, own.root, cache, 6, target="c")
    renamed.rename(own.cache)
    for batch in student_loader(own.json_path, own.root, cache, 6, target="b"):
        check(own, batch)


def test_a_sample_without_logits_is_missed_at_construction(own: World) -> None:
    new = own.add(30, "b", "train")
    own.write()
    with pytest.raises(MissingLogitsError, match=rf"1 of 21 files.*\n.*{new}: not in the cache"):
        loader_of(own)
    assert len(list(loader_of(own, 64, files=own.permitted()[:-1]))) == 1


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_a_feature_that_is_gone_names_itself(own: World, workers: int) -> None:
    gone = own.permitted()[3]
    own.feature(gone).unlink()
    options = {"num_workers": 1, "multiprocessing_context": "fork"} if workers else {}
    with pytest.raises(FeatureError, match=f"{gone}.* does not exist"):
        list(loader_of(own, **options))


def test_features_outside_the_root_are_read_only_where_that_is_allowed(own: World, tmp_path: Path) -> None:
    file = own.permitted()[3]
    (tmp_path / "elsewhere").mkdir()
    moved = own.feature(file).rename(tmp_path / "elsewhere" / "feature.npy")
    own.feature(file).symlink_to(moved)
    with pytest.raises(FeatureError, match="outside the data root"):
        list(loader_of(own))
    for batch in loader_of(own, allow_outside=[tmp_path / "elsewhere"]):
        check(own, batch)


def test_a_feature_that_changed_since_the_dump_is_refused_unless_the_front_end_differs_on_purpose(own: World) -> None:
    changed = own.permitted()[0]
    own.write_feature(changed, np.ones((12, 20), np.float32))
    loader = student_loader(own.json_path, own.root, own.cache, 64)
    with pytest.raises(StaleError, match=changed):
        list(loader)
    (batch,) = student_loader(own.json_path, own.root, own.cache, 64, check_features=False)
    assert changed in batch["path"]


@pytest.mark.parametrize("changed", [0, 1])
def test_a_feature_must_be_the_one_that_each_teacher_scored(shared: World, changed: int) -> None:
    sample = shared.data().selection.samples[0]
    source = FeatureSource(shared.root)
    digests = np.stack([np.frombuffer(source.read(sample.file).digest, np.uint8)] * 2)[None]
    present = np.array([True])
    assert FeatureDataset(source, [sample], scored=(digests, present))[0][1] == sample
    digests = digests.copy()
    digests[0, changed, 0] ^= 1
    with pytest.raises(StaleError, match="is not the one that the teachers scored"):
        FeatureDataset(source, [sample], scored=(digests, present))[0]
