"""The nets for students: what they cost as published, what they compute, and their sizes in settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import Run
from test_teachers import assert_same_logits, clips, random_weights, reference_norm
from torch import Tensor, nn
from train_fixtures import built

import teachers
from kd_cache.distill.complexity import complexity
from kd_cache.errors import TeacherError, UsageError
from kd_cache.train.architectures import architectures
from kd_cache.train.bc_resnet import BCResNet
from kd_cache.train.cp_mobile import CPMobile
from kd_cache.train.cp_resnet import CPResNet
from kd_cache.train.freezing import BACKBONE, HEAD, NECK, parts_of
from kd_cache.train.nets import make_net
from kd_cache.train.settings import Settings
from kd_cache.train.tf_sepnet import TFSepNet

PUBLISHED: list[tuple[str, dict[str, Any], tuple[int, int], int, int]] = [
    ("cp_mobile", {}, (65, 256), 61_148, 29_419_156),
    ("cp_resnet", {}, (43, 256), 127_684, 28_840_396),
    ("cp_resnet", {"channels": (8, 8, 16, 24)}, (48, 64), 8_780, 550_028),
    ("bc_resnet", {"base_channels": 80}, (64, 256), 314_970, 97_978_480),
    ("tf_sepnet", {}, (64, 512), 126_858, 29_419_648),
]


@pytest.mark.parametrize(("arch", "sizes", "shape", "parameters", "macs"), PUBLISHED)
def test_a_net_costs_what_its_paper_or_the_docs_say(
    arch: str, sizes: dict[str, Any], shape: tuple[int, int], parameters: int, macs: int
) -> None:
    found = complexity(make_net(Settings("scene", arch=arch, **sizes), 10), shape)
    assert (found.parameters, found.macs) == (parameters, macs)


def layer(w: dict[str, Tensor], name: str, x: Tensor, **how: Any) -> Tensor:
    """A convolution that keeps its input's size, or halves it, and batch norm."""
    weight = w[f"{name}.0.weight"].double()
    x = F.conv2d(x, weight, padding=tuple(size // 2 for size in weight.shape[2:]), **how)
    return reference_norm(w, f"{name}.1", x)


def reference_cp_mobile(w: dict[str, Tensor], features: Tensor) -> Tensor:
    """Logits in float64, block by block."""
    x = features.double()[:, None].permute(0, 1, 3, 2)
    x = layer(w, "in_c.1", layer(w, "in_c.0", x, stride=2).clamp(min=0), stride=2).clamp(min=0)
    for name, stride in (
        ("s1.b1", (1, 1)), ("s1.b2", (1, 1)), ("s1.b3", (1, 2)),
        ("s2.b4", (2, 1)), ("s2.b5", (1, 1)), ("s3.b6", (1, 1)),
    ):  # fmt: skip
        block = f"stages.{name}.block"
        y = layer(w, f"{block}.0", x).clamp(min=0)
        y = layer(w, f"{block}.1", y, stride=stride, groups=y.shape[1]).clamp(min=0)
        y = layer(w, f"{block}.2", y)
        if x.shape[1] == y.shape[1]:
            y = y + (x if stride == (1, 1) else F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride))
        x = y.clamp(min=0)
    logits = F.conv2d(x, w["feed_forward.0.weight"].double())
    return reference_norm(w, "feed_forward.1", logits).mean(dim=(2, 3))


def residual(x: Tensor) -> Tensor:
    """Residual normalization, bin by bin."""
    bins = [(x[:, :, f] - x[:, :, f].mean((1, 2), True)) / (x[:, :, f].var((1, 2), keepdim=True) + 1e-5).sqrt()
            for f in range(x.shape[2])]  # fmt: skip
    return 0.1 * x + torch.stack(bins, dim=2)


def staged(w: dict[str, Tensor], x: Tensor, pooled: str, block: Callable[..., Tensor]) -> Tensor:
    """Four stages of blocks ``(weights, name, input, input after the transition)``, then the head."""
    x = residual(x)
    for stage, count in zip("1234", (2, 2, 2, 3), strict=True):
        for name in (f"stage{stage}.{number}" for number in range(count)):
            led = layer(w, f"{name}.transition", x).clamp(min=0) if f"{name}.transition.0.weight" in w else x
            x = block(w, name, x, led)
        x = residual(x)
        x = F.max_pool2d(x, 2) if stage in pooled else x
    return F.conv2d(x, w["head.weight"].double(), w["head.bias"].double()).mean(dim=(2, 3))


def broadcasted(w: dict[str, Tensor], name: str, x: Tensor, led: Tensor) -> Tensor:
    y = F.conv2d(led, w[f"{name}.over_bins.weight"].double(), padding=(1, 0), groups=led.shape[1])
    edges = [0, *torch.tensor([len(part) for part in torch.arange(y.shape[2]).tensor_split(4)]).cumsum(0).tolist()]
    bands = [y[:, :, start:end] for start, end in pairwise(edges)]
    y = torch.cat([reference_norm(w, f"{name}.norm.bands.{k}", band) for k, band in enumerate(bands)], dim=2)
    z = layer(w, f"{name}.over_frames", y.mean(dim=2, keepdim=True), groups=y.shape[1])
    z = F.conv2d(z / (1 + torch.exp(-z)), w[f"{name}.mixed.weight"].double())
    return (y + z + (x if led is x else 0)).clamp(min=0)


def separate(w: dict[str, Tensor], name: str, _: Tensor, x: Tensor) -> Tensor:
    half, found = x.shape[1] // 2, []
    order = [channel // 2 + half * (channel % 2) for channel in range(2 * half)]  # of both halves in turn
    for path, axis, part in (("bins", 2, order[:half]), ("frames", 3, order[half:])):
        y = layer(w, f"{name}.{path}.along", x[:, part], groups=half).clamp(min=0).mean(dim=axis, keepdim=True)
        found.append(x[:, part] + layer(w, f"{name}.{path}.mixed", y).clamp(min=0))
    return torch.cat(found, dim=1)


def reference_bc_resnet(w: dict[str, Tensor], features: Tensor) -> Tensor:
    x = features.double()[:, None].permute(0, 1, 3, 2)
    return staged(w, layer(w, "stem", x, stride=2).clamp(min=0), "12", broadcasted)


def reference_tf_sepnet(w: dict[str, Tensor], features: Tensor) -> Tensor:
    x = layer(w, "stem.0", features.double()[:, None].permute(0, 1, 3, 2), stride=2).clamp(min=0)
    return staged(w, layer(w, "stem.1", x, stride=2, groups=x.shape[1]).clamp(min=0), "123", separate)


REFERENCES: dict[str, tuple[Callable[[], nn.Module], Callable[[dict[str, Tensor], Tensor], Tensor]]] = {
    "cp_mobile": (lambda: CPMobile(10), reference_cp_mobile),
    "bc_resnet": (lambda: BCResNet(10, 6), reference_bc_resnet),
    "tf_sepnet": (lambda: TFSepNet(10, 8), reference_tf_sepnet),
}


@pytest.mark.parametrize("arch", REFERENCES)
def test_a_net_equals_an_independent_reference(tmp_path: Path, arch: str) -> None:
    make, reference = REFERENCES[arch]
    shapes = {name: list(t.shape) for name, t in make().state_dict().items() if not name.endswith("tracked")}
    tensors = random_weights(shapes)
    teachers.save_checkpoint(tmp_path / "t.pth", tensors, {})
    x = clips(3, 33, 37)
    assert_same_logits(teachers.load_teacher(tmp_path / "t.pth")(x), reference(tensors, x))


SMALL: dict[str, Callable[[], nn.Module]] = {
    "cp_mobile": lambda: CPMobile.by_sizes(3, base_channels=16, channels_multiplier=1.3, expansion_rate=1.5),
    "cp_resnet": lambda: CPResNet(3, (4, 2, 6, 5)),
    "bc_resnet": lambda: BCResNet(3, 5),
    "tf_sepnet": lambda: TFSepNet(3, 4),
}


@pytest.mark.parametrize("arch", SMALL)
def test_a_checkpoint_of_any_sizes_is_recognised_by_its_tensors_and_gives_the_same_logits(
    tmp_path: Path, arch: str
) -> None:
    net = SMALL[arch]().eval()
    teachers.save_checkpoint(tmp_path / "net.safetensors", net.state_dict(), {})
    teacher = teachers.load_teacher(tmp_path / "net.safetensors")
    assert (teacher.architecture, teacher.num_classes) == (arch, 3)
    for frames, bins in ((48, 64), (65, 256), (97, 31)):
        x = clips(2, frames, bins)
        torch.testing.assert_close(teacher(x), net(x))
        assert teacher.backbone.embed(x).shape == (2, net.embedding_dim)
    assert set(parts_of(net).values()) == {HEAD, NECK, BACKBONE}
    frames, bins = architectures()[arch].least
    assert torch.isfinite(net(clips(1, frames, bins))).all()
    with pytest.raises(TeacherError, match=f"T={frames - 1}, F={bins}"):
        net(torch.zeros(1, frames - 1, bins))


def test_of_sizes_only_those_of_the_architecture_may_be_given() -> None:
    for given, says in (
        ({"arch": "cp_mobile", "channels": (8, 8, 8, 8)}, "of sizes it has --base-channels, --channels-m"),
        ({"arch": "cnn14", "base_channels": 8}, "cnn14 has no --base-channels; of sizes it has none"),
        ({"arch": "mine:net", "expansion_rate": 2.0}, "mine:net has no --expansion-rate"),
        ({"arch": "cp_mobile", "feature_dim": 8}, "CP-Mobile has no --feature-dim"),
        ({"channels": (8, 8, 8, 8), "feature_dim": 8}, "give one of them"),
        ({"channels": (8, 8, 7, 8)}, "must be even, found 7"),
        ({"arch": "tf_sepnet", "base_channels": 6}, "must be a multiple of 4, found 6"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as refused:
            make_net(Settings("scene", **given), 10)
        assert says in str(refused.value)
    for wrong in ({"expansion_rate": math.nan}, {"base_channels": 0}, {"channels_multiplier": 9.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Settings("scene", **wrong)


def test_a_student_s_sizes_are_kept_with_it(run: Run, tmp_path: Path) -> None:
    """The default architecture, narrow: trained without teachers, measured, and counted from its checkpoint."""
    town = built(tmp_path)
    counts = ("--json-path", town.json_path, "--num-scenes", 3, "--num-cities", 3)
    sizes = {"base_channels": 8, "channels_multiplier": 1.0, "expansion_rate": 1.5}
    args = [text for name, value in sizes.items() for text in (f"--{name.replace('_', '-')}", value)]
    made = run("train", "scene", *counts, "--arch", "cp_mobile", *args, "--epochs", 4, "--warmup-epochs", 1, "--lr",
               0.03, "--ema", 0, "--batch-size", 8, "--json")  # fmt: skip
    assert made.exit_code == 0, made.output
    (report,) = json.loads(made.stdout)["trained"]
    config = yaml.safe_load((Path(report["run"]) / "config.yaml").read_text())
    assert {name: config["settings"][name] for name in sizes} == sizes
    counted = run("student", "complexity", report["checkpoint"], "--shape", "12,20", "--json", *counts[2:])
    assert json.loads(counted.stdout)["parameters"] == complexity(CPMobile.by_sizes(3, **sizes), (12, 20)).parameters
    measured = run("evaluate", report["checkpoint"], *counts, "--json")
    assert json.loads(measured.stdout)["accuracy"] == pytest.approx(report["results"]["test"]["accuracy"])
