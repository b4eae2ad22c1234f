"""Playlists as text: their form, and what may take the place of what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.video.fragments import Part
from edit_ray.video.hls import ENDLIST, MediaPlaylist, multivariant, newest_playlist

EVENT = MediaPlaylist(fps=16, longest=33)
SLIDING = MediaPlaylist(fps=16, longest=33, sliding=True)
PARTS = [Part("segments/00000-t0.m4s", 0, 33), Part("segments/00001-t0.m4s", 33, 24)]


def test_the_whole_text_of_an_event():
    assert EVENT.text(PARTS) == (
        "#EXTM3U\n"
        "#EXT-X-VERSION:7\n"
        "#EXT-X-TARGETDURATION:3\n"
        "#EXT-X-MEDIA-SEQUENCE:0\n"
        "#EXT-X-PLAYLIST-TYPE:EVENT\n"
        "#EXT-X-INDEPENDENT-SEGMENTS\n"
        '#EXT-X-MAP:URI="init.mp4"\n'
        "#EXTINF:2.062500,\n"
        "segments/00000-t0.m4s\n"
        "#EXTINF:1.500000,\n"
        "segments/00001-t0.m4s\n"
    )


def test_a_sliding_one_says_how_many_have_left_it():
    lines = SLIDING.text(PARTS[1:], first=1).splitlines()
    assert "#EXT-X-MEDIA-SEQUENCE:1" in lines
    assert not any("PLAYLIST-TYPE" in line or "ENDLIST" in line for line in lines)


@given(st.lists(st.integers(1, 81), min_size=1, max_size=30), st.sampled_from([1, 16, 24, 30]))
def test_no_duration_is_beyond_the_target_and_their_sum_is_the_videos(lengths, fps):
    text = MediaPlaylist(fps, max(lengths)).text([Part("a", 0, length) for length in lengths])
    target = int(text.partition("TARGETDURATION:")[2].split()[0])
    durations = [float(line[8:-1]) for line in text.splitlines() if line.startswith("#EXTINF:")]
    assert max(durations) <= target < max(durations) + 1
    assert abs(sum(durations) - sum(lengths) / fps) < 1e-6 * len(lengths)


@given(st.integers(0, 8), st.integers(0, 8), st.booleans(), st.booleans(), st.integers(0, 8))
def test_an_event_may_only_grow(before, after, was_ended, is_ended, reroll_from):
    old = [Part(f"{index}-t0", 8 * index, 8) for index in range(before)]
    new = [Part(f"{index}-t{int(index >= reroll_from)}", 8 * index, 8) for index in range(after)]
    grows = new[:before] == old and (not was_ended or (is_ended and new == old))
    text, present = EVENT.text(new) + ENDLIST * is_ended, EVENT.text(old) + ENDLIST * was_ended
    assert EVENT.may_replace(text, present) == grows


def test_a_sliding_one_may_change_until_it_has_ended():
    ended = SLIDING.text(PARTS) + ENDLIST
    assert SLIDING.may_replace(SLIDING.text(PARTS[1:], first=1), SLIDING.text(PARTS))
    assert SLIDING.may_replace(ended, SLIDING.text(PARTS))
    assert SLIDING.may_replace(ended, ended)
    assert not SLIDING.may_replace(SLIDING.text(PARTS), ended)


@pytest.mark.parametrize("form", ['CODECS="avc1.64000a",RESOLUTION=48x32,', ""])
def test_the_one_that_names_another(tmp_path, form):
    text = multivariant("live-3.m3u8", bandwidth=12345, form=form, fps=16)
    attributes = f"#EXT-X-STREAM-INF:BANDWIDTH=12345,{form}FRAME-RATE=16.000"
    assert text.splitlines() == ["#EXTM3U", "#EXT-X-VERSION:7", attributes, "live-3.m3u8"]
    assert newest_playlist(tmp_path) is None
    for content, name in ((text, "live-3.m3u8"), (text + "live-4.m3u8\n", None), (EVENT.text(PARTS), None), ("", None)):
        (tmp_path / "live.m3u8").write_text(content)
        assert newest_playlist(tmp_path) == name
    assert ENDLIST not in text
