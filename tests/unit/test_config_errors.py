"""Every row of bad input: one sentence with the place, the key, what was given and what is valid, and no traceback."""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edit_ray.config import load_config, strict_yaml
from edit_ray.errors import ConfigError

GOOD = """\
sampling: {num_frames: 33, fps: 16}
video: {num_segments: 4}
prompt_segments: [{start: 0s, prompt: a}]
"""


def problems_of(path: Path | None, overrides: Sequence[str] = ()) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, check_model=False)
    for problem in caught.value.problems:
        assert problem.isprintable(), problem
        assert "Traceback" not in problem
    return caught.value.problems


def problems_in(folder: Path, text: str | bytes, overrides: Sequence[str] = ()) -> tuple[str, ...]:
    path = folder / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = problems_of(path, overrides)
    assert all(problem.startswith((str(path), "--set ")) for problem in found), found
    return tuple(problem.removeprefix(str(path)) for problem in found)


# What is written over GOOD, and the words that the one sentence must have.
BAD_VALUES: list[tuple[str, tuple[str, ...]]] = [
    # unknown keys
    ("sampling.sed=7", ("sampling.sed", "unknown key", "did you mean sampling.seed?")),
    ("seed=7", ("seed", "unknown key", "did you mean sampling.seed?")),
    ("samplng.seed=7", ("samplng", "unknown key", "did you mean sampling?")),
    ("sampling.steps=7", ("sampling.steps", "unknown key", "did you mean sampling.num_inference_steps?")),
    ("video.fps=7", ("video.fps", "unknown key", "did you mean sampling.fps?")),
    ("output.qqqqq=7", ("output.qqqqq", "unknown key", "directory, crf, preset")),
    ("prompt_segments.0.promt=x", ("prompt_segments.0.promt", "unknown key", "prompt_segments.0.prompt?")),
    # wrong types
    ("sampling.height=tall", ("sampling.height is 'tall'", "a whole number from 16 to 4096")),
    ("sampling.height='128'", ("sampling.height is '128'", "a whole number from 16 to 4096")),
    ("sampling.height=128.5", ("sampling.height is 128.5", "a whole number")),
    ("sampling.height=true", ("sampling.height is true", "a whole number")),
    ("sampling.height=", ("sampling.height is empty (null)", "a whole number")),
    ("sampling.guidance_scale=true", ("sampling.guidance_scale is true", "a finite number from 0 to 100")),
    ("sampling.negative_prompt=3", ("sampling.negative_prompt is 3", "text of 0 to 2000 characters")),
    ("model.path=7", ("model.path is 7", "text of 1 to 1024 characters")),
    (
        "model=tiny",
        ("model is 'tiny'", "a mapping with the keys path, transformer, transformer_2, torch_dtype"),
    ),
    ("prompt_segments=a cat", ("prompt_segments is 'a cat'", "a list of 1 to 10000 entries")),
    ("prompt_segments.0=a cat", ("prompt_segments.0 is 'a cat'", "a mapping with the keys start, segment, prompt")),
    ("prompt_segments.0.start=3", ("prompt_segments.0.start is 3", "a duration with its unit, such as 6.5s")),
    ("prompt_segments.0.start=soon", ("prompt_segments.0.start is 'soon'", "a duration with its unit")),
    ("store.host_bytes=plenty", ("store.host_bytes is 'plenty'", "a number of bytes", "256MiB")),
    ("engine.cpu_threads=all", ("engine.cpu_threads is 'all'", "a whole number from 1 to 1024")),
    # bad choices
    ("model.torch_dtype=float64", ("model.torch_dtype is 'float64'", "one of float32, bfloat16, float16")),
    ("model.device=tpu", ("model.device is 'tpu'", "one of auto, cpu, cuda")),
    ("model.offload=all", ("model.offload is 'all'", "one of none, text_encoder")),
    ("continuity.mode=overlay", ("continuity.mode is 'overlay'", "one of none, warm_start, history, overlap")),
    ("continuity.overlap_source=pixels", ("overlap_source is 'pixels'", "one of hybrid, latent, reencode")),
    ("continuity.picture_as=frame", ("continuity.picture_as is 'frame'", "one of first_frame, still")),
    ("continuity.adain=0.3", ("continuity.adain is 0.3", "from 0 to 0.25")),
    ("cache.policy=''", ("cache.policy is ''", "must be text of 1 to 200 characters")),
    ("cache.granularity=blocks", ("cache.granularity is 'blocks'", "must be stack, per_block, or a whole number")),
    ("output.preset=quick", ("output.preset is 'quick'", "one of ultrafast, superfast")),
    # out of range
    ("sampling.num_inference_steps=0", ("sampling.num_inference_steps is 0", "from 1 to 1000")),
    ("sampling.num_inference_steps=1001", ("sampling.num_inference_steps is 1001", "from 1 to 1000")),
    ("video.num_segments=0", ("video.num_segments is 0", "from 1 to 100000")),
    ("video.num_segments=100001", ("video.num_segments is 100001", "from 1 to 100000")),
    ("video.num_segments=" + "9" * 90, ("video.num_segments is 9999", "90 digits", "from 1 to 100000")),
    ("video.num_segments=" + "9" * 9000, ("video.num_segments is", "from 1 to 100000")),
    ("sampling.height=0", ("sampling.height is 0", "from 16 to 4096")),
    ("sampling.seed=-1", ("sampling.seed is -1", "at least 0 and below 9223372036854775808")),
    ("sampling.fps=1000", ("sampling.fps is 1000", "from 1 to 120")),
    ("sampling.flow_shift=0", ("sampling.flow_shift is 0", "above 0 and at most 100")),
    ("output.crf=52", ("output.crf is 52", "from 0 to 51")),
    ("store.host_bytes=2000TiB", ("store.host_bytes is '2000TiB'", "a number of bytes from 0 to 1024TiB")),
    ("engine.idle_exit_s=-1", ("engine.idle_exit_s is -1", "from 0 to 604800")),
    # not finite
    ("sampling.guidance_scale=.nan", ("sampling.guidance_scale is nan", "a finite number")),
    ("sampling.guidance_scale=.inf", ("sampling.guidance_scale is inf", "a finite number")),
    ("sampling.flow_shift=1e999", ("sampling.flow_shift is inf", "a finite number")),
    # frames
    ("sampling.num_frames=34", ("sampling.num_frames is 34", "must be 4k+1", "33 or 37")),
    ("sampling.num_frames=0", ("sampling.num_frames is 0", "from 1 to 1025")),
    # prompts
    ("prompt_segments.0.prompt=''", ("prompt_segments.0.prompt is ''", "1 to 2000 characters that is not blank")),
    ("prompt_segments.0.prompt='  '", ("prompt_segments.0.prompt is '  '", "not blank")),
    ("prompt_segments.0.prompt=" + "x" * 2001, ("prompt_segments.0.prompt", "(2001 characters)", "1 to 2000")),
    # storyboard
    ("prompt_segments.0.start=1s", ("prompt_segments.0.start is 1s", "first prompt must start at 0s")),
    ("prompt_segments.0.segment=0", ("prompt_segments.0 has both start and segment", "one of them")),
    ("prompt_segments.0.start=null", ("prompt_segments.0 has neither start nor segment", "one of them")),
    ("video.duration=5s", ("video has both num_segments and duration", "one of them")),
    # options that are none
    ("sampling.seed", ("sampling.seed", "must be KEY=VALUE")),
    ("=3", ("=3", "must be KEY=VALUE")),
    ("sampling..seed=3", ("sampling..seed", "must be KEY=VALUE")),
    ("sampling.fps.x=3", ("sampling.fps has no keys below it",)),
    ("prompt_segments.7.prompt=x", ("prompt_segments is a list", "0 to 1")),
    ("sampling.negative_prompt='x", ("the quotes do not enclose",)),
    ('sampling.negative_prompt="\\UFFFFFFFF"', ("the quotes do not enclose",)),
]


