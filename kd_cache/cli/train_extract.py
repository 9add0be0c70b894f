"""What ``kd-cache train extract`` does, once its options are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from kd_cache.cli.console import Screen
from kd_cache.cli.dump_run import dump_and_report
from kd_cache.cli.inputs import load_inputs
from kd_cache.cli.saved import run_record
from kd_cache.errors import UsageError, shown
from kd_cache.store.index import is_teacher_name


def run_extract(ctx: typer.Context) -> None:
    """Guard, load, embed, verify, report. Exits with the command's status if that is not 0."""
    options = {name: _at_home(value) for name, value in ctx.params.items()}
    with Screen(quiet=options["quiet"], as_json=options["as_json"]) as screen:
        inputs = load_inputs(
            options["target"],
            options["json_path"],
            options["data_root"],
            options["features"],
            num_scenes=options["num_scenes"],
            num_cities=options["num_cities"],
            allow_shared_locations=options["allow_shared_locations"],
            allow_outside=options["allow_outside"],
            max_manifest_bytes=options["max_manifest_bytes"],
            max_feature_bytes=options["max_feature_bytes"],
        )
        from kd_cache.dump import DumpJob
        from kd_cache.pipeline.device import resolve_device
        from teachers.checkpoint_file import checkpoint_limit
        from teachers.training.embeddings import FOLDER

        with checkpoint_limit(options["max_checkpoint_bytes"]):
            sources = _sources(options["checkpoint"])
        job = DumpJob(
            cache_root=options["output_dir"] / FOLDER,
            manifest=inputs.manifest,
            selection=inputs.selection,
            source=inputs.source,
            teachers={name: teacher for name, (teacher, _) in sources.items()},
            device=resolve_device(options["device"]),
            files=False,
            workers=options["workers"],
            notes={name: {"source": _described(teacher, path)} for name, (teacher, path) in sources.items()},
            record=run_record(ctx, inputs),
        )
        code, content = dump_and_report(job, 10, screen)
        screen.result("", f"Embeddings: {', '.join(f'--embeddings {name}' for name in sources)}")
        screen.result_json({**content, "embeddings": list(sources)})
    if code:
        raise typer.Exit(code)


def _sources(texts: list[str]) -> dict[str, tuple[Any, Path]]:
    """What to embed with, by name."""
    from teachers.checkpoint import load_teacher
    from teachers.training.embeddings import EmbeddingTeacher, source_name

    found: dict[str, tuple[Any, Path]] = {}
    for text in texts:
        name, named, rest = text.partition("=")
        path = Path(rest if named else text).expanduser()
        teacher = load_teacher(path)
        name = name if named else source_name(teacher)
        if not is_teacher_name(name):
            raise UsageError(f"--checkpoint {shown(text)}: {shown(name)} cannot be a name (letters, digits, _ . -)")
        if name in found:
            raise UsageError(f"two sources are called {name}; give --checkpoint NAME=PATH another NAME")
        found[name] = (EmbeddingTeacher(teacher), path)
    return found


def _described(teacher: Any, path: Path) -> dict[str, Any]:
    return {
        "built_in": False,
        "checkpoint": str(path.absolute()),
        "checkpoint_sha256": teacher.checkpoint_sha256,
        "read_from": teacher.source,
    }


def _at_home(value: Any) -> Any:
    """Paths from a file or the environment may start with ``~``, which no shell has replaced there."""
    if isinstance(value, list | tuple):
        return [_at_home(item) for item in value]
    return value.expanduser() if isinstance(value, Path) else value
