"""Which runs a GPU actor works for, and in which of their lives."""

from __future__ import annotations

from edit_ray.actors.messages import RunSpec
from edit_ray.errors import NotAdopted, RunCancelled, StaleWork


class Adoption:
    """One run of each id at a time: the one of which this process was told last."""

    def __init__(self) -> None:
        self._adopted: dict[str, RunSpec] = {}
        self._stopped: set[str] = set()

    def of(self, run_id: str) -> RunSpec | None:
        """The run of this id, as it was adopted last."""
        return self._adopted.get(run_id)

    def adopt(self, spec: RunSpec) -> None:
        """Works on the run for this incarnation from now on, unless it does already, or for a later one."""
        known = self._adopted.get(spec.run_id)
        if known is None or known.key != spec.key or known.incarnation < spec.incarnation:
            self._adopted[spec.run_id] = spec
            self._stopped.discard(spec.run_id)

    def stop(self, run_id: str) -> None:
        """`check` refuses the run until it is adopted again."""
        self._stopped.add(run_id)

    def forget(self, run_id: str) -> None:
        """The run has ended."""
        self._adopted.pop(run_id, None)
        self._stopped.discard(run_id)

    def check(self, spec: RunSpec) -> None:
        """Raises NotAdopted, StaleWork or RunCancelled where nobody waits for this run's work."""
        known = self._adopted.get(spec.run_id)
        if known is None:
            raise NotAdopted(f"this GPU actor was not told of the run {spec.run_id}")
        if known.key != spec.key:
            raise StaleWork(f"the run id {spec.run_id} belongs to another run now")
        if known.incarnation > spec.incarnation:
            raise StaleWork(f"run {spec.run_id} lives in a later incarnation than {spec.incarnation}")
        if spec.run_id in self._stopped:
            raise RunCancelled(f"run {spec.run_id} was stopped")
