"""The engine's options."""

import os
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, Strict, WithJsonSchema, model_validator

from edit_ray.options import Options
from edit_ray.tiers.options import ByteCount

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIPS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
WEIGHTS = (".safetensors", ".gguf")


def is_clip(path: str) -> bool:
    """Whether a file's name is that of a clip and not of a picture."""
    return path.lower().endswith(CLIPS)


def _path_of(names: tuple[str, ...], path: str) -> str:
    """The absolute path, because the actors run in a different working directory."""
    if not path.lower().endswith(names):
        raise ValueError("another kind of file")
    return os.path.abspath(os.path.expanduser(path))


def _lora_path(path: str) -> str:
    """The absolute path, because the actors run in a different working directory."""
    if not path.endswith(".safetensors"):
        raise ValueError("no .safetensors file")
    return os.path.abspath(os.path.expanduser(path))


_OF_A_PICTURE = f"the path of a picture ({', '.join(PICTURES)})"
Picture = Annotated[
    str,
    Field(min_length=1, max_length=4096, json_schema_extra={"valid": _OF_A_PICTURE}),
    AfterValidator(partial(_path_of, PICTURES)),
]
"""The absolute path of a picture."""

_OF_WEIGHTS = f"the path of a file of weights ({', '.join(WEIGHTS)})"
WeightsFile = Annotated[
    str,
    Field(min_length=1, max_length=4096, json_schema_extra={"valid": _OF_WEIGHTS}),
    AfterValidator(partial(_path_of, WEIGHTS)),
]
"""The absolute path of one transformer's weights."""


def _model_path(path: str) -> str:
    """A folder's absolute path, as the actors run in a different working directory; hub ids and others unchanged."""
    return os.path.realpath(path) if os.path.isdir(path) else path


def _frame_rate(given: object) -> int | float:
    """Frames a second from 24, 23.976, 12.5 or "24000/1001"; television's rounded rates (29.97) become the fraction."""
    written = r"[0-9]{1,6}(/[0-9]{1,6}|\.[0-9]{1,9})?"
    if isinstance(given, bool) or not (isinstance(given, int | float) or re.fullmatch(written, str(given))):
        raise ValueError("no frame rate")
    try:
        rate = Fraction(given if isinstance(given, int | float) else str(given))
    except (ZeroDivisionError, OverflowError):
        raise ValueError("no frame rate") from None
    television = Fraction(round(rate * 1001 / 1000) * 1000, 1001)
    if rate.denominator > 1 and abs(rate - television) < Fraction(1, 1000):
        rate = television
    if not 1 <= rate <= 120:
        raise ValueError("no frame rate")
    rate = rate.limit_denominator(1001)
    return rate.numerator if rate.denominator == 1 else float(rate)


def _falling(levels: tuple[float, ...]) -> tuple[float, ...]:
    if not levels or levels[0] > 1 or any(low >= high for high, low in pairwise([*levels, 0.0])):
        raise ValueError("no falling noise levels")
    return levels


Sampler = Literal["unipc", "euler", "dpm++", "renoise"]
FrameRate = Annotated[
    int | float,
    PlainValidator(_frame_rate),
    WithJsonSchema({"type": "number", "valid": "a number from 1 to 120, such as 16, 23.976 or 24000/1001"}),
]


class LoraOptions(Options):
    """A LoRA file, in any dialect of keys that diffusers converts.

    `weight` is its factor, `expert` the transformer that it changes. `adapter` names it for `lora_weights`; without a
    name it is `lora_` and its position in the list, from 0.
    """

    path: Annotated[str, AfterValidator(_lora_path)] = Field(
        min_length=1, max_length=4096, json_schema_extra={"valid": "the path of a .safetensors file"}
    )
    weight: float = Field(default=1.0, ge=-10, le=10)
    expert: Literal["transformer", "transformer_2"] = "transformer"
    adapter: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        json_schema_extra={"valid": "1 to 64 letters, digits, - and _"},
    )


def adapter_names(loras: Sequence[LoraOptions]) -> list[str]:
    """The adapters' names: their own, or `lora_` and the position."""
    return [lora.adapter or f"lora_{index}" for index, lora in enumerate(loras)]


