"""``make gpu`` is ready for whoever has a GPU: its dry run on the CPU passes, and says what it could not check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO

from benchmarks.gpu_checks import CPU, FAILED, PASSED, SKIPPED, Checks, agreement, run_all

NEEDS_CUDA = {"dump, cp_resnet, tf32", "training, tf32", "training, fp16", "dump --ray local"}


def test_the_dry_run_passes_and_skips_only_what_needs_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--dry-run", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "gpu.json").read_text())
    results = {each["check"]: each["result"] for each in content["checks"]}
    assert {name for name, result in results.items() if result == SKIPPED} == NEEDS_CUDA
    assert all(results[name] == PASSED for name in results.keys() - NEEDS_CUDA)
    assert content["dry_run"] is True
    assert "dry run" in content["device"]


def test_a_check_that_fails_is_told_and_keeps_none_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = Checks(CPU, tmp_path, dry=True)

    def broken() -> str:
        agreement(np.ones((2, 1, 3)), np.zeros((2, 1, 3)) + 2, 1e-3)
        return ""

    monkeypatch.setattr(checks, "table", lambda: iter([("one", broken), ("two", lambda: "fine")]))
    one, two = run_all(checks, until=float("inf"))
    assert (one.result, two.result) == (FAILED, PASSED)
    assert "differs by 5.0e-01" in one.figures
    late = run_all(checks, until=float("-inf"))
    assert [each.result for each in late] == [SKIPPED, SKIPPED]
