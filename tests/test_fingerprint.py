"""What made a number: a fingerprint changes if, and only if, something that made it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd_cache.errors import TeacherError, UsageError
from kd_cache.score.storage_cost import StorageCost, kl_divergence
from kd_cache.store.origin import FORMAT_VERSION, Fingerprint, canonical_json, class_order, weights_digest

small = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines may be busy
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
PARTS = st.dictionaries(TEXT, TEXT, max_size=5)


def state() -> dict[str, torch.Tensor]:
    """One tensor of each kind."""
    draw = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 2, 2, generator=draw),
        "bn.running_mean": torch.randn(4, generator=draw),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.randn(3, generator=draw).half(),
        "brain": torch.randn(3, 5, generator=draw).bfloat16(),
        "double": torch.randn(2, generator=draw).double(),
        "count": torch.tensor([1, -2, 3]),
        "mask": torch.tensor([True, False]),
        "byte": torch.tensor([1, 255], dtype=torch.uint8),
        "scale": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
    }


# -- the weights' digest -----------------------------------------------------------------------------------------------


def test_neither_order_nor_memory_layout_nor_gradients_matter() -> None:
    weights = state()
    other = {name: tensor.clone() for name, tensor in reversed(weights.items())}
    other["conv.weight"] = weights["conv.weight"].contiguous(memory_format=torch.channels_last)
    other["brain"] = weights["brain"].t().contiguous().t()
    other["bn.running_mean"] = torch.stack([weights["bn.running_mean"], torch.zeros(4)], dim=1)[:, 0]
    other["double"] = torch.nn.Parameter(weights["double"].clone())
    assert not any(other[name].is_contiguous() for name in ("conv.weight", "brain", "bn.running_mean"))
    assert weights_digest(other) == weights_digest(weights)
    assert weights_digest({"a": torch.ones(1).expand(3, 4)}) == weights_digest({"a": torch.ones(3, 4)})


def test_the_number_of_batches_seen_does_not_matter() -> None:
    weights = state()
    digest = weights_digest(weights)
    assert weights_digest(weights | {"bn.num_batches_tracked": torch.tensor(8)}) == digest
    assert weights_digest({k: v for k, v in weights.items() if k != "bn.num_batches_tracked"}) == digest
    assert weights_digest(weights | {"num_batches_tracked": torch.tensor(8)}) == digest


def test_loading_and_saving_does_not_matter(tmp_path: Any) -> None:
    import safetensors.torch

    weights = state()
    torch.save(weights, tmp_path / "w.pth")
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    assert weights_digest(torch.load(tmp_path / "w.pth", weights_only=True)) == weights_digest(weights)
    assert weights_digest(safetensors.torch.load_file(tmp_path / "w.safetensors")) == weights_digest(weights)


def test_an_entry_that_is_no_tensor_is_refused_by_name() -> None:
    with pytest.raises(TeacherError, match=r"net\._extra_state is not a tensor but dict") as caught:
        weights_digest({"net._extra_state": {"a": 1}})  # type: ignore[dict-item]
    assert "weights" in str(caught.value.hint)


def documented(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, dtype and shape as JSON and the bytes of each tensor, but for counters of batches, by name.

    So any other name, shape, dtype, byte or absence is another digest: none of these can stand for another.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        is_counter = tensor.ndim == 0 and not tensor.is_floating_point()
        if not is_counter or name.rpartition(".")[2] != "num_batches_tracked":
            dtype = str(tensor.dtype).split(".")[1]
            digest.update(json.dumps([name, dtype, list(tensor.shape)], separators=(",", ":")).encode())
            bits = tensor.reshape(-1).view(torch.int16) if dtype == "bfloat16" else tensor.reshape(-1)
            digest.update(bits.numpy().tobytes())
    return digest.hexdigest()


NAMES = st.sampled_from(["a", "b", "ab", "my_num_batches_tracked", "num_batches_tracked", "bn.num_batches_tracked"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
TENSORS = st.builds(
    lambda values, dtype, shape: torch.tensor(values).to(dtype).reshape(shape),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0]), min_size=4, max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from([(4,), (2, 2), (4, 1), (1, 4, 1)]),
) | st.sampled_from([torch.tensor(1.0), torch.tensor(3), torch.zeros(0), torch.zeros(0, 4)])


@small
@given(st.dictionaries(NAMES, TENSORS, max_size=4))
def test_the_weights_digest_is_what_it_is_documented_to_be(weights: dict[str, torch.Tensor]) -> None:
    assert weights_digest(weights) == documented(weights)
    assert weights_digest(state() | weights) == documented(state() | weights)


def test_weights_digests_stay_the_same() -> None:
    # Part of every fingerprint. Another value here means that the rows of every teacher of every user turn stale, and
    # all of them must be scored again: change it with a new FORMAT_VERSION only.
    weights = {"a": torch.arange(4.0).reshape(2, 2), "b": torch.tensor(1.5).bfloat16(), "é": torch.tensor([1])}
    assert weights_digest(weights) == "45bf17fb52599a0028ff64a45aceedd73ebf368637600ec8b7a96500c7d77894"


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_fingerprints_stay_the_same() -> None:
    # From `printf '{"architecture":"cnn14/1","weights":"00é"}' | sha256sum`. Another value here turns every row of
    # every cache stale: the canonical text of the parts must never change under one FORMAT_VERSION.
    fingerprint = Fingerprint({"weights": "00é", "architecture": "cnn14/1"})
    assert fingerprint.digest == "03784629c85f6481de07b07c0d20eaf2d550f8141773f921eaeb6d11964d2927"
    assert FORMAT_VERSION == 1


def test_the_digest_is_the_sha256_of_the_canonical_json() -> None:
    parts = {"b": 'x"\\\n', "a": "é\u2028\U0001f600", "": ""}
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert Fingerprint(parts).digest == hashlib.sha256(text.encode()).hexdigest()


@small
@given(PARTS, PARTS)
def test_a_digest_changes_exactly_if_a_part_does(mine: dict[str, str], theirs: dict[str, str]) -> None:
    a, b = Fingerprint(mine), Fingerprint(theirs)
    assert (a.digest == b.digest) == (mine == theirs) == (a.differing_parts(b) == [])
    assert Fingerprint(dict(reversed(mine.items()))).digest == a.digest


def test_absent_and_present_parts_differ_by_name() -> None:
    mine, theirs = Fingerprint({"a": "1", "b": "2"}), Fingerprint({"b": "3", "c": "4"})
    assert mine.differing_parts(theirs) == ["a", "b", "c"]
    assert mine.difference(theirs) == "a: 1 → absent; b: 2 → 3; c: absent → 4"
    assert mine.difference(mine) == ""


def test_long_parts_are_shortened_in_a_difference() -> None:
    mine, theirs = Fingerprint({"weights": "a" * 64}), Fingerprint({"weights": "b" * 64})
    assert mine.difference(theirs) == f"weights: {'a' * 20}… → {'b' * 20}…"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes", np.float32(1)])
def test_what_has_no_one_json_text_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        canonical_json({"a": value})


@small
@given(st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | TEXT | st.lists(st.integers(), max_size=3)))
def test_canonical_json_reads_back_and_does_not_depend_on_order(content: dict[str, Any]) -> None:
    text = canonical_json(content)
    assert json.loads(text) == content
    assert canonical_json(dict(reversed(content.items()))) == text


# -- class order -------------------------------------------------------------------------------------------------------


def test_class_orders_tell_names_counts_and_orders_apart() -> None:
    names = ["airport", "bus", "metro"]
    orders = {class_order(given_names, 3) for given_names in (None, names, names[::-1], ["airport", "bus", "tram"])}
    assert len(orders) == 4
    assert class_order(None, 3) == "0..2"
    assert class_order(None, 10) == "0..9"
    assert class_order(["a,b", "c"], 2) != class_order(["a", "b,c"], 2)


def test_many_classes_are_digested() -> None:
    names = [f"class {number}" for number in range(527)]
    assert class_order(names, 527).startswith("sha256:")
    assert class_order(names, 527) != class_order(names[::-1], 527)
    assert len(class_order(names, 527)) < 100


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b", "c"]])
def test_a_wrong_number_of_class_names_is_refused_with_both_numbers(names: list[str]) -> None:
    with pytest.raises(UsageError, match=f"expected 2 class names, one per class, found {len(names)}"):
        class_order(names, 2)


# -- what half precision costs -----------------------------------------------------------------------------------------


def torch_kl(of: np.ndarray, to: np.ndarray) -> np.ndarray:
    log_p, log_q = (torch.from_numpy(x.astype(np.float64)).log_softmax(dim=1) for x in (of, to))
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1).numpy()


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_the_divergence_is_that_of_torch(scale: float) -> None:
    draw = np.random.default_rng(0)
    of, to = draw.normal(scale=scale, size=(2, 50, 10))
    np.testing.assert_allclose(kl_divergence(of, to), torch_kl(of, to), rtol=1e-9, atol=1e-12)
    assert kl_divergence(np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]])) == pytest.approx(1e4)


def test_the_divergence_of_equal_rows_is_zero_and_never_below() -> None:
    rows = np.random.default_rng(0).normal(scale=5, size=(200, 10))
    assert (kl_divergence(rows, rows) == 0).all()
    assert (kl_divergence(rows, rows + 1e-9) >= 0).all()
    np.testing.assert_allclose(kl_divergence(rows, rows + 3), 0, atol=1e-12)


def test_the_cost_of_half_precision_is_counted_over_all_rows_as_torch_counts_it() -> None:
    exact = np.random.default_rng(0).normal(scale=3, size=(300, 10)).astype(np.float32)
    exact[7, :2] = 12.0, 12.001  # half precision cannot tell these apart
    stored = exact.astype(np.float16)
    cost = StorageCost("logits")
    assert cost.as_json() == {"rows": 0, "kl_mean": 0.0, "kl_max": 0.0, "argmax_flips": 0}
    for part in (slice(0, 1), slice(1, 100), slice(100, 100), slice(100, 300)):
        cost.add(exact[part], stored[part])
    expected = torch_kl(exact, stored)
    flips = (torch.from_numpy(exact).argmax(1) != torch.from_numpy(stored.astype(np.float32)).argmax(1)).sum()
    found = cost.as_json()
    assert found["rows"] == 300
    assert found["kl_mean"] == pytest.approx(expected.mean(), rel=1e-6)
    assert found["kl_max"] == pytest.approx(expected.max(), rel=1e-6)
    assert found["argmax_flips"] == flips >= 1
    # The budget of the project for stored logits at C = 10.
    assert found["kl_mean"] <= 1e-6
    assert found["kl_max"] <= 1e-4


@pytest.mark.parametrize("kind", ["probs", "sigmoid"])
def test_rows_that_are_no_logits_cost_their_largest_absolute_error(kind: str) -> None:
    exact = np.random.default_rng(0).uniform(size=(40, 5)).astype(np.float32)
    stored = exact.astype(np.float16)
    cost = StorageCost(kind)
    cost.add(exact, stored)
    error = np.abs(exact - stored.astype(np.float64)).max(axis=1)
    assert cost.as_json() == {
        "rows": 40,
        "absolute_error_mean": pytest.approx(error.mean()),
        "absolute_error_max": pytest.approx(error.max()),
        "argmax_flips": int((exact.argmax(1) != stored.argmax(1)).sum()),
    }
