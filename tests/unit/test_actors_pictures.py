"""Runs that see pictures: `image`, `svi`, those of the storyboard; through the actors' plain classes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edit_ray.actors.denoiser import DenoiserActor
from edit_ray.actors.local import LocalWorker
from edit_ray.actors.messages import RunSpec
from edit_ray.config import Config, check_config
from edit_ray.engine.continuity import load_latents
from edit_ray.engine.decode import StreamingDecoder, to_uint8
from edit_ray.engine.init_file import read_picture
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.engine.vae_stream import encode_still, encode_video, to_video
from edit_ray.errors import ConfigError, HardwareDiffers
from edit_ray.runs.folder import RunFolder
from edit_ray.testing import save_random_wan
from tests.unit.test_actors import Pool
from tests.unit.test_actors_recovery import end_of

SEGMENTS, SIZE = 6, {"height": 32, "width": 32}
SAMPLING = {**SIZE, "num_frames": 17, "num_inference_steps": 2, "seed": 5, "guidance_scale": 1.0}
LAYOUTS = {
    "TI2V": {"expand_timesteps": True},
    "Wan2.2": {"layout": "image", "two_experts": True},
    "Wan2.1": {"layout": "image_clip"},
    "Wan2.1, first and last": {"layout": "first_last_clip"},
    "VACE": {"layout": "vace"},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: save_random_wan(tmp_path_factory.mktemp("wan"), **layout) for name, layout in LAYOUTS.items()}


@pytest.fixture
def files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
    for name, frame in zip("abcd", noise, strict=True):
        Image.fromarray(frame).save(tmp_path / f"{name}.png")
    return {name: str(tmp_path / f"{name}.png") for name in "abcd"}


def spec_for(root, model, continuity, *entries, run_id="one", **changes):
    config = {
        "model": {"path": str(model)},
        "sampling": SAMPLING,
        "video": {"num_segments": SEGMENTS},
        "prompt_segments": [{"segment": 0, "prompt": "a red circle"} | entries[0], *entries[1:]],
        "continuity": continuity,
        "engine": {"cpu_threads": 1},
    } | changes
    spec = RunSpec(run_id, root, Config.model_validate(config), config["video"]["num_segments"])
    assert check_config(spec.config) == []
    spec.folder.create("", spec.begun("", {})).close()
    return spec


def make(spec, *, lose=False):
    """All segments, by one GPU actor or each call by a new one: the frames of each, and how often a VAE encoded."""
    denoiser, encoded, frames = None, Counter(), []

    def actor():
        nonlocal denoiser
        if denoiser is None or lose:
            denoiser = DenoiserActor(LocalWorker())
            denoiser.prepare_run(spec)
            engine = denoiser._model.engine
            engine.pipe.vae.encode = counted(engine.pipe.vae.encode)
        return denoiser

    def counted(encode):
        def call(video, *args, **kwargs):
            encoded[segment.index, video.shape[2]] += 1
            return encode(video, *args, **kwargs)

        return call

    for index in range(spec.num_segments):
        segment = spec.segment(index)
        actor().denoise_segment(spec, segment, 0)
        actor().decode_segment(spec, segment)
        frames.append(next(reversed(denoiser._frames.values())).copy())
        actor().encode_segment(spec, segment)
    return frames, encoded


def latents_of(spec):
    return [load_latents(spec.latents(index)) for index in range(spec.num_segments)]


def image_of(path):
    return Image.fromarray(read_picture(path, **SIZE)[0])


def pipeline(model, spec, index, **conditions):
    """The same segment by the library."""
    pipe, segment = EditWanPipeline.from_pretrained(model), spec.segment(index)
    pipe.set_progress_bar_config(disable=True)
    arguments = {name: value for name, value in SAMPLING.items() if name != "seed"}
    generator = torch.Generator().manual_seed(segment.seed)
    return pipe(segment.prompt, "", **arguments, generator=generator, output_type="latent", **conditions).frames


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", ["TI2V", "Wan2.1", "Wan2.2"])
def test_image_begins_each_segment_with_the_last_frame(tmp_path, models, files, layout):
    """Frames exact in number, one encoding a segment, the pipeline's latents, one decoder for the whole video."""
    ends = {} if layout == "Wan2.1" else {"last_image": files["b"]}
    spec = spec_for(tmp_path, models[layout], {"mode": "image", "init": files["a"]}, ends)
    frames, encoded = make(spec)
    assert [len(part) for part in frames] == [17, *[16] * (SEGMENTS - 1)]
    assert spec.config.num_frames_total == 17 + 16 * (SEGMENTS - 1)
    latents = latents_of(spec)
    assert [part.shape[2] for part in latents] == [5, *[4] * (SEGMENTS - 1)]
    once = {(index, 1 if layout == "TI2V" else 17): 1 for index in range(SEGMENTS)}
    assert encoded == once | ({(SEGMENTS - 1, 5): 1} if layout == "TI2V" else {})
    for index in (0, 1, SEGMENTS - 1):
        shown = {"image": Image.fromarray(frames[index - 1][-1]) if index else image_of(files["a"])}
        if index == SEGMENTS - 1:  # the end of the video, and of no other segment
            shown |= {name: image_of(path) for name, path in ends.items()}
        window = pipeline(models[layout], spec, index, **shown)
        assert torch.equal(window[:, :, 5 - latents[index].shape[2] :], latents[index])
    vae = EditWanPipeline.from_pretrained(models[layout]).vae
    whole = to_uint8(StreamingDecoder(vae).decode(torch.cat(latents, dim=2)))
    assert np.array_equal(whole.numpy(), np.concatenate(frames))
    if layout == "TI2V":
        still = encode_still(vae, to_video(read_picture(files["b"], **SIZE)))
        assert torch.equal(latents[-1][:, :, -1:], still[:, :, -1:]), "a model that holds latents reaches it"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", ["Wan2.2", "Wan2.1"])
