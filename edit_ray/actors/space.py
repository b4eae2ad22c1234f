"""Whether the file system has room for what a run will still write."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from edit_ray.actors.messages import RunSpec
from edit_ray.engine.model_info import read_model_info
from edit_ray.errors import ResourcesUnavailable
from edit_ray.runs.manifest import SegmentRecord
from edit_ray.runs.retention import SegmentSize, bytes_to_come, first_guess, measured, shortage

_ENDLESS = 100  # segments that a run without an end is asked to have room for


def shortage_before(spec: RunSpec) -> str | None:
    """One sentence where a run's output will not fit. Raises ModelError."""
    info, sampling = read_model_info(spec.config.model.path), spec.config.sampling
    pixels = (sampling.height // info.scale_factor_spatial) * (sampling.width // info.scale_factor_spatial)
    latent_bytes = 4 * info.z_dim * spec.layout.latent_frames * pixels
    size = first_guess(sampling.num_frames, sampling.height, sampling.width, latent_bytes)
    return _shortage(spec, 0, size, spec.root)


def shortage_after(spec: RunSpec, records: Sequence[SegmentRecord]) -> str | None:
    """The same once segments are there, from what they take."""
    latest = spec.latents(len(records) - 1)
    size = measured(records, SegmentSize(latest.stat().st_size if latest.exists() else 0, 0))
    return _shortage(spec, len(records), size, spec.folder.path)


def is_full(error: BaseException) -> bool:
    """Whether something could not be written as there is no room for it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def room_in(root: Path) -> Iterator[None]:
    """Raises ResourcesUnavailable, with a sentence, where the file system refuses what is done meanwhile."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise ResourcesUnavailable(f"no space is left in {root}; free some, and ask again") from None
        where, why = error.filename or root, error.strerror or str(error)
        raise ResourcesUnavailable(f"{where} cannot be used ({why}); ask again once it can be") from None


def _shortage(spec: RunSpec, committed: int, size: SegmentSize, path: Path) -> str | None:
    to_come = (spec.num_segments - committed) if spec.num_segments is not None else _ENDLESS
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    status = os.statvfs(there)
    needed = bytes_to_come(to_come, size, spec.config.output.keep_segments)
    return shortage(needed, status.f_bavail * status.f_frsize)
