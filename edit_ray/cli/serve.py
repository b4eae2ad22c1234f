"""`edit-ray serve`: a run's page and media, for browsers on this machine."""

from __future__ import annotations

import argparse
import os
from threading import Lock
from typing import TYPE_CHECKING, Any

from edit_ray.cli.watch import awaited
from edit_ray.errors import ConfigError

if TYPE_CHECKING:
    from edit_ray.runs.folder import RunFolder
    from edit_ray.runs.manifest import Manifest


def serve(options: argparse.Namespace) -> int:
    """Serves a run's page until it is interrupted."""
    from edit_ray.config import load_config, output_root
    from edit_ray.page.server import HLS_JS, PageServer
    from edit_ray.runs.folder import RunFolder

    if not 0 <= options.port <= 65535:
        raise ConfigError([f"--port is {options.port}; it must be from 1 to 65535, or 0 for any free one"])
    try:
        folder = RunFolder(output_root(options.output, os.environ), options.run_id)
        awaited(folder.read_manifest, options.wait)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    fps = load_config(folder.path / "run.yaml", check_model=False).sampling.fps
    try:
        server = PageServer(folder.path, RunStatusReader(folder, fps), options.port)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError([f"--port is {options.port}, which cannot be had ({reason}); choose another"]) from None
    with server:
        if not HLS_JS.is_file():
            print("hls.js is not installed (`make page`): the page plays what is there when it is opened", flush=True)
        print(server.url, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


class RunStatusReader:
    """What the page shows of the run in a folder. Each call reads and looks at only what is new."""

    def __init__(self, folder: RunFolder, fps: float) -> None:
        from edit_ray.runs.manifest_file import ManifestReader

        self._folder, self._fps = folder, fps
        self._reader = ManifestReader(folder.manifest)
        self._one_at_a_time = Lock()
        self._seen, self._takes = 0, 0  # segments and takes of which `prompts` tells
        self._prompts: list[dict[str, Any]] = []

    def __call__(self) -> dict[str, Any]:
        """Raises as `RunFolder.read_manifest`."""
        from edit_ray.video.hls import newest_playlist

        with self._one_at_a_time:
            manifest = self._folder.read_manifest(self._reader)
            return {
                "run_id": self._folder.run_id,
                "state": manifest.state,
                "error": manifest.error,
                "committed": len(manifest.segments),
                "num_segments": manifest.num_segments,
                "final": manifest.final,
                "playlist": newest_playlist(self._folder.path),
                "prompts": list(self._prompts_of(manifest)),
            }

    def _prompts_of(self, manifest: Manifest) -> list[dict[str, Any]]:
        if len(manifest.takes) != self._takes or len(manifest.segments) < self._seen:
            self._seen, self._takes, self._prompts = 0, len(manifest.takes), []
        for segment in manifest.segments[self._seen :]:
            if not self._prompts or self._prompts[-1]["prompt"] != segment.prompt:
                self._prompts.append({"start_s": segment.first_frame / self._fps, "prompt": segment.prompt})
        self._seen = len(manifest.segments)
        return self._prompts
