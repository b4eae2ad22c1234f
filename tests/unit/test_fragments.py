"""A segment's file: the fragment that ffmpeg writes at its place in the video, and the init that all of them share."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.video.encode import OutputOptions, encode, time_scale
from edit_ray.video.fragments import frames_in, split, stream_form
from tests.unit.video_frames import HEIGHT, WIDTH, numbered

OPTIONS = OutputOptions(preset="ultrafast")


def number_and_time(fragment: bytes) -> tuple[int, int]:
    """The sequence number and the decode time that a fragment begins with."""
    found = re.search(rb"mfhd\0{4}(.{4}).*tfdt\x01\0{3}(.{8})", fragment, re.DOTALL)
    return int.from_bytes(found[1]), int.from_bytes(found[2])


@pytest.mark.parametrize("fps", [1, 16, 24000 / 1001, 999.5, 1000])
def test_a_fragment_has_its_place_in_the_video_and_nothing_else_depends_on_that(fps):
    options, (_, ticks) = {"fps": fps, "options": OPTIONS}, time_scale(fps)
    whole = encode(numbered(0, 5), **options)
    init, fragment = split(whole)
    assert whole == init + fragment
    assert (number_and_time(fragment), frames_in(fragment)) == ((1, 0), 5)
    for number, first_frame in ((1, 5), (777, 123_457), (2**31 - 2, 10**12 + 1)):
        placed = split(encode(numbered(0, 5), **options, number=number, first_frame=first_frame))
        assert placed[0] == init
        assert number_and_time(placed[1]) == (number + 1, first_frame * ticks)
        assert sum(a != b for a, b in zip(placed[1], fragment, strict=True)) <= 12
    for count in (1, 33):
        assert split(encode(numbered(9, count), **options))[0] == init, "it does not depend on the frames"
    assert re.fullmatch(rf'CODECS="avc1\.[0-9a-f]{{6}}",RESOLUTION={WIDTH}x{HEIGHT},', stream_form(init))


@pytest.fixture(scope="module")
def encoded():
    return encode(numbered(0, 5), fps=16, options=OPTIONS)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_anything_else_is_refused(encoded, data):
    """Every truncation, any bytes behind it, and any other bytes; of an init nothing is said then."""
    damaged = [
        encoded[: data.draw(st.integers(0, len(encoded) - 1))],
        encoded + data.draw(st.binary(min_size=1, max_size=40)),
    ]
    for given_bytes in (*damaged, data.draw(st.binary(max_size=300))):
        with pytest.raises(ValueError, match=r"an encoded segment consists of|does not fit into what holds it"):
            split(given_bytes)
        assert stream_form(given_bytes) == "" or given_bytes == split(encoded)[0]
        assert frames_in(given_bytes) in (0, 5) or given_bytes not in damaged
