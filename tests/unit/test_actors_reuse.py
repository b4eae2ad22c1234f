"""Segments that reuse each other's residuals, through the actors' plain classes: only the plan decides the frames."""

import asyncio

import pytest
import torch

from edit_ray.actors.local import LocalCrew
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.cache.stores.shared_tiers import SharedTiers
from edit_ray.config import Config
from edit_ray.engine.latent_files import load_latents
from edit_ray.runs.folder import RunFolder
from edit_ray.testing import save_random_wan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
SEGMENTS = 6
# 32 x 32, 5 frames: 2 latent frames of 4 x 4, so 8 tokens of width 24 in float32.
RESIDUAL = 8 * 24 * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("model") / "wan", num_layers=4)


def config_for(model, host=100, granularity="stack", shared_memory="require", **cache):
    inner = {"inner": "fbcache", "rel_l1_thresh": 0.2}
    if granularity != "stack":  # where a unit may be a single block, the first one is no probe
        inner = {"inner": "taylorseer", "cache_interval": 2, "disable_cache_before_step": 2, "max_order": 1}
    reuse = {"policy": "warmstart_reuse", "warm_steps": 3, "reuse_window": 3, **inner}
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "sampling": {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 6, "seed": 5},
            "video": {"num_segments": SEGMENTS},
            "prompt_segments": [{"segment": 0, "prompt": "a red circle"}],
            "continuity": {"mode": "none"},
            "cache": reuse | {"granularity": granularity} | cache,
            "store": {"host_bytes": host * 4096, "allow_tmpfs": True, "shared_memory": shared_memory},
            "engine": {"cpu_threads": 1, "idle_exit_s": 3600},
        }
    )


class Crew(LocalCrew):
    """Loses its GPU actor or its store before some segments, or after one has been made."""

    def __init__(self, lost=()):
        super().__init__()
        self.lost = dict(lost)

    async def denoiser(self, method, *arguments):
        segment = arguments[1].index if len(arguments) > 1 else None
        if method == "denoise_segment" and segment in self.lost:
            lost = self.lost.pop(segment)
            if "store" in lost:
                self._store.close()
                self._store = type(self._store)()
            if "gpu" in lost:
                self._denoiser = type(self._denoiser)(self)
                raise ConnectionError("the actor died")
        return await super().denoiser(method, *arguments)


async def generate(root, config, run_id, crew=None):
    crew = crew or Crew()
    scheduler = SegmentSchedulerActor(crew)
    await scheduler.submit(run_id, config.model_dump(mode="json"), str(root), str(root))
    index, records = 0, []
    while (reply := await scheduler.wait_segment(run_id, index, 60)).record is not None:
        records.append(reply.record)
        index += 1
    assert reply.status.state == "done", reply.status.error
    async with asyncio.timeout(10):  # the run is closed a moment later
        while list((root / ".cache_store").glob("*.safetensors")):
            await asyncio.sleep(0.01)
    await crew.end()
    return records


def latents_of(root, run_id):
    return torch.cat([load_latents(RunFolder(root, run_id).latents(k)) for k in range(SEGMENTS)])


@pytest.mark.parametrize("granularity", ["stack", "per_block", 3])
def test_latents_are_the_same_in_much_memory_and_in_little(tmp_path, model, granularity):
    records = asyncio.run(generate(tmp_path, config_for(model, 100, granularity), "much"))
    little = asyncio.run(generate(tmp_path, config_for(model, 2, granularity), "little"))
    carried = asyncio.run(generate(tmp_path, config_for(model, 2, granularity, "never"), "carried"))
    for other in ("little", "carried"):
        assert torch.equal(latents_of(tmp_path, "much"), latents_of(tmp_path, other))
    units = {"stack": 1, "per_block": 4, 3: 2}[granularity]
    for made in (records, little, carried):
        counts = [(r.statistics["entries_written"], r.statistics["entries_read"]) for r in made]
        opening = 3 * 2 * units
        assert counts == [(opening, 0), *[(0, opening)] * 3, (opening, 0), (0, opening)]
    assert all(record.statistics["host_bytes"] <= 2 * 4096 for record in little)
    last = little[-1].statistics
    assert last["prefetch_requested"] > 0
    assert last["prefetch_useful"] + last["prefetch_late"] > 0
    assert records[-1].statistics["prefetch_requested"] == 0, "everything was still in memory"


