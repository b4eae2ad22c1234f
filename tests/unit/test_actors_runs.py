"""What ended runs can go on with, and what goes wrong in a run: each a clear error, or no difference at all."""

import asyncio
import re
import threading
import time

import pytest
import torch
from diffusers import AutoencoderKLWan

from edit_ray.actors.denoiser import DenoiserActor
from edit_ray.actors.local import LocalPool, LocalWorker
from edit_ray.actors.messages import RunSpec
from edit_ray.engine.continuity import load_latents
from edit_ray.engine.model_info import lookback_latents
from edit_ray.errors import ConfigError, RunLive
from edit_ray.runs.folder import RunFolder
from edit_ray.video.hls import newest_playlist
from tests.chaos.storm import die
from tests.runs_here import PLAIN_AND_REUSE, SEGMENTS, SHORT, Pool, check_same, config_for, done, end_of, made, submit


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["plain", "reuse"])
async def test_a_run_is_extended_and_rerolled_and_its_old_takes_are_kept(start, tmp_path, model, name):
    folder = RunFolder(tmp_path, name)
    scheduler = start()
    await submit(scheduler, tmp_path, name, config_for(model, **PLAIN_AND_REUSE[name]))
    with pytest.raises(RunLive, match="is active; wait for it to end"):
        await scheduler.extend(name, str(tmp_path), 2, False)
    await end_of(scheduler, name)
    before = folder.read_manifest()
    assert (await scheduler.extend(name, str(tmp_path), 2, False)).num_segments == SEGMENTS + 2
    await done(scheduler, name)
    extended = folder.read_manifest()
    assert extended.segments[:SEGMENTS] == before.segments
    for start, words in ((-1, "--from is -1"), (6, "from 0 to 5")):
        with pytest.raises(ConfigError, match=words):
            await scheduler.reroll(name, str(tmp_path), start, None, None, False)
    with pytest.raises(ConfigError, match="--segments is 0"):
        await scheduler.extend(name, str(tmp_path), 0, False)
    await scheduler.reroll(name, str(tmp_path), 4, 99, "a blue square", False)
    await done(scheduler, name)
    manifest = folder.read_manifest()
    assert [record.take for record in manifest.segments] == [0, 0, 0, 0, 1, 1]
    assert manifest.earlier_takes == extended.segments[4:]
    assert [record.prompt for record in manifest.segments[4:]] == ["a blue square"] * 2
    for record in (*manifest.segments, *manifest.earlier_takes):
        assert (folder.path / record.media).exists()
        assert (folder.path / record.latents).exists()
    assert not torch.equal(load_latents(folder.latents(4, 0)), load_latents(folder.latents(4, 1)))
    assert manifest.num_frames == 9 + 5 * 4 * (3 - 2)
    assert all("seam_score" in record.statistics for record in manifest.segments[1:])
    kept, first = manifest.segments[:4], manifest.earlier_takes
    assert [playlist(folder.path, number) for number in range(3)] == [
        listed(records) for records in (kept, (*kept, *first), manifest.segments)
    ]
    assert newest_playlist(folder.path) == "live-2.m3u8"


def playlist(folder, number):
    """The fragments that a playlist names, all of which are there, and its durations, in frames at 16 a second."""
    text = (folder / f"live-{number}.m3u8").read_text()
    assert text.endswith("#EXT-X-ENDLIST\n")
    found = re.findall(r"^#EXTINF:([0-9.]+),\n(.+)$", text, re.MULTILINE)
    assert all((folder / name).exists() for _, name in found)
    return [(name, float(seconds) * 16) for seconds, name in found]


def listed(records):
    return [(record.media, record.num_frames) for record in records]


async def test_an_extended_run_is_the_run_that_was_as_long_from_the_start(start, tmp_path, model, whole):
    scheduler = start()
    folder = await made(scheduler, tmp_path, "plain", config_for(model, video={"num_segments": SEGMENTS - 1}))
    await scheduler.extend("plain", str(tmp_path), 1, False)
    await done(scheduler, "plain")
    assert folder.final.read_bytes() == (await whole(config_for(model))).final.read_bytes()


async def test_a_reroll_with_the_same_seed_makes_the_same_segments(start, tmp_path, model, whole):
    """Another take of all segments with the run's own seed: nothing but its name tells it from the first."""
    scheduler, config = start(), config_for(model)
    folder = await made(scheduler, tmp_path, "plain", config)
    await scheduler.reroll("plain", str(tmp_path), 1, config.sampling.seed, None, False)
    await done(scheduler, "plain")
    for index in range(1, SEGMENTS):
        first = (await whole(config)).latents(index, 0)
        assert torch.equal(load_latents(folder.latents(index, 1)), load_latents(first))


