"""Provenance: what a teacher learnt from travels with it, and a teacher that learnt from a held-out file is refused."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, World, kaiming
from hypothesis import given
from hypothesis import strategies as st
from tiny_teachers import Linear

from kd_cache import Provenance
from kd_cache.care.problems import LEAK
from kd_cache.care.repair import RepairJob, repair_cache
from kd_cache.care.verify import VerifyJob, verify_cache
from kd_cache.dataset.guard import leaked, refuse_leaking, select, select_source
from kd_cache.dataset.manifest import load_manifest
from kd_cache.errors import CheckpointError, DataLeakageError, TeacherError
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.score.teacher import check_teacher
from kd_cache.store.snapshot import Snapshot
from teachers import CPResNet, load_teacher, save_checkpoint

CPU = torch.device("cpu")
FILES = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12), max_size=40)


def md5(file: str) -> bytes:
    return hashlib.md5(file.encode(), usedforsecurity=False).digest()


def as_bytes(keys: np.ndarray) -> list[bytes]:
    assert keys.dtype == np.uint8
    assert keys.ndim == 2
    assert keys.shape[1] == 16
    return [key.tobytes() for key in keys]


def same(one: Provenance, other: Provenance) -> bool:
    return as_bytes(one.trained) == as_bytes(other.trained) and as_bytes(one.validated) == as_bytes(other.validated)


# -- the keys ----------------------------------------------------------------------------------------------------------


@given(FILES, FILES)
def test_the_documented_json_of_sorted_md5_is_all_a_reader_needs_and_is_read_again(
    trained: list[str], validated: list[str]
) -> None:
    made = Provenance.of(trained, iter(validated))
    expected = {"trained": sorted({md5(f) for f in trained}), "validated": sorted({md5(f) for f in validated})}
    assert as_bytes(made.keys) == sorted({md5(file) for file in [*trained, *validated]})
    content = json.loads(json.dumps(made.as_json()))
    keys = {name: base64.standard_b64decode(content[name]) for name in expected}
    assert keys == {name: b"".join(mine) for name, mine in expected.items()}
    count = (len(keys["trained"]) // 16).to_bytes(8, "little")
    assert content["sha256"] == hashlib.sha256(count + keys["trained"] + keys["validated"]).hexdigest()
    assert content.keys() == {"trained", "validated", "complete", "sha256"}  # as before features' digests were kept
    found = Provenance.from_json(content)
    assert {name: as_bytes(getattr(found, name)) for name in expected} == expected
    assert found.digest == made.digest


def test_a_part_that_says_nothing_makes_the_whole_incomplete() -> None:
    made = Provenance.of(["a"], ["b"])
    both = made.together(Provenance.unknown())
    assert same(both, made)
    assert (made.complete, both.complete) == (True, False)
    found = Provenance.from_json(json.loads(json.dumps(both.as_json())))
    assert found.complete is False
    assert found.digest == both.digest != made.digest
    with pytest.raises(ValueError, match="digest"):
        Provenance.from_json({**both.as_json(), "complete": True})
    with pytest.raises(ValueError, match="complete"):
        Provenance.from_json({**both.as_json(), "complete": "no"})


def test_what_was_written_before_it_could_be_incomplete_is_complete() -> None:
    content = Provenance.of(["a"]).as_json()
    del content["complete"]
    assert Provenance.from_json(content).complete


@given(FILES, st.randoms(use_true_random=False))
def test_order_and_repeats_do_not_count(files: list[str], chance: Any) -> None:
    mixed = [*files, *files[::2]]
    chance.shuffle(mixed)
    assert Provenance.of(mixed).digest == Provenance.of(files).digest


@given(st.lists(st.sampled_from("abcdef"), unique=True), st.integers(0, 6))
def test_the_digest_tells_trained_from_validated(files: list[str], at: int) -> None:
    ordered = sorted(files, key=md5)
    digests = {Provenance.of(ordered[:cut], ordered[cut:]).digest for cut in range(len(ordered) + 1)}
    assert len(digests) == len(ordered) + 1


@given(FILES, FILES, FILES, FILES)
def test_together_a_sample_that_trained_either_trained_and_none_is_lost(
    trained: list[str], validated: list[str], more: list[str], others: list[str]
) -> None:
    one, other = Provenance.of(trained, validated), Provenance.of(more, others)
    both = one.together(other)
    assert as_bytes(both.trained) == sorted({md5(file) for file in [*trained, *more]})
    expected = {md5(file) for file in [*validated, *others]} - {md5(file) for file in [*trained, *more]}
    assert as_bytes(both.validated) == sorted(expected)
    assert as_bytes(both.keys) == sorted({*as_bytes(one.keys), *as_bytes(other.keys)})
    assert same(both, other.together(one))


@given(FILES, FILES, FILES)
def test_has_trained_answers_for_each_file_in_turn(trained: list[str], validated: list[str], asked: list[str]) -> None:
    asked = [*asked, *trained[::2], *validated]
    found = Provenance.of(trained, validated).has_trained(iter(asked))
    assert found.dtype == bool
    assert found.tolist() == [file in set(trained) for file in asked]


# -- JSON that is not what was written ---------------------------------------------------------------------------------

GOOD = Provenance.of(["a", "b", "c"], ["v"]).as_json()
KEYS = base64.b64encode(bytes(16)).decode()
WRONG: dict[str, Any] = {
    "nothing": None,
    "a text": "provenance",
    "a list": [GOOD],
    "an empty object": {},
    "no trained": {name: value for name, value in GOOD.items() if name != "trained"},
    "no validated": {name: value for name, value in GOOD.items() if name != "validated"},
    "no digest": {name: value for name, value in GOOD.items() if name != "sha256"},
    "trained null": GOOD | {"trained": None},
    "trained a number": GOOD | {"trained": 7},
    "trained a list": GOOD | {"trained": ["a", "b", "c"]},
    "trained is not base64": GOOD | {"trained": "not base64!"},
    "trained is not ASCII": GOOD | {"trained": "ä" * 24},
    "validated has lost its padding": GOOD | {"validated": GOOD["validated"].rstrip("=")},
    "a line break within": GOOD | {"trained": f"{GOOD['trained'][:8]}\n{GOOD['trained'][8:]}"},
    "15 bytes": GOOD | {"validated": base64.b64encode(bytes(15)).decode()},
    "17 bytes": GOOD | {"validated": base64.b64encode(bytes(17)).decode()},
    "another key": GOOD | {"validated": KEYS},
    "a key less": GOOD | {"trained": base64.b64encode(base64.b64decode(GOOD["trained"])[16:]).decode()},
    "a key more": GOOD | {"trained": base64.b64encode(bytes(16) + base64.b64decode(GOOD["trained"])).decode()},
    "trained and validated changed places": GOOD | {"trained": GOOD["validated"], "validated": GOOD["trained"]},
    "no keys": GOOD | {"trained": "", "validated": ""},
    "the digest null": GOOD | {"sha256": None},
    "the digest of another": GOOD | {"sha256": Provenance.of(["a"]).digest},
    "the digest in capitals": GOOD | {"sha256": GOOD["sha256"].upper()},
    "the digest as a list": GOOD | {"sha256": [GOOD["sha256"]]},
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_json_that_was_not_written_so_is_a_value_error(content: Any) -> None:
    with pytest.raises(ValueError, match=r"expected an object|keys are not|its digest"):
        Provenance.from_json(content)


@given(st.integers(0, 16 * 4 * 8 - 1))
def test_every_flipped_bit_of_a_key_is_found(bit: int) -> None:
    name, place = ("trained", bit) if bit < 16 * 3 * 8 else ("validated", bit - 16 * 3 * 8)
    content = bytearray(base64.b64decode(GOOD[name]))
    content[place // 8] ^= 1 << place % 8
    with pytest.raises(ValueError, match="its digest"):
        Provenance.from_json(GOOD | {name: base64.b64encode(content).decode()})


# -- who leaks ---------------------------------------------------------------------------------------------------------


def row(world: World, device: str, split: str = "train", number: int = 0) -> str:
    found = [r["file"] for r in world.rows if r["device_id"] == device and r["split"] == split]
    return str(found[number])


@pytest.mark.parametrize("part", ["trained", "validated"])
def test_each_sample_that_is_not_permitted_is_told_with_what_is_known_of_it(world: World, part: str) -> None:
    manifest = load_manifest(world.json_path)
    strange = ["elsewhere/1.npy", "elsewhere/2.npy"]
    wrong = [row(world, "A", "test"), row(world, "s4", "test"), row(world, "c")]
    files = [*strange, *world.permitted(), *wrong]
    made = Provenance.of(files) if part == "trained" else Provenance.of(world.permitted(), files)
    lines = leaked(made, manifest, select(manifest, "b"))
    assert set(lines[1:]) == {
        f"{wrong[0]}: device A, split test",
        f"{wrong[1]}: device s4, split test",
        f"{wrong[2]}: device c, split train",
    }
    assert lines[0].startswith("samples that this manifest does not list: 2 of 25 (renamed since")
    assert not any(md5(file).hex() in "".join(lines) for file in strange), "names, not hashes"


def test_a_target_file_leaks_into_what_the_source_alone_may_make(world: World) -> None:
    manifest = load_manifest(world.json_path)
    made = Provenance.of(world.permitted())
    lines = leaked(made, manifest, select_source(manifest))
    assert sorted(lines) == sorted(
        f"{r['file']}: device b, split train" for r in world.rows if r["device_id"] == "b" and r["split"] == "train"
    )


@given(st.sets(st.integers(0, 28)), st.sets(st.integers(0, 28)), st.sampled_from(["b", "c"]))
def test_exactly_what_is_not_permitted_leaks(trained: set[int], validated: set[int], target: str) -> None:
    devices = ["A"] * 12 + ["b"] * 8 + ["c"] * 5 + ["A", "b", "s4", "s6"]
    rows = [
        {"file": f"{n}.npy", "scene_label": 1, "device_id": device, "split": "train" if n < 25 else "test"}
        for n, device in enumerate(devices)
    ]
    manifest = _manifest(rows)
    made = Provenance.of((f"{n}.npy" for n in trained), (f"{n}.npy" for n in validated))
    forbidden = {n for n in trained | validated if n >= 25 or devices[n] not in ("A", target)}
    found = leaked(made, manifest, select(manifest, target))
    assert {int(line.partition(".")[0]) for line in found} == forbidden
    assert len(found) == len(forbidden)


def _manifest(rows: list[dict[str, Any]]) -> Any:
    from kd_cache.dataset.manifest import Manifest, parse_manifest

    return Manifest(parse_manifest(json.dumps(rows).encode(), "m.json"), "")


def test_a_refusal_names_the_teacher_the_first_twenty_and_how_many_there_are(world: World) -> None:
    manifest = load_manifest(world.json_path)
    made = Provenance.of([*world.permitted(), *(f"elsewhere/{n}.npy" for n in range(40)), row(world, "s4", "test")])
    with pytest.raises(DataLeakageError, match=r"teacher mine .* on 41 samples") as caught:
        refuse_leaking({"good": Provenance.of([]), "dumb": None, "mine": made}, manifest, select(manifest, "b"))
    assert caught.value.exit_code == 6
    assert row(world, "s4", "test") in caught.value.message
    assert "samples that this manifest does not list: 40 of 61" in caught.value.message


def test_terminal_escapes_in_a_teachers_name_and_file_are_escaped(world: World) -> None:
    world.rows.append({**world.rows[-1], "file": "bad\x1b[2J.npy"})
    manifest = load_manifest(world.write().json_path)
    with pytest.raises(DataLeakageError) as caught:
        refuse_leaking({"\x1b[31m": Provenance.of(["bad\x1b[2J.npy"])}, manifest, select(manifest, "b"))
    assert "\x1b" not in caught.value.message
    assert r"bad\x1b[2J.npy" in caught.value.message


# -- in a checkpoint ---------------------------------------------------------------------------------------------------

SUFFIXES = [".safetensors", ".pth"]


def small_weights() -> dict[str, torch.Tensor]:
    net = CPResNet(10, (2, 2, 2, 4))
    kaiming(net, 0)
    return net.state_dict()


def saved(path: Path, provenance: Any) -> Path:
    save_checkpoint(path, small_weights(), {"architecture": "cp_resnet", "role": "scene", "provenance": provenance})
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_checkpoint_gives_back_its_provenance_or_has_none(tmp_path: Path, suffix: str) -> None:
    keys = np.random.default_rng(0).integers(0, 256, (140_000, 16), np.uint8)  # as many as TAU has files
    ordered = np.frombuffer(b"".join(sorted(key.tobytes() for key in keys)), np.uint8).reshape(-1, 16)
    for made in (Provenance.of(["a", "b"], ["ü"]), Provenance(ordered[::2], ordered[1::2])):
        found = load_teacher(saved(tmp_path / f"t{suffix}", made.as_json())).provenance
        assert found is not None
        np.testing.assert_array_equal(found.trained, made.trained)
        np.testing.assert_array_equal(found.keys, made.keys)
    assert load_teacher(saved(tmp_path / f"t{suffix}", None)).provenance is None
    save_checkpoint(tmp_path / f"u{suffix}", small_weights(), {})
    assert load_teacher(tmp_path / f"u{suffix}").provenance is None


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [value for value in WRONG.values() if value is not None])
def test_a_damaged_provenance_is_a_checkpoint_error_that_names_the_file(
    tmp_path: Path, suffix: str, content: Any
) -> None:
    path = saved(tmp_path / f"t{suffix}", content)
    with pytest.raises(CheckpointError, match="provenance of the record") as caught:
        load_teacher(path)
    assert str(path) in caught.value.message


def test_provenance_is_no_part_of_what_makes_logits_stale(tmp_path: Path) -> None:
    parts = [
        load_teacher(saved(tmp_path / f"{n}.safetensors", made)).fingerprint_parts()
        for n, made in enumerate([None, Provenance.of(["a"]).as_json(), Provenance.of(["b"]).as_json()])
    ]
    assert parts[0] == parts[1] == parts[2]


# -- a dump ------------------------------------------------------------------------------------------------------------


class Told(Linear):
    """A teacher that says what made it, and counts the batches that it scores."""

    def __init__(self, seed: int, provenance: Any) -> None:
        super().__init__(seed)
        self.provenance = provenance
        self.batches = 0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        return super().forward(features)


def from_file(ckpt: Path | None) -> Told:
    """What ``--teacher told=test_provenance:from_file,ckpt=PATH`` loads: a JSON list of the files that trained it."""
    assert ckpt is not None
    return Told(1, Provenance.of(json.loads(ckpt.read_text())))


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


def job(world: World, **teachers: Any) -> DumpJob:
    return DumpJob(world.root / "cache", world.data(), teachers, CPU, workers=0)


@pytest.fixture
def made_with(run: Run, world: World) -> Callable[..., Any]:
    """Run a command with a teacher that these files trained."""

    def call(command: str, files: Iterable[str], *args: object) -> Any:
        path = world.root / "told.json"
        path.write_text(json.dumps(list(files)))
        teacher = ("--teacher", f"told=test_provenance:from_file,ckpt={path}")
        return run(command, *teacher, *args)

    return call


LEAKS: dict[str, Callable[[World], str]] = {
    "a test file": lambda world: row(world, "A", "test"),
    "a test file of the target": lambda world: row(world, "b", "test"),
    "a file of an unseen device": lambda world: row(world, "s4", "test"),
    "a file of another target": lambda world: row(world, "c"),
    "a file in no row": lambda world: "elsewhere/1.npy",
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--shard", "0/2"), ("--no-skip-existing",)], ids=str)
def test_the_command_exits_6_and_touches_nothing(
    made_with: Callable[..., Any], world: World, leak: Callable[[World], str], options: tuple[str, ...]
) -> None:
    args = ("--target", "b", "--json-path", world.json_path, "--only", "told", *options)
    (world.root / "told.json").write_text(json.dumps([*world.permitted(), leak(world)]))
    before = tree(world.root)
    result = made_with("dump", [*world.permitted(), leak(world)], *args)
    assert result.exit_code == 6, result.output
    assert "told" in result.stderr
    assert tree(world.root) == before


def test_a_leak_is_refused_also_where_every_row_is_there_already(world: World) -> None:
    dump_logits(job(world, told=Told(1, None)))
    before = tree(world.cache)
    with pytest.raises(DataLeakageError):
        dump_logits(job(world, told=Told(1, Provenance.of([row(world, "c")]))))
    assert tree(world.cache) == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_built_in_teacher_is_refused_by_what_its_checkpoint_says(run: Run, world: World, suffix: str) -> None:
    path = saved(world.root / f"best{suffix}", Provenance.of([*world.permitted(), row(world, "b", "test")]).as_json())
    before = tree(world.root)
    args = ("--target", "b", "--json-path", world.json_path, "--only", "scene", "--scene-teacher-ckpt", path)
    result = run("dump", *args)
    assert result.exit_code == 6, result.output
    assert f"{row(world, 'b', 'test')}: device b, split test" in result.stderr
    assert tree(world.root) == before
    saved(path, Provenance.of(world.permitted()).as_json())
    assert run("dump", *args).exit_code == 0


# -- the audit ---------------------------------------------------------------------------------------------------------


def audit(world: World, **teachers: Any) -> Any:
    return verify_cache(audit_job(world, **teachers))


def audit_job(world: World, **teachers: Any) -> VerifyJob:
    planned = job(world, **teachers)
    return VerifyJob(Snapshot(planned.folder), planned.data, teachers, n=None, device=CPU)


def test_a_sample_that_moved_to_test_after_the_dump_makes_the_teacher_a_leak(
    made_with: Callable[..., Any], world: World
) -> None:
    files = world.permitted()
    dumped = made_with("dump", files, "--target", "b", "--json-path", world.json_path, "--only", "told")
    assert dumped.exit_code == 0, dumped.output
    good = made_with("verify", files, "--all", "--json")
    assert good.exit_code == 0, good.output
    moved = next(r for r in world.rows if r["file"] == files[4])
    moved["split"] = "test"
    world.write()
    result = made_with("verify", files, "--all", "--json")
    assert result.exit_code == 6, result.output
    found = json.loads(result.stdout)["caches"][0]["problems"]
    told_of = [problem for problem in found if "its teacher was made with" in problem["reason"]]
    assert [(p["kind"], p["teacher"], p["about"]) for p in told_of] == [(LEAK, "told", "teacher")]
    assert f"{files[4]}: device A, split test" in told_of[0]["reason"]


def test_an_audit_changes_nothing_and_a_repair_scores_nothing_with_a_leaking_teacher(world: World) -> None:
    dump_logits(job(world, told=Told(1, None)))
    leaking = Told(1, Provenance.of([row(world, "c")]))
    world.view("told", world.permitted()[0]).unlink()
    next((world.cache / "packs").glob("told-*")).unlink()
    before = tree(world.root)
    assert audit(world, told=leaking).exit_code == 6
    assert tree(world.root) == before
    with pytest.raises(DataLeakageError):
        repair_cache(RepairJob(audit_job(world, told=leaking), world.root / "cache"))
    assert leaking.batches == 0


# -- the contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provenance", [{"trained": []}, "a.npy", ["a.npy"], 0, False, Provenance, np.zeros((0, 16))])
def test_a_provenance_of_another_kind_breaks_the_contract(provenance: Any) -> None:
    with pytest.raises(TeacherError, match=r"provenance must be a kd_cache\.Provenance") as caught:
        check_teacher("mine", Told(1, provenance))
    assert "mine" in caught.value.message
    assert caught.value.exit_code == 1


def test_a_teacher_may_say_what_made_it_or_nothing() -> None:
    for teacher in (Linear(1), Told(1, None), Told(1, Provenance.of([])), Told(1, Provenance.of(["a"], ["b"]))):
        check_teacher("mine", teacher)
