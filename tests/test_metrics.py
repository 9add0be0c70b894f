"""Metrics of logits: equal to those of scikit-learn and of plain sums, and refused where they would mean nothing."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    log_loss,
    recall_score,
)

from kd_cache.errors import TeacherError, UsageError
from kd_cache.train.evaluation import BINS, FIGURES, THRESHOLDS, Metrics, intervals, measure, measure_groups

Case = tuple[np.ndarray, np.ndarray]
SKLEARNS = {"accuracy", "log_loss"}
near = {"rel": 1e-6, "abs": 1e-6}


def random_case(seed: int, samples: int, classes: int, scale: float = 3.0) -> Case:
    chance = np.random.default_rng(seed)
    logits = (scale * chance.normal(size=(samples, classes))).astype(np.float32)
    return logits, chance.integers(classes, size=samples)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Logits with many ties or with none, float32 or float64, and labels that need not use all classes."""
    samples, classes = draw(st.integers(1, 30)), draw(st.integers(2, 6))
    values = st.integers(-3, 3) | st.floats(-15, 15, width=32)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    logits = draw(hnp.arrays(dtype, (samples, classes), elements=values))
    most = draw(st.integers(0, classes - 1))
    return logits, draw(hnp.arrays(np.int64, samples, elements=st.integers(0, most)))


def check_against_scikit_learn(logits: np.ndarray, labels: np.ndarray) -> Metrics:
    classes = range(logits.shape[1])
    log_probs = log_softmax(logits.astype(np.float64), axis=1)
    probs = np.exp(log_probs)
    decisions = [row.index(max(row)) for row in logits.tolist()]
    found = measure(logits, labels)
    assert found.samples == len(labels)
    assert found.accuracy == pytest.approx(accuracy_score(labels, decisions), **near)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
        warnings.filterwarnings("ignore", "A single label was found")
        assert found.macro_accuracy == pytest.approx(balanced_accuracy_score(labels, decisions), **near)
    assert found.log_loss == pytest.approx(log_loss(labels, probs, labels=classes), **near)
    brier = brier_score_loss(labels, probs, labels=list(classes), scale_by_half=False)
    assert found.brier == pytest.approx(brier, **near)
    assert found.confusion == confusion_matrix(labels, decisions, labels=classes).tolist()
    occurring = sorted(set(labels.tolist()))
    recall = recall_score(labels, decisions, labels=occurring, average=None, zero_division=0)
    expected = dict(zip(occurring, recall.tolist(), strict=True))
    assert [share is None for share in found.per_class] == [label not in expected for label in classes]
    assert [share for share in found.per_class if share is not None] == pytest.approx(list(expected.values()), **near)
    return found


# -- a second calibration error ----------------------------------------------------------------------------------------


def judged(logits: np.ndarray, labels: np.ndarray) -> list[tuple[float, bool]]:
    """Each sample's highest probability, and whether its class is right."""
    found = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        top = max(row)
        found.append((1 / math.fsum(math.exp(value - top) for value in row), row.index(top) == label))
    return found


def plain_ece(pairs: list[tuple[float, bool]], bin_of: Callable[[float], int]) -> float:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in pairs:
        bins.setdefault(bin_of(confidence), []).append((confidence, right))
    total = 0.0
    for mine in bins.values():
        accuracy = sum(right for _, right in mine) / len(mine)
        confidence = math.fsum(confidence for confidence, _ in mine) / len(mine)
        total += len(mine) / len(pairs) * abs(accuracy - confidence)
    return total


def far_from(pairs: list[tuple[float, bool]], edges: list[float]) -> bool:
    """No confidence is so near to an edge that rounding decides on which side it is."""
    return all(abs(confidence - edge) > 1e-9 for confidence, _ in pairs for edge in edges if 0 < edge < 1)


@given(cases())
def test_numbers_are_those_of_scikit_learn(case: Case) -> None:
    check_against_scikit_learn(*case)


