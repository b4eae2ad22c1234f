"""How a causal model makes a video chunk by chunk: the options in its `model_index.json`, and those of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from edit_ray.engine.options import ContinuityOptions, SamplingOptions
from edit_ray.errors import ConfigError, ModelError
from edit_ray.options import Options, describe, node_at
from edit_ray.runs.run_plan import Switch

INDEX_KEY = "causal"
"""Where `model_index.json` has them; a bidirectional model has no such key."""
FOREIGN_CLASS = "CausalWanTransformer3DModel"
"""FastVideo's transformer; its weights have diffusers' names."""


class CausalOptions(Options):
    """The chunks of a causal model, what they attend to, and the few steps that each takes.

    `chunk_size`, `window` and `sink` count latent frames. `window` is what a chunk attends to, itself and the sink
    included; the sink is the beginning, which stays. `timesteps` are the noise levels times 1000, warped by the flow
    shift. `sampler`: `renoise` adds fresh noise to the prediction of the clean chunk in each step, `unipc` and `euler`
    solve the flow. K/V of a finished chunk is computed at the timestep `context_noise`. With `rope: relative` what is
    in the window is numbered again for each chunk, so that a video has no end; with `absolute` keys have the numbers of
    their frames in the video, as in the published code, and it ends with the model's table.
    """

    chunk_size: int = Field(default=3, ge=1, le=64)
    window: int = Field(default=21, ge=1, le=1024)
    sink: int = Field(default=0, ge=0, le=1024)
    timesteps: list[float] = Field(default=[1000.0, 937.5, 2500 / 3, 625.0], min_length=1, max_length=1000)
    sampler: Literal["renoise", "unipc", "euler"] = "renoise"
    context_noise: float = Field(default=0.0, ge=0, le=1000)
    rope: Literal["relative", "absolute"] = "relative"

    @property
    def sigmas(self) -> list[float]:
        """The noise levels of the steps, in (0, 1]."""
        return [timestep / 1000 for timestep in self.timesteps]

    @property
    def chunks(self) -> int:
        """The chunks in a full window, the current one included."""
        return self.window // self.chunk_size

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(low >= high for high, low in pairwise([*self.timesteps, 0.0])) or self.timesteps[0] > 1000:
            raise ValueError(f"timesteps is {self.timesteps}; they must fall from at most 1000 to above 0.")
        if self.window < self.sink + self.chunk_size:
            raise ValueError(
                f"window is {self.window}; it must be at least {self.sink + self.chunk_size}: the sink of {self.sink} "
                f"and the current chunk of {self.chunk_size} latent frames."
            )
        for name in ("window", "sink"):
            if (given := getattr(self, name)) % self.chunk_size:
                raise ValueError(
                    f"{name} is {given}; K/V is kept by whole chunks, so it must be a multiple of chunk_size, "
                    f"{self.chunk_size}: the nearest is {max(round(given / self.chunk_size), 1) * self.chunk_size}."
                )
        return self


def causal_options(given: Mapping[str, Any], *, base: CausalOptions | None = None) -> CausalOptions:
    """The options of `base`, changed by those `given`. Raises `ConfigError` with a sentence for each mistake."""
    try:
        return CausalOptions(**({} if base is None else base.model_dump()) | dict(given))
    except ValidationError as error:
        raise ConfigError([_sentence(each) for each in error.errors()]) from None


def options_of_run(base: CausalOptions, continuity: ContinuityOptions, sampling: SamplingOptions) -> CausalOptions:
    """The options of a causal model in a run: its own, changed by what the run's configuration gives.

    The noise levels `sigmas` are warped by `flow_shift`. Raises `ConfigError` with a sentence for each mistake.
    """
    names = ("window", "sink", "context_noise", "rope")
    given = {name: value for name in names if (value := getattr(continuity, name)) is not None}
    if sampling.sampler is not None:
        given["sampler"] = sampling.sampler
    if sampling.sigmas is not None:
        shift = sampling.flow_shift
        given["timesteps"] = [1000 * shift * sigma / (1 + (shift - 1) * sigma) for sigma in sampling.sigmas]
    return causal_options(given, base=base)


def _sentence(error: Any) -> str:
    path, schema = error["loc"], CausalOptions.model_json_schema()
    if not path:
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        return f"A causal model has no option {path[0]}; it has {', '.join(CausalOptions.model_fields)}."
    return f"{path[0]} is {error['input']!r}; it must be {describe(node_at(path[:1], schema), schema)}."


def causal_in(index: Mapping[str, Any], path: object) -> CausalOptions | None:
    """The causal options in a `model_index.json`; None of a bidirectional model. Raises `ModelError` for bad ones."""
    _check_class(index, path)
    try:
        return causal_options(index[INDEX_KEY]) if INDEX_KEY in index else None
    except (TypeError, ValueError) as error:
        said = " ".join(str(error).splitlines())
        raise ModelError(f"{str(path)!r} has causal options in its model_index.json that cannot be: {said}") from None


def _check_class(index: Mapping[str, Any], path: object) -> None:
    transformer = index.get("transformer")
    if INDEX_KEY not in index and isinstance(transformer, list) and transformer[-1:] == [FOREIGN_CLASS]:
        raise ModelError(
            f"{str(path)!r} is a causal model with the class {FOREIGN_CLASS}, which diffusers does not have: "
            "`edit-ray convert` makes one of it that EditCausalWanPipeline loads."
        )


def check_kind(index: Mapping[str, Any], path: object, *, causal: bool) -> None:
    """Check that a model with this `model_index.json` is a causal one, or with `causal=False` that it is none.

    Raises:
        ModelError: it is not; the sentence says what would load it.
    """
    _check_class(index, path)
    if causal and INDEX_KEY not in index:
        raise ModelError(
            f"{str(path)!r} is a bidirectional model, which sees a whole clip at once: EditWanPipeline loads it; "
            "`edit-ray convert` makes a causal model of a published causal checkpoint."
        )
    if not causal and INDEX_KEY in index:
        raise ModelError(
            f"{str(path)!r} is a causal model, which makes a video chunk by chunk: EditCausalWanPipeline loads it, "
            "and a run with continuity.mode 'causal'."
        )


def latents_of_chunks(num_frames: int, chunk_size: int, temporal_factor: int) -> int:
    """The latent frames of a video of whole chunks.

    Raises:
        ValueError: no number of chunks has `num_frames` frames; names the nearest that has.
    """
    latents, odd = divmod(num_frames - 1, temporal_factor)
    if not odd and latents >= 0 and (latents + 1) % chunk_size == 0:
        return latents + 1

    def frames(chunks: int) -> int:
        return (chunks * chunk_size - 1) * temporal_factor + 1

    below = max((num_frames - 1) // (chunk_size * temporal_factor), 1)
    nearest = min((frames(chunks) for chunks in (below, below + 1)), key=lambda count: abs(count - num_frames))
    raise ValueError(
        f"num_frames is {num_frames}; chunks of {chunk_size} latent frames make {frames(1)}, {frames(2)}, {frames(3)} "
        f"and so on: the nearest is {nearest}."
    )


def check_switch(switch: str) -> Switch:
    """The switch. Raises ValueError for an unknown one."""
    valid: Sequence[Switch] = ("recache", "keep", "cut")
    for known in valid:
        if switch == known:
            return known
    raise ValueError(f"switch is {switch!r}; it must be one of {', '.join(valid)}.")