def test_reuse_shows_in_what_is_computed_and_in_the_latents(tmp_path, model):
    values = config_for(model).model_dump(mode="json")
    made = {}
    for name, cache in (
        ("reusing", {"policy": "warmstart_reuse", "inner": "always", "warm_steps": 3, "reuse_window": 3}),
        ("alone", {"policy": "none"}),
    ):
        config = Config.model_validate(values | {"cache": cache})
        made[name] = asyncio.run(generate(tmp_path, config, name)), latents_of(tmp_path, name)
    (reusing, first), (_, second) = made["reusing"], made["alone"]
    same = [torch.equal(first[k], second[k]) for k in range(SEGMENTS)]
    assert same == [True, False, False, False, True, False], "the first and the fifth have nothing to reuse"
    assert [record.statistics["units_skipped"] for record in reusing] == [0, 6, 6, 6, 0, 6]


@pytest.mark.parametrize("shared_memory", ["require", "never"])
@pytest.mark.parametrize(
    "lost",
    [{2: "store"}, {2: "gpu"}, {1: "store", 3: "gpu"}, {4: "gpu and store"}, {0: "gpu", 5: "store"}],
    ids=str,
)
def test_a_lost_actor_changes_no_latents(tmp_path, model, lost, shared_memory):
    config = config_for(model, 2, shared_memory=shared_memory)
    asyncio.run(generate(tmp_path, config, "whole"))
    crew = Crew(lost)
    asyncio.run(generate(tmp_path, config, "hurt", crew))
    assert not crew.lost, "every planned loss happened"
    assert torch.equal(latents_of(tmp_path, "whole"), latents_of(tmp_path, "hurt"))


def test_each_segment_is_asked_for_before_the_one_before_it_ends(tmp_path, model, monkeypatch):
    log = []
    prepare, complete = SharedTiers.prepare, SharedTiers.complete

    def logged(name, call):
        def wrapped(self, run, segment, *others):
            if name == "prepare":
                log.append((name, segment))
            result = call(self, run, segment, *others)
            if name == "complete":
                log.append((name, segment))
            return result

        return wrapped

    monkeypatch.setattr(SharedTiers, "prepare", logged("prepare", prepare))
    monkeypatch.setattr(SharedTiers, "complete", logged("complete", complete))
    asyncio.run(generate(tmp_path, config_for(model), "one"))
    assert sorted(log) == [(name, k) for name in ("complete", "prepare") for k in range(SEGMENTS)]
    assert all(log.index(("prepare", k)) < log.index(("complete", k - 1)) for k in range(1, SEGMENTS))


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (
            {"host_bytes": RESIDUAL - 1},
            f"store.host_bytes is {RESIDUAL - 1}; one residual of this run has {RESIDUAL} bytes",
        ),
        ({"host_bytes": 2**49}, "of shared memory, and /dev/shm has"),
        ({"directory": "FILE"}, "store.directory cannot be used: directory is 'FILE', which is a file"),
    ],
    ids=["too small", "too large", "no folder"],
)
def test_a_store_that_cannot_be_made_ends_the_run_with_a_sentence(tmp_path, model, store, words):
    (tmp_path / "file").touch()
    config = config_for(model).model_dump(mode="json")
    config["store"] |= {key: str(tmp_path / "file") if value == "FILE" else value for key, value in store.items()}

    async def submit():
        crew = Crew()
        scheduler = SegmentSchedulerActor(crew)
        await scheduler.submit("one", config, str(tmp_path), str(tmp_path))
        reply = await scheduler.wait_segment("one", 0, 60)
        await crew.end()
        return reply.status

    status = asyncio.run(submit())
    assert status.state == "failed"
    assert words.replace("FILE", str(tmp_path / "file")) in status.error
    assert "attempt" not in status.error, "another would fail the same way"
