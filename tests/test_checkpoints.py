"""Checkpoints: every layout that occurs loads whole. Hostile files, each with its error: hostile_checkpoints.py."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, World, kaiming
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_cache.errors import CheckpointError
from kd_cache.train.nets import warm_start
from kd_cache.train.settings import Settings
from kd_cache.train.state_dicts import CITY_ENTRY, HEAD_ENTRY
from teachers import CNN14, City2Scene, CPResNet, load_teacher, save_checkpoint

CHANNELS = (4, 4, 8, 8, 16, 16)


def cnn14(classes: int = 10, seed: int = 0) -> dict[str, Tensor]:
    net = CNN14(classes, CHANNELS, 16, (8, 8))
    kaiming(net, seed)
    return net.state_dict()


def cp_resnet(classes: int = 10, seed: int = 0) -> dict[str, Tensor]:
    net = CPResNet(classes, (4, 4, 8, 12))
    kaiming(net, seed)
    return net.state_dict()


def head(inputs: int, scenes: int = 10) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(7)
    return {"weight": torch.randn(scenes, inputs, generator=draw), "bias": torch.zeros(scenes)}


def city2scene(cities: int = 12, scenes: int = 10) -> dict[str, Any]:
    return {"epoch": 3, CITY_ENTRY: cnn14(cities), HEAD_ENTRY: head(16, scenes), "val_acc": 0.5}


def flattened(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    both = (CITY_ENTRY, HEAD_ENTRY)
    return {f"{entry}.{name}": tensor for entry in both for name, tensor in entries[entry].items()}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    def save(content: Any) -> Path:
        path = tmp_path / "t.pth"
        torch.save(content, path)
        return path

    return save


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "t.pth"
        path.write_bytes(content)
        return path

    return write


def refusal(path: Path, **options: Any) -> str:
    """The message of the CheckpointError that loading ``path`` must raise: it names the file and what to do."""
    with pytest.raises(CheckpointError) as caught:
        load_teacher(path, **options)
    assert caught.value.message.startswith(str(path))
    assert caught.value.hint
    return caught.value.message


def changed(tensors: Mapping[str, Tensor], name: str, by: float = 1.0) -> dict[str, Tensor]:
    return {**tensors, name: tensors[name] + by}


# Writing


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_saving_twice_gives_the_same_bytes_and_leaves_no_temporary_file(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in ("a", "b")]
    for path in paths:
        save_checkpoint(path, cnn14(), {"architecture": "cnn14", "training": {"epochs": 3}})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.pth"
    path.write_bytes(b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(path, cnn14(), {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.pth"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("record", [{"training": float("nan")}, {"training": object()}])
def test_a_record_that_is_not_json_is_not_written(tmp_path: Path, record: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="plain JSON"):
        save_checkpoint(tmp_path / "t.pth", cnn14(), record)
    with pytest.raises(CheckpointError, match=r"\.safetensors or \.pth"):
        save_checkpoint(tmp_path / "t.onnx", cnn14(), {})
    assert not list(tmp_path.iterdir())


# Which entry, which prefixes


@pytest.mark.parametrize("build", [cnn14, cp_resnet])
@pytest.mark.parametrize(
    ("wrap", "source"),
    [
        (dict, "bare state dict"),
        (OrderedDict, "bare state dict"),
        (lambda t: {"epoch": 3, "model_state_dict": t, "optimizer_state_dict": {}}, "model_state_dict"),
        (lambda t: {"model": t, "args": None}, "model"),
        (lambda t: {"state_dict": t, "model_ema": None}, "state_dict"),
        (
            lambda t: {"state_dict": {"x": torch.zeros(1)}, "state_dict_ema": t},
            "state_dict_ema, 1 tensors beside it left out (state_dict.x)",
        ),
        (lambda t: prefixed("module.", t), "bare state dict, prefix 'module.' removed"),
        (
            lambda t: {"model": prefixed("_orig_mod.module.", t)},
            "model, prefix '_orig_mod.' removed, prefix 'module.' removed",
        ),
        (
            lambda t: {"model_ema": {"n_averaged": torch.tensor(5), **prefixed("module.", t)}},
            "model_ema, prefix 'module.' removed, 1 tensors beside it left out (n_averaged)",
        ),
        (
            lambda t: {"state_dict": {**prefixed("model._orig_mod.", t), "loss.weight": torch.ones(10)}},
            "state_dict, prefix 'model.' removed, prefix '_orig_mod.' removed, "
            "1 tensors beside it left out (loss.weight)",
        ),
        (lambda t: {"state_dict": prefixed("net.", t)}, "state_dict, prefix 'net.' removed"),
        (
            lambda t: {"module": prefixed("backbone.", t), "optimizer": {"state": t}},
            "module, prefix 'backbone.' removed",
        ),
        (
            lambda t: {**t, "accuracy.tp": torch.tensor([3]), "queue": torch.zeros(0), "loss_fn.weight": torch.ones(3)},
            "bare state dict, 3 tensors beside it left out (accuracy.tp, queue, loss_fn.weight)",
        ),
        (
            lambda t: {"state_dict": {**prefixed("a.net.", t), "head.0.weight": torch.ones(3), "n": torch.tensor(1)}},
            "state_dict, prefix 'a.' removed, prefix 'net.' removed, 2 tensors beside it left out (head.0.weight, n)",
        ),
        (
            lambda t: {"model_state_dict": {**t, "adapt_layer.0.weight": torch.ones(2)}},
            "model_state_dict, 1 tensors beside it left out (adapt_layer.0.weight)",
        ),
    ],
)
def test_every_layout_loads_and_says_what_was_used(
    saved: Callable[[Any], Path], build: Callable[[], dict[str, Tensor]], wrap: Any, source: str
) -> None:
    tensors = build()
    teacher = load_teacher(saved(wrap(tensors)), role="scene", num_classes=10)
    assert teacher.source == source
    for name, tensor in teacher.net.state_dict().items():
        assert torch.equal(tensor, tensors[name])


def loaded_as(path: Path, expected: Mapping[str, Tensor]) -> str:
    """How the teacher was found that has exactly these tensors; counters of batch norm do not matter."""
    teacher = load_teacher(path)
    for name, tensor in teacher.net.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, expected[name]), name
    return teacher.source


RAW, AVERAGED = cp_resnet(seed=1), cp_resnet(seed=0)
AVERAGES: dict[str, Any] = {
    **{
        f"in {name}": {"model": RAW, name: AVERAGED}
        for name in ("ema_state_dict", "ema", "model_ema_state_dict", "ema_model", "swa_model", "averaged_model")
    },
    "in two dicts": {"state_dict": RAW, "ema": {"decay": 0.999, "shadow": AVERAGED}},
    "wrapped in a dict": {"model": RAW, "modelEMA": {"module": AVERAGED}},
    "of a callback": {"state_dict": RAW, "callbacks": {"SWA": {"average_model_state": prefixed("module.", AVERAGED)}}},
    "beside the net": {"state_dict": prefixed("online_model.", RAW) | prefixed("ema_model.module.", AVERAGED)},
    "preferred of two": {"model_ema": AVERAGED, "swa": RAW},
}


@pytest.mark.parametrize("where", AVERAGES)
def test_averaged_weights_go_first_however_they_are_spelled_and_the_others_are_named(
    saved: Callable[[Any], Path], where: str
) -> None:
    assert ", which fits too" in loaded_as(saved(AVERAGES[where]), AVERAGED)


def test_a_dump_says_which_of_two_nets_it_took(run: Run, world: World) -> None:
    torch.save(AVERAGES["in ema"], world.root / "two.pth")
    args = ("--json-path", world.json_path, "--only", "scene", "--scene-teacher-ckpt", world.root / "two.pth")
    result = run("dump", "--target", "b", *args)
    assert result.exit_code == 0, result.output
    assert "scene: weights read from ema, chosen before 'model.', which fits too" in result.stderr


PANNS = {
    **{name.removeprefix("feature_extractor."): tensor for name, tensor in cnn14(seed=3).items()},
    **{f"bn0.{name}": torch.ones(64) for name in ("weight", "bias", "running_mean", "running_var")},
    "spectrogram_extractor.stft.conv_real.weight": torch.zeros(257, 1, 512),
    "fc_audioset.weight": torch.zeros(527, 16),
}
"""The published tagger's names: no batch norm behind fc1, no classifier of scenes."""


