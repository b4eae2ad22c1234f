"""The door's page in a browser: a video is made, watched while it grows, steered, approved, made again and branched."""

import asyncio
import json
import time

import pytest

from edit_ray.page.run_server import HLS_JS
from tests.door_here import serving
from tests.unit import chromium

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

AT = "document.querySelector('video').currentTime"
TOKEN = "a token of this test"

# What a person does, in the page: words on buttons and labels are the only names used.
HANDS = """
window.press = (word) => {
  const all = [...document.querySelectorAll('button, summary, a')].filter((e) => e.checkVisibility());
  const found = all.find((e) => e.textContent.trim().startsWith(word));
  if (!found) throw new Error(`there is no ${word} among ${all.map((e) => e.textContent)}`);
  found.click();
};
window.write = (label, value) => {
  const all = [...document.querySelectorAll('label')].filter((e) => e.checkVisibility());
  const input = all.find((e) => e.textContent.trim().startsWith(label)).querySelector('input, textarea, select');
  input.value = value;
  input.dispatchEvent(new Event('input', { bubbles: true }));
};
window.said = () => document.querySelector('article [role=status]')?.textContent ?? '';
window.badge = () => document.querySelector('.badge')?.textContent ?? '';
window.segments = () => document.querySelectorAll('.strip li:not(.coming)').length;
"""


@pytest.fixture(autouse=True)
def _programs():
    chromium.require("chromium", chromium.PROGRAM is not None, "chromium is not installed")
    chromium.require(
        "hls.js", HLS_JS.is_file() and chromium.AXE.is_file(), "hls.js and axe-core are not installed: make page"
    )


async def make(page, prompt, length, **more):
    """Fills in the form and sends it; waits for the page of the new video, whose id it returns."""
    await page.until("!!document.querySelector('option')", 30)
    await page.value(f"write('Prompt', {json.dumps(prompt)}); write('Seconds', {json.dumps(length)})")
    if more:
        await page.value("press('More')")
    if more.get("steps"):
        await page.value(f"write('Steps', '{more['steps']}')")
    if more.get("ask"):
        await page.value("document.querySelector('[type=checkbox]').click()")
    await page.value("press('Make the video')")
    return await id_of(page, "")


async def id_of(page, other):
    """The id of the video that the page shows, once it is not `other`."""
    await page.until(f"location.hash.startsWith('#/videos/') && location.hash !== '#/videos/{other}'", 60)
    await page.until("badge() !== ''", 30)
    return (await page.value("location.hash")).removeprefix("#/videos/")


def watched(model, root, tmp_path, script, **changes):
    async def watch():
        with serving(model, root, **changes) as url:
            async with chromium.page(tmp_path / "browser", 1280, 900) as page:
                await page.open(url, HANDS)
                await script(page, url)
                assert page.errors == []

    asyncio.run(watch())


