"""What may be a teacher's name: it becomes a folder, a part of file names and a key of the index."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from kd_cache.errors import UsageError

INDEX_NAME = "cache_index.json"
TEACHER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
RESERVED_NAMES = ("packs", "pending", "num_samples", "kd_cache", INDEX_NAME, "plan.json", "seen.bin", "remote.json")
MODES: Final = ("ce", "fit", "mean", "probs", "gate", "entropy", "label")
"""Ways to make one teacher of several: a student is told one of them, or a teacher's name."""
MODES_BEFORE: Final[Mapping[str, str]] = {"ce_only": "ce", "mean_fusion": "mean", "attn_fusion": "gate"}
"""What an older pipeline calls modes, and what they are called here."""
PACK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}-[0-9a-f]{32}\.h5\Z")
PENDING_NAME = re.compile(r"[0-9a-f]{16}\.json\Z")
NOTES_NAME = re.compile(r"[0-9a-f]{16}\.seen\Z")
SAMPLES_NAME = re.compile(r"samples-[0-9a-f]{32}\.bin\Z")
IN_PENDING = re.compile("|".join(name.pattern for name in (PENDING_NAME, NOTES_NAME, SAMPLES_NAME)))
"""What else lies beside packs and records is not ours: a copy ``x (1).h5``, ``._x`` and other systems' leftovers."""


def is_teacher_name(name: str) -> bool:
    """Letters, digits, ``_.-``, and none that is taken."""
    return bool(TEACHER_NAME.match(name)) and name.lower() not in RESERVED_NAMES


def refuse_mode(name: str, hint: str) -> None:
    """Raise `UsageError` where a new teacher would be called like a mode. Caches that have such a one keep it."""
    if name.lower() in (*MODES, *MODES_BEFORE):
        raise UsageError(f"no teacher may be called {name}: it is a --teacher-mode of kd-cache student", hint=hint)
