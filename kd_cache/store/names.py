"""What may be a teacher's name: it becomes a folder, a part of file names and a key of the index."""

from __future__ import annotations

import re

INDEX_NAME = "cache_index.json"
TEACHER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
RESERVED_NAMES = ("packs", "pending", "num_samples", "kd_cache", INDEX_NAME, "plan.json", "seen.bin")
PACK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}-[0-9a-f]{32}\.h5\Z")
PENDING_NAME = re.compile(r"[0-9a-f]{16}\.json\Z")
"""What else lies beside packs and records is not ours: a copy ``x (1).h5``, ``._x`` and other systems' leftovers."""


def is_teacher_name(name: str) -> bool:
    """Letters, digits, ``_.-``, and none that is taken."""
    return bool(TEACHER_NAME.match(name)) and name.lower() not in RESERVED_NAMES
