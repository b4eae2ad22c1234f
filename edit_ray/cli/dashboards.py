"""`edit-ray dashboards`: Grafana's dashboards, Prometheus' rules and the page of metrics, made from the catalog."""

from __future__ import annotations

import argparse

from edit_ray.errors import ConfigError


def dashboards(options: argparse.Namespace) -> int:
    """Writes what is made from the catalog and differs from what is there."""
    from edit_ray.metrics.generate import write_generated

    try:
        written = write_generated(options.into)
    except OSError as error:
        raise ConfigError([f"--into is {options.into}, which cannot be written ({error.strerror})"]) from None
    for path in written:
        print(path)
    print(f"{len(written)} files written" if written else f"all files under {options.into} are as they should be")
    return 0
