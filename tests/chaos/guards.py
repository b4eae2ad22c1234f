"""Removes every sync, every comparison of digests and every guard in turn; an experiment must fail each time.

python tests/chaos/guards.py [WORD] prints a table, of those only whose name has WORD; JOBS=8 tries eight at a time. A
guard without which nothing fails is a survivor: it is needless, or no experiment covers it; the exit code is then 1.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("edit_ray", "tests", "jobs", "configs", "examples", "pyproject.toml")
SYNC = re.compile(r"^( +)(?:files\.)?(?:disk\.f)?sync\((?!keys).*\)$", re.MULTILINE)

POWER = "tests/unit/test_power_loss.py"
PROOFS_OF_SYNCS = {
    "tiers/disk_tier.py": "tests/unit/test_tier_service.py -k synced",
    "runs/folder.py": "tests/unit/test_folder.py tests/unit/test_actors_branches.py -k 'durable or loss_of_power'",
    "video/hls.py": "tests/unit/test_stream_files.py -k loss_of_power",
    "files.py": f"tests/unit/test_folder.py {POWER}",
    "runs/manifest_file.py": f"tests/unit/test_folder.py tests/unit/test_manifest.py {POWER}",
}
"""What proves a module's syncs, where it is not the loss of power in a whole run alone."""


@dataclass(frozen=True)
class Guard:
    """A place in the package, what stands there without the guard, and the tests that fail then."""

    name: str
    module: str
    place: slice
    instead: str
    tests: str


def syncs() -> list[Guard]:
    """Every call that makes something durable, as a statement that does nothing."""
    found = []
    for path in sorted((ROOT / "edit_ray").rglob("*.py")):
        module, source = path.relative_to(ROOT / "edit_ray").as_posix(), path.read_text()
        for match in SYNC.finditer(source):
            line = source.count("\n", 0, match.start()) + 1
            name, tests = f"{match[0].strip()}, line {line}", PROOFS_OF_SYNCS.get(module, POWER)
            found.append(Guard(name, module, slice(*match.span()), f"{match[1]}pass", tests))
    return found


def replaced(name: str, module: str, old: str, new: str, tests: str) -> Guard:
    """A guard that is replaced by a text; the old one must be there exactly once."""
    source = (ROOT / "edit_ray" / module).read_text()
    if source.count(old) != 1:
        raise SystemExit(f"{name}: {module} has {source.count(old)} times {old!r}")
    start = source.index(old)
    return Guard(name, module, slice(start, start + len(old)), new, f"tests/unit/{tests}")


