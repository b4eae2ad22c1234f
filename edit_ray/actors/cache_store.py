"""The CacheStore actor: the host and disk tiers of residuals, for all runs of one GPU actor."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from edit_ray.actors.messages import code_version, run_key
from edit_ray.errors import ConfigError, EditRayError, StaleLease
from edit_ray.metrics.catalog import LABELS
from edit_ray.metrics.collect import SeriesId, Snapshot, series
from edit_ray.runs.folder import RunFolder
from edit_ray.tiers.arena import make_arena, remove_stale
from edit_ray.tiers.disk_tier import DiskTier, EntryFolder, FolderTaken, FolderUnusable
from edit_ray.tiers.options import StoreOptions, on_this_node
from edit_ray.tiers.protocol import Lease, Op
from edit_ray.tiers.reuse_plan import Key, Uses
from edit_ray.tiers.service import TABLES_BYTES, TierService
from edit_ray.tiers.slots import divide

CLEANING_PAUSES_S = (0.02, 0.1)  # before each retry


class CacheStoreActor:
    """Owns the arena and the disk tier, from the first run that reuses residuals until its end.

    It knows keys and bytes, and of runs their ids and whether they have ended. It never holds a CUDA context.
    """

    def __init__(self, worker: int = 0) -> None:
        """`worker` is the number of the GPU actor beside it. Each has its own folder for its disk tier."""
        self._worker = worker
        self._tiers: TierService | None = None
        self._made_for: tuple[StoreOptions, Path, dict[int, int]] | None = None
        self._root: Path | None = None  # of the runs
        self._runs: set[str] = set()
        self._life = secrets.token_hex(8)  # the incarnation of this actor's snapshots
        self._counts: Counter[SeriesId] = Counter()  # of the tiers, as read last
        self._earlier: Counter[SeriesId] = Counter()  # of tiers that are closed, and of the actor itself
        self._lock = threading.Lock()

    def describe(self) -> dict[str, str | int]:
        return {"version": code_version(), "pid": os.getpid()}

    def metrics(self) -> Snapshot:
        """All counts since the actor's start, and what its tiers hold now."""
        with self._lock:
            gauges = self._read_stats()
            return Snapshot(self._life, self._earlier + self._counts, gauges)

    def _read_stats(self) -> dict[SeriesId, float]:
        """Read the tiers' counts; returns their gauges. Failed tiers hold nothing."""
        if self._tiers is None or self._tiers.failed:
            return {}
        stats = self._tiers.statistics()
        counts = {**stats["counts"], ("refusals", "stale_lease"): stats["stale_leases"]}
        counts |= {("tier_move_seconds", move): seconds for move, seconds in stats["move_seconds"].items()}
        counts |= {("disk_faults", fault): number for fault, number in stats["faults"].items()}
        self._counts = Counter(
            {(f"edit_ray_{name}_total", tuple(labels), ""): value for (name, *labels), value in counts.items()}
        )
        names = {"bytes": "bytes", "budget_bytes": "budget_bytes", "peak_bytes": "peak_bytes", "entries_in": "entries"}
        gauges = {
            series(f"edit_ray_tier_{name}", tier=tier): stats[key].get(tier, 0)
            for key, name in names.items()
            for tier in LABELS["tier"]
        }
        return {of: value for of, value in gauges.items() if value is not None}

    def follow(
        self,
        run_id: str,
        uses: Uses,
        demand: Mapping[int, int],
        segment: int,
        options: StoreOptions,
        directory: Path,
        root: Path,
    ) -> None:
        """Begin a run, or resume it at `segment`. Creates the tiers if there are none for these options.

        Entries of ended runs that are found on disk are dropped.

        Args:
            run_id: The run's name in the keys of its entries.
            uses: Which segments read which entries, and in which order.
            demand: How many entries of each size, in bytes, a segment works on.
            segment: The run's next segment.
            options: The sizes of the tiers.
            directory: The folder of the disk tier; every CacheStore actor but the first has a folder inside it.
            root: The folder that holds the runs' folders.

        Raises:
            ConfigError: the tiers cannot be created.
            HostMemoryShort: there is too little memory.
        """
        slots = divide(options.host_bytes, demand) if demand else {}
        with self._lock:
            if self._tiers is None or self._tiers.failed or self._made_for != (options, directory, slots):
                self._close()
                self._tiers, self._made_for = self._make(options, directory, slots), (options, directory, slots)
                self._root = root
                self._drop_ended(self._tiers, followed=run_id)
                self._remove_left(directory, lambda name: name != run_id and not _goes_on(root, name, run_id))
            for replaced in [other for other in self._runs - {run_id} if _id_of(other) == _id_of(run_id)]:
                self._tiers.drop_run(replaced)
                self._runs.discard(replaced)
            self._tiers.follow(uses, segment)
            self._runs.add(run_id)

    def prepare(self, run_id: str, segment: int, attempt: int, holder: str, ops: Sequence[Op]) -> Lease:
        """`TierService.prepare`. Raises StaleLease if this incarnation does not follow the run."""
        return self._of(run_id).prepare(run_id, segment, attempt, holder, ops)

    def complete(self, run_id: str, segment: int, attempt: int, holder: str, store: str) -> dict[str, Any]:
        """`TierService.complete`; returns the tiers' statistics."""
        tiers = self._of(run_id)
        try:
            tiers.complete(run_id, segment, attempt, holder, store)
        except OSError as error:
            if error.filename is not None and self._made_for is not None:  # the user knows the configured folder
                error.filename, error.filename2 = str(self._made_for[1]), None
            raise
        return tiers.statistics()

    def missing(self, run_id: str, keys: Sequence[Key]) -> list[Key]:
        """`TierService.missing`."""
        return self._of(run_id).missing(keys)

    def give_up(self, run_id: str, holder: str) -> None:
        """`TierService.give_up`; an unknown run holds nothing."""
        with suppress(StaleLease):
            self._of(run_id).give_up(run_id, holder)

    def drop_run(self, run_id: str, directory: Path | None = None) -> None:
        """Drop all entries of a run, if it is known. After the last run the memory is released.

        `directory` is the disk tier's, in which a run that began with another CacheStore actor has left entries.
        """
        with self._lock:
            if self._tiers is not None and self._tiers.failed:
                self._close()
            if self._tiers is not None:
                self._tiers.drop_run(run_id)
            if directory is not None:
                self._remove_left(directory, lambda name: name == run_id)
            self._runs.discard(run_id)
            if not self._runs:
                if self._tiers is not None:
                    self._drop_ended(self._tiers, followed=run_id)
                self._close()
                with suppress(OSError):  # arenas of killed incarnations
                    remove_stale()

    def close(self) -> None:
        """Release the memory; entries on disk stay."""
        with self._lock:
            self._close()

    def _disk_tier(self, directory: Path, allow_tmpfs: bool) -> DiskTier:
        """In this actor's folder on this node, or in the first below it that no other store has open."""
        here = on_this_node(directory)
        own = here / f"worker-{self._worker}" if self._worker else here
        folders = chain([own], (own / f"other-{number}" for number in count(1)))
        while True:
            with suppress(FolderTaken):
                return DiskTier(next(folders), allow_tmpfs=allow_tmpfs)

    def _make(self, options: StoreOptions, directory: Path, slots: Mapping[int, int]) -> TierService:
        try:
            disk = self._disk_tier(directory, options.allow_tmpfs)
        except FolderUnusable as error:
            raise ConfigError([f"store.directory is {str(directory)!r}, {error.why}"]) from None
        except ValueError as error:  # of `on_this_node`
            raise ConfigError([f"store.directory is {str(directory)!r}, {error}"]) from None
        except OSError as error:
            raise ConfigError([f"store.directory is {str(directory)!r}, which fails: {error.strerror}."]) from None
        try:
            size = sum(size * number for size, number in slots.items()) + TABLES_BYTES
            return TierService(make_arena(size, options.shared_memory), slots, disk, options.disk_bytes)
        except BaseException:
            disk.close()
            raise

    def _drop_ended(self, tiers: TierService, followed: str) -> None:
        """Drop the entries of ended runs, such as one that moved to another CacheStore actor."""
        for name in _runs_in(tiers.disk.files):
            if name != followed and self._root is not None and not _goes_on(self._root, name, followed):
                tiers.drop_run(name)

    def _remove_left(self, directory: Path, unwanted: Callable[[str], bool]) -> None:
        """Remove the entries of unwanted runs from this node's folders that no store has open."""
        with suppress(ValueError, OSError):  # there is no such folder on this node, or it cannot be read
            here = on_this_node(directory)
            folders = [*here.glob("worker-*/other-*"), *here.glob("worker-*"), *here.glob("other-*"), here]
            for pause_s in (*CLEANING_PAUSES_S, None):  # a read may fail once, or another actor clean up too
                folders = [folder for folder in folders if folder.is_dir() and not _cleaned(folder, unwanted)]
                if not folders or pause_s is None:
                    return
                time.sleep(pause_s)

    def _of(self, run_id: str) -> TierService:
        with self._lock:
            if self._tiers is None or self._tiers.failed or run_id not in self._runs:
                self._earlier[series("edit_ray_refusals_total", refusal="stale_lease")] += 1
                raise StaleLease(f"This CacheStore actor does not follow the run {run_id!r}.")
            return self._tiers

    def _close(self) -> None:
        with suppress(StaleLease):  # the tiers' thread has failed meanwhile
            self._read_stats()
        self._earlier.update(self._counts)  # adds them
        self._counts = Counter()
        tiers, self._tiers, self._made_for = self._tiers, None, None
        self._runs.clear()
        if tiers is not None:
            tiers.close()


