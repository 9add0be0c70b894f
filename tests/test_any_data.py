"""Data sets that are no acoustic scenes: any input, any task, data sets and nets of one's own."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import REPO, Run

import kd_cache
import kd_cache.score.unchanged
from kd_cache import LogitCache, PackedFeatures, Task, student_loader
from kd_cache.dataset.features import FeatureSource, input_digest
from kd_cache.dataset.inputs import InputSource
from kd_cache.dataset.task import DCASE
from kd_cache.dataset.task_file import as_record, load_task, recorded_task, task_from
from kd_cache.distill import LOSSES
from kd_cache.errors import CorruptError, DataLeakageError, FeatureError, KDCacheError, UsageError
from kd_cache.store.plan import BatchPlan, ShapeCodes

EXAMPLES = sorted((REPO / "docs" / "examples").glob("*.py"))
TASK = REPO / "docs" / "examples" / "speech_digits.yaml"
quiet = pytest.mark.filterwarnings("ignore::UserWarning")


class Rows:
    """Inputs ``[3]`` float32 with whatever else a test gives them."""

    def __init__(self, count: int = 6, **said: Any) -> None:
        self.keys, self.reads = [f"row-{number}" for number in range(count)], 0
        self.__dict__ |= said

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Any:
        self.reads += 1
        return torch.full((3,), float(number + 1)), 0


class Net(torch.nn.Linear):
    architecture = "linear/1"


def net(classes: int = 4) -> Net:
    torch.manual_seed(0)
    return Net(3, classes)


@quiet
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_dumps_verifies_attaches_and_distils(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    if path.stem == "hugging_face":
        pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert [*tmp_path.glob("cache/*/cache_index.json")]
    assert len(path.read_text().splitlines()) <= 40


class Named(torch.nn.Module):
    """Of tokens ``[T]`` and a weight: the counts of four tokens."""

    architecture = "named/1"

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        assert (x["tokens"].dtype, x["weight"].dtype, list(x)) == (torch.int64, torch.float32, ["tokens", "weight"])
        return torch.nn.functional.one_hot(x["tokens"], 4).sum(dim=1) * x["weight"][:, None]


@quiet
@pytest.mark.parametrize("lengths", [(5,), (3, 5)])
def test_dictionaries_of_tensors_reach_teachers_by_name_and_each_part_of_them_is_digested(
    tmp_path: Path, lengths: tuple[int, ...]
) -> None:
    draw = np.random.default_rng(0)
    made = [
        {"weight": np.float64(n + 1), "tokens": torch.from_numpy(draw.integers(0, 4, lengths[n % len(lengths)]))}
        for n in range(12)
    ]
    rows = Rows(12, made=made)
    rows.__class__ = type("Dictionaries", (Rows,), {"__getitem__": lambda self, number: (self.made[number], 0)})
    place = tmp_path / "cache" / "named"
    cache = kd_cache.score(rows, {"n": Named()}, cache=place)
    expected = [np.bincount(each["tokens"], minlength=4) * each["weight"] for each in made]
    np.testing.assert_array_equal(cache.batch(rows.keys)[:, 0].numpy(), expected)
    assert not kd_cache.verify(rows, {"n": Named()}, cache=place).problems
    item, logits = cache.attach(rows, rows.keys)[3]
    assert (item[0] is made[3], logits[0].tolist()) == (True, expected[3].tolist())
    source = InputSource(rows, rows.keys)
    before = source.read("row-0").digest
    for name, value in (("weight", np.float32(1)), ("tokens", made[0]["tokens"] + 1), ("more", np.zeros(2))):
        kept, made[0] = made[0], {**made[0], name: value}
        assert source.read("row-0").digest != before
        made[0] = kept
    made[0] = dict(reversed(made[0].items()))
    assert source.read("row-0").digest == before  # names have one order
    made[0] = {**made[0], "weight": np.float64(7)}
    report = kd_cache.score(rows, {"n": Named()}, cache=place)
    assert report.batch(rows.keys[:1])[0, 0].tolist() == (expected[0] * 7).tolist()


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({}, "expected tensors by their names"),
        ({3: np.zeros(2)}, "expected tensors by their names"),
        ({"a": {"b": np.zeros(2)}}, "a is a dictionary in a dictionary"),
        ({"a": "text"}, "a: it is a str"),
        ({"a": np.array([1.0, np.nan])}, "a: its value at"),
        ({"a": np.zeros((2, 0))}, "a: its shape is"),
    ],
)
def test_a_dictionary_that_is_no_input_is_refused(item: Any, told: str) -> None:
    rows = Rows(1)
    rows.__class__ = type("One", (Rows,), {"__getitem__": lambda self, number: item})
    with pytest.raises(FeatureError, match=told):
        InputSource(rows, rows.keys).read("row-0")
    with pytest.raises(FeatureError, match="expected"):
        InputSource(rows, rows.keys, anything=False).read("row-0")


# -- a task ------------------------------------------------------------------------------------------------------------


def digits(root: Path, **changed: dict[str, Any]) -> list[str]:
    """A manifest of spoken digits in a folder; the options that name it. ``changed`` rows by file."""
    where = [("close", "train")] * 6 + [("far", "train")] * 4 + [("phone", "test")] * 2
    rows = [
        {"file": f"d{n}.npy", "label": n % 10, "device_id": mic, "split": split, "speaker": f"Speaker {n}"}
        for n, (mic, split) in enumerate(where)
    ]
    for row in rows:
        np.save(root / row["file"], np.random.default_rng(len(row["file"])).normal(size=(5, 3)).astype(np.float32))
        row |= changed.get(row["file"][:-4], {})
    (root / "dataset.json").write_text(json.dumps(rows))
    (root / "own.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    num_classes, value_kind = 10, 'logits'\n"
        "    def forward(self, x): return super().forward(x.mean(dim=1))\n"
        "    def fingerprint_parts(self): return {'architecture': 'n/1'}\n"
        "def net(ckpt):\n    torch.manual_seed(0)\n    return Net(3, 10)\n"
    )
    return ["--task", str(TASK), "--json-path", str(root / "dataset.json"), "--teacher", f"n={root / 'own.py'}:net"]


def test_a_second_task_with_domains_and_groups_is_a_yaml_file(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    made = digits(tmp_path)
    done = run("dump", "--target", "far", *made)
    assert done.exit_code == 0
    assert "close → far: 10 permitted train samples (6 of close, 4 of far)" in done.stderr
    assert run("verify", "cache/close2far", *made[4:]).exit_code == 0  # its task is in the cache
    cache = LogitCache.open("cache/close2far")
    assert (cache.task, cache.target) == (load_task(TASK), "far")
    (batch,) = student_loader("dataset.json", ".", cache, batch_size=10, shuffle=False)
    assert batch["source_mask"].tolist() == [device == "close" for device in batch["device_id"]]
    assert (batch["scene_label"] == -100).tolist() == batch["target_mask"].tolist()
    assert "expected one of far" in run("dump", "--target", "phone", *made).stderr
    assert "no target is named" in run("dump", *made).stderr


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"d0": {"speaker": "speaker_11"}}, "are of a speaker that also occurs in test"),
        ({"d0": {"device_id": "phone"}}, "unseen devices phone"),
        ({"d0": {"file": "speaker11_x.npy", "speaker": None}}, "d0"),
        ({"d11": {"file": "./d3.npy"}}, "also in test"),
    ],
)
def test_the_guard_of_another_task_refuses(
    run: Run, tmp_path: Path, monkeypatch: Any, changed: dict[str, Any], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "file" in changed.get("d0", {}):
        told = "speaker-11"  # its name tells the speaker where no field does
    done = run("dump", "--target", "far", *digits(tmp_path, **changed))
    assert done.exit_code == 6
    assert told in done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_task_is_what_its_record_says() -> None:
    task = load_task(TASK)
    assert recorded_task(as_record(task)) == task
    assert as_record(DCASE) == {}
    assert recorded_task({}) is DCASE
    counted = task_from({"name": "big", "classes": 1_000_000})
    assert counted.num_classes == 1_000_000
    assert recorded_task(as_record(counted)) == counted
    with pytest.raises(CorruptError):
        recorded_task({"task": {"name": 3}})


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("- 1", "expected entries"), ("name: a b", "letters"), ("name: [", "not YAML"), ("color: red", "no task has"),
        ("name: a\nclasses: 1000001", "1,000,000"), ("name: a\nclasses: [x, x]", "each once"),
        ("name: a\nsource: b", "no domains"), ("name: a\ngroup: split", "field of the manifest"),
        ("name: a\ndomains: [b, c]\nsource: b", "one target"), ("name: a\ninputs: 3", "expected features or any"),
        ("name: a\ngroup: g\ngroup_in_name: '(('", "regular expression"), ("name: a\ngroup_in_name: '(x)'", "group"),
        ("name: a\ndomains: [b, ../c]\nsource: b\ntargets: [../c]", "domain's name"),
    ],
)  # fmt: skip
def test_a_task_that_makes_no_sense_is_refused(tmp_path: Path, wrong: str, told: str) -> None:
    (tmp_path / "task.yaml").write_text(wrong)
    with pytest.raises(UsageError, match=told):
        load_task(tmp_path / "task.yaml")
    with pytest.raises(UsageError, match="cannot read"):
        load_task(tmp_path / "none.yaml")


# -- any input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "i8", "?", "f8", "f2", "u2"])
@pytest.mark.parametrize("shape", [(7,), (3, 4, 2)])
def test_any_shape_and_dtype_is_read_where_a_task_allows_it(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    source = FeatureSource(tmp_path, anything=True)
    feature = source.read("a.npy")
    assert feature.array.dtype == array.dtype
    assert (feature.array == array).all()
    assert (source.shape("a.npy"), feature.digest) == (shape, input_digest(array))
    with pytest.raises(FeatureError):
        FeatureSource(tmp_path).read("a.npy")


@pytest.mark.parametrize("value", [1e300, np.nan, -np.inf])
def test_no_number_that_float32_cannot_hold_reaches_a_teacher(tmp_path: Path, value: float) -> None:
    np.save(tmp_path / "a.npy", np.array([[[0, 1], [value, 2]]]))
    with pytest.raises(FeatureError, match=r"\[0, 1, 0\]"):
        FeatureSource(tmp_path, anything=True).read("a.npy")
    np.save(tmp_path / "a.npy", np.float32(1))
    with pytest.raises(FeatureError, match="an axis at least"):
        FeatureSource(tmp_path, anything=True).shape("a.npy")


def test_plans_and_notes_hold_any_shape() -> None:
    plan = BatchPlan.from_counts({(3, 32, 32): 9, (5,): 1}, 8, anything=True)
    assert plan.as_json() == {"batch_size": 8, "bins": None, "batches": {"3x32x32": 8, "5": 1}}
    assert BatchPlan.from_json(plan.as_json()) == plan
    assert plan.takes((1, 2, 3))
    older = BatchPlan.from_json({"batch_size": 8, "bins": 64, "batches": {"48x64": 8}})
    assert older is not None
    assert older.takes((9, 64))
    assert not older.takes((64,))
    assert not older.takes((9, 64, 1))
    codes = ShapeCodes()
    assert codes.code((48, 64)) == (48, 64)
    assert codes.shape(48, 64) == (48, 64)
    assert codes.shape(0, 0) is None
    kept = codes.code((3, 32, 32))
    assert ShapeCodes(plan).shape(*kept) == (3, 32, 32)
    assert ShapeCodes().shape(*kept) is None


# -- a data set of one's own -------------------------------------------------------------------------------------------


@quiet
def test_a_spec_saves_a_rerun_the_reading_and_its_change_asks_for_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(kd_cache.score.unchanged, "SETTLED", 0)
    monkeypatch.setattr(kd_cache.score.unchanged, "SAMPLED", 1)
    rows, cache, counts = Rows(400), tmp_path / "cache" / "rows", []
    for spec in ("1", "1", "2", None):
        rows.spec, rows.reads = spec, 0
        kd_cache.score(rows, {"big": net()}, cache=cache)
        counts.append(rows.reads)
    assert counts[1] < 100
    assert min(counts[0], counts[2], counts[3]) >= 400
    assert kd_cache.verify(rows, {"big": net()}, cache=cache).problems == []
    assert kd_cache.verify(rows, {"big": net(5)}, cache=cache).exit_code == 5


@quiet
def test_a_plain_module_says_what_is_derived_and_stays_in_its_mode(tmp_path: Path) -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(), torch.nn.Linear(4, 2))
    plain[0].eval()
    with pytest.warns(UserWarning, match="architecture is derived"):
        cache = kd_cache.score(Rows(), {"plain": plain}, cache=tmp_path / "rows")
    assert [part.training for part in plain] == [False, True, True]
    assert cache.num_classes == 2
    assert cache.target == cache.task.source


@quiet
def test_what_a_data_set_does_with_its_memory_and_its_bad_rows_changes_no_other_row(tmp_path: Path) -> None:
    class OneBuffer(Rows):
        buffer = torch.zeros(3)

        def __getitem__(self, number: int) -> Any:
            if number == 2:
                raise OSError("unreadable")
            return self.buffer.fill_(number + 1)

    with pytest.raises(FeatureError, match="cannot give it: OSError: unreadable"):
        kd_cache.score(OneBuffer(40), {"big": net()}, cache=tmp_path / "rows")
    cache = kd_cache.score(OneBuffer(40), {"big": net()}, cache=tmp_path / "rows", on_bad_sample="skip")
    expected = net()(torch.full((3,), 31.0)).detach()
    assert torch.allclose(cache.batch(["row-30"])[0, 0], expected)
    assert len(cache) == 39


class Random(Rows):
    def __getitem__(self, number: int) -> Any:
        return torch.rand(3)


DIGITS = {"task": Task("digits", group="speaker")}


@quiet
@pytest.mark.parametrize(
    ("rows", "options", "error", "told"),
    [
        (Random(), {}, FeatureError, "another each time"),
        (Rows(keys=[0, 1, 2]), {}, UsageError, "a key must be a text, found 0 (int)"),
        (Rows(keys=["a", "a"]), {}, UsageError, "keys occur twice"),
        (Rows(keys=["\ud800", "a"]), {}, UsageError, "lone surrogate"),
        (Rows(), {"keys": ["a"]}, UsageError, "6 rows, found 1 keys"),
        (Rows(keys=None), {"keys": None}, (UsageError, TypeError), ""),
        (Rows(spec=3), {}, UsageError, "spec must be a text"),
        (Rows(labels=[0] * 5), {}, UsageError, "labels are 5"),
        (Rows(labels=["x"] * 6), {}, UsageError, "labels"),
        (Rows(), DIGITS, DataLeakageError, "does not say which are held out"),
        (Rows(held_out=["a"]), DIGITS, UsageError, "held_out must be"),
        (Rows(groups="abcdef", held_out={"x": "C"}), DIGITS, DataLeakageError, "speaker that also occurs in test"),
        (Rows(held_out={"./row-3": None}), {}, DataLeakageError, "in another split"),
        (Rows(), {"task": Task("x", devices=("a", "b"), source="a", targets=("b",))}, UsageError, "has domains"),
        (Rows(), {"cache": "a b"}, UsageError, "the cache is called"),
        (Rows(), {"task": Task("x", anything=False)}, FeatureError, "none of the 6 features can be read"),
        (Rows(), {"teachers": {}}, UsageError, "no teacher"),
        (Rows(), {"teachers": {"t": torch.nn.Linear(5, 2)}}, KDCacheError, "failed on an input"),
    ],
)  # fmt: skip
def test_what_is_no_data_set_is_refused_before_anything_is_stored(
    tmp_path: Path, monkeypatch: Any, rows: Rows, options: dict[str, Any], error: Any, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as refused:
        kd_cache.score(rows, **{"teachers": {"big": net()}, "cache": "cache/rows", **options})
    assert told in str(refused.value)
    assert not [*tmp_path.rglob("*")]


@quiet
def test_a_group_that_nobody_can_look_for_is_told_of(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    kd_cache.score(Rows(), {"big": net()}, cache="cache/digits", unguarded=True, **DIGITS)
    assert "which speaker test uses is not known" in run("info", "cache").stdout
    kd_cache.score(Rows(groups="abcdef", held_out={"x": "z"}), {"big": net()}, cache="cache/digits", **DIGITS)
    assert "is not known" not in run("info", "cache").stdout
    done = run("verify", "cache/digits")
    assert done.exit_code == 2
    assert "Pass --dataset" in done.stderr


def test_the_command_line_takes_a_data_set_of_one_s_own(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    digits(tmp_path)
    (tmp_path / "rows.py").write_text(
        "import numpy as np\nclass Rows:\n    keys = ['a', 'b']\n    def __len__(self): return 2\n"
        "    def __getitem__(self, n): return np.full((4, 3), n, 'f4')\n"
    )
    (tmp_path / "task.yaml").write_text("name: rows\nclasses: 10\n")
    own = ["--dataset", "rows.py:Rows", "--teacher", "n=own.py:net"]
    assert run("dump", "--task", "task.yaml", *own).exit_code == 0
    assert run("verify", "cache/rows", *own, "--all", "--recompute").exit_code == 0
    assert run("verify", "--task", "task.yaml", *own).exit_code == 0
    assert run("seal", "--task", "task.yaml", *own[:2]).exit_code == 0
    wrong = run("dump", "--task", "task.yaml", "--dataset", "rows.py:Nothing", *own[2:])
    assert wrong.exit_code == 2
    assert "Nothing" in wrong.stderr
    assert "leave out --target" in run("dump", "--target", "b", "--task", "task.yaml", *own).stderr


# -- a vector for each frame -------------------------------------------------------------------------------------------


class Frames(torch.nn.Linear):
    architecture = "frames/1"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[..., None])  # [B, T] -> [B, T, C]


@quiet
def test_rows_of_frames_are_stored_and_served_as_such(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rows, teacher = Rows(8, labels=[0, 1] * 4), Frames(1, 2)
    for dtype in ("fp16", "fp32"):
        cache = kd_cache.score(rows, {"frames": teacher}, cache="cache/rows", dtype=dtype)
    assert (cache.frames, cache.num_classes, cache.width) == (3, 2, 6)
    expected = torch.stack([teacher(rows[number][0]) for number in range(8)]).detach()[:, None]
    assert torch.allclose(cache.batch(rows.keys), expected)
    out = torch.empty(8, 1, 3, 2, dtype=torch.float64)
    assert torch.allclose(cache.batch(cache.rows(rows.keys), out=out), expected.double())
    assert cache.attach(rows, rows.keys)[5][1].shape == (1, 3, 2)
    with pytest.raises(UsageError, match="expected out as"):
        cache.batch(rows.keys, out=torch.empty(8, 1, 6))
    assert kd_cache.verify(rows, {"frames": teacher}, cache="cache/rows").exit_code == 0
    kd_cache.score(rows, {"net": net(2)}, cache="cache/rows")
    with pytest.raises(UsageError, match="3 frames of 2 classes"):
        LogitCache.open("cache/rows")
    assert run("info", "cache").exit_code == 0
    assert run("export", "cache/rows", "--to", "npy", "--output", "out").exit_code == 0


@quiet
def test_another_number_of_frames_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Ragged(Rows):
        def __getitem__(self, number: int) -> Any:
            return torch.ones(3 + number % 2)

    with pytest.raises(KDCacheError, match="all rows of a cache have one number of frames"):
        kd_cache.score(Ragged(), {"frames": Frames(1, 2)}, cache=tmp_path / "rows")


@pytest.mark.parametrize("name", ["kl", "bce", "dkd", "mse"])
def test_a_loss_of_frames_is_the_mean_over_them(name: str) -> None:
    student, teacher = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(1)).unbind()
    labels = (torch.tensor([0, 1, 2, -1]),) if name == "dkd" else ()
    found = LOSSES[name](student, teacher, *labels)
    each = [LOSSES[name](student[:, at], teacher[:, at], *labels) for at in range(5)]
    assert torch.allclose(found, torch.stack(each).mean(dim=0))


@pytest.mark.parametrize(("shape", "chunks"), [((5,), (2, 2)), ((3, 4, 2), (1, 2, 3, 2)), ((2, 3, 4), None)])
def test_packed_inputs_have_any_shape_and_dtype(tmp_path: Path, shape: tuple[int, ...], chunks: Any) -> None:
    arrays = np.arange(3 * np.prod(shape)).reshape(3, *shape).astype("u1")
    whole = None if chunks is None else (chunks + shape)[: 1 + len(shape)]
    how = {} if whole is None else {"chunks": tuple(map(min, whole, arrays.shape)), "compression": "gzip"}
    with h5py.File(tmp_path / "rows.h5", "w") as packed:
        packed.create_dataset("features", data=arrays, **how)
        packed["files"] = ["a", "b", "c"]
    with h5py.File(tmp_path / "each.h5", "w") as packed:
        for name, array in zip("abc", arrays, strict=True):
            packed.create_dataset(name, data=array, **({} if chunks is None else {"chunks": True, "shuffle": True}))
    for path in (tmp_path / "rows.h5", tmp_path / "each.h5"):
        source = PackedFeatures(path, anything=True)
        assert source.shape("b") == shape
        found = source.read("b")
        assert found.array.dtype == np.uint8
        assert (found.array == arrays[1]).all()
        assert found.digest == input_digest(arrays[1])
    if chunks is None:
        with pytest.raises(FeatureError, match=r"expected \[samples, frames, bins\]"):
            PackedFeatures(tmp_path / "rows.h5").read("b")


@quiet
def test_logits_that_are_there_need_names_and_no_data(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    table = torch.randn(3, 5)
    torch.save(table, "big.pt")
    Path("names.json").write_text('["c", "a", "b"]')
    Path("task.yaml").write_text("name: mine\n")
    done = run("adopt", "big.pt", "--files-list", "names.json", "--task", "task.yaml")
    assert done.exit_code == 0, done.stderr
    cache = LogitCache.open("cache/mine")
    assert torch.equal(cache.batch(["a", "b", "c"])[:, 0], table[[1, 2, 0]])
    assert "names alone" in run("verify", "cache/mine").stderr
    Path("task.yaml").write_text("name: mine\ngroup: speaker\n")
    done = run("adopt", "big.pt", "--files-list", "names.json", "--task", "task.yaml", "--cache-root", "other")
    assert done.exit_code == 2
    assert "names alone do not say what may be used" in done.stderr
