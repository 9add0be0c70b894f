"""The stages of a dump that work at the same time: reading ahead, scoring under pressure, committing beside it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, World
from fault_tools import TIER
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_teachers import Linear

import kd_cache.score.commits
import kd_cache.score.planning
from kd_cache import FeatureSource, LogitCache, StoreError, TeacherError
from kd_cache.dataset.features import Feature
from kd_cache.errors import FeatureError
from kd_cache.score.batcher import Batcher
from kd_cache.score.device import full_precision, numerics
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.score.engine import Batch, Engine
from kd_cache.score.planning import Places, Ranks, best_batch_size
from kd_cache.score.reading import CHUNK, read_ahead
from kd_cache.score.stages import READING, SCORING, Busy
from kd_cache.score.storage_cost import StorageCost
from kd_cache.store.plan import Place, Shape
from kd_cache.watch import Watcher

CPU = torch.device("cpu")
ONLY = frozenset({"tiny"})


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> FeatureSource:
    for number in range(150):
        np.save(tmp_path / f"{number}.npy", np.full((1 + number % 5, 4), number, np.float32))
    (tmp_path / "77.npy").write_bytes(b"no feature")
    return FeatureSource(tmp_path)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_features_come_in_order_each_with_its_own_error(source: FeatureSource, workers: int) -> None:
    files = [f"{number}.npy" for number in range(150)]
    busy = Busy()
    for number, feature in enumerate(chain.from_iterable(read_ahead(source, files, workers, busy))):
        if number == 77:
            assert isinstance(feature, FeatureError)
            assert "77.npy" in feature.message
        else:
            assert isinstance(feature, Feature)
            assert feature.array.shape == (1 + number % 5, 4)
            assert (feature.array == number).all()
    assert number == 149
    assert busy.shares[READING] > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_ahead_is_bounded(source: FeatureSource, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    read_many = source.read_many

    def counting(files: Sequence[str]) -> list[Feature | FeatureError]:
        asked.extend(files)
        return read_many(files)

    monkeypatch.setattr(source, "read_many", counting)
    features = read_ahead(source, [f"{number % 150}.npy" for number in range(1000)], workers, Busy())
    next(features)
    time.sleep(0.2)
    assert len(asked) <= 1 + 3 * workers * CHUNK
    features.close()


def test_large_features_are_read_in_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1000, 500), np.float32))  # 2 MB
    source, sizes = FeatureSource(tmp_path), []
    read_many = source.read_many

    def counting(files: Sequence[str]) -> list[Feature | FeatureError]:
        sizes.append(len(files))
        return read_many(files)

    monkeypatch.setattr(source, "read_many", counting)
    assert sum(map(len, read_ahead(source, ["a.npy"] * 12, 1, Busy()))) == 12
    assert max(sizes) == 4


def test_nobody_reads_on_when_nobody_listens(source: FeatureSource) -> None:
    before = threading.active_count()
    features = read_ahead(source, [f"{number % 150}.npy" for number in range(1000)], 3, Busy())
    next(features)
    features.close()
    assert threading.active_count() == before


@settings(max_examples=50)
@given(data=st.data(), frames=st.lists(st.integers(1, 3), min_size=1, max_size=40))
def test_ranks_count_samples_that_are_not_read(data: st.DataObject, frames: list[int]) -> None:
    class Headers:
        def shape(self, file: str) -> Shape:
            if int(file) % 7 == 6:
                raise FeatureError("no header")
            return frames[int(file)], 8

    places, expected = Places(), {}
    for number, count in enumerate(frames):
        if number % 7 != 6:
            expected[number] = places.next_rank((count, 8))
    ranks = Ranks(Headers(), [str(number) for number in range(len(frames))])  # type: ignore[arg-type]
    chosen = data.draw(st.sets(st.sampled_from(sorted(expected))) if expected else st.just(set()))
    for number in data.draw(st.sets(st.sampled_from(range(len(frames))))):
        if number in expected:
            ranks.shapes[number] = frames[number], 8  # known without its header
    assert {number: ranks.rank(number, (frames[number], 8)) for number in sorted(chosen)} == {
        number: expected[number] for number in chosen
    }


# -- scoring ----------------------------------------------------------------------------------------------------------


class Cramped(Linear):
    """Memory for so many rows at once."""

    def __init__(self, room: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__(1)
        self.room, self.error = room, error
        self.sizes: list[int] = []

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(features))
        if len(features) > self.room:
            raise self.error("DefaultCPUAllocator: can't allocate memory")
        return super().forward(features)


def full_batch(size: int, seed: int = 0) -> Batch:
    arrays = np.random.default_rng(seed).normal(size=(size, 5, 20)).astype(np.float32)
    return Batch(size, ONLY, {slot: (slot, array) for slot, array in enumerate(arrays)})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_the_batch_and_goes_on(error: type[Exception]) -> None:
    teacher, notes = Cramped(5, error), list[str]()
    engine = Engine({"tiny": teacher}, CPU, note=notes.append)
    with numerics(CPU, "fp32", 1):
        first, second = engine.score(full_batch(16)), engine.score(full_batch(16, seed=1))
        expected = [Engine({"tiny": Linear(1)}, CPU).score(full_batch(16, seed)) for seed in (0, 1)]
    assert teacher.sizes == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4]
    assert engine.most_rows == 4
    assert engine.halved
    assert len(notes) == 2
    assert all("out of memory" in note and "may differ" in note for note in notes)
    for found, reference in zip((first, second), expected, strict=True):
        assert found.numbers == reference.numbers
        np.testing.assert_allclose(found.logits["tiny"], reference.logits["tiny"], rtol=1e-6)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, lambda text: MemoryError()])
def test_too_little_memory_for_one_sample_is_an_error_that_says_so(error: type[Exception]) -> None:
    match = r"tiny.*not enough memory.*one sample of shape \[5, 20\]( \(.+\))?$"
    with numerics(CPU, "fp32", 1), pytest.raises(TeacherError, match=match):
        Engine({"tiny": Cramped(0, error)}, CPU).score(full_batch(8))


class InPlace(Cramped):
    """Writes into what it is given and gives the same buffer each time."""

    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.buffers: dict[int, torch.Tensor] = {}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features.sub_(1.0)
        buffer = self.buffers.setdefault(len(features), torch.empty(len(features), 10))
        return buffer.copy_(super().forward(features))


def test_what_a_teacher_does_to_its_input_and_output_reaches_no_other_row() -> None:
    arrays = full_batch(16)
    shifted = Batch(16, ONLY, {slot: (number, array - 1) for slot, (number, array) in arrays.rows.items()})
    with numerics(CPU, "fp32", 1):
        expected = Engine({"tiny": Linear(1)}, CPU).score(shifted).logits["tiny"]
        for room in (16, 5):
            engine = Engine({"first": InPlace(room), "tiny": InPlace(room)}, CPU, compare=True)
            both = Batch(16, frozenset({"first", "tiny"}), dict(arrays.rows))
            scored = [engine.score(both) for _ in range(2)]  # compared, and both
            for done in scored:
                for name in ("first", "tiny"):
                    np.testing.assert_allclose(done.logits[name], expected, rtol=1e-5)
                    np.testing.assert_allclose(done.exact[name], expected, rtol=1e-5)


def test_a_dump_that_ran_out_of_memory_keeps_and_tells_it(world: World) -> None:
    report, notes = _dumped(world, Cramped(3), batch_size=8)
    assert report.halved_to == 2
    assert any("out of memory" in note for note in notes)
    index = json.loads((world.cache / "cache_index.json").read_bytes())
    assert index["kd_cache"]["teachers"]["tiny"]["batches_halved_to"] == 2
    cache = LogitCache.open(world.cache)
    assert len(cache) == report.permitted


def test_what_a_cheaper_precision_costs_is_measured_on_a_sample_of_the_run() -> None:
    arrays = np.random.default_rng(0).normal(size=(40, 5, 20)).astype(np.float32)
    cost, compared, kl = StorageCost("logits"), [], []
    with numerics(CPU, "bf16", 1):
        engine = Engine({"tiny": Linear(1)}, CPU, compare=True)
        batcher = Batcher(engine)
        done = [b for n, array in enumerate(arrays) for b in batcher.add(n, array, ONLY, Place(8, n % 8))]
        for scored in [*done, *batcher.finish()]:
            if "tiny" in scored.exact:
                compared.append(scored.numbers[0] // 8 + 1)
                cost.add(scored.exact["tiny"], scored.logits["tiny"])
                exact = Linear(1)(torch.from_numpy(arrays[scored.numbers])).double().log_softmax(1)
    assert compared == [1, 2, 4]  # of five batches
    with torch.inference_mode():
        for number in compared:
            rows = torch.from_numpy(arrays[8 * (number - 1) : 8 * number])
            exact = Linear(1)(rows).double().log_softmax(1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = Linear(1)(rows).double().log_softmax(1)
            kl += (exact.exp() * (exact - half)).sum(dim=1).tolist()
    told = cost.as_json()
    assert told["rows"] == len(kl) == 24
    assert told["kl_mean"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert told["kl_max"] == pytest.approx(np.max(kl), rel=1e-3)
    assert told["kl_mean"] > 1e-9  # it is not fp32 against itself


def test_full_precision_leaves_no_trace() -> None:
    with numerics(CPU, "bf16", 1):
        with full_precision():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_a_dump_below_fp32_reports_its_cost_and_one_in_fp32_none(dump: Run, world: World) -> None:
    result = dump("--precision", "bf16", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert set(content["busy"]) >= {"reading", "scoring", "copying", "committing"}
    assert all(0 <= share <= 1 for share in content["busy"].values())
    told = content["teachers"]["tiny"]["precision_cost"]
    assert told["rows"] > 0
    assert told["kl_max"] >= told["kl_mean"] > 0
    index = json.loads((world.cache / "cache_index.json").read_bytes())
    assert index["kd_cache"]["teachers"]["tiny"]["precision_cost"] == told
    shutil.rmtree(world.cache)
    assert json.loads(dump("--json").stdout)["teachers"]["tiny"]["precision_cost"] is None
    assert "bf16 against fp32" in dump("--precision", "bf16").stdout


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler uses what torch deprecates
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")
def test_compiled_teachers_score_the_same_and_the_index_says_that_they_were(
    cached: World, dump: Run, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the gate by torch's compiler alone, which takes a second; `make faults` has the C++ compiler make it fast."""
    if TIER == "one":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = LogitCache.open(world.cache).tensor()
    shutil.rmtree(world.cache)
    result = dump("--compile")
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(LogitCache.open(world.cache).tensor(), plain, rtol=1e-5, atol=1e-6)
    index = json.loads((world.cache / "cache_index.json").read_bytes())
    assert index["kd_cache"]["teachers"]["tiny"]["compiled"] is True
    assert dump().exit_code == 0  # nothing to score, nothing to forget
    index = json.loads((world.cache / "cache_index.json").read_bytes())
    assert index["kd_cache"]["teachers"]["tiny"]["compiled"] is True


