"""``kd-cache diff``: what two caches hold, and how far their common rows are apart, checked by other code than ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Run, World
from store_fixtures import MadeCache, Rows, make_cache, names, origin, two_teachers, write_older

from kd_cache.care.diff import TeacherDiff, diff_caches
from kd_cache.errors import MissingLogitsError
from kd_cache.store.origin import Origin


def one(path: Path, rows: Rows, made_by: Origin | None = None, packs: int = 1) -> MadeCache:
    """A cache of one teacher, scene."""
    return make_cache(path / "A2b", {"scene": rows}, {"scene": made_by or origin()}, packs)


def scene(a: MadeCache, b: MadeCache) -> TeacherDiff:
    return diff_caches(a.path, b.path).teachers["scene"]


def nudged(rows: Rows, how: Mapping[str, float], column: int = 0) -> Rows:
    """The same rows, with a value added in one column of some files."""
    logits = rows.logits.copy()
    for file, by in how.items():
        logits[rows.files.index(file), column] += by
    return Rows(rows.files, rows.keys, rows.inputs, logits)


def torch_kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KL(softmax(a) ‖ softmax(b)) per row, as torch has it."""
    log_p, log_q = (torch.from_numpy(x.astype(np.float64)).log_softmax(1) for x in (a, b))
    # kl_div(input, target) is KL(target ‖ input).
    found: np.ndarray = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1).numpy()
    return found


def older(path: Path, **rows: Rows) -> Path:
    return write_older(path / "A2b", {name: mine.by_file() for name, mine in rows.items()})


# -- equal caches -----------------------------------------------------------------------------------------------------


def test_a_cache_is_equal_to_itself_and_to_its_copy(tmp_path: Path) -> None:
    cache = two_teachers(tmp_path / "A2b", count=30)
    shutil.copytree(cache.path, tmp_path / "copy")
    report = diff_caches(cache.path, tmp_path / "copy")
    assert list(report.teachers) == ["city2scene", "scene"]
    for found in report.teachers.values():
        assert (found.rows_a, found.rows_b, found.in_both, found.only_in_a, found.only_in_b) == (30, 30, 30, 0, 0)
        assert (found.bit_equal, found.argmax_changes, found.kl_mean, found.kl_max) == (30, 0, 0.0, 0.0)
        assert (found.fingerprints_equal, found.difference, found.other_features) == (True, None, 0)
        assert found.changed == []
    assert (report.only_in_a, report.only_in_b, report.notes) == ([], [], [])


def test_packs_are_no_difference(tmp_path: Path) -> None:
    rows = Rows.of(names(40))
    found = scene(one(tmp_path / "a", rows), one(tmp_path / "b", rows, packs=7))
    assert (found.in_both, found.bit_equal) == (40, 40)


# -- coverage ---------------------------------------------------------------------------------------------------------


def test_rows_are_joined_by_key_whatever_their_positions(tmp_path: Path) -> None:
    # 0..29 and 20..59: in key order, the ten common files stand at other positions in each.
    a, b = Rows.of(names(30)), Rows.of(names(40, start=20))
    found = scene(one(tmp_path / "a", a), one(tmp_path / "b", b))
    assert (found.rows_a, found.rows_b, found.in_both, found.only_in_a, found.only_in_b) == (30, 40, 10, 20, 30)
    common = [a.files.index(file) for file in a.files if file in b.files]
    assert any(a.files[n] != b.files[n] for n in common)
    assert found.bit_equal == 10


def test_caches_without_a_common_row_are_compared_too(tmp_path: Path) -> None:
    found = scene(one(tmp_path / "a", Rows.of(names(5))), one(tmp_path / "b", Rows.of(names(5, start=5))))
    assert (found.in_both, found.compared, found.kl_mean, found.argmax_share) == (0, 0, None, None)


