"""Augmentation: what each change may do to a clip, that a seed means one thing, and that the input is never touched."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from kd_cache.errors import UsageError
from kd_cache.train.augment import Mixed, augmented
from kd_cache.train.settings import LEVELS, Augmentation

ONE_CHANGE = {
    "time_roll": 0.5,
    "time_mask": 0.4,
    "freq_mask": 0.4,
    "mixup": 0.3,
    "freq_mixstyle": 1.0,
    "device_response": 1.0,
}
EVERY = {name: Augmentation(**{name: value}) for name, value in ONE_CHANGE.items()} | {
    "all": Augmentation(**ONE_CHANGE)
}
HOW = pytest.mark.parametrize("how", EVERY.values(), ids=EVERY)


def clips(
    batch: int = 4, frames: int = 20, bins: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, bins, generator=chance, dtype=torch.float64).to(dtype)


def changed(x: Tensor, seed: int = 0, **values: float) -> Mixed:
    return augmented(x, Augmentation(**values), torch.Generator().manual_seed(seed))


def close(one: Tensor, other: Tensor, most: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= most)


# -- every change ------------------------------------------------------------------------------------------------------


@HOW
def test_every_change_keeps_the_contract(how: Augmentation) -> None:
    """A seed means one thing; a generator goes on; nothing global is used or moved; the input is never touched."""
    x = clips(batch=8)
    before = x.clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, again, other = (augmented(x, how, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    for first, second in zip(one, again, strict=True):
        assert first is second is None or torch.equal(first, second)
    assert not torch.equal(one.features, other.features)
    assert (one.share is not None) == (one.partner is not None) == bool(how.mixup)
    chance = torch.Generator().manual_seed(3)
    assert not torch.equal(augmented(x, how, chance).features, augmented(x, how, chance).features)
    assert not torch.equal(one.features, x)
    assert not how.is_off
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)  # the same clips, laid out otherwise
    assert close(augmented(transposed, how, torch.Generator().manual_seed(7)).features, one.features, 1e-12)
    one.features.zero_()
    assert torch.equal(x, before)


@HOW
def test_every_change_keeps_shape_and_type_and_stays_finite(how: Augmentation) -> None:
    for shape in ((1, 1, 1), (1, 12, 5), (2, 1, 8), (3, 9, 1), (5, 7, 11)):
        for x in (clips(*shape), clips(*shape, dtype=torch.float32), torch.full(shape, -11.5)):
            for seed in range(5):
                found = augmented(x, how, torch.Generator().manual_seed(seed)).features
                assert (found.shape, found.dtype) == (shape, x.dtype)
                assert torch.isfinite(found).all()


# -- off ---------------------------------------------------------------------------------------------------------------


def test_both_clips_of_a_pair_are_changed_alike() -> None:
    a, b, how = torch.randn(5, 12, 8), torch.randn(5, 12, 8), LEVELS["full"].changed(freq_mixstyle=1.0)
    found, chance = augmented(torch.stack([a, b], dim=1), how, torch.Generator().manual_seed(1)), torch.Generator()
    for end, clips in enumerate((a, b)):
        alone = augmented(clips, how, chance.manual_seed(1))
        assert torch.equal(found.features[:, end], alone.features)
        assert torch.equal(found.partner, alone.partner)
        assert torch.equal(found.share, alone.share)


def test_off_does_nothing_and_draws_nothing() -> None:
    x, chance = clips(), torch.Generator().manual_seed(0)
    before = chance.get_state()
    found = augmented(x, Augmentation(), chance)
    assert torch.equal(found.features, clips())
    assert (found.share, found.partner) == (None, None)
    assert torch.equal(chance.get_state(), before)


# -- one change at a time ----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 30), st.sampled_from([0.01, 0.1, 0.25, 0.5, 1.0]))
def test_time_roll_rolls_each_clip_by_up_to_the_share(seed: int, frames: int, share: float) -> None:
    x = torch.arange(6 * frames * 3, dtype=torch.float32).reshape(6, frames, 3)
    found = changed(x, seed, time_roll=share).features
    for before, after in zip(x, found, strict=True):
        (shift,) = (number for number in range(frames) if torch.equal(before[number], after[0]))
        assert shift <= share * frames
        assert torch.equal(after, before.roll(-shift, 0))


def test_clips_of_a_batch_are_rolled_differently_and_by_everything_there_is() -> None:
    x = torch.arange(10.0).reshape(1, 10, 1).expand(400, 10, 2)
    found = changed(x, time_roll=1.0).features
    assert set(found[:, 0, 0].tolist()) == set(range(10))


MASKS = pytest.mark.parametrize(("name", "axis"), [("time_mask", 1), ("freq_mask", 2)])


def stretches(x: Tensor, found: Tensor, axis: int) -> Tensor:
    """Which frames (bins) of each clip are hidden ``[B, size]``: a whole one, or none of it."""
    differs = found != x
    hidden = differs.all(dim=3 - axis)
    assert torch.equal(hidden, differs.any(dim=3 - axis))
    return hidden


@MASKS
@given(st.sampled_from([0.05, 0.1, 0.26, 0.5, 1.0]), st.sampled_from([5, 16, 64]))
def test_a_mask_is_one_stretch_of_at_most_its_share_that_takes_the_clip_s_mean(
    name: str, axis: int, share: float, size: int
) -> None:
    x = clips(50, *((size, 4) if axis == 1 else (4, size)))
    found = changed(x, **{name: share}).features
    hidden = stretches(x, found, axis)
    assert hidden.sum(dim=1).max() <= share * size + 1e-6
    for before, after, mask in zip(x, found, hidden, strict=True):
        at = mask.nonzero().flatten().tolist()
        assert at == list(range(min(at, default=0), max(at, default=-1) + 1))
        covered = after[mask] if axis == 1 else after[:, mask]
        assert torch.allclose(covered, before.mean(), atol=1e-12, rtol=0)


@MASKS
def test_a_mask_may_lie_anywhere_and_be_of_any_length(name: str, axis: int) -> None:
    x = clips(2000, 10, 10)
    hidden = stretches(x, changed(x, **{name: 0.4}).features, axis)
    assert set(hidden.sum(dim=1).tolist()) == set(range(5))
    share = hidden.double().mean(dim=0)
    assert (share > 0.05).all()
    assert close(share, share.flip(0), 0.06)


@given(st.integers(0, 2**32), st.integers(1, 9), st.sampled_from([0.01, 0.2, 1.0, 5.0]))
def test_mixup_is_the_convex_combination_it_tells(seed: int, batch: int, alpha: float) -> None:
    x = clips(batch, 5, 4, seed % 1000)
    features, share, partner = changed(x, seed, mixup=alpha)
    assert share.shape == partner.shape == (batch,)
    assert sorted(partner.tolist()) == list(range(batch))
    assert ((share >= 0.5) & (share <= 1)).all()
    for number in range(batch):
        own = float(share[number])
        expected = own * x[number] + (1 - own) * x[partner[number]]
        assert close(features[number], expected)


def test_mixup_mixes_clips_that_are_changed_already() -> None:
    x = clips(8)
    values = ONE_CHANGE | {"mixup": 0.0}
    alone = changed(x, 3, **values).features
    features, share, partner = changed(x, 3, **(values | {"mixup": 0.4}))
    assert close(features, share[:, None, None] * alone + (1 - share[:, None, None]) * alone[partner])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_draws_from_the_beta_distribution_folded_at_a_half(alpha: float) -> None:
    share = changed(torch.zeros(20_000, 1, 1), mixup=alpha).share
    beta, at = stats.beta(alpha, alpha), np.linspace(0.5, 0.999, 100)  # nearer to 1 a float32 rounds to it
    found = np.searchsorted(np.sort(share.numpy()), at) / len(share)
    assert np.abs(found - (beta.cdf(at) - beta.cdf(1 - at))).max() < 0.02


@pytest.mark.parametrize("alpha", [1e-30, 1e-6, 1e-3])
def test_a_tiny_alpha_mixes_nothing(alpha: float) -> None:
    x = clips(50)
    features, share, _ = changed(x, mixup=alpha)
    assert share.isfinite().all()
    assert (share > 0.999).float().mean() > 0.95
    assert features.isfinite().all()


def of_bins(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each clip's bins ``[B, F]``."""
    return x.mean(dim=1), x.std(dim=1, correction=0)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("alpha", [0.3, 3.0])
