"""The small world: drawn from seeds, moving as its tables say, rendered alike in any batch."""

from dataclasses import replace

import pytest
import torch

from training.world import CAMERAS, GROUNDS, MOTIONS, SKIES, Worlds, cameras, changed_worlds, draw_worlds, poses
from training.world_render import render_worlds

SIZE = (16, 24)


def worlds(number: int, seed: int = 1, **same: int) -> Worlds:
    drawn = draw_worlds(number, torch.Generator().manual_seed(seed))
    return replace(drawn, **{name: torch.full((number,), value) for name, value in same.items()})


def test_a_seed_is_a_clip_whatever_it_is_rendered_with() -> None:
    three = worlds(3)
    clips = render_worlds(three, 3, *SIZE)
    assert clips.shape == (3, 3, 3, *SIZE)
    assert clips.abs().max() <= 1
    torch.testing.assert_close(render_worlds(three[1:2], 3, *SIZE)[0], clips[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(render_worlds(worlds(3), 2, *SIZE), clips[:, :, :2], atol=1e-5, rtol=0)
    torch.testing.assert_close(render_worlds(three, 2, *SIZE, every=2), clips[:, :, ::2], atol=1e-5, rtol=0)


def test_a_change_keeps_the_shot() -> None:
    before = worlds(100)
    after = changed_worlds(before, torch.Generator().manual_seed(2))
    assert all(torch.equal(getattr(after, name), getattr(before, name)) for name in ("count", "motion", "camera"))
    torch.testing.assert_close(cameras(after, 3), cameras(before, 3))
    same = (after.ground == before.ground) & (after.colour == before.colour).all(1)
    assert 40 < same.sum() < 70
    assert (after.sky != before.sky).sum() > 60


def test_solids_of_a_scene_have_their_own_colours_and_places() -> None:
    drawn = draw_worlds(200, torch.Generator().manual_seed(2))
    assert set(drawn.count.tolist()) == {1, 2, 3}
    assert all(len(set(colours)) == 3 for colours in drawn.colour.tolist())
    centre, _ = poses(drawn, 65)
    for count in (2, 3):
        of = centre[(drawn.count == count) & (drawn.motion != MOTIONS.index("rolling"))][:, :, :count]
        gaps = torch.cdist(of.flatten(0, 1), of.flatten(0, 1)) + 10 * torch.eye(count)
        assert gaps.min() > 0.5, "no two meet"


@pytest.mark.parametrize("motion", range(len(MOTIONS)), ids=MOTIONS)
def test_motions(motion: int) -> None:
    centre, rolled = poses(worlds(20, motion=motion), 33)
    moved = (centre - centre[:, :1]).abs().amax(dim=(0, 1, 2))
    expected = {"rolling": (1, 0, 0), "bouncing": (0, 1, 0), "circling": (1, 0, 1), "rising": (0, 1, 0)}
    assert (moved > 0.3).int().tolist() == list(expected.get(MOTIONS[motion], (0, 0, 0)))
    assert bool(rolled.abs().max() > 0) == (MOTIONS[motion] == "rolling")
    assert centre[..., 1].min() > 0, "above the ground"


@pytest.mark.parametrize("camera", range(len(CAMERAS)), ids=CAMERAS)
def test_cameras(camera: int) -> None:
    eye, axes = cameras(worlds(1, camera=camera), 33)
    torch.testing.assert_close(axes @ axes.mT, torch.eye(3).expand(1, 33, 3, 3), atol=1e-5, rtol=0)
    assert bool((eye[0, -1] - eye[0, 0]).norm() > 0.5) == (CAMERAS[camera] in ("dolly in", "orbit"))
    to_the_right = ((axes[0, -1, 2] - axes[0, 0, 2]) @ axes[0, 0, 0]).item()
    if CAMERAS[camera].startswith("pan"):
        assert (to_the_right > 0.1) == (CAMERAS[camera] == "pan right")
    elif CAMERAS[camera] != "orbit":
        assert to_the_right == pytest.approx(0, abs=1e-5)


def test_every_sky_and_ground_looks_different() -> None:
    number = len(SKIES) * len(GROUNDS)
    same = replace(worlds(1, motion=4, camera=0), sky=torch.zeros(1), ground=torch.zeros(1))
    grid = same[torch.zeros(number, dtype=torch.long)]
    grid = replace(grid, sky=torch.arange(number) % len(SKIES), ground=torch.arange(number) // len(SKIES))
    pictures = render_worlds(grid, 1, *SIZE).flatten(1)
    apart = torch.cdist(pictures, pictures) / pictures.shape[1] ** 0.5 + torch.eye(number)
    assert apart.min() > 0.02
