"""`engine.mode: fast` for a transformer: replaced forwards of its blocks, and their weights in a new layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from edit_ray.engine import fast_block
from edit_ray.engine.causal_attention import ChunkProcessor
from edit_ray.engine.fast_block import BlockWeights, Layer, Rope, Sizes, TextKeys, quantise
from edit_ray.engine.options import Mode
from edit_ray.errors import ModelError

FP8_CAPABILITY = (8, 9)
TEXT_TOKENS = 512
WanModel = WanTransformer3DModel | WanVACETransformer3DModel


def check_mode(mode: str, fp8: bool, device: torch.device) -> None:
    """Raise `ModelError` for an unknown mode, and for FP8 in the mode exact or on a device without it."""
    if mode not in get_args(Mode):
        raise ModelError(f"The mode is {mode!r}; it must be one of {', '.join(get_args(Mode))}.")
    if fp8 and mode != "fast":
        raise ModelError(f"fp8 is true in the mode {mode}; it needs the mode fast.")
    if fp8 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY):
        here = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise ModelError(f"fp8 is true, and {here} multiplies no FP8; it needs a GPU of capability 8.9 or later.")


class Functions(NamedTuple):
    """The functions of a forward: those of `fast_block`, compiled or as they are."""

    embed: Callable[..., Tensor] = fast_block.embed
    block: Callable[..., Tensor] = fast_block.block
    head: Callable[..., Tensor] = fast_block.head
    enter: Callable[..., tuple[Tensor, ...]] = fast_block.enter
    leave: Callable[..., Tensor] = fast_block.leave


@cache
def compiled() -> Functions:
    """Compiled once in a process for each form of their tensors."""
    made: list[Any] = [torch.compile(function, dynamic=False, fullgraph=True) for function in Functions()]
    return Functions(*made)


class FastTransformer:
    """Replaces the forwards of one transformer, its blocks and VACE's control blocks while a loop runs."""

    def __init__(
        self, transformer: Any, *, fp8: bool = False, offloaded: bool = False, functions: Functions | None = None
    ) -> None:
        """`offloaded`: a block's weights are where they compute only while its forward runs."""
        self.transformer, self.fp8, self.offloaded = transformer, fp8, offloaded
        self._functions = functions or compiled()
        self._blocks: list[Any] = []  # control blocks last
        self._weights: list[BlockWeights] = []
        self._quantised: dict[int, tuple[list[int | None], Layer]] = {}  # by a weight's address, with versions
        self._texts: list[tuple[Tensor, int | None, dict[int, TextKeys]]] = []  # by block
        self._joined: list[tuple[Tensor, Tensor, Tensor]] = []  # text, image, both in one
        self._rope: tuple[Tensor, Rope] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the forwards are the fast ones."""
        controls = list(getattr(self.transformer, "vace_blocks", ()))
        self._blocks = [*self.transformer.blocks, *controls]
        self._weights = [] if self.offloaded else [self._gather(each) for each in self._blocks]
        for index, each in enumerate(self._blocks):
            each.forward = partial(self._control if each in controls else self._block, index)
        self.transformer.forward = self._forward
        try:
            yield
        finally:
            for module in (self.transformer, *self._blocks):
                del module.forward
            self._texts.clear()
            self._joined.clear()

    def _forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        control_hidden_states: Tensor | None = None,
        control_hidden_states_scale: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,  # diffusers' scale of adapters: there are none
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """The transformer's forward, with diffusers' arguments and results."""
        whole, embed, head = self.transformer, self._functions.embed, self._functions.head
        patch = whole.config.patch_size
        grid = tuple(size // of for size, of in zip(hidden_states.shape[2:], patch, strict=True))
        rotary_emb = whole.rope(hidden_states)
        x = embed(hidden_states, whole.patch_embedding.weight, whole.patch_embedding.bias)
        per_token = timestep.shape[1] if timestep.ndim == 2 else None
        times = timestep if per_token is None else timestep.flatten()
        texts = encoder_hidden_states, encoder_hidden_states_image
        temb, timestep_proj, text, image = whole.condition_embedder(times, *texts, timestep_seq_len=per_token)
        text = text if image is None else self._join(text, image)
        timestep_proj = timestep_proj.unflatten(-1, (6, -1))
        hints = {}
        if control_hidden_states is not None:
            hints = self._hints(x, text, control_hidden_states, control_hidden_states_scale, timestep_proj, rotary_emb)
        for index, each in enumerate(whole.blocks):
            x = each(x, text, timestep_proj, rotary_emb)
            if index in hints:
                hint, scale = hints.pop(index)
                x = x + hint * scale
        layer = Layer(whole.proj_out.weight, whole.proj_out.bias)
        output = head(x, temb, whole.scale_shift_table, layer, (*grid, *patch), whole.norm_out.eps)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _hints(
        self, x: Tensor, text: Tensor, control: Tensor, scale: Tensor | None, temb: Tensor, rotary_emb: Any
    ) -> dict[int, tuple[Any, Tensor]]:
        """VACE's hints and their scales, by the block after which they are added."""
        whole = self.transformer
        embedding, layers = whole.vace_patch_embedding, whole.config.vace_layers
        scales = control.new_ones(len(layers)) if scale is None else scale
        control = self._functions.embed(control, embedding.weight, embedding.bias)
        control = torch.cat([control, control.new_zeros(len(control), x.shape[1] - control.shape[1], x.shape[2])], 1)
        hints = {}
        for index, each, of in zip(layers, whole.vace_blocks, scales.unbind(), strict=True):
            hint, control = each(x, text, control, temb, rotary_emb)
            hints[index] = (hint, of)
        return hints

    def _block(
        self, index: int, x: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        each = self._blocks[index]
        text, weights = self._text_of(index, encoder_hidden_states), self._weights[index : index + 1]
        sizes = Sizes(each.attn1.heads, each.norm1.eps, each.attn1.norm_q.eps)
        (weights_of,) = weights or [self._gather(each)]
        processor = each.attn1.processor
        if not isinstance(processor, ChunkProcessor):
            return self._functions.block(x, text, temb, self._rope_of(rotary_emb), weights_of, sizes)
        rope = self._rope_of(processor.attention.here)
        query, *own = self._functions.enter(x, temb, rope, weights_of, sizes)
        key, value = processor.attention.extend(processor.layer, *own)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return self._functions.leave(x, attended, text, temb, weights_of, sizes)

    def _control(
        self, index: int, x: Tensor, text: Tensor, control: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A control block's hint and what the next control block is given."""
        each = self._blocks[index]
        control = control if each.proj_in is None else each.proj_in(control) + x
        control = self._block(index, control, text, temb, rotary_emb)
        return each.proj_out(control), control

    def _join(self, text: Tensor, image: Tensor) -> Tensor:
        """CLIP's features and the text in one, the same tensor in all steps."""
        for known_text, known_image, joined in self._joined:
            if known_text is text and known_image is image:
                return joined
        joined = torch.cat([image, text], dim=1)
        self._joined = [(text, image, joined), *self._joined[:1]]
        return joined

    def _text_of(self, index: int, text: Tensor) -> TextKeys:
        """Keys and values of a projected text in a block, the same in all steps."""
        version = version_of(text)
        made = next(
            (made for known, of, made in self._texts if known is text and version is not None and version == of), None
        )
        if made is None:
            made = {}
            self._texts = [(text, version, made), *self._texts[:1]]
        if index not in made:
            made[index] = _keys_and_values(self._blocks[index].attn2, text)
        return made[index]

    def _rope_of(self, rotary_emb: tuple[Tensor, Tensor]) -> Rope:
        cos, sin = rotary_emb
        if self._rope is None or self._rope[0] is not cos:
            signs = torch.arange(sin.shape[-1], device=sin.device) % 2 * 2 - 1  # made there: nothing waits
            self._rope = (cos, Rope(cos[0, :, 0].float().contiguous(), (sin[0, :, 0].float() * signs).contiguous()))
        return self._rope[1]

    def _gather(self, each: Any) -> BlockWeights:
        attn, text, up, down = each.attn1, each.attn2, each.ffn.net[0].proj, each.ffn.net[2]
        return BlockWeights(
            table=each.scale_shift_table,
            qkv=self._layer(attn.to_q, attn.to_k, attn.to_v, fused=fused_qkv(attn)),
            norm_q=attn.norm_q.weight,
            norm_k=attn.norm_k.weight,
            out=self._layer(attn.to_out[0]),
            norm2=None if isinstance(each.norm2, nn.Identity) else (each.norm2.weight, each.norm2.bias),
            text_q=self._layer(text.to_q),
            text_norm_q=text.norm_q.weight,
            text_out=self._layer(text.to_out[0]),
            up=self._layer(up),
            down=self._layer(down),
        )

    def _layer(self, *layers: Any, fused: Layer | None = None) -> Layer:
        """The layer, or several fused ones; with `fp8` quantised, again if one of their weights has changed."""
        weight, bias, _ = fused or Layer(layers[0].weight, layers[0].bias)
        layer = Layer(weight.detach(), None if bias is None else bias.detach())
        if not self.fp8:
            return layer
        key, versions = weight.data_ptr(), [version_of(each.weight) for each in layers]
        if key not in self._quantised or self._quantised[key][0] != versions:
            self._quantised[key] = versions, quantise(layer)
        return self._quantised[key][1]


def can_be_fast(transformer: Any, *, offloaded: bool = False) -> bool:
    """Whether a transformer is diffusers' own, as loaded: no adapters, hooks, fused layers, or quantised weights.

    Blocks that are offloaded have two hooks, which only move their weights.
    """
    if not isinstance(transformer, WanModel):
        return False
    if any(block.attn1.fused_projections or block.attn2.fused_projections for block in transformer.blocks):
        return False
    weights = [parameter.data for parameter in transformer.parameters()]
    if any(type(weight) is not Tensor or not weight.is_floating_point() for weight in weights):
        return False
    hooked = set(transformer.blocks) if offloaded else set()
    return all(is_unmodified(module, hooks=2 if module in hooked else 0) for module in transformer.modules())


def is_unmodified(module: nn.Module, *, replaced: bool = False, hooks: int = 0) -> bool:
    """Whether a module is torch's or diffusers' own, with so many hooks, not compiled, and with its class's forward.

    `replaced` skips the forward. Hooks of diffusers that were removed leave the class's forward on the module.
    """
    on_module = module.__dict__.get("forward")
    bound_to, function = getattr(on_module, "__self__", None), getattr(on_module, "__func__", None)
    own_forward = on_module is None or (bound_to is module and function is type(module).forward)
    return (
        (type(module).__module__.startswith(("torch.nn.", "diffusers.")) or computes_as_its_base(module))
        and (replaced or own_forward)
        and len(module._forward_hooks) + len(module._forward_pre_hooks) == hooks
        and module._compiled_call_impl is None
    )


def computes_as_its_base(module: Any) -> bool:
    """Whether a module is a layer with a LoRA that is fused into its base layer."""
    return getattr(module, "merged", False) and not module.disable_adapters


def version_of(tensor: Tensor) -> int | None:
    """A number that grows when the tensor is changed in place; tensors of the inference mode have none."""
    return None if tensor.is_inference() else tensor._version


def fused_qkv(attn: WanAttention) -> Layer:
    """Weight [3D, D] and bias [3D] of query, key and value in one tensor; the layers' own are views of it."""
    layers = (attn.to_q, attn.to_k, attn.to_v)
    weight = _in_one([layer.weight for layer in layers])
    return Layer(weight, None if attn.to_q.bias is None else _in_one([layer.bias for layer in layers]))


def _in_one(parts: Sequence[nn.Parameter]) -> Tensor:
    """The parts as one tensor; where they do not lie behind each other they are moved into a new one."""
    first, size = parts[0].detach(), parts[0].nbytes
    alike = {part.untyped_storage().data_ptr() for part in parts} == {first.untyped_storage().data_ptr()}
    if not alike or [part.data_ptr() - first.data_ptr() for part in parts] != [size * n for n in range(len(parts))]:
        joined = torch.cat([part.detach() for part in parts])
        for part, chunk in zip(parts, joined.chunk(len(parts)), strict=True):
            part.data = chunk
        return joined
    return first.as_strided((len(parts) * len(first), *first.shape[1:]), first.stride())


def _keys_and_values(attn: WanAttention, text: Tensor) -> TextKeys:
    def split(key: Tensor, value: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (key, value)]

    image: list[Tensor] = []
    if attn.add_k_proj is not None:  # diffusers takes the last tokens for the text
        shown, text = text[:, :-TEXT_TOKENS], text[:, -TEXT_TOKENS:]
        image = split(attn.norm_added_k(attn.add_k_proj(shown)), attn.add_v_proj(shown))
    return TextKeys(*split(attn.norm_k(attn.to_k(text)), attn.to_v(text)), *image)
