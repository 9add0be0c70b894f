"""Errors of torch's in the middle of a training, in words, with what to do about them."""

from __future__ import annotations

from kd_cache.errors import KDCacheError, TeacherError, TrainingError, shown
from kd_cache.score.engine import is_out_of_memory
from kd_cache.train.settings import Settings


def foreseen(error: Exception, settings: Settings) -> KDCacheError | None:
    """What a person can do about an error of torch's; ``None`` for one that nobody foresaw."""
    first = (shown(error).splitlines() or [""])[0]
    if is_out_of_memory(error):
        return TrainingError(
            f"there is not enough memory for batches of {settings.batch_size} clips ({first})",
            hint="Give a smaller --batch-size, with --accumulate if the steps are to stay as large.",
        )
    if "more than 1 value per channel" in str(error):
        return TrainingError("batch norm learns nothing from a batch of one clip", hint="Give --batch-size 2 or more.")
    if settings.deterministic and "deterministic" in str(error):
        return TrainingError(
            f"this device cannot repeat this net's training to the bit: {first}",
            hint="Leave out --deterministic, or train on the CPU.",
        )
    if settings.compile and type(error).__module__.startswith("torch._"):
        return TrainingError(
            f"torch.compile failed: {type(error).__name__}: {first}",
            hint="It needs a C++ compiler; or leave out --compile.",
        )
    if ":" in settings.arch:
        return TeacherError(
            f"{shown(settings.arch)} failed: {type(error).__name__}: {first}",
            hint="It gets features [B, T, F], of one shape in a batch. Run again with --debug to see where it failed.",
        )
    return None
