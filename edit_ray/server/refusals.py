"""What the door refuses, and how it says so: errors in OpenAI's form, with a code from a closed list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edit_ray.config.mistakes import printable
from edit_ray.errors import (
    ConfigError,
    EditRayError,
    HardwareDiffers,
    ManifestUnreadable,
    ModelError,
    NotYourRun,
    RunDamaged,
    RunEnded,
    RunExists,
    RunLive,
    RunLocked,
    SegmentGone,
    UnknownRun,
)

CODES: Mapping[str, int] = {
    "invalid_request": 400,
    "invalid_value": 400,
    "unknown_field": 400,
    "model_not_found": 400,
    "not_supported": 400,
    "invalid_api_key": 401,
    "wrong_host": 403,
    "wrong_origin": 403,
    "not_your_video": 403,
    "not_found": 404,
    "video_not_found": 404,
    "segment_not_found": 404,
    "not_ready": 404,
    "method_not_allowed": 405,
    "too_slow": 408,
    "key_reused": 409,
    "video_conflict": 409,
    "video_damaged": 409,
    "too_large": 413,
    "wrong_media_type": 415,
    "wrong_range": 416,
    "rate_limited": 429,
    "internal_error": 500,
    "unavailable": 503,
}
"""Every `error.code`, with its HTTP status."""

FAILURES = ("cancelled", "generation_failed")
"""Every `error.code` of a video that has failed."""

_CODE_OF: Sequence[tuple[type[EditRayError], str]] = (
    (ConfigError, "invalid_value"),
    (UnknownRun, "video_not_found"),
    (SegmentGone, "segment_not_found"),
    (NotYourRun, "not_your_video"),
    (RunEnded, "video_conflict"),
    (RunLive, "video_conflict"),
    (RunExists, "video_conflict"),
    (RunLocked, "video_conflict"),
    (HardwareDiffers, "video_conflict"),
    (ModelError, "video_conflict"),
    (ManifestUnreadable, "video_damaged"),
    (RunDamaged, "video_damaged"),
)
RETRY_S = 2
"""When a client may ask again after `unavailable` and `rate_limited`."""
_MOST_PROBLEMS = 100


@dataclass(frozen=True)
class Problem:
    """One mistake: a sentence, the field that has it (None: no field has it alone), and a code of `CODES`."""

    message: str
    param: str | None = None
    code: str = "invalid_value"


class Refusal(Exception):
    """The answer to a request that is not carried out: every mistake in it, the first of which decides the status."""

    def __init__(self, *problems: Problem, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(" ".join(problem.message for problem in problems))
        self.problems = problems[:_MOST_PROBLEMS]
        self.headers = dict(headers or {})
        if self.code in ("unavailable", "rate_limited"):
            self.headers.setdefault("Retry-After", str(RETRY_S))
        if self.status == 409:
            self.headers.setdefault("X-Should-Retry", "false")  # or OpenAI's clients ask again, to be told the same
        if self.status in (408, 413):
            self.headers.setdefault("Connection", "close")  # the rest of the body is not waited for
        if self.status == 401:
            self.headers.setdefault("WWW-Authenticate", "Bearer")

    @property
    def code(self) -> str:
        return self.problems[0].code

    @property
    def status(self) -> int:
        """The HTTP status."""
        return CODES[self.code]

    @property
    def body(self) -> dict[str, Any]:
        """The answer as JSON."""
        problems = [
            {"param": problem.param, "code": problem.code, "message": printable(problem.message)}
            for problem in self.problems
        ]
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": " ".join(problem["message"] or "" for problem in problems),
                "type": {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind),
                "param": problems[0]["param"],
                "code": self.code,
                "edit_ray": {"problems": problems},
            }
        }


def refuse(code: str, message: str, param: str | None = None) -> Refusal:
    """A refusal for one reason."""
    return Refusal(Problem(message, param, code))


def refusal_of(error: EditRayError) -> Refusal:
    """The answer to an error of ours. Those that are not named are of the cluster, and may pass."""
    code = next((code for kind, code in _CODE_OF if isinstance(error, kind)), "unavailable")
    sentences = error.problems if isinstance(error, ConfigError) else (str(error),)
    return Refusal(*(Problem(sentence, None, code) for sentence in sentences))
