"""Views: policies, what is drawn for a view, and its replay to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_cache.dataset.views import Policy, replay_views
from kd_cache.errors import FeatureError, StaleError, UsageError

POLICY = {
    "seed": 3,
    "decibel": 0.25,
    "device_response": {"points": 3, "decibels": [-4, 4]},
    "gain": {"decibels": [-6, 6.5]},
    "roll": {"frames": [-3, 3]},
    "crop": {"frames": [5, 7]},
    "time_masks": {"count": 1, "frames": [0, 2]},
    "frequency_masks": {"count": 2, "bins": [1, 2]},
}


def a_feature() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((8, 5)).astype(np.float16)


def test_known_draws() -> None:
    """Made apart from this code, with hashlib and struct alone: other draws would be another policy's."""
    policy = Policy.of(POLICY)
    assert policy.digest == "8afd3766a22fc19ccf55413a51056bf6be94c08f5176cd8e16b1b87caed4c759"
    expected = [2, 168, 725, 221, 596, 6, 7, 0, 2, 6, 1, 2, 2, 2, 0, 0]
    assert policy.draw(bytes(range(16)), 2, (8, 5)).tolist() == expected
    assert Policy.from_text(policy.text) == policy
    assert policy.size == len(expected)
    assert policy.draw(bytes(range(16)), 0, (8, 5)).tolist() == [0] * len(expected)


def test_each_change_by_hand() -> None:
    x = a_feature().astype(np.float32)
    lowest = x.min()

    def changed(policy: dict[str, object], *values: int) -> np.ndarray:
        return Policy.of(policy).apply(a_feature(), np.array([1, *values, 0, 0]))

    rolled = changed({"roll": {"frames": [-3, 3]}}, 1)
    assert (rolled == np.concatenate([x[2:], x[:2]])).all()
    cropped = changed({"crop": {"frames": [5, 7]}}, 5, 2)
    assert (cropped == np.concatenate([x[2:7], x[2:5]])).all()
    louder = changed({"gain": {"decibels": [-6, 6]}, "decibel": 0.25}, 800)
    assert (louder == x + np.float32(0.5)).all()
    bent = changed({"device_response": {"points": 2, "decibels": [0, 4]}, "decibel": 1}, 0, 400)
    assert (bent == x + np.array([0, 0.625, 2, 3.375, 4], np.float32)).all()
    masked = changed({"time_masks": {"count": 1, "frames": [0, 2]}}, 2, 6)
    assert (masked[6:] == lowest).all()
    assert (masked[:6] == x[:6]).all()
    masked = changed({"frequency_masks": {"count": 1, "bins": [0, 2]}}, 1, 3)
    assert (masked[:, 3] == lowest).all()
    assert (masked[:, 4] == x[:, 4]).all()


def test_replay_is_equal_to_the_bit_and_asserted() -> None:
    policy, clean = Policy.of(POLICY), a_feature()
    made = [policy.augmented("a.npy", view, clean) for view in range(4)]
    assert (made[0][0] == clean).all()
    assert len({array.tobytes() for array, _ in made}) == 4
    inputs, draws = np.stack([clean] * 4), np.stack([draws for _, draws in made])
    assert (replay_views(policy, inputs, draws) == np.stack([array for array, _ in made])).all()
    again = replay_views(policy, torch.from_numpy(inputs), torch.from_numpy(draws))
    assert isinstance(again, torch.Tensor)
    assert again.numpy().tobytes() == b"".join(a.tobytes() for a, _ in made)
    with pytest.raises(StaleError, match="view 3, comes out otherwise"):
        replay_views(policy, np.concatenate([inputs[:3], inputs[3:] + np.float16(1)]), draws)
    replay_views(
        policy, np.concatenate([inputs[:3], inputs[3:] + np.float16(1)]), draws, check=[True, True, True, False]
    )
    with pytest.raises(UsageError, match=r"expected draws \[4, 16\]"):
        replay_views(policy, inputs, draws[:, 1:])


def test_starts_leave_room_for_what_they_begin() -> None:
    policy = Policy.of({"crop": {"frames": [6, 20]}, "time_masks": {"count": 1, "frames": [0, 20]}})
    for view in range(1, 60):
        _, *drawn = policy.draw(bytes(16), view, (8,)).tolist()[:5]
        assert 6 <= drawn[0] <= 8
        assert drawn[0] + drawn[1] <= 8
        assert drawn[2] + drawn[3] <= 8


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[1]", "expected entries"),
        ("{a: b: c", "is not YAML"),
        ("seed: 1", "changes nothing"),
        ("roll: {frames: [0, 2]}\nshear: 1", "no policy has"),
        ("roll: 3", "roll must say frames"),
        ("roll: {frames: [2, 0]}", "frames is .2, 0., expected"),
        ("roll: {frames: [0, 1.5]}", "expected"),
        ("time_masks: {count: 0, frames: [0, 2]}", "count is 0, expected a number between 1 and 16"),
        ("gain: {decibels: [0, 1]}", "what one decibel is"),
        ("gain: {decibels: [0, 0.001]}\ndecibel: 1", "steps of 0.01"),
        ("roll: {frames: [0, 2]}\ndecibel: 1", "no change is in decibels"),
        ("roll: {frames: [0, 2]}\nseed: -1", "seed is -1"),
    ],
)
def test_policies_that_are_none(tmp_path, content: str, why: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=why):
        Policy.load(path)
    with pytest.raises(UsageError, match="cannot read the policy"):
        Policy.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((3, 4, 5), np.float32), "gain, roll of the policy cannot change"),
        (np.zeros(8, np.float32), "which gain of the policy"),
        (np.zeros((8, 5), np.int16), "is of int16"),
    ],
)
def test_inputs_that_a_policy_does_not_fit(array: np.ndarray, why: str) -> None:
    policy = Policy.of({"gain": {"decibels": [0, 1]}, "roll": {"frames": [0, 2]}, "decibel": 1})
    with pytest.raises(FeatureError, match=why):
        policy.augmented("x.npy", 1, array)
