"""Dumps, parts, deaths, damage, seals, audits and repairs in any order: no reader is ever given a wrong row.

The model is plain Python: every feature a file ever had, every version a teacher ever was, what was permitted when the
index was last written. Whole numbers throughout, so that the right row is one number and no other.
`make faults` tries more.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from fault_tools import LIMIT, often
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kd_cache.care.gc import find_garbage, remove_garbage
from kd_cache.care.repair import RepairJob, repair_cache
from kd_cache.care.seal import SealJob, seal_cache
from kd_cache.care.verify import VerifyJob, VerifyReport, verify_cache
from kd_cache.dataset.dataset import Dataset
from kd_cache.dataset.task import DCASE
from kd_cache.errors import CorruptError, KDCacheError, StoreError
from kd_cache.score.dump import DumpJob, dump_logits
from kd_cache.score.teacher import teacher_fingerprint
from kd_cache.serve.logit_cache import LogitCache
from kd_cache.store.cache import CacheFolder
from kd_cache.store.snapshot import Snapshot
from kd_cache.watch import Watcher

pytestmark = [pytest.mark.faults, LIMIT]

BINS, CLASSES, MOST = 4, 3, 10
NAMES = ("first", "second")
CPU = torch.device("cpu")
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 (what is lost with the machine is not the point)


class DeadError(BaseException):
    """The process is no more."""


class Fate:
    """Counts what changes the disk, and each call of a teacher; at the drawn one something happens.

    ``dead`` is a process that was killed: from then on nothing that changes the disk happens at all, not even what
    ``finally`` blocks would do. ``interrupt`` is Ctrl-C; an error number is a disk that refuses once.
    """

    def __init__(self, what: str | int, moment: int) -> None:
        self.what = what
        self.left = moment
        self.struck = False

    def tick(self) -> None:
        if self.struck and self.what == "dead":
            raise DeadError
        self.left -= 1
        if self.left == 0:
            self.struck = True
            if self.what == "dead":
                raise DeadError
            if self.what == "interrupt":
                raise KeyboardInterrupt
            raise OSError(self.what, os.strerror(int(self.what)))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("replace", "unlink", "fsync", "mkdir", "rmdir"):
                patch.setattr(os, name, self._before(getattr(os, name)))
            patch.setattr(Exact, "fate", self)
            yield

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return call(*args, **kwargs)

        return wrapped


LARGE = st.integers(0, 2**20)
FATES = st.none() | st.builds(
    Fate,
    st.sampled_from(["dead", "dead", "interrupt", errno.EIO, errno.ENOSPC]),
    st.integers(1, 30) | st.integers(30, 120),
)


def weights(name: str, version: int) -> np.ndarray:
    return np.random.default_rng([NAMES.index(name), version]).integers(-50, 51, (BINS, CLASSES)).astype(np.float64)


class Exact:
    """A teacher of whole numbers."""

    num_classes = CLASSES
    value_kind = "logits"
    fate: Fate | None = None

    def __init__(self, name: str, version: int) -> None:
        self.name, self.version = name, version
        self._weights = torch.from_numpy(weights(name, version)).float()

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        if self.fate is not None:
            self.fate.tick()
        return features.sum(dim=1) @ self._weights

    def fingerprint_parts(self) -> dict[str, str]:
        return {"architecture": "exact/1", "weights": f"{self.name} {self.version}"}


def digest_of(feature: np.ndarray) -> bytes:
    """As the README describes it."""
    return xxhash.xxh3_128_digest(feature.dtype.str.encode() + str(feature.shape).encode() + feature.tobytes())


class Ear(Watcher):
    """Remembers what a dump says is durable."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def saved(self, count: int) -> None:
        self.machine.saved |= self.machine._stored_rows()


