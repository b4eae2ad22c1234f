"""The HTTP door's routes over runs that are made in this process."""

import base64
import io
import itertools
import json
import math
import os
import queue
import threading
import time

import pytest
from PIL import Image

from edit_ray.runs.folder import RunFolder
from edit_ray.runs.ids import Owner
from edit_ray.server import uploads
from edit_ray.server.gate import Limits
from edit_ray.server.scheduler_answers import SchedulerAnswers
from tests.documented import ROOT, blocks
from tests.door_here import PROMPT, ClientHere, SchedulerHere, browser, offer_of, until_ended

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scheduler():
    scheduler = SchedulerHere()
    yield scheduler
    scheduler.end()


@pytest.fixture(scope="module")
def made(scheduler, model, tmp_path_factory):
    """A client of HTTP, the folder of runs, and the id of a video of three segments that is done."""
    root = tmp_path_factory.mktemp("runs")
    http = browser(ClientHere(root, scheduler), [offer_of(model)])
    ours = {"num_segments": 3, "seed": 5}
    answer = http.post("/v1/videos", json={"prompt": PROMPT, "edit_ray": ours})
    assert answer.status_code == 200, answer.text
    video_id = answer.json()["id"]
    assert until_ended(http, video_id)["status"] == "completed"
    return http, root, video_id


@pytest.fixture
def http(scheduler, model, tmp_path):
    return browser(ClientHere(tmp_path, scheduler), [offer_of(model)])


def picture(kind="PNG", size=(40, 40)):
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, kind)
    return data.getvalue()


def code_of(answer):
    return answer.status_code, answer.json()["error"]["code"]


def events_of(text):
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return found


# What is read.


def test_a_video_is_the_same_for_any_replica(made, scheduler, model):
    http, root, video_id = made
    other = browser(ClientHere(root, scheduler), [offer_of(model)])
    alone = browser(ClientHere(root, SilentScheduler()), [offer_of(model)])
    video = http.get(f"/v1/videos/{video_id}").json()
    assert other.get(f"/v1/videos/{video_id}").json() == alone.get(f"/v1/videos/{video_id}").json() == video
    assert (video["status"], video["seconds"], video["edit_ray"]["seed"]) == ("completed", f"{(9 + 4 + 4) / 8:.10g}", 5)


class SilentScheduler:
    """As when the cluster is gone."""

    def ask(self, method, *arguments):
        from edit_ray.errors import ResourcesUnavailable, UnknownRun

        raise ResourcesUnavailable("no Ray answers") if method == "submit" else UnknownRun("no segment scheduler")


def test_without_a_cluster_a_request_may_be_repeated_later(model, tmp_path):
    http = browser(ClientHere(tmp_path, SilentScheduler()), [offer_of(model)])
    answer = http.post("/v1/videos", json={"prompt": PROMPT})
    assert code_of(answer) == (503, "unavailable")
    assert answer.headers["retry-after"] == "2"
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_parts_of_the_content(made):
    http, root, video_id = made
    whole = (root / video_id / "final.mp4").read_bytes()
    path = f"/v1/videos/{video_id}/content"
    part = http.get(path, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    assert http.get(path, headers={"Range": "bytes=-6"}).content == whole[-6:]
    assert http.get(path, headers={"Range": "bytes=nothing"}).content == whole
    beyond = http.get(path, headers={"Range": f"bytes={len(whole)}-"})
    assert code_of(beyond) == (416, "wrong_range")
    assert beyond.headers["content-range"] == f"bytes */{len(whole)}"
    head = http.head(path)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(whole)), b"")
    assert head.headers["content-type"] == "video/mp4"


def test_what_plays_is_what_lies_in_the_folder(made):
    http, root, video_id = made
    master = http.get(f"/v1/videos/{video_id}/live.m3u8")
    assert master.headers["content-type"] == "application/vnd.apple.mpegurl"
    media = master.text.strip().splitlines()[-1]
    playlist = http.get(f"/v1/videos/{video_id}/{media}").text
    named = [line for line in playlist.splitlines() if line and not line.startswith("#")]
    assert len(named) == 3
    init = http.get(f"/v1/videos/{video_id}/init.mp4").content
    fragments = b"".join(http.get(f"/v1/videos/{video_id}/{name}").content for name in named)
    assert init + fragments == (root / video_id / "stream.mp4").read_bytes()
    assert http.get(f"/v1/videos/{video_id}/stream.mp4").content == init + fragments


