"""Whether a run's files are as they were: a resume notices, `verify` says so, `--remake-damaged` mends."""

import asyncio
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.cli.main import main
from edit_ray.errors import HardwareDiffers, RunDamaged
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest_file import ManifestReader
from tests.runs_here import REUSE, config_for, end_of, made, submit
from tests.unit.test_manifest import line_of


class Stopping(LocalPool):
    """Cancels the run as its segment 3 is to be encoded: segments 0 to 2 are committed."""

    def __init__(self):
        super().__init__()
        self.scheduler = SegmentSchedulerActor(self)

    async def denoiser(self, worker, method, *arguments):
        if method == "encode_segment" and arguments[1].index == 3:
            await self.scheduler.cancel("one")
        return await super().denoiser(worker, method, *arguments)


async def stopped(root, config):
    crew = Stopping()
    await submit(crew.scheduler, root, "one", config)
    assert (await end_of(crew.scheduler, "one")).state == "cancelled"
    await crew.end()


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """A run that was cancelled, and what comes of it when it goes on."""
    root = tmp_path_factory.mktemp("undisturbed")
    asyncio.run(stopped(root, config_for(model)))
    shutil.copytree(root / "one", root / "stopped" / "one")
    assert asyncio.run(resumed(root)).state == "done"
    return root


async def resumed(root, **how):
    crew = LocalPool()
    scheduler = SegmentSchedulerActor(crew)
    try:
        status = await scheduler.resume("one", str(root), how.get("allow", False), how.get("remake", False))
        return status if status.ended else await end_of(scheduler, "one")
    finally:
        await crew.end()


@pytest.fixture
def root(undisturbed, tmp_path):
    """A copy of the run as it was when it had been cancelled."""
    shutil.copytree(undisturbed / "stopped", tmp_path, dirs_exist_ok=True)
    return tmp_path


def content(root):
    run = root / "one"
    files = [path for name in ("latents", "segments") for path in (run / name).iterdir()]
    return {path.relative_to(run): path.read_bytes() for path in [*files, run / "stream.mp4", run / "final.mp4"]}


def flip(path, at=-100):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def verified(root, capsys):
    code = main(["--output", str(root), "verify", "one"])
    return code, capsys.readouterr().out


