"""Run every benchmark, one process each; then write their tables where ``docs/performance.md`` quotes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NAMES = ("read", "loader", "dump", "scale", "train", "student", "prepare", "topk")


def main() -> int:
    """The number of benchmarks that failed, with the arguments of this command."""
    failed = [
        name
        for name in NAMES
        if subprocess.run([sys.executable, "-m", f"benchmarks.bench_{name}", *sys.argv[1:]], check=False).returncode
    ]
    print(f"failed: {', '.join(failed)}" if failed else f"results in {Path(__file__).parent / 'results'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