def test_segments_with_their_latents_and_pictures(made):
    http, root, video_id = made
    page = http.get(f"/v1/videos/{video_id}/segments?limit=2").json()
    assert ([segment["index"] for segment in page["data"]], page["has_more"]) == ([0, 1], True)
    rest = http.get(f"/v1/videos/{video_id}/segments?after=1").json()
    assert ([segment["index"] for segment in rest["data"]], rest["has_more"]) == ([2], False)
    segment = http.get(f"/v1/videos/{video_id}/segments/1").json()
    assert segment == page["data"][1]
    assert segment["prompt"] == PROMPT
    assert "seam_score" in segment["statistics"]
    folder = RunFolder(root, video_id)
    assert http.get(segment["media"]).content == folder.media(1).read_bytes()
    latents = http.get(segment["latents"])
    assert latents.content == folder.latents(1).read_bytes()
    assert Image.open(io.BytesIO(http.get(segment["thumbnail"]).content)).format == "WEBP"
    assert code_of(http.get(f"/v1/videos/{video_id}/segments/3")) == (404, "segment_not_found")
    assert code_of(http.get(f"/v1/videos/{video_id}/segments/3/latents")) == (404, "segment_not_found")
    assert code_of(http.get(f"/v1/videos/{video_id}/content?variant=audio")) == (400, "invalid_value")


