"""`edit-ray plan`: what a run's segments will reuse of each other, and what that costs, before anything is loaded."""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING

from edit_ray.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from edit_ray.cache.policies import WarmstartReuse
    from edit_ray.cli.outlook import Outlook
    from edit_ray.config import Config
    from edit_ray.engine.model_info import ModelInfo

# One forward of Wan2.1-1.3B on that GPU, eager: 480 x 832 pixels, 33 frames, bfloat16. Nothing else was measured.
MEASURED_MS, MEASURED_TOKENS, MEASURED_WIDTH, MEASURED_BLOCKS = 181.6, 14_040, 1536, {"transformer": 30}


def plan(options: argparse.Namespace) -> int:
    """Print what the run of a configuration will reuse. Loads no weights. Raises ConfigError, ModelError."""
    from edit_ray.cli.outlook import look_ahead
    from edit_ray.cli.plan_text import lines
    from edit_ray.config import load_config
    from edit_ray.engine.model_info import read_model_info

    milliseconds: float | None = options.forward_ms
    if milliseconds is not None and not 0 < milliseconds < math.inf:
        raise ConfigError([f"--forward-ms is {milliseconds:g}; it must be a number of milliseconds above 0"])
    config = load_config(options.config, options.set)
    if not config.cache.reuse_window:
        print("cache.reuse_window is 0: no segment of this run reuses anything of another.")
        return 0
    info = read_model_info(config.model.path)
    try:
        outlook = look_ahead(config, info, _experts(config, info), _policy(config))
    except ValueError as error:
        raise ConfigError([f"{options.config}: cache.{error}"]) from None
    host = config.store.host_bytes
    if any(segment.working for segment in outlook.plan.segments) and outlook.size > host:
        raise ConfigError([f"store.host_bytes is {host}; one residual of this run has {outlook.size} bytes."])
    if milliseconds is None and _is_measured(config, info, outlook):
        milliseconds = MEASURED_MS
    print("\n".join(lines(config, outlook, milliseconds)))
    return 0


def what_does_not_fit(config: Config) -> str | None:
    """What a run computes for want of room although its segments could reuse it, in a sentence; None if all fits."""
    from edit_ray.cli.outlook import followed_plan
    from edit_ray.engine.model_info import read_model_info

    bound = config.store.disk_bytes
    if not config.cache.reuse_window or bound is None:
        return None
    info = read_model_info(config.model.path)
    plan = followed_plan(config, info, _experts(config, info), _policy(config), bound)
    if not plan.computed:
        return None
    return (
        f"{len(plan.computed)} residuals ({sum(slot.size for slot in plan.computed):,} bytes) do not fit into "
        f"store.disk_bytes, {bound:,}: every segment computes them; all of them need {plan.needed_bytes:,} bytes"
    )


def _policy(config: Config) -> WarmstartReuse:
    """The run's policy, which the configuration's checks have found to be this one."""
    from edit_ray.cache.policies import WarmstartReuse
    from edit_ray.engine.calibration import policy_of

    policy = policy_of(config.cache, config.model.path)
    assert isinstance(policy, WarmstartReuse)
    return policy


def _experts(config: Config, info: ModelInfo) -> list[str]:
    """The expert of each step. Only where there are two of them the noise scheduler has to say, which needs torch."""
    steps = config.sampling.num_inference_steps
    if info.boundary_ratio is None:
        return ["transformer"] * steps
    import diffusers

    from edit_ray.engine.caching import loop_steps
    from edit_ray.engine.loading import with_flow_shift
    from edit_ray.engine.model_files import locate_model

    location = locate_model(config.model.path)
    try:
        # Every noise scheduler's config lies in the same file, and names its class.
        loaded = diffusers.UniPCMultistepScheduler.load_config(location, subfolder="scheduler")
        noise_scheduler = getattr(diffusers, loaded["_class_name"]).from_config(loaded)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{config.model.path!r} has a noise scheduler that cannot be made: {error}") from None
    noise_scheduler = with_flow_shift(noise_scheduler, config.sampling.flow_shift)
    noise_scheduler.set_timesteps(steps)
    pipe = SimpleNamespace(config=SimpleNamespace(boundary_ratio=info.boundary_ratio), scheduler=noise_scheduler)
    return [step.expert for step in loop_steps(pipe, noise_scheduler)]


def _is_measured(config: Config, info: ModelInfo, outlook: Outlook) -> bool:
    """Whether the seconds of this run's forwards are those that were measured."""
    model = config.model
    return (
        (outlook.shape[1], info.width, info.num_blocks) == (MEASURED_TOKENS, MEASURED_WIDTH, MEASURED_BLOCKS)
        and model.torch_dtype == "bfloat16"
        and model.device != "cpu"
    )
