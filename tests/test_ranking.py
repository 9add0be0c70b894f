"""Rankers: pairs, whole series on one side, exactly 1 − P for swapped pairs, and one loop for all of it."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO, Run
from rank_fixtures import gallery, write_pairs
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score
from train_fixtures import Listening
from typer.testing import CliRunner

from kd_cache.cli import app
from kd_cache.commands import Run as Given
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.provenance import Provenance
from kd_cache.errors import CheckpointError, DataLeakageError, ManifestError, UsageError
from kd_cache.train.checkpoint import read_record, save_checkpoint
from kd_cache.train.evaluation import interval_of_mean
from kd_cache.train.pairs import Pair, divide_pairs, groups_of_series, read_pairs, sieve
from kd_cache.train.ranker import EMBEDDINGS, Plan, Ranker, load_ranker, probability
from kd_cache.train.ranking import RankJob, RankTraining, ranking_figures, train_ranker
from kd_cache.train.settings import RANK, Settings, Stage
from teachers.commands import RANK as RANK_COMMAND
from teachers.embeddings import Source
from teachers.ranking import _settings

SOURCES = {"scene": "light", "city": "edges", "looks": "spread", "texture": "corner"}
"""Called as in configs/, and what they are."""
ROW = {"a": "x", "b": "y", "winner": "a", "agreement": 0.8, "reviewers": 3, "series": "s"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gallery, its pairs, and four sources that were extracted; not to be changed."""
    root = tmp_path_factory.mktemp("gallery")
    _, rows = gallery(root)
    write_pairs(root / "pairs.csv", rows)
    own = [text for name, net in SOURCES.items() for text in ("--teacher", f"{name}={root}/nets.py:{net}")]
    where = ["--json-path", f"{root}/dataset.json", "--output-dir", f"{root}/outputs"]
    result = CliRunner().invoke(app, ["train", "extract", "--target", "b", *own, *where])
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def here(shelf: Path, tmp_path: Path) -> Path:
    """A copy of it, in which commands run."""
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    return tmp_path


def ranker_job(root: Path, output: Path, *sources: str, epochs: int = 6, **changed: Any) -> RankJob:
    own = {name: changed.pop(name) for name in list(changed) if name in RankJob.__dataclass_fields__}
    stages = (Stage(changed.pop("level", 0), epochs, 0.02),)
    if sources and not (output / "embeddings").exists():
        (output / "embeddings").symlink_to(root / "outputs/embeddings")
    arch = EMBEDDINGS if sources else f"{root}/nets.py:trunk"
    quick = {"val_ratio": 0.15, "warmup_epochs": 1, "ema": 0.0, "dropout": 0.1, "arch": arch, "stages": stages}
    job = RankJob(
        settings=Settings(RANK, **{**quick, **changed}),
        data=Dataset.load("b", root / "dataset.json"),
        output_dir=output,
        device=torch.device("cpu"),
        embeddings=sources,
        pairs=root / "pairs.csv",
        workers=0,
    )
    return replace(job, **own)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_a_table_and_json_say_the_same(tmp_path: Path) -> None:
    rows = [
        ROW,
        {**ROW, "b": "z", "winner": "b"},
        {**ROW, "a": "z", "winner": "tie"},
        {**ROW, "a": "w", "agreement": 0.5},
    ]
    table = write_pairs(tmp_path / "pairs.csv", rows)
    (tmp_path / "pairs.tsv").write_text(table.read_text().replace(",", "\t"))
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    found = [read_pairs(tmp_path / f"pairs.{kind}", 1 << 20).pairs for kind in ("csv", "tsv", "json")]
    assert found[0] == found[1] == found[2]
    assert found[0][1] == Pair("x", "z", 1, 0.8, 3, "s")
    assert [pair.winner for pair in found[0]] == [0, 1, None, None]  # half of the votes are a tie


