"""Every error that users can meet, each with one clear sentence.

EditRayError
├── ConfigError            (also ValueError)   the configuration is wrong: every mistake at once
├── ModelError             (also ValueError)   a path that is no usable Wan model
├── RunExists              (also ValueError)   a run id that is taken
├── UnknownRun             (also LookupError)  a run id that nobody knows
├── ResourcesUnavailable                       the cluster lacks what the actors need
├── ActorVersionMismatch                       living actors run other code than the caller
├── SegmentFailed                              a segment failed more often than it may
├── EntryLost                                  a stored residual that the plan promised is gone
├── StaleLease                                 a lease of a store, or of a holder, that is no more
└── RunCancelled                               the run was stopped on request
"""

from collections.abc import Sequence


class EditRayError(Exception):
    """The root of all errors that edit_ray raises on purpose."""


class ConfigError(EditRayError, ValueError):
    """One or more mistakes in a configuration; `problems` holds one sentence per mistake."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class ModelError(EditRayError, ValueError):
    """A model path that is neither `builtin:…`, nor a diffusers folder, nor a reachable hub id, or not a Wan model."""


class RunExists(EditRayError, ValueError):
    """The run id is taken; nothing is overwritten."""


class UnknownRun(EditRayError, LookupError):
    """No run has this id."""


class ResourcesUnavailable(EditRayError):
    """The Ray cluster does not have, or does not free in time, what the actors ask for."""


class ActorVersionMismatch(EditRayError):
    """The living actors were started from another version of edit_ray."""


class SegmentFailed(EditRayError):
    """A segment failed more often than `engine.segment_retries` allows."""


class EntryLost(EditRayError):
    """A residual that the reuse plan promised to a segment cannot be had."""


class StaleLease(EditRayError):
    """Someone speaks of a segment that was given to another, or by a store that lives no more."""


class RunCancelled(EditRayError):
    """The run was stopped on request."""
