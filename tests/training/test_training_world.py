"""The small world: drawn from seeds, moving as its tables say, named by its captions, and judged against them."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from training import scenes
from training.captions import Named, named, read_caption, thinned, vocabulary, worded, world_captions
from training.loop import Call
from training.models import CAPTION_TOKENS, build_tokenizer
from training.recipe import SMOKE
from training.scenes import COLOURS
from training.world import CAMERAS, GROUNDS, MOTIONS, SKIES, Worlds, cameras, changed_worlds, draw_worlds, poses
from training.world_judge import PARTS, PLACE, UNKNOWN, judged, labels, load_judge, train_judge
from training.world_render import render_worlds

SIZE, LARGE = (16, 24), (128, 128)


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


# Captions


WORLDS = draw_worlds(400, torch.Generator().manual_seed(1))


def test_every_wording_reads_as_what_it_was_made_of() -> None:
    draw = random.Random(2)
    contents = [thinned(content, draw) for content in named(WORLDS)]
    assert [read_caption(worded(content, draw)) for content in contents] == contents
    assert [read_caption(text) for text in world_captions(WORLDS)] == named(WORLDS)


def test_plain_caption() -> None:
    content = Named((("red", "ball", "shiny"), ("orange", "cone", None)), "rolling", "grass", "noon", "still")
    assert worded(content) == "a shiny red ball and an orange cone rolling on grass at noon, the camera is still"
    assert read_caption("At night, three owls") == Named(sky="night")


def test_captions_vary_and_leave_out() -> None:
    texts = world_captions(WORLDS, torch.Generator().manual_seed(3))
    assert texts == world_captions(WORLDS, torch.Generator().manual_seed(3))
    contents = [read_caption(text) for text in texts]
    for part in ("motion", "ground", "sky", "camera"):
        assert 0.1 < sum(getattr(content, part) is None for content in contents) / len(contents) < 0.3
    assert 5 < sum(not content.solids for content in contents) < 80, "fragments"
    plain = world_captions(WORLDS)
    assert 40 < sum(text in plain for text in texts) < 300


def test_captions_stay_inside_the_tokenizer() -> None:
    draw, tokenizer = torch.Generator().manual_seed(4), build_tokenizer()
    of_worlds = world_captions(WORLDS, draw) + world_captions(WORLDS)
    of_scenes = scenes.captions(scenes.draw_scenes(400, draw), draw)
    for texts, words in ((of_worlds, vocabulary()), (of_scenes, scenes.vocabulary())):
        assert {word.strip(",") for text in texts for word in text.split()} == set(words)
        batch = tokenizer(texts, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt").input_ids
        assert batch.shape == (len(texts), CAPTION_TOKENS), "none is longer"
        assert not (batch == tokenizer.unk_token_id).any()


# The judge


CLIP = torch.zeros(1, 3, 1, 1, 1)


class Knowing(torch.nn.Module):
    """Answers with the labels of the scenes it is given, whatever the clip shows."""

    def __init__(self, worlds: Worlds) -> None:
        super().__init__()
        self.right = labels(worlds, 9, LARGE)

    def forward(self, clip: torch.Tensor) -> dict[str, torch.Tensor]:
        classes = PLACE | {part: len(table) for part, table in PARTS.items()}
        return {name: 50.0 * F.one_hot(self.right[name].clamp(min=0), number) for name, number in classes.items()}


def test_right_labels_are_what_the_captions_name() -> None:
    worlds = draw_worlds(60, torch.Generator().manual_seed(1))
    assert all(flags.all() for flags in judged(Knowing(worlds), CLIP, named(worlds)).values())
    shifted = [*named(worlds)[1:], named(worlds)[0]]
    assert all(flags.float().mean() < 0.6 for flags in judged(Knowing(worlds), CLIP, shifted).values())


def test_each_part_is_judged_by_itself_and_what_is_open_is_right() -> None:
    worlds = draw_worlds(1, torch.Generator().manual_seed(2), solids=1)
    judge, whole = Knowing(worlds), named(worlds)[0]
    assert all(flags.all() for flags in judged(judge, CLIP, [Named()]).values())
    colour, form, material = whole.solids[0]
    other = next(name for name in COLOURS if name != colour)
    wrong = {
        "colour": replace(whole, solids=(*whole.solids, (other, form, None))),
        "sky": replace(whole, sky="fog" if whole.sky != "fog" else "noon"),
        "camera": replace(whole, camera="orbit" if whole.camera != "orbit" else "still"),
        "form": replace(whole, solids=((colour, "ring" if form != "ring" else "ball", material),)),
        "material": replace(whole, solids=((colour, form, "shiny" if material != "shiny" else "matte"),)),
    }
    for part, content in wrong.items():
        right = judged(judge, CLIP, [content])
        assert not right.pop(part).any()
        if part != "colour":  # of a solid that is not there, the form is anything
            assert all(flags.all() for flags in right.values())


def test_places_of_the_labels_are_where_the_solids_are_drawn() -> None:
    drawn = draw_worlds(6, torch.Generator().manual_seed(3))
    worlds = replace(drawn, motion=torch.full((6,), MOTIONS.index("resting")))
    right = labels(worlds, 1, (48, 48), every=1)["colour"]
    solid = render_worlds(worlds, 1, 48, 48) - render_worlds(
        replace(worlds, count=torch.zeros_like(worlds.count)), 1, 48, 48
    )
    changed = F.avg_pool2d(solid.abs().amax(1).flatten(0, 1), 2)[:, 1::4, 1::4][:, None] > 0.05  # at the cells' middles
    assert changed[right > 0].float().mean() > 0.85, "a ring has a hole"
    assert changed[right == 0].float().mean() < 0.15, "shadows and mirrors"
    assert (right > 0).any()
    assert (right == UNKNOWN).any()


def test_a_trained_judge_is_loaded(tmp_path: Path) -> None:
    loop = train_judge(Call(tmp_path / "model", tmp_path, SMOKE, 1e-4))
    assert loop.step >= 1
    judge, clip = load_judge(tmp_path, SMOKE, "cpu"), torch.rand(2, 3, 9, 16, 32)
    trained = loop.modules["judge"](clip)
    assert all(torch.equal(logits, trained[name]) for name, logits in judge(clip).items())
    assert trained["form"].shape == (2, 9, 2, 4, PLACE["form"])