WRONG: dict[str, dict[str, Any]] = {
    "a is None, expected a text": {"a": None},
    "series is , expected a text": {"series": ""},
    "a and b are both x": {"b": "x"},
    "winner is x, expected a, b or tie": {"winner": "x"},
    "agreement is 1.5, expected a share": {"agreement": 1.5},
    "agreement is NaN, expected a number": {"agreement": "NaN"},
    "agreement is True, expected a number": {"agreement": True},
    "reviewers is 2.5, expected how many": {"reviewers": 2.5},
    "split is all, expected train, val, test": {"split": "all"},
    "x and y: 2 rows": {"a": "y", "b": "x"},
}


def test_everything_that_is_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([ROW, *({**ROW, **change} for change in WRONG.values())]))
    with pytest.raises(ManifestError) as caught:
        read_pairs(path, 1 << 20)
    assert [text for text in WRONG if text not in caught.value.message] == []
    for content, told in (('{"a": 1}', "a list of objects"), ("[", "not valid"), ("[]", "is empty")):
        path.write_text(content)
        with pytest.raises(ManifestError, match=told):
            read_pairs(path, 1 << 20)
    (tmp_path / "pairs.csv").write_text("a,b,winner,agreement,series\n")
    with pytest.raises(ManifestError, match="columns reviewers once"):
        read_pairs(tmp_path / "pairs.csv", 1 << 20)
    with pytest.raises(ManifestError, match="cannot read"):
        read_pairs(tmp_path / "none.json", 1 << 20)


def test_each_pair_is_left_out_for_one_reason() -> None:
    pairs = [Pair("x", str(n), *told, "s") for n, told in enumerate([(0, 0.9, 2), (None, 0.5, 1), (None, 0.5, 4),
                                                                      (1, 0.69, 2), (1, 0.7, 9)])]  # fmt: skip
    found = sieve(pairs, 0.7, 2)
    assert (found.pairs, found.ties) == ((pairs[0], pairs[4]), (pairs[2],))
    assert found.left_out == {"fewer than 2 reviewers": 1, "tied": 1, "agreement below 0.7": 1}


def drawn_pairs(seed: int, series: int = 40, shared: int = 6) -> list[Pair]:
    """Series of different lengths; some samples are in two of them."""
    chance = np.random.default_rng(seed)
    pairs = []
    for number in range(series):
        files = [f"{number}/{image}" for image in range(3 + number % 4)]
        if number < shared:
            files[0] = f"{number + 20}/1"
        pairs += [Pair(a, b, int(chance.integers(2)), 0.9, 3, f"s{number}") for a, b in itertools.pairwise(files)]
    return pairs


@pytest.mark.parametrize("seed", range(3))
def test_series_and_samples_never_straddle(seed: int) -> None:
    pairs = drawn_pairs(seed)
    assert groups_of_series(pairs)["s20"] == groups_of_series(pairs)["s0"] == "s0"
    tests, validated = [], set()
    for fold in range(6):
        division = divide_pairs(pairs, val_ratio=0.15, test_ratio=0.2, fold=fold)
        sides = (division.train, division.validation, division.test)
        assert sorted(pair for side in sides for pair in side) == sorted(pairs)
        for mine, other in itertools.combinations(sides, 2):
            assert not {pair.series for pair in mine} & {pair.series for pair in other}
            assert not {file for pair in mine for file in pair[:2]} & {file for pair in other for file in pair[:2]}
        tests.append(division.test)
        validated |= set(division.validation)
        turned = divide_pairs(pairs[::-1], val_ratio=0.15, test_ratio=0.2, fold=fold)
        assert set(turned.validation) == set(division.validation)
    assert len(set(tests)) == 1
    assert validated == set(pairs) - set(tests[0])


