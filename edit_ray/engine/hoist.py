"""What a Wan transformer computes from sizes, timesteps and prompts alone, computed once and not in every forward.

RoPE, the projections of text and image, and the time embeddings. The transformer's own modules compute them, from the
inputs that the loop would give them, so every bit stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn

_KEPT_TEXTS = 4  # both branches, and what a callback has just replaced

Key = tuple[object, ...]


class Hoisted:
    """Stands in for `rope` and `condition_embedder` of one transformer while a loop runs.

    A value is found again by the memory, shape and version of what it was made from, which is kept alive, so that a
    tensor that was changed in place is another one. Whether weights or modules have changed, `refresh` looks.
    """

    def __init__(self, transformer: WanTransformer3DModel | WanVACETransformer3DModel) -> None:
        self.transformer = transformer
        self._rope_module, self._embedder = transformer.rope, transformer.condition_embedder
        self._rope, self._embed = self._rope_module.forward, self._embedder.forward
        self._plain = True
        self._weights: object = None
        self._schedule: object = None
        self._ropes: dict[Key, tuple[Tensor, Tensor]] = {}
        self._texts: dict[Key, tuple[Tensor, Tensor | None, Tensor, Tensor | None]] = {}  # text, image; both projected
        self._times: dict[Key, tuple[Tensor, Tensor, Tensor]] = {}  # timestep, temb, timestep_proj

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The transformer's forwards in here take what is known already."""
        self.refresh()
        self._rope_module.forward, self._embedder.forward = self._rope_of, self._conditions_of
        try:
            yield
        finally:
            del self._rope_module.forward, self._embedder.forward
            self._texts.clear()
            if self._schedule is None:
                self._times.clear()

    def refresh(self) -> None:
        """Forget everything if the weights are no longer those it was made with."""
        self._plain = _are_plain(self._embedder)
        parameters = [*self._embedder.parameters(), *self._rope_module.buffers()]
        weights = [(p.data_ptr(), p._version, p.dtype) for p in parameters]
        if weights != self._weights:
            self._weights, self._schedule = weights, None
            for known in (self._ropes, self._texts, self._times):
                known.clear()

    def embed_times(self, timesteps: Sequence[Tensor], values: Sequence[float], text: Tensor) -> None:
        """Embed the timesteps [B] of all steps, each alone as in the loop, unless the last loop had the same.

        `text` is a prompt's embedding, whose type the embeddings take.
        """
        schedule = (tuple(values), timesteps[0].dtype, timesteps[0].shape, timesteps[0].device, text.dtype)
        if schedule == self._schedule and len(self._times) == len(timesteps):
            made = [(temb, projected) for _, temb, projected in self._times.values()]
        else:
            made = [self._embed(timestep, text[:, :1])[:2] for timestep in timesteps]
        self._schedule = schedule
        self._times = {
            _key(timestep, text.dtype): (timestep, temb, projected)
            for timestep, (temb, projected) in zip(timesteps, made, strict=True)
        }

    def _rope_of(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        key = (hidden_states.shape[2:], hidden_states.device)
        if key not in self._ropes:
            self._ropes = {key: self._rope(hidden_states)}
        return self._ropes[key]

    def _conditions_of(
        self,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        timestep_seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        text, image = encoder_hidden_states, encoder_hidden_states_image
        if not self._plain or timestep.is_inference() or text.is_inference():
            return self._embed(timestep, text, image, timestep_seq_len)  # type: ignore[no-any-return]
        time_key, text_key = _key(timestep, text.dtype), _key(text, *([] if image is None else _key(image)))
        time, known = self._times.get(time_key), self._texts.get(text_key)
        if time is not None and known is not None:
            return time[1], time[2], known[2], known[3]
        shown = (text, image) if known is None else (text[:, :1], None)
        temb, projected_time, projected, projected_image = self._embed(timestep, *shown, timestep_seq_len)
        if time is None and self._schedule is None:
            # Of timesteps for each token there is much: the branches of one step share it.
            self._times = {time_key: (timestep, temb, projected_time)}
        elif time is not None:
            _, temb, projected_time = time
        if known is None:
            self._texts[text_key] = (text, image, projected, projected_image)
            if len(self._texts) > _KEPT_TEXTS:
                del self._texts[next(iter(self._texts))]
        else:
            projected, projected_image = known[2:]
        return temb, projected_time, projected, projected_image


def can_hoist(transformer: nn.Module) -> bool:
    """Whether a transformer embeds conditions with modules that nothing else has changed the calls of.

    Adapters (LoRA) and offloading change what a module computes without a change of its weights.
    """
    if not isinstance(transformer, WanTransformer3DModel | WanVACETransformer3DModel):
        return False
    if transformer._compiled_call_impl is not None:
        return False
    parts: tuple[nn.Module, ...] = (transformer.rope, transformer.condition_embedder)
    return all(has_own_forward(part) and _are_plain(part) for part in parts)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is its class's: hooks of diffusers that were removed leave just that on the module."""
    on_module = module.__dict__.get("forward")
    bound_to, function = getattr(on_module, "__self__", None), getattr(on_module, "__func__", None)
    return on_module is None or (bound_to is module and function is type(module).forward)


def _are_plain(part: nn.Module) -> bool:
    """Whether all submodules are torch's and diffusers' own, without hooks."""
    return all(
        type(module).__module__.startswith(("torch.nn.", "diffusers."))
        and (module is part or has_own_forward(module))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        for module in part.modules()
    )


def _key(tensor: Tensor, *more: object) -> Key:
    return (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, *more)


def version_of(tensor: Tensor) -> int | None:
    """A number that grows when the tensor is changed in place; tensors of the inference mode have none."""
    return None if tensor.is_inference() else tensor._version
