"""Standard output and standard error that cannot fail a run: closed, on a full disk, or without a reader."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Forgiving(io.FileIO):
    """A stream that takes everything. What the system refused is in ``lost``."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # another program made it non-blocking, and it is full
                select.select((), (self,), ())
        except OSError as error:
            self.lost = error
            return memoryview(data).nbytes
        return count


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Replace both for this process; what of standard output was lost is said at the end, with exit status 1.

    A reader that went away (``| head``) had enough of it, and is no failure.
    """
    for number in range(3):  # whatever is opened next would get a closed one's number, and hear what is printed
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    out, err = Forgiving(1, "w", closefd=False), Forgiving(2, "w", closefd=False)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(out, sys.stdout, line_buffering=out.isatty())
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(err, sys.stderr, line_buffering=True)
    status = None
    try:
        yield
    except SystemExit as end:
        status = end.code
    sys.stdout.flush()
    if out.lost is not None and out.lost.errno != errno.EPIPE:
        sys.stderr.write(f"error: what was to be printed is lost, what was done stands: {out.lost.strerror}\n")
        status = status or 1
    raise SystemExit(status)


def _text(raw: Forgiving, instead_of: TextIO | None, *, line_buffering: bool) -> TextIO:
    encoding = getattr(instead_of, "encoding", None)
    # A terminal without Unicode must not fail a finished dump.
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=line_buffering)
