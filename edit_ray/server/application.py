"""The door as an application that Ray Serve builds from its own configuration: `edit_ray.server.application:app`.

So do `serve deploy` and KubeRay's RayService, where nobody runs `edit-ray serve`. Serve reads what `app` takes from its
annotation, which therefore is no text: this module has no `from __future__ import annotations`.
"""

import os
from pathlib import Path
from typing import Any

from pydantic import Field

from edit_ray.config import output_root
from edit_ray.options import Options
from edit_ray.runs.ids import Owner, owner_here
from edit_ray.server import door
from edit_ray.server.gate import Entrance
from edit_ray.server.models import models_of
from edit_ray.server.token_file import token_of


class DoorArguments(Options):
    """The `args` of the application in Serve's configuration; paths are those of every node.

    `host` and `port` are those of its `http_options`; replicas are the `num_replicas` of its deployment `Door`.
    `configs` are models as for `edit-ray serve --config`, and `overrides` hold for each of them as `--set` does.
    """

    configs: list[str] = Field(default_factory=list)
    overrides: list[str] = Field(default_factory=list)
    output: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    token_file: str | None = None
    allow_hosts: list[str] = Field(default_factory=list)


def settings_of(arguments: DoorArguments) -> door.DoorSettings:
    """What replicas are made from. Raises ConfigError."""
    token = token_of(None if arguments.token_file is None else Path(arguments.token_file), "token_file")
    return door.DoorSettings(
        output_root(arguments.output, os.environ),
        Owner(owner_here(os.environ).name, door.JOB),
        models_of([Path(config) for config in arguments.configs], arguments.overrides),
        Entrance(arguments.host, arguments.port, token, tuple(arguments.allow_hosts)),
        continues=True,
    )


def app(arguments: DoorArguments) -> Any:
    """The application. Raises ConfigError."""
    return door.application(settings_of(arguments))
