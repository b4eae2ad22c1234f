import errno
import os
from functools import partial

import pytest

from edit_ray import files
from edit_ray.runs.event_log import append_event, read_events
from tests.faults import broken, faulty, first_bytes


def test_events_come_back_in_order_with_their_times(tmp_path):
    path = tmp_path / "events.jsonl"
    assert read_events(path) == []
    append_event(path, "segment_begun", segment=0, attempt=1)
    append_event(path, "said", words="two\nlines, é", none=None)
    first, second = read_events(path)
    assert (first["event"], first["segment"], first["attempt"]) == ("segment_begun", 0, 1)
    assert (second["words"], second["none"]) == ("two\nlines, é", None)
    assert first["monotonic"] <= second["monotonic"]
    assert first["wall"] <= second["wall"]
    assert len(path.read_text().splitlines()) == 2


def test_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, "one")
    with open(path, "a") as file:
        file.write('{"event": "tw\n')
    append_event(path, "three")
    assert [event["event"] for event in read_events(path)] == ["one", "three"]


class Shortened(files.Disk):
    """A disk that takes only some of the first write, and then is full for a while."""

    def __init__(self, taken):
        self.taken, self.full = taken, True

    def write(self, descriptor, parts, offset):
        if not self.full:
            return super().write(descriptor, parts, offset)
        if self.taken == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count, self.taken = super().write(descriptor, [parts[0][: self.taken]], offset), 0
        return count


@pytest.mark.parametrize("taken", [0, 1, 20])
def test_a_line_cut_short_by_a_full_disk_takes_no_other_with_it(tmp_path, taken):
    path, disk = tmp_path / "events.jsonl", Shortened(taken)
    append_event(path, "one")
    with files.swapped(disk):
        append_event(path, "two")
        disk.full = False
        append_event(path, "three")
    append_event(path, "four")
    assert [event["event"] for event in read_events(path)] == ["one", "three", "four"]


def test_a_write_that_takes_only_some_bytes_is_continued(tmp_path):
    with files.swapped(faulty(write=first_bytes)):
        append_event(tmp_path / "events.jsonl", "one", words="some more words")
    assert [event["words"] for event in read_events(tmp_path / "events.jsonl")] == ["some more words"]


TIMES = '"wall": 1.0, "monotonic": 2.0'


@pytest.mark.parametrize(
    "line",
    [
        *("7", "[]", "null", '"words"', "{}", '{"event": "x"}', f'{{"event": 7, {TIMES}}}', "[" * 100_000),
        *('{"event": "x", "wall": NaN, "monotonic": 1}', '{"event": "x", "wall": 1e999, "monotonic": 1}'),
        *(f'{{"event": "segment_made", "figures": {bad}, {TIMES}}}' for bad in ("7", "[]", '{"a": "b"}', "null")),
        *(f'{{"event": "segment_made", "segment": {bad}, {TIMES}}}' for bad in ("-1", "{}", "1.5", "true", "null")),
        *["\x00" * 40, "\udcff", f'{{"event": "x", {TIMES}, "words": "\udcff"}}'],
    ],
    ids=range(22),
)
def test_what_is_no_event_is_left_out(tmp_path, line):
    path = tmp_path / "events.jsonl"
    append_event(path, "one")
    with path.open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    append_event(path, "two", segment=0, take=1, attempt=2, worker=3, figures={"s": 0.5})
    assert [event["event"] for event in read_events(path)] == ["one", "two"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_log_that_cannot_be_used_fails_nobody(tmp_path, number):
    with files.swapped(faulty(open=partial(broken, number=number))):
        append_event(tmp_path / "events.jsonl", "one")
        assert read_events(tmp_path / "events.jsonl") == []
