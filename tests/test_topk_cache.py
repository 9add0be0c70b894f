"""Caches of top-k rows, from the dump to the student; and what is refused of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, World
from fault_tools import often
from store_fixtures import flip, forks
from test_topk import same
from torch.nn import functional as F
from torch.utils.data import DataLoader
from train_fixtures import town

import kd_cache
from kd_cache import BatchLoader, LogitCache, Provenance, TopK
from kd_cache.care.diff import diff_caches
from kd_cache.distill import DistillLoss, fit_weights, fuse, held_out, kl
from kd_cache.errors import UsageError
from kd_cache.score.tolerance import topk_deviation
from kd_cache.store.topk import TopKCodec

TEACHERS = """
import torch

class Wide(torch.nn.Module):
    def __init__(self, classes=600, value_kind="logits", frames=None, scale=1.0, seed=0):
        super().__init__()
        self.num_classes, self.value_kind, self.num_frames, self.scale = classes, value_kind, frames, scale
        drawn = torch.randn(20, classes, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(4 * drawn, requires_grad=False)

    def forward(self, features):
        logits = self.scale * (features.mean(dim=1) @ self.weight)
        return logits.softmax(dim=1) if self.value_kind == "probs" else logits

    def fingerprint_parts(self):
        return {"architecture": f"wide/{self.scale}"}

def wide(ckpt): return Wide()
def broad(ckpt): return Wide(seed=1)
def narrow(ckpt): return Wide(511)
def probs(ckpt): return Wide(value_kind="probs")
def framed(ckpt): return Wide(frames=2)
def huge(ckpt): return Wide(scale=1e6)
"""
K = 20
__all__ = ["town"]


class Inputs:
    """Made by their number; the last layer of `net` makes of them an image's classes, or a language's."""

    spec = "made/1"

    def __init__(self) -> None:
        self.keys = [f"{number}.png" for number in range(7)]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.randn(12, generator=torch.Generator().manual_seed(number))


class Net(torch.nn.Linear):
    architecture = "linear/1"


def net(classes: int, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net(12, classes)
    made.weight.data *= 15  # it is sure of some classes
    return made


@forks
@pytest.mark.parametrize(("classes", "k"), [(1_000, 100), (70_000, 64)])
def test_an_image_s_and_a_language_s_teacher_from_the_dump_to_a_step(classes: int, k: int, tmp_path: Path) -> None:
    data, made = Inputs(), {"a": net(classes), "b": net(classes, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = kd_cache.score(data, made, cache=tmp_path / "wide", dtype=f"topk:{k}")
        assert kd_cache.verify(data, made, cache=tmp_path / "wide").exit_code == 0
    assert f"dtype=topk:{k}" in repr(cache)
    inputs = torch.stack([data[data.keys.index(file)] for file in cache.files])
    with torch.no_grad():
        exact = torch.stack([each.eval()(inputs) for each in made.values()], dim=1)
    topk = cache.batch(cache.files)
    codec = TopKCodec(k, classes)
    assert same(topk, TopK.of(codec.encode(exact.flatten(0, 1).numpy()).reshape(7, 2, -1), codec))
    assert (topk.ids.dtype, topk.log_probs.dtype, topk.num_classes) == (torch.int64, torch.float32, classes)
    assert (topk.dense().exp().sum(dim=2) - 1).abs().max() < 1e-3
    # the costs that the dump measured, from scratch
    kept = json.loads((tmp_path / "wide" / "cache_index.json").read_text())["kd_cache"]["teachers"]["b"]
    assert kept["dtype"] == kept["parts"]["dtype"] == f"topk:{k}"
    for temperature, end in ((1.0, ""), (2.0, "_t2"), (4.0, "_t4")):
        p = (exact[:, 1].double() / temperature).log_softmax(dim=1)
        cost = F.kl_div(topk[:, 1].dense(temperature).double(), p, log_target=True, reduction="none").sum(dim=1)
        outside = 1 - p.exp().gather(1, topk.ids[:, 1]).sum(dim=1)
        told = kept["storage_cost"]
        measured = float(cost.mean()), float(cost.max()), float(outside.mean())
        assert (told[f"kl_mean{end}"], told[f"kl_max{end}"], told[f"outside{end}"]) == pytest.approx(measured, rel=1e-4)
    # every way to a batch
    loaded = DataLoader(attached := cache.attach(data, data.keys), 4, num_workers=1, collate_fn=attached.collate)
    theirs = [rows for _, rows in loaded]
    assert same(theirs[1], cache.batch(data.keys[4:]))
    assert same(attached[3][1], cache.batch(data.keys[3:4])[0])
    assert all(same(rows, cache.batch(files)) for rows, files in zip(
        (rows for rows, _ in BatchLoader(cache, data.keys, torch.arange(7), batch_size=4)),
        (data.keys[:4], data.keys[4:]), strict=True))  # fmt: skip
    assert same(cache.tensor(["b"], data.keys[:2]), cache.batch(data.keys[:2])[:, [1]])
    # a step
    student = net(classes, 2)
    for temperature in (1.0, 2.0):
        before = kl(student(inputs), topk[:, 0], temperature=temperature).mean()
        student.zero_grad()
        before.backward()
        with torch.no_grad():
            for each in student.parameters():
                each -= 0.1 * each.grad
        assert kl(student(inputs), topk[:, 0], temperature=temperature).mean() < before


@pytest.fixture
def wide(run: Run, world: World) -> World:
    (world.root / "wide.py").write_text(TEACHERS)
    return world


def dump(run: Run, world: World, *more: object, teachers: tuple[str, ...] = ("wide",), dtype: str = f"topk:{K}") -> Any:
    named = [part for name in teachers for part in ("--teacher", f"{name}=wide.py:{name}", "--only", name)]
    return run("dump", "--target", "b", "--json-path", world.json_path, *named, "--dtype", dtype, *more)


OWN = ("--teacher", "wide=wide.py:wide")


def test_every_command_that_reads_rows_reads_these(run: Run, wide: World) -> None:
    done = dump(run, wide)
    assert done.exit_code == 0, done.output
    told = "wide: storing as topk:20, over 20 rows: kl mean "
    assert told in done.stdout
    assert "no .npy files are written: rows of wide are no vectors" in done.stderr
    assert told.removeprefix("wide: ") in run("info", wide.cache).stdout
    assert "Nothing to score" in dump(run, wide).stdout
    audit = run("verify", wide.cache, "--all", "--recompute", *OWN, "--json")
    assert audit.exit_code == 0, audit.output
    (checked,) = (each["teachers"]["wide"] for each in json.loads(audit.stdout)["caches"])
    assert (checked["fresh"], checked["recomputed"], checked["bit_exact"]) == (20, 20, 20)
    # its accuracy is that of its first ids; its pages and its difference from whole rows are of what it says
    cache = LogitCache.open(wide.cache)
    by_file = {row["file"]: row["scene_label"] for row in wide.rows if row["device_id"] == "A"}
    labelled = [file for file in cache.files if file in by_file]
    right = int((cache.batch(labelled).ids[:, 0, 0] == torch.tensor([by_file[file] for file in labelled])).sum())
    assert checked["accuracy"] == {"correct": right, "rows": 12}
    assert run("report", wide.cache).exit_code == 0
    assert dump(run, wide, "--cache-root", "whole", dtype="fp32").exit_code == 0
    apart = diff_caches(wide.root / "whole" / "A2b", wide.cache).teachers["wide"]
    cost = json.loads((wide.cache / "cache_index.json").read_text())["kd_cache"]["teachers"]["wide"]["storage_cost"]
    assert (apart.kl_mean, apart.kl_max) == pytest.approx((cost["kl_mean"], cost["kl_max"]), rel=1e-4)
    assert apart.argmax_changes == 0
    # parts make the bytes of one process, and merge brings them
    whole = wide.packs()
    for part in ("0/2", "1/2"):
        assert dump(run, wide, "--cache-root", "parts", "--shard", part).exit_code == 0
    seal = ("seal", "--target", "b", "--cache-root", "parts", "--json-path", wide.json_path)
    assert "there are no .npy files of wide" in run(*seal, "--files").stderr
    assert run(*seal).exit_code == 0
    sealed = {path.name: path.read_bytes() for path in (wide.root / "parts" / "A2b" / "packs").iterdir()}
    assert sealed == whole
    merge = ("merge", "parts/A2b", "--target", "b", "--cache-root", "merged", "--json-path", wide.json_path)
    assert run(*merge).exit_code == 0
    assert (wide.root / "merged" / "A2b" / "packs" / next(iter(whole))).exists()
    # a damaged pack is refused, found and mended
    flip(wide.cache / "packs" / next(iter(whole)))
    assert run("verify", wide.cache, "--all", *OWN).exit_code == 4
    assert run("repair", wide.cache, *OWN).exit_code == 0
    assert wide.packs() == whole


@pytest.mark.parametrize(
    ("teacher", "dtype", "why"),
    [
        ("narrow", "topk:20", "topk:20 is for 512 classes and more, found 511"),
        ("wide", "topk:600", "topk:600 keeps 600 of 600 classes"),
        ("wide", "topk:0", "expected fp32, fp16, or topk:K"),
        ("wide", "top:5", "expected fp32, fp16, or topk:K"),
        ("probs", "topk:20", "topk:20 is for logits, found probs"),
        ("framed", "topk:20", "topk:20 is for one vector a sample, found 2 frames"),
        ("wide", "topk:20 --files", "there are no .npy files of wide: top-k rows"),
    ],
)
def test_what_cannot_be_stored_so_is_refused_before_anything_is_scored(
    run: Run, wide: World, teacher: str, dtype: str, why: str
) -> None:
    refused = dump(run, wide, *dtype.split()[1:], teachers=(teacher,), dtype=dtype.split()[0])
    assert refused.exit_code == 2
    assert why in refused.stderr
    assert not wide.cache.exists()


def test_a_row_too_far_apart_for_half_precision_is_a_bad_sample(run: Run, wide: World) -> None:
    refused = dump(run, wide, teachers=("huge",))
    assert refused.exit_code == 1
    assert "do not fit topk:20" in refused.stderr


def test_a_cache_has_no_view_once_a_teacher_s_rows_are_no_vectors(run: Run, wide: World) -> None:
    assert dump(run, wide, dtype="fp32", teachers=("broad",)).exit_code == 0
    assert wide.view("broad", wide.permitted()[0]).exists()
    assert dump(run, wide).exit_code == 0
    index = json.loads((wide.cache / "cache_index.json").read_text())
    assert (index["wide"], index["broad"], index["kd_cache"]["files"]) == ({}, {}, False)
    assert not wide.view("broad", wide.permitted()[0]).exists()
    assert dump(run, wide, "--files", dtype="fp32", teachers=("broad",)).exit_code == 2
    for to in ("pt", "tsv", "npy"):
        refused = run("export", wide.cache, "--to", to, "--output", "out")
        assert (refused.exit_code, "there are no .npy files of wide" in refused.stderr) == (2, True)
    assert run("export", wide.cache, "--to", "pt", "--output", "out", "--only", "broad").exit_code == 0
    with pytest.raises(UsageError, match="do not fit into one tensor"):
        LogitCache.open(wide.cache)


@pytest.mark.parametrize("scale", [1e-3, 3.0, 100.0])
def test_rows_scored_again_are_the_same_where_only_rounding_differs(scale: float) -> None:
    codec, chance = TopKCodec(K, 600), np.random.default_rng(0)
    logits = (scale * chance.normal(size=600) + 50).astype(np.float32)
    row = codec.encode(logits[None])[0]
    noise = (scale * 1e-6 * chance.normal(size=600)).astype(np.float32)
    assert topk_deviation(logits + noise, row, codec) < 1e-5
    no_longer = np.where(logits == np.sort(logits)[-K], logits.min(), logits)
    other = logits - scale * np.eye(600)[logits.argmax()]
    for wrong in (np.roll(logits, 1), no_longer, logits + 50, other) if scale > 1 else ():
        assert topk_deviation(wrong.astype(np.float32), row, codec) > 1e-4


def test_a_missing_row_is_nan_and_its_distillation_is_skipped(run: Run, wide: World) -> None:
    assert dump(run, wide).exit_code == 0
    cache = LogitCache.open(wide.cache, on_miss="nan")
    with pytest.warns(UserWarning, match="served as NaN"):
        topk = cache.batch([*cache.files[:3], "nowhere"])
    assert topk.log_probs.isnan().all(dim=2).flatten().tolist() == [False] * 3 + [True]
    assert same(topk[:3], cache.batch(cache.files[:3]))
    student = torch.zeros(4, 600, requires_grad=True)
    objective = DistillLoss("wide", teachers=("wide",), apply_to="all", temperature=1, on_missing="skip")
    nobody, source = torch.full((4,), -100), torch.ones(4, dtype=torch.bool)
    objective(student, topk, nobody, source).backward()
    assert objective.seen.missing == 1
    assert student.grad is not None
    assert (student.grad.abs().sum(dim=1) > 0).tolist() == [True] * 3 + [False]
    with pytest.raises(UsageError, match="fills no tensor"):
        cache.batch(cache.files[:1], out=torch.empty(1, 1, 600))


def test_teachers_are_made_one_and_a_mean_of_several_spreads_their_rest() -> None:
    codec = TopKCodec(K, 600)
    logits = np.random.default_rng(1).normal(size=(5, 2, 600)).astype(np.float32) * 3
    topk = TopK.of(codec.encode(logits.reshape(10, 600)).reshape(5, 2, -1), codec)
    names = ("a", "b")
    assert same(fuse(topk, "b", teachers=names), topk[:, 1])
    assert same(fuse(topk[:, :1], "mean"), topk[:, 0])
    for temperature in (1.0, 2.0):
        dense = topk.dense(temperature)
        mean = fuse(topk, "mean", temperature=temperature) / temperature
        torch.testing.assert_close(mean.log_softmax(dim=1), dense.mean(dim=1).log_softmax(dim=1))
        linear = (fuse(topk, "probs", temperature=temperature) / temperature).softmax(dim=1)
        torch.testing.assert_close(linear, dense.exp().mean(dim=1))
    half = fuse(topk[:, :1], "weights:a=0.5", teachers=("a",))
    torch.testing.assert_close(half, 0.5 * topk[:, 0].dense())
    student, nobody = torch.zeros(5, 600), torch.full((5,), -100)
    source = torch.zeros(5, dtype=torch.bool)
    for mode in ("a", "mean"):
        objective = DistillLoss(mode, teachers=names, alpha=1, temperature=2)
        expected = kl(student, fuse(topk, mode, teachers=names, temperature=2.0), temperature=2.0).mean()
        torch.testing.assert_close(objective(student, topk, nobody, source), expected)
    for bad in ({"fusion": "entropy"}, {"fusion": "label"}, {"loss": "mse"}, {"weighting": "pmax"},
                {"temperature": 3.0}, {"temperature": 4.0, "temperature_end": 1.0}):  # fmt: skip
        objective = DistillLoss(**{"fusion": "mean", "teachers": names, **bad})
        objective.start_epoch(0)
        with pytest.raises(UsageError, match="top-k rows"):
            objective(student, topk, nobody, source)
    with pytest.raises(UsageError, match="expected top-k rows of 5 samples and 599 classes"):
        DistillLoss("mean")(torch.zeros(5, 599), topk, nobody, source)


@pytest.mark.faults
def test_a_student_is_trained_towards_such_teachers_and_refused_what_they_cannot_give(run: Run, town: World) -> None:
    """Its labels are of 3 of the 600 classes."""
    (town.root / "wide.py").write_text(TEACHERS)
    assert dump(run, town, "--num-scenes", 600, teachers=("wide", "broad")).exit_code == 0

    def student(mode: str, *more: object) -> Any:
        brief = ("--channels", "8,8,8,8", "--arch", "cp_resnet", "--epochs", 1, "--warmup-epochs", 0)
        return run("student", "--target", "b", "--teacher-mode", mode, *brief, "--temperature", 1, *OWN, "--teacher",
                   "broad=wide.py:broad", "--json", *more)  # fmt: skip

    for mode in ("wide", "mean")[: often(0, 2, 2)]:  # the gate has no time for it
        done = student(mode)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["student"]["results"]["agreement"]["rows"] > 0
    refused = student("wide", "--loss", "rkl")
    assert refused.exit_code == 2
    assert "top-k rows are for the loss kl" in refused.stderr
    # what is fitted is fitted on what they give every class
    cache, nothing = LogitCache.open(town.cache), Provenance.of([])
    rows = held_out(cache, town.data().selection, dict.fromkeys(cache.teachers, nothing))
    assert torch.equal(rows.logits, cache.batch(rows.files).dense())
    assert fit_weights(rows).of.keys() == {"wide", "broad"}
