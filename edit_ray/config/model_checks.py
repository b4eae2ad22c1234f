"""What a configuration must have in common with its model, read from the model's JSON files alone."""

from collections.abc import Iterator, Mapping, Sequence

from edit_ray.cache.options import CacheOptions
from edit_ray.cache.policies import POLICIES, OptionError, check_granularity
from edit_ray.config.mistakes import KeyPath, Mistake, dotted
from edit_ray.config.model import Config
from edit_ray.engine.calibration import policy_of
from edit_ray.engine.init_file import read_init
from edit_ray.engine.model_info import ModelInfo, dtype_problem, read_model_info
from edit_ray.engine.options import ContinuityOptions, frames_of
from edit_ray.engine.targets import check_target
from edit_ray.errors import ConfigError, ModelError
from edit_ray.runs.layout import TEMPORAL_FACTOR

MAX_WORDS_NAMED = 100
MAX_TEXT = 2000
REUSING = "warmstart_reuse"  # the policy that reads other segments' residuals

Text = tuple[KeyPath, str]


def check_config(config: Config) -> list[str]:
    """One sentence for everything about the configuration that its model, or the device, cannot do.

    Loads no weights; `load_config` has made this check unless it was told not to.
    """
    texts: list[Text] = [
        (("prompt_segments", index, name), text)
        for index, entry in enumerate(config.prompt_segments)
        for name, text in (("prompt", entry.prompt), ("negative_prompt", entry.negative_prompt or ""))
    ]
    texts.append((("sampling", "negative_prompt"), config.sampling.negative_prompt))
    return [mistake.text for mistake in model_mistakes(config, texts)]


def check_texts(config: Config, texts: Mapping[str, str]) -> list[str]:
    """One sentence for each text, named as in `texts`, that is none or that the configuration's model does not know."""
    problems = [
        f"{name} has {len(text)} characters; it must have 1 to {MAX_TEXT} and not be blank."
        for name, text in texts.items()
        if not text.strip() or len(text) > MAX_TEXT
    ]
    if not problems:
        info = read_model_info(config.model.path)
        problems = [mistake.text for mistake in _check_words([((name,), text) for name, text in texts.items()], info)]
    return problems


def model_mistakes(config: Config, texts: Sequence[Text]) -> list[Mistake]:
    """What the model or the device cannot do; `texts` are the prompts with their keys."""
    mistakes = [
        *_check_dtype(config),
        *_check_init(config.continuity),
        *cache_mistakes(config.cache, config.sampling.num_inference_steps, config.model.path),
    ]
    try:
        info = read_model_info(config.model.path)
    except ModelError as error:
        return [*mistakes, Mistake(("model", "path"), f"model.path: {error}")]
    return [*mistakes, *_check_shape(config, info), *_check_words(texts, info)]


def _check_dtype(config: Config) -> Iterator[Mistake]:
    problem = dtype_problem(config.model.torch_dtype, config.model.device)
    if problem:
        yield Mistake(("model", "torch_dtype"), f"model.torch_dtype {problem}", needs=(("model", "device"),))


def _check_init(continuity: ContinuityOptions) -> Iterator[Mistake]:
    """Reads the user's file as the run will, only smaller."""
    if continuity.init is None:
        return
    try:
        read_init(continuity.init, frames=frames_of(continuity.init_latents), height=16, width=16)
    except ConfigError as error:
        for problem in error.problems:
            yield Mistake(("continuity", "init"), problem, needs=(("continuity", "history_latents"),))


def _check_shape(config: Config, info: ModelInfo) -> Iterator[Mistake]:
    for name, step in (("height", info.height_step), ("width", info.width_step)):
        given: int = getattr(config.sampling, name)
        if given % step:
            below = given // step * step
            near = " or ".join(str(size) for size in (below, below + step) if size)
            yield Mistake(
                ("sampling", name),
                f"sampling.{name} is {given}; it must be a multiple of {step} for this model, such as {near}.",
            )
    if info.scale_factor_temporal != TEMPORAL_FACTOR:
        yield Mistake(
            ("model", "path"),
            f"model.path is {config.model.path!r}, whose VAE makes one latent of {info.scale_factor_temporal} frames; "
            f"it must be {TEMPORAL_FACTOR}.",
        )
    if config.continuity.mode == "history" and not info.expand_timesteps:
        yield Mistake(
            ("continuity", "mode"),
            "continuity.mode is 'history'; it must be none, warm_start or overlap for this model, because history "
            "needs per-token timesteps (expand_timesteps: true in its model_index.json).",
        )


def _check_words(texts: Sequence[Text], info: ModelInfo) -> Iterator[Mistake]:
    if info.vocabulary is None:
        return
    known = sorted(info.vocabulary, key=lambda word: (not word[:1].isalpha(), word))  # punctuation last
    named = ", ".join(word if word[:1].isalpha() else repr(word) for word in known[:MAX_WORDS_NAMED]) + (
        ", …" if len(known) > MAX_WORDS_NAMED else ""
    )
    for path, text in texts:
        unknown = list(dict.fromkeys(word for word in info.words(text) if word not in info.vocabulary))
        if unknown:
            words = ", ".join(map(repr, unknown[:20])) + (", …" if len(unknown) > 20 else "")
            yield Mistake(path, f"{dotted(path)} has words that this model does not know: {words}; it knows: {named}.")


def cache_mistakes(cache: CacheOptions, num_inference_steps: int, model_path: str) -> Iterator[Mistake]:
    """Everything that is wrong with the section, for the model at `model_path`, whose calibration may complete it."""
    options = cache.policy_options
    if cache.policy == "none":
        of_policy = {"target_speedup": cache.target_speedup is not None, "reuse_window": cache.reuse_window > 0}
        for name in [*options, *(name for name, given in of_policy.items() if given)]:
            said = f"cache.{name} is an option of no policy: cache.policy is none."
            yield Mistake(("cache", name), said, needs=(("cache", "policy"),))
        return
    valid = ["none", *POLICIES.names()]
    if cache.policy not in valid:
        yield Mistake(("cache", "policy"), f"cache.policy is {cache.policy!r}; it must be one of {', '.join(valid)}.")
        return
    if (cache.policy == REUSING) != (cache.reuse_window > 0):
        said = (
            f"cache.reuse_window is {cache.reuse_window} and cache.policy {cache.policy!r}; for segments that reuse "
            f"each other's residuals the policy is {REUSING!r} and the window 1 or more, for others neither."
        )
        yield Mistake(("cache", "reuse_window" if cache.reuse_window else "policy"), said)
    elif options.get("align", "step") == "last":
        said = "cache.align is 'last', which works in the library; in a run it must be 'step'."
        yield Mistake(("cache", "align"), said)
    try:
        policy = policy_of(cache, model_path)
        check_granularity(policy, cache.granularity)
        policy.check(num_inference_steps)
        if cache.target_speedup is not None:
            check_target(cache.policy, policy, options)
    except (ValueError, TypeError) as error:
        text, option = str(error), error.option if isinstance(error, OptionError) else ""
        key = option if option in options or option in CacheOptions.model_fields else "policy"
        said = f"cache.{text}" if text.startswith(key) else f"cache: {text}"
        needs = (("sampling", "num_inference_steps"), ("model", "path"))
        yield Mistake(("cache", key), said, needs)