def test_most_of_the_pairs_train_and_too_few_groups_are_refused() -> None:
    large = [Pair("m", f"m{n}", 0, 1, 2, "large") for n in range(30)]
    small = [Pair(f"{n}a", f"{n}b", 0, 1, 2, f"small {n}") for n in range(2)]
    division = divide_pairs(large + small, val_ratio=0.3, test_ratio=0.3)
    assert (division.train, len(division.validation), len(division.test)) == (tuple(large), 1, 1)
    assert division.train_locations == division.validation_locations == 1
    with pytest.raises(UsageError, match="2 groups of series"):
        divide_pairs(large + small[:1], val_ratio=0.3, test_ratio=0.3)
    assert len(divide_pairs(large + small, val_ratio=0.3, test_ratio=0).test) == 0


def test_a_split_of_one_s_own_counts_and_must_not_tear_series_apart() -> None:
    rows = [
        Pair(f"{n}a", f"{n}b", 0, 1, 2, f"s{n}", split) for n, split in enumerate(("train", "val", "test", "train"))
    ]
    division = divide_pairs(rows, val_ratio=0.1, test_ratio=0.1, share=0.5)
    assert (len(division.train), division.validation, division.test) == (1, (rows[1],), (rows[2],))
    for torn in (rows[0]._replace(a="x", split="test"), rows[3]._replace(b="1b")):  # by series, by a sample
        with pytest.raises(DataLeakageError, match="in two splits"):
            divide_pairs([*rows, torn], val_ratio=0.1, test_ratio=0.1)
    with pytest.raises(UsageError, match="have no split"):
        divide_pairs([*rows, rows[0]._replace(a="x", split=None)], val_ratio=0.1, test_ratio=0.1)


# -- the net -----------------------------------------------------------------------------------------------------------


def test_a_swapped_pair_has_the_rest_of_the_probability_to_the_last_bit() -> None:
    chance = torch.Generator().manual_seed(1)
    most = torch.finfo(torch.float32).max
    values = [0.0, -0.0, 1e-45, -1e-45, 1e-7, 0.5, 17.5, -17.5, 88.0, 1e4, -1e30, most, -most]
    extreme = torch.tensor([[a, b] for a in values for b in values])
    for logits in (extreme, extreme.double(), 20 * torch.randn(4096, 2, generator=chance)):
        p, swapped = probability(logits), probability(logits.flip(1))
        assert torch.equal(swapped, 1 - p)
        assert torch.equal(p, 1 - swapped)
        torch.testing.assert_close(p, torch.softmax(logits.double(), dim=1)[:, 0].to(p.dtype), rtol=0, atol=1.2e-7)


def nets() -> dict[str, tuple[Ranker, tuple[int, ...]]]:
    plan = Plan(EMBEDDINGS, sources=[["one", "", 5], ["two", "", 2]], dropout=0.5)
    whole = Plan("cp_mobile", sizes={"base_channels": 8})
    return {"embeddings": (plan.ranker(plan.trunk(3), 3), (7,)), "whole": (whole.ranker(whole.trunk()), (32, 32))}


@pytest.mark.parametrize("kind", ["embeddings", "whole"])
@pytest.mark.parametrize("count", [1, 7, 33])
def test_a_net_swaps_its_logits_exactly(kind: str, count: int) -> None:
    net, shape = nets()[kind]
    net.eval()
    chance = torch.Generator().manual_seed(count)
    a, b = (torch.randn(count, *shape, generator=chance).round() * 1e3 for _ in "ab")
    a[0] = b[0]  # equal samples
    some = torch.arange(count) % 3 == 0  # not all are swapped, as in a person's table
    mixed_a, mixed_b = (torch.where(some.view(-1, *[1] * len(shape)), x, y) for x, y in ((b, a), (a, b)))
    with torch.no_grad():
        p, swapped, mixed = net.prefer(a, b), net.prefer(b, a), net.prefer(mixed_a, mixed_b)
    assert torch.equal(swapped, 1 - p)
    assert torch.equal(mixed, torch.where(some, swapped, p))
    assert p[0] == 0.5
    assert count == 1 or p.unique().numel() > 2