def test_busy_shares_are_parts_of_the_time_over_all_workers() -> None:
    now = [100.0]
    busy = Busy(clock=lambda: now[0])
    for _ in range(2):
        with busy.doing(SCORING, workers=2):
            now[0] += 4
    now[0] += 8
    assert busy.shares == {SCORING: 0.25}


# -- the size of batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "count", "chosen"),
    [
        ({8: 100, 16: 190, 32: 300, 64: 301}, 1000, 32),  # no gain any more
        ({8: 100, 16: 190, 32: 300, 64: 0}, 1000, 32),  # no memory any more
        ({8: 100, 16: 190, 32: 300, 64: 500}, 20, 32),  # no samples any more
        ({8: 100, 16: 103, 32: 900}, 1000, 8),
        ({8: 0, 16: 0}, 1000, 8),  # a teacher that fails: the dump will name the sample
        ({2**n: 2**n for n in range(3, 12)}, 9999, 1024),
    ],
)
def test_the_largest_batch_that_still_gains_is_chosen(
    rates: dict[int, float], count: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kd_cache.score.planning, "_rate", lambda engine, shape, size, dtype: rates[size])
    assert best_batch_size(Engine({}, CPU), (5, 20), count) == chosen


def test_measuring_survives_teachers_that_refuse_or_need_too_much() -> None:
    with numerics(CPU, "fp32", 1):
        assert best_batch_size(Engine({"tiny": Cramped(16)}, CPU), (5, 20), 10_000) <= 16
        assert best_batch_size(Engine({"tiny": Linear(1, bins=3)}, CPU), (5, 20), 10_000) == 8


