"""`edit-ray make-model`: a published Wan's configuration with random weights, to measure speed and memory on."""

from __future__ import annotations

import argparse
from pathlib import Path

from edit_ray.errors import ConfigError


def make_model(options: argparse.Namespace) -> int:
    """Writes a model of random weights into a new folder."""
    from edit_ray.engine.loading import DTYPES, choose_device
    from edit_ray.testing.made_model import make_model as write_model

    folder: Path = options.folder.expanduser()
    try:
        if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
            raise ConfigError([f"--output is {folder}, which is there; it must be a new or an empty folder"])
        made = write_model(
            folder,
            options.variant,
            text_encoder=options.text_encoder,
            dtype=DTYPES[options.dtype],
            device=choose_device(options.device),
            seed=options.seed,
        )
    except OSError as error:
        raise ConfigError([f"--output is {folder}, which cannot be written ({error.strerror or error})"]) from None
    print(made)
    return 0
