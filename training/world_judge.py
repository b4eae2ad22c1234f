"""The small world's judge: a network that says what a clip shows, trained on rendered clips; it knows no caption.

It names colour, form and material at every place; places of one colour vote, as solids of a scene differ in colour.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.captions import Named
from training.loop import Call, Loop, mixed_precision
from training.recipe import FIRST_TRAINING_SEED, Recipe
from training.scenes import COLOURS
from training.world import CAMERAS, FORMS, GROUNDS, LENS, MATERIALS, MOTIONS, SKIES, Worlds, cameras, draw_worlds, poses
from training.world_render import render_worlds

EVERY = 4  # it looks at every fourth frame
CELL = 8  # pixels, both ways, of what it calls a place
PARTS = {"motion": MOTIONS, "ground": GROUNDS, "sky": SKIES, "camera": CAMERAS}
PLACE = {"colour": 1 + len(COLOURS), "form": len(FORMS), "material": len(MATERIALS)}  # classes; colour 0 is none
SURE = 0.8  # the probability from which a place counts as of a colour: rims and shadows never reach it
LEAST = 0.8  # such places a frame, on average, that a colour needs to be there: any of 5,000 solids covers 0.89
UNKNOWN = -100  # the label of what is not asked for


class WorldJudge(nn.Module):
    """Clips [B, 3, T, H, W] in [-1, 1], every fourth frame of a video, to logits by name.

    Those of `PARTS` are [B, classes], those of `PLACE` [B, T, H/8, W/8, classes].
    """

    def __init__(self, width: int) -> None:
        super().__init__()

        def layers(*shapes: tuple[int, int, int]) -> nn.Sequential:
            made: list[nn.Module] = []
            for inside, out, stride in shapes:
                made += [nn.Conv3d(inside, out, 3, (1, stride, stride), 1), nn.GroupNorm(4, out), nn.GELU()]
            return nn.Sequential(*made)

        near, far = 4 * width, 8 * width
        self.near = layers((5, width, 2), (width, 2 * width, 2), (2 * width, near, 2), (near, near, 1), (near, near, 1))
        self.far = layers((near, far, 2), (far, far, 1))
        self.place = nn.Linear(near, sum(PLACE.values()))
        self.whole = nn.Sequential(nn.Linear(2 * far, far), nn.GELU(), nn.Linear(far, sum(map(len, PARTS.values()))))

    def forward(self, clip: Tensor) -> dict[str, Tensor]:
        rows, columns = (torch.linspace(-1, 1, size, device=clip.device) for size in clip.shape[-2:])
        where = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None, :, None]
        near = self.near(torch.cat([clip, where.expand(len(clip), -1, clip.shape[2], -1, -1)], 1))
        far = self.far(near)
        whole = self.whole(torch.cat([far.mean((2, 3, 4)), far.amax((2, 3, 4))], 1)).float()
        place = self.place(near.permute(0, 2, 3, 4, 1)).float()
        named = dict(zip(PLACE, place.split(list(PLACE.values()), -1), strict=True))
        return named | dict(zip(PARTS, whole.split([len(table) for table in PARTS.values()], 1), strict=True))


def labels(worlds: Worlds, num_frames: int, size: tuple[int, int], every: int = EVERY) -> dict[str, Tensor]:
    """The right classes, by name: [B], or [B, T, H/8, W/8] of places; those at a solid's rim are not asked for."""
    height, width = size
    eye, axes = cameras(worlds, num_frames, every)
    seen = torch.einsum("btij,btsj->btsi", axes, poses(worlds, num_frames, every)[0] - eye[:, :, None])
    depth = seen[..., 2].clamp(min=0.1)
    scale = LENS * height / depth  # pixels a unit of length
    rows, columns = (CELL * (torch.arange(length // CELL, device=depth.device) + 0.5) for length in size)
    down = rows[:, None] - (height / 2 - scale * seen[..., 1])[..., None, None]
    across = columns - (width / 2 + scale * seen[..., 0])[..., None, None]
    reach = torch.hypot(down, across) / (scale * worlds.size[:, None])[..., None, None]  # [B, T, 3, h, w], in radii
    there = (torch.arange(depth.shape[-1], device=depth.device) < worlds.count[:, None])[:, None, :, None, None]
    covered = torch.where(there & (reach < 0.6), depth[..., None, None], torch.inf)
    first = covered.argmin(2)  # [B, T, h, w]
    on_one, near_one = covered.amin(2) < torch.inf, (there & (reach < 1.3)).any(2)

    def of_first(values: Tensor) -> Tensor:
        return values.gather(1, first.flatten(1)).view_as(first)

    right = {part: getattr(worlds, part) for part in PARTS}
    right["colour"] = torch.where(on_one, 1 + of_first(worlds.colour), torch.where(near_one, UNKNOWN, 0))
    for name in ("form", "material"):
        right[name] = torch.where(on_one, of_first(getattr(worlds, name)), UNKNOWN)
    return right


@torch.no_grad()
def judged(judge: nn.Module, clip: Tensor, contents: Sequence[Named]) -> dict[str, Tensor]:
    """Which clips [B, 3, T, H, W] show what is named of each part: bool [B]; what is left open is always right.

    `colour` is right if exactly the named colours are there; `form` and `material` are those of all named solids.
    """
    logits = judge(clip[:, :, ::EVERY])
    shares = {name: logits[name].softmax(-1).flatten(1, 3) for name in PLACE}  # [B, places, classes]
    colours = shares["colour"][..., 1:].transpose(1, 2)  # [B, colours, places]
    there = ((colours > SURE).sum(-1) >= LEAST * logits["colour"].shape[1]).tolist()
    form, material = ((colours @ shares[name]).argmax(-1).tolist() for name in ("form", "material"))
    whole = {part: logits[part].argmax(-1).tolist() for part in PARTS}
    names = list(COLOURS)
    right: dict[str, list[bool]] = {name: [] for name in (*PLACE, *PARTS)}
    for row, content in enumerate(contents):
        solids = [(names.index(colour), form_, material_) for colour, form_, material_ in content.solids]
        seen = {index for index, is_there in enumerate(there[row]) if is_there}
        right["colour"].append(not solids or seen == {colour for colour, _, _ in solids})
        right["form"].append(all(FORMS[form[row][colour]] == named for colour, named, _ in solids))
        right["material"].append(all(MATERIALS[material[row][c]] == named for c, _, named in solids if named))
        for part, table in PARTS.items():
            right[part].append(getattr(content, part) in (None, table[whole[part][row]]))
    return {name: torch.tensor(flags) for name, flags in right.items()}


class JudgeLoss:
    """Cross-entropy on rendered clips, half of them blurred or noised as decoded ones are; renewed as it goes."""

    def __init__(self, judge: WorldJudge, seed: int, recipe: Recipe, device: str) -> None:
        self.judge, self.recipe, self.device = judge, recipe, device
        self.generator = torch.Generator().manual_seed(seed)
        self.pools = [self._drawn(size, recipe.judge_pool) for size in recipe.world_sizes]

    def _drawn(self, size: tuple[int, int], number: int) -> tuple[Tensor, dict[str, Tensor]]:
        worlds = draw_worlds(number, self.generator).to(self.device)
        clips = torch.empty(number, 3, self.recipe.window, *size, dtype=torch.uint8, device=self.device)
        for start in range(0, number, 64):
            rows = slice(start, start + 64)
            clips[rows] = ((render_worlds(worlds[rows], self.recipe.window, *size, every=EVERY) + 1) * 127.5).round()
        return clips, labels(worlds, self.recipe.window, size)

    def __call__(self, step: int, progress: float) -> Tensor:
        turn = step % len(self.pools)
        clips, right = self.pools[turn]
        fresh = self._drawn(self.recipe.world_sizes[turn], min(self.recipe.judge_renewed, len(clips)))
        index = torch.randperm(len(clips), device=self.device)
        clips[index[: len(fresh[0])]] = fresh[0]
        for name, values in fresh[1].items():
            right[name][index[: len(values)]] = values
        index = index[-self.recipe.batch :]
        clip = clips[index].float() / 127.5 - 1
        with mixed_precision(self.device):
            logits = self.judge(self._worn(clip))
        losses = [
            F.cross_entropy(answer.flatten(0, -2), right[name][index].flatten(), ignore_index=UNKNOWN)
            for name, answer in logits.items()
        ]
        return torch.stack(losses).sum()

    def _worn(self, clip: Tensor) -> Tensor:
        blurred = F.avg_pool3d(clip, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
        some = torch.rand(2, len(clip), 1, 1, 1, 1, device=clip.device)
        tint = 0.05 * torch.randn(len(clip), 3, 1, 1, 1, device=clip.device)
        noised = torch.where(some[0] < 0.5, blurred, clip) + 0.1 * some[1].square() * torch.randn_like(clip) + tint
        return noised.clamp(-1, 1)


def load_judge(state: Path, recipe: Recipe, device: str) -> WorldJudge:
    """The judge that `train_judge` left in the folder `state`."""
    judge = WorldJudge(recipe.judge_width)
    averaged = torch.load(state / "judge.pt", map_location="cpu", weights_only=True)["averaged"]
    with torch.no_grad():
        torch._foreach_copy_(list(judge.parameters()), averaged)
    return judge.to(device).eval()


def train_judge(call: Call) -> Loop:
    """Train the judge, which is its state, `state / "judge.pt"`, and no part of the model in `output`."""
    torch.manual_seed(FIRST_TRAINING_SEED + call.ranks.rank)
    judge = WorldJudge(call.recipe.judge_width).to(call.device)
    loop = Loop("judge", {"judge": judge}, call, call.recipe.judge_learning_rate)
    loop.run(JudgeLoss(judge, loop.seed, call.recipe, call.device))
    call.ranks.wait()
    return loop
