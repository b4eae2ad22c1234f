"""What a call is conditioned on besides its prompt: pictures, a video, a mask, references.

The model decides what becomes of them. diffusers' own pipelines make the tensors: their methods read only components
and settings that `EditWanPipeline` has as well, so the bits are theirs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from diffusers import WanVACEPipeline, WanVACETransformer3DModel, WanVideoToVideoPipeline
from torch import Generator, Tensor

from edit_ray.cache.install import check_steps
from edit_ray.engine.model_info import Kind
from edit_ray.engine.vae_stream import encode_still

# The pipeline that a model of each kind is saved as.
SAVED_AS: Mapping[Kind, str] = {
    "text": "WanPipeline",
    "image": "WanImageToVideoPipeline",
    "first frame": "WanPipeline",
    "vace": "WanVACEPipeline",
}
_TAKES: Mapping[Kind, tuple[str, ...]] = {
    "text": ("video", "strength", "latents", "history", "overlap"),
    "image": ("image", "last_image", "image_embeds", "image_latents", "latents", "history", "overlap"),
    "first frame": ("image", "last_image", "video", "strength", "latents", "history", "overlap"),
    "vace": ("video", "mask", "reference_images", "conditioning_scale", "latents"),
}
_IS: Mapping[Kind, str] = {
    "text": "a text-to-video model",
    "image": "an image-to-video model",
    "first frame": "a text- and image-to-video model",
    "vace": "a VACE model",
}
_BEGINNINGS = ("video", "image", "latents", "history", "overlap")
_TOGETHER = ({"image", "latents"}, {"latents", "history"}, {"latents", "overlap"}, {"history", "overlap"})


@dataclass(frozen=True)
class StepSchedule:
    """The steps of a loop: a number of them, which the noise scheduler chooses, or given noise levels.

    Raises:
        ValueError: the noise levels do not fall from at most 1 to above 0.
    """

    num_inference_steps: int
    sigmas: Sequence[float] | None = None

    def __post_init__(self) -> None:
        levels = self.sigmas
        if levels is None:
            check_steps(self.num_inference_steps)
        elif not levels or any(low >= high for high, low in pairwise([*levels, 0.0])) or levels[0] > 1:
            raise ValueError(f"`sigmas` is {levels}; they must fall from at most 1 to above 0.")

    def set_on(self, noise_scheduler: Any, device: torch.device | None = None) -> None:
        """Set the steps of a noise scheduler.

        Raises:
            ValueError: it takes no noise levels.
        """
        if self.sigmas is None:
            noise_scheduler.set_timesteps(self.num_inference_steps, device=device)
            return
        if "sigmas" not in inspect.signature(noise_scheduler.set_timesteps).parameters:
            raise ValueError(f"`sigmas` is given, but {type(noise_scheduler).__name__} takes no noise levels.")
        noise_scheduler.set_timesteps(sigmas=np.array(self.sigmas), device=device)


@dataclass(frozen=True)
class Window:
    """What one loop denoises: a number of videos of one size, in the steps of a schedule."""

    batch: int
    height: int
    width: int
    num_frames: int
    schedule: StepSchedule


@dataclass(frozen=True)
class Conditioning:
    """What the loop begins with, and what the transformer gets besides the latents in every step.

    B videos, C latent channels, M channels of conditions, T latent frames, h x w latent pixels.
    """

    latents: Tensor  # [B, C, T, h, w] float32: noise, or a noised video
    channels: Tensor | None = None  # [B, M, T, h, w], concatenated to the latents
    arguments: Mapping[str, Tensor] = field(default_factory=dict)  # of the transformer's forward, by name
    history: Tensor | None = None  # [B, C, 1, h, w], the first latent frame, clean
    end: Tensor | None = None  # the same of the last latent frame
    begin_index: int = 0  # of the noise scheduler's timesteps, the first one that is denoised
    references: int = 0  # latent frames in front of the video


def kind_of(transformer: Any, expand_timesteps: bool) -> Kind:
    """How a model with this transformer is conditioned."""
    if isinstance(transformer, WanVACETransformer3DModel):
        return "vace"
    if transformer.config.in_channels != transformer.config.out_channels:
        return "image"
    return "first frame" if expand_timesteps else "text"


def check_given(kind: Kind, given: Mapping[str, Any]) -> None:
    """Check which of the arguments `given`, by name, a call has; those that it has not are None.

    Raises:
        ValueError: a model of this kind does not take one, needs one that is missing, or two exclude each other.
    """
    names = {name for name, value in given.items() if value is not None}
    if foreign := sorted(names - set(_TAKES[kind])):
        raise ValueError(
            f"{_quoted(foreign)} cannot be used with {_IS[kind]}; it takes {_quoted(_TAKES[kind])} besides the prompt."
        )
    if kind == "image" and not names & {"image", "image_latents"}:
        raise ValueError("`image` is missing: an image-to-video model begins with one.")
    if "image_latents" in names and "last_image" in names and "image" not in names:
        raise ValueError("`image` is missing: `last_image` is encoded together with it.")
    if "strength" in names and "video" not in names:
        raise ValueError("`strength` says how much of a `video` is made again, and there is no `video`.")
    if "strength" in names and not 0 < given["strength"] <= 1:
        raise ValueError(f"`strength` is {given['strength']}; it must be above 0, up to 1.")
    if kind in ("text", "first frame"):
        for one, other in combinations([name for name in _BEGINNINGS if name in names], 2):
            if {one, other} not in _TOGETHER:
                raise ValueError(f"`{one}` and `{other}` are both given; a call begins with one of them.")


def prepare(
    pipe: Any, kind: Kind, given: Mapping[str, Any], window: Window, generator: Generator | list[Generator] | None
) -> Conditioning:
    """Encode what `check_given` found right, and draw the noise; `pipe` is an `EditWanPipeline`.

    Raises:
        ValueError: `strength` leaves no step, `conditioning_scale` has another length than the model's control layers,
            and what diffusers' pipelines raise for pictures and videos that they do not read.
    """
    if kind == "vace":
        return _vace(pipe, given, window, generator)
    if kind == "image" or given.get("image") is not None:
        conditions = _image(pipe, kind, given, window, generator)
    elif given.get("video") is not None:
        conditions = _video(pipe, given, window, generator)
    else:
        conditions = Conditioning(_noise(pipe, window, window.num_frames, generator, given.get("latents")))
    if kind == "first frame" and given.get("last_image") is not None:
        shown = pipe.video_processor.preprocess(given["last_image"], window.height, window.width)
        end = encode_still(pipe.vae, shown[:, :, None])[:, :, -1:].to(conditions.latents)
        return replace(conditions, end=end.expand(window.batch, -1, -1, -1, -1))
    return conditions


def _noise(
    pipe: Any, window: Window, num_frames: int, generator: Generator | list[Generator] | None, latents: Tensor | None
) -> Tensor:
    size = (window.batch, pipe.denoiser.config.out_channels, window.height, window.width, num_frames)
    noise: Tensor = pipe.prepare_latents(*size, torch.float32, pipe._execution_device, generator, latents)
    return noise


def _image(
    pipe: Any, kind: Kind, given: Mapping[str, Any], window: Window, generator: Generator | list[Generator] | None
) -> Conditioning:
    """Image to video, and first and last frame: a mask and the encoded frames, and of Wan2.1 also CLIP's features."""
    from diffusers import WanImageToVideoPipeline  # imports CLIP's image processor, which logs where torchvision lacks

    device, transformer = pipe._execution_device, pipe.denoiser
    image, last_image, held = given.get("image"), given.get("last_image"), given.get("image_latents")
    arguments = {}
    if transformer.config.image_dim is not None:
        embeds = given.get("image_embeds")
        if embeds is None and image is None:
            raise ValueError("`image` is missing: this model also sees CLIP's features of it, or `image_embeds`.")
        if last_image is not None and embeds is None and transformer.config.pos_embed_seq_len is None:
            raise ValueError("`last_image` is given, but CLIP's features of one picture are all that this model sees.")
        if embeds is None:
            shown = image if last_image is None else [image, last_image]
            embeds = WanImageToVideoPipeline.encode_image(pipe, shown, device)
        arguments["encoder_hidden_states_image"] = embeds.repeat(window.batch, 1, 1).to(transformer.dtype)
    if held is not None and last_image is None:
        noise = _noise(pipe, window, window.num_frames, generator, given.get("latents"))
        mask = torch.zeros_like(noise[:, :1]).repeat(1, pipe.vae_scale_factor_temporal, 1, 1, 1)
        mask[:, :, 0] = 1
        return Conditioning(noise, torch.cat([mask, _held(held, torch.zeros_like(noise))], dim=1), arguments)
    size = (window.height, window.width)
    if kind == "first frame":
        last_image = None  # `prepare` holds its latent
    first, last = (
        None if frame is None else pipe.video_processor.preprocess(frame, *size).to(device, dtype=torch.float32)
        for frame in (image, last_image)
    )
    prepared = WanImageToVideoPipeline.prepare_latents(
        pipe, first, window.batch, transformer.config.out_channels, *size, window.num_frames, torch.float32, device,
        generator, given.get("latents"), last,
    )  # fmt: skip
    if kind == "first frame":
        return Conditioning(prepared[0], history=prepared[1])
    channels = prepared[1]
    if held is not None:  # between it and the last frame's latent there is nothing, in latents and not in pixels
        encoded = channels[:, -transformer.config.out_channels :]
        between = torch.cat([torch.zeros_like(encoded[:, :, 1:]), encoded[:, :, -1:]], dim=2)
        channels = torch.cat([channels[:, : -encoded.shape[1]], _held(held, between)], dim=1)
    return Conditioning(prepared[0], channels=channels, arguments=arguments)