def with_prompts(*entries: str) -> str:
    return GOOD.replace("[{start: 0s, prompt: a}]", "".join(f"\n  - {{{entry}}}" for entry in entries))


# Where each prompt begins.
STORYBOARDS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("start: 0s", "start: 5s", "start: 3s"), (":6:", "2.start is 3s", "the 5s of")),
    (("segment: 0", "segment: 2", "segment: 1"), ("2.segment is segment 1", "order")),
    (("start: 0s", "segment: 2", "start: 3s"), ("2.start is 3s", "segment 2", "order")),
    (("segment: 0", "start: 2s"), ("1.start is 2s, in segment 0", "ends at 2.0625s")),
    (("segment: 0", "segment: 0"), ("1.segment is segment 0, in segment 0", "of its own")),
    (("segment: 0", "segment: 4"), ("1.segment is segment 4", "beyond the end", "4 segments")),
    (("start: 0s", "start: 8.25s"), ("1.start is 8.25s", "beyond the end", "last 8.25s")),
    (("segment: 1",), ("0.segment is segment 1", "must start at 0s or at segment 0")),
]

HISTORY, OVERLAP = (f"continuity.mode={mode} continuity.history_latents=9" for mode in ("history", "overlap"))
REUSE = "cache.policy=warmstart_reuse cache.inner=always cache.reuse_window=1"
LONG = "video.num_segments=null sampling.num_frames=1 sampling.fps=120 video.duration=7h"
HUGE = "sampling.height=4096 sampling.width=4096 sampling.num_frames=1025"
# Options that are each valid alone, and words of the sentence.
TOGETHER: list[tuple[str, tuple[str, ...]]] = [
    (HISTORY, ("continuity.history_latents is 9", "less than the 9 latents", "33 frames")),
    (OVERLAP, ("continuity.history_latents is 9", "less than the 9 latents")),
    ("continuity.mode=warm_start", ("continuity.mode is 'warm_start'", "cache.reuse_window of 1 or more")),
    ("continuity.adain=0.1 continuity.mode=none", ("continuity.adain is 0.1", "0 where continuity.mode is none")),
    (HUGE, ("sampling.num_frames is 1025 at 4096x4096", "at most 2147483648")),
    ("video.num_segments=100000 sampling.num_frames=1025", ("100000", "102500000 frames", "at most 10000000")),
    (LONG, ("video.duration is 25200s", "3024000 segments", "at most 100000")),
    ("video.num_segments=null video.duration=0s", ("video.duration is '0s'", "above 0s")),
    ("video.num_segments=null video.duration=9", ("video.duration is 9", "with its unit")),
    ("video.num_segments=null video.duration=169h", ("video.duration is '169h'", "at most 7 days")),
    (f"video.num_segments=null {REUSE}", ("video.num_segments is null", "must have the window 0")),
    ("engine.cfg_parallel=true model.device=cpu", ("engine.cfg_parallel is true", "needs two GPUs")),
    (
        "engine.cfg_parallel=true model.device=cuda cache.policy=always cache.cfg_gate=0.5",
        ("cache.cfg_gate is 0.5 and engine.cfg_parallel true", "two GPUs compute both at once"),
    ),
    (f"{REUSE} cache.warm_steps=2 cache.cfg_gate=0", ("cache.cfg_gate is 0,", "before the end of the 2 warm steps")),
    (f"engine.cfg_parallel=true {REUSE}", ("engine.cfg_parallel is true", "with two GPUs it must be 0")),
    (f"prompt_segments.0.guidance_scale=1.0 {REUSE}", ("guidance_scale is 1", "both must be above 1 or neither")),
    ("engine.fp8=true engine.mode=exact", ("engine.fp8 is true and engine.mode exact",)),
]


