"""Checks of a configuration against its model, from the model's JSON files."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from edit_ray.cache.options import CacheOptions
from edit_ray.cache.policies import POLICIES, OptionError, check_granularity
from edit_ray.config.causal_checks import causal_model_mistakes
from edit_ray.config.cross_checks import guidance_mistakes
from edit_ray.config.mistakes import KeyPath, Mistake, mistake_at, mistakes_of, printable
from edit_ray.config.model import Config, PromptSegment
from edit_ray.config.picture_checks import file_mistakes, model_takes
from edit_ray.config.run_memory import run_of
from edit_ray.engine.calibration import check_target, policy_of
from edit_ray.engine.card_memory import LEAST_SLOTS, needs_of
from edit_ray.engine.known_words import unknown_words
from edit_ray.engine.lora_files import lora_mistakes
from edit_ray.engine.model_info import ModelInfo, dtype_problem, read_configs, read_model_info
from edit_ray.engine.trained_range import beyond_training
from edit_ray.errors import ConfigError, ModelError
from edit_ray.runs.run_plan import EDITABLE, TEMPORAL_FACTOR

_SURROGATES = re.compile("[\ud800-\udfff]")  # which no tokenizer takes
MAX_TEXT = 2000
REUSING = "warmstart_reuse"  # the policy that reuses residuals of other segments

Text = tuple[KeyPath, str]


def check_config(config: Config) -> list[str]:
    """One sentence for everything that the model or the device does not support. Loads no weights.

    `load_config` includes this check unless `check_model` is False.
    """
    return [mistake.text for mistake in model_mistakes(config, texts_in(config.model_dump(mode="json")))]


def check_texts(config: Config, texts: Mapping[str, str]) -> list[str]:
    """One sentence per text, named by its key, that is blank, too long or has words unknown to the model."""
    problems = [
        f"{name} has {len(text)} characters; it must have 1 to {MAX_TEXT} and not be blank."
        for name, text in texts.items()
        if not text.strip() or len(text) > MAX_TEXT
    ]
    if not problems:
        info = read_model_info(config.model.path)
        problems = [mistake.text for mistake in _words([((name,), text) for name, text in texts.items()], info)]
    return problems


def read_edit(config: Config, said: Mapping[str, Any]) -> dict[str, Any]:
    """What an edit of the storyboard says, checked as an entry of `prompt_segments` is; None says nothing.

    Raises ConfigError with a sentence for each mistake.
    """
    given = {name: value for name, value in said.items() if value is not None}
    problems = [
        f"{name} is an unknown field; an edit has {', '.join(EDITABLE)}." for name in given if name not in EDITABLE
    ]
    known = {name: given[name] for name in EDITABLE if name in given}
    try:
        entry = PromptSegment.model_validate({"segment": 0, "prompt": "-"} | known)
    except ValidationError as error:
        problems += [mistake.text for mistake in mistakes_of(error, PromptSegment.model_json_schema())]
    else:
        known = {name: getattr(entry, name) for name in known}
        problems += [mistake.text for mistake in guidance_mistakes(config, entry, ("guidance_scale",))]
        texts = {name: known[name] for name in ("prompt", "negative_prompt") if name in known}
        info = read_model_info(config.model.path)
        problems += [mistake.text for mistake in _words([((name,), text) for name, text in texts.items()], info)]
    if problems:
        raise ConfigError([printable(problem) for problem in problems])
    return known


def training_warning(config: Config) -> str | None:
    """One sentence if a run lies beyond what the model's card says that it was trained for.

    A causal model in the folder of another has that one's card, which knows nothing of its steps.
    """
    names = {"height", "width"}
    if not config.continuity.causal:
        names |= {"num_frames", "num_inference_steps", "guidance_scale"}
    return beyond_training(config.model.path, config.sampling.model_dump(include=names))


def texts_in(data: Any) -> Iterator[Text]:
    """Every prompt in a configuration's raw data; what is no text is left out."""
    if not isinstance(data, dict):
        return
    entries, sampling = data.get("prompt_segments"), data.get("sampling")
    sections = [
        (("prompt_segments", at), entry) for at, entry in enumerate(entries if isinstance(entries, list) else ())
    ]
    for path, section in [*sections, (("sampling",), sampling)]:
        for name in ("prompt", "negative_prompt"):
            text = section.get(name) if isinstance(section, dict) else None
            if isinstance(text, str) and not _SURROGATES.search(text):
                yield (*path, name), text


