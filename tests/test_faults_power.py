"""Real disks that fail: the power is cut under a command, and only what was really kept comes back; or it is full."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_checks import (
    Scenario,
    acknowledged_samples,
    check_after,
    check_outcome,
    check_rows,
    check_same,
    check_served,
    complete_samples,
    make_place,
    make_scenario,
    temporaries,
)
from fault_tools import MARKS, Fault, ended_at_last, host, often

pytestmark = MARKS

SEED = 20261121
SIZES = {"ext4": 64 << 20, "xfs": 320 << 20}
_SHUT_DOWN = 0x8004587D  # FS_IOC_SHUTDOWN of ext4, XFS_IOC_GOINGDOWN of XFS
_WITHOUT_THE_LOG = 2  # what the journal has not written yet is gone


class Volume:
    """A file system in an image of its own, mounted on a folder."""

    def __init__(self, kind: str, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder
        with image.open("wb") as file:
            file.truncate(SIZES[kind])
        quiet = ("-q", "-F") if kind == "ext4" else ("-q", "-f")
        _call(f"mkfs.{kind}", *quiet, image)
        self.mount()

    def mount(self) -> None:
        _call("mount", "-o", "loop", self.image, self.folder)
        shutil.rmtree(self.folder / "lost+found", ignore_errors=True)

    def unmount(self) -> None:
        for _ in range(100):  # a killed process may hold a file for a moment longer
            done = subprocess.run(["umount", self.folder], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
            time.sleep(0.05)
        raise OSError(f"cannot unmount {self.folder}: {done.stderr}")

    def cut_power(self) -> None:
        """From now on nothing reaches the disk."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUT_DOWN, struct.pack("I", _WITHOUT_THE_LOG))
        finally:
            os.close(descriptor)


def _call(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip()}")


@contextmanager
def mounted(kind: str, image: Path, folder: Path) -> Iterator[Volume]:
    """A volume, or a skip that says why there is none."""
    missing = [name for name in ("mount", "umount", "losetup", f"mkfs.{kind}") if shutil.which(name) is None]
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("power cuts need Linux and root, to mount an image")
    if missing:
        pytest.skip(f"power cuts on {kind} need {', '.join(missing)}")
    try:
        volume = Volume(kind, image, folder)
    except OSError as error:
        pytest.skip(f"an image of {kind} cannot be mounted here: {error}")
    try:
        yield volume
    finally:
        volume.unmount()
        image.unlink()


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_a_power_cut_at_a_random_moment_costs_nothing_acknowledged(kind: str, tmp_path: Path) -> None:
    draw = random.Random(f"{SEED} {kind}")  # noqa: S311 (moments, not a secret)
    place = make_place(tmp_path, source=20, target=12)
    names = ("dump", "seal", "rescoring", "part")[: often(1, 2, 4)]
    with mounted(kind, tmp_path / "image", place.disk) as volume:
        scenarios = [make_scenario(place, name) for name in names]
        seconds = [_seconds(scenario) for scenario in scenarios]
        cuts, early, number, said, kept = often(1, 4, 100), 0, 0, 0, 0
        while early < cuts:
            which = number % len(scenarios)
            found, complete, ended = cut_once(volume, scenarios[which], draw.uniform(0, seconds[which]))
            if ended:  # it takes less than it took at first
                seconds[which] *= 0.8
            said, kept, early, number = said + found, kept + complete, early + (not ended), number + 1
            assert number < 20 * cuts, "no cut hits a run"
    print(
        f"\n{kind}, seed {SEED}: {early} cuts within a run, {number - early} after its end; {said} samples "
        f"acknowledged, {kept} kept, 0 lost"
    )


def _seconds(scenario: Scenario) -> float:
    """How long it takes on this disk."""
    scenario.set_up()
    os.sync()
    began = time.monotonic()
    scenario.place.finish(scenario.arguments)
    return time.monotonic() - began


def cut_once(volume: Volume, scenario: Scenario, moment: float) -> tuple[int, int, bool]:
    """Cut the power at a moment of a run, mount again, check, resume.

    Returns the samples the command said were saved, those that are complete, and whether it had ended before the cut.
    """
    place = scenario.place
    scenario.set_up()
    _sync(volume.folder)
    command = host().start(*scenario.arguments, cwd=place.root)
    with ended_at_last([command]):
        ended = command.ended(moment)
        volume.cut_power()
        if not command.ended(10):
            command.send(signal.SIGKILL)
        outcome = command.wait()
    volume.unmount()
    volume.mount()
    cut = f"power cut after {moment:.3f} s"
    said, complete = check_after(scenario, outcome, cut, left=True, durable=True)
    return said, complete, ended


def _sync(folder: Path) -> None:
    """What was there before the command is on the disk for good."""
    _call("sync", "-f", folder)


def test_a_disk_that_is_really_full_is_named_and_the_dump_goes_on_when_there_is_room(tmp_path: Path) -> None:
    scenario = make_scenario(make_place(tmp_path, source=8, target=4), "dump")
    place = scenario.place
    for kilobytes in range(8, 124, often(60, 20, 4)):
        with memory_disk(place.disk, kilobytes):
            outcome = place.run(*scenario.arguments)
            assert outcome.code == 1, outcome
            check_outcome(outcome, Fault(place.disk, how="short"))
            rows = check_rows(place.cache, place.right, {})
            assert acknowledged_samples(outcome.stderr) <= complete_samples(rows)
            assert not temporaries(place.disk)
            check_served(place.cache, place.right)
            _call("mount", "-o", "remount,size=16m", place.disk)
            check_same(place.finish(scenario.arguments), scenario.after)


@contextmanager
def memory_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """So much room and no more, or a skip that says why not."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small disk needs Linux and root, to mount a tmpfs")
    shutil.rmtree(folder)
    folder.mkdir()
    try:
        _call("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder)
    except OSError as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {error}")
    try:
        yield
    finally:
        _call("umount", folder)
