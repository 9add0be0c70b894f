"""One teacher out of several: what each way is, and that only rows which trained no teacher decide the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import World
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from store_fixtures import Rows, make_cache, origin
from torch import Tensor
from torch.nn import functional as F
from train_fixtures import town

from kd_cache import LogitCache, Provenance
from kd_cache.dataset.guard import Selection
from kd_cache.dataset.task import DCASE
from kd_cache.distill import fit, fit_gate, fit_weights, fuse, held_out, kl
from kd_cache.distill.fitting import likeliest
from kd_cache.distill.fusion import Weights
from kd_cache.errors import UsageError

__all__ = ["town"]
B, C = 12, 5
NAMES = ("one", "two", "three")


def case(seed: int = 0, rows: int = B, teachers: int = 3) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, teachers, C, generator=chance, dtype=torch.float64)
    return logits, torch.randint(C, (rows,), generator=chance)


def near(found: Tensor, expected: Tensor, most: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=most, atol=most)


# -- each way ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_each_way_is_what_it_is_called(temperature: float) -> None:
    logits, labels = case()
    p = logits.softmax(2)

    def fused(mode: Any, **more: Any) -> Tensor:
        return (fuse(logits, mode, teachers=NAMES, temperature=temperature, **more) / temperature).softmax(1)

    def pooled(weights: Tensor) -> Tensor:
        return (torch.einsum("bkc,bk->bc", logits, weights.expand(B, 3)) / temperature).softmax(1)

    near(fused("mean"), pooled(torch.full((3,), 1 / 3).double()), 1e-7)
    near(fused("probs"), (logits / temperature).softmax(2).mean(1))
    near(fused("two"), (logits[:, 1] / temperature).softmax(1))
    near(fused("weights:three=0.75,one=0.25"), pooled(torch.tensor([0.25, 0, 0.75]).double()))
    sure = 1 / (1e-3 - (p * p.log()).sum(2))
    by_entropy = sure / sure.sum(1, keepdim=True)
    near(fused("entropy"), pooled(by_entropy))
    of_label = p[torch.arange(B), :, labels]
    by_label = of_label / of_label.sum(1, keepdim=True)
    some = torch.where(torch.arange(B) % 2 == 0, -100, labels)
    near(fused("label", labels=some), pooled(torch.where((some < 0)[:, None], by_entropy, by_label)))


@given(st.integers(0, 10**6))
def test_fusion_keeps_shifts_away_and_does_not_know_the_order_of_teachers_or_rows(seed: int) -> None:
    logits, labels = case(seed)
    chance = torch.Generator().manual_seed(seed)
    rows, order = torch.randperm(B, generator=chance), torch.randperm(3, generator=chance)
    names = [NAMES[number] for number in order]
    for mode in ("mean", "probs", "entropy", "label", "two", "weights:two=3,one=.5"):
        expected = fuse(logits, mode, teachers=NAMES, labels=labels, temperature=2).log_softmax(1)
        moved = (logits + 7 * torch.arange(3)[:, None])[rows][:, order]
        found = fuse(moved, mode, teachers=names, labels=labels[rows], temperature=2)
        near(found.log_softmax(1), expected[rows], 1e-10)
        alone = logits[:, :1].expand_as(logits)
        if not mode.startswith("weights"):
            same = fuse(alone, mode, teachers=NAMES, labels=labels, temperature=2)
            near(same.log_softmax(1), logits[:, 0].log_softmax(1), 1e-6)


def test_the_mean_of_the_losses_has_the_gradient_of_the_mean_of_probabilities_and_of_no_other_pool() -> None:
    logits, _ = case(3)
    student = torch.randn(B, C, dtype=torch.float64, requires_grad=True)
    mean = torch.stack([kl(student, logits[:, k]) for k in range(3)]).mean(0).sum()
    wanted = torch.autograd.grad(mean, student)[0]

    def slope(mode: str) -> Tensor:
        return torch.autograd.grad(kl(student, fuse(logits, mode, temperature=4)).sum(), student)[0]

    near(slope("probs"), wanted)
    assert (slope("mean") - wanted).abs().max() > 1e-3


def test_extreme_logits_stay_finite_in_every_way() -> None:
    logits = torch.tensor([[[1e4, 0, 0], [0, 0, 0]], [[900, -900, 1], [1e-30, 0, 3]]]).half()
    for mode in ("mean", "probs", "entropy", "label", "weights:a=2,b=1"):
        found = fuse(logits, mode, teachers=("a", "b"), labels=torch.tensor([1, -1]))
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("mode", "more", "message"),
    [
        ("means", {}, "known: mean, probs, entropy, label, weights:NAME=X,…, one, two, three"),
        ("fit", {}, "must be fitted first"),
        ("gate", {}, "must be fitted first"),
        ("label", {}, "got no labels"),
        ("weights:four=1", {}, "a weight for four; the teachers are one, two, three"),
        ("weights:one=1,one=2", {}, "each teacher once"),
        ("weights:one=x", {}, "each teacher once"),
        ("weights:one=-1", {}, "expected 0 or more"),
        ("weights:one=0", {}, "expected 0 or more"),
        ("mean", {"teachers": ("one", "two", "fit")}, "the name of a mode"),
        ("mean", {"teachers": ("one", "two")}, r"expected the teachers' logits as \[B, 2, C\], found \[12, 3, 5\]"),
    ],
)
def test_what_makes_no_sense_is_refused(mode: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fuse(case()[0], mode, **{"teachers": NAMES, **more})


# -- the likeliest weights --------------------------------------------------------------------------------------------


def drawn(seed: int, rows: int, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that the teachers' pool with these weights gives."""
    logits, _ = case(seed, rows, len(beta))
    labels = torch.multinomial(
        (logits * beta[:, None]).sum(1).softmax(1), 1, generator=torch.Generator().manual_seed(1)
    )
    return logits, labels[:, 0]


