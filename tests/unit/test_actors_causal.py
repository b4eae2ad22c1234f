"""Runs of causal models, through the actors' plain classes: segments of chunks, whose K/V is computed again."""

import shutil

import pytest
import torch

from edit_ray import EditCausalWanPipeline
from edit_ray.actors.gpu_work import chunks_before, window_of
from edit_ray.actors.messages import RunSpec
from edit_ray.config import check_config
from edit_ray.engine.causal_pipeline import _seeds
from edit_ray.engine.causal_segment import CausalSegmentEngine
from edit_ray.engine.causal_stream import GivenChunk
from edit_ray.engine.continuity import load_latents
from edit_ray.engine.decode import StreamingDecoder, to_uint8
from edit_ray.engine.model_files import model_digest
from edit_ray.errors import ConfigError
from edit_ray.runs.causal_plan import seen_chunks
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.run_plan import segment_seed
from edit_ray.testing import save_random_wan
from tests.chaos.storm import die
from tests.runs_here import Dying, Pool, check_same, config_for, done, end_of, lose_the_gpu_actor, made, submit

pytestmark = pytest.mark.usefixtures("one_thread")
RED, BLUE, GREEN = "a red circle", "a blue square", "a green circle"
SEGMENTS, CHUNKS, SEED = 5, 2, 5
OPTIONS = {"chunk_size": 1, "window": 4, "sink": 1, "timesteps": [1000.0, 750.0]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("causal") / "wan", causal=OPTIONS)