@pytest.mark.parametrize("cpu_threads", [1, 2])
def test_a_segment_is_decoded_while_the_next_one_is_denoised(tmp_path, model, cpu_threads):
    """Whoever waits for its frames does not wait for the next ones: also where torch's work is done one by one."""
    decoded = threading.Event()

    class Held(DenoiserActor):
        """Denoises no step after the second one of segment 1 before segment 0 is decoded."""

        def _let_decoding_go_first(self, engine):
            deadline = time.monotonic() + 20
            while self._progress and (self._progress.segment_index, self._progress.step) == (1, 2):
                super()._let_decoding_go_first(engine)
                if decoded.wait(0.01) or time.monotonic() > deadline:
                    break

    spec = RunSpec("one", tmp_path, config_for(model, engine={"cpu_threads": cpu_threads}), 4)
    spec.folder.create("", spec.begun("", {})).close()
    worker = LocalWorker()
    denoiser = Held(worker)
    denoiser.prepare_run(spec)
    denoiser.denoise_segment(spec, spec.segment(0), 0)
    denoising = threading.Thread(target=denoiser.denoise_segment, args=(spec, spec.segment(1), 0))
    denoising.start()
    while denoising.is_alive() and ((at := denoiser.progress()) is None or (at.segment_index, at.step) != (1, 2)):
        time.sleep(0.001)
    denoiser.decode_segment(spec, spec.segment(0))
    assert denoiser.progress().step == 2
    decoded.set()
    denoising.join()
    denoiser.decode_segment(spec, spec.segment(1))
    worker.end()


async def test_an_actor_that_answers_and_makes_no_step_is_restarted(finish, tmp_path, model, whole):
    async def hang(*_):
        await asyncio.Event().wait()

    pool = Pool({("denoise_segment", 1): hang})
    status = await finish(config_for(model, engine={"cpu_threads": 1, "step_timeout_s": 2.0}), "plain", pool)
    assert (status.state, pool.calls.count(("denoise_segment", 1))) == ("done", 2), status.error
    check_same(await whole(config_for(model)), RunFolder(tmp_path, "plain"), but=["run.yaml"])


async def test_latents_that_are_not_finite_are_tried_again_and_never_written(finish, start, tmp_path, model):
    class NotFinite(DenoiserActor):
        def denoise_segment(self, spec, segment, attempt):
            if segment.index != 1:
                return super().denoise_segment(spec, segment, attempt)
            weight = self._ready_engine(spec).pipe.transformer.proj_out.bias.data
            whole = weight.clone()
            try:
                weight.fill_(float("nan"))
                return super().denoise_segment(spec, segment, attempt)
            finally:
                weight.copy_(whole)

    class Spoilt(LocalPool):
        async def start(self, spec, worker):
            await super().start(spec, worker)
            self.workers[worker].denoiser.__class__ = NotFinite

    status = await finish(config_for(model, engine={"cpu_threads": 1, "segment_retries": 1}), "one", Spoilt())
    assert status.state == "failed"
    assert "denoise of segment 1 failed (attempt 2 of 2)" in status.error
    assert "not finite" in status.error
    folder = RunFolder(tmp_path, "one")
    assert [record.index for record in folder.read_manifest().segments] in ([], [0])
    assert not folder.latents(1).exists()
    assert not folder.media(1).exists()


class Crowded(LocalPool):
    """Its GPU has no memory left the first `times` that segment 1 is denoised, or decoded. Its tiles are small."""

    def __init__(self, times, crowded="denoise_segment"):
        super().__init__()
        self.times, self.crowded = times, crowded

    async def denoiser(self, worker, method, *arguments):
        if method in ("denoise_segment", "decode_segment"):
            pipe = self.workers[worker].denoiser._ready_engine(arguments[0]).pipe
            pipe.vae.tile_sample_min_height = pipe.vae.tile_sample_min_width = 24
            pipe.vae.tile_sample_stride_height = pipe.vae.tile_sample_stride_width = 16
        if method == self.crowded and arguments[1].index == 1 and self.times:
            self.times -= 1

            def full(*_):
                hook.remove()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

            decodes = method == "decode_segment"
            hook = (pipe.vae.decoder if decodes else pipe.transformer).register_forward_pre_hook(full)
        return await super().denoiser(worker, method, *arguments)


@pytest.mark.parametrize("times", [1, 2])
async def test_memory_that_does_not_do_is_tried_once_more_then_named(finish, tmp_path, model, whole, times):
    status = await finish(config_for(model), "plain", Crowded(times))
    if times == 1:
        assert status.state == "done", status.error
        check_same(await whole(config_for(model)), RunFolder(tmp_path, "plain"))
    else:
        assert status.error.startswith("denoise of segment 1 failed: out of GPU memory (CUDA out of memory.")


