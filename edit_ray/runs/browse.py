"""The runs that lie in a folder, whether anybody works on them or not."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edit_ray.runs.folder import RunFolder
from edit_ray.runs.ids import RUN_ID_PATTERN


def folders_in(root: Path) -> list[RunFolder]:
    """The folders under `root` that hold a manifest, the oldest run first; none where there is no such folder."""
    try:
        names = [path.name for path in root.iterdir() if re.fullmatch(RUN_ID_PATTERN, path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [RunFolder(root, name) for name in names]
    return sorted((folder for folder in found if os.path.isfile(folder.manifest)), key=_begun_at)


def _begun_at(folder: RunFolder) -> tuple[float, str]:
    try:
        return folder.run_yaml.stat().st_mtime, folder.run_id  # written once, when the run began
    except OSError:
        return 0.0, folder.run_id
