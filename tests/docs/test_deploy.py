"""deploy/: the files parse, agree with each other and with the configurations, and the job's command is understood."""

import json
import re
import runpy
import shlex
from functools import partial
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray._common.utils import import_attr
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from edit_ray.actors.launch import SCHEDULER_RESOURCE
from edit_ray.config import load_config
from edit_ray.errors import ConfigError
from edit_ray.server import door, models
from edit_ray.server.application import DoorArguments, settings_of
from edit_ray.server.proxy_answers import CALLBACK
from edit_ray.tiers.options import parse_bytes
from edit_ray.tiers.service import TABLES_BYTES
from tests.door_here import TOKEN

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


(JOB,) = documents("kuberay/ray-job.yaml")
(CLUSTER,) = documents("kuberay/ray-cluster.yaml")
(SERVICE,) = documents("kuberay/ray-service.yaml")
SERVE = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
SPEC = CLUSTER["spec"]
(WORKERS,) = SPEC["workerGroupSpecs"]


@pytest.fixture(scope="module")
def config():
    """What the job's command line asks for, its paths being those of the image."""
    program, script, *arguments = shlex.split(JOB["spec"]["entrypoint"])
    options = runpy.run_path(str(ROOT / "jobs" / "long_video.py"))["_parser"]().parse_args(arguments)
    assert (program, script) == ("python", "/opt/edit_ray/jobs/long_video.py")
    assert options.resume
    assert str(options.output) == "/runs"
    return load_config(ROOT / options.config.relative_to("/opt/edit_ray"), options.set, check_model=False)


def pods():
    """Every pod's specification, with its rayStartParams."""
    return [(group["template"]["spec"], group["rayStartParams"]) for group in (SPEC["headGroupSpec"], WORKERS)]


def volumes(pod):
    return {volume["name"]: volume for volume in pod["volumes"]}


def test_all_files_parse_and_are_named_in_the_readme():
    files = sorted(path for path in DEPLOY.rglob("*.yaml"))
    assert len(files) == 7
    for path in files:
        assert all(list(yaml.safe_load_all(path.read_text())))
        assert f"({path.relative_to(DEPLOY)})" in (DEPLOY / "README.md").read_text()


def test_job_and_cluster_are_the_same_cluster():
    assert JOB["spec"]["rayClusterSpec"] == SPEC
    ray = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert SPEC["rayVersion"] == ray
    assert SPEC["authOptions"] == {"mode": "token"}


def test_the_door_s_cluster_is_the_same_beside_what_the_door_needs():
    spec = json.loads(json.dumps(SERVICE["spec"]["rayClusterConfig"]))  # nothing in it is the same object twice
    (workers,) = spec["workerGroupSpecs"]
    for group in (spec["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        container["env"].remove({"name": "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "value": CALLBACK})
        secret = {"name": "door-token", "secret": {"secretName": "edit-ray-door-token"}}
        pod["volumes"].remove(secret)
        at = Path(SERVE["applications"][0]["args"]["token_file"]).parent.as_posix()
        container["volumeMounts"].remove({"name": "door-token", "mountPath": at, "readOnly": True})
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"].remove(
        {"name": "serve", "containerPort": SERVE["http_options"]["port"]}
    )
    assert spec == SPEC
    readme = (DEPLOY / "README.md").read_text()
    assert "kubectl create secret generic edit-ray-door-token --from-literal=token=" in readme
    assert f"{SERVICE['metadata']['name']}-serve-svc:{SERVE['http_options']['port']}" in readme


def test_serve_builds_the_door_that_its_configuration_asks_for(config, monkeypatch, tmp_path):
    """As Serve does it, with the files of this machine in place of the image's."""
    schema = ServeDeploySchema.model_validate(SERVE)
    (application,) = schema.applications
    assert [deployment.name for deployment in application.deployments] == [door.DEPLOYMENT]
    assert application.name == door.APPLICATION
    arguments = DoorArguments.model_validate(application.args)
    assert (arguments.host, arguments.port) == (schema.http_options.host, schema.http_options.port)
    assert arguments.output == "/runs"
    chosen = {name: value for name, _, value in (text.partition("=") for text in arguments.overrides)}
    assert chosen["model.path"] == config.model.path
    assert chosen["store.directory"] == config.store.directory
    assert [chosen[f"metrics.{name}"] for name in ("address", "port", "token_file")] == [
        config.metrics.address,
        str(config.metrics.port),
        config.metrics.token_file,
    ]
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setattr(models, "load_config", partial(load_config, check_model=False))
    here = {"output": str(tmp_path / "runs"), "token_file": str(tmp_path / "token")}
    here["configs"] = [str(ROOT / Path(path).relative_to("/opt/edit_ray")) for path in arguments.configs]
    built = call_user_app_builder_with_args_if_necessary(
        import_attr(application.import_path), arguments.model_dump() | here
    )
    assert isinstance(built, Application)
    settings = settings_of(arguments.model_copy(update=here))
    assert settings.entrance.token == TOKEN
    assert settings.continues
    ((name, base),) = settings.models
    assert (name, base.model.path) == ("wan21_t2v_1_3b", config.model.path)
    with pytest.raises(ConfigError, match=r"must be 127\.0\.0\.1 without a token"):
        settings_of(arguments.model_copy(update=here | {"token_file": None}))
    with pytest.raises(ConfigError, match="there is no configuration for it"):
        settings_of(arguments.model_copy(update=here | {"configs": []}))
    with pytest.raises(ValidationError, match="replicas"):
        DoorArguments.model_validate({"replicas": 2})


