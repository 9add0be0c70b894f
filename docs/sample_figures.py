"""Print the table of data/sample/README.md: ``python docs/sample_figures.py outputs/sample outputs/shuffled``."""

import json
import sys
from pathlib import Path

TARGETS = ("b", "c", "s1", "s2", "s3")
ROLES = {"city": "city", "city2scene": "City2Scene", "scene": "scene"}


def results(root: Path, role: str, target: str) -> dict:
    """Of the newest finished run."""
    place = "global" if role == "scene" else f"A2{target}"
    return json.loads(max(root.glob(f"teacher_{role}/{place}/runs/*/results.json")).read_text())


def accuracy(root: Path, role: str, target: str, device: str) -> float:
    """In per cent, over the device's test clips."""
    return 100 * results(root, role, target)["test"]["by"]["device"][device]["accuracy"]


def main(true: Path, shuffled: Path) -> None:
    columns = [f"{labels} labels, {where} test" for labels in ("true", "shuffled") for where in ("A", "target")]
    print(f"| target | teacher | {' | '.join(columns)} | chance |")
    print("|---" * (len(columns) + 3) + "|")
    for target in TARGETS:
        for role, name in ROLES.items():
            cells = [accuracy(root, role, target, device) for root in (true, shuffled) for device in ("A", target)]
            chance = 100 * results(true, role, target)["chance"]
            print(f"| {target} | {name} | {' | '.join(f'{cell:.0f}' for cell in cells)} | {chance:.0f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
