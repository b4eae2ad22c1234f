"""What an ended run may go on with: more segments, or another take of some."""

from __future__ import annotations

from edit_ray.actors.admission import Change
from edit_ray.actors.kept import can_be_made
from edit_ray.actors.messages import RunSpec
from edit_ray.config import check_texts
from edit_ray.errors import ConfigError
from edit_ray.runs.ids import MAX_SEGMENTS
from edit_ray.runs.manifest import Extended, Manifest, Rerolled
from edit_ray.runs.run_plan import Take, take_seed


def extension(segments: int) -> Change:
    """`segments` more than there were. Raises ConfigError."""

    def change(manifest: Manifest, spec: RunSpec) -> Extended:
        if manifest.num_segments is None:
            raise ConfigError(["the run goes on until it is stopped (video.num_segments is null); resume it instead"])
        most = MAX_SEGMENTS - manifest.num_segments
        if not 1 <= segments <= most:
            raise ConfigError([f"--segments is {segments}; it must be from 1 to {most}"])
        return Extended(manifest.incarnation + 1, manifest.num_segments + segments, replans=False)

    return change


def reroll(start: int, seed: int | None, prompt: str | None) -> Change:
    """Segments from `start` on again; a seed of its own is derived where none is given. Raises ConfigError."""

    def change(manifest: Manifest, spec: RunSpec) -> Rerolled:
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

    return change
