"""The middle of a dump: read every feature of a part once, score what is not fresh, hand the rows over to be committed.

Four stages work at the same time: threads read features ahead, this one puts them into batches, the device scores them
with every teacher that needs them, and another thread commits what was scored. Each waits for the slowest of them only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from kd_cache.dataset.features import Feature, shape_of
from kd_cache.errors import FeatureError, KDCacheError, TeacherError, shown
from kd_cache.score.batcher import Batcher
from kd_cache.score.commits import Commits
from kd_cache.score.device import numerics
from kd_cache.score.engine import Engine, Scored
from kd_cache.score.existing import ASKED, FRESH, Found, Known
from kd_cache.score.input_checks import input_remarks
from kd_cache.score.job import NEW, DumpJob, DumpReport
from kd_cache.score.planning import Others, Planner, Ranks
from kd_cache.score.reading import Read, read_ahead
from kd_cache.score.stages import Busy
from kd_cache.score.unchanged import Unchanged
from kd_cache.score.value_kind import RowCheck
from kd_cache.store.plan import Shape, ShapeCodes
from kd_cache.watch import Watcher


class Scoring:
    """Scores the samples of a part.

    Args:
        files: of all permitted samples, in key order; ``keys`` ``[N, 16]`` u1 theirs.
        part: which of them to score.
        report: gets the counts.
        commits: takes the rows.
        busy: hears how long each stage works.

    Attributes:
        inputs: ``[N, 16]`` u1, the digest of each feature that was read.
        readable: ``[N]`` bool, whether it could be.
    """

    def __init__(
        self,
        job: DumpJob,
        found: Found,
        files: Sequence[str],
        keys: np.ndarray,
        part: range,
        report: DumpReport,
        commits: Commits,
        watcher: Watcher,
        busy: Busy,
    ) -> None:
        self._job, self._found, self._files, self._keys, self._part = job, found, files, keys, part
        self._unchanged = Unchanged(job, found, files, keys, part, watcher)
        self._report, self._commits, self._watcher, self._busy = report, commits, watcher, busy
        self._others = Others(job)
        self._ranks = Ranks(job.data.features, files, part.start, self._others)
        self._due: dict[int, dict[str, str]] = {}  # by sample and teacher: why it must be scored
        self._draws: dict[int, np.ndarray] = {}  # of samples that are due, where they are scored in a view
        self._checks = {name: RowCheck(origin.value_kind) for name, origin in job.origins.items()}
        self._done = 0
        self.inputs = np.zeros((len(files), 16), np.uint8)
        self.readable = np.zeros(len(files), bool)

    def run(self) -> None:
        """Score everything that must be, and commit it: also when stopping, what was scored is kept.

        Raises:
            FeatureError, TeacherError: a bad sample with ``on_bad_sample="stop"``.
            StoreError: a commit failed.
        """
        view = f", view {self._job.view} of {self._job.views}" if self._job.view is not None else ""
        self._watcher.stage(f"scoring{view}", len(self._part))
        self._pass_over_unchanged()  # at once: what comes after it takes the time that a rate is of
        try:
            with numerics(self._job.device, self._job.precision, self._job.seed):
                self._score_all()
        finally:
            self._commits.finish(self._scored)
            self._report.busy = self._busy.shares

    def remember(self, path: Path | None = None) -> None:
        """Note the features that were read, for the next dump; of a part at ``path``, for the seal."""
        read = self.readable & ~self._unchanged.fresh
        self._unchanged.remember(read, self.inputs, self._ranks.shapes, path)

    def input_remarks(self) -> Iterator[str]:
        """What the features that were read, or known to be unchanged, give cause to say."""
        numbers = np.flatnonzero(self.readable)
        selection = self._job.data.selection
        files = [self._files[number] for number in numbers.tolist()]
        yield from input_remarks(
            files,
            self.inputs[numbers],
            self._ranks.distinct,
            selection.labels[numbers],
            self._job.data.features,
        )

    def _score_all(self) -> None:
        job = self._job
        engine = Engine(
            job.teachers,
            job.device,
            compiled=job.compiled,
            precision=job.precision,
            compare=job.precision != "fp32",
            busy=self._busy,
            note=self._watcher.note,
        )
        planner = Planner(job, self._found, job.planned or self._files, engine, self._watcher, self._others)
        batcher = Batcher(engine)
        unread = np.flatnonzero(~self._unchanged.fresh[self._part.start : self._part.stop]) + self._part.start
        at = 0
        # Closed here whatever happens: threads that read on would outlive an interrupted dump.
        reading = read_ahead(job.data.features, [self._files[n] for n in unread.tolist()], job.workers, self._busy)
        with closing(reading) as chunks:
            for features in chunks:
                self._take_chunk(unread[at : at + len(features)], features, planner, batcher)
                at += len(features)
        self._keep(batcher.finish())
        if len(unread) and self._ranks.have_moved(slice(self._part.start, self._part.stop)):
            self._others.forget()
        self._report.halved_to = engine.most_rows
        for name, check in self._checks.items():
            if (remark := check.remark()) is not None:
                self._watcher.note(f"{name}: {remark}")

    def _pass_over_unchanged(self) -> None:
        fresh = self._unchanged.fresh
        self.inputs[fresh], self.readable[fresh] = self._unchanged.digests[fresh], True
        self._ranks.shapes[fresh] = self._unchanged.shapes[fresh]
        if (self._ranks.shapes[:, 1] < 0).any():
            self._ranks.codes = ShapeCodes(self._found.snapshot.plan)
        count = int(fresh.sum())
        for report in self._report.teachers.values():
            report.skipped += count
        self._advance(count)

    def _take_chunk(self, numbers: np.ndarray, features: Read, planner: Planner, batcher: Batcher) -> None:
        """Put what must be scored of these samples into batches."""
        good = np.array([isinstance(feature, Feature) for feature in features])
        present = [feature for feature in features if isinstance(feature, Feature)]
        digests = np.frombuffer(b"".join([feature.digest for feature in present]), np.uint8).reshape(-1, 16)
        self.inputs[numbers[good]], self.readable[numbers[good]] = digests, True
        codes = [self._ranks.codes.code(shape_of(feature.array)) for feature in present]
        self._ranks.shapes[numbers[good]] = np.array(codes, np.int32).reshape(-1, 2)
        reasons = dict(zip(numbers[good].tolist(), self._reasons(numbers[good], digests), strict=True))
        for number, feature in zip(numbers.tolist(), features, strict=True):
            if isinstance(feature, FeatureError):
                self._bad(number, feature)
            elif reasons[number]:
                self._due[number] = reasons[number]
                if feature.draws is not None:
                    self._draws[number] = feature.draws
                self._place(number, feature.array, planner, batcher)
            else:
                self._advance(1)

    def _reasons(self, numbers: np.ndarray, digests: np.ndarray) -> list[dict[str, str]]:
        """Of each sample, why which teachers must score it. Counted when they have."""
        reasons = due_reasons(self._job, self._found, numbers, digests)
        for name in self._found.known:
            self._report.teachers[name].skipped += sum(name not in each for each in reasons)
        return reasons

    def _place(self, number: int, array: np.ndarray, planner: Planner, batcher: Batcher) -> None:
        shape, plan = shape_of(array), planner.plan_for(array)
        if not plan.takes(shape):
            what = f"has {shape[1]} bins, expected {plan.bins} as the others have"
            self._bad(number, FeatureError(f"feature {shown(self._files[number])} {what}"))
            return
        for name in self._due[number]:
            self._refuse_other_bins(name, number, shape)
        place = plan.place(shape, self._ranks.rank(number, shape))
        self._keep(batcher.add(number, array, frozenset(self._due[number]), place))

    def _refuse_other_bins(self, name: str, number: int, shape: Shape) -> None:
        """A teacher that says how many bins it was made for must not score swapped axes, which its code may allow."""
        expected = getattr(self._job.teachers[name], "num_bins", None)
        if expected is not None and shape[1:] != (expected,):
            swapped = "; its axes are swapped" if shape == (expected, *shape[1:2]) else ""
            raise TeacherError(
                f"teacher {name} takes features [T, {expected}], but {shown(self._files[number])} is "
                f"{list(shape)}{swapped}",
                hint="Give the features that the teacher was trained on.",
            )

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
                self._draws.pop(number, None)
            self._report.samples_scored += len(scored.numbers)
            self._advance(len(scored.numbers))
            self._watcher.busy(self._busy.shares)
            self._commits.advance(self._scored)

    @property
    def _scored(self) -> int:
        """Samples that this run is through with, but for those that are left out."""
        return self._done - len(self._report.missing)

    def _keep_rows(self, name: str, scored: Scored) -> None:
        numbers, logits = scored.numbers, scored.logits[name]
        origin, report = self._job.origins[name], self._report.teachers[name]
        stored, fits = origin.encoded(logits)
        good = np.isfinite(logits).all(axis=1)
        self._checks[name].add(origin.as_vectors(logits[good]))
        wrong = self._checks[name].contradiction()
        if wrong is not None:
            raise TeacherError(
                f"teacher {name} says value_kind {origin.value_kind}, but its rows {wrong}",
                hint="Return raw logits, or declare the value_kind that the teacher returns.",
            )
        kept = [number for row, number in enumerate(numbers) if fits[row]]
        files = [self._files[number] for number in kept]
        draws = np.stack([self._draws[number] for number in kept]) if self._draws and kept else None
        self._commits.add(name, self._keys[kept], self.inputs[kept], files, stored[fits], draws)
        for number in kept:
            report.count(self._due[number][name])
        for row in np.flatnonzero(~fits).tolist():
            largest = np.abs(logits[row]).max()
            reason = f"do not fit {self._job.dtype} (largest {largest:.6g}); use --dtype fp32"
            what = reason if good[row] else f"are not finite (classes {np.flatnonzero(~np.isfinite(logits[row]))})"
            message = f"teacher {name}: the logits of {shown(self._files[numbers[row]])} {what}"
            self._bad(numbers[row], TeacherError(message))
        if report.cost is not None:
            report.cost.add(origin.as_vectors(logits[fits]), origin.as_vectors(stored[fits]))
        if report.precision_cost is not None and name in scored.exact:
            exact = scored.exact[name]
            compared = good & np.isfinite(exact).all(axis=1)
            report.precision_cost.add(origin.as_vectors(exact[compared]), origin.as_vectors(logits[compared]))

    def _bad(self, number: int, error: KDCacheError) -> None:
        if not refuse_bad(self._job, self._report, self._files[number], error):
            self.readable[number] = False
            self._advance(1)


def due_reasons(job: DumpJob, found: Found, numbers: np.ndarray, digests: np.ndarray) -> list[dict[str, str]]:
    """Why each teacher must score these samples (``digests`` ``[n, 16]`` u1); those with a fresh row are left out."""
    states = [_states(job, known, numbers, digests) for known in found.known.values()]
    return [
        {name: state for name, state in zip(found.known, each, strict=True) if state != FRESH}
        for each in zip(*states, strict=True)
    ]


def _states(job: DumpJob, known: Known, numbers: np.ndarray, digests: np.ndarray) -> list[str]:
    if job.skip_existing:
        return known.states(numbers, digests)
    states = [ASKED if scored else NEW for scored in known.was_scored(numbers).tolist()]
    lent = known.are_lent(numbers, digests).tolist()  # scored a moment ago, for another cache
    return [FRESH if here else state for here, state in zip(lent, states, strict=True)]


def refuse_bad(job: DumpJob, report: DumpReport, file: str, error: KDCacheError) -> bool:
    """A sample that cannot be scored: raise its error, or list it as missing; whether its feature is good even so."""
    is_feature = isinstance(error, FeatureError)
    if job.on_bad_sample == "stop":
        if isinstance(error, FeatureError):
            error = job.data.features.refusal(file, error, job.data.selection.listed)
        what = "the sample" if is_feature else "the teacher, or the sample"
        hint = error.hint or f"Mend {what}, or pass --on-bad-sample skip to leave such samples out."
        raise type(error)(error.message, hint=hint)
    report.missing.setdefault(file, error.message)
    return not is_feature
