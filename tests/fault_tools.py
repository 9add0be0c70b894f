"""Running the real ``kd-cache`` hundreds of times, and breaking it: what the fault tests share.

Starting Python and torch takes seconds, so the commands run in processes that a preloaded *host* forks: the same code
from ``kd_cache.cli.main`` on, with its own arguments, folder, output and signals. The host is started with the shim of
``fault_shim.c`` in ``LD_PRELOAD``, where there is a C compiler; a `Fault` tells the shim what to break in one command.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import gc
import importlib
import json
import os
import pkgutil
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kd_cache.serve.logit_cache import LogitCache

HERE = Path(__file__).parent
TIERS = ("one", "more", "full")
TIER = os.environ.get("KD_CACHE_FAULTS", "one")
"""How many faults are drawn: one of each kind in the gate, more with `make faults`, the full numbers take hours."""
if TIER not in TIERS:
    raise ValueError(f"KD_CACHE_FAULTS is {TIER!r}, expected one of {', '.join(TIERS)}")
FULL = TIER == "full"


def often(one: int, more: int, full: int) -> int:
    """How many times, in each of the `TIERS`."""
    return (one, more, full)[TIERS.index(TIER)]


LIMIT = pytest.mark.timeout(often(600, 1800, 12 * 3600))
"""Time for one test: it stops what hangs, on a machine with much else to do as well."""
MARKS = [
    pytest.mark.faults,
    LIMIT,
    pytest.mark.skipif(sys.platform != "linux", reason="commands are followed with pidfd, which needs Linux"),
]
"""Every fault test carries these: ``pytestmark = MARKS``."""

OPERATIONS = ("open", "create", "write", "fsync", "rename", "unlink", "mkdir", "truncate", "close", "read", "list")
_HOWS = ("nothing", "error", "short", "kill before", "kill after", "signal")


Rows = dict[tuple[str, str, str], bytes]
"""The bytes of rows, by teacher, fingerprint and file."""


@dataclass(frozen=True)
class Fault:
    """What the shim does to the calls of one command below ``folder``.

    Attributes:
        record: a file that gets every call; see `fault_disk.calls`.
        at: the number of the call that is broken; -1 for none.
        how: ``error``, ``short`` (half is written, and then the disk is full), ``kill before``, ``kill after``, or
            ``signal``, which comes just before the call.
        code: the errno of an ``error``, the number of a ``signal``.
        sticky: operations to which the same happens afterwards.
    """

    folder: Path
    record: Path | None = None
    at: int = -1
    how: str = "nothing"
    code: int = 0
    sticky: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = self.how
        if self.how in ("error", "signal"):
            what = errno.errorcode[self.code] if self.how == "error" else signal.Signals(self.code).name
        return f"{what} at call {self.at}" + (", and from then on" if self.sticky else "")


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its status (minus the signal's number, if one ended it) and what it printed."""

    code: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


class Command:
    """A command that runs. Kill it, send it signals, wait for it."""

    def __init__(self, host: Host, pid: int, output: Path) -> None:
        self._host = host
        self._handle = os.pidfd_open(pid)
        self.pid = pid
        self.output = output
        self.began = time.monotonic()
        self.outcome: Outcome | None = None

    def send(self, number: signal.Signals) -> None:
        """Only before `wait`: until then the process is ours, alive or not."""
        os.kill(self.pid, number)

    def stderr(self) -> str:
        """What it has printed so far."""
        return self.output.with_suffix(".err").read_text(errors="replace")

    def ended(self, seconds: float = 0.0) -> bool:
        """Wait so long at most; whether it has ended."""
        return bool(select.select([self._handle], [], [], seconds)[0])

    def wait(self, seconds: float = 240.0) -> Outcome:
        """Its outcome, however often one asks. A command that hangs is killed, and fails the test."""
        if self.outcome is None and not self.ended(seconds):
            self.send(signal.SIGKILL)
            self.ended(10)
            pytest.fail(f"a command did not end within {seconds} s\n{self._finish()}")
        return self.outcome or self._finish()

    def _finish(self) -> Outcome:
        os.close(self._handle)
        code = os.waitstatus_to_exitcode(self._host.ask(op="reap", pid=self.pid)["status"])
        self.outcome = Outcome(code, self.output.with_suffix(".out").read_text(errors="replace"), self.stderr())
        for suffix in (".out", ".err"):
            self.output.with_suffix(suffix).unlink()
        return self.outcome


