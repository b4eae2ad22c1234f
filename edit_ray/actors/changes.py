"""What an ended run may go on with: more segments, or another take of some."""

from __future__ import annotations

from edit_ray.actors.admission import Change
from edit_ray.config import Config, check_texts
from edit_ray.config.options import MAX_SEGMENTS
from edit_ray.errors import ConfigError
from edit_ray.runs.manifest import Extended, Manifest, Rerolled
from edit_ray.runs.plan import Take, take_seed


def extension(segments: int) -> Change:
    """`segments` more than there were. Raises ConfigError."""

    def change(manifest: Manifest, config: Config) -> Extended:
        if manifest.num_segments is None:
            raise ConfigError(["the run goes on until it is stopped (video.num_segments is null); resume it instead"])
        most = MAX_SEGMENTS - manifest.num_segments
        if not 1 <= segments <= most:
            raise ConfigError([f"--segments is {segments}; it must be from 1 to {most}"])
        return Extended(manifest.incarnation + 1, manifest.num_segments + segments)

    return change


def reroll(start: int, seed: int | None, prompt: str | None) -> Change:
    """Segments from `start` on again; a seed of its own is derived where none is given. Raises ConfigError."""

    def change(manifest: Manifest, config: Config) -> Rerolled:
        committed, number = len(manifest.segments), len(manifest.takes) + 1
        problems = []
        if not manifest.dropped_before <= start < committed:
            problems.append(
                f"--from is {start}; it must be a segment that was made and is there, "
                f"from {manifest.dropped_before} to {committed - 1}"
            )
        if seed is not None and not 0 <= seed < 2**63:
            problems.append(f"--seed is {seed}; it must be at least 0 and below 2**63")
        if prompt is not None:
            problems += check_texts(config, {"--prompt": prompt})
        if problems:
            raise ConfigError(problems)
        own = take_seed(config.sampling.seed, number) if seed is None else seed
        return Rerolled(manifest.incarnation + 1, Take(number, start, own, prompt))

    return change
