"""Changes of videos over HTTP: what is steered, paused, approved, made again, branched, and what is refused."""

import json
import time

import pytest

from edit_ray.runs.folder import RunFolder
from edit_ray.testing import save_random_wan
from tests.door_here import PROMPT, ClientHere, SchedulerHere, browser, offer_of, until_ended

pytestmark = pytest.mark.usefixtures("one_thread")
BLUE = "a blue square"


@pytest.fixture(scope="module")
def scheduler():
    scheduler = SchedulerHere()
    yield scheduler
    scheduler.end()


@pytest.fixture
def http(scheduler, model, tmp_path):
    return browser(ClientHere(tmp_path, scheduler), [offer_of(model)])


def begun(http, **ours):
    answer = http.post("/v1/videos", json={"prompt": PROMPT, "edit_ray": {"num_segments": 4, "seed": 5, **ours}})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def until(http, video_id, holds, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not holds(video := http.get(f"/v1/videos/{video_id}").json()):
        assert time.monotonic() < deadline, video
        time.sleep(0.05)
    return video


def code_of(answer):
    return answer.status_code, answer.json()["error"]["code"]


def bytes_of(root, video_id):
    return (root / video_id / "stream.mp4").read_bytes()


def test_a_paused_video_is_steered_and_goes_on_to_what_a_storyboard_would_have_made(http, tmp_path):
    video_id = begun(http, approve="each")
    path = f"/v1/videos/{video_id}"
    waiting = until(http, video_id, lambda video: video["edit_ray"]["awaiting_approval"])
    assert (waiting["status"], waiting["edit_ray"]["committed"], waiting["edit_ray"]["approve"]) == (
        "in_progress",
        1,
        "each",
    )
    steered = http.patch(path, json={"steer": {"prompt": BLUE, "from_segment": 2}})
    assert (steered.status_code, steered.json()["edit_ray"]["applied_from"]) == (200, 2)
    assert steered.json()["prompt"] == BLUE
    assert [(scene["segment"], scene["prompt"]) for scene in steered.json()["edit_ray"]["storyboard"]] == [
        (0, PROMPT),
        (2, BLUE),
    ]

    assert http.patch(path, json={"paused": True}).json()["edit_ray"]["paused"]
    assert not http.patch(path, json={"paused": False}).json()["edit_ray"]["paused"]
    for segment in range(4):
        until(http, video_id, lambda video, made=segment + 1: video["edit_ray"]["committed"] == made)
        assert http.patch(path, json={"approve": segment}).json()["edit_ray"]["approved"] == segment + 1
    assert until_ended(http, video_id)["status"] == "completed"

    storyboard = [{"segment": 0, "prompt": PROMPT}, {"segment": 2, "prompt": BLUE}]
    body = {"edit_ray": {"num_segments": 4, "seed": 5, "storyboard": storyboard}}
    other = http.post("/v1/videos", json=body).json()["id"]
    assert until_ended(http, other)["status"] == "completed"
    assert bytes_of(tmp_path, video_id) == bytes_of(tmp_path, other)


def test_a_causal_model_is_a_model_as_others_are(scheduler, tmp_path_factory, tmp_path):
    options = {"chunk_size": 1, "window": 4, "sink": 1, "timesteps": [1000.0, 750.0]}
    causal = save_random_wan(tmp_path_factory.mktemp("causal") / "wan", causal=options)
    continuity = {"mode": "causal", "chunks": 2, "chunk_size": 1}
    sampling = {"num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    offer = offer_of(causal, continuity=continuity, sampling=sampling)
    http = browser(ClientHere(tmp_path, scheduler), [offer])
    storyboard = [{"segment": 0, "prompt": PROMPT}, {"segment": 1, "prompt": BLUE, "switch": "keep"}]
    body = {"edit_ray": {"num_segments": 2, "storyboard": storyboard, "continuity": {"kv": "commit"}}}
    answer = http.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    assert until_ended(http, answer.json()["id"])["status"] == "completed"


def test_the_same_key_steers_once(http, tmp_path):
    video_id = begun(http, approve="each")
    until(http, video_id, lambda video: video["edit_ray"]["awaiting_approval"])
    body, key = {"steer": {"prompt": BLUE}}, {"Idempotency-Key": "one"}
    answers = [http.patch(f"/v1/videos/{video_id}", json=body, headers=key).json() for _ in range(2)]
    assert [answer["edit_ray"]["applied_from"] for answer in answers] == [1, 1]
    assert len(RunFolder(tmp_path, video_id).read_manifest().changes) == 1
    http.delete(f"/v1/videos/{video_id}")


def test_a_segment_is_made_again_in_its_place(http, tmp_path):
    video_id = begun(http)
    assert until_ended(http, video_id)["status"] == "completed"
    before = bytes_of(tmp_path, video_id)
    events = http.get(f"/v1/videos/{video_id}/events").text
    last = events.rpartition("id: ")[2].partition("\n")[0]
    answer = http.post(f"/v1/videos/{video_id}/reroll", json={"from_segment": 2, "prompt": BLUE, "seed": 9})
    assert (answer.status_code, answer.json()["id"]) == (200, video_id)
    assert until_ended(http, video_id)["status"] == "completed"
    assert bytes_of(tmp_path, video_id) != before
    assert [s["take"] for s in http.get(f"/v1/videos/{video_id}/segments").json()["data"]] == [0, 0, 1, 1]
    later = http.get(f"/v1/videos/{video_id}/events", headers={"Last-Event-ID": last}).text
    assert later.count("event: segment") == 2


def test_a_branch_shares_what_came_before_it(http, tmp_path):
    video_id = begun(http)
    assert until_ended(http, video_id)["status"] == "completed"
    body, key = {"at": 2, "prompt": BLUE, "num_segments": 3}, {"Idempotency-Key": "branch"}
    answers = [http.post(f"/v1/videos/{video_id}/branch", json=body, headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    (branch_id,) = {answer.json()["id"] for answer in answers}
    assert until_ended(http, branch_id)["status"] == "completed"
    data = [http.get(f"/v1/videos/{found}/segments").json()["data"] for found in (video_id, branch_id)]
    assert [segment["prompt"] for segment in data[1]] == [PROMPT, PROMPT, BLUE]
    assert data[0][1]["seed"] == data[1][1]["seed"]
    other = http.post(f"/v1/videos/{video_id}/branch", json={"at": 1}, headers=key)
    assert code_of(other) == (409, "key_reused")


def test_an_extension_is_rounded_up_and_says_so(http):
    video_id = begun(http, num_segments=1)
    assert until_ended(http, video_id)["status"] == "completed"
    body = {"video": {"id": video_id}, "seconds": "0.6"}
    video = http.post("/v1/videos/extensions", json=body).json()
    assert video["edit_ray"]["note"] == "0.6 s more were asked for; 2 whole segments last 1 s."
    assert (video["seconds"], video["edit_ray"]["num_segments"]) == ("2.125", 3)
    assert until_ended(http, video["id"])["status"] == "completed"


@pytest.mark.parametrize(
    ("method", "path", "body", "found"),
    [
        ("PATCH", "", {}, [("invalid_value", None)]),
        ("PATCH", "", {"paused": True, "approve": 0}, [("invalid_value", None)]),
        ("PATCH", "", {"steer": {"promt": "x"}}, [("unknown_field", "steer.promt")]),
        ("PATCH", "", {"steer": 5}, [("invalid_value", "steer")]),
        ("PATCH", "", {"paused": "yes", "more": 1}, [("unknown_field", "more"), ("invalid_value", "paused")]),
        ("PATCH", "", {"paused": True}, [("video_conflict", None)]),
        ("PATCH", "", {"steer": {"prompt": BLUE}}, [("video_conflict", None)]),
        ("PATCH", "", {"approve": 0}, [("video_conflict", None)]),
        ("POST", "/remix", {}, [("invalid_value", "prompt")]),
        (
            "POST",
            "/remix",
            {"prompt": " ", "edit_ray": {"seed": -1}},
            [("invalid_value", "prompt"), ("invalid_value", "seed")],
        ),
        ("POST", "/remix", {"prompt": "\ud800"}, [("invalid_value", "prompt")]),
        ("POST", "/remix", {"prompt": BLUE, "edit_ray": 5}, [("invalid_value", "edit_ray")]),
        ("POST", "/remix", {"prompt": BLUE, "size": "1x1"}, [("unknown_field", "size")]),
        ("POST", "/branch", {}, [("invalid_value", "at")]),
        ("POST", "/branch", {"at": 9, "num_segments": 0}, [("invalid_value", "at"), ("invalid_value", "num_segments")]),
        ("POST", "/branch", {"at": "1"}, [("invalid_value", "at")]),
        ("POST", "/branch", {"at": 1, "num_segments": 1.5}, [("invalid_value", "num_segments")]),
        ("POST", "/reroll", {}, [("invalid_value", "from_segment")]),
        ("POST", "/reroll", {"from_segment": True}, [("invalid_value", "from_segment")]),
        ("POST", "/reroll", {"from_segment": 9, "seed": 5}, [("invalid_value", "from_segment")]),
        (
            "POST",
            "/reroll",
            {"from_segment": 0, "prompt": "\ud800", "seed": "x"},
            [("invalid_value", "prompt"), ("invalid_value", "seed")],
        ),
    ],
)
def test_changes_that_are_refused(made, method, path, body, found):
    http, video_id, before = made
    about = {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}
    answer = http.request(method, f"/v1/videos/{video_id}{path}", **about)
    problems = [(problem["code"], problem["param"]) for problem in answer.json()["error"]["edit_ray"]["problems"]]
    assert problems == found, answer.text
    assert [video["id"] for video in http.get("/v1/videos").json()["data"]] == [video_id]
    assert http.get(f"/v1/videos/{video_id}").json() == before


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({}, ["video", "seconds"]),
        ({"video": {"id": "ID"}, "seconds": "0"}, ["seconds"]),
        ({"video": {"id": "ID"}, "seconds": "x", "model": "tiny"}, ["model", "seconds"]),
        ({"video": "ID", "seconds": "4"}, ["video"]),
        ({"video": {"id": 5}, "seconds": "4"}, ["video"]),
        ({"video": {"id": "ID"}, "seconds": "1", "prompt": " "}, ["prompt"]),
        ({"video": {"id": "ID"}, "seconds": "604800"}, ["num_segments"]),
    ],
)
def test_extensions_that_are_refused(made, body, found):
    http, video_id, _ = made
    if isinstance(body.get("video"), dict) and body["video"]["id"] == "ID":
        body = body | {"video": {"id": video_id}}
    answer = http.post("/v1/videos/extensions", json=body)
    assert answer.status_code == 400
    assert [problem["param"] for problem in answer.json()["error"]["edit_ray"]["problems"]] == found


def test_a_file_is_not_extended(made):
    answer = made[0].post("/v1/videos/extensions", data={"seconds": "4"}, files={"video": b"\0\0\0\x18ftypmp42"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "video")


def test_a_video_that_is_made_is_not_extended_yet(http):
    video_id = begun(http, approve="each")
    answer = http.post("/v1/videos/extensions", json={"video": {"id": video_id}, "seconds": "1"})
    assert code_of(answer) == (409, "video_conflict")
    assert code_of(http.post(f"/v1/videos/{video_id}/reroll", json={"from_segment": 0}))[0] in (400, 409)
    http.delete(f"/v1/videos/{video_id}")


def test_other_videos_are_unknown(http):
    for method, path, body in (
        ("PATCH", "/v1/videos/none", {"paused": True}),
        ("POST", "/v1/videos/none/remix", {"prompt": BLUE}),
        ("POST", "/v1/videos/none/branch", {"at": 0}),
        ("POST", "/v1/videos/none/reroll", {"from_segment": 0}),
        ("POST", "/v1/videos/extensions", {"video": {"id": "../x"}, "seconds": "1"}),
    ):
        assert code_of(http.request(method, path, json=body)) == (404, "video_not_found")


@pytest.fixture(scope="module")
def made(scheduler, model, tmp_path_factory):
    """A client of HTTP, and the id and the object of a video that is done."""
    http = browser(ClientHere(tmp_path_factory.mktemp("runs"), scheduler), [offer_of(model)])
    video_id = begun(http, num_segments=2)
    return http, video_id, until_ended(http, video_id)