def model_mistakes(config: Config, texts: Iterable[Text]) -> list[Mistake]:
    """Everything that the model or the device does not support; `texts` are the prompts with their keys."""
    steps, model = config.sampling.num_inference_steps, config.model
    mistakes = [*file_mistakes(config), *_cache(config, steps)]
    if problem := dtype_problem(model.torch_dtype, model.device):
        mistakes.append(mistake_at("model.torch_dtype", problem, "model.device"))
    mistakes += [mistake_at(f"model.{name}", problem) for name, problem in model.problems_here().items()]
    try:
        info = read_model_info(model.path)
    except ModelError as error:
        return [*mistakes, Mistake(("model", "path"), f"model.path: {error}")]
    return [
        *(*mistakes, *_shape(config, info), *model_takes(config, info), *_device_bytes(config)),
        *causal_model_mistakes(config, info),
        *(*_experts(config, info), *_loras(config, info), *_words(texts, info)),
    ]


def _shape(config: Config, info: ModelInfo) -> Iterator[Mistake]:
    for name, step in (("height", info.height_step), ("width", info.width_step)):
        given: int = getattr(config.sampling, name)
        if given % step:
            below = given // step * step
            near = " or ".join(str(size) for size in (below, below + step) if size)
            yield mistake_at(
                f"sampling.{name}", f"is {given}; it must be a multiple of {step} for this model, such as {near}."
            )
    if info.scale_factor_temporal != TEMPORAL_FACTOR:
        yield mistake_at(
            "model.path",
            f"is {config.model.path!r}, whose VAE makes one latent of {info.scale_factor_temporal} frames; it must be "
            f"{TEMPORAL_FACTOR}.",
        )


def _experts(config: Config, info: ModelInfo) -> Iterator[Mistake]:
    if len(info.num_blocks) == 2:
        return
    for name in ("guidance_scale_2", "boundary_ratio"):
        if (given := getattr(config.sampling, name)) is not None:
            yield mistake_at(
                f"sampling.{name}", f"is {given:g}; it must be null for this model, which has one expert.", "model.path"
            )


def _loras(config: Config, info: ModelInfo) -> Iterator[Mistake]:
    """Reads the headers of the files, and compares them with the model."""
    for index, key, says in lora_mistakes(config.model, info):
        yield mistake_at(("model", "loras", index, key), says, "model.path")


def _device_bytes(config: Config) -> Iterator[Mistake]:
    """Of offloaded blocks some must be on the device."""
    given = config.model.device_bytes
    if config.model.offload != "blocks" or given is None or config.model.problems_here():
        return
    configs, per_token = read_configs(config.model.path)
    least = needs_of(configs, run_of(config), per_token=per_token).least
    if given < least:
        yield mistake_at(
            "model.device_bytes",
            f"is {given}; it must be at least {least}: {LEAST_SLOTS} blocks, and what is around the blocks.",
        )


def _words(texts: Iterable[Text], info: ModelInfo) -> Iterator[Mistake]:
    if info.tokenizer is None:
        return
    for path, text in texts:
        if (says := unknown_words(info.tokenizer, text)) is not None:
            yield mistake_at(path, says)


def _cache(config: Config, num_inference_steps: int) -> Iterator[Mistake]:
    """Mistakes in the section; the calibration of the model may complete it."""
    cache, options = config.cache, config.cache.policy_options
    if cache.policy == "none":
        of_policy = {name: getattr(cache, name) is not None for name in ("target_speedup", "cfg_gate")}
        of_policy["reuse_window"] = cache.reuse_window > 0
        for name in [*options, *(name for name, given in of_policy.items() if given)]:
            path = ("cache", name)
            yield mistake_at(path, "is an option of no policy: cache.policy is none.", "cache.policy")
        return
    valid = ["none", *POLICIES.names()]
    if cache.policy not in valid:
        yield mistake_at("cache.policy", f"is {cache.policy!r}; it must be one of {', '.join(valid)}.")
        return
    if (cache.policy == REUSING) != (cache.reuse_window > 0):
        said = (
            f"cache.reuse_window is {cache.reuse_window} and cache.policy {cache.policy!r}; for segments that reuse "
            f"each other's residuals the policy is {REUSING!r} and the window 1 or more, for others neither."
        )
        yield Mistake(("cache", "reuse_window" if cache.reuse_window else "policy"), said)
    elif options.get("align", "step") == "last":
        yield mistake_at("cache.align", "is 'last', which works in the library; in a run it must be 'step'.")
    try:
        policy = policy_of(cache, config.model)
        check_granularity(policy, cache.granularity)
        policy.check(num_inference_steps)
        if cache.target_speedup is not None:
            check_target(cache.policy, policy, options)
        if config.engine.cfg_parallel and policy.uncond_follows:
            said = f"is {cache.policy!r} and engine.cfg_parallel true; its uncond branch needs cond's decisions."
            yield mistake_at("cache.policy", said, "engine.cfg_parallel")
    except (ValueError, TypeError) as error:
        text, option = str(error), error.option if isinstance(error, OptionError) else ""
        key = option if option in options or option in CacheOptions.model_fields else "policy"
        said = f"cache.{text}" if text.startswith(key) else f"cache: {text}"
        needs = (("sampling", "num_inference_steps"), ("model", "path"))
        yield Mistake(("cache", key), said, needs)
