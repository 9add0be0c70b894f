"""What workers send arrives as it was, whatever is in a batch."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from store_fixtures import forks
from torch.utils.data import DataLoader, Dataset

from kd_cache.serve import parcel
from kd_cache.serve.parcel import sent_batch, sent_pair

TENSORS = {
    "float32": torch.arange(6.0).reshape(2, 3),
    "float16": torch.arange(6.0).half(),
    "bfloat16": torch.arange(6.0).bfloat16(),
    "bool": torch.tensor([True, False]),
    "int64": torch.arange(5),
    "empty": torch.empty(0, 2),
    "no axes": torch.tensor(3.5),
    "strides": torch.arange(12.0).reshape(3, 4).t()[::2],
    "large": torch.arange(100_000.0),
}
OTHERS: dict[str, Any] = {"array": np.arange(3), "text": "x", "list": [1, 2], "nested": {"tensor": torch.ones(2)}}


class Nothing(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> int:
        return number


def pair(_: list[int]) -> Any:
    return sent_pair({"base": torch.arange(3)}, TENSORS["float32"].clone())


def batch(_: list[int]) -> Any:
    return sent_batch({**TENSORS, **OTHERS})


def same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            same(found[name], value)
    else:
        assert found == expected


@forks
@pytest.mark.parametrize("start", [None, "fork", "spawn"])
def test_a_batch_is_the_same_from_this_process_and_from_a_worker(start: str | None) -> None:
    options: dict[str, Any] = {} if start is None else {"num_workers": 1, "multiprocessing_context": start}
    for received in DataLoader(Nothing(), 2, collate_fn=batch, **options):
        same(received, {**TENSORS, **OTHERS})
    for received in DataLoader(Nothing(), 2, collate_fn=pair, **options):
        assert type(received) is tuple
        same(received[0], {"base": torch.arange(3)})
        same(received[1], TENSORS["float32"])
        received[1].zero_()  # it is the student's own


def test_small_tensors_go_in_the_message_and_others_as_torch_sends_them() -> None:
    packed = {name: isinstance(parcel._packed(tensor), parcel._Array) for name, tensor in TENSORS.items()}
    assert [name for name, is_packed in packed.items() if not is_packed] == ["bfloat16", "large"]
    for odd in (
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, requires_grad=True),
        torch.ones(2, device="meta"),
        torch.eye(3).to_sparse(),
        3,
    ):
        assert parcel._packed(odd) is odd
    sent = pickle.loads(pickle.dumps(parcel._Pair((1, TENSORS["int64"]))))  # noqa: S301 (our own)
    same(sent[1], TENSORS["int64"])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(3, dtype=torch.complex64).conj().imag,
        torch.zeros(3, dtype=torch.float8_e5m2),
        torch.zeros(3, dtype=torch.bfloat16),
    ],
)
def test_tensors_that_are_no_plain_arrays_travel_as_torch_sends_them(tensor: torch.Tensor) -> None:
    assert parcel._packed(tensor) is tensor
