"""The reuse benchmark: which steps its settings skip, its verdicts by hand, and all of it once, at a toy size."""

import json
import sys

import pytest

from benchmarks import reuse
from benchmarks.long_videos import load
from benchmarks.reuse import Warm, settings, thresholds_by_skips, work
from benchmarks.reuse_report import differences, verdicts
from edit_ray.tiers.reuse_plan import make_reuse_plan

pytestmark = pytest.mark.usefixtures("one_thread")
ALIGNED = [setting for setting in settings() if setting.align == "step"]


@pytest.mark.parametrize("setting", ALIGNED, ids=lambda setting: setting.name)
def test_skips_are_those_of_the_reuse_plan(setting):
    model = {"experts": ["transformer"] * 30, "unit_bytes": {"transformer": [1]}, "branches": ("cond",)}
    plan = make_reuse_plan("run", 8, window=setting.window, warm_steps=setting.warm_steps, **model)
    assert setting.skips(8) == tuple(len({read.step for read in segment.reads}) for segment in plan.segments)


def test_every_setting_has_its_teacache():
    todo = list(work(("warm_start", "history"), settings(), 8))
    assert len(settings()) == 12 + 20
    assert len(todo) == 2 * (1 + 32 + 16)
    for mode in ("warm_start", "history"):
        skips = [what for of, what in todo if of == mode and isinstance(what, tuple)]
        assert {what.skips(8) for of, what in todo if of == mode and isinstance(what, Warm)} == set(skips)


def test_thresholds_skip_as_many_steps_as_they_are_for():
    pipe = load("builtin:tiny_wan", "cpu")
    thresholds = thresholds_by_skips(pipe, 30, 2)
    for wanted, threshold in enumerate(thresholds):
        masks = pipe.enable_cache("teacache", 30, rel_l1_thresh=threshold).plan().values()
        pipe.disable_cache()
        assert sum(not computes for mask in masks for computes in mask) == 2 * wanted


def found(kind, psnr, skips=(0, 1), align=None, mode="history"):
    setting = {} if align is None else {"setting": {"align": align}}
    return {"mode": mode, "kind": kind, "skips": list(skips), "psnr": psnr, "name": f"{kind} {align}", **setting}


def test_verdicts_compare_equal_blocks_of_the_same_mode():
    measured = [
        found("teacache", [30.0, 40.0]),
        found("teacache", [10.0, 20.0], skips=(0, 2)),
        found("teacache", [0.0, 0.0], mode="warm_start"),
        found("warm", [31.0, 41.0], align="step"),
        found("warm", [9.0, 19.0], skips=(0, 2), align="last"),
    ]
    assert differences(measured[3], measured) == [1, 1]
    step, last = verdicts(measured)
    assert "1 of 1 settings above" in step
    assert "wins: +1.00 dB (+1.00 to +1.00)" in step
    assert "0 of 1 settings above" in last
    assert "loses: -1.00 dB" in last


@pytest.mark.slow
def test_all_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reuse, "QUICK", reuse.QUICK | {"height": 32, "width": 32, "segments": 2})
    arguments = ["--quick", "--modes", "warm_start", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["reuse.py", *arguments])
    reuse.main()
    measured = json.loads((tmp_path / "results.json").read_text())["measured"]
    shares = {name["kind"]: name["share"] for name in measured}
    assert shares["uncached"] == 1
    assert [entry["share"] for entry in measured if entry["kind"] == "warm"] == [11 / 12, 10 / 12] * 3
    assert measured[0]["psnr"] == [100.0]
    assert all(0 < entry["psnr"][0] < 100 for entry in measured if entry["kind"] == "warm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "reuse.md", "reuse.png"]
    assert "settings above TeaCache" in capsys.readouterr().out
