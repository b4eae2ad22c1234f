"""What lies in the folder of a disk tier."""

import os
from pathlib import Path

from edit_ray.tiers.disk_tier import LOCK


def files_in(folder):
    """Every path in the folder but the lock of the store that has it open."""
    return [Path(folder) / name for name in os.listdir(folder) if name != LOCK]