MISTAKES = [
    *((GOOD, [override], words) for override, words in BAD_VALUES),
    *((with_prompts(*(f"{start}, prompt: a" for start in starts)), [], words) for starts, words in STORYBOARDS),
    *((GOOD, overrides.split(), words) for overrides, words in TOGETHER),
    ("video: {}\nprompt_segments: [{segment: 0, prompt: a}]\n", [], ("video has neither num_segments nor duration",)),
]


@pytest.mark.parametrize(("text", "overrides", "words"), MISTAKES, ids=lambda value: str(value)[:50])
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, overrides: Sequence[str], words: Sequence[str]) -> None:
    (problem,) = problems_in(tmp_path, text, overrides)
    if len(overrides) == 1:
        assert problem.startswith((f"--set {overrides[0][:90]}", ":2: video has", ":3: prompt_segments.0 has"))
    assert len(problem) < 420
    assert [word for word in words if word not in problem] == []


# The text of a file, the line that is named, and words of the sentence.
FILES: list[tuple[str | bytes, str, str]] = [
    (GOOD + "video: {num_segments: 4}\n", ":4:", "video is given twice, first in line 2"),
    (GOOD.replace("fps: 16", "fps: 16, fps: 17"), ":1:", "sampling.fps is given twice"),
    (GOOD.replace("fps: 16", "fps: !!python/object/apply:os.system [ls]"), ":1:", "!!python/object/apply:os.system"),
    (GOOD.replace("prompt: a", "prompt: !!str a"), ":3:", "prompt_segments.0.prompt has the tag !!str"),
    (GOOD.replace("prompt: a", "prompt: !x a"), ":3:", "tag !x; tags are not allowed"),
    (GOOD.replace("fps: 16", "fps: &f 16"), ":1:", "sampling.fps has the anchor &f"),
    (GOOD + "---\nvideo: {}\n", ":4:", "a second YAML document"),
    (GOOD + "output: {preset: 'fast}\n", "", "not valid YAML"),
    (GOOD + "\tcache: {}\n", ":4:", "not valid YAML"),
    ("video: [\n", ":2:", "not valid YAML"),
    ("[a] b\n", ":1:", "not valid YAML"),
    ("", "", "this is empty"),
    ("# nothing but a comment\n", "", "this is empty"),
    ("null\n", "", "this is empty"),
    ("[1, 2]\n", "", "a list of 2; it must be a mapping with the keys model, sampling"),
    ("just text\n", "", "'just text'; it must be a mapping"),
    (GOOD + "[a, b]: 3\n", ":4:", "is not plain text"),
    (GOOD + 'output: {directory: "\\ud800"}\n', ":4:", "surrogate"),
    (b"\x00\x01\x02\x03", "", "not valid YAML text: special characters are not allowed"),
    (b"\x89PNG\r\n\x1a\n\x00", "", "byte 0 is not UTF-8"),
    (GOOD.encode("utf-16"), "", "byte 0 is not UTF-8"),
    (b"#" * (2**20 + 1), "", "larger than the 1048576 bytes"),
    ("a: " + "[" * 500_000, ":1:", "nested deeper than 16 levels"),
    ("[" + "0," * 5000 + "]", ":1:", "of over 4000 values"),
]