# -- figures -----------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_scikit_learn() -> None:
    chance = np.random.default_rng(0)
    logits = chance.normal(size=(300, 2)).astype(np.float32).round(1)  # ties among them
    logits[logits[:, 0] == logits[:, 1], 0] += 0.05
    winners = (chance.normal(size=300) > logits[:, 0] - logits[:, 1]).astype(np.int64)
    series = [f"s{number % 12}" for number in range(300)]
    found = ranking_figures(logits, winners, series, series, 1)
    p = 1 / (1 + np.exp(logits[:, 1].astype(float) - logits[:, 0]))
    first = winners == 0
    expected = {
        "auc": roc_auc_score(first, p),
        "brier": 2 * brier_score_loss(first, p),
        "log_loss": log_loss(first, p),
        "accuracy": accuracy_score(first, p > 0.5),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    mine = np.array(series) == "s3"
    of_series = {"auc": roc_auc_score(first[mine], p[mine]), "brier": 2 * brier_score_loss(first[mine], p[mine])}
    assert {name: found["by"]["series"]["s3"][name] for name in of_series} == pytest.approx(of_series, abs=1e-6)
    baseline = found["baselines"]["majority of training"]
    assert baseline["better_by"] == pytest.approx(found["accuracy"] - (winners == 1).mean())
    assert found["intervals"]["accuracy"] == interval_of_mean((p > 0.5) == first, np.array(series))
    for low, high, value in (
        (*found["intervals"]["accuracy"], found["accuracy"]),
        (*baseline["interval"], baseline["accuracy"]),
        (*baseline["better_by_interval"], baseline["better_by"]),
    ):
        assert low < value < high
    turned = ranking_figures(logits[:, ::-1], 1 - winners, series, series, 0)
    same = ("accuracy", "auc", "ece", "brier", "log_loss")
    assert {name: turned[name] for name in same} == pytest.approx({name: found[name] for name in same}, abs=1e-12)
    one = ranking_figures(np.zeros((2, 2)), np.array([0, 0]), ["s", "s"], ["s", "s"], 0)
    assert (one["auc"], one["intervals"], one["baselines"]["always a"]["interval"]) == (None, None, None)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["one_source", "four_sources", "end_to_end"])
def test_a_known_ranking_is_learnt_on_series_that_were_never_seen(run: Run, here: Path, config: str) -> None:
    save_checkpoint(here / "init.safetensors", Plan("nets.py:trunk").trunk(1).state_dict(), {})
    end_to_end = ("--init", "init.safetensors", "--arch", "nets.py:trunk", "--lr", 0.01, "--time-roll", 0.5)
    start = end_to_end if config == "end_to_end" else ()
    drawn = ("--report",) if config == "one_source" else ()
    quick = ("--epochs", 9, "--ema", 0, "--workers", 0, "--json", *drawn, *start)
    where = ("--config", REPO / f"configs/rank_{config}.yaml", "--json-path", "dataset.json", "--pairs", "pairs.csv")
    result = run("train", "rank", *where, *quick)
    assert result.exit_code == 0, result.output
    report, pages = (json.loads(result.stdout)[name] for name in ("ranker", "reports"))
    for page in pages:
        text = Path(page).read_text()
        assert [told for told in ("Ranker A2b", "test pairs are right", "guessing always a") if told not in text] == []
    assert len(pages) == len(drawn)
    test = report["results"]["test"]
    assert test["accuracy"] >= 0.9
    assert test["auc"] >= 0.95
    assert test["baselines"]["always a"]["better_by_interval"][0] > 0
    assert len(test["by"]["series"]) == 2
    assert {path.name for path in Path(report["run"]).iterdir()} >= {"config.yaml", "best.safetensors", "results.json"}
    record = read_record(report["checkpoint"])
    assert not {*record["series"]["trained"], *record["series"]["validated"]} & test["by"]["series"].keys()
    assert "rank A2b" in run("info", "outputs").stdout
    assert "tells no classes apart" in run("evaluate", report["checkpoint"]).stderr


