"""What the HTTP door decides without a socket: forms, requests as configurations, runs as objects, pages, refusals."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_ray import errors
from edit_ray.actors.messages import Progress, RunStatus
from edit_ray.config import Config, PromptSegment
from edit_ray.engine.options import ContinuityOptions, SamplingOptions
from edit_ray.runs.events import RunState
from edit_ray.runs.manifest import Begun, Ended, Manifest, Opened, Rerolled, SegmentRecord
from edit_ray.runs.run_plan import FrameLayout, Take
from edit_ray.server.event_stream import Cursor, message, nothing_more
from edit_ray.server.form_fields import from_json, nested
from edit_ray.server.refusals import CODES, FAILURES, Problem, Refusal, refusal_of, refuse
from edit_ray.server.video_object import (
    STATE_OF,
    RunView,
    VideoFailure,
    behind,
    eta_s,
    model_name,
    progress_of,
    segment_of,
    video_of,
)
from edit_ray.server.video_request import (
    CONTINUITY,
    ENTRY,
    FIELDS,
    LARGEST,
    OUR_FIELDS,
    SAMPLING,
    Offer,
    config_for,
    nearest,
    rounding,
)
from edit_ray.server.video_service import keyed_id, seed_of, whole_number

PROMPT = "a red circle"
BASE = Config.model_validate(
    {"video": {"duration": "4s"}, "prompt_segments": [{"segment": 0, "prompt": "a blue square"}]}
)
OFFERS = {"tiny": Offer("tiny", BASE, 16, 16), "other": Offer("other", BASE, 16, 32)}
LAYOUT = FrameLayout(9, 2, 8.0)


def asked(body, **more):
    return config_for(body, OFFERS, seed=5, **more)


def problems(body, **more):
    _, found = asked(body, **more)
    return [(problem.code, problem.param) for problem in found]


def good(body, **more):
    config, found = asked(body, **more)
    assert found == []
    return config


# Forms.


def test_a_form_is_what_json_would_be():
    fields = [
        ("prompt", "5"),
        ("video[id]", "x"),
        ("edit_ray[seed]", "5"),
        ("edit_ray[negative_prompt]", "5"),
        ("edit_ray[cache][policy]", "none"),
        ("edit_ray[sigmas][]", "1.0"),
        ("edit_ray[sigmas][]", "0.5"),
        ("input_reference", b"bytes"),
    ]
    ours = {"seed": 5, "negative_prompt": "5", "cache": {"policy": "none"}, "sigmas": [1.0, 0.5]}
    expected = {"prompt": "5", "video": {"id": "x"}, "edit_ray": ours, "input_reference": b"bytes"}
    assert nested(fields) == (expected, [])
    assert nested([("edit_ray", '{"seed": 5, "storyboard": [{"segment": 0}]}')])[0] == {
        "edit_ray": {"seed": 5, "storyboard": [{"segment": 0}]}
    }


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([("a", "1"), ("a", "2")], "'a' is given twice; it must be given once."),
        ([("a[", "1")], "is no name of a field"),
        ([("", "1")], "is no name of a field"),
        ([("a[b][c][d][e][f][g]", "1")], "is no name of a field"),
        ([("edit_ray[storyboard][][prompt]", "x")], "send edit_ray as JSON text"),
        ([("a", "1"), ("a[b]", "2")], "both as a value and as a mapping"),
        ([("a[b]", "1"), ("a[]", "2")], "both as a value and as a list"),
        ([("a[]", "1"), ("a[b]", "2")], "both as a value and as a mapping"),
        ([("edit_ray", "{")], "edit_ray cannot be read as JSON (at character 1)"),
        ([("edit_ray", '{"a": 1, "a": 2}')], "edit_ray has the key 'a' twice"),
        ([("edit_ray", '{"a": NaN}')], "edit_ray cannot be read as JSON"),
        ([("edit_ray", "[" * 20 + "]" * 20)], "edit_ray has more than 16 levels"),
        ([("edit_ray", "[" * 100_000)], "edit_ray cannot be read as JSON"),
        ([("edit_ray", "1" * 5000)], "edit_ray cannot be read as JSON"),
    ],
)
def test_a_form_with_mistakes(fields, says):
    _, (problem, *others) = nested(fields)
    assert says in problem.message
    assert others == []


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30))))
def test_any_form_is_read_or_refused(fields):
    found, _ = nested(fields)
    assert isinstance(found, dict)


_PLAIN = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=5)


@given(st.dictionaries(_PLAIN, st.text(max_size=5) | st.dictionaries(_PLAIN, st.text(max_size=5), min_size=1)))
def test_nested_fields_come_back(values):
    fields = []
    for name, value in values.items():
        fields += (
            [(f"{name}[{key}]", text) for key, text in value.items()] if isinstance(value, dict) else [(name, value)]
        )
    assert nested(fields) == (values, [])


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda below: st.lists(below, max_size=3)))
def test_json_is_read(value):
    assert from_json(json.dumps(value)) == value


# Requests.


def test_what_is_not_said_comes_from_the_model():
    config = good({"prompt": PROMPT})
    assert config.video == BASE.video
    assert config.sampling == BASE.sampling.model_copy(update={"seed": 5})
    assert [entry.prompt for entry in config.prompt_segments] == [PROMPT]
    assert good({"prompt": PROMPT, "model": None, "seconds": None, "size": None, "edit_ray": None}) == config


@pytest.mark.parametrize(
    ("seconds", "segments", "note"),
    [
        ("4", 2, "4 s were asked for; 2 whole segments last 4.125 s."),
        (4, 2, "4 s were asked for; 2 whole segments last 4.125 s."),
        ("0.5", 1, "0.5 s were asked for; one whole segment lasts 2.0625 s."),
        (2.0625, 1, None),
        ("4.125", 2, None),
        ("604800", None, None),
    ],
)
def test_seconds_are_rounded_up_to_whole_segments(seconds, segments, note):
    if segments is None:
        assert problems({"prompt": PROMPT, "seconds": seconds}) == [("invalid_value", "seconds")]
        return
    config = good({"prompt": PROMPT, "seconds": seconds})
    assert (config.num_segments, rounding(config)) == (segments, note)
    assert config.num_frames_total / config.sampling.fps >= float(seconds)


@pytest.mark.parametrize("seconds", ["", "0", "-1", "nan", "1e3", "4s", 0, -4, True, [], {}, "604801", 1e300, "٤"])
def test_seconds_of_none(seconds):
    assert problems({"prompt": PROMPT, "seconds": seconds}) == [("invalid_value", "seconds")]


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("100x90", "the nearest is 96x96"),
        ("129x128", "the nearest is 128x128"),
        ("1x99999", "the nearest is 16x4096"),
        ("0x0", "the nearest is 16x16"),
        ("4112x64", "the nearest is 4096x64"),
        ("128", "such as 128x64"),
        ("128X64", "such as 128x64"),
        (128, "such as 128x64"),
        ("-1x5", "such as 128x64"),
        ("999999x5", "such as 128x64"),
    ],
)
def test_a_size_that_the_model_cannot_make(size, says):
    _, (problem,) = asked({"prompt": PROMPT, "size": size})
    assert problem.param == "size"
    assert says in problem.message


def test_width_comes_first():
    sampling = good({"prompt": PROMPT, "size": "64x128"}).sampling
    assert (sampling.width, sampling.height) == (64, 128)
    _, (problem,) = asked({"prompt": PROMPT, "size": "48x48", "model": "other"})
    assert "multiples of 32 and 16" in problem.message
    assert "nearest is 64x48" in problem.message


@given(st.integers(-10, 10**5), st.sampled_from([1, 8, 16, 32, 48]))
def test_the_nearest_size_is_one_that_can_be_made(size, step):
    found = nearest(size, step)
    assert found % step == 0
    assert 16 <= found <= LARGEST
    others = [other for other in range(step, LARGEST + 1, step) if other >= 16]
    assert abs(found - size) == min(abs(other - size) for other in others)


def test_everything_of_ours_reaches_the_configuration():
    ours = {
        "storyboard": [
            {"segment": 0, "prompt": PROMPT, "seed": 8, "guidance_scale": 2.0},
            {"segment": 2, "prompt": "a blue square", "negative_prompt": "green"},
        ],
        "num_segments": 3,
        "seed": 9,
        "num_inference_steps": 7,
        "guidance_scale": 3.0,
        "negative_prompt": "red",
        "num_frames": 17,
        "fps": 8,
        "flow_shift": 2.0,
        "sampler": "euler",
        "continuity": {"mode": "history", "history_latents": 2},
        "cache": {"policy": "dicache", "rel_l1_thresh": 0.1},
    }
    config = good({"edit_ray": ours})
    given = config.model_dump(mode="json", exclude_unset=True)
    for name in ("seed", "num_inference_steps", "guidance_scale", "negative_prompt", "num_frames", "fps", "sampler"):
        assert given["sampling"][name] == ours[name]
    assert config.num_segments == 3
    assert [entry.prompt for entry in config.prompt_segments] == [PROMPT, "a blue square"]
    assert (config.prompt_segments[0].seed, config.prompt_segments[1].negative_prompt) == (8, "green")
    assert (config.continuity.mode, config.continuity.history_latents) == ("history", 2)
    assert (config.cache.policy, config.cache.policy_options) == ("dicache", {"rel_l1_thresh": 0.1})
    levels = good({"prompt": PROMPT, "edit_ray": {"sigmas": [1.0, 0.5]}}).sampling
    assert (levels.sigmas, levels.num_inference_steps) == ((1.0, 0.5), 2)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({}, [("invalid_value", "prompt")]),
        ({"prompt": 5}, [("invalid_value", "prompt")]),
        ({"prompt": " "}, [("invalid_value", "prompt")]),
        ({"prompt": "x" * 2001}, [("invalid_value", "prompt")]),
        ({"prompt": "\ud800"}, [("invalid_value", "prompt")]),
        ({"prompt": "a zebra"}, [("invalid_value", "prompt")]),
        ({"prompt": PROMPT, "model": "sora-2"}, [("model_not_found", "model")]),
        ({"prompt": PROMPT, "model": ["tiny"]}, [("model_not_found", "model")]),
        ({"prompt": PROMPT, "n": 2, "edit": 1}, [("unknown_field", "n"), ("unknown_field", "edit")]),
        ({"prompt": PROMPT, "edit_ray": 5}, [("invalid_value", "edit_ray")]),
        ({"prompt": PROMPT, "edit_ray": {"sed": 5}}, [("unknown_field", "edit_ray.sed")]),
        ({"prompt": PROMPT, "edit_ray": {"seed": "5"}}, [("invalid_value", "edit_ray.seed")]),
        ({"prompt": PROMPT, "edit_ray": {"num_frames": 10}}, [("invalid_value", "edit_ray.num_frames")]),
        ({"prompt": PROMPT, "edit_ray": {"num_segments": 0}}, [("invalid_value", "edit_ray.num_segments")]),
        ({"prompt": PROMPT, "seconds": "4", "edit_ray": {"num_segments": 2}}, [("invalid_value", "seconds")]),
        ({"prompt": PROMPT, "edit_ray": {"cache": 5}}, [("invalid_value", "edit_ray.cache")]),
        ({"prompt": PROMPT, "edit_ray": {"cache": {"policy": "x"}}}, [("invalid_value", "edit_ray.cache.policy")]),
        ({"prompt": PROMPT, "edit_ray": {"continuity": []}}, [("invalid_value", "edit_ray.continuity")]),
        (
            {"prompt": PROMPT, "edit_ray": {"continuity": {"init": "/etc/passwd"}}},
            [("unknown_field", "edit_ray.continuity.init")],
        ),
        ({"edit_ray": {"storyboard": []}}, [("invalid_value", "edit_ray.storyboard")]),
        ({"edit_ray": {"storyboard": "x"}}, [("invalid_value", "edit_ray.storyboard")]),
        ({"edit_ray": {"storyboard": [5]}}, [("invalid_value", "edit_ray.storyboard.0")]),
        ({"edit_ray": {"storyboard": [{"segment": 0}]}}, [("invalid_value", "edit_ray.storyboard.0.prompt")]),
        (
            {"prompt": PROMPT, "edit_ray": {"storyboard": [{"segment": 0, "prompt": PROMPT}]}},
            [("invalid_value", "prompt")],
        ),
        (
            {"edit_ray": {"storyboard": [{"segment": 0, "prompt": PROMPT, "image": "/etc/passwd"}]}},
            [("unknown_field", "edit_ray.storyboard.0.image")],
        ),
    ],
)
def test_mistakes_in_a_request(body, found):
    assert problems(body) == found


def test_every_option_is_the_users_or_the_operators():
    """A new one is put on one side on purpose: no request may name a file of the server."""
    assert set(ContinuityOptions.model_fields) - set(CONTINUITY) == {"init"}
    assert set(SamplingOptions.model_fields) - set(SAMPLING) == {"height", "width"}
    pictures = {"image", "last_image", "reference_images"}
    assert set(PromptSegment.model_fields) - set(ENTRY) == pictures


@pytest.mark.parametrize("name", ["store", "engine", "output", "metrics", "model", "height", "width", "directory"])
def test_what_belongs_to_the_operator_cannot_be_asked_for(name):
    assert problems({"prompt": PROMPT, "edit_ray": {name: {}}}) == [("unknown_field", f"edit_ray.{name}")]


def test_all_mistakes_come_at_once_each_in_a_sentence():
    body = {
        "prompt": "a bad zebra",
        "modle": "tiny",
        "size": "100x90",
        "seconds": "x",
        "edit_ray": {"seed": -1, "continuity": {"mode": "historic"}, "cache": {"policy": "tea"}},
    }
    _, found = asked(body)
    assert [problem.param for problem in found] == [
        "modle",
        "size",
        "seconds",
        "edit_ray.seed",
        "edit_ray.continuity.mode",
        "edit_ray.cache.policy",
        "prompt",
    ]
    said = [problem.message for problem in found]
    assert all(sentence.endswith((".", ".)")) for sentence in said)
    assert "did you mean model?" in said[0]
    assert not any(word in " ".join(said) for word in ("sampling", "prompt_segments", "--set"))


def test_a_file_that_was_sent_is_not_named_by_its_path(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    _, (problem,) = asked({"prompt": PROMPT, "edit_ray": {"continuity": {"mode": "history"}}}, init=str(path))
    assert problem.param == "input_reference"
    assert problem.message.startswith("input_reference is the file that was sent, which cannot be read as a picture (")
    assert str(tmp_path) not in problem.message


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), _JSON, max_size=4),
    st.dictionaries(st.sampled_from(OUR_FIELDS), _JSON, max_size=4),
)
def test_any_request_is_a_configuration_or_mistakes(body, ours):
    config, found = asked(body | {"edit_ray": ours})
    assert config is not None or found
    assert all(problem.code in CODES and problem.message for problem in found)
    json.dumps(Refusal(*found, Problem("x")).body).encode()


# Runs as objects.


def manifest_of(segments=0, num_segments=3, takes=(), end=None, **begun):
    first = Begun("run", "1", 32, 48, LAYOUT, num_segments, "mine", {}, **begun)
    manifest = Manifest.start(first)
    for index in range(segments):
        record = SegmentRecord(
            index,
            0,
            PROMPT,
            index,
            LAYOUT.first_frame(index),
            LAYOUT.frames_of(index),
            f"latents/{index:05d}-t0.safetensors",
            f"segments/{index:05d}-t0.m4s",
            {"publish_at": 100.0 + 2 * index},
        )
        manifest = manifest.and_then(record)
    for take in takes:
        manifest = manifest.after(Opened(manifest.incarnation + 1, {}, change=Rerolled(manifest.incarnation + 1, take)))
    return manifest if end is None else manifest.after(Ended(manifest.incarnation, *end))


def view_of(manifest, state=None, progress=None, config=BASE, **more):
    status = RunStatus.of("/x/run", manifest, state, progress)
    return RunView(manifest, replace(status, **more), config, 10.9, 20.9)


def test_every_state_of_a_run_is_one_of_a_video():
    assert set(STATE_OF) == set(RunState.__args__)
    assert [state for state, video in STATE_OF.items() if video == "completed"] == ["done"]
    assert [state for state, video in STATE_OF.items() if video == "failed"] == ["failed", "cancelled"]


def test_a_run_that_is_being_made():
    video = video_of(view_of(manifest_of(1), "running", Progress("run", 1, 1, 4)), OFFERS)
    assert (video.id, video.status, video.progress, video.model) == ("run", "in_progress", 41, "tiny")
    assert (video.size, video.seconds, video.created_at) == ("48x32", "2.125", 10)
    assert (video.completed_at, video.error, video.prompt) == (None, None, "a blue square")
    ours = video.edit_ray
    assert (ours.state, ours.committed, ours.num_segments, ours.fps) == ("running", 1, 3, 8.0)
    assert (ours.step.segment, ours.step.step, ours.step.num_steps) == (1, 1, 4)
    assert [scene.prompt for scene in ours.storyboard] == ["a blue square"]
    assert video_of(view_of(manifest_of(1), "running"), OFFERS, whole=False).edit_ray.storyboard is None


def test_a_run_that_is_done():
    video = video_of(view_of(manifest_of(3, end=("done",))), OFFERS)
    assert (video.status, video.progress, video.completed_at, video.error) == ("completed", 100, 20, None)
    assert video.edit_ray.eta_s is None


def test_a_run_that_has_failed_is_still_an_answer():
    video = video_of(view_of(manifest_of(1, end=("failed", "no memory"))), OFFERS)
    assert (video.status, video.completed_at) == ("failed", None)
    assert video.error == VideoFailure(code="generation_failed", message="no memory")
    cancelled = video_of(view_of(manifest_of(1, end=("cancelled",))), OFFERS)
    assert (cancelled.status, cancelled.error.code) == ("failed", "cancelled")
    assert {video.error.code, cancelled.error.code} == set(FAILURES)


def test_a_run_that_nobody_works_on_waits():
    video = video_of(view_of(manifest_of(1)), OFFERS)
    assert (video.status, video.edit_ray.state) == ("queued", "open")
    assert "edit-ray resume" in video.edit_ray.warning


def test_a_run_without_an_end_or_a_readable_configuration():
    video = video_of(view_of(manifest_of(2, num_segments=None), "running", config=None), OFFERS)
    assert (video.seconds, video.progress, video.prompt, video.model) == ("1.625", 0, None, "unknown")
    assert video.edit_ray.num_segments is None


def test_a_model_is_known_by_what_no_request_changes():
    assert (
        model_name(good({"prompt": PROMPT, "size": "64x64", "edit_ray": {"cache": {"policy": "none"}}}), OFFERS)
        == "tiny"
    )
    other = BASE.model_copy(update={"model": BASE.model.model_copy(update={"path": "/models/wan/"})})
    assert model_name(other, OFFERS) == "wan"


@given(
    st.integers(0, 50), st.integers(0, 50), st.integers(1, 30), st.integers(1, 50), st.sampled_from(sorted(STATE_OF))
)
def test_progress_is_a_percentage_and_whole_only_when_done(committed, segment, steps, num_segments, state):
    status = RunStatus("run", state, "/x", committed, num_segments, progress=Progress("run", segment, steps, 30))
    assert (progress_of(status) == 100) == (state == "done")
    assert 0 <= progress_of(status) <= 100


def test_the_remaining_time_follows_the_latest_segments():
    assert eta_s(manifest_of(1).segments, 3) is None
    assert eta_s(manifest_of(2).segments, 10) == 16.0
    assert eta_s(manifest_of(20).segments, 30) == 20.0
    assert eta_s(manifest_of(20).segments, None) is None
    assert eta_s([replace(record, statistics={}) for record in manifest_of(3).segments], 9) is None


def test_a_segment_says_where_its_files_are():
    manifest = replace(manifest_of(2), dropped_before=1)
    gone, there = (segment_of(manifest, record) for record in manifest.segments)
    assert (gone.media, gone.latents, gone.thumbnail) == (None, None, None)
    assert there.media == "/v1/videos/run/segments/00001-t0.m4s"
    assert there.latents == "/v1/videos/run/segments/1/latents"


@given(st.lists(st.text(min_size=1, max_size=3), unique=True, max_size=6), st.integers(0, 6))
def test_pages_hold_each_id_once(ids, at):
    assert behind(ids, None) == ids
    if at < len(ids):
        assert [*ids[: at + 1], *behind(ids, ids[at])] == ids
    with pytest.raises(Refusal):
        behind(ids, "nowhere")


# Ids and numbers.


@given(
    st.text(min_size=1, max_size=64),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=255),
)
def test_a_key_is_one_run_of_one_owner(owner, key):
    assert keyed_id(owner, key) == keyed_id(owner, key)
    assert keyed_id(owner + "x", key) != keyed_id(owner, key)
    assert keyed_id(owner, key[:-1] + chr(126 - ord(key[-1]) + 32)) != keyed_id(owner, key) or ord(key[-1]) == 79
    assert 0 <= seed_of(keyed_id(owner, key)) < 2**31


@pytest.mark.parametrize("key", ["", "x" * 256, "a\r\nb", "é", "\0"])
def test_a_key_that_is_none(key):
    with pytest.raises(Refusal) as refused:
        keyed_id("me", key)
    assert refused.value.status == 400


@pytest.mark.parametrize("text", ["", "-1", "0", "101", "1.5", "٣", " 1", "1\n", "0x1", "9" * 5000])
def test_a_number_that_is_none(text):
    with pytest.raises(Refusal):
        whole_number(text, "limit", 1, 100)


# Refusals.


def test_every_error_of_ours_has_an_answer_from_the_list():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EditRayError)]
    for kind in kinds:
        error = kind(["a sentence"]) if kind is errors.ConfigError else kind("a sentence")
        refusal = refusal_of(error)
        assert CODES[refusal.code] == refusal.status
        assert refusal.status in (400, 403, 404, 409, 503), kind
        assert ("Retry-After" in refusal.headers) == (refusal.status == 503)
        assert refusal.body["error"]["message"] == "a sentence"
    assert refusal_of(errors.NotYourRun("x")).status == 403
    assert refusal_of(errors.UnknownRun("x")).status == 404


@given(st.text(), st.none() | st.text(), st.sampled_from(sorted(CODES)))
def test_a_refusal_has_openais_form_and_one_line(text, param, code):
    refusal = refuse(code, text, param)
    error = json.loads(json.dumps(refusal.body))["error"]
    assert error["message"].isprintable()
    assert (error["code"], error["type"] == "server_error") == (code, CODES[code] >= 500)
    assert error["edit_ray"]["problems"] == [{"param": error["param"], "code": code, "message": error["message"]}]


# Events.


@given(st.integers(0, 10**9 - 1), st.integers(0, 10**9 - 1), st.integers(0, 10**15 - 1))
def test_a_cursor_comes_back(takes, segments, log):
    assert Cursor.of(str(Cursor(takes, segments, log))) == Cursor(takes, segments, log)


@given(st.text(max_size=30))
def test_any_other_id_is_the_beginning(text):
    assert Cursor.of(text) in (Cursor(), Cursor.of(text.strip()))


def test_a_reader_knows_nothing_twice_but_what_was_replaced():
    manifest = manifest_of(3, takes=[Take(1, 1, 5)])
    assert Cursor(0, 3, 0).next_in(manifest) == 1
    assert Cursor(1, 1, 0).next_in(manifest) == 1
    assert Cursor(0, 0, 0).next_in(manifest) == 0
    assert Cursor(9, 2, 0).next_in(manifest) == 2


def test_nothing_more_comes_of_a_run_that_has_ended():
    manifest = manifest_of(3, end=("done",))
    assert nothing_more(manifest, Cursor(0, 3, 0))
    assert not nothing_more(manifest, Cursor(0, 3))
    assert not nothing_more(manifest, Cursor(0, 2, 0))
    assert not nothing_more(manifest_of(3), Cursor(0, 3, 0))


@given(st.text(), st.text())
def test_a_message_is_one_event(name, text):
    lines = message("segment", {name: text}, Cursor(1, 2, 3)).decode().split("\n")
    assert (lines[:2], lines[3:]) == (["id: 1-2-3", "event: segment"], ["", ""])
    assert json.loads(lines[2].removeprefix("data: ")) == {name: text}
