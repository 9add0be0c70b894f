"""Run teachers once over a training set, keep their logits on disk, serve them to students.

Never a wrong, stale, corrupt or leaked row. Importing this package does not import torch; what needs it is
imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_cache.adopt import AdoptJob, AdoptReport, adopt_rows
    from kd_cache.diff import DiffReport, diff_caches
    from kd_cache.dump import DumpJob, DumpReport, dump_logits, plan_dump
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
        UsageError,
    )
    from kd_cache.export import ExportJob, ExportReport, export_logits
    from kd_cache.features import FeatureSource
    from kd_cache.fingerprint import Fingerprint, weights_digest
    from kd_cache.gc import GcReport, find_garbage, remove_garbage
    from kd_cache.loader import LogitCache
    from kd_cache.manifest import Manifest, Sample, load_manifest, sample_key
    from kd_cache.merge import MergeJob, MergeReport, merge_caches
    from kd_cache.packed_features import PackedFeatures
    from kd_cache.problems import Problem, VerifyReport
    from kd_cache.provenance import Provenance
    from kd_cache.reader.attach import CachedDataset
    from kd_cache.reader.batch_loader import BatchLoader
    from kd_cache.splits import Selection, select
    from kd_cache.store.view import load_cached_logits_batch
    from kd_cache.student import student_loader
    from kd_cache.teacher import Teacher, teacher_fingerprint
    from kd_cache.verify import VerifyJob, verify_cache

__version__ = "0.1.0"

_HOME = {
    "kd_cache.adopt": ("AdoptJob", "AdoptReport", "adopt_rows"),
    "kd_cache.reader.attach": ("CachedDataset",),
    "kd_cache.reader.batch_loader": ("BatchLoader",),
    "kd_cache.diff": ("DiffReport", "diff_caches"),
    "kd_cache.dump": ("DumpJob", "DumpReport", "dump_logits", "plan_dump"),
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
        "UsageError",
    ),
    "kd_cache.export": ("ExportJob", "ExportReport", "export_logits"),
    "kd_cache.features": ("FeatureSource",),
    "kd_cache.fingerprint": ("Fingerprint", "weights_digest"),
    "kd_cache.gc": ("GcReport", "find_garbage", "remove_garbage"),
    "kd_cache.loader": ("LogitCache",),
    "kd_cache.manifest": ("Manifest", "Sample", "load_manifest", "sample_key"),
    "kd_cache.merge": ("MergeJob", "MergeReport", "merge_caches"),
    "kd_cache.packed_features": ("PackedFeatures",),
    "kd_cache.provenance": ("Provenance",),
    "kd_cache.splits": ("Selection", "select"),
    "kd_cache.store.view": ("load_cached_logits_batch",),
    "kd_cache.student": ("student_loader",),
    "kd_cache.teacher": ("Teacher", "teacher_fingerprint"),
    "kd_cache.problems": ("Problem", "VerifyReport"),
    "kd_cache.verify": ("VerifyJob", "verify_cache"),
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
    "KDCacheError",
    "LogitCache",
    "Manifest",
    "ManifestError",
    "MergeJob",
    "MergeReport",
    "MissingLogitsError",
    "PackedFeatures",
    "Problem",
    "Provenance",
    "Sample",
    "Selection",
    "StaleError",
    "StoreError",
    "Teacher",
    "TeacherError",
    "TrainingError",
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
    "sample_key",
    "select",
    "student_loader",
    "teacher_fingerprint",
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
