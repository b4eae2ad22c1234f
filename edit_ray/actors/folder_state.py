"""What a run's folder says about how the run may start or continue: hardware, segments, damage, disk space."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from edit_ray.actors.messages import RunSpec
from edit_ray.config import check_texts, load_config
from edit_ray.config.causal_checks import chunk_sizes
from edit_ray.engine.model_info import read_model_info
from edit_ray.errors import ConfigError, HardwareDiffers, ResourcesUnavailable
from edit_ray.files import digest_of_file
from edit_ray.runs.causal_plan import segments_seen
from edit_ray.runs.event_log import latest_events
from edit_ray.runs.folder import RunFolder, remove_run
from edit_ray.runs.ids import MAX_SEGMENTS
from edit_ray.runs.manifest import Extended, Manifest, Rerolled, SegmentRecord
from edit_ray.runs.retention import BITS_PER_PIXEL, first_made_again, first_needed, shortage
from edit_ray.runs.run_plan import Take, take_seed
from edit_ray.runs.scheduler import LEAD

Provenance = Mapping[str, str | int]
"""What a run's bits depend on: hardware, versions, digests of its configuration and model."""

Change = Callable[[Manifest, RunSpec], Extended | Rerolled]
"""Makes the first line of the next incarnation: an extension or a re-roll of an ended run."""

Damage = Mapping[Path, tuple[int, str]]
"""Each damaged file with the first segment that needs it, and what is wrong with it."""

_NAMED = 3  # files that a refusal names
_ENDLESS = 100  # segments that must fit on the disk for a run without an end
_SAID = {
    "config": "run.yaml was edited",
    "model": "the model's files are others than those it was begun with",
    "loras": "its LoRA files are others than those it was begun with",
    "pictures": "its pictures are others than those it was begun with",
}


# Hardware.


def differing(before: Provenance, here: Provenance) -> list[str]:
    """The names of values that are known of both and differ."""
    return [name for name in before if name in here and before[name] != here[name]]


def check_same(run_id: str, before: Provenance, here: Provenance) -> None:
    """Raise HardwareDiffers, which names what differs."""
    if names := differing(before, here):
        said = ", ".join(_SAID.get(name, f"{name} was {before[name]!r} and is {here[name]!r}") for name in names)
        raise HardwareDiffers(
            f"run {run_id!r} would not keep its bits here: {said}; --allow-different-hardware continues anyway"
        )


# Segments that exist.


def denoised_before(spec: RunSpec, committed: int) -> list[dict[str, float]]:
    """The statistics of the segments after the committed ones that need not be denoised again.

    Their latents are what this run would make now: of this take, after as many edits, under this plan of reuse. The
    event log says that a segment was made only once all its other files are durable. If segments are denoised from
    frames, the latest one is denoised again in any case: its predecessor's frames may be decoded in tiles from now on.
    """
    made: dict[tuple[int | None, int | None, int, str], dict[str, float]] = {}
    for event in latest_events(spec.folder.events, "segment_made"):
        index = event.get("segment")
        if index is not None and index < committed:  # later segments have later events
            break
        of = index, event.get("take"), event.get("edits", 0), str(event.get("plan"))
        made.setdefault(of, event.get("figures", {}))
    found: list[dict[str, float]] = []
    for index in range(committed, committed + LEAD):
        edits = spec.storyboard.edits_of(index)
        stats = made.get((index, spec.segment(index).take, edits, spec.residuals_id))
        if not stats or not _is_as_made(spec.latents(index), stats):
            break
        found.append(stats)
    return found[:-1] if spec.layout.denoise_needs_frames else found


def _is_as_made(latents: Path, stats: dict[str, float]) -> bool:
    """Whether the latents have the digest of the event; earlier versions wrote none."""
    try:
        found = digest_of_file(latents)
    except OSError:
        return False
    return stats.get("latents_xxh3", found) == found


def last_worker(spec: RunSpec) -> int | None:
    """The GPU actor that worked on the run last; None if none has."""
    return next(latest_events(spec.folder.events, "gpu_actor"), {}).get("worker")


