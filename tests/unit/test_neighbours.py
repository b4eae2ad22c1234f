"""Clusters that know nothing of each other and share a store's folder, or one of runs: each makes its own frames."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edit_ray.runs.folder import RunFolder
from tests.chaos.neighbours import config_of, make

REPOSITORY = Path(__file__).resolve().parents[2]
APART = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """The video of each seed, made while nobody else was there."""
    root = tmp_path_factory.mktemp("alone")

    def video(seed):
        assert asyncio.run(make(root, f"of-{seed}", config_of(model, seed, root / "store"))) == "done"
        return RunFolder(root, f"of-{seed}").final.read_bytes()

    return {seed: video(seed) for seed in (5, 6)}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("names", [("one", "one"), ("one", "two")], ids=str)
def test_two_clusters_share_a_stores_folder(tmp_path, model, alone, names):
    async def both():
        store = tmp_path / "store"
        runs = zip((5, 6), names, strict=True)
        return await asyncio.gather(
            *(make(tmp_path / str(seed), name, config_of(model, seed, store)) for seed, name in runs)
        )

    assert asyncio.run(both()) == ["done", "done"]
    for seed, name in zip((5, 6), names, strict=True):
        assert RunFolder(tmp_path / str(seed), name).final.read_bytes() == alone[seed]
    assert list((tmp_path / "store").rglob("*.safetensors")) == []


@pytest.mark.slow
def test_equal_process_numbers_in_two_containers_mix_nothing(tmp_path, model, alone):
    """They share the folder of runs and the store's, and each thinks that it is process 1."""
    if shutil.which("unshare") is None or subprocess.run([*APART, "true"], check=False).returncode:
        pytest.skip("needs user namespaces, for processes with numbers of their own")
    command = [*APART, sys.executable, "-m", "tests.chaos.neighbours", str(model), str(tmp_path)]
    both = [
        subprocess.Popen(
            [*command, f"of-{seed}", str(seed), str(tmp_path / "store")],
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for seed in alone
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [out.split() for out, _ in said] == [["1", "done"]] * 2, said
    for seed in alone:
        assert RunFolder(tmp_path, f"of-{seed}").final.read_bytes() == alone[seed]
    assert [path.name for path in tmp_path.rglob("*.safetensors") if "latents" not in str(path)] == []
