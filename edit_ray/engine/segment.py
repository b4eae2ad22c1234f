"""`SegmentEngine`: one loaded model that denoises and decodes segments; what a GPU actor wraps, without Ray."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from edit_ray.cache.options import CacheOptions
from edit_ray.cache.records import Record
from edit_ray.cache.stores.memory import GPUStore
from edit_ray.engine.decode import StreamingDecoder, to_uint8
from edit_ray.engine.fast_vae import fast_decoder
from edit_ray.engine.init_file import Frames, read_init
from edit_ray.engine.loading import load_pipeline, noise_scheduler_for, second_gpu, streamed, usable_cores
from edit_ray.engine.lora import weigh_loras
from edit_ray.engine.options import ContinuityOptions, LoraOptions, Mode, ModelOptions, SamplingOptions, frames_of
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.engine.reuse import plan_run_reuse
from edit_ray.engine.vae_stream import Preceding, RunStream, encode_picture, encode_video, to_video
from edit_ray.errors import ModelError, SegmentFailed
from edit_ray.tiers.leases import Reuse
from edit_ray.tiers.store_client import PlannedStore

MAX_SEQUENCE_LENGTH = 512  # the pipeline's default, so that embeddings equal the library's
ARGUMENTS = {"height", "width", "num_frames", "num_inference_steps", "sigmas", "guidance_scale", "guidance_scale_2"}
"""Of the pipeline's call."""
UNCACHED = CacheOptions()
KEPT_PROMPTS = 256  # at Wan's size an embedding takes 4 MB of host memory
PROMPTS_AT_ONCE = 32  # for which the text encoder's weights are copied to the device once


