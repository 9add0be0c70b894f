"""What teachers are worth: students of several modes and seeds, each seed against its twin without teachers.

All of one seed begin with the same weights and see the same batches, so that a difference is the teachers'. A run that
is there already is not repeated: a comparison that was interrupted goes on, and more modes or seeds join it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from kd_cache.commands import Table, points
from kd_cache.distill.fusion import FITTED, fusion_of
from kd_cache.distill.objective import CE
from kd_cache.distill.student import StudentJob, StudentTraining, opened
from kd_cache.errors import TrainingError, shown
from kd_cache.files.atomic import make_directory, write_atomic
from kd_cache.train.evaluation import FIGURES, GROUPS
from kd_cache.train.job import FRESH
from kd_cache.train.pretraining import key_of
from kd_cache.train.resampling import DRAWS, Cells, Interval, interval_of
from kd_cache.train.run_folder import finished
from kd_cache.watch import Watcher

LEAST_SEEDS: Final = 3
"""Of fewer nobody can say more than luck."""
SURE: Final = 0.05
_RANKED: Final = "accuracy"
"""The figure that the verdict is about: over all devices."""


@dataclass(frozen=True)
class StudentRun:
    """One student of a comparison: what it came to, or why it came to nothing."""

    mode: str
    seed: int
    results: Mapping[str, Any] | None
    failure: str = ""

    def figures(self, split: str) -> dict[str, float]:
        """`FIGURES` over all devices, and the accuracy of each device group."""
        measured = (self.results or {}).get(split) or {}
        groups = measured.get("by", {}).get("device_group", {})
        found = {name: measured[name] for name in FIGURES if name in measured}
        return found | {group: groups[group]["accuracy"] for group in GROUPS if group in groups}

    def drawn(self, split: str) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
        """Those of the figures that locations decide, of each draw of locations, and which locations there are."""
        content = ((self.results or {}).get(split) or {}).get("by_location")
        if content is None:
            return {}
        cells = Cells.from_json(content)
        parts = {"": cells, **{group: cells.of_group(group) for group in GROUPS}}
        found = {}
        for group, part in parts.items():
            for figure, values in (part.drawn() or {}).items():
                if not group or figure == _RANKED:
                    found[group or figure] = (tuple(sorted(set(part.places.tolist()))), values)
        return found


@dataclass(frozen=True)
class Comparison:
    """Students by mode and seed, and what follows from them. Without test rows it is about validation.

    Attributes:
        folder: where runs and reports are.
        modes: ``ce`` first.
    """

    folder: Path
    modes: Sequence[str]
    seeds: Sequence[int]
    runs: Sequence[StudentRun]

    @cached_property
    def split(self) -> str:
        return "test" if any((run.results or {}).get("test") for run in self.runs) else "validation"

    def values(self, mode: str, figure: str) -> list[float | None]:
        """One per seed; ``None`` where there is none."""
        found = {run.seed: run.figures(self.split).get(figure) for run in self.runs if run.mode == mode}
        return [found[seed] for seed in self.seeds]

    def differences(self, mode: str, figure: str = _RANKED) -> list[float | None]:
        """To the twin of the same seed."""
        pairs = zip(self.values(mode, figure), self.values(CE, figure), strict=True)
        return [None if one is None or twin is None else one - twin for one, twin in pairs]

    @cached_property
    def _drawn(self) -> dict[tuple[str, int], dict[str, tuple[tuple[int, ...], np.ndarray]]]:
        return {(run.mode, run.seed): run.drawn(self.split) for run in self.runs}

    def intervals(self, mode: str, figure: str = _RANKED) -> list[Interval | None]:
        """Of each seed's difference, and last of their mean: 95 % over draws of the locations, the same for both."""
        pairs = [(self._drawn[mode, seed].get(figure), self._drawn[CE, seed].get(figure)) for seed in self.seeds]
        apart = [one[1] - twin[1] if one and twin and one[0] == twin[0] else None for one, twin in pairs]
        known = [each for each in apart if each is not None]
        mean = np.mean(known, axis=0) if len(known) == len(apart) else None
        return [None if each is None else interval_of(each) for each in (*apart, mean)]

    def _difference(self, mode: str, figure: str) -> dict[str, Any]:
        *by_seed, of_mean = self.intervals(mode, figure)
        spread = _spread(self.differences(mode, figure))
        return {**spread, "interval": of_mean, "intervals_by_seed": by_seed}

    def as_json(self) -> dict[str, Any]:
        modes = {}
        for mode in self.modes:
            modes[mode] = {
                figure: {
                    **_spread(self.values(mode, figure)),
                    **({} if mode == CE else {"difference": self._difference(mode, figure)}),
                }
                for figure in (*FIGURES, *GROUPS)
            }
        return {
            "folder": str(self.folder),
            "split": self.split,
            "seeds": list(self.seeds),
            "modes": modes,
            "verdicts": {mode: verdict(self.differences(mode)) for mode in self.modes if mode != CE},
            "sentences": self.sentences,
            "failures": {f"{run.mode}, seed {run.seed}": run.failure for run in self.runs if run.failure},
        }

    @property
    def table(self) -> Table:
        """In per cent, differences in points."""
        rows = []
        for mode in self.modes:
            cells = [_mean_sd(self.values(mode, name)) for name in (_RANKED, "macro_accuracy", *GROUPS)]
            apart = self.differences(mode)
            told = ["–"] * 3
            if mode != CE:
                sure = self.intervals(mode)[-1]
                told = [points(_spread(apart)["mean"]), _between(sure), " ".join(map(points, apart))]
            rows.append([mode, *cells, *told])
        columns = ["Student", "All", "Macro", *(group.capitalize() for group in GROUPS), f"− {CE}", "95 %", "by seed"]
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        title = f"Accuracy on {self.split}, mean ± sd over {seeds}, and the difference to {CE}"
        return Table(title, columns, rows)

    @property
    def sentences(self) -> list[str]:
        """What to make of it, a line per mode."""
        found = [f"{mode}: {verdict(self.differences(mode))}" for mode in self.modes if mode != CE]
        found += [f"{run.mode}, seed {run.seed}: {run.failure}" for run in self.runs if run.failure]
        count = len(self.seeds)
        if count >= LEAST_SEEDS:
            found.append(
                f"Were teachers worth nothing, all {count} seeds would agree in {100 * chance(count, 0):.2g} % of "
                "such comparisons: more --seeds say more."
            )
        if any(self.intervals(mode)[-1] for mode in self.modes if mode != CE):
            found.append(
                f"95 %: of the mean difference of these seeds, over {DRAWS:,} draws of the {self.split} locations."
            )
        if self.split != "test":
            found.append("There are no test rows: these figures are of the rows that chose the epochs.")
        return found

    @property
    def files(self) -> list[Path]:
        """What `write` writes: ``comparison.json``, ``.csv`` (a row per mode and seed) and ``.md``."""
        return [self.folder / f"comparison.{kind}" for kind in ("json", "csv", "md")]

    def write(self) -> None:
        """Raises `StoreError`."""
        texts = (json.dumps(self.as_json(), indent=1) + "\n", self._csv(), self._markdown())
        for path, text in zip(self.files, texts, strict=True):
            write_atomic(path, text.encode())

    def _csv(self) -> str:
        text = io.StringIO()
        columns = ["mode", "seed", *FIGURES, *GROUPS, "difference", "difference_low", "difference_high", "failure"]
        out = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        out.writeheader()
        apart = {mode: dict(zip(self.seeds, self.differences(mode), strict=True)) for mode in self.modes}
        sure = {mode: dict(zip(self.seeds, self.intervals(mode)[:-1], strict=True)) for mode in self.modes}
        for run in self.runs:
            about = {"mode": run.mode, "seed": run.seed, "failure": run.failure}
            low, high = sure[run.mode][run.seed] or ("", "")
            ends = {"difference_low": low, "difference_high": high}
            out.writerow({**about, **run.figures(self.split), "difference": apart[run.mode][run.seed], **ends})
        return text.getvalue()

    def _markdown(self) -> str:
        table = self.table
        lines = [f"# {table.title}", "", _row(table.columns), _row(["---"] * len(table.columns))]
        return "\n".join([*lines, *map(_row, table.rows), "", *(f"- {line}" for line in self.sentences)]) + "\n"


