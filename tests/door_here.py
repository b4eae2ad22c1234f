"""The HTTP door in one process: its application over the client, whose segment scheduler is the plain class, no Ray."""

import asyncio
import contextlib
import socket
import threading
import time

import uvicorn
from starlette.testclient import TestClient

from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.client import LongVideoClient
from edit_ray.config import Config
from edit_ray.engine.model_info import read_model_info
from edit_ray.server.app import make_app
from edit_ray.server.gate import Entrance
from edit_ray.server.video_request import Offer

PROMPT = "a red circle"
TOKEN = "a token of this test"


class ClientHere(LongVideoClient):
    """The client; what it asks Ray's segment scheduler, it asks that of `SchedulerHere`."""

    def __init__(self, output, scheduler):
        super().__init__(output=output, connect=False)
        self._scheduler = scheduler

    def _ask(self, method, *arguments, timeout_s=None, starts=False):
        return self._scheduler.ask(method, *arguments)


class SchedulerHere:
    """The segment scheduler's class in an event loop of its own thread."""

    def __init__(self):
        self.pool, self._loop = LocalPool(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.actor = self._run(self._made())

    async def _made(self):
        return SegmentSchedulerActor(self.pool)

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def ask(self, method, *arguments):
        return self._run(getattr(self.actor, method)(*arguments))

    def end(self):
        for run in self.ask("runs"):
            if not run.ended:
                with contextlib.suppress(Exception):
                    self.ask("cancel", run.run_id)
                    self.ask("wait_segment", run.run_id, 10**6, 30)
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self):
        await self.pool.end()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def offer_of(model, name="tiny", **changes):
    """A model of tiny runs of two segments."""
    values = {
        "model": {"path": str(model)},
        "sampling": {"height": 32, "width": 32, "num_frames": 9, "fps": 8, "num_inference_steps": 3},
        "video": {"num_segments": 2},
        "prompt_segments": [{"segment": 0, "prompt": PROMPT}],
        "continuity": {"mode": "history", "history_latents": 2},
        "engine": {"cpu_threads": 1, "idle_exit_s": 3600},
        "metrics": {"enabled": False},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    base, info = Config.model_validate(values), read_model_info(str(model))
    return Offer(name, base, info.height_step, info.width_step)


def browser(runs, offers, entrance=None, limits=None, **more):
    """A client of the application, whose requests run in this process."""
    return TestClient(make_app(runs, offers, entrance, limits), base_url="http://127.0.0.1", **more)


def until_ended(http, video_id, timeout_s=60):
    """The video object of a run once it has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        video = http.get(f"/v1/videos/{video_id}").json()
        if video["status"] in ("completed", "failed"):
            return video
        time.sleep(0.05)
    raise AssertionError(f"{video_id} has not ended within {timeout_s} s: {video}")


@contextlib.contextmanager
def serving(model, root, token=None, limits=None, **changes):
    """The door's address, served by uvicorn over a segment scheduler in this process."""
    scheduler = SchedulerHere()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        entrance = Entrance(port=port, token=token)
        app = make_app(ClientHere(root, scheduler), [offer_of(model, **changes)], entrance, limits)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.should_exit = True
            thread.join()
            scheduler.end()
