"""Run teachers once over a training set, keep their logits on disk, serve them to students.

Never a wrong, stale, corrupt or leaked row. Importing this package does not import torch; what needs it is
imported when it is first used.
"""

from __future__ import annotations

import sys

_started_as = " ".join(sys.orig_argv).replace(" -m ", " -m")
if sys.argv[:1] == ["-m"] and " -mkd_cache" in _started_as and not sys.flags.safe_path:
    # python -m kd_cache…: the current folder comes first, and any file in it would pass for a module that we import.
    # A module that --teacher names is looked for there all the same, last.
    del sys.path[0]

import importlib  # noqa: E402
import types  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from kd_cache.care.diff import DiffReport, diff_caches
    from kd_cache.care.gc import GcReport, find_garbage, remove_garbage
    from kd_cache.care.merge import MergeJob, MergeReport, merge_caches
    from kd_cache.care.problems import Problem, VerifyReport
    from kd_cache.care.verify import VerifyJob, verify_cache
    from kd_cache.dataset.features import FeatureSource
    from kd_cache.dataset.guard import Selection, select
    from kd_cache.dataset.inputs import Inputs
    from kd_cache.dataset.manifest import Manifest, Sample, load_manifest
    from kd_cache.dataset.packed import PackedFeatures
    from kd_cache.dataset.provenance import Provenance
    from kd_cache.dataset.task import Task
    from kd_cache.dataset.views import Policy, replay_views
    from kd_cache.errors import (
        CheckpointError,
        CorruptError,
        DataLeakageError,
        FeatureError,
        KDCacheError,
        ManifestError,
        MissingLogitsError,
        StaleError,
        StoreError,
        TeacherError,
        TrainingError,
        UnfitError,
        UsageError,
    )
    from kd_cache.exchange.adopt import AdoptJob, AdoptReport, adopt_rows
    from kd_cache.exchange.export import ExportJob, ExportReport, export_logits
    from kd_cache.keys import sample_key
    from kd_cache.own_data import score, verify
    from kd_cache.score.dump import DumpJob, DumpReport, dump_logits, plan_dump
    from kd_cache.score.teacher import Teacher, teacher_fingerprint
    from kd_cache.serve.attach import CachedDataset
    from kd_cache.serve.batch_loader import BatchLoader
    from kd_cache.serve.logit_cache import LogitCache
    from kd_cache.serve.student_loader import student_loader
    from kd_cache.serve.topk import TopK
    from kd_cache.store.origin import Fingerprint, weights_digest
    from kd_cache.store.view import load_cached_logits_batch

import kd_cache.score as _score  # noqa: E402

__version__ = "0.1.0"


class _Callable(types.ModuleType):
    """The package `kd_cache.score` and, called, the function of that name: two things with one good name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """`kd_cache.own_data.score`."""
        return importlib.import_module("kd_cache.own_data").score(*args, **options)


_score.__class__ = _Callable

_HOME = {
    "kd_cache.exchange.adopt": ("AdoptJob", "AdoptReport", "adopt_rows"),
    "kd_cache.serve.attach": ("CachedDataset",),
    "kd_cache.serve.batch_loader": ("BatchLoader",),
    "kd_cache.care.diff": ("DiffReport", "diff_caches"),
    "kd_cache.score.dump": ("DumpJob", "DumpReport", "dump_logits", "plan_dump"),
    "kd_cache.errors": (
        "CheckpointError",
        "CorruptError",
        "DataLeakageError",
        "FeatureError",
        "KDCacheError",
        "ManifestError",
        "MissingLogitsError",
        "StaleError",
        "StoreError",
        "TeacherError",
        "TrainingError",
        "UnfitError",
        "UsageError",
    ),
    "kd_cache.exchange.export": ("ExportJob", "ExportReport", "export_logits"),
    "kd_cache.dataset.features": ("FeatureSource",),
    "kd_cache.dataset.inputs": ("Inputs",),
    "kd_cache.dataset.task": ("Task",),
    "kd_cache.dataset.views": ("Policy", "replay_views"),
    "kd_cache.own_data": ("score", "verify"),
    "kd_cache.store.origin": ("Fingerprint", "weights_digest"),
    "kd_cache.care.gc": ("GcReport", "find_garbage", "remove_garbage"),
    "kd_cache.serve.logit_cache": ("LogitCache",),
    "kd_cache.dataset.manifest": ("Manifest", "Sample", "load_manifest"),
    "kd_cache.keys": ("sample_key",),
    "kd_cache.care.merge": ("MergeJob", "MergeReport", "merge_caches"),
    "kd_cache.dataset.packed": ("PackedFeatures",),
    "kd_cache.dataset.provenance": ("Provenance",),
    "kd_cache.dataset.guard": ("Selection", "select"),
    "kd_cache.store.view": ("load_cached_logits_batch",),
    "kd_cache.serve.student_loader": ("student_loader",),
    "kd_cache.serve.topk": ("TopK",),
    "kd_cache.score.teacher": ("Teacher", "teacher_fingerprint"),
    "kd_cache.care.problems": ("Problem", "VerifyReport"),
    "kd_cache.care.verify": ("VerifyJob", "verify_cache"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AdoptJob",
    "AdoptReport",
    "BatchLoader",
    "CachedDataset",
    "CheckpointError",
    "CorruptError",
    "DataLeakageError",
    "DiffReport",
    "DumpJob",
    "DumpReport",
    "ExportJob",
    "ExportReport",
    "FeatureError",
    "FeatureSource",
    "Fingerprint",
    "GcReport",
    "Inputs",
    "KDCacheError",
    "LogitCache",
    "Manifest",
    "ManifestError",
    "MergeJob",
    "MergeReport",
    "MissingLogitsError",
    "PackedFeatures",
    "Policy",
    "Problem",
    "Provenance",
    "Sample",
    "Selection",
    "StaleError",
    "StoreError",
    "Task",
    "Teacher",
    "TeacherError",
    "TopK",
    "TrainingError",
    "UnfitError",
    "UsageError",
    "VerifyJob",
    "VerifyReport",
    "adopt_rows",
    "diff_caches",
    "dump_logits",
    "export_logits",
    "find_garbage",
    "load_cached_logits_batch",
    "load_manifest",
    "merge_caches",
    "plan_dump",
    "remove_garbage",
    "replay_views",
    "sample_key",
    "score",
    "select",
    "student_loader",
    "teacher_fingerprint",
    "verify",
    "verify_cache",
    "weights_digest",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
