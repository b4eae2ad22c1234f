"""Pages of docs/: their code runs, and their tables, names and numbers are those of the code."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edit_ray.cache.policies import POLICIES, CachePolicy, PolicyContext, WarmstartReuse
from edit_ray.cache.policies.policy import UnitState
from edit_ray.cli.main import parser
from edit_ray.config import load_config
from edit_ray.config.model import layout_of
from edit_ray.engine.options import CLIPS, PICTURES, ContinuityOptions, SamplingOptions
from edit_ray.video.encode import OutputOptions, encode
from edit_ray.video.fragments import Part, write_part
from edit_ray.video.hls import StreamFiles
from edit_ray.video.seams import LARGEST_SCORE, RADIUS, Joins
from tests.documented import ROOT, blocks, run_code
from tests.parity.test_cache_matrix import OPTIONS

CACHING, CONDITIONING, LONG_VIDEO = "docs/caching.md", "docs/conditioning.md", "docs/long-video.md"
PAGE, WATCHING = ((ROOT / "docs" / name).read_text() for name in ("caching.md", "watching.md"))
# What is changed so that the code takes seconds on a CPU; everything else runs as it is printed.
SMALLER = {"height=128": "height=32", "width=128": "width=32"}
FEW_STEPS = SMALLER | {"steps = 30": "steps = 6", "num_frames=33": "num_frames=5"}

pytestmark = pytest.mark.usefixtures("one_thread")


# docs/caching.md


def sections():
    """The python code of each section that has some, by its heading, in the order of the page."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)[1:]
    code = [block.code for block in blocks(CACHING, "python")]
    own = ([each for each in code if each in text] for text in parts[1::2])
    return {heading: found for heading, found in zip(parts[::2], own, strict=True) if found}


def rows(heading):
    """The cells of the table whose first column has this heading, one list a row."""
    lines = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def names():
    """What the quick start leaves, which every other section begins with."""
    found = run_code(CACHING, sections()["Quick start"], FEW_STEPS)
    found["pipe"].set_progress_bar_config(disable=True)
    return found


def test_the_quick_start_runs(names):
    assert names["video"].shape == (5, 32, 32, 3)
    assert names["pipe"].cache is None


