"""Which files of a run are not as they were committed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from edit_ray.files import digest_of_file
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Manifest, SegmentRecord

Damage = Mapping[Path, tuple[int, str]]
"""Each damaged file with the first segment that needs it, and what is wrong with it."""

_CHUNK = 4 << 20
_NAMED = 3  # files that a refusal names


def damage_of(folder: RunFolder, manifest: Manifest) -> Damage:
    """The damaged files among those that the video is made of. Reads all of them.

    Of segments before `dropped_before` latents may be gone; segments of earlier versions have no digests, and their
    files must only be there.
    """
    init = _digest(folder.init)
    return {
        path: (record.index, wrong)
        for record in manifest.segments
        for path, wrong in _wrong_of(folder, record, manifest.dropped_before, init)
    }


def all_damage_of(folder: RunFolder, manifest: Manifest) -> list[str]:
    """A sentence for each damaged file, of earlier takes as well and of the video as a whole."""
    init, known = _digest(folder.init), manifest.provenance.get("config")
    found = [f"{path} {wrong}" for path, (_, wrong) in damage_of(folder, manifest).items()]
    if known is not None and _digest(folder.run_yaml) != known:
        found.append(f"{folder.run_yaml} is not as it was when the run was last begun or gone on with")
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


def _is_joined(path: Path, parts: Sequence[Path]) -> bool:
    """Whether a file holds what the parts hold, one after the other."""
    try:
        with path.open("rb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    while data := file.read(_CHUNK):
                        if whole.read(len(data)) != data:
                            return False
            return not whole.read(1)
    except OSError:
        return False


def refusal(run_id: str, damaged: Damage) -> str:
    """One sentence: what is damaged, and what can be done."""
    said = [f"{path} {wrong}" for path, (_, wrong) in list(damaged.items())[:_NAMED]]
    more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
    return (
        f"run {run_id!r} is damaged: {', '.join(said)}{more}; `edit-ray resume {run_id} --remake-damaged` makes what "
        "does not match again"
    )


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
    """None where the file cannot be read."""
    try:
        return f"{digest_of_file(path):016x}"
    except OSError:
        return None
