"""README, docs and the other pages: their links lead somewhere, their commands are understood, what is made is fresh.

tests/documented.py says which test runs which of their code; here is that of the README.
"""

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import yaml
from PIL import Image

from edit_ray.cli.main import parser
from edit_ray.config import load_config
from tests.documented import PAGES, ROOT, blocks, commands, run_code

SITE = runpy.run_path(str(ROOT / "docs" / "repository_links.py"))
# Programs of others, whose arguments are not looked at: tests/documented.py says which test runs them.
OF_OTHERS = {"pip", "python", "python3", "uv", "ray", "torchrun"}
OF_OTHERS |= {"docker", "kubectl", "npm", "ffplay", "sudo", "cd", "export"}


def anchors(page):
    """Of the headings, as code hosts and the site make them."""
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    SITE["linked"](text, PurePosixPath(page), ROOT)
    for target in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if not path.startswith("http"):
            other = os.path.normpath(Path(page).parent / path) if path else page
            assert heading in anchors(other), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text()) <= 6500


def test_every_page_has_its_place_in_the_site():
    said = yaml.safe_load((ROOT / "mkdocs.yml").read_text().split("hooks:")[0]) | {
        "nav": yaml.safe_load((ROOT / "mkdocs.yml").read_text().split("\nnav:")[1])
    }
    named = [next(iter(entry.values())) for entry in said["nav"]]
    assert sorted(named) == sorted(["index.md", *(page.removeprefix("docs/") for page in PAGES if page[:5] == "docs/")])


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page):
    job = runpy.run_path(str(ROOT / "jobs" / "long_video.py"))["_parser"]()
    targets = (ROOT / "Makefile").read_text()
    for command in commands(page):
        words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
        match words:
            case ["edit-ray", *arguments]:
                parser().parse_args(arguments)
            case ["make", *names]:
                assert all(f"\n{name}:" in targets for name in names), command
            case ["ray", "job", "submit", *rest] if "--" in rest:
                assert rest[rest.index("--") + 1 :][:2] == ["python", "jobs/long_video.py"]
                job.parse_args(rest[rest.index("--") + 3 :])
            case ["python", script, *_]:
                assert (ROOT / script).is_file(), command
            case [program, *_]:
                assert Path(program).name in OF_OTHERS, command


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_configurations_are_valid(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rest = {"video": "{num_segments: 3}", "prompt_segments": "[{segment: 0, prompt: a red circle}]"}
    for code in (block.code for block in blocks(page, "yaml")):
        path = tmp_path / "run.yaml"
        for picture in re.findall(r"\b\w+\.png", code):
            Image.new("RGB", (16, 16)).save(picture)
        path.write_text(code + "".join(f"\n{key}: {value}\n" for key, value in rest.items() if f"{key}:" not in code))
        # LoRAs and causal models are files of the reader's.
        check_model = "loras:" not in code and "mode: causal" not in code
        assert yaml.safe_load(code).keys() <= load_config(path, check_model=check_model).model_fields_set


def test_pages_that_are_made_from_the_code_are_fresh():
    for page, text in runpy.run_path(str(ROOT / "docs" / "generate.py"))["generated"]().items():
        assert (ROOT / page).read_text() == text, f"{page}: run `python docs/generate.py`"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """Of the library; those of the clients are in tests/ray."""
    monkeypatch.chdir(tmp_path)
    codes = [
        block.code for block in blocks("README.md", "python") if not re.search("LongVideoClient|OpenAI", block.code)
    ]
    names = run_code("README.md", codes, {})
    assert names["video"].shape == (33, 128, 128, 3)
    assert (tmp_path / "circle_and_square.mp4").is_file()
    said, promised = capsys.readouterr().out, re.findall(r"skipped=\(.*?\)", (ROOT / "README.md").read_text())
    assert promised
    assert [words for words in promised if words not in said] == [], "the snippet skips what it says"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        if "mkdocs" in os.environ.get("EDIT_RAY_REQUIRE", ""):
            pytest.fail("mkdocs is not installed")
        pytest.skip("mkdocs is not installed: `make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "excluded from the built site" not in done.stderr
    assert (tmp_path / "index.html").is_file()
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    from_elsewhere = r"<(?:script|link|img)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
    assert {name: found for name, page in pages.items() if (found := re.findall(from_elsewhere, page))} == {}
    assert "&gt;&gt;&gt; " in pages["api.html"]
    assert "<blockquote>" not in pages["api.html"], "an example is no quotation"


# Said by Ray, or put together from parts.
OF_RAY = {"No module named 'ray'", "No available agent", "The current node timed out during startup"}
OF_RAY |= {"AuthenticationError", "RAY_AUTH_MODE is currently 'disabled'"}
MADE_OF_PARTS = {
    "is an unknown key; did you mean",
    "is not allowed here; models are builtin:",
    "lower the host tier's budget or enlarge /dev/shm",
    "this is a newer version's manifest",
}


def test_what_the_page_of_troubles_quotes_is_what_is_said():
    sources = "\n".join(path.read_text() for path in (ROOT / "edit_ray").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", sources)  # sentences that go on in the next line
    quoted = [
        part.strip(" ;")
        for row in re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", row)
        for part in code.split("…")
    ]
    sentences = {part for part in quoted if len(part) >= 10}
    assert len(sentences) > 20
    assert {part for part in sentences if part not in said} == OF_RAY | MADE_OF_PARTS