class Host:
    """The preloaded process that forks commands."""

    def __init__(self, shim: Path | None) -> None:
        self._shim = shim
        self._folder = Path(tempfile.mkdtemp(prefix="kd-cache-host-"))
        self._count = 0
        ours, theirs = socket.socketpair()
        self._socket = ours
        with theirs:
            environment = {name: value for name, value in os.environ.items() if not name.startswith("KD_CACHE")}
            environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
            if shim is not None:
                environment["LD_PRELOAD"] = str(shim)
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "fault_tools.py"), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                cwd=HERE.parent,
            )
        self._lines = ours.makefile("r")

    def ask(self, **question: Any) -> dict[str, Any]:
        self._socket.sendall(json.dumps(question).encode() + b"\n")
        line = self._lines.readline()
        assert line, "the host of the commands is gone"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(
        self,
        *arguments: object,
        cwd: Path,
        fault: Fault | None = None,
        call: str = "command",
        env: Mapping[str, str] | None = None,
    ) -> Command:
        """Start ``kd-cache`` with these arguments, or another of the `CALLS`."""
        self._count += 1
        output = self._folder / str(self._count)
        for suffix in (".out", ".err"):
            output.with_suffix(suffix).touch()  # a command may be killed before it comes to open them
        plan = None
        if fault is not None:
            assert self._shim is not None
            bits = sum(1 << OPERATIONS.index(name) for name in fault.sticky)
            how = _HOWS.index(fault.how)
            plan = [str(fault.folder), str(fault.record or ""), fault.at, how, fault.code, bits]
        answer = self.ask(
            op="start",
            call=call,
            arguments=[str(argument) for argument in arguments],
            cwd=str(cwd),
            output=str(output),
            plan=plan,
            env=dict(env or {}),
        )
        return Command(self, answer["pid"], output)

    def run(self, *arguments: object, cwd: Path, **options: Any) -> Outcome:
        """Start and wait."""
        return self.start(*arguments, cwd=cwd, **options).wait()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder)


@functools.cache
def host() -> Host:
    """The one host of this test run, with the shim where it can be built."""
    made = Host(_shim())
    atexit.register(made.close)
    return made


@functools.cache
def _shim() -> Path | None:
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="kd-cache-shim-"))
    atexit.register(shutil.rmtree, folder)
    library = folder / "shim.so"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", library, HERE / "fault_shim.c", "-ldl"],
        check=True,
    )
    return library


NEEDS_SHIM = pytest.mark.skipif(
    shutil.which("cc") is None, reason="system calls are broken by a shim, which needs a C compiler (cc)"
)


@contextlib.contextmanager
def ended_at_last(commands: list[Command]) -> Iterator[None]:
    """Kill whatever of ``commands`` nobody has waited for, also if the test fails."""
    try:
        yield
    finally:
        for command in commands:
            if command.outcome is None:
                command.send(signal.SIGKILL)
                command.wait()


# -- in the host ------------------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> None:
    """Fork what is asked for, until the other side hangs up."""
    _preload()
    children: set[int] = set()
    with connection, connection.makefile("r") as lines:
        for line in lines:
            question = json.loads(line)
            if question["op"] == "reap":
                children.discard(question["pid"])
                answer = {"status": os.waitpid(question["pid"], 0)[1]}
            else:
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    _become(question)
                children.add(pid)
                answer = {"pid": pid}
            connection.sendall(json.dumps(answer).encode() + b"\n")
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _preload() -> None:
    """Import what a command imports, and let torch start what it starts once."""
    import torch
    import typer.main

    torch.set_num_threads(1)
    typer.main.get_command = functools.cache(typer.main.get_command)  # what the options are, made once for all
    importlib.import_module("tiny_teachers")
    importlib.import_module("kd_cache")
    for module in pkgutil.walk_packages(sys.modules["kd_cache"].__path__, "kd_cache."):
        if not module.name.endswith(".__main__"):  # that one is a command
            importlib.import_module(module.name)
    # What is imported when a command line is parsed, and when an error is told.
    with Path(os.devnull).open("w") as silent, contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        sys.argv = ["kd-cache", "dump", "--target", "b", "--json-path", os.devnull]
        _status_of(_command)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()
    gc.freeze()


def _become(question: Mapping[str, Any]) -> None:
    """In the forked process: be that command, and end as it ends."""
    status = 70
    try:
        for number, suffix in ((1, ".out"), (2, ".err")):
            file = os.open(question["output"] + suffix, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, number)
            os.close(file)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
        os.chdir(question["cwd"])
        os.environ.update(question["env"])
        if question["plan"]:
            _configure_shim(*question["plan"])
        sys.argv = ["kd-cache", *question["arguments"]]
        status = _status_of(CALLS[question["call"]])
    except BaseException as error:  # noqa: BLE001 (as the interpreter does at its end)
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined] # as the interpreter does at its end: it joins threads
        os._exit(status)


def _status_of(call: Callable[[], object]) -> int:
    try:
        call()
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    return 0