FILES = ["latents/00001-t0.safetensors", "segments/00000-t0.m4s", "segments/00002-t0.m4s", "init.mp4"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "harm", [flip, pytest.param(lambda path: path.unlink(), marks=pytest.mark.slow)], ids=["one bit", "gone"]
)
def test_what_is_damaged_is_named_and_made_again_with_the_same_bytes(root, undisturbed, name, harm, capsys):
    assert verified(root, capsys) == (0, "one is as it was written: 3 segments\n")
    harm(root / "one" / name)
    code, said = verified(root, capsys)
    assert code == 1
    assert name in said
    with pytest.raises(RunDamaged, match=rf"{name} .*--remake-damaged") as error:
        asyncio.run(resumed(root))
    assert "\n" not in str(error.value)
    status = asyncio.run(resumed(root, remake=True))
    assert status.state == "done", status.error
    assert content(root) == content(undisturbed)
    assert verified(root, capsys)[0] == 0


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in FILES),
        "final.mp4",
        "stream.mp4",
        "latents/00003-t0.safetensors",
    ],
)
def test_a_run_that_is_done_is_mended_too(undisturbed, tmp_path, name, capsys):
    shutil.copytree(undisturbed / "one", tmp_path / "one")
    flip(tmp_path / "one" / name, at=(tmp_path / "one" / name).stat().st_size // 3)
    code, said = verified(tmp_path, capsys)
    assert code == 1
    assert name in said
    status = asyncio.run(resumed(tmp_path, remake=True))
    assert status.state == "done", status.error
    assert content(tmp_path) == content(undisturbed)
    assert verified(tmp_path, capsys)[0] == 0


def test_damaged_latents_that_are_not_committed_are_made_again(root, undisturbed):
    latents = root / "one" / "latents" / "00003-t0.safetensors"
    assert latents.exists()
    flip(latents)
    assert asyncio.run(resumed(root)).state == "done"
    assert content(root) == content(undisturbed)


def test_what_a_segment_reused_cannot_be_made_again_alone(tmp_path, model):
    asyncio.run(stopped(tmp_path, config_for(model, **REUSE)))
    flip(tmp_path / "one" / FILES[0])
    status = asyncio.run(resumed(tmp_path, remake=True))
    assert status.state == "failed"
    assert "`edit-ray reroll one --from 1`" in status.error


@pytest.mark.parametrize("name", ["latents", "media"])
def test_what_is_made_again_with_other_bytes_is_no_repair(root, name):
    """The manifest has another digest than what is made: what the run was begun with must have made something else."""
    lines = [json.loads(text) for text in (root / "one" / "manifest.jsonl").read_bytes().splitlines()]
    for values in lines:
        del values["crc"]
        if values["kind"] == "committed" and values["segment"]["index"] == 1:
            values["segment"]["digests"][name] = "0" * 16
    (root / "one" / "manifest.jsonl").write_bytes(b"".join(map(line_of, lines)))
    status = asyncio.run(resumed(root, remake=True))
    assert status.state == "failed"
    assert f"segment 1 was made again, and has other {name}; `edit-ray reroll one --from 1`" in status.error


def test_an_edited_configuration_is_noticed(root, capsys):
    path = root / "one" / "run.yaml"
    path.write_text(path.read_text().replace("seed: 5", "seed: 6"))
    code, said = verified(root, capsys)
    assert (code, "run.yaml" in said) == (1, True)
    with pytest.raises(HardwareDiffers, match=r"run\.yaml was edited"):
        asyncio.run(resumed(root))
    assert asyncio.run(resumed(root, allow=True)).state == "done"
    assert asyncio.run(resumed(root, remake=True)).state == "done", "it goes on with what was allowed"


def test_other_weights_at_the_same_path_are_noticed_and_loaded_anew(tmp_path, model):
    own = tmp_path / "model"
    shutil.copytree(model, own)
    weights = next((own / "transformer").glob("*.safetensors"))

    async def both():
        crew = Stopping()
        await submit(crew.scheduler, tmp_path, "one", config_for(own))
        await end_of(crew.scheduler, "one")
        tensors = load_file(weights)
        name = min(tensors)
        save_file(tensors | {name: tensors[name] * 1.5}, weights, metadata={"format": "pt"})
        with pytest.raises(HardwareDiffers, match="the model's files are others"):
            await crew.scheduler.resume("one", str(tmp_path), False)
        for run_id in ("living", "new"):  # by the actor that has loaded the old ones, and by a new one
            if run_id == "new":
                await crew.end()
                crew = LocalPool()
                crew.scheduler = SegmentSchedulerActor(crew)
            await made(crew.scheduler, tmp_path, run_id, config_for(own))
        await crew.end()

    asyncio.run(both())
    living, new = (RunFolder(tmp_path, run_id) for run_id in ("living", "new"))
    assert living.latents(0).read_bytes() == new.latents(0).read_bytes()
    assert living.latents(0).read_bytes() != RunFolder(tmp_path, "one").latents(0).read_bytes()


def test_a_run_of_an_earlier_version_goes_on(root, undisturbed, capsys):
    """Its manifest knows no digests, and its extensions are lines of their own."""
    path = root / "one" / "manifest.jsonl"
    lines = []
    for text in path.read_bytes().splitlines():
        values = json.loads(text)
        del values["crc"]
        for name in ("owner", "job", "replans", "change", "writer", "final_digest"):
            values.pop(name, None)
        values.get("segment", {}).pop("digests", None)
        for name in ("config", "model", "ffmpeg"):
            values.get("provenance", {}).pop(name, None)
        lines.append(line_of(values | ({"schema": 2} if "schema" in values else {})))
    path.write_bytes(b"".join(lines))
    assert ManifestReader(path).read().begun.schema == 2
    code, said = verified(root, capsys)
    assert (code, "3 of which an earlier version wrote without digests" in said) == (0, True)
    assert asyncio.run(resumed(root)).state == "done"
    assert content(root) == content(undisturbed)