def test_teachers_that_only_one_cache_holds_are_named(tmp_path: Path) -> None:
    a = make_cache(
        tmp_path / "a",
        {"scene": Rows.of(names(3)), "city": Rows.of(names(3))},
        {"scene": origin(), "city": origin("city")},
    )
    b = make_cache(
        tmp_path / "b",
        {"mine": Rows.of(names(3)), "scene": Rows.of(names(3))},
        {"mine": origin("mine"), "scene": origin()},
    )
    report = diff_caches(a.path, b.path)
    assert (list(report.teachers), report.only_in_a, report.only_in_b) == (["scene"], ["city"], ["mine"])
    report = diff_caches(a.path, b.path, ["city"])
    assert (list(report.teachers), report.only_in_a, report.only_in_b) == ([], ["city"], [])
    with pytest.raises(MissingLogitsError, match=r"neither .* logits of ghost \(they hold scene, city, mine\)"):
        diff_caches(a.path, b.path, ["ghost"])


def test_common_rows_of_other_features_are_counted(tmp_path: Path) -> None:
    a, b = Rows.of(names(20)), Rows.of(names(20))
    b.inputs = b.inputs.copy()
    b.inputs[[3, 7]] = Rows.of(names(20), inputs=1).inputs[[3, 7]]
    assert scene(one(tmp_path / "a", a), one(tmp_path / "b", b)).other_features == 2


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 527])
def test_kl_and_argmax_are_those_that_torch_finds(tmp_path: Path, classes: int) -> None:
    a = Rows.of(names(60), classes, seed=1)
    b = Rows(a.files, a.keys, a.inputs, a.logits + 0.5 * Rows.of(names(60), classes, seed=2).logits)
    found = scene(one(tmp_path / "a", a, origin(classes=classes)), one(tmp_path / "b", b, origin(classes=classes)))
    expected = torch_kl(a.logits, b.logits)
    assert found.kl_mean == pytest.approx(expected.mean(), rel=1e-9)
    assert found.kl_max == pytest.approx(expected.max(), rel=1e-9)
    assert expected.mean() != pytest.approx(torch_kl(b.logits, a.logits).mean())  # the direction matters
    changed = a.logits.argmax(1) != b.logits.argmax(1)
    assert 0 < changed.sum() == found.argmax_changes
    assert found.argmax_share == pytest.approx(changed.mean())
    numbers = [(a.files[n], a.logits[n].argmax(), b.logits[n].argmax()) for n in np.flatnonzero(changed)]
    assert [(change.file, change.a, change.b) for change in found.changed] == numbers


def test_log_probs_are_compared_as_distributions(tmp_path: Path) -> None:
    a, b = (Rows.of(names(20), seed=seed) for seed in (1, 2))
    for rows in (a, b):
        rows.logits = torch.from_numpy(rows.logits).log_softmax(1).numpy()
    kind = origin(kind="log_probs")
    found = scene(one(tmp_path / "a", a, kind), one(tmp_path / "b", b, kind))
    p = np.exp(a.logits.astype(np.float64))
    expected = (p * (a.logits.astype(np.float64) - b.logits)).sum(axis=1)
    assert found.kl_mean == pytest.approx(expected.mean(), rel=1e-5)
    assert found.largest_difference is None


@pytest.mark.parametrize("kind", ["probs", "sigmoid"])
def test_probabilities_are_compared_by_their_largest_difference(tmp_path: Path, kind: str) -> None:
    a, b = (Rows.of(names(20), seed=seed) for seed in (1, 2))
    for rows in (a, b):
        rows.logits = torch.from_numpy(rows.logits).sigmoid().numpy()
    found = scene(one(tmp_path / "a", a, origin(kind=kind)), one(tmp_path / "b", b, origin(kind=kind)))
    expected = np.abs(a.logits.astype(np.float64) - b.logits).max()
    assert (found.kl_mean, found.kl_max) == (None, None)
    assert found.largest_difference == pytest.approx(expected, rel=1e-12)


def test_half_precision_is_held_against_full_and_bits_are_equal_where_nothing_was_lost(tmp_path: Path) -> None:
    a = Rows.of(names(50))
    a.logits[:10] = np.round(a.logits[:10])  # small integers are exact in float16
    b = Rows(a.files, a.keys, a.inputs, a.logits.astype("<f2"))
    found = scene(one(tmp_path / "a", a), one(tmp_path / "b", b, origin(dtype="fp16")))
    assert found.bit_equal == (a.logits == b.logits).all(axis=1).sum() >= 10
    assert found.kl_max == pytest.approx(torch_kl(a.logits, b.logits).max(), rel=1e-6)
    assert (found.fingerprints_equal, found.difference) == (False, "dtype: fp32 → fp16")