def can_be_made(spec: RunSpec, segment_index: int) -> bool:
    """Whether the latents exist that a segment continues and its decoder looks back at. Raises ModelError."""
    if spec.config.output.keep_segments is None or not spec.layout.one_stream:
        return True
    info = read_model_info(spec.config.model.path)
    needed = spec.layout.history_latents + info.lookback_latents
    before = {*range(first_needed(segment_index, needed, spec.layout), segment_index)}
    if info.causal is not None:
        before |= {*segments_seen(spec.storyboard, segment_index, chunk_sizes(spec.config, info.causal))}
    return all(spec.latents(index).exists() for index in before)


def can_be_made_again(spec: RunSpec, committed: int) -> bool:
    """Whether the committed segments whose residuals later ones reuse can be made again. Raises ModelError."""
    first = first_made_again(committed, spec.config.cache.reuse_window, spec.planned_from)
    exist = all(spec.latents(index).exists() for index in range(first, committed))
    return first == committed or (exist and can_be_made(spec, first))


# What a run may change.


def extension(segments: int, manifest: Manifest, spec: RunSpec) -> Extended:
    """`segments` more. Raises ConfigError."""
    if (last := spec.config.prompt_segments[-1].last_image) is not None:
        raise ConfigError([f"the run ends with {last!r} (last_image of its last prompt), and nothing follows an end"])
    if manifest.num_segments is None:
        raise ConfigError(["the run continues until it is stopped (video.num_segments is null); resume it instead"])
    most = MAX_SEGMENTS - manifest.num_segments
    if not 1 <= segments <= most:
        raise ConfigError([f"--segments is {segments}; it must be from 1 to {most}"])
    return Extended(manifest.incarnation + 1, manifest.num_segments + segments, replans=False)


def reroll(start: int, seed: int | None, prompt: str | None, manifest: Manifest, spec: RunSpec) -> Rerolled:
    """Another take from segment `start` on, its seed derived if None. Raises ConfigError."""
    committed, number = len(manifest.segments), len(manifest.takes) + 1
    first = manifest.dropped_before
    while first < committed and not can_be_made(spec, first):
        first += 1
    problems = []
    if not first <= start < committed:
        valid = f"from {first} to {committed - 1}" if first < committed else "and there is none"
        why = ", as the latents that earlier ones continue were dropped" if first > manifest.dropped_before else ""
        problems.append(f"--from is {start}; it must be a segment that was made and is there, {valid}{why}")
    if seed is not None and not 0 <= seed < 2**63:
        problems.append(f"--seed is {seed}; it must be at least 0 and below 2**63")
    if prompt is not None:
        problems += check_texts(spec.config, {"--prompt": prompt})
    if problems:
        raise ConfigError(problems)
    own = take_seed(spec.config.sampling.seed, number) if seed is None else seed
    return Rerolled(manifest.incarnation + 1, Take(number, start, own, prompt))


# Damaged files.


def damage_of(folder: RunFolder, manifest: Manifest) -> Damage:
    """The damaged files among those that the video is made of. Reads all of them.

    Of segments before `dropped_before` latents may be missing. Segments of earlier versions have no digests, and their
    files need only exist.
    """
    init = _digest(folder.init)
    return {
        path: (record.index, wrong)
        for record in manifest.segments
        for path, wrong in _wrong_of(folder, record, manifest.dropped_before, init)
    }


def all_damage_of(folder: RunFolder, manifest: Manifest) -> list[str]:
    """A sentence for each damaged file, those of earlier takes and of the joined video included."""
    init, known = _digest(folder.init), manifest.provenance.get("config")
    found = [f"{path} {wrong}" for path, (_, wrong) in damage_of(folder, manifest).items()]
    if known is not None and _digest(folder.run_yaml) != known:
        found.append(f"{folder.run_yaml} has changed since the run was last started or resumed")
    for record in manifest.earlier_takes:
        found += [f"{path} {wrong}" for path, wrong in _wrong_of(folder, record, manifest.dropped_before, init)]
    if manifest.end is None:
        return found
    final, stream = manifest.end.final_digest, folder.path / "stream.mp4"
    if final is not None and _digest(folder.final) != final:
        found.append(f"{folder.final} is missing or is not as it was written")
    media = [folder.path / record.media for record in manifest.segments[manifest.dropped_before :]]
    if media and not found and not _is_joined(stream, [folder.init, *media]):
        found.append(f"{stream} does not hold what the segments' files do")
    return found


