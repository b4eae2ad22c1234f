"""The page in a browser: a video that still grows plays from its start across its joins."""

import asyncio
import threading

import numpy as np
import pytest

from edit_ray.page.drawing import data_url
from edit_ray.page.run_page import render_run
from edit_ray.page.run_server import HLS_JS, PageServer
from edit_ray.video.hls import StreamFiles, newest_playlist
from tests.unit import chromium
from tests.unit.test_cache_report import RECORD
from tests.unit.test_run_report import segment
from tests.unit.test_stream_files import make_part

pytestmark = pytest.mark.slow

COUNT_SEEKS = "window.seeks = 0; document.addEventListener('seeking', () => { window.seeks += 1 }, true)"
VIDEO = "document.getElementById('video')"
AT = f"{VIDEO}.currentTime"
LENGTHS = [33, 24, 24, 24]


class GrowingRun:
    """A run's folder that gets another segment whenever it is told."""

    def __init__(self, folder) -> None:
        self.folder, self.made, self.ended = folder, 0, False
        self._files = StreamFiles(folder, fps=16, longest=33)
        self._files.rebuild([])

    def status(self) -> dict:
        return {
            "run_id": "one",
            "state": "done" if self.ended else "running",
            "committed": self.made,
            "num_segments": len(LENGTHS),
            "error": None,
            "final": None,
            "playlist": newest_playlist(self.folder),
            "prompts": [{"start_s": 0.0, "prompt": "numbers"}, {"start_s": 57 / 16, "prompt": "more numbers"}],
        }

    def grow(self) -> None:
        self._files.append(make_part(self.folder, self.made, sum(LENGTHS[: self.made]), LENGTHS[self.made]))
        self.made += 1

    def end(self) -> None:
        self._files.end()
        self.ended = True


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return GrowingRun(tmp_path / "run")


@pytest.fixture
def url(run):
    chromium.require("chromium", chromium.PROGRAM is not None, "chromium is not installed")
    with PageServer(run.folder, run.status) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


async def opened(page, url) -> None:
    await page.call("Page.enable")
    await page.call("Page.addScriptToEvaluateOnNewDocument", source=COUNT_SEEKS)
    await page.call("Page.navigate", url=url)
    await page.until("document.readyState === 'complete' && location.href !== 'about:blank'", 30)


def test_playback_crosses_every_join_without_a_seek_while_the_run_goes_on(run, url, tmp_path):
    chromium.require("hls.js", HLS_JS.is_file(), "hls.js is not installed: make page")

    async def watch():
        async with chromium.page(tmp_path / "browser") as page:
            await opened(page, url)
            await page.until("document.getElementById('told').textContent.includes('0 of 4')", 30)
            run.grow()
            await page.until(f"{AT} > 0.2", 30)
            for join in (33, 57, 81):
                if join == 57:  # once the viewer has to wait for the next segment
                    await page.until(f"{AT} > 0.5 && {VIDEO}.readyState < HTMLMediaElement.HAVE_FUTURE_DATA", 30)
                run.grow()
                await page.until(f"{AT} > {join / 16 + 0.2}", 30)
                assert not run.ended
            assert await page.value("document.getElementById('prompt').textContent") in ("numbers", "more numbers")
            run.end()
            await page.until(f"{VIDEO}.ended", 30)
            await page.until("document.getElementById('told').textContent.startsWith('done, 4 of 4')", 30)
            assert await page.value(AT) == pytest.approx(105 / 16, abs=0.1)
            assert await page.value("seeks") == 0
            assert await page.value(f"{VIDEO}.getVideoPlaybackQuality().totalVideoFrames") >= 105

    asyncio.run(watch())


def test_a_report_is_in_order_on_a_phone_and_a_desktop_light_and_dark(tmp_path):
    chromium.require("chromium", chromium.PROGRAM is not None, "chromium is not installed")
    chromium.require("axe-core", chromium.AXE.is_file(), "axe-core is not installed: make page")
    segments = [segment(index, prompt, red=90.0 + index) for index, prompt in enumerate("aabbb")]
    pictures = [(index, [data_url(np.zeros((32, 48, 3), np.uint8))] * 2) for index in range(5)]
    records = {f"segment {index}": RECORD for index in range(5)}
    file = tmp_path / "report.html"
    file.write_text(render_run("one", "done", "{}", segments, records=records, pictures=pictures))

    async def look():
        async with chromium.page(tmp_path / "browser") as page:
            await page.open(file.as_uri())
            await page.check_look()
            await page.value("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
            await page.check_look()
            ground = "getComputedStyle(document.body).backgroundColor"
            found = []
            for theme in ("light", "dark"):
                await page.value(f"document.querySelector('[value={theme}]').click()")
                found.append(await page.value(ground))
            assert found == ["rgb(244, 246, 248)", "rgb(17, 21, 27)"]
            assert page.errors == []

    asyncio.run(look())


def test_without_hls_js_the_browser_plays_what_is_there(run, url, tmp_path, monkeypatch):
    monkeypatch.setattr("edit_ray.page.run_server.HLS_JS", tmp_path / "nowhere")
    for _ in LENGTHS:
        run.grow()
    run.end()

    async def watch():
        async with chromium.page(tmp_path / "browser") as page:
            await opened(page, url)
            await page.until(f"{VIDEO}.ended", 60)
            assert await page.value("typeof Hls") == "undefined"
            assert await page.value(AT) == pytest.approx(105 / 16, abs=0.1)

    asyncio.run(watch())
