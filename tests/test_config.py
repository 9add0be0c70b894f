"""Settings from a file: under the command line and the environment, over the defaults; nothing in it goes unheard."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Run as Call
from plugin_fixtures import Shown, config
from plugin_fixtures import nowhere as nowhere
from plugin_fixtures import plugin as plugin
from plugin_fixtures import shown as shown

from kd_cache.cli import commands
from kd_cache.commands import Run
from kd_cache.errors import UsageError

pytestmark = pytest.mark.usefixtures("nowhere")


def test_a_list_on_the_command_line_replaces_the_files(shown: Shown) -> None:
    config("only: [a, b]")
    assert shown("--only", "c")["values"]["only"] == ["c"]
    assert shown()["values"]["only"] == ["a", "b"]


def test_which_file_is_read(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown()["values"]["config"] is None
    config("target: c\nbatch_size: 7")
    found = shown()
    assert (found["values"]["target"], found["values"]["config"]) == ("c", "kd-cache.yaml")
    assert {"target", "batch_size"} <= set(found["given"])
    assert "cache_root" not in found["given"]
    config("target: s1", "mine.yaml")
    for args in (("--config", "mine.yaml"), ("--seconds", "1", "--config", "mine.yaml")):
        values = shown(*args)["values"]
        assert (values["target"], values["batch_size"], values["config"]) == ("s1", 32, "mine.yaml")
    monkeypatch.setenv("KD_CACHE_CONFIG", "mine.yaml")
    assert shown()["values"]["target"] == "s1"
    for name in ("none.yaml", ".", "n" * 300, "kd-cache.yaml/x"):
        assert "cannot read" in shown.refusal("--config", name)


@pytest.mark.parametrize(
    "text", ["", "\n", "# only a remark\n", "---\n", "null", "\ufeff", "target:\nonly: ~", "seed: 3\nto: tsv"]
)
def test_what_sets_nothing_of_this_command(shown: Shown, text: str) -> None:
    config(text)
    values = shown()["values"]
    assert (values["target"], values["only"]) == ("b", [])
    assert "seed" not in values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("only:\n  - a\n  - b", {"only": ["a", "b"]}),
        ("only: a", {"only": ["a"]}),
        ("only: []", {"only": []}),
        ("only: [1, 2.5]", {"only": ["1", "2.5"]}),
        ("only: &a [p, q]", {"only": ["p", "q"]}),
        ("allow_outside: [/x, y]", {"allow_outside": ["/x", "y"]}),
        ("cache_root: 2024", {"cache_root": "2024"}),
        ("cache_root: 'a b/é'", {"cache_root": "a b/é"}),
        ("seconds: 2", {"seconds": 2.0}),
        ("seconds: 1e-3", {"seconds": 0.001}),
        ("skip_existing: no", {"skip_existing": False}),
        ("stage: [{level: 2, lr: 1e-4}, level=0]", {"stage": ["level=2,lr=1e-4", "level=0"]}),
        ("stage: {level: 2}", {"stage": ["level=2"]}),
        ("\ufefftarget_name: c", {"target": "c"}),
        ("json: true\nuse_fp16: true", {"as_json": True, "dtype": "fp16"}),
        ("use_fp16: false", {"dtype": "fp32"}),
    ],
)
def test_values_are_taken_as_the_command_line_would_take_them(shown: Shown, text: str, values: dict[str, Any]) -> None:
    config(text)
    found = shown()["values"]
    assert {name: found[name] for name in values} == values


def test_use_fp16_is_another_spelling_of_dtype_fp16(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    def dtype(*args: str) -> str:
        return str(shown(*args)["values"]["dtype"])

    assert dtype("--use-fp16") == dtype("--use_fp16") == "fp16"
    assert "--dtype takes one value and is given fp16 and fp32" in shown.refusal("--use-fp16", "--dtype", "fp32")
    config("use_fp16: true")
    assert (dtype(), dtype("--dtype", "fp32")) == ("fp16", "fp32")
    config("dtype: fp32")
    monkeypatch.setenv("KD_CACHE_USE_FP16", "1")
    assert (dtype(), dtype("--dtype", "fp32")) == ("fp16", "fp32")
    monkeypatch.setenv("KD_CACHE_DTYPE", "fp32")
    assert dtype() == "fp32"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # Names
        ("targt: c", "unknown setting targt; is it target?"),
        ("batchsize: 3", "is it batch_size?"),
        ("no_skip_existing: true", "is it skip_existing?"),
        ("xyzzy:", "unknown setting xyzzy"),
        ("config: other.yaml", "unknown setting config"),
        ("help: true", "unknown setting help"),
        ("Target: c", "unknown setting Target; is it target?"),
        ("--target: c", "unknown setting __target; is it target?"),
        ('"a\\e[2Jb": 3', r"unknown setting a\x1b[2Jb"),
        ("x: &a [p]\nonly: *a", "unknown setting x"),
        ("target: b\ntarget: c", "set more than once"),
        ("batch-size: 1\nbatch_size: 2", "set more than once"),
        ("target: b\ntarget_name: c", "set more than once"),
        ("dtype: fp32\nuse_fp16: true", "set more than once"),
        # Values
        ("target: {b: 1}", "target must be a value or a list, not a section"),
        ("dump:\n  target: b", "unknown setting dump"),
        ("only: {a: 1}", "only must be a value or a list, not a section"),
        ("only: [{a: 1}]", "only must be a text or a number"),
        ("only: [[a]]", "only must be a text or a number"),
        ("only: [a, null]", "only must be a text or a number"),
        ("only: [true]", "only must be a text or a number"),
        ("only: &a [&b [&c [d, d], *c], *b, *b]", "only must be a text or a number"),
        ("target: [b]", "target must be one value, not a list"),
        ("skip_existing: [true]", "skip_existing must be one value, not a list"),
        ("skip_existing: 1", "skip_existing must be true or false (without quotes), found 1"),
        ("use_fp16: 'false'", "use_fp16 must be true or false (without quotes), found false"),
        ("batch_size: true", "batch_size must be a text or a number"),
        ("batch_size: 2.5", "Invalid value for '--batch-size'"),
        ("batch_size: many", "Invalid value for '--batch-size'"),
        ("batch_size: 0", "Invalid value for '--batch-size'"),
        ("target: no", "target must be a text or a number; put it in quotes"),
        ("dtype: fp8", "expected fp32, fp16, or topk:K"),
        ("cache_root: 2024-01-01", "cache_root must be a text or a number; put it in quotes"),
        ('cache_root: "a\\0b"', "Invalid value for '--cache-root'"),
        # No settings at all
        *[(text, "is not YAML") for text in (
            "target: [b", "target: b: c", "\ttarget: b", "target: 'b", b"target: \xff", b"\x00\x01\x02",
            "target: \x1b[2J", "*nothing", "a: b\n---\na: b", "[" * 3000, "a: " * 3000, "[a]: b", "{}: b",
        )],
        *[(text, "expected settings such as 'target: b'") for text in ("target", "- target: b", "3", "1: b")],
        ("target: b" + " " * (1 << 14), "has more than 16384 characters"),
    ],
)  # fmt: skip
def test_what_is_no_setting_is_an_error_that_names_it_and_the_file(shown: Shown, text: str | bytes, says: str) -> None:
    config(text)
    message = shown.refusal()
    assert says in message
    assert "kd-cache.yaml" in message or "Invalid value for" in message or "is not one of" in message
    assert "\x1b" not in message
    assert ("is it" in message) == ("is it" in says) or "unknown setting" not in message or says.endswith(("dump", "J"))


def test_a_flood_of_references_is_refused_at_once(shown: Shown) -> None:
    levels = "\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 30))
    config(f"x0: &x0 [a]\n{levels}\nonly: *x29")
    assert "unknown setting x0" in shown.refusal()
    config("<<: {target: c}")
    assert "merge keys (<<) are not settings" in shown.refusal()


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [ran]",
        "!!python/object/new:os.mkdir [ran]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [a]",
        "!mine x",
    ],
)
def test_tags_of_python_objects_are_never_constructed(shown: Shown, value: str) -> None:
    for text in (f"target: {value}", f"only: [{value}]", f"? {value}\n: b", value):
        config(text)
        assert "is not YAML" in shown.refusal()
        assert not Path("ran").exists()


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_the_record_has_values_sources_and_a_hash_of_the_values(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_CACHE_CACHE_ROOT", "caches")
    config("only: [a]")
    found = shown("--target", "c", "--seconds", "2.5")
    assert found["values"] == {
        "allow_outside": [], "as_json": True, "batch_size": 32, "cache_root": "caches", "config": "kd-cache.yaml",
        "dtype": "fp32", "only": ["a"], "seconds": 2.5, "skip_existing": True, "stage": [], "target": "c",
    }  # fmt: skip
    sources = {name: found["sources"][name] for name in ("cache_root", "only", "seconds", "skip_existing")}
    assert list(sources.values()) == ["environment", "default_map", "commandline", "default"]
    text = json.dumps(found["values"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert found["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setenv("KD_CACHE_TARGET", "c")
    assert shown("--seconds", "2.5")["sha256"] == found["sha256"] != shown()["sha256"]


def test_a_path_that_no_json_can_keep_is_a_usage_error(shown: Shown) -> None:
    assert r"cache_root is caf\udce9, which is not UTF-8" in shown.refusal("--cache-root", "caf\udce9")


def test_what_is_recalled_and_what_is_never_written_down() -> None:
    unkept = {option.name for option in commands.all_options() if not option.kept}
    assert unkept == {"teacher", "shard", "dataset", "report", "push", "ray", "ray_gpus", "ray_storage", "parts"}
    run = Run(commands.SEAL, {"num_scenes": 3, "json_path": None, "features": Path("x")}, {"features": "commandline"})
    saved = run.recall({"num_scenes": 10, "json_path": "relative"}, {"json_path": "/a", "features": "/b"})
    assert saved == {"json_path": "/a", "features": Path("x"), "num_scenes": 10}
    with pytest.raises(UsageError, match="expected a number from 1 to 65,536, or auto"):
        next(each for each in commands.all_options() if each.name == "batch_size").parse("0")  # type: ignore[misc]


# -- the real commands -------------------------------------------------------------------------------------------------


def test_kd_cache_reads_its_cache_root_in_the_same_order(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*args: str) -> str:
        result = run("verify", *args)
        assert result.exit_code == 3, result.output
        return str(result.stderr)

    assert "under cache" in searched()
    config("cache_root: from-file\nrecompute: false\nshard_size: 3\nall: false\ntrain: {epochs: 3}")
    assert "under from-file" in searched()
    monkeypatch.setenv("KD_CACHE_CACHE_ROOT", "from-environment")
    assert "under from-environment" in searched()
    assert "under from-command-line" in searched("--cache-root", "from-command-line")
    assert "under with_underscores" in searched("--cache_root", "with_underscores")


def test_kd_cache_takes_what_it_requires_from_the_environment_or_the_file(
    run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--target" in run("dump", "--json-path", "none.json").stderr
    config("target: b\njson_path: from-file.json")
    result = run("dump")
    assert result.exit_code == 2
    assert "from-file.json" in result.stderr
    monkeypatch.setenv("KD_CACHE_TARGET", "c")
    monkeypatch.setenv("KD_CACHE_JSON_PATH", "from-environment.json")
    assert "from-environment.json" in run("dump").stderr


CODE = "print('it ran'); raise SystemExit(99)"


@pytest.mark.parametrize("text", ["teacher: x=payload:y", "teacher: [a=./payload.py:y]", "scene: {arch: 'payload:y'}"])
def test_a_file_that_nobody_named_names_no_code(run: Call, text: str) -> None:
    """Whatever the command: a folder may be anybody's."""
    config(text)
    Path("payload.py").write_text(CODE)
    for command in (("verify",), ("repair",), ("train", "scene"), ("dump", "--target", "b")):
        refused = run(*command)
        said = " ".join(refused.output.replace("│", " ").split())
        assert refused.exit_code == 2, refused.output
        assert "code comes only from the command line, the environment or a file named with --config" in said
    named = (
        run("train", "scene", "--config", "kd-cache.yaml")
        if "arch" in text
        else run("dump", "--target", "b", "--config", "kd-cache.yaml")
    )
    assert "code comes only" not in named.output
    config("scene: {arch: cnn14}")
    assert "code comes only" not in run("train", "scene", "--json-path", "none.json").output


