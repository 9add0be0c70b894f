"""The built-in networks against an independent re-implementation, and what a loaded teacher promises."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import kaiming
from torch import Tensor, nn

import teachers
from kd_cache.dataset.task import DCASE
from kd_cache.errors import CheckpointError, TeacherError
from kd_cache.train.cp_resnet import CPResNet
from teachers.cnn14 import CNN14, CNN14Features
from teachers.loading import LoadedTeacher

FULL = os.environ.get("KD_CACHE_FULL_TESTS") == "1"
"""Full width for every batch size and length: minutes, and several GB."""

PUBLISHED = (64, 128, 256, 512, 1024, 2048)
NARROW = (2, 4, 8, 8, 16, 24)
BLOCK_TENSORS = ("weight", "bias", "running_mean", "running_var")


# The reference: a plain dict of tensors and the formulas of DOMAIN.md in float64. Nothing of `teachers` is used.


def reference_shapes(channels: tuple[int, ...], classes: int, projection: bool = False) -> dict[str, list[int]]:
    wide, hidden = channels[-1], max(channels[-1] // 2, 4)
    shapes: dict[str, list[int]] = {}
    for number, (before, after) in enumerate(zip((1, *channels), channels, strict=False), start=1):
        block = f"feature_extractor.conv_block{number}"
        shapes[f"{block}.conv1.weight"] = [after, before, 3, 3]
        shapes[f"{block}.conv2.weight"] = [after, after, 3, 3]
        shapes |= {f"{block}.{bn}.{kind}": [after] for bn in ("bn1", "bn2") for kind in BLOCK_TENSORS}
    shapes |= linear("feature_extractor.fc1", wide, wide)
    shapes |= {f"feature_extractor.bn1.{kind}": [wide] for kind in BLOCK_TENSORS}
    if projection:
        head = "feature_extractor.projection_head.head"
        shapes |= linear(f"{head}.0", wide, wide) | linear(f"{head}.3", wide, wide)
        shapes |= {f"{head}.1.{kind}": [wide] for kind in BLOCK_TENSORS}
    for number, inputs, outputs in ((0, wide, hidden), (3, hidden, hidden), (6, hidden, classes)):
        shapes |= linear(f"classifier.{number}", inputs, outputs)
    return shapes


def linear(name: str, inputs: int, outputs: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}


def random_weights(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, Tensor]:
    """Kaiming weights; batch-norm statistics and every offset random, so that no term of the formulas is idle."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            fan_in = math.prod(shape[1:])
            tensors[name] = torch.randn(shape, generator=draw) * math.sqrt(2 / fan_in)
        elif name.endswith(("running_var", "weight")):
            tensors[name] = torch.rand(shape, generator=draw) + 0.5
        else:
            tensors[name] = torch.randn(shape, generator=draw) * 0.2
    return tensors


def reference_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        w[f"{name}.{kind}"].double().reshape(1, -1, *[1] * (x.ndim - 2))
        for kind in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def reference_linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].double().T + w[f"{name}.bias"].double()


def reference_embedding(w: dict[str, Tensor], features: Tensor) -> Tensor:
    x = features.double()[:, None].permute(0, 1, 3, 2)  # [B, 1, F, T]
    for number in range(1, 7):
        for half in (1, 2):
            block = f"feature_extractor.conv_block{number}"
            x = F.conv2d(x, w[f"{block}.conv{half}.weight"].double(), padding=1)
            x = reference_norm(w, f"{block}.bn{half}", x).clamp(min=0)
        if number < 6:
            rows, frames = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
            x = x[:, :, :rows, :frames]
            x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    x = x.sum(dim=3) / x.shape[3]
    x = x.max(dim=2).values + x.sum(dim=2) / x.shape[2]
    x = reference_linear(w, "feature_extractor.fc1", x)
    x = reference_norm(w, "feature_extractor.bn1", x).clamp(min=0)
    head = "feature_extractor.projection_head.head"
    if f"{head}.0.weight" in w:
        x = reference_norm(w, f"{head}.1", reference_linear(w, f"{head}.0", x)).clamp(min=0)
        x = reference_linear(w, f"{head}.3", x)
    return x


def reference_classifier(w: dict[str, Tensor], x: Tensor) -> Tensor:
    x = reference_linear(w, "classifier.0", x).clamp(min=0)
    x = reference_linear(w, "classifier.3", x).clamp(min=0)
    return reference_linear(w, "classifier.6", x)


def assert_same_logits(found: Tensor, reference: Tensor) -> None:
    assert found.shape == reference.shape
    largest = reference.abs().max()
    assert (found.double() - reference).abs().max() <= 1e-5 * largest
    if len(reference) > 1:  # a net that ignores its input would pass the line above
        assert reference.std(dim=0).min() > 1e-3 * largest


