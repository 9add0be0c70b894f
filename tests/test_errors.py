"""The error tree: as drawn, with the exit statuses promised, whole after a pickle, and safe to print."""

from __future__ import annotations

import copy
import errno
import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_cache import errors
from kd_cache.errors import (
    ChangedError,
    CheckpointError,
    CorruptError,
    DataLeakageError,
    FeatureError,
    KDCacheError,
    ManifestError,
    MissingLogitsError,
    StaleError,
    StoreError,
    TeacherError,
    TrainingError,
    UnfitError,
    UsageError,
    listed,
    shown,
    worst_exit_code,
)

TREE: dict[type[KDCacheError], tuple[type[Exception], int]] = {
    KDCacheError: (Exception, 1),
    UsageError: (ValueError, 2),
    ManifestError: (UsageError, 2),
    UnfitError: (UsageError, 2),
    MissingLogitsError: (KeyError, 3),
    CorruptError: (ValueError, 4),
    StaleError: (ValueError, 5),
    DataLeakageError: (ValueError, 6),
    CheckpointError: (ValueError, 1),
    TeacherError: (ValueError, 1),
    TrainingError: (RuntimeError, 1),
    FeatureError: (ValueError, 1),
    StoreError: (OSError, 1),
    ChangedError: (StoreError, 1),
}
ALL = list(TREE)


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(below) for below in kind.__subclasses__()))


def test_the_tree_drawn_is_the_tree_that_exists() -> None:
    drawn = re.findall(r"(\w+Error)(?: \((\w+)\))? +exit (\d)", str(errors.__doc__))
    assert {name: (builtin or None, int(code)) for name, builtin, code in drawn} == {
        kind.__name__: (
            next((b.__name__ for b in kind.__bases__ if not issubclass(b, KDCacheError) and b is not Exception), None),
            kind.exit_code,
        )
        for kind in subclasses(KDCacheError)
        if kind.__module__ == "kd_cache.errors"
    }


def test_every_error_of_the_package_is_in_the_tree() -> None:
    assert {kind for kind in subclasses(KDCacheError) if kind.__module__.startswith("kd_cache")} == set(ALL)


def test_each_error_is_caught_as_the_builtin_a_caller_would_catch_and_has_its_exit_status() -> None:
    for kind, (builtin, code) in TREE.items():
        with pytest.raises(builtin) as caught:
            raise kind("what", hint="next")
        assert isinstance(caught.value, KDCacheError)
        assert kind.exit_code == code


TEXTS = st.text(max_size=20)
ERRORS = st.builds(lambda kind, text, hint: kind(text, hint=hint), st.sampled_from(ALL), TEXTS, st.none() | TEXTS)


@given(ERRORS, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_any_error_prints_its_message_and_hint_and_both_survive_a_pickle(error: KDCacheError, protocol: int) -> None:
    assert str(error) == (error.message if error.hint is None else f"{error.message}\n{error.hint}")
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301
        assert type(again) is type(error)
        assert (again.message, again.hint, str(again)) == (error.message, error.hint, str(error))


def fail(kind: type[KDCacheError]) -> None:
    raise kind("what", hint="next")


def test_errors_cross_from_a_worker_process() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for kind in ALL:
            with pytest.raises(kind) as caught:
                pool.submit(fail, kind).result()
            assert (caught.value.message, caught.value.hint) == ("what", "next")


def test_a_store_error_does_not_pass_its_text_off_as_an_errno() -> None:
    error = StoreError("no space", hint="make some")
    assert error.errno is None
    assert error.errno != errno.ENOSPC
    assert error.strerror == "no space"
    assert error.filename is None


# -- exit status -------------------------------------------------------------------------------------------------------


WORSE = (130, 143, 1, 2, 3, 5, 4, 6)
"""Exit statuses; each is worse than those before it."""


@given(st.lists(st.sampled_from((0, *WORSE)), max_size=6))
def test_the_worst_of_several_problems_decides(codes: list[int]) -> None:
    worst = max(codes, key=lambda code: (0, *WORSE).index(code), default=0)
    assert worst_exit_code(codes) == worst_exit_code(iter(codes)) == worst


@given(st.lists(st.integers(0, 255), max_size=6))
def test_a_problem_never_gives_status_zero(codes: list[int]) -> None:
    assert (worst_exit_code(codes) == 0) == (not any(codes))
    assert worst_exit_code(codes) in {0, *codes}


# -- names in messages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain/Näme ✓ 文.npy", "plain/Näme ✓ 文.npy"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("a\0b\x7f", r"a\x00b\x7f"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("\u200bzero\ufeff", r"\u200bzero\ufeff"),
        ("line\u2028sep\xa0nbsp", r"line\u2028sep\xa0nbsp"),
        ("\ud800lone\udcff", r"\ud800lone\udcff"),
        ("\U000e0001tag", r"\U000e0001tag"),
        ("", ""),
        (3, "3"),
        (None, "None"),
        (ValueError("a\x1b"), r"a\x1b"),
    ],
)
def test_what_could_drive_a_terminal_is_escaped(name: object, text: str) -> None:
    assert shown(name) == text


@given(st.text(max_size=30))
def test_any_name_can_be_printed_on_any_utf8_terminal(name: str) -> None:
    text = shown(name)
    assert text.isprintable()
    text.encode()
    assert shown(text) == text
    if name.isprintable():
        assert text == name


def test_every_path_is_shown_whole_and_a_text_without_end_is_not() -> None:
    longest = "/".join(["n" * 255] * 16)
    assert len(longest) == 4095
    assert shown(longest) == longest
    assert len(shown("x" * 10**6)) < 4200
    assert "1000000 characters" in shown("x" * 10**6)


def test_a_list_of_names_is_cut_at_twenty_and_says_how_many_there_are() -> None:
    assert listed(["a", "b\x1b"]) == "  a\n  b\\x1b"
    assert listed(range(20)).count("\n") == 19
    lines = listed(range(45)).split("\n")
    assert lines[:20] == [f"  {number}" for number in range(20)]
    assert lines[20:] == ["  … and 25 more (45 in all)"]
    assert listed(["a"], total=3) == "  a\n  … and 2 more (3 in all)"
    assert listed([]) == ""