@pytest.mark.parametrize("as_city2scene", [False, True])
def test_published_weights_start_a_net_and_what_is_not_taken_is_said(
    saved: Callable[[Any], Path], as_city2scene: bool
) -> None:
    net: Any = CNN14(10, CHANNELS, 16, (8, 8))
    inner = net.feature_extractor
    if as_city2scene:
        net = City2Scene(net, torch.nn.Linear(16, 10))
    published = {name: tensor for name, tensor in PANNS.items() if not name.startswith(("bn1.", "classifier."))}
    path = saved({"iteration": 1, "model": published})
    told = warm_start(net, path, Settings("city2scene" if as_city2scene else "scene")).told
    assert re.search(r"feature_extractor.bn1.weight.*6 of the file .* left out: bn0.weight, .*fc_audioset.weight", told)
    for name, tensor in published.items():
        if name.startswith(("conv", "fc1")) and not name.endswith("tracked"):
            assert torch.equal(inner.state_dict()[name], tensor), name
    with pytest.raises(CheckpointError) as caught:
        load_teacher(path)
    assert "kd-cache train --arch cnn14 --init" in str(caught.value.hint)


def test_averages_that_are_no_whole_net_are_not_used_and_said(saved: Callable[[Any], Path]) -> None:
    parameters = {name: tensor for name, tensor in AVERAGED.items() if "running" not in name}
    for shadow in ({"shadow": parameters}, {"shadow_params": list(parameters.values())}):
        assert "averages in ema" in loaded_as(saved({"model": RAW, "ema": shadow}), RAW)


