"""What a model's JSON files say about it, without its weights and without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from edit_ray.engine.causal_options import CausalOptions, causal_in
from edit_ray.engine.known_words import vocabulary_of
from edit_ray.engine.model_files import INDEX_FILE, HubUnreachable, hub_file, local_folder, locate_model, part_in
from edit_ray.errors import ModelError

TRANSFORMER_CLASS = "WanTransformer3DModel"
VACE_CLASS = "WanVACETransformer3DModel"
VAE_CLASS = "AutoencoderKLWan"
MAX_JSON_BYTES = 64 * 2**20

Kind = Literal["text", "image", "first frame", "vace"]
"""How a model is conditioned besides by its prompt: not at all, by pictures in channels of their own, by a clean first
latent, by control blocks."""


@dataclass(frozen=True)
class ModelInfo:
    """A Wan model: sizes in pixels and frames, and the words that it was trained on.

    `width` is that of the transformer's hidden states; `num_blocks` has the experts that the model has;
    `rope_max_seq_len` is the latent frames that it has positions for.
    """

    patch_size: tuple[int, int, int]
    scale_factor_temporal: int
    scale_factor_spatial: int
    z_dim: int
    kind: Kind
    width: int
    num_blocks: Mapping[str, int]
    expand_timesteps: bool
    boundary_ratio: float | None
    first_and_last: bool | None  # whether CLIP must see a last frame too; it must not if False, and may without CLIP
    lookback_latents: int  # latents before a point of the stream on which the frames after it depend
    rope_max_seq_len: int = 1024
    causal: CausalOptions | None = None  # of a causal model
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)  # if it looks up words

    @property
    def height_step(self) -> int:
        """Pixels that the height is a multiple of."""
        return self.scale_factor_spatial * self.patch_size[1]

    @property
    def width_step(self) -> int:
        """Pixels that the width is a multiple of."""
        return self.scale_factor_spatial * self.patch_size[2]

    @cached_property
    def vocabulary(self) -> frozenset[str] | None:
        """The words that the tokenizer knows; None if any text will do."""
        return None if self.tokenizer is None else vocabulary_of(self.tokenizer)


def dtype_problem(torch_dtype: str, device: str) -> str | None:
    """Why the device cannot run the dtype, as a predicate of the key; None if it can, or is not known yet."""
    if device == "cpu" and torch_dtype == "float16":
        return "is 'float16'; it must be one of float32, bfloat16 on the device cpu."
    return None


def read_model_info(path: str) -> ModelInfo:
    """What the model's JSON files say; `path` as `locate_model` takes it.

    Raises:
        ModelError: no such model, not reachable, not a Wan model, or its files are damaged.
    """
    files = _ModelFiles(path)
    try:
        return _read(files)
    except HubUnreachable as error:
        raise ModelError(
            f"{path!r} is neither a folder (there is no {Path(path).absolute()}) nor a hub id that can be reached "
            f"({error})."
        ) from None


def read_configs(path: str) -> tuple[dict[str, dict[str, Any]], bool]:
    """The configs of a model's parts that take GPU memory, by name, and whether it embeds each token's timestep.

    Raises:
        ModelError: as `read_model_info`, of models of every kind.
    """
    files = _ModelFiles(path)
    try:
        index = files.json(INDEX_FILE)
        names = ("transformer", "transformer_2", "vae", "image_encoder")
        found = {name: files.json(f"{name}/config.json") for name in names if _class_of(index, name)}
    except HubUnreachable as error:
        raise ModelError(f"{path!r} cannot be reached on the hub ({error}).") from None
    return found, bool(index.get("expand_timesteps", False))


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


class _ModelFiles:
    """A model's small files, in its folder or on the hub."""

    def __init__(self, path: str) -> None:
        self.path, self._location = path, locate_model(path)
        self._folder = local_folder(self._location)

    def find(self, name: str) -> Path | None:
        """The file of this name, if the model has one; raises HubUnreachable."""
        if self._folder is None:
            return hub_file(self._location, name)
        file = part_in(self._folder, name)
        return file if file.is_file() else None

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file. Raises HubUnreachable; ModelError if missing, unreadable or not an object."""
        file = self.find(name)
        if file is None:
            raise ModelError(f"{self.path!r} has no {name}; a diffusers Wan model has one.")
        try:
            size = file.stat().st_size
            content = json.loads(file.read_text(encoding="utf-8")) if size <= MAX_JSON_BYTES else None
        except (OSError, ValueError, RecursionError) as error:
            said = f"{self.path!r} has a {name} that cannot be read as JSON: {type(error).__name__}."
            raise ModelError(said) from None
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{self.path!r} has a {name} of more than {MAX_JSON_BYTES} bytes.")
        if not isinstance(content, dict):
            raise ModelError(f"{self.path!r} has a {name} that is not a JSON object.")
        return content


def _read(files: _ModelFiles) -> ModelInfo:
    path, index = files.path, files.json(INDEX_FILE)
    causal = causal_in(index, path)
    classes = {name: _class_of(index, name) for name in ("transformer", "transformer_2", "vae", "tokenizer")}
    transformer_class = classes["transformer"] or classes["transformer_2"]
    if transformer_class not in (TRANSFORMER_CLASS, VACE_CLASS) or classes["vae"] != VAE_CLASS:
        raise ModelError(
            f"{path!r} is a {index.get('_class_name', 'model without a class name')} with the transformer "
            f"{transformer_class} and the VAE {classes['vae']}; it must be a Wan model, with {TRANSFORMER_CLASS} or "
            f"{VACE_CLASS} and {VAE_CLASS}."
        )
    experts = {name: files.json(f"{name}/config.json") for name in ("transformer", "transformer_2") if classes[name]}
    transformer, vae = next(iter(experts.values())), files.json("vae/config.json")
    tokenizer = _word_tokenizer(files, classes["tokenizer"])
    try:
        frames, rows, columns = map(int, transformer.get("patch_size", (1, 2, 2)))
        boundary_ratio, in_channels = index.get("boundary_ratio"), int(transformer.get("in_channels", 16))
        info = ModelInfo(
            patch_size=(frames, rows, columns),
            scale_factor_temporal=int(vae.get("scale_factor_temporal", 4)),
            scale_factor_spatial=int(vae.get("scale_factor_spatial", 8)),
            z_dim=int(vae.get("z_dim", 16)),
            kind=_kind_of(transformer_class, in_channels, int(vae.get("z_dim", 16)), index),
            width=int(transformer.get("num_attention_heads", 40)) * int(transformer.get("attention_head_dim", 128)),
            num_blocks={name: int(expert.get("num_layers", 40)) for name, expert in experts.items()},
            expand_timesteps=bool(index.get("expand_timesteps", False)),
            boundary_ratio=None if boundary_ratio is None else float(boundary_ratio),
            first_and_last=None if transformer.get("image_dim") is None else bool(transformer.get("pos_embed_seq_len")),
            lookback_latents=lookback_latents(vae),
            rope_max_seq_len=int(transformer.get("rope_max_seq_len", 1024)),
            causal=causal,
            tokenizer=tokenizer,
        )
        sizes = (info.scale_factor_temporal, info.scale_factor_spatial, info.z_dim, info.width)
        if min(*info.patch_size, *sizes, *info.num_blocks.values()) < 1:
            raise ValueError("a size below 1")
    except (TypeError, ValueError, OverflowError):
        configs = ", ".join(f"{name}/config.json" for name in experts)
        raise ModelError(
            f"{path!r} has sizes that cannot be in its {configs}, vae/config.json or {INDEX_FILE}."
        ) from None
    of_pictures = info.scale_factor_temporal + info.z_dim  # a mask for each frame of a latent, and the encoded picture
    if in_channels not in (info.z_dim, info.z_dim + of_pictures):
        raise ModelError(
            f"{path!r} is a {index.get('_class_name')} whose transformer takes {in_channels} channels where its VAE "
            f"gives {info.z_dim}; a Wan model takes as many, or with a picture {info.z_dim + of_pictures}."
        )
    return info


def _kind_of(transformer_class: str | None, in_channels: int, z_dim: int, index: Mapping[str, Any]) -> Kind:
    if transformer_class == VACE_CLASS:
        return "vace"
    if in_channels != z_dim:
        return "image"
    return "first frame" if index.get("expand_timesteps", False) else "text"


def _class_of(index: Mapping[str, Any], part: str) -> str | None:
    """The class of a part in `model_index.json`, which has [library, class] for every part, nulls for none."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None


def _word_tokenizer(files: _ModelFiles, class_name: str | None) -> Tokenizer | None:
    """The model's tokenizer if it looks up words; None for tokenizers that take any text."""
    name = "tokenizer/tokenizer.json"
    # T5's file is large, and known to take any text.
    if (class_name or "T5").startswith("T5") or (file := files.find(name)) is None:
        return None
    model = files.json(name).get("model")
    if not isinstance(model, dict) or model.get("type") != "WordLevel":
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ModelError(f"{files.path!r} has a damaged {name}: {error}.") from None
