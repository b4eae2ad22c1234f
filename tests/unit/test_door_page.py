"""The door's page without a browser: its files, what they name, and the storyboard's arithmetic."""

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import subprocess

import pytest
from starlette.requests import ClientDisconnect, Request

from edit_ray.config import Config
from edit_ray.server.app import make_app
from edit_ray.server.bodies import file_answer
from edit_ray.server.page_files import PAGE_FILES
from tests.door_here import ClientHere, browser, offer_of
from tests.unit import chromium
from tests.unit.test_cache_report import Page

SCRIPTS = {
    name: path.read_text() for name, (path, _) in PAGE_FILES.items() if name.endswith(".js") and "hls" not in name
}
HTML = PAGE_FILES["index.html"][0].read_text()
IMPORT = re.compile(r'^import .*? from "\./([\w.]+)";$|^import "\./([\w.]+)";$', re.M)


class Unasked:
    """No segment scheduler is asked for a file of the page."""


@pytest.fixture(scope="module")
def app(model, tmp_path_factory):
    return make_app(ClientHere(tmp_path_factory.mktemp("runs"), Unasked()), [offer_of(model)])


def reached():
    """The scripts that the page loads, by following their imports."""
    found, open_names = set(), re.findall(r'src="page/([\w.]+)"', HTML)
    while open_names:
        name = open_names.pop()
        if name not in found:
            found.add(name)
            open_names += [one or other for one, other in IMPORT.findall(SCRIPTS.get(name, ""))]
    return found


def test_every_file_that_the_page_names_is_there_and_no_other():
    named = reached() | set(re.findall(r'href="page/([\w.]+)"', HTML)) | {"index.html"}
    assert named | {"without_hls.js"} == set(PAGE_FILES) | {"without_hls.js"}
    assert all(path.is_file() for path, _ in PAGE_FILES.values())


def test_the_page_fetches_nothing_from_elsewhere_and_has_nothing_inline():
    page = Page(HTML)
    assert not any(name.startswith("on") or name == "style" for _, attrs in page.elements for name in attrs)
    assert all(attrs.get("src", "").startswith("page/") for attrs in page.all("script"))
    for name, text in SCRIPTS.items():
        assert "innerHTML" not in text, name
        assert not re.search(r"\beval\b|new Function|insertAdjacentHTML|document\.write", text), name
        assert "://" not in text.replace("http://www.w3.org/2000/svg", ""), name


def test_every_control_has_a_name():
    page = Page(HTML)
    assert [attrs.get("id") or attrs.get("name") for attrs in page.all("input")] == [*["theme"] * 3, "token"]
    assert len(page.all("label")) == len(page.all("input"))
    assert page.all("html") == [{"lang": "en"}]
    for name, text in SCRIPTS.items():
        for made in re.findall(r'el\("progress", (\{.*?\})', text):
            assert "aria-label" in made, name


def test_every_route_that_the_page_asks_is_one(app):
    routes = set(app.openapi()["paths"])
    asked = set(re.findall(r'at\(id, "(/[\w./]+)', SCRIPTS["api.js"])) | {""}
    one = {
        re.sub(r"^/v1/videos/\{video_id\}", "", route) for route in routes if route.startswith("/v1/videos/{video_id}")
    }
    one |= {rest.replace("{name}.mp4", "stream.mp4") for rest in one}
    assert asked - one == set()
    assert set(re.findall(r'"(/(?:v1/models|v1/videos/extensions|session))"', SCRIPTS["api.js"])) <= routes


@pytest.mark.parametrize("name", sorted(PAGE_FILES))
def test_the_door_serves_its_page(app, model, tmp_path, name):
    http = browser(ClientHere(tmp_path, Unasked()), [offer_of(model)])
    path, kind = PAGE_FILES[name]
    answer = http.get("/" if name == "index.html" else f"/page/{name}")
    assert (answer.status_code, answer.headers["content-type"], answer.content) == (200, kind, path.read_bytes())
    assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/page/", "/page/page_files.py", "/page/..%2fapp.py", "/page/app.js/", "/index.html"])
