"""Freezing: what a stage trains moves, everything else stays bit for bit; heads of every depth survive a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import kaiming
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd_cache.errors import TrainingError, UsageError
from kd_cache.store.origin import weights_digest
from kd_cache.train.freezing import BACKBONE, HEAD, NECK, UNUSED, Frozen, parts_of, trainable_parameters
from kd_cache.train.layers import mlp
from kd_cache.train.nets import Standardised
from kd_cache.train.state_dicts import CITY_ENTRY, HEAD_ENTRY
from teachers import CNN14, City2Scene, CPResNet, load_teacher, save_checkpoint

CHANNELS = (2, 2, 2, 4, 4, 4)


def seeded(net: nn.Module, seed: int = 0) -> Any:
    kaiming(net, seed)
    return net


def cnn14(classes: int = 4, hidden: tuple[int, ...] = (5, 5), projection: tuple[int, int] | None = None) -> CNN14:
    return seeded(CNN14(classes, CHANNELS, 6, hidden, projection))  # type: ignore[no-any-return]


def cp_resnet(classes: int = 4) -> CPResNet:
    return seeded(CPResNet(classes, (2, 2, 4, 6)))  # type: ignore[no-any-return]


def on(city: nn.Module, head: Callable[[int], nn.Module]) -> City2Scene:
    return City2Scene(city, seeded(head(city.embedding_dim), 1))  # type: ignore[arg-type]


def linear(inputs: int) -> nn.Linear:
    return nn.Linear(inputs, 3)


def deep(inputs: int) -> nn.Sequential:
    return mlp(inputs, (5,), 3, 0.3)


def standardised(inputs: int) -> Standardised:
    draw = torch.Generator().manual_seed(2)
    return Standardised(seeded(nn.Linear(inputs, 3)), torch.randn(50, inputs, generator=draw) * 3 + 1)


NETS: dict[str, Callable[[], nn.Module]] = {
    "cnn14": cnn14,
    "cnn14 with a projection": lambda: cnn14(projection=(5, 4)),
    "cnn14 with a linear classifier": lambda: cnn14(hidden=()),
    "cp_resnet": cp_resnet,
    "city2scene on cnn14": lambda: on(cnn14(), linear),
    "city2scene on cp_resnet": lambda: on(cp_resnet(), deep),
    "city2scene on cnn14, standardised": lambda: on(cnn14(), standardised),
    "city2scene on cp_resnet, standardised": lambda: on(cp_resnet(), standardised),
}
every_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def expected_part(name: str) -> str:
    """The parts as they are documented, said again from a tensor's name alone."""
    if name.startswith("scene_head."):
        return HEAD
    bare = name.removeprefix("city_model.")
    if bare.startswith(("classifier.", "head.")):
        return UNUSED if bare != name else HEAD
    neck = ("feature_extractor.fc1.", "feature_extractor.bn1.", "feature_extractor.projection_head.", "block4.")
    return NECK if bare.startswith(neck) else BACKBONE


TRAINED = {2: {HEAD}, 1: {HEAD, NECK}, 0: {HEAD, NECK, BACKBONE}}


def clips(net: nn.Module, count: int = 8) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    inner = net.city_model if isinstance(net, City2Scene) else net
    shape = (33, 32) if isinstance(inner, CNN14) else (6, 18)
    return torch.randn(count, *shape, generator=draw)


def train(net: nn.Module, frozen: Frozen, steps: int = 3) -> None:
    """Steps whose gradients reach every parameter that trains, large enough to move it."""
    torch.manual_seed(11)
    frozen.train()
    x = clips(net)
    labels = torch.arange(len(x)) % 3
    optimiser = torch.optim.AdamW([parameter for _, parameter in trainable_parameters(net)], lr=0.05)
    for _ in range(steps):
        F.cross_entropy(net(x), labels).backward()
        optimiser.step()
        optimiser.zero_grad()


