"""The clients of the door's load test, and the folder of its long run; the test itself is run by hand, on Ray."""

import asyncio
import json
import time
import urllib.request

import pytest

from benchmarks.cpu_run import config_for
from benchmarks.door_clients import Attendance, Crowd, events_in, named_in, quantile
from benchmarks.door_load import tables, verdicts, write
from benchmarks.long_folder import LongFolder
from edit_ray.testing import save_random_wan
from tests.door_here import PROMPT, ClientHere, SchedulerHere, browser, offer_of, serving

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("model") / "wan", expand_timesteps=True)


def test_a_quantile_is_a_value_that_occurred():
    values = [float(value) for value in range(100, 0, -1)]
    assert [quantile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert [quantile([7.0], share) for share in (0.0, 0.5, 0.99)] == [7, 7, 7]
    assert quantile([1.0, 2.0, 3.0], 0.99) == 3, "of few the longest"


def test_what_a_playlist_names():
    media = '#EXTM3U\n#EXT-X-MAP:URI="init.mp4"\n#EXTINF:2.0,\nsegments/0.m4s\n#EXTINF:2.0,\nsegments/1.m4s\n'
    assert named_in(media) == ["init.mp4", "segments/0.m4s", "segments/1.m4s"]
    assert named_in('#EXTM3U\n#EXT-X-STREAM-INF:CODECS="x"\nlive-0.m3u8\n') == ["live-0.m3u8"]


def test_events_of_a_stream():
    async def lines():
        for line in (b": still here\n", b"\n", b"id: 0-1-2\n", b"event: segment\n", b'data: {"index": 0}\n', b"\n"):
            yield line

    async def found():
        return [event async for event in events_in(lines())]

    assert asyncio.run(found()) == [("segment", '{"index": 0}')]


def test_a_client_that_has_missed_something_is_named():
    for wrong in ({"segments": [[0, 1, 1]]}, {"fragments": [1]}, {"others": {"video: 503": 1}}):
        with pytest.raises(AssertionError):
            Attendance(**wrong).check(2)
    Attendance(segments=[[0, 1]], fragments=[2]).check(2)


def test_a_small_crowd_gets_all_of_a_run_that_grows(model, tmp_path):
    async def attended(url):
        body = json.dumps({"prompt": PROMPT, "edit_ray": {"num_segments": 3}}).encode()
        asked = urllib.request.Request(f"{url}v1/videos", body, {"Content-Type": "application/json"})
        with await asyncio.to_thread(urllib.request.urlopen, asked, timeout=60) as answer:
            video_id = json.load(answer)["id"]
        ended, crowd = asyncio.Event(), Crowd(url, video_id, readers=4, followers=3, players=2, poll_s=0.2)
        attending = asyncio.create_task(crowd.attend(ended))
        deadline = time.monotonic() + 60
        while not (tmp_path / video_id / "final.mp4").exists():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        ended.set()
        return await attending

    with serving(model, tmp_path) as url:
        seen = asyncio.run(attended(url))
    seen.check(3)
    assert (len(seen.segments), len(seen.fragments)) == (3, 2)
    assert len(seen.seconds["fragment"]) == 2 * (3 + 1), "and the init, once each"
    assert seen.figures()["video"]["answers"] == len(seen.seconds["video"]) > 4


def test_the_long_run_is_one_for_the_door_and_grows(model, tmp_path):
    long, scheduler = LongFolder(tmp_path, "long", config_for(1, 2), 250, grows_s=1.0), SchedulerHere()
    http = browser(ClientHere(tmp_path, scheduler), [offer_of(model)])
    assert http.get("/v1/videos/long").json()["edit_ray"]["committed"] == 250
    long.grow_to(time.monotonic() + 3.5)
    video = http.get("/v1/videos/long").json()
    scheduler.end()
    assert video["edit_ray"]["committed"] in (253, 254)
    assert video["edit_ray"]["eta_s"] > 0
    assert [scene["segment"] for scene in video["edit_ray"]["storyboard"]] == [0, 100, 200]


def test_the_figures_are_judged_and_written(tmp_path):
    row = {"answers": 800, "p50_ms": 9.0, "p99_ms": 150.0, "most_ms": 210.0}
    long = {"first_ms": 800.0, "alone": row, "beside_the_crowd": row | {"p99_ms": 150.1}}
    pairs = [(3.0, 3.15), (3.0, 3.0), (3.0, 6.0)]
    figures = {"seconds_a_segment": pairs, "ratios": [b / a for a, b in pairs], "answers": {"video": row}}
    found = verdicts(figures | {"long_run": long})
    assert list(found.values()) == [True, True, False]
    about = dict.fromkeys(("command", "date", "commit", "device", "machine"), "x")
    write(tmp_path / "results", about | figures | {"long_run": long, "verdicts": found})
    text = (tmp_path / "results" / "door_load.md").read_text()
    assert text.count(": met\n") == 2
    assert text.count(": NOT met\n") == 1
    assert [table.row_count for table in tables(figures | {"long_run": long})] == [3, 3]