def compare(job: StudentJob, modes: Sequence[str], seeds: Sequence[int], watcher: Watcher | None = None) -> Comparison:
    """Train a student of each mode and seed, and ``ce`` with them, and write down what they came to.

    ``job`` says everything else; its own mode and seed do not count. Raises as `train_student`, but for one that learnt
    nothing, which is a finding.
    """
    watcher = watcher or Watcher()
    modes = list(dict.fromkeys([CE, *modes]))
    cache = opened(job, watcher)
    for mode in modes:
        if mode not in (CE, *FITTED):
            fusion_of(mode, cache.teachers)  # refused now, not after the first students are trained
    twin = StudentTraining(_of(job, CE, 0, Path()), watcher)
    shared = key_of({**twin.parts, "teachers": cache.fingerprints})
    folder = twin.job.home.parent / f"compare-{shared[:12]}"
    make_directory(folder)
    planned = [(mode, seed) for seed in seeds for mode in modes]
    runs = []
    for number, (mode, seed) in enumerate(planned, start=1):
        watcher.note(f"student {number} of {len(planned)}: {mode}, seed {seed}")
        runs.append(_run(_of(job, mode, seed, folder / mode.replace(":", "-") / f"seed-{seed}"), watcher))
    found = Comparison(folder, modes, list(seeds), sorted(runs, key=lambda run: (modes.index(run.mode), run.seed)))
    found.write()
    return found


