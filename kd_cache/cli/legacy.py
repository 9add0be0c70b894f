"""What the settings file and the environment may say for ``kd-cache train``, until it comes as a plug-in."""

from __future__ import annotations

import functools

import typer

from kd_cache.options import Option


@functools.cache
def legacy_options() -> tuple[Option, ...]:
    """The options of ``kd-cache train …``, as far as a name goes."""
    from kd_cache.cli.train import train_app

    group = typer.main.get_command(train_app)
    return tuple(
        Option(str(each.name), str, "", "", flag=each.opts[0], also=tuple(each.opts[1:]), variable=str(each.envvar))
        for command in group.commands.values()  # type: ignore[attr-defined]
        for each in command.params
        if each.name != "help"
    )


def legacy_sections() -> tuple[str, ...]:
    """Its sections of the file."""
    return ("train", "city", "city2scene", "scene")