def test_a_measured_batch_size_is_kept_by_the_rerun(dump: Run, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd_cache.score.planning, "_rate", lambda engine, shape, size, dtype: min(size, 16))
    first = dump("--batch-size", "auto")
    assert first.exit_code == 0, first.output
    assert "batch size 16, measured" in first.stderr
    assert json.loads((world.cache / "plan.json").read_bytes())["batch_size"] == 16
    before = world.packs("tiny")
    monkeypatch.setattr(kd_cache.score.planning, "_rate", lambda engine, shape, size, dtype: size)
    again = dump("--batch-size", "auto", "--no-skip-existing")
    assert again.exit_code == 0, again.output
    world.add(90, "A", "train")
    world.write()
    longer = dump("--batch-size", "auto")
    assert longer.exit_code == 0, longer.output
    assert "measured" not in longer.stderr
    assert len(world.packs("tiny")) == len(before) == 1


def test_parts_must_be_told_their_batch_size(dump: Run) -> None:
    result = dump("--batch-size", "auto", "--shard", "0/2")
    assert result.exit_code == 2
    assert "the same for all parts" in result.stderr


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "", "9" * 12, "65537"])
def test_a_batch_size_that_is_none_is_a_usage_error(dump: Run, text: str) -> None:
    result = dump("--batch-size", text)
    assert result.exit_code == 2, result.output
    assert "batch-size" in result.stderr


