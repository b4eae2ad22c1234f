"""`EditWanPipeline`: diffusers' `WanPipeline` with an explicit denoising loop, and segments that continue others."""

import json
import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import get_module_execution_device
from PIL.Image import Image
from tokenizers.models import WordLevel
from torch import Generator, Tensor
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel
from transformers.image_processing_utils import BaseImageProcessor

from edit_ray.engine.caching import CacheControl, experts_of
from edit_ray.engine.calibration import FILE_NAME
from edit_ray.engine.causal_options import check_kind
from edit_ray.engine.cfg_parallel import CfgControl, check_device
from edit_ray.engine.conditioning import (
    SAVED_AS,
    Conditioning,
    StepSchedule,
    Window,
    check_given,
    kind_of,
    prepare,
)
from edit_ray.engine.continuity import ContextLatents, check_context
from edit_ray.engine.decode import denormalise
from edit_ray.engine.fast_transformer import check_mode
from edit_ray.engine.known_words import unknown_words
from edit_ray.engine.loop import Request, StepCallback, denoise
from edit_ray.engine.lora import LoraControl
from edit_ray.engine.model_files import BUILTIN_PREFIX, locate_model
from edit_ray.engine.model_info import Kind
from edit_ray.engine.offload import OffloadControl
from edit_ray.engine.options import Mode
from edit_ray.engine.precompute import Precompute
from edit_ray.engine.trained_range import CARD, read_trained_for

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
logger = logging.getLogger(__name__)
_lock = threading.Lock()
_running: set[int] = set()  # ids of pipelines; kept here, so that a copy or a pickle takes none of it along


