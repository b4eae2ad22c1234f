"""What must hold between keys that are right by themselves; nothing here needs the model."""

from collections.abc import Iterator, Sequence

from edit_ray.cache.options import CacheOptions
from edit_ray.config.mistakes import KeyPath, Mistake, dotted
from edit_ray.config.options import PromptSegment, VideoOptions, format_duration
from edit_ray.engine.options import ContinuityOptions, EngineOptions, ModelOptions, SamplingOptions
from edit_ray.runs.layout import TEMPORAL_FACTOR, FrameLayout
from edit_ray.runs.numbers import MAX_SEGMENTS

MAX_SEGMENT_PIXELS = 2**31
MAX_VIDEO_FRAMES = 10_000_000

_LAYOUT_KEYS: tuple[KeyPath, ...] = (("sampling", "num_frames"), ("sampling", "fps"), ("continuity",))


def layout_of(sampling: SamplingOptions, continuity: ContinuityOptions) -> FrameLayout:
    """The frames that each segment adds.

    Raises:
        ValueError: `num_frames` and `history_latents` do not fit each other.
    """
    return FrameLayout(
        sampling.num_frames,
        continuity.carried_latents,
        sampling.fps,
        init_latents=continuity.preceding_latents,
        denoise_needs_frames=continuity.carried_frames > 0,
    )


def num_segments_of(video: VideoOptions, layout: FrameLayout) -> int | None:
    """The number of segments, or the fewest that cover the duration; None where it goes on until it is stopped."""
    return video.num_segments if video.duration is None else layout.segments_for(video.duration)


def first_segment(entry: PromptSegment, layout: FrameLayout) -> int:
    """The segment from which on the prompt is in effect: the one that contains its start."""
    if entry.segment is not None:
        return entry.segment
    assert entry.start is not None, "PromptSegment has one of the two"
    return layout.segment_at(entry.start)


def shape_and_length_mistakes(
    sampling: SamplingOptions,
    continuity: ContinuityOptions,
    cache: CacheOptions,
    video: VideoOptions,
    prompt_segments: Sequence[PromptSegment],
) -> list[Mistake]:
    """Every mistake between these sections, at most those of a segment alone where there are some."""
    mistakes = [*_check_shape(sampling, continuity), *_check_continuity(continuity, cache)]
    if mistakes:
        return mistakes
    layout = layout_of(sampling, continuity)
    num_segments = num_segments_of(video, layout)
    if num_segments is None:
        return list(_check_order_of_all(prompt_segments, layout))
    return [*_check_length(video, layout, num_segments), *_check_storyboard(prompt_segments, layout, num_segments)]


def reuse_mistakes(
    cache: CacheOptions, sampling: SamplingOptions, video: VideoOptions, prompt_segments: Sequence[PromptSegment]
) -> Iterator[Mistake]:
    """What cannot be where segments reuse each other's residuals, which is planned for the whole run before it."""
    if not cache.reuse_window:
        return
    window: KeyPath = ("cache", "reuse_window")
    if video.endless:
        yield Mistake(
            ("video", "num_segments"),
            f"video.num_segments is null and cache.reuse_window {cache.reuse_window}; a run that goes on until it is "
            "stopped must have the window 0.",
            needs=(window,),
        )
    for index, entry in enumerate(prompt_segments):
        scale = sampling.guidance_scale if entry.guidance_scale is None else entry.guidance_scale
        if (scale > 1) != (sampling.guidance_scale > 1):
            path: KeyPath = ("prompt_segments", index, "guidance_scale")
            yield Mistake(
                path,
                f"{dotted(path)} is {scale:g} and sampling.guidance_scale {sampling.guidance_scale:g}; with "
                "cache.reuse_window both must be above 1 or neither.",
                needs=(window, ("sampling", "guidance_scale")),
            )


def two_gpu_mistakes(engine: EngineOptions, model: ModelOptions, cache: CacheOptions) -> Iterator[Mistake]:
    """What cannot be where the branches of guidance are on a GPU each."""
    if not engine.cfg_parallel:
        return
    path: KeyPath = ("engine", "cfg_parallel")
    if model.device == "cpu":
        yield Mistake(
            path,
            "engine.cfg_parallel is true and model.device 'cpu'; it needs two GPUs, and model.device 'cuda' or 'auto'.",
            needs=(("model", "device"),),
        )
    if cache.reuse_window:
        yield Mistake(
            path,
            f"engine.cfg_parallel is true and cache.reuse_window {cache.reuse_window}; with two GPUs it must be 0, as "
            "what segments reuse is brought to one GPU, in the order in which one branch follows the other.",
            needs=(("cache", "reuse_window"),),
        )


def mode_mistakes(engine: EngineOptions) -> Iterator[Mistake]:
    """What cannot be of how the model computes."""
    if engine.fp8 and engine.mode != "fast":
        path: KeyPath = ("engine", "fp8")
        text = f"{dotted(path)} is true and engine.mode {engine.mode}; 8 bits must go with the mode fast."
        yield Mistake(path, text, needs=(("engine", "mode"),))


