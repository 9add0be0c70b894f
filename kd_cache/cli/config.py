"""Settings from a YAML file, below the command line and the environment, above the defaults."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any

import typer
import yaml

from kd_cache.errors import KDCacheError, UsageError, shown
from kd_cache.fingerprint import canonical_json

DEFAULT_FILE = Path("kd-cache.yaml")


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of ``--config``: make the file's values the defaults of this command. Unknown keys are errors."""
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    if path is not None and not ctx.resilient_parsing:
        try:
            ctx.default_map = _applicable(ctx, _load(path), path)
        except KDCacheError as error:
            raise typer.BadParameter(error.message) from error
    return path


def _load(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {shown(path)}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{shown(path)} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{shown(path)}: expected settings such as 'target: b', one per line")
    return {key.replace("-", "_"): value for key, value in content.items()}


def _applicable(ctx: typer.Context, settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings that this command has. One file serves all commands, so another command's are known too."""
    parent = ctx.parent.command if ctx.parent is not None else None
    commands = getattr(parent, "commands", {ctx.command.name: ctx.command})
    known = {parameter.name for command in commands.values() for parameter in command.params} - {"config"}
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, [name for name in known if name], 1)
            raise UsageError(f"{shown(path)}: unknown setting {shown(key)}" + (f"; is it {near[0]}?" if near else ""))
        if isinstance(value, dict):
            raise UsageError(f"{shown(path)}: {key} must be a value or a list, not a section")
    mine = {parameter.name: parameter for parameter in ctx.command.params}
    return {
        key: _as_list(value) if getattr(mine[key], "multiple", False) else value
        for key, value in settings.items()
        if key in mine and value is not None
    }


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def given(ctx: typer.Context, name: str) -> bool:
    """Whether a person set this option: on the command line, in the environment or in the file."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT",)


def resolved_settings(ctx: typer.Context) -> dict[str, Any]:
    """Every option's value and where it came from, and a SHA-256 over the values."""
    values = {name: _plain(value) for name, value in sorted(ctx.params.items())}
    sources = {name: source.name.lower() for name in values if (source := ctx.get_parameter_source(name)) is not None}
    return {"values": values, "sources": sources, "sha256": hashlib.sha256(canonical_json(values)).hexdigest()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
