"""The older path of `own_teacher`."""

from __future__ import annotations

from teachers.loading import OwnTeacher, own_teacher

__all__ = ["OwnTeacher", "own_teacher"]