def test_a_ranker_that_is_loaded_again_is_the_one_that_was_measured(shelf: Path, tmp_path: Path) -> None:
    for sources, arch in ((("scene", "looks"), None), ((), f"{shelf}/nets.py:trunk")):
        job = ranker_job(shelf, tmp_path, *sources, name="x" * (1 + len(sources)))
        report = train_ranker(job)
        ranker = load_ranker(report.checkpoint, arch)
        assert ranker.sources == sources
        assert ranker.provenance is not None
        assert len(ranker.provenance.trained) == len({file for pair in job.division.train for file in pair[:2]})
        assert ranker.provenance.complete == (not sources)  # of nets of one's own nobody says what made them
        clips = RankTraining(job).test
        a, b = clips._features(np.arange(len(clips))).unbind(1)
        right = (ranker.prefer(a, b) < 0.5).int() == clips.winners
        assert float(right.float().mean()) == pytest.approx(report.results["test"]["accuracy"])
        again = train_ranker(replace(job, name="again"))
        assert sha256(again.checkpoint) == sha256(report.checkpoint)
    with pytest.raises(UsageError, match="of its maker's own"):
        load_ranker(report.checkpoint)
    plan = read_record(report.checkpoint)["ranker"]
    for change in (
        {"sources": [["x", "y", 0]]},
        {"hidden": [-1]},
        {"width": "x"},
        {"dropout": 2},
        {"arch": ...},
        {"sizes": {"x": 1}},
    ):
        changed = {name: value for name, value in {**plan, **change}.items() if value is not ...}
        save_checkpoint(tmp_path / "other.safetensors", ranker.state_dict(), {"ranker": changed})
        with pytest.raises(CheckpointError, match="no ranker's checkpoint"):
            load_ranker(tmp_path / "other.safetensors")
    changed = {**plan, "hidden": [65]}
    save_checkpoint(tmp_path / "other.safetensors", ranker.state_dict(), {"ranker": changed})
    with pytest.raises(CheckpointError, match="do not fit the ranker that its record describes"):
        load_ranker(tmp_path / "other.safetensors", f"{shelf}/nets.py:trunk")


def test_what_trained_and_is_tested_too_is_said(here: Path) -> None:
    job = ranker_job(here, here / "out")
    trained, tested = job.division.train[0].a, job.division.test[0].a
    shutil.copy(here / trained, here / tested)  # by its bytes
    record = {"provenance": Provenance.of([job.division.test[0].b, job.division.validation[0].b]).as_json()}
    save_checkpoint(here / "init.safetensors", Plan.of(job.settings, []).trunk().state_dict(), record)
    training = RankTraining(replace(job, init=here / "init.safetensors"), heard := Listening())
    training._announce()
    assert heard.told("1 test features are byte for byte a training sample's, of other series: the test is better")
    assert heard.told("test samples trained what this starts from")
    assert heard.told("validation samples trained what this starts from")


@pytest.mark.parametrize("sources", [("scene", "looks"), ()], ids=["frozen", "end to end"])
def test_a_run_that_was_stopped_ends_in_the_same_bits(shelf: Path, tmp_path: Path, sources: tuple[str, ...]) -> None:
    job = ranker_job(shelf, tmp_path, *sources, ema=0.9)
    with pytest.raises(KeyboardInterrupt):
        train_ranker(job, Listening(stop_after=3))
    resumed = train_ranker(job)
    assert resumed.how == "resumed"
    whole = train_ranker(replace(job, name="whole", resume="fresh"))
    assert sha256(resumed.checkpoint) == sha256(whole.checkpoint)
    assert resumed.results["test"] == whole.results["test"]


