"""Cross-field checks: conditions between keys that are each valid alone. None of them needs the model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from edit_ray.config.causal_checks import causal_mistakes, chunk_mistakes
from edit_ray.config.mistakes import KeyPath, Mistake, mistake_at
from edit_ray.config.picture_checks import mode_mistakes
from edit_ray.engine.options import adapter_names
from edit_ray.runs.ids import MAX_SEGMENTS
from edit_ray.runs.run_plan import TEMPORAL_FACTOR, FrameLayout

if TYPE_CHECKING:
    from edit_ray.config.model import Config, PromptSegment

MAX_SEGMENT_PIXELS = 2**31
MAX_VIDEO_FRAMES = 10_000_000

_LAYOUT_KEYS = ("sampling.num_frames", "sampling.fps", "continuity")


def cross_field_mistakes(config: Config) -> Iterator[Mistake]:
    """Every mistake; those of the video's length only if its segments are valid."""
    of_segments = [*_shape(config), *_continuity(config), *chunk_mistakes(config)]
    yield from of_segments or _length_and_storyboard(config)
    yield from mode_mistakes(config)
    yield from causal_mistakes(config)
    yield from _reuse(config)
    yield from _branches(config)
    yield from _steps(config)
    yield from _loras(config)
    yield from _engine(config)
    yield from _weights(config)
    yield from _storage(config)


