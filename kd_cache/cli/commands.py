"""The command table: each command with its function, options and examples. Only what runs is imported."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Literal

from kd_cache.cli import notes
from kd_cache.cli.data_commands import CHECK, PREPARE
from kd_cache.cli.remote_commands import PULL, PUSH, PUSH_TO
from kd_cache.cli.student_commands import COMPARE, COMPLEXITY, PREDICT, STUDENT
from kd_cache.commands import GROUP, Command, Group, Plugin
from kd_cache.errors import UsageError
from kd_cache.options import (
    CACHE,
    DATA,
    DATA_LIMITS,
    DATASET,
    LIMITS,
    MAX_SEED,
    MAX_SOURCE,
    MAX_VIEWS,
    OUTPUT,
    OWN_DATA,
    OWN_TEACHERS,
    RUN,
    SHOWING,
    TEACHERS,
    BadSample,
    DType,
    ExportFormat,
    InputsAre,
    Option,
    Precision,
    Target,
    ValueKind,
    batch_size,
    byte_size,
    changed,
    targets,
)
from kd_cache.train.settings import OPTIONS as TRAINING

SAVED = "Data options that are not given are taken from what the dumps saved with the cache."
ARGUMENTS = "Arguments"
_TARGETS = targets(
    help="Target device; the cache holds the train samples of A and of this device. Several, or all: a cache of each; "
    "a teacher that serves them all scores a sample once."
)
_ANY_TARGET = targets(
    help="Just the caches of these targets.", panel=CACHE, default=None,
    otherwise="every cache under the root",
)  # fmt: skip
_CACHE = Option(
    "cache", Path | None, "A cache, or a folder of caches.", ARGUMENTS, None, "see --target", positional=True
)
_HAS_VIEW = changed(
    "files", kind=bool | None, help="Whether the cache has a view of one <md5>.npy per row.", default=None,
    otherwise="as its dumps said",
)  # fmt: skip
_AUDIT = (0, 1, 2, 3, 4, 5, 6)

DUMP = Command(
    "dump",
    "kd_cache.cli.dump:dump",
    "Score the permitted train samples of A and a target with every teacher, and keep the logits.",
    (
        _TARGETS, *DATASET, *OWN_DATA, "rename_map", "on_bad_sample", *OWN_TEACHERS, "only", "cache_root",
        changed("dtype", stands_for=(("--use-fp16", "fp16"),)),
        "skip_existing", "files",
        Option("num_verify", int, "Random samples to verify afterwards; a failed verification is a failed dump.",
               CACHE, 10, low=0),
        Option("reread", bool,
               "Read every feature, also those whose files look unchanged since the last dump read them.", RUN, False,
               off=True),
        Option("views", int, "So many views of each sample, the clean one included: augmented inputs, scored with what "
               "was drawn for them kept. More of them later add to those that are there.", CACHE, 0, low=0,
               high=MAX_VIEWS),
        Option("policy", Path | None, "YAML file that says how inputs of --views are augmented.", CACHE, None,
               metavar="FILE"),
        "min_accuracy",
        "device", "precision", "compile",
        Option("batch_size", int | str | None,
               "Largest batch; auto measures the largest that fits and is still faster.", RUN, None,
               "32 on a CPU, 256 on a GPU", metavar="N|auto", parse=batch_size),
        "workers", "seed",
        Option("shard_size", int, "Commit finished rows after this many samples …", RUN, 4096, low=1),
        Option("shard_seconds", float, "… or after so many seconds, whichever comes first.", RUN, 5.0, low=0),
        Option("shard", str | None,
               "Score part i of n (the first is 0/n); when all parts are done, run kd-cache seal. env: the part "
               "that RANK/WORLD_SIZE or SLURM_ARRAY_TASK_ID/_COUNT name.",
               RUN, None, "everything", metavar="i/n|env",
               kept=False),
        PUSH_TO,
        Option("ray", str | None,
               "Score the parts as tasks of a Ray cluster, and seal them: a running one, one started here, or the one "
               "whose head is there (pip install kd-cache[ray]).", RUN, None, "this process does everything",
               metavar="auto|local|host:port", kept=False),
        Option("parts", int | None, "How many parts --ray makes; another number on the next run is fine.", RUN, None,
               "several for each slot of the cluster", low=1, kept=False),
        Option("ray_gpus", float | None, "GPUs of a part that --ray starts; without any it runs on the CPU.", RUN,
               None, "1 where the cluster has GPUs and --device permits", low=0, high=1, kept=False),
        Option("ray_storage", str | None,
               "Where machines share no disk: each part is dumped into a folder of its machine and pushed there, and "
               "pulled from there to be sealed (pip install kd-cache[remote]).", RUN, None, "all see the cache root",
               metavar="URL", kept=False),
        *DATA_LIMITS, "max_checkpoint_bytes", "config",
        changed("dry_run", help="Only say what would be scored, and how many bytes it takes."),
        *SHOWING,
    ),
    "Every option can also be set as an environment variable (KD_CACHE_TARGET, KD_CACHE_CACHE_ROOT, …) or in "
    "kd-cache.yaml (target: b).",
    (
        "kd-cache dump --target b",
        "kd-cache dump --target s1 --json-path data/sample/dataset.json --data-root data/sample "
        "--city2scene-teacher-ckpt data/sample/teachers/teacher_city2scene/A2s1/best.safetensors "
        "--scene-teacher-ckpt data/sample/teachers/teacher_scene/global/best.safetensors",
        "kd-cache dump --target b,c --cache-root cache/several",
        "kd-cache dump --target b --dtype fp16 --cache-root cache/half",
        "kd-cache dump --target b --dry-run --json",
        "kd-cache dump --target b --shard 0/2 --cache-root cache/parts",
        "kd-cache dump --target b --shard 1/2 --cache-root cache/parts",
    ),
    ("dry_run",),
    _AUDIT,
    notes=notes.DUMP,
)  # fmt: skip

SEAL = Command(
    "seal",
    "kd_cache.cli.seal:seal",
    "Merge the packs of all dumps into one per teacher, write view and index. Needs no teacher.",
    (
        "target", "cache_root", *DATASET, *OWN_DATA, _HAS_VIEW,
        Option("inputs", InputsAre,
               "Which features count: unchanged where nobody touched their files since a part read them, and read "
               "elsewhere; read: all of them; as-scored: they are not at hand, each is as its part read it (recorded).",
               CACHE, "unchanged"),
        Option("pack_bytes", int | None,
               "Make 2, 4, 8 … packs of a teacher where one would be larger; each has the keys that begin alike.",
               CACHE, None, "as it was, at first 8GiB", metavar="N|32MiB|8GiB", parse=byte_size),
        "workers", *DATA_LIMITS, "config", *SHOWING,
    ),
    SAVED,
    (
        "kd-cache seal --target b --cache-root cache/parts",
        "kd-cache seal --target b --cache-root cache/parts --inputs as-scored",
        "kd-cache seal --target b --cache-root cache/parts --pack-bytes 1GiB",
    ),
    exit_codes=_AUDIT,
    notes=notes.SEAL,
)  # fmt: skip

VERIFY = Command(
    "verify",
    "kd_cache.cli.verify:verify",
    "Check that every permitted sample has a row, and that rows are intact, fresh and permitted. Changes nothing.",
    (
        _CACHE,
        _ANY_TARGET,
        Option("n", int, "How many permitted samples to draw at random.", CACHE, 100, also=("-n",), low=1),
        Option("everything", bool, "Check every sample, and also rows and files without a manifest entry.", CACHE,
               False, flag="--all", variable="KD_CACHE_ALL"),
        Option("recompute", bool, "Score the samples again and compare.", CACHE, False),
        # Not "seed": in a settings file that is the dump's, and would take the freshness out of every draw.
        Option("verify_seed", int | None, "Which samples to draw.", CACHE, None, "fresh randomness, printed",
               flag="--seed", low=0, high=MAX_SEED),
        changed("min_accuracy", help="Report a teacher that names fewer of the labelled source rows rightly (a share "
                "from 0 to 1)."),
        "cache_root", *DATASET, *OWN_DATA, "rename_map", *OWN_TEACHERS,
        changed("dtype", kind=str | None, help="Storage type to expect.", default=None, otherwise="as dumped"),
        changed("precision", kind=Precision | None, help="Compute precision to expect.", default=None,
                otherwise="as dumped"),
        "device", *DATA_LIMITS, "max_checkpoint_bytes", "config", *SHOWING,
    ),
    "Data and teacher options that are not given are taken from what the dump saved with the cache.",
    (
        "kd-cache verify --n 100",
        "kd-cache verify --target b --all --recompute",
        "kd-cache verify cache/A2b --n 100 --json",
    ),
    ("n", "everything", "recompute"),
    _AUDIT,
    notes=notes.VERIFY,
)  # fmt: skip

REPAIR = Command(
    "repair",
    "kd_cache.cli.repair:repair",
    "Verify everything, score again or rebuild what is wrong, verify again. Intact rows are not touched.",
    (
        _CACHE,
        _ANY_TARGET,
        Option("recompute", bool, "Score every sample again first: rows that differ are replaced, adopted rows that "
               "agree are confirmed.", CACHE, False),
        "cache_root", *DATASET, *OWN_DATA, "rename_map",
        changed("on_bad_sample", kind=BadSample | None, default=None, otherwise="as dumped",
                help="Stop at a sample that cannot be scored, or skip it and list it as missing."),
        *OWN_TEACHERS, "device", "workers", *DATA_LIMITS, "max_checkpoint_bytes", "config", *SHOWING,
    ),
    "Data and teacher options that are not given are taken from what the dump saved with the cache. Exits with the "
    "status of the second verification.",
    ("kd-cache repair", "kd-cache repair --target b --recompute"),
    ("recompute",),
    _AUDIT,
    notes=notes.REPAIR,
)  # fmt: skip

INFO = Command(
    "info",
    "kd_cache.cli.info:info",
    "Show what a cache holds, what made it, when, and with which settings.",
    (
        Option("path", Path, "A cache, a folder of caches, or the output folder of train.", ARGUMENTS, Path("cache"),
               positional=True),
        _ANY_TARGET,
        "as_json", "debug",
    ),
    "Of a folder that kd-cache train wrote: its teachers, their accuracy, and the city teachers whose weights are "
    "cached, with their settings.",
    ("kd-cache info", "kd-cache info cache/A2b --json"),
    exit_codes=(0, 1, 2, 3, 4),
)  # fmt: skip

DIFF = Command(
    "diff",
    "kd_cache.cli.diff:diff",
    "Compare two caches: rows, equal bits, changed argmax and KL per teacher.",
    (
        Option("a", Path, "A cache.", ARGUMENTS, positional=True, metavar="A"),
        Option("b", Path, "The cache to compare it with.", ARGUMENTS, positional=True, metavar="B"),
        "only", *SHOWING,
    ),
    "Exits 0 whether or not they differ.",
    ("kd-cache diff cache/A2b cache/half/A2b", "kd-cache diff cache/A2b cache/half/A2b --only scene --json"),
    ("only",),
    (0, 1, 2, 3, 4),
    notes=notes.DIFF,
)  # fmt: skip

EXPORT = Command(
    "export",
    "kd_cache.cli.export:export",
    "Write a cache's rows for other programs. Needs no teacher, no manifest and no features.",
    (
        Option("cache", Path | None, "A finished cache, such as cache/A2b.", ARGUMENTS, None,
               "the only one under ./cache", positional=True),
        Option("to", ExportFormat,
               "pt: a tensor and its list of files per teacher; tsv: a table per teacher; npy: a file per row.",
               OUTPUT),
        Option("output", Path | None, "Folder to write into.", OUTPUT, None, "only for npy: the cache's own view"),
        "only",
        Option("overwrite", bool, "Replace the files of an earlier export.", OUTPUT, False),
        *SHOWING,
    ),
    "The rows are those that LogitCache serves, in the order of their keys (the MD5 of their file).",
    (
        "kd-cache export cache/A2b --to tsv --output cache/exported",
        "kd-cache export cache/A2b --to pt --output cache/exported --overwrite",
        "kd-cache export cache/A2b --to npy",
    ),
    ("output", "only", "overwrite"),
    (0, 1, 2, 3, 4),
    notes=notes.EXPORT,
)  # fmt: skip

ADOPT = Command(
    "adopt",
    "kd_cache.cli.adopt:adopt",
    "Bring rows that another program made into a cache. They stay marked as unverified.",
    (
        Option("source", Path, "The folder of an older script's cache, a tensor (.pt) with its files, or a .tsv.",
               ARGUMENTS, positional=True),
        "target",
        Option("name", str | None, "The teacher's name in the cache.", TEACHERS, None,
               "as the source says, or the file's name", metavar="NAME"),
        Option("files_list", Path | None,
               "Files of a bare tensor in the order of its rows: a JSON list, or one a line.", DATA, None,
               "<stem>.files.json beside it"),
        Option("value_kind", ValueKind | None, "What the rows are.", DATA, None, "as the source says, else logits"),
        # Not "dtype": in a settings file that is the dump's.
        Option("text_dtype", DType | None, "What the numbers of a .tsv are stored as.", DATA, None, "fp32",
               flag="--dtype"),
        *DATASET, *OWN_DATA,
        changed("on_bad_sample", help="Stop at a feature that cannot be read or a row that is damaged or not finite, "
                "or skip it, list it as missing and exit 3."),
        "min_accuracy", "cache_root",
        replace(_HAS_VIEW, otherwise="as the cache is, or yes"),
        "workers", *DATA_LIMITS,
        Option("max_source_bytes", int, "A larger file to adopt is refused unread.", LIMITS, MAX_SOURCE, "32 GiB",
               low=1),
        "config", *SHOWING,
    ),
    "Rows are joined to samples by file name; those of samples that are not permitted are left out.",
    (
        "kd-cache adopt cache/exported/scene.pt --target b --cache-root cache/adopted",
        "kd-cache adopt cache/exported/city2scene.tsv --target b --name adopted_city2scene --cache-root cache/other",
    ),
    ("name", "files_list", "value_kind"),
    _AUDIT,
    notes=notes.ADOPT,
)  # fmt: skip

GC = Command(
    "gc",
    "kd_cache.cli.gc:gc",
    "Remove temporaries of killed processes, superseded packs, and files without an index entry.",
    (
        Option("cache", Path | None, "A cache.", ARGUMENTS, None, "every cache under the root", positional=True),
        "cache_root",
        Option("older_than", int,
               "Keep files younger than this: a running dump or seal may need them. With 0, no other kd-cache may run.",
               CACHE, 3600, low=0, high=10**10, metavar="SECONDS"),
        Option("drop_unfinished", bool, "Drop what dumps committed that did not finish: they start anew then.", CACHE,
               False),
        "config",
        changed("dry_run", help="Only say what would be removed, and why."),
        *SHOWING,
    ),
    "Rows that the index needs, and files that kd-cache did not name, are never removed; what an unfinished dump "
    "committed only with --drop-unfinished.",
    ("kd-cache gc cache/A2b --dry-run", "kd-cache gc cache/A2b", "kd-cache gc --older-than 86400 --json"),
    ("older_than", "drop_unfinished", "dry_run"),
    (0, 1, 2, 4),
    notes=notes.GC,
)  # fmt: skip

MERGE = Command(
    "merge",
    "kd_cache.cli.merge:merge",
    "Bring the rows of other caches, finished or not, into the cache of a target, and seal it. Needs no teacher.",
    (
        Option("sources", list[Path], "Caches of the same target; they are only read.", ARGUMENTS, metavar="SOURCE...",
               positional=True),
        "target", "cache_root", "only", *DATASET, *OWN_DATA, _HAS_VIEW, "workers", *DATA_LIMITS, "config", *SHOWING,
    ),
    "Rows that the manifest does not permit are left out. Data options that are not given are those saved with the "
    "cache, or with the first source.",
    (
        "kd-cache dump --target b --shard 0/2 --cache-root cache/one",
        "kd-cache dump --target b --shard 1/2 --cache-root cache/two",
        "kd-cache merge cache/one/A2b cache/two/A2b --target b --cache-root cache/merged",
    ),
    ("only",),
    _AUDIT,
    notes=notes.MERGE,
)  # fmt: skip

SAMPLE_DATA = Command(
    "sample-data",
    "kd_cache.cli.sample_data:sample_data",
    "Generate the synthetic sample: 10 scenes, 10 cities, 9 devices, equal bytes on any machine.",
    (
        Option("out", Path, "Folder to write dataset.json and features/ into.", ARGUMENTS, positional=True),
        Option("size", Literal["small", "large"],
               "small is the embedded sample; large has 300 more train clips of a target, without scene labels, and "
               "1,800 more test clips.", DATA, "small"),
        changed("target", kind=Target | None, metavar="", help="The device that the large sample has more clips of.",
                default=None, otherwise="none: the small sample"),
        "as_json", "debug",
    ),
    examples=("kd-cache sample-data cache/sample", "kd-cache sample-data cache/large-b --size large --target b"),
)  # fmt: skip

_OF_TRAINING = {option.name: option for option in TRAINING}
EVALUATE = Command(
    "evaluate",
    "kd_cache.cli.evaluate:evaluate",
    "Measure a teacher or student on labelled rows: accuracy, log loss and calibration, of all and by group.",
    (
        Option("model", str, "A checkpoint, or a net of your own (its code runs).", ARGUMENTS, positional=True,
               metavar="CKPT|NAME=module:factory[,ckpt=PATH]"),
        Option("split", Literal["test", "val"], "The manifest's test rows, or the locations of train that training "
               "holds out (of scene labels those of A alone).", DATA, "test"),
        Option("label", Literal["scene", "city"] | None, "What it tells apart.", DATA, None,
               "what the checkpoint says, else scene"),
        changed("target", help="The device that groups call target, and whose rows --split val "
                "divides with those of A.", default=None, otherwise="none: A alone, as for a scene teacher"),
        *DATASET,
        changed("student_features", help="Features of a student that was trained on its own: a folder of .npy "
                "files, or one HDF5 file.", otherwise="the manifest's"),
        "rename_map",
        Option("against", Path | None, "A cache: also measure its teachers on these rows, and say the difference to "
               "each. They are looked up where the dump found them.", TEACHERS, None, metavar="CACHE"),
        *OWN_TEACHERS,
        Option("csv", Path | None, "Also write rows and accuracy of each device and class to this file.", OUTPUT, None),
        Option("overwrite", bool, "Replace a file that differs.", OUTPUT, False),
        _OF_TRAINING["val_ratio"], _OF_TRAINING["fold"], "device",
        _OF_TRAINING["batch_size"], "workers",
        changed("seed", help="Of the draws that intervals come from."),
        *DATA_LIMITS, "max_checkpoint_bytes", "config", *SHOWING,
    ),
    "Intervals cover 95 %, by drawing whole recording locations 1,000 times. A net that was trained or validated on a "
    "test row is refused.",
    (
        "kd-cache evaluate data/sample/teachers/teacher_scene/global/best.safetensors --target b",
        "kd-cache evaluate data/sample/teachers/teacher_city2scene/A2b/best.safetensors --target b --split val --json",
    ),
    ("split", "label", "against", "csv"),
    (0, 1, 2, 3, 6),
    notes=notes.EVALUATE,
)  # fmt: skip

REPORT = Command(
    "report",
    "kd_cache.cli.pages:report",
    "Write an HTML page of a cache, a training or a comparison: one file with figures and tables.",
    (
        Option("path", Path, "A cache, a folder that train or student wrote, or one of student compare.", ARGUMENTS,
               positional=True),
        Option("output", Path | None, "Folder to write report.html and report.json into, or the page's own name "
               "(.html).", OUTPUT, None, "beside the results; of a cache outputs/report/<its name>"),
        *DATASET, *OWN_TEACHERS, *DATA_LIMITS, "max_checkpoint_bytes", "config", *SHOWING,
    ),
    "Needs matplotlib: pip install kd-cache[report]. Of a cache, data and teacher options that are not given are those "
    "saved with it; they say which rows trained its teachers.",
    (
        "kd-cache report cache/A2b",
        "kd-cache report outputs/student/A2b/fit --output outputs/report/student",
    ),
    ("output",),
    _AUDIT,
    notes=notes.REPORT,
)  # fmt: skip

COMMANDS = (
    DUMP, VERIFY, INFO, SEAL, MERGE, PUSH, PULL, REPAIR, DIFF, GC, EXPORT, ADOPT, STUDENT, COMPARE, PREDICT,
    COMPLEXITY, EVALUATE, REPORT, PREPARE, CHECK, SAMPLE_DATA,
)  # fmt: skip


@functools.cache
def all_commands() -> tuple[dict[str, Command], dict[str, Group]]:
    """The product's commands and those of plug-ins, and the groups, by name. A plug-in's replaces none of ours."""
    found = {command.name: command for command in COMMANDS}
    groups: dict[str, Group] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            plugin: Plugin = point.load()
        except Exception as error:
            raise UsageError(f"the plug-in {point.name} ({point.value}) cannot be loaded: {error}") from error
        for command in plugin.commands:
            if command.name in found:
                raise UsageError(f"the plug-in {point.name} ({point.value}) brings a second command {command.name}")
            found[command.name] = command
        groups |= {group.name: group for group in plugin.groups}
    for name in found:
        if " " in name and name.rpartition(" ")[0] not in {*groups, *found}:
            raise UsageError(f"no plug-in says what the group of kd-cache {name} is")
    return found, groups


def beside(command: Command) -> dict[str, str]:
    """Commands called like this one and a word more, ``student compare`` beside ``student``, and what they are for."""
    every = all_commands()[0].values()
    return {each.name: each.help for each in every if each.name.startswith(f"{command.name} ")}


def all_options() -> list[Option]:
    """Every option of every command; one that several have is there several times."""
    return [option for command in all_commands()[0].values() for option in command.options if not option.positional]


def sections(command: Command | None = None) -> list[str]:
    """The settings file's sections that a command reads, the nearest last; without one, all that there are."""
    groups = all_commands()[1]
    if command is None:
        return [name for group in groups.values() for name in (group.name, *group.sections)]
    group, _, word = command.name.rpartition(" ")
    return [name for name in (group, word) if group in groups and name in (group, *groups[group].sections)]