def test_weights_that_made_the_labels_are_found_again() -> None:
    true = torch.tensor([0.3, 1.2, 0.0], dtype=torch.float64)
    logits, labels = drawn(0, 10_000, true)
    found = likeliest(logits, labels)
    near(found[:2], true[:2], 0.05)
    assert 0 <= found[2] < 0.03
    theirs = minimize(
        lambda beta: float(F.cross_entropy((logits * torch.tensor(beta)[:, None]).sum(1), labels)),
        [0.5] * 3, bounds=[(0, None)] * 3, tol=1e-12,
    )  # fmt: skip
    near(found, torch.tensor(theirs.x), 2e-3)


def test_of_one_teacher_it_is_temperature_scaling() -> None:
    logits, labels = drawn(4, 3000, torch.tensor([1 / 3], dtype=torch.float64))
    scores = [float(F.cross_entropy(logits[:, 0] * b, labels)) for b in torch.linspace(0.2, 0.5, 3001)]
    assert abs(float(likeliest(logits, labels)) - (0.2 + 1e-4 * scores.index(min(scores)))) < 2e-4


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(3, 60))
def test_no_step_from_the_found_weights_is_better_and_scale_and_order_do_not_matter(
    seed: int, teachers: int, rows: int
) -> None:
    logits, labels = case(seed, rows, teachers)
    found = likeliest(logits, labels)
    assert torch.isfinite(found).all()
    assert (found >= 0).all()
    order = torch.randperm(teachers, generator=torch.Generator().manual_seed(seed))
    scale = torch.logspace(-2, 2, teachers).double()
    near(likeliest((logits * scale[:, None])[:, order], labels), (found / scale)[order], 1e-5)

    def cost(beta: Tensor) -> float:
        spread = (logits - logits.mean(2, keepdim=True)).square().mean((0, 2)).sqrt()
        prior = (beta * spread / 10).square().sum() / 2
        return float(F.cross_entropy((logits * beta[:, None]).sum(1), labels, reduction="sum") + prior)

    for step in (1e-3, -1e-3):
        for k in range(teachers):
            near_by = found.clone()
            near_by[k] = (near_by[k] + step).clamp(min=0)
            assert cost(near_by) >= cost(found) - 1e-9


def test_teachers_that_are_always_right_and_teachers_that_say_nothing_get_finite_weights() -> None:
    _, labels = case(0, 30)
    right = F.one_hot(labels, C).double()
    logits = torch.stack([right, right, torch.zeros_like(right), torch.ones_like(right)], 1)
    found = likeliest(logits, labels)
    near(found[0], found[1])
    assert 0 < found[0] < 100
    assert not found[2:].any()


# -- the rows that may decide -----------------------------------------------------------------------------------------


@dataclass
class Held:
    """A cache over the town, whose two teachers trained on the first location of each city and scene alone."""

    cache: LogitCache
    selection: Selection
    provenances: dict[str, Provenance | None]
    files: set[str]
    """The clips of A at the other locations."""