class SegmentEngine:
    """Denoises segments by prompt and seed, and decodes runs as streams. One caller per method at a time.

    It keeps the decoder states of the `max_live_decoders` runs that were decoded last; others are rebuilt.
    """

    def __init__(
        self, pipe: EditWanPipeline, *, offload_text_encoder: bool = False, loras: Sequence[LoraOptions] = ()
    ) -> None:
        """`loras` are those on `pipe` that are not fused."""
        self.pipe, self._loras = pipe, loras
        self._lora_weights: Mapping[str, float] = {}  # in place of their own
        self._own_scheduler, self._own_boundary = pipe.scheduler, pipe.config.boundary_ratio
        self.device = torch.device(pipe.device)  # diffusers searches every module for it
        self._offload_text_encoder = offload_text_encoder
        self._embeds: OrderedDict[str, Tensor] = OrderedDict()  # prompt -> [1, L, D] on the CPU
        self._streams: OrderedDict[str, RunStream] = OrderedDict()  # least recently used first
        self._streams_lock = threading.Lock()
        self.max_live_decoders = 1
        self._anchor: tuple[Frames, Tensor] | None = None  # the picture that was encoded for `svi` last, and its latent
        self._cached_for: object = None  # the options that the pipeline's cache was enabled with
        self._fast_decoder = ExitStack()
        self._mode: Mode = "exact"
        # Priority over the denoising beside it: these frames are awaited, and both together take as long in any order.
        self._video_stream = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None

    pipeline_class: ClassVar[type[EditWanPipeline]] = EditWanPipeline

    @classmethod
    def load(cls, model: ModelOptions, cpu_threads: int | None = None, *, cfg_parallel: bool = False) -> Self:
        """Load `model` and give torch `cpu_threads` threads, by default one per core that this process may use.

        With `cfg_parallel` the branch "uncond" is computed on a second GPU. Raises `ModelError`.
        """
        torch.set_num_threads(cpu_threads or usable_cores())
        second = second_gpu() if cfg_parallel else None
        pipe = load_pipeline(model, cls.pipeline_class)
        if second is not None:
            pipe.enable_cfg_parallel(second)
        loras = () if model.fuse_lora else model.loras
        return cls(pipe, offload_text_encoder=model.offload != "none", loras=loras)

    def use_mode(self, mode: Mode, *, fp8: bool = False) -> None:
        """Compute in this mode from now on, `fast` with the blocks' linear layers in FP8 if `fp8`.

        Raises `ModelError` on hardware without FP8.
        """
        self.pipe.use_mode(mode, fp8=fp8)
        if mode == self._mode:
            return
        with self._video():  # on the stream that reads the weights, so that it reads the new layout
            self._fast_decoder.close()
            if mode == "fast" and self.device.type == "cuda":
                self._fast_decoder.enter_context(fast_decoder(self.pipe.vae))
        self._mode = mode

    def encode_prompts(self, prompts: Sequence[str], negative_prompt: str = "") -> None:
        """Encode the prompts not yet known; of an offloaded text encoder one block is on the device at a time.

        Raises `ModelError` for a model without text encoder.
        """
        wanted = dict.fromkeys([*prompts, negative_prompt])
        missing = [prompt for prompt in wanted if prompt not in self._embeds]
        if not missing:
            return
        if self.pipe.text_encoder is None:
            raise ModelError("The model has no text encoder, so no prompt can be encoded.")
        for start in range(0, len(missing), PROMPTS_AT_ONCE):
            some = missing[start : start + PROMPTS_AT_ONCE]
            self._embeds.update(zip(some, self._encode(some), strict=True))
        for prompt in wanted:
            self._embeds.move_to_end(prompt)
        while len(self._embeds) > max(KEPT_PROMPTS, len(wanted)):
            self._embeds.popitem(last=False)

    def denoise(
        self,
        sampling: SamplingOptions,
        *,
        prompt: str,
        seed: int,
        on_step: Callable[[int, int], None] | None = None,
        cache: CacheOptions = UNCACHED,
        segment_index: int = 0,
        store: PlannedStore | None = None,
        lora_weights: Mapping[str, float] | None = None,
        **conditions: Any,
    ) -> Tensor:
        """One segment's normalised latents [1, C, T, h, w], float32, on the CPU, its context first.

        Equal, bit for bit, to `pipe(prompt, negative_prompt, generator=torch.Generator().manual_seed(seed),
        output_type="latent", …)` on the same hardware and threads; `conditions` are further arguments of that call,
        such as `history` and `image`. `on_step(done, total)` is called after each step;
        an exception from it ends the segment and leaves the engine usable. With a cache `self.record` then holds its
        decisions. `store` follows the run's reuse plan, for a policy that reuses between segments. `lora_weights`
        replace those of LoRAs that are not fused, by adapter. Raises `SegmentFailed` if a value is not finite.
        """
        self.encode_prompts([prompt], sampling.negative_prompt)
        self._use(cache, sampling, lora_weights or {})
        if (enabled := self.pipe.cache) is not None:
            stored = [] if store is None else store.planned_reads()
            enabled.use_store(GPUStore() if store is None else store, stored)
            enabled.set_generation(segment_index)
            enabled.set_reuse_window(int(key[0] or 0) for key in stored)
        guided = sampling.guidance_scale > 1
        output: tuple[Tensor] = self.pipe(
            **sampling.model_dump(include=ARGUMENTS),
            generator=torch.Generator().manual_seed(seed),
            prompt_embeds=self._embeds[prompt].to(self.device),
            negative_prompt_embeds=self._embeds[sampling.negative_prompt].to(self.device) if guided else None,
            output_type="latent",
            callback_on_step_end=None if on_step is None else _step_callback(on_step, sampling.num_inference_steps),
            **conditions,
            reset_cache=store is None,
            return_dict=False,
        )
        if store is not None:
            store.finish()
        references = len(conditions.get("reference_images", ()))  # are in front of the video
        return self._checked(output[0][:, :, references:], seed)

    def _checked(self, latents: Tensor, seed: int) -> Tensor:
        """The latents in float32 on the CPU. Raises `SegmentFailed` if a value is not finite."""
        latents = latents.to("cpu", torch.float32)
        if not latents.isfinite().all():
            raise SegmentFailed(
                f"The segment of seed {seed} has latents that are not finite in {self.pipe.transformer.dtype}; "
                "try model.torch_dtype 'bfloat16' or 'float32'."
            )
        return latents

    def plan_reuse(
        self, run_id: str, num_segments: int, cache: CacheOptions, sampling: SamplingOptions, budget: int | None
    ) -> Reuse | None:
        """What the segments of a run reuse of each other; None without a reuse window."""
        if not cache.reuse_window:
            return None
        self._use(cache, sampling, {})
        return plan_run_reuse(self.pipe, run_id, num_segments, cache.reuse_window, sampling, budget)

    @property
    def history_len(self) -> int:
        """The number of its own latest residuals that each unit reads."""
        return 1 if self.pipe.cache is None else self.pipe.cache.history_len

    @property
    def record(self) -> Record | None:
        """What the cache decided in the last segment; None without a cache."""
        return None if self.pipe.cache is None else self.pipe.cache.record

    @property
    def figures(self) -> Mapping[str, float]:
        """Further statistics of the last segment, by the names of the manifest."""
        return {}

    def context(
        self,
        continuity: ContinuityOptions,
        run_id: str,
        *,
        position: int,
        preceding: Preceding,
        tiled_from: int | None = None,
        picture: Frames | None = None,
    ) -> dict[str, Any]:
        """What the segment after `position` latents of a run's stream continues, as arguments of `denoise`.

        It depends on latents alone, and with `svi` on the `picture`, uint8 [1, H, W, 3]. Frames that it needs are
        decoded again, unless they were kept, from `preceding`, which returns the last `count` latents before
        `position`; those from `tiled_from` on in tiles.
        """
        if continuity.mode == "svi":
            assert picture is not None, "the caller has checked it"
            conditions = self.picture(continuity, picture)
            return conditions | {"image_latents": torch.cat([conditions["image_latents"], preceding(1)], dim=2)}
        with self._video():
            stream = self._stream(run_id, tiled_from)
            if continuity.mode != "image" or self.pipe.kind != "image":
                return stream.context(continuity, position, preceding)
            return self.picture(continuity, to_uint8(stream.last_frames(1, position, preceding)).cpu().numpy())

    def picture(self, continuity: ContinuityOptions, frame: Frames) -> dict[str, Any]:
        """What a segment that begins with a picture, uint8 [1, H, W, 3], is conditioned on, as arguments of `denoise`.

        A model that holds latents gets `history`, float32 on the CPU: the picture as `picture_as` says, behind what it
        is alone if that is something else.
        """
        if self.pipe.kind == "first frame":
            with self._video():
                return {"history": encode_picture(self.pipe.vae, to_video(frame), continuity).cpu()}
        shown = {"image": Image.fromarray(frame[0])}
        if continuity.mode != "svi":
            return shown
        if self._anchor is None or not np.array_equal(self._anchor[0], frame):
            with self._video():
                self._anchor = frame, encode_video(self.pipe.vae, to_video(frame)).cpu()
        return shown | {"image_latents": self._anchor[1]}

    def encode_init(self, continuity: ContinuityOptions, sampling: SamplingOptions) -> Tensor:
        """The latents [1, C, n, h, w] of the user's picture or clip, float32, on the CPU; raises `ConfigError`.

        Segment 0 continues the last `init_latents` of them; the first is the picture's own.
        """
        assert continuity.init is not None, "the caller has checked it"
        count = frames_of(continuity.init_latents)
        frames = read_init(continuity.init, frames=count, height=sampling.height, width=sampling.width)
        encode = partial(encode_picture, continuity=continuity) if continuity.begins_with_picture else encode_video
        with self._video():
            return encode(self.pipe.vae, to_video(frames)).cpu()

    def decode(
        self,
        run_id: str | None,
        latents: Tensor,
        *,
        position: int = 0,
        preceding: Preceding | None = None,
        keep_frames: int = 0,
        tiled_from: int | None = None,
    ) -> Tensor:
        """New latents [1, C, n, h, w] of a run's stream as frames, uint8 [F, H, W, 3], on the CPU.

        `position` counts the stream's latents before them. The decoder's state is carried from call to call; if it is
        not at `position` (a new process, a segment made again) it is rebuilt from `preceding(count)`, which returns
        the last `count` latents before `position`. The last `keep_frames` frames are kept for `context`. With
        `run_id` `None` the latents are a stream of their own. From the position `tiled_from` on the stream is decoded
        in tiles.
        """
        with self._video():
            if run_id is not None:
                video = self._stream(run_id, tiled_from).decode(latents, position, preceding, keep_frames)
            else:
                tiled = tiled_from is not None and position >= tiled_from
                video = StreamingDecoder(self.pipe.vae, tiled=tiled).decode(latents)
            return to_uint8(video).cpu()

    def release(self, run_id: str) -> None:
        """Free the run's decoder states."""
        for stream in [stream for stream in self._streams if stream.partition("/")[0] == run_id]:
            del self._streams[stream]

    def free_memory(self, *, of_cache: bool) -> None:
        """Free the device memory of what can be computed again: decoder states, and with `of_cache` residuals."""
        self._streams.clear()
        if of_cache:
            self.pipe.disable_cache()
            self._cached_for = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _video(self) -> AbstractContextManager[object]:
        """Queues the VAE's work beside that of the transformer, not after it."""
        return nullcontext() if self._video_stream is None else torch.cuda.stream(self._video_stream)

    def _stream(self, run_id: str, tiled_from: int | None) -> RunStream:
        with self._streams_lock:  # a segment is decoded while the next one is denoised
            stream = self._streams.setdefault(run_id, RunStream(self.pipe.vae))
            self._streams.move_to_end(run_id)
            while len(self._streams) > self.max_live_decoders:
                self._streams.popitem(last=False)
        stream.tiled_from = tiled_from
        return stream

    def _use(self, cache: CacheOptions, sampling: SamplingOptions, lora_weights: Mapping[str, float]) -> None:
        """Set noise scheduler, experts' boundary, LoRAs and cache, unless the last segment had the same."""
        self.pipe.scheduler = noise_scheduler_for(self._own_scheduler, sampling)
        self.pipe.register_to_config(boundary_ratio=sampling.boundary_ratio or self._own_boundary)
        steps = (sampling.num_inference_steps, sampling.sigmas, sampling.sampler, sampling.flow_shift)
        wanted = (cache, steps, sampling.boundary_ratio, dict(lora_weights))
        if self._cached_for == wanted and (self.pipe.cache is not None or cache.policy == "none"):
            return
        self.pipe.disable_cache()
        self._cached_for = None
        if lora_weights != self._lora_weights:
            weigh_loras(self.pipe, self._loras, lora_weights)
            self._lora_weights = lora_weights
        if cache.policy != "none":
            own: dict[str, Any] = {"target_speedup": cache.target_speedup, "cfg_gate": cache.cfg_gate}
            options = {**own, "sigmas": sampling.sigmas, **cache.policy_options}
            self.pipe.enable_cache(cache.policy, sampling.num_inference_steps, cache.granularity, **options)
        self._cached_for = wanted

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """[1, L, D] of each prompt, with the bits that it has alone, on the CPU."""
        options: dict[str, Any] = {"do_classifier_free_guidance": False, "max_sequence_length": MAX_SEQUENCE_LENGTH}
        encode = partial(self.pipe.encode_prompt, device=self.device, **options)
        if self._offload_text_encoder and self.device.type != "cpu":
            with streamed(self.pipe.text_encoder.to("cpu"), self.device):
                return list(encode(list(prompts))[0].cpu().split(1))
        return [encode(prompt)[0].cpu() for prompt in prompts]


def _step_callback(on_step: Callable[[int, int], None], total: int) -> Callable[..., dict[str, Any]]:
    def after_step(_pipe: object, step_index: int, *_: object) -> dict[str, Any]:
        on_step(step_index + 1, total)
        return {}

    return after_step