def _held(held: Tensor, rest: Tensor) -> Tensor:
    """`rest` [B, C, T, h, w] with the latents `held` [B or 1, C, n, h, w] in its first n slots, n < T.

    Source: Stable Video Infinity (github.com/vita-epfl/Stable-Video-Infinity).
    """
    slots = held.shape[2] if held.ndim == 5 else 0
    if not 0 < slots < rest.shape[2] or held.shape[1] != rest.shape[1] or held.shape[3:] != rest.shape[3:]:
        batch, channels, frames, height, width = rest.shape
        raise ValueError(
            f"`image_latents` has the shape {tuple(held.shape)}; it must be [B, C, n, h, w] = "
            f"({batch}, {channels}, n, {height}, {width}) with n from 1 to {frames - 1}."
        )
    return torch.cat([held.to(rest).expand(len(rest), -1, -1, -1, -1), rest[:, :, slots:]], dim=2)


def _video(
    pipe: Any, given: Mapping[str, Any], window: Window, generator: Generator | list[Generator] | None
) -> Conditioning:
    """Video to video: noise that covers the video as far as `strength` says, and the steps from there."""
    device, scheduler, steps = pipe._execution_device, pipe.scheduler, window.schedule.num_inference_steps
    strength = 0.8 if given.get("strength") is None else given["strength"]
    window.schedule.set_on(scheduler, device)
    begin = (steps - min(int(steps * strength), steps)) * scheduler.order
    if begin >= len(scheduler.timesteps):
        raise ValueError(f"`strength` {strength} of {steps} steps leaves none; 1 / num_inference_steps is the least.")
    size = (window.height, window.width)
    video = pipe.video_processor.preprocess_video(given["video"], *size).to(device, dtype=torch.float32)
    timestep = scheduler.timesteps[begin : begin + 1].repeat(window.batch)
    channels = pipe.denoiser.config.out_channels
    latents = WanVideoToVideoPipeline.prepare_latents(
        pipe, video, window.batch, channels, *size, torch.float32, device, generator, None, timestep
    )
    return Conditioning(latents, begin_index=begin)


