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
    try:
        if not given.strip():
            raise ConfigError([f"{name} is empty; it must be a folder that can be written."])
        root = Path(os.path.abspath(_expand(given, environ)))
        _check_place(name, given, root)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except FileExistsError:
        raise ConfigError([f"{name} is {given!r}, a file; it must be a folder that can be written."]) from None
    except NotADirectoryError:
        raise ConfigError([f"{name} is {given!r}, below a file; it must be a folder that can be written."]) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            [f"{name} is {given!r}, which cannot be written ({reason}); it must be a folder that can be."]
        ) from None
    except (ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{name} is {given!r}, which is no path ({error}); it must be a folder."]) from None
    return root


def _expand(given: str, environ: Mapping[str, str]) -> Path:
    home = environ.get("HOME")
    if home and (given == "~" or given.startswith("~/")):
        return Path(home, given[2:])
    return Path(given).expanduser()


def _check_place(name: str, given: str, root: Path) -> None:
    for place in (root, Path(os.path.realpath(root))):
        parts = place.parts
        if any(parts[at : at + 2] == _RAY_JOB_PARTS for at in range(len(parts))):
            raise ConfigError(
                [
                    f"{name} is {given!r}, which is {place}, inside a Ray job's unpacked files, and those are deleted; "
                    "it must be an absolute path elsewhere."
                ]
            )