async def test_memory_that_does_not_do_for_decoding_does_for_tiles_and_stays_so(start, tmp_path, model, whole):
    """What is resumed by other actors, which have memory enough, is decoded as it would have been."""
    config, pool = config_for(model, **SHORT), Crowded(1, "decode_segment")
    scheduler = start(pool)
    tiled = await made(scheduler, tmp_path, "whole", config)
    pool.times = 1
    await submit(scheduler, tmp_path, "hurt", config)
    await scheduler.wait_segment("hurt", 1, 60)
    await die(scheduler)
    await pool.end()
    again = start(Crowded(0))
    await again.resume("hurt", str(tmp_path), False)
    await done(again, "hurt")
    before, hurt = await whole(config), RunFolder(tmp_path, "hurt")
    assert tiled.read_manifest().tiled_from == hurt.read_manifest().tiled_from == 1
    assert [record.statistics["decode_tiled"] for record in hurt.read_manifest().segments] == [0, 1, 1]
    check_same(hurt, tiled)
    assert [before.media(k).read_bytes() == tiled.media(k).read_bytes() for k in range(3)] == [True, False, False]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("tiled_decode", "times"), [("auto", 2), ("always", 1), ("never", 1)])
async def test_memory_that_does_not_even_do_for_tiles_is_named(finish, tmp_path, model, tiled_decode, times):
    engine = {"cpu_threads": 1, "tiled_decode": tiled_decode}
    status = await finish(config_for(model, engine=engine, **SHORT), "one", Crowded(times, "decode_segment"))
    assert status.error.startswith("decode of segment 1 failed: out of GPU memory (CUDA out of memory.")
    assert RunFolder(tmp_path, "one").read_manifest().tiled_from == (1 if tiled_decode == "auto" else None)


async def test_what_a_killed_actor_had_begun_to_write_goes_with_the_end_of_the_run(start, tmp_path, model):
    scheduler = start()
    await submit(scheduler, tmp_path, "plain", config_for(model))
    draft = tmp_path / "plain" / "segments" / ".00000-t0.m4s.1.part"
    draft.write_bytes(b"half a segm")
    await done(scheduler, "plain")
    assert not draft.exists()


async def test_a_removed_folder_ends_the_run_with_a_sentence(start, tmp_path, model):
    scheduler = start()
    await submit(scheduler, tmp_path, "one", config_for(model))
    await scheduler.wait_segment("one", 0, 60)
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    status = await end_of(scheduler, "one")
    assert status.state == "failed"
    assert f"the run's folder {tmp_path / 'one'} was removed" in status.error
    assert RunFolder(tmp_path, "elsewhere").path.exists()


async def test_an_endless_run_keeps_a_bounded_number_of_files(start, tmp_path, model):
    endless = {"sampling": {"num_frames": 17}, "video": {"num_segments": None}, "cache": {"policy": "always"}}
    config = config_for(model, **endless, output={"keep_segments": 2}, continuity={"history_latents": 2})
    scheduler = start()
    await submit(scheduler, tmp_path, "one", config)
    for index in range(14):
        await scheduler.wait_segment("one", index, 60)
    await scheduler.cancel("one")
    status = await end_of(scheduler, "one")
    in_memory = [(await scheduler.wait_segment("one", index, 1)).record for index in range(status.committed)]
    assert [bool(record.statistics) for record in in_memory[-3:]] == [False, True, True]
    assert not any(record.statistics for record in in_memory[:-2])
    await scheduler.resume("one", str(tmp_path), False)
    await scheduler.wait_segment("one", status.committed, 60)
    await scheduler.cancel("one")
    status = await end_of(scheduler, "one")
    folder = RunFolder(tmp_path, "one")
    assert status.state == "cancelled"
    assert (status.num_segments, status.num_frames) == (None, None)
    assert status.committed >= 14
    assert status.dropped_before == status.committed - 2
    media = sorted(path.name for path in (folder.path / "segments").iterdir())
    assert len(media) <= 4, "two that stay, and two that were on their way when the run was stopped"
    assert len(list((folder.path / "records").iterdir())) <= 4
    assert all(record.statistics for record in folder.read_manifest().segments), "the file keeps what memory lets go"
    needed = 2 + lookback_latents(AutoencoderKLWan.load_config(model / "vae"))
    latents = len(list((folder.path / "latents").iterdir()))
    assert -(-needed // 3) <= latents <= -(-needed // 3) + 2, "each segment adds three"


async def test_two_gpu_actors_make_two_runs_at_once(start, tmp_path, model, whole):
    scheduler = start(pool := LocalPool())
    config = config_for(model, engine={"cpu_threads": 1, "gpu_actors": 2})
    await submit(scheduler, tmp_path, "one", config)
    await submit(scheduler, tmp_path, "two", config)
    states = [status.state for status in await scheduler.runs()]
    assert set(states) <= {"preparing", "running"}, "neither waits for the other's GPU actor"
    for run_id in ("one", "two"):
        await done(scheduler, run_id)
        check_same(RunFolder(tmp_path, run_id), await whole(config_for(model)), but=["run.yaml"])
    assert sorted(pool.workers) == [0, 1]
