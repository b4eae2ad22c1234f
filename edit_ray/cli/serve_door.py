"""`edit-ray serve` without a run: the HTTP door, until it is interrupted."""

from __future__ import annotations

import argparse
import os
import signal
import threading

from edit_ray.config import output_root
from edit_ray.errors import ConfigError
from edit_ray.runs.ids import Owner, owner_here
from edit_ray.server.token_file import token_of

MOST_REPLICAS = 64


def serve_door(options: argparse.Namespace) -> int:
    """Serve OpenAI's video API over the runs of a folder; what clients have begun goes on when it ends."""
    if not 1 <= options.port <= 65535:
        raise ConfigError([f"--port is {options.port}; it must be from 1 to 65535"])
    if not 1 <= options.replicas <= MOST_REPLICAS:
        raise ConfigError([f"--replicas is {options.replicas}; it must be from 1 to {MOST_REPLICAS}"])
    try:
        from edit_ray.server import door
        from edit_ray.server.gate import Entrance
        from edit_ray.server.models import models_of
    except ImportError as missing:
        said = f"it needs {missing.name}: pip install 'edit_ray[serve]'"
        raise ConfigError([f"the HTTP door is not installed; {said}"]) from None
    output = output_root(options.output, os.environ)
    owner = Owner(owner_here(os.environ).name, door.JOB)
    entrance = Entrance(options.host, options.port, token_of(options.token_file), tuple(options.allow_host))
    settings = door.DoorSettings(output, owner, models_of(options.config), entrance, replicas=options.replicas)
    started = door.start(settings, options.address)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for run_id in started.continued:
            print(f"{run_id} is continued", flush=True)
        print(started.url, flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        door.stop()
    return 0
