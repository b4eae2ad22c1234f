"""Every error that users can meet, each with one clear sentence.

EditRayError
├── ConfigError            (also ValueError)   the configuration is wrong: every mistake at once
├── ModelError             (also ValueError)   a path that is no usable Wan model
├── RunExists              (also ValueError)   a run id that is taken
├── RunLive                (also ValueError)   a run that must have ended first
├── NotYourRun             (also ValueError)   a run of another owner
├── RunLocked              (also ValueError)   a run that another process works on
├── ManifestUnreadable     (also ValueError)   a manifest that is damaged, or of another version
├── HardwareDiffers        (also ValueError)   a run that would go on with other bits
├── RunDamaged             (also ValueError)   a run whose committed files are not as they were written
├── UnknownRun             (also LookupError)  a run id that nobody knows
├── RunFolderGone                              a run's folder vanished while it was at work
├── SegmentGone            (also LookupError)  a segment whose files were dropped to make room
├── ResourcesUnavailable                       the cluster lacks what the actors need
│   ├── HostMemoryShort                        a node has too little memory for the host tier
│   └── NoPlace                                no node has what a GPU actor needs
├── ActorVersionMismatch                       living actors run other code than the caller
├── SegmentFailed                              a segment failed more often than it may
├── OutOfMemory                                the GPU's memory does not do, even when all else has left it
├── EntryLost                                  a stored residual that the plan promised is gone
│   └── StoreDied                              the store that had it is no more
├── StaleLease                                 a lease of a store, or of a holder, that is no more
├── StaleWork                                  work for a life of a run that is over
├── NotAdopted                                 work for a run of which a GPU actor was not told
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


class RunLive(EditRayError, ValueError):
    """The run is at work, and what was asked for needs one that has ended."""


class NotYourRun(EditRayError, ValueError):
    """The run belongs to another owner; `force` acts on it anyway."""


class RunLocked(EditRayError, ValueError):
    """Another process works on the run."""


class ManifestUnreadable(EditRayError, ValueError):
    """A manifest is damaged, cut off at its beginning, or of a version that is not known here."""


class HardwareDiffers(EditRayError, ValueError):
    """A run would go on where its bits would be others: another device, library, thread count or mode."""


class RunDamaged(EditRayError, ValueError):
    """Committed files of a run are missing, or are not as they were written."""


class RunFolderGone(EditRayError):
    """A run's folder was removed or replaced while the run was at work."""


class UnknownRun(EditRayError, LookupError):
    """No run has this id."""


class SegmentGone(EditRayError, LookupError):
    """The segment was made, and its files were dropped to make room."""


class ResourcesUnavailable(EditRayError):
    """The Ray cluster does not have, or does not free in time, what the actors ask for."""


class HostMemoryShort(ResourcesUnavailable):
    """A node has too little memory for `store.host_bytes`; another attempt would find no more."""


class NoPlace(ResourcesUnavailable):
    """No node of the cluster has free what a GPU actor needs."""


class ActorVersionMismatch(EditRayError):
    """The living actors were started from another version of edit_ray."""


class SegmentFailed(EditRayError):
    """A segment failed more often than `engine.segment_retries` allows."""


class OutOfMemory(EditRayError):
    """The GPU's memory does not do for a segment, even when everything else has left it."""


class EntryLost(EditRayError):
    """A residual that the reuse plan promised to a segment cannot be had."""


class StoreDied(EntryLost):
    """The store died that was to bring residuals, or to keep them."""


class StaleLease(EditRayError):
    """Someone speaks of a segment that was given to another, or by a store that lives no more."""


class StaleWork(EditRayError):
    """Work was asked for by a segment scheduler that lives no more."""


class NotAdopted(EditRayError):
    """A GPU actor was started again, and nobody has told it of the run yet."""


class RunCancelled(EditRayError):
    """The run was stopped on request."""
