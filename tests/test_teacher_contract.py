"""A teacher of a user's own: how it is named and found, what it must be, and what its fingerprint is made of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kd_cache.errors import CheckpointError, TeacherError, UsageError
from kd_cache.score.teacher import (
    PRECISIONS,
    TeacherSpec,
    check_teacher,
    parse_teacher,
    resolve_factory,
    teacher_fingerprint,
    teacher_origin,
)
from kd_cache.store.origin import VALUE_KINDS, weights_digest


class Mine:
    """The least that is a teacher."""

    num_classes = 3
    value_kind = "logits"
    parts: Mapping[str, Any] = {"architecture": "mine/1", "weights": "00"}

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, 0, :3]

    def fingerprint_parts(self) -> Mapping[str, str]:
        return self.parts


def made(**changes: Any) -> Any:
    """A `Mine` with other attributes; ``...`` takes one away."""
    return type("Made", (Mine,), {name: None if value is ... else value for name, value in changes.items()})()


class Net(torch.nn.Module):
    """A module, whose weights are digested for it."""

    num_classes = 3
    value_kind = "logits"

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features.mean(dim=1))  # type: ignore[no-any-return]

    def fingerprint_parts(self) -> dict[str, str]:
        return {"architecture": "net/1"}


# -- NAME=module:factory[,ckpt=PATH] -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("big=mine:big", TeacherSpec("big", "mine:big")),
        ("big=a.b.c:d.e", TeacherSpec("big", "a.b.c:d.e")),
        ("big=mine:big,ckpt=w.pt", TeacherSpec("big", "mine:big", Path("w.pt"))),
        ("big=mine:big,ckpt=a,b=c/w.pt", TeacherSpec("big", "mine:big", Path("a,b=c/w.pt"))),
        ("big=mine:big,ckpt=ckpt=w.pt", TeacherSpec("big", "mine:big", Path("ckpt=w.pt"))),
        ("city", TeacherSpec("city", "city")),
        ("city,ckpt=w.pt", TeacherSpec("city", "city", Path("w.pt"))),
        ("mine2=city", TeacherSpec("mine2", "city")),
        ("A-1_b.c=m:f", TeacherSpec("A-1_b.c", "m:f")),
    ],
)
def test_a_teacher_is_named_by_name_factory_and_checkpoint(text: str, spec: TeacherSpec) -> None:
    assert parse_teacher(text) == spec


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *(
            (f"{name}=m:f", "cannot be a teacher's name") for name in ("", "../x", "a\x1b[2J", "Packs")
        ),  # see test_index
        ("m:f", "cannot be a teacher's name"),
        ("big=", "expected module:factory after big="),
        ("big=,ckpt=w.pt", "expected module:factory after big="),
        ("big=m:f,", "expected ,ckpt=PATH"),
        ("big=m:f,ckpt=", "expected ,ckpt=PATH"),
        ("big=m:f,w.pt", "expected ,ckpt=PATH"),
        ("big=m:f,path=w.pt", "expected ,ckpt=PATH"),
    ],
)
def test_each_way_to_misname_a_teacher_is_a_usage_error(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_teacher(text)
    assert reason in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.exit_code == 2


# -- finding the factory -----------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Write a module into the folder where the command runs; modules and path are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)

    def call(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    yield call
    for name in set(sys.modules) - before:
        if name.startswith("user_"):
            del sys.modules[name]


def test_modules_and_packages_in_the_working_folder_are_found(write: Callable[[str, str], None]) -> None:
    write("user_one.py", "def big(ckpt):\n    return ckpt\n")
    assert resolve_factory("user_one:big")(Path("w")) == Path("w")
    write("user_pkg/__init__.py", "")
    write("user_pkg/deep.py", "class Zoo:\n    @staticmethod\n    def big(ckpt):\n        return 7\n")
    assert resolve_factory("user_pkg.deep:Zoo.big")(None) == 7  # type: ignore[comparison-overlap]


def test_an_installed_module_needs_no_look_into_the_working_folder(write: Callable[[str, str], None]) -> None:
    write("colorsys.py", "raise SystemExit(0)")
    resolve_factory("colorsys:rgb_to_hsv")
    assert "" not in sys.path


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ("", "user_none:big", "ModuleNotFoundError"),
        ("", "user_bad:big", "AttributeError"),
        ("big = 3", "user_bad:big", "is not callable"),
        ("big = None", "user_bad:big", "is not callable"),
        ("", "user_bad:", "is not callable"),
        ("", ":big", "cannot import"),
        ("", "user bad:big", "cannot import"),
        ("", "user_bad:big:bigger", "cannot import"),
        ("", "../user_bad:big", "cannot import"),
        ("", "user_bad:a\x1b[2J", "cannot import"),
        ("1 / 0", "user_bad:big", "ZeroDivisionError: division by zero"),
        ("import user_gone", "user_bad:big", "No module named 'user_gone'"),
        ("def big(:", "user_bad:big", "SyntaxError"),
        ("raise SystemExit(0)", "user_bad:big", "SystemExit"),
        ("import sys; sys.exit()", "user_bad:big", "SystemExit"),
        ("raise RuntimeError('a\\x1b[2Jb')", "user_bad:big", r"RuntimeError: a\x1b[2Jb"),
    ],
)
def test_each_way_not_to_find_a_factory_is_a_usage_error(
    write: Callable[[str, str], None], text: str, name: str, reason: str
) -> None:
    write("user_bad.py", text)
    with pytest.raises(UsageError) as caught:
        resolve_factory(name)
    assert reason in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.exit_code == 2


def test_an_entry_point_of_the_group_is_found_and_one_that_cannot_be_imported_is_a_usage_error(
    write: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("user_entry.py", "def big(ckpt):\n    return 'made'\n")
    write("user_entry-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: user-entry\nVersion: 1.0\n")
    points = "[kd_cache.teachers]\nuser_big = user_entry:big\nuser_gone = user_gone:big\n"
    write("user_entry-1.0.dist-info/entry_points.txt", points)
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_factory("user_big")(None) == "made"  # type: ignore[comparison-overlap]
    with pytest.raises(UsageError, match="cannot import user_gone"):
        resolve_factory("user_gone")


def test_an_unknown_entry_point_is_a_usage_error_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no teacher is registered as 'nobody'") as caught:
        resolve_factory("nobody")
    assert "city2scene" in caught.value.message
    assert "module:factory" in str(caught.value.hint)


# -- calling the factory -----------------------------------------------------------------------------------------------


def load(monkeypatch: pytest.MonkeyPatch, factory: Callable[[Path | None], Any], ckpt: Path | None = None) -> Any:
    monkeypatch.setattr("kd_cache.score.teacher.resolve_factory", lambda name: factory)
    return TeacherSpec("big", "m:f", ckpt).load()


@pytest.mark.parametrize(
    "error", [ValueError("no\x1b[2J"), OSError("no"), SystemExit(0), AssertionError("no"), KeyError()]
)
def test_a_factory_that_fails_is_a_teacher_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def factory(ckpt: Path | None) -> Mine:
        raise error

    with pytest.raises(TeacherError, match="the factory m:f of teacher big failed") as caught:
        load(monkeypatch, factory)
    assert type(error).__name__ in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.__cause__ is error


def test_errors_of_ours_pass_through_a_factory_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def factory(ckpt: Path | None) -> Mine:
        raise CheckpointError("torn", hint="mend it")

    with pytest.raises(CheckpointError) as caught:
        load(monkeypatch, factory)
    assert (caught.value.message, caught.value.hint) == ("torn", "mend it")


def test_an_interrupt_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def factory(ckpt: Path | None) -> Mine:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(monkeypatch, factory)


# -- the contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_the_least_teacher_of_every_kind_is_accepted(kind: str) -> None:
    check_teacher("big", made(value_kind=kind))
    check_teacher("big", made(class_names=["a", "b", "c"]))
    check_teacher("big", made(class_names=("a", "b", "c")))
    check_teacher("big", Net())


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (None, "must be callable and have num_classes"),
        ("text", "must be callable and have num_classes"),
        (3, "must be callable and have num_classes"),
        (lambda features: features, "must be callable and have num_classes"),
        (SimpleNamespace(num_classes=3, value_kind="logits"), "must be callable and have num_classes"),
        (made(num_classes=...), "num_classes, an integer ≥ 1; found None"),
        (made(num_classes=0), "found 0"),
        (made(num_classes=-3), "found -3"),
        (made(num_classes=3.0), "found 3.0"),
        (made(num_classes="3"), "found 3"),
        (made(num_classes=True), "found True"),
        (made(num_classes=torch.tensor(3)), "found"),
        (made(value_kind=...), "value_kind is 'None', expected one of logits, log_probs, probs, sigmoid"),
        (made(value_kind="softmax"), "value_kind is 'softmax'"),
        (made(value_kind="Logits"), "value_kind is 'Logits'"),
        (made(value_kind=["logits"]), "value_kind is"),
        (made(fingerprint_parts=...), "has no fingerprint_parts()"),
        (made(fingerprint_parts={"architecture": "a"}), "has no fingerprint_parts()"),
        (made(parts=None), "failed: TypeError"),
        (made(parts=3), "failed: TypeError"),
        (made(parts={}), "must name 'weights'"),
        (made(parts={"architecture": "a"}), "must name 'weights'"),
        (made(parts={"weights": "00"}), "must name 'architecture'"),
        (made(parts={"weights": "", "architecture": "a"}), "must name 'weights'"),
        (made(parts={"weights": None, "architecture": "a"}), "must name 'weights'"),
        (made(parts={"weights": "00", "architecture": 1}), "must map names to texts"),
        (made(parts={"weights": "00", "architecture": "a", "more": 1}), "must map names to texts"),
        (made(parts={"weights": "00", "architecture": "a", 1: "more"}), "must map names to texts"),
        (made(class_names="abc"), "class_names must be a list of texts"),
        (made(class_names=[0, 1, 2]), "class_names must be a list of texts"),
        (made(class_names=["a", "b", "\udc80"]), "class_names must be a list of texts"),
        (made(parts={"weights": "00", "architecture": "\ud800"}), "must map names to texts"),
        *((made(num_bins=bins), "num_bins must be an integer ≥ 1") for bins in ("64", 0, 64.0)),
        (made(class_names=iter("abc")), "class_names must be a list of texts"),
        (Mine, "failed: TypeError"),
    ],
)
def test_each_way_to_break_the_contract_is_a_teacher_error(teacher: Any, reason: str) -> None:
    with pytest.raises(TeacherError) as caught:
        check_teacher("big", teacher)
    assert reason in caught.value.message
    assert caught.value.exit_code == 1


def test_a_state_dict_that_cannot_be_digested_is_a_teacher_error() -> None:
    class Extra(Net):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 1}

    class Broken(Net):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("sharded")

    with pytest.raises(TeacherError, match="_extra_state is not a tensor"):
        check_teacher("big", Extra())
    with pytest.raises(TeacherError, match="RuntimeError: sharded"):
        check_teacher("big", Broken())


def test_a_wrong_number_of_class_names_is_refused() -> None:
    with pytest.raises(UsageError, match="expected 3 class names"):
        check_teacher("big", made(class_names=["a", "b"]))


# -- the fingerprint ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_has_every_part_that_makes_the_number() -> None:
    assert dict(teacher_fingerprint(Mine()).parts) == {
        "architecture": "mine/1",
        "weights": "00",
        "feature_spec": "unstated",
        "value_kind": "logits",
        "num_classes": "3",
        "class_order": "0..2",
        "precision": "fp32",
        "dtype": "fp32",
        "format_version": "1",
    }


CHANGES: dict[str, tuple[dict[str, Any], dict[str, str], list[str]]] = {
    "weights": ({"parts": {"architecture": "mine/1", "weights": "01"}}, {}, ["weights"]),
    "architecture": ({"parts": {"architecture": "mine/2", "weights": "00"}}, {}, ["architecture"]),
    "feature_spec": (
        {"parts": {"architecture": "mine/1", "weights": "00", "feature_spec": "logmel64"}},
        {},
        ["feature_spec"],
    ),
    "a part of its own": ({"parts": {"architecture": "mine/1", "weights": "00", "tta": "5"}}, {}, ["tta"]),
    "value_kind": ({"value_kind": "probs"}, {}, ["value_kind"]),
    "num_classes": ({"num_classes": 4}, {}, ["class_order", "num_classes"]),
    "class_order": ({"class_names": ["a", "b", "c"]}, {}, ["class_order"]),
    "dtype": ({}, {"dtype": "fp16"}, ["dtype"]),
    **{f"precision {name}": ({}, {"precision": name}, ["precision"]) for name in PRECISIONS if name != "fp32"},
}


@pytest.mark.parametrize(("attributes", "run", "parts"), CHANGES.values(), ids=CHANGES)
def test_each_changed_part_changes_the_digest_and_is_named(
    attributes: dict[str, Any], run: dict[str, Any], parts: list[str]
) -> None:
    before, after = teacher_fingerprint(Mine()), teacher_fingerprint(made(**attributes), **run)
    assert before.digest != after.digest
    assert before.differing_parts(after) == parts


def test_a_new_format_version_changes_every_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = teacher_fingerprint(Mine())
    monkeypatch.setattr("kd_cache.score.teacher.FORMAT_VERSION", 2)
    assert before.differing_parts(teacher_fingerprint(Mine())) == ["format_version"]


def test_the_weights_of_a_module_are_digested_for_it() -> None:
    net = Net()
    before = teacher_fingerprint(net)
    assert before.parts["weights"] == weights_digest(net.state_dict())
    with torch.no_grad():
        net.head.bias[0] += 1
    assert before.differing_parts(teacher_fingerprint(net)) == ["weights"]


def test_a_digest_that_a_module_names_itself_is_believed() -> None:
    class Named(Net):
        def fingerprint_parts(self) -> dict[str, str]:
            return {"architecture": "net/1", "weights": "abc"}

    assert teacher_fingerprint(Named()).parts["weights"] == "abc"


@pytest.mark.parametrize("part", ["value_kind", "num_classes", "class_order", "precision", "dtype", "format_version"])
def test_a_part_that_kd_cache_fills_in_too_still_counts(part: str) -> None:
    one, two = (
        teacher_fingerprint(made(parts={"architecture": "a", "weights": "0", part: text})) for text in ("x", "y")
    )
    assert one.parts[part] == teacher_fingerprint(Mine()).parts[part]
    assert one.differing_parts(two) == [f"own_{part}"]


def test_fingerprints_of_teachers_stay_the_same() -> None:
    # All built-in and all users' teachers go through this: another value here turns every row of every cache stale, and
    # everything must be scored again. Change it with a new FORMAT_VERSION only.
    assert teacher_fingerprint(Mine()).digest == "09688924c54ad7277198a3c68d06cd1d4ec3cf622f15650f4cb90fce88715c3a"


# -- the origin of a row -----------------------------------------------------------------------------------------------


def test_the_origin_keeps_what_a_reader_needs() -> None:
    origin = teacher_origin("big", made(class_names=["a", "b", "c"]), precision="bf16", dtype="fp16")
    assert (origin.teacher, origin.value_kind, origin.num_classes, origin.dtype) == ("big", "logits", 3, "fp16")
    assert origin.class_names == ("a", "b", "c")
    assert origin.stored.str == "<f2"
    assert origin.fingerprint.parts["precision"] == "bf16"
    assert teacher_origin("big", Mine()).class_names is None


@pytest.mark.parametrize(("option", "value"), [("dtype", "bf16"), ("dtype", "fp64"), ("precision", "fp8")])
def test_an_unknown_precision_or_storage_type_is_a_usage_error(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{option} is '{value}', expected one of fp32"):
        teacher_origin("big", Mine(), **{option: value})
