"""Runs by the actors' plain classes in this process: what they are asked for, pools that fail, and what they leave."""

import asyncio

from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.config import Config, load_config
from edit_ray.runs.folder import RunFolder
from tests.chaos.undisturbed import told

SEGMENTS = 4
ONE = {"video": {"num_segments": 1}, "prompt_segments": [{"segment": 0, "prompt": "a red circle"}]}
SHORT = {"video": {"num_segments": 3}}
WARM = {"policy": "warmstart_reuse", "inner": "fbcache", "rel_l1_thresh": 0.2, "warm_steps": 2, "reuse_window": 2}
REUSE = {"cache": WARM, "store": {"host_bytes": 4 * 4096, "allow_tmpfs": True}}
PLAIN_AND_REUSE = {"plain": {}, "reuse": REUSE}


def config_for(model, /, **changes):
    values = {
        "model": {"path": str(model)},
        "sampling": {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "seed": 5},
        "video": {"num_segments": SEGMENTS},
        "prompt_segments": [
            {"segment": 0, "prompt": "a red circle"},
            {"segment": 2, "prompt": "a blue square"},
        ],
        "continuity": {"mode": "history", "history_latents": 2},
        "engine": {"cpu_threads": 1, "idle_exit_s": 3600},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return Config.model_validate(values)


async def submit(scheduler, root, run_id, config, token="mine"):
    return await scheduler.submit(run_id, config.model_dump(mode="json"), str(root), str(root), token)


async def end_of(scheduler, run_id):
    async with asyncio.timeout(60):
        while not (status := (await scheduler.wait_segment(run_id, 10**6, 5)).status).ended:
            pass
    return status


async def done(scheduler, run_id):
    """Waits until the run is done, which must be how it ends."""
    status = await end_of(scheduler, run_id)
    assert status.state == "done", status.error
    return status


async def made(scheduler, root, run_id, config):
    """The folder of a run, from its submission until it is done."""
    await submit(scheduler, root, run_id, config)
    await done(scheduler, run_id)
    return RunFolder(root, run_id)


class Whole:
    """Runs to which nothing has happened, each made once, in a folder."""

    def __init__(self, root):
        self._root, self._made = root, {}

    async def __call__(self, config):
        """The folder of the run of this configuration."""
        key = config.model_dump_json()
        if key not in self._made:
            pool = LocalPool()
            self._made[key] = await made(SegmentSchedulerActor(pool), self._root, f"run-{len(self._made)}", config)
            await pool.end()
        return self._made[key]


def everything(folder):
    """The bytes of all that a run has made, but for what tells of times."""
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    files = [path for path in files if path.name not in ("manifest.jsonl", "events.jsonl")]
    return {path.relative_to(folder.path).as_posix(): path.read_bytes() for path in files}


def check_same(one, other, *, but=()):
    """AssertionError unless two runs have made the same bytes, except in the files named."""
    ones, others = everything(one), everything(other)
    differing = [name for name in sorted({*ones, *others}) if ones.get(name) != others.get(name)]
    assert differing == list(but), differing


def told_from_the_start(folder):
    """The configuration whose storyboard says by itself what the run's edits and re-rolls made of its own."""
    manifest = folder.read_manifest()
    return told(load_config(folder.run_yaml, (), check_model=False), manifest.num_segments, manifest.changes)


class Pool(LocalPool):
    """Before a call of a method for a segment (None: of a run) it awaits what `strikes` has for them, once."""

    def __init__(self, strikes=()):
        super().__init__()
        self.strikes, self.calls = dict(strikes), []

    async def denoiser(self, worker, method, *arguments):
        segment = getattr(arguments[1], "index", None) if len(arguments) > 1 else None
        self.calls.append((method, segment))
        if strike := self.strikes.pop((method, segment), None):
            await strike(self, worker, *arguments)
        return await super().denoiser(worker, method, *arguments)


async def lose_the_gpu_actor(pool, worker, *_):
    """As an actor's death does: everything is forgotten."""
    await pool.restart_denoiser(worker)
    raise ConnectionError("the actor died")


class Dying(LocalPool):
    """Says when so many pieces of work were asked for."""

    def __init__(self, calls):
        super().__init__()
        self.left, self.now = calls, asyncio.Event()

    async def denoiser(self, worker, method, *arguments):
        if method in ("prepare_run", "denoise_segment", "decode_segment", "encode_segment", "finalize_run"):
            self.left -= 1
            if self.left == 0:
                self.now.set()
        return await super().denoiser(worker, method, *arguments)