@pytest.mark.parametrize(("samples", "classes", "scale"), [(1, 10, 1), (2, 2, 5), (400, 10, 0.01), (400, 12, 5)])
def test_numbers_of_real_sizes_are_those_of_scikit_learn(samples: int, classes: int, scale: float) -> None:
    check_against_scikit_learn(*random_case(samples + classes, samples, classes, scale))


@given(cases())
def test_the_calibration_error_of_equal_width_is_that_of_a_plain_sum(case: Case) -> None:
    pairs = judged(*case)
    assume(far_from(pairs, [k / 15 for k in range(16)]))
    expected = plain_ece(pairs, lambda confidence: min(int(confidence * 15), 14))
    found = measure(*case)
    assert found.ece == pytest.approx(expected, abs=1e-9)
    assert sum(each["count"] for each in found.reliability) == found.samples
    drawn = sum(each["count"] * abs(each["accuracy"] - each["confidence"]) for each in found.reliability)
    assert drawn / found.samples == pytest.approx(expected, abs=1e-9), "a diagram shows the error that is told"
    assert all(each["low"] - 1e-9 <= each["confidence"] <= each["high"] + 1e-9 for each in found.reliability)


@given(st.integers(0, 2**32), st.integers(1, 80), st.integers(1, 80))
def test_bins_of_equal_mass_end_at_quantiles_and_never_part_equal_confidences(
    seed: int, samples: int, different: int
) -> None:
    assume(math.gcd(samples - 1, BINS) == 1)  # else an edge may lie on a sample, where rounding decides
    pool, _ = random_case(seed, different, 4)
    chance = np.random.default_rng(seed)
    case = pool[chance.integers(different, size=samples)], chance.integers(4, size=samples)
    pairs = judged(*case)
    ranked = [Fraction(confidence) for confidence in sorted(confidence for confidence, _ in pairs)]
    assume(all(low == high or low + Fraction(1, 10**9) < high for low, high in itertools.pairwise(ranked)))
    edges = []
    for k in range(1, BINS):
        at = Fraction(k * (samples - 1), BINS)
        low = math.floor(at)
        edges.append(ranked[low] + (at - low) * (ranked[min(low + 1, samples - 1)] - ranked[low]))
    expected = plain_ece(pairs, lambda confidence: sum(edge <= Fraction(confidence) for edge in edges))
    assert measure(*case).ece_equal_mass == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(1, 60))
def test_calibration_errors_do_not_depend_on_the_order_of_the_samples(seed: int, samples: int, different: int) -> None:
    pool, _ = random_case(seed, different, 4)
    chance = np.random.default_rng(seed)
    logits, labels = pool[chance.integers(different, size=samples)], chance.integers(4, size=samples)
    order = chance.permutation(samples)
    one, other = measure(logits, labels), measure(logits[order], labels[order])
    assert other.ece == pytest.approx(one.ece, abs=1e-12)
    assert other.ece_equal_mass == pytest.approx(one.ece_equal_mass, abs=1e-12)
    ranked = np.argsort(labels * 1000 + logits.argmax(axis=1), kind="stable")
    assert measure(logits[ranked], labels[ranked]).ece_equal_mass == pytest.approx(one.ece_equal_mass, abs=1e-12)


# -- early exit --------------------------------------------------------------------------------------------------------


@given(cases())
def test_early_exit_counts_who_is_sure_enough_and_how_often_they_are_right(case: Case) -> None:
    pairs = judged(*case)
    assume(far_from(pairs, list(THRESHOLDS)))
    found = measure(*case).early_exit
    assert [step["threshold"] for step in found] == list(THRESHOLDS)
    for step, threshold in zip(found, THRESHOLDS, strict=True):
        sure = [right for confidence, right in pairs if confidence >= threshold]
        assert step["coverage"] == pytest.approx(len(sure) / len(pairs), abs=1e-12)
        assert step["accuracy"] == (pytest.approx(sum(sure) / len(sure), abs=1e-12) if sure else None)