@pytest.mark.parametrize("heading", [heading for heading in sections() if heading != "Quick start"])
def test_a_section_runs(names, heading, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert names["pipe"].cache is None
    own = dict(names)
    try:
        run_code(CACHING, sections()[heading], FEW_STEPS, own)
    finally:
        own["pipe"].disable_cache()
    if heading == "Warm start":
        printed = [line for line in capsys.readouterr().out.splitlines() if line[0].isdigit()]
        assert printed == ["0 [True, True]", "1 [False, False]", "2 [False, False]", "3 [True, True]"]


def test_everything_is_tested():
    assert sum(map(len, sections().values())) == len(blocks(CACHING, "python"))
    assert [old for old in FEW_STEPS if old not in PAGE] == []


def test_the_entry_point_is_the_one_that_is_looked_up():
    (block,) = blocks(CACHING, "toml")
    assert f'[project.entry-points."{POLICIES.group}"]' in block.code


def option_of(text):
    """`name` or `name=default` as a pair, the second None where there is no default."""
    name, equals, default = text.partition("=")
    return name, eval(default) if equals else inspect.Parameter.empty


def test_the_table_of_policies_is_that_of_the_classes():
    table = {row[0].strip("`"): row[1:] for row in rows("policy")}
    ours = {name for name in POLICIES.names() if POLICIES.find(name).__module__.startswith("edit_ray.")}
    assert set(table) == ours
    for name, (_, options, known, granularities) in table.items():
        cls = POLICIES.find(name)
        parameters = inspect.signature(cls).parameters.values()
        expected = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert dict(map(option_of, re.findall(r"`([^`]+)`", options))) == expected, name
        if cls is WarmstartReuse:
            assert (known, granularities) == ("as inner", "as inner")
        else:
            made = cls(**OPTIONS[name][0])
            assert known == ("yes" if made.timestep_only else "no"), name
            assert tuple(granularities.split(", ")) == made.granularities, name


def test_the_tables_for_writers_are_those_of_the_classes():
    described = {name.strip("()") for row in rows("`ctx.`") for name in re.findall(r"`([\w.()]+)`", row[0])}
    for name in described:
        part, _, below = name.partition(".")
        assert (
            hasattr(UnitState("", "", 0), below)
            if part == "state"
            else hasattr(PolicyContext, part) or (part in PolicyContext.__dataclass_fields__)
        ), name
    attributes = {name.strip("`"): default for name, default, _ in rows("class attribute")}
    assert set(attributes) == {
        name for name, value in vars(CachePolicy).items() if not name.startswith("_") and not callable(value)
    }
    for name, default in attributes.items():
        value = getattr(CachePolicy, name)
        assert default == ("all" if name == "granularities" else f"`{value}`")


# docs/conditioning.md and docs/long-video.md


def test_the_code_of_the_page_on_conditions_runs(tmp_path, monkeypatch):
    """In one piece: later blocks use the pipeline of earlier ones."""
    monkeypatch.chdir(tmp_path)
    names = run_code(CONDITIONING, [block.code for block in blocks(CONDITIONING, "python")], FEW_STEPS)
    assert names["pipe"].block_offload is None
    assert len(names["video"]) == len(names["again"]) == 17
    assert names["few"].frames.shape == (1, 17, 32, 32, 3)


def test_the_code_of_the_page_on_long_videos_runs(capsys):
    (block,) = blocks(LONG_VIDEO, "python")
    run_code(LONG_VIDEO, [block.code], SMALLER | {"num_inference_steps=30": "num_inference_steps=2"})
    assert capsys.readouterr().out.splitlines()[-1] == "81"


def test_the_configuration_of_long_videos_names_every_option(tmp_path):
    options, storyboard, _ = (block.code for block in blocks(LONG_VIDEO, "yaml"))
    path = tmp_path / "run.yaml"
    path.write_text(f"{options}video: {{num_segments: 3}}\nprompt_segments: [{{segment: 0, prompt: a red circle}}]\n")
    config = load_config(path)
    assert config.continuity == ContinuityOptions(mode="overlap")
    assert config.num_frames_total == 33 + 2 * 24
    of_causal_runs = next(block.code for block in blocks("docs/causal.md", "yaml"))
    named = [re.findall(r"^  (\w+):", text, re.MULTILINE) for text in (options, of_causal_runs)]
    assert list(ContinuityOptions.model_fields) == list(dict.fromkeys(named[0] + named[1]))
    assert [suffix for suffix in PICTURES + CLIPS if f"`{suffix}`" not in (ROOT / LONG_VIDEO).read_text()] == []
    path.write_text(storyboard + "video: {num_segments: 3}\n")
    last = load_config(path).storyboard.segment(2)
    assert (last.guidance_scale, "square" in last.prompt) == (6.0, True)


def test_the_pictures_of_a_storyboard_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown_in = blocks(LONG_VIDEO, "yaml")[2].code
    for name in re.findall(r"\w+\.png", shown_in):
        Image.new("RGB", (16, 16)).save(name)
    Path("run.yaml").write_text(shown_in + "video: {num_segments: 4}\n")
    board = load_config(Path("run.yaml")).storyboard
    shown = [board.segment(index).pictures for index in range(4)]
    assert [[Path(path).stem for path in pictures.paths] for pictures in shown] == [["first"], [], ["second"], ["last"]]


@pytest.mark.parametrize(("mode", "taken"), [("none", 0), ("history", 3), ("overlap", 3), ("image", 1), ("svi", 2)])
def test_the_table_of_frames_is_the_layout_s(mode, taken):
    layout = layout_of(SamplingOptions(num_frames=33), ContinuityOptions(mode=mode))
    assert layout.total_frames(4) == (33 + 3 * 4 * (9 - taken) if taken else 4 * 33)


def test_the_commands_in_the_text_on_long_videos_are_understood():
    commands = re.findall(r"`edit-ray ([^`]+)`", (ROOT / LONG_VIDEO).read_text())
    assert len(commands) >= 4
    for command in commands:
        parser().parse_args(command.split())


# docs/watching.md


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with two segments of noise, and the figures of the second."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "segments").mkdir()
    files = StreamFiles(folder, fps=16, longest=16)
    parts = [Part(f"segments/{index:05d}-t0.m4s", 16 * index, 16) for index in range(2)]
    for index, part in enumerate(parts):
        frames = np.random.default_rng(index).integers(0, 256, (16, 32, 32, 3), np.uint8)
        write_part(folder, part, encode(frames, fps=16, options=OutputOptions()))
        files.append(part)
    return folder, Joins().measure("one", folder, parts[1], parts[0], frames)


def test_the_files_are_those_of_a_run(run):
    named = set(re.findall(r"`([\w./-]+\.(?:mp4|m3u8|m4s))`", WATCHING)) - {"final.mp4"}
    there = {
        re.sub(r"live-\d+", "live-N", re.sub(r"\d{5}-t\d+", "NNNNN-tT", path.relative_to(run[0]).as_posix()))
        for path in run[0].rglob("*.m*")
    }
    assert named == there


def test_the_figures_are_those_of_a_segment(run):
    named = set(re.findall(r"`(seam_\w+|interior_score|red|green|blue|sharpness)`", WATCHING))
    assert named == set(run[1])
    assert f"at most {LARGEST_SCORE:g} |" in WATCHING
    assert RADIUS == 8
    assert "up to eight frames on each side" in " ".join(WATCHING.split())