def test_a_module_of_wrapped_compiled_and_averaged_nets_with_metrics_loads(saved: Callable[[Any], Path]) -> None:
    net = CPResNet(10, (4, 4, 8, 12))
    net.load_state_dict(AVERAGED)
    net.block1 = torch.compile(net.block1, backend="eager")
    net.head = torch.nn.DataParallel(net.head)
    module = torch.nn.Module()
    module.teacher = torch.optim.swa_utils.AveragedModel(net)
    module.student, module.same = torch.nn.Linear(3, 3), module.teacher
    source = loaded_as(saved({"state_dict": module.state_dict(), "hyper_parameters": {"lr": 0.1}}), AVERAGED)
    assert source.startswith("state_dict, prefix 'teacher.' removed")
    assert "student.weight" in source


def test_two_nets_that_are_equally_good_are_refused_by_their_names(saved: Callable[[Any], Path]) -> None:
    pairs = [
        {"state_dict": prefixed("teacher.", cnn14()) | prefixed("student.", RAW)},
        {"best": RAW, "last": AVERAGED},
        {"ema": {"a": RAW, "b": AVERAGED}},
    ]
    for content in pairs:
        assert re.search(r"two networks, under '\S+\.' and under '\S+\.'", refusal(saved(content)))
    assert "1 unexpected" in refusal(saved({**RAW, "gate.weight": torch.ones(2)}))
    assert "block1.flag: int64" in refusal(saved({**RAW, "block1.flag": torch.tensor(1)}))
    twice = {**RAW, "block1._orig_mod.conv1.weight": AVERAGED["block1.conv1.weight"]}
    assert "1 unexpected" in refusal(saved(twice))


def test_a_city2scene_file_loads_nested_flattened_and_prefixed(tmp_path: Path) -> None:
    entries = city2scene()
    tensors = flattened(entries)
    save_checkpoint(tmp_path / "a.pth", tensors, {"role": "city2scene"})
    save_checkpoint(tmp_path / "b.safetensors", tensors, {"role": "city2scene"})
    torch.save(entries, tmp_path / "c.pth")
    prefixes = {entry: prefixed("module.", entries[entry]) for entry in (CITY_ENTRY, HEAD_ENTRY)}
    torch.save(prefixes, tmp_path / "d.pth")
    save_file(flattened(prefixes), tmp_path / "e.safetensors")
    save_checkpoint(tmp_path / "f.safetensors", load_teacher(tmp_path / "c.pth").state_dict(), {})
    loaded = [load_teacher(path, role="city2scene") for path in sorted(tmp_path.iterdir())]
    parts = [teacher.fingerprint_parts() for teacher in loaded]
    assert parts == [parts[0]] * 6
    assert parts[0]["architecture"] == "cnn14/1+city2scene"
    assert {(teacher.num_classes, teacher.num_cities) for teacher in loaded} == {(10, 12)}
    assert loaded[0].source == f"{CITY_ENTRY} + {HEAD_ENTRY}"
    assert loaded[3].source == f"{CITY_ENTRY} + {HEAD_ENTRY}, prefix 'module.' removed"
    raw = torch.load(tmp_path / "a.pth", weights_only=True)
    assert raw.keys() == {CITY_ENTRY, HEAD_ENTRY, "kd_cache"}