def test_a_sample_exactly_at_the_threshold_is_sure_enough() -> None:
    found = measure(np.zeros((4, 2), np.float32), np.array([0, 0, 0, 1]))
    assert found.early_exit[0] == {"threshold": 0.5, "coverage": 1.0, "accuracy": 0.75}
    assert found.early_exit[1] == {"threshold": 0.6, "coverage": 0.0, "accuracy": None}


# -- degenerate inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5, 15])
def test_constant_logits_decide_for_the_first_class_with_its_fair_share(classes: int) -> None:
    labels = np.arange(60) % classes
    found = check_against_scikit_learn(np.full((60, classes), 7.0, np.float32), labels)
    assert found.accuracy == pytest.approx(1 / classes, **near)
    assert found.log_loss == pytest.approx(math.log(classes), **near)
    assert found.brier == pytest.approx(1 - 1 / classes, **near)
    assert found.ece == pytest.approx(0, abs=1e-9)
    assert found.ece_equal_mass == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("size", [1e4, 1e30, float(np.finfo(np.float32).max)])
def test_huge_logits_neither_overflow_nor_lose_their_loss(size: float) -> None:
    logits = np.array([[size, -size, 0], [-size, size, 0], [size, size, size]], np.float32)
    found = measure(logits, np.array([0, 0, 2]))
    assert found.log_loss == pytest.approx((0 + 2 * float(np.float32(size)) + math.log(3)) / 3, rel=1e-6)
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.brier == pytest.approx((0 + 2 + 2 / 3) / 3, **near)


@pytest.mark.parametrize("shift", [-1e5, 1e5])
def test_a_constant_added_to_all_logits_changes_nothing(shift: float) -> None:
    logits, labels = random_case(1, 50, 6)
    logits = logits.astype(np.float64)
    one, other = measure(logits, labels), measure(logits + shift, labels)
    for name in ("accuracy", "macro_accuracy", "log_loss", "ece", "ece_equal_mass", "brier", "per_class"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), **near)


def test_the_types_of_labels_and_logits_do_not_matter() -> None:
    logits, labels = random_case(4, 200, 30)
    for kind in (np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64):
        assert measure(logits, labels.astype(kind)) == measure(logits, labels)
    for kind in (np.float16, np.float32, np.float64):
        rounded = logits.astype(kind)
        assert measure(rounded, labels) == measure(rounded.astype(np.float64), labels)


def test_what_is_measured_is_left_as_it_was_and_can_be_written_as_json() -> None:
    logits, labels = random_case(6, 30, 5)
    logits.flags.writeable = labels.flags.writeable = False
    found = measure(logits, labels)
    content = found.as_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert Metrics(**content) == found


# -- groups ------------------------------------------------------------------------------------------------------------


@given(cases(), st.randoms(use_true_random=False))
def test_groups_are_measured_as_their_samples_alone_would_be(case: Case, chance: Any) -> None:
    logits, labels = case
    groups = {
        "device": [chance.choice(["A", "b", "s1"]) for _ in labels],
        "city": [chance.choice(["lyon", "a much longer name", ""]) for _ in labels],
    }
    found = measure_groups(logits, labels, groups)
    assert list(found) == ["device", "city"]
    for kind, names in groups.items():
        assert list(found[kind]) == sorted(set(names))
        assert sum(each["samples"] for each in found[kind].values()) == len(labels)
        for name, each in found[kind].items():
            mine = [number for number, other in enumerate(names) if other == name]
            probs = np.exp(log_softmax(logits[mine].astype(np.float64), axis=1))
            decisions = [row.index(max(row)) for row in logits[mine].tolist()]
            assert each == {
                "samples": len(mine),
                "accuracy": pytest.approx(accuracy_score(labels[mine], decisions), **near),
                "log_loss": pytest.approx(log_loss(labels[mine], probs, labels=range(logits.shape[1])), **near),
                **{
                    figure: getattr(measure(logits[mine], labels[mine]), figure)
                    for figure in FIGURES[1:]
                    if figure != "log_loss"
                },
            }