class Machine(RuleBasedStateMachine):
    """One cache and everything that may happen to it."""

    @initialize(finished=st.sampled_from([True, True, True, False]))
    def begin(self, finished: bool) -> None:
        self.root = Path(tempfile.mkdtemp(dir=MEMORY))
        self.rows: dict[str, dict[str, Any]] = {}
        self.features: dict[str, np.ndarray] = {}
        self.ever: dict[str, dict[bytes, np.ndarray]] = {}
        self.version = dict.fromkeys(NAMES, 0)
        self.made: dict[str, tuple[str, int]] = {}  # fingerprint -> teacher and version
        self.permitted: list[set[str]] = []  # one of these was permitted when the index was written
        self.current: dict[str, set[str]] = {}  # one of these fingerprints is current
        self.begun: dict[str, set[str]] = {name: set() for name in NAMES}
        self.saved: set[tuple[str, str, str, bytes]] = set()  # teacher, fingerprint, file, feature of acknowledged rows
        self.number = 0
        for device in "AAAAAbbb":
            self._add(device)
        self._write_manifest()
        if finished:
            self.dump(NAMES, again=False, fate=None)

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root, ignore_errors=True)

    # -- the world ----------------------------------------------------------------------------------------------------

    def _add(self, device: str) -> None:
        file = f"x/{self.number}-{device}.npy"
        self.rows[file] = {
            "file": file,
            "scene_label": self.number % CLASSES,
            "device_id": device,
            "domain": DCASE.domain_of[device],
            "split": "train",
        }
        self.number += 1
        self._new_feature(file)

    def _new_feature(self, file: str) -> None:
        self.number += 1
        shape = (3 if self.number % 3 else 5, BINS)
        feature = np.random.default_rng(self.number).integers(-9, 10, shape).astype(np.float32)
        self.features[file] = feature
        self.ever.setdefault(file, {})[digest_of(feature)] = feature
        path = self.root / file
        path.parent.mkdir(exist_ok=True)
        np.save(path, feature)

    def _write_manifest(self) -> None:
        content = {"train": list(self.rows.values()), "val": [], "test": []}
        (self.root / "dataset.json").write_text(json.dumps(content))

    def _teachers(self, names: Sequence[str] = NAMES) -> dict[str, Exact]:
        teachers = {name: Exact(name, self.version[name]) for name in names}
        for name, teacher in teachers.items():
            self.made[teacher_fingerprint(teacher).digest] = (name, teacher.version)
        return teachers

    def _now(self, name: str) -> str:
        return teacher_fingerprint(Exact(name, self.version[name])).digest

    @property
    def folder(self) -> CacheFolder:
        return CacheFolder(self.root / "cache" / "A2b")

    def _data(self) -> Dataset:
        return Dataset.load("b", self.root / "dataset.json")

    def _dump_job(self, names: Sequence[str], part: tuple[int, int] | None = None, *, again: bool = False) -> DumpJob:
        return DumpJob(
            cache_root=self.root / "cache",
            data=self._data(),
            teachers=self._teachers(names),
            device=CPU,
            skip_existing=not again,
            workers=0,
            batch_size=2,
            shard_size=3,
            shard_seconds=1e9,
            part=part,
        )

    def _audit(self, teachers: Mapping[str, Exact], n: int | None = None) -> VerifyJob:
        return VerifyJob(Snapshot(self.folder), self._data(), teachers=teachers, n=n, device=CPU)

    def _stored_rows(self) -> set[tuple[str, str, str, bytes]]:
        """Teacher, fingerprint, file and feature of every row in a good pack."""
        return {
            (pack.origin.teacher, pack.origin.fingerprint.digest, file, digest.tobytes())
            for pack in self.folder.packs().good
            for file, digest in zip(pack.files, pack.inputs, strict=True)
        }

    # -- doing things, with a fate ------------------------------------------------------------------------------------

    def _try(self, fate: Fate | None, work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        """The result, or what stopped it: only what may."""
        try:
            if fate is None:
                return work(), None
            with fate.at_work():
                return work(), None
        except (DeadError, KeyboardInterrupt) as stop:
            assert fate is not None
            assert fate.struck
            return None, stop
        except KDCacheError as error:
            self._refuse_false_alarm(error.message)
            event(f"{type(error).__name__}{'' if fate is None or not fate.struck else ' by fate'}")
            return None, error

    def _refuse_false_alarm(self, text: str) -> None:
        """Nothing here joins logits to wrong rows."""
        assert "joined" not in text

    def _may_become(self, names: Sequence[str]) -> None:
        """What was done may have come as far as the index, or not."""
        self.permitted.append(set(self.rows))
        for name in names:
            self.begun[name].add(self._now(name))
            self.current.setdefault(name, set()).update(self.begun[name])

    def _became(self, names: Sequence[str]) -> None:
        """It has come as far as the index."""
        self.permitted = [set(self.rows)]
        for name in names:
            self.begun[name] = {self._now(name)}
            self.current[name] = {self._now(name)}

    # -- what may happen ----------------------------------------------------------------------------------------------

    @rule(
        names=st.sampled_from([NAMES, NAMES, NAMES[:1], NAMES[1:]]),
        again=st.sampled_from([False, False, False, True]),
        fate=FATES,
    )
    def dump(self, names: Sequence[str], again: bool, fate: Fate | None) -> None:
        self._may_become(names)
        report, _ = self._try(fate, lambda: dump_logits(self._dump_job(names, again=again), Ear(self)))
        if report is not None:
            assert report.missing == {}
            self._became(names)
            self._complete(names)
            event("a dump was whole")

    @rule(number=st.integers(0, 1), fate=FATES)
    def dump_part(self, number: int, fate: Fate | None) -> None:
        for name in NAMES:
            self.begun[name].add(self._now(name))
        self._try(fate, lambda: dump_logits(self._dump_job(NAMES, (number, 2)), Ear(self)))

    @rule(fate=FATES)
    def seal(self, fate: Fate | None) -> None:
        self._may_become(NAMES)
        job = SealJob(Snapshot(self.folder), self._data(), workers=1, record={"environment": {"torch": "not known"}})
        report, _ = self._try(fate, lambda: seal_cache(job))
        if report is not None:
            self.permitted = [set(self.rows)]
            self._complete((), present=True)
            event("a seal was whole")

    @rule(fate=FATES)
    def repair(self, fate: Fate | None) -> None:
        self._may_become(NAMES)
        report, _ = self._try(fate, self._repair)
        if report is None:
            return
        self._heard(report.before)
        event("repaired" if report.before.problems else "nothing to repair")
        assert report.after.problems == []
        self._heard(self._verified())

    def _repair(self) -> Any:
        job = RepairJob(
            self._audit(self._teachers()),
            self.root / "cache",
            workers=1,
            record={"environment": {"torch": "not known"}},
        )
        return repair_cache(job)

    @rule(n=st.sampled_from([None, 1, 3]))
    def verify(self, n: int | None) -> None:
        report, _ = self._try(None, lambda: verify_cache(self._audit(self._teachers(), n)))
        if report is not None:
            self._heard(report)

    def _verified(self) -> VerifyReport:
        return verify_cache(self._audit(self._teachers()))

    def _heard(self, report: VerifyReport) -> None:
        """An audit of everything that finds nothing is a promise."""
        for problem in report.problems:
            self._refuse_false_alarm(problem.reason)
        if report.everything and report.exit_code == 0:
            self._complete((), present=True)

    def _dump_as_hinted(self, *, again: bool = False) -> Any:
        """Where index and packs are lost, nothing proves whose the row files are: their owner moves them away."""
        try:
            return dump_logits(self._dump_job(NAMES, again=again))
        except StoreError as error:
            if "Move those files away" not in str(error.hint):
                raise
            for name in NAMES:
                shutil.rmtree(self.folder.view_path(name), ignore_errors=True)
            return dump_logits(self._dump_job(NAMES, again=again))

    @rule()
    def heal(self) -> None:
        """Whatever happened: a repair, or the dump that it asks for, brings everything back."""
        self._may_become(NAMES)
        report, _ = self._try(None, self._repair)
        if report is not None:
            assert report.after.problems == [], report.after.problems
        else:
            done, error = self._try(None, self._dump_as_hinted)
            event("healed by a dump")
            if done is None:
                assert isinstance(error, CorruptError)
                assert "--no-skip-existing" in str(error.hint)
                self._dump_as_hinted(again=True)
                event("healed by scoring everything again")
        found = self._verified()
        assert found.problems == [], found.problems
        index = self.folder.index()
        assert index is not None
        names = NAMES if report is None else list(index.origins)  # what nobody has sealed yet is no part of a repair
        self._became(names)
        self._complete(names)

    @rule(fate=FATES)
    def collect_garbage(self, fate: Fate | None) -> None:
        def collect() -> None:
            remove_garbage(find_garbage(self.folder.path, older_than=0))

        before = self._served()
        self._try(fate, collect)
        assert self._served() == before

    # -- damage -------------------------------------------------------------------------------------------------------

    def _stored(self) -> list[Path]:
        return sorted(path for path in self.folder.path.rglob("*") if path.is_file())

    def _has_files(self) -> bool:
        return hasattr(self, "root") and bool(self._stored())

    def _pick(self, kind: int, which: int) -> Path:
        """Any file of the cache; not one of the many in the view each time."""
        by_kind: dict[str, list[Path]] = {}
        for path in self._stored():
            name = path.name.partition("-")[0] if path.parent == self.folder.path else path.parent.name
            by_kind.setdefault("view" if name in NAMES else name, []).append(path)
        chosen = by_kind[sorted(by_kind)[kind % len(by_kind)]]
        path = chosen[which % len(chosen)]
        if path.parent.name in ("packs", "pending") or path == self.folder.index_path:
            self.saved.clear()  # a pack is gone, or what says whose packs they are
        return path

    # Numbers, not names and sizes, are drawn: those hold random and timely parts, and a draw must be repeatable.

    @precondition(_has_files)
    @rule(kind=LARGE, which=LARGE, place=LARGE, bit=st.integers(0, 7), anywhere=st.booleans())
    def flip_a_bit(self, kind: int, which: int, place: int, bit: int, anywhere: bool) -> None:
        path = self._pick(kind, which)
        content = bytearray(path.read_bytes())
        written = np.flatnonzero(np.frombuffer(content, np.uint8)).tolist()  # much of a small pack is zeros
        places = range(len(content)) if anywhere else written
        if places:
            content[places[place % len(places)]] ^= 1 << bit
            path.write_bytes(content)

    @precondition(_has_files)
    @rule(kind=LARGE, which=LARGE, share=st.floats(0, 1, exclude_max=True))
    def truncate(self, kind: int, which: int, share: float) -> None:
        path = self._pick(kind, which)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    @precondition(_has_files)
    @rule(kind=LARGE, which=LARGE)
    def delete(self, kind: int, which: int) -> None:
        self._pick(kind, which).unlink()

    # -- the world moves on -------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def change_a_feature(self, data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(sorted(self.features)), label="file")
        self._new_feature(file)

    @rule(data=st.data())
    def bring_a_feature_back(self, data: st.DataObject) -> None:
        """What was scored before may be asked for again."""
        file = data.draw(st.sampled_from(sorted(self.features)), label="file")
        feature = data.draw(st.sampled_from(list(self.ever[file].values())), label="feature")
        self.features[file] = feature
        np.save(self.root / file, feature)

    @rule(name=st.sampled_from(NAMES), version=st.integers(0, 3))
    def change_a_checkpoint(self, name: str, version: int) -> None:
        self.version[name] = version

    @rule(device=st.sampled_from("Ab"))
    def add_a_row(self, device: str) -> None:
        if len(self.rows) < MOST:
            self._add(device)
            self._write_manifest()

    @rule(data=st.data())
    def remove_a_row(self, data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(sorted(self.rows)), label="file")
        device = self.rows[file]["device_id"]
        if sum(row["device_id"] == device for row in self.rows.values()) > 1:
            del self.rows[file], self.features[file]
            self._write_manifest()
            self.saved.clear()  # packs that hold it and are not current go as a whole

    @rule(data=st.data(), label=st.integers(0, CLASSES - 1))
    def relabel(self, data: st.DataObject, label: int) -> None:
        file = data.draw(st.sampled_from(sorted(self.rows)), label="file")
        self.rows[file]["scene_label"] = label
        self._write_manifest()

    # -- what must hold -----------------------------------------------------------------------------------------------

    def _right(self, file: str, digest: bytes, fingerprint: str) -> np.ndarray:
        name, version = self.made[fingerprint]
        return self.ever[file][digest].astype(np.float64).sum(axis=0) @ weights(name, version)

    def _served(
        self, verify: str = "full", teachers: Sequence[str] | None = None
    ) -> dict[tuple[str, str], tuple[bytes, bytes]]:
        """By file and teacher: the digest of the feature that was scored, and the row. Nothing if it does not open."""
        try:
            cache = LogitCache.open(self.folder.path, teachers, verify=verify)
            files = cache.files
            rows = cache.rows(files)
            logits, digests = cache.batch(rows).numpy(), cache.input_digests(rows)
        except KDCacheError as error:
            event(f"a reader is told: {type(error).__name__}")
            return {}
        assert digests is not None
        assert any(set(files) <= permitted for permitted in self.permitted)
        served = {}
        for at, file in enumerate(files):
            for teacher, name in enumerate(cache.teachers):
                fingerprint = cache.fingerprints[name]
                assert fingerprint in self.current[name]
                assert self.made[fingerprint][0] == name
                digest = digests[at, teacher].tobytes()
                assert digest in self.ever[file]
                row = logits[at, teacher]
                assert (row == self._right(file, digest, fingerprint)).all()
                served[file, name] = (digest, row.tobytes())
        return served

    def _complete(self, names: Sequence[str], *, present: bool = False) -> None:
        """Every permitted file is served, as its feature is now, by these teachers as they are now.

        With ``present`` also by every teacher in the index.
        """
        index = self.folder.index()
        assert index is not None
        assert set(names) <= set(index.origins)
        for name in index.origins if present else names:
            served = self._served(teachers=[name])
            assert {file for file, _ in served} == set(self.rows)
            assert all(digest == digest_of(self.features[file]) for (file, _), (digest, _) in served.items())
        for name in names:
            assert index.origins[name].fingerprint.digest == self._now(name)

    @invariant()
    def whatever_is_served_is_right(self) -> None:
        if hasattr(self, "root"):
            self._served()

    @invariant()
    def what_was_acknowledged_is_there_as_long_as_it_is_wanted(self) -> None:
        """But for what this test damages itself: then nothing is left to be remembered."""
        if hasattr(self, "root"):
            now = {
                (name, self._now(name), file, digest_of(self.features[file])) for name in NAMES for file in self.rows
            }
            self.saved &= now
            assert self.saved <= self._stored_rows()

    @rule()
    def read_lazily(self) -> None:
        lazily = self._served("lazy")
        fully = self._served()
        if fully:
            assert lazily == fully


def test_nothing_wrong_is_ever_served_whatever_happens_in_whatever_order() -> None:
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=often(10, 50, 100), stateful_step_count=often(12, 20, 30))
    )
