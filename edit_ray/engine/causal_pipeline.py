"""`EditCausalWanPipeline`: Wan models that make a video chunk by chunk, attending to the K/V of earlier chunks."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, NoReturn, Self

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel
from transformers.image_processing_utils import BaseImageProcessor

from edit_ray.cache.kv import KVWindow
from edit_ray.cache.kv_retention import RetentionPolicy, make_retention
from edit_ray.cache.kv_rings import KVLayout
from edit_ray.cache.loop_position import LoopStep
from edit_ray.cache.stores.base import CacheStore
from edit_ray.engine.caching import loop_steps
from edit_ray.engine.causal_options import INDEX_KEY, CausalOptions, causal_options, latents_of_chunks
from edit_ray.engine.causal_stream import CausalStream, GivenChunk, VideoChunk, schedule_of
from edit_ray.engine.conditioning import StepSchedule
from edit_ray.engine.loop import StepCallback
from edit_ray.engine.model_files import folder_above, local_folder
from edit_ray.engine.pipeline import EditWanOutput, EditWanPipeline, one_call_at_a_time

logger = logging.getLogger(__name__)
_SHARED = ("tokenizer", "text_encoder", "vae", "scheduler")


def noise_scheduler_of(sampler: str) -> SchedulerMixin:
    """diffusers' noise scheduler of a `sampler`, which takes noise levels as they are, without a shift."""
    if sampler == "unipc":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        return UniPCMultistepScheduler(**flow, flow_shift=1.0)
    return FlowMatchLCMScheduler(shift=1.0) if sampler == "renoise" else FlowMatchEulerDiscreteScheduler(shift=1.0)


