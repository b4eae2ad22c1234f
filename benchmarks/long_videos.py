"""Long videos of one prompt, several seeds side by side, in one process without Ray, and their seams and drift."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edit_ray import EditWanPipeline
from edit_ray.config.model import layout_of
from edit_ray.engine.continuity import match_statistics
from edit_ray.engine.options import ContinuityOptions, SamplingOptions
from edit_ray.engine.vae_stream import RunStream
from edit_ray.runs.run_plan import FrameLayout, segment_seed
from edit_ray.video.seams import RADIUS, FrameSeries

Frames = NDArray[np.uint8]
BeforeSegment = Callable[[int], None]


@dataclass(frozen=True)
class Task:
    """What is generated: so many seeds of one prompt, each a video of so many segments."""

    prompt: str = "a red circle and a blue square bouncing on a black background"
    seeds: int = 4
    segments: int = 8
    height: int = 128
    width: int = 128
    num_frames: int = 33
    num_inference_steps: int = 30
    guidance_scale: float = 4.0
    first_seed: int = 880_000  # neither the training's nor the calibration's

    @property
    def sampling(self) -> SamplingOptions:
        """The options of its segments."""
        return SamplingOptions(
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )

    def layout(self, continuity: ContinuityOptions) -> FrameLayout:
        """Which frames are whose."""
        return layout_of(self.sampling, continuity)


@dataclass(frozen=True)
class Made:
    """Frames, uint8 [seeds, F, H, W, 3], and the blocks evaluated for them, counted once for all seeds."""

    frames: Frames
    blocks: int


def load(model: str, device: str) -> EditWanPipeline:
    """The pipeline in float32 proper."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe = EditWanPipeline.from_pretrained(model, torch_dtype=torch.float32, device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Maker:
    """Makes a task's videos, each segment of all seeds in one batch."""

    def __init__(self, pipe: EditWanPipeline, task: Task) -> None:
        self.pipe: Any = pipe
        self.task = task
        self._blocks = 0
        embeds = self.pipe.encode_prompt(task.prompt, "", max_sequence_length=512, device=self.pipe.device)
        self._embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))
        for block in self.pipe.transformer.blocks:
            block.attn1.register_forward_pre_hook(self._count)  # a skipped block does not reach its attention

    def _count(self, module: torch.nn.Module, args: Any) -> None:
        self._blocks += 1

    def make(self, continuity: ContinuityOptions, before: BeforeSegment | None = None) -> Made:
        """The videos; `before(index)` is called before each segment, to set up the pipeline's cache."""
        task, layout = self.task, self.task.layout(continuity)
        stream, parts, videos = RunStream(self.pipe.vae), list[Tensor](), list[Tensor]()
        self._blocks = 0

        def preceding(count: int) -> Tensor:
            return torch.cat(parts, dim=2)[:, :, -count:]

        for index in range(task.segments):
            if before is not None:
                before(index)
            position = layout.first_latent(index)
            context = stream.context(continuity, position, preceding) if index else {}
            latents = self._denoise(index, context)[:, :, position - layout.first_latent(index + 1) :]
            if continuity.adain and index:
                latents = match_statistics(latents, parts[0], continuity.adain)
            parts.append(latents)
            if layout.history_latents:
                video = stream.decode(latents, position, preceding, continuity.carried_frames)
            else:
                video = RunStream(self.pipe.vae).decode(latents, 0)
            videos.append((video / 2 + 0.5).mul(255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu())
        return Made(torch.cat(videos, dim=1).numpy(), self._blocks)

    def _denoise(self, index: int, context: dict[str, Tensor]) -> Tensor:
        """A segment of all seeds, [seeds, C, T, h, w]; the noise of each is that of a run of its own."""
        seeds = [segment_seed(self.task.first_seed + seed, index) for seed in range(self.task.seeds)]
        latents: Tensor = self.pipe(
            **{name: embeds.expand(self.task.seeds, -1, -1) for name, embeds in self._embeds.items()},
            **self.task.sampling.model_dump(include={"height", "width", "num_frames"}),
            num_inference_steps=self.task.num_inference_steps,
            guidance_scale=self.task.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            return_dict=False,
            reset_cache=False,
            **context,
        )[0]
        return latents


@dataclass(frozen=True)
class Seams:
    """Of one video: the score of each join, the scores inside segments, and the drift of each segment from the first.

    Colour drift in grey levels of the channel that changed most, drift of sharpness as log2 of a ratio.
    """

    joins: list[float]
    interior: list[float]
    color_drift: list[float]
    sharpness_drift: list[float]

    @classmethod
    def of(cls, frames: Frames, layout: FrameLayout, segments: int) -> "Seams":
        """Measured on the frames of a video [F, H, W, 3]."""
        series = FrameSeries.of(frames)
        starts = [layout.first_frame(index) for index in range(segments + 1)]
        interior = [place for start, end in pairwise(starts) for place in range(start + RADIUS, end - RADIUS + 1)]
        first = FrameSeries.of(frames[: starts[1]]).appearance()
        drifts = [first.drift(FrameSeries.of(frames[start:end]).appearance()) for start, end in pairwise(starts)]
        return cls(
            joins=[series.seam(start).score for start in starts[1:-1]],
            interior=[series.seam(place).score for place in interior],
            color_drift=[color for color, _ in drifts],
            sharpness_drift=[sharpness for _, sharpness in drifts],
        )


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
