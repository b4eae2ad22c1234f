"""What clips are made of: flat scenes and two sizes of the small world, each with its captions and its changes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from training import captions, scenes, world
from training.recipe import Recipe
from training.world_render import render_worlds

FADE_FRAMES = 8  # length of a cross-fade
Drawn = Any  # a batch of `Scenes` or `Worlds`


@dataclass(frozen=True)
class Source:
    """One kind of clips [B, 3, T, *size] in [-1, 1]; `draw` and `changed` draw scenes from a CPU generator."""

    size: tuple[int, int]
    draw: Callable[[int, torch.Generator], Drawn]
    changed: Callable[[Drawn, torch.Generator], Drawn]
    captions: Callable[[Drawn, torch.Generator], list[str]]
    render: Callable[[Drawn, int], Tensor]

    def render_change(self, before: Drawn, after: Drawn, frame: Tensor, num_frames: int) -> Tensor:
        """Render `before`, cross-faded into `after` from frame index `frame` [B] on."""
        time = torch.arange(num_frames, device=frame.device)
        share = ((time - frame[:, None] + 1) / FADE_FRAMES).clamp(0, 1)[:, None, :, None, None]
        clip = self.render(before, num_frames)
        return clip + share * (self.render(after, num_frames) - clip)


def sources_of(recipe: Recipe) -> tuple[Source, ...]:
    """Flat scenes, then the small world in each of the recipe's sizes."""
    flat = Source((scenes.SIZE, scenes.SIZE), scenes.draw_scenes, scenes.changed_scenes, scenes.captions, scenes.render)
    worlds = (
        Source(
            (height, width),
            world.draw_worlds,
            world.changed_worlds,
            captions.world_captions,
            partial(render_worlds, height=height, width=width),
        )
        for height, width in recipe.world_sizes
    )
    return (flat, *worlds)


class ClipPool:
    """Rendered clips of a source on the device, from which batches draw windows; each draw renews one clip.

    Rendering may cost more than a training step does, so every clip serves several times.
    """

    def __init__(self, source: Source, seed: int, recipe: Recipe, device: str) -> None:
        self.source, self.device, self.changing = source, device, recipe.changing_clips
        self.longest = max(frames for _, turns in recipe.curriculum for frames, _ in turns)
        self.generator = torch.Generator().manual_seed(seed)
        self.clips = torch.cat([self._rendered() for _ in range(recipe.pool)])

    def _rendered(self) -> Tensor:
        before = self.source.draw(1, self.generator)
        if torch.rand((), generator=self.generator) < self.changing:
            after, frame = self.source.changed(before, self.generator), torch.tensor([self._below(self.longest)])
            shown = (before.to(self.device), after.to(self.device), frame.to(self.device))
            clip = self.source.render_change(*shown, self.longest)
        else:
            clip = self.source.render(before.to(self.device), self.longest)
        return ((clip + 1) * 127.5).round().byte()

    def draw(self, number: int, num_frames: int) -> Tensor:
        """Clips [number, 3, num_frames, H, W] in [-1, 1]."""
        self.clips[self._below(len(self.clips))] = self._rendered()[0]
        windows = []
        for _ in range(number):
            start = self._below(self.longest - num_frames + 1)
            windows.append(self.clips[self._below(len(self.clips)), :, start : start + num_frames])
        return torch.stack(windows).float() / 127.5 - 1

    def _below(self, high: int) -> int:
        return int(torch.randint(high, (), generator=self.generator))