def test_svi_holds_on_to_one_picture_and_continues_latents(tmp_path, models, files, layout):
    last = {} if layout == "Wan2.1" else {"last_image": files["b"]}
    spec = spec_for(tmp_path, models[layout], {"mode": "svi", "init": files["a"]}, last)
    frames, encoded = make(spec)
    assert [len(part) for part in frames] == [17, *[12] * (SEGMENTS - 1)]
    latents = latents_of(spec)
    assert [part.shape[2] for part in latents] == [5, *[3] * (SEGMENTS - 1)]
    assert encoded == {(0, 1): 1} | ({(SEGMENTS - 1, 17): 1} if last else {}), "the picture once, and the video's end"
    pipe = EditWanPipeline.from_pretrained(models[layout])
    anchor = encode_video(pipe.vae, to_video(read_picture(files["a"], **SIZE)))
    shown = {"image": image_of(files["a"])}
    for index in (0, 1, SEGMENTS - 1):
        held = anchor if index == 0 else torch.cat([anchor, latents[index - 1][:, :, -1:]], dim=2)
        ends = {name: image_of(path) for name, path in last.items()} if index == SEGMENTS - 1 else {}
        window = pipeline(models[layout], spec, index, image_latents=held, **shown, **ends)
        assert torch.equal(window[:, :, 5 - latents[index].shape[2] :], latents[index])
    whole = to_uint8(StreamingDecoder(pipe.vae).decode(torch.cat(latents, dim=2)))
    assert np.array_equal(whole.numpy(), np.concatenate(frames))


