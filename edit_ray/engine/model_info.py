"""What a model's JSON files say about it, without its weights and without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edit_ray.engine.model_files import INDEX_FILE, HubUnreachable, hub_file, local_folder, locate_model
from edit_ray.errors import ModelError

TRANSFORMER_CLASS = "WanTransformer3DModel"
VAE_CLASS = "AutoencoderKLWan"
MAX_JSON_BYTES = 64 * 2**20

_Find = Callable[[str], Path | None]


@dataclass(frozen=True)
class ModelInfo:
    """A Wan text-to-video model: sizes in pixels and frames, and the words that it was trained on.

    `width` is that of the transformer's hidden states; `num_blocks` has the experts that the model has. `vocabulary`
    is None if any text will do: only word-level tokenizers have one. `lookback_latents` is `lookback_latents`' result.
    """

    patch_size: tuple[int, int, int]
    scale_factor_temporal: int
    scale_factor_spatial: int
    z_dim: int
    width: int
    num_blocks: Mapping[str, int]
    expand_timesteps: bool
    boundary_ratio: float | None
    vocabulary: frozenset[str] | None
    lookback_latents: int
    _split: Callable[[str], list[str]] = field(default=str.split, repr=False, compare=False)

    @property
    def height_step(self) -> int:
        """Pixels that the height is a multiple of."""
        return self.scale_factor_spatial * self.patch_size[1]

    @property
    def width_step(self) -> int:
        """Pixels that the width is a multiple of."""
        return self.scale_factor_spatial * self.patch_size[2]

    def words(self, text: str) -> list[str]:
        """The text in the words that the tokenizer looks up."""
        return self._split(text)


def dtype_problem(torch_dtype: str, device: str) -> str | None:
    """Why the device cannot run the dtype, as a predicate of the key; None if it can, or is not known yet."""
    if device == "cpu" and torch_dtype == "float16":
        return "is 'float16'; it must be one of float32, bfloat16 on the device cpu."
    return None


def read_model_info(path: str) -> ModelInfo:
    """What the model's JSON files say; `path` as `locate_model` takes it.

    Raises:
        ModelError: no such model, not reachable, not a Wan text-to-video model, or its files are damaged.
    """
    location = locate_model(path)
    folder = local_folder(location)

    def in_folder(name: str) -> Path | None:
        assert folder is not None
        return folder / name if (folder / name).is_file() else None

    try:
        return _read(path, partial(hub_file, location) if folder is None else in_folder)
    except HubUnreachable as error:
        raise ModelError(
            f"{path!r} is neither a folder (there is no {Path(path).absolute()}) nor a hub id that can be reached "
            f"({error})."
        ) from None


def lookback_latents(vae_config: Mapping[str, Any]) -> int:
    """Latents that must be decoded again before a point of the stream so that all frames after it are bit-equal.

    Every causal convolution over time looks back two frames, each 1/rate latents long, where the rate doubles at each
    temporal upsampling. Their sum is the decoder's view to the past. One latent more is the one being decoded, and the
    first two of a rebuilt stream are special: the decoder emits one frame for the first and pads the second.
    """
    per_residual_block = 2 * 2  # two convolutions
    per_level = per_residual_block * (vae_config.get("num_res_blocks", 2) + 1)
    rate = 1
    view: float = 2 + 2 * per_residual_block  # the first convolution and the middle block
    for upsamples_time in [*reversed(vae_config.get("temperal_downsample", [False, True, True])), False]:
        view += per_level / rate
        if upsamples_time:
            view += 2 / rate
            rate *= 2
    view += 2 / rate  # the last convolution
    return math.ceil(view) + 1 + 2


def _read(path: str, find: _Find) -> ModelInfo:
    index = _json(path, INDEX_FILE, find)
    _check_classes(path, index)
    experts = {
        name: _json(path, f"{name}/config.json", find)
        for name in ("transformer", "transformer_2")
        if _class_of(index, name)
    }
    transformer, parts = next(iter(experts.values())), ", ".join(f"{name}/config.json" for name in experts)
    vae = _json(path, "vae/config.json", find)
    vocabulary, split = _vocabulary(path, index, find)
    try:
        patch_frames, patch_height, patch_width = map(int, transformer.get("patch_size", (1, 2, 2)))
        boundary_ratio = index.get("boundary_ratio")
        info = ModelInfo(
            patch_size=(patch_frames, patch_height, patch_width),
            scale_factor_temporal=int(vae.get("scale_factor_temporal", 4)),
            scale_factor_spatial=int(vae.get("scale_factor_spatial", 8)),
            z_dim=int(vae.get("z_dim", 16)),
            width=int(transformer.get("num_attention_heads", 40)) * int(transformer.get("attention_head_dim", 128)),
            num_blocks={name: int(expert.get("num_layers", 40)) for name, expert in experts.items()},
            expand_timesteps=bool(index.get("expand_timesteps", False)),
            boundary_ratio=None if boundary_ratio is None else float(boundary_ratio),
            vocabulary=vocabulary,
            lookback_latents=lookback_latents(vae),
            _split=split,
        )
        in_channels = int(transformer.get("in_channels", 16))
        sizes = (info.scale_factor_temporal, info.scale_factor_spatial, info.z_dim, info.width)
        if min(*info.patch_size, *sizes, *info.num_blocks.values()) < 1:
            raise ValueError("a size below 1")
    except (TypeError, ValueError, OverflowError):
        raise ModelError(
            f"{path!r} has sizes that cannot be in its {parts}, vae/config.json or {INDEX_FILE}."
        ) from None
    if in_channels != info.z_dim:
        raise ModelError(
            f"{path!r} is a {index.get('_class_name')} whose transformer takes {in_channels} channels where its VAE "
            f"gives {info.z_dim}; it must be a Wan text-to-video model, which takes as many as the VAE gives."
        )
    return info


def _check_classes(path: str, index: Mapping[str, Any]) -> None:
    """Raises ModelError unless the model's parts are Wan's."""
    transformer = _class_of(index, "transformer") or _class_of(index, "transformer_2")
    vae = _class_of(index, "vae")
    if (transformer, vae) != (TRANSFORMER_CLASS, VAE_CLASS):
        raise ModelError(
            f"{path!r} is a {index.get('_class_name', 'model without a class name')} with the transformer "
            f"{transformer} and the VAE {vae}; it must be a Wan model, with {TRANSFORMER_CLASS} and {VAE_CLASS}."
        )


def _class_of(index: Mapping[str, Any], part: str) -> str | None:
    """The class of a part in `model_index.json`, which has [library, class] for every part, nulls for none."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None


