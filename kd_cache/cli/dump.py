"""``kd-cache dump``: score a training set with every teacher, once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kd_cache
from kd_cache.cli import options as opt
from kd_cache.cli.config import given, resolved_settings
from kd_cache.cli.console import Screen, reporting_errors, size, table
from kd_cache.cli.inputs import Inputs, data_paths, load_inputs
from kd_cache.cli.report import problem_table, verify_table
from kd_cache.cli.teachers import load_teachers, teacher_specs
from kd_cache.errors import StoreError, shown, worst_exit_code
from kd_cache.teacher import TeacherSpec

if TYPE_CHECKING:
    from kd_cache.dump import DumpJob, DumpReport
    from kd_cache.verify import VerifyReport

EXAMPLES = """Examples:

kd-cache dump --target b

kd-cache dump --target s1 --json-path dataset.json --data-root features --dtype fp16

kd-cache dump --target b --teacher big=my_teachers:big,ckpt=big.pt --only big

kd-cache dump --target b --dry-run --json"""


@reporting_errors
def dump_command(
    ctx: typer.Context,
    target: Annotated[
        opt.Target,
        typer.Option(
            "--target",
            "--target-name",
            help="Target device; the cache holds train samples of A and of it.",
            envvar="KD_CACHE_TARGET",
            show_envvar=False,
            rich_help_panel=opt.DATA,
        ),
    ],
    json_path: opt.JsonPathOption = None,
    data_root: opt.DataRootOption = None,
    num_scenes: opt.NumScenesOption = 10,
    num_cities: opt.NumCitiesOption = 12,
    allow_shared_locations: opt.AllowSharedOption = False,
    allow_outside: opt.AllowOutsideOption = [],  # noqa: B006 (typer copies it)
    on_bad_sample: Annotated[
        opt.BadSample,
        typer.Option(
            "--on-bad-sample",
            help="Stop at a sample that cannot be scored, or skip it, list it as missing and exit 3.",
            envvar="KD_CACHE_ON_BAD_SAMPLE",
            show_envvar=False,
            rich_help_panel=opt.DATA,
        ),
    ] = "stop",
    city2scene_teacher_ckpt: opt.City2SceneOption = None,
    scene_teacher_ckpt: opt.SceneOption = None,
    teacher: opt.TeacherOption = [],  # noqa: B006
    only: opt.OnlyOption = [],  # noqa: B006
    cache_root: opt.CacheRootOption = Path("cache"),
    dtype: Annotated[
        opt.DType,
        typer.Option(
            "--dtype",
            help="How logits are stored; fp16 reports the KL it cost.",
            envvar="KD_CACHE_DTYPE",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = "fp32",
    use_fp16: Annotated[
        bool,
        typer.Option(
            "--use-fp16",
            help="The same as --dtype fp16.",
            envvar="KD_CACHE_USE_FP16",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing/--no-skip-existing",
            help="Keep fresh rows, or score everything again.",
            envvar="KD_CACHE_SKIP_EXISTING",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = True,
    files: Annotated[
        bool,
        typer.Option(
            "--files/--no-files",
            help="Also write the view: one <md5>.npy per sample and teacher.",
            envvar="KD_CACHE_FILES",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = True,
    num_verify: Annotated[
        int,
        typer.Option(
            "--num-verify",
            min=0,
            help="Random samples to verify afterwards; a failed verification is a failed dump.",
            envvar="KD_CACHE_NUM_VERIFY",
            show_envvar=False,
            rich_help_panel=opt.CACHE,
        ),
    ] = 10,
    device: opt.DeviceOption = "auto",
    precision: Annotated[
        opt.Precision,
        typer.Option(
            "--precision",
            help="Compute precision; a part of the fingerprint. fp32 turns TF32 off.",
            envvar="KD_CACHE_PRECISION",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = "fp32",
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Most samples scored at once.  [default: 32 on a CPU, 256 on a GPU]",
            envvar="KD_CACHE_BATCH_SIZE",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            min=0,
            help="Threads that read features ahead.",
            envvar="KD_CACHE_WORKERS",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = 2,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            help="Seed of torch's random numbers, for teachers that use any.",
            envvar="KD_CACHE_SEED",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = 42,
    shard_size: Annotated[
        int,
        typer.Option(
            "--shard-size",
            min=1,
            help="Commit finished rows after this many samples …",
            envvar="KD_CACHE_SHARD_SIZE",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = 4096,
    shard_seconds: Annotated[
        float,
        typer.Option(
            "--shard-seconds",
            min=0,
            help="… or after so many seconds, whichever comes first.",
            envvar="KD_CACHE_SHARD_SECONDS",
            show_envvar=False,
            rich_help_panel=opt.RUN,
        ),
    ] = 5.0,
    config: opt.ConfigOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what would be scored, and how many bytes it takes.",
            envvar="KD_CACHE_DRY_RUN",
            show_envvar=False,
            rich_help_panel=opt.OUTPUT,
        ),
    ] = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Score the permitted train samples of A and a target with every teacher, and keep the logits.

    Every option can also be set as an environment variable (KD_CACHE_TARGET, KD_CACHE_CACHE_ROOT, …) or in
    kd-cache.yaml (target: b).
    """
    with Screen(quiet=quiet, as_json=as_json) as screen:
        inputs = load_inputs(
            target,
            json_path,
            data_root,
            num_scenes=num_scenes,
            num_cities=num_cities,
            allow_shared_locations=allow_shared_locations,
            allow_outside=allow_outside,
        )
        _announce(screen, inputs)
        _refuse_file_as_root(cache_root)
        specs = teacher_specs(
            target,
            {"city2scene": city2scene_teacher_ckpt, "scene": scene_teacher_ckpt},
            teacher,
            only,
            own_data=given(ctx, "json_path") or given(ctx, "data_root"),
        )
        # Everything below needs torch, which takes seconds to import: what can fail without it has failed by now.
        from kd_cache.dump import DumpJob, dump_logits, plan_dump
        from kd_cache.engine import resolve_device

        placed = resolve_device(device)
        teachers = load_teachers(specs, num_scenes, num_cities)
        job = DumpJob(
            cache_root=cache_root,
            manifest=inputs.manifest,
            selection=inputs.selection,
            source=inputs.source,
            teachers=teachers,
            device=placed,
            dtype="fp16" if use_fp16 else dtype,
            precision=precision,
            batch_size=batch_size,
            skip_existing=skip_existing,
            files=files,
            on_bad_sample=on_bad_sample,
            workers=workers,
            seed=seed,
            shard_size=shard_size,
            shard_seconds=shard_seconds,
            notes={spec.name: {"source": _described(spec, teachers[spec.name])} for spec in specs},
            record=_record(ctx, specs, *data_paths(json_path, data_root)),
        )
        if dry_run:
            report = plan_dump(job)
            screen.result(_plan_table(job, report), _plan_line(report))
            screen.result_json({"dry_run": True, **_as_json(report)})
            raise typer.Exit(3 if report.missing else 0)
        report = dump_logits(job, screen)
        verified = _verify(job, num_verify, screen)
        _print_report(screen, job, report, verified)
    code = worst_exit_code([3 if report.missing else 0, 0 if verified is None else verified.exit_code])
    if code:
        raise typer.Exit(code)