class ModelOptions(Options):
    """Which model, in which precision, where, and with which LoRAs.

    `transformer` and `transformer_2` are single files of weights in place of the model's own: GGUF, or safetensors in
    Wan's or diffusers' names, also in 8 bits with scales. `storage` keeps the weights of the transformers' blocks in
    fewer bits: `fp8` rounds them and computes in `torch_dtype`; `int8` is torchao's. GGUF and torchao are in the extra
    `quant`. `offload` leaves parts in host memory: the text encoder, of which one block at a time is on the device, or
    with `blocks` also those of the transformers; then `device_bytes` is what their weights may take on the device.

    With `fuse_lora` LoRAs are added to the weights, and cost no time; without, their weights may change with the
    storyboard (`lora_weights`).
    """

    path: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_model_path)] = "builtin:tiny_wan"
    transformer: WeightsFile | None = None
    transformer_2: WeightsFile | None = None
    torch_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    storage: Literal["torch_dtype", "fp8", "int8"] = "torch_dtype"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    offload: Literal["none", "text_encoder", "blocks"] = "text_encoder"
    device_bytes: ByteCount | None = None
    # Not strict: YAML and JSON have lists in place of tuples.
    loras: tuple[LoraOptions, ...] = Field(
        default=(),
        max_length=16,
        strict=False,
        json_schema_extra={"valid": "a list of 0 to 16 entries such as {path: …, weight: 1.0, expert: transformer}"},
    )
    fuse_lora: bool = True

    @property
    def files(self) -> dict[str, str]:
        """The single files, by the transformer that they are loaded as."""
        files = {"transformer": self.transformer, "transformer_2": self.transformer_2}
        return {name: file for name, file in files.items() if file is not None}

    @property
    def in_gguf(self) -> list[str]:
        """The transformers that are loaded from GGUF."""
        return [name for name, file in self.files.items() if file.lower().endswith(".gguf")]

    @property
    def gguf_bytes(self) -> dict[str, int]:
        """The sizes of their files. Raises OSError for one that is not there."""
        return {name: os.path.getsize(self.files[name]) for name in self.in_gguf}

    def problems_here(self) -> dict[str, str]:
        """Why options cannot be used on this machine, as predicates by their names: a file or a package is missing."""
        needed = dict.fromkeys(self.in_gguf, "gguf") | ({"storage": "torchao"} if self.storage == "int8" else {})
        lacking = {name: file for name, file in self.files.items() if not os.path.isfile(file)}
        problems = {name: f"is {file!r}, which is not a file." for name, file in lacking.items()}
        for name, package in needed.items():
            if find_spec(package) is None:
                given = getattr(self, name)
                problems[name] = (
                    f"is {given!r}, which needs the package {package}, and it is not installed: "
                    "pip install 'edit_ray[quant]'."
                )
        return problems


class SamplingOptions(Options):
    """One segment's arguments, named as in diffusers.

    `sigmas` are noise levels in place of `num_inference_steps`; the noise scheduler applies `flow_shift` to them.
    `sampler` is the noise scheduler, by default the model's own; `renoise` estimates the clean latents in each step and
    adds fresh noise, as models distilled to a few steps expect. A causal model takes its own noise levels and sampler
    unless they are given, and defaults differ: `guidance_scale` 1, 4 steps, `flow_shift` 5, and `num_frames` are those
    of `continuity.chunks`. `guidance_scale_2` and `boundary_ratio` are for models
    with two experts: the guidance below the boundary, by default that above it, and where the boundary is, by default
    where the model says.
    """

    height: int = Field(default=128, ge=16, le=4096)
    width: int = Field(default=128, ge=16, le=4096)
    num_frames: int = Field(default=33, ge=1, le=1025)
    fps: FrameRate = 16
    num_inference_steps: int = Field(default=30, ge=1, le=1000)
    # Not strict: YAML and JSON have lists in place of tuples.
    sigmas: Annotated[tuple[Annotated[float, Strict()], ...], AfterValidator(_falling)] | None = Field(
        default=None,
        max_length=1000,
        strict=False,
        json_schema_extra={"valid": "a list of falling numbers, from at most 1 to above 0, such as [1.0, 0.75, 0.5]"},
    )
    sampler: Sampler | None = None
    guidance_scale: float = Field(default=4.0, ge=0, le=100)
    guidance_scale_2: float | None = Field(default=None, ge=0, le=100)
    boundary_ratio: float | None = Field(default=None, gt=0, lt=1)
    flow_shift: float = Field(default=3.0, gt=0, le=100)
    seed: int = Field(default=0, ge=0, lt=2**63)
    negative_prompt: str = Field(default="", max_length=2000)

    @model_validator(mode="before")
    @classmethod
    def _count_sigmas(cls, given: Any) -> Any:
        """The number of steps is that of the noise levels, and is known to everybody who only counts steps."""
        levels = given.get("sigmas") if isinstance(given, dict) else None
        return {"num_inference_steps": len(levels), **given} if isinstance(levels, list | tuple) and levels else given