@pytest.mark.parametrize(("content", "line", "words"), FILES, ids=lambda value: repr(value)[:40])
def test_a_bad_file_is_named_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes, line: str, words: str
) -> None:
    assert strict_yaml.MAX_NODES == 60_000
    monkeypatch.setattr(strict_yaml, "MAX_NODES", 4000)  # reading 60,000 takes seconds
    began = time.monotonic()
    problems = problems_in(tmp_path, content)
    assert time.monotonic() - began < 30
    matching = [problem for problem in problems if words in problem]
    assert len(matching) == 1, problems
    assert matching[0].startswith(line or ":")


def test_aliases_are_refused_before_they_multiply(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 12)]
    problems = problems_in(tmp_path, "\n".join(lines))
    assert any("a1.0 is the alias *a0; aliases are not allowed" in problem for problem in problems)
    assert any("more mistakes" in problem for problem in problems)
    assert len(problems) == 101


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert problems_of(path, ["sampling.seed"]) == (
        f"{path}: there is no such file; it must be a YAML file.",
        "--set sampling.seed: it must be KEY=VALUE with a dotted key, such as sampling.seed=7.",
    )


AS_ANOTHER = pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", "this is a folder; it must be a YAML file."),
        ("pipe", "not a regular file"),  # and is not opened
        *((name, "cannot be read|a file name|no such file") for name in ("x" * 300, "loop", "nul\0l", "file/below")),
        ("\udc80", "no such file"),
        pytest.param("secret", "cannot be read: Permission denied", marks=AS_ANOTHER),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, words: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    (tmp_path / "secret").touch(mode=0)
    (problem,) = problems_of(tmp_path / name)
    assert str(tmp_path) in problem
    assert re.search(words, problem)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = """\
model: {torch_dtype: half, pth: x}
sampling:
  height: tall
  num_frames: 34
  num_inference_steps: 0
  seed: 1
  seed: 2
video: {num_segments: 3}
prompt_segments:
  - {start: 0s, prompt: ""}
  - {start: 7s, prompt: b, foo: 1}
  - {start: 5s, prompt: c}
continuity: {mode: history, history_latents: 99}
"""
    expected = {
        ":1: model.torch_dtype is 'half'",
        ":1: model.pth is an unknown key",
        ":3: sampling.height is 'tall'",
        ":4: sampling.num_frames is 34",
        ":5: sampling.num_inference_steps is 0",
        ":7: sampling.seed is given twice",
        ":10: prompt_segments.0.prompt is ''",
        ":11: prompt_segments.1.foo is an unknown key",
        ":12: prompt_segments.2.start is 5s, before the 7s",
        ":13: continuity.history_latents is 99",
        "--set output.crf=99: output.crf is 99",
        "--set nonsense: it must be KEY=VALUE",
    }
    problems = problems_in(tmp_path, text, ["output.crf=99", "nonsense"])
    assert len(problems) == len(expected), problems
    for words in expected:
        assert any(problem.startswith(words) for problem in problems), words


