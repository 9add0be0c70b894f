"""A child process in which the real command meets hostile files: 5 seconds, 512 MB, and every change is noticed.

Seconds are those of the processor, so that a machine with much else to do changes no verdict; a child that waits for
something that never comes is stopped all the same, after `WAITING`.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from kd_cache.cli import app, console
from kd_cache.errors import KDCacheError

SECONDS = 5
WAITING = 100
MEMORY = 512 << 20
"""Beyond what the process with torch imported has already."""
_LARGE = 1 << 22


Work = Callable[[], dict[str, Any]]
Job = tuple[Sequence[Work], Path]
"""Pieces of work, one after the other, and the current folder meanwhile."""


@dataclass
class Outcome:
    """What came out of a child.

    ``code`` is the exit status, ``kind`` the type of the error that was reported or raised, ``value`` what a piece of
    Python returned; ``grown`` the bytes of memory (resident) it took at most beyond what it began with.
    """

    code: int = -1
    kind: str | None = None
    stdout: str = ""
    stderr: str = ""
    value: Any = None
    seconds: float = 0.0
    grown: int = 0
    killed: str | None = None

    @property
    def said(self) -> str:
        return self.stdout + self.stderr


def command(*args: object) -> Work:
    """Run ``kd-cache``, and note the type of the error behind its message."""

    def work() -> dict[str, Any]:
        kinds: list[str] = []
        genuine = console._tell_error

        def noting(kind: str, *told: Any, **how: Any) -> None:
            kinds.append(kind)
            genuine(kind, *told, **how)

        console._tell_error = noting
        try:
            result = CliRunner().invoke(app, [str(arg) for arg in args], prog_name="kd-cache")
        finally:
            console._tell_error = genuine
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return {
            "code": result.exit_code,
            "kind": kinds[-1] if kinds else None,
            "stdout": result.stdout,
            "stderr": result.stderr,
        }

    return work


def python(call: Callable[[], Any]) -> Work:
    """Run a piece of Python; an error of ours has its exit code, anything else escapes."""

    def work() -> dict[str, Any]:
        try:
            return {"code": 0, "value": call()}
        except KDCacheError as error:
            return {"code": error.exit_code, "kind": type(error).__name__, "stderr": str(error)}

    return work


def fenced(work: Work, folder: Path, seconds: float = SECONDS, waiting: float = WAITING) -> Outcome:
    """The one outcome of one piece of work: see `each_fenced`."""
    ((outcome,),) = each_fenced([([work], folder)], seconds, waiting)
    return outcome


def all_fenced(works: Sequence[Work], folder: Path) -> list[Outcome]:
    """The outcomes of one job: see `each_fenced`."""
    (outcomes,) = each_fenced([(works, folder)])
    return outcomes


def each_fenced(jobs: Sequence[Job], seconds: float = SECONDS, waiting: float = WAITING) -> list[list[Outcome]]:
    """Do the jobs one after the other in a child process; each has the outcomes of its own works.

    The child is killed if one piece of work takes so many seconds, and no allocation beyond `MEMORY` succeeds. An
    error that a piece of work does not handle is its outcome's ``kind``, with ``killed`` set to ``"escaped"``. The last
    outcome of a job in which the child died says of what; a new child does the jobs that are left.
    """
    done: list[list[Outcome]] = []
    while len(done) < len(jobs):
        done += _in_a_child(jobs[len(done) :], seconds, waiting)
    return done


def _in_a_child(jobs: Sequence[Job], seconds: float, waiting: float) -> list[list[Outcome]]:
    """The outcomes of the jobs up to the one at which the child died."""
    said = os.memfd_create("said")
    receiving, sending = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _be_the_child(jobs, seconds, waiting, sending, said)
    os.close(sending)
    done: list[list[Outcome]] = [[]]
    with os.fdopen(receiving, "rb") as pipe:
        for line in pipe:
            told = json.loads(line)
            if isinstance(told, str):  # the end of a job, and what was printed past Python's own streams
                done[-1][-1].stderr += told
                done.append([])
            else:
                done[-1].append(Outcome(**told))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        last = os.pread(said, _LARGE, 0).decode("utf-8", "replace")
        done[-1].append(Outcome(killed=signal.Signals(os.WTERMSIG(status)).name, stderr=last))
    elif len(done) <= len(jobs):
        done[-1].append(Outcome(killed="ended by itself"))
    os.close(said)
    return done[: len(jobs)]


def _be_the_child(jobs: Sequence[Job], seconds: float, waiting: float, sending: int, said: int) -> None:
    """Never returns: what pytest would do at the end of its process is not done twice."""
    try:
        _put_up_the_fence(said)
        with os.fdopen(sending, "wb") as pipe:

            def tell(what: object) -> None:
                pipe.write(json.dumps(what).encode() + b"\n")
                pipe.flush()

            for works, folder in jobs:
                _enter(folder, said)
                for work in works:
                    signal.setitimer(signal.ITIMER_PROF, seconds)
                    signal.setitimer(signal.ITIMER_REAL, waiting)
                    tell(_done(work))
                sys.stdout.flush()
                sys.stderr.flush()
                tell(os.pread(said, _LARGE, 0).decode("utf-8", "replace"))
    finally:
        os._exit(0)


def _done(work: Work) -> dict[str, Any]:
    with suppress(OSError):  # where it is refused, a job is charged with the most that an earlier one took
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most memory there ever was, is counted anew
    before = _memory("VmRSS")
    began = time.process_time()
    try:
        made = work()
    except BaseException as error:  # noqa: BLE001 (it is reported, and the test fails)
        made = {"kind": type(error).__name__, "stderr": repr(error), "killed": "escaped"}
    return made | {"seconds": time.process_time() - began, "grown": _memory("VmHWM") - before}


def _put_up_the_fence(said: int) -> None:
    gc.freeze()  # pytest's many objects are not this child's business
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    for stream in (1, 2):
        os.dup2(said, stream)
    for name in [name for name in os.environ if name.startswith("KD_CACHE_") or name == "FORCE_COLOR"]:
        del os.environ[name]
    warnings.resetwarnings()
    warnings.showwarning = _print_warning
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _enter(folder: Path, said: int) -> None:
    """Begin a job: in its folder, with nothing printed yet and all of the memory to take."""
    os.chdir(folder)
    os.environ |= {"HOME": str(folder), "TMPDIR": str(folder), "COLUMNS": "200"}
    tempfile.tempdir = None
    os.ftruncate(said, 0)
    os.lseek(said, 0, os.SEEK_SET)
    gc.collect()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + MEMORY, most))


def _print_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """As Python does it; pytest collects them, and no one would see what a user sees."""
    sys.stderr.write(f"{category.__name__}: {message}\n")


def _memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def picture(folder: Path, without: str | None = None) -> dict[str, tuple[Any, ...]]:
    """Everything below a folder: kind and mode, and the bytes (of a large file: size and time; of a link: its end).

    ``without`` names an entry of the folder to leave out.
    """
    found: dict[str, tuple[Any, ...]] = {}
    waiting = [str(folder)]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            name = os.path.relpath(entry.path, folder)
            if name == without:
                continue
            status = entry.stat(follow_symlinks=False)
            content: Any = None
            if entry.is_symlink():
                content = str(Path(entry.path).readlink())
            elif stat.S_ISDIR(status.st_mode):
                waiting.append(entry.path)
            elif stat.S_ISREG(status.st_mode):
                content = _content(entry.path, status)
            found[name] = (status.st_mode, content)
    return found


def _content(path: str, status: os.stat_result) -> Any:
    if status.st_size > _LARGE:
        return status.st_size, status.st_mtime_ns
    with open(path, "rb") as file:
        return file.read()