def _vace(
    pipe: Any, given: Mapping[str, Any], window: Window, generator: Generator | list[Generator] | None
) -> Conditioning:
    """VACE: what stays of a video, what is made again, and where, for the control blocks; references in front."""
    device, transformer = pipe._execution_device, pipe.denoiser
    video, mask, references = WanVACEPipeline.preprocess_conditions(
        pipe, given.get("video"), given.get("mask"), given.get("reference_images"), window.batch, window.height,
        window.width, window.num_frames, torch.float32, device,
    )  # fmt: skip
    control = WanVACEPipeline.prepare_video_latents(pipe, video, mask, references, generator, device)
    masks = WanVACEPipeline.prepare_masks(pipe, mask, references, generator)
    number = len(references[0])
    latents = _noise(
        pipe, window, window.num_frames + number * pipe.vae_scale_factor_temporal, generator, given.get("latents")
    )
    arguments = {
        "control_hidden_states": torch.cat([control, masks], dim=1).to(transformer.dtype),
        "control_hidden_states_scale": _scales(transformer, given.get("conditioning_scale"), device),
    }
    return Conditioning(latents, arguments=arguments, references=number)


def _scales(transformer: Any, scale: float | list[float] | Tensor | None, device: torch.device) -> Tensor:
    """A factor for each control layer, 1 unless given."""
    layers = len(transformer.config.vace_layers)
    scales = torch.as_tensor(1.0 if scale is None else scale)
    if scales.ndim == 0:
        scales = scales.expand(layers)
    if scales.shape != (layers,):
        raise ValueError(
            f"`conditioning_scale` has the shape {tuple(scales.shape)}; it must be one number, or {layers}."
        )
    return scales.to(device=device, dtype=transformer.dtype)


def _quoted(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