def _shape(config: Config) -> Iterator[Mistake]:
    sampling, continuity = config.sampling, config.continuity
    frames, latents = sampling.num_frames, (sampling.num_frames - 1) // TEMPORAL_FACTOR + 1
    if continuity.causal:
        pass  # the nearest whole number of chunks is named
    elif frames % TEMPORAL_FACTOR != 1:
        below = (frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1
        near = f"{below} or {below + TEMPORAL_FACTOR}"
        yield mistake_at("sampling.num_frames", f"is {frames}; it must be {TEMPORAL_FACTOR}k+1, such as {near}.")
    elif continuity.mode in ("image", "svi") and continuity.carried_latents >= latents:
        yield mistake_at(
            "sampling.num_frames",
            f"is {frames}, {latents} latents a segment; it must be at least "
            f"{TEMPORAL_FACTOR * continuity.carried_latents + 1} where continuity.mode is {continuity.mode}.",
            "continuity.mode",
        )
    elif continuity.carried_latents >= latents:
        yield mistake_at(
            "continuity.history_latents",
            f"is {continuity.history_latents}; it must be less than the {latents} latents of a segment of {frames} "
            "frames.",
            *("continuity.mode", "sampling.num_frames"),
        )
    pixels = sampling.height * sampling.width * frames
    if pixels > MAX_SEGMENT_PIXELS:
        yield mistake_at(
            "sampling.num_frames",
            f"is {frames} at {sampling.height}x{sampling.width}, {pixels} pixels a segment; height · width · "
            f"num_frames must be at most {MAX_SEGMENT_PIXELS}.",
            *("sampling.height", "sampling.width"),
        )


def _continuity(config: Config) -> Iterator[Mistake]:
    continuity, mode = config.continuity, config.continuity.mode
    if mode == "warm_start" and not config.cache.reuse_window:
        yield mistake_at(
            "continuity.mode",
            "is 'warm_start', and no segment reuses residuals of another; it needs cache.policy warmstart_reuse and a "
            "cache.reuse_window of 1 or more.",
            "cache",
        )
    if continuity.carried_latents or continuity.causal:
        return
    if continuity.init is not None:
        yield mistake_at(
            "continuity.init",
            f"is {continuity.init!r}; it needs continuity.mode history, overlap, image or svi, as with {mode} no "
            "segment continues anything.",
            "continuity.mode",
        )
    if continuity.adain:
        yield mistake_at(
            "continuity.adain",
            f"is {continuity.adain:g}; it must be 0 where continuity.mode is {mode}, as it corrects what segments take "
            "over from each other.",
            "continuity.mode",
        )


def _length_and_storyboard(config: Config) -> Iterator[Mistake]:
    layout, entries = config.layout, config.prompt_segments
    if entries[0].segment or entries[0].start:
        yield mistake_at(*_start(0, entries[0], "; the first prompt must start at 0s or at segment 0."))
    for index, (before, entry) in enumerate(pairwise(entries), start=1):
        yield from _order(index, before, entry, layout)
    num_segments = config.num_segments
    if num_segments is None:
        return
    total = layout.total_frames(num_segments)
    ((key, given),) = config.video.model_dump(exclude_none=True, exclude={"approve"}).items()
    for count, most, gives in (
        (num_segments, MAX_SEGMENTS, f"takes {num_segments} segments"),
        (total, MAX_VIDEO_FRAMES, f"gives {total} frames"),
    ):
        if count > most:
            yield mistake_at(f"video.{key}", f"is {given}, which {gives}; there must be at most {most}.", *_LAYOUT_KEYS)
            break
    for index, entry in enumerate(entries):
        beyond = layout.frame_at(entry.start) >= total if entry.start is not None else None
        if entry.first_segment(layout) >= num_segments if beyond is None else beyond:
            lasts = f"it has {num_segments} segments that last {total / layout.fps:g}s"
            where = _start(index, entry, f", beyond the end of the video; {lasts}.")
            yield mistake_at(*where, "video", *_LAYOUT_KEYS)


def _order(index: int, before: PromptSegment, entry: PromptSegment, layout: FrameLayout) -> Iterator[Mistake]:
    segment_before, segment = before.first_segment(layout), entry.first_segment(layout)
    alike = (before.start is None) == (entry.start is None)
    # Two starts of one kind are compared directly, which is meaningful even if the segments' shape is wrong.
    in_seconds = alike and entry.start is not None
    if (entry.start or 0) < (before.start or 0) if in_seconds else segment < segment_before:
        above = f"before the {before.position} of the prompt above it; prompts must be in order."
        yield mistake_at(*_start(index, entry, f", {above}"), *(() if alike else _LAYOUT_KEYS))
    elif segment == segment_before:
        ends = layout.first_frame(segment + 1) / layout.fps
        own = f"each prompt must begin in a segment of its own (segment {segment} ends at {ends:g}s)"
        where = _start(index, entry, f", in segment {segment} as the prompt above it; {own}.")
        yield mistake_at(*where, *(() if entry == before else _LAYOUT_KEYS))


def _start(index: int, entry: PromptSegment, says: str) -> tuple[KeyPath, str]:
    """The key of an entry's start, and a sentence that begins with its value."""
    return ("prompt_segments", index, "segment" if entry.start is None else "start"), f"is {entry.position}{says}"


def _reuse(config: Config) -> Iterator[Mistake]:
    """Reuse between segments is planned for the whole run before it starts."""
    window = config.cache.reuse_window
    if not window:
        return
    if config.video.endless:
        yield mistake_at(
            "video.num_segments",
            f"is null and cache.reuse_window {window}; an endless run must have the window 0.",
            "cache.reuse_window",
        )
    warm, gate = config.cache.policy_options.get("warm_steps", 2), config.cache.cfg_gate
    if gate is not None and isinstance(warm, int) and gate * config.sampling.num_inference_steps < warm:
        yield mistake_at(
            "cache.cfg_gate",
            f"is {gate:g}, which comes before the end of the {warm} warm steps; it must be at least their share of "
            f"the {config.sampling.num_inference_steps} steps, because segments reuse those of both branches.",
            *("cache.warm_steps", "sampling.num_inference_steps"),
        )


def _branches(config: Config) -> Iterator[Mistake]:
    for index, entry in enumerate(config.prompt_segments):
        yield from guidance_mistakes(config, entry, ("prompt_segments", index, "guidance_scale"))


def guidance_mistakes(config: Config, entry: PromptSegment, path: KeyPath) -> Iterator[Mistake]:
    """Segments that reuse each other's residuals or K/V have the same branches."""
    guidance, with_kv = config.sampling.guidance_scale, config.continuity.commits_kv
    scale = guidance if entry.guidance_scale is None else entry.guidance_scale
    if (config.cache.reuse_window or with_kv) and (scale > 1) != (guidance > 1):
        key, said = ("continuity.kv", "continuity.kv commit") if with_kv else ("cache.reuse_window",) * 2
        yield mistake_at(
            path,
            f"is {scale:g} and sampling.guidance_scale {guidance:g}; with {said} both must be above 1 or neither.",
            *(key, "sampling.guidance_scale"),
        )


def _steps(config: Config) -> Iterator[Mistake]:
    sampling, levels = config.sampling, config.sampling.sigmas
    if levels is not None and len(levels) != sampling.num_inference_steps:
        yield mistake_at(
            "sampling.num_inference_steps",
            f"is {sampling.num_inference_steps}, and sampling.sigmas has {len(levels)} noise levels; one of them must "
            "be given, not both.",
            "sampling.sigmas",
        )
    if levels is not None and sampling.sampler == "dpm++":
        yield mistake_at(
            "sampling.sampler",
            "is 'dpm++', which takes no noise levels; with sampling.sigmas it must be one of unipc, euler, renoise.",
            "sampling.sigmas",
        )
    if (sampling.guidance_scale_2 or 0) > 1 >= sampling.guidance_scale:
        yield mistake_at(
            "sampling.guidance_scale_2",
            f"is {sampling.guidance_scale_2:g} and sampling.guidance_scale {sampling.guidance_scale:g}; guidance is on "
            "where both are above 1, or off.",
            "sampling.guidance_scale",
        )


def _loras(config: Config) -> Iterator[Mistake]:
    """Weights that change need LoRAs that are not fused, and nothing that outlives the change."""
    loras, names = config.model.loras, adapter_names(config.model.loras)
    for index, (lora, name) in enumerate(zip(loras, names, strict=True)):
        if (lora.expert, name) in [(each.expert, other) for each, other in zip(loras[:index], names, strict=False)]:
            yield mistake_at(
                ("model", "loras", index, "adapter"),
                f"is {name!r}, as another one of {lora.expert} is called; each must have a name of its own.",
            )
    yield from _loras_of_fewer_bits(config)
    others = {
        "model.fuse_lora": (config.model.fuse_lora, "true; it must be false, as a fused LoRA keeps its weight"),
        "cache.reuse_window": (config.cache.reuse_window > 0, "above 0; with it, weights must stay the same"),
        "engine.cfg_parallel": (config.engine.cfg_parallel, "true; with it, weights must stay the same"),
    }
    for index, entry in enumerate(config.prompt_segments):
        path = ("prompt_segments", index, "lora_weights")
        for unknown in sorted((entry.lora_weights or {}).keys() - set(names)):
            valid = f"one of {', '.join(dict.fromkeys(names))}" if names else "one of model.loras, which is empty"
            yield mistake_at((*path, unknown), f"names no adapter; it must be {valid}.", "model.loras")
        for key, (refused, says) in others.items():
            if entry.lora_weights and loras and refused:
                yield mistake_at(path, f"is given, and {key} is {says}.", key)


def _loras_of_fewer_bits(config: Config) -> Iterator[Mistake]:
    """Nothing can be added to weights that are stored in whole numbers."""
    model = config.model
    for name in ["storage"] * (model.storage == "int8") + model.in_gguf:
        if model.loras and model.fuse_lora:
            said = f"is true and model.{name} {getattr(model, name)!r}; such weights take no LoRA, it must be false."
            yield mistake_at("model.fuse_lora", said, f"model.{name}", "model.loras")


def _engine(config: Config) -> Iterator[Mistake]:
    engine, window = config.engine, config.cache.reuse_window
    if engine.cfg_parallel and config.model.device == "cpu":
        needs = "it needs two GPUs, and model.device 'cuda' or 'auto'"
        yield mistake_at("engine.cfg_parallel", f"is true and model.device 'cpu'; {needs}.", "model.device")
    if engine.cfg_parallel and window:
        yield mistake_at(
            "engine.cfg_parallel",
            f"is true and cache.reuse_window {window}; with two GPUs it must be 0, because residuals are "
            "prefetched to one GPU, in the order of its two branches.",
            "cache.reuse_window",
        )
    if engine.cfg_parallel and config.cache.cfg_gate is not None:
        said = "and engine.cfg_parallel true; the gate needs cond before uncond, and two GPUs compute both at once."
        yield mistake_at("cache.cfg_gate", f"is {config.cache.cfg_gate:g} {said}", "engine.cfg_parallel")
    if engine.fp8 and engine.mode != "fast":
        yield mistake_at(
            "engine.fp8", f"is true and engine.mode {engine.mode}; 8 bits must go with the mode fast.", "engine.mode"
        )


def _weights(config: Config) -> Iterator[Mistake]:
    """What the transformers' blocks in host memory exclude."""
    model, engine = config.model, config.engine
    blocks = model.offload == "blocks"
    if blocks != (model.device_bytes is not None):
        said = (
            "is 'blocks', and model.device_bytes is not given; it must be what the transformers' weights may take on "
            "the device, which `edit-ray plan` tells."
            if blocks
            else f"is {model.offload!r} and model.device_bytes {model.device_bytes}; that must go with 'blocks'."
        )
        yield mistake_at("model.offload", said, "model.device_bytes")
    if blocks and engine.cfg_parallel:
        yield mistake_at(
            "engine.cfg_parallel",
            "is true and model.offload 'blocks'; with two GPUs all weights must be on them.",
            "model.offload",
        )
    if engine.fp8 and blocks:
        yield mistake_at(
            "engine.fp8",
            "is true and model.offload 'blocks'; what it makes of the weights must stay on the device.",
            "model.offload",
        )


def _storage(config: Config) -> Iterator[Mistake]:
    """What weights in fewer bits and single files exclude."""
    model, engine = config.model, config.engine
    blocks = model.offload == "blocks"
    if model.storage == "int8" and (blocks or model.files):
        other = "offload" if blocks else next(iter(model.files))
        yield mistake_at(
            "model.storage",
            f"is 'int8' and model.{other} {getattr(model, other)!r}; torchao's weights must be on the device and made "
            "of the model's own files.",
            f"model.{other}",
        )
    if model.storage == "fp8" and model.in_gguf:
        name = model.in_gguf[0]
        yield mistake_at(
            "model.storage", f"is 'fp8' and model.{name} GGUF, which has a storage of its own.", f"model.{name}"
        )
    reasons = {"storage": model.storage != "torch_dtype", **dict.fromkeys(model.in_gguf, True)}
    fewer = [(name, getattr(model, name)) for name, excludes in reasons.items() if excludes]
    for name, given in fewer[:1]:
        if engine.mode == "fast":
            said = f"is fast and model.{name} {given!r}; the compiled blocks need weights in torch_dtype."
            yield mistake_at("engine.mode", said, f"model.{name}")
