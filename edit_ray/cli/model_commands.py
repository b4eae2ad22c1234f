"""`edit-ray calibrate` and `edit-ray tune`: fit a policy to a model, or find the best policy for it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_ray.errors import ConfigError

if TYPE_CHECKING:
    from edit_ray.config import Config
    from edit_ray.engine.pipeline import EditWanPipeline
    from edit_ray.tuning.rank import SkipMeasure
    from edit_ray.tuning.tune import Trial
    from edit_ray.tuning.videos import Videos


def calibrate(options: argparse.Namespace) -> int:
    """Measures a model and writes the policy's fitted options. Checks all input before it imports torch."""
    if options.batch_size < 1:
        raise ConfigError([f"--batch-size is {options.batch_size}; it must be a whole number from 1"])
    config, prompts = _uncached_config(options), _read_prompts(options.prompts)
    _check_calibration(options.file)
    from edit_ray.engine.calibration import write_calibration
    from edit_ray.tuning.calibrate import fit_magcache, fit_teacache, observe, plot_fit
    from edit_ray.tuning.rank import SkipMeasure

    pipe, sampling, seed = _load(config), _sampling(config), config.sampling.seed
    call = sampling | _pictures(config)
    plot = None
    if options.policy in ("ranked", "lemica"):
        measure = SkipMeasure(pipe, prompts, seed, call, options.batch_size)
        fitted = _rank(measure) if options.policy == "ranked" else _measure_reuse(measure)
    else:
        measured = observe(pipe, prompts, seed, call, use_ret_steps=options.use_ret_steps)
        try:
            if options.policy == "teacache":
                fitted = fit_teacache(measured, options.use_ret_steps)
            else:
                fitted = fit_magcache(measured, config.sampling.num_inference_steps)
        except ValueError as error:
            raise ConfigError([str(error)]) from None
        if importlib.util.find_spec("matplotlib") is not None:
            plot = options.file.with_suffix(f".{options.policy}.png")
            plot_fit(measured, fitted).savefig(plot)
    measured_with: dict[str, Any] = {"prompts": len(prompts), "seed": seed, **sampling}
    if pipe.lora_digest:
        measured_with["loras"] = pipe.lora_digest
    write_calibration(options.file, options.policy, fitted, measured_with)
    print(options.file)
    if plot is not None:
        print(plot)
    return 0


def tune(options: argparse.Namespace) -> int:
    """Prints the policy with the least computation at the given PSNR. Checks all input before it imports torch."""
    if not 0 < options.psnr < 100:
        raise ConfigError([f"--psnr is {options.psnr:g}; it must be above 0 and below 100"])
    if options.seeds < 1:
        raise ConfigError([f"--seeds is {options.seeds}; it must be a whole number from 1"])
    if options.budget < 0:
        raise ConfigError([f"--budget is {options.budget}; it must be a whole number from 0"])
    config, prompts = _uncached_config(options), _read_prompts(options.prompts)
    if len(prompts) * options.seeds < 2:
        raise ConfigError(["one video is not enough to generalize from: give more --prompts or --seeds"])
    from edit_ray.tuning.tune import FEWEST_PROMPTS, SEARCH, TUNABLE, best

    enough = len(prompts) >= FEWEST_PROMPTS
    every = [*TUNABLE, SEARCH]
    given = [name for name in every if name != SEARCH or (enough and options.budget)]
    policies = given if options.policies is None else [name.strip() for name in options.policies.split(",")]
    if unknown := [name for name in policies if name not in every]:
        raise ConfigError([f"--policies has {', '.join(unknown)}; it may have {', '.join(every)}"])
    if SEARCH in policies and not enough:
        raise ConfigError([f"--prompts has {len(prompts)}; {SEARCH} takes at least {FEWEST_PROMPTS}"])
    trials = []
    videos = _videos(options, config, prompts)
    for trial in _trials(videos, options, policies):
        trials.append(trial)
        numbers = {name: value for name, value in trial.options.items() if isinstance(value, float | int)}
        setting = " ".join(f"{name}={value:g}" for name, value in numbers.items())
        surely = f" (at least {trial.low:.2f})" if math.isfinite(trial.low) else ""  # it was not given up before
        _say(
            f"{trial.policy} {setting}: {trial.blocks:.3f} of the blocks, {trial.psnr:.2f} dB{surely}: {trial.verdict}"
        )
    found = best(trials)
    _say(f"{videos.made} videos were made")
    if found is None:
        _say(f"no setting of {', '.join(policies)} keeps {options.psnr:g} dB")
        return 1
    alike = found.likeness
    _say(
        f"as many other prompts have a mean of at least {found.low:.2f} dB with 95 % confidence; here the worst frame "
        f"has {alike.worst_psnr:.2f} dB; SSIM {alike.ssim:.4f}, MS-GMSD {alike.gmsd:.4f}, flicker {alike.flicker:.2f}"
    )
    print(f"cache: {{{', '.join(f'{name}: {_yaml(value)}' for name, value in _chosen(found).items())}}}")
    return 0


def _chosen(found: Trial) -> dict[str, Any]:
    return {"policy": found.policy, **found.options}