def copied(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def moved(before: dict[str, Tensor], net: nn.Module) -> set[str]:
    return {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}


# -- parts -------------------------------------------------------------------------------------------------------------


@every_net
def test_every_tensor_has_the_part_that_is_documented(make: Callable[[], nn.Module]) -> None:
    net = make()
    parts = parts_of(net)
    assert list(parts) == list(net.state_dict())
    assert parts == {name: expected_part(name) for name in net.state_dict()}
    present = {HEAD, NECK, BACKBONE} | ({UNUSED} if isinstance(net, City2Scene) else set())
    assert set(parts.values()) == present


def test_a_head_by_itself_is_all_head() -> None:
    head = standardised(6)
    assert parts_of(head) == dict.fromkeys(["mean", "scale", "head.weight", "head.bias"], HEAD)


@every_net
def test_each_level_trains_its_parts_and_says_how_much(make: Callable[[], nn.Module]) -> None:
    net = make()
    named = dict(net.named_parameters())
    for level in (2, 1, 0):
        for parameter in net.parameters():
            parameter.requires_grad_(level == 2)
        frozen = Frozen.at(net, level)
        trained = {name for name in named if expected_part(name) in TRAINED[level]}
        assert {name for name, parameter in named.items() if parameter.requires_grad} == trained
        assert {name for name, _ in trainable_parameters(net)} == trained
        assert frozen.names == {name for name in net.state_dict() if expected_part(name) not in TRAINED[level]}
        assert frozen.trainable == sum(named[name].numel() for name in trained)
        if frozen.names:
            digest = weights_digest({name: net.state_dict()[name] for name in frozen.names})
            said = f"level {level}: {len(frozen.names)} tensors are frozen (sha256 {digest[:16]}…), 0 of their "
            assert str(frozen) == f"{said}parameters train, {frozen.trainable:,} others do"
        else:
            assert str(frozen) == f"level {level}: nothing is frozen, {frozen.trainable:,} parameters train"


# -- training ----------------------------------------------------------------------------------------------------------


@every_net
def test_stages_in_turn_move_what_each_trains_and_nothing_else(make: Callable[[], nn.Module]) -> None:
    net = make()
    parts = parts_of(net)
    constants = {"scene_head.mean", "scene_head.scale"}
    for level in (2, 1, 0, 2):
        frozen = Frozen.at(net, level)
        before = copied(net)
        train(net, frozen)
        frozen.check()
        trained = {name for name, part in parts.items() if part in TRAINED[level]}
        assert trained - constants <= moved(before, net) <= trained


@pytest.mark.parametrize("make", [cnn14, lambda: on(cnn14(), standardised)], ids=["cnn14", "city2scene"])
def test_dropout_in_a_frozen_backbone_is_off(make: Callable[[], nn.Module]) -> None:
    net = make()
    inner: Any = net.city_model if isinstance(net, City2Scene) else net
    x = clips(net)
    expected = copy.deepcopy(inner).eval().embed(x)
    Frozen.at(net, 2).train()
    assert torch.equal(inner.embed(x), inner.embed(x))
    torch.testing.assert_close(inner.embed(x), expected)
    assert torch.equal(net(x), net(x)) != isinstance(net, CNN14)  # whose head, which trains, has dropout
    Frozen.at(net, 0).train()
    assert not torch.equal(inner.embed(x), inner.embed(x))


def test_nothing_is_dropped_behind_a_frozen_block_of_a_net_whose_neck_trains() -> None:
    net, seen = cnn14(), []
    Frozen.at(net, 1).train()
    assert net.feature_extractor.training
    last = net.feature_extractor.get_submodule("conv_block6")
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    x = clips(net)
    net(x), net(x)
    assert torch.equal(*seen)


@settings(max_examples=20)
@given(st.lists(st.sampled_from([2, 1, 0]), min_size=1, max_size=4), st.sampled_from(sorted(NETS)))
def test_freezing_again_depends_on_the_last_level_alone(levels: list[int], name: str) -> None:
    net, fresh = NETS[name](), NETS[name]()
    for level in levels:
        last = Frozen.at(net, level)
        last.train()
    alone = Frozen.at(fresh, levels[-1])
    alone.train()
    assert (last.names, last.digest, last.trainable) == (alone.names, alone.digest, alone.trainable)
    assert {n for n, _ in trainable_parameters(net)} == {n for n, _ in trainable_parameters(fresh)}
    assert [m.training for m in net.modules()] == [m.training for m in fresh.modules()]


# -- the proof ---------------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("level", [2, 1, 0])
def test_whatever_of_the_frozen_changes_or_may_train_again_is_found(make: Callable[[], nn.Module], level: int) -> None:
    net = make()
    frozen = Frozen.at(net, level)
    with torch.no_grad():
        for _, parameter in trainable_parameters(net):
            parameter.add_(1)
    frozen.check()
    state = net.state_dict()
    for name in sorted(name for name in frozen.names if not name.endswith("num_batches_tracked")):
        value = state[name].view(-1)[0].clone()
        state[name].view(-1)[0] = torch.nextafter(value, value + 1)
        with pytest.raises(TrainingError, match=f"frozen at level {level} changed"):
            frozen.check()
        state[name].view(-1)[0] = value
        frozen.check()
    for name, parameter in net.named_parameters():
        if name in frozen.names:
            parameter.requires_grad_(True)
            with pytest.raises(TrainingError) as caught:
                frozen.check()
            assert name in caught.value.message
            parameter.requires_grad_(False)
    if level:
        net.train()
        net(clips(net))  # batch norms move their statistics
        with pytest.raises(TrainingError, match="changed while it was frozen"):
            frozen.check()


# -- nets of a user's own ----------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A net that says nothing of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.out = nn.Linear(6, 3)

    def embed(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x.mean(dim=1))
        return found

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.embed(x))
        return found


