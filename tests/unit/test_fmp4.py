"""Fragmented MP4 as bytes: what ffmpeg writes is understood, and nothing else is."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edit_ray.video.encode import OutputOptions, encode
from edit_ray.video.fragments import Fragment, place, read_fragment, split
from tests.unit.video_frames import numbered

few = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def encoded():
    return encode(numbered(0, 5), fps=16, options=OutputOptions(preset="ultrafast"))


def box(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def test_an_encoded_segment_is_an_init_and_a_fragment(encoded):
    init, fragment = split(encoded)
    assert encoded.startswith(init + fragment)
    assert init[4:8] == b"ftyp"
    assert read_fragment(fragment) == Fragment(sequence_number=1, decode_time=0, num_frames=5)
    assert split(init + fragment) == (init, fragment), "the index at the end may be missing"


@pytest.mark.parametrize("fps", [1, 16, 24, 60])
def test_the_init_does_not_depend_on_the_frames(fps):
    options = OutputOptions(preset="ultrafast")
    inits = {split(encode(numbered(first, count), fps=fps, options=options))[0] for first, count in [(0, 1), (9, 33)]}
    assert len(inits) == 1


@few
@given(number=st.integers(0, 2**32 - 1), first_frame=st.integers(0, 2**60 // 1000))
def test_a_placed_fragment_says_where_it_is_and_keeps_everything_else(encoded, number, first_frame):
    fragment = split(encoded)[1]
    placed = place(fragment, sequence_number=number, first_frame=first_frame)
    assert read_fragment(placed) == Fragment(number, first_frame * 1000, 5)
    assert place(placed, sequence_number=1, first_frame=0) == fragment


@pytest.mark.parametrize(("number", "frame"), [(-1, 0), (2**32, 0), (1, -1), (1, 2**64 // 1000 + 1)])
def test_numbers_that_do_not_fit_are_refused(encoded, number, frame):
    with pytest.raises(ValueError, match="does not fit into"):
        place(split(encoded)[1], sequence_number=number, first_frame=frame)


def refused(data: bytes) -> str | None:
    """What is wrong with the data, or None; any other error than a ValueError fails the test."""
    try:
        split(data)
        return None
    except ValueError as error:
        return str(error)


@few
@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_value_error(data):
    assert refused(data) is not None
    with pytest.raises(ValueError, match=r"fragment|number|box|moof"):
        read_fragment(data)


@few
@given(st.data())
def test_damage_is_refused_or_harmless(encoded, data):
    """Every header byte may be anything: either it is refused, or sizes, times and counts still agree."""
    damaged = bytearray(encoded)
    headers = encoded.index(b"mdat") + 4
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, headers - 1))] = data.draw(st.integers(0, 255))
    if refused(bytes(damaged)) is None:
        init, fragment = split(bytes(damaged))
        assert read_fragment(fragment).num_frames == 5
        assert len(init) + len(fragment) <= len(encoded)


@few
@given(st.data())
def test_every_truncation_is_refused(encoded, data):
    whole = len(b"".join(split(encoded)))
    assert refused(encoded[: data.draw(st.integers(0, whole - 1))]) is not None


def test_what_is_wrong_is_said(encoded):
    init, fragment = split(encoded)
    moof = fragment[: fragment.index(b"mdat") - 4]
    assert "not of ftyp, moov, moof and mdat" in refused(init)
    assert "moof, mdat, moof, mdat" in refused(init + 2 * fragment)
    assert "consists of nothing" in refused(b"")
    assert "does not fit into what holds it" in refused(encoded[:-1])
    assert "its mdat holds 3" in refused(init + moof + box(b"mdat", b"abc"))
    assert "at most 1048576" in refused(box(b"ftyp") + box(b"moov", bytes(1 << 20)) + fragment)
    assert "ends within a number" in refused(init + b"moo")
    assert "nothing where tfhd, tfdt, trun must be" in refused(
        init + box(b"moof", box(b"mfhd") + box(b"traf")) + box(b"mdat")
    )
    wrong = bytearray(encoded)
    wrong[encoded.index(b"tfhd") + 5] &= ~0x02  # default-base-is-moof
    assert "cannot be moved" in refused(bytes(wrong))
    wrong = bytearray(encoded)
    wrong[encoded.index(b"mfhd") + 3] = ord("D")
    assert "mfhD, traf where mfhd, traf must be" in refused(bytes(wrong))
