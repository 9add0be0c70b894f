"""Which samples a list of a data set's subset names, such as ``split25.csv``: by name, whatever the order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from kd_cache.dataset.manifest import Sample
from kd_cache.distill.prediction import AUDIO
from kd_cache.errors import UsageError, listed, shown
from kd_cache.prepare.tables import read_table


def listed_samples(table: Path, samples: Iterable[Sample]) -> frozenset[str]:
    """The files of the train samples that a table lists.

    A row ``audio/x.wav`` is the sample whose file is so called, but for its ending and the folder it lies in:
    ``features/x.npy``.

    Raises:
        ManifestError: no table with a column of file names.
        UsageError: a row without a sample, or with several.
    """
    read = read_table(table, {})
    names = {_stem(row[read.columns["file"]]).removeprefix(AUDIO) for _, row in read.rows}
    found = defaultdict(list)
    for sample in samples:
        parts = _stem(sample.file).split("/")
        for start in range(len(parts) if sample.split == "train" else 0):
            if (name := "/".join(parts[start:])) in names:
                found[name].append(sample.file)
    problems = [f"{name}: no train sample" for name in sorted(names - found.keys())]
    problems += [f"{name}: {' and '.join(files[:2])}" for name, files in sorted(found.items()) if len(files) > 1]
    if problems or not names:
        raise UsageError(
            f"{len(problems):,} of {len(names):,} rows of {shown(table)} are not one train sample each\n"
            f"{listed(problems)}".rstrip(),
            hint="Check that --subset is a list of this data set's train rows.",
        )
    return frozenset(file for files in found.values() for file in files)


def _stem(name: str) -> str:
    """``audio/x`` of ``audio/x.wav``."""
    folder, slash, last = name.rpartition("/")
    stem, dot, _ = last.rpartition(".")
    return f"{folder}{slash}{stem if dot else last}"