def test_a_video_is_made_watched_steered_made_again_branched_and_extended(model, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()

    async def script(page, url):
        await page.check_look()
        first = await make(page, "a red circle", "6", steps=40)
        await page.until("document.querySelector('.before')?.checkVisibility()", 30)
        assert await page.value("document.querySelector('.before .prompt').textContent") == "a red circle"
        dead = await page.value("[...document.querySelectorAll('article a')].filter((e) => e.checkVisibility()).length")
        assert dead == 0, "before the first segment nothing can be downloaded"
        await page.until("segments() >= 1", 120)
        await page.until(f"{AT} > 0.2", 60)

        await page.value("press('Pause')")
        await page.until("said().startsWith('Paused')", 60)
        await page.value("press('Continue')")
        await page.until("!said().startsWith('Paused')", 60)
        await page.value("write('New prompt', 'a blue square'); press('Change what comes')")
        await page.until("document.querySelector('.steer [role=status]').textContent.startsWith('It holds')", 60)
        start = int(
            await page.value("document.querySelector('.steer [role=status]').textContent.match(/segment (\\d+)/)[1]")
        )
        assert start >= 1
        await page.until(f"{AT} > 1.2", 120)
        await page.until("badge() === 'done'", 300)
        await page.until("[...document.querySelectorAll('.strip img')].every((e) => e.naturalWidth > 0)", 30)
        await page.check_look()
        count = await page.value("segments()")
        prompts = (root / first / "manifest.jsonl").read_text()
        assert "a blue square" in prompts

        await page.value("document.querySelectorAll('.strip button')[1].focus()")
        await page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
        await page.until("document.querySelector('.chosen h2').textContent === 'Segment 2'", 30)
        await page.value("press('Make again or branch'); write('Prompt from here on', 'a red circle')")
        await page.value("press('Make again from here')")
        await page.until("badge() !== 'done'", 60)
        await page.until("badge() === 'done'", 300)
        assert await page.value("segments()") == count
        assert '"number":1' in (root / first / "manifest.jsonl").read_text().replace(" ", "")

        await page.value("document.querySelectorAll('.strip button')[1].click()")
        await page.until("document.querySelector('.chosen h2').textContent === 'Segment 1'", 30)
        await page.value("press('Make again or branch'); press('Branch here')")
        second = await id_of(page, first)
        await page.until("badge() === 'done'", 300)
        assert second != first
        await page.value("write('Prompt of what follows', 'a red circle'); write('Seconds', '1'); press('Extend')")
        third = await id_of(page, second)
        await page.until("badge() === 'done'", 300)
        assert await page.value("segments()") > count

        await page.value("location.hash = '#/'")
        await page.until("document.querySelectorAll('.videos li').length === 3", 30)
        await page.until("[...document.querySelectorAll('.videos img')].every((e) => e.naturalWidth > 0)", 30)
        await page.check_look()
        await page.value(f"location.hash = '#/videos/{third}'")
        await page.until("badge() === 'done'", 30)
        await page.until(f"{AT} > 0", 30)
        await page.value("press('Delete')")
        await page.value("press('Really delete it?')")
        await page.until("location.hash === '#/' && document.querySelectorAll('.videos li').length === 2", 60)
        assert not (root / third).exists()

    watched(model, root, tmp_path, script)


def test_a_storyboard_is_edited_by_keys_and_by_hand_and_a_theme_stays(model, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    border = "document.querySelector('.board .border')"

    async def drag(page, by):
        at = await page.value(f"(({{x, y}}) => [x + 12, y + 12])({border}.getBoundingClientRect())")
        mouse = {"button": "left", "clickCount": 1, "y": at[1]}
        await page.call("Input.dispatchMouseEvent", type="mousePressed", x=at[0], **mouse)
        await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0] + by, **mouse)
        await page.call("Input.dispatchMouseEvent", type="mouseReleased", x=at[0] + by, **mouse)

    async def script(page, url):
        await page.until("!!document.querySelector('option')", 30)
        await page.value("write('Prompt', 'a red circle'); write('Seconds', '5'); press('Add a prompt')")
        await page.value("write('Prompt 2', 'a blue square')")
        now = f"Number({border}.getAttribute('aria-valuenow'))"
        middle = await page.value(now)
        await page.value(f"{border}.focus()")
        for key, by in (("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", -1)):
            await page.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
            assert await page.value(now) == middle + by
        await drag(page, 5000)
        assert await page.value(now) == await page.value(f"Number({border}.getAttribute('aria-valuemax'))")
        await drag(page, -5000)
        assert await page.value(now) == 1
        await page.check_look()

        ground = "getComputedStyle(document.body).backgroundColor"
        await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
        light = await page.value(ground)
        await page.value("document.querySelector('[name=theme][value=dark]').click()")
        assert await page.value(ground) != light
        await page.call("Page.reload")
        await page.until("!!document.querySelector('option')", 30)
        assert await page.value(ground) != light, "the choice outlives the page"

        await page.value("write('Prompt', 'a red circle'); write('Seconds', '2'); press('Add a prompt')")
        await page.value("write('Prompt 2', 'a blue square'); press('Make the video')")
        video_id = await id_of(page, "")
        await page.until("badge() === 'done'", 120)
        lines = [json.loads(line) for line in (root / video_id / "manifest.jsonl").read_text().splitlines()]
        prompts = [line["segment"]["prompt"] for line in lines if line["kind"] == "committed"]
        assert list(dict.fromkeys(prompts)) == ["a red circle", "a blue square"]

    watched(model, root, tmp_path, script)


def test_a_segment_waits_for_a_yes(model, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()

    async def script(page, url):
        await make(page, "a red circle", "2", ask=True)
        await page.until("said().includes('waits for your yes')", 120)
        assert await page.value("segments()") == 1
        await page.check_look()
        rounds = 0
        while await page.value("badge()") != "done":
            assert (rounds := rounds + 1) < 10
            before = await page.value("segments()")
            await page.value("press('Approve segment')")
            await page.until(
                f"badge() === 'done' || (segments() > {before} && said().includes('waits for your yes'))", 120
            )
        assert rounds == await page.value("segments()")

    watched(model, root, tmp_path, script)


def test_mistakes_are_shown_where_they_were_made(model, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()

    async def script(page, url):
        await page.until("!!document.querySelector('option')", 30)
        await page.value(
            "write('Prompt', 'a red circle'); write('Seconds', '1'); press('More'); write('Steps', '99999')"
        )
        await page.value("press('Make the video')")
        await page.until(
            "document.querySelector('.errors').textContent.startsWith('Steps for each segment is 99999')", 30
        )
        await page.check_look()
        assert page.errors.pop().startswith("Failed to load resource: the server responded with a status of 400")
        assert list(root.iterdir()) == []
        await page.call("Page.navigate", url=f"{url}#/videos/nobody")
        await page.until("said().includes('no video')", 30)
        page.errors.clear()

    watched(model, root, tmp_path, script)


def test_the_token_is_asked_for_once_and_is_kept_as_a_cookie(model, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()

    async def script(page, url):
        await page.until("document.getElementById('entrance').open", 30)
        await page.check_look()
        await page.value("write('Token', 'wrong'); press('Enter')")
        await page.until("document.getElementById('entrance-error').textContent !== ''", 30)
        await page.value(f"write('Token', {json.dumps(TOKEN)}); press('Enter')")
        await page.until("!!document.querySelector('option')", 30)
        assert await page.value("document.cookie") == "", "no script can read it"
        page.errors.clear()  # the refusals
        await make(page, "a red circle", "1")
        await page.until("badge() === 'done'", 120)
        deadline = time.monotonic() + 30
        while not await page.value(f"{AT} > 0") and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert await page.value(AT) > 0

    watched(model, root, tmp_path, script, token=TOKEN)
