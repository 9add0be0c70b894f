"""Every option, said once: command line, settings file, what is kept with a cache, and docs are made of this table.

A command lists the options that it has by name (`kd_cache.commands`); where one means something else there, it says
`changed`. An option that only one command has, and those of a plug-in, are `Option`s of their own.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kd_cache.errors import UsageError, shown

Target = Literal["b", "c", "s1", "s2", "s3"]
TARGETS = typing.get_args(Target)
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
DType = Literal["fp32", "fp16"]
TOPK = re.compile(r"topk:([1-9][0-9]{0,9})\Z")
"""What rows of the K most probable classes are stored as."""
BadSample = Literal["stop", "skip"]
InputsAre = Literal["unchanged", "read", "as-scored"]
ValueKind = Literal["logits", "log_probs", "probs", "sigmoid"]
ExportFormat = Literal["npy", "pt", "tsv"]

DATA, TEACHERS, CACHE, RUN, LIMITS, OUTPUT = "Data", "Teachers", "Cache", "Run", "Limits", "Output"

# As dataset.manifest, dataset.features, train.checkpoint_file, exchange.imported and store.plan have them.
MAX_MANIFEST, MAX_FEATURE, MAX_CHECKPOINT, MAX_SOURCE, MAX_BATCH = 1 << 30, 1 << 24, 4 << 30, 1 << 35, 1 << 16
MAX_SEED = 2**63 - 1
MAX_VIEWS = 1024
PREFIX = "KD_CACHE_"
SETTINGS_FILE = Path("kd-cache.yaml")
"""Read where it is in the working folder and no other is named."""

MIRROR, OFFLINE = "KD_CACHE_MIRROR", "KD_CACHE_OFFLINE"
ENVIRONMENT = {
    MIRROR: "where copies of caches that were opened at an URL are kept",
    OFFLINE: "1: such a copy is used as it is, without asking the store",
    "KD_CACHE_FAULTS": "how much the test suite runs",
    "KD_CACHE_FULL_TESTS": "how much the test suite runs",
}
"""Variables that are no options, and what each says."""
SCHEMES = ("s3", "gs", "az", "hf", "https", "http", "file", "memory")
_URL = re.compile(rf"({'|'.join(SCHEMES)}):/")


def is_url(text: str) -> bool:
    """Whether a text is an URL, or was one before it was taken for a path, which has a ``/`` less."""
    return bool(_URL.match(text))


def home_path(path: str | Path) -> Path:
    """The path, a ``~`` at its start replaced. Raises `UsageError` where nobody is called so, and for an URL."""
    if is_url(text := str(path)):
        url = text if "://" in text else text.replace(":/", "://", 1)
        raise UsageError(
            f"{shown(url)} is an URL, expected a path on this machine",
            hint=f"kd-cache pull {shown(url)} CACHE brings a cache here; kd-cache push CACHE {shown(url)} sends it.",
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{shown(str(path))}: {error}") from error


@dataclass(frozen=True)
class Option:
    """One option of a command, or one of its arguments (``positional``).

    ``name`` is its key in a settings file. Flag ``--cache-root`` and variable ``KD_CACHE_CACHE_ROOT`` follow from the
    name ``cache_root`` where they are not given. ``kind`` is the type of its value: `Path`, `int`, ``list[str]``,
    a `Literal` of choices, …, or one of them ``| None``. Without a ``default`` it is required.
    """

    name: str
    kind: Any
    help: str
    panel: str
    default: Any = ...
    otherwise: str = ""
    """The default in words, where the value alone does not say it."""
    flag: str = ""
    also: tuple[str, ...] = ()
    """Further spellings, older ones among them."""
    stands_for: tuple[tuple[str, str], ...] = ()
    """Switches that stand for a value of it: ``(("--use-fp16", "fp16"),)``."""
    off: bool = False
    """A switch that also has ``--no-…``."""
    variable: str = ""
    metavar: str = ""
    low: float | None = None
    high: float | None = None
    parse: Callable[[str], Any] | None = None
    """Reads a text from the command line, the environment or the file; raises `UsageError`."""
    keyed: bool = False
    """An item may be a section of its own in a file: ``{level: 2, lr: 1e-4}`` for ``level=2,lr=1e-4``."""
    names_code: bool = False
    """A value with a colon names code that runs: it is not taken from a file that nobody named."""
    positional: bool = False
    kept: bool = True
    """Whether its value is written down with what the command makes. Not a teacher of one's own, which names code: what
    a cache says must never be run. Nor a part: what all parts make together is what one process makes.
    """
    recalled: bool = False
    """Whether later commands take it from the cache where it is not given."""

    @property
    def flags(self) -> tuple[str, ...]:
        """``--files``, ``--no-files``, and further spellings; an argument has none."""
        if self.positional:
            return ()
        first = self.flag or "--" + self.name.replace("_", "-")
        return (first, *(["--no-" + first[2:]] if self.off else []), *self.also)

    @property
    def envvar(self) -> str:
        return self.variable or PREFIX + self.name.upper()

    @property
    def spellings(self) -> tuple[str, ...]:
        """Its names in a settings file: ``as_json``, ``json``."""
        long = [_key(flag) for flag in self.flags if flag[:2] == "--" and flag[:5] != "--no-"]
        return tuple(dict.fromkeys([self.name, *long, *dict(self.switches)]))

    @property
    def switches(self) -> tuple[tuple[str, str], ...]:
        """`stands_for` by the names in a settings file: ``(("use_fp16", "fp16"),)``."""
        return tuple((_key(flag), value) for flag, value in self.stands_for)

    @property
    def variables(self) -> tuple[str, ...]:
        """What the environment may call it."""
        return (self.envvar, *(PREFIX + name.upper() for name, _ in self.switches))

    @property
    def bare(self) -> Any:
        """``kind`` without ``| None``."""
        parts = [part for part in typing.get_args(self.kind) if part is not types.NoneType]
        is_union = typing.get_origin(self.kind) in (types.UnionType, typing.Union)
        return parts[0] if is_union and len(parts) == 1 else self.kind

    @property
    def is_switch(self) -> bool:
        return self.bare is bool

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.bare) is list

    @property
    def is_path(self) -> bool:
        return self.bare in (Path, list[Path])

    @property
    def choices(self) -> tuple[str, ...]:
        return typing.get_args(self.bare) if typing.get_origin(self.bare) is Literal else ()

    @property
    def value(self) -> str:
        """What stands for its value in help: ``b|c|s1``, ``PATH``, or nothing for a switch."""
        if self.metavar or self.is_switch:
            return self.metavar
        kind = typing.get_args(self.bare)[0] if self.is_list else self.bare
        return "|".join(self.choices) or {Path: "PATH", int: "N", float: "X"}.get(kind, "TEXT")

    @property
    def shown_default(self) -> str:
        """The default for a person; nothing where there is none to speak of."""
        if self.otherwise or self.default in (None, ..., []):
            return self.otherwise
        if self.is_switch:
            return (self.flags[0] if self.default else self.flags[1]) if self.off else ""
        return str(self.default)


def _key(flag: str) -> str:
    return flag[2:].replace("-", "_")


def batch_size(text: str) -> int | str:
    """A number that a batch plan may hold, or ``auto``."""
    if text == "auto":
        return text
    try:
        if 0 < (number := int(text)) <= MAX_BATCH:
            return number
    except ValueError:
        pass
    raise UsageError(f"expected a number from 1 to {MAX_BATCH:,}, or auto, found {text!r}")


def storage_type(text: str) -> str:
    """``fp32``, ``fp16`` or ``topk:K``."""
    named = text.lower()
    if named in typing.get_args(DType) or TOPK.match(named):
        return named
    raise UsageError(f"expected fp32, fp16, or topk:K for the K most probable classes, found {text!r}")


def byte_size(text: str) -> int:
    """A number of bytes, with or without a unit: ``32MiB``, ``8GB``."""
    number, unit = text.rstrip("BKMGTPi"), text.lstrip("0123456789")
    factors: dict[str, int] = {"": 1, "B": 1}
    for power, prefix in enumerate("KMGT", 1):
        factors |= {f"{prefix}B": 1000**power, f"{prefix}iB": 1024**power}
    if number.isascii() and number.isdigit() and unit in factors and (size := int(number) * factors[unit]):
        return size
    raise UsageError(f"expected a number of bytes such as 32MiB or 8GiB, found {shown(text)!r}")


def changed(name: str, **differences: Any) -> Option:
    """An option of the table as one command has it: ``changed("precision", default=None)``."""
    return replace(OPTIONS[name], **differences)


def targets(**differences: Any) -> Option:
    """The option ``target`` of a command that takes several; its value is a text with commas."""
    several = "|".join([*typing.get_args(Target), "b,c", "all"])
    return changed("target", metavar=several, also=(*OPTIONS["target"].also, "--targets"), **differences)


_TABLE = (
    # Data
    Option("target", str | None, "Target device; the cache holds the train samples of A and of this device.", DATA,
           None, "needed, but where the task has no domains", also=("--target-name",), metavar="|".join(TARGETS)),
    Option("json_path", Path | None, "Dataset JSON (manifest), or a .jsonl with a row on every line.", DATA, None,
           "data/sample/dataset.json", recalled=True),
    Option("data_root", Path | None, "Folder that the manifest's files are relative to.", DATA, None,
           "the manifest's folder", recalled=True),
    Option("features", Path | None, "One HDF5 file that holds the features, instead of files below the data root.",
           DATA, None, recalled=True),
    Option("student_features", Path | None, "The student's own features (of another front end), called as in the "
           "manifest: a folder of .npy files, or one HDF5 file.", DATA, None, "those that teachers score",
           metavar="DIR|FILE"),
    Option("task", Path | None, "YAML file that says what the data set is: classes, domains, groups, inputs. Later "
           "commands find it in the cache.", DATA, None, "acoustic scenes under device shift", metavar="FILE"),
    Option("dataset", str | None, "A map-style data set of your own, in place of a manifest. Its code runs, so it is "
           "never taken from a cache.", DATA, None, metavar="module:factory|file.py:factory", kept=False,
           names_code=True),
    Option("unguarded", bool, "Go on where the task has groups and --dataset does not say which are held out (recorded "
           "with the cache).", DATA, False, recalled=True),
    Option("num_scenes", int, "Scene classes; checked against the checkpoints and the labels.", DATA, 10, low=1,
           recalled=True),
    Option("num_cities", int, "City classes; checked against the checkpoints and the labels.", DATA, 12, low=1,
           recalled=True),
    Option("allow_shared_locations", bool,
           "Permit a recording location in both train and test (recorded with the cache).", DATA, False, recalled=True),
    Option("allow_outside", list[Path], "Permit features in this folder outside the data root. Repeatable.", DATA, [],
           recalled=True),
    Option("rename_map", list[str],
           "A path, or a folder, that was called otherwise when the teachers were made, or a file of such lines; "
           "repeatable. Samples whose features are as they were are known without.", DATA, [], metavar="OLD=NEW|FILE"),
    Option("on_bad_sample", BadSample,
           "Stop at a sample that cannot be scored (its feature or a logit is missing, mis-shaped or not finite), or "
           "skip it, list it as missing and exit 3.", DATA, "stop", recalled=True),
    # Teachers
    Option("city2scene_teacher_ckpt", Path | None, "City2Scene checkpoint, .safetensors or .pth.", TEACHERS, None,
           "the sample's; with your own data outputs/teacher_city2scene/A2<target>/best.safetensors, then best.pth"),
    Option("scene_teacher_ckpt", Path | None, "Scene checkpoint, .safetensors or .pth.", TEACHERS, None,
           "the sample's; with your own data outputs/teacher_scene/global/best.safetensors, then best.pth"),
    Option("teacher", list[str],
           "A further teacher of your own; repeatable. A file is found by its path, and imports others beside it as "
           "'from .other import …'. Its code runs, so it is never taken from a cache.", TEACHERS, [],
           metavar="NAME=module:factory|file.py:factory[,ckpt=PATH]", kept=False, names_code=True),
    Option("only", list[str], "Use this teacher only; repeatable.", TEACHERS, [], metavar="NAME"),
    # Cache
    Option("cache_root", Path, "Folder of the caches; one per target, A2<target>.", CACHE, Path("cache")),
    Option("dtype", str, "How logits are stored: whole, or of 512 classes and more the K most probable and what the "
           "others share. fp16 and topk report the KL that they cost.", CACHE, "fp32", metavar="fp32|fp16|topk:K",
           parse=storage_type),
    Option("skip_existing", bool, "Keep rows that are fresh; --no-skip-existing scores everything again.", CACHE, True,
           off=True),
    Option("files", bool | None, "Also write the view: one <md5>.npy per sample and teacher.", CACHE, None,
           "yes, below a million samples", off=True),
    Option("min_accuracy", float | None, "Refuse a teacher that names fewer of the labelled source rows rightly "
           "(a share from 0 to 1); the index stays as it was.", CACHE, None, low=0, high=1),
    # Run
    Option("device", str, "Where the teachers run.", RUN, "auto", metavar="auto|cpu|cuda[:i]"),
    Option("precision", Precision,
           "Compute precision; a part of the fingerprint. fp32 turns TF32 off; for the others the KL against fp32 is "
           "measured, reported and kept.", RUN, "fp32"),
    Option("compile", bool,
           "Run the teachers through torch.compile: it takes minutes to start, is faster afterwards, and changes "
           "last bits; needs a C++ compiler.", RUN, False, off=True),
    Option("workers", int, "Threads that read features ahead.", RUN, 2, low=0),
    Option("seed", int, "Seed of torch's random numbers, for teachers that use any.", RUN, 42, low=0, high=MAX_SEED),
    Option("config", Path | None, "YAML file with settings, such as 'target: b'; unknown keys are errors.", RUN, None,
           "kd-cache.yaml if present", metavar="FILE"),
    # Limits
    Option("max_manifest_bytes", int, "A larger dataset JSON is refused unread.", LIMITS, MAX_MANIFEST, "1 GiB", low=1),
    Option("max_feature_bytes", int, "A larger feature file is refused unread.", LIMITS, MAX_FEATURE, "16 MiB", low=1),
    Option("max_checkpoint_bytes", int, "A larger checkpoint is refused unread.", LIMITS, MAX_CHECKPOINT, "4 GiB",
           low=1),
    # Output
    Option("report", bool, "Write a page of what came of it beside the results (pip install kd-cache[report]).", OUTPUT,
           True, off=True, kept=False),
    Option("dry_run", bool, "Only say what would be done.", OUTPUT, False),
    Option("as_json", bool, "Print the result as JSON, and nothing else, on standard output.", OUTPUT, False,
           flag="--json", variable="KD_CACHE_JSON"),
    Option("quiet", bool, "Print errors only.", OUTPUT, False),
    Option("debug", bool, "Show the traceback of an error.", OUTPUT, False),
)  # fmt: skip

OPTIONS = {option.name: option for option in _TABLE}

FIRST = ("target", "json_path", "data_root", "city2scene_teacher_ckpt", "scene_teacher_ckpt", "teacher", "cache_root",
         "device", "config", "as_json")  # fmt: skip
"""The ten that people need first; help shows them before all others."""

# Groups that commands have in common.
DATASET = ("json_path", "data_root", "features", "num_scenes", "num_cities", "allow_shared_locations", "allow_outside")
OWN_DATA = ("task", "dataset", "unguarded")
OWN_TEACHERS = ("city2scene_teacher_ckpt", "scene_teacher_ckpt", "teacher")
DATA_LIMITS = ("max_manifest_bytes", "max_feature_bytes")
SHOWING = ("as_json", "quiet", "debug")


def resolved(options: Iterable[str | Option]) -> tuple[Option, ...]:
    """Names replaced by the table's options."""
    return tuple(OPTIONS[option] if isinstance(option, str) else option for option in options)
