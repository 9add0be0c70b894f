"""The middle of a dump: read every feature of a part once, score what is not fresh, hand the rows over to be committed.

Four stages work at the same time: threads read features ahead, this one puts them into batches, the device scores them
with every teacher that needs them, and another thread commits what was scored. Each waits for the slowest of them only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kd_cache.batcher import Batcher
from kd_cache.commits import Commits
from kd_cache.device import numerics
from kd_cache.dump_job import DumpJob, DumpReport
from kd_cache.engine import Engine, Scored
from kd_cache.errors import FeatureError, KDCacheError, TeacherError, shown
from kd_cache.features import Feature
from kd_cache.found import Found
from kd_cache.known import ASKED, FRESH, NEW, Known
from kd_cache.planning import Planner, Ranks
from kd_cache.reading import read_ahead
from kd_cache.stages import Busy
from kd_cache.value_kind import contradiction
from kd_cache.watch import Watcher


class Scoring:
    """Scores the samples of a part.

    Args:
        files: of all permitted samples, in key order.
        part: which of them to score.
        report: gets the counts.

    Attributes:
        inputs: ``[N, 16]`` u1, the digest of each feature that was read.
        readable: ``[N]`` bool, whether it could be.
    """

    def __init__(
        self, job: DumpJob, found: Found, files: Sequence[str], part: range, report: DumpReport, watcher: Watcher
    ) -> None:
        self._job, self._found, self._files, self._part = job, found, files, part
        self._report, self._watcher = report, watcher
        self._ranks = Ranks(job.source, files)
        self._due: dict[int, dict[str, str]] = {}  # by sample and teacher: why it must be scored
        self._done = 0
        self._busy = Busy()
        self.inputs = np.zeros((len(files), 16), np.uint8)
        self.readable = np.zeros(len(files), bool)

    def run(self, commits: Commits, busy: Busy) -> None:
        """Score everything that must be, and commit it: also when stopping, what was scored is kept.

        Raises:
            FeatureError, TeacherError: a bad sample with ``on_bad_sample="stop"``.
            StoreError: a commit failed.
        """
        self._busy, self._commits = busy, commits
        self._watcher.stage("scoring", len(self._part))
        try:
            with numerics(self._job.device, self._job.precision, self._job.seed):
                self._score_all()
        finally:
            commits.finish(self._done)
            self._report.busy = busy.shares

    def _score_all(self) -> None:
        job = self._job
        engine = Engine(
            job.teachers,
            job.device,
            compiled=job.compiled,
            compare=job.precision != "fp32",
            busy=self._busy,
            note=self._watcher.note,
        )
        planner = Planner(job, self._found, self._files, engine, self._watcher)
        batcher = Batcher(engine)
        numbers = list(self._part)
        features = read_ahead(job.source, [self._files[number] for number in numbers], job.workers, self._busy)
        for number, feature in zip(numbers, features, strict=True):
            if isinstance(feature, FeatureError):
                self._bad(number, feature)
                continue
            needed = self._needed(number, feature)
            if not needed:
                self._advance(1)
                continue
            shape = (feature.array.shape[0], feature.array.shape[1])
            plan = planner.plan_for(shape)
            if shape[1] != plan.bins:
                what = f"has {shape[1]} bins, expected {plan.bins} as the others have"
                self._bad(number, FeatureError(f"feature {shown(self._files[number])} {what}"))
                continue
            place = plan.place(shape, self._ranks.rank(number, shape))
            self._keep(batcher.add(number, feature.array, needed, place))
        self._keep(batcher.finish())
        self._report.halved_to = engine.most_rows

    def _needed(self, number: int, feature: Feature) -> frozenset[str]:
        """The teachers that must score this sample. Why is counted when they have."""
        self.inputs[number] = np.frombuffer(feature.digest, np.uint8)
        self.readable[number] = True
        self._ranks.shapes[number] = feature.array.shape
        reasons = due_reasons(self._job, self._found, number, feature.digest)
        for name in self._found.known:
            self._report.teachers[name].skipped += name not in reasons
        if reasons:
            self._due[number] = reasons
        return frozenset(reasons)

    def _advance(self, count: int) -> None:
        self._done += count
        self._watcher.advance(count)

    def _keep(self, batches: Iterator[Scored]) -> None:
        for scored in batches:
            for name in scored.logits:
                self._keep_rows(name, scored)
            for error in scored.errors.values():
                for number in scored.numbers:
                    self._bad(number, TeacherError(f"{error.message} (sample {shown(self._files[number])})"))
            for number in scored.numbers:
                del self._due[number]
            self._report.samples_scored += len(scored.numbers)
            self._advance(len(scored.numbers))
            self._watcher.busy(self._busy.shares)
            self._commits.advance(self._done)

    def _keep_rows(self, name: str, scored: Scored) -> None:
        numbers, logits = scored.numbers, scored.logits[name]
        origin, report = self._job.origins[name], self._report.teachers[name]
        with np.errstate(over="ignore"):  # an overflow to inf is reported below, by name
            stored = logits.astype(origin.stored)
        good = np.isfinite(logits).all(axis=1)
        wrong = contradiction(origin.value_kind, logits[good])
        if wrong is not None:
            raise TeacherError(
                f"teacher {name} says value_kind {origin.value_kind}, but its rows {wrong}",
                hint="Return raw logits, or declare the value_kind that the teacher returns.",
            )
        fits = np.isfinite(stored).all(axis=1)
        kept = [number for row, number in enumerate(numbers) if fits[row]]
        self._commits.add(name, [self._files[number] for number in kept], self.inputs[kept], stored[fits])
        for number in kept:
            report.count(self._due[number][name])
        for row in np.flatnonzero(~fits).tolist():
            largest = np.abs(logits[row]).max()
            reason = f"do not fit {self._job.dtype} (largest {largest:.6g}); use --dtype fp32"
            what = reason if good[row] else f"are not finite (classes {np.flatnonzero(~np.isfinite(logits[row]))})"
            message = f"teacher {name}: the logits of {shown(self._files[numbers[row]])} {what}"
            self._bad(numbers[row], TeacherError(message))
        if report.cost is not None:
            report.cost.add(logits[fits], stored[fits])
        if report.precision_cost is not None and name in scored.exact:
            exact = scored.exact[name]
            compared = good & np.isfinite(exact).all(axis=1)
            report.precision_cost.add(exact[compared], logits[compared])

    def _bad(self, number: int, error: KDCacheError) -> None:
        if not refuse_bad(self._job, self._report, self._files[number], error):
            self.readable[number] = False
            self._advance(1)


def due_reasons(job: DumpJob, found: Found, number: int, digest: bytes) -> dict[str, str]:
    """Why each teacher must score this sample; those for whom its row is fresh are left out."""
    states = {name: _state(job, known, number, digest) for name, known in found.known.items()}
    return {name: state for name, state in states.items() if state != FRESH}


def _state(job: DumpJob, known: Known, number: int, digest: bytes) -> str:
    if job.skip_existing:
        return known.state(number, digest)
    return ASKED if known.holds(number) or number in known.superseded else NEW


def refuse_bad(job: DumpJob, report: DumpReport, file: str, error: KDCacheError) -> bool:
    """A sample that cannot be scored: raise its error, or list it as missing; whether its feature is good even so."""
    is_feature = isinstance(error, FeatureError)
    if job.on_bad_sample == "stop":
        what = "the sample" if is_feature else "the teacher, or the sample"
        hint = error.hint or f"Mend {what}, or pass --on-bad-sample skip to leave such samples out."
        raise type(error)(error.message, hint=hint)
    report.missing.setdefault(file, error.message)
    return not is_feature