def test_mixstyle_keeps_the_normalised_content_and_mixes_the_statistics(batch: int, alpha: float) -> None:
    scale = torch.linspace(0.5, 4, batch, dtype=torch.float64)[:, None, None]
    x = clips(batch, 30, 8) * scale + 5 * clips(batch, 1, 8, seed=9)
    mean, deviation = of_bins(x)
    for seed in range(20):
        found = changed(x, seed, freq_mixstyle=1.0, mixstyle_alpha=alpha)
        assert (found.share, found.partner) == (None, None)
        new_mean, new_deviation = of_bins(found.features)
        content = (found.features - new_mean[:, None]) / new_deviation[:, None]
        assert close(content, (x - mean[:, None]) / deviation[:, None], 1e-4)
        partners = [
            [other for other in range(batch) if is_between(new_mean, new_deviation, mean, deviation, number, other)]
            for number in range(batch)
        ]
        assert all(partners)


def is_between(
    new_mean: Tensor, new_deviation: Tensor, mean: Tensor, deviation: Tensor, number: int, other: int
) -> bool:
    """All of this clip's statistics lie on the way to the other's, at one place of its first half."""
    new = torch.cat([new_mean[number], new_deviation[number]])
    own, others = (torch.cat([mean[each], deviation[each]]) for each in (number, other))
    way = others - own
    part = float((new - own) @ way / (way @ way)) if other != number else 0.0
    return -1e-6 <= part <= 0.5 + 1e-6 and close(new, own + part * way, 1e-4)