# -- intervals ---------------------------------------------------------------------------------------------------------


def located(seed: int, places: int, each: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clips of places that are easy or hard as a whole; on average seven in ten are right."""
    chance = np.random.default_rng(seed)
    right = chance.random((places, each)) < chance.beta(1.4, 0.6, places)[:, None]
    labels = chance.integers(4, size=places * each)
    decided = np.where(right.reshape(-1), labels, (labels + 1) % 4)
    return 3 * np.eye(4, dtype=np.float32)[decided], labels, np.repeat(np.arange(places), each)


def test_intervals_hold_the_truth_nineteen_times_of_twenty_where_clips_of_a_place_go_together() -> None:
    held, narrow = 0, 0
    for seed in range(80):
        logits, labels, places = located(seed, 40, 8)
        found = intervals(logits, labels, places, seed)
        held += found["accuracy"][0] <= 0.7 <= found["accuracy"][1]
        by_clip = intervals(logits, labels, np.arange(len(labels)), seed)
        narrow += by_clip["accuracy"][0] <= 0.7 <= by_clip["accuracy"][1]
    assert 0.88 <= held / 80 <= 0.985
    assert narrow / 80 < 0.85  # what drawing clips would claim


def test_an_interval_is_that_of_a_plain_bootstrap() -> None:
    logits, labels, places = located(1, 12, 5)
    found = intervals(logits, labels, places, 3)
    chosen = np.random.default_rng(3).multinomial(12, [1 / 12] * 12, size=1000)
    drawn = [np.repeat(np.arange(len(labels)), counts[places]) for counts in chosen]
    for name, values in found.items():
        plain = [getattr(measure(logits[rows], labels[rows]), name) for rows in drawn]
        assert values == pytest.approx(np.quantile(plain, [0.025, 0.975]).tolist())


@given(cases(), st.integers(0, 10**6))
def test_intervals_do_not_know_the_order_of_clips_or_the_names_of_places(case: Case, seed: int) -> None:
    logits, labels = case
    chance = np.random.default_rng(seed)
    places = chance.integers(5, size=len(labels))
    found = intervals(logits, labels, places, seed)
    assert (found is None) == (len(np.unique(places)) == 1)
    if found is None:
        return
    order = chance.permutation(len(labels))
    other = intervals(logits[order], labels[order], places[order] * 1000 + 7, seed)
    for name, (low, high) in found.items():
        assert other[name] == pytest.approx((low, high))
        assert 0 <= low <= high


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused() -> None:
    for shape in ((0, 4), (0, 0)):
        with pytest.raises(UsageError, match="no samples to measure"):
            measure(np.zeros(shape, np.float32), np.zeros(0, np.int64))
    logits, labels = random_case(0, 9, 4)
    for count in (1, 8, 10):
        with pytest.raises(ValueError, match=r".+"):
            measure(logits, np.resize(labels, count))
    groups = {"device": ["A", "b", "A", "b", "A", "b", "A", "b", "c"]}
    for label in (-1, -100, 4, 1 << 40):
        wrong = np.where(np.arange(9) == 5, label, labels)
        for call in (lambda *given: measure(*given), lambda *given: measure_groups(*given, groups)):
            with pytest.raises(UsageError, match=rf"must lie in \[0, 4\).*{label}"):
                call(logits, wrong)
    for value in (math.nan, math.inf, -math.inf):
        for at in ((0, 0), (8, 3)):
            broken = logits.copy()
            broken[at] = value
            for call in (lambda *given: measure(*given), lambda *given: measure_groups(*given, groups)):
                with pytest.raises(TeacherError, match="not finite"):
                    call(broken, labels)