@pytest.mark.parametrize(("level", "kept"), [(0, set()), (1, {"body"}), (2, {"body", "neck"})])
def test_what_is_frozen_of_a_trunk_stays_to_the_bit(shelf: Path, tmp_path: Path, level: int, kept: set[str]) -> None:
    job = ranker_job(shelf, tmp_path, level=level, epochs=1)
    trunk = Plan.of(job.settings, []).trunk(5)
    save_checkpoint(tmp_path / "init.safetensors", trunk.state_dict(), {})
    heard = Listening()
    report = train_ranker(replace(job, init=tmp_path / "init.safetensors"), heard)
    ranker: Any = load_ranker(report.checkpoint, f"{shelf}/nets.py:trunk")
    before, after = trunk.state_dict(), ranker.trunk.net.state_dict()
    assert {name.partition(".")[0] for name in before if torch.equal(before[name], after[name])} - {"head"} == kept
    assert heard.told("what")  # nobody knows what made such a checkpoint
    assert not ranker.provenance.complete


def test_ties_are_left_out_or_count_as_half_a_win_for_each(shelf: Path, tmp_path: Path) -> None:
    text = (shelf / "pairs.csv").read_text().replace(",a,0.8,", ",tie,0.8,")
    (tmp_path / "pairs.csv").write_text(text)
    half, out = (ranker_job(shelf, tmp_path, ties=ties, pairs=tmp_path / "pairs.csv") for ties in ("half", "out"))
    assert {pair.winner for pair in out.division.train} == {1}
    assert (half.division.validation, half.division.test) == (out.division.validation, out.division.test)
    ties = out.sieved.left_out["tied"]
    assert ties == text.count("tie,")
    train = RankTraining(half, heard := Listening()).train
    assert heard.told(f"{ties} tied") and heard.told("half a win")  # noqa: PT018
    assert 0.3 < (train.winners == 0).float().mean() < 0.4  # half of two thirds of them


def test_shuffled_winners_and_quick_experiments_publish_nothing(shelf: Path, tmp_path: Path) -> None:
    for name, changed in (("shuffled", {"shuffle_labels": True}), ("quick", {"quick_experiment": 0.5})):
        report = train_ranker(ranker_job(shelf, tmp_path, "scene", name=name, epochs=1, **changed))
        assert not report.published
        assert not (tmp_path / f"rank/A2b/{name}/best.safetensors").exists()
    assert report.results["locations"] == {"train": 6, "validation": 1}


def unseen(here: Path, *files: str) -> None:
    """Pairs of a series that name these."""
    with (here / "pairs.csv").open("a") as file:
        file.writelines(f"{name},s0/{number}.npy,a,0.9,3,series 0\n" for number, name in enumerate(files))


