"""Frame rates that are no whole numbers: read as people write them, exact in files and playlists, kept in manifests."""

import re
import subprocess
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.config import Config, load_config
from edit_ray.errors import ConfigError
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Begun
from edit_ray.video.encode import OutputOptions, encode, join, time_scale
from edit_ray.video.fragments import Part, write_part
from edit_ray.video.hls import StreamFiles
from tests.unit.test_config import check_written
from tests.unit.video_frames import FFMPEG, numbered, shown_by

GIVEN = ["video.num_segments=3", "prompt_segments.0.segment=0", "prompt_segments.0.prompt=a red circle"]
FILM, TELEVISION = 24000 / 1001, 30000 / 1001


def config_at(fps: object) -> Config:
    return load_config(None, [*GIVEN, f"sampling.fps={fps}"])


WRITTEN = {"23.976": FILM, "24000/1001": FILM, "29.97": TELEVISION, "12.5": 12.5, "24": 24, "25.0": 25, "50/2": 25}


@pytest.mark.parametrize(("written", "meant"), WRITTEN.items())
def test_a_frame_rate_is_read_as_it_is_written(written, meant, tmp_path):
    config = config_at(written)
    assert config.sampling.fps == meant
    assert isinstance(config.sampling.fps, int) == (meant == round(meant)), "a whole one stays what it was"
    assert config.layout.segments_for(60) == -(-60 * Fraction(meant).limit_denominator(1001) // 33)
    check_written(config, tmp_path)


@pytest.mark.parametrize(
    "written", ["0", "121", "0.5", "24/0", "fast", "true", "[24]", "1e3", "-24", ".inf", ".nan", "''"]
)
def test_what_is_no_frame_rate_is_refused(written):
    with pytest.raises(ConfigError, match=r"sampling\.fps is .*it must be a number from 1 to 120, such as 16, 23\.976"):
        config_at(written)


@given(st.fractions(1, 120, max_denominator=1001))
def test_every_frame_rate_has_exact_ticks(rate):
    second, frame = time_scale(float(rate))
    assert Fraction(second, frame) == rate


@pytest.mark.parametrize("fps", [FILM, TELEVISION, 12.5, 16])
def test_files_and_playlists_keep_the_rate(tmp_path, fps):
    parts, first = [], 0
    for index, count in enumerate((9, 8, 8)):
        parts.append(Part(f"{index}.m4s", first, count))
        place = {"number": index, "first_frame": first}
        data = encode(numbered(first, count), fps=fps, options=OutputOptions(preset="ultrafast"), **place)
        write_part(tmp_path, parts[-1], data)
        first += count
    files = StreamFiles(tmp_path, fps=fps, longest=9)
    for part in parts:
        files.append(part)
    files.end()
    join(tmp_path / "init.mp4", [tmp_path / part.path for part in parts], tmp_path / "final.mp4")
    for name in ("stream.mp4", "final.mp4"):
        assert shown_by(tmp_path / name) == list(range(25))
        asked = [FFMPEG, "-hide_banner", "-i", str(tmp_path / name), "-vf", "showinfo", "-f", "null", "-"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stderr
        times = [float(time) for time in re.findall(r"pts_time:\s*([0-9.]+)", said)]
        assert times == pytest.approx([index / fps for index in range(25)], abs=1e-5)
    playlist = (tmp_path / "live-0.m3u8").read_text()
    assert [float(s) for s in re.findall(r"EXTINF:([0-9.]+)", playlist)] == pytest.approx(
        [part.num_frames / fps for part in parts], abs=1e-6
    )
    assert f"FRAME-RATE={fps:.3f}" in (tmp_path / "live.m3u8").read_text()


@pytest.mark.parametrize("fps", [16, FILM])
def test_a_manifest_keeps_the_rate(tmp_path, fps):
    config = config_at(fps)
    folder = RunFolder(tmp_path, "r")
    begun = Begun("r", "1", 128, 128, config.layout, 3, "", {})
    folder.create("", begun)
    assert folder.read_manifest().begun.layout == config.layout
