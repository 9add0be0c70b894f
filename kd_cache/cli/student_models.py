"""``kd-cache student complexity`` and ``student predict``: of a student that there is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kd_cache.cli.console import Screen, percent
from kd_cache.cli.evaluate import model_spec, refuse_other_classes
from kd_cache.cli.inputs import data_of, source_at
from kd_cache.cli.teachers import load_teachers
from kd_cache.commands import Failure, Report, Run, Table
from kd_cache.dataset.features import FeatureSource
from kd_cache.dataset.task_file import DEFAULT
from kd_cache.distill.complexity import LIMITS
from kd_cache.distill.complexity import complexity as counted
from kd_cache.distill.prediction import PredictionJob, files_below, labels_of, listed_files, worth
from kd_cache.distill.prediction import predict as predicted
from kd_cache.errors import TeacherError, UsageError, shown
from kd_cache.files.atomic import make_directory, write_atomic
from kd_cache.prepare.dataset_json import refuse_other
from kd_cache.score.device import resolve_device
from kd_cache.score.teacher import OWN_FEATURES, Teacher
from kd_cache.train.checkpoint_file import checkpoint_limit
from kd_cache.train.clips import class_names
from kd_cache.train.nets import make_net
from kd_cache.train.settings import CITY, SCENE, SIZES, Settings


def complexity(
    run: Run,
    screen: Screen,
    model: str | None,
    limits: Literal["none", "dcase"],
    stored_as: Literal["fp32", "fp16", "int8"],
    shape: Any,
) -> Report:
    """Count a net's parameters and multiply-accumulates."""
    values = run.values
    net: Any
    if model is not None:
        if any(map(run.said, ("arch", *SIZES))):
            raise UsageError("name a checkpoint or an --arch, not both")
        name, net = _loaded(model, values, screen)
    else:
        settings = Settings(
            SCENE, **{name: values[name] for name in ("arch", "feature_dim", "mlp_hidden_dims", *SIZES)}
        )
        name, net = values["arch"], make_net(settings, values["num_scenes"])
    if not isinstance(net, nn.Module):
        raise TeacherError(f"{shown(name)} is no torch.nn.Module, so its layers cannot be counted")
    found = counted(net, shape or _shape(values))
    cells = [shown(name), *(f"{number:,}" for number in (found.parameters, found.macs, *found.memory.values()))]
    content: dict[str, Any] = {"model": name, **found.as_json()}
    lines: list[str | Table] = [
        Table(
            f"A clip of {found.shape[0]} frames and {found.shape[1]} bins",
            ["Net", "Parameters", "MACs", *(f"Bytes as {dtype}" for dtype in found.memory)],
            [cells],
        )
    ]
    if limits == "none":
        return Report(content, lines)
    beyond = found.beyond(LIMITS[limits], stored_as)
    content |= {"limits": limits, "stored_as": stored_as, "beyond": beyond}
    lines += [Failure(f"beyond the limits of {limits}: {what}") for what in beyond]
    if not beyond:
        lines.append(f"within the limits of {limits}, stored as {stored_as}")
    return Report(content, lines, bool(beyond))


def predict(run: Run, screen: Screen, model: str, features_at: Path, table: Path | None, output: Path) -> Report:
    """Write what a net makes of unlabelled clips."""
    values = run.values
    name, net = _loaded(model, values, screen)
    if getattr(net, "role", None) == CITY:
        raise UsageError(f"{shown(model)} tells cities apart, and scenes are to be predicted")
    refuse_other_classes(name, net, "scene", values)
    if table is None and not features_at.is_dir():
        raise UsageError(f"{shown(features_at)} is no folder, so --table must say which clips it has")
    source = source_at(features_at, values)
    files = files_below(features_at) if table is None else listed_files(table, source)
    classes = class_names(DEFAULT, "scene", net.num_classes)
    labels = {} if table is None else labels_of(table, classes)
    if getattr(net, OWN_FEATURES, None) is not None:
        screen.note(f"{shown(model)} has a front end of its own: what --features names must be made by it")
    info = _cost(net, source, files)  # on the CPU, before it goes elsewhere
    job = PredictionJob(
        name, net, source, files, DEFAULT, resolve_device(values["device"]), values["batch_size"], values["workers"]
    )
    found = predicted(job, screen)
    if (figures := worth(found, labels)) is not None:
        info["test"] = figures
    beside = output.with_name(f"{output.stem}.info.json")
    written = {output: found.as_tsv().encode(), beside: (json.dumps(info, indent=1) + "\n").encode()}
    for path, content in written.items():
        refuse_other(path, {content}, overwrite=values["overwrite"])
    make_directory(output.parent)
    for path, content in written.items():
        write_atomic(path, content)
    told = {"model": model, "output": str(output), "clips": len(files), "class_names": classes, "info": info}
    lines = [f"{shown(output)}: {len(files):,} clips, {len(classes)} classes", shown(beside)]
    if figures is not None:
        of, right = figures["samples"], percent(figures["accuracy"])
        lines.append(f"accuracy on the {of:,} clips that the table has a scene of: {right}")
    return Report(told, lines)


def _cost(net: Any, source: FeatureSource, files: Mapping[str, str]) -> dict[str, Any]:
    """MACs and parameters, for a clip of the first one's shape; nothing of a net whose layers cannot be counted."""
    if not isinstance(net, nn.Module) or not files:
        return {}
    found = counted(net, source.shape(next(iter(files.values()))))
    return {"MACs": found.macs, "Params": found.parameters, "shape": list(found.shape)}


def _loaded(model: str, values: Mapping[str, Any], screen: Screen) -> tuple[str, Teacher]:
    with checkpoint_limit(values["max_checkpoint_bytes"]):
        spec = model_spec(model)
    limits = (values["num_scenes"], values["num_cities"], values["max_checkpoint_bytes"])
    return spec.name, load_teachers([spec], *limits, screen)[spec.name]


def _shape(values: Mapping[str, Any]) -> tuple[int, int]:
    """Of the manifest's first train feature."""
    data = data_of(DEFAULT.source, values)
    frames, bins = data.features.shape(data.selection.samples[0].file)
    return frames, bins
