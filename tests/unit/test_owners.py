"""Runs belong to whoever submitted them: who that is, what is recorded, and what is refused to others."""

import asyncio
import json
import zlib

import pytest

from edit_ray.actors.local import LocalPool
from edit_ray.actors.messages import RunStatus
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.errors import ConfigError
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.ids import Owner, owner_here
from tests.runs_here import config_for, end_of


@pytest.fixture
def begun(tmp_path, model):
    """The folder of a run of Ada's that was stopped at once."""

    async def make():
        pool = LocalPool()
        scheduler = SegmentSchedulerActor(pool)
        config = config_for(model).model_dump(mode="json")
        await scheduler.submit("mine", config, str(tmp_path), str(tmp_path), "token", "ada", "raysubmit_1")
        await scheduler.cancel("mine")
        status = await end_of(scheduler, "mine")
        await pool.end()
        return status

    return RunFolder(tmp_path, "mine"), asyncio.run(make())


def test_a_run_s_owner_and_job_are_in_its_folder_and_in_its_status(begun):
    folder, status = begun
    on_disk = folder.read_manifest()
    assert (on_disk.begun.owner, on_disk.begun.job) == ("ada", "raysubmit_1")
    for said in (status, RunStatus.of(folder.path, on_disk)):
        assert (said.owner, said.job) == ("ada", "raysubmit_1")


def test_a_folder_from_before_there_were_owners_is_everybody_s(begun):
    folder, _ = begun
    first, *others = folder.manifest.read_bytes().splitlines(keepends=True)
    values = json.loads(first)
    for name in ("crc", "owner", "job"):
        del values[name]
    body = json.dumps(values, ensure_ascii=False)[1:].encode()
    folder.manifest.write_bytes(b'{"crc": "%08x", %b\n' % (zlib.crc32(body), body) + b"".join(others))
    assert folder.read_manifest().begun.owner == ""
    assert Owner("anybody").owns(folder.read_manifest().begun.owner)


def test_the_owner_is_the_variable_s_else_the_login_name_with_the_ray_job():
    job = json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})
    assert owner_here({"EDIT_RAY_OWNER": "ada", "RAY_JOB_CONFIG_JSON_ENV_VAR": job}) == Owner("ada", "raysubmit_1")
    assert owner_here({"EDIT_RAY_OWNER": "ada", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}) == Owner("ada")
    assert owner_here({}).name == owner_here({"EDIT_RAY_OWNER": ""}).name != ""
    for name in (" ", "a" * 65, "two\nlines"):
        with pytest.raises(ConfigError, match="EDIT_RAY_OWNER"):
            owner_here({"EDIT_RAY_OWNER": name})
