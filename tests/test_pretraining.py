"""Cached pre-training: found under the very same key only, used whole or reported as damaged, saved whole or not."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kd_cache
import teachers
from kd_cache.errors import StoreError
from kd_cache.train import pretraining
from kd_cache.train.pretraining import ENTRY, WEIGHTS, Entry, Pretrained, code_version, differing_parts, key_of
from kd_cache.train.settings import Settings
from teachers.recipes import RECIPES

PARTS: dict[str, Any] = {
    "role": {"role": "city", "num_cities": 12},
    "seed": {"seed": 42, "deterministic": False},
    "data": {"train": "ab" * 32, "validation": "cd" * 32},
    "stages": [{"level": 0, "epochs": 3, "lr": 3e-3}],
    "start": None,
    "code": "0.1.0+0123456789abcdef",
}
MEASURED = {"validation": {"accuracy": 0.75}, "best_epoch": 3}


@pytest.fixture
def store(tmp_path: Path) -> Pretrained:
    return Pretrained(tmp_path / "outputs" / "pretrained")


@pytest.fixture
def save(store: Pretrained, tmp_path: Path) -> Callable[..., Path]:
    """Save these bytes under these parts; gives the entry's folder."""

    def call(parts: dict[str, Any] = PARTS, content: bytes = b"weights of a city teacher" * 9) -> Path:
        weights = tmp_path / "best.safetensors"
        weights.write_bytes(content)
        store.save(parts, weights, MEASURED)
        found = store.find(parts)
        assert found is not None
        return found.path

    return call


def changed(**values: Any) -> dict[str, Any]:
    return {**PARTS, **values}


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


def found_at(store: Pretrained, parts: dict[str, Any]) -> Entry:
    found = store.find(parts)
    assert found is not None
    return found


# -- what is saved is found --------------------------------------------------------------------------------------------


def test_what_was_saved_last_is_found_whole_and_says_in_words_what_it_is(
    store: Pretrained, save: Callable[..., Path]
) -> None:
    for content in (b"some weights", b"others, longer"):
        path = save(content=content)
        found = found_at(store, PARTS)
        assert (found.damage, found.weights.read_bytes()) == (None, content)
        assert (found.parts, found.measured) == (PARTS, MEASURED)
        assert store.entries() == [found]
        said = json.loads((path / ENTRY).read_text())
        assert (said["key"], said["parts"]) == (key_of(PARTS), PARTS)
        assert said["key"].startswith(path.name)
        assert tree(store.root).keys() == {path.name, f"{path.name}/{ENTRY}", f"{path.name}/{WEIGHTS}"}


OTHERS = [
    changed(seed={"seed": 42, "deterministic": True}),
    changed(stages=[{"level": 0, "epochs": 3, "lr": 3.0000001e-3}]),
    changed(stages=[]),
    changed(code="0.1.1+0123456789abcdef"),
    changed(more=None),
    {name: value for name, value in PARTS.items() if name != "start"},
    {},
]


def test_a_changed_part_misses_and_only_the_entry_of_a_key_is_removed(
    store: Pretrained, save: Callable[..., Path]
) -> None:
    mine = save()
    for other in OTHERS:
        assert store.find(other) is None
        assert store.remove(other) is False
        save(other, b"others")
    assert len(store.entries()) == 1 + len(OTHERS)
    assert found_at(store, PARTS).weights.read_bytes() != b"others"
    assert store.remove(PARTS) is True
    assert not mine.exists()
    assert store.find(PARTS) is None
    assert len(store.entries()) == len(OTHERS)


def test_entries_are_listed_the_oldest_first(store: Pretrained, save: Callable[..., Path]) -> None:
    for number, created in enumerate(["2026-03-01T00:00:00+00:00", "2025-01-01T00:00:00+00:00", "2026-02-01T00:00:00"]):
        path = save(changed(number=number))
        content = json.loads((path / ENTRY).read_text())
        (path / ENTRY).write_text(json.dumps(content | {"created": created}))
    assert [entry.parts["number"] for entry in store.entries()] == [1, 2, 0]
    assert all(entry.damage is None for entry in store.entries())


# -- keys --------------------------------------------------------------------------------------------------------------

SAID = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)