def _check_shape(sampling: SamplingOptions, continuity: ContinuityOptions) -> Iterator[Mistake]:
    frames, latents = sampling.num_frames, (sampling.num_frames - 1) // TEMPORAL_FACTOR + 1
    if frames % TEMPORAL_FACTOR != 1:
        below = (frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1
        path: KeyPath = ("sampling", "num_frames")
        near = f"such as {below} or {below + TEMPORAL_FACTOR}"
        yield Mistake(path, f"{dotted(path)} is {frames}; it must be {TEMPORAL_FACTOR}k+1, {near}.")
    elif continuity.carried_latents >= latents:
        path = ("continuity", "history_latents")
        yield Mistake(
            path,
            f"{dotted(path)} is {continuity.history_latents}; it must be less than the {latents} latents of a segment "
            f"of {frames} frames.",
            needs=(("continuity", "mode"), ("sampling", "num_frames")),
        )
    pixels = sampling.height * sampling.width * frames
    if pixels > MAX_SEGMENT_PIXELS:
        path = ("sampling", "num_frames")
        yield Mistake(
            path,
            f"{dotted(path)} is {frames} at {sampling.height}x{sampling.width}, {pixels} pixels a segment; "
            f"height · width · num_frames must be at most {MAX_SEGMENT_PIXELS}.",
            needs=(("sampling", "height"), ("sampling", "width")),
        )


def _check_continuity(continuity: ContinuityOptions, cache: CacheOptions) -> Iterator[Mistake]:
    mode: KeyPath = ("continuity", "mode")
    if continuity.mode == "warm_start" and not cache.reuse_window:
        yield Mistake(
            mode,
            "continuity.mode is 'warm_start', and no segment reuses residuals of another; it needs cache.policy "
            "warmstart_reuse and a cache.reuse_window of 1 or more.",
            needs=(("cache",),),
        )
    if continuity.init is not None and not continuity.carried_latents:
        yield Mistake(
            ("continuity", "init"),
            f"continuity.init is {continuity.init!r}; it needs continuity.mode history or overlap, as with "
            f"{continuity.mode} no segment continues anything.",
            needs=(mode,),
        )
    if continuity.adain and not continuity.carried_latents:
        yield Mistake(
            ("continuity", "adain"),
            f"continuity.adain is {continuity.adain:g}; it must be 0 where continuity.mode is {continuity.mode}, "
            "as it corrects what segments take over from each other.",
            needs=(mode,),
        )


def _check_length(video: VideoOptions, layout: FrameLayout, num_segments: int) -> Iterator[Mistake]:
    key = "num_segments" if video.duration is None else "duration"
    given = num_segments if video.duration is None else format_duration(video.duration)
    if num_segments > MAX_SEGMENTS:
        yield Mistake(
            ("video", key),
            f"video.{key} is {given}, which takes {num_segments} segments; there must be at most {MAX_SEGMENTS}.",
            needs=_LAYOUT_KEYS,
        )
    elif layout.total_frames(num_segments) > MAX_VIDEO_FRAMES:
        yield Mistake(
            ("video", key),
            f"video.{key} is {given}, which gives {layout.total_frames(num_segments)} frames; there must be at most "
            f"{MAX_VIDEO_FRAMES}.",
            needs=_LAYOUT_KEYS,
        )


def _check_order_of_all(entries: Sequence[PromptSegment], layout: FrameLayout) -> Iterator[Mistake]:
    if entries[0].segment or entries[0].start:
        path, given = _start(entries, 0)
        yield Mistake(path, f"{dotted(path)} is {given}; the first prompt must start at 0s or at segment 0.")
    for index in range(1, len(entries)):
        yield from _check_order(entries, index, layout)


def _check_storyboard(entries: Sequence[PromptSegment], layout: FrameLayout, num_segments: int) -> Iterator[Mistake]:
    yield from _check_order_of_all(entries, layout)
    total = layout.total_frames(num_segments)
    for index, entry in enumerate(entries):
        beyond = (
            first_segment(entry, layout) >= num_segments
            if entry.start is None
            else layout.frame_at(entry.start) >= total
        )
        if beyond:
            path, given = _start(entries, index)
            yield Mistake(
                path,
                f"{dotted(path)} is {given}, beyond the end of the video; it has {num_segments} segments that last "
                f"{total / layout.fps:g}s.",
                needs=(("video",), *_LAYOUT_KEYS),
            )


def _check_order(entries: Sequence[PromptSegment], index: int, layout: FrameLayout) -> Iterator[Mistake]:
    previous, entry = entries[index - 1], entries[index]
    path, given = _start(entries, index)
    _, given_before = _start(entries, index - 1)
    before, here = first_segment(previous, layout), first_segment(entry, layout)
    alike = (previous.start is None) == (entry.start is None)
    # Two starts of one kind are compared as they are: that says something even if the segments' shape is wrong.
    earlier = (entry.start or 0) < (previous.start or 0) if alike and entry.start is not None else here < before
    if earlier:
        yield Mistake(
            path,
            f"{dotted(path)} is {given}, before the {given_before} of the prompt above it; prompts must be in order.",
            needs=() if alike else _LAYOUT_KEYS,
        )
    elif here == before:
        yield Mistake(
            path,
            f"{dotted(path)} is {given}, in segment {here} as the prompt above it; "
            f"each prompt must begin in a segment of its own (segment {here} ends at "
            f"{layout.first_frame(here + 1) / layout.fps:g}s).",
            needs=() if entry == previous else _LAYOUT_KEYS,
        )


def _start(entries: Sequence[PromptSegment], index: int) -> tuple[KeyPath, str]:
    """The key that says where the entry begins, and its value as it is written."""
    entry = entries[index]
    if entry.start is not None:
        return ("prompt_segments", index, "start"), format_duration(entry.start)
    return ("prompt_segments", index, "segment"), f"segment {entry.segment}"