def test_the_record_comes_back_from_both_formats(tmp_path: Path) -> None:
    record = {
        "architecture": "cp_resnet",
        "architecture_version": "1",
        "role": "city",
        "class_names": ["a", "b", "c"],
        "value_kind": "logits",
        "feature_spec": "log-mel 256",
        "training": {"seed": 1},
    }
    for path in (tmp_path / "t.pth", tmp_path / "t.safetensors"):
        save_checkpoint(path, cp_resnet(3), record)
        teacher = load_teacher(path)
        assert teacher.record == record
        assert teacher.class_names == ("a", "b", "c")
        assert (teacher.architecture, teacher.role, teacher.num_cities) == ("cp_resnet", "city", 3)
        assert teacher.value_kind == "logits"
        assert teacher.fingerprint_parts()["feature_spec"] == "log-mel 256"
        assert teacher.fingerprint_parts()["architecture"] == "cp_resnet/1"


STORED: dict[str, Callable[[Path, dict[str, Tensor]], object]] = {
    "safetensors": lambda path, tensors: save_checkpoint(path, tensors, {"role": "scene", "training": {"epochs": 9}}),
    "pth": lambda path, tensors: save_checkpoint(path, tensors, {}),
    "prefixed, in another order": lambda path, tensors: torch.save(
        dict(reversed(prefixed("module.", tensors).items())), path
    ),
    "by safetensors itself": lambda path, tensors: save_file(prefixed("_orig_mod.", tensors), path),
    "by torch before 1.6": lambda path, tensors: torch.save(
        {"model": tensors}, path, _use_new_zipfile_serialization=False
    ),
    "without batch counters": lambda path, tensors: torch.save(
        {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}, path
    ),
    "with gaps in memory": lambda path, tensors: torch.save(
        {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in tensors.items()}, path
    ),
    "as float64": lambda path, tensors: torch.save({n: t.double() for n, t in tensors.items()}, path),
}


@pytest.mark.parametrize("build", [cnn14, cp_resnet])
def test_the_same_weights_are_the_same_teacher_however_they_are_stored(
    tmp_path: Path, build: Callable[[], dict[str, Tensor]]
) -> None:
    """Also under whatever name: content and not the suffix decides the format."""
    found = []
    for how, store in STORED.items():
        path = tmp_path / f"t{'.safetensors' if how == 'safetensors' else '.pth'}"
        store(path, build())
        teacher = load_teacher(path.rename(tmp_path / "t.any"))
        assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}, how
        found.append(teacher.fingerprint_parts())
    assert found == [found[0]] * len(STORED)
    assert found[0].keys() == {"architecture", "feature_spec", "weights"}
    assert found[0]["feature_spec"] == "log-mel [T, F], front end unstated"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrower_weights_become_float32(saved: Callable[[Any], Path], dtype: torch.dtype) -> None:
    teacher = load_teacher(saved({n: t.to(dtype) if t.is_floating_point() else t for n, t in cp_resnet().items()}))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert torch.isfinite(teacher(torch.randn(2, 43, 64))).all()


