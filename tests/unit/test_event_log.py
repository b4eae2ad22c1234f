from edit_ray.runs.event_log import append_event, read_events


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