def config_of(model, *, switch=None, start=2, continuity=None, sampling=None, **changes):
    second = {"segment": start, "prompt": BLUE} | ({"switch": switch} if switch else {})
    values = {"video": {"num_segments": SEGMENTS}, "prompt_segments": [{"segment": 0, "prompt": RED}, second]}
    config = config_for(
        model,
        continuity={"mode": "causal", "chunk_size": 1, "chunks": CHUNKS} | (continuity or {}),
        sampling={"num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0, "seed": SEED} | (sampling or {}),
        **values | changes,
    )
    assert check_config(config) == []
    return config


def latents_of(folder, segments=SEGMENTS, take=0):
    return torch.cat([load_latents(folder.latents(index, take)) for index in range(segments)], dim=2)


def generator_of(segment):
    return torch.Generator().manual_seed(segment_seed(SEED, segment))


class Library:
    """The chunks of a run by streams of the library; one segment after the other."""

    def __init__(self, model, **options):
        self.pipe = EditCausalWanPipeline.from_pretrained(model)
        self.options, self.stream, self.made = options, None, []

    def begin(self, segment, prompt, history=None):
        arguments = {"height": 32, "width": 32, "decode": False, "history": history, **self.options}
        self.stream = self.pipe.stream(prompt, generator=generator_of(segment), **arguments)

    def go_on(self, segment, prompt):
        self.stream.send(prompt=prompt, switch="recache")
        self.stream._seeds = _seeds(generator_of(segment), 1)

    def make(self):
        self.made += [next(self.stream).latents for _ in range(CHUNKS)]

    def texts(self, prompt):
        return self.pipe._texts_of(1.0, prompt, None, 1, None, None, 512)

    @property
    def latents(self):
        return torch.cat(self.made, dim=2)


@pytest.mark.parametrize("changes", [{}, {"rope": "absolute"}, {"window": 3, "sink": 2}, {"window": 1, "sink": 0}])
async def test_a_run_is_one_stream_whose_kv_is_made_anew_at_every_segment(whole, model, changes):
    folder, library = await whole(config_of(model, continuity=changes)), Library(model, **changes)
    library.begin(0, RED)
    for segment in range(SEGMENTS):
        if segment:
            library.go_on(segment, RED if segment < 2 else BLUE)
        library.make()
    assert torch.equal(latents_of(folder), library.latents)


async def test_a_segment_rebuilds_the_kv_of_the_stream_that_makes_it_anew(whole, model):
    config = config_of(model)
    folder, library = await whole(config), Library(model)
    engine = CausalSegmentEngine(EditCausalWanPipeline.from_pretrained(model))
    spec = RunSpec(folder.run_id, folder.path.parent, config, SEGMENTS)
    library.begin(0, RED)
    for segment in range(4):
        if segment:
            library.go_on(segment, RED if segment < 2 else BLUE)
        library.make()
    window = window_of(engine, spec)
    before = chunks_before(spec, seen_chunks(spec.storyboard, 3, window), window.chunk_size)
    stream = engine.stream(config.sampling, prompt=BLUE, seed=segment_seed(SEED, 3), before=before, chunks=CHUNKS)
    while next(stream, None):
        if stream.next_chunk == library.stream.next_chunk:
            kept, mine = library.stream.kv, stream.kv
            assert mine.chunks == kept.chunks == (0, 5, 6, 7)
            assert all(torch.equal(mine.get(c, layer), kept.get(c, layer)) for c in kept.chunks for layer in range(2))
            break
    else:
        pytest.fail("the segment has as many chunks")


async def test_a_kept_prompt_shows_earlier_chunks_with_their_own(whole, model):
    latents, library = latents_of(await whole(config_of(model, switch="keep"))), Library(model)
    for segment in range(SEGMENTS):
        seen = [0, *range(1, 2 * segment)[-3:]] if segment else []
        shown = [(chunk, library.texts(RED if chunk < 2 * CHUNKS else BLUE)) for chunk in seen]
        history = [GivenChunk(chunk, latents[:, :, chunk : chunk + 1], texts) for chunk, texts in shown]
        library.begin(segment, RED if segment < 2 else BLUE, history)
        library.make()
    assert torch.equal(latents, library.latents)


async def test_a_cut_is_a_beginning_and_its_first_chunks_are_the_sink(whole, model):
    library = Library(model)
    for segment in range(SEGMENTS):
        library.begin(segment, RED if segment < 2 else BLUE) if segment in (0, 2) else library.go_on(
            segment, RED if segment < 2 else BLUE
        )
        library.make()
    assert torch.equal(latents_of(await whole(config_of(model, switch="cut"))), library.latents)


async def test_the_frames_of_all_segments_are_one_stream(whole, model):
    folder = await whole(config_of(model))
    records = folder.read_manifest().segments
    assert [record.num_frames for record in records] == [5, 8, 8, 8, 8]
    frames = to_uint8(StreamingDecoder(EditCausalWanPipeline.from_pretrained(model).vae).decode(latents_of(folder)))
    assert len(frames) == folder.read_manifest().num_frames == 37
    assert [record.statistics["chunks"] for record in records] == [CHUNKS] * SEGMENTS
    assert records[0].statistics["recache_s"] == 0 < records[1].statistics["recache_s"]
    assert all(record.statistics["kv_bytes"] == 2 * 4 * 24 * 4 * 4 * 3 for record in records)
    assert all(record.statistics["steps_computed_cond"] == 2 * CHUNKS for record in records)


STAGES = [(f"{stage}_segment", segment) for stage in ("denoise", "decode", "encode") for segment in range(SEGMENTS)]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("strike", [*STAGES, ("prepare_run", None), ("finalize_run", None)])
async def test_a_run_that_loses_its_gpu_actor_makes_the_same_bytes(start, tmp_path, model, whole, strike):
    config, pool = config_of(model, switch="keep"), Pool({strike: lose_the_gpu_actor})
    folder = await made(start(pool), tmp_path, "one", config)
    assert not pool.strikes
    check_same(await whole(config), folder)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("calls", range(1, 3 * SEGMENTS + 2))
@pytest.mark.parametrize("switch", ["recache", "keep", "cut"])
async def test_the_next_segment_scheduler_goes_on_to_the_same_bytes(start, tmp_path, model, whole, switch, calls):
    config, pool = config_of(model, switch=switch), Dying(calls)
    first = start(pool)
    await submit(first, tmp_path, "one", config)
    await pool.now.wait()
    await die(first)
    await done(start(pool), "one")
    check_same(await whole(config), RunFolder(tmp_path, "one"))


async def test_a_stopped_run_is_resumed_by_other_actors_to_the_same_bytes(start, tmp_path, model, whole):
    config, first = config_of(model), start()
    await submit(first, tmp_path, "one", config)
    await first.wait_segment("one", 1, 60)
    await first.cancel("one")
    await end_of(first, "one")
    second = start()
    await second.resume("one", str(tmp_path), False)
    await done(second, "one")
    playlists = ["live-0.m3u8", "live-1.m3u8", "live.m3u8"]  # the stop has ended one
    check_same(await whole(config), RunFolder(tmp_path, "one"), but=playlists)


@pytest.mark.parametrize("switch", ["recache", "keep", "cut"])
async def test_an_extended_run_is_the_run_that_was_as_long_from_the_start(start, tmp_path, model, whole, switch):
    scheduler = start()
    short = config_of(model, switch=switch, video={"num_segments": SEGMENTS - 2})
    folder = await made(scheduler, tmp_path, "one", short)
    await scheduler.extend("one", str(tmp_path), 2, False)
    await done(scheduler, "one")
    long = await whole(config_of(model, switch=switch))
    assert torch.equal(latents_of(folder), latents_of(long))
    assert folder.final.read_bytes() == long.final.read_bytes()


def changed_from_the_start(model, start_of_blue, switch):
    """From segment 3 on another prompt and seed: the storyboard's own switches stay, and the new prompt is one of its
    own.
    """
    green = {"prompt": GREEN, "seed": 77}
    own = green | {"segment": start_of_blue} | ({"switch": switch} if switch else {})
    entries = [{"segment": 0, "prompt": RED}, *([green | {"segment": 3}] if start_of_blue != 3 else []), own]
    return config_of(model, prompt_segments=entries)


@pytest.mark.parametrize(("start_of_blue", "switch"), [(4, None), (4, "cut"), (3, "keep")])
async def test_a_reroll_makes_what_a_run_with_its_prompt_and_seed_makes(
    start, tmp_path, model, whole, start_of_blue, switch
):
    scheduler = start()
    folder = await made(scheduler, tmp_path, "one", config_of(model, start=start_of_blue, switch=switch))
    await scheduler.reroll("one", str(tmp_path), 3, 77, GREEN, False)
    await done(scheduler, "one")
    takes = [load_latents(folder.latents(index, int(index >= 3))) for index in range(SEGMENTS)]
    from_start = await whole(changed_from_the_start(model, start_of_blue, switch))
    assert torch.equal(torch.cat(takes, dim=2), latents_of(from_start))


@pytest.mark.parametrize(("start_of_blue", "switch"), [(4, "cut"), (3, "keep")])
async def test_a_steered_run_and_a_branch_make_what_a_run_with_that_prompt_and_seed_makes(
    start, tmp_path, model, whole, start_of_blue, switch
):
    scheduler, config = start(), config_of(model, start=start_of_blue, switch=switch)
    said = {"prompt": GREEN, "seed": 77}
    await submit(scheduler, tmp_path, "steered", config)
    assert (await scheduler.steer("steered", 3, said, "a")).start == 3
    await done(scheduler, "steered")
    await made(scheduler, tmp_path, "one", config)
    await scheduler.branch("two", str(tmp_path), "one", 3, said, None, False, "b")
    await done(scheduler, "two")
    from_start = await whole(changed_from_the_start(model, start_of_blue, switch))
    for run_id in ("steered", "two"):
        check_same(RunFolder(tmp_path, run_id), from_start, but=["run.yaml"])


@pytest.mark.parametrize("chunks", [1, 5])
async def test_a_segment_has_one_chunk_or_more_than_the_window(start, tmp_path, model, whole, chunks):
    sampling, several = {"num_frames": 4 * chunks - 3}, {"chunks": chunks}
    config = config_of(model, switch="keep", sampling=sampling, continuity=several)
    folder = await made(start(Pool({("denoise_segment", 3): lose_the_gpu_actor})), tmp_path, "one", config)
    assert [record.num_frames for record in folder.read_manifest().segments] == [4 * chunks - 3, *[4 * chunks] * 4]
    check_same(await whole(config), folder)


@pytest.mark.parametrize("switch", ["recache", "cut"])
async def test_old_files_are_removed_and_those_that_a_rebuild_needs_are_kept(start, tmp_path, model, whole, switch):
    """The latents of the sink stay as long as its scene does, also of a run that is killed; nothing is made without."""
    many = {"continuity": {"chunks": 5}, "sampling": {"num_frames": 17}, "start": 10, "switch": switch}
    config = config_of(model, **many, video={"num_segments": 18}, output={"keep_segments": 1})
    folder, pool = RunFolder(tmp_path, "one"), Pool()
    first = start(pool)
    await submit(first, tmp_path, "one", config)
    await first.wait_segment("one", 9, 60)
    await die(first)
    assert kept_latents(folder)[0] == 0
    second = start(pool)
    await done(second, "one")
    kept = kept_latents(folder)
    assert kept == [0 if switch == "recache" else 10, *range(kept[1], 18)]
    assert kept[1] > 10
    entire = await whole(config_of(model, **many, video={"num_segments": 18}))
    assert torch.equal(load_latents(folder.latents(17, 0)), load_latents(entire.latents(17, 0)))
    (folder.path / "latents" / f"{kept[0]:05d}-t0.safetensors").unlink()
    with pytest.raises(ConfigError, match="and there is none, as the latents that earlier ones continue were dropped"):
        await second.reroll("one", str(tmp_path), 17, 1, None, False)


def kept_latents(folder):
    """The segments that have latents; a killed scheduler's GPU actor may still be at a draft."""
    return sorted(int(path.name[:5]) for path in (folder.path / "latents").glob("[0-9]*"))


async def test_residual_caches_decide_in_each_chunk_and_all_of_them_are_counted(start, tmp_path, model):
    cache = {"policy": "fbcache", "rel_l1_thresh": 10.0}
    config = config_of(model, cache=cache, continuity={"chunks": 3}, sampling={"num_frames": 9})
    folder = await made(start(), tmp_path, "one", config)
    statistics = folder.read_manifest().segments[1].statistics
    assert statistics["steps_computed_cond"] + statistics["steps_skipped_cond"] == 3 * 2
    assert statistics["steps_skipped_cond"] > 0


async def test_guidance_is_possible_and_warned_of(start, tmp_path, model, whole):
    config = config_of(model, sampling={"guidance_scale": 3.0, "negative_prompt": "background"}, switch="keep")
    scheduler = start(Pool({("denoise_segment", 3): lose_the_gpu_actor}))
    await submit(scheduler, tmp_path, "one", config)
    await scheduler.wait_segment("one", 1, 60)
    assert "guidance_scale is 3: causal models are distilled" in (await scheduler.status("one")).warning
    await done(scheduler, "one")
    check_same(await whole(config), RunFolder(tmp_path, "one"))


async def test_a_model_in_the_folder_of_another_takes_its_parts(start, tmp_path, model, whole):
    """As training leaves it: the transformer and an index; another VAE above makes another model."""
    above = save_random_wan(tmp_path / "above", expand_timesteps=True)
    inside = above / "causal"
    inside.mkdir()
    shutil.copytree(model / "transformer", inside / "transformer")
    shutil.copyfile(model / "model_index.json", inside / "model_index.json")
    folder = await made(start(), tmp_path, "one", config_of(inside))
    digest = folder.read_manifest().provenance["model"]
    assert torch.equal(latents_of(folder), latents_of(await whole(config_of(model))))
    assert model_digest(str(inside)) == digest
    weights = above / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert model_digest(str(inside)) != digest