def parts_with(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    values = st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    )
    return st.dictionaries(st.text(max_size=4), values, max_size=5)


SOME_PARTS = parts_with(st.none() | SAID)


def reversed_dicts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: reversed_dicts(value[name]) for name in reversed(value)}
    return [reversed_dicts(item) for item in value] if isinstance(value, list) else value


@given(SOME_PARTS)
def test_a_key_does_not_depend_on_the_order_of_its_parts(parts: dict[str, Any]) -> None:
    key = key_of(parts)
    assert key_of(reversed_dicts(parts)) == key
    assert key_of(json.loads(json.dumps(parts))) == key
    assert len(key) == 64
    assert int(key, 16) >= 0


@given(SOME_PARTS, SOME_PARTS)
def test_two_keys_are_equal_where_their_json_is(one: dict[str, Any], other: dict[str, Any]) -> None:
    texts = [json.dumps(parts, sort_keys=True) for parts in (one, other)]
    assert (key_of(one) == key_of(other)) is (texts[0] == texts[1])


def test_the_code_version_changes_with_a_line_of_anything_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_version().startswith(f"{kd_cache.__version__}+")
    train, recipes = tmp_path / "kd_cache/train", tmp_path / "teachers"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(pretraining.__file__).parent, train, ignore=ignored)
    shutil.copytree(RECIPES["city"].code[0], recipes, ignore=ignored)
    monkeypatch.setattr(pretraining, "__file__", str(train / "pretraining.py"))
    version = code_version.__wrapped__
    versions = {code_version(RECIPES["city"].code)}
    assert version((recipes,)) in versions
    loop = train / "loop.py"
    assert "schedule.lr(done.step)" in loop.read_text()
    loop.write_text(loop.read_text().replace("schedule.lr(done.step)", "schedule.lr(done.step + 1)"))
    versions.add(version((recipes,)))
    assert len(versions) == 2
    for path in [*train.rglob("*.py"), *recipes.rglob("*.py")]:
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        assert version((recipes,)) not in versions, path
        versions.add(version((recipes,)))
        path.write_bytes(content)
    (recipes / "cnn14.py").rename(recipes / "cnn15.py")
    assert version((recipes,)) not in versions


@pytest.mark.parametrize("role", RECIPES)
def test_every_recipe_s_key_covers_its_own_code(role: str) -> None:
    assert RECIPES[role].code == (Path(teachers.__file__).parent,)


# -- how keys differ ---------------------------------------------------------------------------------------------------


@given(parts_with(SAID), parts_with(SAID))
def test_parts_differ_exactly_where_they_are_not_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    told = differing_parts(one, other)
    names = {name for name in {*one, *other} if one.get(name) != other.get(name)}
    assert all(any(line.startswith(name) for line in told) for name in names)
    assert bool(told) is bool(names)
    assert differing_parts(one, one) == []


def test_the_nearest_entry_tells_what_differs_with_both_values(store: Pretrained, save: Callable[..., Path]) -> None:
    settings = Settings("city", arch="cnn14", mlp_hidden_dims=(64, 32))  # tuples, which a file gives back as lists
    parts = changed(settings=settings.key_parts())
    save({**parts, "seed": {"seed": 1, "deterministic": True}, "code": "other"})
    save({**parts, "seed": {"seed": 7, "deterministic": False}, "start": {"kind": "backbone"}})
    save({})
    assert store.nearest(parts) == ["seed.seed 7 → 42", "start {'kind': 'backbone'} → None"]
    save(parts)
    assert store.nearest(parts) == []
    long = {**parts, "data": {**PARTS["data"], "train": "ee" * 32}}
    assert store.nearest(long) == ["data.train"]
    assert differing_parts({"a": 1}, {"b": 2}) == ["a 1 → None", "b None → 2"]


# -- damage ------------------------------------------------------------------------------------------------------------


def flip_weights(path: Path, at: int = 7) -> None:
    content = bytearray((path / WEIGHTS).read_bytes())
    content[at] ^= 1
    (path / WEIGHTS).write_bytes(content)


def rewritten(**values: Any) -> Callable[[Path], object]:
    return lambda path: (path / ENTRY).write_text(json.dumps(json.loads((path / ENTRY).read_text()) | values))