def _announce(screen: Screen, inputs: Inputs) -> None:
    selection = inputs.selection
    counts = ", ".join(f"{count:,} of {device}" for device, count in selection.per_device.items())
    screen.remark(f"A → {selection.target}: {len(selection.samples):,} permitted train samples ({counts})")
    if selection.located < selection.locatable:
        unknown = selection.locatable - selection.located
        screen.note(
            f"{unknown:,} of {selection.locatable:,} train and test rows name no recording location (neither a field "
            "nor a TAU file name does), so shared locations among them cannot be seen"
        )
    if selection.shared_locations:
        screen.note(f"{len(selection.shared_locations):,} train samples share a location with test, as you allowed")


def _refuse_file_as_root(cache_root: Path) -> None:
    if cache_root.exists() and not cache_root.is_dir():
        raise StoreError(f"the cache root {shown(cache_root)} is a file, expected a folder", hint="Pass --cache-root.")


def _described(spec: TeacherSpec, teacher: object) -> dict[str, Any]:
    """Where a teacher came from, for the index: never anything that a reader would run."""
    source: dict[str, Any] = {"built_in": spec.checkpoint is not None and spec.factory.startswith("teachers:")}
    if spec.checkpoint is not None:
        source["checkpoint"] = str(spec.checkpoint.absolute())
        if spec.checkpoint.is_file():
            source["checkpoint_sha256"] = hashlib.sha256(spec.checkpoint.read_bytes()).hexdigest()
    if isinstance(getattr(teacher, "source", None), str):
        source["read_from"] = str(teacher.source)  # type: ignore[attr-defined]
    return source