def one_call_at_a_time(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A pipeline's method that is not entered twice: scheduler, guidance and cache belong to the pipeline.

    Raises:
        RuntimeError: in the second call; the first continues undisturbed.
    """

    @wraps(call)
    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        pipe: Any = args[0]
        with _lock:
            if id(pipe) in _running:
                raise RuntimeError(
                    f"This {type(pipe).__name__} is running, in another thread or in a call that made this one; "
                    "a pipeline makes one call at a time. copy.deepcopy(pipe) is another pipeline."
                )
            _running.add(id(pipe))
        try:
            return call(*args, **kwargs)
        finally:
            _running.discard(id(pipe))

    return alone


@dataclass
class EditWanOutput(WanPipelineOutput):  # type: ignore[misc]  # diffusers ships no types that mypy can follow
    """`.frames` is the batch as in diffusers; the output itself is indexed by video, [F, H, W, 3] each for "np".

    `output[0]` and `output.to_tuple()[0]` are the first video, `output[:2]` the first two.
    """

    def __getitem__(self, key: int | slice | str) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.frames[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The videos, one each."""
        return tuple(self.frames)


class EditWanPipeline(CacheControl, CfgControl, OffloadControl, LoraControl, WanPipeline):  # type: ignore[misc]
    """Wan with diffusers' components, arguments and results, and one loop that can be read and edited.

    It loads text-to-video, image-to-video (Wan2.1, Wan2.2), text- and image-to-video (TI2V) and VACE models. A call's
    arguments up to `max_sequence_length` mean what they mean in `diffusers.WanPipeline`; `image`, `last_image` and
    `image_embeds` what in `WanImageToVideoPipeline`; with a text-to-video model `video` and `strength` (0.8) what in
    `WanVideoToVideoPipeline`, whose video has its own number of frames; with a VACE model `video`, `mask`,
    `reference_images` and `conditioning_scale` (1) what in `WanVACEPipeline`. A TI2V model holds its last latent frame
    to `last_image`, as if the video stood still there. `image_latents` [B, C, n, h, w] are normalised latents that an
    image-to-video model sees in place of the encoded `image`, followed by zeros; its mask is on the first frame alone.

    `sigmas`, in place of `num_inference_steps`, are noise levels for the noise scheduler's `set_timesteps`. A scheduler
    that draws noise in each step (`FlowMatchLCMScheduler`) draws it from `generator`. `history` or `overlap`
    [B, C, k, h, w] are normalised latents that the first k of T are held to, clean (for models with `expand_timesteps`)
    or as noisy as the rest. With a cache, `reset_cache=False` keeps what earlier calls stored, and `prefetch_reuse`
    prefetches it.

    A call returns `EditWanOutput`, whose `[0]` is the first video and whose `.frames` is the batch, or with
    `return_dict=False` as diffusers `(batch,)`, whose `[0]` is the batch: "np" [B, F, H, W, 3], "pt" [B, F, 3, H, W],
    "pil" lists of images, "latent" [B, C, T, h, w].

    Examples:
        >>> pipe = EditWanPipeline.from_pretrained("builtin:tiny_wan")
        >>> video = pipe("a red circle bouncing on a black background", height=128, width=128, num_frames=33)[0]
    """

    # A pipeline that is given embeddings needs neither text encoder nor tokenizer.
    _optional_components: ClassVar = [
        *WanPipeline._optional_components, "text_encoder", "tokenizer", "image_encoder", "image_processor"
    ]  # fmt: skip
    _causal: ClassVar[bool] = False  # whether models of this pipeline are causal
    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->transformer_2->vae"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: UMT5EncoderModel | None,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        transformer: WanTransformer3DModel | WanVACETransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | WanVACETransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        image_processor: BaseImageProcessor | None = None,
        image_encoder: CLIPVisionModel | None = None,
    ) -> None:
        super().__init__(
            tokenizer, text_encoder, vae, scheduler, transformer, transformer_2, boundary_ratio, expand_timesteps
        )
        self.register_modules(image_processor=image_processor, image_encoder=image_encoder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        device: str | torch.device | None = None,
        **kwargs: object,
    ) -> Self:
        """Load `builtin:NAME`, a folder in diffusers' layout, or a hub id, and move it to `device` if one is given.

        Everything else (`revision`, `cache_dir`, `local_files_only`, components, …) goes to diffusers as it is, which
        resolves hub ids. Weights must be safetensors unless `use_safetensors` says otherwise. Raises `ModelError` for
        an unknown builtin name, for a device that does not exist and for a model of the other kind (causal or
        bidirectional), and what diffusers raises.
        """
        if device is not None:
            device = check_device(device)
        path = str(pretrained_model_name_or_path)
        path = locate_model(path) if path.startswith(BUILTIN_PREFIX) else path
        if torch_dtype is not None:
            kwargs["dtype"] = torch_dtype  # diffusers' own name for it since 0.42
        kwargs.setdefault("use_safetensors", True)  # pickles run code
        pipe: Self = super().from_pretrained(path, **kwargs)
        return pipe if device is None else pipe.to(device)

    @classmethod
    def load_config(cls, path: str | PathLike[str], **kwargs: Any) -> Any:
        """As diffusers', which `from_pretrained` calls before it loads any part; checks the kind of model."""
        config = super().load_config(path, **kwargs)
        check_kind(config if isinstance(config, dict) else config[0], path, causal=cls._causal)
        return config

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as diffusers' pipeline for this kind of model, with the model's cache calibration."""
        super().save_pretrained(save_directory, *args, **kwargs)
        source, target = None if self.lora_digest != "" else self.calibration, Path(save_directory, FILE_NAME)
        if source is not None and not (target.exists() and source.samefile(target)):
            shutil.copyfile(source, target)

    def to_json_string(self) -> str:
        """The configuration as `save_pretrained` writes it."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = SAVED_AS[self.kind]
        unknown = {"image": (), "vace": ("image_encoder", "image_processor", "expand_timesteps")}
        for name in unknown.get(self.kind, ("image_encoder", "image_processor")):
            config.pop(name, None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @one_call_at_a_time
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int | None = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' default, never changed)
        max_sequence_length: int = 512,
        *,
        image: Image | Tensor | None = None,
        last_image: Image | Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_latents: Tensor | None = None,
        video: list[Image] | Tensor | None = None,
        strength: float | None = None,
        mask: list[Image] | None = None,
        reference_images: Image | list[Image] | list[list[Image]] | None = None,
        conditioning_scale: float | list[float] | Tensor | None = None,
        sigmas: list[float] | None = None,
        history: Tensor | None = None,
        overlap: Tensor | None = None,
        reset_cache: bool = True,
        prefetch_reuse: bool = False,
    ) -> EditWanOutput | tuple[Any]:
        """Generate videos; the class says what the arguments and the result are."""
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        embeds, videos = (prompt_embeds, negative_prompt_embeds), num_videos_per_prompt or 1
        self.check_inputs(prompt, negative_prompt, height, width, *embeds, names, guidance_scale_2)
        given: dict[str, Any] = {"image": image, "last_image": last_image, "image_embeds": image_embeds}
        given |= {"image_latents": image_latents}
        given |= {"video": video, "strength": strength, "mask": mask, "reference_images": reference_images}
        given |= {"conditioning_scale": conditioning_scale, "latents": latents, "history": history, "overlap": overlap}
        check_given(self.kind, given)
        schedule = StepSchedule(num_inference_steps if sigmas is None else len(sigmas), sigmas)
        size = self._fit(height, width, num_frames)
        self._begin_call(guidance_scale, guidance_scale_2, attention_kwargs)
        cond, uncond = self._embed(prompt, negative_prompt, videos, *embeds, max_sequence_length)
        batch = len(cond) * (1 if prompt is not None else videos)  # diffusers does not repeat given embeddings
        conditions = prepare(self, self.kind, given, Window(batch, *size, schedule), generator)
        self._warn_beyond(conditions, schedule.num_inference_steps, guidance_scale)
        request = Request(
            conditions, cond, uncond, schedule, guidance_scale, self._guidance_scale_2, generator,
            self._context(conditions, history, overlap), callback_on_step_end, tuple(names), reset_cache, prefetch_reuse
        )  # fmt: skip
        frames = self._decode(denoise(self, request), output_type, conditions.references)
        self.maybe_free_model_hooks()
        return EditWanOutput(frames=frames) if return_dict else (frames,)

    def use_mode(self, mode: Mode, *, fp8: bool = False) -> None:
        """From the next call on, compute the bits of diffusers (`exact`) or faster ones (`fast`).

        `fast` compiles the transformers' blocks in its first call; with `fp8` their linear layers compute in 8 bits.
        Raises `ModelError` for an unknown mode, for `fp8` without `fast`, and on hardware without FP8.
        """
        check_mode(mode, fp8, torch.device(self.device))
        self.precompute.mode, self.precompute.fp8 = mode, fp8

    @cached_property
    def precompute(self) -> Precompute:
        """What is computed before a loop and kept for the next one."""
        return Precompute()

    def _begin_call(
        self, guidance_scale: float, guidance_scale_2: float | None, attention_kwargs: dict[str, Any] | None
    ) -> None:
        """Set what diffusers' properties of a running call, and its callbacks, read."""
        two_experts = self.config.boundary_ratio is not None
        self._guidance_scale = guidance_scale
        self._guidance_scale_2 = guidance_scale if two_experts and guidance_scale_2 is None else guidance_scale_2
        self._attention_kwargs, self._current_timestep, self._interrupt = attention_kwargs, None, False

    def _fit(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        """The next lower size that the VAE and the patches divide, as diffusers chooses it."""
        factor, (_, patch_height, patch_width) = self.vae_scale_factor_temporal, self.denoiser.config.patch_size
        row, column = self.vae_scale_factor_spatial * patch_height, self.vae_scale_factor_spatial * patch_width
        frames = num_frames if num_frames % factor == 1 else num_frames // factor * factor + 1
        fitted = (height // row * row, width // column * column, max(frames, 1))
        if fitted != (height, width, num_frames):
            logger.warning(
                "height, width and num_frames %s become %s: sizes are multiples of %d and %d, num_frames is %dn + 1.",
                *((height, width, num_frames), fitted, row, column, factor),
            )
        return fitted

    def _warn_beyond(self, conditions: Conditioning, num_inference_steps: int, guidance_scale: float) -> None:
        """Say what of a call is not in the model's card; a video has as many frames as its latents."""
        latents, rows, columns = conditions.latents.shape[2:]
        call = {
            "height": rows * self.vae_scale_factor_spatial,
            "width": columns * self.vae_scale_factor_spatial,
            "num_frames": (latents - conditions.references - 1) * self.vae_scale_factor_temporal + 1,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
        }
        if (beyond := read_trained_for(self.file_of_model(CARD)).beyond(call)) is not None:
            logger.warning("This call is %s.", beyond)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, for another pipeline's constructor; what only image-to-video has, where it is there."""
        parts: dict[str, Any] = super().components
        return {name: part for name, part in parts.items() if part is not None or not name.startswith("image_")}

    @property
    def kind(self) -> Kind:
        """How the model is conditioned."""
        return kind_of(self.denoiser, self.config.expand_timesteps)

    @property
    def denoiser(self) -> WanTransformer3DModel | WanVACETransformer3DModel:
        """The transformer whose shapes and types count; a pipeline may lack either of the two experts."""
        return next(iter(experts_of(self).values()))

    def _embed(self, prompt: Any, negative_prompt: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, L, D] of both branches in the transformer's dtype; the second is `None` without guidance."""
        guided, device, dtype = self.do_classifier_free_guidance, self._execution_device, self.denoiser.dtype
        cond, uncond = self.encode_prompt(prompt, negative_prompt, guided, *arguments, device)
        return cond.to(dtype), None if uncond is None else uncond.to(dtype)

    def _get_t5_prompt_embeds(self, prompt: str | list[str], *args: Any, **kwargs: Any) -> Tensor:
        """As diffusers', which cuts long prompts and forgets unknown words silently, with warnings."""
        words: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        looked_up = isinstance(getattr(words, "model", None), WordLevel)
        limit = kwargs.get("max_sequence_length", 226)
        for text in [prompt] if isinstance(prompt, str) else prompt:
            count = len(self.tokenizer(prompt_clean(text), truncation=False).input_ids)
            if looked_up and (says := unknown_words(words, prompt_clean(text))) is not None:
                logger.warning("The text %.40r %s", text, says)
            if count > limit:
                logger.warning("A prompt has %d tokens; the model is given the first %d: %.40r…", count, limit, text)
        return super()._get_t5_prompt_embeds(prompt, *args, **kwargs)  # type: ignore[no-any-return]

    def _context(
        self, conditions: Conditioning, history: Tensor | None, overlap: Tensor | None
    ) -> ContextLatents | None:
        noise, end = conditions.latents, conditions.end
        history = conditions.history if history is None else history
        if overlap is not None:
            if history is not None:
                raise ValueError("`history` and `overlap` are both given; a segment continues one of them.")
            context = check_context("overlap", overlap, noise)
            return ContextLatents(context, noise[:, :, : context.shape[2]], end)
        if history is None:
            return None if end is None else ContextLatents(noise[:, :, :0], end=end)
        if not self.config.expand_timesteps:
            raise ValueError(
                "`history` needs a model with per-token timesteps: `expand_timesteps` is false in this model's config."
            )
        return ContextLatents(check_context("history", history, noise), end=end)

    def _decode(self, latents: Tensor, output_type: str | None, references: int) -> Any:
        """Latents [B, C, T, h, w] as `output_type`, without the references in front; with "latent" they are the output.

        As in diffusers, latents that are the output still have their references.
        """
        if output_type == "latent":
            return latents
        latents = latents[:, :, references:].to(get_module_execution_device(self.vae), dtype=self.vae.dtype)
        video = self.vae.decode(denormalise(latents, self.vae.config), return_dict=False)[0]
        return self.video_processor.postprocess_video(video, output_type=output_type)
