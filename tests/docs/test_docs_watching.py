"""docs/watching.md: its names are those of the code, its picture is small."""

import re
from pathlib import Path

import numpy as np
import pytest

from edit_ray.video.encode import OutputOptions, encode
from edit_ray.video.fragments import Part, write_part
from edit_ray.video.hls import StreamFiles
from edit_ray.video.seams import LARGEST_SCORE, RADIUS, Joins

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "watching.md").read_text()


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
    named = set(re.findall(r"`([\w./-]+\.(?:mp4|m3u8|m4s))`", PAGE)) - {"final.mp4"}
    there = {
        re.sub(r"live-\d+", "live-N", re.sub(r"\d{5}-t\d+", "NNNNN-tT", path.relative_to(run[0]).as_posix()))
        for path in run[0].rglob("*.m*")
    }
    assert named == there


def test_the_figures_are_those_of_a_segment(run):
    named = set(re.findall(r"`(seam_\w+|interior_score|red|green|blue|sharpness)`", PAGE))
    assert named == set(run[1])
    assert f"at most {LARGEST_SCORE:g} |" in PAGE
    assert RADIUS == 8
    assert "up to eight frames on each side" in " ".join(PAGE.split())


def test_the_picture_is_there_and_small():
    (picture,) = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", PAGE)
    assert (ROOT / "docs" / picture).stat().st_size < 200_000