def test_shared_memory_does_for_the_configuration(config):
    for pod, params in pods():
        size = parse_bytes(volumes(pod)["shm"]["emptyDir"]["sizeLimit"] + "B")
        store = config.store.host_bytes + TABLES_BYTES if params.get("num-gpus") else 0
        assert size >= store + int(params["object-store-memory"])
        (container,) = pod["containers"]
        assert parse_bytes(container["resources"]["limits"]["memory"] + "B") > 2 * size


def test_every_path_is_a_volume_and_every_volume_is_there(config):
    claims = {claim["metadata"]["name"]: claim["spec"] for claim in documents("kuberay/volumes.yaml")}
    for pod, params in pods():
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes(pod))
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert {environment["EDIT_RAY_OUTPUT"], environment["EDIT_RAY_MODEL_ROOTS"]} <= set(mounts)
        assert config.model.path.startswith(environment["EDIT_RAY_MODEL_ROOTS"] + "/")
        for volume in volumes(pod).values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims
        if params.get("num-gpus"):
            assert "ephemeral" in volumes(pod)[mounts[config.store.directory]], "it goes with the pod"
            assert container["resources"]["limits"]["nvidia.com/gpu"] == params["num-gpus"]
        else:
            assert Path(config.metrics.token_file).parent.as_posix() in mounts
    assert claims["edit-ray-runs"]["accessModes"] == ["ReadWriteMany"]


def test_metrics_are_found_where_they_are(config):
    head, params = pods()[0]
    assert json.loads(json.loads(params["resources"])) == {SCHEDULER_RESOURCE: 1}
    ports = {port["name"]: port["containerPort"] for port in head["containers"][0]["ports"]}
    ours, rays = documents("kuberay/pod-monitor.yaml")
    (endpoint,) = ours["spec"]["podMetricsEndpoints"]
    assert ports[endpoint["port"]] == config.metrics.port
    secret = volumes(head)["metrics-token"]["secret"]["secretName"]
    assert endpoint["authorization"]["credentials"] == {"name": secret, "key": Path(config.metrics.token_file).name}
    for monitor, job in ((ours, "edit_ray"), (rays, "ray")):
        assert monitor["spec"]["podMetricsEndpoints"][0]["relabelings"][0]["replacement"] == job
        labels = SPEC["headGroupSpec"]["template"]["metadata"]["labels"] | {"ray.io/node-type": "head"}
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (rule,) = documents("kuberay/prometheus-rule.yaml")
    there = yaml.safe_load((ROOT / "monitoring" / "prometheus" / "rules.yml").read_text())
    assert rule["spec"] == there


def test_the_image_has_what_the_files_expect():
    (version,) = re.findall(r'^__version__ = "(.*)"$', (ROOT / "edit_ray" / "__init__.py").read_text(), re.MULTILINE)
    assert f"edit-ray:{version}" in DOCKERFILE
    assert {pod["containers"][0]["image"] for pod, _ in pods()} == {f"edit-ray:{version}"}
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
    assert {"jobs", "configs", "edit_ray", "constraints.txt", "pyproject.toml", "README.md"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert re.search(r"^USER 1000$", DOCKERFILE, re.MULTILINE)


def test_the_launcher_s_head_has_the_segment_scheduler():
    (launcher,) = documents("ray-cluster.yaml")
    start = launcher["head_start_ray_commands"][-1]
    assert json.loads(re.search(r"--resources='([^']*)'", start)[1]) == {SCHEDULER_RESOURCE: 1}
    assert "RAY_AUTH_MODE=token" in start