def test_the_events_of_a_run_that_has_ended(made):
    http, _, video_id = made
    answer = http.get(f"/v1/videos/{video_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events_of(answer.text)
    assert [name for name, _, _ in found] == ["segment", "segment", "segment", "status", "ended"]
    assert [data["index"] for name, _, data in found if name == "segment"] == [0, 1, 2]
    assert found[-1][2] == {"status": "completed", "state": "done", "error": None}

    behind = http.get(f"/v1/videos/{video_id}/events", headers={"Last-Event-ID": found[1][1]})
    assert [data["index"] for name, _, data in events_of(behind.text) if name == "segment"] == [2]
    over = http.get(f"/v1/videos/{video_id}/events", headers={"Last-Event-ID": found[-1][1]})
    assert (over.status_code, over.content) == (204, b"")


def test_the_events_of_a_run_that_grows(http, tmp_path):
    video_id = http.post("/v1/videos", json={"prompt": PROMPT, "edit_ray": {"num_segments": 3}}).json()["id"]
    found = events_of(http.get(f"/v1/videos/{video_id}/events").text)
    assert [data["index"] for name, _, data in found if name == "segment"] == [0, 1, 2]
    assert found[-1][0] == "ended"
    states = [data["status"] for name, _, data in found if name == "status"]
    assert states[-1] == "completed"
    assert {"queued", "in_progress"} & set(states[:-1])


def test_a_range_that_is_none_is_passed_over_of_every_file(made):
    http, _, video_id = made
    for path in ("/", "/page/page.css", f"/v1/videos/{video_id}/content"):
        assert http.get(path, headers={"Range": ""}).content == http.get(path).content
        assert http.get(path, headers={"Range": "bytes=0-3"}).content == http.get(path).content[:4]


# Making.


def test_the_same_key_is_the_same_run(http, tmp_path):
    body, key = {"prompt": PROMPT, "edit_ray": {"num_segments": 1}}, {"Idempotency-Key": "one"}
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(http.post("/v1/videos", json=body, headers=key)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    (video_id,) = {answer.json()["id"] for answer in answers}
    assert len(http.get("/v1/videos").json()["data"]) == 1
    assert until_ended(http, video_id)["status"] == "completed"
    assert http.post("/v1/videos", json=body, headers=key).json()["status"] == "completed"
    other = http.post("/v1/videos", json=body | {"seconds": "1"}, headers=key)
    assert code_of(other) == (400, "invalid_value")
    other = http.post("/v1/videos", json=body | {"prompt": "a blue square"}, headers=key)
    assert code_of(other) == (409, "key_reused")
    assert other.headers["x-should-retry"] == "false"
    assert http.post("/v1/videos", json=body, headers={"Idempotency-Key": "two"}).json()["id"] != video_id


def test_the_same_key_with_another_picture(http):
    body = {"prompt": PROMPT, "edit_ray": json.dumps({"num_segments": 1})}
    key = {"Idempotency-Key": "one"}

    def send(data):
        return http.post("/v1/videos", data=body, files={"input_reference": data}, headers=key)

    first, again = send(picture()), send(picture())
    assert first.status_code == again.status_code == 200
    assert first.json()["id"] == again.json()["id"]
    assert code_of(send(picture("JPEG"))) == (409, "key_reused")
    assert until_ended(http, first.json()["id"])["status"] == "completed"


def test_what_a_form_says_json_says_too(http, tmp_path):
    ours = {"num_segments": 1, "seed": 3}
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    bodies = [
        {"json": {"prompt": PROMPT, "edit_ray": ours, "input_reference": {"image_url": url}}},
        {
            "data": {"prompt": PROMPT, "edit_ray[num_segments]": "1", "edit_ray[seed]": "3"},
            "files": {"input_reference": picture()},
        },
        {"data": {"prompt": PROMPT, "edit_ray": json.dumps(ours), "input_reference[image_url]": url}},
    ]
    ids = [http.post("/v1/videos", **body).json()["id"] for body in bodies]
    assert [until_ended(http, video_id)["status"] for video_id in ids] == ["completed"] * 3
    finals = [(tmp_path / video_id / "stream.mp4").read_bytes() for video_id in ids]
    assert finals[0] == finals[1] == finals[2]


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ({"image_url": "http://127.0.0.1/x.png"}, "the server fetches nothing"),
        ({"image_url": "file:///etc/passwd"}, "the server fetches nothing"),
        ({"image_url": "data:image/png;base64,?"}, "not base64"),
        ({"image_url": 5}, "it must be a file"),
        ({"file_id": "x"}, "keeps no files"),
        ("x.png", "it must be a file"),
        ({"image_url": "data:image/png;base64,aGVsbG8="}, "another kind of file"),
    ],
)
def test_a_reference_that_is_none(http, tmp_path, reference, says):
    answer = http.post("/v1/videos", json={"prompt": PROMPT, "input_reference": reference})
    assert code_of(answer) == (400, "invalid_value")
    assert says in answer.json()["error"]["message"]
    assert not (tmp_path / uploads.FOLDER).exists()


def test_all_mistakes_of_a_request_with_a_bad_picture_come_at_once_and_leave_nothing(http, tmp_path):
    data = {"prompt": " ", "size": "1x1", "edit_ray[continuity][mode]": "history"}
    answer = http.post("/v1/videos", data=data, files={"input_reference": picture()[:60]})
    params = [problem["param"] for problem in answer.json()["error"]["edit_ray"]["problems"]]
    assert sorted(params) == ["input_reference", "prompt", "size"]
    assert str(tmp_path) not in answer.text
    assert list((tmp_path / uploads.FOLDER).iterdir()) == []


# Removing.


def test_a_run_that_is_being_made_is_cancelled_and_removed(http, tmp_path):
    ours = {"num_segments": 500, "num_inference_steps": 50}
    video_id = http.post("/v1/videos", json={"prompt": PROMPT, "edit_ray": ours}).json()["id"]
    deadline = time.monotonic() + 60
    while http.get(f"/v1/videos/{video_id}").json()["status"] == "queued" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert code_of(http.get(f"/v1/videos/{video_id}/content")) == (404, "not_ready")
    answer = http.delete(f"/v1/videos/{video_id}")
    assert answer.json() == {"id": video_id, "object": "video.deleted", "deleted": True}
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert code_of(http.delete(f"/v1/videos/{video_id}")) == (404, "video_not_found")
    assert code_of(http.get(f"/v1/videos/{video_id}/events")) == (404, "video_not_found")