def _of(job: StudentJob, mode: str, seed: int, home: Path) -> StudentJob:
    return replace(job, mode=mode, settings=replace(job.settings, seed=seed), own_home=home if home.parts else None)


def _run(job: StudentJob, watcher: Watcher) -> StudentRun:
    training, seed = StudentTraining(job, watcher), job.settings.seed
    if job.resume != FRESH and (results := finished(job.home, training.key)) is not None:
        watcher.note(f"{shown(job.home)} is there already")
        return StudentRun(job.mode, seed, results)
    try:
        return StudentRun(job.mode, seed, training.run().results)
    except TrainingError as error:
        watcher.note(f"{job.mode}, seed {seed}: {error.message}")
        return StudentRun(job.mode, seed, None, error.message)


def verdict(differences: Sequence[float | None]) -> str:
    """What the signs of the seeds say. By luck alone three of three agree in a quarter of all comparisons."""
    count = len(differences)
    known = [each for each in differences if each is not None]
    if len(known) < count:
        return f"cannot be compared: {count - len(known)} of {count} seeds have no figure"
    better, worse = sum(each > 0 for each in known), sum(each < 0 for each in known)
    if count < LEAST_SEEDS:
        return f"no more than luck (better in {better} of {count} seeds, and fewer than {LEAST_SEEDS} tell nothing)"
    for word, agreeing, other in (("better", better, worse), ("worse", worse, better)):
        if agreeing == count or (agreeing > other and chance(agreeing, other) <= SURE):
            return f"{word} in {agreeing} of {count} seeds, {points(statistics.mean(known))} points on average"
    return f"no more than luck (better in {better} of {count} seeds)"


def chance(one: int, other: int) -> float:
    """The probability of signs that agree as much or more, were each a coin's (sign test, two-sided)."""
    count, most = one + other, max(one, other)
    return min(1.0, sum(math.comb(count, number) for number in range(most, count + 1)) / 2.0 ** (count - 1))


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [each for each in values if each is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "by_seed": list(values),
    }


def _mean_sd(values: Sequence[float | None]) -> str:
    spread = _spread(values)
    if spread["mean"] is None:
        return "–"
    return f"{100 * spread['mean']:.1f}" + ("" if spread["sd"] is None else f" ± {100 * spread['sd']:.1f}")


def _between(interval: Interval | None) -> str:
    return "–" if interval is None else " to ".join(map(points, interval))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
