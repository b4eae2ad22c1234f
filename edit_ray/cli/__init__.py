"""`edit-ray`: a look at the runs and at what their cache did, measurements of a model, and an end to the actors."""

from edit_ray.cli.main import main

__all__ = ["main"]