class EditCausalWanPipeline(EditWanPipeline):
    """A causal, few-step Wan model: a call makes a video, `stream` makes one that continues for as long as it is asked.

    Arguments mean what they mean in `EditWanPipeline`, and the result is the same. `options` of a call are fields of
    `CausalOptions`, in place of the model's own (`causal`): `window`, `sink`, `timesteps` and so on. Fresh noise comes
    from seeds of its own for each chunk and step; `generator` gives the first seed. `retention` chooses the chunks that
    stay in the window, and `store` keeps those that it may want back. `kv_device_bytes` is what the window may take on
    the device, with its rotated keys: the layers beyond it are in host memory, and copied to the device as they are
    needed, without a change of bits.

    Examples:
        >>> pipe = EditCausalWanPipeline.from_pretrained("a/converted/model", device="cuda")
        >>> video = pipe("a red circle", num_frames=81, generator=torch.Generator().manual_seed(0))[0]
        >>> stream = pipe.stream("a red circle")
        >>> frames = next(stream).frames
        >>> stream.send(prompt="a blue square", switch="recache")
    """

    _causal = True
    _kv: Callable[[], KVWindow | None] | None = None  # a weak reference: a dropped stream frees its K/V

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: UMT5EncoderModel | None,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        transformer: WanTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        image_processor: BaseImageProcessor | None = None,
        image_encoder: CLIPVisionModel | None = None,
        causal: Mapping[str, Any] | None = None,
    ) -> None:
        if transformer_2 is not None or boundary_ratio is not None:
            raise ValueError("A causal model has one transformer; here are transformer_2 and boundary_ratio as well.")
        parts: dict[str, Any] = {"image_processor": image_processor, "image_encoder": image_encoder}
        parts["expand_timesteps"] = expand_timesteps
        super().__init__(tokenizer, text_encoder, vae, scheduler, transformer, **parts)
        self.causal = causal_options(causal or {})
        self.register_to_config(causal=self.causal.model_dump())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> Self:
        """As of `EditWanPipeline`. A model in the folder of another one takes those parts of it that it has not."""
        folder = local_folder(str(pretrained_model_name_or_path))
        above = None if folder is None else folder_above(folder)
        if folder is not None and above is not None:
            lacking = [name for name in _SHARED if name not in kwargs and not (folder / name).is_dir()]
            given: dict[str, Any] = dict.fromkeys(name for name in ("transformer", *_SHARED) if name not in lacking)
            parts = EditWanPipeline.from_pretrained(above, torch_dtype=torch_dtype, **given).components
            kwargs |= {name: parts[name] for name in lacking}
        loading: dict[str, Any] = {"torch_dtype": torch_dtype, "device": device}
        return super().from_pretrained(pretrained_model_name_or_path, **loading, **kwargs)

    @property
    def causal(self) -> CausalOptions:
        """The model's options, which a call's own change for that call."""
        return self._causal_options

    @causal.setter
    def causal(self, options: CausalOptions) -> None:
        self._causal_options = options

    @property
    def kv(self) -> KVWindow:
        """The K/V of the stream that has made the last chunk, to see and to edit. Raises ValueError without one."""
        kv = None if self._kv is None else self._kv()
        if kv is None or kv.freed:
            raise ValueError("There is no K/V: no stream of this pipeline is open.")
        return kv

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle, which has no stream."""
        return {**super().__getstate__(), "_kv": None}

    def to_json_string(self) -> str:
        """The configuration as `save_pretrained` writes it."""
        config = json.loads(super().to_json_string())
        config |= {"_class_name": "EditCausalWanPipeline", INDEX_KEY: self.causal.model_dump()}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def __call__(  # type: ignore[override]  # a causal model has no number of steps, and takes no clip
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        guidance_scale: float = 1.0,
        num_videos_per_prompt: int | None = 1,
        generator: Generator | list[Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (as in EditWanPipeline)
        max_sequence_length: int = 512,
        **options: Any,
    ) -> EditWanOutput | tuple[Any]:
        """Generate videos of `num_frames` frames; the class says what the arguments and the result are."""
        stream = self.stream(
            prompt, negative_prompt, height, width, num_frames, guidance_scale, generator,
            num_videos_per_prompt=num_videos_per_prompt, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds, attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end, max_sequence_length=max_sequence_length, decode=False,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs, **options,
        )  # fmt: skip
        latents = []
        with self.progress_bar(total=stream.num_chunks) as bar:
            for chunk in stream:
                latents.append(chunk.latents)
                bar.update()
        with torch.no_grad():
            frames = self._decode(torch.cat(latents, dim=2), output_type, 0)
        self.maybe_free_model_hooks()
        return EditWanOutput(frames=frames) if return_dict else (frames,)

    def stream(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int | None = None,
        guidance_scale: float = 1.0,
        generator: Generator | list[Generator] | None = None,
        *,
        num_videos_per_prompt: int | None = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        history: Tensor | Sequence[GivenChunk] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (as in EditWanPipeline)
        max_sequence_length: int = 512,
        decode: bool = True,
        retention: str | RetentionPolicy = "window_sink",
        store: CacheStore | None = None,
        kv_device_bytes: int | None = None,
        **options: Any,
    ) -> CausalStream:
        """A stream of chunks, without an end unless `num_frames` is given.

        `history` [B, C, k, h, w] are normalised latents that the stream continues: whole chunks, which it does not make
        again; or those chunks that the next one sees, with their numbers and prompts. `callback_on_step_end` is called
        with the step inside the chunk.

        Raises:
            ConfigError: a wrong option; all of them are named.
            ValueError: no number of chunks has `num_frames` frames; `history` is not of whole chunks, or has gaps where
                frames are to be decoded; `kv_device_bytes` is too small.
            HostMemoryShort: the node has too little memory for the K/V beyond `kv_device_bytes`.
        """
        causal, names = causal_options(options, base=self.causal), tuple(callback_on_step_end_tensor_inputs)
        embeds, videos = (prompt_embeds, negative_prompt_embeds), num_videos_per_prompt or 1
        self.check_inputs(prompt, negative_prompt, height, width, *embeds, list(names))
        latents = None
        if num_frames is not None:
            latents = latents_of_chunks(num_frames, causal.chunk_size, self.vae_scale_factor_temporal)
        height, width, _ = self._fit(height, width, 1)
        texts = self._texts_of(guidance_scale, prompt, negative_prompt, videos, *embeds, max_sequence_length)
        factor = self.vae_scale_factor_spatial
        batch = len(texts[0])
        shape = (batch, self.denoiser.config.in_channels, causal.chunk_size, height // factor, width // factor)
        kv = self._window(causal, shape, texts[1] is not None, retention, store, kv_device_bytes)
        return CausalStream(
            self, causal, kv, texts, shape=shape, seeds=_seeds(generator, batch),
            num_chunks=None if latents is None else latents // causal.chunk_size, guidance_scale=guidance_scale,
            attention_kwargs=attention_kwargs, max_sequence_length=max_sequence_length,
            history=() if history is None else self._beginning(history, shape, whole=decode),
            callback=callback_on_step_end, callback_tensor_inputs=names, decode=decode,
        )  # fmt: skip

    @one_call_at_a_time
    def make_chunk(self, stream: CausalStream) -> VideoChunk:
        """The next chunk of a stream."""
        self.scheduler = noise_scheduler_of(stream.options.sampler)
        self._begin_call(stream.guidance_scale, None, stream.attention_kwargs)
        self._kv = weakref.ref(stream.kv)
        return stream.make()

    def planned_steps(self, schedule: StepSchedule) -> list[LoopStep]:
        """The steps of a chunk, whatever their number elsewhere."""
        scheduler = noise_scheduler_of(self.causal.sampler)
        schedule_of(self.causal).set_on(scheduler, torch.device("cpu"))
        return loop_steps(self, scheduler)

    def enable_cfg_parallel(self, *_: object, **__: object) -> NoReturn:
        """Not for a causal model, which has no guidance. Raises ValueError."""
        raise ValueError("cfg_parallel computes the two branches of guidance on two GPUs; a causal model has one.")

    def encode_text(self, prompt: Any, prompt_embeds: Tensor | None, max_sequence_length: int) -> Tensor:
        """Embeddings [B, L, D] of a stream's new prompt, in the transformer's dtype."""
        return self._texts_of(1.0, prompt, None, 1, prompt_embeds, None, max_sequence_length)[0]

    @one_call_at_a_time
    @torch.no_grad()
    def _texts_of(self, guidance_scale: float, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        if guidance_scale > 1:
            logger.warning(
                "guidance_scale is %s: causal models are distilled to be used without guidance, at 1; this takes twice "
                "the time and memory, and may oversaturate.",
                guidance_scale,
            )
        self._begin_call(guidance_scale, None, None)
        return self._embed(*arguments)

    def _window(
        self,
        causal: CausalOptions,
        shape: tuple[int, ...],
        guided: bool,
        retention: str | RetentionPolicy,
        store: CacheStore | None,
        device_bytes: int | None,
    ) -> KVWindow:
        layout = self.kv_layout(causal, shape[0], *shape[-2:])
        branches = ("cond", "uncond") if guided else ("cond",)
        return KVWindow(
            layout,
            make_retention(retention),
            sink_chunks=causal.sink // causal.chunk_size,
            branches=branches,
            store=store,
            device_bytes=device_bytes,
        )

    def kv_layout(self, causal: CausalOptions, batch: int, height: int, width: int) -> KVLayout:
        """The sizes of a window of K/V, for videos of so many latent pixels."""
        config = self.denoiser.config
        return KVLayout(
            num_layers=config.num_layers,
            batch=batch,
            tokens=causal.chunk_size * (height // config.patch_size[1]) * (width // config.patch_size[2]),
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            chunks=causal.chunks,
            dtype=self.denoiser.dtype,
            device=torch.empty(0, device=self._execution_device).device,  # with its number, as tensors say it
            rotated_keys=causal.rope == "relative",
        )

    def _beginning(
        self, history: Tensor | Sequence[GivenChunk], shape: tuple[int, ...], *, whole: bool
    ) -> list[GivenChunk]:
        """A given beginning in float32 on the device. Raises ValueError for another shape than a stream's chunks."""
        batch, channels, frames, *size = shape
        for latents in [history] if isinstance(history, Tensor) else [given.latents for given in history]:
            given, many = list(latents.shape), isinstance(history, Tensor)
            right = len(given) == 5 and given[:2] == [batch, channels] and given[3:] == size
            if not right or not given[2] or given[2] % frames or (given[2] != frames and not many):
                valid = [batch, channels, f"n * {frames}" if many else frames, *size]
                raise ValueError(
                    f"`history` is {given}; it must be {valid}, {'n chunks' if many else 'one'} of latents."
                )
        if isinstance(history, Tensor):
            history = [GivenChunk(index, latents) for index, latents in enumerate(history.split(frames, dim=2))]
        numbers = [given.index for given in history]
        if numbers != (list(range(len(numbers))) if whole else sorted(set(numbers))):
            said = "all from 0 on, as the stream decodes" if whole else "numbers that rise"
            raise ValueError(f"`history` has the chunks {numbers}; they must be {said}.")
        return [replace(given, latents=given.latents.to(self._execution_device, torch.float32)) for given in history]


def _seeds(generator: Generator | list[Generator] | None, batch: int) -> list[int]:
    """The seed of each video, drawn from the generators: the next call with the same ones makes other videos."""
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"There are {len(generator)} generators for {batch} videos; give one, or one for each.")
    each = generator if isinstance(generator, list) else [generator] * batch
    drawn = [torch.randint(2**63 - 1, (), generator=one, device="cpu" if one is None else one.device) for one in each]
    return [int(seed) for seed in drawn]