def test_a_picture_stays_while_another_run_names_it(http, tmp_path):
    files = {"input_reference": picture()}
    body = {"prompt": PROMPT, "edit_ray[num_segments]": "1"}
    video_id = http.post("/v1/videos", data=body, files=files).json()["id"]
    assert until_ended(http, video_id)["status"] == "completed"
    branch = tmp_path / "branch"
    branch.mkdir()
    (branch / "manifest.jsonl").touch()
    (branch / "run.yaml").write_bytes((tmp_path / video_id / "run.yaml").read_bytes())
    http.delete(f"/v1/videos/{video_id}")
    (stored,) = (tmp_path / uploads.FOLDER).iterdir()
    assert stored.name == f"{video_id}.png"
    (branch / "run.yaml").unlink()
    uploads.forget(tmp_path, {stored.name})
    assert not stored.exists()


def test_what_made_no_run_is_swept_after_an_hour(tmp_path):
    old = uploads.store(tmp_path, "old", picture(), ".png")
    os.utime(old, (1, 1))
    assert uploads.store(tmp_path, "new", picture(), ".png").exists()
    assert not old.exists()


# When the segment scheduler is silent.


class Silent(ClientHere):
    """A client whose questions get no answer while `answers` is not set."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.answers = threading.Event()
        self.answers.set()

    def _ask(self, *arguments, **options):
        assert self.answers.wait(60)
        return super()._ask(*arguments, **options)


def test_readers_get_the_last_answer_of_a_segment_scheduler_that_is_silent(scheduler, model, tmp_path, monkeypatch):
    monkeypatch.setattr("edit_ray.server.scheduler_answers.PATIENCE_S", 0.2)
    client = Silent(tmp_path, scheduler)
    http = browser(client, [offer_of(model)])
    body = {"prompt": PROMPT, "edit_ray": {"num_segments": 3, "approve": "each"}}
    video_id = http.post("/v1/videos", json=body).json()["id"]
    deadline = time.monotonic() + 60
    while not http.get(f"/v1/videos/{video_id}").json()["edit_ray"]["awaiting_approval"]:
        assert time.monotonic() < deadline
    client.answers.clear()
    time.sleep(0.6)  # the last answer is too old
    began = time.monotonic()
    for _ in range(5):
        video = http.get(f"/v1/videos/{video_id}").json()
        assert (video["status"], video["edit_ray"]["awaiting_approval"]) == ("in_progress", True)
        assert [found["id"] for found in http.get("/v1/videos").json()["data"]] == [video_id]
    assert time.monotonic() - began < 5
    client.answers.set()
    assert http.delete(f"/v1/videos/{video_id}").status_code == 200


def test_readers_do_not_wait_for_a_question_while_the_last_answer_is_young(tmp_path, monkeypatch):
    monkeypatch.setattr("edit_ray.server.scheduler_answers.STATUS_AGE_S", 0.0)
    monkeypatch.setattr("edit_ray.server.scheduler_answers.STALE_S", math.inf)
    monkeypatch.setattr("edit_ray.server.scheduler_answers.PATIENCE_S", 60.0)
    go, asked, said = threading.Semaphore(1), queue.Queue(), itertools.count()

    class Asked:
        def status(self, run_id):
            asked.put(run_id)
            assert go.acquire(timeout=60)
            return next(said)

    answers = SchedulerAnswers(Asked())
    assert answers.status("one", fresh=True) == 0
    assert [answers.status("one") for _ in range(100)] == [0] * 100
    assert [asked.get(timeout=60) for _ in range(2)] == ["one", "one"], "one question for all of them"
    assert asked.empty()
    go.release()
    deadline = time.monotonic() + 60
    while answers.status("one") != 1:
        assert time.monotonic() < deadline
    go.release()
    go.release()
    assert answers.status("one", fresh=True) >= 2, "whoever wants it fresh waits"


def test_new_videos_are_refused_while_many_wait(scheduler, model, tmp_path):
    http = browser(ClientHere(tmp_path, scheduler), [offer_of(model)], limits=Limits(queued=0))
    answer = http.post("/v1/videos", json={"prompt": PROMPT})
    assert code_of(answer) == (503, "unavailable")
    assert "0 videos wait already" in answer.json()["error"]["message"]


# Whose it is.


def test_another_owners_runs_are_refused(made, scheduler, model):
    _, root, video_id = made
    client = ClientHere(root, scheduler)
    client.owner = Owner("somebody else")
    stranger = browser(client, [offer_of(model)])
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/events"), ("GET", "/segments/0")):
        assert code_of(stranger.request(method, f"/v1/videos/{video_id}{path}")) == (403, "not_your_video")
    assert stranger.get("/v1/videos").json()["data"] == []
    assert (root / video_id).exists()


def test_a_damaged_manifest_is_an_answer(made, scheduler, model, tmp_path):
    _, root, video_id = made
    (tmp_path / "copied").mkdir()
    (tmp_path / "copied" / "manifest.jsonl").write_bytes((root / video_id / "manifest.jsonl").read_bytes())
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "manifest.jsonl").write_bytes(b"nothing\n")
    http = browser(ClientHere(tmp_path, scheduler), [offer_of(model)])
    for name in ("copied", "torn"):
        assert code_of(http.get(f"/v1/videos/{name}")) == (409, "video_damaged")
    assert http.get("/v1/videos").json()["data"] == []


def test_a_run_whose_configuration_is_gone_is_still_an_answer(made, scheduler, model, tmp_path):
    _, root, video_id = made
    copy = tmp_path / video_id
    copy.mkdir()
    (copy / "manifest.jsonl").write_bytes((root / video_id / "manifest.jsonl").read_bytes())
    http = browser(ClientHere(tmp_path, scheduler), [offer_of(model)])
    video = http.get(f"/v1/videos/{video_id}").json()
    assert (video["status"], video["model"], video["prompt"]) == ("completed", "unknown", None)
    assert code_of(http.get(f"/v1/videos/{video_id}/content")) == (404, "not_ready")
    assert code_of(http.get(f"/v1/videos/{video_id}/content?variant=thumbnail")) == (409, "video_damaged")
    assert code_of(http.get(f"/v1/videos/{video_id}/segments/0/latents")) == (404, "not_found")


# Queries, and readers.


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=no", "after")],
)
def test_a_page_that_is_none(made, query, param):
    answer = made[0].get(f"/v1/videos?{query}")
    assert code_of(answer) == (400, "invalid_value")
    assert answer.json()["error"]["param"] == param


def test_unknown_parameters_are_named(made):
    answer = made[0].get("/v1/videos?limit=1&limit=2&before=x")
    assert [problem["param"] for problem in answer.json()["error"]["edit_ray"]["problems"]] == ["limit", "before"]


def test_a_replica_takes_so_many_readers(made, scheduler, model):
    _, root, video_id = made
    http = browser(ClientHere(root, scheduler), [offer_of(model)], limits=Limits(readers=0))
    assert code_of(http.get(f"/v1/videos/{video_id}/events")) == (503, "unavailable")


# The page about it.


def test_the_error_on_the_page_has_the_form_of_all(made):
    (block,) = blocks("docs/http.md", "json")
    answer = made[0].post("/v1/videos", json={"prompt": PROMPT, "size": "1x1"})
    error, shown = answer.json()["error"], json.loads(block.code)["error"]
    assert error.keys() == shown.keys()
    assert error["edit_ray"]["problems"][0].keys() == shown["edit_ray"]["problems"][0].keys()
    assert all(error[name] == shown[name] for name in ("type", "param", "code"))


def test_the_page_has_every_route(made):
    page = (ROOT / "docs" / "http.md").read_text()
    for path, operations in made[0].get("/openapi.json").json()["paths"].items():
        for method in operations:
            assert f"`{method.upper()} {path}`" in page or "/live-{number}.m3u8" in path, path