def test_samples_that_must_not_or_cannot_be_used_are_named_at_once(run: Run, here: Path) -> None:
    def refused(
        code: int, *told: str, more: tuple[object, ...] = ("--embeddings", "scene", "--embeddings", "city")
    ) -> None:
        where = ("--target", "b", "--json-path", "dataset.json", "--pairs", "pairs.csv", "--epochs", 1)
        result = run("train", "rank", *where, *more)
        assert result.exit_code == code, result.output
        assert [text for text in told if text not in result.stderr] == []

    manifest = json.loads((here / "dataset.json").read_text())
    pairs = (here / "pairs.csv").read_text()
    np.save(here / "new.npy", np.ones((9, 10), np.float32))
    manifest["train"] += [{"file": "new.npy", "scene_label": 0, "device_id": "A", "split": "train"}]
    manifest["test"] += [{"file": "held.npy", "scene_label": 0, "device_id": "A", "split": "test"}]
    (here / "dataset.json").write_text(json.dumps(manifest))
    unseen(here, "new.npy")
    refused(3, "embeddings scene: ", "embeddings city: ", "new.npy")  # of all sources at once
    refused(2, "new.npy, s0/0.npy", "different shapes", more=("--arch", "nets.py:trunk"))
    unseen(here, "no.npy", "never.npy")
    refused(3, "2 samples of the pairs", "no.npy", "never.npy")
    (here / "pairs.csv").write_text(pairs)
    unseen(here, "held.npy")
    refused(6, "1 files are not permitted", "held.npy")
    (here / "pairs.csv").write_text(pairs)
    np.save(here / "s3/1.npy", np.ones((8, 10), np.float32))
    refused(5, "1 features changed", "s3/1.npy")
    (here / "pairs.csv").write_text(pairs.replace("\n", ",train\n").replace("series,train", "series,split", 1))
    refused(2, "is left to validate with")
    (here / "pairs.csv").write_text(
        pairs.replace("\n", ",train\n").replace("series,train", "series,split", 1)[:-6] + "test\n"
    )
    refused(6, "series 15 in test, series 15 in train")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--embeddings", "scene", "--embeddings", "scene"), "named twice"),
        (("--embeddings", "scene", "--freeze", "none"), "both say what to stand on"),
        (("--embeddings", "scene", "--init", "x"), "both say what to stand on"),
        (("--embeddings", "scene", "--augment", "moderate"), "nothing of the clips can be augmented"),
        (("--embeddings", "scene", "--mixup", 0.2), "nothing of the clips can be augmented"),
        (("--embeddings", "none"), "no embeddings are called none"),
        (("--freeze", "full"), "this one is untrained"),
        (("--name", "../x"), "cannot be a folder's name"),
        (("--embeddings", "scene", "--min-reviewers", 9), "160 fewer than 9 reviewers"),
        (("--arch", "unknown"), "no architecture is called unknown"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    run: Run, here: Path, more: tuple[object, ...], told: str
) -> None:
    result = run("train", "rank", "--target", "b", "--json-path", "dataset.json", "--pairs", "pairs.csv", *more)
    assert result.exit_code == 2, result.output
    assert told in result.stderr


@pytest.mark.parametrize(
    ("given", "stage", "roll", "mask"),
    [
        ({}, "off", 0, 0),
        ({"augment": "moderate"}, "moderate", 1.0, 0),
        ({"augment": "full", "time_roll": 0.2, "compile": True}, "full", 0.2, 0.1),
        ({"time_roll": 0.2}, "full", 0.2, 0),
    ],
)
def test_a_ranker_s_clips_are_changed_as_asked_and_compiled_batches_are_whole(
    given: dict[str, Any], stage: str, roll: float, mask: float
) -> None:
    values = {option.name: option.default for option in RANK_COMMAND.options}
    found = _settings(Given(RANK_COMMAND, values | given, {}))
    how = found.augmentation(found.stages[0])
    assert (found.stages[0].augment, how.time_roll, how.time_mask) == (stage, roll, mask)
    assert found.drop_last == found.compile == given.get("compile", False)


def test_nets_of_one_s_own_embed_and_others_are_refused(run: Run, here: Path) -> None:
    where = ("train", "extract", "--target", "b", "--json-path", "dataset.json")
    for more, told in (
        ((), "nothing to embed with"),
        (("--teacher", "x=nets.py:logits"), "x gives logits, expected embedding"),
        (("--teacher", "x=nets.py:light", "--teacher", "x=nets.py:edges"), "two sources are called x"),
    ):
        result = run(*where, *more)
        assert (result.exit_code, told in result.stderr) == (2, True), result.output
    again = run(
        *where, *(text for name, net in SOURCES.items() for text in ("--teacher", f"{name}=nets.py:{net}")), "--json"
    )
    assert json.loads(again.stdout)["samples_scored"] == 0
    with pytest.raises(UsageError, match="no net that a teacher could stand on"):
        Source.open(here / "outputs/embeddings/A2b", "scene")
