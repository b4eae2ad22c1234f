"""docs/long-video.md: its code runs, its configuration is understood, its numbers of frames are the layout's."""

import re
from pathlib import Path

import pytest
from PIL import Image

from edit_ray.cli.main import parser
from edit_ray.config import load_config
from edit_ray.config.model import layout_of
from edit_ray.engine.options import CLIPS, PICTURES, ContinuityOptions, SamplingOptions
from edit_ray.runs.run_plan import FrameLayout

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "long-video.md").read_text()
# What is changed so that the code takes seconds on a CPU; everything else runs as it is printed.
SMALLER = {"height=128": "height=32", "width=128": "width=32", "num_inference_steps=30": "num_inference_steps=2"}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("one_thread")
def test_the_code_runs(capsys):
    (code,) = blocks("python")
    for old, new in SMALLER.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "<docs/long-video.md>", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "81"


def test_the_configuration_names_every_option(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        blocks("yaml")[0] + "video: {num_segments: 3}\nprompt_segments: [{segment: 0, prompt: a red circle}]\n"
    )
    config = load_config(path)
    assert config.continuity == ContinuityOptions(mode="overlap")
    assert config.num_frames_total == 33 + 2 * 24
    assert list(ContinuityOptions.model_fields) == re.findall(r"^  (\w+):", blocks("yaml")[0], re.MULTILINE)
    for suffix in PICTURES + CLIPS:
        assert f"`{suffix}`" in PAGE


def test_the_storyboard_is_understood(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(blocks("yaml")[1] + "video: {num_segments: 3}\n")
    last = load_config(path).storyboard.segment(2)
    assert (last.guidance_scale, "square" in last.prompt) == (6.0, True)


def test_the_pictures_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"\w+\.png", blocks("yaml")[2]):
        Image.new("RGB", (16, 16)).save(name)
    Path("run.yaml").write_text(blocks("yaml")[2] + "video: {num_segments: 4}\n")
    board = load_config(Path("run.yaml")).storyboard
    shown = [board.segment(index).pictures for index in range(4)]
    assert [[Path(path).stem for path in pictures.paths] for pictures in shown] == [["first"], [], ["second"], ["last"]]


def test_the_commands_are_understood():
    commands = re.findall(r"`edit-ray ([^`]+)`", PAGE)
    assert len(commands) >= 4
    for command in commands:
        parser().parse_args(command.split())


def test_the_table_of_frames_is_the_layout_s():
    frames, latents, k, segments = 33, 9, 3, 4
    of_clip, later = FrameLayout(frames, k, 16, init_latents=k), 4 * (latents - k)
    assert of_clip.total_frames(segments) == segments * later
    assert FrameLayout(frames, k, 16).total_frames(segments) == frames + (segments - 1) * later
    assert FrameLayout(frames, 0, 16).total_frames(segments) == segments * frames
    for mode, taken in (("image", 1), ("svi", 2)):
        layout = layout_of(SamplingOptions(num_frames=frames), ContinuityOptions(mode=mode))
        assert layout.total_frames(segments) == frames + (segments - 1) * 4 * (latents - taken)