def _cleaned(folder: Path, unwanted: Callable[[str], bool]) -> bool:
    """Remove the entries of unwanted runs; False if a file stays or a store has the folder open."""
    try:
        with closing(EntryFolder(folder, allow_tmpfs=True)) as files:
            names = set(filter(unwanted, _runs_in(files)))
            for key in [key for key in files.entries() if key and str(key[0]) in names]:
                files.remove(files.drop(key))
            return files.faults["remove"] == 0
    except (FolderUnusable, OSError):
        return False


def _runs_in(files: EntryFolder) -> set[str]:
    return {str(key[0]) for key in files.entries() if key}


def _goes_on(root: Path, residuals_id: str, followed: str) -> bool:
    """Whether another run than the one followed may be resumed: it has not ended. Both are `RunSpec.residuals_id`."""
    run_id = _id_of(residuals_id)
    if run_id == _id_of(followed):
        return False  # an earlier run of that name, or an earlier plan
    try:
        manifest = RunFolder(root, run_id).read_manifest()
    except (EditRayError, ValueError, OSError):
        return False
    return manifest.end is None and residuals_id.startswith(run_key(run_id, manifest.begun.submission) + ".")


def _id_of(residuals_id: str) -> str:
    """The run id in a `RunSpec.residuals_id`; ids have no dots."""
    return residuals_id.partition(".")[0]
