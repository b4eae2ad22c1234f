"""`edit-ray`: commands for runs, models, monitoring files and this machine's setup."""

from edit_ray.cli.main import main

__all__ = ["main"]
