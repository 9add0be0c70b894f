"""Standard output and error that are closed, full or without a reader: the work is done all the same."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import TINY, World

from kd_cache.cli.streams import Forgiving

KD_CACHE = Path(sys.executable).with_name("kd-cache")


def shell(line: str, *args: object) -> subprocess.CompletedProcess[str]:
    """``$KD "$@"`` and redirections, as a shell has them."""
    environment = os.environ | {"KD": str(KD_CACHE), "PYTHONPATH": str(Path(__file__).parent)}
    command = ["bash", "-c", line, "bash", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ('"$KD" "$@" <&- >&- 2>&-', 0, ""),
        ('"$KD" "$@" 2>/dev/full >&2', 1, ""),
        ('"$KD" "$@" >/dev/full', 1, "what was to be printed is lost, what was done stands: No space left"),
        ('"$KD" "$@" 2>&1 | true; exit ${PIPESTATUS[0]}', 0, ""),
    ],
)
def test_a_dump_is_finished_whatever_becomes_of_its_output(world: World, line: str, code: int, says: str) -> None:
    root = world.root / "cache"
    data = ("--target", "b", "--json-path", world.json_path, "--cache-root", root)
    done = shell(line, "dump", *data, *TINY, "--only", "tiny")
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert (world.cache / "cache_index.json").is_file()


def test_an_error_keeps_its_status_where_nobody_hears_it() -> None:
    assert shell('"$KD" "$@" >/dev/full 2>/dev/full', "verify", "--cache-root", "nowhere").returncode == 3
    lost = shell('"$KD" "$@" >/dev/full', "--version")
    assert (lost.returncode, lost.stderr.startswith("error: what was to be printed is lost")) == (1, True)


def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    content, found = os.urandom(1 << 18), bytearray()

    def read() -> None:
        while part := os.read(reading, 1 << 12):
            found.extend(part)

    reader = threading.Thread(target=read)
    with Forgiving(writing, "w") as stream:
        count = stream.write(content)
        reader.start()
        while count < len(content):
            count += stream.write(content[count:])
    reader.join(60)
    os.close(reading)
    assert (bytes(found), stream.lost) == (content, None)
