"""The lines of the command table that are about a data set before anything is scored."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from kd_cache.cli import notes
from kd_cache.commands import Command
from kd_cache.dataset.front_end import FRONT_ENDS, FrontEnd
from kd_cache.options import DATA, DATA_LIMITS, DATASET, OUTPUT, SHOWING, Option, changed

ARGUMENTS, FEATURES = "Arguments", "Features"

_FRONT_END = tuple(
    Option(each.name, each.metadata["kind"] | None, each.metadata["help"], FEATURES, None, "the front end's",
           off=each.metadata["kind"] is bool)
    for each in fields(FrontEnd)
)  # fmt: skip

PREPARE = Command(
    "prepare",
    "kd_cache.cli.prepare:prepare",
    "Make the manifest of a data set from its tables, and log-mel features of its audio.",
    (
        Option("layout", str, "tau: TAU Urban Acoustic Scenes 2019, 2020, 2022 or the subsets of 2024, 2025, whose "
               "tables have names of their own; csv: your own tables.", ARGUMENTS, positional=True, metavar="tau|csv"),
        Option("folder", Path, "The data set's folder, which the tables' file names are relative to.", ARGUMENTS,
               positional=True),
        Option("out", Path, "Folder to write dataset.json into, and the features.", OUTPUT),
        # Not "features": in a settings file that is the file that a dump reads.
        Option("front_end", str | None, "Make features too, by this front end.", FEATURES, None, "no features",
               flag="--features", metavar="|".join(FRONT_ENDS)),
        Option("npy", bool, "Write one .npy per clip instead of one HDF5 file.", FEATURES, False),
        *_FRONT_END,
        Option("subset", str | None, "Train on this subset: 25 for split25.csv.", DATA, None,
               "fold1_train.csv, or the only subset there is", metavar="5|10|25|50|100"),
        Option("table", list[str], "A table of your own, for the layout csv: of a split, or with a column for it. "
               "meta=PATH says more of the files that others list. Repeatable.", DATA, [],
               metavar="[train|val|test|meta=]PATH"),
        Option("columns", str | None, "What columns are called: of file, scene, city, device, location, split.", DATA,
               None, "as in TAU: filename, scene_label, identifier, source_label",
               metavar="file=NAME,scene=NAME,…"),
        "allow_shared_locations",
        changed("allow_outside", help="Permit audio in this folder outside the data set's. Repeatable."),
        changed("workers", help="Threads that read audio and compute."),
        Option("overwrite", bool, "Replace a dataset.json or features that differ.", OUTPUT, False),
        changed("max_manifest_bytes", help="A larger table is refused unread."),
        changed("max_feature_bytes", help="A clip with larger features is refused."), "config", *SHOWING,
    ),
    "Rows are joined by file name. What no table and no name says is counted and left unknown.",
    ("kd-cache prepare tau cache/made-tau --out cache/prepared",),
    ("subset", "table", "columns", "front_end"),
    (0, 1, 2, 6),
    notes=notes.PREPARE,
)  # fmt: skip

CHECK = Command(
    "check",
    "kd_cache.cli.check:check",
    "Say everything that is wrong with a manifest: labels, guard, locations, missing files. Needs no teacher.",
    (
        changed("target", help="Look only for the files that the cache of this target needs.",
                default=None, otherwise="every file of the manifest"),
        *DATASET, "task", *DATA_LIMITS, "config", *SHOWING,
    ),
    "No feature is read. Exits 3 where files are missing.",
    ("kd-cache check --json-path data/sample/dataset.json", "kd-cache check --target b --json"),
    exit_codes=(0, 1, 2, 3, 6),
)  # fmt: skip
