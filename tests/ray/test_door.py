"""The HTTP door on Ray Serve: two replicas, either of which answers for what the other has begun."""

import contextlib
import hashlib
import http.client
import json
import os
import signal
import socket
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray._private.state import actors

from edit_ray.client import LongVideoClient
from edit_ray.config import config_of
from edit_ray.config.strict_yaml import parse
from edit_ray.errors import ConfigError
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.ids import Owner
from edit_ray.server import door
from edit_ray.server.gate import Entrance, Limits
from edit_ray.server.request_counts import LABELS
from jobs.demo import free_port
from tests.door_here import TOKEN
from tests.ray.conftest import CONFIG, wait_until
from tests.runs_here import check_same
from tests.unit.test_door_node import asked_by_node

BODY = {"prompt": "a red circle", "size": "32x32", "edit_ray": {"num_segments": 2, "num_inference_steps": 2, "seed": 3}}


class Served:
    """Asks the door; each request is a connection of its own, so that any replica may answer."""

    def __init__(self, settings, url):
        self.settings, self.url = settings, url

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(self.settings.entrance.host, self.settings.entrance.port, timeout=60)
        about = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", **headers}
        connection.request(method, path, None if body is None else json.dumps(body), about)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        is_json = answer.getheader("Content-Type", "").startswith("application/json")
        return answer.status, json.loads(data) if is_json else data

    def ended(self, video_id):
        def video():
            status, video = self.ask("GET", f"/v1/videos/{video_id}")
            assert status == 200
            return video if video["status"] in ("completed", "failed") else None

        return wait_until(video)


@pytest.fixture(scope="module")
def served(ray_head, model, tmp_path_factory):
    base = config_of(parse(CONFIG.format(model=model, steps=2, segments=2)).data)
    entrance = Entrance("127.0.0.1", free_port(), TOKEN)
    output = tmp_path_factory.mktemp("runs")
    limits = Limits(body_bytes=100_000, body_s=2.0)
    settings = door.DoorSettings(output, Owner("me", door.JOB), (("tiny", base),), entrance, limits, replicas=2)
    started = door.start(settings)
    yield Served(settings, started.url)
    door.stop()
    serve.shutdown()


def test_two_replicas_answer_as_one(served):
    assert served.url == f"http://127.0.0.1:{served.settings.entrance.port}/"
    assert len(serve.status().applications["edit_ray"].deployments["Door"].replica_states) == 1
    assert sum(serve.status().applications["edit_ray"].deployments["Door"].replica_states.values()) == 2
    assert served.ask("GET", "/v1/videos", Authorization="Bearer nothing")[0] == 401

    key = {"Idempotency-Key": "one"}
    with ThreadPoolExecutor(6) as threads:
        posts = [threads.submit(served.ask, "POST", "/v1/videos", BODY, **key) for _ in range(6)]
        answers = [post.result() for post in posts]
    assert [status for status, _ in answers] == [200] * 6
    (video_id,) = {video["id"] for _, video in answers}
    assert served.ended(video_id)["status"] == "completed"

    with ThreadPoolExecutor(6) as threads:
        reads = [threads.submit(served.ask, "GET", f"/v1/videos/{video_id}") for _ in range(12)]
        assert {json.dumps(read.result()) for read in reads} == {json.dumps((200, served.ended(video_id)))}
    assert [video["id"] for video in served.ask("GET", "/v1/videos")[1]["data"]] == [video_id]
    folder = RunFolder(served.settings.output, video_id)
    content = served.ask("GET", f"/v1/videos/{video_id}/content")
    assert content == (200, folder.final.read_bytes())
    part = served.ask("GET", f"/v1/videos/{video_id}/content", Range="bytes=4-7")
    assert part == (206, b"ftyp")
    _, events = served.ask("GET", f"/v1/videos/{video_id}/events")
    assert events.count(b"event: segment") == 2
    assert events.endswith(b"\n\n")


def counted():
    """The requests that all replicas have counted, by method, route and outcome, as Ray's nodes export them."""
    found = Counter()
    for node in ray.nodes():
        where = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(where, timeout=10) as answer:
            page = answer.read().decode()
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == f"ray_{door.COUNTER}":
                    found[tuple(sample.labels[label] for label in LABELS)] += sample.value
    return found


def test_rays_metrics_have_the_requests_of_all_replicas_by_route_and_outcome(served):
    served.ask("GET", "/v1/videos/nobody-has-it")  # of which there is a series from now on
    unknown, refused = ("GET", "/v1/videos/{video_id}", "video_not_found"), ("GET", "other", "invalid_api_key")
    before = wait_until(lambda: (found := counted())[unknown] and found)
    for number in range(8):
        assert served.ask("GET", f"/v1/videos/nobody-has-{number}")[0] == 404
        assert served.ask("GET", f"/nowhere/{number}", Authorization="Bearer nothing")[0] == 401
    wait_until(lambda: (now := counted())[unknown] == before[unknown] + 8 and now[refused] == before[refused] + 8)


def test_the_bytes_are_those_of_the_same_run_without_a_door(served):
    _, video = served.ask("POST", "/v1/videos", BODY)
    assert served.ended(video["id"])["status"] == "completed"
    made = RunFolder(served.settings.output, video["id"])
    client = LongVideoClient(output=served.settings.output)
    run_id = client.submit(made.run_yaml)
    list(client.stream(run_id, frames=False))
    check_same(made, RunFolder(served.settings.output, run_id))
    assert client.status(video["id"]).owner == "me"
    assert [run["id"] for run in served.ask("GET", "/v1/videos")[1]["data"]].count(run_id) == 0, "it is another owner's"


@pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")
def test_openais_client_is_answered_by_either_replica(served):
    """What it lists and gets are connections of their own: each may reach another replica."""

    def client():
        return openai.OpenAI(api_key=TOKEN, base_url=f"{served.url}v1", max_retries=0)

    with client() as one, client() as other:
        ours = {"num_inference_steps": 2, "num_segments": 1}
        video = one.videos.create(prompt="a red circle", size="32x32", extra_body={"edit_ray": ours})
        assert other.videos.poll(video.id, poll_interval_ms=50).status == "completed"
        extended = other.videos.extend(
            video=openai.omit, prompt="a blue square", seconds="1", extra_body={"video": {"id": video.id}}
        )
        remixed = one.videos.remix(video.id, prompt="a blue square")
        made = [one.videos.poll(extended.id, poll_interval_ms=50), other.videos.poll(remixed.id, poll_interval_ms=50)]
        assert [video.status for video in made] == ["completed"] * 2
        assert [found.id for found in other.videos.list(limit=3)][:3] == [remixed.id, extended.id, video.id]
        for number, each in enumerate((video.id, extended.id, remixed.id)):
            content = (one, other)[number % 2].videos.download_content(each).read()
            assert content == RunFolder(served.settings.output, each).final.read_bytes()
        assert one.videos.delete(remixed.id).deleted
        with pytest.raises(openai.NotFoundError):
            other.videos.retrieve(remixed.id)


@pytest.mark.slow
def test_openais_client_for_node_is_answered_by_either_replica(served):
    got = asked_by_node(f"{served.url}v1", "a red circle", TOKEN)
    assert got["video"]["status"] == "completed"
    final = RunFolder(served.settings.output, got["video"]["id"]).final.read_bytes()
    assert got["content"] == hashlib.sha256(final).hexdigest()
    assert got["refused"] == [404, "video_not_found"]


@pytest.mark.parametrize(
    ("length", "sent", "status"), [(2**31, 0, 413), (None, 300_000, 413), (100, 3, 408)], ids=["said", "sent", "slow"]
)
def test_a_body_is_bounded_behind_the_proxy(served, length, sent, status):
    """One that is said to be too large, one that becomes so, and one that does not come."""
    about = f"Content-Length: {length}" if length is not None else "Transfer-Encoding: chunked"
    head = ["POST /v1/videos HTTP/1.1", f"Host: 127.0.0.1:{served.settings.entrance.port}", about]
    head += [f"Authorization: Bearer {TOKEN}", "Content-Type: application/json", "", ""]
    body = b" " * sent if length is not None else b"%x\r\n" % sent + b" " * sent + b"\r\n"
    with socket.create_connection(("127.0.0.1", served.settings.entrance.port), 30) as raw:
        raw.sendall("\r\n".join(head).encode() + body)
        assert raw.recv(65536).startswith(f"HTTP/1.1 {status} ".encode())


def test_a_run_that_is_being_made_is_removed(served):
    long = BODY | {"edit_ray": {"num_segments": 1000, "num_inference_steps": 100}}
    _, video = served.ask("POST", "/v1/videos", long)
    path = f"/v1/videos/{video['id']}"
    wait_until(lambda: served.ask("GET", path)[1]["edit_ray"]["step"])
    assert served.ask("DELETE", path) == (200, {"id": video["id"], "object": "video.deleted", "deleted": True})
    assert served.ask("GET", path)[0] == 404
    assert not (served.settings.output / video["id"]).exists()


def replicas():
    """The processes of the replicas that are there."""
    there = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
    return {actor["Pid"] for actor in there if "Door" in actor["ActorClassName"] or "Door" in (actor["Name"] or "")}


@pytest.mark.slow
def test_killed_replicas_lose_no_request_and_make_none_twice(served):
    """Clients ask again with the same key, as OpenAI's do after a connection that broke."""

    def ask_until_answered(number):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, video = served.ask("POST", "/v1/videos", BODY, **{"Idempotency-Key": f"kill-{number}"})
                if status == 200:
                    return video["id"]
            time.sleep(0.1)
        raise AssertionError(f"request {number} was not answered")

    before = {video["id"] for video in served.ask("GET", "/v1/videos?limit=100")[1]["data"]}
    for kill in range(3):
        victims = wait_until(lambda: len(found := replicas()) == 2 and found)
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(ask_until_answered, f"{kill}-{number}") for number in range(4)]
            os.kill(min(victims), signal.SIGKILL)
            ids = {each.result() for each in asked}
        assert len(ids) == 4
        assert {served.ended(video_id)["status"] for video_id in ids} == {"completed"}
        assert {ask_until_answered(f"{kill}-{number}") for number in range(4)} == ids
        before |= ids
    assert {video["id"] for video in served.ask("GET", "/v1/videos?limit=100")[1]["data"]} == before
    finals = {RunFolder(served.settings.output, video_id).final.read_bytes()[-1000:] for video_id in ids}
    assert len(finals) == 1


def test_serve_that_listens_elsewhere_is_said_so(served):
    elsewhere = door.DoorSettings(
        served.settings.output, Owner("me"), served.settings.models, Entrance(port=free_port())
    )
    with pytest.raises(ConfigError, match=r"Ray Serve of this cluster listens on 127\.0\.0\.1:"):
        door.start(elsewhere)