def _record(ctx: typer.Context, specs: Sequence[TeacherSpec], json_path: Path, data_root: Path) -> dict[str, Any]:
    """What the index keeps of the run. `kd-cache verify` takes its paths from here, so they are absolute."""
    settings = resolved_settings(ctx)
    # A user's own factory is code; what a cache says must never be run, so it is not even written down.
    for part in ("values", "sources"):
        settings[part].pop("teacher", None)
    settings["paths"] = {
        "json_path": str(json_path.absolute()),
        "data_root": str(data_root.absolute()),
        "allow_outside": [str(path.absolute()) for path in ctx.params["allow_outside"]],
        "checkpoints": {spec.name: str(spec.checkpoint.absolute()) for spec in specs if spec.checkpoint is not None},
    }
    return {"tool": f"kd-cache {kd_cache.__version__}", "created": _now(), "settings": settings}


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")


def _verify(job: DumpJob, count: int, screen: Screen) -> VerifyReport | None:
    from secrets import randbits

    from kd_cache.verify import VerifyJob, verify_cache

    if count == 0:
        return None
    unchecked = dict.fromkeys(_others(job), ("it was not part of this dump", False))
    return verify_cache(
        VerifyJob(
            job.folder,
            job.manifest,
            job.selection,
            job.source,
            teachers=job.teachers,
            unchecked=unchecked,
            n=count,
            seed=randbits(32),
        ),
        screen,
    )


def _others(job: DumpJob) -> list[str]:
    index = job.folder.index()
    return [] if index is None else [name for name in index.origins if name not in job.teachers]


def _print_report(screen: Screen, job: DumpJob, report: DumpReport, verified: VerifyReport | None) -> None:
    screen.result(_summary_table(report), *_summary_lines(job, report))
    if verified is not None:
        screen.result("", verify_table(verified))
        if verified.problems:
            screen.result("", problem_table(verified.problems))
    content = _as_json(report)
    content["verification"] = None if verified is None else verified.as_json()
    screen.result_json(content)


def _summary_table(report: DumpReport) -> Any:
    rows = []
    for name, result in report.teachers.items():
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in result.rescored.items())
        rescored = f"{result.rescored.total():,}" + (f" ({reasons})" if reasons else "")
        rows.append([name, f"{result.scored:,}", f"{result.skipped:,}", rescored, f"{result.dropped:,}"])
    columns = ["Teacher", "Scored", "Skipped (fresh)", "Rescored (stale)", "Dropped"]
    return table(f"{shown(report.cache)}: {report.permitted:,} permitted samples", columns, rows)


def _summary_lines(job: DumpJob, report: DumpReport) -> list[str]:
    lines = []
    if report.samples_scored == 0:
        lines.append("Nothing to score: every permitted sample is cached and fresh.")
    else:
        lines.append(
            f"{report.samples_scored:,} samples scored in {report.seconds:.1f} s, {report.rate:,.0f} samples/s "
            f"on {job.device}, {job.precision}, stored as {job.dtype}"
        )
    if report.published is not None:
        done = report.published
        lines.append(
            f"{size(done.pack_bytes)} of packs, {done.view_written:,} .npy files written, {done.view_removed:,} removed"
            f"; {done.num_samples:,} samples complete"
        )
    for name, result in report.teachers.items():
        if result.cost is not None and result.cost.rows:
            cost = result.cost.as_json()
            measured = ", ".join(f"{key.replace('_', ' ')} {value:.2g}" for key, value in cost.items() if key != "rows")
            lines.append(f"{name}: fp16 cost over {cost['rows']:,} rows: {measured}")
    for number, (file, reason) in enumerate(report.missing.items()):
        if number == 20:
            lines.append(f"… and {len(report.missing) - 20:,} more missing samples")
            break
        lines.append(f"missing: {file}: {reason}")
    return lines


def _plan_table(job: DumpJob, report: DumpReport) -> Any:
    rows = [
        [name, f"{result.scored:,}", f"{result.skipped:,}", f"{result.rescored.total():,}", f"{result.dropped:,}"]
        for name, result in report.teachers.items()
    ]
    columns = ["Teacher", "To score", "Fresh", "Stale", "To drop"]
    return table(f"{shown(report.cache)}: what kd-cache dump would do", columns, rows)


def _plan_line(report: DumpReport) -> str:
    return f"{report.samples_scored:,} samples to read and score, about {size(report.bytes_planned)} of logits to store"


def _as_json(report: DumpReport) -> dict[str, Any]:
    content: dict[str, Any] = {
        "cache": str(report.cache),
        "permitted": report.permitted,
        "per_device": report.per_device,
        "teachers": {name: result.as_json() for name, result in report.teachers.items()},
        "samples_scored": report.samples_scored,
        "missing": report.missing,
        "seconds": report.seconds,
        "samples_per_second": report.rate,
    }
    if report.published is None:
        return content | {"bytes": report.bytes_planned}
    done: Mapping[str, Any] = vars(report.published)
    return content | {"bytes": report.published.pack_bytes, "published": dict(done)}