def test_loading_draws_no_random_numbers_and_freezes(saved: Callable[[Any], Path]) -> None:
    path = saved(city2scene())
    before = torch.get_rng_state()
    teacher = load_teacher(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


# Fingerprints


def test_one_changed_weight_changes_the_weights_part_alone(saved: Callable[[Any], Path]) -> None:
    one = load_teacher(saved(cnn14())).fingerprint_parts()
    for name in ("classifier.6.bias", "feature_extractor.bn1.running_var"):
        other = load_teacher(saved(changed(cnn14(), name, 1e-3))).fingerprint_parts()
        assert {key for key in one if one[key] != other[key]} == {"weights"}


@pytest.mark.parametrize(
    ("city", "classifier", "backbone", "width"),
    [
        (cnn14, "classifier.6.bias", "feature_extractor.fc1.bias", 16),
        (cp_resnet, "head.1.bias", "stem.1.bias", 12),
    ],
)
def test_of_city2scene_only_what_inference_uses_counts(
    saved: Callable[[Any], Path], city: Any, classifier: str, backbone: str, width: int
) -> None:
    def parts(tensors: dict[str, Tensor], scene: dict[str, Tensor]) -> dict[str, str]:
        return load_teacher(saved({CITY_ENTRY: tensors, HEAD_ENTRY: scene})).fingerprint_parts()

    own = parts(city(12), head(width))
    assert parts(changed(city(12), classifier), head(width)) == own
    assert parts(changed(city(12), backbone), head(width)) != own
    assert parts(city(12), changed(head(width), "bias")) != own


# What was asked for


def test_the_numbers_of_classes_and_cities_are_checked_against_the_weights(saved: Callable[[Any], Path]) -> None:
    assert "expected 15 outputs (--num-scenes 15), found 10" in refusal(saved(cnn14(10)), num_classes=15)
    assert "--num-scenes 9" in refusal(saved(city2scene()), num_classes=9)
    assert "(--num-cities 10), found 12" in refusal(saved(city2scene()), num_cities=10)
    assert "(--num-cities 10), found 12" in refusal(saved(cnn14(12)), role="city", num_cities=10)
    assert load_teacher(saved(cnn14(10)), role="scene", num_cities=12).num_cities is None


def test_a_file_of_another_role_is_refused_by_both_names(saved: Callable[[Any], Path], tmp_path: Path) -> None:
    assert "expected a scene teacher, found city2scene" in refusal(saved(city2scene()), role="scene")
    message = refusal(saved(cnn14()), role="city2scene")
    assert "expected a city2scene teacher, found a plain scene or city model" in message
    save_checkpoint(tmp_path / "c.pth", cnn14(12), {"role": "city"})
    assert "expected a scene teacher, found city" in refusal(tmp_path / "c.pth", role="scene")
    save_checkpoint(tmp_path / "c.pth", cnn14(12), {"role": "city2scene"})
    assert "the record says the role is city2scene" in refusal(tmp_path / "c.pth")
    assert "no role is called 'student'" in refusal(tmp_path / "c.pth", role="student")


# Names and shapes


def test_another_network_is_refused_with_names_found_and_architectures_known(
    saved: Callable[[Any], Path],
) -> None:
    message = refusal(saved({"conv.\x1b[31mweight": torch.ones(3), "fc.bias": torch.ones(3)}))
    assert "cnn14 or cp_mobile or cp_resnet" in message
    assert "fc.bias" in message
    assert "\\x1b[31m" in message
    assert "\x1b" not in message


def test_a_prefix_on_some_names_or_on_two_networks_is_no_partial_load(saved: Callable[[Any], Path]) -> None:
    tensors = cnn14()
    tensors["module.classifier.6.bias"] = tensors.pop("classifier.6.bias")
    assert "1 missing, 1 unexpected" in refusal(saved(tensors))
    both = {**prefixed("model.", cnn14()), **prefixed("net.", cnn14(seed=1))}
    assert "two networks" in refusal(saved({"state_dict": both}))


def test_shapes_that_make_no_network_are_refused(saved: Callable[[Any], Path]) -> None:
    tensors = cp_resnet()
    tensors["block3.conv2.weight"] = torch.ones(7, 4, 3, 3)
    assert "make no cp_resnet" in refusal(saved(tensors))
    tensors["block3.conv2.weight"] = torch.tensor(1.0)
    assert "of another shape" in refusal(saved(tensors))


# Values


def bias(value: object) -> dict[str, Any]:
    return {"model": {**cnn14(), "classifier.6.bias": value}}


def noted(record: object) -> dict[str, Any]:
    return {"model_state_dict": cnn14(), "kd_cache": record}


NO_TEACHERS: list[tuple[object, str]] = [
    (bias(3), "classifier.6.bias: a int"),
    (bias([0.0]), "classifier.6.bias: a list"),
    (bias(torch.zeros(10, dtype=torch.int64)), "int64"),
    (bias(torch.zeros(10, dtype=torch.complex64)), "complex64"),
    (bias(torch.zeros(0)), "an empty tensor [0]"),
    (bias(torch.zeros(10).to_sparse()), "torch.sparse_coo"),
    (bias(torch.zeros(10, device="meta")), "no data (meta)"),
    (torch.zeros(3), "found a Tensor"),
    ({}, "nothing"),
    ({"model_state_dict": "weights"}, "model_state_dict: a str"),
    ({"model_state_dict": {}}, "an empty dict"),
    ({"epoch": 3, "weights": {}}, "epoch: a int"),
    ({3: torch.zeros(1)}, "3: a name that is not text"),
    (noted("{"), "not JSON"),
    (noted("[" * 100_000), "not JSON"),
    (noted("[]"), "JSON object"),
    (noted({"a": 1}), "JSON object"),
    (
        noted('{"architecture": "resnet50"}'),
        "architecture must be bc_resnet or cnn14 or cp_mobile or cp_resnet or tf_sepnet, found resnet50",
    ),
    (noted('{"architecture": {}}'), "architecture must be"),
    (noted('{"architecture": "cp_resnet"}'), "none of its names"),
    (noted('{"architecture_version": "2"}'), "architecture_version must be 1, found 2"),
    (noted('{"role": "student"}'), "role must be scene or city2scene or city"),
    (noted('{"value_kind": "probs"}'), "value_kind must be logits"),
    (noted('{"class_names": "abc"}'), "class_names of the record must be a list"),
    (noted('{"feature_spec": 256}'), "feature_spec of the record must be text"),
    (noted('{"class_names": ["a", "b"]}'), "names 2 classes, the weights have 10"),
    ({CITY_ENTRY: cnn14(12)}, "both and nothing else; found 85, 0"),
    ({HEAD_ENTRY: head(16), CITY_ENTRY: {}}, "both and nothing else; found 0, 2"),
    ({CITY_ENTRY: cnn14(12), HEAD_ENTRY: head(17)}, "weight: expected [10, 16], found [10, 17]"),
    ({CITY_ENTRY: cnn14(12), HEAD_ENTRY: {"weight": torch.ones(10, 16)}}, "missing:\n  bias"),
    (prefixed(f"{CITY_ENTRY}.", cnn14(12)), "both and nothing else"),
    ({**flattened(city2scene()), "x": torch.ones(1)}, "1 others"),
    *(
        ({name: torch.ones(1)}, "none of its names")
        for name in ("module." * 2000 + "x", "model." * 2000 + "x", ".", "")
    ),
]
"""Values that are no dense float tensors, no state dict at all, records that cannot be trusted, half a City2Scene file,
and hostile names."""


def test_what_is_no_whole_teacher_is_refused_for_what_it_is(saved: Callable[[Any], Path]) -> None:
    for content, expected in NO_TEACHERS:
        assert expected in refusal(saved(content))


# Files


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="cannot open"):
        load_teacher(str(tmp_path / "a\0b"))


