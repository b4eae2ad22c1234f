"""From a request for a video to a run's configuration, or to every mistake in it. Nothing here touches a socket.

Fields of OpenAI's API stand at the top, all others under `edit_ray`. A field is a key of the configuration by another
name: its values are checked, and described, by the configuration alone.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edit_ray.config import Config
from edit_ray.config.load import validate
from edit_ray.config.mistakes import KeyPath, Mistake, dotted, show
from edit_ray.config.model import MAX_DURATION_S
from edit_ray.server.refusals import Problem

OURS = "edit_ray"
FIELDS = ("prompt", "model", "seconds", "size", "input_reference", OURS)
SAMPLING = (
    *("num_frames", "fps", "num_inference_steps", "sigmas", "sampler", "guidance_scale", "guidance_scale_2"),
    *("boundary_ratio", "flow_shift", "seed", "negative_prompt"),
)
CONTINUITY = (
    *("mode", "history_latents", "overlap_source", "adain", "picture_as"),
    *("chunks", "chunk_size", "kv", "window", "sink", "context_noise", "rope"),
)
ENTRY = ("start", "segment", "prompt", "negative_prompt", "guidance_scale", "seed", "lora_weights", "switch")
OUR_FIELDS = ("storyboard", "num_segments", "approve", "continuity", "cache", *SAMPLING)

SMALLEST, LARGEST = 16, 4096  # pixels of a side
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")

# The configuration's keys as a request names them; the first that fits is taken.
_NAMES = (
    (re.compile(r"\bprompt_segments\.0\.prompt\b"), "prompt"),
    (re.compile(r"\bprompt_segments\b"), f"{OURS}.storyboard"),
    (re.compile(r"\bsampling\.(?:height|width)\b"), "size"),
    (re.compile(r"\bsampling\.(?=[a-z])"), f"{OURS}."),
    (re.compile(r"\bvideo\.duration\b"), "seconds"),
    (re.compile(r"\bvideo\.(num_segments|approve)\b"), rf"{OURS}.\1"),
    (re.compile(r"\bcontinuity\.init\b(?!_)"), "input_reference"),
    (re.compile(r"\b(continuity|cache)\.(?=[a-z])"), rf"{OURS}.\1."),
    (re.compile(r"^(continuity|cache)(?=$| is |:)"), rf"{OURS}.\1"),
)


@dataclass(frozen=True)
class Offer:
    """A model of the door: its name, the configuration that requests change, and what height and width divide by."""

    name: str
    base: Config
    height_step: int
    width_step: int


def config_for(
    body: Mapping[str, Any], offers: Mapping[str, Offer], *, seed: int, init: str | None = None
) -> tuple[Config | None, list[Problem]]:
    """The configuration that a request asks for, or every mistake in it.

    Args:
        body: the request's fields.
        offers: the models by their names, the first of which is taken where none is named.
        seed: of the run, where the request gives none.
        init: the file that was uploaded as `input_reference`.
    """
    problems = list(unknown_fields(body, FIELDS, ""))
    ours = _mapping(body, OURS, OUR_FIELDS, problems)
    offer = _offer(body.get("model"), offers, problems)
    data = offer.base.model_dump(mode="json")
    data["sampling"] |= {"seed": seed} | {name: ours[name] for name in SAMPLING if name in ours}
    if ours.get("sigmas") is not None and "num_inference_steps" not in ours:
        del data["sampling"]["num_inference_steps"]  # it follows from their number
    _put_size(data, body.get("size"), offer, problems)
    _put_length(data, body, ours, problems)
    _put_prompts(data, body, ours, problems)
    data["continuity"] |= _mapping(ours, "continuity", CONTINUITY, problems, f"{OURS}.")
    if init is not None:
        data["continuity"]["init"] = init
    if "cache" in ours:
        data["cache"] = ours["cache"]
    config, mistakes = validate(data)
    told = {problem.param for problem in problems}
    problems += [problem for mistake in mistakes if (problem := _problem(mistake, body, ours, init)).param not in told]
    return config, problems


def rounding(config: Config) -> str | None:
    """What is said of a video that lasts longer than was asked for, as it consists of whole segments."""
    asked_s, frames = config.video.duration, config.num_frames_total
    if asked_s is None or frames is None or math.isclose(frames / config.sampling.fps, asked_s):
        return None
    lasts_s = frames / config.sampling.fps
    segments = f"{config.num_segments} whole segments last" if config.num_segments != 1 else "one whole segment lasts"
    return f"{asked_s:g} s were asked for; {segments} {lasts_s:g} s."


def seconds_of(given: Any) -> float | None:
    """A number of seconds, as text or as a number; None if it is none that a video can last."""
    text = str(given) if isinstance(given, str | int | float) and not isinstance(given, bool) else ""
    if _SECONDS.fullmatch(text) is None or not 0 < float(text) <= MAX_DURATION_S:
        return None
    return float(text)


def nearest(size: int, step: int) -> int:
    """The multiple of `step` that is nearest to a size in pixels, among those that a video may have."""
    least, most = math.ceil(SMALLEST / step), LARGEST // step
    return step * min(max(round(size / step), least), most)


def unknown_fields(given: Mapping[str, Any], known: Iterable[str], above: str) -> Iterator[Problem]:
    """The fields that are none of the known ones, each with the one that it may mean."""
    valid = tuple(known)
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.6)
            hint = f"; did you mean {above}{near[0]}?" if near else "."
            said = f"is an unknown field{hint} (Known here: {', '.join(valid)}.)"
            yield Problem(f"{above}{show(str(name))[1:-1]} {said}", f"{above}{name}"[:100], "unknown_field")


def _mapping(
    given: Mapping[str, Any], name: str, known: Iterable[str], problems: list[Problem], above: str = ""
) -> Mapping[str, Any]:
    """The known fields of a mapping; empty if it is none."""
    value, valid = given.get(name), tuple(known)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        said = f"is {show(value)}; it must be a mapping with the keys {', '.join(valid)}."
        problems.append(Problem(f"{above}{name} {said}", f"{above}{name}"))
        return {}
    problems += unknown_fields(value, valid, f"{above}{name}.")
    return {key: value[key] for key in valid if key in value}


def _offer(model: Any, offers: Mapping[str, Offer], problems: list[Problem]) -> Offer:
    if isinstance(model, str) and model in offers:
        return offers[model]
    if model is not None:
        said = f"model is {show(model)}; it must be one of {', '.join(offers)}."
        problems.append(Problem(said, "model", "model_not_found"))
    return next(iter(offers.values()))


def _put_size(data: dict[str, Any], size: Any, offer: Offer, problems: list[Problem]) -> None:
    if size is None:
        return
    steps = f"multiples of {offer.width_step} and {offer.height_step}"
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        said = f"it must be width x height in pixels, {steps} for this model, such as 128x64."
        problems.append(Problem(f"size is {show(size)}; {said}", "size"))
        return
    width, height = map(int, match.groups())
    can = nearest(width, offer.width_step), nearest(height, offer.height_step)
    if can != (width, height):
        said = f"it must be {steps} for this model, {SMALLEST} to {LARGEST}; the nearest is {can[0]}x{can[1]}."
        problems.append(Problem(f"size is {show(size)}; {said}", "size"))
    data["sampling"] |= {"width": can[0], "height": can[1]}


def _put_length(
    data: dict[str, Any], body: Mapping[str, Any], ours: Mapping[str, Any], problems: list[Problem]
) -> None:
    seconds, segments = body.get("seconds"), ours.get("num_segments")
    about = {"approve": ours["approve"]} if "approve" in ours else {}
    if seconds is not None and segments is not None:
        said = f"seconds and {OURS}.num_segments are both given; the length must be one of them."
        problems.append(Problem(said, "seconds"))
    elif seconds is not None:
        if seconds_of(seconds) is None:
            said = f"it must be a number above 0 and at most {MAX_DURATION_S:.0f}, such as 4."
            problems.append(Problem(f"seconds is {show(seconds)}; {said}", "seconds"))
        else:
            data["video"] = about | {"duration": f"{seconds}s"}
    elif segments is not None:
        data["video"] = about | {"num_segments": segments}
    else:
        data["video"] |= about


def _put_prompts(
    data: dict[str, Any], body: Mapping[str, Any], ours: Mapping[str, Any], problems: list[Problem]
) -> None:
    storyboard = ours.get("storyboard")
    if storyboard is None:
        data["prompt_segments"] = [{"segment": 0} | {name: body[name] for name in ("prompt",) if name in body}]
        return
    if body.get("prompt") is not None:
        said = f"prompt and {OURS}.storyboard are both given; the prompts must be in one of them."
        problems.append(Problem(said, "prompt"))
    data["prompt_segments"] = storyboard
    if isinstance(storyboard, list):
        entries = [dict(entry) if isinstance(entry, Mapping) else entry for entry in storyboard]
        for index, entry in enumerate(entries):
            if isinstance(entry, dict):
                problems += unknown_fields(entry, ENTRY, f"{OURS}.storyboard.{index}.")
                entries[index] = {key: entry[key] for key in ENTRY if key in entry}
        data["prompt_segments"] = entries


def _problem(mistake: Mistake, body: Mapping[str, Any], ours: Mapping[str, Any], init: str | None) -> Problem:
    """A mistake in the configuration, in the request's words: its names of keys, and no path of this machine."""

    def named(text: str) -> str:
        for pattern, name in _NAMES[1:] if ours.get("storyboard") is not None else _NAMES:
            text = pattern.sub(name, text)
        return text

    path, text = dotted(mistake.path), mistake.text
    if init is not None:
        text = text.replace(repr(init), "the file that was sent").replace(init, "the file that was sent")
    param = named(path)
    return Problem(named(text), param if _is_given(mistake.path, param) else None)


def _is_given(path: KeyPath, param: str) -> bool:
    """Whether a request can have the field; the door's own configuration has the others."""
    return param.startswith(FIELDS) or path[:1] in (("cache",), ("continuity",), ("video",))
