import numpy as np
import pytest

from edit_ray.video.encode import EncodeError, encode, join, read_frames
from edit_ray.video.options import OutputOptions

OPTIONS = OutputOptions(crf=12)


def moving_square(count: int, start: int = 0) -> np.ndarray:
    frames = np.full((count, 48, 64, 3), (40, 60, 90), np.uint8)
    for index in range(count):
        left = 2 + (start + index) % 40
        frames[index, 16:32, left : left + 16] = (220, 120, 30)
    return frames


def test_every_frame_comes_back_nearly_as_it_was(tmp_path):
    frames = moving_square(33)
    encode(frames, tmp_path / "a.mp4", fps=16, options=OPTIONS)
    back = read_frames(tmp_path / "a.mp4", height=48, width=64)
    assert back.shape == frames.shape
    error = np.abs(back.astype(int) - frames).mean(axis=(1, 2, 3))
    assert error.max() < 2.5, "colours and order survive"


def test_the_same_frames_give_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        encode(moving_square(9), tmp_path / name, fps=16, options=OPTIONS)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_joined_parts_have_exactly_their_frames(tmp_path):
    lengths = (33, 24, 24, 1)
    parts = []
    for index, count in enumerate(lengths):
        parts.append(tmp_path / f"it's part {index}.mp4")
        encode(moving_square(count, sum(lengths[:index])), parts[-1], fps=16, options=OPTIONS)
    join(parts, tmp_path / "all.mp4")
    joined = read_frames(tmp_path / "all.mp4", height=48, width=64)
    assert len(joined) == sum(lengths)
    assert np.array_equal(joined, np.concatenate([read_frames(part, height=48, width=64) for part in parts]))


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(EncodeError, match="ffmpeg failed"):
        read_frames(tmp_path / "bad.mp4", height=48, width=64)