class ContinuityOptions(Options):
    """How a segment follows its predecessor.

    `none`: not at all. `warm_start`: it reuses residuals, and nothing else. `history`: it sees the last
    `history_latents` latents clean, in models with per-token timesteps. `overlap`: it sees them as noisy as the rest,
    in any model; `overlap_source` says whether they are taken as they are (`latent`), encoded again from their frames
    (`reencode`), or only the first of them is (`hybrid`). `image`: it begins with the last frame, in models that take
    a picture. `svi`: an image-to-video model sees the latent of `init` and behind it the last latent. `adain` moves
    each segment's colours by this factor towards those of the first. `init` is what segment 0 continues: a picture
    becomes the video's first frame, a clip is continued from its end and not shown again. `picture_as` says how a
    model that holds latents sees a picture: as the first latent of a clip, which stands for one frame, or as a later
    latent of a still clip, which stands for four.

    `causal` is for causal models: a segment is `chunks` chunks of `chunk_size` latents. It begins with the K/V of the
    chunks before it: computed again from their latents (`kv: recache`), or as the segment before has stored it, so that
    K/V rolls on through the run as in a stream (`commit`). `window`, `sink`, `context_noise` and `rope` are the model's
    own unless given.
    """

    mode: Literal["none", "warm_start", "history", "overlap", "image", "svi", "causal"] = "none"
    history_latents: int = Field(default=3, ge=1, le=64)
    overlap_source: Literal["hybrid", "latent", "reencode"] = "hybrid"
    adain: float = Field(default=0.0, ge=0, le=0.25)
    init: Annotated[str, AfterValidator(partial(_path_of, PICTURES + CLIPS))] | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        json_schema_extra={"valid": f"{_OF_A_PICTURE} or of a clip ({', '.join(CLIPS)})"},
    )
    picture_as: Literal["first_frame", "still"] = "first_frame"
    chunks: int = Field(default=7, ge=1, le=256)
    chunk_size: int = Field(default=3, ge=1, le=64)
    kv: Literal["recache", "commit"] = "recache"
    window: int | None = Field(default=None, ge=1, le=1024)
    sink: int | None = Field(default=None, ge=0, le=1024)
    context_noise: float | None = Field(default=None, ge=0, le=1000)
    rope: Literal["relative", "absolute"] | None = None

    @property
    def causal(self) -> bool:
        """Whether segments are chunks of a causal model."""
        return self.mode == "causal"

    @property
    def commits_kv(self) -> bool:
        """Whether K/V is stored with each segment."""
        return self.causal and self.kv == "commit"

    @property
    def carried_latents(self) -> int:
        """Latents at the beginning of a later segment that are not new, k; 0 if each is a clip of its own.

        With `image` the last frame's, with `svi` the picture's and the last one of the segment before.
        """
        return {"image": 1, "svi": 2}.get(self.mode, self.history_latents if self._continues_latents else 0)

    @property
    def _continues_latents(self) -> bool:
        return self.mode in ("history", "overlap")

    @property
    def carried_frames(self) -> int:
        """Frames before a segment that must be decoded before it starts: those of its k latents, the last one, or 0."""
        if self.mode == "image":
            return 1
        needs_frames = self.mode == "overlap" and self.overlap_source != "latent"
        return frames_of(self.history_latents) if needs_frames else 0

    @property
    def init_latents(self) -> int:
        """Latents that segment 0 takes over from `init`: one of a picture, k of a clip, none in modes of pictures."""
        if self.init is None or not self._continues_latents:
            return 0
        return self.history_latents if is_clip(self.init) else 1

    @property
    def begins_with_picture(self) -> bool:
        """Whether the first latent of the run's stream is that of the user's picture."""
        return self.init is not None and self.init_latents > 0 and not is_clip(self.init)

    @property
    def preceding_latents(self) -> int:
        """Latents before the run's own in its stream: those of a clip."""
        return 0 if self.begins_with_picture else self.init_latents


def frames_of(latents: int) -> int:
    """Frames of a clip of this many latents: one of the first, four of each other."""
    return 4 * (latents - 1) + 1


Mode = Literal["exact", "fast"]


class EngineOptions(Options):
    """How the actors work.

    `mode` exact makes the same frames in every process on the same hardware, those of diffusers. `fast` compiles the
    transformer's blocks and the decoder on a GPU, and its frames differ a little; with `fp8` it multiplies in 8 bits.
    With `cfg_parallel` each GPU actor has two GPUs, one for each branch of classifier-free guidance. A run pauses
    `max_ahead` segments after the last that its clients have taken. An actor is killed and restarted if it makes no
    step for `step_timeout_s` seconds, loads a model for more than `load_timeout_s`, or does not answer a question or
    obey a cancel for `answer_timeout_s`. Failed work is retried `segment_retries` times; the death of an actor or an
    encoder is not a failure of the work, unless it happens more than ten times during the same work. The run uses up to
    `gpu_actors`, as many as the cluster can place. `tiled_decode` auto decodes in tiles from the segment on for which
    the GPU ran out of memory, always from the first one. A GPU actor keeps the decoder states of the last
    `max_live_decoders` runs.
    """

    mode: Mode = "exact"
    fp8: bool = False
    gpu_actors: int = Field(default=1, ge=1, le=64)
    cfg_parallel: bool = False
    cpu_threads: int | None = Field(default=None, ge=1, le=1024)
    tiled_decode: Literal["auto", "always", "never"] = "auto"
    max_live_decoders: int = Field(default=1, ge=1, le=64)
    max_ahead: int | None = Field(default=None, ge=1, le=100_000)
    step_timeout_s: float = Field(default=600.0, gt=0, le=86400)
    load_timeout_s: float = Field(default=3600.0, gt=0, le=7 * 86400)
    answer_timeout_s: float = Field(default=60.0, gt=0, le=86400)
    segment_retries: int = Field(default=2, ge=0, le=100)
    idle_exit_s: float = Field(default=600.0, ge=0, le=7 * 86400)
    start_timeout_s: float = Field(default=120.0, gt=0, le=86400)