def test_no_mistake_is_invented_from_a_wrong_value(tmp_path: Path) -> None:
    # With the default of 33 frames, or with one segment, the second prompt would be out of place.
    text = """\
sampling: {num_frames: 1000000}
video: {num_segments: many}
prompt_segments: [{segment: 0, prompt: a}, {start: 1s, prompt: b}, {segment: 900, prompt: c}]
continuity: {mode: histry, history_latents: 20}
"""
    problems = problems_in(tmp_path, text)
    assert [problem.split(" is ")[0] for problem in problems] == [
        ":1: sampling.num_frames",
        ":2: video.num_segments",
        ":4: continuity.mode",
    ]


def test_nothing_at_all_says_what_is_needed() -> None:
    assert problems_of(None) == (
        "(no file): video is missing; it must be a mapping with the keys num_segments, duration, approve.",
        "(no file): prompt_segments is missing; it must be a list of 1 to 10000 entries such as "
        "{start: 0s, prompt: …} or {segment: 0, prompt: …}.",
    )


def test_thousands_of_mistakes_are_counted_not_listed(tmp_path: Path) -> None:
    problems = problems_in(tmp_path, with_prompts(*["segment: 0, prompt: a"] * 1000))
    assert len(problems) == 101
    assert "899 more mistakes" in problems[-1]


# Whatever else a configuration holds: it is understood, or refused in sentences that any terminal can print.

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
keys = st.sampled_from(["model", "sampling", "prompt_segments", "num_segments", "start", "path", "mode", "0", "1", "x"])


@fuzz
@given(st.binary(max_size=200) | st.text("ab:- \n{}[]&*!|>'\"%#?,\\0u\t", max_size=60).map(str.encode))
def test_random_bytes_and_yaml_are_refused_in_words(tmp_path: Path, content: bytes) -> None:
    assert problems_in(tmp_path, content)


@fuzz
@given(st.lists(st.tuples(st.lists(keys, max_size=4), st.text(max_size=9)), max_size=4))
def test_random_options_raise_nothing_else(tmp_path: Path, options: list[tuple[list[str], str]]) -> None:
    nonsense = [f"{'.'.join(key)}={value}" for key, value in options]
    problems_in(tmp_path, GOOD, [*nonsense, "no option"])
