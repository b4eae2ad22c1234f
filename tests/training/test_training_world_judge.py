"""What the small world's judge says of clips, against what captions name."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from training.captions import Named, named
from training.loop import Call
from training.recipe import SMOKE
from training.scenes import COLOURS
from training.world import MOTIONS, Worlds, draw_worlds
from training.world_judge import PARTS, PLACE, UNKNOWN, judged, labels, load_judge, train_judge
from training.world_render import render_worlds

SIZE = (128, 128)
CLIP = torch.zeros(1, 3, 1, 1, 1)


class Knowing(torch.nn.Module):
    """Answers with the labels of the scenes it is given, whatever the clip shows."""

    def __init__(self, worlds: Worlds) -> None:
        super().__init__()
        self.right = labels(worlds, 9, SIZE)

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