class Telling(Own):
    """A net that says where its head is."""

    classifier_prefix = "out."


class WithNeck(Telling):
    neck_prefixes = ("inner.1.",)


@pytest.mark.parametrize("level", [2, 1])
def test_a_net_that_says_nothing_of_its_parts_trains_as_a_whole_or_not_at_all(level: int) -> None:
    net = Own()
    assert set(parts_of(net).values()) == {BACKBONE}
    with pytest.raises(UsageError, match=f"Own has no part to train at freeze level {level}") as caught:
        Frozen.at(net, level)
    assert caught.value.exit_code == 2
    assert "classifier_prefix" in str(caught.value)
    whole = Frozen.at(net, 0)
    assert whole.names == frozenset()
    assert whole.trainable == sum(parameter.numel() for parameter in net.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(("make", "level", "trained"), [
    (Telling, 2, {"out.weight", "out.bias"}),
    (Telling, 1, {"out.weight", "out.bias"}),
    (WithNeck, 2, {"out.weight", "out.bias"}),
    (WithNeck, 1, {"inner.1.weight", "inner.1.bias", "out.weight", "out.bias"}),
])  # fmt: skip
def test_a_net_that_names_its_head_and_neck_trains_them_alone(
    make: Callable[[], Telling], level: int, trained: set[str]
) -> None:
    net = make()
    frozen = Frozen.at(net, level)
    assert {name for name, _ in trainable_parameters(net)} == trained
    before = copied(net)
    frozen.train()
    net(torch.randn(16, 4, 7))
    frozen.check()
    assert moved(before, net) <= {"inner.1.running_mean", "inner.1.running_var", "inner.1.num_batches_tracked"}
    assert (parts_of(net)["inner.1.running_mean"] == NECK) == (make is WithNeck)


# -- a head over standardised embeddings -------------------------------------------------------------------------------


def embeddings(count: int = 200, width: int = 12, seed: int = 0) -> Tensor:
    """Directions of very different size, never negative, as ReLU leaves them."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draw).relu() * torch.logspace(-2, 2, width)


HEADS: dict[str, Callable[[int], Any]] = {
    "linear": lambda inputs: nn.Linear(inputs, 5),
    "one layer": lambda inputs: mlp(inputs, (), 5, 0.0),
    "two hidden layers": lambda inputs: mlp(inputs, (9, 7), 5, 0.3),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)


@every_head
def test_a_folded_head_is_the_same_function_and_a_plain_one(make: Callable[[int], Any]) -> None:
    for constant in (None, 0.0, 1.0, 3.7, 100.0):
        x, unseen = embeddings(), embeddings(seed=1)
        if constant is not None:
            x[:, 3] = unseen[:, 3] = constant
        made = Standardised(seeded(make(12)), x).eval()
        before = copied(made)
        plain = made.folded()
        assert type(plain) is type(made.head)
        assert plain.state_dict().keys() == make(12).state_dict().keys()
        with torch.no_grad():
            torch.testing.assert_close(plain.eval()(unseen), made(unseen), rtol=1e-5, atol=1e-5)
        assert not moved(before, made)


@pytest.mark.parametrize("constant", [0.0, 1.0, 3.7, 100.0])
def test_a_constant_column_says_nothing_and_cannot_drown_the_others(constant: float) -> None:
    """A clip in which a unit that never fired does so gives logits of the same order as any other."""
    from sklearn.preprocessing import StandardScaler

    x = embeddings()
    x[:, 3] = constant
    head = seeded(nn.Linear(12, 5))
    made = Standardised(copy.deepcopy(head), x).eval()
    unseen = embeddings(seed=1)
    unseen[:, 3] = constant + 0.01
    scaler = StandardScaler().fit(x.double().numpy())
    scaled = torch.from_numpy(scaler.transform(unseen.double().numpy())).float()
    with torch.no_grad():
        torch.testing.assert_close(made(unseen), head(scaled), rtol=1e-3, atol=1e-3)


# -- in a checkpoint ---------------------------------------------------------------------------------------------------

SUFFIXES = [".safetensors", ".pth"]


def city2scene_tensors(city: nn.Module, head: nn.Module) -> dict[str, Tensor]:
    entries = {CITY_ENTRY: city.state_dict(), HEAD_ENTRY: head.state_dict()}
    return {f"{entry}.{name}": tensor for entry, state in entries.items() for name, tensor in state.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("city", [cnn14, cp_resnet], ids=["cnn14", "cp_resnet"])
@pytest.mark.parametrize("hidden", [None, (), (7,), (5, 6, 7)], ids=str)
def test_a_city2scene_teacher_with_any_head_is_loaded_as_it_was_saved(
    tmp_path: Path, suffix: str, city: Callable[[int], Any], hidden: tuple[int, ...] | None
) -> None:
    backbone = city(12)
    width = backbone.embedding_dim
    head = seeded(nn.Linear(width, 10) if hidden is None else mlp(width, hidden, 10, 0.3), 1)
    tensors = city2scene_tensors(backbone, head)
    numbers = ("",) if hidden is None else tuple(f"{3 * layer}." for layer in range(len(hidden) + 1))
    for number in numbers:
        assert f"scene_head_state_dict.{number}weight" in tensors
    path = tmp_path / f"t{suffix}"
    save_checkpoint(path, tensors, {"role": "city2scene"})
    teacher = load_teacher(path, role="city2scene", num_classes=10, num_cities=12)
    loaded = teacher.net.state_dict()
    used = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    for name, tensor in used.items():
        own = name.replace(CITY_ENTRY, "city_model").replace(HEAD_ENTRY, "scene_head")
        assert torch.equal(loaded[own], tensor)
    assert loaded.keys() == City2Scene(backbone, head).state_dict().keys()
    x = clips(backbone)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), City2Scene(backbone, head).eval()(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(teacher(x), teacher(x))