def held(town: World, rubbish: bool = False) -> Held:
    """With ``rubbish`` all rows of the trained locations and of the target name another scene, and so do b's labels."""
    for row in town.rows if rubbish else []:
        row["scene_label"] = (row["scene_label"] + (row["device_id"] == "b")) % 3
    selection = town.write().data().selection
    by_file = {sample.file: sample for sample in selection.samples}
    trained = [file for file in by_file if int(file.split("-")[2]) % 10 == 0]
    kept = {}
    for seed, (name, skill) in enumerate({"good": 3.0, "poor": 0.5}.items()):
        rows = kept[name] = Rows.of(list(by_file), seed=seed)
        rows.logits /= 3
        for number, file in enumerate(rows.files):
            is_bad = rubbish and (file in trained or by_file[file].device_id == "b")
            rows.logits[number, by_file[file].scene_label] += -50 if is_bad else skill
    cache = make_cache(town.root / f"{rubbish}" / "A2b", kept, {name: origin(name) for name in kept})
    told = {"good": Provenance.of(trained[::2], list(by_file)[:1]), "poor": Provenance.of(trained[1::2])}
    files = {file for file, sample in by_file.items() if sample.device_id == "A" and file not in trained}
    return Held(LogitCache.open(cache.path), selection, dict(told), files)


def test_only_labelled_source_rows_of_places_that_no_teacher_heard_decide(town: World) -> None:
    clean = held(town)
    rows = held_out(clean.cache, clean.selection, clean.provenances)
    assert set(rows.files) == clean.files
    assert len(rows) == len(set(rows.places.tolist())) == 27
    found = fit(clean.cache, clean.selection, clean.provenances)
    gate = fit_gate(rows)
    dirty = held(town, rubbish=True)
    assert fit(dirty.cache, dirty.selection, dirty.provenances) == found
    other = fit_gate(held_out(dirty.cache, dirty.selection, dirty.provenances))
    assert all(torch.equal(a, b) for a, b in zip(gate.parameters(), other.parameters(), strict=True))
    assert found.of["good"] > found.of["poor"] > 0
    assert found.measured["rows"] == 27
    assert found.measured["fit"]["log_loss"] < found.measured["mean"]["log_loss"]
    assert not any(parameter.requires_grad for parameter in gate.parameters())
    turned = LogitCache.open(clean.cache.path, ["poor", "good"])
    logits = clean.cache.batch(rows.files)
    expected = fuse(logits, found, teachers=clean.cache.teachers)
    near(fuse(logits[:, [1, 0]], found, teachers=turned.teachers), expected, 1e-6)
    loss = {mode: float(F.cross_entropy(fuse(logits, mode), rows.labels)) for mode in ("mean", gate)}
    assert loss[gate] < loss["mean"]


def test_each_row_is_judged_by_weights_that_it_did_not_choose(town: World) -> None:
    one = held(town)
    rows = held_out(one.cache, one.selection, one.provenances)
    apart = torch.empty(len(rows), 3, dtype=torch.float64)
    for fold in range(5):
        mine = torch.from_numpy(rows.places % 5 == fold)
        beta = likeliest(rows.logits.double()[~mine], rows.labels[~mine])
        apart[mine] = (rows.logits.double()[mine] * beta[:, None]).sum(1)
    expected = float(F.cross_entropy(apart, rows.labels))
    assert fit_weights(rows).measured["fit"]["log_loss"] == pytest.approx(expected)


@pytest.mark.parametrize("what", ["nothing", "not all", "too few"])
def test_where_nobody_knows_which_rows_are_held_out_the_mean_is_taken_with_a_warning(town: World, what: str) -> None:
    one = held(town)
    other = {
        "nothing": None,
        "not all": Provenance.unknown(),
        "too few": Provenance.of(sorted(one.files)[:8]),
    }[what]
    told = {**one.provenances, "poor": other}
    with pytest.warns(UserWarning, match=f"mean is taken.*({what}|19 labelled source rows)"):
        found = fit(one.cache, one.selection, told)
    assert found == Weights({"good": 0.5, "poor": 0.5})
    with pytest.raises(UsageError, match=r"fewer than 20|which rows are held out"):
        fit_gate(held_out(one.cache, one.selection, told))


def test_a_gate_is_of_its_teachers_alone(town: World) -> None:
    one = held(town)
    gate = fit_gate(held_out(one.cache, one.selection, one.provenances))
    with pytest.raises(UsageError, match="the gate is of good, poor with 3 classes"):
        fuse(torch.zeros(4, 3, 3), gate)


def test_rows_whose_classes_stand_in_another_order_than_the_labels_are_refused_and_not_averaged(town: World) -> None:
    one = held(town)
    with pytest.MonkeyPatch.context() as patched:
        turned = (*DCASE.scenes[1:], DCASE.scenes[0])
        patched.setattr(LogitCache, "class_names", {"good": None, "poor": turned})
        with pytest.raises(UsageError, match="poor: the teacher and the task have the same classes in another order"):
            fit(one.cache, one.selection, one.provenances)