def _configure_shim(folder: str, record: str, at: int, how: int, code: int, sticky: int) -> None:
    library = ctypes.CDLL(None)
    library.kd_fault_configure(folder.encode(), record.encode(), ctypes.c_long(at), how, code, ctypes.c_ulong(sticky))


def _command() -> None:
    from kd_cache.cli import main

    main()


def _reader() -> None:
    """A student's process: open the cache and read all of it, again and again, until the file ``stop`` is there.

    Once it has read anything, the file ``ready`` is there.
    """
    _, cache, right_rows, stop, ready, pause = sys.argv
    tally = read_until(Path(cache), load_rows(Path(right_rows)), Path(stop).exists, Path(ready).touch, float(pause))
    print(json.dumps(vars(tally)))


CALLS: dict[str, Callable[[], object]] = {"command": _command, "reader": _reader}
"""What a forked process can be."""


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a reader saw: rounds in which it read, rows it was served, wrong ones, errors by their type.

    ``sets`` are the different sets of rows it was served: how many samples, made by which teachers.
    """

    rounds: int = 0
    rows: int = 0
    wrong: list[str] = field(default_factory=list)
    sets: list[list[Any]] = field(default_factory=list)
    unfinished: int = 0
    errors: dict[str, int] = field(default_factory=dict)


def read_until(cache: Path, right: Rows, done: Callable[[], bool], ready: Callable[[], None], pause: float) -> Tally:
    """Open a cache and read all of it until it is ``done``, and once more: what is there at the end is always read.

    ``ready`` is called after each reading. A typed error is counted, anything else ends the reader.
    """
    from kd_cache.errors import KDCacheError
    from kd_cache.serve.logit_cache import LogitCache

    tally, last = Tally(), False
    while not last:
        time.sleep(pause)
        last = done()
        finished = (cache / "cache_index.json").exists()
        try:
            opened = LogitCache.open(cache)
        except KDCacheError as error:
            if finished:
                name = f"{type(error).__name__}: {error}"
                tally.errors[name] = tally.errors.get(name, 0) + 1
            tally.unfinished += not finished
            continue
        count, wrong = compare(opened, right)
        tally.rounds += 1
        tally.rows += count
        tally.wrong += wrong
        if (served := [len(opened), opened.fingerprints]) not in tally.sets:
            tally.sets.append(served)
        ready()
    return tally


def compare(opened: LogitCache, right: Rows) -> tuple[int, list[str]]:
    """How many rows a reader serves, and which of them are not the right ones."""
    files, made_by = opened.files, opened.fingerprints
    logits = opened.batch(files).numpy()
    wrong = [
        f"{teacher}: {file}"
        for number, file in enumerate(files)
        for teacher, row in zip(opened.teachers, logits[number], strict=True)
        if row.tobytes() != right.get((teacher, made_by[teacher], file))
    ]
    return int(logits.shape[0] * logits.shape[1]), wrong


@contextlib.contextmanager
def readers(count: int, cache: Path, right: Rows, folder: Path) -> Iterator[list[Tally]]:
    """So many processes that read a cache meanwhile; what they saw is in the list at the end. Each read is right.

    A cache that has an index must open, whatever happens to it. Where it is there from the beginning, all of them have
    read it once before anything else happens; and all read it once more at the end.
    """
    save_rows(folder / "right.json", right)
    stop, ready = folder / "stop", [folder / f"ready-{number}" for number in range(count)]
    for path in (stop, *ready):
        path.unlink(missing_ok=True)
    asked = (cache, folder / "right.json", stop)
    pause = 0.02 * count  # they must leave the others some of the machine
    running = [host().start(*asked, path, pause, cwd=folder, call="reader") for path in ready]
    tallies: list[Tally] = []
    with ended_at_last(running):
        if (cache / "cache_index.json").exists():
            _wait_for(ready, running)
        yield tallies
        stop.touch()
        for reader in running:
            outcome = reader.wait()
            assert outcome.code == 0, outcome
            tallies.append(Tally(**json.loads(outcome.stdout)))
    for tally in tallies:
        assert not tally.wrong, f"wrong rows were served: {tally.wrong[:5]}"
        assert not tally.errors, f"a finished cache did not open: {tally.errors}"


def _wait_for(paths: list[Path], running: list[Command]) -> None:
    """Until these files are there, or one of the commands that make them has ended."""
    began = time.monotonic()
    while not all(path.exists() for path in paths):
        if time.monotonic() - began > 120 or any(command.ended(0.01) for command in running):
            pytest.fail(f"readers do not read: {[command.stderr() for command in running]}")


def save_rows(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps([[*key, row.hex()] for key, row in rows.items()]))


def load_rows(path: Path) -> Rows:
    return {(name, made_by, file): bytes.fromhex(row) for name, made_by, file, row in json.loads(path.read_text())}


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
