"""What is asked of a video that there is: remixes, extensions and branches of it, re-rolls, and steering it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from edit_ray.config import read_edit
from edit_ray.config.mistakes import show
from edit_ray.errors import ConfigError, RunExists
from edit_ray.runs.run_plan import EDITABLE
from edit_ray.server.refusals import Problem, Refusal, refuse
from edit_ray.server.video_object import RunView, Video
from edit_ray.server.video_request import OURS, seconds_of, unknown_fields
from edit_ray.server.video_service import VideoService, keyed_id, seed_of

REMIX = ("prompt", OURS)
EXTENSION = ("video", "prompt", "seconds", OURS)
BRANCH = ("at", "prompt", "seed", "num_segments")
REROLL = ("from_segment", "prompt", "seed")
STEER = ("from_segment", *EDITABLE)
CHANGES = ("steer", "paused", "approve")

_OPTION = re.compile(r"(?<!\S)--(from|seed|prompt)\b")


class VideoChanges:
    """The changes of a service's videos. A source of another video never changes; its own are lines of its manifest."""

    def __init__(self, service: VideoService) -> None:
        self._service, self._runs = service, service.runs

    def remix(self, run_id: str, body: Mapping[str, Any], key: str | None) -> Video:
        """A new video of the same length from another prompt, and with another seed unless it is given."""
        problems = [*unknown_fields(body, REMIX, ""), *_missing(body, "prompt")]
        ours = _ours(body, ("seed",), problems)
        _stop_at(problems)
        self._mine(run_id)
        return self._branch(run_id, 0, body, key, {"prompt": body["prompt"], "seed": ours.get("seed")}, seeded=True)

    def extension(self, body: Mapping[str, Any], key: str | None) -> Video:
        """A new video that begins as an ended one and goes on for `seconds`, from a prompt if there is one."""
        problems = [*unknown_fields(body, EXTENSION, ""), *_missing(body, "video", "seconds")]
        ours = _ours(body, ("seed",), problems)
        source, seconds = _source_of(body.get("video"), problems), None
        if body.get("seconds") is not None and (seconds := seconds_of(body["seconds"])) is None:
            said = "it must be a number above 0, such as 4."
            problems.append(Problem(f"seconds is {show(body['seconds'])}; {said}", "seconds"))
        _stop_at(problems)
        assert source is not None
        assert seconds is not None
        view = self._mine(source)
        if not view.status.ended:
            said = "it must have ended; until then PATCH it, or branch it."
            raise refuse("video_conflict", f"The video {source} is {view.status.state}; {said}", "video")
        layout, committed = view.manifest.begun.layout, view.status.committed
        each_s = layout.frames_of(1) / layout.fps
        more = max(1, math.ceil(seconds / each_s - 1e-6))
        about = {"prompt": body.get("prompt"), "seed": ours.get("seed"), "num_segments": committed + more}
        video = self._branch(source, committed, body, key, about)
        if not math.isclose(more * each_s, seconds):
            segments = f"{more} whole segments last" if more > 1 else "one whole segment lasts"
            video.edit_ray.note = f"{seconds:g} s more were asked for; {segments} {more * each_s:g} s."
        return video

    def branch(self, run_id: str, body: Mapping[str, Any], key: str | None) -> Video:
        """A new video that shares the segments before `at`, and goes its own way."""
        _stop_at([*unknown_fields(body, BRANCH, ""), *_missing(body, "at")])
        self._mine(run_id)
        return self._branch(run_id, body["at"], body, key, {name: body.get(name) for name in BRANCH[1:]})

    def reroll(self, run_id: str, body: Mapping[str, Any]) -> Video:
        """The segments of a video from `from_segment` on again: of one that has ended, or waits."""
        start: Any = body.get("from_segment")
        problems = list(unknown_fields(body, REROLL, ""))
        if type(start) is not int:
            must = "it must be the number of a segment."
            problems.append(Problem(f"from_segment is {show(start)}; {must}", "from_segment"))
        _stop_at(problems)
        view = self._mine(run_id)
        said = {name: body.get(name) for name in ("prompt", "seed")}
        with _named(REROLL):
            if view.config is not None:
                read_edit(view.config, said)
            self._runs.reroll(run_id, start, **said)
        return self._service.video(run_id, fresh=True)

    def change(self, run_id: str, body: Mapping[str, Any], key: str | None) -> Video:
        """Steer, pause or approve a video that is being made; the answer says from which segment on an edit holds."""
        problems = list(unknown_fields(body, CHANGES, ""))
        asked = [name for name in CHANGES if body.get(name) is not None]
        if len(asked) != 1:
            given = " and ".join(asked) or "nothing"
            problems.append(Problem(f"The body has {given}; it must have one of {', '.join(CHANGES)}."))
        steer = body.get("steer")
        if steer is not None and not isinstance(steer, Mapping):
            problems.append(Problem(f"steer is {show(steer)}; it must be a mapping with {', '.join(STEER)}.", "steer"))
        elif steer is not None:
            problems += unknown_fields(steer, STEER, "steer.")
        if body.get("paused") is not None and not isinstance(body["paused"], bool):
            problems.append(Problem(f"paused is {show(body['paused'])}; it must be true or false.", "paused"))
        _stop_at(problems)
        self._mine(run_id)
        start = None
        with _named((*STEER, "segment"), above="steer." if asked[0] == "steer" else ""):
            if asked[0] == "steer":
                request = None if key is None else keyed_id(f"{self._runs.owner.name}/{run_id}", key)
                start = self._runs.steer(run_id, request=request, **dict(steer or {})).start
            elif asked[0] == "paused":
                (self._runs.pause if body["paused"] else self._runs.unpause)(run_id)
            else:
                self._runs.approve(run_id, body["approve"])
        video = self._service.video(run_id, fresh=True)
        video.edit_ray.applied_from = start
        return video

    def _mine(self, run_id: str) -> RunView:
        return self._service.shelf.view(run_id, fresh=True)

    def _branch(
        self,
        run_id: str,
        at: Any,
        body: Mapping[str, Any],
        key: str | None,
        about: dict[str, Any],
        *,
        seeded: bool = False,
    ) -> Video:
        """The new video; `about` are the client's arguments. The same `key` and body again return the same video."""
        new_id, request = self._service.new_id(key), None
        if key is not None:
            asked = json.dumps([run_id, body], sort_keys=True, default=str)
            request = hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()
        if seeded and about.get("seed") is None:
            about["seed"] = seed_of(new_id)
        try:
            with _named(BRANCH):
                self._runs.branch(run_id, at, new_id=new_id, request=request, **about)
        except RunExists:
            if key is None:
                raise
            raise self._service.other_key() from None
        return self._service.video(new_id, fresh=True)