# -- committing -------------------------------------------------------------------------------------------------------


class Listening(Watcher):
    def __init__(self) -> None:
        self.done, self.saved_at, self.notes = 0, list[int](), list[str]()

    def stage(self, name: str, total: int) -> None:
        self.done = 0

    def advance(self, count: int) -> None:
        self.done += count

    def saved(self, count: int) -> None:
        assert count <= self.done
        self.saved_at.append(count)

    def note(self, text: str) -> None:
        self.notes.append(text)


def _job(world: World, teacher: Linear, **options: object) -> DumpJob:
    return DumpJob(
        cache_root=world.root / "cache",
        data=world.data(),
        teachers={"tiny": teacher},
        device=CPU,
        **options,  # type: ignore[arg-type]
    )


def _dumped(world: World, teacher: Linear, **options: object) -> tuple[object, list[str]]:
    watcher = Listening()
    return dump_logits(_job(world, teacher, **options), watcher), watcher.notes


def test_a_commit_that_fails_beside_the_scoring_stops_the_dump_and_is_not_told_as_saved(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = kd_cache.score.commits.write_pack, 0

    def failing(directory: Path, *rest: object, **named: object) -> Path:
        nonlocal count
        count += 1
        if count == 3:
            raise StoreError(f"cannot write a pack into {directory}: the disk is full")
        return write(directory, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(kd_cache.score.commits, "write_pack", failing)
    watcher = Listening()
    with pytest.raises(StoreError, match="the disk is full"):
        dump_logits(_job(world, Linear(1), batch_size=2, shard_size=2), watcher)
    assert watcher.saved_at == [2, 4]  # not what was committed after the shard that was lost
    monkeypatch.undo()
    report = dump_logits(_job(world, Linear(1), batch_size=2), Listening())
    assert report.teachers["tiny"].skipped >= 4
    assert report.teachers["tiny"].scored + report.teachers["tiny"].skipped == report.permitted


def test_commits_do_not_hold_up_scoring(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a shard is written, the next batches are scored: the teacher runs during a commit."""
    write, during = kd_cache.score.commits.write_pack, threading.Event()
    scored_meanwhile = threading.Event()

    class Noticing(Linear):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            if during.wait(0.2):
                scored_meanwhile.set()
            return super().forward(features)

    def slow(*rest: object, **named: object) -> Path:
        during.set()
        scored_meanwhile.wait(120)
        during.clear()
        return write(*rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(kd_cache.score.commits, "write_pack", slow)
    dump_logits(_job(world, Noticing(1), batch_size=2, shard_size=2), Listening())
    assert scored_meanwhile.is_set()


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bits_each_time_and_the_cpus_numbers(world: World) -> None:
    packs = []
    for device in ("cpu", "cuda", "cuda"):
        result = dump_logits(_job_on(world, device), Listening())
        assert result.samples_scored == result.permitted
        packs.append((LogitCache.open(world.cache).tensor(), world.packs("tiny")))
        shutil.rmtree(world.cache)
    torch.testing.assert_close(packs[0][0], packs[1][0], rtol=1e-5, atol=1e-5)
    assert packs[1][1] == packs[2][1]


def _job_on(world: World, device: str) -> DumpJob:
    return DumpJob(world.root / "cache", world.data(), {"tiny": Linear(1)}, torch.device(device))
