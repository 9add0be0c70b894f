"""Samples as arrays are the same samples."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_cache.dataset.manifest import Sample
from kd_cache.serve.sample_columns import SampleColumns

label = st.none() | st.integers(0, 20)
sample = st.builds(
    Sample, st.text(max_size=9), label, label, st.integers(0, 8), st.sampled_from(["A", "b"]), st.just("train"),
    st.none() | st.just("train"), st.none() | st.text(max_size=3),
)  # fmt: skip


@given(st.lists(sample, max_size=8))
def test_samples_come_back_as_they_were(samples: list[Sample]) -> None:
    columns = SampleColumns(samples)
    assert list(columns) == samples
    assert columns[:] == samples
    assert columns[1::2] == samples[1::2]
    assert [columns[-number] for number in range(1, len(samples) + 1)] == samples[::-1]
    assert list(pickle.loads(pickle.dumps(columns))) == samples  # noqa: S301 (our own)
    for outside in (len(samples), -len(samples) - 1):
        with pytest.raises(IndexError):
            columns[outside]