CUT = {"segment": 2, "prompt": "a blue square"}
STORIES = {
    "image": ("Wan2.2", {"mode": "image"}, {"image": "a"}, CUT | {"image": "c", "last_image": "b"}),
    "image, TI2V": ("TI2V", {"mode": "image", "picture_as": "still"}, {"last_image": "b"}, CUT | {"image": "c"}),
    "svi": ("Wan2.2", {"mode": "svi", "init": "d"}, {}, CUT | {"image": "c"}),
    "none": ("Wan2.2", {"mode": "none"}, {"image": "a", "last_image": "b"}, CUT | {"image": "c"}),
    "none, TI2V": ("TI2V", {"mode": "none", "picture_as": "still"}, {"image": "a", "last_image": "b"}, CUT),
    "history": ("TI2V", {"mode": "history", "init": "a"}, {}, CUT | {"last_image": "b"}),
    "overlap": ("TI2V", {"mode": "overlap"}, {"last_image": "c"}, CUT | {"last_image": "b"}),
    "references": ("VACE", {"mode": "none"}, {"reference_images": "ab"}, CUT | {"reference_images": "c"}),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("story", STORIES)
def test_a_gpu_actor_that_dies_between_any_two_calls_changes_nothing(tmp_path, models, files, story):
    layout, continuity, *entries = STORIES[story]
    named = {"image", "last_image", "init"}

    def filled(values):
        paths = {name: files[value] for name, value in values.items() if name in named}
        if "reference_images" in values:
            paths["reference_images"] = [files[name] for name in values["reference_images"]]
        return values | paths

    one, other = (
        spec_for(
            tmp_path,
            models[layout],
            filled(continuity),
            *map(filled, entries),
            run_id=run_id,
            video={"num_segments": 4},
        )
        for run_id in ("one", "other")
    )
    (whole, _), (hurt, _) = make(one), make(other, lose=True)
    assert [len(part) for part in whole] == [one.segment(index).num_frames for index in range(4)]
    assert all(torch.equal(*parts) for parts in zip(latents_of(one), latents_of(other), strict=True))
    assert all(np.array_equal(*parts) for parts in zip(whole, hurt, strict=True))


async def test_a_picture_that_was_edited_stops_the_run_and_what_ends_with_one_is_not_extended(
    start, tmp_path, models, files
):
    """Its digest is that of the manifest's first line; a re-roll keeps the pictures."""
    values = spec_for(
        tmp_path / "spec",
        models["TI2V"],
        {"mode": "image", "init": files["a"]},
        {},
        CUT | {"image": files["c"], "last_image": files["b"]},
        video={"num_segments": 4},
    ).config.model_dump(mode="json")
    picture, folder = Path(files["c"]), RunFolder(tmp_path, "one")
    content = picture.read_bytes()

    async def edit(*_):
        picture.write_bytes(Path(files["d"]).read_bytes())

    scheduler = start(Pool({("denoise_segment", 2): edit}))
    await scheduler.submit("one", values, str(tmp_path), str(tmp_path), "")
    status = await end_of(scheduler, "one")
    assert status.state == "failed"
    assert "a picture of run 'one' was edited while the run was active; put it back" in status.error
    assert folder.read_manifest().begun.provenance["pictures"]
    with pytest.raises(HardwareDiffers, match="its pictures are others than those it was begun with"):
        await scheduler.resume("one", str(tmp_path), False)
    picture.unlink()
    with pytest.raises(ConfigError, match=r"c\.png', which cannot be read \(No such file"):
        await scheduler.resume("one", str(tmp_path), False)
    picture.write_bytes(content)
    await scheduler.resume("one", str(tmp_path), False)
    assert (await end_of(scheduler, "one")).state == "done"
    with pytest.raises(ConfigError, match=r"the run ends with '.*b\.png' \(last_image of its last prompt\)"):
        await scheduler.extend("one", str(tmp_path), 1, False)
    await scheduler.reroll("one", str(tmp_path), 3, None, None, False)
    assert (await end_of(scheduler, "one")).state == "done"
    takes = [load_latents(folder.latents(3, take)) for take in (0, 1)]
    assert torch.equal(*(latents[:, :, -1:] for latents in takes)), "the end"
    assert not torch.equal(*takes)
