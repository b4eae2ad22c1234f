"""`edit-ray serve`: a run's page and media, for browsers on this machine."""

from __future__ import annotations

import argparse
import os
from typing import Any

from edit_ray.cli.watch import awaited
from edit_ray.errors import ConfigError


def serve(options: argparse.Namespace) -> int:
    """Serves a run's page until it is interrupted."""
    from edit_ray.config import load_config, output_root
    from edit_ray.page.served import HLS_JS
    from edit_ray.page.server import PageServer
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
        server = PageServer(folder.path, lambda: run_status(folder, fps), options.port)
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


def run_status(folder: Any, fps: float) -> dict[str, Any]:
    """What the page shows of the run in `folder`: a RunFolder, whose errors it raises."""
    from edit_ray.video.stream_files import newest_playlist

    manifest = folder.read_manifest()
    prompts: list[dict[str, Any]] = []
    for segment in manifest.segments:
        if not prompts or prompts[-1]["prompt"] != segment.prompt:
            prompts.append({"start_s": segment.first_frame / fps, "prompt": segment.prompt})
    return {
        "run_id": folder.run_id,
        "state": manifest.state,
        "error": manifest.error,
        "committed": len(manifest.segments),
        "num_segments": manifest.num_segments,
        "final": manifest.final,
        "playlist": newest_playlist(folder.path),
        "prompts": prompts,
    }
