"""Every error kd-cache raises on purpose, in one tree.

    KDCacheError                       exit 1   something went wrong; the message says what to do
    ├── UsageError (ValueError)        exit 2   an option, a setting or a call that makes no sense
    │   ├── ManifestError              exit 2   the dataset JSON cannot be read without guessing
    │   └── UnfitError                 exit 2   nothing is held out that teachers' weights could be fitted on
    ├── MissingLogitsError (KeyError)  exit 3   a sample that should be cached is not
    ├── CorruptError (ValueError)      exit 4   stored bytes are not the bytes that were written
    ├── StaleError (ValueError)        exit 5   stored logits were made by something else than asked for
    ├── DataLeakageError (ValueError)  exit 6   a sample that must never be scored, cached or distilled
    ├── CheckpointError (ValueError)   exit 1   a teacher's weights cannot be loaded safely and completely
    ├── TeacherError (ValueError)      exit 1   a teacher broke its contract (shape, finiteness, kind)
    ├── TrainingError (RuntimeError)   exit 1   a teacher's training diverged, or changed what was frozen
    ├── FeatureError (ValueError)      exit 1   a feature file is missing, malformed or not finite
    └── StoreError (OSError)           exit 1   the cache could not be written or read
        └── ChangedError               exit 1   a file at an URL is not the one that was counted on

Each also inherits the builtin that a caller would catch. The command line turns ``exit_code`` into the
process's exit status; when several kinds of problem occur at once, 6 > 4 > 5 > 3 (``worst_exit_code``).
"""

from __future__ import annotations

from collections.abc import Iterable


class KDCacheError(Exception):
    """Base class. ``message`` says what was expected and found; ``hint`` what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # DataLoader workers send errors by pickle; a keyword-only argument needs help to survive that.
        return _rebuild, (type(self), self.message, self.hint)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


def _rebuild(kind: type[KDCacheError], message: str, hint: str | None) -> KDCacheError:
    return kind(message, hint=hint)


class UsageError(KDCacheError, ValueError):
    exit_code = 2


class ManifestError(UsageError):
    pass


class UnfitError(UsageError):
    pass


class MissingLogitsError(KDCacheError, KeyError):
    exit_code = 3
    __str__ = KDCacheError.__str__  # KeyError would print the repr


class CorruptError(KDCacheError, ValueError):
    exit_code = 4


class StaleError(KDCacheError, ValueError):
    exit_code = 5


class DataLeakageError(KDCacheError, ValueError):
    exit_code = 6


class CheckpointError(KDCacheError, ValueError):
    pass


class TeacherError(KDCacheError, ValueError):
    pass


class TrainingError(KDCacheError, RuntimeError):
    pass


class FeatureError(KDCacheError, ValueError):
    pass


class StoreError(KDCacheError, OSError):
    __str__ = KDCacheError.__str__

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno, self.strerror = None, message  # OSError takes its two arguments for an errno and a reason


class ChangedError(StoreError):
    pass


def worst_exit_code(codes: Iterable[int]) -> int:
    """The one exit status that stands for several problems: 6 > 4 > 5 > 3 > 2 > 1 > any other, and 0 for none."""
    found = set(codes)
    return next((code for code in (6, 4, 5, 3, 2, 1) if code in found), max(found, default=0))


MOST_SHOWN = 4096  # characters; no path is longer


def shown(name: object) -> str:
    """``name`` as it may be printed: terminal escapes, control characters and lone surrogates are escaped.

    The middle of a text that is too long to be any path is left out: a message must stay readable.
    """
    try:
        text = str(name)
    except Exception:  # noqa: BLE001 (an error of somebody's own that cannot say what it is)
        text = f"a {type(name).__name__} without a text"
    if len(text) > MOST_SHOWN:
        text = f"{text[: MOST_SHOWN // 2]} … {text[-MOST_SHOWN // 4 :]} ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def listed(names: Iterable[object], *, total: int | None = None, most: int = 20) -> str:
    """One name a line, the first ``most`` of them, then how many more there are."""
    kept = list(names)
    total = len(kept) if total is None else total
    lines = [f"  {shown(name)}" for name in kept[:most]]
    if total > len(lines):
        lines.append(f"  … and {total - len(lines)} more ({total} in all)")
    return "\n".join(lines)