def _yaml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _videos(options: argparse.Namespace, config: Config, prompts: list[str]) -> Videos:
    """The prompts' videos, with what `--file` knows of them. Raises ConfigError."""
    from edit_ray.files import digest_of_file
    from edit_ray.tuning.journal import Journal
    from edit_ray.tuning.videos import Videos

    pipe = _load(config)
    about = {
        "model": config.model.model_dump(mode="json"),
        "calibration": None if pipe.calibration is None else digest_of_file(pipe.calibration),
        "sampling": config.sampling.model_dump(mode="json"),
        "pictures": list(config.storyboard.segment(0).pictures.paths),
        "prompts": prompts,
        "seeds": options.seeds,
    }
    try:
        journal = Journal(options.file, about)
    except (ValueError, OSError) as error:
        raise ConfigError([f"--file: {error}"]) from None
    call = _sampling(config) | _pictures(config)
    return Videos(pipe, prompts, config.sampling.seed, call, options.seeds, journal)


def _trials(videos: Videos, options: argparse.Namespace, policies: list[str]) -> Iterator[Trial]:
    """Those of the search first: the better the first find, the sooner the others are known to be slower."""
    from edit_ray.tuning.rank import loop_of
    from edit_ray.tuning.tune import SEARCH, best, tune_by_search
    from edit_ray.tuning.tune import tune as trials_of

    searched = []
    if SEARCH in policies:
        loop = loop_of(videos.pipe, videos.call)
        for trial in tune_by_search(videos, loop, options.psnr, options.budget, _say):
            searched.append(trial)
            yield trial
    found = best(searched)
    others = [name for name in policies if name != SEARCH]
    least = math.inf if found is None else found.blocks
    yield from trials_of(videos, options.psnr, others, seeds=options.seeds, least=least)


def _load(config: Config) -> EditWanPipeline:
    from edit_ray.engine.loading import load_pipeline, noise_scheduler_for

    model = config.model
    if model.offload == "text_encoder":  # prompts run one at a time
        model = model.model_copy(update={"offload": "none"})
    pipe = load_pipeline(model)
    if pipe.block_offload is not None and pipe.text_encoder is not None:
        pipe.text_encoder.to(pipe.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = noise_scheduler_for(pipe.scheduler, config.sampling)
    if config.sampling.boundary_ratio is not None:
        pipe.register_to_config(boundary_ratio=config.sampling.boundary_ratio)
    return pipe


def _sampling(config: Config) -> dict[str, Any]:
    """The pipeline's arguments except prompt, seed and pictures."""
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt")
    given = {name: getattr(config.sampling, name) for name in ("sigmas", "guidance_scale_2")}
    few = {name: value for name, value in given.items() if value is not None}
    return {name: getattr(config.sampling, name) for name in names} | few


def _pictures(config: Config) -> dict[str, Any]:
    """Those of segment 0, as the pipeline's arguments."""
    from edit_ray.engine.init_file import picture_arguments

    sampling = config.sampling
    return picture_arguments(config.storyboard.segment(0).pictures, height=sampling.height, width=sampling.width)


def _rank(measure: SkipMeasure) -> dict[str, Any]:
    """The options of `ranked` for a model; prints its progress to stderr. Raises ConfigError."""
    from edit_ray.cache.policies.schedule import ranks_of
    from edit_ray.tuning.rank import MOST_SKIPPED, rank_skips

    slots, owners = measure.slots(), measure.owners()
    if not slots:
        raise ConfigError(["sampling.num_inference_steps is 1: no step can be skipped"])
    forwards = measure.num_steps * len(measure.branches)
    order: tuple[tuple[str, int], ...] = ()
    for done in rank_skips(measure, slots, int(forwards * MOST_SKIPPED)):
        order = done.skipped
        print(f"{len(order)} of {forwards} forwards skipped: {done.likeness:.1f} dB", file=sys.stderr, flush=True)
    return {"skip_rank": ranks_of(order, owners, measure.num_steps)}


def _measure_reuse(measure: SkipMeasure) -> dict[str, Any]:
    """The options of `lemica` for a model; prints its progress to stderr. Raises ConfigError."""
    reuses = measure.reuses()
    if not reuses:
        raise ConfigError([f"sampling.num_inference_steps is {measure.num_steps}: no step can be skipped"])
    errors: list[list[float]] = [[] for _ in range(measure.num_steps)]
    for done, (step, count) in enumerate(reuses, start=1):
        errors[step].append(measure.error(measure.reused(step, count)))
        said = f"{count} steps reuse step {step}: {errors[step][-1]:.4f}"
        print(f"{done} of {len(reuses)}: {said}", file=sys.stderr, flush=True)
    return {"reuse_error": errors}


def _uncached_config(options: argparse.Namespace) -> Config:
    """The configuration without its cache section, which may need the missing calibration. Raises ConfigError."""
    from edit_ray.cache.options import CacheOptions
    from edit_ray.config import check_config, load_config

    config = load_config(options.config, options.set, check_model=False).model_copy(update={"cache": CacheOptions()})
    problems = check_config(config)
    if problems:
        raise ConfigError([f"{options.config}: {problem}" for problem in problems])
    return config


def _check_calibration(path: Path) -> None:
    """Raises ConfigError if the calibration cannot be written to this file."""
    from edit_ray.engine.calibration import read_calibration

    try:
        read_calibration(path)
    except ValueError as error:
        raise ConfigError([f"--file: {error}"]) from None
    if not path.parent.is_dir():
        raise ConfigError([f"--file is {path}, and {path.parent} is not a folder"])


def _read_prompts(path: Path) -> list[str]:
    """The non-blank lines of a text file. Raises ConfigError."""
    try:
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"--prompts {path} cannot be read: {error}"]) from None
    if not prompts:
        raise ConfigError([f"--prompts {path} holds no prompt; it must have one per line"])
    return prompts
