"""`edit-ray dashboards`: Grafana's dashboards, Prometheus' rules and the page of metrics, made from the catalog."""

from __future__ import annotations

import argparse
from pathlib import Path

import edit_ray
from edit_ray.errors import ConfigError


def dashboards(options: argparse.Namespace) -> int:
    """Writes what is made from the catalog and differs from what is there."""
    clone = Path(edit_ray.__file__).resolve().parents[1]
    if not (clone / "monitoring" / "generate.py").is_file():
        raise ConfigError(
            ["edit-ray dashboards needs a clone of the repository; the installed package does not contain monitoring/"]
        )
    from monitoring.generate import write_generated

    try:
        written = write_generated(options.into)
    except OSError as error:
        raise ConfigError([f"--into is {options.into}, which cannot be written ({error.strerror})"]) from None
    for path in written:
        print(path)
    print(f"{len(written)} files written" if written else f"all files under {options.into} are as they should be")
    return 0
