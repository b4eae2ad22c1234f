"""Where runs are written."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from edit_ray.errors import ConfigError

OUTPUT_VARIABLE = "EDIT_RAY_OUTPUT"
DEFAULT_OUTPUT = "~/edit_ray_outputs"

# Ray unpacks a job's files below such a folder, and deletes it when the job is forgotten.
_RAY_JOB_PARTS = ("runtime_resources", "working_dir_files")


def output_root(option: str | None, environ: Mapping[str, str]) -> Path:
    """The absolute folder that holds runs: `option`, else `$EDIT_RAY_OUTPUT`, else `~/edit_ray_outputs`.

    It is made if it is not there, and a file is written and removed to see that it can be.

    Raises:
        ConfigError: it is a file, cannot be made or written, or lies in a Ray job's unpacked folder.
    """
    if option is not None:
        name, given = "--output", option
    elif environ.get(OUTPUT_VARIABLE):
        name, given = f"${OUTPUT_VARIABLE}", environ[OUTPUT_VARIABLE]
    else:
        name, given = "the default output folder", DEFAULT_OUTPUT
    if not given.strip():
        raise ConfigError([f"{name} is empty; it must be a folder that can be written."])
    try:
        home = environ.get("HOME")
        from_home = bool(home) and (given == "~" or given.startswith("~/"))
        root = Path(os.path.abspath(Path(home or "", given[2:]) if from_home else Path(given).expanduser()))
        if any(_in_ray_job(place.parts) for place in (root, Path(os.path.realpath(root)))):
            wrong = f"which is {root}, inside a Ray job's unpacked files, and those are deleted"
            raise ConfigError([f"{name} is {given!r}, {wrong}; it must be an absolute path elsewhere."])
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
        return root
    except ConfigError:
        raise
    except (FileExistsError, NotADirectoryError) as error:
        what = "a file" if isinstance(error, FileExistsError) else "below a file"
        text = f"{what}; it must be a folder that can be written"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        text = f"which cannot be written ({reason}); it must be a folder that can be"
    except (ValueError, RuntimeError) as error:
        text = f"which is no path ({error}); it must be a folder"
    raise ConfigError([f"{name} is {given!r}, {text}."])


def _in_ray_job(parts: tuple[str, ...]) -> bool:
    return any(parts[at : at + 2] == _RAY_JOB_PARTS for at in range(len(parts)))