def guards() -> list[Guard]:
    return [
        replaced(
            "a draft's random name", "files.py", "{secrets.token_hex(8)}", "{os.getpid()}", "test_folder.py -k pids"
        ),
        replaced("O_EXCL", "files.py", "| os.O_EXCL", "", "test_folder.py -k link"),
        replaced("a draft that failed goes", "files.py", "disk.unlink(draft.path)", "pass", "test_folder.py -k failed"),
        replaced("a torn line gets its end", "files.py", 'b"\\n" * torn + line', "line", "test_event_log.py"),
        replaced(
            "short writes go on", "files.py", "while done < len(data):", "if done < len(data):", "test_event_log.py"
        ),
        replaced(
            "short reads go on",
            "files.py",
            "while done < size and",
            "if done < size and",
            "test_folder.py -k some_bytes",
        ),
        replaced(
            "only events are read",
            "runs/event_log.py",
            "return event if valid else None",
            "return event",
            "test_event_log.py -k no_event",
        ),
        replaced(
            "the log fails nobody",
            "runs/event_log.py",
            "with suppress(OSError):",
            "if True:",
            "test_event_log.py -k log",
        ),
        replaced(
            "drafts of the dead go", "runs/folder.py", "files.remove_drafts(self.path / name)", "pass", "test_folder.py"
        ),
        replaced(
            "what is being made stays",
            "runs/folder.py",
            "files.disk.lock(manifest)",
            "pass",
            "test_folder.py -k making",
        ),
        replaced(
            "litter must be old",
            "runs/folder.py",
            "if path.stat(follow_symlinks=False).st_mtime < before:",
            "if True:",
            "test_folder.py -k young",
        ),
        replaced("litter goes", "runs/folder.py", "_remove_litter(root,", "(lambda *_: None)(root,", "test_folder.py"),
        replaced(
            "a taken id", "runs/folder.py", "if self.path.exists():", "if False:", "test_folder.py -k overwritten"
        ),
        replaced(
            "the manifest's lock", "runs/manifest_file.py", "files.disk.lock(descriptor)", "pass", "test_folder.py"
        ),
        replaced(
            "an end is tried again", "actors/live_run.py", "END_ATTEMPTS = 3", "END_ATTEMPTS = 1", "test_one_failure.py"
        ),
        replaced(
            "a fragment's head last",
            "video/hls.py",
            "files.write_all(stream, fragment[_BOX_HEADER:], self._bytes + _BOX_HEADER)",
            "files.write_all(stream, fragment, self._bytes)",
            "test_stream_files.py -k midst",
        ),
        replaced(
            "half a fragment is cut off",
            "video/hls.py",
            "files.disk.truncate(stream, self._bytes)  #",
            "pass  #",
            "test_stream_files.py -k torn_write",
        ),
        replaced(
            "what is not committed is cut off",
            "video/hls.py",
            "files.disk.truncate(stream, self._bytes)\n            files.disk.fsync(stream)\n        return",
            "files.disk.fsync(stream)\n        return",
            "test_stream_files.py -k never_shrinks",
        ),
        replaced(
            "a stream without its last fragment",
            "video/hls.py",
            "if files.read_at(stream, self._bytes - len(last), len(last)) != last:",
            "if False:",
            "test_stream_files.py -k not_copied",
        ),
        replaced(
            "an entry's URI last",
            "video/hls.py",
            "{lines[:uri]}#{lines[uri + 1 :]}",
            "{lines}",
            "test_stream_files.py -k midst",
        ),
        replaced(
            "a playlist that is not as it was told",
            "video/hls.py",
            "and self._size_of(name) == self._listed",
            "",
            "test_stream_files.py -k has_cut",
        ),
        replaced(
            "one init for all",
            "video/fragments.py",
            "elif files.read_bytes(path) != init:",
            "elif False:",
            "test_video.py test_stream_files.py".replace(" ", " tests/unit/"),
        ),
        replaced(
            "an entry's checksum",
            "tiers/disk_tier.py",
            "xxh3_64_hexdigest(into[: entry.nbytes]) == entry.checksum",
            "True",
            "test_disk_damage.py",
        ),
        replaced(
            "an entry's header",
            "tiers/disk_tier.py",
            "if header != expected:",
            "if False:",
            "test_disk_damage.py",
        ),
        replaced(
            "an entry's length",
            "tiers/entry_file.py",
            "st_size == size and",
            "st_size >= 0 and",
            "test_disk_files.py -k another_size",
        ),
        replaced(
            "latents made again are compared",
            "actors/denoiser.py",
            "not torch.equal(latents, load_latents(spec.latents(segment.index)))",
            "False",
            "test_actors_reuse.py",
        ),
        replaced(
            "work of an earlier incarnation",
            "actors/gpu_work.py",
            "known.incarnation > spec.incarnation",
            "False",
            "test_actors_guards.py -k earlier_life",
        ),
        replaced(
            "a line's checksum",
            "runs/manifest_lines.py",
            "int(head[1], 16) == zlib.crc32(view[begin + _BODY : end])",
            "True",
            "test_manifest.py -k changed",
        ),
        replaced(
            "a manifest that was replaced",
            "runs/manifest_file.py",
            "if there is None or (there.st_ino, there.st_dev) != (mine.st_ino, mine.st_dev):",
            "if there is None:",
            "test_manifest.py -k gone_is_noticed",
        ),
        replaced(
            "a run that another one has opened",
            "runs/manifest_file.py",
            "if self.manifest.incarnation > self._incarnation:",
            "if False:",
            "test_manifest.py -k lost_the_lock",
        ),
        replaced(
            "only one's own bytes are taken back",
            "runs/manifest_file.py",
            "if written and text.startswith(written):",
            "if True:",
            "test_manifest.py -k own_bytes",
        ),
        replaced(
            "latents that are not committed",
            "actors/folder_state.py",
            'stats.get("latents_xxh3", found) == found',
            "True",
            "test_integrity.py -k not_committed",
        ),
        replaced(
            "files of segments",
            "actors/folder_state.py",
            "found != record.digests.get(name, found)",
            "False",
            "test_integrity.py -k damaged_is_named",
        ),
        replaced(
            "the init",
            "actors/folder_state.py",
            'init != record.digests.get("init", init)',
            "False",
            "test_integrity.py -k init.mp4 -m slow",
        ),
        replaced(
            "the configuration",
            "actors/folder_state.py",
            "_digest(folder.run_yaml) != known",
            "False",
            "test_integrity.py -k edited_configuration",
        ),
        replaced(
            "the whole video",
            "actors/folder_state.py",
            "_digest(folder.final) != final",
            "False",
            "test_integrity.py -k mended_too",
        ),
        replaced(
            "the stream is its fragments",
            "actors/folder_state.py",
            "not _is_joined(stream, [folder.init, *media])",
            "False",
            "test_integrity.py -k mended_too",
        ),
        replaced(
            "what is made again has the digests that were committed",
            "actors/stages.py",
            "made[name] != record.digests.get(name, made[name])",
            "False",
            "test_integrity.py -k no_repair",
        ),
        replaced(
            "the weights that are loaded",
            "actors/gpu_work.py",
            "self._weights != weights_digest(spec.config.model)",
            "False",
            "test_integrity.py -k other_weights",
        ),
        replaced(
            "the hardware that a run was begun on",
            "actors/folder_state.py",
            "before[name] != here[name]",
            "False",
            "test_integrity.py -k edited_configuration",
        ),
    ]


def survives(guard: Guard) -> bool:
    """Whether the tests pass in a copy of the package without the guard."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        path = copy / "edit_ray" / guard.module
        whole = path.read_text()
        path.write_text(whole[: guard.place.start] + guard.instead + whole[guard.place.stop :])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(guard.tests)],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": f"{copy}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{guard.name}: the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main(word: str = "") -> int:
    chosen = [guard for guard in (*syncs(), *guards()) if word in f"{guard.module} {guard.name}"]
    survivors = 0
    with ThreadPoolExecutor(int(os.environ.get("JOBS", "1"))) as pool:
        for guard, alive in zip(chosen, pool.map(survives, chosen), strict=True):
            survivors += alive
            print(f"{'SURVIVES' if alive else 'noticed':9} {guard.module:28} {guard.name}", flush=True)
    print(f"{len(chosen)} guards, {survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