@contextlib.contextmanager
def _named(fields: Iterable[str], above: str = "") -> Iterator[None]:
    """Inside it a ConfigError becomes a Refusal whose problems name the fields that their sentences begin with."""
    known = tuple(fields)

    def problem(sentence: str) -> Problem:
        said = _OPTION.sub(lambda match: "from_segment" if match[1] == "from" else match[1], sentence)
        first = said.partition(" ")[0]
        return Problem(f"{above}{said}", f"{above}{first}") if first in known else Problem(said)

    try:
        yield
    except ConfigError as mistakes:
        raise Refusal(*map(problem, mistakes.problems)) from None


def _ours(body: Mapping[str, Any], known: Iterable[str], problems: list[Problem]) -> Mapping[str, Any]:
    ours = body.get(OURS)
    if ours is None:
        return {}
    if not isinstance(ours, Mapping):
        problems.append(Problem(f"{OURS} is {show(ours)}; it must be a mapping with {', '.join(known)}.", OURS))
        return {}
    problems += unknown_fields(ours, known, f"{OURS}.")
    return ours


def _missing(body: Mapping[str, Any], *names: str) -> list[Problem]:
    missing = [name for name in names if body.get(name) is None]
    return [Problem(f"{name} is missing; it must be given.", name) for name in missing]


def _source_of(video: Any, problems: list[Problem]) -> str | None:
    """The id of the video that an extension begins as."""
    if video is None:
        return None
    if isinstance(video, Mapping) and set(video) == {"id"} and isinstance(video["id"], str):
        return str(video["id"])
    is_file = "a file, and only videos of this server can be extended" if isinstance(video, bytes) else show(video)
    problems.append(Problem(f"video is {is_file}; it must be a mapping with the id of a video.", "video"))
    return None


def _stop_at(problems: list[Problem]) -> None:
    if problems:
        raise Refusal(*problems)