def _vocabulary(
    path: str, index: Mapping[str, Any], find: _Find
) -> tuple[frozenset[str] | None, Callable[[str], list[str]]]:
    """The words of a word-level tokenizer and how it splits a text; None for tokenizers that take any text."""
    name = "tokenizer/tokenizer.json"
    # T5's file is large, and known to take any text.
    if (_class_of(index, "tokenizer") or "T5").startswith("T5") or (file := find(name)) is None:
        return None, str.split
    model = _json(path, name, find).get("model")
    if not isinstance(model, dict) or model.get("type") != "WordLevel":
        return None, str.split
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ModelError(f"{path!r} has a damaged {name}: {error}.") from None

    def split(text: str) -> list[str]:
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        if tokenizer.pre_tokenizer is None:
            return text.split()
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return frozenset(tokenizer.get_vocab()) - special, split


def _json(path: str, name: str, find: _Find) -> dict[str, Any]:
    file = find(name)
    if file is None:
        raise ModelError(f"{path!r} has no {name}; a diffusers Wan model has one.")
    try:
        size = file.stat().st_size
        content = json.loads(file.read_text(encoding="utf-8")) if size <= MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path!r} has a {name} that cannot be read as JSON: {type(error).__name__}.") from None
    if size > MAX_JSON_BYTES:
        raise ModelError(f"{path!r} has a {name} of more than {MAX_JSON_BYTES} bytes.")
    if not isinstance(content, dict):
        raise ModelError(f"{path!r} has a {name} that is no JSON object.")
    return content
