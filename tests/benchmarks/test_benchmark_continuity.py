"""The continuity benchmark: its verdicts by hand, and all of it once, at a toy size."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import continuity
from benchmarks.continuity_report import verdicts
from benchmarks.long_videos import Maker, Seams, Task, load
from edit_ray.engine.options import ContinuityOptions
from edit_ray.engine.segment import SegmentEngine
from edit_ray.runs.run_plan import FrameLayout, segment_seed
from edit_ray.testing import save_random_wan
from tests.parity.test_continuity_parity import make

SMALL = Task(prompt="a red circle", seeds=2, segments=3, height=32, width=32, num_frames=33, num_inference_steps=2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("wan"), expand_timesteps=True)


def variant(name, *joins, interior=1.0):
    """One join a seed."""
    return {"name": name, "seeds": [{"joins": [join], "interior": [interior]} for join in joins]}


def test_bars_are_met_or_not():
    for history, overlap, said in (((1.0, 1.5), (3.0, 3.0), "met"), ((2.0, 1.0), (1.0, 4.1), "NOT MET")):
        measured = [variant("none", 4.0, 4.0), variant("history", *history), variant("overlap, latent", *overlap)]
        assert [line.split(":")[0] for line in verdicts(measured)] == [said] * 3
    assert "lower for 1 of 2 seeds" in verdicts(measured)[-1]
    assert verdicts([variant("none", 4.0)]) == [], "nothing is said of what was not measured"


def test_a_seam_shows_at_joins_and_nowhere_else():
    rows = np.arange(32)
    frames = np.stack([np.broadcast_to((rows + t) * 2 % 256, (32, 32)) for t in range(75)]).astype(np.uint8)
    frames = np.repeat(frames[..., None], 3, axis=-1)
    layout = FrameLayout(33, 3, 16)
    smooth = Seams.of(frames[: layout.total_frames(2)], layout, 2)
    frames = frames[: layout.total_frames(2)].copy()
    frames[33:] = 255 - frames[33:]
    cut = Seams.of(frames, layout, 2)
    assert len(smooth.joins) == len(cut.joins) == 1
    assert len(smooth.interior) == (33 - 16 + 1) + (24 - 16 + 1)
    assert cut.joins[0] > 3 > smooth.joins[0]
    assert smooth.interior == pytest.approx(cut.interior, abs=1e-4)
    assert cut.color_drift[0] == 0
    assert cut.color_drift[1] > smooth.color_drift[1]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mode", ["none", "history", "overlap", "image"])
def test_videos_are_those_of_runs(model, mode):
    """Segment by segment, all seeds at once: what the engine makes of one seed, but for the batch's rounding."""
    options = ContinuityOptions(mode=mode)
    made = Maker(load(str(model), "cpu"), SMALL).make(options)
    layout = SMALL.layout(options)
    assert made.frames.shape == (2, layout.total_frames(3), 32, 32, 3)
    assert made.blocks == 3 * 2 * 2 * 2, "segments, steps, branches, blocks"
    engine, first = SegmentEngine(load(str(model), "cpu")), SMALL.first_seed + 1
    frames = make(engine, options, [], 3, sampling=SMALL.sampling, seed=partial(segment_seed, first))
    assert np.abs(made.frames[1].astype(int) - torch.cat(frames).numpy()).max() <= 1


@pytest.mark.slow
def test_all_of_it(model, tmp_path, monkeypatch, capsys):
    asked = ["--model", str(model), "--prompt", "a red circle", "--modes", "none; history, adain 0.25", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["continuity.py", "--quick", "--output", str(tmp_path / "out"), *asked])
    continuity.main()
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [found["name"] for found in content["variants"]] == ["none", "history, adain 0.25"]
    assert content["task"]["segments"] == 3
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"continuity.md", "continuity.png", "joins.png", "results.json"}
    with Image.open(tmp_path / "out" / "joins.png") as sheet:
        assert sheet.height == 2 * (64 + 4)
    assert "joins / inside" in capsys.readouterr().out
