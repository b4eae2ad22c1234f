"""`edit-ray plan` says beforehand what a run then does, from the model's JSON files alone."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edit_ray.cli import main
from edit_ray.cli.plan_reuse import lines
from edit_ray.cli.reuse_estimate import DISK_TO_HOST, HOST_TO_GPU, ReuseEstimate, what_does_not_fit
from edit_ray.config import Config, dump_yaml, load_config
from edit_ray.engine.loading import load_pipeline
from edit_ray.engine.segment import SegmentEngine
from edit_ray.testing import save_random_wan
from tests.unit.test_actors_reuse import RESIDUAL, SEGMENTS, config_for, generate

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
TINY = "configs/tiny.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("model") / "wan", num_layers=4)


def changed(config, **sections):
    values = config.model_dump(mode="json")
    return Config.model_validate(
        {name: value | sections.get(name, {}) for name, value in values.items() if isinstance(value, dict)}
        | {"prompt_segments": values["prompt_segments"]}
    )


def counts_of(plan):
    return [(len(segment.writes), len(segment.reads)) for segment in plan.segments]


def said(capsys, *arguments, config=TINY):
    code = main(["plan", "--config", str(config), *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("granularity", "disk"), [("stack", None), (2, None), (2, 12 * 4096), (2, 8 * 4096)])
def test_a_run_writes_and_reads_what_the_plan_says(tmp_path, model, granularity, disk):
    config = changed(config_for(model, 2, granularity), store={"disk_bytes": disk})
    estimate = ReuseEstimate(config)
    assert (estimate.size, estimate.shape) == (RESIDUAL, (1, 8, 24))
    records = asyncio.run(generate(tmp_path, config, "run"))
    ran = [(r.statistics["entries_written"], r.statistics["entries_read"]) for r in records]
    assert ran == counts_of(estimate.plan)
    skipped = sum(read for _, read in ran)
    units = {"stack": 1, 2: 2}[granularity]
    # fbcache's first block of each unit runs always: of 4 blocks a stack leaves out 3, a group of 2 one.
    assert estimate.saved == skipped * {"stack": 3 / 4, 2: 1 / 4}[granularity]
    assert estimate.forwards == SEGMENTS * 6 * 2
    assert estimate.needed_bytes == 3 * 2 * units * 4096
    assert estimate.live_bytes == max(map(sum, ran)) * 4096 == min(estimate.needed_bytes, disk or 2**40)


@pytest.mark.parametrize("boundary", [None, 0.97, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_is_the_engines_own(tmp_path, boundary, dtype):
    folder = save_random_wan(tmp_path / "wan", two_experts=boundary is not None, boundary_ratio=boundary, num_layers=3)
    wanted = config_for(folder, granularity=2, inner="teacache", wan_variant="t2v-1.3B", warm_steps=5)
    config = changed(
        wanted,
        model={"torch_dtype": dtype},
        sampling={"guidance_scale": 1.0, "flow_shift": 5.0},
    )
    estimate = ReuseEstimate(config)
    engine = SegmentEngine(load_pipeline(config.model))
    for budget in (None, 4 * estimate.size):
        config = changed(config, store={"disk_bytes": budget})
        estimate = ReuseEstimate(config)
        reuse = engine.plan_reuse("", config.num_segments, config.cache, config.sampling, budget)
        assert (reuse.form.shape, reuse.form.size) == (estimate.shape, estimate.size)
        assert reuse.plan == estimate.plan
        assert bool(estimate.plan.computed) == (budget is not None)
    if boundary:
        assert {key.expert for key in estimate.plan.uses()} | {slot.expert for slot in estimate.plan.computed} == {
            "transformer",
            "transformer_2",
        }


def test_of_a_causal_run_it_says_the_kv_and_what_is_computed_again(tmp_path, capsys):
    folder = save_random_wan(tmp_path / "wan", causal={"window": 12, "sink": 3})
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {folder}}}\nvideo: {{num_segments: 2}}\nsampling: {{height: 32, width: 32}}\n"
        "continuity: {mode: causal}\nprompt_segments: [{segment: 0, prompt: a red circle}]\n"
    )
    _, out, _ = said(capsys, config=tmp_path / "run.yaml")
    assert out.splitlines()[:2] == [
        "K/V       4.608 kB a chunk of 3 latents, 18.43 kB in a window of 12, 9.216 kB of rotated keys",
        "recache   a segment of 7 chunks takes 35 forwards of a chunk, and before them up to 4",
    ]
    assert "card  weights  K/V  residuals" in out
    assert all(len(line) <= 100 for line in out.splitlines())
    _, out, _ = said(capsys, "--set", "continuity.rope=absolute", "--card", "0.001", config=tmp_path / "run.yaml")
    assert "in a window of 12\n" in out
    assert "too small; a smaller continuity.window needs less" in out
    _, out, _ = said(capsys, "--set", "continuity.kv=commit", config=tmp_path / "run.yaml")
    assert out.splitlines()[1] == "commit    a segment reads up to 18.43 kB of K/V, and writes up to 18.43 kB"


def test_every_choice_is_what_a_run_so_configured_would_do(model):
    estimate = ReuseEstimate(config_for(model, granularity="stack", inner="teacache", wan_variant="t2v-1.3B"))
    assert {(c.granularity, c.window) for c in estimate.choices()} == {
        (granularity, window) for granularity in ("stack", "per_block") for window in (1, 2, 3, 4)
    }
    for choice in estimate.choices():
        config = config_for(
            model, granularity=choice.granularity, reuse_window=choice.window, inner="teacache", wan_variant="t2v-1.3B"
        )
        other = ReuseEstimate(config)
        counts = counts_of(other.plan)
        assert choice.entries == max(map(sum, counts))
        assert (choice.live_bytes, choice.saved) == (other.live_bytes, other.saved)
        assert choice.written_bytes == sum(writes for writes, _ in counts) * RESIDUAL
        assert choice.read_bytes == sum(reads for _, reads in counts) * RESIDUAL


def test_a_granularity_without_meaning_for_the_policy_is_no_choice(model):
    assert {c.granularity for c in ReuseEstimate(config_for(model, granularity=2)).choices()} == {"stack", 2}


@pytest.mark.parametrize(("host", "hits"), [(2, 0), (8, 16), (12, 48)])
def test_the_reads_are_simulated_by_the_stores_own_planner(model, host, hits):
    """Four segments read 12 residuals each: none is left in memory in 2 slots, all are in 12."""
    estimate = ReuseEstimate(config_for(model, host, granularity=2))
    assert estimate.simulated() == (hits, 48 - hits)


def test_only_so_many_accesses_are_simulated(model, monkeypatch):
    monkeypatch.setattr("edit_ray.cli.reuse_estimate.MAX_ACCESSES", 60)
    config = changed(config_for(model), video={"num_segments": 50})
    estimate = ReuseEstimate(config)
    assert estimate.simulated_segments == 10
    assert sum(estimate.simulated()) == 6 * 7, "the segments 0, 4 and 8 write"
    assert "segments 0 to 9" in "\n".join(lines(config, estimate, None))


def test_what_is_said_of_the_small_configuration(capsys):
    code, out, err = said(capsys)
    assert (code, err) == (0, "")
    assert "576 tokens of width 192" in out
    assert "residual  442,368 bytes (442.4 kB)" in out
    assert "segment   0: writes 4 residuals (1.769 MB" in out
    assert "segment   1, 2: reads 4 residuals (1.769 MB)" in out
    assert "capacity (store.disk_bytes): unlimited" in out
    assert "computed  none: all residuals fit" in out
    table = [line.split() for line in out.splitlines()]
    assert ["4", "2", "4", "1.769", "MB", "1.769", "MB", "3.539", "MB", "3", "configured"] in table
    assert ["stack", "4", "2", "884.7", "kB", "884.7", "kB", "2.654", "MB", "5.25"] in table
    moving = 8 * 442_368 * (1 / DISK_TO_HOST + 1 / HOST_TO_GPU)
    assert f"reads     0 from the host tier, 8 from disk; prefetch has {moving:.4g} s to hide" in out
    assert "one forward: unknown" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_what_does_not_fit_is_said_with_what_it_would_need(capsys):
    code, out, _ = said(capsys, "--set", "store.disk_bytes=1MB", "--forward-ms", "20", "--set", "model.device=cpu")
    assert code == 0
    assert "computed  2 residuals (884.7 kB) do not fit" in out
    # Two units of 8 blocks in two, whose probe runs anyhow: 2 x 3/8 of a forward.
    assert "0.015 s in each that would have reused them; all of them need 1,769,472 bytes" in out
    assert "1.5 of the run's 240 forwards, 0.03 s" in out
    assert "one forward: 20 ms" in out
    assert "host to GPU" not in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_a_run_says_before_it_starts_what_does_not_fit():
    assert what_does_not_fit(load_config(Path(TINY))) is None
    assert what_does_not_fit(load_config(Path(TINY), ["store.disk_bytes=1GiB"])) is None
    assert what_does_not_fit(load_config(Path(TINY), ["store.disk_bytes=1MB"])) == (
        "2 residuals (884,736 bytes) do not fit into store.disk_bytes, 1,000,000: every segment computes them; "
        "all of them need 1,769,472 bytes"
    )


def test_seconds_are_known_only_of_what_was_measured(tmp_path, capsys):
    folder = save_random_wan(tmp_path / "wan")
    sizes = folder / "transformer" / "config.json"
    large = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30}
    sizes.write_text(json.dumps(json.loads(sizes.read_text()) | large))
    base = changed(
        config_for(folder, 2**18, inner="teacache", wan_variant="t2v-1.3B"),
        model={"torch_dtype": "bfloat16"},
        sampling={"height": 480, "width": 832, "num_frames": 33},
    )
    path = tmp_path / "run.yaml"
    for config, known in (
        (base, True),
        (changed(base, sampling={"height": 464}), False),
        (changed(base, model={"torch_dtype": "float32"}), False),
        (changed(base, model={"device": "cpu"}), False),
    ):
        path.write_text(dump_yaml(config))
        code, out, _ = said(capsys, config=path)
        assert code == 0
        assert ("one forward: 181.6 ms" in out) == known
        assert ("43,130,880 bytes (43.13 MB): 14,040 tokens" in out) == (known or config.model.device == "cpu")


def test_a_run_without_reuse_says_so_and_what_fits(tmp_path, capsys, model):
    config = config_for(model).model_dump(mode="json") | {"cache": {"policy": "fbcache"}}
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(Config.model_validate(config)))
    code, out, _ = said(capsys, config=path)
    assert code == 0
    assert out.startswith("cache.reuse_window is 0: no segment of this run reuses residuals of another.\nsteps     6 a")
    assert "\n\nOn a card, GB" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--forward-ms", "0"], "--forward-ms is 0; it must be"),
        (["--card", "12", "0"], "--card is 12 0; it must be gigabytes above 0"),
        (["--forward-ms", "nan"], "--forward-ms is nan; it must be"),
        (["--set", "cache.granularity=99"], "cache.granularity is 99; it must be 'stack', 'per_block' or a group size"),
        (["--set", "store.host_bytes=400kB"], "store.host_bytes is 400000; one residual of this run has 442368 bytes"),
        (["--set", "cache.reuse_windows=1"], "cache.reuse_windows"),
        (["--set", "model.path=/nowhere"], "'/nowhere'"),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments, sentence):
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_a_damaged_noise_scheduler_of_two_experts_is_said(tmp_path, capsys):
    folder = save_random_wan(tmp_path / "wan", two_experts=True)
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config_for(folder)))
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "NoSuchScheduler"}')
    code, _, err = said(capsys, config=path)
    assert code == 2
    assert "noise scheduler that cannot be made" in err


def test_the_command_loads_neither_torch_nor_ray():
    code = (
        "import sys\nfrom edit_ray.cli import main\n"
        f"assert main(['plan', '--config', {TINY!r}]) == 0\n"
        "assert not {'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert torch  # this process has loaded it, the other has not