def test_bits_decide_not_values(tmp_path: Path) -> None:
    a = Rows.of(names(4))
    a.logits[:] = 0.0
    b = Rows(a.files, a.keys, a.inputs, a.logits.copy())
    b.logits[1, 2] = -0.0
    found = scene(one(tmp_path / "a", a), one(tmp_path / "b", b))
    assert (found.bit_equal, found.kl_max) == (3, 0.0)


def test_rows_that_are_not_finite_are_told_of_and_left_out_of_the_distances(tmp_path: Path) -> None:
    # A dump refuses such rows; a cache of an older script may hold them.
    a, b = Rows.of(names(6), seed=1), Rows.of(names(6), seed=2)
    a.logits[1, 0], b.logits[4, 1] = np.nan, np.inf
    report = diff_caches(older(tmp_path / "a", scene=a), one(tmp_path / "b", b).path)
    found = report.teachers["scene"]
    good = [0, 2, 3, 5]
    assert (found.in_both, found.not_finite, found.compared) == (6, 2, 4)
    assert found.kl_max == pytest.approx(torch_kl(a.logits[good], b.logits[good]).max())
    json.dumps(report.as_json(), allow_nan=False)


def test_the_block_size_changes_no_figure(tmp_path: Path) -> None:
    a, b = Rows.of(names(50), seed=1), Rows.of(names(50, start=13), seed=2)
    caches = one(tmp_path / "a", a, packs=3), one(tmp_path / "b", b)
    whole = scene(*caches)
    parts = diff_caches(caches[0].path, caches[1].path, block_values=12).teachers["scene"]  # 4 rows
    assert parts.kl_mean == pytest.approx(whole.kl_mean, rel=1e-12)
    assert vars(parts) | {"kl_mean": 0} == vars(whole) | {"kl_mean": 0}


# -- what is not compared ---------------------------------------------------------------------------------------------


def test_other_numbers_of_classes_are_said_and_not_compared(tmp_path: Path) -> None:
    a = one(tmp_path / "a", Rows.of(names(8), 3), origin(classes=3))
    b = one(tmp_path / "b", Rows.of(names(8), 5), origin(classes=5))
    found = scene(a, b)
    assert found.not_compared == "A has 3 classes, B has 5"
    assert (found.in_both, found.bit_equal, found.argmax_changes, found.kl_mean) == (8, None, None, None)


def test_logits_are_not_compared_with_probabilities(tmp_path: Path) -> None:
    a = one(tmp_path / "a", Rows.of(names(8)))
    b = one(tmp_path / "b", Rows.of(names(8)), origin(kind="probs"))
    assert scene(a, b).not_compared == "A stores logits, B stores probs"


def test_another_class_order_is_not_compared_column_by_column(tmp_path: Path) -> None:
    def named(*classes: str) -> Origin:
        made = origin(class_order=json.dumps(classes))
        return Origin(made.teacher, made.fingerprint, made.value_kind, 3, made.dtype, classes)

    a = one(tmp_path / "a", Rows.of(names(8)), named("bus", "park", "tram"))
    b = one(tmp_path / "b", Rows.of(names(8)), named("park", "bus", "tram"))
    found = scene(a, b)
    assert str(found.not_compared).startswith("A and B have the same classes in another order: column 0 is bus of A")
    assert "class_order" in (found.difference or "")


def test_every_differing_part_of_the_fingerprint_is_named(tmp_path: Path) -> None:
    rows = Rows.of(names(3))
    made = origin(weights="w1", precision="fp32"), origin(weights="w2", precision="tf32")
    found = scene(one(tmp_path / "a", rows, made[0]), one(tmp_path / "b", rows, made[1]))
    assert found.difference == "precision: fp32 → tf32; weights: w1 → w2"
    assert (found.fingerprints_equal, found.bit_equal) == (False, 3)


def test_only_the_current_fingerprint_is_compared(tmp_path: Path) -> None:
    rows = Rows.of(names(5), seed=1)
    a, b = one(tmp_path / "a", rows), one(tmp_path / "b", rows)
    Rows.of(names(9), seed=2).write(b.path / "packs", origin(weights="of another time"))
    found = scene(a, b)
    assert (found.rows_b, found.bit_equal) == (5, 5)


# -- caches of an older script, and no caches -------------------------------------------------------------------------


