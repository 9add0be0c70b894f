"""Reproducible scoring: the plan, the slots, the numerics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_teachers import Linear

from kd_cache.dataset.features import FeatureSource
from kd_cache.errors import FeatureError, UsageError
from kd_cache.score.batcher import Batcher
from kd_cache.score.device import numerics, resolve_device
from kd_cache.score.engine import Engine
from kd_cache.score.planning import Places, count_shapes, places_of
from kd_cache.store.plan import BatchPlan, Place, load_plan

CPU = torch.device("cpu")
ONLY = frozenset({"tiny"})


def score(order: list[int], arrays: np.ndarray, size: int) -> np.ndarray:
    """Score samples in some order, each at the slot of its number; rows by number."""
    out = np.full((len(arrays), 10), np.nan, np.float32)
    with numerics(CPU, "fp32", 42):
        batcher = Batcher(Engine({"tiny": Linear(1)}, CPU))
        batches = [b for n in order for b in batcher.add(n, arrays[n], ONLY, Place(size, n % size))]
        for scored in [*batches, *batcher.finish()]:
            out[scored.numbers] = scored.logits["tiny"]
    return out


@given(
    order=st.permutations(range(13)),
    left_out=st.sets(st.integers(0, 12), max_size=11),
    size=st.sampled_from([1, 2, 5, 16]),
)
def test_a_row_has_the_same_bits_whatever_is_scored_with_it_and_in_which_order(
    order: list[int], left_out: set[int], size: int
) -> None:
    arrays = np.random.default_rng(0).normal(size=(13, 7, 20)).astype(np.float32)
    reference = score(list(range(13)), arrays, size)
    chosen = [number for number in order if number not in left_out]
    assert score(chosen, arrays, size)[chosen].tobytes() == reference[chosen].tobytes()


def test_sparse_rows_share_batches_instead_of_filling_one_each() -> None:
    batcher = Batcher(Engine({"tiny": Linear(1)}, CPU))
    arrays = np.zeros((256, 4, 20), np.float32)
    chosen = range(0, 256, 3)  # every third row is stale; in one open batch at a time, each would hold 11 of 32
    batches = [b for n in chosen for b in batcher.add(n, arrays[n], ONLY, Place(32, n % 32))]
    batches += batcher.finish()
    assert sorted(number for scored in batches for number in scored.numbers) == list(chosen)
    assert len(batches) == 3


@given(counts=st.dictionaries(st.tuples(st.integers(1, 99), st.just(64)), st.integers(1, 5000), min_size=1))
def test_a_plan_wastes_at_most_half_of_a_rare_shapes_only_batch(counts: dict[tuple[int, int], int]) -> None:
    plan = BatchPlan.from_counts(counts, 32)
    for shape, count in counts.items():
        assert plan.batches[shape] <= 32
        assert plan.batches[shape] < 2 * count or count == 1
        assert plan.batches[shape] >= min(count, 32)


def test_a_plan_survives_the_disk_and_keeps_its_sizes_when_extended(tmp_path: Path) -> None:
    plan = BatchPlan.from_counts({(10, 64): 100, (12, 64): 3}, 32)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    longer = BatchPlan.from_counts({(10, 64): 1, (12, 64): 50, (14, 64): 7}, 8, earlier=plan)
    assert longer.batches == {(10, 64): 32, (12, 64): 4, (14, 64): 8}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"batches": {"axb": 1}}', "[" * 9999, '{"batch_size": true}'])
def test_a_damaged_plan_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    assert load_plan(tmp_path / "plan.json") is None
    assert load_plan(tmp_path / "absent.json") is None


def test_shapes_are_counted_from_headers_and_bad_features_only_when_asked(tmp_path: Path) -> None:
    for name, shape in (("a", (3, 5)), ("b", (4, 5)), ("c", (3, 5))):
        np.save(tmp_path / f"{name}.npy", np.zeros(shape, np.float32))
    (tmp_path / "d.npy").write_bytes(b"no")
    source = FeatureSource(tmp_path)
    files = [f"{name}.npy" for name in "abcd"]
    assert count_shapes(source, files, skip_bad=True) == {(3, 5): 2, (4, 5): 1}
    with pytest.raises(FeatureError, match=r"d\.npy"):
        count_shapes(source, files, skip_bad=False)
    with pytest.raises(FeatureError, match="no feature"):
        BatchPlan.from_counts({}, 32)
    plan = BatchPlan.from_counts({(3, 5): 2, (4, 5): 1}, 2)
    assert places_of(source, files, plan) == {"a.npy": Place(2, 0), "b.npy": Place(1, 0), "c.npy": Place(2, 1)}


def test_ranks_count_each_shape_for_itself() -> None:
    places = Places()
    assert [places.next_rank(shape) for shape in [(1, 2), (3, 2), (1, 2), (1, 2)]] == [0, 0, 1, 2]


def test_numerics_are_deterministic_inside_and_put_back_outside() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    state = torch.random.get_rng_state()
    try:
        with numerics(CPU, "fp32", 1):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            assert torch.is_inference_mode_enabled()
            first = torch.rand(3)
        with numerics(CPU, "fp32", 1):
            assert torch.equal(torch.rand(3), first)
        assert torch.backends.cuda.matmul.allow_tf32
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.equal(torch.random.get_rng_state(), state)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precisions_compute_in_half_precision(precision: str, dtype: torch.dtype) -> None:
    with numerics(CPU, precision, 1):
        assert torch.nn.Linear(4, 4)(torch.ones(2, 4)).dtype == dtype


def test_tf32_on_a_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="CUDA"), numerics(CPU, "tf32", 1):
        pass


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cpu:cuda", "cuda:99"])
def test_an_unknown_or_absent_device_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        resolve_device(name)
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("devices", "rank", "expected"),
    [(0, None, "cpu"), (0, "3", "cpu"), (4, None, "cuda"), (4, "3", "cuda:3"), (2, "3", "cuda:1"), (4, "x", "cuda")],
)
def test_auto_takes_the_gpu_of_the_local_rank(
    monkeypatch: pytest.MonkeyPatch, devices: int, rank: str | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert resolve_device("auto") == torch.device(expected)


def test_a_plan_in_which_a_number_changed_is_no_plan(tmp_path: Path) -> None:
    """Another batch size would silently make other last bits; only the first version wrote no digest."""
    path = tmp_path / "plan.json"
    BatchPlan(8, 4, {(12, 4): 8, (16, 4): 2}).save(path)
    whole = path.read_text()
    assert load_plan(path) is not None
    for old, new in (('"batch_size": 8', '"batch_size": 9'), ('"12x4": 8', '"12x4": 4'), ('"bins": 4', '"bins": 5')):
        assert whole.count(old) == 1
        path.write_text(whole.replace(old, new))
        assert load_plan(path) is None
    content = json.loads(whole)
    del content["digest"]
    path.write_text(json.dumps(content))
    assert load_plan(path) == BatchPlan(8, 4, {(12, 4): 8, (16, 4): 2})
