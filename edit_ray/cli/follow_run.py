"""`edit-ray watch` and `edit-ray serve`: follow a run on the terminal or in a browser."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from edit_ray.cli.run_commands import client_of, line_of
from edit_ray.errors import ConfigError, UnknownRun

if TYPE_CHECKING:
    from edit_ray.actors.messages import RunStatus
    from edit_ray.client import LongVideoClient
    from edit_ray.runs.folder import RunFolder
    from edit_ray.runs.manifest import Manifest

POLL_S = 0.5

_Found = TypeVar("_Found")


def wait_for_run(read: Callable[[], _Found], wait_s: float) -> _Found:
    """The result of `read`, retried while there is no such run yet. Raises UnknownRun after `wait_s` seconds."""
    deadline, warned = time.monotonic() + wait_s, False
    while True:
        try:
            return read()
        except UnknownRun as unknown:
            if time.monotonic() >= deadline:
                raise
            if not warned:
                print(f"{unknown}; waiting {wait_s:g} s for it to start", file=sys.stderr, flush=True)
        warned = True
        time.sleep(POLL_S)


def watch(options: argparse.Namespace) -> int:
    """Follows a run to its end by a bar on a terminal, else by a line when its state or number of segments changes.

    Returns 0 if it is done, 1 if it is not or nobody works on it.
    """
    client, before, draws = client_of(options), None, sys.stdout.isatty()
    status = wait_for_run(lambda: client.status(options.run_id), options.wait)
    with live_bar(client, options.run_id):
        while not status.ended and status.state != "open":
            now = status.state, status.committed
            if now != before and not draws:
                print(line_of(status), flush=True)
            before = now
            time.sleep(POLL_S)
            status = client.status(status.run_id)
    print(line_of(status))
    if status.error:
        print(status.error)
    return 0 if status.state == "done" else 1


@contextlib.contextmanager
def live_bar(client: LongVideoClient, run_id: str) -> Iterator[None]:
    """Draws, on a terminal, a bar over all denoising steps, with the remaining time at the current pace."""
    if not sys.stdout.isatty():
        yield
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    over = Event()

    def follow(bar: Progress) -> None:
        task = bar.add_task(run_id, total=None)
        while not over.wait(POLL_S):
            with contextlib.suppress(Exception):  # a failing bar must not end what it shows
                status = client.status(run_id)
                done, total = steps_of(status)
                bar.update(task, description=description_of(status), completed=done, total=total)

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        follower = Thread(target=follow, args=(bar,), daemon=True)
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()


def steps_of(status: RunStatus) -> tuple[float, float | None]:
    """Denoised segments, with the current one in part, and their total."""
    at = status.progress
    done = at.segment_index + at.step / at.num_steps if at else 0.0
    return max(done, status.committed), status.num_segments


def description_of(status: RunStatus) -> str:
    """Such as `my-run running: 3/8 segments, segment 4 step 12/30`."""
    total = "∞" if status.num_segments is None else status.num_segments
    at = status.progress
    step = f", segment {at.segment_index} step {at.step}/{at.num_steps}" if at else ""
    return f"{status.run_id} {status.state}: {status.committed}/{total} segments{step}"


def serve(options: argparse.Namespace) -> int:
    """Serves a run's page until it is interrupted; without a run, the HTTP door."""
    if options.run_id is None:
        from edit_ray.cli.serve_door import serve_door

        return serve_door(options)
    from edit_ray.config import load_config, output_root
    from edit_ray.page.run_server import HLS_JS, PageServer
    from edit_ray.runs.folder import RunFolder

    if not 0 <= options.port <= 65535:
        raise ConfigError([f"--port is {options.port}; it must be from 1 to 65535, or 0 for any free one"])
    try:
        folder = RunFolder(output_root(options.output, os.environ), options.run_id)
        wait_for_run(folder.read_manifest, options.wait)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    fps = load_config(folder.path / "run.yaml", check_model=False).sampling.fps
    try:
        server = PageServer(folder.path, RunStatusReader(folder, fps), options.port)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError([f"--port is {options.port}, which cannot be opened ({reason}); choose another"]) from None
    with server:
        if not HLS_JS.is_file():
            print("hls.js is not installed (`make page`): the page plays only what exists when it loads", flush=True)
        print(server.url, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


class RunStatusReader:
    """The JSON status that the page polls. Each call reads only new lines of the manifest."""

    def __init__(self, folder: RunFolder, fps: float) -> None:
        from edit_ray.runs.manifest_file import ManifestReader

        self._folder, self._fps = folder, fps
        self._reader = ManifestReader(folder.manifest)
        self._lock = Lock()
        self._seen, self._takes = 0, 0  # segments and takes that `_prompts` covers
        self._prompts: list[dict[str, Any]] = []

    def __call__(self) -> dict[str, Any]:
        """Raises the errors of `RunFolder.read_manifest`."""
        from edit_ray.video.hls import newest_playlist

        with self._lock:
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