@pytest.mark.parametrize("module", [("-m", "kd_cache"), ("-mkd_cache",), ("-m", "kd_cache.cli.reference")])
def test_a_module_of_the_current_folder_never_passes_for_one_that_is_imported(module: tuple[str, ...]) -> None:
    for name in ("typer", "yaml", "rich", "numpy", "teachers", "dataclasses", "pkgutil"):
        Path(f"{name}.py").write_text(CODE)
    Path("evil-1.dist-info").mkdir()
    Path("evil-1.dist-info", "METADATA").write_text("Name: evil\nVersion: 1\n")
    Path("evil-1.dist-info", "entry_points.txt").write_text("[kd_cache.commands]\nx = typer:x\n")
    Path("mine.py").write_text("def own(ckpt): raise SystemExit('mine was asked for')")
    done = subprocess.run([sys.executable, *module, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, "it ran" in done.stdout) == (0, False), done.stderr
    if module[-1] == "kd_cache":  # a module that is asked for is found there all the same
        dump = ("dump", "--target", "b", "--teacher", "mine=mine:own", "--only", "mine")
        asked = subprocess.run([sys.executable, *module, *dump], capture_output=True, text=True, check=False)
        assert "cannot import" not in asked.stderr


@pytest.mark.parametrize("name", ["KD_CACHE_CACHE_ROOT", "KD_CACHE_BATCH_SIZE", "KD_CACHE_USE_FP16"])
def test_an_empty_variable_is_no_default(run: Call, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    result = run("info", "cache")
    assert (result.exit_code, name in result.stderr) == (2, True)