def test_the_door_serves_no_other_file(model, tmp_path, path):
    http = browser(ClientHere(tmp_path, Unasked()), [offer_of(model)])
    assert http.get(path).status_code == 404


@pytest.mark.parametrize("version", ["2.0", "2.4"])
def test_a_file_is_closed_when_its_viewer_leaves_before_the_first_byte(tmp_path, version):
    (tmp_path / "long.mp4").write_bytes(bytes(1 << 22))
    descriptor = os.open(tmp_path / "long.mp4", os.O_RDONLY)
    scope = {"type": "http", "method": "GET", "headers": [], "asgi": {"spec_version": version}}
    answer = file_answer(Request(scope), (descriptor, "video/mp4"))

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        raise OSError("the viewer has left")

    with contextlib.suppress(OSError, ClientDisconnect, ExceptionGroup):
        asyncio.run(answer(scope, receive, send))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


# The storyboard, in node.

DRIVER = """
import { asFields, fitted, lengthOf, moved, split, without } from SCENES;
import { readFileSync } from "node:fs";
const given = JSON.parse(readFileSync(0, "utf8"));
const out = given.stories.map((story) => {
  let scenes = [{ segment: 0, prompt: "" }], segments = story.segments;
  return story.steps.map(([name, index, value]) => {
    const at = index % scenes.length;
    if (name === "split") scenes = split(scenes, at, segments) ?? scenes;
    if (name === "remove") scenes = without(scenes, at);
    if (name === "move" && at > 0) scenes = moved(scenes, at, value, segments);
    if (name === "fit") { segments = Math.max(1, value); scenes = fitted(scenes, segments); }
    return { scenes, segments, fields: asFields(scenes) };
  });
});
const lengths = given.lengths.map(([layout, length]) => lengthOf(layout, length));
console.log(JSON.stringify({ out, lengths }));
"""


def layout_of(config):
    frames = config.layout.frames_of(1)
    return {"num_frames": config.sampling.num_frames, "fps": config.sampling.fps, "frames_of_a_later_segment": frames}


def test_a_storyboard_stays_one_whatever_is_done_to_it_and_lengths_are_those_of_the_server(tmp_path):
    node = shutil.which("node")
    chromium.require("node", node is not None, "node is not installed")
    rng = random.Random(7)
    steps = ("split", "remove", "move", "fit")
    stories = [
        {
            "segments": rng.randint(1, 12),
            "steps": [[rng.choice(steps), rng.randint(0, 9), rng.randint(-2, 14)] for _ in range(20)],
        }
        for _ in range(200)
    ]
    base = {"sampling": {"num_frames": 33, "fps": 16}, "prompt_segments": [{"segment": 0, "prompt": "a red circle"}]}
    seconds = [0.1, 1, 2, 2.0625, 2.1, 3.5, 3.5625, 4, 6, 59.9, 3600]
    configs = [
        Config.model_validate(base | {"video": {"duration": f"{length}s"}, "continuity": {"mode": mode}})
        for mode in ("none", "history")
        for length in seconds
    ]
    lengths = [[layout_of(config), config.video.duration] for config in configs]
    (tmp_path / "driver.mjs").write_text(DRIVER.replace("SCENES", json.dumps(str(PAGE_FILES["scenes.js"][0]))))
    answer = subprocess.run(
        [node, "--no-warnings", str(tmp_path / "driver.mjs")],
        input=json.dumps({"stories": stories, "lengths": lengths}),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = json.loads(answer.stdout)
    for state in (state for story in found["out"] for state in story):
        begins = [scene["segment"] for scene in state["scenes"]]
        assert begins[0] == 0
        assert begins == sorted(set(begins))
        assert begins[-1] < state["segments"]
        assert ("prompt" in state["fields"]) == (len(begins) == 1) != ("storyboard" in state["fields"])
    for config, length in zip(configs, found["lengths"], strict=True):
        assert length["segments"] == config.num_segments
        assert length["seconds"] == pytest.approx(config.num_frames_total / config.sampling.fps)
