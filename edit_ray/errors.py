"""All errors that edit_ray raises on purpose, each with one clear sentence."""

from collections.abc import Sequence


class EditRayError(Exception):
    """The base class of all errors of edit_ray."""


class ConfigError(EditRayError, ValueError):
    """Mistakes in a configuration; `problems` holds one sentence per mistake."""

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
    """The run is active, and the request needs an ended one."""


class RunEnded(EditRayError, ValueError):
    """The run has ended, and the request needs an active one."""


class NotYourRun(EditRayError, ValueError):
    """The run belongs to another owner; `force` overrides."""


class RunLocked(EditRayError, ValueError):
    """Another process works on the run."""


class ManifestUnreadable(EditRayError, ValueError):
    """A manifest is damaged, truncated at its start, or of an unknown version."""


class HardwareDiffers(EditRayError, ValueError):
    """The run would continue with other bits: another device, library, thread count or mode."""


class RunDamaged(EditRayError, ValueError):
    """Committed files of a run are damaged or missing."""


class RunFolderGone(EditRayError):
    """The folder of an active run was removed or replaced."""


class UnknownRun(EditRayError, LookupError):
    """No run has this id."""


class SegmentGone(EditRayError, LookupError):
    """The segment's files were dropped to save space."""


class ResourcesUnavailable(EditRayError):
    """The Ray cluster lacks resources for the actors, or does not free them in time."""


class HostMemoryShort(ResourcesUnavailable):
    """A node has too little memory for `store.host_bytes`; a retry would not help."""


class NoPlace(ResourcesUnavailable):
    """No node of the cluster has free resources for a GPU actor."""


class ActorVersionMismatch(EditRayError):
    """The living actors were started from another version of edit_ray."""


class SegmentFailed(EditRayError):
    """A segment could not be made: one attempt failed, retries are used up, or nobody works on its run."""


class OutOfMemory(EditRayError):
    """Out of GPU memory for a segment, after everything else was freed."""


class EntryLost(EditRayError):
    """A residual that the reuse plan promised to a segment is lost."""


class StoreDied(EntryLost):
    """The store of the residuals died."""


class StaleLease(EditRayError):
    """The lease of a segment belongs to another holder, or to a store that is gone."""


class StaleWork(EditRayError):
    """The work was requested for an earlier incarnation of the run, or for another run of its id."""


class NotAdopted(EditRayError):
    """A restarted GPU actor does not know the run yet."""


class RunCancelled(EditRayError):
    """The run was stopped on request."""