def without(name: str) -> Callable[[Path], object]:
    def drop(path: Path) -> None:
        content = json.loads((path / ENTRY).read_text())
        del content[name]
        (path / ENTRY).write_text(json.dumps(content))

    return drop


def holding(content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / ENTRY).write_bytes(content)


def folder_for(name: str) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return replace


def swap_in(path: Path, names: Iterable[str]) -> None:
    """Copy these of the other entry over."""
    other = next(each for each in path.parent.iterdir() if each != path and (each / WEIGHTS).is_file())
    for name in names:
        shutil.copy(other / name, path / name)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit in the weights": flip_weights,
    "truncated weights": lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1]),
    "longer weights": lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes() + b"\0"),
    "empty weights": lambda path: (path / WEIGHTS).write_bytes(b""),
    "no weights": lambda path: (path / WEIGHTS).unlink(),
    "a folder for weights": folder_for(WEIGHTS),
    "no entry.json": lambda path: (path / ENTRY).unlink(),
    "a folder for entry.json": folder_for(ENTRY),
    "an empty folder": lambda path: [(path / name).unlink() for name in (WEIGHTS, ENTRY)],
    "an empty entry.json": holding(b""),
    "half an entry.json": lambda path: (path / ENTRY).write_bytes((path / ENTRY).read_bytes()[:200]),
    "no UTF-8": holding(b"\xff\xfe{}"),
    "a NUL": holding(b"\0" * 64),
    "a number": holding(b"7"),
    "null": holding(b"null"),
    "a list": holding(b"[]"),
    "an empty object": holding(b"{}"),
    "nested too deeply": holding(b"[" * 200_000),
    "parts nested too deeply": holding(b'{"parts":' + b'{"a":' * 900 + b"1" + b"}" * 901),
    "a number too long": holding(b'{"parts": ' + b"9" * 5000 + b"}"),
    "a lone surrogate": rewritten(parts={"a": "\ud800"}),
    "not a number": rewritten(parts={"a": float("nan")}),
    "parts of another key": rewritten(parts={**PARTS, "code": "other"}),
    "parts that are a list": rewritten(parts=["role", "seed"]),
    "parts that are a text": rewritten(parts="role and seed"),
    "parts that are a number": rewritten(parts=7),
    "parts that hold a list for an object": rewritten(parts={**PARTS, "seed": [42, False]}),
    "another key": rewritten(key="0" * 64),
    "a key that is no text": rewritten(key=7),
    "another digest": rewritten(sha256="0" * 64),
    "an entry of another key": lambda path: swap_in(path, (ENTRY, WEIGHTS)),
    "weights of another key": lambda path: swap_in(path, (WEIGHTS,)),
    "a digest that is no text": rewritten(sha256=None),
    "measured a number": rewritten(measured=7),
    "measured a text": rewritten(measured="well"),
    **{f"no {name}": without(name) for name in ("key", "parts", "sha256", "created", "measured")},
}


def test_damage_is_reported_and_mended_by_the_next_save(store: Pretrained, save: Callable[..., Path]) -> None:
    other = changed(number=1)
    good = save(other, b"good").name
    (store.root / ".tmp-1-abcabcabcabcabca").mkdir()
    (store.root / "notes.txt").write_text("no entry, and not listed")
    for name, damage in DAMAGES.items():
        path = save()
        assert store.find(PARTS) == replace(found_at(store, PARTS), damage=None)
        damage(path)
        found = found_at(store, PARTS)
        assert found.damage, name
        assert found.damage.isprintable()
        assert {entry.path.name: entry.damage is None for entry in store.entries()} == {path.name: False, good: True}
        assert isinstance(store.nearest(changed(number=2)), list)
    assert store.remove(PARTS) is True
    assert [entry.damage for entry in store.entries()] == [None]


def test_a_flipped_bit_of_an_entry_is_found_or_leaves_its_parts_as_they_were(
    store: Pretrained, save: Callable[..., Path]
) -> None:
    path = save()
    good = (path / ENTRY).read_bytes()
    for bit in range(0, len(good) * 8, 7):  # of every byte one, and every one of a byte somewhere
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        (path / ENTRY).write_bytes(content)
        found = found_at(store, PARTS)
        assert found.damage or found.parts == PARTS


# -- faults ------------------------------------------------------------------------------------------------------------


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


