"""The GPU benchmarks: their masks, what a failing row leaves of the others, and all of them once, at a toy size."""

import argparse
import json
import re
import sys

import numpy as np
import pytest
import torch

from benchmarks import causal, causal_windows, gpu_page, long_video, memory_bound, skip_cost, wan_table
from benchmarks.gpu_results import LeftOut, Results, write_report
from benchmarks.real_size import TASKS, mask_of
from benchmarks.stand_in_ffmpeg import use_stand_in
from benchmarks.wan_table import never_skipping
from edit_ray.cache.policies import POLICIES
from edit_ray.video.encode import OutputOptions, encode, join, read_frames
from edit_ray.video.fragments import split


def test_a_mask_skips_as_many_steps_as_it_is_told_and_never_the_first_or_the_last():
    for skipped in range(29):
        mask = mask_of(30, skipped)
        assert (len(mask), mask.count(False), mask[0], mask[-1]) == (30, skipped, True, True)
    for skipped in (-1, 29):
        with pytest.raises(ValueError, match="cannot be skipped"):
            mask_of(30, skipped)


def test_every_policy_is_compared_where_it_never_skips():
    own = {name for name in POLICIES.names() if POLICIES.find(name).__module__.startswith("edit_ray.")}
    assert set(never_skipping(3)) == own, "other tests may have registered more"


@pytest.fixture
def results(tmp_path):
    args = argparse.Namespace(output=tmp_path / "out", device="cpu", seconds=60.0)
    return Results(args, TASKS["tiny"].told(), figure="seconds")


def written(results):
    return json.loads((results.folder / "results.json").read_text())


def test_a_row_that_fails_loses_nothing_of_the_others(results, capsys):
    with results.row("one") as figures:
        figures["seconds"] = 1.0
    with results.row("two") as figures:
        raise RuntimeError("no such\nthing")
    with results.row("three") as figures:
        raise LeftOut("not here")
    with results.row("one") as figures:  # goes on
        figures["times"] = 2
    content = written(results)
    assert content["rows"] == [{"name": "one", "seconds": 1.0, "times": 2}]
    assert content["left_out"] == [
        {"name": "two", "why": "RuntimeError: no such"},
        {"name": "three", "why": "not here"},
    ]
    assert results.of("two") == {}


def test_no_row_is_begun_when_the_time_is_over(results):
    assert results.time_for("one")
    results._seconds = -1.0
    assert not results.time_for("two")
    assert [left["name"] for left in written(results)["left_out"]] == ["two"]


def test_bars_are_said_whatever_came_of_them(results):
    with results.row("one") as figures:
        figures["seconds"] = 1.0
    results.bar("a", 0.5, most=1.0)
    results.bar("b", 0.5, least=1.0)
    results.bar("c", None, most=1.0)
    results.bar("a", 1.5, most=1.0)  # the same again
    assert [(bar["what"], bar["met"]) for bar in written(results)["bars"]] == [("b", False), ("c", None), ("a", False)]
    write_report(results.folder)
    said = (results.folder / "results.md").read_text()
    assert said.count("missed") == 2
    assert "not measured" in said
    assert (results.folder / "results.png").exists()


def test_without_ffmpeg_frames_go_through_the_stand_in_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "")
    use_stand_in(tmp_path)
    frames = np.arange(3 * 16 * 32 * 3, dtype=np.uint8).reshape(3, 16, 32, 3)
    init, fragment = split(encode(frames, fps=8, options=OutputOptions()))
    (tmp_path / "init").write_bytes(init)
    (tmp_path / "part").write_bytes(fragment)
    assert (read_frames(tmp_path / "part", height=16, width=32, init=tmp_path / "init") == frames).all()
    join(tmp_path / "init", [tmp_path / "part"] * 2, tmp_path / "all.mp4")
    assert (read_frames(tmp_path / "all.mp4", height=16, width=32) == np.concatenate([frames, frames])).all()


def test_the_page_and_the_table_are_those_of_the_results():
    readme = gpu_page.README.read_text()
    assert gpu_page.PAGE.read_text() == gpu_page.page(), "run benchmarks/gpu_page.py"
    assert gpu_page.BEGIN in readme
    assert gpu_page.filled(readme) == readme


def test_the_table_has_ours_and_what_was_not_run(tmp_path, monkeypatch, results):
    for name in ("ours, exact", "ours, exact, 17 skipped", "ours, fp8", "diffusers, no cache"):
        with results.row(name) as figures:
            figures.update(seconds=2.0, speedup=1.5, skipped=17, peak_GB=5.04)
    results.content["task"] |= {"num_inference_steps": 30, "real_weights": False}
    results.write()
    results.folder.rename(tmp_path / "wan_table")
    monkeypatch.setattr(gpu_page, "RESULTS", tmp_path)
    table = gpu_page.readme_table()
    assert "| exact, 17 skipped | 2.00 s | 1.50× | 57% | 5.0 GB |" in table
    assert "were not run" in table
    assert not re.search("fp8|diffusers", table)
    readme = f"a\n{gpu_page.BEGIN}\nold\n{gpu_page.END}\nb\n"
    assert gpu_page.filled(readme) == f"a\n{gpu_page.BEGIN}\n{table}{gpu_page.END}\nb\n"
    assert gpu_page.filled("no place") == "no place"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("benchmark", [wan_table, skip_cost, long_video, memory_bound, causal, causal_windows])
def test_all_of_it(benchmark, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    name = benchmark.__name__.rpartition(".")[2]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--device", "cpu", "--output", str(tmp_path / "out")])
    if benchmark is long_video:
        sys.argv += ["--directory", str(tmp_path / "tiers")]
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["benchmark"] == name
    whys = {left["why"] for left in content["left_out"]}
    assert all("not worth compiling" in why or "cache-dit is not installed" in why for why in whys)
    rows = {row["name"]: row for row in content["rows"]}
    if benchmark is wan_table:
        shares = {row["blocks"] for name, row in rows.items() if "6 skipped" in name and "DBCache" not in name}
        assert shares == {80, 80 + 12}, "all skip the same steps; the first block of FirstBlockCache runs in each"
        assert rows["latents equal diffusers'"]["differing"] is None
    if benchmark is causal_windows:
        assert any("latents are equal" in note for note in content["notes"])
        assert [row["loaded_gb"] > 0 for row in rows.values() if "loaded_gb" in row] == [False, True]
    if benchmark is memory_bound:
        assert all(row["equal"] for row in content["rows"] if "equal" in row)
