"""OpenAI's Python client, as it is, against the HTTP door."""

import io

import openai
import pytest
from PIL import Image

from edit_ray.runs.folder import RunFolder
from tests.door_here import PROMPT, ClientHere, SchedulerHere, browser, offer_of
from tests.runs_here import everything

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def scheduler():
    scheduler = SchedulerHere()
    yield scheduler
    scheduler.end()


@pytest.fixture
def client(scheduler, model, tmp_path):
    offers = [offer_of(model), offer_of(model, "other", engine={"segment_retries": 1})]
    http = browser(ClientHere(tmp_path, scheduler), offers)
    return openai.OpenAI(api_key="unused", base_url="http://127.0.0.1/v1", http_client=http, max_retries=0)


def test_create_poll_list_content_delete(client, tmp_path):
    video = client.videos.create(prompt=PROMPT, model="other", seconds="1", size="48x32")
    assert (video.object, video.model, video.size, video.prompt) == ("video", "other", "48x32", PROMPT)
    assert video.status in ("queued", "in_progress")
    assert video.error is None
    done = client.videos.poll(video.id, poll_interval_ms=50)
    assert (done.status, done.progress, done.seconds) == ("completed", 100, "1.125")
    assert done.edit_ray["note"] == "1 s were asked for; one whole segment lasts 1.125 s."
    assert done.completed_at >= done.created_at > 0

    second = client.videos.create_and_poll(
        prompt=PROMPT, poll_interval_ms=50, extra_body={"edit_ray": {"seed": 7, "num_segments": 1}}
    )
    assert (second.edit_ray["seed"], second.edit_ray["num_segments"]) == (7, 1)
    assert [found.id for found in client.videos.list()] == [second.id, video.id]
    assert [found.id for found in client.videos.list(limit=1)] == [second.id, video.id]
    assert [found.id for found in client.videos.list(order="asc", limit=1)] == [video.id, second.id]

    content = client.videos.download_content(video.id)
    assert content.read() == (tmp_path / video.id / "final.mp4").read_bytes()
    for variant in ("thumbnail", "spritesheet"):
        picture = Image.open(io.BytesIO(client.videos.download_content(video.id, variant=variant).read()))
        assert picture.size == {"thumbnail": (48, 32), "spritesheet": (48, 32)}[variant]

    gone = client.videos.delete(video.id)
    assert (gone.id, gone.deleted, gone.object) == (video.id, True, "video.deleted")
    assert not (tmp_path / video.id).exists()
    with pytest.raises(openai.NotFoundError) as refused:
        client.videos.retrieve(video.id)
    assert refused.value.code == "video_not_found"


def test_a_mistake_is_an_error_of_the_clients_own(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt=PROMPT, model="sora-2", size="100x90", seconds="none")
    assert [problem["param"] for problem in refused.value.body["edit_ray"]["problems"]] == ["model", "size", "seconds"]
    assert "the nearest is 96x96" in refused.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.edit(prompt=PROMPT, video=openai.omit, extra_body={"video": {"id": "any"}})
    assert refused.value.code == "not_supported"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("sora-2")


def test_a_video_begins_with_a_picture(client, tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(data, "PNG")
    video = client.videos.create(prompt=PROMPT, seconds="1", input_reference=("x/../y.exe", data.getvalue()))
    assert client.videos.poll(video.id, poll_interval_ms=50).status == "completed"
    (stored,) = (tmp_path / ".uploads").iterdir()
    assert (stored.name, stored.read_bytes()) == (f"{video.id}.png", data.getvalue())
    client.videos.delete(video.id)
    assert list((tmp_path / ".uploads").iterdir()) == []


def test_a_remix_and_an_extension_are_videos_of_their_own(client, tmp_path):
    video = client.videos.create_and_poll(prompt=PROMPT, poll_interval_ms=50, seconds="1.5")
    before = everything(RunFolder(tmp_path, video.id))

    remix = client.videos.poll(client.videos.remix(video.id, prompt="a blue square").id, poll_interval_ms=50)
    assert (remix.status, remix.remixed_from_video_id, remix.prompt) == ("completed", video.id, "a blue square")
    assert (remix.seconds, remix.size) == (video.seconds, video.size)

    # Its own types and checks disagree on `video`: it takes only files there, so the id goes another way.
    longer = client.videos.extend(
        prompt="a blue square", seconds="1", video=openai.omit, extra_body={"video": {"id": video.id}}
    )
    assert longer.id not in (video.id, remix.id)
    assert longer.edit_ray["note"] is None
    longer = client.videos.poll(longer.id, poll_interval_ms=50)
    assert (longer.status, longer.remixed_from_video_id) == ("completed", video.id)
    assert float(longer.seconds) == float(video.seconds) + 1
    shared = [RunFolder(tmp_path, found.id).media(0).read_bytes() for found in (video, longer)]
    assert shared[0] == shared[1]
    assert everything(RunFolder(tmp_path, video.id)) == before
    client.videos.delete(video.id)
    assert client.videos.download_content(longer.id).read() == (tmp_path / longer.id / "final.mp4").read_bytes()