def test_a_cache_of_an_older_script_is_compared_with_a_note(tmp_path: Path) -> None:
    a, b = Rows.of(names(10), seed=1), Rows.of(names(12), seed=1)
    a = nudged(a, {names(1)[0]: 100.0})
    report = diff_caches(older(tmp_path / "a", scene=a), one(tmp_path / "b", b).path)
    found = report.teachers["scene"]
    assert (found.in_both, found.only_in_b, found.bit_equal) == (10, 2, 9)
    assert (found.fingerprints_equal, found.difference, found.other_features) == (None, None, None)
    assert len(report.notes) == 1
    assert "older script" in report.notes[0]
    both = diff_caches(tmp_path / "a" / "A2b", tmp_path / "a" / "A2b")
    assert (both.teachers["scene"].bit_equal, len(both.notes)) == (10, 2)


def test_older_teachers_of_different_sizes_are_each_compared(tmp_path: Path) -> None:
    made = older(tmp_path, scene=Rows.of(names(4), 3), city=Rows.of(names(4), 5))
    assert {name: found.bit_equal for name, found in diff_caches(made, made).teachers.items()} == {
        "scene": 4,
        "city": 4,
    }


# -- the command ------------------------------------------------------------------------------------------------------


def test_diff_exits_0_and_says_in_words_and_json_what_half_precision_cost(
    run: Run, cached: World, dump: Run, world: World
) -> None:
    dump("--dtype", "fp16", "--cache-root", "cache/half")
    result = run("diff", "cache/A2b", "cache/half/A2b")
    assert result.exit_code == 0
    assert "tiny: fingerprints differ (dtype: fp32 → fp16)" in result.stdout
    assert "KL(A ‖ B), mean" in result.stdout
    content = json.loads(run("diff", "cache/A2b", "cache/half/A2b", "--only", "tiny", "--json").stdout)
    assert list(content["teachers"]) == ["tiny"]
    tiny = content["teachers"]["tiny"]
    files = world.permitted()
    a, b = (np.stack([np.load(root / world.view("tiny", f).relative_to(world.cache)) for f in files])
            for root in (world.cache, world.root / "cache" / "half" / "A2b"))  # fmt: skip
    assert (tiny["rows_a"], tiny["in_both"], tiny["only_in_b"]) == (20, 20, 0)
    assert tiny["argmax_changes"] == (a.argmax(1) != b.argmax(1)).sum()
    assert tiny["kl_max"] == pytest.approx(torch_kl(a, b).max(), rel=1e-6)


def test_teachers_of_one_side_are_named(run: Run, cached: World, world: World) -> None:
    run("dump", "--target", "b", "--json-path", world.json_path, *TINY, "--only", "tiny", "--cache-root", "one")
    result = run("diff", "cache/A2b", "one/A2b")
    assert (result.exit_code, "only in A: other" in result.stdout) == (0, True)
    assert "tiny: fingerprints equal" in result.stdout


def test_20_changed_files_are_shown_and_1000_listed_and_what_is_left_out_is_said(run: Run, tmp_path: Path) -> None:
    files = names(1005)
    a = Rows.of(files, seed=1)
    b = Rows(a.files, a.keys, a.inputs, a.logits[:, [2, 0, 1]].copy())
    one(tmp_path / "a", a)
    one(tmp_path / "b", b)
    result = run("diff", "a/A2b", "b/A2b")
    assert result.stdout.count("scene: argmax ") == 20
    assert "scene: … and 985 more; --json lists 1,000" in result.stdout
    found = json.loads(run("diff", "a/A2b", "b/A2b", "--json").stdout)["teachers"]["scene"]
    assert (found["argmax_changes"], len(found["changed"]), found["changed_left_out"]) == (1005, 1000, 5)
    few = [row["file"] for row in found["changed"][:20]]
    assert all(file in result.stdout for file in few)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["a/A2b", "a/A2b", "--only", "ghost"], 3, "neither cache holds logits of ghost"),
        (["a/A2b"], 2, "Missing argument"),
    ],
)
def test_errors_keep_their_exit_codes(run: Run, tmp_path: Path, args: list[str], code: int, message: str) -> None:
    one(tmp_path / "a", Rows.of(names(3)))
    result = run("diff", *args)
    assert (result.exit_code, message in result.stderr) == (code, True)