def test_mixstyle_changes_as_many_batches_as_it_is_probable() -> None:
    x = clips(8, 6, 4)
    touched = [not torch.equal(changed(x, seed, freq_mixstyle=0.4).features, x) for seed in range(500)]
    assert 150 < sum(touched) < 250


@pytest.mark.parametrize("height", [0.25, 1.0, 4.0])
def test_a_device_response_is_a_clip_s_own_smooth_and_as_high_as_stated(height: float) -> None:
    x = torch.full((500, 3, 128), 1000.0, dtype=torch.float64)
    added = changed(x, device_response=height).features - x
    response = added[:, 0]
    assert close(added, added[:, :1].expand_as(added), 1e-9)  # in all frames the same
    assert len({tuple(each) for each in response.round(decimals=6).tolist()}) == 500
    assert response.abs().max() <= 3 * height
    assert response.abs().amax(dim=1).median() > height / 4
    assert response.max() > 0 > response.min()
    steepest = 3 * 0.65 * height / (0.06 * 128)
    assert response.diff(dim=1).abs().max() <= steepest


def test_a_noise_floor_hides_what_is_quieter_in_some_clips() -> None:
    quiet = torch.full((1000, 3, 8), -1000.0, dtype=torch.float64)
    found = changed(quiet, device_response=2.0).features
    raised = found.flatten(1).amin(dim=1) > -500
    assert 0.25 < raised.double().mean() < 0.35
    assert close(found[raised], found[raised][:, :1, :1].expand_as(found[raised]), 0)
    assert (found[raised] <= 0).all()
    assert (found[raised] >= -3).all()
    assert close(found[~raised], quiet[~raised], 6)


# -- settings ----------------------------------------------------------------------------------------------------------

MOST = {
    "time_roll": 1,
    "time_mask": 1,
    "freq_mask": 1,
    "mixup": 10,
    "freq_mixstyle": 1,
    "mixstyle_alpha": 10,
    "device_response": 10,
}


def test_every_setting_has_bounds_that_work_and_beyond_which_it_is_refused_by_name() -> None:
    assert set(MOST) == {field.name for field in fields(Augmentation)}
    for name, most in MOST.items():
        for value in (-1e-9, -1, most + 1e-6, math.inf, -math.inf, math.nan):
            for make in (Augmentation, LEVELS["full"].changed):
                with pytest.raises(UsageError, match=f"{name} is .*expected 0 to {most}"):
                    make(**{name: value})
        base: dict[str, Any] = {"freq_mixstyle": 1.0} if name == "mixstyle_alpha" else {}
        for value in (0, most):
            found = changed(clips(), **(base | {name: value})).features
            assert found.isfinite().all()
            assert value or close(found, clips())


def test_the_levels_go_from_nothing_to_all() -> None:
    assert list(LEVELS) == ["off", "moderate", "full"]
    assert LEVELS["off"].is_off
    off, moderate, full = ({f.name: getattr(how, f.name) for f in fields(how)} for how in LEVELS.values())
    assert all(off[name] <= moderate[name] <= full[name] for name in off)
    assert {name for name in off if off[name] != moderate[name]} == {"time_roll", "freq_mixstyle", "device_response"}
    assert {name for name in off if moderate[name] != full[name]} == {"time_mask", "freq_mask", "mixup"}


def test_changing_leaves_the_rest_as_it_was() -> None:
    how = LEVELS["full"].changed(mixup=None, time_mask=0.0, freq_mask=None)
    assert how == Augmentation(time_roll=1.0, freq_mixstyle=0.4, device_response=1.0, freq_mask=0.1, mixup=0.2)
    assert LEVELS["full"].time_mask == 0.1
    assert how.changed() == how
    with pytest.raises(TypeError, match="pitch"):
        how.changed(pitch=1.0)
