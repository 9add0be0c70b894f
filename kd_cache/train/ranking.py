"""Training a ranker: the loop and the run folder of any training, over pairs of samples in place of samples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_cache.dataset.guard import refuse_outside
from kd_cache.dataset.manifest import Sample
from kd_cache.errors import MissingLogitsError, UsageError, listed, shown
from kd_cache.keys import sample_key
from kd_cache.store.origin import canonical_json
from kd_cache.train.clips import Clips
from kd_cache.train.embeddings import FOLDER, Embeddings, side_by_side
from kd_cache.train.evaluation import interval_of_mean, intervals, measure, measure_groups, score
from kd_cache.train.job import TrainJob, TrainReport
from kd_cache.train.nets import WarmStart
from kd_cache.train.pairs import WINNERS, Pair, PairDivision, PairsFile, Sieved, divide_pairs, read_pairs, sieve
from kd_cache.train.ranker import EMBEDDINGS, Plan
from kd_cache.train.training import Training
from kd_cache.watch import Watcher


@dataclass(frozen=True)
class RankJob(TrainJob):
    """As `TrainJob`, of the role ``rank``, and:

    Attributes:
        pairs: the pairs file.
        name: of the folder of its runs, ``<output_dir>/rank/<place>/<name>``.
        min_agreement, min_reviewers: pairs below are left out.
        ties: ``out`` leaves ties in votes out; ``half`` learns from them as half a win for each. None is measured on.
        test_ratio: of the groups of series.
        max_pairs_bytes: a larger file is refused unread.
    """

    pairs: Path = Path("pairs.csv")
    name: str = EMBEDDINGS
    min_agreement: float = 0.7
    min_reviewers: int = 2
    ties: str = "out"
    test_ratio: float = 0.15
    max_pairs_bytes: int = 1 << 30

    @property
    def home(self) -> Path:
        return self.output_dir / "rank" / self.place / self.name

    @cached_property
    def file(self) -> PairsFile:
        """The pairs. Raises as `read_pairs`."""
        return read_pairs(self.pairs, self.max_pairs_bytes)

    @cached_property
    def sieved(self) -> Sieved:
        return sieve(self.file.pairs, self.min_agreement, self.min_reviewers)

    @cached_property
    def division(self) -> PairDivision:  # type: ignore[override]
        """Who trains and who validates, of the pairs that count. Raises as `divide_pairs`, and `UsageError`."""
        settings, sieved = self.settings, self.sieved
        whole = divide_pairs(
            self.file.pairs,
            val_ratio=settings.val_ratio,
            test_ratio=self.test_ratio,
            fold=settings.fold,
            share=settings.quick_experiment,
        )
        counted = set(sieved.pairs)
        train, validation, test = (
            tuple(pair for pair in side if pair in counted) for side in (whole.train, whole.validation, whole.test)
        )
        for name, side in (("train", train), ("validate", validation)):
            if not side:
                left = ", ".join(f"{count:,} {why}" for why, count in sieved.left_out.items() if count)
                raise UsageError(
                    f"none of the {len(self.file.pairs):,} pairs is left to {name} with (left out: {left or 'none'})",
                    hint="Lower --min-agreement or --min-reviewers, or review more series.",
                )
        if self.ties == "half":
            tied = set(sieved.ties)
            halves = [pair for pair in whole.train if pair in tied]
            train += tuple(pair._replace(winner=winner) for pair in halves for winner in range(len(WINNERS)))
        return PairDivision(train, validation, test, whole.group_of)


class PairClips(Clips):
    """N pairs of the samples of ``clips``: features ``[B, 2, …]``, and labels 0 where a is better, 1 where b is.

    ``samples``, and what is told of each, are those that are in a pair.
    """

    def __init__(self, clips: Clips, pairs: Sequence[Pair]) -> None:
        place = {sample.file: number for number, sample in enumerate(clips.samples)}
        rows = sorted({place[file] for pair in pairs for file in pair[:2]})
        mine = clips.part(rows)
        super().__init__(mine.samples, mine.shapes, mine.digests, mine._arrays, mine._source, mine._workers)
        at = {clips.samples[row].file: number for number, row in enumerate(rows)}
        self._of, self.pairs = clips, tuple(pairs)
        self.winners = torch.tensor([pair.winner for pair in pairs], dtype=torch.int64)
        self._ends = np.array([[at[pair.a], at[pair.b]] for pair in pairs], np.int64).reshape(-1, 2)
        wrong = [pair for pair, (a, b) in zip(pairs, self._ends, strict=True) if mine.shapes[a] != mine.shapes[b]]
        if wrong:
            raise UsageError(
                f"the two features of {len(wrong)} pairs have different shapes\n"
                f"{listed(f'{pair.a}, {pair.b}' for pair in wrong)}",
                hint="Give them one shape, or rank by embeddings.",
            )
        self.shapes = [mine.shapes[a] for a, _ in self._ends]

    def __len__(self) -> int:
        return len(self.pairs)

    def stacked(self) -> Tensor:
        """``[S, …]`` float32: the features of its samples, each once."""
        return super()._features(np.arange(len(self.samples)))

    def labels(self, what: str) -> Tensor:
        return self.winners

    def with_labels_of(self, order: np.ndarray) -> PairClips:
        made = PairClips(self._of, self.pairs)
        made.winners = self.winners[order]
        return made

    def digest(self, what: str) -> str:
        """SHA-256 over samples, features and winners, whatever the order of the pairs."""
        digests = self.digests[self._ends]
        lines = [
            canonical_json([pair.a, pair.b, each.tobytes().hex(), winner])
            for pair, each, winner in zip(self.pairs, digests, self.winners.tolist(), strict=True)
        ]
        return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()

    def _features(self, rows: np.ndarray) -> Tensor:
        a, b = (super(PairClips, self)._features(self._ends[rows, end]) for end in (0, 1))
        return torch.stack([a, b], dim=1)


class RankTraining(Training):
    """A ranker on embeddings of several sources, or on a trunk that trains with it."""

    units = ("pairs", "series")
    train: PairClips
    validation: PairClips
    job: RankJob

    def _refuse_unlabelled(self) -> None:
        """Pairs are labelled; but their samples must be there, and permitted."""
        division, manifest = self.job.division, self.job.data.manifest
        self.files = sorted(
            {file for pair in (*division.train, *division.validation, *division.test) for file in pair[:2]},
            key=sample_key,
        )
        known = {sample.file: sample for sample in manifest}
        if missing := [file for file in self.files if file not in known]:
            raise MissingLogitsError(
                f"{len(missing)} samples of the pairs are not in the manifest\n{listed(missing)}",
                hint="The columns a and b name files exactly as the manifest does.",
            )
        refuse_outside(self.job.data.selection, self.files)
        self._tell_of_left_out()

    def _tell_of_left_out(self) -> None:
        file, sieved = self.job.file, self.job.sieved
        left = ", ".join(f"{count:,} {why}" for why, count in sieved.left_out.items() if count)
        learnt = " (of ties, those that train count as half a win for each)" if self.job.ties == "half" else ""
        self.watcher.note(
            f"{shown(self.job.pairs)}: {len(sieved.pairs):,} of {len(file.pairs):,} pairs count; left out: "
            f"{left or 'none'}{learnt}"
        )

    def _clips(self) -> tuple[Clips, Clips]:
        job = self.job
        known: dict[str, Sample] = {sample.file: sample for sample in job.data.selection.samples}
        clips = Clips.read(job.data.features, [known[file] for file in self.files], job.workers, self.watcher)
        self.sources = [Embeddings.open(job.output_dir / FOLDER / job.place, name) for name in job.embeddings]
        if self.sources:
            digests = clips.digests
            clips = Clips.of_rows(clips.samples, side_by_side(self.sources, self.files, digests))
            clips.digests = digests
        self.test = PairClips(clips, job.division.test)
        return PairClips(clips, job.division.train), PairClips(clips, job.division.validation)

    def held_out(self) -> dict[str, Clips]:
        return {"validation": self.validation, "test": self.test}

    def build(self) -> tuple[nn.Module, WarmStart | None]:
        settings = self.settings
        self.plan = Plan.of(settings, [source.described for source in self.sources])
        trunk = self.plan.trunk(settings.seed, self.train.stacked() if self.sources else None)
        for source in self.sources:
            if (made := source.provenance) is None:
                self.watcher.note(f"what the embeddings {shown(source.name)} were made with is not known")
            self.inherit(made)
        start = None if self.job.init is None else self.started_from(self.job.init, trunk)
        return self.plan.ranker(trunk, settings.seed), start

    def architecture(self) -> str | None:
        return None  # of a classifier; this one's is its plan

    def further_parts(self) -> dict[str, Any]:
        return {"ranker": asdict(self.plan)}

    @cached_property
    def record(self) -> dict[str, Any]:
        division = self.job.division
        series = {
            "trained": sorted({pair.series for pair in division.train}),
            "validated": sorted({pair.series for pair in division.validation}),
        }
        return {**super().record, "class_names": list(WINNERS), "ranker": asdict(self.plan), "series": series}

    @property
    def _facts(self) -> dict[str, Any]:
        sieved, job = self.job.sieved, self.job
        pairs = {"sha256": job.file.digest, "in_file": len(job.file.pairs), "left_out": sieved.left_out}
        return {**super()._facts, "ranker": asdict(self.plan), "pairs": pairs, "units": self.units}

    def measured(self, best: nn.Module, clips: Clips, which: str) -> dict[str, Any]:
        assert isinstance(clips, PairClips)  # noqa: S101 (it is given no others)
        logits = score(best, clips, self.job.device, self.settings.batch_size)
        groups = self.job.division.groups(clips.pairs)
        series = [pair.series for pair in clips.pairs]
        majority = Counter(self.train.winners.tolist()).most_common(1)[0][0]
        return ranking_figures(logits, clips.winners.numpy(), series, groups, majority)

    def _measured_on_test(self, best: nn.Module) -> dict[str, Any] | None:
        return self.measured(best, self.test, "test") if len(self.test) else None


def ranking_figures(
    logits: np.ndarray, winners: np.ndarray, series: Sequence[str], groups: Sequence[str], majority: int
) -> dict[str, Any]:
    """How good a ranker is, as JSON values.

    Args:
        logits: ``[N, 2]``; their first less their second is the log odds of a ≻ b.
        winners: ``[N]``: 0 where a is better, 1 where b is.
        series: of each pair; figures are given for each.
        groups: of each pair: series that share samples.
        majority: the winner of most training pairs, for the baseline of that name.

    As `Metrics` has them, of the classes a and b; intervals draw whole groups. ``auc`` is of P(a ≻ b) as the file has
    the pairs, ``None`` where all winners are the same. ``baselines`` have accuracies too, and by how much the ranker's
    is better.
    """
    margin, places = logits[:, 0].astype(np.float64) - logits[:, 1], np.array(groups)
    right = (logits.argmax(axis=1) == winners).astype(np.float64)
    found: dict[str, Any] = {
        **measure(logits, winners).as_json(),
        "auc": area_under_curve(margin, winners == 0),
        "intervals": intervals(logits, winners, places),
        "class_names": list(WINNERS),
        "by": measure_groups(logits, winners, {"series": series}),
        "baselines": {},
    }
    for name, guess in (("always a", 0), ("majority of training", majority)):
        guessed = (winners == guess).astype(np.float64)
        found["baselines"][name] = {
            "accuracy": float(guessed.mean()),
            "interval": interval_of_mean(guessed, places),
            "better_by": float((right - guessed).mean()),
            "better_by_interval": interval_of_mean(right - guessed, places),
        }
    names = np.array(series)
    for name, figures in found["by"]["series"].items():
        mine = names == name
        figures["auc"] = area_under_curve(margin[mine], winners[mine] == 0)
    return found


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Of all positives with all negatives, the share where the positive scores higher, ties as half.

    Mann and Whitney (1947). ``scores`` ``[N]``, ``positive`` ``[N]`` bool; ``None`` where either kind is not there.
    """
    _, rank, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle = (np.cumsum(counts) - (counts - 1) / 2)[rank]
    ones = int(positive.sum())
    zeros = len(positive) - ones
    if not ones or not zeros:
        return None
    return float((middle[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def train_ranker(job: RankJob, watcher: Watcher | None = None) -> TrainReport:
    """Train a ranker, or go on with its unfinished run. Raises as `Training.run`, `read_pairs` and `divide_pairs`."""
    return RankTraining(job, watcher).run()
