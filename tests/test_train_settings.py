"""Settings of a training: presets are the documented stages, what makes no sense is refused, and all of it is keyed."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_cache.errors import UsageError
from kd_cache.options import Option
from kd_cache.train.pretraining import key_of
from kd_cache.train.settings import (
    AUTO,
    BACKBONE,
    CITY,
    CITY2SCENE,
    FROZEN,
    FULL_MODEL,
    LEVELS,
    OPTIONS,
    PRESETS,
    ROLES,
    SCENE,
    SCRATCH,
    Settings,
    Stage,
    parse_stage,
    stages_of,
)

STARTS = (SCRATCH, FROZEN, FULL_MODEL, BACKBONE)


def of(start: str, **values: Any) -> tuple[Stage, ...]:
    return stages_of(Settings(CITY, **values), start)


def table(stages: tuple[Stage, ...]) -> list[tuple[int, int, float, str, str]]:
    return [(stage.level, stage.epochs, pytest.approx(stage.lr), stage.augment, stage.schedule) for stage in stages]


# -- presets -----------------------------------------------------------------------------------------------------------

DOCUMENTED: dict[str, list[tuple[int, int, float, str, str]]] = {
    SCRATCH: [(0, 40, 3e-3, "moderate", "cosine")],
    FROZEN: [(2, 200, 1e-2, "off", "cosine")],
    FULL_MODEL: [
        (2, 5, 1e-4, "off", "constant"),
        (1, 8, 5e-5, "moderate", "constant"),
        (0, 17, 3e-5, "moderate", "constant"),
    ],
    BACKBONE: [
        (2, 10, 1e-4, "off", "constant"),
        (1, 2, 2e-4, "moderate", "constant"),
        (0, 18, 2e-4, "moderate", "cosine"),
    ],
}


@pytest.mark.parametrize("start", STARTS)
def test_each_start_has_the_stages_that_are_documented(start: str) -> None:
    assert table(of(start)) == DOCUMENTED[start]


@pytest.mark.parametrize("start", STARTS)
def test_a_preset_that_is_named_counts_whatever_the_start_and_the_role(start: str) -> None:
    assert set(PRESETS) == {AUTO, *DOCUMENTED}
    assert [of(start, preset=preset) for preset in STARTS] == [of(preset) for preset in STARTS]
    assert [stages_of(Settings(role), start) for role in ROLES] == [of(start)] * len(ROLES)


@pytest.mark.parametrize(("start", "before"), [(SCRATCH, 0), (FROZEN, 0), (FULL_MODEL, 13), (BACKBONE, 12)])
def test_the_last_stage_takes_the_epochs_that_are_left_and_too_few_are_refused(start: str, before: int) -> None:
    for epochs in range(1, 60):
        if epochs > before:
            stages = of(start, epochs=epochs)
            assert stages[-1].epochs == epochs - before
            assert stages[:-1] == of(start)[:-1]
            continue
        with pytest.raises(UsageError, match=f"--preset {start} needs more than {before} epochs") as caught:
            of(start, epochs=epochs)
        assert f"found --epochs {epochs}" in caught.value.message
        assert "--stage" in str(caught.value)


@pytest.mark.parametrize("start", STARTS)
def test_what_is_no_training_is_refused(start: str) -> None:
    wrong = [("epochs", value) for value in (0, -1)]
    wrong += [("lr", value) for value in (0.0, -1e-3, float("nan"), float("inf"), 11.0)]
    wrong += [("preset", value) for value in ("nonsense", "", "SCRATCH")]
    for name, value in wrong:
        with pytest.raises(UsageError, match=name):
            of(start, **{name: value})


@given(st.sampled_from(STARTS), st.floats(1e-6, 4))
def test_later_learning_rates_keep_their_proportion_to_the_first(start: str, lr: float) -> None:
    stages, usual = of(start, lr=lr), of(start)
    assert stages[0].lr == lr
    assert [stage.lr / lr for stage in stages] == pytest.approx([stage.lr / usual[0].lr for stage in usual])
    assert [replace(stage, lr=1.0) for stage in stages] == [replace(stage, lr=1.0) for stage in usual]


# -- stages one by one -------------------------------------------------------------------------------------------------

STAGES = st.builds(
    Stage,
    st.sampled_from([0, 1, 2]),
    st.integers(1, 10**6),
    st.floats(0, 10, exclude_min=True),
    st.sampled_from(sorted(LEVELS)),
    st.sampled_from(["cosine", "constant"]),
)


def written(stage: Stage, order: list[str], space: str = "") -> str:
    return f",{space}".join(f"{name}={getattr(stage, name)!s}" for name in order)


@given(STAGES, st.permutations(["level", "epochs", "lr", "augment", "schedule"]), st.sampled_from(["", " ", "  "]))
def test_a_stage_is_read_as_it_is_written_in_any_order(stage: Stage, order: list[str], space: str) -> None:
    assert parse_stage(written(stage, order, space)) == stage


@pytest.mark.parametrize(("level", "augment"), [(2, "off"), (1, "moderate"), (0, "moderate")])
def test_what_a_stage_leaves_out_follows_from_its_level(level: int, augment: str) -> None:
    assert parse_stage(f"level={level},epochs=5,lr=5e-5") == Stage(level, 5, 5e-5, augment, "cosine")
    assert parse_stage(f"level={level},epochs=5,lr=5e-5,augment=full").augment == "full"
    assert parse_stage(f"level={level},epochs=5,lr=5e-5,schedule=constant").schedule == "constant"


GOOD = "level=1,epochs=5,lr=5e-5"
REFUSED = {
    "": "expected each of",
    f"{GOOD},": "expected each of",
    f"{GOOD},level=1": "found level=1",
    f"{GOOD},speed=3": "found speed=3",
    f"{GOOD},augment": "found augment",
    "1,5,5e-5": "found 1",
    "epochs=5,lr=5e-5": "level is missing",
    "augment=off": "level, epochs, lr is missing",
    "level=,epochs=5,lr=5e-5": "invalid literal",
    "level=1.0,epochs=5,lr=5e-5": "1.0",
    "level=3,epochs=5,lr=5e-5": "level is 3, expected 0, 1 or 2",
    "level=1,epochs=0,lr=5e-5": "epochs is 0, expected 1 or more",
    "level=1,epochs=2.5,lr=5e-5": "2.5",
    "level=1,epochs=5,lr=": "could not convert",
    "level=1,epochs=5,lr=0": "lr is 0.0, expected more than 0",
    "level=1,epochs=5,lr=11": "at most 10",
    "level=1,epochs=5,lr=nan": "lr is nan",
    f"{GOOD},augment=strong": "augment is strong, expected off, moderate, full",
    f"{GOOD},schedule=linear": "schedule is linear, expected cosine or constant",
    f"level=1,epochs={'9' * 5000},lr=1": "--stage",
}


def test_a_stage_that_makes_no_sense_is_refused_with_the_reason() -> None:
    for text, reason in REFUSED.items():
        with pytest.raises(UsageError) as caught:
            parse_stage(text)
        assert reason in caught.value.message, text


@given(
    st.text(st.sampled_from("levpochsr=,. 0129-+eEx_\x1b"), max_size=40)
    | st.text(max_size=9).map(f"{GOOD},augment=".__add__)
)
def test_any_text_is_a_stage_or_refused_in_words_that_no_terminal_obeys(text: str) -> None:
    try:
        stage = parse_stage(text)
    except UsageError as error:
        assert error.message.isprintable()  # noqa: PT017 - most texts are refused
        return
    assert stage.level in (0, 1, 2)
    assert stage.epochs >= 1
    assert 0 < stage.lr <= 10


@given(st.lists(STAGES, min_size=1, max_size=5), st.sampled_from(STARTS), st.sampled_from(PRESETS), st.booleans())
def test_stages_of_ones_own_replace_the_preset_unless_they_unfreeze_at_once(
    stages: list[Stage], start: str, preset: str, direct: bool
) -> None:
    settings = Settings(CITY, preset=preset, epochs=1, lr=1.0, stages=tuple(stages), direct_unfreeze=direct)
    levels = [stage.level for stage in stages]
    if not direct and any(pair == (2, 0) for pair in pairwise(levels)):
        with pytest.raises(UsageError, match="straight after one at level 2") as caught:
            stages_of(settings, start)
        assert "--direct-unfreeze" in str(caught.value)
    else:
        assert stages_of(settings, start) == tuple(stages)


# -- augmentation ------------------------------------------------------------------------------------------------------

OVERRIDES = ("mixup", "time_mask", "freq_mask", "time_roll", "freq_mixstyle", "device_response")
STRENGTHS = st.dictionaries(st.sampled_from(OVERRIDES), st.floats(0, 1))


@given(STRENGTHS | st.just({}), st.sampled_from(sorted(LEVELS)))
def test_settings_of_ones_own_count_in_every_stage_that_is_not_off(values: dict[str, Any], augment: str) -> None:
    made = dataclasses.asdict(Settings(CITY, **values).augmentation(Stage(0, 1, 1e-3, augment)))
    assert made == dataclasses.asdict(LEVELS[augment]) | ({} if augment == "off" else values)


@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if option.low is not None], ids=lambda option: option.name
)
def test_a_setting_out_of_its_range_is_refused_by_name(option: Option) -> None:
    assert option.low is not None
    for value in (
        option.low - 0.1,
        math.nan,
        math.inf,
        -math.inf,
        *([] if option.high is None else [option.high * 1.1]),
    ):
        with pytest.raises(UsageError, match=re.escape(f"{option.name} is {value}, expected {option.low:g} ")):
            Settings(CITY, **{option.name: value})
    for value in (option.low, option.high or option.low + 1):
        assert getattr(Settings(CITY, **{option.name: value}), option.name) == value


def test_every_setting_has_the_default_that_its_option_has() -> None:
    assert {option.name: option.default for option in OPTIONS}.items() <= vars(Settings(CITY)).items()


# -- roles and keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "label", "classes"), [(CITY, "city", 7), (CITY2SCENE, "scene", 3), (SCENE, "scene", 3)]
)
def test_a_role_learns_its_label(role: str, label: str, classes: int) -> None:
    settings = Settings(role, num_scenes=3, num_cities=7)
    assert (settings.label, settings.num_classes) == (label, classes)


def another(value: Any) -> list[Any]:
    """Values that are not this one, of the kinds that the field may have."""
    if isinstance(value, bool):
        return [not value]
    if value is None:
        return [0, 1]
    if isinstance(value, tuple):
        return [(*value, Stage(0, 1, 1e-3)), (*value, Stage(0, 1, 2e-3))]
    return [f"{value}x"] if isinstance(value, str) else [value + 1, value + 1e-9]


BASES = (
    Settings(CITY),
    Settings(
        SCENE,
        arch="cnn14",
        epochs=7,
        lr=1e-3,
        feature_dim=64,
        mlp_hidden_dims=(5, 6),
        stages=(Stage(2, 5, 1e-4),),
        mixup=0.0,
        time_mask=0.0,
        freq_mask=0.0,
        time_roll=0.0,
        freq_mixstyle=0.0,
        device_response=0.0,
    ),
)


@pytest.mark.parametrize("base", BASES, ids=["defaults", "all said"])
def test_every_setting_stands_in_exactly_one_part_of_the_key(base: Settings) -> None:
    parts = base.key_parts()
    found = [name for group in parts.values() for name in group]
    values = {name: value for group in parts.values() for name, value in group.items()}
    assert sorted(found) == sorted(values)
    assert values == {name: value for name, value in dataclasses.asdict(base).items() if name not in OF_STAGES}


# They say what the stages are, and those are in a training's key.
OF_STAGES = {"epochs", "lr", "preset", "stages", "direct_unfreeze"}

ALLOWED: dict[str, list[Any]] = {
    "mlp_hidden_dims": [(), (5,), (6, 5), (5, 6, 7)],
    "epochs": [1, 8],
    "feature_dim": [2, 3],
    "base_channels": [4, 1024],
    "channels_multiplier": [1.0, 1 + 1e-9],
    "expansion_rate": [1.0, 1 + 1e-9],
    "channels": [(1, 2, 4, 3), (1, 2, 3, 4)],
    "momentum": [0.0, 0.9 + 1e-9],
    "dropout": [0.0, 0.3 + 1e-9],
    "label_smoothing": [0.5, 1e-9],
    "ema": [0.5, 1e-9],
    "quick_experiment": [0.5, 1 - 1e-9],
    "deterministic": [True],
}


@pytest.mark.parametrize("base", BASES, ids=["defaults", "all said"])
def test_another_value_of_any_setting_is_another_key(base: Settings) -> None:
    assert key_of(base.key_parts()) == key_of(replace(base).key_parts())
    for name in {field.name for field in fields(Settings)} - OF_STAGES:
        values = ALLOWED.get(name) or another(getattr(base, name))
        keys = {key_of(replace(base, **{name: value}).key_parts()) for value in values} | {key_of(base.key_parts())}
        assert len(keys) == 1 + len(values), name