def clips(batch: int, frames: int, bins: int = 64) -> Tensor:
    """Noise with a loudness and a tilt of its own in each clip."""
    draw = torch.Generator().manual_seed(batch * 10_000 + frames)
    tilt = torch.randn(batch, 1, 1, generator=draw) * torch.linspace(-1, 1, bins)
    loudness = torch.rand(batch, 1, 1, generator=draw) * 2 + 0.2
    return (torch.randn(batch, frames, bins, generator=draw) + tilt) * loudness


class Compared:
    """A scene and a City2Scene teacher on the same backbone weights, and what the reference makes of them."""

    def __init__(self, folder: Path, channels: tuple[int, ...], suffix: str) -> None:
        self.weights = random_weights(reference_shapes(channels, 10))
        city_classifier = random_weights(linear("classifier.6", self.weights["classifier.6.weight"].shape[1], 12))
        self.head = random_weights(linear("scene", channels[-1], 10), seed=1)
        flattened = {f"city_model_state_dict.{n}": t for n, t in (self.weights | city_classifier).items()}
        flattened |= {n.replace("scene.", "scene_head_state_dict."): t for n, t in self.head.items()}
        self.teachers = {}
        for role, tensors in (("scene", self.weights), ("city2scene", flattened)):
            path = folder / f"{role}{suffix}"
            if suffix == ".pth":  # as the existing pipelines write; without fsync, which costs seconds here
                torch.save({"model_state_dict": tensors}, path)
            else:
                teachers.save_checkpoint(path, tensors, {"architecture": "cnn14", "role": role})
            self.teachers[role] = teachers.load_teacher(path, role=role, num_classes=10, num_cities=12)
            path.unlink()
        self.embedding = lru_cache(maxsize=2)(lambda batch, frames: self._embedding(batch, frames))

    def _embedding(self, batch: int, frames: int) -> Tensor:
        return reference_embedding(self.weights, clips(batch, frames))

    def reference(self, role: str, batch: int, frames: int) -> Tensor:
        embedding = self.embedding(batch, frames)
        if role == "scene":
            return reference_classifier(self.weights, embedding)
        return reference_linear(self.head, "scene", embedding)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compared]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "published": Compared(folder, PUBLISHED, ".pth"),
        "narrow": Compared(folder, NARROW, ".safetensors"),
    }


@pytest.mark.parametrize("role", ["scene", "city2scene"])
@pytest.mark.parametrize("frames", [101, 1001])
@pytest.mark.parametrize("batch", [1, 7, 32])
def test_cnn14_equals_the_independent_reference(
    compared: dict[str, Compared], batch: int, frames: int, role: str
) -> None:
    wide = FULL or (batch <= 7 and frames == 101)
    both = compared["published" if wide else "narrow"]
    assert_same_logits(both.teachers[role](clips(batch, frames)), both.reference(role, batch, frames))


def test_cnn14_with_a_projection_head_equals_the_reference(tmp_path: Path) -> None:
    tensors = random_weights(reference_shapes((16, 16, 32, 32, 64, 64), 10, projection=True))
    teachers.save_checkpoint(tmp_path / "t.safetensors", tensors, {})
    teacher = teachers.load_teacher(tmp_path / "t.safetensors")
    x = clips(7, 101)
    assert_same_logits(teacher(x), reference_classifier(tensors, reference_embedding(tensors, x)))


@pytest.mark.parametrize("projection", [False, True])
def test_cnn14_has_exactly_the_published_names_and_shapes(projection: bool) -> None:
    with torch.device("meta"):
        net = CNN14(10, projection=(2048, 2048) if projection else None)
    counters = "num_batches_tracked"
    found = {n: list(t.shape) for n, t in net.state_dict().items() if not n.endswith(counters)}
    assert found == reference_shapes(PUBLISHED, 10, projection)
    assert net.embedding_dim == 2048


def test_cnn14_features_give_the_embedding_of_the_whole_net() -> None:
    net = CNN14(10, NARROW, 24, (8, 8)).eval()
    features = CNN14Features(NARROW, 24).eval()
    features.load_state_dict(net.feature_extractor.state_dict())
    x = clips(2, 40)
    assert net.embed(x).shape == (2, 24)
    assert torch.equal(features(x), net.embed(x))


# CP-ResNet