@contextlib.contextmanager
def full_at(moment: int) -> Iterator[list[str]]:
    """The disk is full at call number ``moment`` of `CALLS`, and at no other. Yields the calls."""
    called: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **options: Any) -> Any:
            called.append(name)
            return full() if len(called) == moment else call(*args, **options)

        return instead

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield called


@pytest.mark.parametrize("before", [None, b"before"], ids=["new", "again"])
def test_a_save_that_fails_anywhere_leaves_no_temporary_folder_and_no_half_entry(
    tmp_path: Path, before: bytes | None
) -> None:
    weights, moment, calls = tmp_path / "best.safetensors", 0, ["none yet"]
    while len(calls) >= moment:
        moment += 1
        store = Pretrained(tmp_path / f"{moment}" / "pretrained")
        if before is not None:
            weights.write_bytes(before)
            store.save(PARTS, weights, MEASURED)
        weights.write_bytes(b"after")
        failed = False
        with full_at(moment) as calls:
            try:
                store.save(PARTS, weights, MEASURED)
            except StoreError as error:
                failed = "No space left" in error.message
        names = [path.name for path in store.root.iterdir()] if store.root.exists() else []
        removing = calls[moment - 1 :][:1] in (["unlink"], ["rmdir"])  # what cannot be removed may be left
        assert removing or not [name for name in names if name.startswith(".tmp-")]
        found = store.find(PARTS)
        assert found is None or found.damage is None
        assert [entry.damage for entry in store.entries()] == ([] if found is None else [None])
        content = None if found is None else found.weights.read_bytes()
        assert content in ((before, b"after") if failed or removing else (b"after",))
    assert moment > 6
    assert not failed


def test_a_save_that_is_interrupted_leaves_nothing(
    store: Pretrained, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    store.root.mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save()
    assert tree(store.root) == {}


def test_weights_that_are_not_there_are_a_store_error(store: Pretrained, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        store.save(PARTS, tmp_path / "gone.safetensors", MEASURED)
    assert not store.root.exists() or tree(store.root) == {}


def test_an_entry_that_cannot_be_removed_is_a_store_error(
    store: Pretrained, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save()
    (path / "notes.txt").write_text("mine")
    store.remove(PARTS)
    assert os.listdir(path) == ["notes.txt"]
    save()
    assert (path / "notes.txt").read_text() == "mine"
    monkeypatch.setattr(Path, "rmdir", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        store.remove(PARTS)
    assert path.name in caught.value.message


@contextlib.contextmanager
def unreadable(folder: Path) -> Iterator[None]:
    """Nobody may look into the folder: the superuser, who may, becomes somebody else for a while."""
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


ASKED: dict[str, Callable[[Pretrained], object]] = {
    "find": lambda store: store.find(PARTS),
    "entries": lambda store: store.entries(),
    "nearest": lambda store: store.nearest(PARTS),
    "remove": lambda store: store.remove(PARTS),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_folder_that_cannot_be_looked_into_is_a_store_error(
    store: Pretrained, save: Callable[..., Path], ask: Callable[[Pretrained], object]
) -> None:
    save()
    with unreadable(store.root), pytest.raises(StoreError, match="Permission denied"):
        ask(store)
    assert store.find(PARTS) is not None


def test_no_folder_or_a_file_in_its_place_holds_no_entries(tmp_path: Path) -> None:
    store = Pretrained(tmp_path / "pretrained")
    (tmp_path / "w").write_bytes(b"weights")
    for _ in range(2):
        assert store.find(PARTS) is None
        assert store.entries() == store.nearest(PARTS) == []
        assert store.remove(PARTS) is False
        assert store.root.is_file() or not store.root.exists()
        store.root.write_text("a file")
    with pytest.raises(StoreError):
        store.save(PARTS, tmp_path / "w", MEASURED)
    assert store.root.read_text() == "a file"


def test_a_file_in_place_of_an_entry_is_not_used_and_not_overwritten(
    store: Pretrained, save: Callable[..., Path]
) -> None:
    path = save()
    shutil.rmtree(path)
    path.write_text("a file")
    assert store.find(PARTS) is None
    with pytest.raises(StoreError):
        save()
    assert tree(store.root) == {path.name: b"a file"}
