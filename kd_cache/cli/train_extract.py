"""What ``kd-cache train extract`` does, once its options are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from kd_cache.cli.console import Screen
from kd_cache.cli.dump_run import dump_and_report
from kd_cache.cli.inputs import inputs_of
from kd_cache.cli.saved import run_record
from kd_cache.cli.teachers import described
from kd_cache.errors import UsageError, shown
from kd_cache.store.index import is_teacher_name
from kd_cache.teacher import TeacherSpec


def run_extract(ctx: typer.Context) -> None:
    """Guard, load, embed, verify, report. Exits with the command's status if that is not 0."""
    options = ctx.params
    with Screen(quiet=options["quiet"], as_json=options["as_json"]) as screen:
        inputs = inputs_of(options["target"], options)
        from kd_cache.dump import DumpJob
        from kd_cache.pipeline.device import resolve_device
        from kd_cache.train.checkpoint_file import checkpoint_limit
        from teachers.embeddings import FOLDER

        with checkpoint_limit(options["max_checkpoint_bytes"]):
            specs, sources = _sources(options["checkpoint"])
        job = DumpJob(
            cache_root=options["output_dir"] / FOLDER,
            manifest=inputs.manifest,
            selection=inputs.selection,
            source=inputs.source,
            teachers=sources,
            device=resolve_device(options["device"]),
            files=False,
            workers=options["workers"],
            notes={spec.name: {"source": described(spec, sources[spec.name])} for spec in specs},
            record=run_record(ctx, inputs),
        )
        code, content = dump_and_report(job, 10, screen)
        screen.result("", f"Embeddings: {', '.join(f'--embeddings {name}' for name in sources)}")
        screen.result_json({**content, "embeddings": list(sources)})
    if code:
        raise typer.Exit(code)


def _sources(texts: list[str]) -> tuple[list[TeacherSpec], dict[str, Any]]:
    """What to embed with: where it is from, and loaded, by name."""
    from teachers.embeddings import EmbeddingTeacher, source_name
    from teachers.loading import load_teacher

    specs, found = [], {}
    for text in texts:
        name, named, rest = text.partition("=")
        path = Path(rest if named else text).expanduser()
        teacher = load_teacher(path)
        name = name if named else source_name(teacher)
        if not is_teacher_name(name):
            raise UsageError(f"--checkpoint {shown(text)}: {shown(name)} cannot be a name (letters, digits, _ . -)")
        if name in found:
            raise UsageError(f"two sources are called {name}; give --checkpoint NAME=PATH another NAME")
        specs.append(TeacherSpec(name, "", path))
        found[name] = EmbeddingTeacher(teacher)
    return specs, found
