"""Runs of causal models: the defaults that differ, and what such a run or such a model does not take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edit_ray.config.mistakes import KeyPath, Mistake, mistake_at
from edit_ray.config.run_memory import run_of
from edit_ray.engine.card_memory import kv_bytes
from edit_ray.engine.causal_options import CausalOptions, latents_of_chunks, options_of_run
from edit_ray.engine.model_info import ModelInfo, read_configs
from edit_ray.engine.options import ContinuityOptions, frames_of
from edit_ray.errors import ConfigError
from edit_ray.runs.causal_plan import ChunkSizes
from edit_ray.runs.run_plan import TEMPORAL_FACTOR

if TYPE_CHECKING:
    from edit_ray.config.model import Config

_DEFAULTS: dict[str, Any] = {"guidance_scale": 1.0, "flow_shift": 5.0}
_STEPS = 4  # of the published models
_OWN = ("window", "sink", "context_noise", "rope")
_PICTURES = ("image", "last_image", "reference_images")


def causal_defaults(data: Any) -> Any:
    """The raw configuration, completed by the defaults of a causal run; whatever else it is comes back as it is.

    `num_frames` and `continuity.chunks` say the same, and either gives the other.
    """
    continuity = data.get("continuity") if isinstance(data, dict) else None
    sampling = data.get("sampling", {}) if isinstance(data, dict) else None
    if not isinstance(continuity, dict) or continuity.get("mode") != "causal" or not isinstance(sampling, dict):
        return data
    steps = {} if sampling.get("sigmas") else {"num_inference_steps": _STEPS}
    sampling, fields = _DEFAULTS | steps | sampling, ContinuityOptions.model_fields
    size, chunks = (continuity.get(name, fields[name].default) for name in ("chunk_size", "chunks"))
    if type(size) is int and size > 0:  # else that is a mistake of its own
        if "num_frames" not in sampling and type(chunks) is int:
            sampling["num_frames"] = frames_of(size * chunks)
        elif "chunks" not in continuity and type(given := sampling.get("num_frames")) is int:
            continuity = continuity | {"chunks": max(1, ((given - 1) // TEMPORAL_FACTOR + 1) // size)}
    return data | {"continuity": continuity, "sampling": sampling}


def guidance_warning(config: Config) -> str | None:
    """One sentence if a causal run has guidance, for which such models are not made."""
    scales = [_guidance(config, entry) for entry in range(len(config.prompt_segments))]
    if not config.continuity.causal or max(scales) <= 1:
        return None
    return (
        f"guidance_scale is {max(scales):g}: causal models are distilled to be used without guidance, at 1; it takes "
        "twice the time and memory, and may oversaturate"
    )


def chunk_sizes(config: Config, base: CausalOptions) -> ChunkSizes:
    """The chunks and the window of a run of the model with these options. Raises ConfigError."""
    options = options_of_run(base, config.continuity, config.sampling)
    return ChunkSizes(options.chunk_size, options.window, options.sink)


def causal_mistakes(config: Config) -> Iterator[Mistake]:
    """What does not go together with `continuity.mode: causal`, or needs it, whatever the model."""
    continuity, mode = config.continuity, "continuity.mode"
    if not continuity.causal:
        for name in _OWN:
            if (given := getattr(continuity, name)) is not None:
                yield mistake_at(f"continuity.{name}", f"is {given!r}; it needs continuity.mode causal.", mode)
        for index, entry in enumerate(config.prompt_segments):
            if entry.switch is not None:
                said = f"is {entry.switch!r}; it needs continuity.mode causal, where chunks attend to earlier ones."
                yield mistake_at(("prompt_segments", index, "switch"), said, mode)
        return
    yield from _beginning(config)
    yield from _stored_kv(config)
    yield from _guidance_texts(config)
    if config.sampling.sampler == "dpm++":
        said = "is 'dpm++'; it must be one of renoise, unipc, euler where continuity.mode is causal."
        yield mistake_at("sampling.sampler", said, mode)
    if config.cache.reuse_window:
        said = (
            f"is {config.cache.reuse_window}; it must be 0 where continuity.mode is causal: a chunk's residuals are of "
            "no use to another, and what carries over is K/V."
        )
        yield Mistake(("cache",), f"cache.reuse_window {said}", (("continuity", "mode"),))
    if config.engine.cfg_parallel:
        said = "is true; it must be false where continuity.mode is causal, as such a model has no guidance to divide."
        yield mistake_at("engine.cfg_parallel", said, mode)


def chunk_mistakes(config: Config) -> Iterator[Mistake]:
    """A `num_frames` that is not that of the chunks."""
    frames, continuity = config.sampling.num_frames, config.continuity
    if not continuity.causal:
        return
    keys = ("continuity.mode", "continuity.chunks", "continuity.chunk_size")
    try:
        latents_of_chunks(frames, continuity.chunk_size, TEMPORAL_FACTOR)
    except ValueError as error:
        yield mistake_at("sampling.num_frames", str(error).removeprefix("num_frames "), *keys)
        return
    made = frames_of(continuity.chunks * continuity.chunk_size)
    if frames != made:
        said = f"is {frames}, and continuity.chunks {continuity.chunks}, which makes {made}; one of them must be given."
        yield mistake_at("sampling.num_frames", said, *keys)


def _beginning(config: Config) -> Iterator[Mistake]:
    continuity, mode = config.continuity, "continuity.mode"
    pictures = "a causal run begins with its prompt, and takes no picture and no clip"
    if continuity.init is not None:
        yield mistake_at("continuity.init", f"is {continuity.init!r}; {pictures}.", mode)
    if continuity.adain:
        said = f"is {continuity.adain:g}; it must be 0 where continuity.mode is causal: K/V carries the colours on."
        yield mistake_at("continuity.adain", said, mode)
    for index, entry in enumerate(config.prompt_segments):
        for name in _PICTURES:
            if getattr(entry, name) is not None:
                yield mistake_at(("prompt_segments", index, name), f"is given; {pictures}.", mode)


def _stored_kv(config: Config) -> Iterator[Mistake]:
    """What K/V in the store excludes: it is planned for the whole run, and computed again from all latents if lost."""
    if not config.continuity.commits_kv:
        return
    if config.video.endless:
        said = "is null and continuity.kv 'commit'; an endless run must have kv recache."
        yield mistake_at("video.num_segments", said, "continuity.kv", "continuity.mode")
    if (keep := config.output.keep_segments) is not None:
        said = (
            f"is {keep} and continuity.kv 'commit'; it must be null, because lost K/V is computed again from the "
            "latents of all segments, or kv recache."
        )
        yield mistake_at("output.keep_segments", said, "continuity.kv", "continuity.mode")


def _guidance_texts(config: Config) -> Iterator[Mistake]:
    """A negative prompt without guidance would do nothing."""
    says = "{!r} has no effect at guidance_scale {:g}, which causal models are made for; it must be empty."
    scale = config.sampling.guidance_scale
    if config.sampling.negative_prompt and scale <= 1:
        text = says.format(config.sampling.negative_prompt, scale)
        yield mistake_at("sampling.negative_prompt", text, "sampling.guidance_scale", "continuity.mode")
    for index, entry in enumerate(config.prompt_segments):
        if entry.negative_prompt and (own := _guidance(config, index)) <= 1:
            path: KeyPath = ("prompt_segments", index, "negative_prompt")
            needs = (f"prompt_segments.{index}.guidance_scale", "sampling.guidance_scale", "continuity.mode")
            yield mistake_at(path, says.format(entry.negative_prompt, own), *needs)


def _guidance(config: Config, entry: int) -> float:
    own = config.prompt_segments[entry].guidance_scale
    return config.sampling.guidance_scale if own is None else own


def causal_model_mistakes(config: Config, info: ModelInfo) -> Iterator[Mistake]:
    """What a causal model does not do, and a bidirectional one with `continuity.mode: causal`."""
    continuity, sampling, mode = config.continuity, config.sampling, config.continuity.mode
    if info.causal is None:
        if continuity.causal:
            said = (
                "is 'causal', and this model is bidirectional: it makes a whole segment at once; it must be one of the "
                "others, or the model a causal one, such as `edit-ray convert` makes."
            )
            yield mistake_at("continuity.mode", said, "model.path")
        return
    if not continuity.causal:
        said = f"is {mode!r}; it must be causal for this model, which makes a video chunk by chunk."
        yield mistake_at("continuity.mode", said, "model.path")
        return
    if continuity.chunk_size != info.causal.chunk_size:
        said = f"is {continuity.chunk_size}; it must be {info.causal.chunk_size}, which this model's chunks have."
        yield mistake_at("continuity.chunk_size", said, "model.path")
        return
    try:
        options = options_of_run(info.causal, continuity, sampling)
    except ConfigError as error:
        for problem in error.problems:
            key = f"continuity.{problem.split()[0]}" if problem.split()[0] in _OWN else "continuity"
            yield Mistake(tuple(key.split(".")), f"continuity.{problem}", (("model", "path"),))
        return
    steps = len(options.timesteps)
    if sampling.num_inference_steps != steps:
        said = f"is {sampling.num_inference_steps}; it must be {steps} for this model, or follow from sampling.sigmas."
        yield mistake_at("sampling.num_inference_steps", said, "model.path", "sampling.sigmas")
    yield from _end_of_table(config, info, options)
    yield from _tiers(config)


def _tiers(config: Config) -> Iterator[Mistake]:
    """Tiers that do not hold an entry of K/V, or what the next segment begins with while this one writes."""
    if not config.continuity.commits_kv:
        return
    configs, _ = read_configs(config.model.path)
    run, transformer = run_of(config), configs["transformer"]
    window, chunk = run.window + config.continuity.chunks * run.chunk_size, run.chunk_size
    spatial = configs["vae"].get("scale_factor_spatial", 8)
    needed, whole = (kv_bytes(transformer, run, spatial, latents) for latents in (window, chunk))
    entry = whole // (int(transformer.get("num_layers", 40)) * run.branches)
    store = config.store
    for name, given, least, of in (
        ("disk_bytes", store.disk_bytes, needed, "the K/V of a window and of a segment"),
        ("host_bytes", store.host_bytes, entry, "the K/V of a chunk in a layer"),
    ):
        if given is not None and given < least:
            said = f"is {given}; it must be at least {least} where continuity.kv is commit, for {of}."
            yield mistake_at(f"store.{name}", said, "continuity.kv", "model.path")


def _end_of_table(config: Config, info: ModelInfo, options: CausalOptions) -> Iterator[Mistake]:
    """With absolute positions a video between two cuts ends with the model's table."""
    if options.rope != "absolute":
        return
    cuts = [scene.start for scene in config.storyboard.scenes if scene.switch == "cut" and scene.start]
    end = config.num_segments
    each = config.layout.latent_frames
    longest = None if end is None else max(b - a for a, b in zip([0, *cuts], [*cuts, end], strict=True)) * each
    if longest is None or longest > info.rope_max_seq_len:
        has = "no end" if longest is None else f"{longest} latent frames without a cut"
        said = (
            f"is 'absolute', with which this model's videos end after {info.rope_max_seq_len} latent frames, and this "
            f"one has {has}; with relative they have no end."
        )
        yield Mistake(("continuity", "rope"), f"continuity.rope {said}", (("model", "path"), ("video",)))
