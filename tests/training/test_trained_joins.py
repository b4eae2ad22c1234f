"""What the embedded model makes where a run is extended, re-rolled, or begins from a picture.

Slow: `make proof` runs it. The scores are those of the manifest.
"""

import asyncio

import numpy as np
import pytest
import torch
from PIL import Image

from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.config import Config
from edit_ray.engine.init_file import read_init
from edit_ray.runs.folder import RunFolder
from edit_ray.video.encode import read_frames
from tests.runs_here import submit
from training.scenes import captions, draw_scenes, render

pytestmark = pytest.mark.slow
SIZE = {"height": 128, "width": 128}


def config(segments, prompt, seed=7, **continuity):
    return Config.model_validate(
        {
            "sampling": {**SIZE, "num_frames": 33, "num_inference_steps": 15, "seed": seed},
            "video": {"num_segments": segments},
            "prompt_segments": [{"segment": 0, "prompt": prompt}],
            "continuity": {"mode": "history"} | continuity,
            "engine": {"cpu_threads": 1, "idle_exit_s": 3600},
        }
    )


async def generate(root, asked, *changes):
    """A run, and what it goes on with; its manifest."""
    crew = LocalPool()
    scheduler = SegmentSchedulerActor(crew)
    await submit(scheduler, root, "one", asked)
    await done(scheduler)
    for method, *arguments in changes:
        await getattr(scheduler, method)("one", str(root), *arguments, False)
        await done(scheduler)
    await crew.end()
    return RunFolder(root, "one").read_manifest()


async def done(scheduler):
    while not (status := (await scheduler.wait_segment("one", 10**6, 5)).status).ended:
        pass
    assert status.state == "done", status.error


def test_the_joins_of_an_extension_and_of_a_reroll_are_no_more_visible_than_places_inside(tmp_path):
    prompt = "a red circle bouncing on a black background"
    changes = ("extend", 2), ("reroll", 4, 99, None)
    segments = asyncio.run(generate(tmp_path, config(3, prompt), *changes)).segments
    assert [(record.index, record.take) for record in segments] == [*((k, 0) for k in range(4)), (4, 1)]
    scores = {record.index: record.statistics["seam_score"] for record in segments if record.index}
    interior = np.mean([record.statistics["interior_score"] for record in segments])
    print(f"joins {scores}, inside {interior:.2f}")
    assert scores[3] <= 1.25 * interior, "where the extension begins"
    assert scores[4] <= 1.25 * interior, "where the other take begins"


def test_the_first_frame_is_the_picture(tmp_path):
    scene = draw_scenes(1, torch.Generator().manual_seed(5), objects=1)
    frames, prompt = render(scene, 1), captions(scene)[0]
    path = str(tmp_path / "a.png")
    Image.fromarray(frames_of(frames)[0]).save(path)
    picture = read_init(path, frames=1, **SIZE)[0]
    asyncio.run(generate(tmp_path, config(1, prompt, init=path, picture_as="still")))
    shown = read_frames(RunFolder(tmp_path, "one").final, **SIZE)
    errors = ((shown[:9].astype(float) - picture) ** 2).mean(axis=(1, 2, 3))
    psnr = 10 * np.log10(255**2 / errors)
    print(f"{prompt}: PSNR of the first frames to the picture {psnr.round(1)}")
    assert psnr[0] >= 30


def frames_of(video):
    """[B, 3, F, H, W] in [-1, 1] as uint8 [B F, H, W, 3]."""
    return (video.movedim(1, -1).add(1) * 127.5).round().to(torch.uint8).flatten(0, 1).numpy()