ANOTHER_ZIP = io.BytesIO()
np.savez(ANOTHER_ZIP, a=np.zeros(3))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"epoch,loss\n1,0.5\n", "starts with epoch,loss"),
        (b"\x1b[2J\x00\xff", "starts with \\x1b[2J"),
        (b"PK\x03\x04", "damaged"),
        (ANOTHER_ZIP.getvalue(), "another zip file"),
        (b"\x80\x02", "damaged"),
        (b"\x80", "damaged"),
        (pickle.dumps({"a": 1}), "found a plain pickle"),
        (struct.pack("<Q", 2) + b"{}" + b"surplus", "damaged"),
        (struct.pack("<Q", 22) + b'{"__metadata__": null}', "nothing"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(
    written: Callable[[bytes], Path], content: bytes, expected: str
) -> None:
    assert expected in refusal(written(content))


FORMATS: dict[str, Callable[[Path], object]] = {
    "zip": lambda path: torch.save(cp_resnet(), path),
    "legacy": lambda path: torch.save(cp_resnet(), path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: save_file(cp_resnet(), path),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_truncation_is_refused_and_a_flipped_byte_is_or_only_changes_a_number(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t"
    FORMATS[kind](path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refusal(path)
    flips = np.random.default_rng(0).integers(0, len(whole), 100)
    for position in [*flips[:50], *(flips[50:] % 4000)]:  # the second half: header or pickle
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            load_teacher(path)
        except CheckpointError as error:
            assert str(path) in error.message  # noqa: PT017 - a flip in a number is not an error


def test_any_flipped_bit_in_weights_or_record_that_we_wrote_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_checkpoint(path, cp_resnet(), {"role": "scene", "class_names": list("abcdefghij")})
    assert load_file(path).keys() == cp_resnet().keys()  # safetensors' own reader takes it as it is
    whole = path.read_bytes()
    body = 8 + int.from_bytes(whole[:8], "little")
    name = whole.index(rb"\"b\"") + 2
    flips = np.random.default_rng(0).integers(body, len(whole), 60)
    for position in [body, len(whole) - 1, name, *flips.tolist()]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert "not those that were written" in refusal(path)


def test_tensors_that_changed_places_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_checkpoint(path, cp_resnet(), {})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    one, other = header["block1.bn1.bias"], header["block1.bn1.running_mean"]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    assert load_file(path).keys() == cp_resnet().keys()
    assert "not those that were written" in refusal(path)


# Code in a pickle


@pytest.mark.parametrize(
    "beside",
    [argparse.Namespace(lr=0.1), defaultdict(list, a=[1]), Path("runs"), np.ones(3), datetime(2024, 1, 1)],
    ids=lambda value: type(value).__name__,
)
def test_a_file_that_a_user_trusts_loads_by_the_hint_as_it_is_printed(
    saved: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch, beside: object
) -> None:
    path = saved({**city2scene(), "args": beside})
    with pytest.raises(CheckpointError, match="nothing ran") as refused:
        load_teacher(path)
    monkeypatch.chdir(path.parent)
    exec(str(refused.value.hint).partition("\n")[2], {})  # noqa: S102 - the lines that a person is told to run
    parts = [
        load_teacher(file, role="city2scene").fingerprint_parts()
        for file in ("trusted.safetensors", saved(city2scene()))
    ]
    assert parts[0] == parts[1]


def test_no_line_to_run_is_printed_for_what_may_be_code(tmp_path: Path) -> None:
    for name in ("builtins.eval", "os.system", "subprocess.Popen", "a.B]);import os;os.system('x')#.C"):
        module, _, what = name.rpartition(".")
        (tmp_path / "t.pth").write_bytes(b"\x80\x02" + f"c{module}\n{what}\n)R.".encode())
        with pytest.raises(CheckpointError, match="nothing ran") as refused:
            load_teacher(tmp_path / "t.pth")
        assert "safe_globals" not in str(refused.value.hint)


def test_names_a_user_trusts_may_be_allowed_explicitly(saved: Callable[[Any], Path]) -> None:
    path = saved({"model_state_dict": cnn14(), "args": argparse.Namespace(lr=0.1)})
    assert "argparse.Namespace" in refusal(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert load_teacher(path).source == "model_state_dict"


NUMBERS = [
    *(np.dtype(code).type(1) for code in "?bBhHiIlLefdFD"),
    *(np.str_("bést"), np.bytes_(b"best"), np.array(1, ">f4")[()]),
]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_a_training_scripts_numpy_numbers_beside_the_weights_do_no_harm(tmp_path: Path, number: np.generic) -> None:
    net = CPResNet(10)
    torch.save({"model_state_dict": net.state_dict(), "val_acc": number}, tmp_path / "best.pth")
    assert load_teacher(tmp_path / "best.pth").num_classes == 10


def test_healthy_files_that_cannot_be_read_are_not_called_damaged(tmp_path: Path, run: Run, world: World) -> None:
    path = tmp_path / "t.pth"
    for content, protocol, said in (
        (cp_resnet(), 4, "saved with pickle protocol 4"),
        ({"model": cp_resnet(), "key": b"bytes"}, 3, "saved with pickle protocol 3"),
        ({"model": cp_resnet(), "when": np.datetime64("2024")}, 2, "a numpy M8"),
        ({"model": cp_resnet(), "x": np.longdouble(1)}, 2, "a numpy f16"),
    ):
        torch.save(content, path, pickle_protocol=protocol)
        assert said in refusal(path)
        assert "damaged" not in refusal(path)
    torch.save(torch.zeros(3, 10), tmp_path / "l.pt", pickle_protocol=4)
    (tmp_path / "l.files.json").write_text(json.dumps(["a", "b", "c"]))
    result = run("adopt", tmp_path / "l.pt", "--target", "b", "--json-path", world.json_path)
    assert (result.exit_code, "pickle protocol 4" in result.stderr) == (2, True)
    assert not re.search("damaged|weights_only|Warning", result.stderr)
