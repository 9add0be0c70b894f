"""Top-k rows: the codec's bytes, what a batch of them is, and the loss towards them."""

from __future__ import annotations

import math
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

from kd_cache.distill.losses import LOSSES, kl
from kd_cache.errors import UsageError
from kd_cache.serve.topk import TopK
from kd_cache.store.topk import TopKCodec


def by_hand(logits: list[float], k: int) -> bytes:
    """The row from its definition, with struct and math alone; ids below 65,537 classes as u16."""
    order = sorted(range(len(logits)), key=lambda number: (-logits[number], number))
    sums = {t: math.log(math.fsum(math.exp(each / t) for each in logits)) for t in (1, 2, 4)}
    left = {t: math.log(math.fsum(math.exp(logits[each] / t) for each in order[k:])) for t in (1, 2, 4)}
    code = "H" if len(logits) <= 65_536 else "I"
    return (
        struct.pack(f"<{k}{code}", *order[:k])
        + struct.pack(f"<{k}e", *(logits[each] - sums[1] for each in order[:k]))
        + struct.pack("<4f", sums[1], *(left[t] - sums[t] for t in (1, 2, 4)))
    )


def drawn(classes: int, rows: int = 1, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(rows, classes))).astype(np.float32)


@pytest.mark.parametrize(("classes", "k", "width"), [(512, 3, 28), (65_536, 2, 24), (65_537, 2, 28), (70_000, 5, 46)])
def test_the_bytes_of_a_row_are_those_of_its_definition(classes: int, k: int, width: int) -> None:
    logits = drawn(classes)
    logits[0, [classes - 1, 7, 300]] = 20.0  # three of the same size: the lower id is first
    codec = TopKCodec(k, classes)
    row = codec.encode(logits)
    assert row.shape == (1, width) == (1, codec.width)
    assert row.tobytes() == by_hand(logits[0].tolist(), k)
    assert codec.split(row)["ids"][0].tolist()[:3] == [7, 300, classes - 1][:k]


def test_the_bytes_of_a_row_stay_the_same() -> None:
    """Known answer: of others every top-k cache would have to be scored again."""
    logits = np.zeros((1, 512), np.float32)
    logits[0, [511, 2, 3]] = 8, 6, 6
    expected = "ff01 0200 0300 dab5 bbc0 bbc0 9ed90541 0b8608c0 86d72ebe 5d8501bd"
    assert TopKCodec(3, 512).encode(logits).tobytes().hex() == expected.replace(" ", "")


@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(512, 700),
    k=st.integers(1, 511),
    scale=st.floats(0, 30),
    levels=st.integers(2, 50),
)
@settings(max_examples=12)
def test_what_is_stored_is_the_distribution_that_was_scored(
    seed: int, classes: int, k: int, scale: float, levels: int
) -> None:
    logits = np.round(drawn(classes, 3, seed, scale) * levels) / levels  # with ties
    codec = TopKCodec(k, classes)
    rows, topk = codec.encode(logits), TopK.of(codec.encode(logits), codec)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(topk.ids.numpy(), order)
    rounded = float(topk.log_probs.abs().max()) * 2**-10  # a step of float16, and as much for what all have together
    for temperature in (1.0, 2.0, 4.0):
        exact = torch.from_numpy(logits).double().div(temperature).log_softmax(dim=1)
        dense = topk.dense(temperature)
        torch.testing.assert_close(dense.exp().sum(dim=1), torch.ones(3), rtol=0, atol=1e-4)
        near = rounded / temperature + 1e-4
        torch.testing.assert_close(dense.gather(1, topk.ids).double(), exact.gather(1, topk.ids), rtol=0, atol=near)
        others = exact.scatter(1, topk.ids, -math.inf).logsumexp(dim=1)
        inside, rest = codec.softened(rows, temperature)
        np.testing.assert_allclose(rest, others.numpy(), rtol=1e-6)
        np.testing.assert_allclose(inside, topk.softened(temperature)[0].numpy(), atol=1e-5)