def refusal(run_id: str, damaged: Damage) -> str:
    """One sentence: what is damaged, and what to do."""
    said = [f"{path} {wrong}" for path, (_, wrong) in list(damaged.items())[:_NAMED]]
    more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
    return (
        f"run {run_id!r} is damaged: {', '.join(said)}{more}; `edit-ray resume {run_id} --remake-damaged` makes what "
        "does not match again"
    )


def _is_joined(path: Path, parts: Sequence[Path]) -> bool:
    """Whether a file holds the bytes of the parts, one after the other."""
    try:
        with path.open("rb") as whole:
            return all(whole.read(len(data)) == data for data in map(Path.read_bytes, parts)) and not whole.read(1)
    except OSError:
        return False


def _wrong_of(
    folder: RunFolder, record: SegmentRecord, dropped_before: int, init: str | None
) -> Iterator[tuple[Path, str]]:
    for name, path in (("latents", folder.path / record.latents), ("media", folder.path / record.media)):
        found = _digest(path)
        if found is None and record.index >= dropped_before:
            yield path, "is missing or cannot be read"
        elif found is not None and found != record.digests.get(name, found):
            yield path, "is not as it was written"
    if record.index >= dropped_before and init != record.digests.get("init", init):
        yield folder.init, "is missing or is not as it was written"


def _digest(path: Path) -> str | None:
    """None if the file cannot be read."""
    try:
        return f"{digest_of_file(path):016x}"
    except OSError:
        return None


# Removal.


def remove_with_residuals(folder: RunFolder) -> None:
    """Remove a run's folder, and what the stores' directory still has of it. Raises as `remove_run`."""
    residuals: list[Path] = []
    with contextlib.suppress(ConfigError):  # an unreadable configuration: stores remove entries that belong to no run
        residuals = list(_residuals_of(folder))
    remove_run(folder)
    for path in residuals:
        path.unlink(missing_ok=True)


def _residuals_of(folder: RunFolder) -> Iterator[Path]:
    """The run's entries on disk, which stay in the store's directory after the loss of a cluster."""
    spec = RunSpec.of(folder.path.parent, load_config(folder.run_yaml, check_model=False), folder.read_manifest())
    if found := list(Path(os.path.expandvars(spec.residuals_directory)).rglob("*.safetensors")):
        from edit_ray.tiers.entry_file import read_key

        yield from (path for path in found if (key := read_key(path)) and str(key[0]).startswith(f"{spec.key}."))


# Disk space.


def shortage_before(spec: RunSpec) -> str | None:
    """A sentence if a new run's output will not fit on its disk. Raises ModelError."""
    info, sampling = read_model_info(spec.config.model.path), spec.config.sampling
    pixels = (sampling.height // info.scale_factor_spatial) * (sampling.width // info.scale_factor_spatial)
    latents = 4 * info.z_dim * spec.layout.latent_frames * pixels
    media = int(sampling.num_frames * sampling.height * sampling.width * BITS_PER_PIXEL / 8)
    return _shortage(spec, 0, latents, media, spec.root)


def shortage_after(spec: RunSpec, records: Sequence[SegmentRecord]) -> str | None:
    """As `shortage_before`, for a run with segments: estimated from the sizes of the latest ones."""
    latest = spec.latents(len(records) - 1)
    latents = latest.stat().st_size if latest.exists() else 0
    media = max(int(record.statistics.get("media_bytes", 0)) for record in records[-8:])
    return _shortage(spec, len(records), latents, media, spec.folder.path)


def is_full(error: BaseException) -> bool:
    """Whether a write failed for lack of disk space."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def usable_disk(root: Path) -> Iterator[None]:
    """Raise ResourcesUnavailable, with a sentence, if the file system refuses an operation of the block."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise ResourcesUnavailable(f"no space is left in {root}; free some, and ask again") from None
        where, why = error.filename or root, error.strerror or str(error)
        raise ResourcesUnavailable(f"{where} cannot be used ({why}); ask again once it can be") from None


def _shortage(spec: RunSpec, committed: int, latents: int, media: int, path: Path) -> str | None:
    to_come = (spec.num_segments - committed) if spec.num_segments is not None else _ENDLESS
    status = os.statvfs(next(folder for folder in (path, *path.parents) if folder.exists()))
    free = status.f_bavail * status.f_frsize
    return shortage(to_come, latents, media, spec.config.output.keep_segments, free)
