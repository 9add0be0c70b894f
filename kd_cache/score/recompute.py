"""Scoring cached samples again, and what difference is still the same number.

Results are bit-exact only on the same hardware and software with the same batch shape. Elsewhere they agree within a
tolerance relative to the largest centred logit of the row: fp32 1e-5, tf32 5e-3, fp16 1e-2, bf16 5e-2, one step of half
precision more where rows are stored as fp16; never less than what the teacher itself varies between batch sizes, as far
as that is rounding (`most_allowed`): of a teacher that varies more, no row can be told to be right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kd_cache.dataset.features import FeatureSource
from kd_cache.errors import FeatureError
from kd_cache.keys import keys_of
from kd_cache.score.batcher import Batcher
from kd_cache.score.device import numerics
from kd_cache.score.engine import Batch, Engine, Scored
from kd_cache.score.teacher import Teacher
from kd_cache.score.tolerance import TOLERANCE, agrees, deviation, most_allowed, topk_deviation
from kd_cache.store.plan import Place
from kd_cache.store.union import Union
from kd_cache.watch import Watcher

_SELF_TEST = 4


@dataclass
class Rechecked:
    """How many rows were scored again, how many came out equal to the bit, and which differ too much, and why."""

    rows: int = 0
    bit_exact: int = 0
    deviation: float = 0.0
    wrong: list[tuple[str, str]] = field(default_factory=list)


class Recheck:
    """Recomputes rows of one teacher.

    Args:
        union: the stored rows; their origin says in which precision they were computed.
        places: where each file was computed in its batch; without that no row can be expected to be equal to the bit.
    """

    def __init__(self, teacher: Teacher, union: Union, places: Mapping[str, Place], device: torch.device) -> None:
        self._teacher, self._union, self._places, self._device = teacher, union, places, device
        self._name = union.origin.teacher
        # Of rows that were adopted from elsewhere nobody knows the precision; fp32 is what most scripts compute in.
        precision = union.origin.fingerprint.parts.get("precision")
        self._precision = precision if precision in TOLERANCE else "fp32"
        self._kind = union.origin.value_kind
        self._noise: float | None = None
        self._arrays: dict[int, np.ndarray] = {}
        self._result = Rechecked()

    def run(self, files: Sequence[str], source: FeatureSource, watcher: Watcher, seed: int = 42) -> Rechecked:
        """Score those of ``files`` that have a row and a readable feature."""
        positions = self._union.find(keys_of(files))
        watcher.stage(f"recomputing {self._name}", len(files))
        only_me = frozenset({self._name})
        with numerics(self._device, self._precision, seed):
            self._engine = Engine({self._name: self._teacher}, self._device)
            batcher = Batcher(self._engine)
            for number, file in enumerate(files):
                watcher.advance(1)
                if positions[number] < 0:
                    continue
                try:
                    feature = source.read(file)
                except FeatureError:
                    continue  # verify has reported it: nothing could be compared
                drawn = self._union.take_draws(positions[number : number + 1])
                if drawn is not None and (feature.draws is None or (drawn[0] != feature.draws).any()):
                    self._result.wrong.append((file, "its view is augmented otherwise now than when it was scored"))
                    continue
                self._arrays[number] = array = feature.array
                self._compare(batcher.add(number, array, only_me, self._place(file)), files, positions)
            self._compare(batcher.finish(), files, positions)
        return self._result

    def _place(self, file: str) -> Place:
        return self._places.get(file, Place(1, 0))

    def _compare(self, batches: Iterator[Scored], files: Sequence[str], positions: np.ndarray) -> None:
        for scored in batches:
            stored = self._union.take(positions[scored.numbers])
            for row, number in enumerate(scored.numbers):
                array = self._arrays.pop(number)
                if self._name in scored.errors:
                    self._result.wrong.append((files[number], scored.errors[self._name].message))
                else:
                    self._compare_row(files[number], scored.logits[self._name][row], stored[row], array)

    def _compare_row(self, file: str, logits: np.ndarray, stored: np.ndarray, array: np.ndarray) -> None:
        self._result.rows += 1
        origin = self._union.origin
        if len(logits) != (values := origin.num_classes * (origin.frames or 1)):
            reason = f"scoring it again gives {len(logits)} values, stored are {values}"
            self._result.wrong.append((file, reason))
            return
        now = origin.encoded(logits[None])[0][0]
        if now.tobytes() == stored.tobytes():
            self._result.bit_exact += 1
            return
        if origin.topk is None:
            difference = deviation(now, stored, self._kind)
        else:
            difference = topk_deviation(logits, stored, origin.topk)
        self._result.deviation = max(self._result.deviation, difference)
        if self._noise is None:
            self._noise = self._self_test(array, self._place(file).size)
        most = most_allowed(self._precision)
        allowed = min(max(TOLERANCE[self._precision], 2 * self._noise), most)
        is_same = difference <= allowed if origin.topk else agrees(now, stored, self._kind, allowed)
        if not is_same:
            reason = f"they differ by {difference:.1e} of the row's range, allowed {allowed:.1e}"
            if self._noise > most:
                reason += f"; the teacher itself varies by {self._noise:.1e} with what is scored beside a sample"
            self._result.wrong.append((file, f"scoring it again gives other logits: {reason}"))

    def _self_test(self, array: np.ndarray, size: int) -> float:
        """How much this teacher's result for one sample varies between a batch of one and a larger one."""
        only_me = frozenset({self._name})
        batches = (Batch(count, only_me, {0: (0, array)}) for count in (1, max(size, _SELF_TEST)))
        results = [self._engine.score(batch).logits.get(self._name) for batch in batches]
        alone, among = (None if logits is None else logits[0] for logits in results)
        if alone is None or among is None:  # a teacher may refuse a batch of one
            return 0.0
        return deviation(among, alone, self._kind)