def batch(k: int = 4, rows: int = 6, teachers: int = 2, classes: int = 600) -> TopK:
    codec = TopKCodec(k, classes)
    return TopK.of(codec.encode(drawn(classes, rows * teachers)).reshape(rows, teachers, -1), codec)


def same(one: TopK, other: TopK) -> bool:
    pairs = ((one.ids, other.ids), (one.log_probs, other.log_probs), (one.rest, other.rest))
    return one.num_classes == other.num_classes and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_a_batch_is_indexed_pickled_collated_and_moved_as_a_tensor_is() -> None:
    topk = batch()
    assert [(each.dtype, list(each.shape)) for each in (topk.ids, topk.log_probs, topk.rest)] == [
        (torch.int64, [6, 2, 4]),
        (torch.float32, [6, 2, 4]),
        (torch.float32, [6, 2, 3]),
    ]
    assert len(topk) == 6
    assert topk.dense().shape == (6, 2, 600)
    assert torch.equal(topk[:, 1].dense(2.0), topk.dense(2.0)[:, 1])
    assert same(pickle.loads(pickle.dumps(topk)), topk)  # noqa: S301 (our own)
    assert same(topk.to("cpu", non_blocking=True), topk)
    (numbers, collated) = default_collate([(number, topk[number]) for number in range(6)])
    assert numbers.tolist() == list(range(6))
    assert same(collated, topk)


def test_a_temperature_that_nobody_kept_is_refused() -> None:
    topk = batch()[:, 0]
    for ask in (topk.dense, lambda t: kl(torch.zeros(6, 600), topk, temperature=t)):
        with pytest.raises(UsageError, match=r"the temperature is 3\.0.* at 1, 2 and 4 only"):
            ask(3.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kl_is_that_of_k_classes_and_the_rest_and_so_is_its_gradient(temperature: float) -> None:
    topk = batch()[:, 0]
    student = torch.from_numpy(drawn(600, 6, seed=9)).double().requires_grad_()
    inside, rest = (each.double() for each in topk.softened(temperature))
    probs = (student / temperature).softmax(dim=1)
    mine = torch.stack([row[ids] for row, ids in zip(probs, topk.ids, strict=True)])
    q, p = torch.cat([mine, 1 - mine.sum(1, keepdim=True)], 1), torch.cat([inside, rest[:, None]], 1).exp()
    expected = temperature**2 * (p * (p / q).log()).sum(dim=1)
    found = kl(student, topk, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    slopes = [torch.autograd.grad(each.sum(), student)[0] for each in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)
    full = kl(student, topk.dense(temperature).double() * temperature, temperature=temperature)
    assert (found <= full + 1e-9).all()
    assert slopes[0].abs().max() > 1e-3
    assert kl(topk.dense(temperature) * temperature, topk, temperature=temperature).abs().max() < 1e-5


def test_a_row_whose_rest_is_nothing_has_a_finite_loss() -> None:
    logits = np.full((1, 600), -3e38, np.float32)
    logits[0, 5] = 3e38
    codec = TopKCodec(1, 600)
    topk = TopK.of(codec.encode(logits), codec)
    assert topk.rest[0, 0] == -math.inf
    assert topk.dense().exp().sum() == 1
    student = torch.zeros(1, 600, requires_grad=True)
    loss = kl(student, topk, temperature=1.0)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor([math.log(600)]))
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"kl"}))
def test_the_other_losses_say_that_they_need_every_class(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} needs the teacher's logit of every class"):
        LOSSES[name](torch.zeros(6, 600), batch()[:, 0])


@pytest.mark.parametrize("shape", [(6, 599), (5, 600), (6, 2, 600)])
def test_a_student_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"expected the student's logits as \[B, 600\] and a TopK \[B, K\]"):
        kl(torch.zeros(shape), batch()[:, 0])
    with pytest.raises(UsageError, match="expected the student's logits"):
        kl(torch.zeros(6, 600), batch())
