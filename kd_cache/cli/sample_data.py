"""``kd-cache sample-data``: write the embedded sample's manifest and features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kd_cache.cli import options as opt
from kd_cache.cli.console import Screen, reporting_errors
from kd_cache.errors import shown


@reporting_errors
def sample_data_command(
    out: Annotated[Path, typer.Argument(help="Folder to write dataset.json and features/ into.")],
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Generate the synthetic sample: 10 scenes, 10 cities, 9 devices, equal bytes on any machine."""
    from kd_cache.sample_data import write_sample

    with Screen(quiet=False, as_json=as_json) as screen:
        write_sample(out)
        count = sum(1 for _ in (out / "features").glob("*.npy"))
        screen.result(f"{count:,} features and dataset.json written to {shown(out)}")
        screen.result_json({"path": str(out), "features": count})