def reference_cp_resnet(w: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """(embedding, logits) in float64, spelled out block by block."""

    def conv(name: str, x: Tensor, **how: int) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"].double(), **how)

    def block(name: str, x: Tensor, first: int, second: int, groups: int = 1) -> Tensor:
        y = conv(f"{name}.conv1", x, padding=first // 2, groups=groups)
        y = reference_norm(w, f"{name}.bn1", y).clamp(min=0)
        y = conv(f"{name}.conv2", y, padding=second // 2, groups=groups)
        y = reference_norm(w, f"{name}.bn2", y)
        if f"{name}.shortcut.0.weight" in w:
            x = reference_norm(w, f"{name}.shortcut.1", conv(f"{name}.shortcut.0", x, groups=groups))
        return (y + x).clamp(min=0)

    x = features.double()[:, None].permute(0, 1, 3, 2)
    x = reference_norm(w, "stem.1", conv("stem.0", x, stride=2, padding=1)).clamp(min=0)
    x = block("block1", F.max_pool2d(x, 2), 3, 1)
    x = block("block2", F.max_pool2d(x, (2, 1)), 3, 3)
    x = block("block3", F.max_pool2d(x, (2, 1)), 3, 3, groups=2)
    x = block("block4", x, 3, 1)
    logits = reference_norm(w, "head.1", conv("head.0", x))
    return x.mean(dim=(2, 3)), logits.mean(dim=(2, 3))


@pytest.mark.parametrize(("frames", "bins"), [(43, 256), (101, 64), (5, 17)])
def test_cp_resnet_equals_the_independent_reference(tmp_path: Path, frames: int, bins: int) -> None:
    shapes = {n: list(t.shape) for n, t in CPResNet(10).state_dict().items() if not n.endswith("tracked")}
    tensors = random_weights(shapes)
    teachers.save_checkpoint(tmp_path / "t.pth", tensors, {})
    teacher = teachers.load_teacher(tmp_path / "t.pth")
    x = clips(3, frames, bins)
    embedding, logits = reference_cp_resnet(tensors, x)
    assert_same_logits(teacher(x), logits)
    assert_same_logits(teacher.backbone.embed(x)[:, :1], embedding[:, :1])


def test_cp_resnet_takes_28_8_million_multiply_accumulates() -> None:
    net, macs = CPResNet(10).eval(), []

    def count(conv: nn.Conv2d, _: object, output: Tensor) -> None:
        macs.append(output[0].numel() * conv.weight[0].numel())

    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(count)
    net(clips(1, 43, 256))
    assert sum(macs) == 28_839_120


# What every network refuses, and how training starts


@pytest.mark.parametrize(
    ("net", "frames", "bins"),
    [(CNN14(10, NARROW, 8, (4, 4)), 32, 32), (CPResNet(10), 5, 17)],
    ids=["cnn14", "cp_resnet"],
)
def test_a_clip_too_small_for_the_poolings_is_a_teacher_error(net: nn.Module, frames: int, bins: int) -> None:
    net.eval()
    assert torch.isfinite(net(clips(1, frames, bins))).all()
    for shape in ((1, frames - 1, bins), (1, frames, bins - 1)):
        with pytest.raises(TeacherError, match=f"T={shape[1]}, F={shape[2]}"):
            net(torch.zeros(shape))


@pytest.mark.parametrize("x", [torch.zeros(101, 64), torch.zeros(1, 101, 64, dtype=torch.int64)])
def test_features_of_another_rank_or_kind_are_a_teacher_error(x: Tensor) -> None:
    with pytest.raises(TeacherError, match=r"float features \[B, T, F\]"):
        CPResNet(10)(x)


# The loaded teacher


def narrow_teacher() -> LoadedTeacher:
    net = CNN14(10, NARROW, 8, (4, 4))
    kaiming(net, 0)
    return LoadedTeacher(net, source="here")


def test_a_loaded_teacher_moves_like_any_module() -> None:
    teacher = narrow_teacher()
    x = clips(2, 64)
    logits = teacher(x)
    assert torch.allclose(teacher.double()(x.double()), logits.double(), atol=1e-5)
    assert {tensor.device.type for tensor in teacher.to("meta").state_dict().values()} == {"meta"}


def test_class_names_are_the_fields_own_when_their_number_is() -> None:
    def names(outputs: int) -> tuple[str, ...] | None:
        return LoadedTeacher(CNN14(outputs, NARROW, 8, (4, 4)), source="").class_names

    assert names(10) == DCASE.scenes
    assert names(12) == DCASE.cities
    assert names(3) is None
    assert list(DCASE.scenes) == sorted(DCASE.scenes)
    assert list(DCASE.cities) == sorted(DCASE.cities)


@pytest.mark.parametrize("factory", [teachers.scene, teachers.city2scene, teachers.city])
def test_a_factory_without_a_checkpoint_says_so(factory) -> None:
    with pytest.raises(CheckpointError, match=f"{factory.__name__} teacher has no checkpoint"):
        factory(None)


def test_exports_are_there_and_importing_the_package_imports_no_torch() -> None:
    assert sorted(teachers.__all__) == teachers.__all__ == dir(teachers)
    assert all(getattr(teachers, name).__name__ == name for name in teachers.__all__)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        teachers.nothing_like_this  # noqa: B018
    script = "import sys, teachers.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_older_path_of_own_teacher_still_works() -> None:
    from teachers.training.own_net import own_teacher

    assert own_teacher is teachers.own_teacher
